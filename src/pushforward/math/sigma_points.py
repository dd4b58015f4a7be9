r"""Statistical linear regression of a step on its carry and noise, by sigma points.

For out = f(c, e) with c ~ N(mean, U U') and e ~ N(0, I), sigma points x = (x_c, x_e) of the standard normal law give
the mean of `out`, the regression on (c, e) and the covariance of its residual (Arasaratnam and Haykin 2009,
"Cubature Kalman filters", IEEE TAC 54; Julier and Uhlmann 2004, "Unscented filtering and nonlinear estimation";
García-Fernández et al. 2015, "Posterior linearization filter"). The result is a `Step`, so that the Kalman filter
and smoother of `kalman.py` become the unscented or cubature ones.

The residual enters as extra noise. It has as many columns as the rule has degrees of freedom beyond the regression:
the residuals are orthogonal to fixed vectors, so a root of their covariance is a fixed combination of them, and
nothing is factored that depends on f.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pushforward.math.kalman import Step


class Points(NamedTuple):
    """A quadrature rule for N(0, I) that is exact to second degree, as constants.

    `residual_root` turns residuals of the regression at the nodes into a root of their covariance.
    """

    nodes: Float[np.ndarray, "nodes dim"]
    mean_weights: Float[np.ndarray, " nodes"]
    cov_weights: Float[np.ndarray, " nodes"]
    residual_root: Float[np.ndarray, "nodes columns"]


def rule(nodes: np.ndarray, mean_weights: np.ndarray, cov_weights: np.ndarray) -> Points:
    """Completes a rule by the root of the residual covariance.

    Residuals p of a regression satisfy w' p = 0 and X' W p = 0 (w, W the weights of mean and covariance, X the nodes),
    so their covariance p' W p = p' M p with M = Q W Q, Q the projector on that complement; M = root root'.

    Args:
        nodes: shape (nodes, dim), symmetric about 0.
        mean_weights: weights of the mean, shape (nodes,), sum 1.
        cov_weights: weights of the covariance, shape (nodes,), with X' W X = I.

    Raises:
        ValueError: if the rule gives some function a residual covariance that is not positive semi-definite.
    """
    constraints = np.column_stack([mean_weights, cov_weights[:, None] * nodes])
    left, values, _ = np.linalg.svd(constraints)
    complement = left[:, int(np.sum(values > 1e-12 * values[0])) :]
    values, vectors = np.linalg.eigh(complement.T @ (cov_weights[:, None] * complement))
    size = np.max(np.abs(cov_weights))
    if np.any(values < -1e-10 * size):
        raise ValueError(
            f"This sigma-point rule gives a negative variance to some functions (eigenvalue {values.min():.3g}). "
            "Take kappa >= 0 and beta >= 0, or the cubature rule."
        )
    kept = values > 1e-10 * size
    return Points(nodes, mean_weights, cov_weights, complement @ vectors[:, kept] * np.sqrt(values[kept]))


def unscented(dim: int, *, alpha: float = 1.0, beta: float = 2.0, kappa: float = 0.0) -> Points:
    """The scaled unscented rule: 0 and +-alpha sqrt(dim + kappa) along the axes.

    With s = alpha^2 (dim + kappa) the weights are 1 / (2 s) along the axes, 1 - dim / s at 0 for the mean and
    2 - dim / s - alpha^2 + beta for the covariance. The defaults have no negative weight. With beta = 2 and kappa = 0
    the variance of a quadratic is exact in one dimension; in more it is overstated (|x|^2: 2 dim^2, exact 2 dim).

    Args:
        dim: length of carry and noise together, >= 1.
        alpha: spread of the nodes, > 0.
        beta: extra weight of the node at 0 in the covariance, >= 0.
        kappa: >= 0; dim + kappa scales the squared distance of the nodes.
    """
    spread = alpha**2 * (dim + kappa)
    axes = np.sqrt(spread) * np.eye(dim)
    nodes = np.concatenate([np.zeros((1, dim)), axes, -axes])
    mean = np.full(2 * dim + 1, 0.5 / spread)
    mean[0] = 1.0 - dim / spread
    cov = mean.copy()
    cov[0] += 1.0 - alpha**2 + beta
    return rule(nodes, mean, cov)


def cubature(dim: int) -> Points:
    """The spherical-radial rule of third degree: +-sqrt(dim) along the axes, equal weights (Arasaratnam, Haykin 2009).

    Args:
        dim: length of carry and noise together; 0 gives the one node of a law without spread.
    """
    if dim == 0:
        return rule(np.zeros((1, 0)), np.ones(1), np.ones(1))
    axes = np.sqrt(dim) * np.eye(dim)
    weights = np.full(2 * dim, 0.5 / dim)
    return rule(np.concatenate([axes, -axes]), weights, weights)


def linearise(
    fn: Callable[[Array, Array], tuple[Array, Array]],
    mean: Float[Array, " n"],
    root: Float[Array, "n r"],
    points: Points,
) -> Step:
    """The step whose joint law of carry and data matches the sigma-point moments of a nonlinear one.

    With out = (c', y): slopes G = sum_i w_i (out_i - mean out) x_i', A and H from G_c U^+ (exact on the range of U),
    B and D from G_e followed by columns whose product is the covariance of the residual. The step's R is zero; add
    the covariance of independent data noise to it. Linear functions are reproduced, with residual zero.

    Args:
        fn: maps the carry (n,) and noise (q,) to the next carry and the predicted data.
        mean: mean of the carry, shape (n,).
        root: matrix U with U U' its covariance, shape (n, r), possibly singular.
        points: a rule of dimension r + q.

    Returns:
        A step with q + columns + r noises: those of `fn`, the residual, and slopes along directions in which U is
        singular (zero when U has full column rank).
    """
    nodes, weights, cov_weights, residual_root = (jnp.asarray(part, mean.dtype) for part in points)
    r = root.shape[1]
    carries, outputs = jax.vmap(lambda x: fn(mean + root @ x[:r], x[r:]))(nodes)
    size = carries.shape[1]
    out = jnp.concatenate([carries, outputs], axis=1)
    # Differences from one node first: the mean weights may be large and of both signs.
    centre = out[0] + weights @ (out - out[:1])
    residual = out - centre[None]
    slopes = residual.T @ (cov_weights[:, None] * nodes)
    residual = residual - nodes @ slopes.T
    maps = slopes[:, :r] @ jnp.linalg.pinv(root) if mean.shape[0] and r else jnp.zeros((out.shape[1], mean.shape[0]))
    unseen = slopes[:, :r] - maps @ root
    noises = jnp.concatenate([slopes[:, r:], residual.T @ residual_root, unseen], axis=1)
    offset = centre - maps @ mean
    return Step(
        maps[:size],
        noises[:size],
        offset[:size],
        maps[size:],
        noises[size:],
        offset[size:],
        jnp.zeros_like(offset[size:]),
    )
