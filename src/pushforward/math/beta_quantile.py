r"""Quantiles of the Beta(a, b) law from normal scores, in the logit, with derivatives in the score, a and b.

In u = logit(x) the density f(u) = x^a (1 - x)^b / B(a, b) is log-concave with mode log(a / b), so both log tails are
concave in u. The lower tail is f(u) M(u) with, after the substitution x' = x e^-s,

    M = int_0^inf exp(-a s + (b - 1) log1p(-e^u expm1(-s))) ds / (1 - x);

the upper tail exchanges a with b and u with -u. The integrand decays like an exponential and is smooth in log s,
so the double exponential rule with fixed nodes gives M to rounding. The same nodes give the derivatives in the
parameters: d log F / da = E[log x'] - psi(a) + psi(a + b), and b with 1 - x'. Working in the logit keeps both
x and 1 - x to full relative accuracy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn import sigmoid, softplus
from jax.scipy.special import digamma

from pushforward.math.special import (
    HALF_LOG_2PI,
    broadcast_float,
    half_line_nodes,
    log1mexp,
    log_tails,
    normal_score,
    rough_score,
    stirling_remainder,
)


def logit_beta(z: Array, a: Array, b: Array) -> Array:
    """Computes logit T(z), T(z) being the quantile of Beta(a, b) at probability Phi(z).

    Args:
        z: standard normal scores.
        a: exponent of x, > 0; broadcasts with `z`.
        b: exponent of 1 - x, > 0; broadcasts with `z`.
    """
    z, a, b = broadcast_float(z, a, b)
    lower, upper = log_tails(z)
    return logit_beta_from_tails(lower, upper, a, b)


def logit_beta_from_tails(lower: Array, upper: Array, a: Array, b: Array) -> Array:
    """Computes logit x with I_x(a, b) = p from log p and log(1 - p), all of one shape and dtype."""
    return jnp.log(a) - jnp.log(b) + _log_odds_ratio(lower, upper, a, b)


def logit_beta_tails(logit: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Computes log I_x(a, b) and log I_{1-x}(b, a) from logit x."""
    logit, a, b = broadcast_float(logit, a, b)
    mode = jnp.log(a) - jnp.log(b)
    v = logit - mode
    mills, *_ = _tail(v, a, b, mode)
    log_tail = _log_density(v, a, b, mode) + _log_mode_density(a, b) + jnp.log(mills)
    other = log1mexp(jnp.minimum(log_tail, -jnp.finfo(v.dtype).tiny))
    below = v <= 0
    return jnp.where(below, log_tail, other), jnp.where(below, other, log_tail)


def logit_beta_score(logit: Array, a: Array, b: Array) -> Array:
    """Computes z from logit x; the inverse of `logit_beta`."""
    return normal_score(*logit_beta_tails(logit, a, b))


def _log_mode_density(a: Array, b: Array) -> Array:
    remainder = stirling_remainder(jnp.stack([a, b, a + b]))
    return 0.5 * (jnp.log(a) + jnp.log(b) - jnp.log(a + b)) - HALF_LOG_2PI - remainder[0] - remainder[1] + remainder[2]


def _log_density(v: Array, a: Array, b: Array, mode: Array) -> Array:
    """Computes log f(mode + v) - log f(mode) = -(a + b) KL(mode, x)."""
    near = jnp.abs(v) < 1.0
    close = jnp.where(near, v, 0.0)
    u = mode + jnp.where(near, 0.0, v)
    lower = jnp.where(near, jnp.log1p(b / (a + b) * jnp.expm1(-close)), softplus(-u) - softplus(-mode))
    upper = jnp.where(near, jnp.log1p(a / (a + b) * jnp.expm1(close)), softplus(u) - softplus(mode))
    return -a * lower - b * upper


