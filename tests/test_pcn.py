"""`PreconditionedCrankNicolson`: exact moments, and an acceptance that does not see the mesh."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pushforward import _errors
from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward.methods.pcn import PreconditionedCrankNicolson, _advance, _package, _start
from pushforward.model.inverse import read_problem
from pushforward.problems import bod, linear_gaussian


def _read(problem):
    return read_problem(problem.model, (), {**problem.inputs, **problem.data})


def _standard_error(x):
    """Monte Carlo standard error of the mean of each column; x has shape (chain, draw, k)."""
    return np.array([x[..., j].std() / np.sqrt(float(az.ess(x[..., j]))) for j in range(x.shape[-1])])


def _check_mean(x, exact):
    # 4 standard errors: a false alarm in 6e-5 of the keys for each entry
    score = (x.mean((0, 1)) - exact) / _standard_error(x)
    assert np.abs(score).max() < 4, score


def _with_products(x):
    """Columns of x, then the products whose means are the second moments."""
    rows, columns = np.triu_indices(x.shape[-1])
    return np.concatenate([x, x[..., rows] * x[..., columns]], -1)


def test_bod_moments():
    method = PreconditionedCrankNicolson(chains=8, thinning=20)
    draws = method.run(_read(bod.PROBLEM), jax.random.key(0), 2000, Runner())
    x = np.asarray(draws.positions, float)
    assert x.shape == (8, 2000, 2)
    assert int(draws.outcome) == Outcome.SUCCESS
    second = (bod.COVARIANCE_U + np.outer(bod.MEAN_U, bod.MEAN_U))[np.triu_indices(2)]
    _check_mean(_with_products(x), np.concatenate([bod.MEAN_U, second]))
    assert float(draws.evaluations) == 8 * (1000 + 2000 * 20)
    assert float(draws.gradient_evaluations) == 0
    assert abs(float(draws.summary["acceptance_rate"]) - 0.25) < 0.05


def test_linear_gaussian_moments():
    problem = linear_gaussian.linear_gaussian(2)
    read = _read(problem)
    draws = PreconditionedCrankNicolson(thinning=50).run(read, jax.random.key(0), 2000, Runner())
    theta = np.asarray(jax.jit(jax.vmap(jax.vmap(read.constrain)))(draws.positions)["theta"], float)
    mean, covariance = problem.numbers["mean"]["theta"], problem.numbers["covariance"]
    _check_mean(theta, mean)
    centred = theta - mean
    _check_mean(_with_products(centred)[..., 2:], covariance[np.triu_indices(2)])


def test_lp_is_the_log_density():
    problem = _read(bod.PROBLEM)
    draws = PreconditionedCrankNicolson(chains=2, warmup=50, thinning=2).run(problem, jax.random.key(0), 20, Runner())
    expected = jax.jit(jax.vmap(jax.vmap(problem.log_density)))(draws.positions)
    np.testing.assert_allclose(draws.stats["lp"], expected, rtol=1e-5)
    assert draws.stats["acceptance_rate"].shape == (2, 20)


def _field(basis, y=None):
    """Three averages of a random field whose Karhunen-Loeve coefficients are N(0, 1)."""
    z = numpyro.sample("z", dist.Normal(0, 1).expand([basis.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Normal(basis @ z, 0.3), obs=y)


def _field_problem(d):
    """Brownian motion on [0, 1], the first d terms of its Karhunen-Loeve series, seen at three times."""
    frequency = (np.arange(d) + 0.5) * np.pi
    times = np.array([0.3, 0.6, 0.9])
    basis = np.sqrt(2) * np.sin(np.outer(times, frequency)) / frequency
    return read_problem(_field, (), {"basis": basis, "y": np.array([0.4, -0.2, 0.9])})


def _acceptance_at(problem, beta, chains=64, steps=1000):
    """Mean acceptance of each chain at a fixed beta, in stationarity for half of the steps."""
    method = PreconditionedCrankNicolson(chains=chains, warmup=1, thinning=1)
    start = _start(chains, steps, problem.dimension)
    logit = jnp.full(chains, np.log(beta / (1 - beta)))
    start = type(start)(**{**vars(start), "logit": logit})
    keys = jax.random.split(jax.random.key(1), chains)
    last = Runner().loop(_advance, start, steps, method, problem, keys, None)
    return np.asarray(last.acceptance[:, steps // 2 :]).mean(1)


def test_acceptance_does_not_depend_on_the_mesh():
    # For d = 25, 100, 400 the data see the same field up to its truncated tail.
    rates = {d: _acceptance_at(_field_problem(d), 0.3) for d in (25, 100, 400)}
    mean = {d: r.mean() for d, r in rates.items()}
    error = {d: r.std(ddof=1) / np.sqrt(r.size) for d, r in rates.items()}
    assert max(error.values()) < 0.02
    for d in (100, 400):  # 4 standard errors of a difference; false alarm 6e-5 each
        assert abs(mean[d] - mean[25]) < 4 * np.hypot(error[d], error[25]), mean


def test_prior_is_invariant_without_data():
    # With nothing observed but a constant, all is accepted and z stays N(0, I).
    def model(y=None):
        numpyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(0, 1), obs=y)

    problem = read_problem(model, (), {"y": np.array(0.3)})
    draws = PreconditionedCrankNicolson(chains=4, warmup=10).run(problem, jax.random.key(0), 2000, Runner())
    x = np.asarray(draws.positions, float)
    assert np.asarray(draws.stats["acceptance_rate"]).min() == pytest.approx(1)
    _check_mean(x, np.zeros(3))
    _check_mean(x**2, np.ones(3))


def test_chunks_do_not_change_the_draws(tmp_path):
    problem, key = _read(bod.PROBLEM), jax.random.key(3)
    method = PreconditionedCrankNicolson(chains=2, warmup=30, thinning=3)
    whole = method.run(problem, key, 40, Runner())
    chunked = method.run(problem, key, 40, Runner(checkpoint=tmp_path / "run", identity="same"))
    np.testing.assert_array_equal(whole.positions, chunked.positions)
    assert whole.positions.shape == (2, 40, 2)


def test_other_data_do_not_recompile():
    method = PreconditionedCrankNicolson(chains=2, warmup=20, thinning=1)
    first, second = Runner(), Runner()
    method.run(_read(bod.PROBLEM), jax.random.key(0), 10, first)
    other = read_problem(bod.model, (), {"t": bod.TIMES, "y": bod.SECOND_DATA})
    method.run(other, jax.random.key(0), 10, second)
    assert second.compile_seconds == 0


def _truncated(y=None):
    """Likelihood zero or NaN on 7 of 8 prior draws."""
    z = numpyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))
    value = jnp.where(z[0] < 0, jnp.nan, jnp.where((z[1] < 0) | (z[2] < 0), -jnp.inf, 0.0))
    numpyro.factor("support", value)
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def test_infinite_and_nan_likelihoods_are_rejected():
    problem = read_problem(_truncated, (), {"y": np.array(0.3)})
    draws = PreconditionedCrankNicolson(warmup=300).run(problem, jax.random.key(0), 1000, Runner())
    x = np.asarray(draws.positions, float)
    assert int(draws.outcome) == Outcome.SUCCESS
    assert x.min() > 0
    assert float(draws.summary["nonfinite_proposals"]) > 0
    _check_mean(x, np.full(3, np.sqrt(2 / np.pi)))


def test_no_start_is_said():
    def model(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("never", jnp.where(z > 100, 0.0, -jnp.inf))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)

    problem = read_problem(model, (), {"y": np.array(0.3)})
    draws = PreconditionedCrankNicolson(warmup=20).run(problem, jax.random.key(0), 5, Runner())
    assert int(draws.outcome) == Outcome.NONFINITE_START
    assert not np.isnan(np.asarray(draws.positions)).any()


def test_float64():
    with jax.enable_x64(True):
        draws = PreconditionedCrankNicolson(chains=2, warmup=20).run(_read(bod.PROBLEM), jax.random.key(0), 5, Runner())
        assert draws.positions.dtype == jnp.float64
        assert draws.stats["lp"].dtype == jnp.float64


def test_warning_where_chains_stand_still():
    method = PreconditionedCrankNicolson(chains=1, warmup=1)
    start = _start(1, 4, 2)
    start = type(start)(**{**vars(start), "lp": jnp.zeros((1, 4))})
    assert "Increase warmup" in method.warnings(_package(start, 5))[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chains": 0}, r"chains=...\) takes an integer of at least 1; got 0"),
        ({"warmup": 1.5}, r"warmup=...\) takes an integer"),
        ({"thinning": 0}, r"thinning=...\) takes an integer"),
        ({"target_acceptance": 1.0}, r"target_acceptance=...\) takes a number between 0 and 1; got 1.0"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(_errors.MethodError, match=match):
        PreconditionedCrankNicolson(**options)
