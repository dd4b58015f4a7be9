"""Prior maps of matrix-valued families."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.nn import log_sigmoid
from jax.scipy.linalg import solve_triangular

from pushforward.math.beta_quantile import logit_beta, logit_beta_score
from pushforward.math.gamma_quantile import log_gamma, log_gamma_score
from pushforward.math.special import LOG_2
from pushforward.model._maps import PriorMap, register


def _solve(tril: Array, matrix: Array) -> Array:
    return solve_triangular(*_same_batch(tril, matrix), lower=True)  # type: ignore[reportArgumentType]


def _same_batch(*matrices: Array) -> list[Array]:
    batch = jnp.broadcast_shapes(*(m.shape[:-2] for m in matrices))
    return [jnp.broadcast_to(m, batch + m.shape[-2:]) for m in matrices]


@register(dist.MatrixNormal)
def _matrix_normal(d: dist.MatrixNormal) -> PriorMap:
    row, column = d.scale_tril_row, d.scale_tril_column

    def push(z: Array) -> Array:
        return d.loc + row @ z @ jnp.swapaxes(column, -1, -2)

    def pull(x: Array) -> Array:
        return jnp.swapaxes(_solve(column, jnp.swapaxes(_solve(row, x - d.loc), -1, -2)), -1, -2)

    return PriorMap("affine", tuple(d.event_shape), push, pull)


@register(dist.LKJCholesky)
def _lkj_cholesky(d: dist.LKJCholesky) -> PriorMap:
    r"""C-vine: independent partial correlations (Lewandowski, Kurowicka and Joe 2009, section 2.4).

    r_ij = 2 v_ij - 1 with v_ij ~ Beta(b_j, b_j), b_j = eta + (d - 1 - j) / 2 for the j-th column, j = 1..d-1, and
    L_ij = r_ij prod_{k<j} sqrt(1 - r_ik^2). With u = logit(v): r = tanh(u / 2), 1 - r^2 = 4 v (1 - v).
    """
    size = d.dimension
    rows, columns = np.tril_indices(size, -1)
    shape = jnp.expand_dims(d.concentration, -1) + 0.5 * (size - 2 - columns)

    def push(z: Array) -> Array:
        u = logit_beta(z, shape, shape)
        full = jnp.zeros((*z.shape[:-1], size, size), z.dtype).at[..., rows, columns].set(u)
        below = jnp.asarray(np.tril(np.ones((size, size), bool), -1))
        left = LOG_2 + 0.5 * (log_sigmoid(full) + log_sigmoid(-full))
        left = jnp.where(below, left, 0.0)
        before = jnp.exp(jnp.cumsum(left, -1) - left)
        partial = jnp.where(below, jnp.tanh(0.5 * full), jnp.eye(size, dtype=z.dtype))
        value = partial * before
        tiny = jnp.finfo(value.dtype).tiny
        return jnp.where(jnp.asarray(np.eye(size, dtype=bool)) & (value < tiny), tiny, value)

    def pull(x: Array) -> Array:
        squares = jnp.flip(jnp.cumsum(jnp.flip(x**2, -1), -1), -1)
        after = (squares - x**2)[..., rows, columns]
        element = x[..., rows, columns]
        half = jnp.arcsinh(element / jnp.sqrt(after))
        return logit_beta_score(2.0 * half, shape, shape)

    return PriorMap("C-vine", (size * (size - 1) // 2,), push, pull)


def _bartlett(z: Array, df: Array, size: int) -> Array:
    """Fills the lower triangle with chi variates on the diagonal and normals below it (Bartlett 1933)."""
    rows, columns = np.tril_indices(size, -1)
    diagonal = np.arange(size)
    chi = jnp.exp(0.5 * (LOG_2 + log_gamma(z[..., :size], 0.5 * df)))
    matrix = jnp.zeros((*z.shape[:-1], size, size), z.dtype).at[..., diagonal, diagonal].set(chi)
    return matrix.at[..., rows, columns].set(z[..., size:])


def _bartlett_score(matrix: Array, df: Array, size: int) -> Array:
    rows, columns = np.tril_indices(size, -1)
    chi = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    scores = log_gamma_score(2.0 * jnp.log(chi) - LOG_2, 0.5 * df)
    return jnp.concatenate([scores, matrix[..., rows, columns]], -1)


@register(dist.WishartCholesky)
def _wishart_cholesky(d: dist.WishartCholesky) -> PriorMap:
    size = d.event_shape[-1]
    df = jnp.expand_dims(d.concentration, -1) - jnp.arange(size)
    return PriorMap(
        "Bartlett",
        (size * (size + 1) // 2,),
        lambda z: d.scale_tril @ _bartlett(z, df, size),
        lambda x: _bartlett_score(_solve(d.scale_tril, x), df, size),
    )


@register(dist.InverseWishartCholesky)
def _inverse_wishart_cholesky(d: dist.InverseWishartCholesky) -> PriorMap:
    """L = scale_tril A^-1 with A lower triangular and A A^T a Wishart matrix taken from the last row up."""
    size = d.event_shape[-1]
    df = jnp.expand_dims(d.concentration, -1) + (jnp.arange(size) - size + 1)

    def push(z: Array) -> Array:
        factor = _bartlett(z, df, size)
        return d.scale_tril @ _solve(factor, jnp.eye(size, dtype=factor.dtype))

    def pull(x: Array) -> Array:
        return _bartlett_score(_solve(x, d.scale_tril), df, size)

    return PriorMap("Bartlett", (size * (size + 1) // 2,), push, pull)
