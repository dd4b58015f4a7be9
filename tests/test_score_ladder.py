"""The ladder of exact tests of trajectories from scores, the rungs that need draws or training: minutes each.

The rungs below these are in `test_diffusion_math.py`, by moment propagation. Chain of 65 states, smooth.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import pushforward as pf
from pushforward.problems import rotating_chain
from test_score_trajectory import exact_network

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:ScoreTrajectory. the held-out loss")]

ROWS = rotating_chain.STEPS + 1


def drawn(method, y, noise, draws):
    """Draws, flat, (draw, 130)."""
    tree = pf.infer(rotating_chain.model, method=method, y=y, noise=noise, draws=draws, progress=False)
    found = tree["posterior"]
    x = np.concatenate([found["x0"].to_numpy()[0][:, None], found["x"].to_numpy()[0]], 1)
    return x.reshape(draws, -1).astype(float)


def law(scenario, seed):
    """Data of a scenario, the noise, and the exact law given them."""
    known = rotating_chain.scenario(scenario)
    _, y = rotating_chain.simulate(jax.random.key(seed), scenario)
    return np.asarray(y), known.noise, rotating_chain.exact(np.asarray(y, float), noise=known.noise)


def distances(x, exact):
    """RMS of mean errors in sd, sd ratios, and KL of a Gaussian fitted to the draws, per dimension."""
    sd, mean = np.sqrt(np.diag(exact.covariance)), np.ravel(exact.mean)
    error, fitted = x.mean(0) - mean, np.cov(x.T)
    traces = np.trace(np.linalg.solve(exact.covariance, fitted)) + error @ np.linalg.solve(exact.covariance, error)
    determinants = np.linalg.slogdet(exact.covariance)[1] - np.linalg.slogdet(fitted)[1]
    return np.mean((error / sd) ** 2) ** 0.5, x.std(0) / sd, (traces - len(sd) + determinants) / (2 * len(sd))


def fitted(network, archive, **options):
    method = pf.ScoreTrajectory(network, **options)
    return method.fit(rotating_chain.model, observed=("y", "y0"), trajectories=archive, progress=False)


@pytest.fixture(scope="module")
def archive():
    return np.asarray(rotating_chain.trajectories(jax.random.key(1), 16384))


@pytest.mark.parametrize("scenario", ["lo", "hi"])
def test_many_draws_against_the_smoother(archive, scenario):
    """4096 draws: dm (.016 from their number alone), standard deviations (1.1 % likewise), coverage of 90 %."""
    method = fitted(
        exact_network(ROWS, rotating_chain.SMOOTH),
        archive[:200],
        training=pf.ScoreTraining(steps=1, batch_size=2),
        guidance="surrogate",
    )
    # What the archive says of scales and covariance, replaced by the truth, makes network and guidance exact.
    covariance = rotating_chain.covariance().reshape(ROWS, 2, ROWS, 2)
    known = {"covariance": jnp.asarray(covariance), "location": jnp.zeros(2), "spread": jnp.ones(2)}
    trained = dataclasses.replace(method.trained, model=dataclasses.replace(method.trained.model, **known))
    method = dataclasses.replace(method, trained=trained)
    y, noise, exact = law(scenario, 3)
    x = drawn(method, y, noise, 4096)
    dm, sd, _ = distances(x, exact)
    assert dm <= 0.03
    assert np.abs(sd - 1).max() <= 0.05
    low, high = np.quantile(x, [0.05, 0.95], axis=0)
    covered = norm.cdf(high, exact.mean.ravel(), exact.sd.ravel()) - norm.cdf(low, exact.mean.ravel(), exact.sd.ravel())
    assert 0.88 <= covered.min() <= covered.max() <= 0.92


def test_a_trained_network_on_the_chain(archive):
    """Two minutes of training; Kullback-Leibler divergence per number at most .05.

    A Gaussian fitted to n draws of d numbers is off by (d + 3) / (4 n) itself, .008 here. Guidance knows of the
    archive only, so that all errors count.
    """
    training = pf.ScoreTraining(steps=2000, batch_size=64)
    method = fitted(pf.TemporalUNet(), archive, training=training, guidance="surrogate", sampler=pf.Heun(steps=32))
    for scenario in ("lo", "hi"):
        y, noise, exact = law(scenario, 3)
        dm, sd, divergence = distances(drawn(method, y, noise, 4096), exact)
        assert dm < 0.3
        assert np.abs(sd - 1).max() < 0.2
        assert divergence <= 0.05


@pytest.mark.parametrize("k", [2, 8])
def test_moment_matching_of_a_trained_network_of_windows_does_not_explode(archive, k):
    """dm at most .5 with projection and two moves; raw, it diverged."""
    method = fitted(
        pf.WindowMLP(width=128, depth=3),
        archive[:4096],
        window=2 * k + 1,
        training=pf.ScoreTraining(steps=2000, batch_size=128),
        guidance="mmps",
        sampler=pf.Heun(steps=32, corrections=2, tau=0.5),
    )
    y, noise, exact = law("hi", 3)
    x = drawn(method, y, noise, 64)
    dm, sd, _ = distances(x, exact)
    assert dm <= 0.5
    assert sd.max() < 3
