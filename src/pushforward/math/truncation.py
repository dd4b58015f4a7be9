"""Truncated standard normals: a truncated law is T(truncated normal), T being the map of the untruncated one.

With a = T^-1(low), b = T^-1(high), p = Phi(z) and q = Phi(-z), the score y = T^-1(x) satisfies
Phi(y) = q Phi(a) + p Phi(b) and Phi(-y) = q Phi(-a) + p Phi(-b). Both sums are free of cancellation in log space,
except that y - a loses its digits where the added mass is small beside the tail it is added to. There the distance
d = y - a solves int_0^d exp(-a s - s^2 / 2) ds = mass / phi(a), by Newton's iteration on a Gauss-Legendre rule.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import log_ndtr

from pushforward.math.special import HALF_LOG_2PI, broadcast_float, log1mexp, log_tails, normal_score

_NODES, _WEIGHTS = (0.5 * (x + shift) for x, shift in zip(np.polynomial.legendre.leggauss(8), (1.0, 0.0), strict=True))


def log_mass(a: Array, width: Array) -> Array:
    """Computes log(Phi(a + width) - Phi(a)) for width > 0, for narrow intervals by Gauss-Legendre."""
    a, width = broadcast_float(a, width)
    width = jnp.maximum(width, jnp.finfo(width.dtype).tiny)
    b = a + width
    right = a + b > 0
    outer, inner = log_ndtr(jnp.stack([jnp.where(right, -b, a), jnp.where(right, -a, b)]))
    narrow = width * (1.0 + jnp.abs(a) + jnp.abs(b)) < 1.0
    left = jnp.where(narrow, a, 0.0)
    near = jnp.log(jnp.where(narrow, _moment(left, jnp.where(narrow, width, 1.0)), 1.0)) - 0.5 * left**2 - HALF_LOG_2PI
    return jnp.where(narrow, near, inner + log1mexp(jnp.where(narrow, -1.0, outer - inner)))


def _moment(a: Array, distance: Array) -> Array:
    """Computes int_0^distance exp(-a s - s^2 / 2) ds."""
    nodes, weights = (jnp.asarray(x.reshape((-1,) + (1,) * a.ndim), a.dtype) for x in (_NODES, _WEIGHTS))
    s = distance[None] * nodes
    return distance * jnp.sum(weights * jnp.exp(-s * (a[None] + 0.5 * s)), axis=0)


def _distance(a: Array, log_tail: Array, log_added: Array, score: Array) -> Array:
    """Computes y - a from log Phi(-|a|), log(Phi(y) - Phi(a)) and y to working precision."""
    near = log_added - log_tail < -1.6
    a_near = jnp.where(near, a, 0.0)
    target = jnp.exp(jnp.where(near, log_added + 0.5 * a**2 + HALF_LOG_2PI, -5.0))

    def step(_, d):
        return d - (_moment(a_near, d) - target) * jnp.exp(d * (a_near + 0.5 * d))

    return jnp.where(near, jax.lax.fori_loop(0, 4, step, target), score - a)


@jax.custom_jvp
def above(z: Array, a: Array) -> tuple[Array, Array]:
    """Computes the score y > a of a normal truncated to (a, inf), and the distance y - a.

    Args:
        z: standard normal scores.
        a: lower bound, of the shape and dtype of `z`.
    """
    (lower, log_lost), (upper, log_kept) = log_tails(jnp.stack([z, a]))
    score = normal_score(jnp.logaddexp(log_lost, lower + log_kept), upper + log_kept)
    return score, _distance(a, jnp.minimum(log_lost, log_kept), lower + log_kept, score)


@above.defjvp
def _above_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[tuple, tuple]:
    """Differentiates Phi(-y) = q Phi(-a): phi(y) dy = q phi(a) da + Phi(-a) phi(z) dz."""
    (z, a), (z_tangent, a_tangent) = primals, tangents
    score, distance = above(z, a)
    in_z = jnp.exp(log_ndtr(-a) + 0.5 * (score**2 - z**2))
    in_a = jnp.exp(log_ndtr(-z) + distance * (a + 0.5 * distance))
    change = in_z * z_tangent + in_a * a_tangent
    return (score, distance), (change, change - a_tangent)


def above_score(distance: Array, a: Array) -> Array:
    """Computes z from y - a > 0; the inverse of `above`."""
    distance, a = broadcast_float(distance, a)
    log_kept = log_ndtr(-a)
    return normal_score(log_mass(a, distance) - log_kept, log_ndtr(-a - distance) - log_kept)


@jax.custom_jvp
def within(z: Array, a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Computes the score y of a normal truncated to (a, b), and the distances y - a and b - y.

    Args:
        z: standard normal scores.
        a: lower bound, of the shape and dtype of `z`.
        b: upper bound, likewise.
    """
    (lower, below_a, below_b), (upper, above_a, above_b) = log_tails(jnp.stack([z, a, b]))
    score = normal_score(
        jnp.logaddexp(upper + below_a, lower + below_b), jnp.logaddexp(upper + above_a, lower + above_b)
    )
    kept = log_mass(a, b - a)
    tails = jnp.stack([jnp.minimum(below_a, above_a), jnp.minimum(below_b, above_b)])
    added = jnp.stack([lower + kept, upper + kept])
    from_a, from_b = _distance(jnp.stack([a, -b]), tails, added, jnp.stack([score, -score]))
    return score, from_a, from_b


@within.defjvp
def _within_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """Differentiates Phi(y) = q Phi(a) + p Phi(b)."""
    (z, a, b), (z_tangent, a_tangent, b_tangent) = primals, tangents
    score, from_a, from_b = within(z, a, b)
    lower, upper = log_tails(z)
    in_z = jnp.exp(log_mass(a, b - a) + 0.5 * (score**2 - z**2))
    in_a = jnp.exp(upper + from_a * (a + 0.5 * from_a))
    in_b = jnp.exp(lower + from_b * (0.5 * from_b - b))
    change = in_z * z_tangent + in_a * a_tangent + in_b * b_tangent
    return (score, from_a, from_b), (change, change - a_tangent, b_tangent - change)


def within_score(from_a: Array, from_b: Array, a: Array, b: Array) -> Array:
    """Computes z from y - a > 0 and b - y > 0; the inverse of `within`."""
    from_a, from_b, a, b = broadcast_float(from_a, from_b, a, b)
    kept = log_mass(a, b - a)
    return normal_score(log_mass(a, from_a) - kept, log_mass(-b, from_b) - kept)
