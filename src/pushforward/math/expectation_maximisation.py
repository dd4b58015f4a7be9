r"""Expectation-maximisation: points that carry the smoother's moments.

The E step of EM (Dempster, Laird and Rubin 1977; Shumway and Stoffer 1982 for state-space models) needs the expected
log density of states and data under the smoothing law. For linear-Gaussian models that density is quadratic in the pair
(state before a step, noise of the step), whose law is Gaussian. Equally weighted points at m +- sqrt(d) times the
columns of a root of the covariance integrate every polynomial of degree 3 exactly (Arasaratnam and Haykin 2009), so
that the mean of the log density over them *is* the E step, whatever parameters the density has.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pushforward.math.kalman import Smoothed
from pushforward.math.small_matrices import symmetric


def pair_law(smoothed: Smoothed, q: int) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Mean and covariance of (carry before a step, its first q entries of noise), given all data; d = n + q."""
    cross, noise = smoothed.cross[:, :q], smoothed.noise_cov[:q, :q]
    mean = jnp.concatenate([smoothed.carry_mean, smoothed.noise_mean[:q]])
    return mean, symmetric(jnp.block([[smoothed.carry_cov, cross], [cross.T, noise]]))


def quadratic_points(mean: Float[Array, " d"], cov: Float[Array, "d d"]) -> Float[Array, "points d"]:
    """Points (2d, d) of equal weight whose mean and covariance are the given ones; `cov` may be singular.

    Args:
        mean: shape (d,).
        cov: shape (d, d), positive semi-definite up to rounding.
    """
    d = mean.shape[0]
    values, vectors = jnp.linalg.eigh(cov)
    columns = vectors * jnp.sqrt(d * jnp.maximum(values, 0.0))
    return mean + jnp.concatenate([columns.T, -columns.T])
