r"""Linear Gaussian inverse problems of any dimension, with the exact answer.

    theta ~ N(m0, C0),    y = A theta + noise,    noise ~ N(0, diag(sigma^2)).

The prior is a stationary chain, C0[i, j] = exp(-|i - j| / 3), with a mean that is not zero. The map is made so
that the data inform every direction, and each by a different amount. Write C0 = L0 L0^T; then

    diag(1 / sigma) A L0 = U diag(s) V^T,    s geometric from 10 down to 0.3,

with U and V random orthonormal columns, so that along column i of V the posterior variance is 1 / (1 + s_i^2)
of the prior variance: from 1 % to 92 %. There is one datum more than there are parameters, so A is not square
and a transposition cannot go unnoticed; the noise has another standard deviation for each datum.

Source: constructed here; data are simulated from `truth`. Formulas: Stuart (2010), Inverse problems: a
Bayesian perspective, Acta Numerica 19, doi:10.1017/S0962492910000061.
"""

import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike

from pushforward.problems._problem import Problem, constant

_CORRELATION_LENGTH = 3.0
_SINGULAR_VALUES = (10.0, 0.3)
_NOISE_RANGE = (0.05, 0.2)


def model(prior_mean: ArrayLike, prior_scale: ArrayLike, forward: ArrayLike, noise: ArrayLike, y=None):
    """theta ~ N(prior_mean, prior_scale prior_scale^T), y ~ N(forward theta, diag(noise^2)).

    Args:
        prior_mean: m0, shape (dimension,).
        prior_scale: lower Cholesky factor of C0, shape (dimension, dimension).
        forward: A, shape (data, dimension).
        noise: standard deviations, shape (data,).
        y: data, shape (data,), or None to simulate.
    """
    theta = numpyro.sample("theta", dist.MultivariateNormal(prior_mean, scale_tril=prior_scale))
    numpyro.sample("y", dist.Normal(forward @ theta, noise), obs=y)


def linear_gaussian(dimension: int, *, seed: int = 0) -> Problem:
    """A linear Gaussian problem; its `numbers` are exact.

    Args:
        dimension: number of parameters, at least 1.
        seed: of `numpy.random.default_rng`; another seed gives another map, truth and data.

    Returns:
        A problem whose `numbers` are `mean` and `sd` (of `theta`), `covariance`, shape (dimension, dimension),
        and `log_evidence`.

    Example:
        >>> p = linear_gaussian(2)
        >>> p.inputs["forward"].shape, round(p.numbers["log_evidence"], 6)
        ((3, 2), 2.107865)
    """
    if dimension < 1:
        raise ValueError(f"dimension is {dimension}; a problem has at least 1 parameter")
    rng = np.random.default_rng(seed)
    size = dimension + 1
    index = np.arange(dimension)
    prior_mean = rng.normal(size=dimension)
    prior_scale = np.linalg.cholesky(np.exp(-np.abs(index[:, None] - index) / _CORRELATION_LENGTH))
    noise = rng.uniform(*_NOISE_RANGE, size=size)
    left, right = _orthonormal(rng, size, dimension), _orthonormal(rng, dimension, dimension)
    whitened = left * np.geomspace(*_SINGULAR_VALUES, dimension) @ right.T
    forward = noise[:, None] * np.linalg.solve(prior_scale.T, whitened.T).T
    theta = prior_mean + prior_scale @ rng.normal(size=dimension)
    y = forward @ theta + noise * rng.normal(size=size)

    mean, covariance, log_evidence = exact_posterior(prior_mean, prior_scale, forward, noise, y)
    inputs = {"prior_mean": prior_mean, "prior_scale": prior_scale, "forward": forward, "noise": noise}
    return Problem(
        name=f"linear_gaussian_{dimension}",
        model=model,
        inputs={name: constant(value) for name, value in inputs.items()},
        data={"y": constant(y)},
        source="constructed; closed form (Stuart 2010)",
        numbers={
            "mean": {"theta": constant(mean)},
            "sd": {"theta": constant(np.sqrt(np.diag(covariance)))},
            "covariance": constant(covariance),
            "log_evidence": log_evidence,
        },
        truth={"theta": constant(theta)},
    )


def exact_posterior(prior_mean, prior_scale, forward, noise, y) -> tuple[np.ndarray, np.ndarray, float]:
    r"""Posterior mean, covariance and log evidence of a linear Gaussian problem, for any data.

    With diag(1/sigma) A L0 = U S V^T and r = (y - A m0) / sigma,

        mean = m0 + L0 V S (1 + S^2)^-1 U^T r,    covariance = L0 (I - V S^2 (1 + S^2)^-1 V^T) L0^T,
        -2 log Z = k log(2 pi) + 2 sum log sigma + sum log(1 + S^2) + |r|^2 - |S (1 + S^2)^-1/2 U^T r|^2.

    Args:
        prior_mean, prior_scale, forward, noise, y: as for `model`; here y must not hold NaN.

    Returns:
        Shapes (dimension,), (dimension, dimension) and a float.
    """
    left, s, right = np.linalg.svd(forward @ prior_scale / noise[:, None], full_matrices=False)
    residual = (y - forward @ prior_mean) / noise
    projected = left.T @ residual
    shrink = s**2 / (1 + s**2)
    mean = prior_mean + prior_scale @ right.T @ (s / (1 + s**2) * projected)
    root = prior_scale @ right.T
    covariance = prior_scale @ prior_scale.T - root * shrink @ root.T
    log_evidence = -0.5 * (
        len(y) * np.log(2 * np.pi)
        + 2 * np.sum(np.log(noise))
        + np.sum(np.log1p(s**2))
        + residual @ residual
        - shrink @ projected**2
    )
    return mean, covariance, float(log_evidence)


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random orthonormal columns; R's diagonal is made positive because LAPACK versions choose its sign."""
    q, r = np.linalg.qr(rng.normal(size=(rows, columns)))
    return q * np.sign(np.diag(r))
