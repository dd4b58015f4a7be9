"""The registry of prior maps and the corrected bijection that serves every other distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import Distribution, biject_to, constraints, discrete

from pushforward.math.special import inside

Weight = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class PriorMap:
    """One distribution's map T from standard normal noise to values.

    Attributes:
        words: what kind of map it is, for tables.
        noise_event: shape of the noise behind one event.
        push: z -> T(z); broadcasts over leading dimensions of z.
        pull: the inverse of `push`.
        weight: (z, T(z)) -> log p(T(z)) + log|det T'(z)| - log N(z), of batch shape; None where that is zero.
    """

    words: str
    noise_event: tuple[int, ...]
    push: Callable[[Array], Array]
    pull: Callable[[Array], Array]
    weight: Weight | None = None


Builder = Callable[[Distribution], PriorMap]
_BUILDERS: dict[type[Distribution], Builder] = {}
_REFUSED = {
    dist.ImproperUniform: "is not a probability distribution, so no noise can be pushed to it",
    dist.Unit: "is a factor of the density, not a random variable",
    discrete.HurdleProbs: "mixes a point mass with another law, so its values have no density",
    discrete.ZeroInflatedProbs: "mixes a point mass with another law, so its values have no density",
    dist.LeftCensoredDistribution: "describes censored data, not a latent variable",
    dist.RightCensoredDistribution: "describes censored data, not a latent variable",
    dist.IntervalCensoredDistribution: "describes censored data, not a latent variable",
}


def register(*classes: type[Distribution]) -> Callable[[Builder], Builder]:
    """Registers the map of some classes and of those subclasses that keep their density."""

    def decorate(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(classes, builder))
        return builder

    return decorate


def prior_map(distribution: Distribution) -> PriorMap:
    """Finds the map of a distribution by its class.

    A subclass inherits the map of a registered class only if it inherits `log_prob` as well, because a map is a
    statement about the density. Everything else gets the corrected bijection.

    Raises:
        TypeError: the distribution is discrete, improper or has atoms, or no bijection to its support is known.
    """
    cls = type(distribution)
    for base, reason in _REFUSED.items():
        if isinstance(distribution, base):
            raise TypeError(f"{cls.__name__} {reason}")
    for base in cls.__mro__:
        if base in _BUILDERS:
            if cls.log_prob is base.log_prob:
                return _BUILDERS[base](distribution)
            break
    return bijection(distribution)


def bijection(distribution: Distribution) -> PriorMap:
    """Builds T = biject_to(support), with the prior's log density moved into the weight."""
    name = type(distribution).__name__
    support = distribution.support
    if support is None or support.is_discrete:
        raise TypeError(f"{name} is discrete: there is no map from normal noise to its values")
    try:
        transform = biject_to(support)
        noise = transform.inverse_shape(distribution.shape())
    except NotImplementedError:
        raise TypeError(f"{name} has no known bijection from the real line to its support {support}") from None
    event = tuple(noise[len(distribution.batch_shape) :])
    batch = len(distribution.batch_shape)

    def weight(z: Array, value: Array) -> Array:
        jacobian = transform.log_abs_det_jacobian(z, value)
        jacobian = jnp.sum(jacobian, axis=tuple(range(batch, jnp.ndim(jacobian))))
        return distribution.log_prob(value) + jacobian - standard_normal(z, len(event))

    return PriorMap("bijection, corrected", event, transform, transform.inv, weight)


def standard_normal(z: Array, event_dim: int) -> Array:
    """Computes log N(z; 0, I) summed over the last `event_dim` axes."""
    size = math.prod(z.shape[z.ndim - event_dim :])
    return -0.5 * jnp.sum(z**2, axis=tuple(range(z.ndim - event_dim, z.ndim))) - 0.5 * size * math.log(2 * math.pi)


def inside_support(support: constraints.Constraint, value: Array) -> Array:
    """Rounds values inward to the nearest float strictly inside an interval-like support."""
    if hasattr(support, "base_constraint"):
        return inside_support(support.base_constraint, value)
    if support is constraints.unit_interval:
        low, high = 0.0, 1.0
    else:
        low = getattr(support, "lower_bound", -jnp.inf)
        high = getattr(support, "upper_bound", jnp.inf)
    low, high = (jnp.broadcast_to(jnp.asarray(x, value.dtype), value.shape) for x in (low, high))
    return inside(value, low, high)
