"""Localised ensemble analyses: distances, the taper of Gaspari and Cohn, and the weights of the LETKF."""

import math

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float
from pushforward.math.ensemble import whiten
from pushforward.math.ensemble_roots import (
    batch_product,
    from_complement,
    inverse_factors,
    inverse_roots,
    rows_from_complement,
    to_complement,
)

HALF_SUPPORT = 1.82
"""Half the support of the taper, in radii: the value at one radius is 0.6335 (DAPPER's convention)."""


def gaspari_cohn(r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The compactly supported correlation function of fifth order: 1 at 0, 5/24 at 1, 0 from 2 on.

    ``1 - 5/3 r^2 + 5/8 r^3 + 1/2 r^4 - 1/4 r^5`` up to 1, then ``(2 - r)^4 (r^2 + 2 r - 1/2) / (12 r)``, the usual
    polynomial in a form that is exactly 0 at 2 and never negative (Gaspari and Cohn 1999, eq. 4.10).
    """
    r = jnp.minimum(jnp.abs(r), 2.0)
    near = 1.0 + r**2 * (-5.0 / 3.0 + r * (0.625 + r * (0.5 - 0.25 * r)))
    beyond = jnp.maximum(r, 1.0)
    far = (2.0 - beyond) ** 4 * (beyond**2 + 2.0 * beyond - 0.5) / (12.0 * beyond)
    return jnp.where(r < 1.0, near, far)


def localisation_taper(distances: Float[Array, "*shape"], radius: Array | float) -> Float[Array, "*shape"]:
    """Factors of the data's precision at these distances: Gaspari-Cohn with half-support 1.82 radius.

    Args:
        distances: any shape, here (local points, m).
        radius: in the units of the distances; infinity switches localisation off.
    """
    return gaspari_cohn(distances / (HALF_SUPPORT * radius))


def ring_distances(n: int, positions: Float[Array, "m"]) -> Float[Array, "n m"]:
    """Distances, in grid units, of the grid points 0..n-1 of a periodic line to these positions."""
    return distances(jnp.arange(n)[:, None], jnp.asarray(positions)[:, None], periods=jnp.asarray([n]))


def distances(a: Float[Array, "n k"], b: Float[Array, "m k"], *, periods: Array | None = None) -> Float[Array, "n m"]:
    """Euclidean distances between points; with `periods` (k,) the shortest way around (infinity: not periodic)."""
    shift = jnp.abs(a[:, None] - b[None]).astype(jnp.result_type(float))
    if periods is not None:
        periods = jnp.asarray(periods, shift.dtype)
        finite = jnp.isfinite(periods)
        shift = jnp.where(finite, jnp.mod(shift, jnp.where(finite, periods, 1.0)), shift)
        shift = jnp.minimum(shift, periods - shift)
    return jnp.sqrt(jnp.sum(shift**2, -1))


def letkf_weights(
    predicted: Float[Array, "members m"],
    data: Float[Array, "m"],
    variances: Float[Array, "m"],
    taper: Float[Array, "local m"],
) -> Float[Array, "local members members"]:
    """Weights of the local ensemble transform Kalman filter: `etkf` at each local point with tapered data.

    The precision of datum j counts ``taper[l, j]`` times at local point l (Hunt, Kostelich and Szunyogh 2007, section
    2.3). ``analysis[:, l] = weights[l] @ ensemble[:, l]``: see `apply_local`. With a taper of ones all rows are `etkf`.

    Args:
        predicted: predicted data of each member, (N, m).
        data: data, NaN where missing.
        variances: noise variances, (m,).
        taper: from `localisation_taper`, (local points, m), at least 0.

    Returns:
        (local points, N, N), rows of sum one.
    """
    gram, right = _local_systems(predicted, data, variances, taper)
    root = inverse_roots(gram)
    mean = batch_product(root, batch_product(root, right[:, None]))[:, 0]
    return _embed(root, mean)


def letkf_weights_triangular(
    predicted: Float[Array, "members m"],
    data: Float[Array, "m"],
    variances: Float[Array, "m"],
    taper: Float[Array, "local m"],
) -> Float[Array, "local members members"]:
    """The same with the inverse Cholesky factor as root, in the complement of 1: several times faster.

    Each local mean and covariance is that of `letkf_weights`. The factor varies smoothly from point to point too, but
    moves the members more than the symmetric root does, and covariances between points are other ones. Follow it by a
    rotation; compare scores with `letkf_weights` before relying on it. Arguments and result as there.
    """
    gram, right = _local_systems(predicted, data, variances, taper)
    # Without the barriers XLA computes the unrolled loops anew for each of their uses.
    factor = jax.lax.optimization_barrier(inverse_factors(gram))
    mean = batch_product(jnp.swapaxes(factor, 0, 1), batch_product(factor, right[:, None]))[:, 0]
    return _embed(factor, mean)


def _local_systems(predicted: Array, data: Array, variances: Array, taper: Array) -> tuple[Array, Array]:
    """I + S diag(taper) S^T and S diag(taper) d / sqrt(N - 1) in the complement of 1, local points last."""
    root = math.sqrt(predicted.shape[0] - 1)
    w = whiten(predicted, data, variances)
    inner = to_complement(w.anomalies / root)
    n, m = inner.shape
    # One product for the Gram matrices of all local points.
    pairs = (inner[:, None] * inner[None]).reshape(n * n, m)
    gram = (pairs @ taper.T).reshape(n, n, -1) + jnp.eye(n, dtype=inner.dtype)[:, :, None]
    return jax.lax.optimization_barrier((gram, (inner * (w.innovation / root)) @ taper.T))


def _embed(transform: Array, mean: Array) -> Array:
    mean = jax.lax.optimization_barrier(mean)
    weights = from_complement(transform) + rows_from_complement(mean)[None]
    return jnp.moveaxis(weights, -1, 0)


def apply_local(
    weights: Float[Array, "local members members"], ensemble: Float[Array, "members local *shape"]
) -> Float[Array, "members local *shape"]:
    """Applies the weights of each local point to what belongs to it, the second axis of the ensemble."""
    return jnp.einsum("lij,jl...->il...", weights, ensemble)
