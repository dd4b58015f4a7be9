"""Filtering a chain with linear-Gaussian steps, and drawing from what the filter knows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.math import kalman
from pushforward.math.kalman import Filtered, Record, Step, Updated, Varying
from pushforward.math.small_matrices import solve_factor
from pushforward.methods._linearization import Linearization
from pushforward.methods._loops import checkpointed_scan
from pushforward.model.linear import first_at, step_at
from pushforward.model.state_space import Chain

_AT_ONCE = 16
_STACKED = 5_000_000
"""Entries of stacked matrices up to which the steps of a time-varying chain are linearised before filtering."""


class Series(NamedTuple):
    """A chain as linear steps: its initial law given first data, its steps, and what varies among them."""

    first: Updated
    first_noise: Array
    riders: list[Array]
    steps: Step
    data: Array
    varying: Varying


def begin(chain: Chain, size: int) -> tuple[Updated, Array, list[Array]]:
    """Moments of the first carry given what is observed with it, the noise of that, and what rides along."""
    step = first_at(chain, jnp.zeros(size))
    _, riders, observed = chain.start(jnp.zeros(size))
    return kalman.update(jnp.zeros(0), jnp.zeros((0, 0)), step, observed.data), step.R, riders


def linear_series(chain: Chain, constant: bool, offsets_constant: bool) -> Series | None:
    """A linear chain as matrices: one set where they do not depend on time. None where stacking them is too much."""
    first, noise, riders = begin(chain, chain.initial_dimension)
    n, q, length = first.mean.shape[0], chain.noise_dimension, chain.structure.length
    state, still = jnp.zeros(n), jnp.zeros(q)

    def move(riding: list[Array], t: Array) -> tuple[list[Array], list[Array]]:
        return chain.step(state, riding, t, still).riders, riding

    before = jax.lax.scan(move, riders, jnp.arange(length))[1] if riders else []
    times = jnp.arange(length)
    data = over_time(chain, lambda r, t: chain.step(state, r, t, still).observed.data, before, times)
    if constant:
        one = step_at(chain, state, riders, jnp.asarray(0), still)
        if offsets_constant:
            return Series(first, noise, before, one, data, kalman.CONSTANT)

        def offsets(riding: list[Array], t: Array) -> tuple[Array, Array]:
            moved = chain.step(state, riding, t, still)
            return moved.state, moved.observed.mean

        b, d = over_time(chain, offsets, before, times)
        return Series(first, noise, before, one._replace(b=b, d=d), data, kalman.CONSTANT._replace(b=True, d=True))
    if length * (n + q) * (n + data.shape[1]) > _STACKED:
        return None
    steps = over_time(chain, lambda r, t: step_at(chain, state, r, t, still), before, times)
    return Series(first, noise, before, steps, data, Varying())


def over_time(chain: Chain, fn: Callable[..., Any], riders: list[Array], times: Array) -> Any:
    """`fn(riders, t)` at all times. Sites observed after the scan cost O(T) at each of them, so only some at once."""
    if not chain.structure.fused:
        return jax.vmap(fn)(riders, times)
    return jax.lax.map(lambda item: fn(*item), (riders, times), batch_size=_AT_ONCE)


class Followed(NamedTuple):
    """A chain filtered step by step: `noise` is the data noise of each step, `columns` its noise columns."""

    first: Updated
    first_noise: Array
    riders: list[Array]
    filtered: Filtered
    noise: Array
    last_riders: list[Array]


def follow(chain: Chain, linearization: Linearization, growth: float) -> Followed:
    """Linearise and update in one loop; `growth` multiplies the covariance before each step."""
    first, noise, riders = begin(chain, chain.initial_dimension)

    def move(carry: tuple, t: Array) -> tuple[tuple, tuple]:
        after, onward, noise = _advance(chain, linearization, growth, carry, t)
        out = (after.log_likelihood, after.mean, after.cov, after.record)
        return (after.mean, after.cov, onward), (out, carry[2], noise)

    start = (first.mean, first.cov, riders)
    (_, _, last), (out, before, noises) = jax.lax.scan(move, start, jnp.arange(chain.structure.length))
    return Followed(first, noise, before, Filtered(jnp.sum(out[0]), *out[1:]), noises, last)


def log_evidence(chain: Chain, linearization: Linearization, growth: float) -> Array:
    """log p(data) by the loop of `follow`, of which nothing is kept; memory of its gradient is O(sqrt T)."""
    first, _, riders = begin(chain, chain.initial_dimension)

    def move(carry: tuple, t: Array) -> tuple[tuple, None]:
        after, onward, _ = _advance(chain, linearization, growth, carry[:3], t)
        return (after.mean, after.cov, onward, carry[3] + after.log_likelihood), None

    start = (first.mean, first.cov, riders, first.log_likelihood)
    return checkpointed_scan(move, start, chain.structure.length)[3]


def _advance(
    chain: Chain, linearization: Linearization, growth: float, carry: tuple, t: Array
) -> tuple[Updated, list[Array], Array]:
    """The update of one step, what rides along after it, and its data noise."""
    mean, cov, riding = carry
    cov = growth * cov
    moved = chain.step(mean, riding, t, jnp.zeros(chain.noise_dimension))
    data = moved.observed.data
    step = linearization.step(chain, mean, cov, riding, t, data)
    return kalman.update(mean, cov, step, data), moved.riders, step.R


class CarryDraws(NamedTuple):
    """Joint draws of states before the steps and noise of the steps, axes (time, draw, ...)."""

    initial: Array
    states: Array
    noise: Array
    last: Array


class AllDraws(NamedTuple):
    """Draws from the smoothing, filtering and one-step laws of (state before a step, noise of the step)."""

    smoothing: CarryDraws
    filtering: tuple[Array, Array]
    one_step: tuple[Array, Array]


def draw(
    first: Updated,
    records: Record,
    last_mean: Array,
    roots: tuple[Array, Array],
    key: Key,
    draws: int,
    growth: float = 1.0,
) -> AllDraws:
    """Draws from a filtered chain, by simulating the errors of the filter.

    The error x of the filtered mean obeys x' = L x + J e - K v whatever the data (de Jong and Shephard 1995), so it is
    simulated forward, stable where the filter is. A draw given all data is the smoothed mean plus the error less the
    error's own smoothed mean (Durbin and Koopman 2002).

    Args:
        first: of the initial step.
        records: of the steps, leading axis time.
        last_mean: filtered mean after the last step.
        roots: roots of the covariance of the data's noise, of the initial step and of the steps.
        key: typed JAX key.
        draws: number of draws.
        growth: what multiplied the covariance before each step.
    """
    length, q = records.J.shape[0], records.J.shape[2]
    keys = jax.random.split(key, 4)
    shapes = (first.record.J.shape[1], first.record.H.shape[0])
    z, v0 = (jax.random.normal(k, (s, draws)) for k, s in zip(keys[:2], shapes, strict=True))
    e = jax.random.normal(keys[2], (length, q, draws))
    v = roots[1] @ jax.random.normal(keys[3], (length, records.H.shape[1], draws))

    def forward(error: Array, item: tuple) -> tuple[Array, tuple]:
        record, e, v = item
        error = jnp.sqrt(growth) * error
        innovation = record.H @ error + record.D @ e + v
        score = _score(record, record.innovation[:, None] - innovation)
        given = (error + record.cov @ (record.H.T @ score), e + record.D.T @ score)
        return record.L @ error + record.J @ e - record.gain @ v, (error, innovation, given)

    def backward(r: Array, item: tuple) -> tuple[Array, tuple]:
        record, error, e, innovation = item
        score = _score(record, record.innovation[:, None] - innovation)
        before = record.H.T @ score + record.L.T @ r
        return before, (record.mean[:, None] + error + record.cov @ before, e + record.D.T @ score + record.J.T @ r)

    v0 = roots[0] @ v0
    start = first.record.J @ z - first.record.gain @ v0
    last, (errors, innovations, given) = jax.lax.scan(forward, start, (records, e, v))
    r, (states, noise) = jax.lax.scan(backward, jnp.zeros_like(last), (records, errors, e, innovations), reverse=True)
    _, (_, z) = backward(r, (first.record, jnp.zeros((0, draws)), z, first.record.D @ z + v0))
    means = records.mean[..., None]
    turned = jax.tree.map(
        lambda x: jnp.swapaxes(x, -1, -2), (states, noise, (means + given[0], given[1]), (means + errors, e))
    )
    smoothing = CarryDraws(z.T, turned[0], turned[1], (last_mean[:, None] + last).T)
    return AllDraws(smoothing, turned[2], turned[3])


def _score(record: Record, innovation: Array) -> Array:
    white = solve_factor(record.factor, innovation, transposed=False)
    return solve_factor(record.factor, white, transposed=True)


def joint_moments(record: Record) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Mean and covariance of (state before a step, noise of the step), given the data so far and one step earlier."""
    q = record.J.shape[1]
    mean = jnp.concatenate([record.mean, jnp.zeros(q)])
    cov = jax.scipy.linalg.block_diag(record.cov, jnp.eye(q))
    maps = jnp.concatenate([record.H, record.D], axis=1)
    white = solve_factor(record.factor, maps @ cov, transposed=False)
    score = cov @ (maps.T @ record.score)
    return (mean + score, cov - white.T @ white), (mean, cov)


def each(riders: list[Array], draws: int) -> list[Array]:
    """What rides along, repeated for each draw."""
    return [jnp.broadcast_to(r, (draws, *r.shape)) for r in riders]
