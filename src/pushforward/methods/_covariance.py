"""Families of Gaussians for `GaussianVI`: the options that users name, and what the fit moves.

A family member is the push of noise ``e`` by ``x = m + root e``; it also keeps the whitened gradient
``u`` and curvature ``M`` of the log density seen at its points (see `math.gaussian_approximation`).
"""

import abc
from typing import Any, Self

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from pushforward._errors import MethodError
from pushforward._types import Array
from pushforward.math import gaussian_approximation as equations

_LOG_2PI = 1.8378770664093453


class Covariance(eqx.Module):
    """Which covariances q may have."""

    @abc.abstractmethod
    def start(self, d: int, scale: float) -> "Family":
        """The member with mean 0 and standard deviations `scale` from which the fit starts."""

    def noise_size(self, d: int) -> int:
        """Dimension of the noise that one draw of q uses."""
        return d


class Full(Covariance):
    """Any covariance: d (d + 1) / 2 numbers, steps of cost O(d^3)."""

    def start(self, d: int, scale: float) -> "FullFamily":
        """See `Covariance.start`."""
        zero = jnp.zeros(d)
        return FullFamily(zero, scale * jnp.eye(d), zero, jnp.eye(d))


class Diagonal(Covariance):
    """Independent coordinates of ``z``: too narrow where the posterior correlates them."""

    def start(self, d: int, scale: float) -> "DiagonalFamily":
        """See `Covariance.start`."""
        zero = jnp.zeros(d)
        return DiagonalFamily(zero, scale * jnp.ones(d), zero, jnp.ones(d))


class LowRank(Covariance):
    """A diagonal plus a matrix of rank k: d (k + 1) numbers, for many dimensions.

    Args:
        rank: k, the number of directions beside the diagonal.
    """

    rank: int = 5

    def __check_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise MethodError(f"LowRank(rank) takes an integer of at least 1; got {self.rank!r}.")

    def start(self, d: int, scale: float) -> "LowRankFamily":
        """See `Covariance.start`."""
        return LowRankFamily(jnp.zeros(d), jnp.full(d, jnp.log(scale)), jnp.zeros((d, self.rank)))

    def noise_size(self, d: int) -> int:
        """See `Covariance.noise_size`."""
        return d + self.rank


_NAMES = {"full": Full, "diagonal": Diagonal, "low_rank": LowRank}


def covariance_option(value: Any) -> Covariance:
    """An instance, or the name of a class with its defaults."""
    if isinstance(value, Covariance):
        return value
    if isinstance(value, str) and value in _NAMES:
        return _NAMES[value]()
    raise MethodError(f"covariance= takes one of {list(_NAMES)} or an instance such as pf.LowRank(5); got {value!r}.")


class Family(eqx.Module):
    """A Gaussian q(m, root) with draws ``m + root e``."""

    mean: eqx.AbstractVar[Array]

    @abc.abstractmethod
    def sample(self, noise: Array) -> Array:
        """The draw that `noise` makes."""

    @abc.abstractmethod
    def log_root(self) -> Array:
        """log |det root|."""

    def entropy(self) -> Array:
        """Entropy of q in nats."""
        return self.log_root() + 0.5 * self.mean.size * (1 + _LOG_2PI)


class _Stepping(Family):
    """A family with a natural-gradient step."""

    u: eqx.AbstractVar[Array]
    curvature: eqx.AbstractVar[Array]

    def log_density(self, noise: Array) -> Array:
        """log q at the draw that `noise` makes."""
        return -0.5 * jnp.sum(noise**2) - 0.5 * noise.size * _LOG_2PI - self.log_root()

    @abc.abstractmethod
    def with_moments(self, gradients: Array, noise: Array) -> Self:
        """The same q with u and M from weighted gradients at its points."""

    @abc.abstractmethod
    def step(self, rho: Array) -> Self:
        """The q that a natural-gradient step of size rho leads to."""

    @abc.abstractmethod
    def shrunk(self) -> Self:
        """The same mean with half the standard deviations."""

    @abc.abstractmethod
    def gain(self) -> Array:
        """Predicted gain of the ELBO of a full step."""


