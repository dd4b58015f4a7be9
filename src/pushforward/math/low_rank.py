"""Gaussian densities whose covariance is a known one plus a small number of directions with changing variances.

    y ~ N(V c, I + V diag(s^2) V^T),    y (m,), V (m, k), k small,

for many c and s and one y and V. With V = Q R (thin QR), e = Q^T y and everything orthogonal to Q in N(0, I),

    log p(y) = -|y - Q e|^2 / 2 - (m - k) log(2 pi) / 2 + log N(e; R c, I + R diag(s^2) R^T),

which is exact, needs m numbers once and O(k^3) for each c and s, and loses no digits as y^T y - ... would (the
matrix inversion lemma of Woodbury in square-root form).
"""

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from pushforward._types import Array, Float


class Reduced(eqx.Module):
    """Data and directions in k dimensions.

    Attributes:
        data: e, (k,).
        triangle: R, (k, k).
        constant: the part of the log density that does not change.
    """

    data: Float[Array, "k"]
    triangle: Float[Array, "k k"]
    constant: Float[Array, ""]


def reduce(y: Float[Array, "m"], directions: Float[Array, "m k"], log_det: Array | float = 0.0) -> Reduced:
    """What does not change with c and s.

    Args:
        y: data, whitened by the covariance that stays.
        directions: V, whitened alike; rows of missing data are 0 in both.
        log_det: log determinant of the root of the covariance that stays, and log(2 pi) / 2 for each datum present.
    """
    q, triangle = jnp.linalg.qr(directions)
    data = q.T @ y
    return Reduced(data, triangle, -0.5 * jnp.sum((y - q @ data) ** 2) - log_det)


def log_density(reduced: Reduced, mean: Float[Array, "k"], variance: Float[Array, "k"]) -> Float[Array, ""]:
    """log p(y) for coefficients c and variances s^2 of the directions."""
    r = reduced.triangle
    covariance = (r * variance) @ r.T
    lower = jnp.linalg.cholesky(covariance + jnp.eye(len(r), dtype=r.dtype))
    residual = solve_triangular(lower, reduced.data - r @ mean, lower=True)
    return reduced.constant - 0.5 * jnp.sum(residual**2) - jnp.sum(jnp.log(jnp.diagonal(lower)))
