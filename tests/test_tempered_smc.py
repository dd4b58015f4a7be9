"""`TemperedSMC`: evidence, posterior and standard errors against exact answers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pushforward import _errors
from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward.methods.tempered_smc import TemperedSMC
from pushforward.model.inverse import read_problem
from pushforward.problems import bod, linear_gaussian

SMALL = TemperedSMC(particles=100, islands=2, mutation_steps=5)


def _read(problem):
    return read_problem(problem.model, (), {**problem.inputs, **problem.data})


def _runs(method, problem, keys, draws=1000):
    return [method.run(problem, jax.random.key(k), draws, Runner()) for k in range(keys)]


def _summary(runs, name):
    return np.array([float(r.summary[name]) for r in runs])


def _check_mean(values, exact, sd=None):
    """Mean over keys within 4 standard errors from the spread over keys: by Student's t with 9 degrees of freedom a
    false alarm in 0.3 % of all choices of keys, for each entry."""
    values = np.asarray(values, float)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    score = (values.mean(0) - exact) / error
    assert np.abs(score).max() < 4, score


@pytest.fixture(scope="module")
def bod_runs():
    return _runs(TemperedSMC(), _read(bod.PROBLEM), 10)


def test_bod_evidence(bod_runs):
    # sd 0.017 over keys, so that 0.05 is left by one of ten keys in 3 % of all choices of keys
    error = _summary(bod_runs, "log_evidence") - bod.LOG_EVIDENCE
    assert np.abs(error).max() < 0.05, error
    assert all(int(r.outcome) == Outcome.SUCCESS for r in bod_runs)


def test_bod_standard_error_is_the_spread_over_keys(bod_runs):
    # The ratio of spreads with 9 and 70 degrees of freedom leaves (0.4, 2) in less than 1 %.
    spread = _summary(bod_runs, "log_evidence").std(ddof=1)
    reported = np.sqrt(np.mean(_summary(bod_runs, "log_evidence_se") ** 2))
    assert 0.4 < spread / reported < 2


def test_bod_moments(bod_runs):
    x = np.array([np.asarray(r.positions, float).reshape(-1, 2) for r in bod_runs])
    assert x.shape == (10, 8000, 2)
    _check_mean(x.mean(1), bod.MEAN_U)
    second = np.einsum("rni,rnj->rij", x, x) / x.shape[1]
    _check_mean(
        second.reshape(10, 4)[:, [0, 1, 3]], (bod.COVARIANCE_U + np.outer(bod.MEAN_U, bod.MEAN_U)).ravel()[[0, 1, 3]]
    )
    assert np.abs(x.mean((0, 1)) - bod.MEAN_U).max() < 0.03


@pytest.mark.slow
def test_linear_gaussian_20():
    problem = linear_gaussian.linear_gaussian(20)
    read = _read(problem)
    runs = _runs(TemperedSMC(), read, 4)
    # 4 reported standard errors (7 degrees of freedom): a false alarm in 0.5 % per key
    score = (_summary(runs, "log_evidence") - problem.numbers["log_evidence"]) / _summary(runs, "log_evidence_se")
    assert np.abs(score).max() < 4, score
    theta = np.asarray(jax.jit(jax.vmap(jax.vmap(read.constrain)))(runs[0].positions)["theta"], float).reshape(-1, 20)
    sd = problem.numbers["sd"]["theta"]
    assert np.abs((theta.mean(0) - problem.numbers["mean"]["theta"]) / sd).max() < 0.1
    np.testing.assert_allclose(theta.std(0), sd, rtol=0.1)


def _error_at(particles, keys=24):
    problem = linear_gaussian.linear_gaussian(2)
    method = TemperedSMC(particles=particles, islands=2, mutation_steps=5)
    runs = _runs(method, _read(problem), keys, draws=10)
    return _summary(runs, "log_evidence") - problem.numbers["log_evidence"]


def test_evidence_is_unbiased_and_its_error_falls_as_the_root_of_particles():
    few, many = _error_at(200), _error_at(3200)
    for error in (few, many):  # E Z = Z: 4 standard errors over 24 keys, false alarm 0.06 % each
        ratio = np.exp(error)
        assert abs(ratio.mean() - 1) < 4 * ratio.std(ddof=1) / np.sqrt(len(ratio))
    # The slope of two spreads with 23 degrees of freedom has sd 0.075.
    slope = np.log(many.std() / few.std()) / np.log(16)
    assert -0.8 < slope < -0.2, slope


def _two_modes(y=None):
    """|x| is seen: modes at -2 and 2, narrow enough that no local move crosses."""
    x = numpyro.sample("x", dist.Normal(0.3, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.abs(x[0]), 0.05), obs=y)


def test_two_modes():
    # x0 | y: weights phi(2 - 0.3) and phi(-2 - 0.3), up to the noise's width.
    problem = read_problem(_two_modes, (), {"y": np.array(2.0)})
    runs = _runs(TemperedSMC(), problem, 10)
    sd = np.sqrt(1 + 0.05**2)
    masses = np.exp(-0.5 * (np.array([2.0, -2.0]) - 0.3) ** 2 / sd**2)
    exact = masses[0] / masses.sum()
    upper = [np.mean(np.asarray(r.positions)[..., 0] > 0) for r in runs]
    _check_mean(upper, exact)
    assert np.abs(np.array(upper) - exact).max() < 0.1
    _check_mean(np.exp(_summary(runs, "log_evidence")), masses.sum() / np.sqrt(2 * np.pi) / sd)


def test_draws_are_thinned_and_never_inflated():
    problem, method = _read(bod.PROBLEM), SMALL
    for asked, given in ((7, 7), (100, 100), (500, 100)):
        draws = method.run(problem, jax.random.key(0), asked, Runner())
        assert draws.positions.shape == (2, given, 2)
    assert float(draws.evaluations) == 200 * 8 * float(draws.summary["stages"])
    assert float(draws.gradient_evaluations) == 0


def test_chunks_do_not_change_the_draws(tmp_path):
    problem, method = _read(bod.PROBLEM), SMALL
    whole = method.run(problem, jax.random.key(3), 100, Runner())
    chunked = method.run(problem, jax.random.key(3), 100, Runner(checkpoint=tmp_path / "run", identity="same"))
    np.testing.assert_array_equal(whole.positions, chunked.positions)


def test_other_data_do_not_recompile():
    method, second = SMALL, Runner()
    method.run(_read(bod.PROBLEM), jax.random.key(0), 100, Runner())
    other = read_problem(bod.model, (), {"t": bod.TIMES, "y": bod.SECOND_DATA})
    method.run(other, jax.random.key(0), 100, second)
    assert second.compile_seconds == 0


def test_higher_target_ess_takes_more_stages_and_too_few_are_said():
    problem = _read(bod.PROBLEM)
    enough = SMALL.run(problem, jax.random.key(0), 10, Runner())
    assert int(enough.outcome) == Outcome.SUCCESS
    stages = int(enough.summary["stages"])
    finer = TemperedSMC(particles=100, islands=2, mutation_steps=10, target_ess=0.9, max_stages=stages + 1)
    draws = finer.run(problem, jax.random.key(0), 10, Runner())
    assert int(draws.outcome) == Outcome.MAXIMUM_STEPS
    assert int(draws.summary["stages"]) == stages + 1
    assert float(draws.summary["temperature"]) < 1


def _quadrant(limit, y=None):
    """Likelihood zero or NaN below a limit."""
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.factor("support", jnp.where(z[0] < limit, jnp.nan, jnp.where(z[1] < limit, -jnp.inf, 0.0)))
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def _above(limit):
    problem = read_problem(_quadrant, (), {"limit": np.array(limit), "y": np.array(0.0)})
    return TemperedSMC(islands=4).run(problem, jax.random.key(0), 1000, Runner())


def test_zero_and_nan_likelihoods_count_as_zero():
    draws = _above(0.0)
    assert int(draws.outcome) == Outcome.SUCCESS
    assert np.asarray(draws.positions).min() > 0
    exact = np.log(0.25) - 0.5 * np.log(2 * np.pi)
    # binomial standard error of 8000 prior draws: 0.019; false alarm 6e-5
    assert abs(float(draws.summary["log_evidence"]) - exact) < 4 * 0.019


def test_no_start_is_said():
    draws = _above(100.0)
    assert int(draws.outcome) == Outcome.NONFINITE_START
    assert np.isfinite(np.asarray(draws.positions)).all()


def test_float64():
    with jax.enable_x64(True):
        draws = SMALL.run(_read(bod.PROBLEM), jax.random.key(0), 5, Runner())
        assert draws.positions.dtype == jnp.float64
        assert int(draws.outcome) == Outcome.SUCCESS


def test_warning_where_islands_disagree(bod_runs):
    assert TemperedSMC().warnings(bod_runs[0]) == []
    far = bod_runs[0].summary | {"log_evidence_se": 0.8}
    draws = type(bod_runs[0])(**{**vars(bod_runs[0]), "summary": far})
    assert "Increase mutation_steps (now 10)" in TemperedSMC().warnings(draws)[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"islands": 1}, r"islands=...\) takes an integer of at least 2; got 1"),
        ({"target_ess": 1.0}, r"target_ess=...\) takes a number between 0 and 1; got 1.0"),
        ({"max_stages": 0}, r"max_stages=...\) takes an integer"),
        ({"particles": 1}, r"particles=...\) takes an integer of at least 2; got 1"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(_errors.MethodError, match=match):
        TemperedSMC(**options)
