r"""Quantiles of the Gamma(a, 1) law from normal scores, with derivatives in the score and in a.

The law is handled in w = log(x / a), where its density f(w) = x^a e^-x / Gamma(a) is log-concave with mode w = 0.
Both log tails are then concave in w, so Newton's iteration on them converges from everywhere. The tails beyond x are
f(w) M(w) with, after the substitutions x' = x e^-s below and x' = x + s above,

    M = int_0^inf exp(-a s - x expm1(-s)) ds   and   M = int_0^inf exp(-s + (a - 1) log1p(s / x)) ds / x.

Both integrands decay like exponentials and are smooth in log s, so the double exponential rule with fixed nodes
gives M to rounding. The same nodes give the derivative in a: d log F / da = E[log x'] - psi(a) over that tail.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
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


def log_gamma(z: Array, a: Array) -> Array:
    """Computes log T(z), T(z) being the quantile of Gamma(a, 1) at probability Phi(z).

    Args:
        z: standard normal scores.
        a: shape (concentration) > 0; broadcasts with `z`.
    """
    z, a = broadcast_float(z, a)
    return jnp.log(a) + _log_ratio(z, a)


def log_gamma_score(log_value: Array, a: Array) -> Array:
    """Computes z from log x; the inverse of `log_gamma`."""
    log_value, a = broadcast_float(log_value, a)
    w = log_value - jnp.log(a)
    mills, _ = _tail(w, a)
    log_tail = _log_density(w, a, _log_mode_density(a)) + jnp.log(mills)
    other = log1mexp(jnp.minimum(log_tail, -jnp.finfo(w.dtype).tiny))
    below = w <= 0
    return normal_score(jnp.where(below, log_tail, other), jnp.where(below, other, log_tail))


def _log_mode_density(a: Array) -> Array:
    return 0.5 * jnp.log(a) - HALF_LOG_2PI - stirling_remainder(a)


def _log_density(w: Array, a: Array, log_mode_density: Array) -> Array:
    return a * (w - jnp.expm1(w)) + log_mode_density


def _tail(w: Array, a: Array) -> tuple[Array, Array]:
    """Computes M(w) and the mean of log(x' / x) over the tail beyond w, as seen from the mode."""
    x = a * jnp.exp(w)
    below = w <= 0
    safe = jnp.where(below, a, x)
    slope = jnp.where(below, jnp.maximum(a - x, 0.0), 1.0 - jnp.maximum(a - 1.0, 0.0) / safe)
    curvature = jnp.where(below, x, jnp.maximum(a - 1.0, 0.0) / safe**2)
    reach = 2.0 / (slope + jnp.sqrt(slope**2 + 2.0 * curvature)) + jnp.where(below, 1.0 / a, 0.0)
    reach = lax.stop_gradient(reach)
    nodes, weights = (jnp.asarray(v, w.dtype) for v in half_line_nodes(jnp.finfo(w.dtype).bits))
    nodes, weights = (v.reshape((1,) * w.ndim + (-1,)) for v in (nodes, weights))
    s = reach[..., None] * nodes
    below, safe, shape, x = (v[..., None] for v in (below, safe, a, x))
    rise = jnp.log1p(s / safe)
    log_mass = jnp.where(below, -shape * s - x * jnp.expm1(-s), (shape - 1.0) * rise - s)
    mass = weights * jnp.exp(log_mass)
    total = jnp.sum(mass, axis=-1)
    mean = jnp.sum(mass * jnp.where(below, -s, rise), axis=-1) / total
    return total * reach / jnp.where(w <= 0, 1.0, safe[..., 0]), mean


def _start(lower: Array, upper: Array, a: Array) -> Array:
    """First guess: Wilson and Hilferty (1931), P(a, x) <= x^a / Gamma(a + 1), or Q(a, x) ~ a E_1(x) for small a."""
    cube = 1.0 - 1.0 / (9.0 * a) + rough_score(lower, upper) / (3.0 * jnp.sqrt(a))
    hilferty = 3.0 * jnp.log(jnp.maximum(cube, 1e-3))
    log_factorial = -a * jnp.where(a < 1.0, 0.5772 - 0.5772 * a, 1.0) + jnp.where(a < 1.0, 0.0, a * jnp.log(a))
    bound = (lower + log_factorial) / a - jnp.log(a)
    log_integral = upper - jnp.log(a)
    decay = jnp.log(jnp.maximum(-log_integral - jnp.log1p(jnp.abs(log_integral)), 0.1))
    integral = jnp.where(log_integral < -0.7, decay, -0.58 - jnp.exp(jnp.minimum(log_integral, 80.0)))
    below = jnp.maximum(bound, hilferty)
    return jnp.where((a < 0.3) & (below > 0), jnp.maximum(integral - jnp.log(a), 0.0), below)


@jax.custom_jvp
def _log_ratio(z: Array, a: Array) -> Array:
    """Computes w = log(x / a) with P(a, x) = Phi(z), by Halley's iteration on the log of the tail beyond w."""
    lower, upper = log_tails(z)
    log_mode_density = _log_mode_density(a)

    def step(_, w):
        below = w <= 0
        mills, _ = _tail(w, a)
        residual = jnp.where(below, lower, upper) - _log_density(w, a, log_mode_density) - jnp.log(mills)
        newton = jnp.where(below, residual, -residual) * mills
        bend = 0.5 * newton * (-a * jnp.expm1(w) + jnp.where(below, -1.0, 1.0) / mills)
        return w + newton / jnp.minimum(jnp.maximum(1.0 + bend, 0.5), 2.0)

    steps = 6 if jnp.finfo(z.dtype).bits == 32 else 8
    return lax.fori_loop(0, steps, step, _start(lower, upper, a))


@_log_ratio.defjvp
def _log_ratio_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Differentiates log F(w; a) = log Phi(z) implicitly: dw = M (dlog p - dlogF/da da)."""
    (z, a), (z_tangent, a_tangent) = primals, tangents
    w = _log_ratio(z, a)
    lower, upper = log_tails(z)
    below = w <= 0
    mills, mean = _tail(w, a)
    hazard = jnp.exp(-0.5 * z**2 - HALF_LOG_2PI - jnp.where(below, lower, upper))
    in_shape = w + jnp.log(a) - digamma(a) + mean
    # w is log x - log a, whence the last term.
    return w, mills * (hazard * z_tangent + jnp.where(below, -1.0, 1.0) * in_shape * a_tangent) - a_tangent / a
