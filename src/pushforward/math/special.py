"""Normal tail probabilities, rounding into open intervals and quadrature nodes.

Everything that follows works with the pair (log p, log q) of tail probabilities, p = Phi(z) and
q = Phi(-z), because the larger one carries no information about its tail: in float32 Phi(z) is exactly 1
from z = 5.6 on, while log Phi(-z) is accurate to z = 1e19.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import erf, erfinv, gammaln, log_ndtr, ndtri
from jax.typing import ArrayLike

LOG_2 = math.log(2.0)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def log1mexp(x: Array) -> Array:
    """Computes log(1 - e^x) for x < 0 (Maechler 2012, "Accurately computing log(1 - exp(-|a|))", eq. 7)."""
    near = x > -LOG_2
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -LOG_2))),
        jnp.log1p(-jnp.exp(jnp.where(near, -LOG_2, x))),
    )


def log_tails(z: Array) -> tuple[Array, Array]:
    """Computes log Phi(z) and log Phi(-z), both with full relative accuracy.

    Args:
        z: standard normal scores, any shape.

    Returns:
        The pair (log p, log q), each of the shape of `z`.
    """
    below = z <= 0
    small = log_ndtr(jnp.where(below, z, -z))
    large = jnp.log1p(-jnp.exp(small))
    return jnp.where(below, small, large), jnp.where(below, large, small)


@jax.custom_jvp
def tail_score(log_tail: Array) -> Array:
    """Computes the z <= 0 with log Phi(z) = log_tail, for log_tail <= log(1/2).

    `ndtri` where e^log_tail is a normal float. Below, with y = z^2, the fixed point of
    y = -2 log_tail - log(2 pi y) + 2 log(1 - 1/y + 3/y^2 - 15/y^3 + ...) (DLMF 7.12.1), which contracts like 1/y.
    """
    near = log_tail > -80.0
    power = -2.0 * jnp.where(near, -80.0, log_tail)

    def step(_, y):
        inverse = 1.0 / y
        series = inverse * (-1.0 + inverse * (3.0 + inverse * (-15.0 + inverse * (105.0 - 945.0 * inverse))))
        return power - jnp.log(2.0 * math.pi * y) + 2.0 * jnp.log1p(series)

    far = jnp.sqrt(jax.lax.fori_loop(0, 6, step, power))
    return jnp.where(near, ndtri(jnp.exp(jnp.where(near, log_tail, -80.0))), -far)


@tail_score.defjvp
def _tail_score_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (log_tail,), (tangent,) = primals, tangents
    score = tail_score(log_tail)
    return score, tangent * jnp.exp(log_tail + 0.5 * score**2 + HALF_LOG_2PI)


def normal_score(lower: Array, upper: Array) -> Array:
    """Computes z from its two log tail probabilities; the inverse of `log_tails`.

    Args:
        lower: log p, any shape.
        upper: log(1 - p), the same shape; only the smaller of the two is used.
    """
    left = lower <= upper
    score = tail_score(jnp.where(left, lower, upper))
    return jnp.where(left, score, -score)


def rough_score(lower: Array, upper: Array) -> Array:
    """Computes `normal_score` to 5e-4, cheaply (Abramowitz and Stegun 1964, 26.2.23); a start for iterations."""
    left = lower <= upper
    t = jnp.sqrt(-2.0 * jnp.where(left, lower, upper))
    size = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return jnp.where(left, -size, size)


def half_normal_from_tails(lower: Array, upper: Array) -> Array:
    """Computes the |N(0, 1)| quantile with log tail probabilities log p and log(1 - p)."""
    left = lower <= upper
    centre = math.sqrt(2.0) * erfinv(jnp.exp(jnp.where(left, lower, -LOG_2)))
    return jnp.where(left, centre, -tail_score(jnp.where(left, -LOG_2, upper) - LOG_2))


def half_normal(z: Array) -> Array:
    """Computes the quantile of |N(0, 1)| at probability Phi(z): Phi^-1((1 + Phi(z)) / 2)."""
    small = log_ndtr(jnp.where(z <= 0, z, -z))
    return half_normal_from_tails(jnp.where(z <= 0, small, 0.0), jnp.where(z <= 0, 0.0, small))


@jax.custom_jvp
def log_half_normal(z: Array) -> Array:
    """Computes log `half_normal`(z), with the derivative in log space, where it cannot overflow."""
    return jnp.log(half_normal(z))


@log_half_normal.defjvp
def _log_half_normal_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (z,), (tangent,) = primals, tangents
    value = log_half_normal(z)
    return value, tangent * jnp.exp(0.5 * (jnp.exp(2.0 * value) - z**2) - LOG_2 - value)


def half_normal_score(value: Array) -> Array:
    """Computes z from a quantile of |N(0, 1)|; the inverse of `half_normal`."""
    return normal_score(jnp.log(erf(value / math.sqrt(2.0))), LOG_2 + log_ndtr(-value))


@jax.custom_jvp
def inside(value: Array, low: Array, high: Array) -> Array:
    """Rounds values that left the open interval (low, high) to its outermost normal floats.

    A quantile closer to an end of the support than the float grid can hold rounds onto that end, where
    log densities are infinite. It is moved inward by one step of the grid; the derivative in `value` stays 1
    (a clipped value would have derivative 0), so the analytic derivative of the quantile survives.
    """
    tiny = jnp.finfo(value.dtype).tiny
    above = jnp.nextafter(low, jnp.full_like(low, jnp.inf))
    above = jnp.where(jnp.abs(low) < tiny, tiny, above)
    below = jnp.nextafter(high, jnp.full_like(high, -jnp.inf))
    below = jnp.where(jnp.abs(high) < tiny, -tiny, below)
    return jnp.where(value < above, above, jnp.where(value > below, below, value))


@inside.defjvp
def _inside_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return inside(*primals), tangents[0]


def stirling_remainder(a: Array) -> Array:
    """Computes log Gamma(a) - [(a - 1/2) log a - a + log(2 pi)/2] without cancellation (DLMF 5.11.1)."""
    large = a >= 8.0
    big = jnp.where(large, a, 8.0)
    small = jnp.where(large, 8.0, a)
    inverse = 1.0 / big
    square = inverse**2
    coefficients = (-691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12)
    series = jnp.zeros_like(big)
    for coefficient in coefficients:
        series = series * square + coefficient
    direct = gammaln(small) - (small - 0.5) * jnp.log(small) + small - HALF_LOG_2PI
    return jnp.where(large, series * inverse, direct)


@functools.cache
def half_line_nodes(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes s and weights w with sum_j w_j g(s_j) = int_0^inf g(s) ds for g that decays like e^-s or faster.

    The double exponential substitution s = exp(t - e^-t) with the trapezoidal rule in t (Takahasi and Mori 1974,
    section 6); the nodes resolve all scales between 1e-13 and 90.

    Args:
        bits: 32 or 64, the precision in which the integrand is evaluated.
    """
    count, first, last = (26, -2.8, 4.4) if bits == 32 else (64, -3.35, 4.6)
    t = np.linspace(first, last, count)
    s = np.exp(t - np.exp(-t))
    return s, s * (1.0 + np.exp(-t)) * (t[1] - t[0])


def broadcast_float(*arrays: ArrayLike) -> list[Array]:
    """Brings arrays to one shape and one floating dtype."""
    dtype = jnp.result_type(float, *arrays) if not any(_is_float(a) for a in arrays) else jnp.result_type(*arrays)
    return list(jnp.broadcast_arrays(*(jnp.asarray(a, dtype) for a in arrays)))


def _is_float(array: ArrayLike) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)
