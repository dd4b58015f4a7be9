"""Ensemble analyses found by optimisation: the finite-size filter (EnKF-N) and Gauss-Newton in weight space (iEnKS)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float
from pushforward.math.ensemble import Whitened, etkf, whiten
from pushforward.math.ensemble_roots import inverse_factor, inverse_root

_GRID = 64
_LOG_RANGE = math.log(1e6)
_NEWTON_STEPS = 12


def finite_size(w: Whitened, *, certainty: float = 1.0) -> Float[Array, "members members"]:
    """Weights of the finite-size filter EnKF-N: an ETKF that inflates its forecast by what the data call for.

    The forecast anomalies are multiplied by l, ``l^2 = inflation_square(w)``, then updated as in `etkf`.
    No inflation needs tuning where the model is perfect.

    Args:
        w: whitened forecast.
        certainty: 1 takes the members as draws of a chaotic or random model; more trusts their covariance more.

    Source: Bocquet, Raanes and Hannart 2015 (dual form, Jeffreys hyperprior), with the anomalies' root of the
    ETKF, as in DAPPER's EnKF_N with its defaults.
    """
    members = w.anomalies.shape[0]
    inflation = jnp.sqrt(inflation_square(w, certainty=certainty))
    weights = etkf(w._replace(anomalies=inflation * w.anomalies))
    return inflation * weights + (1.0 - inflation) / members


def inflation_square(w: Whitened, *, certainty: float = 1.0) -> Float[Array, ""]:
    """z = l^2, the covariance inflation that minimises the dual cost of the EnKF-N.

    With whitened anomalies Y, ``Y = U s V^T`` and ``N1 = N - 1``

        J(z) = sum_i (V^T d)_i^2 / (z s_i^2 + N1) + e / z + c log z,

    equivalently ``zeta = N1 / z`` of the paper. ``e = (N + 1) / N`` and ``c = N / N1``, then both are
    corrected, e -> e / k and c -> c k with ``k = (e / c)^(a / 2)`` and a the mean over members of
    ``N1 / (s_i^2 + N1)``, so that z = 1 without data (eq. 36 there), and multiplied by `certainty`. The global
    minimum is looked for on a grid with z from below e / c to 1e6 times that, then found by bracketed Newton steps.
    Derivatives are those of the stationary point.
    """
    return _stationary(w.anomalies, w.innovation, certainty)


def _coefficients(members: int, prior_weight: Array, certainty: float) -> tuple[Array, Array]:
    e, c = (members + 1) / members, members / (members - 1)
    correction = (e / c) ** (0.5 * prior_weight)
    return certainty * e / correction, certainty * c * correction


@jax.custom_jvp
def _stationary(anomalies: Array, innovation: Array, certainty: float) -> Array:
    members, m = anomalies.shape
    less = members - 1
    if m < members:
        values, vectors = jnp.linalg.eigh(anomalies.T @ anomalies)
        power = values * (innovation @ vectors) ** 2
    else:
        values, vectors = jnp.linalg.eigh(anomalies @ anomalies.T)
        power = ((anomalies @ innovation) @ vectors) ** 2
    values, power = jnp.maximum(values, 0.0), jnp.maximum(power, 0.0)
    prior_weight = (jnp.sum(less / (values + less)) + max(members - m, 0)) / members
    e, c = _coefficients(members, prior_weight, certainty)

    # In v = log z; the sum in J up to a constant is -z power / (N1 (z s^2 + N1)).
    def cost(v):
        z = jnp.exp(v)[..., None]
        return jnp.sum(-z * power / (less * (z * values + less)) + (e / z + c * jnp.log(z)) / len(values), -1)

    def slopes(v):
        z = jnp.exp(v)
        bottom = z * values + less
        first = c - e / z - z * jnp.sum(power / bottom**2)
        return first, e / z - z * jnp.sum(power * (less - z * values) / bottom**3)

    grid = jnp.log(e / c) - 0.1 + jnp.linspace(0.0, _LOG_RANGE, _GRID, dtype=values.dtype)
    best = jnp.argmin(cost(grid))
    low, high = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, _GRID - 1)]

    def newton(_, state):
        v, low, high = state
        first, second = slopes(v)
        low, high = jnp.where(first < 0, v, low), jnp.where(first < 0, high, v)
        proposal = v - first / second
        inside = (second > 0) & (proposal >= low) & (proposal <= high)
        return jnp.where(inside, proposal, 0.5 * (low + high)), low, high

    return jnp.exp(jax.lax.fori_loop(0, _NEWTON_STEPS, newton, (grid[best], low, high))[0])


@_stationary.defjvp
def _stationary_jvp(primals, tangents):
    z = _stationary(*primals)
    by_z = jax.jvp(lambda z: _slope(z, *primals), (z,), (jnp.ones_like(z),))[1]
    by_rest = jax.jvp(lambda *rest: _slope(z, *rest), primals, tangents)[1]
    return z, -by_rest / by_z


def _slope(z: Array, anomalies: Array, innovation: Array, certainty: float) -> Array:
    """z dJ/dz from Cholesky factors, whose derivatives stay finite where eigenvalues are equal."""
    members, m = anomalies.shape
    less = members - 1
    small = anomalies.T @ anomalies if m < members else anomalies @ anomalies.T
    unit = jnp.eye(len(small), dtype=small.dtype)
    prior_factor = inverse_factor(unit + small / less)
    prior_weight = (jnp.sum(prior_factor**2) + max(members - m, 0)) / members
    e, c = _coefficients(members, prior_weight, certainty)
    factor = inverse_factor(less * unit + z * small)
    if m < members:
        inner = anomalies @ (factor.T @ (factor @ innovation))
    else:
        inner = factor.T @ (factor @ (anomalies @ innovation))
    return c - e / z - z * jnp.sum(inner**2)


# ----------------------------------------------------------------------------------------- Gauss-Newton in weights


class Iterate(NamedTuple):
    """Mean weights w and transform T: the trial ensemble is ``mean + 1 w^T A + T A``, A the first anomalies.

    Attributes:
        mean: w, (N,).
        transform: T, (N, N).
        increment: the last step of w, (N,); its size is the test of convergence.
    """

    mean: Float[Array, "members"]
    transform: Float[Array, "members members"]
    increment: Float[Array, "members"]


def iterative_start(members: int) -> Iterate:
    """The forecast: w = 0, T = I."""
    dtype = jnp.result_type(float)
    zero = jnp.zeros(members, dtype)
    return Iterate(zero, jnp.eye(members, dtype=dtype), zero)


def iterative_step(
    mean: Float[Array, "members"],
    transform: Float[Array, "members members"],
    predicted: Array,
    data: Array,
    noise: Array,
) -> Iterate:
    """One Gauss-Newton step of the iterative ensemble Kalman filter and smoother, symmetric square root.

    With Y the whitened anomalies of the data predicted by the trial ensemble, d its innovation and
    ``Y0 = T^-1 Y`` (the sensitivities to the first anomalies):

        w <- w + (Y0 Y0^T + (N - 1) I)^-1 (Y0 d - (N - 1) w),      T <- (I + Y0 Y0^T / (N - 1))^-1/2

    One step from `iterative_start` is `etkf`; for a linear prediction further steps change nothing.

    Args:
        mean: w of the trial ensemble.
        transform: T of the trial ensemble, symmetric and positive definite. A small multiple of I for the trial
            (the "bundle" form) makes Y0 a finite difference; the T returned is then still the analysis'.
        predicted: data predicted by the trial ensemble, (N, m), through as much model time as the window has.
        data: data (m,), NaN where missing.
        noise: variances (m,) or covariance (m, m).

    Source: Bocquet and Sakov 2012, 2014; with T for the trial as in DAPPER's iEnKS "Sqrt", lag 1.
    """
    members = len(mean)
    less = members - 1
    w = whiten(predicted, data, noise)
    trial = inverse_factor(transform)
    sensitivity = trial.T @ (trial @ w.anomalies)
    root = inverse_root(jnp.eye(members, dtype=mean.dtype) + sensitivity @ sensitivity.T / less)
    increment = root @ (root @ (sensitivity @ w.innovation / less - mean))
    return Iterate(mean + increment, root, increment)


def iterative_weights(iterate: Iterate) -> Float[Array, "members members"]:
    """Weights W with rows of sum one of an iterate: ``W @ ensemble = mean + 1 w^T A + T A``."""
    members = len(iterate.mean)
    inner = iterate.transform + iterate.mean
    return inner + (1.0 - jnp.sum(inner, 1, keepdims=True)) / members
