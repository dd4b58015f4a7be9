"""`Pathfinder`: exact where the posterior is Gaussian, honest where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pushforward import _errors
from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward.methods.pathfinder import Pathfinder, _fit_pareto, _gaussian, _resample, _smoothed
from pushforward.model.inverse import read_problem
from pushforward.problems import bod, linear_gaussian

SMALL = Pathfinder(paths=2, elbo_samples=10, proposals=320)


def _read(problem):
    return read_problem(problem.model, (), {**problem.inputs, **problem.data})


def test_linear_gaussian_is_exact():
    # With the exact Gaussian the log weights are constant; H is exact up to the last step of L-BFGS.
    problem = linear_gaussian.linear_gaussian(2)
    read = _read(problem)
    draws = Pathfinder().run(read, jax.random.key(0), 4000, Runner())
    assert int(draws.outcome) == Outcome.SUCCESS
    assert float(draws.summary["elbo"]) == pytest.approx(problem.numbers["log_evidence"], abs=0.02)
    assert float(draws.summary["log_evidence"]) == pytest.approx(problem.numbers["log_evidence"], abs=0.01)
    theta = np.asarray(jax.jit(jax.vmap(read.constrain))(draws.positions[0])["theta"], float)
    mean, sd = problem.numbers["mean"]["theta"], problem.numbers["sd"]["theta"]
    # 4000 nearly independent draws: 4 standard errors, false alarm 6e-5 for each entry
    assert np.abs((theta.mean(0) - mean) / sd).max() < 4 / np.sqrt(4000)
    assert np.abs(theta.var(0) / sd**2 - 1).max() < 4 * np.sqrt(2 / 4000)


@pytest.fixture(scope="module")
def bod_runs():
    return [Pathfinder().run(_read(bod.PROBLEM), jax.random.key(k), 1000, Runner()) for k in range(8)]


def test_bod_elbo_and_evidence(bod_runs):
    for draws in bod_runs:
        elbo, error = float(draws.summary["elbo"]), float(draws.summary["elbo_se"])
        # The bound holds; at 4 standard errors with 15 degrees of freedom it is crossed in 0.06 % if tight.
        assert elbo < bod.LOG_EVIDENCE + 4 * error
        assert elbo > 3.0
        assert abs(float(draws.summary["log_evidence"]) - bod.LOG_EVIDENCE) < 0.4
    mean = np.mean([np.asarray(d.positions).mean((0, 1)) for d in bod_runs], 0)
    # Smoothed weights are biased towards q: within a quarter of a standard deviation; the prior fails.
    assert np.abs((mean - bod.MEAN_U) / np.sqrt(np.diag(bod.COVARIANCE_U))).max() < 0.25


def test_counts(bod_runs):
    draws, method = bod_runs[0], Pathfinder()
    climbs = method.paths * float(draws.summary["steps"])
    assert float(draws.gradient_evaluations) == climbs
    assert float(draws.evaluations) == climbs * (1 + method.elbo_samples) + method.proposals
    expected = jax.jit(jax.vmap(_read(bod.PROBLEM).log_density))(draws.positions[0])
    np.testing.assert_allclose(draws.stats["lp"][0], expected, rtol=1e-4)


def _two_modes(y=None):
    """Modes at -2 and 2 in the first coordinate."""
    x = numpyro.sample("x", dist.Normal(0.1, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.abs(x[0]), 0.1), obs=y)


def test_two_modes_are_weighted_by_mass():
    problem = read_problem(_two_modes, (), {"y": np.array(2.0)})
    draws = Pathfinder(paths=12).run(problem, jax.random.key(0), 1000, Runner())
    variance = 1 + 0.1**2
    masses = np.exp(-0.5 * (np.array([2.0, -2.0]) - 0.1) ** 2 / variance)
    evidence = np.log(masses.sum() / np.sqrt(2 * np.pi * variance))
    # Importance weights over the mixture: both masses come out to Monte Carlo error (sd 0.015).
    assert np.mean(draws.positions[..., 0] > -0.1) == pytest.approx(masses[0] / masses.sum(), abs=0.06)
    assert float(draws.summary["log_evidence"]) == pytest.approx(evidence, abs=0.05)


def test_gaussian_of_a_quadratic():
    # After d conjugate steps the factored H is the inverse Hessian, and sample and density agree with it.
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        root = generator.normal(size=(3, 3))
        hessian = root @ root.T + np.eye(3)
        steps = np.linalg.eigh(hessian)[1].T
        x, alpha = generator.normal(size=3), np.array([0.5, 1.0, 2.0])
        q, direction = _gaussian(*(jnp.asarray(a) for a in (x, hessian @ x, alpha, steps, steps @ hessian)))
        np.testing.assert_allclose(direction, -x, atol=1e-10)
        np.testing.assert_allclose(q.mean, 0, atol=1e-10)
        factor = jax.jacobian(q.sample)(jnp.zeros(3))
        np.testing.assert_allclose(factor @ factor.T, np.linalg.inv(hessian), atol=1e-10)
        z = generator.normal(size=3)
        exact = dist.MultivariateNormal(jnp.zeros(3), precision_matrix=jnp.asarray(hessian)).log_prob(z)
        np.testing.assert_allclose(q.log_density(jnp.asarray(z)), exact, atol=1e-10)


@pytest.mark.parametrize("shape", [0.2, 0.6])
def test_pareto_fit(shape):
    # sd of the estimate over samples of 20,000 about (1 + k) / sqrt(n) = 0.01
    u = (np.arange(20_000) + 0.5) / 20_000
    excess = np.expm1(-shape * np.log1p(-u)) / shape * 3.0
    found, scale = _fit_pareto(excess)
    assert found == pytest.approx(shape, abs=0.03)
    assert scale == pytest.approx(3.0, rel=0.05)


def test_smoothing_keeps_the_order_and_the_body():
    log_weights = 1.5 * np.random.default_rng(0).normal(size=2000)
    weights = np.exp(log_weights - log_weights.max())
    smooth = _smoothed(log_weights)
    order, size = np.argsort(weights), int(3 * np.sqrt(2000))
    np.testing.assert_allclose(smooth[order[:-size]], weights[order[:-size]])
    assert np.all(np.diff(smooth[order]) >= -1e-12)
    assert smooth.max() <= 1


def test_resampling_follows_the_weights():
    weights = np.random.default_rng(1).random(500)
    log_weights = np.log(np.where(weights < 0.3, 1e-300, weights))
    log_weights[weights < 0.3] = -np.inf
    chosen = _resample(log_weights, 10_000, np.random.default_rng(0))
    counts = np.bincount(chosen, minlength=500)
    smooth = _smoothed(log_weights)
    assert np.abs(counts - 10_000 * smooth / smooth.sum()).max() <= 1 + 1e-6
    assert counts[weights < 0.3].max() == 0


def test_other_data_do_not_recompile():
    first, second = Runner(), Runner()
    SMALL.run(_read(bod.PROBLEM), jax.random.key(0), 100, first)
    SMALL.run(read_problem(bod.model, (), {"t": bod.TIMES, "y": bod.SECOND_DATA}), jax.random.key(1), 50, second)
    assert first.compile_seconds > 0
    assert second.compile_seconds == 0


def _quadrant(limit, y=None):
    """NaN or zero likelihood below a limit."""
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.factor("support", jnp.where(z[0] < limit, jnp.nan, jnp.where(z[1] < limit, -jnp.inf, 0.0)))
    numpyro.sample("y", dist.Normal(z.sum(), 0.5), obs=y)


def _above(limit):
    problem = read_problem(_quadrant, (), {"limit": np.array(limit), "y": np.array(3.0)})
    return SMALL.run(problem, jax.random.key(0), 100, Runner())


def test_failed_starts_and_proposals_are_left_out():
    draws = _above(0.0)
    assert int(draws.outcome) == Outcome.SUCCESS
    assert np.asarray(draws.positions).min() > 0
    assert np.isfinite(draws.stats["lp"]).all()


def test_no_start_is_said():
    draws = _above(100.0)
    assert int(draws.outcome) == Outcome.NONFINITE_START
    assert not np.isnan(draws.positions).any()


def test_float64_and_too_few_steps():
    with jax.enable_x64(True):
        method = Pathfinder(paths=2, max_steps=3, elbo_samples=10, proposals=320)
        draws = method.run(_read(bod.PROBLEM), jax.random.key(0), 5, Runner())
        assert draws.positions.dtype == jnp.float64
        assert int(draws.outcome) == Outcome.MAXIMUM_STEPS


def test_warning_by_khat(bod_runs):
    def with_khat(khat):
        draws = bod_runs[0]
        return type(draws)(**{**vars(draws), "summary": draws.summary | {"khat": khat}})

    assert Pathfinder().warnings(with_khat(0.5)) == []
    assert "Pareto k-hat is 0.90" in Pathfinder().warnings(with_khat(0.9))[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"paths": 0}, r"paths=...\) takes an integer of at least 1; got 0"),
        ({"memory": 2.5}, r"memory=...\) takes an integer"),
        ({"max_steps": 0}, r"max_steps=...\) takes an integer"),
        ({"elbo_samples": 1}, r"elbo_samples=...\) takes an integer of at least 2"),
        ({"proposals": 10}, r"proposals=...\) takes an integer of at least 100"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(_errors.MethodError, match=match):
        Pathfinder(**options)
