"""Products and factorisations of matrices of a few rows, in a form that XLA makes fast inside a loop over time.

A general product of 4 x 4 matrices is a call, and its derivative two more with transposed copies; as a sum of outer
products it is fused with its neighbors. A filter of four states takes its gradient in a quarter of the time so.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

SMALL = 6  # up to this many rows the factorisation is unrolled into elementwise operations, which XLA fuses
BLOCK = 20  # larger ones go by blocks: beyond about this size OpenBLAS starts threads that spin
FEW = 6  # up to this many terms a product is a sum of outer products


def product(left: Float[Array, "rows k"], right: Array) -> Array:
    """left @ right, for a matrix or a vector on the right."""
    terms = left.shape[1]
    if not 0 < terms <= FEW:
        return left @ right
    if right.ndim == 1:
        return sum((left[:, k] * right[k] for k in range(1, terms)), left[:, 0] * right[0])
    return sum((left[:, k, None] * right[k][None] for k in range(1, terms)), left[:, 0, None] * right[0][None])


def symmetric(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Averages a matrix with its transpose, since rounding errors of odd symmetry may grow."""
    return 0.5 * (matrix + jnp.swapaxes(matrix, -1, -2))


def eliminate(joint: Float[Array, "k k"], m: int) -> Float[Array, "k m"]:
    """The first m columns of the lower Cholesky factor of a matrix whose leading m x m block is positive definite.

    With joint = [[S, C'], [C, V]] these are [F; C F^-T], F F' = S; then V - (C F^-T)(C F^-T)' is the Schur complement.
    """
    size, columns = 1 if m <= SMALL else BLOCK, []
    for start in range(0, m, size):
        stop = min(start + size, m)
        column = joint[start:, start:stop]
        for first, done in columns:
            rest = done[start - first :]
            column = column - rest @ rest[: stop - start].T if size > 1 else column - rest * rest[:1]
        if size == 1:
            column = column * lax.rsqrt(column[:1])
        else:
            factor = jnp.linalg.cholesky(column[: stop - start], symmetrize_input=False)
            column = jnp.concatenate([factor, solve_factor(factor, column[stop - start :].T, transposed=False).T])
        columns.append((start, column))
    padded = (jnp.pad(column, ((start, 0), (0, 0))) for start, column in columns)
    return jnp.concatenate([joint[:, :0], *padded], axis=1)


def solve_factor(factor: Float[Array, "m m"], right: Float[Array, "m k"], *, transposed: bool) -> Float[Array, "m k"]:
    """Solves F x = right, or F' x = right if `transposed`, for lower triangular F; unrolled if small."""
    m = factor.shape[0]
    if m > SMALL:
        # From the right, since rows lie one after the other: solve_triangular makes copies and takes up to 20 x longer.
        return lax.linalg.triangular_solve(factor, right.T, left_side=False, lower=True, transpose_a=not transposed).T
    rows: dict[int, Array] = {}
    for i in reversed(range(m)) if transposed else range(m):
        known = sum((factor[j, i] if transposed else factor[i, j]) * row for j, row in rows.items())
        rows[i] = (right[i] - known) / factor[i, i]
    return jnp.stack([rows[i] for i in range(m)]) if m else right


def swept(joint: Float[Array, "k k"], m: int) -> tuple[list[Array], list[Array]]:
    """`eliminate` for m <= SMALL by full columns: the diagonal of F, and the columns of C F^-T.

    Nothing is cut or padded, so that the columns stay in one fused loop; rows of the first block hold no triangle.
    """
    columns: list[Array] = []
    for j in range(m):
        column = joint[:, j]
        for done in columns:
            column = column - done * done[j]
        columns.append(lax.optimization_barrier(column * lax.rsqrt(column[j])))
    return [column[j] for j, column in enumerate(columns)], [column[m:] for column in columns]
