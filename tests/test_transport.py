"""FlowVI and NUTS in its coordinates: exact answers, the bars on BOD by quadrature, trained maps, errors."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import exact
import pushforward as pf
from pushforward._errors import MethodError
from pushforward.problems import bod

SMALL = pf.Flow("coupling", layers=2, width=8)
MATRIX = np.array([[1.0, 0.5], [0.0, 1.0], [1.0, -1.0]])
DATA = np.array([1.0, 0.3, 0.2])


def linear(y=None):
    x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.asarray(MATRIX) @ x, 0.5).to_event(1), obs=y)


def exact_linear():
    covariance = np.linalg.inv(np.eye(2) + MATRIX.T @ MATRIX / 0.25)
    evidence = float(dist.MultivariateNormal(np.zeros(3), MATRIX @ MATRIX.T + 0.25 * np.eye(3)).log_prob(DATA))
    return covariance @ MATRIX.T @ DATA / 0.25, covariance, evidence


@pytest.fixture(scope="module")
def fitted():
    return pf.FlowVI(SMALL, samples=64).fit(linear, y=DATA, progress=False)


def test_linear_gaussian_is_exact(fitted):
    """The path gradients vanish at the posterior, so the flow ends there: the ELBO is the evidence up to training."""
    tree = pf.infer(linear, method=fitted, y=DATA, draws=4000, progress=False)
    mean, covariance, evidence = exact_linear()
    found = pf.attributes(tree)
    assert found["elbo"] == pytest.approx(evidence, abs=2e-3)
    assert found["log_evidence"] == pytest.approx(evidence, abs=2e-3)
    assert found["khat"] < 0.7
    x = tree["posterior"]["x"].to_numpy()[0]
    # Five standard errors of 4000 draws; false-alarm rate 3e-6.
    white = (x - mean) @ np.linalg.cholesky(np.linalg.inv(covariance))
    assert np.abs(white.mean(0)).max() < 5 / 4000**0.5
    assert np.abs(np.cov(white.T) - np.eye(2)).max() < 5 * (2 / 4000) ** 0.5


def test_a_fitted_flow_is_saved_and_loaded(fitted, tmp_path):
    pf.save(tmp_path / "flow.pf", fitted)
    trees = [
        pf.infer(linear, method=m, y=DATA, draws=20, progress=False) for m in (fitted, pf.load(tmp_path / "flow.pf"))
    ]
    assert trees[0]["posterior"].dataset.equals(trees[1]["posterior"].dataset)
    assert pf.attributes(trees[0])["steps"] == 0


def test_nuts_moves_in_its_coordinates(fitted):
    tree = pf.infer(linear, method=pf.NUTS(chains=2, warmup=200, transport=fitted), y=DATA, draws=1000, progress=False)
    mean, covariance, _ = exact_linear()
    white = (tree["posterior"]["x"].to_numpy().reshape(-1, 2) - mean) @ np.linalg.cholesky(np.linalg.inv(covariance))
    # The chains are at least as good as 1000 independent draws here; five of their standard errors.
    assert np.abs(white.mean(0)).max() < 5 / 1000**0.5
    assert np.abs(np.cov(white.T) - np.eye(2)).max() < 5 * (2 / 1000) ** 0.5
    lp = tree["sample_stats"]["lp"].to_numpy()
    likelihood = tree["log_likelihood"]["y"].to_numpy()
    prior = dist.Normal(0, 1).log_prob(tree["posterior"]["x"].to_numpy()).sum(-1)
    np.testing.assert_allclose(lp, likelihood + prior, rtol=1e-4, atol=1e-4)


def test_bad_input(fitted):
    with pytest.raises(MethodError, match="flow= takes one of .* got 'spline'"):
        pf.FlowVI("spline")
    with pytest.raises(MethodError, match=r"correct=...\) takes one of \['none', 'psis', 'imh'\]"):
        pf.FlowVI(correct="mcmc")
    with pytest.raises(MethodError, match="tempering must leave steps"):
        pf.FlowVI(tempering=100, steps=100)
    with pytest.raises(MethodError, match="transport= takes a fitted flow.*a FlowVI that is not fitted"):
        pf.NUTS(transport=pf.FlowVI())
    with pytest.raises(MethodError, match="transport= takes a fitted flow"):
        pf.NUTS(transport="flow")

    def wider(y=None):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    for method in (fitted, pf.NUTS(transport=fitted)):
        with pytest.raises(MethodError, match="fitted to a model with 2 latent numbers, and this one has 3"):
            pf.infer(wider, method=method, y=DATA, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["DATA", "SECOND_DATA"])
def test_bod_bars(data):
    """KL(q, posterior), the log evidence by quadrature less the ELBO; the evidence after importance weights; k-hat."""
    y = getattr(bod, data)
    evidence = exact.bod_log_evidence(y)
    found = pf.attributes(pf.infer(bod.model, method="flow_vi", t=bod.TIMES, y=y, progress=False))
    assert evidence - found["elbo"] < 0.005 + 3 * found["elbo_se"]
    assert found["log_evidence"] == pytest.approx(evidence, abs=0.005)
    assert found["khat"] < 0.7


@pytest.mark.filterwarnings("ignore:FlowVI. The run used up its steps")
@pytest.mark.slow
@pytest.mark.parametrize("correct", ["psis", "imh"])
def test_corrections_remove_the_error(correct):
    """A flow that stops early, corrected: means of A and B within 5 standard errors of 500 effective draws."""
    method = pf.FlowVI(correct=correct, steps=300)
    tree = pf.infer(bod.model, method=method, t=bod.TIMES, y=bod.DATA, draws=4000, progress=False)
    for name, mean, sd in zip(("A", "B"), bod.MEAN, np.sqrt(np.diag(bod.COVARIANCE)), strict=True):
        assert float(tree["posterior"][name].mean()) == pytest.approx(mean, abs=5 * sd / 500**0.5)
