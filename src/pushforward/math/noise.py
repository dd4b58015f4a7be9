"""DataNoise of data as an operator: standard deviations, covariances, or a diagonal plus low rank, and R^-1/2 of each.

A noise is one of

- an array of the data's shape, standard deviations;
- an array with one axis more, covariances of the last axis of the data;
- a `LowRank`, ``R = diag(d) + F F^T`` along the last axis of the data, which is never made dense.

Missing data drop out exactly: what is left has the marginal noise of the entries present.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from pushforward._types import Array, Bool, Float


class LowRank(NamedTuple):
    """``R = diag(diagonal) + factor factor^T`` for each event of the data.

    Attributes:
        factor: F, (*batch, m, rank).
        diagonal: d, variances, (*batch, m).
    """

    factor: Float[Array, "*batch m rank"]
    diagonal: Float[Array, "*batch m"]


type DataNoise = Array | LowRank


def whiten(
    values: Float[Array, "*batch m"], noise: DataNoise, present: Bool[Array, "*batch m"]
) -> Float[Array, "*batch m"]:
    """R^-1/2 of values, which are filled at missing entries; 0 there.

    The root of a dense R is the inverse Cholesky factor's, that of a low-rank one is symmetric: with the thin singular
    value decomposition ``d^-1/2 F = U s V^T``, ``R^-1/2 = (I - U (1 - (1 + s^2)^-1/2) U^T) d^-1/2``, cost O(m rank^2).
    """
    filled = jnp.where(present, values, 0.0)
    if isinstance(noise, LowRank):
        sd = jnp.sqrt(jnp.where(present, noise.diagonal, 1.0))
        scaled = jnp.where(present[..., None], noise.factor / sd[..., None], 0.0)
        left, sizes, _ = jnp.linalg.svd(scaled, full_matrices=False)
        filled = filled / sd
        along = jnp.einsum("...mr,...m->...r", left, filled)
        return filled - jnp.einsum("...mr,...r->...m", left, (1.0 - (1.0 + sizes**2) ** -0.5) * along)
    if noise.ndim == present.ndim:
        return filled / noise
    both = present[..., :, None] & present[..., None, :]
    root = jnp.linalg.cholesky(jnp.where(both, noise, jnp.eye(present.shape[-1], dtype=noise.dtype)))
    return solve_triangular(root, filled[..., None], lower=True)[..., 0]


def flat(noise: DataNoise) -> Array:
    """All numbers that a noise is made of, as one vector."""
    parts = noise if isinstance(noise, LowRank) else (noise,)
    return jnp.concatenate([jnp.ravel(p) for p in parts])


def fault(noise: DataNoise, ndim: int) -> str | None:
    """What is wrong with a noise of data with so many axes, or None; on the host."""
    if isinstance(noise, LowRank):
        factor, diagonal = (np.asarray(p, float) for p in noise)
        good = np.isfinite(factor).all() and np.isfinite(diagonal).all() and (diagonal > 0).all()
        return None if good else "covariance is not positive definite"
    values = np.asarray(noise, float)
    if values.ndim > ndim:
        blocks = values.reshape(-1, *values.shape[-2:])
        good = np.isfinite(blocks).all() and all(np.linalg.eigvalsh(b)[0] > 0 for b in blocks)
        return None if good else "covariance is not positive definite"
    good = (values > 0).all() and np.isfinite(values).all()
    return None if good else "standard deviation is not positive"
