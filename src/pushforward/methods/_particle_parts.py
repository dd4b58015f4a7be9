"""The interchangeable parts of a particle filter: resampling, regularization and smoother."""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.math import particles, resampling
from pushforward.methods._base import check_integer, check_positive


class Resampling(eqx.Module):
    """Base of resampling schemes; subclasses are final.

    Attributes:
        averages: whether particles that go on are averages of others, not copies.
        threshold: resampling happens where the effective sample size is below this fraction of the particles; 1: at
            every step, 0: never.
    """

    differentiable: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    threshold: eqx.AbstractVar[float]

    def __check_init__(self):
        name, value = type(self).__name__, self.threshold
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise MethodError(f"{name}(threshold=...) takes a fraction between 0 and 1; got {value!r}.")

    @abstractmethod
    def uniforms(self, count: int) -> tuple[int, ...]:
        """Shape of the uniforms that `ancestors` needs."""

    @abstractmethod
    def ancestors(self, uniforms: Array, weights: Array, count: int) -> Array:
        """Indices of the particles that go on, (count,), from weights >= 0 of any positive sum."""

    def moved(self, state: Array, log_weights: Array, ancestors: Array) -> tuple[Array, Array]:
        """States (N, n) and log weights, up to a constant, of the particles that go on."""
        return state[ancestors], jnp.zeros_like(log_weights)


class Systematic(Resampling):
    """One uniform for all strata (Kitagawa 1996): least variance for its price, the default."""

    threshold: float = 0.5

    def uniforms(self, count: int) -> tuple[int, ...]:
        """See `Resampling.uniforms`."""
        return ()

    def ancestors(self, uniforms: Array, weights: Array, count: int) -> Array:
        """See `Resampling.ancestors`."""
        return resampling.systematic_from(uniforms, weights, count)


class Stratified(Resampling):
    """One uniform for each stratum (Kitagawa 1996)."""

    threshold: float = 0.5

    def uniforms(self, count: int) -> tuple[int, ...]:
        """See `Resampling.uniforms`."""
        return (count,)

    def ancestors(self, uniforms: Array, weights: Array, count: int) -> Array:
        """See `Resampling.ancestors`."""
        return resampling.stratified_from(uniforms, weights, count)


class Residual(Resampling):
    """Whole copies first, then the remainders in strata (after Liu and Chen 1998)."""

    threshold: float = 0.5

    def uniforms(self, count: int) -> tuple[int, ...]:
        """See `Resampling.uniforms`."""
        return (count,)

    def ancestors(self, uniforms: Array, weights: Array, count: int) -> Array:
        """See `Resampling.ancestors`."""
        return resampling.residual_from(uniforms, weights, count)


class Multinomial(Resampling):
    """Independent draws (Gordon, Salmond and Smith 1993): the largest variance; for comparison with theory."""

    threshold: float = 0.5

    def uniforms(self, count: int) -> tuple[int, ...]:
        """See `Resampling.uniforms`."""
        return (count + 1,)

    def ancestors(self, uniforms: Array, weights: Array, count: int) -> Array:
        """See `Resampling.ancestors`."""
        return resampling.multinomial_from(uniforms, weights, count)


class StopGradient(Resampling):
    """Systematic resampling whose weights carry the gradient of the choice (Scibior and Wood 2021).

    The gradient of the likelihood estimate is unbiased and noisy; its variance grows with the number of steps.
    """

    differentiable: ClassVar[bool] = True
    threshold: float = 0.5

    def uniforms(self, count: int) -> tuple[int, ...]:
        """See `Resampling.uniforms`."""
        return ()

    def ancestors(self, uniforms: Array, weights: Array, count: int) -> Array:
        """See `Resampling.ancestors`."""
        return resampling.systematic_from(uniforms, weights, count)

    def moved(self, state: Array, log_weights: Array, ancestors: Array) -> tuple[Array, Array]:
        """See `Resampling.moved`."""
        return state[ancestors], resampling.stop_gradient_weights(log_weights, ancestors)


