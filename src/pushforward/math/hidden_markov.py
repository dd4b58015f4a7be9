"""Equations of finite hidden Markov models: exact filter, smoother and draws of paths, in logarithms.

A chain of order k over K values has the state (v_{t-k+1}, ..., v_t), one of M = K^k. Numbered with the latest value
fastest, a state before a step is (d, r): d, the oldest value, is forgotten by the step, and r, one of R = K^{k-1},
stays; the state after it is (r, b) with the new value b. A first-order chain has R = 1, so that d and b number its
states. A step enters by its log potential, shape (D, R, K):

    log_potential[d, r, b] = log p(b, y_t given the state (d, r) before).

Laws of states are vectors of log probabilities (M,), -inf where impossible. Potentials may be -inf too: values and
gradients stay free of NaN, and data that no path explains have the log likelihood -inf. Source: Baum, Petrie, Soules
and Weiss (1970); for draws of paths Chib (1996, Journal of Econometrics 75, eq. 12).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float, Int, Key


class Filtered(NamedTuple):
    """What the filter found over T steps.

    Attributes:
        log_likelihood: log p(y_1..T).
        log_filter: log p(state_t given y_1..t) for t = 0..T, shape (T + 1, M).
        increments: log p(y_t given y_1..t-1), shape (T,).
    """

    log_likelihood: Array
    log_filter: Array
    increments: Array


class Smoothed(NamedTuple):
    """Log probabilities given all data.

    Attributes:
        log_smooth: log p(state_t given y_1..T) for t = 0..T, shape (T + 1, M).
        log_pair: log p(state_t-1, b_t given y_1..T), shape (T, D, R, K).
    """

    log_smooth: Array
    log_pair: Array


def log_sum(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """log sum exp over axes, with gradient 0 where all of it is -inf (`logsumexp` has NaN there)."""
    top = jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    total = jnp.sum(jnp.exp(x - top), axis)
    some = total != 0
    return jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + top.reshape(total.shape), -jnp.inf)


def normalize(log_weights: Float[Array, "states"]) -> tuple[Float[Array, "states"], Float[Array, ""]]:
    """Log probabilities and the log of the total; where the total is -inf, all states are equally likely.

    What stands in for a law without support keeps later steps finite: the total already says that it failed.
    """
    total = log_sum(log_weights)
    failed = total == -jnp.inf
    even = jnp.full_like(log_weights, -jnp.log(len(log_weights)))
    return jnp.where(failed, even, log_weights - jnp.where(failed, 0.0, total)), total


def forward_step(
    log_filter: Float[Array, "states"], log_potential: Float[Array, "forgotten kept values"]
) -> tuple[Float[Array, "states"], Float[Array, ""]]:
    """log p(state_t given y_1..t), and log p(y_t given y_1..t-1).

    Args:
        log_filter: log p(state_t-1 given y_1..t-1), shape (M,).
        log_potential: of step t, shape (D, R, K).
    """
    return normalize(log_sum(_joint(log_filter, log_potential), 0).ravel())


def backward_step(
    log_after: Float[Array, "states"],
    log_filter: Float[Array, "states"],
    log_potential: Float[Array, "forgotten kept values"],
) -> Float[Array, "forgotten kept values"]:
    """log p(state_t-1, b_t given y_1..T) from the smoothed law of state_t.

    Given state_t = (r, b) the past and the future part: p(d given r, b, y) is that of the filter.

    Args:
        log_after: log p(state_t given y_1..T), shape (M,).
        log_filter: log p(state_t-1 given y_1..t-1), shape (M,).
        log_potential: of step t, shape (D, R, K).
    """
    joint = _joint(log_filter, log_potential)
    total = log_sum(joint, 0)
    ratio = log_after.reshape(total.shape) - total
    return jnp.where(total == -jnp.inf, -jnp.inf, joint + ratio)


def draw_step(
    uniforms: Float[Array, "draws"],
    after: Int[Array, "draws"],
    log_filter: Float[Array, "states"],
    log_potential: Float[Array, "forgotten kept values"],
) -> Int[Array, "draws"]:
    """Draws of state_t-1 given draws of state_t and y_1..T.

    Args:
        uniforms: numbers in [0, 1), one for each draw.
        after: numbers of the states at t, shape (draws,).
        log_filter: log p(state_t-1 given y_1..t-1), shape (M,).
        log_potential: of step t, shape (D, R, K).
    """
    _, kept, values = log_potential.shape
    joint = _joint(log_filter, log_potential)
    found = jax.vmap(lambda u, rb: pick(u, joint[:, rb // values, rb % values]))(uniforms, after)
    return found * kept + after // values


def pick(uniform: Float[Array, ""], log_weights: Float[Array, "states"]) -> Int[Array, ""]:
    """The index at which the running sum of weights passes a uniform number; never one of weight 0, if any has more."""
    top = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(top == -jnp.inf, 0.0, top))
    running, some = jnp.cumsum(weights), weights > 0
    total = jnp.max(jnp.where(some, running, 0.0))
    # A product with a number just below 1 may round to the total, which no sum passes.
    target = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(some & (running > target))


def forward(
    log_initial: Float[Array, "states"], log_potentials: Float[Array, "steps forgotten kept values"]
) -> Filtered:
    """The filter over all steps.

    Args:
        log_initial: log p(state_0, y_0), normalised or not; its total is part of the log likelihood, shape (M,).
        log_potentials: shape (T, D, R, K).
    """
    start, first = normalize(log_initial)

    def move(log_filter: Array, potential: Array) -> tuple[Array, tuple[Array, Array]]:
        after, increment = forward_step(log_filter, potential)
        return after, (after, increment)

    _, (laws, increments) = jax.lax.scan(move, start, log_potentials)
    return Filtered(first + jnp.sum(increments), jnp.concatenate([start[None], laws]), increments)


def smooth(
    log_filter: Float[Array, "times states"], log_potentials: Float[Array, "steps forgotten kept values"]
) -> Smoothed:
    """Smoothed laws of states and of pairs.

    Args:
        log_filter: of `forward`, shape (T + 1, M).
        log_potentials: shape (T, D, R, K).
    """

    def move(log_after: Array, item: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        pair = backward_step(log_after, *item)
        before = log_sum(pair, 2).ravel()
        return before, (before, pair)

    _, (laws, pairs) = jax.lax.scan(move, log_filter[-1], (log_filter[:-1], log_potentials), reverse=True)
    return Smoothed(jnp.concatenate([laws, log_filter[-1:]]), pairs)


def draw_paths(
    key: Key,
    log_filter: Float[Array, "times states"],
    log_potentials: Float[Array, "steps forgotten kept values"],
    draws: int,
) -> Int[Array, "draws times"]:
    """Independent draws of paths of states given all data, by going backward.

    Args:
        key: typed JAX key.
        log_filter: of `forward`, shape (T + 1, M).
        log_potentials: shape (T, D, R, K).
        draws: number of paths.
    """
    uniforms = jax.random.uniform(key, (len(log_filter), draws), log_filter.dtype)
    last = jax.vmap(pick, (0, None))(uniforms[-1], log_filter[-1])

    def move(after: Array, item: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        u, law, potential = item
        before = draw_step(u, after, law, potential)
        return before, before

    _, states = jax.lax.scan(move, last, (uniforms[:-1], log_filter[:-1], log_potentials), reverse=True)
    return jnp.concatenate([states, last[None]]).T


def _joint(log_filter: Array, log_potential: Array) -> Array:
    """log p(state_t-1, b_t, y_t given y_1..t-1), shape (D, R, K)."""
    return log_filter.reshape(*log_potential.shape[:2], 1) + log_potential
