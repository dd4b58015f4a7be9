"""Regression by a Gaussian process: kernel, log marginal likelihood, predictive mean and variance.

    y_i = f(x_i) + e_i,    f ~ GP(0, k),    e_i ~ N(0, noise^2),
    k(x, x') = amplitude^2 g(r) + slope^2 (1 + x . x'),    r^2 = sum_i (x_i - x'_i)^2 / lengths_i^2,

with g(r) = exp(-r^2 / 2) or the Matern 5/2 correlation (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r). The second term is
an affine mean with weights ~ N(0, slope^2) integrated out. With K = k(X, X) + (noise^2 + jitter) I = L L^T,

    log p(y) = -|L^-1 y|^2 / 2 - sum_i log L_ii - n log(2 pi) / 2,
    mean(x) = k(x, X) K^-1 y,    variance(x) = k(x, x) - |L^-1 k(X, x)|^2 + noise^2.

The jitter keeps L finite: n times the rounding error of the floating type, in units of the mean of K's diagonal. It
regularises and is no part of the predictive variance. Costs are O(n^3) once and O(n^2) for each prediction.

Source: Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, algorithm 2.1, equations 2.25, 2.26,
2.30, 4.17 and 5.9.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

from pushforward._types import Array, Float

KERNELS = {
    "squared_exponential": "infinitely smooth functions",
    "matern52": "functions with two derivatives",
}


class Hyperparameters(eqx.Module):
    """What a kernel is made of; standard deviations and lengths, all positive.

    Attributes:
        amplitude: of the stationary part.
        lengths: of its correlation, one for each input (d,), or one for all ().
        slope: of the affine part.
        noise: of the outputs.
    """

    amplitude: Float[Array, ""]
    lengths: Float[Array, "*d"]
    slope: Float[Array, ""]
    noise: Float[Array, ""]


def correlation(kernel: str, square: Array) -> Array:
    """g at squared distances in units of the lengths."""
    if kernel == "squared_exponential":
        return jnp.exp(-0.5 * square)
    # The root has no derivative at 0, where that of g vanishes.
    positive = square > 0
    r = jnp.where(positive, jnp.sqrt(5 * jnp.where(positive, square, 1.0)), 0.0)
    return (1 + r + r**2 / 3) * jnp.exp(-r)


def covariance(
    kernel: str, h: Hyperparameters, x: Float[Array, "n d"], other: Float[Array, "n2 d"]
) -> Float[Array, "n n2"]:
    """k between the rows of two arrays."""
    a, b = x / h.lengths, other / h.lengths
    square = jnp.sum(a**2, -1)[:, None] + jnp.sum(b**2, -1) - 2 * a @ b.T
    return h.amplitude**2 * correlation(kernel, jnp.maximum(square, 0.0)) + h.slope**2 * (1 + x @ other.T)


def root(kernel: str, h: Hyperparameters, x: Float[Array, "n d"]) -> Float[Array, "n n"]:
    """L, the lower Cholesky factor of the covariance of the outputs."""
    return jnp.linalg.cholesky(noisy(covariance(kernel, h, x, x), h.noise))


def noisy(k: Float[Array, "n n"], noise: Array) -> Float[Array, "n n"]:
    """Covariance of the outputs from that of the function: noise and jitter added."""
    jitter = len(k) * jnp.finfo(k.dtype).eps * jnp.mean(jnp.diagonal(k))
    return k + (noise**2 + jitter) * jnp.eye(len(k), dtype=k.dtype)


@jax.custom_vjp
def log_normal(k: Float[Array, "n n"], y: Float[Array, "n"]) -> Float[Array, ""]:
    """log N(y; 0, K), with the derivative by K of equation 5.9, (a a^T - K^-1) / 2 with a = K^-1 y."""
    return _log_normal(k, y)[0]


def _log_normal(k: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    lower = jnp.linalg.cholesky(k)
    whitened = solve_triangular(lower, y, lower=True)
    log_det = jnp.sum(jnp.log(jnp.diagonal(lower)))
    value = -0.5 * jnp.sum(whitened**2) - log_det - 0.5 * y.size * jnp.log(2 * jnp.pi)
    return value, (lower, solve_triangular(lower, whitened, lower=True, trans=1))


def _log_normal_back(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    lower, alpha = kept
    inverse = cho_solve((lower, True), jnp.eye(len(alpha), dtype=alpha.dtype))
    return 0.5 * g * (jnp.outer(alpha, alpha) - inverse), -g * alpha


log_normal.defvjp(_log_normal, _log_normal_back)


def log_marginal_likelihood(
    kernel: str, h: Hyperparameters, x: Float[Array, "n d"], y: Float[Array, "n"]
) -> Float[Array, ""]:
    """log p(y) for outputs at the rows of x."""
    return log_normal(noisy(covariance(kernel, h, x, x), h.noise), y)


def weights(lower: Float[Array, "n n"], y: Float[Array, "n"]) -> Float[Array, "n"]:
    """K^-1 y from the Cholesky factor of K."""
    return cho_solve((lower, True), y)


def predict(
    kernel: str,
    h: Hyperparameters,
    x: Float[Array, "n d"],
    lower: Float[Array, "n n"],
    alpha: Float[Array, "n"],
    at: Float[Array, "d"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean and variance of a new output at a point.

    Args:
        kernel: name of the correlation.
        h: hyperparameters.
        x: inputs of the training.
        lower: `root` of them.
        alpha: `weights` of the outputs.
        at: the point.
    """
    # Differences here, not products: near a row of x they lose no digits.
    square = jnp.sum(((x - at) / h.lengths) ** 2, -1)
    cross = h.amplitude**2 * correlation(kernel, square) + h.slope**2 * (1 + x @ at)
    own = h.amplitude**2 + h.slope**2 * (1 + jnp.sum(at**2))
    explained = jnp.sum(solve_triangular(lower, cross, lower=True) ** 2)
    return cross @ alpha, jnp.maximum(own - explained, 0.0) + h.noise**2