class Transport(Resampling):
    """Entropic optimal transport to equal weights (Corenflos et al. 2021): smooth in the parameters, biased.

    Particles are averages of others, so the state must be real; costs O(iterations N^2).

    Args:
        epsilon: strength of the entropy; smaller is less biased and needs more iterations.
        iterations: Sinkhorn iterations, about 10 / epsilon.
        threshold: see `Resampling`.
    """

    differentiable: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    epsilon: float = 0.3
    iterations: int = 30
    threshold: float = 0.5

    def __check_init__(self):
        check_positive("Transport", epsilon=self.epsilon)
        check_integer("Transport", iterations=self.iterations)

    def uniforms(self, count: int) -> tuple[int, ...]:
        """See `Resampling.uniforms`."""
        return ()

    def ancestors(self, uniforms: Array, weights: Array, count: int) -> Array:
        """See `Resampling.ancestors`; what is not real goes on by these."""
        return resampling.systematic_from(uniforms, weights, count)

    def moved(self, state: Array, log_weights: Array, ancestors: Array) -> tuple[Array, Array]:
        """See `Resampling.moved`."""
        return resampling.transport(state, log_weights, self.epsilon, self.iterations), jnp.zeros_like(log_weights)


class Regularization(eqx.Module):
    """Base of what moves copies of a particle apart after resampling."""

    @abstractmethod
    def spread(self, key: Key, before: Array, log_weights: Array, after: Array, ancestors: Array, joined: int) -> Array:
        """Resampled states `after` (N, n), moved.

        Args:
            key: typed JAX key.
            before: states before resampling (N, n).
            log_weights: their log weights.
            after: resampled states.
            ancestors: their indices among `before`, ascending.
            joined: number of leading entries that are parameters in the state.
        """


class NoJitter(Regularization):
    """Copies stay where they are: the evidence is unbiased."""

    def spread(self, key: Key, before: Array, log_weights: Array, after: Array, ancestors: Array, joined: int) -> Array:
        """See `Regularization.spread`."""
        return after


class Jitter(Regularization):
    """Regularized particle filter (Musso, Oudjane and Le Gland 2001): copies move by a kernel of the cloud's shape.

    For models whose own noise is too small to keep copies apart. Biased, less so with more particles. Particles that
    were resampled once stay where they are.

    Args:
        scale: of the kernel, times the bandwidth N^(-1 / (n + 4)) and a root of the cloud's covariance.
    """

    scale: float = 1.0

    def __check_init__(self):
        check_positive("Jitter", scale=self.scale)

    def spread(self, key: Key, before: Array, log_weights: Array, after: Array, ancestors: Array, joined: int) -> Array:
        """See `Regularization.spread`."""
        copied = particles.copied(ancestors)
        return particles.jitter(key, before, log_weights, ancestors, self.scale, copied)


class LiuWest(Regularization):
    """Kernel of Liu and West (2001) for parameters in the state: shrunk towards the mean, so that moments stay.

    Args:
        discount: between 0 and 1; 0.95 to 0.99 in the paper. Nearer to 1 the parameters move less.
    """

    discount: float = 0.98

    def __check_init__(self):
        value = self.discount
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 / 3 < value < 1:
            raise MethodError(f"LiuWest(discount=...) takes a number between 1/3 and 1; got {value!r}.")

    def spread(self, key: Key, before: Array, log_weights: Array, after: Array, ancestors: Array, joined: int) -> Array:
        """See `Regularization.spread`."""
        moved = particles.liu_west(key, after[:, :joined], jnp.zeros_like(log_weights), self.discount)
        return jnp.concatenate([moved, after[:, joined:]], 1)


class ParticleSmoother(eqx.Module):
    """Base of what draws trajectories from a particle filter's history."""

    needs_density: ClassVar[bool] = True


class BackwardMoves(ParticleSmoother):
    """Backward sampling by Metropolis moves from each particle's ancestor (Dau and Chopin 2023): O(moves) per draw.

    Consistent for any number of moves; more of them make the trajectories more diverse.

    Args:
        moves: number of proposals per step, drawn from the filter's weights.
    """

    moves: int = 5

    def __check_init__(self):
        check_integer("BackwardMoves", moves=self.moves)


class BackwardSimulation(ParticleSmoother):
    """Backward simulation (Godsill, Doucet and West 2004): each draw weighs all particles, O(N) per draw and step."""


class AncestorTracing(ParticleSmoother):
    """The particles' own histories: no density needed; few distinct ancestors remain early in a long series."""

    needs_density: ClassVar[bool] = False


RESAMPLINGS = {
    "systematic": Systematic,
    "stratified": Stratified,
    "residual": Residual,
    "multinomial": Multinomial,
    "stop_gradient": StopGradient,
    "transport": Transport,
}


def random_uniforms(scheme: Resampling, key: Key, count: int, dtype: jnp.dtype) -> Array:
    """The uniforms of one resampling."""
    return jax.random.uniform(key, scheme.uniforms(count), dtype)
