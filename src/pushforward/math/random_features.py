"""Regression on random Fourier features: a Gaussian process whose cost is linear in the number of data.

    phi(x) = (amplitude sqrt(2 / p) cos(w_j . x / lengths + b_j), j = 1 .. p;  slope;  slope x),
    y_i = phi(x_i) . v + e_i,    v ~ N(0, I),    e_i ~ N(0, noise^2).

Frequencies w_j are drawn from the spectral density of the correlation: N(0, I) for the squared exponential, a
multivariate t with 5 degrees of freedom for Matern 5/2; phases b_j are uniform. Then ``phi(x) . phi(x')`` tends to the
kernel of `gaussian_process` as p grows, with error p^-1/2. With A = Phi^T Phi + noise^2 I and v* = A^-1 Phi^T y,

    log p(y) = log N(y; 0, Phi Phi^T + noise^2 I),
    mean(x) = phi(x) . v*,    variance(x) = noise^2 (1 + phi(x)^T A^-1 phi(x)),

q = p + 1 + d the number of features. Costs are O(n q^2 + q^3) once and O(q^2) for each prediction.

Source: Rahimi and Recht (2007), Random features for large-scale kernel machines, NIPS 20; Bishop (2006), Pattern
Recognition and Machine Learning, equations 3.53, 3.58 and 3.59.
"""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

from pushforward._types import Array, Float, Key
from pushforward.math.gaussian_process import Hyperparameters, log_normal, noisy

_DEGREES = 5.0


def frequencies(kernel: str, key: Key, p: int, d: int) -> tuple[Float[Array, "p d"], Float[Array, "p"]]:
    """Frequencies for lengths of 1, and phases."""
    first, second, third = jax.random.split(key, 3)
    w = jax.random.normal(first, (p, d))
    if kernel == "matern52":
        chi_square = 2 * jax.random.gamma(second, _DEGREES / 2, (p, 1))
        w = w * jnp.sqrt(_DEGREES / chi_square)
    return w, jax.random.uniform(third, (p,), maxval=2 * jnp.pi)


def features(
    h: Hyperparameters, w: Float[Array, "p d"], b: Float[Array, "p"], x: Float[Array, "*n d"]
) -> Float[Array, "*n q"]:
    """phi at one point, or at the rows of an array."""
    waves = h.amplitude * jnp.sqrt(2 / b.size) * jnp.cos((x / h.lengths) @ w.T + b)
    constant = jnp.ones((*x.shape[:-1], 1), x.dtype)
    return jnp.concatenate([waves, h.slope * constant, h.slope * x], -1)


def solve(
    phi: Float[Array, "n q"], y: Float[Array, "n"], noise: Array
) -> tuple[Float[Array, "q q"], Float[Array, "q"], Array]:
    """Cholesky factor of A, v*, and noise^2 with the jitter that keeps the factor finite."""
    square = phi.T @ phi
    # As in `gaussian_process`: n times the rounding error, in units of the mean variance of an output.
    jitter = len(y) * jnp.finfo(phi.dtype).eps * jnp.trace(square) / len(y)
    variance = noise**2 + jitter
    lower = jnp.linalg.cholesky(square + variance * jnp.eye(phi.shape[1], dtype=phi.dtype))
    return lower, cho_solve((lower, True), phi.T @ y), variance


def log_evidence(phi: Float[Array, "n q"], y: Float[Array, "n"], noise: Array) -> Float[Array, ""]:
    """log p(y) given the features of the data, in O(n^2 q + n^3)."""
    return log_normal(noisy(phi @ phi.T, noise), y)


def predict(
    phi: Float[Array, "q"], lower: Float[Array, "q q"], v: Float[Array, "q"], variance: Array, noise: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean and variance of a new output, given its features and what `solve` returned."""
    return phi @ v, variance * jnp.sum(solve_triangular(lower, phi, lower=True) ** 2) + noise**2