class FullFamily(_Stepping):
    """Any covariance; `root` of shape (d, d)."""

    mean: Array
    root: Array
    u: Array
    curvature: Array

    def sample(self, noise: Array) -> Array:
        """See `Family.sample`."""
        return self.mean + self.root @ noise

    def log_root(self) -> Array:
        """See `Family.log_root`."""
        return jnp.linalg.slogdet(self.root)[1]

    def with_moments(self, gradients: Array, noise: Array) -> Self:
        """See `_Stepping.with_moments`."""
        u = self.root.T @ jnp.sum(gradients, 0)
        return type(self)(self.mean, self.root, u, equations.stein_curvature(self.root, gradients, noise))

    def step(self, rho: Array) -> Self:
        """See `_Stepping.step`."""
        return type(self)(
            *equations.full_step(self.mean, self.root, self.u, self.curvature, rho), self.u, self.curvature
        )

    def shrunk(self) -> Self:
        """See `_Stepping.shrunk`."""
        return type(self)(self.mean, 0.5 * self.root, self.u, self.curvature)

    def gain(self) -> Array:
        """See `_Stepping.gain`."""
        return equations.predicted_gain(self.u, self.curvature, jnp.eye(self.mean.size))


class DiagonalFamily(_Stepping):
    """Independent coordinates; `root` holds the d standard deviations."""

    mean: Array
    root: Array
    u: Array
    curvature: Array

    def sample(self, noise: Array) -> Array:
        """See `Family.sample`."""
        return self.mean + self.root * noise

    def log_root(self) -> Array:
        """See `Family.log_root`."""
        return jnp.sum(jnp.log(self.root))

    def with_moments(self, gradients: Array, noise: Array) -> Self:
        """See `_Stepping.with_moments`."""
        u = self.root * jnp.sum(gradients, 0)
        return type(self)(self.mean, self.root, u, -self.root * jnp.sum(gradients * noise, 0))

    def step(self, rho: Array) -> Self:
        """See `_Stepping.step`."""
        return type(self)(
            *equations.diagonal_step(self.mean, self.root, self.u, self.curvature, rho), self.u, self.curvature
        )

    def shrunk(self) -> Self:
        """See `_Stepping.shrunk`."""
        return type(self)(self.mean, 0.5 * self.root, self.u, self.curvature)

    def gain(self) -> Array:
        """See `_Stepping.gain`."""
        return equations.predicted_gain(self.u, self.curvature, jnp.ones(()))


class LowRankFamily(Family):
    """Covariance ``diag(exp(2 log_scale)) + factor factor^T``; noise has d + k entries."""

    mean: Array
    log_scale: Array
    factor: Array

    def sample(self, noise: Array) -> Array:
        """See `Family.sample`."""
        d = self.mean.size
        return self.mean + jnp.exp(self.log_scale) * noise[:d] + self.factor @ noise[d:]

    def _capacitance(self) -> Array:
        scaled = self.factor / jnp.exp(self.log_scale)[:, None]
        return jnp.linalg.cholesky(jnp.eye(self.factor.shape[1]) + scaled.T @ scaled)

    def log_root(self) -> Array:
        """See `Family.log_root`; by the matrix determinant lemma."""
        return jnp.sum(self.log_scale) + jnp.sum(jnp.log(jnp.diagonal(self._capacitance())))

    def log_density(self, noise: Array) -> Array:
        """log q at the draw that `noise` makes.

        With noise (e1, e2), U the scaled factor and v = (I + U^T U)^-1 (U^T e1 - e2), the quadratic form is
        ``|e1 - U v|^2 + |e2 + v|^2``: Woodbury's identity without its cancellation.
        """
        d = self.mean.size
        scaled = self.factor / jnp.exp(self.log_scale)[:, None]
        v = cho_solve((self._capacitance(), True), scaled.T @ noise[:d] - noise[d:])
        quadratic = jnp.sum((noise[:d] - scaled @ v) ** 2) + jnp.sum((noise[d:] + v) ** 2)
        return -0.5 * quadratic - 0.5 * d * _LOG_2PI - self.log_root()
