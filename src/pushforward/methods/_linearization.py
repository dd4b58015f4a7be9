"""How a Kalman filter sees one step of a chain: as it is, by its tangent, or through sigma points."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array
from pushforward.math import kalman, sigma_points
from pushforward.math.kalman import Step
from pushforward.methods._base import check_integer, check_positive
from pushforward.model.linear import facts, step_at, why_no_gaussian_noise
from pushforward.model.state_space import Chain, StateSpace

_JITTER = {8: 1e-12, 4: 1e-5}


class Linearization(eqx.Module):
    """Base of the five ways; subclasses are final."""

    @abstractmethod
    def step(self, chain: Chain, mean: Array, cov: Array, riders: list[Array], step: Array, data: Array) -> Step:
        """The linear-Gaussian step that stands for the chain's at a carry N(mean, cov).

        Args:
            chain: the model at its parameters.
            mean: mean of the state, shape (n,).
            cov: its covariance, shape (n, n).
            riders: what rides along.
            step: number of the step.
            data: data of the step, shape (m,).
        """

    def why_not(self, space: StateSpace) -> str | None:
        """Why the model has no such form, or None where it has."""
        return why_no_gaussian_noise(space, matching=True)


class Exact(Linearization):
    """The step as it is: for models that are linear with Gaussian noise, which is verified by data flow.

    The posterior is then exact.
    """

    def step(self, chain: Chain, mean: Array, cov: Array, riders: list[Array], step: Array, data: Array) -> Step:
        """See `Linearization.step`."""
        return step_at(chain, mean, riders, step, jnp.zeros(chain.noise_dimension))

    def why_not(self, space: StateSpace) -> str | None:
        """Refuses what is not linear or not Gaussian."""
        noise = why_no_gaussian_noise(space, matching=False)
        if noise:
            return noise
        reason = facts(space).nonlinear
        return reason and f"{reason}; use Kalman(linearization=pf.Extended()), pf.Unscented(), pf.EnKF() or pf.NUTS()"


class Extended(Linearization):
    """The tangent at the mean (extended Kalman filter; Jazwinski 1970, section 8.3).

    Good where the step is nearly linear over the spread of the state. It gives no sign where it is not.
    """

    def step(self, chain: Chain, mean: Array, cov: Array, riders: list[Array], step: Array, data: Array) -> Step:
        """See `Linearization.step`."""
        return step_at(chain, mean, riders, step, jnp.zeros(chain.noise_dimension))


class Iterated(Linearization):
    """The tangent at the mean given the step's own data, by Gauss-Newton (Bell and Cathey 1993).

    Args:
        iterations: tangents per step; 1 is the extended filter.
    """

    iterations: int = 3

    def __check_init__(self):
        check_integer("Iterated", 1, iterations=self.iterations)

    def step(self, chain: Chain, mean: Array, cov: Array, riders: list[Array], step: Array, data: Array) -> Step:
        """See `Linearization.step`."""

        def improve(_: int, point: tuple[Array, Array]) -> tuple[Array, Array]:
            record = kalman.update(mean, cov, step_at(chain, point[0], riders, step, point[1]), data).record
            return mean + cov @ (record.H.T @ record.score), record.D.T @ record.score

        start = (mean, jnp.zeros(chain.noise_dimension, mean.dtype))
        point = jax.lax.fori_loop(0, self.iterations - 1, improve, start)
        return step_at(chain, point[0], riders, step, point[1])


class Unscented(Linearization):
    """Moments through 2 (n + q) + 1 sigma points (Julier and Uhlmann 1997; Wan and van der Merwe 2000).

    Args:
        alpha: spread of the points.
        beta: extra weight of the central point in the covariance; 2 suits a Gaussian state.
        kappa: n + q + kappa scales their squared distance.
    """

    alpha: float = 1.0
    beta: float = 2.0
    kappa: float = 0.0

    def __check_init__(self):
        check_positive("Unscented", alpha=self.alpha)
        for name in ("beta", "kappa"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise MethodError(f"Unscented({name}=...) takes a number of at least 0; got {value!r}.")

    def step(self, chain: Chain, mean: Array, cov: Array, riders: list[Array], step: Array, data: Array) -> Step:
        """See `Linearization.step`."""
        size = mean.shape[0] + chain.noise_dimension
        points = sigma_points.unscented(size, alpha=self.alpha, beta=self.beta, kappa=self.kappa)
        return _regressed(chain, mean, cov, riders, step, points)


class Cubature(Linearization):
    """Moments through 2 (n + q) points of equal weight (Arasaratnam and Haykin 2009)."""

    def step(self, chain: Chain, mean: Array, cov: Array, riders: list[Array], step: Array, data: Array) -> Step:
        """See `Linearization.step`."""
        points = sigma_points.cubature(mean.shape[0] + chain.noise_dimension)
        return _regressed(chain, mean, cov, riders, step, points)


NAMES: dict[str, type[Linearization]] = {
    "exact": Exact,
    "extended": Extended,
    "iterated": Iterated,
    "unscented": Unscented,
    "cubature": Cubature,
}


def _regressed(
    chain: Chain, mean: Array, cov: Array, riders: list[Array], step: Array, points: sigma_points.Points
) -> Step:
    """Statistical linear regression of the step on sigma points, with the data's own noise."""

    def run(state: Array, noise: Array) -> tuple[Array, Array]:
        moved = chain.step(state, riders, step, noise)
        return moved.state, moved.observed.mean

    noise = chain.step(mean, riders, step, jnp.zeros(chain.noise_dimension, mean.dtype)).observed.noise
    return sigma_points.linearise(run, mean, root(cov), points)._replace(R=noise)


def root(cov: Array) -> Array:
    """A lower triangular root of a covariance that may be singular: directions of no variance get 1e-6 of the largest
    standard deviation (1e-5 of the variance in float32), so that derivatives exist."""
    size = _JITTER[cov.dtype.itemsize] * jnp.max(jnp.diagonal(cov), initial=0.0)
    # A known state has no variance at all; any root that is far below it but not zero will do.
    size = jnp.maximum(size, jnp.finfo(cov.dtype).tiny ** 0.5)
    return jnp.linalg.cholesky(cov + size * jnp.eye(cov.shape[0], dtype=cov.dtype))
