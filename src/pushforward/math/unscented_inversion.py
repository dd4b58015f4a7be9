"""Unscented Kalman inversion: a Gaussian moved to the posterior by 2 d + 1 evaluations a step, without randomness.

The state is N(mean, C), C = root root^T. A step forgets a share `step` = s of what is known and learns it anew from the
data, ``C^ = C / (1 - s)`` before and noise I / s in the update, so that for linear G

    C_n^-1 = (1 - s) C_{n-1}^-1 + s P,       C_n^-1 (mean_n - mpost) = (1 - s)^n C_0^-1 (mean_0 - mpost),

P the precision of all that is data: with the prior N(0, I) among them (`update`) the limit is the posterior, for every
step; without (`update_without_prior`) the law of the likelihood alone, ``P = G^T G``, singular where the data leave
directions open. Both from any start. Outputs and data are in units of the noise; NaN in the data says missing.

Cost O(d^2 (d + m)): for d up to some hundreds.
"""

import math

import jax.numpy as jnp

from pushforward._types import Array, Float
from pushforward.math.ensemble_roots import inverse_factor


def points(mean: Float[Array, "d"], root: Float[Array, "d d"], step: Array | float = 0.5) -> Float[Array, "points d"]:
    """The sigma points of the law N(mean, root root^T / (1 - step)) that a step evaluates: 2 d + 1 of them.

    The mean, then mean + c r_i, then mean - c r_i, r_i the columns of ``root / sqrt(1 - step)``, c = min(sqrt(d), 2).

    Source: Huang, Schneider and Stuart 2022, "Iterated Kalman methodology for inverse problems",
    doi:10.1016/j.jcp.2022.111262 (modified unscented transform).
    """
    away = _distance(len(mean)) * _predicted(root, step).T
    return jnp.concatenate([mean[None], mean + away, mean - away])


def update(
    mean: Float[Array, "d"],
    root: Float[Array, "d d"],
    outputs: Float[Array, "points m"],
    data: Float[Array, "m"],
    step: Array | float = 0.5,
) -> tuple[Float[Array, "d"], Float[Array, "d d"]]:
    """Mean and lower triangular root after one step, the prior N(0, I) being d further data 0 of outputs z.

    With X (2 d, d) and Y (2 d, n) the deviations of points and outputs from the first, times the root of their
    weights: ``M = (I + s Y Y^T)^-1``, ``mean <- mean + s X^T M Y (y - g_0)``, ``C <- X^T M X``.

    Args:
        mean: of the state, (d,).
        root: any root of the state's covariance, (d, d), as the last update returned it.
        outputs: whitened G at the rows of `points(mean, root, step)`.
        data: whitened alike.
        step: s, in (0, 1). For linear G the errors shrink by 1 - s a step; for others a small s follows G more closely.

    Source: Huang, Huang, Reich and Stuart 2022, "Efficient derivative-free Bayesian inference for large-scale inverse
    problems", doi:10.1088/1361-6420/ac99fa; with s = 1 / 2 Huang, Schneider and Stuart 2022.
    """
    x, y, residual = _deviations(root, outputs, data, step)
    return _updated(mean, x, jnp.concatenate([y, x], 1), jnp.concatenate([residual, -mean]), step)


def update_without_prior(
    mean: Float[Array, "d"],
    root: Float[Array, "d d"],
    outputs: Float[Array, "points m"],
    data: Float[Array, "m"],
    step: Array | float = 0.5,
) -> tuple[Float[Array, "d"], Float[Array, "d d"]]:
    """`update` by the data alone: the mean goes to a least-squares fit, ``C^-1`` to G^T G.

    Where the data leave directions open their variance grows by 1 / (1 - step) each step.
    """
    return _updated(mean, *_deviations(root, outputs, data, step), step)


def _distance(d: int) -> float:
    return min(math.sqrt(d), 2.0)


def _predicted(root: Array, step: Array | float) -> Array:
    return root / jnp.sqrt(1.0 - step)


def _deviations(root: Array, outputs: Array, data: Array, step: Array | float) -> tuple[Array, Array, Array]:
    """X, Y and the data's residual at the centre; each point but the centre has weight 1 / (2 c^2)."""
    x = _predicted(root, step).T / math.sqrt(2.0)
    present = ~jnp.isnan(data)
    outputs = jnp.where(present, outputs, 0.0)
    y = (outputs[1:] - outputs[0]) / (math.sqrt(2.0) * _distance(len(root)))
    return jnp.concatenate([x, -x]), y, jnp.where(present, data, 0.0) - outputs[0]


def _updated(mean: Array, x: Array, y: Array, residual: Array, step: Array | float) -> tuple[Array, Array]:
    factor = inverse_factor(jnp.eye(len(x), dtype=x.dtype) + step * (y @ y.T))
    half = factor @ x
    shift = step * half.T @ (factor @ (y @ residual))
    upper = jnp.linalg.qr(half, mode="r")
    return mean + shift, upper.T * jnp.where(jnp.diagonal(upper) < 0, -1.0, 1.0).astype(x.dtype)
