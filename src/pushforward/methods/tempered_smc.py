"""`TemperedSMC`: islands of particles that are led from the prior to the posterior, by BlackJAX."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods._base import Draws, Method, check_fraction, check_integer, count
from pushforward.model.inverse import InverseProblem

_DEAD = -1e30
_WALKS = 0.3
_SCALES = (0.15, 1.0)
_LARGE_ERROR = 0.5


class TemperedSMC(Method):
    """Sequential Monte Carlo along ``p(z) p(y | z)^lambda``, lambda from 0 to 1; estimates the evidence.

    Each stage raises lambda so far that the weights ``p(y | z)^delta`` keep a conditional effective sample size of
    ``target_ess`` times the particles, multiplies the evidence by their mean, resamples the particles
    systematically and moves each by ``mutation_steps`` steps. Tempering, resampling and the Metropolis-Hastings
    kernel are BlackJAX's.

    The moves suit few and many dimensions. With mean ``m`` and covariance ``C`` of the other islands' particles,
    a step is a random walk ``z' = z + s (2.38^2 C / d)^1/2 xi``, which follows bent posteriors and their tails, or
    the autoregression ``z' = m + sqrt(1 - s^2) (z - m) + s C^1/2 xi``, reversible for N(m, C) and so always
    accepted where the posterior is Gaussian, in any dimension. Kind and scale s are drawn anew at each step.

    The islands are of equal standing and exchange no particles; only the schedule is common, and ``m`` and ``C``
    come from the others. They are the chains of the result, so that R-hat tells whether they agree, and the
    evidence is the mean of theirs, with a standard error from their spread.
    The mean of products of mean weights is unbiased for a schedule fixed in advance (Del Moral 2004, theorem
    7.4.2); adaptation adds a bias of order 1 / particles.

    Use it for the evidence, for multimodal posteriors, and for models without a gradient. Where NUTS works and
    only draws are wanted, NUTS needs fewer runs of the model in many dimensions.

    Args:
        particles: particles of each island, which gives at most that many draws; fewer are evenly spaced ones.
        islands: number of islands; they are what `mesh=` splits.
        target_ess: fraction of the particles that the weights of a stage are to be worth.
        mutation_steps: steps of each particle in each stage.
        max_stages: stages at most; the run ends when lambda is 1.

    Reference:
        Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers, doi:10.1111/j.1467-9868.2006.00553.x;
        Jasra, Stephens, Doucet, Tsagaris (2011), doi:10.1111/j.1467-9469.2010.00723.x (choice of delta).

    Example:
        >>> import pushforward as pf
        >>> pf.TemperedSMC(particles=4000).islands
        8
    """

    particles: int = 2000
    islands: int = 8
    target_ess: float = 0.5
    mutation_steps: int = 10
    max_stages: int = 100

    shards = "islands"

    def __check_init__(self):
        check_integer("TemperedSMC", 1, mutation_steps=self.mutation_steps)
        check_integer("TemperedSMC", 2, islands=self.islands, particles=self.particles, max_stages=self.max_stages)
        check_fraction("TemperedSMC", target_ess=self.target_ess)

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        keys = jax.random.split(key, self.islands)
        first = runner.call(_start, self, problem, keys)
        last = runner.loop(_advance, first, self.max_stages, self, problem, keys, runner.mesh)
        return _package(self, jax.device_get(last), min(draws, self.particles))

    def warnings(self, draws: Draws) -> list[str]:
        """Islands that disagree on the evidence."""
        error = float(draws.summary["log_evidence_se"])
        if error <= _LARGE_ERROR:
            return []
        return [
            f"The islands disagree on the evidence: log_evidence_se is {error:.2f}. Some miss part of the posterior. "
            f"Increase mutation_steps (now {self.mutation_steps}) or particles (now {self.particles})."
        ]


class _Islands(eqx.Module):
    """All islands: particles (island, particle, d) weighted for `temperature`, which they share."""

    z: Array
    weights: Array
    temperature: Array
    log_evidence: Array
    acceptance: Array
    stages: Array
    finished: Array
    alive: Array


def _start(method: TemperedSMC, problem: InverseProblem, keys: Key) -> _Islands:
    def prior(key: Key) -> Array:
        return jax.random.normal(jax.random.fold_in(key, method.max_stages), (method.particles, problem.dimension))

    zero, no = jnp.zeros(method.islands), jnp.zeros((), bool)
    weights = jnp.full((method.islands, method.particles), 1 / method.particles)
    return _Islands(jax.vmap(prior)(keys), weights, jnp.zeros(()), zero, zero, jnp.zeros((), int), no, ~no)


def _advance(
    state: _Islands,
    start: Array,
    stop: Array,
    method: TemperedSMC,
    problem: InverseProblem,
    keys: Key,
    mesh: Mesh | None,
) -> _Islands:
    """Carry all islands from stage `start` to stage `stop`, or through the stage that moves them at lambda = 1."""

    def unfinished(s: _Islands) -> Array:
        return (s.stages < stop) & ~s.finished & s.alive

    return jax.lax.while_loop(unfinished, lambda s: _stage(s, method, problem, keys, mesh), state)


def _stage(s: _Islands, method: TemperedSMC, problem: InverseProblem, keys: Key, mesh: Mesh | None) -> _Islands:
    """Choose the next lambda from the weighted particles; resample and move them at the present one; weight anew."""
    from blackjax.smc import tempered

    kernel = _kernel(method, problem)
    likelihood = _log_likelihood(problem)

    def island(z: Array, weights: Array, mean: Array, root: Array, key: Key) -> tuple[Array, ...]:
        # A leading axis of length 1 is BlackJAX's sign for parameters that all particles share.
        shared = {"mean": mean[None], "root": root[None]}
        state = tempered.TemperedSMCState(z, weights, s.temperature)
        after, info = kernel(jax.random.fold_in(key, s.stages), state, method.mutation_steps, s.temperature, shared)
        return after.particles, jax.vmap(likelihood)(after.particles), jnp.mean(info.update_info.acceptance_rate)

    mean, root = _moments(s.z, s.weights)
    first = s.stages == 0
    mean = jnp.where(first, 0.0, mean)
    root = jnp.where(first, jnp.eye(root.shape[-1], dtype=root.dtype), root)
    z, values, rate = parallel.vmap(island, mesh)(s.z, s.weights, mean, root, keys)
    delta = _increment(values, 1 - s.temperature, method.target_ess)
    log_weights = delta * values
    total = logsumexp(log_weights, axis=1, keepdims=True)
    # A last step that reaches 1 up to rounding is 1.
    temperature = jnp.where(s.temperature + delta > 1 - 1e-6, 1.0, s.temperature + delta)
    return _Islands(
        z,
        jnp.exp(log_weights - total),
        temperature.astype(s.temperature.dtype),
        s.log_evidence + total[:, 0] - jnp.log(values.shape[1]),
        rate,
        s.stages + 1,
        s.temperature >= 1,
        jnp.all(jnp.any(values > _DEAD, axis=1)),
    )


def _log_likelihood(problem: InverseProblem) -> Callable[[Array], Array]:
    """The log likelihood, with a finite stand-in for zero and NaN: 0 times it is 0 at lambda = 0."""

    def value(z: Array) -> Array:
        found = problem.log_likelihood(z)
        return jnp.where(jnp.isfinite(found), found, _DEAD)

    return value


def _kernel(method: TemperedSMC, problem: InverseProblem) -> Callable:
    """BlackJAX's tempered kernel: systematic resampling, then Metropolis-Hastings moves.

    It is called with its present lambda, so that it moves without reweighting: BlackJAX asks for the next lambda
    before it has moved the particles from whose likelihoods the next lambda is best chosen.
    """
    from blackjax.mcmc import random_walk
    from blackjax.smc import tempered
    from blackjax.smc.resampling import systematic

    return tempered.build_kernel(problem.log_prior, _log_likelihood(problem), _move, random_walk.init, systematic)


def _move(key: Key, state: Any, log_density: Callable, mean: Array, root: Array) -> tuple[Any, Any]:
    """One Metropolis-Hastings step with proposal ``m + a (z - m) + b C^1/2 xi``.

    The random walk (a = 1) is symmetric. The autoregression (a^2 + b^2 = 1) is reversible for N(m, C), so the
    ratio of its proposal densities is that of N(m, C).
    """
    from blackjax.mcmc import random_walk

    kind_key, scale_key, move_key = jax.random.split(key, 3)
    walk = jax.random.bernoulli(kind_key, _WALKS)
    low, high = jnp.log(jnp.asarray(_SCALES, mean.dtype))
    scale = jnp.exp(jax.random.uniform(scale_key, (), mean.dtype, low, high))
    a = jnp.where(walk, 1.0, jnp.sqrt(jnp.maximum(1 - scale**2, 0.0)))
    b = jnp.where(walk, scale * 2.38 / mean.size**0.5, scale)

    def propose(key: Key, z: Array) -> Array:
        return mean + a * (z - mean) + b * root @ jax.random.normal(key, z.shape, z.dtype)

    def log_proposal(_: Any, to: Any) -> Array:
        u = solve_triangular(root, to.position - mean, lower=True)
        return jnp.where(walk, 0.0, -0.5 * jnp.sum(u**2))

    return random_walk.build_rmh()(move_key, state, log_density, propose, log_proposal)


def _increment(values: Array, most: Array, target: float) -> Array:
    """The delta <= `most` at which the weights exp(delta values) of living particles have the target ESS."""
    from blackjax.smc.solver import dichotomy

    living = (values > _DEAD).ravel()
    relative = jnp.where(living, values.ravel() - jnp.max(values), 0.0)

    def excess(delta: Array) -> Array:
        log_weights = jnp.where(living, delta * relative, -jnp.inf)
        return 2 * logsumexp(log_weights) - logsumexp(2 * log_weights) - jnp.log(target * jnp.sum(living))

    return dichotomy(excess, jnp.zeros_like(most), most)


def _moments(particles: Array, weights: Array) -> tuple[Array, Array]:
    """For each island, mean and Cholesky factor of the covariance of the particles of all others.

    A kernel that is fitted to the very particles that it moves is biased towards them, at d = 50 by 1 nat
    of log evidence. The covariance is shrunk to its diagonal by d / (d + particles).
    """
    islands, n, d = particles.shape
    means = jnp.einsum("kn,knd->kd", weights, particles)
    centre = jnp.mean(means, axis=0)
    roots = (particles - centre) * jnp.sqrt(weights)[..., None]
    squares = jnp.einsum("kni,knj->kij", roots, roots)
    shift = (jnp.sum(means - centre, axis=0) - (means - centre)) / (islands - 1)
    square = (jnp.sum(squares, axis=0) - squares) / (islands - 1)
    share = d / (d + n * (islands - 1))

    def root(shift: Array, square: Array) -> Array:
        covariance = square - jnp.outer(shift, shift)
        diagonal = jnp.diag(covariance)
        floor = 10 * jnp.finfo(diagonal.dtype).eps * jnp.maximum(jnp.max(diagonal), jnp.finfo(diagonal.dtype).eps)
        return jnp.linalg.cholesky((1 - share) * covariance + jnp.diag(share * diagonal + floor))

    return centre + shift, jax.vmap(root)(shift, square)


def _package(method: TemperedSMC, last: _Islands, draws: int) -> Draws:
    """Evenly spaced particles; the last stage moved them at lambda = 1, so they have equal weights."""
    chosen = ((np.arange(draws) + 0.5) * method.particles / draws).astype(int)
    outcome = Outcome.SUCCESS if last.finished else Outcome.MAXIMUM_STEPS
    outcome = outcome if last.alive else Outcome.NONFINITE_START
    # Per stage: start and steps of each particle, its weight, and BlackJAX's weight at the unchanged lambda.
    runs = count((method.mutation_steps + 3) * method.particles * method.islands * int(last.stages))
    return Draws(np.asarray(last.z)[:, chosen], {}, _summary(last), np.asarray(int(outcome)), runs, count(0))


def _summary(last: _Islands) -> dict[str, Any]:
    """The mean of the islands' evidences, with its standard error from their spread (delta method)."""
    values = np.asarray(last.log_evidence, float)
    islands, largest = values.size, values.max()
    with np.errstate(invalid="ignore"):  # all islands dead: the evidence is zero and its logarithm -inf
        relative = np.exp(values - largest)
        spread = relative.std(ddof=1) / relative.mean()
    return {
        "log_evidence": largest + np.log(relative.mean()),
        "log_evidence_se": spread / np.sqrt(islands),
        "stages": last.stages,
        "temperature": last.temperature,
        "acceptance_rate": np.mean(last.acceptance),
    }
