"""Quantile pairs: strictly increasing maps from normal scores z to standard univariate laws, and back.

Each law has a map `name(z, ...)`, its quantile at probability Phi(z), and `name_score(value, ...)`, the inverse.
For z > 0 the maps use the upper tail log Phi(-z), never 1 - Phi(z). Locations and scales are the caller's.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, softplus
from jax.scipy.special import erf, log_ndtr, ndtr

from pushforward.math.beta_quantile import logit_beta_from_tails, logit_beta_tails
from pushforward.math.special import (
    LOG_2,
    broadcast_float,
    half_normal_from_tails,
    half_normal_score,
    log1mexp,
    log_half_normal,
    log_tails,
    normal_score,
)


def small_tail(z: Array) -> Array:
    """Computes Phi(-|z|)."""
    return ndtr(jnp.where(z <= 0, z, -z))


def between(z: Array, low: Array, high: Array) -> Array:
    """Computes the Uniform(low, high) quantile from the end that is nearer."""
    step = (high - low) * small_tail(z)
    return jnp.where(z <= 0, low + step, high - step)


def between_score(value: Array, low: Array, high: Array) -> Array:
    """Computes z from a Uniform(low, high) quantile."""
    width = high - low
    return normal_score(jnp.log((value - low) / width), jnp.log((high - value) / width))


def exponential(z: Array) -> Array:
    """Computes the Exponential(1) quantile -log(1 - p)."""
    return -log_tails(z)[1]


def exponential_score(value: Array) -> Array:
    """Computes z from an Exponential(1) quantile."""
    return normal_score(log1mexp(-value), -value)


def cauchy(z: Array) -> Array:
    """Computes the Cauchy quantile tan(pi (p - 1/2)), as a tangent near the median and a cotangent beyond."""
    near = jnp.abs(z) < 1.0
    centre = jnp.tan(0.5 * math.pi * erf(jnp.where(near, z, 0.0) / math.sqrt(2.0)))
    far = 1.0 / jnp.tan(math.pi * small_tail(jnp.where(near, 1.0, z)))
    return jnp.where(near, centre, jnp.where(z <= 0, -far, far))


def cauchy_score(value: Array) -> Array:
    """Computes z from a Cauchy quantile."""
    lower, upper = (jnp.log(jnp.arctan2(jnp.ones_like(value), sign * value) / math.pi) for sign in (-1.0, 1.0))
    return normal_score(lower, upper)


def half_cauchy(z: Array) -> Array:
    """Computes the quantile tan(pi p / 2) of |Cauchy|."""
    angle = jnp.tan(0.5 * math.pi * small_tail(z))
    return jnp.where(z <= 0, angle, 1.0 / angle)


def half_cauchy_score(value: Array) -> Array:
    """Computes z from a quantile of |Cauchy|."""
    one = jnp.ones_like(value)
    lower, upper = jnp.arctan2(value, one), jnp.arctan2(one, value)
    return normal_score(jnp.log(lower * (2 / math.pi)), jnp.log(upper * (2 / math.pi)))


def laplace(z: Array) -> Array:
    """Computes the Laplace quantile log 2p below the median and -log 2(1 - p) above."""
    below = z <= 0
    tail = LOG_2 + log_ndtr(jnp.where(below, z, -z))
    return jnp.where(below, tail, -tail)


def laplace_score(value: Array) -> Array:
    """Computes z from a Laplace quantile."""
    small = -jnp.abs(value) - LOG_2
    large = jnp.log1p(-jnp.exp(small))
    below = value <= 0
    return normal_score(jnp.where(below, small, large), jnp.where(below, large, small))


def asymmetric_laplace(z: Array, left: Array, right: Array) -> Array:
    """Computes the quantile of the law with density exp(x / left) below 0 and exp(-x / right) above, normalised."""
    lower, upper = log_tails(z)
    below = lower - jnp.log(left / (left + right))
    above = upper - jnp.log(right / (left + right))
    return jnp.where(below <= 0, left * below, -right * above)


def asymmetric_laplace_score(value: Array, left: Array, right: Array) -> Array:
    """Computes z from a quantile of `asymmetric_laplace`."""
    below = value <= 0
    scaled = jnp.where(below, value / left, -value / right)
    tail = scaled + jnp.log(jnp.where(below, left, right) / (left + right))
    other = log1mexp(tail)
    return normal_score(jnp.where(below, tail, other), jnp.where(below, other, tail))


def logistic(z: Array) -> Array:
    """Computes the Logistic quantile log p - log(1 - p)."""
    lower, upper = log_tails(z)
    return lower - upper


def logistic_score(value: Array) -> Array:
    """Computes z from a Logistic quantile."""
    return normal_score(log_sigmoid(value), log_sigmoid(-value))


def soft_laplace(z: Array) -> Array:
    """Computes the quantile log tan(pi p / 2) of the hyperbolic secant law."""
    tail = jnp.log(jnp.tan(0.5 * math.pi * small_tail(z)))
    return jnp.where(z <= 0, tail, -tail)


def soft_laplace_score(value: Array) -> Array:
    """Computes z from a quantile of the hyperbolic secant law."""
    small = jnp.log(jnp.arctan(jnp.exp(-jnp.abs(value))) * (2 / math.pi))
    large = jnp.log1p(-jnp.exp(small))
    below = value <= 0
    return normal_score(jnp.where(below, small, large), jnp.where(below, large, small))


def gumbel(z: Array) -> Array:
    """Computes the Gumbel (maximum) quantile -log(-log p)."""
    return -jnp.log(-log_tails(z)[0])


def gumbel_score(value: Array) -> Array:
    """Computes z from a Gumbel quantile."""
    lower = -jnp.exp(-value)
    return normal_score(lower, log1mexp(lower))


def gompertz(z: Array, concentration: Array) -> Array:
    """Computes the quantile log(1 - log(1 - p) / concentration) of the Gompertz law of unit rate."""
    return jnp.log1p(exponential(z) / concentration)


def log_weibull(z: Array) -> Array:
    """Computes log(-log(1 - p)), the log of the Weibull quantile of unit scale times its shape."""
    return jnp.log(-log_tails(z)[1])


def log_kumaraswamy(z: Array, a: Array, b: Array) -> Array:
    """Computes the log of the Kumaraswamy quantile (1 - (1 - p)^(1/b))^(1/a)."""
    return log1mexp(log_tails(z)[1] / b) / a


def log_dagum(z: Array, concentration: Array, sharpness: Array) -> Array:
    """Computes the log of the Dagum quantile (p^(-1/concentration) - 1)^(-1/sharpness)."""
    power = -log_tails(z)[0] / concentration
    return -(power + log1mexp(-power)) / sharpness


def log_dagum_score(log_value: Array, concentration: Array, sharpness: Array) -> Array:
    """Computes z from the log of a Dagum quantile."""
    lower = -concentration * softplus(-sharpness * log_value)
    return normal_score(lower, log1mexp(lower))


def levy(z: Array) -> Array:
    """Computes the Levy quantile: 1 / |N|^2 is Levy, so it is half_normal(-z)^-2."""
    return jnp.exp(-2.0 * log_half_normal(-z))


def levy_score(value: Array) -> Array:
    """Computes z from a Levy quantile."""
    return -half_normal_score(value**-0.5)


def log_power_law(z: Array, exponent: Array, log_range: Array) -> Array:
    r"""Computes log(x / low) for the density x^(exponent - 1) on [low, high].

    (x / low)^k = (1 - p) + p r^k with k the exponent and r = high / low, so with t = k log r
    log(x / low) = log1p(p expm1(t)) / k, which tends to p log r as k -> 0.

    Args:
        z: standard normal scores.
        exponent: k, any sign.
        log_range: log(high / low) > 0.
    """
    t = exponent * log_range
    lower, upper = log_tails(z)
    p, q = jnp.exp(lower), jnp.exp(upper)
    flat, steep = jnp.abs(t) < 1e-3, jnp.abs(t) > 1.0
    moderate = jnp.where(flat | steep, 0.5, t)
    large = jnp.where(steep, t, 2.0)
    series = p * log_range * (1.0 + q * t / 2.0 + q * (q - p) * t**2 / 6.0)
    middle = jnp.log1p(p * jnp.expm1(moderate)) / jnp.where(flat | steep, 1.0, exponent)
    outer = jnp.logaddexp(upper, lower + large) / jnp.where(steep, exponent, 1.0)
    return jnp.where(flat, series, jnp.where(steep, outer, middle))


def log_power_law_score(log_ratio: Array, exponent: Array, log_range: Array) -> Array:
    """Computes z from log(x / low); the inverse of `log_power_law`."""
    t = exponent * log_range
    flat = jnp.abs(t) < 1e-6
    k = jnp.where(flat, 1.0, exponent)
    below = jnp.where(flat, log_ratio, -jnp.expm1(-k * log_ratio) / k)
    above = jnp.where(flat, log_range - log_ratio, jnp.expm1(k * (log_range - log_ratio)) / k)
    total = jnp.log(below + above)
    return normal_score(jnp.log(below) - total, jnp.log(above) - total)


def student_t(z: Array, df: Array) -> Array:
    r"""Computes the quantile of Student's t with `df` degrees of freedom.

    nu / (nu + t^2) is Beta(nu / 2, 1 / 2) with lower tail 2 Phi(-|z|) and upper tail erf(|z| / sqrt 2). Near the
    median that logit diverges. There T = c z (1 + k z^2) + O(z^5) with k = ((nu + 1) c^2 / nu - 1) / 6, from
    T' = phi(z) / f(T), and c follows from the value at the edge of that neighbourhood.
    """
    z, df = broadcast_float(z, df)
    edge = 1e-3 if jnp.finfo(z.dtype).bits == 64 else 1e-2
    near = jnp.abs(z) < edge
    size = jnp.where(near, edge, jnp.where(z <= 0, -z, z))
    tail, centre = LOG_2 + log_ndtr(-size), jnp.log(erf(size / math.sqrt(2.0)))
    half = 0.5 * df
    logit = logit_beta_from_tails(tail, centre, half, jnp.full_like(half, 0.5))
    far = jnp.sqrt(df) * jnp.exp(-0.5 * logit)
    bend = ((df + 1.0) / df * (far / size) ** 2 - 1.0) / 6.0
    inner = jnp.where(near, z, 0.0)
    close = far * (inner / edge) * (1.0 + bend * (inner**2 - edge**2))
    return jnp.where(near, close, jnp.where(z <= 0, -far, far))


def student_t_score(value: Array, df: Array) -> Array:
    """Computes z from a Student t quantile."""
    value, df = broadcast_float(value, df)
    middle = value == 0
    size = jnp.where(middle, 1.0, jnp.where(value <= 0, -value, value))
    tail, centre = logit_beta_tails(jnp.log(df) - 2.0 * jnp.log(size), 0.5 * df, jnp.full_like(df, 0.5))
    score = half_normal_from_tails(centre, tail)
    return jnp.where(middle, 0.0, jnp.where(value <= 0, -score, score))
