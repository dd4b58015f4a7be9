"""Points that stand for N(0, I): moment-matched for optimisation, randomised for unbiased estimates."""

from functools import cache

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from pushforward._types import Array, Float


def matched_normal(n: int, d: int) -> Float[np.ndarray, "n d"]:
    """n antithetic points with mean exactly 0 and covariance exactly I, from a scrambled Sobol sequence.

    With them the sample average of any quadratic is its exact expectation.

    Args:
        n: number of points, even and at least 2 d.
        d: dimension.

    Raises:
        ValueError: n is odd or too small to have covariance I.
    """
    if n % 2 or n < 2 * d:
        raise ValueError(f"n must be even and at least 2 d = {2 * d}; got {n}")
    half = _normal(sobol(n // 2, d))
    points = np.concatenate([half, -half])
    root = np.linalg.cholesky(points.T @ points / n)
    return np.linalg.solve(root, points.T).T


@cache
def sobol(n: int, d: int) -> np.ndarray:
    """n points of a scrambled Sobol sequence with a fixed seed (Owen 1998), plain uniforms in too many dimensions."""
    from scipy.stats import qmc

    if d > qmc.Sobol.MAXDIM:
        return np.random.default_rng(0).random((n, d))
    return qmc.Sobol(d, seed=0).random_base2(int(np.ceil(np.log2(n))))[:n]


def _normal(uniform: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri as numpy_ndtri

    return numpy_ndtri(np.clip(uniform, 1e-12, 1 - 1e-12))


def to_normal(uniform: Array) -> Array:
    """Standard normals from uniforms on [0, 1), finite at 0."""
    tiny = jnp.finfo(uniform.dtype).eps
    return ndtri(uniform * (1 - 2 * tiny) + tiny)


def shifted_normal(shift: Float[Array, "d"], lattice: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Randomised quasi-Monte Carlo: the lattice shifted by one uniform vector (Cranley and Patterson 1976).

    Each point is exactly N(0, I), so averages over the points are unbiased, and independent shifts
    give their standard error.
    """
    return to_normal(jnp.mod(lattice + shift, 1.0))
