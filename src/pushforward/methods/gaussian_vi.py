"""`GaussianVI`: the Gaussian in noise space that is closest to the posterior in reverse KL."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.math import points
from pushforward.methods import _scouting
from pushforward.methods._base import Draws, Method, check_integer, check_positive, count
from pushforward.methods._covariance import Covariance, Diagonal, Full, LowRank, covariance_option
from pushforward.methods._importance import evidence_summary, khat_warning
from pushforward.methods._scouting import Scouts
from pushforward.model.inverse import InverseProblem

_START_SCALE = 0.1
_IDLE_STEPS = 15


class GaussianVI(Method):
    """Gaussian variational inference in ``z``, by natural gradients on a fixed set of points.

    Maximises ``ELBO(m, S) = E_q[log p(z, y)] + entropy(q)`` over ``q = N(m, S)``. The expectation is a
    sample average over moment-matched quasi-Monte Carlo points (Opper and Archambeau 2009; Khan and Rue
    2023), so the run is deterministic, exact for linear-Gaussian models, and stops when 15 steps together
    gain less than ``tolerance`` nats. The reported ELBO comes from fresh points.

    The fit starts where a short climb of many prior points found the highest density. Use it for a fast first
    posterior. It is one Gaussian in ``z``: skewed and curved posteriors show as Pareto k-hat above 0.7; modes that it
    never saw do not.

    Args:
        covariance: "full", "diagonal" or "low_rank" (`pf.LowRank(k)`).
        samples: points of the sample average; at least 8 d are always used.
        tolerance: gain of the ELBO, in nats, at which to stop.
        max_steps: evaluations of the sample average at most, scouting apart.

    Example:
        >>> import pushforward as pf
        >>> pf.GaussianVI(covariance="diagonal").samples
        512
    """

    covariance: Covariance = eqx.field(default="full", converter=covariance_option)
    samples: int = 512
    tolerance: float = 1e-4
    max_steps: int = 1000

    shards = "samples"
    gradients = True

    def __check_init__(self):
        check_integer("GaussianVI", 2, samples=self.samples)
        check_integer("GaussianVI", 1, max_steps=self.max_steps)
        check_positive("GaussianVI", tolerance=self.tolerance)

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        d, size = problem.dimension, self.covariance.noise_size(problem.dimension)
        noise = points.fit_noise(key, 2 * max(self.samples // 2, 4 * size, 1), size, draws)
        if isinstance(self.covariance, LowRank):
            diagonal = points.fit_noise(key, 2 * max(self.samples // 2, 4 * d, 1), d, 1)
            found = runner.call(_fit_low_rank, self, problem, key, diagonal, noise, runner.mesh)
        else:
            found = runner.call(_fit, self, problem, noise, runner.mesh)
        q, summary, log_weights = jax.device_get(found)
        outcome = _outcome(self, summary, log_weights)
        runs = count((_scouting.STEPS + summary["steps"] + log_weights.shape[0]) * log_weights.shape[1])
        summary = {k: summary[k] for k in ("elbo_fitted", "steps")} | evidence_summary(log_weights)
        return Draws(q[None], {}, summary, np.asarray(int(outcome)), runs, runs, log_weights)

    def warnings(self, draws: Draws) -> list[str]:
        """Pareto k-hat above 0.7; a sample average that fits its own points."""
        khat = float(draws.summary["khat"])
        full = "" if isinstance(self.covariance, Full) else ", or covariance='full'"
        notes = khat_warning(khat, f"Use NUTS or TemperedSMC{full}.")
        gap = float(draws.summary["elbo_fitted"] - draws.summary["elbo"])
        if gap > max(0.1, 5 * float(draws.summary["elbo_se"])):
            notes.append(
                f"The ELBO on the points of the fit exceeds that on fresh points by {gap:.2f} nats. "
                f"Increase samples (now {self.samples})."
            )
        return notes


type _Fitted = tuple[Array, dict[str, Array], Array]
"""Draws of q, a summary of the fit, and log weights of fresh points."""


class _State(eqx.Module):
    """One state of the loop that evaluates a batch of points per pass.

    The first passes move the scouts, the next fit q on matched points; when `fitted`, the remaining passes
    evaluate fresh points. All are the same code, so that the model is compiled once.
    """

    scouts: Scouts
    family: Any
    trial: Any
    rho: Array
    elbo: Array
    gain: Array
    steps: Array
    mark: Array
    idle: Array
    fitted: Array
    replicate: Array
    log_weights: Array


def _fit(method: GaussianVI, problem: InverseProblem, noise: points.FitNoise, mesh: Mesh | None) -> _Fitted:
    last = climb(method, method.covariance, problem, noise, mesh)
    summary = {"elbo_fitted": last.elbo, "steps": last.steps - _scouting.STEPS, "gain": last.gain}
    return jax.vmap(last.family.sample)(noise.drawn), summary, last.log_weights


def climb(
    method: GaussianVI, covariance: Covariance, problem: InverseProblem, noise: points.FitNoise, mesh: Mesh | None
) -> _State:
    """Fit q on matched points, then evaluate one batch of fresh points per replicate."""
    d, dtype = problem.dimension, noise.matched.dtype
    replicates, n = noise.fresh.shape[:2]
    batch = parallel.vmap(jax.value_and_grad(problem.log_density), mesh)

    def step(s: _State) -> _State:
        e = jnp.where(s.fitted, noise.fresh[s.replicate], noise.matched)
        q = jax.tree.map(lambda a, b: jnp.where(s.fitted, a, b), s.family, s.trial)
        scouting = s.steps < _scouting.STEPS
        values, gradients = batch(jnp.where(scouting, s.scouts.z, jax.vmap(q.sample)(e)))
        scouted = _scout(s, covariance.start(d, _START_SCALE), values, gradients)
        improved = _improve(method, s, q, e, noise.weights, values, gradients)
        recorded = _record(s, values - jax.vmap(q.log_density)(e))
        climbed = jax.tree.map(lambda a, b: jnp.where(scouting, a, b), scouted, improved)
        return jax.tree.map(lambda a, b: jnp.where(s.fitted, a, b), recorded, climbed)

    def unfinished(s: _State) -> Array:
        return ~s.fitted | (s.replicate < replicates)

    start = covariance.start(d, _START_SCALE)
    one, zero = jnp.ones((), dtype), jnp.zeros((), int)
    weights = jnp.zeros((replicates, n), dtype)
    first = _State(
        Scouts.at(noise.matched),
        start,
        start,
        one,
        -jnp.inf * one,
        jnp.inf * one,
        zero,
        -jnp.inf * one,
        zero,
        jnp.zeros((), bool),
        zero,
        weights,
    )
    return jax.lax.while_loop(unfinished, step, first)


def _scout(s: _State, narrow: Any, values: Array, gradients: Array) -> _State:
    """Move the scouts; the fit will start narrowly around the best point that they have seen."""
    scouts = s.scouts.climb(values, gradients)
    trial = eqx.tree_at(lambda q: q.mean, narrow, scouts.best)
    return eqx.tree_at(lambda t: (t.scouts, t.family, t.trial, t.steps), s, (scouts, trial, trial, s.steps + 1))


def _record(s: _State, weights: Array) -> _State:
    """Keep log p - log q at fresh points."""
    log_weights = s.log_weights.at[s.replicate].set(weights, mode="drop")
    return eqx.tree_at(lambda t: (t.replicate, t.log_weights), s, (s.replicate + 1, log_weights))


def _improve(
    method: GaussianVI, s: _State, q: Any, noise: Array, weights: Array, values: Array, gradients: Array
) -> _State:
    """Accept the trial if the ELBO did not fall, and propose the next step; else halve the step."""
    elbo = weights @ values + q.entropy()
    slack = 20 * jnp.finfo(elbo.dtype).eps * jnp.abs(elbo)
    better = jnp.isfinite(elbo) & jnp.all(jnp.isfinite(gradients)) & (elbo >= s.elbo - slack)
    unset = ~jnp.isfinite(s.elbo)
    moved = q.with_moments(weights[:, None] * gradients, noise)
    accepted = jax.tree.map(lambda a, b: jnp.where(better, a, b), moved, s.family)
    rho = jnp.where(better, jnp.minimum(1.0, 2 * s.rho), s.rho / 2)
    proposed, narrower = accepted.step(rho), s.trial.shrunk()
    trial = jax.tree.map(lambda a, b: jnp.where(unset & ~better, a, b), narrower, proposed)
    gain = jnp.where(better, moved.gain(), s.gain)
    steps = s.steps + 1
    # Rounding of the ELBO sets a floor to the gain that can be told from 0.
    tolerance = jnp.maximum(method.tolerance, slack)
    higher = better & (elbo > s.mark + tolerance)
    mark, idle = jnp.where(higher, elbo, s.mark), jnp.where(higher, 0, s.idle + 1)
    done = better & (gain < jnp.maximum(0.01 * method.tolerance, slack))
    fitted = done | (idle >= _IDLE_STEPS) | (steps >= _scouting.STEPS + method.max_steps)
    elbo = jnp.where(better, elbo, s.elbo)
    return _State(s.scouts, accepted, trial, rho, elbo, gain, steps, mark, idle, fitted, s.replicate, s.log_weights)


def _outcome(method: GaussianVI, summary: dict[str, np.ndarray], log_weights: np.ndarray) -> Outcome:
    """Converged if little is left to gain; a step that cannot be improved in floating point is no failure."""
    elbo = summary["elbo_fitted"]
    if not np.isfinite(elbo):
        return Outcome.NONFINITE_START
    if not np.isfinite(log_weights).all():
        return Outcome.NONFINITE
    slack = max(10 * method.tolerance, 1e-3, 1e3 * np.finfo(elbo.dtype).eps * abs(elbo))
    return Outcome.MAXIMUM_STEPS if summary["gain"] > slack else Outcome.SUCCESS


def _fit_low_rank(
    method: GaussianVI,
    problem: InverseProblem,
    key: Key,
    diagonal: points.FitNoise,
    noise: points.FitNoise,
    mesh: Mesh | None,
) -> _Fitted:
    """The diagonal optimum, then L-BFGS over mean, diagonal and factor in coordinates scaled by it."""
    import optimistix as optx

    scaled = climb(method, Diagonal(), problem, diagonal, mesh).family
    batch = parallel.vmap(lambda x: problem.log_density(scaled.mean + scaled.root * x), mesh)
    offset = jnp.sum(jnp.log(scaled.root))

    def negative_elbo(q: Any, _: None) -> Array:
        value = -(noise.weights @ batch(jax.vmap(q.sample)(noise.matched)) + offset + q.entropy())
        # The line search steps back from infinity, and lets NaN pass.
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    start: Any = method.covariance.start(problem.dimension, 1.0)
    tilt = 0.1 * jax.random.normal(key, start.factor.shape)
    start = eqx.tree_at(lambda q: q.factor, start, tilt)
    solver = optx.LBFGS(rtol=method.tolerance, atol=method.tolerance)
    found = optx.minimise(negative_elbo, solver, start, max_steps=method.max_steps, throw=False)
    q = found.value

    def replicate(e: Array) -> Array:
        return batch(jax.vmap(q.sample)(e)) + offset - jax.vmap(q.log_density)(e)

    log_weights = jax.lax.map(replicate, noise.fresh)
    gain = jnp.where(found.result == optx.RESULTS.successful, 0.0, jnp.inf)
    summary = {"elbo_fitted": -negative_elbo(q, None), "steps": found.stats["num_steps"], "gain": gain}
    return scaled.mean + scaled.root * jax.vmap(q.sample)(noise.drawn), summary, log_weights
