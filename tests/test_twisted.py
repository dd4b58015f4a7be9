"""Twisted diffusion sampling: the evidence and the moments of a chain whose law is known exactly."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pushforward as pf
from pushforward._errors import MethodError
from pushforward.math.diffusion import power_grid
from pushforward.math.guidance import gaussian, rows_of
from pushforward.math.twisted import twist, twisted
from pushforward.problems import rotating_chain

STATES, RHO, SD = 9, 0.9, 0.3
COVARIANCE = rotating_chain.covariance(STATES, RHO)
VALUES, VECTORS = np.linalg.eigh(COVARIANCE)
GRID = np.asarray(power_grid(40, lowest=2e-2, highest=20.0), float)
ROWS = np.eye(2 * STATES)[::4]
DATA = np.array([0.3, -0.8, 0.9, np.nan, 1.2])
SEEN = ~np.isnan(DATA)


def denoise(x, s):
    """The exact denoiser of N(0, C)."""
    return (VECTORS @ (VALUES / (VALUES + s**2) * (VECTORS.T @ x.ravel()))).reshape(x.shape)


def law_of_the_chain():
    """Covariance of the clean states that the reverse chain of GRID ends in: a linear map and noise at each level."""
    variances = np.full(VALUES.shape, GRID[0] ** 2)
    for level, following in itertools.pairwise(GRID[:-1]):
        keep = (following / level) ** 2
        gain = keep + (1 - keep) * VALUES / (VALUES + level**2)
        variances = gain**2 * variances + following**2 * (1 - keep)
    variances *= (VALUES / (VALUES + GRID[-2] ** 2)) ** 2
    return (VECTORS * variances) @ VECTORS.T


def exact():
    """Log evidence, mean and covariance of the posterior of the chain's own law."""
    prior, rows, data = law_of_the_chain(), ROWS[SEEN], DATA[SEEN]
    system = rows @ prior @ rows.T + SD**2 * np.eye(len(data))
    gain = np.linalg.solve(system, rows @ prior).T
    half = data @ np.linalg.solve(system, data) + np.linalg.slogdet(2 * np.pi * system)[1]
    return -0.5 * half, gain @ data, prior - gain @ rows @ prior


def matched(level, seen, clean):
    """A V A^T of the exact V."""
    rows = rows_of(seen, clean)
    shrunk = (VECTORS * (VALUES / (VALUES + level**2) * level**2)) @ VECTORS.T
    return rows @ shrunk @ rows.T


def narrow(level, seen, clean):
    """The paper's, as a diagonal."""
    return 0.2 * level**2 * seen.gains


def likelihood(x):
    off = (jnp.asarray(DATA) - ROWS @ x.ravel()) / SD
    return jnp.sum(jnp.where(SEEN, -0.5 * off**2 - jnp.log(SD * jnp.sqrt(2 * jnp.pi)), 0.0))


@functools.cache
def runs(spread, particles, threshold=0.5, repeats=200):
    """Populations by key."""
    observe = gaussian(lambda x: jnp.asarray(ROWS) @ x.ravel(), jnp.asarray(DATA), jnp.full(len(DATA), SD**2))
    one = twist(denoise, observe, spread, likelihood)
    grid = jnp.asarray(GRID)

    def run(key):
        first, second = jax.random.split(key)
        starts = grid[0] * jax.random.normal(first, (particles, STATES, 2))
        many = jax.vmap(one, (0, None))
        return twisted(many, jax.vmap(likelihood), starts, grid, second, threshold=threshold)

    return jax.tree.map(
        np.asarray, jax.jit(lambda k: jax.lax.map(run, k))(jax.random.split(jax.random.key(4), repeats))
    )


@pytest.mark.parametrize(
    ("spread", "particles", "threshold"), [(matched, 32, 0.5), (matched, 32, 0.01), (narrow, 512, 0.5)]
)
def test_the_evidence_is_unbiased(spread, particles, threshold):
    """Mean over 200 runs of the estimate over the exact one is 1; 4 standard errors, false alarm 6e-5."""
    found = runs(spread, particles) if threshold == 0.5 else runs(spread, particles, threshold)
    ratios = np.exp(found.log_evidence - exact()[0])
    assert ratios.std() / 200**0.5 < 0.1
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / 200**0.5


@pytest.mark.parametrize(("spread", "particles"), [(matched, 32), (narrow, 512)])
def test_moments_of_the_posterior(spread, particles):
    """Unnormalised weighted means over 200 runs are unbiased: 5 standard errors of 18 means and of 18 squares."""
    found = runs(spread, particles)
    log_evidence, mean, covariance = exact()
    scale = np.exp(found.log_evidence - log_evidence)[:, None]
    states, weights = found.states.reshape(200, particles, -1), np.exp(found.log_weights)[:, :, None]
    for power, aim in ((1, mean), (2, mean**2 + np.diag(covariance))):
        each = scale * (np.sum(weights * states**power, 1) - aim)
        assert np.all(np.abs(each.mean(0)) < 5 * each.std(0) / 200**0.5)


def test_a_good_twist_needs_no_resampling():
    """The exact V leaves only the error of first-order steps in the weights; the narrow one is resampled."""
    good, bad = runs(matched, 32), runs(narrow, 512)
    assert np.median(good.size) > 0.6 * 32
    assert np.median(bad.resamplings) > np.median(good.resamplings)
    assert np.all(bad.smallest <= bad.size)
    shares = [np.mean([np.unique(r).size for r in p.roots]) / p.roots.shape[1] for p in (good, bad)]
    assert shares[1] < shares[0]
    assert np.allclose(np.exp(bad.log_weights).sum(1), 1)


def test_errors():
    with pytest.raises(MethodError, match=r"Twisted\(guidance=...\) takes one of \['auto', 'averaged', 'gamma'\]"):
        pf.Twisted("mmps")
    with pytest.raises(MethodError, match=r"Twisted\(particles=...\) takes an integer of at least 2; got 1"):
        pf.Twisted(particles=1)
    with pytest.raises(MethodError, match=r"Twisted\(threshold=...\) takes a number between 0 and 1"):
        pf.Twisted(threshold=2.0)
