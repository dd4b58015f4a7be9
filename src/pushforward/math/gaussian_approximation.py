"""Natural-gradient steps of Gaussian variational inference, in whitened coordinates.

The approximation is ``q = N(m, L L^T)`` and ``x = m + L e`` with ``e ~ N(0, I)``. For a log density
with gradient g the whitened quantities are

    u = L^T E[g(x)],        M = -sym(L^T E[g(x) e^T])   (Stein: E[-L^T H L])

and q is optimal where u = 0 and M = I. A natural-gradient step (Khan and Rue 2023, eq. 3.10; Opper and
Archambeau 2009) of size rho has whitened precision ``P = (1 - rho) I + rho M`` and moves the mean by
``rho L P^-1 u``; for a Gaussian target rho = 1 lands on the optimum at once.
"""

import jax.numpy as jnp

from pushforward._types import Array, Float

FLOOR = 0.05
"""Least whitened precision of one step: a step widens q by at most 1 / sqrt(FLOOR)."""


def stein_curvature(root: Float[Array, "d d"], gradients: Array, noise: Array) -> Float[Array, "d d"]:
    """M from noise and gradients, each gradient times the weight of its point, of shape (n, d); Stein's identity."""
    moment = root.T @ (gradients.T @ noise)
    return -0.5 * (moment + moment.T)


def full_step(mean: Array, root: Array, u: Array, curvature: Array, rho: Array) -> tuple[Array, Array]:
    """New mean and root of the covariance after a step of size rho.

    The root is multiplied by the symmetric square root of P^-1, so that it does not turn and a
    fixed set of noise points defines one smooth objective.
    """
    values, vectors = jnp.linalg.eigh(curvature)
    precision = (1 - rho) + rho * jnp.maximum(values, FLOOR)
    shift = vectors @ ((vectors.T @ u) / precision)
    return mean + rho * root @ shift, root @ (vectors / jnp.sqrt(precision)) @ vectors.T


def diagonal_step(mean: Array, scale: Array, u: Array, curvature: Array, rho: Array) -> tuple[Array, Array]:
    """The same for independent coordinates: all arguments but rho have shape (d,)."""
    precision = (1 - rho) + rho * jnp.maximum(curvature, FLOOR)
    return mean + rho * scale * u / precision, scale / jnp.sqrt(precision)


def predicted_gain(u: Array, curvature: Array, identity: Array) -> Array:
    """ELBO that a full step is still predicted to gain, to second order: |u|^2 / 2 + |M - I|^2 / 4."""
    return 0.5 * jnp.sum(u**2) + 0.25 * jnp.sum((curvature - identity) ** 2)
