"""Points that stand for N(0, I): moment-matched for optimisation, randomised for unbiased estimates."""

from functools import cache
from itertools import combinations_with_replacement
from math import comb, factorial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial.hermite_e import hermeval

from pushforward._types import Array, Float, Key


@cache
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


_FRESH_NUMBERS = 4_000_000


@cache
def sobol(n: int, d: int) -> np.ndarray:
    """n points of a scrambled Sobol sequence with a fixed seed (Owen 1998), plain uniforms in too many dimensions."""
    from scipy.stats import qmc

    if d > qmc.Sobol.MAXDIM:
        return np.random.default_rng(0).random((n, d))
    return qmc.Sobol(d, rng=0).random_base2(int(np.ceil(np.log2(n))))[:n]


def prior_points(n: int, d: int) -> Float[np.ndarray, "n d"]:
    """The origin and n - 1 quasi-random draws of N(0, I), always the same, to look for a start among."""
    return np.concatenate([np.zeros((1, d)), _normal(sobol(n, d)[1:])])


def _normal(uniform: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri as numpy_ndtri

    return numpy_ndtri(np.clip(uniform, 1e-12, 1 - 1e-12))


@cache
def matched_weights(n: int, d: int) -> Float[np.ndarray, "n"]:
    """Weights with which `matched_normal(n, d)` has every moment up to degree 5 of N(0, I).

    The least change of equal weights that sets the means of all even Hermite polynomials of degree 2 and
    4 to zero (odd ones vanish by symmetry). Equal weights where there are more than n / 8 of these
    polynomials or a weight would be negative, that is in more than a few dimensions.

    Returns:
        Positive weights of sum 1.
    """
    equal = np.full(n, 1.0 / n)
    degrees = _even_degrees(d) if comb(d + 1, 2) + comb(d + 3, 4) <= n // 8 else []
    if not degrees:
        return equal
    e = matched_normal(n, d)
    hermite = np.stack([hermeval(e, np.eye(5)[k]) / np.sqrt(factorial(k)) for k in range(5)])
    columns = [np.ones(n)] + [np.prod([hermite[k, :, j] for j, k in enumerate(ks)], axis=0) for ks in degrees]
    basis = np.stack(columns, 1)
    target = np.eye(len(columns))[0]
    weights = equal + basis @ np.linalg.solve(basis.T @ basis, target - basis.T @ equal)
    return weights if weights.min() > 0 else equal


def _even_degrees(d: int) -> list[tuple[int, ...]]:
    """Exponents of all monomials in d variables of total degree 2 and 4."""
    found = []
    for total in (2, 4):
        for chosen in combinations_with_replacement(range(d), total):
            found.append(tuple(chosen.count(j) for j in range(d)))
    return found


class FitNoise(NamedTuple):
    """Noise of one fit: fixed points with weights, replicates of fresh points, and the noise of the draws."""

    matched: Float[Array, "n d"]
    weights: Float[Array, "n"]
    fresh: Float[Array, "replicate n d"]
    drawn: Float[Array, "draw d"]


def fit_noise(key: Key, n: int, d: int, draws: int) -> FitNoise:
    """Noise of a fit, made on the host so that nothing of it is compiled.

    Fresh points are randomised quasi-Monte Carlo: a Sobol lattice shifted by one uniform vector per
    replicate (Cranley and Patterson 1976). Each point is exactly N(0, I), so averages over the points
    are unbiased, and independent shifts give their standard error.

    Args:
        key: typed JAX key.
        n: points, even and at least 2 d.
        d: dimension.
        draws: rows of `drawn`.
    """
    dtype = jnp.result_type(float)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    replicates = int(np.clip(_FRESH_NUMBERS // (n * d), 4, 16))
    shifts = generator.random((replicates, 1, d))
    fresh = _normal(np.mod(sobol(n, d) + shifts, 1.0))
    drawn = generator.standard_normal((draws, d))
    return FitNoise(*(jnp.asarray(x, dtype) for x in (matched_normal(n, d), matched_weights(n, d), fresh, drawn)))
