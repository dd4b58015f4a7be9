"""Noise of data as an operator: R^-1/2 in each form, missing data, and low rank without its dense form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pushforward as pf
from pushforward.math.noise import LowRank, fault, whiten
from pushforward.methods._outputs import Units, predict
from pushforward.model.inverse import read_problem

M, RANK = 7, 2
GENERATOR = np.random.default_rng(5)
FACTOR, DIAGONAL = GENERATOR.normal(size=(M, RANK)), 0.3 + GENERATOR.uniform(size=M)
DENSE = np.diag(DIAGONAL) + FACTOR @ FACTOR.T
GAP = np.arange(M) == 4


@pytest.mark.parametrize("missing", [np.zeros(M, bool), GAP], ids=["all", "one missing"])
@pytest.mark.parametrize("form", ["diagonal", "dense", "low rank"])
def test_whitening(float64, form, missing):
    """R^-1/2 R R^-T/2 = I over the data that are present, and the norm is that of the marginal noise."""
    noise, covariance = {
        "diagonal": (jnp.sqrt(DIAGONAL), np.diag(DIAGONAL)),
        "dense": (jnp.asarray(DENSE), DENSE),
        "low rank": (LowRank(jnp.asarray(FACTOR), jnp.asarray(DIAGONAL)), DENSE),
    }[form]
    present = jnp.asarray(~missing)
    root = jax.vmap(lambda v: whiten(v, noise, present))(jnp.eye(M)).T
    kept = ~missing
    np.testing.assert_allclose((root @ covariance @ root.T)[np.ix_(kept, kept)], np.eye(kept.sum()), atol=1e-12)
    v = GENERATOR.normal(size=M)
    found = whiten(jnp.asarray(np.where(missing, np.nan, v)), noise, present)
    want = v[kept] @ np.linalg.solve(covariance[np.ix_(kept, kept)], v[kept])
    assert float(found @ found) == pytest.approx(want, rel=1e-12)
    assert np.all(np.asarray(found)[missing] == 0)


def test_batches_of_events(float64):
    """Each event has a noise of its own."""
    factor = jnp.asarray(GENERATOR.normal(size=(3, M, RANK)))
    values = jnp.asarray(GENERATOR.normal(size=(3, M)))
    noise = LowRank(factor, jnp.broadcast_to(jnp.asarray(DIAGONAL), (3, M)))
    present = jnp.ones((3, M), bool)
    rows = [whiten(values[i], LowRank(factor[i], jnp.asarray(DIAGONAL)), present[i]) for i in range(3)]
    np.testing.assert_allclose(whiten(values, noise, present), jnp.stack(rows), rtol=1e-12)


def test_what_is_no_noise():
    assert fault(LowRank(jnp.ones((M, 1)), jnp.ones(M)), 1) is None
    assert "positive definite" in str(fault(LowRank(jnp.ones((M, 1)), jnp.zeros(M)), 1))
    assert "positive definite" in str(fault(LowRank(jnp.full((M, 1), jnp.nan), jnp.ones(M)), 1))
    assert "positive definite" in str(fault(-jnp.eye(M), 1))
    assert "not positive" in str(fault(jnp.zeros(M), 1))


OPERATOR = GENERATOR.normal(size=(M, 3))


def model(y=None, low_rank=True):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    mean = jnp.asarray(OPERATOR) @ x
    law = dist.LowRankMultivariateNormal(mean, jnp.asarray(FACTOR), jnp.asarray(DIAGONAL))
    numpyro.sample("y", law if low_rank else dist.MultivariateNormal(mean, jnp.asarray(DENSE)), obs=y)


@pytest.mark.parametrize("method", [pf.EKI(20, schedule=2), pf.UKI(), pf.Laplace(curvature="gauss_newton")], ids=repr)
def test_low_rank_noise_is_its_dense_form(float64, method):
    y = np.arange(M) / 3.0
    trees = [pf.infer(model, method=method, y=y, low_rank=r, progress=False) for r in (True, False)]
    first, second = (t["posterior"]["x"].to_numpy() for t in trees)
    np.testing.assert_allclose(first, second, atol=1e-9)


def test_nothing_has_the_square_of_the_data():
    """10,000 data with noise of rank 3: no array of the whole step is larger than a few columns of them."""
    m = 10_000

    def large(y=None):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        law = dist.LowRankMultivariateNormal(x * jnp.ones(m), jnp.ones((m, 3)), jnp.ones(m))
        numpyro.sample("y", law, obs=y)

    problem = read_problem(large, (), {"y": jnp.zeros(m)})

    def step(z):
        units = Units.of(problem)
        return predict(problem, units, z)

    equations = jax.make_jaxpr(step)(jnp.zeros(1)).eqns
    sizes = [np.prod(getattr(v.aval, "shape", ())) for equation in equations for v in equation.outvars]
    assert max(sizes) < 20 * m
    tree = pf.infer(large, method=pf.EKI(20), y=np.zeros(m), progress=False)
    assert np.isfinite(tree["posterior"]["x"].to_numpy()).all()
