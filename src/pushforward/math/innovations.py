"""What innovations say about a Gaussian filter: log density and chi-square of each step's data.

With d the innovation and S the covariance of the predicted data, d' S^-1 d is chi-square with as many degrees of
freedom as data where the filter is right (Bar-Shalom, Li and Kirubarajan 2001, "Estimation with Applications to
Tracking and Navigation", section 5.4: the normalized innovation squared).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.lax.linalg import cholesky, triangular_solve

from pushforward._types import Array, Float
from pushforward.math.ensemble import Whitened
from pushforward.math.kalman import LOG_2PI, Record


class Innovations(NamedTuple):
    """Numbers about the data of a step: log p(y_t given y_1..t-1), d' S^-1 d and the number of data present."""

    log_likelihood: Float[Array, ""]
    chi_square: Float[Array, ""]
    count: Float[Array, ""]


def kalman_innovations(record: Record, data: Float[Array, "m"]) -> Innovations:
    """Of one step of a Kalman filter, from its record, whose factor, innovation and score say it all.

    Args:
        record: of the step.
        data: shape (m,), NaN where missing.
    """
    count = jnp.sum(~jnp.isnan(data), dtype=record.innovation.dtype)
    square = jnp.sum(record.innovation * record.score)
    log_root = jnp.sum(jnp.log(jnp.diagonal(record.factor)))
    return Innovations(-log_root - 0.5 * (square + count * LOG_2PI), square, count)


def ensemble_chi_square(w: Whitened) -> Float[Array, ""]:
    """d' (I + S' S)^-1 d of whitened data, S the anomalies over sqrt(N - 1), from the smaller of two matrices.

    For more data than members it is |d - S' v|^2 + |v|^2 with v = (I + S S')^-1 S d, which does not cancel.

    Args:
        w: whitened predicted data and innovation; missing data are zero columns.
    """
    members, m = w.anomalies.shape
    s, d = w.anomalies / math.sqrt(members - 1), w.innovation
    if m < members:
        factor = cholesky(jnp.eye(m, dtype=s.dtype) + s.T @ s, symmetrize_input=False)
        return jnp.sum(triangular_solve(factor, d[:, None], left_side=True, lower=True) ** 2)
    factor = cholesky(jnp.eye(members, dtype=s.dtype) + s @ s.T, symmetrize_input=False)
    white = triangular_solve(factor, (s @ d)[:, None], left_side=True, lower=True)
    v = triangular_solve(factor, white, left_side=True, lower=True, transpose_a=True)[:, 0]
    return jnp.sum((d - v @ s) ** 2) + v @ v
