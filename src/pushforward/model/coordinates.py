"""The prior map: each latent site's distribution as the pushforward of independent N(0, 1) noise z.

For most families T is exact, so that log p(T(z)) + log|det T'(z)| = log N(z; 0, I) and the density of z is the
standard normal one. For the rest T is NumPyro's bijection to the support and `correction` holds the difference.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from numpyro.distributions import Distribution

from pushforward.model import (
    _maps_discrete,
    _maps_matrix,
    _maps_multivariate,
    _maps_truncated,
    _maps_univariate,
    _maps_wrapped,
)
from pushforward.model._maps import PriorMap, prior_map, register

__all__ = ["PriorMap", "correction", "describe_map", "is_exact", "noise_shape", "prior_map", "pull", "push", "register"]

REGISTERED = (_maps_univariate, _maps_truncated, _maps_multivariate, _maps_matrix, _maps_wrapped, _maps_discrete)


def noise_shape(distribution: Distribution) -> tuple[int, ...]:
    """Returns the shape of the noise behind one draw: batch shape and degrees of freedom of an event."""
    return tuple(distribution.batch_shape) + prior_map(distribution).noise_event


def push(distribution: Distribution, z: Array) -> Array:
    """Computes T(z), distributed as `distribution` when z is standard normal (exactly, if `is_exact`).

    Args:
        distribution: any continuous NumPyro distribution, or a discrete one of scalar events; its parameters may be
            tracers.
        z: noise of shape `noise_shape(distribution)`.

    Returns:
        A value of shape `distribution.shape()`.
    """
    return prior_map(distribution).push(z)


def pull(distribution: Distribution, value: Array) -> Array:
    """Computes the noise z with T(z) = value."""
    return prior_map(distribution).pull(jnp.asarray(value))


def correction(distribution: Distribution, z: Array, value: Array) -> Array | float:
    """Computes log p(T(z)) + log|det T'(z)| - log N(z; 0, I), summed over all elements.

    Args:
        distribution: the distribution.
        z: noise.
        value: `push(distribution, z)`.

    Returns:
        The Python float 0.0 where the map is exact, a scalar array elsewhere.
    """
    weight = prior_map(distribution).weight
    return 0.0 if weight is None else jnp.sum(weight(z, value))


def describe_map(distribution: Distribution) -> str:
    """Names the kind of map in a few words."""
    return prior_map(distribution).words


def is_exact(distribution: Distribution) -> bool:
    """Tells whether the pushforward of N(0, I) is exactly `distribution`."""
    return prior_map(distribution).weight is None
