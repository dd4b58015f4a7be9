"""`GaussianVI`: the Gaussian in noise space that is closest to the posterior in reverse KL."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.math import points
from pushforward.methods._base import Draws, Method, check_integer, check_positive, count
from pushforward.methods._covariance import Covariance, Diagonal, LowRank, covariance_option
from pushforward.methods._importance import evidence_summary, khat_warning
from pushforward.model.inverse import InverseProblem

_REPLICATES = 16
_START_SCALE = 0.1
_LEAST_STEP = 1e-5


class GaussianVI(Method):
    """Gaussian variational inference in ``z``, by natural gradients on a fixed set of points.

    Maximises ``ELBO(m, S) = E_q[log p(z, y)] + entropy(q)`` over ``q = N(m, S)``. The expectation is a
    sample average over moment-matched quasi-Monte Carlo points (Opper and Archambeau 2009; Khan and Rue
    2023), so the run is deterministic, exact for linear-Gaussian models, and stops when a further step
    is predicted to gain less than ``tolerance`` nats. The reported ELBO comes from fresh points.

    Use it for a fast first posterior. It is one Gaussian in ``z``: skewed, curved or multimodal
    posteriors show as Pareto k-hat above 0.7.

    Args:
        covariance: "full", "diagonal" or "low_rank" (`pf.LowRank(k)`).
        samples: points of the sample average; at least 8 d are always used.
        tolerance: predicted gain of the ELBO, in nats, at which to stop.
        max_steps: evaluations of the sample average at most.

    Example:
        >>> import pushforward as pf
        >>> pf.GaussianVI(covariance="diagonal").samples
        512
    """

    covariance: Covariance = eqx.field(default="full", converter=covariance_option)
    samples: int = 512
    tolerance: float = 1e-5
    max_steps: int = 1000

    shards = "samples"

    def __check_init__(self):
        check_integer("GaussianVI", 2, samples=self.samples)
        check_integer("GaussianVI", 1, max_steps=self.max_steps)
        check_positive("GaussianVI", tolerance=self.tolerance)

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        fit = _fit_low_rank if isinstance(self.covariance, LowRank) else _fit
        return runner.call(fit, self, problem, key, draws, runner.mesh)

    def warnings(self, draws: Draws) -> list[str]:
        """Pareto k-hat above 0.7; a sample average that fits its own points."""
        khat = float(draws.summary["khat"])
        notes = khat_warning(khat, "Use FlowVI or NUTS, or covariance='full'.")
        gap = float(draws.summary["elbo_fitted"] - draws.summary["elbo"])
        if gap > max(0.1, 5 * float(draws.summary["elbo_se"])):
            notes.append(
                f"The ELBO on the points of the fit exceeds that on fresh points by {gap:.2f} nats. "
                f"Increase samples (now {self.samples})."
            )
        return notes


class _State(eqx.Module):
    """One state of the loop that evaluates a batch of points per pass.

    Passes first fit q on matched points; when `fitted`, the remaining passes evaluate fresh points, so
    that the model is compiled once.
    """

    family: Any
    trial: Any
    rho: Array
    elbo: Array
    gain: Array
    steps: Array
    fitted: Array
    replicate: Array
    log_weights: Array


def _fit(method: GaussianVI, problem: InverseProblem, key: Key, draws: int, mesh: Mesh | None) -> Draws:
    d = problem.dimension
    # One call for all random numbers: shifts of the fresh batches and the draws' own noise.
    uniforms = jax.random.uniform(key, (_REPLICATES + draws, d))
    last = _climb(method, method.covariance, problem, uniforms[:_REPLICATES], mesh)
    noise = points.to_normal(uniforms[_REPLICATES:])
    passes = count((last.steps + _REPLICATES) * last.log_weights.shape[1])
    summary = evidence_summary(last.log_weights) | {"elbo_fitted": last.elbo, "steps": last.steps}
    outcome = _outcome(method, last.elbo, last.gain, last.log_weights)
    return Draws(jax.vmap(last.family.sample)(noise)[None], {}, summary, outcome, passes, passes, last.log_weights)


def _climb(
    method: GaussianVI, covariance: Covariance, problem: InverseProblem, shifts: Array, mesh: Mesh | None
) -> _State:
    """Fit q on matched points, then evaluate one batch of fresh points per row of `shifts`."""
    d, dtype = problem.dimension, jnp.zeros(()).dtype
    n = _points(method, d)
    matched = jnp.asarray(covariance.matched(n, d), dtype)
    lattice = jnp.asarray(points.sobol(n, d), dtype)
    batch = parallel.vmap(jax.value_and_grad(problem.log_density), mesh)

    def step(s: _State) -> _State:
        fresh = points.shifted_normal(shifts[s.replicate], lattice)
        noise = jnp.where(s.fitted, fresh, matched)
        q = jax.tree.map(lambda a, b: jnp.where(s.fitted, a, b), s.family, s.trial)
        values, gradients = batch(jax.vmap(q.sample)(noise))
        improved = _improve(method, s, q, noise, values, gradients)
        recorded = _record(s, values - jax.vmap(q.log_density)(noise))
        return jax.tree.map(lambda a, b: jnp.where(s.fitted, a, b), recorded, improved)

    def unfinished(s: _State) -> Array:
        return ~s.fitted | (s.replicate < shifts.shape[0])

    start = covariance.start(d, _START_SCALE)
    one, zero = jnp.ones((), dtype), jnp.zeros((), int)
    weights = jnp.zeros((shifts.shape[0], n), dtype)
    first = _State(start, start, one, -jnp.inf * one, jnp.inf * one, zero, jnp.zeros((), bool), zero, weights)
    return jax.lax.while_loop(unfinished, step, first)


def _points(method: GaussianVI, noise_size: int) -> int:
    return 2 * max(method.samples // 2, 4 * noise_size, 1)


def _record(s: _State, weights: Array) -> _State:
    """Keep log p - log q at fresh points."""
    log_weights = s.log_weights.at[s.replicate].set(weights, mode="drop")
    return eqx.tree_at(lambda t: (t.replicate, t.log_weights), s, (s.replicate + 1, log_weights))


def _improve(method: GaussianVI, s: _State, q: Any, noise: Array, values: Array, gradients: Array) -> _State:
    """Accept the trial if the ELBO did not fall, and propose the next step; else halve the step."""
    elbo = jnp.mean(values) + q.entropy()
    slack = 20 * jnp.finfo(elbo.dtype).eps * jnp.abs(elbo)
    better = jnp.isfinite(elbo) & jnp.all(jnp.isfinite(gradients)) & (elbo >= s.elbo - slack)
    unset = ~jnp.isfinite(s.elbo)
    moved = q.with_moments(gradients, noise)
    accepted = jax.tree.map(lambda a, b: jnp.where(better, a, b), moved, s.family)
    rho = jnp.where(better, jnp.minimum(1.0, 2 * s.rho), s.rho / 2)
    proposed, narrower = accepted.step(rho), s.trial.shrunk()
    trial = jax.tree.map(lambda a, b: jnp.where(unset & ~better, a, b), narrower, proposed)
    gain = jnp.where(better, moved.gain(), s.gain)
    steps = s.steps + 1
    fitted = (better & (gain < method.tolerance)) | (rho < _LEAST_STEP) | (steps >= method.max_steps)
    elbo = jnp.where(better, elbo, s.elbo)
    return _State(accepted, trial, rho, elbo, gain, steps, fitted, s.replicate, s.log_weights)


def _outcome(method: GaussianVI, elbo: Array, gain: Array, log_weights: Array) -> Array:
    """Converged if little is left to gain; a step that cannot be improved in floating point is no failure."""
    slack = 1e3 * jnp.finfo(elbo.dtype).eps * jnp.abs(elbo)
    late = gain > jnp.maximum(jnp.maximum(method.tolerance, 1e-3), slack)
    lost = jnp.where(late, int(Outcome.MAXIMUM_STEPS), int(Outcome.SUCCESS))
    bad = jnp.where(jnp.isfinite(elbo), int(Outcome.NONFINITE), int(Outcome.NONFINITE_START))
    return jnp.where(jnp.all(jnp.isfinite(log_weights)), lost, bad)


def _fit_low_rank(method: GaussianVI, problem: InverseProblem, key: Key, draws: int, mesh: Mesh | None) -> Draws:
    """The diagonal optimum, then L-BFGS over mean, diagonal and factor in coordinates scaled by it."""
    import optimistix as optx

    d, dtype = problem.dimension, jnp.zeros(()).dtype
    first_key, tilt_key, shift_key, draw_key = jax.random.split(key, 4)
    scaled = _climb(method, Diagonal(), problem, jax.random.uniform(first_key, (1, d)), mesh).family
    size = method.covariance.noise_size(d)
    n = _points(method, size)
    matched = jnp.asarray(method.covariance.matched(n, d), dtype)
    batch = parallel.vmap(lambda x: problem.log_density(scaled.mean + scaled.root * x), mesh)
    offset = jnp.sum(jnp.log(scaled.root))

    def negative_elbo(q: Any, _: None) -> Array:
        return -(jnp.mean(batch(jax.vmap(q.sample)(matched))) + offset + q.entropy())

    start = method.covariance.start(d, 1.0)
    tilt = 0.1 * jax.random.normal(tilt_key, start.factor.shape, dtype)
    solver = optx.LBFGS(rtol=method.tolerance, atol=method.tolerance)
    found = optx.minimise(
        negative_elbo, solver, eqx.tree_at(lambda q: q.factor, start, tilt), max_steps=method.max_steps, throw=False
    )
    q = found.value

    def replicate(shift: Array) -> Array:
        noise = points.shifted_normal(shift, jnp.asarray(points.sobol(n, size), dtype))
        return batch(jax.vmap(q.sample)(noise)) + offset - jax.vmap(q.log_density)(noise)

    log_weights = jax.lax.map(replicate, jax.random.uniform(shift_key, (_REPLICATES, size)))
    z = jax.vmap(q.sample)(jax.random.normal(draw_key, (draws, size), dtype))
    steps = found.stats["num_steps"]
    summary = evidence_summary(log_weights) | {"elbo_fitted": -negative_elbo(q, None), "steps": steps}
    converged = jnp.where(found.result == optx.RESULTS.successful, int(Outcome.SUCCESS), int(Outcome.MAXIMUM_STEPS))
    outcome = jnp.where(jnp.all(jnp.isfinite(log_weights)), converged, int(Outcome.NONFINITE))
    runs = count((steps + _REPLICATES) * n)
    positions = scaled.mean + scaled.root * z
    return Draws(positions[None], {}, summary, outcome, runs, count(steps * n), log_weights)
