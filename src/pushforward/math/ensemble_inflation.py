"""Inflation: ways to give an ensemble back the spread that sampling error and model error take from it.

Ensembles have shape (members N, ...); all functions keep the mean. Spread is the standard deviation with
denominator N - 1.
"""

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float, Key
from pushforward.math.ensemble import Whitened


def _split(ensemble: Array) -> tuple[Array, Array]:
    mean = jnp.mean(ensemble, 0)
    return mean, ensemble - mean


def multiplicative(ensemble: Float[Array, "members *shape"], factor: float) -> Float[Array, "members *shape"]:
    """``mean + factor (x - mean)``: the covariance grows by factor^2 (Anderson and Anderson 1999)."""
    mean, anomalies = _split(ensemble)
    return mean + factor * anomalies


def rtps(
    forecast: Float[Array, "members *shape"], analysis: Float[Array, "members *shape"], alpha: float
) -> Float[Array, "members *shape"]:
    """Relaxation to prior spread: each component's spread becomes ``(1 - alpha) sd_a + alpha sd_f``.

    Anomalies are multiplied by ``1 + alpha (sd_f - sd_a) / sd_a`` (Whitaker and Hamill 2012, eq. 2). A component
    without analysis spread stays as it is.
    """
    mean, anomalies = _split(analysis)
    before, after = _variance(_split(forecast)[1]), _variance(anomalies)
    ratio = jnp.where(after > 0, before, 1.0) / jnp.where(after > 0, after, 1.0)
    # The root of zero has an infinite derivative: forecasts without spread take the other branch.
    relative = jnp.where(ratio > 0, jnp.sqrt(jnp.where(ratio > 0, ratio, 1.0)), 0.0)
    return mean + anomalies * (1.0 + alpha * (relative - 1.0))


def _variance(anomalies: Array) -> Array:
    return jnp.sum(anomalies**2, 0) / (anomalies.shape[0] - 1)


def rtpp(
    forecast: Float[Array, "members *shape"], analysis: Float[Array, "members *shape"], alpha: float
) -> Float[Array, "members *shape"]:
    """Relaxation to prior perturbations: anomalies ``(1 - alpha) a + alpha f`` (Zhang, Snyder and Sun 2004, eq. 5)."""
    mean, anomalies = _split(analysis)
    return mean + (1.0 - alpha) * anomalies + alpha * _split(forecast)[1]


def additive(ensemble: Float[Array, "members *shape"], key: Key, sd: Array | float) -> Float[Array, "members *shape"]:
    """Adds independent N(0, sd^2) noise less its mean over the members: E[covariance] grows by exactly sd^2 I.

    Args:
        ensemble: (members, ...).
        key: typed JAX key.
        sd: standard deviation, of a shape that broadcasts against one member.
    """
    noise = jax.random.normal(key, ensemble.shape, ensemble.dtype)
    return ensemble + sd * (noise - jnp.mean(noise, 0))


def adaptive_update(rho: Array, variance: Array, w: Whitened) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Updates an estimate of the covariance inflation rho by one innovation, as a scalar Kalman filter would.

    With p data, whitened innovation d and ``t = |Y|^2 / (N - 1)``, the trace of the predicted data's covariance in
    units of the noise, E|d|^2 = rho t + p (Li, Kalnay and Miyoshi 2009, eq. 11), so one analysis observes

        rho_o = (|d|^2 - p) / t,      v_o = (2 / p) ((rho t + p) / t)^2          (Miyoshi 2011, eqs. 10, 12, 13)
        rho <- (v_o rho + v rho_o) / (v_o + v),      v <- v v_o / (v_o + v)

    The caller lets the variance grow between analyses (Miyoshi: times 1.03), inflates anomalies by sqrt(rho), and
    bounds rho if need be. Nothing changes without data or without spread.

    Args:
        rho: prior mean of the factor of the covariance; 1 to begin with.
        variance: prior variance v of rho; 0.04^2 in the paper.
        w: whitened forecast **before** inflation.
    """
    trace = jnp.sum(w.anomalies**2) / (w.anomalies.shape[0] - 1)
    informed = (w.count > 0) & (trace > 0)
    trace, count = jnp.where(informed, trace, 1.0), jnp.where(informed, w.count, 1.0)
    seen = (jnp.sum(w.innovation**2) - count) / trace
    error = (2.0 / count) * (rho + count / trace) ** 2
    gain = jnp.where(informed, variance / (variance + error), 0.0)
    return rho + gain * (seen - rho), (1.0 - gain) * variance
