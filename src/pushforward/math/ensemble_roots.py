"""Roots of the small positive definite matrices of ensemble filters, cheap on a CPU and differentiable.

All matrices here are ``A = I + G`` with G positive semi-definite, so the least eigenvalue is 1 or more and
explicit factors of the inverse lose nothing. The eigenvalues are often equal (G has rank at most the number of
data), where the derivative of an eigendecomposition is infinite though that of the root is finite: the
roots therefore carry their own derivative, a Sylvester equation.
"""

import math

import jax
import jax.numpy as jnp
from jax.lax.linalg import cholesky, triangular_solve

from pushforward._types import Array, Float

_BLOCK = 20
"""Largest block whose LAPACK calls stay in one thread and cost less than the calls' overhead."""
_BLOCKED_UNTIL = 80
_UNROLLED_UNTIL = 12


def inverse_factor(a: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """F lower triangular with F A F^T = I, that is A^-1 = F^T F.

    Blocks of at most 20 up to n = 80: a multi-threaded LAPACK spends more on its threads there than on the work.
    """
    n = a.shape[-1]
    if n <= _BLOCK or n > _BLOCKED_UNTIL:
        factor = cholesky(a, symmetrize_input=False)
        return triangular_solve(factor, jnp.eye(n, dtype=a.dtype), left_side=True, lower=True)
    k = (n + 1) // 2
    first = inverse_factor(a[:k, :k])
    below = a[k:, :k] @ first.T
    second = inverse_factor(a[k:, k:] - below @ below.T)
    corner = -second @ (below @ first)
    return jnp.block([[first, jnp.zeros((k, n - k), a.dtype)], [corner, second]])


@jax.custom_jvp
def inverse_root(a: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Z = A^-1/2, symmetric. Derivatives of any order are exact at equal eigenvalues too."""
    values, vectors = jnp.linalg.eigh(a)
    return (vectors / jnp.sqrt(values)[..., None, :]) @ vectors.mT


@inverse_root.defjvp
def _inverse_root_jvp(primals, tangents):
    # Z A Z = I gives dZ X + X dZ = -Z dA Z with X = A Z = A^1/2.
    (a,), (da,) = primals, tangents
    z = inverse_root(a)
    return z, sylvester(a @ z, -z @ (0.5 * (da + da.mT)) @ z)


def sylvester(x: Float[Array, "*batch n n"], c: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """S with X S + S X = C for a symmetric positive definite X, differentiated as a linear solve."""
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(x))

    def solve(_, right):
        inner = (vectors.mT @ right @ vectors) / (values[..., :, None] + values[..., None, :])
        return vectors @ inner @ vectors.mT

    return jax.lax.custom_linear_solve(lambda s: x @ s + s @ x, c, solve, symmetric=True)


# ------------------------------------------------------------------- many small matrices, the batch as the last axis


def inverse_roots(a: Float[Array, "n n batch"]) -> Float[Array, "n n batch"]:
    """Z = A^-1/2, symmetric, for many matrices side by side along the last axis.

    The product form of the iteration of Denman and Beavers with determinant scaling (Higham 2008, Functions of
    Matrices, eqs. 6.29 and 6.30) for n up to 12, where it takes a third of the time of LAPACK's eigenvectors
    (each operation runs over the whole batch); eigenvectors above.
    """
    if a.shape[0] > _UNROLLED_UNTIL:
        return jnp.moveaxis(inverse_root(jnp.moveaxis(a, -1, 0)), 0, -1)
    return _denman_beavers(a)


@jax.custom_jvp
def _denman_beavers(a: Array) -> Array:
    n = a.shape[0]
    unit = jnp.eye(n, dtype=a.dtype)[:, :, None]
    # The relative error after a step is an eighth of the square of the deviation before it.
    tolerance = 10.0 * math.sqrt(jnp.finfo(a.dtype).eps)

    def unfinished(state):
        return (state[3] > tolerance) & (state[2] < 40)

    def step(state):
        m, z, count, _ = state
        inverse, log_det = _gauss_jordan(m)
        square = jnp.exp(-log_det / n)
        scale = jnp.sqrt(square)
        inverse = inverse / square
        z = 0.5 * scale * batch_product(z, unit + inverse)
        m_next = 0.5 * (unit + 0.5 * (square * m + inverse))
        return m_next, z, count + 1, jnp.max(jnp.abs(m - unit))

    start = (a, jnp.broadcast_to(unit, a.shape), 0, jnp.asarray(jnp.inf, a.dtype))
    return jax.lax.while_loop(unfinished, step, start)[1]


@_denman_beavers.defjvp
def _denman_beavers_jvp(primals, tangents):
    first = [jnp.moveaxis(x, -1, 0) for x in (primals[0], tangents[0])]
    z = _denman_beavers(primals[0])
    a, da = first[0], 0.5 * (first[1] + first[1].mT)
    root = jnp.moveaxis(z, -1, 0)
    return z, jnp.moveaxis(sylvester(a @ root, -root @ da @ root), 0, -1)


def _gauss_jordan(a: Array) -> tuple[Array, Array]:
    """A^-1 and log det A without pivoting, which positive definite matrices do not need."""
    log_det = jnp.zeros(a.shape[-1], a.dtype)
    for k in range(a.shape[0]):
        pivot = 1.0 / a[k, k]
        log_det = log_det - jnp.log(pivot)
        row, column = a[k] * pivot, a[:, k]
        a = a - column[:, None] * row[None]
        a = a.at[k].set(row).at[:, k].set(-column * pivot).at[k, k].set(pivot)
    return a, log_det


def inverse_factors(a: Float[Array, "n n batch"]) -> Float[Array, "n n batch"]:
    """F lower triangular with A^-1 = F^T F, for many matrices side by side along the last axis."""
    n = a.shape[0]
    if n > _UNROLLED_UNTIL:
        first = jnp.moveaxis(a, -1, 0)
        factor = cholesky(first, symmetrize_input=False)
        unit = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), first.shape)
        return jnp.moveaxis(triangular_solve(factor, unit, left_side=True, lower=True), 0, -1)
    # Elimination of [A, I]: rows scaled by the pivots' roots leave L^-1 on the right.
    right = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype)[:, :, None], a.shape)
    rows = []
    for _ in range(n):
        root = jax.lax.rsqrt(a[0, 0])
        line, tail = a[0] * root, right[0] * root
        rows.append(tail)
        a = a[1:, 1:] - line[1:, None] * line[None, 1:]
        right = right[1:] - line[1:, None] * tail[None]
    return jnp.stack(rows)


def batch_product(a: Float[Array, "i j batch"], b: Float[Array, "j k batch"]) -> Float[Array, "i k batch"]:
    """A B for each matrix of the batch; unrolled over j, which vectorises over the batch."""
    if a.shape[1] > _UNROLLED_UNTIL:
        return jnp.einsum("ijb,jkb->ikb", a, b)
    total = a[:, 0, None] * b[None, 0]
    for j in range(1, a.shape[1]):
        total = total + a[:, j, None] * b[None, j]
    return total


# ------------------------------------------------------------------------------- the complement of the vector of ones


def to_complement(rows: Float[Array, "members *shape"]) -> Float[Array, "less *shape"]:
    """B^T X for rows that sum to zero: coordinates in a fixed orthonormal basis B of the complement of 1.

    B is a Householder reflection that sends 1 / sqrt(N) to the first axis, without its first column:
    ``B[0, a] = 1 / sqrt(N)`` and ``B[i, a] = delta(i - 1, a) - 1 / (N - sqrt(N))``.
    """
    n = rows.shape[0]
    return rows[1:] + rows[:1] * (1.0 / math.sqrt(n) + 1.0 / (n - math.sqrt(n)))


def from_complement(
    inner: Float[Array, "less less *batch"], mean: float = 1.0
) -> Float[Array, "members members *batch"]:
    """B M B^T + mean 1 1^T / N: a matrix of the complement in terms of members; rows sum to `mean`."""
    n = inner.shape[0] + 1
    root, c = math.sqrt(n), 1.0 / (n - math.sqrt(n))
    row, column = jnp.sum(inner, 1), jnp.sum(inner, 0)
    total = jnp.sum(row, 0)
    body = inner - c * (row[:, None] + column[None]) + c * c * total
    top = ((column - c * total) / root)[None]
    left = ((row - c * total) / root)[:, None]
    corner = (total / n)[None, None]
    return jnp.concatenate([jnp.concatenate([corner, top], 1), jnp.concatenate([left, body], 1)], 0) + mean / n


def rows_from_complement(inner: Float[Array, "less *shape"]) -> Float[Array, "members *shape"]:
    """B X: the rows of all members, which sum to zero."""
    n = inner.shape[0] + 1
    total = jnp.sum(inner, 0, keepdims=True)
    return jnp.concatenate([total / math.sqrt(n), inner - total / (n - math.sqrt(n))], 0)