def _tail(v: Array, a: Array, b: Array, mode: Array) -> tuple[Array, Array, Array]:
    """Computes M and the means of log x' and log(1 - x') over the tail beyond v, as seen from the mode."""
    below = v <= 0
    own, other = jnp.where(below, a, b), jnp.where(below, b, a)
    u = jnp.where(below, v + mode, -v - mode)
    odds, complement = jnp.exp(u), sigmoid(-u)
    excess = jnp.maximum(other - 1.0, 0.0) * odds
    slope = jnp.maximum(own - excess, 0.0)
    width = 2.0 / (slope + jnp.sqrt(slope**2 + 2.0 * excess / complement))
    reach = lax.stop_gradient(width + 1.0 / own)
    nodes, weights = (jnp.asarray(x, v.dtype) for x in half_line_nodes(jnp.finfo(v.dtype).bits))
    nodes, weights = (x.reshape((1,) * v.ndim + (-1,)) for x in (nodes, weights))
    s = reach[..., None] * nodes
    rise = jnp.log1p(-odds[..., None] * jnp.expm1(-s))
    mass = weights * jnp.exp((other[..., None] - 1.0) * rise - own[..., None] * s)
    total = jnp.sum(mass, axis=-1)
    own_mean = -softplus(-u) - jnp.sum(mass * s, axis=-1) / total
    other_mean = -softplus(u) + jnp.sum(mass * rise, axis=-1) / total
    means = jnp.where(below, own_mean, other_mean), jnp.where(below, other_mean, own_mean)
    return total * reach / complement, *means


def _start(lower: Array, upper: Array, a: Array, b: Array, mode: Array, log_mode_density: Array) -> Array:
    """First guess: a logit-normal of about the right variance, between F(u) <= e^(a u) / (a B(a, b)) and its twin."""
    variance = 1.0 / a + 0.5 / a**2 + 1.0 / b + 0.5 / b**2
    gauss = 0.5 / b - 0.5 / a + rough_score(lower, upper) * jnp.sqrt(variance)
    log_beta = -a * softplus(-mode) - b * softplus(mode) - log_mode_density
    least = (lower + jnp.log(a) + log_beta) / a - mode
    most = -(upper + jnp.log(b) + log_beta) / b - mode
    return jnp.minimum(jnp.maximum(gauss, least), most)


@jax.custom_jvp
def _log_odds_ratio(lower: Array, upper: Array, a: Array, b: Array) -> Array:
    """Computes v = logit(x) - log(a / b) by Halley's iteration on the log of the tail beyond v."""
    mode = jnp.log(a) - jnp.log(b)
    log_mode_density = _log_mode_density(a, b)

    def step(_, v):
        below = v <= 0
        mills, *_ = _tail(v, a, b, mode)
        log_tail = _log_density(v, a, b, mode) + log_mode_density + jnp.log(mills)
        residual = jnp.where(below, lower, upper) - log_tail
        newton = jnp.where(below, residual, -residual) * mills
        slope = a * sigmoid(-v - mode) - b * sigmoid(v + mode)
        bend = 0.5 * newton * (slope + jnp.where(below, -1.0, 1.0) / mills)
        return v + newton / jnp.minimum(jnp.maximum(1.0 + bend, 0.5), 2.0)

    steps = 6 if jnp.finfo(a.dtype).bits == 32 else 8
    return lax.fori_loop(0, steps, step, _start(lower, upper, a, b, mode, log_mode_density))


@_log_odds_ratio.defjvp
def _log_odds_ratio_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Differentiates log F(u; a, b) = log p implicitly, in the tail beyond u."""
    lower, upper, a, b = primals
    lower_tangent, upper_tangent, a_tangent, b_tangent = tangents
    v = _log_odds_ratio(lower, upper, a, b)
    below = v <= 0
    mills, mean_log, mean_log_complement = _tail(v, a, b, jnp.log(a) - jnp.log(b))
    total = digamma(a + b)
    in_a = (mean_log - digamma(a) + total) * a_tangent
    in_b = (mean_log_complement - digamma(b) + total) * b_tangent
    change = mills * (jnp.where(below, lower_tangent, upper_tangent) - in_a - in_b)
    return v, jnp.where(below, change, -change) - a_tangent / a + b_tangent / b
