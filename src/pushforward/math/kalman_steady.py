r"""Log likelihood of a series whose step does not change, with a switch to the steady-state gain.

Only offsets and data vary, so B B', D D' + R and B D' are formed once and one matrix [H; A] maps the carry. Once the
covariance has converged to rounding the gain K is constant, and the rest of the series is the affine recursion
c_t = L c_{t-1} + K (y_t - d_t) + b_t, L = A - K H, with every product but the one by L outside the loop (Anderson
and Moore 1979, "Optimal Filtering", ch. 4, for the convergence; Harvey 1989, section 3.3.3, for the switch).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pushforward.math.kalman import LOG_2PI, Step, dense
from pushforward.math.small_matrices import SMALL, eliminate, product, solve_factor, swept, symmetric

CHUNK = 32
"""Times between tests of convergence."""


class ConstantFiltered(NamedTuple):
    """A filtered series: log p(y_1..y_T), means of c_1..c_T, covariance of c_T, and where the gain became constant.

    `full_steps` counts the steps whose covariance was computed; the rest shared the last gain.
    """

    log_likelihood: Float[Array, ""]
    means: Float[Array, "time n"]
    cov: Float[Array, "n n"]
    full_steps: Int[Array, ""]


class _System(NamedTuple):
    """What does not depend on time: [H; A] and the covariance of the joint noise of data and carry."""

    maps: Float[Array, "k n"]
    noise: Float[Array, "k k"]


class _Input(NamedTuple):
    """What does: y - d with zero where missing, 1 where present, b."""

    y: Float[Array, "time m"]
    present: Float[Array, "time m"]
    b: Float[Array, "time n"]


def filter_constant(
    mean: Float[Array, " n"],
    cov: Float[Array, "n n"],
    step: Step,
    ys: Float[Array, "time m"],
    *,
    steady: bool = True,
) -> ConstantFiltered:
    """Filters a series whose step is constant but for `b` and `d`; reverse-mode differentiable in all arguments.

    The covariance counts as converged when over `CHUNK` steps it moved by less than 1e-14 of its largest entry
    (1e-6 in float32); log likelihood and gradient then agree with the full recursion to about 1e-12. Data that are
    missing keep the full recursion up to the last of them. Under `vmap` both ways are computed: write
    `steady=False` there.

    Args:
        mean: mean of c_0, shape (n,).
        cov: its covariance, shape (n, n).
        step: the step; `b` has shape (n,) or (time, n), `d` (m,) or (time, m).
        ys: data, shape (time, m), NaN where missing.
        steady: whether to look for convergence of the covariance.
    """
    length, m = ys.shape
    n = mean.shape[0]
    noises = jnp.concatenate([step.D, step.B])
    noise = (noises @ noises.T).at[:m, :m].add(dense(step.R))
    system = _System(jnp.concatenate([step.H, step.A]), symmetric(noise))
    missing = jnp.isnan(ys)
    residual = jnp.where(missing, 0.0, ys - jnp.broadcast_to(step.d, ys.shape))
    inputs = _Input(residual, 1.0 - missing.astype(ys.dtype), jnp.broadcast_to(step.b, (length, n)))
    if length < 2 * CHUNK or not n:
        (_, cov), (log_likelihood, means) = _full(system, (mean, cov), (inputs, None))
        full_steps = jnp.asarray(length)
    else:
        (mean, cov), (log_likelihood, means), converged, full_steps = _chunks(system, (mean, cov), inputs, steady)
        if steady:
            term, rest = lax.cond(
                converged & (full_steps < length),
                _steady,
                lambda *_: (jnp.zeros_like(log_likelihood), jnp.zeros_like(means)),
                *(system, mean, cov, inputs, full_steps),
            )
            log_likelihood, means = log_likelihood + term, means + rest
    log_likelihood = log_likelihood - 0.5 * LOG_2PI * jnp.sum(inputs.present)
    return ConstantFiltered(log_likelihood, means, cov, full_steps)


def _joint(system: _System, cov: Array, innovation: Array, present: Array | None) -> Array:
    """Covariance of (data, next carry, innovation's row): [[S, C'], [C, V], [innovation, 0]].

    Missing data become independent of all else, of variance 1. The innovation is one row more to eliminate, which
    saves a triangular solve.
    """
    m = innovation.shape[0]
    half = lax.optimization_barrier(product(system.maps, cov))
    joint = lax.optimization_barrier(product(half, system.maps.T) + system.noise)
    if present is not None:
        kept = jnp.concatenate([present, jnp.ones(joint.shape[0] - m, joint.dtype)])
        joint = joint * (kept[:, None] * kept[None]) + jnp.diag(1.0 - kept)
    row = jnp.concatenate([innovation, jnp.zeros(joint.shape[0] - m, joint.dtype)])
    return jnp.concatenate([joint, row[None]])


def _gain(system: _System, cov: Array, innovation: Array, present: Array | None) -> tuple[Array, Array, Array, Array]:
    """Factor F of S, C F^-T, the next covariance, and F^-1 innovation."""
    m = innovation.shape[0]
    joint = _joint(system, cov, innovation, present)
    columns = eliminate(joint, m)
    below = columns[m:-1]
    return columns[:m], below, symmetric(joint[m:-1, m:] - product(below, below.T)), columns[-1]


def _full(system: _System, start: tuple[Array, Array], series: tuple[_Input, Array | None]) -> tuple:
    """The full recursion; the log likelihood without its constant.

    A series is the inputs, and which of them count: the others leave all as it is. None: all count.
    """
    m = series[0].y.shape[1]

    def move(carry, item: tuple[_Input, Array | None]):
        now, counts = item
        after = counted(carry[0], carry[1], now)
        if counts is None:
            return after
        blank = (carry, (jnp.zeros_like(after[1][0]), carry[0]))
        return jax.tree.map(lambda new, old: jnp.where(counts, new, old), after, blank)

    def counted(mean: Array, cov: Array, now: _Input):
        predicted = product(system.maps, mean)
        innovation = now.y - now.present * predicted[:m]
        push = predicted[m:] + now.b
        if not 0 < m <= SMALL:
            factor, below, cov, white = _gain(system, cov, innovation, now.present)
            term = -jnp.sum(jnp.log(jnp.diagonal(factor))) - 0.5 * jnp.sum(white**2)
            mean = push + product(below, white)
            return (mean, cov), (term, mean)
        joint = _joint(system, cov, innovation, now.present)
        diagonal, columns = swept(joint, m)
        cov = symmetric(joint[m:-1, m:] - sum(c[:-1, None] * c[None, :-1] for c in columns))
        mean = push + sum(c[:-1] * c[-1] for c in columns)
        return (mean, cov), (-sum(jnp.log(d) + 0.5 * c[-1] ** 2 for d, c in zip(diagonal, columns, strict=True)), mean)

    carry, (terms, means) = lax.scan(move, start, series)
    return carry, (jnp.sum(terms), means)


def _chunks(system: _System, start: tuple[Array, Array], inputs: _Input, steady: bool) -> tuple:
    """The full recursion by chunks, which are skipped once the covariance has converged.

    Times that do not count fill up the first chunk, so that one body serves all.
    """
    mean, cov = start
    length = len(inputs.y)
    tolerance = 1e-14 if cov.dtype == jnp.float64 else 1e-6
    idle = -length % CHUNK
    counts = jnp.arange(-idle, length) >= 0 if idle else None
    padded = jax.tree.map(lambda x: jnp.pad(x, ((idle, 0), (0, 0))), inputs)
    chunks = jax.tree.map(lambda x: x.reshape(-1, CHUNK, *x.shape[1:]), (padded, counts))
    # Recomputing a chunk in the backward pass is cheaper than storing its matrices: they stay in the cache.
    full = jax.checkpoint(_full)
    complete = jnp.all(chunks[0].present == 1.0, axis=(1, 2))
    complete_from_here = jnp.flip(jnp.cumprod(jnp.flip(complete.astype(jnp.int32)))) == 1

    def skip(system, carry, chunk):
        return carry, (jnp.zeros((), cov.dtype), jnp.zeros_like(chunk[0].b))

    def move(carry, slices):
        (state, settled, count), (chunk, complete) = carry, slices
        skipped = settled & complete
        after, out = lax.cond(skipped, skip, full, system, state, chunk) if steady else full(system, state, chunk)
        old, new = lax.stop_gradient((state[1], after[1]))
        still = jnp.max(jnp.abs(new - old)) <= tolerance * jnp.max(jnp.abs(new))
        settled = settled | (still & complete & steady)
        return (after, settled, count + jnp.where(skipped, 0, CHUNK)), out

    first = ((mean, cov), jnp.asarray(False), jnp.asarray(-idle))
    (state, settled, count), (terms, means) = lax.scan(move, first, (chunks, complete_from_here))
    return state, (jnp.sum(terms), means.reshape(-1, mean.shape[0])[idle:]), settled, count


def _steady(system: _System, mean: Array, cov: Array, inputs: _Input, start: Array) -> tuple[Array, Array]:
    """Log likelihood and means of the times after `start`, zero before, with the gain at `cov`."""
    length, m = inputs.y.shape
    factor, below, *_ = _gain(system, cov, jnp.zeros(m, cov.dtype), None)
    gain = solve_factor(factor, below.T, transposed=True).T
    H, A = system.maps[:m], system.maps[m:]
    later = jnp.arange(length)[:, None] >= start
    # The mean reached by the full recursion enters as the input of the last time before the switch.
    entry = jnp.where(jnp.arange(length)[:, None] == start - 1, mean[None], 0.0)
    pushed = jnp.where(later, inputs.y @ gain.T + inputs.b, entry)
    L = A - gain @ H

    # A matrix-vector product per time costs less than blocks of times, whose powers of L mean log(block) more work.
    def move(mean, push):
        after = product(L, mean) + push
        return after, (mean, after)

    _, (before, means) = lax.scan(move, jnp.zeros_like(mean), pushed)
    innovations = jnp.where(later, inputs.y - before @ H.T, 0.0)
    white = solve_factor(factor, innovations.T, transposed=False)
    log_factor = jnp.sum(jnp.log(jnp.diagonal(factor)))
    return -0.5 * jnp.sum(white**2) - (length - start) * log_factor, jnp.where(later, means, 0.0)
