"""Gains K (n, m) of few numbers: what is learned of an analysis whose covariance is never computed.

A structured gain is K = C S: S (n, m) carries the innovation to the state, C (n, n) has the structure. State
coordinates lie on a ring where distances count.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def offsets(width: int) -> np.ndarray:
    """Positions -width..width around a coordinate."""
    return np.arange(-width, width + 1)


def neighbours(x: Float[Array, " n"], width: int) -> Float[Array, "n k"]:
    """x[i + j] on a ring, for j = -width..width."""
    return jnp.stack([jnp.roll(x, -int(j)) for j in offsets(width)], axis=1)


def band(rows: Float[Array, "n k"]) -> Float[Array, "n n"]:
    """The matrix on a ring with C[i, i + j] = rows[i, j], j = -width..width."""
    n, k = rows.shape
    i = np.arange(n)[:, None]
    return jnp.zeros((n, n), rows.dtype).at[i, (i + offsets(k // 2)) % n].set(rows)


def bands_of(matrix: Float[Array, "n n"], width: int) -> Float[Array, "n k"]:
    """The rows from which `band` makes the band of a matrix."""
    i = np.arange(matrix.shape[0])[:, None]
    return matrix[i, (i + offsets(width)) % matrix.shape[0]]


def spreading(H: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """S = H^+, which carries data to the state coordinates that they are of; selections give H'."""
    return jnp.linalg.pinv(H)
