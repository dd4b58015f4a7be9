"""`TemperedSMC`: islands of particles that are led from the prior to the posterior."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp, ndtr
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods._base import Draws, Method, check_integer, count
from pushforward.model.inverse import InverseProblem

_DEAD = -1e30
_TARGET_ACCEPTANCE = 0.3
_GAIN = 0.5
_PERIOD = 4
_LARGE_ERROR = 0.5


class TemperedSMC(Method):
    """Sequential Monte Carlo along ``p(z) p(y | z)^lambda``, lambda from 0 to 1; estimates the evidence.

    Each stage raises lambda so far that the weights ``p(y | z)^delta`` keep an effective sample size of
    ``target_ess`` times the particles, multiplies the evidence by their mean, resamples ``particles /
    mutation_steps`` ancestors systematically and moves each for ``mutation_steps`` steps. All states on the
    way are the next particles (waste-free SMC): a stage costs one run of the model per particle.

    The moves suit few and many dimensions. With mean ``m`` and covariance ``C`` of the other islands' particles,
    every fourth is a random walk ``z' = z + s (2.38^2 C / d)^1/2 xi``, which follows bent posteriors and their
    tails; the others are the autoregression ``z' = m + sqrt(1 - b^2) (z - m) + b C^1/2 xi``, reversible for N(m, C)
    and so always accepted where the posterior is Gaussian, in any dimension; ``s`` and ``b`` follow the acceptance.

    The islands are of equal standing and exchange no particles; only the schedule is common, and ``m`` and ``C``
    come from the others. They are the chains of the result, so that R-hat tells whether they agree, and the
    evidence is the mean of theirs, with a standard error from their spread.
    The mean of products of mean weights is unbiased for a schedule fixed in advance (Del Moral 2004, theorem
    7.4.2; Dau and Chopin 2022, proposition 1); adaptation adds a bias of order 1 / particles.

    Use it for the evidence, for multimodal posteriors, and for models without a gradient. Where NUTS works and
    only draws are wanted, NUTS needs fewer runs of the model in many dimensions.

    Args:
        particles: particles of each island, a multiple of `mutation_steps`. An island gives at most that
            many draws; fewer are evenly spaced ones.
        islands: number of islands; they are what `mesh=` splits.
        target_ess: fraction of the particles that the weights of a stage are to be worth.
        mutation_steps: steps of each ancestor, three in four autoregressions.
        max_stages: stages at most; the run ends when lambda is 1.

    Reference:
        Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers, doi:10.1111/j.1467-9868.2006.00553.x;
        Jasra, Stephens, Doucet, Tsagaris (2011), doi:10.1111/j.1467-9469.2010.00723.x (choice of delta);
        Dau, Chopin (2022), Waste-free sequential Monte Carlo, algorithm 2, doi:10.1111/rssb.12475.

    Example:
        >>> from pushforward.methods.tempered_smc import TemperedSMC
        >>> TemperedSMC(particles=4000).islands
        8
    """

    particles: int = 2000
    islands: int = 8
    target_ess: float = 0.5
    mutation_steps: int = 20
    max_stages: int = 100

    shards = "islands"

    def __check_init__(self):
        check_integer("TemperedSMC", 2, islands=self.islands, mutation_steps=self.mutation_steps)
        check_integer("TemperedSMC", 2, particles=self.particles, max_stages=self.max_stages)
        if isinstance(self.target_ess, bool) or not 0 < self.target_ess < 1:
            raise MethodError(f"TemperedSMC(target_ess=...) takes a number between 0 and 1; got {self.target_ess!r}.")
        if self.particles % self.mutation_steps or self.particles < 2 * self.mutation_steps:
            raise MethodError(
                f"TemperedSMC(particles=...) takes a multiple of mutation_steps={self.mutation_steps}, at least twice "
                f"as much; got {self.particles!r}."
            )

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        keys = jax.random.split(key, self.islands)
        first = _start(self, problem.dimension)
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
    """All islands: particles (island, ancestor, step, d), and what a stage carries on.

    Stage 0 draws the prior through the same moves: at lambda = 0, with mean 0, covariance I and b = 1, the
    autoregression proposes independent prior draws and accepts all. So the model is compiled once.
    """

    z: Array
    log_likelihood: Array
    temperature: Array
    log_evidence: Array
    log_scales: Array
    acceptance: Array
    stages: Array
    alive: Array


def _start(method: TemperedSMC, d: int) -> _Islands:
    shape = (method.islands, method.particles // method.mutation_steps, method.mutation_steps)
    zero = jnp.zeros(method.islands)
    return _Islands(
        z=jnp.zeros((*shape, d)),
        log_likelihood=jnp.zeros(shape),
        temperature=jnp.zeros((), zero.dtype),
        log_evidence=zero,
        log_scales=jnp.zeros((method.islands, 2)),
        acceptance=zero,
        stages=jnp.zeros((), int),
        alive=jnp.ones((), bool),
    )


def _advance(
    state: _Islands,
    start: Array,
    stop: Array,
    method: TemperedSMC,
    problem: InverseProblem,
    keys: Key,
    mesh: Mesh | None,
) -> _Islands:
    """Carry all islands from stage `start` to stage `stop`, or to lambda = 1."""

    def unfinished(s: _Islands) -> Array:
        return (s.stages < stop) & ((s.temperature < 1) | (s.stages == 0)) & s.alive

    return jax.lax.while_loop(unfinished, lambda s: _stage(s, method, problem, keys, mesh), state)


def _stage(s: _Islands, method: TemperedSMC, problem: InverseProblem, keys: Key, mesh: Mesh | None) -> _Islands:
    """Reweight, resample, move. Stage 0 has no weights and moves all particles to the prior."""
    first = s.stages == 0
    islands, d = s.z.shape[0], s.z.shape[-1]
    values = s.log_likelihood.reshape(islands, -1)
    particles = s.z.reshape(islands, -1, d)
    delta = jnp.where(first, 0.0, _increment(values.ravel(), 1 - s.temperature, method.target_ess))
    log_weights = jnp.where(first, 0.0, delta * values)
    log_mean = logsumexp(log_weights, axis=1) - jnp.log(values.shape[1])
    weights = jax.nn.softmax(log_weights, axis=1)
    mean, root = _moments(particles, weights)
    mean = jnp.where(first, 0.0, mean)
    root = jnp.where(first, jnp.eye(d, dtype=mean.dtype), root)
    # A last step that reaches 1 up to rounding is 1.
    temperature = jnp.where(s.temperature + delta > 1 - 1e-6, 1.0, s.temperature + delta).astype(values.dtype)

    def move(particles: Array, values: Array, weights: Array, mean: Array, root: Array, scales: Array, key: Key):
        from blackjax.smc.resampling import systematic

        resample_key, move_key = jax.random.split(jax.random.fold_in(key, s.stages))
        chosen = systematic(resample_key, weights, s.z.shape[1])
        moves = _Moves(mean, root, temperature, first)
        return _mutate(moves, particles[chosen], values[chosen], scales, move_key, method, problem)

    z, log_likelihood, log_scales, acceptance = parallel.vmap(move, mesh)(
        particles, values, weights, mean, root, s.log_scales, keys
    )
    return _Islands(
        z=z,
        log_likelihood=log_likelihood,
        temperature=temperature,
        log_evidence=s.log_evidence + log_mean,
        log_scales=jnp.where(first, s.log_scales, log_scales),
        acceptance=acceptance,
        stages=s.stages + 1,
        alive=jnp.all(jnp.any(log_likelihood > _DEAD, axis=(1, 2))),
    )


def _increment(values: Array, most: Array, target: float) -> Array:
    """The delta <= `most` at which the weights exp(delta values) of living particles have the target ESS."""
    from blackjax.smc.solver import dichotomy

    living = values > _DEAD

    def excess(delta: Array) -> Array:
        log_weights = jnp.where(living, delta * (values - jnp.max(values)), -jnp.inf)
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


class _Moves(eqx.Module):
    """Target and proposals of one stage, in coordinates u with z = mean + root u."""

    mean: Array
    root: Array
    temperature: Array
    prior: Array

    def coefficients(self, log_scales: Array, kind: Array) -> tuple[Array, Array, Array]:
        """(a, b, c) of u' = a u + b xi, which is reversible for the precision c = (1 - a^2) / b^2.

        Kind 0 is the autoregression, kind 1 the random walk.
        """
        d = self.mean.size
        b = jnp.exp(jnp.minimum(log_scales[0], 0.0))
        step = jnp.exp(log_scales[1]) * 2.38 / d**0.5
        walk = (kind == 1) & ~self.prior
        b = jnp.where(self.prior, 1.0, jnp.where(walk, step, b))
        a = jnp.where(self.prior, 0.0, jnp.where(walk, 1.0, jnp.sqrt(jnp.maximum(1 - b**2, 0.0))))
        return a, b, jnp.where(walk, 0.0, 1.0)


def _mutate(
    moves: _Moves, z: Array, values: Array, log_scales: Array, key: Key, method: TemperedSMC, problem: InverseProblem
) -> tuple[Array, Array, Array, Array]:
    """Move all ancestors; return states (ancestor, step, d), their likelihoods, scales and acceptance."""
    square = jax.vmap(lambda x: jnp.sum(x**2))

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        u, z, values, scales = carry
        i, noise, threshold = inputs
        kind = (i % _PERIOD == _PERIOD - 1).astype(int)
        a, b, c = moves.coefficients(scales, kind)
        trial_u = a * u + b * noise
        trial = moves.mean + trial_u @ moves.root.T
        found = jax.vmap(problem.log_likelihood)(trial).astype(values.dtype)
        found = jnp.where(jnp.isfinite(found), found, _DEAD)
        ratio = moves.temperature * (found - values) - 0.5 * (square(trial) - square(z))
        ratio = jnp.where(moves.prior, 0.0, ratio + 0.5 * c * (square(trial_u) - square(u)))
        acceptance = jnp.exp(jnp.minimum(ratio, 0.0))
        accepted = threshold < acceptance
        u, z = (jnp.where(accepted[:, None], new, old) for new, old in ((trial_u, u), (trial, z)))
        values = jnp.where(accepted, found, values)
        rate = jnp.mean(acceptance)
        scales = jnp.minimum(scales.at[kind].add(_GAIN * (rate - _TARGET_ACCEPTANCE)), jnp.array([0.0, 2.0]))
        return (u, z, values, scales.astype(log_scales.dtype)), (z, values, rate)

    u = solve_triangular(moves.root, (z - moves.mean).T, lower=True).T
    # One call for all random numbers, which compiles faster: the last column decides on acceptance.
    steps = method.mutation_steps
    normal = jax.random.normal(key, (steps, u.shape[0], u.shape[1] + 1), u.dtype)
    noise, thresholds = normal[..., :-1], ndtr(normal[..., -1])
    carry = u, z, values, log_scales
    (_, _, _, scales), (states, found, rates) = jax.lax.scan(step, carry, (jnp.arange(steps), noise, thresholds))
    return jnp.swapaxes(states, 0, 1), found.T, scales, jnp.mean(rates)


def _package(method: TemperedSMC, last: _Islands, draws: int) -> Draws:
    """Evenly spaced particles, ancestor by ancestor, on the host."""
    n, d = method.particles, last.z.shape[-1]
    chosen = ((np.arange(draws) + 0.5) * n / draws).astype(int)
    z = np.asarray(last.z).reshape(method.islands, n, d)[:, chosen]
    values = np.asarray(last.log_likelihood).reshape(method.islands, n)[:, chosen]
    lp = values - 0.5 * np.sum(z**2, -1) - z.dtype.type(0.5 * d * np.log(2 * np.pi))
    outcome = Outcome.SUCCESS if last.temperature >= 1 else Outcome.MAXIMUM_STEPS
    outcome = outcome if last.alive else Outcome.NONFINITE_START
    runs = count(n * method.islands * int(last.stages))
    return Draws(z, {"lp": lp}, _summary(last), np.asarray(int(outcome)), runs, count(0))


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
