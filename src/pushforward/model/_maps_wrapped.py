"""Prior maps of NumPyro's wrappers, built from the map of what they wrap."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.core import Tracer
from jax.nn import sigmoid
from jax.scipy.special import logit
from numpyro.distributions.transforms import SigmoidTransform, Transform

from pushforward.model._maps import PriorMap, inside_support, prior_map, register


@register(dist.ExpandedDistribution)
def _expanded(d: dist.ExpandedDistribution) -> PriorMap:
    return prior_map(d.base_dist)


@register(dist.Independent)
def _independent(d: dist.Independent) -> PriorMap:
    base = prior_map(d.base_dist)
    moved = d.reinterpreted_batch_ndims
    event = tuple(d.event_shape[:moved]) + base.noise_event
    inner = base.weight
    if inner is None:
        return PriorMap(base.words, event, base.push, base.pull)

    def weight(z: Array, value: Array) -> Array:
        return jnp.sum(inner(z, value), axis=tuple(range(-moved, 0)))

    return PriorMap(base.words, event, base.push, base.pull, weight)


@register(dist.MaskedDistribution)
def _masked(d: dist.MaskedDistribution) -> PriorMap:
    base = prior_map(d.base_dist)
    mask = d._mask
    if not isinstance(mask, Tracer) and np.asarray(mask).all():
        return base

    def weight(z: Array, value: Array) -> Array:
        exact = 0.0 if base.weight is None else base.weight(z, value)
        return jnp.where(mask, exact, exact - d.base_dist.log_prob(value))

    return PriorMap(f"{base.words}, corrected where masked", base.noise_event, base.push, base.pull, weight)


@register(dist.TransformedDistribution)
def _transformed(d: dist.TransformedDistribution) -> PriorMap:
    base = prior_map(d.base_dist)
    event = (tuple(d.base_dist.batch_shape) + base.noise_event)[len(d.batch_shape) :]
    sign = _direction(d, base)

    def push(z: Array) -> Array:
        value = base.push(z * sign)
        for transform in d.transforms:
            value = _apply(transform, value)
        return inside_support(d.support, value)

    def undo(value: Array) -> Array:
        for transform in reversed(d.transforms):
            value = _invert(transform, value)
        return value

    weight, prior = None, base.weight
    if prior is not None:

        def corrected(z: Array, value: Array) -> Array:
            del value
            inner = prior(z * sign, base.push(z * sign))
            return jnp.sum(inner, axis=tuple(range(len(d.batch_shape), jnp.ndim(inner))))

        weight = corrected

    return PriorMap(f"{base.words}, transformed", event, push, lambda value: base.pull(undo(value)) * sign, weight)


def _direction(d: dist.TransformedDistribution, base: PriorMap) -> Array | int:
    """Finds the sign that makes a map of scalars increase when a transform of it decreases."""
    if base.noise_event != tuple(d.base_dist.event_shape) or any(t.domain.event_dim for t in d.transforms):
        return 1
    sign = 1
    for transform in d.transforms:
        try:
            sign = sign * transform.sign
        except (NotImplementedError, AttributeError):
            return 1
    return sign


def _apply(transform: Transform, value: Array) -> Array:
    """Applies a transform; NumPyro's sigmoid clips, which would stop the derivative."""
    return sigmoid(value) if isinstance(transform, SigmoidTransform) else transform(value)


def _invert(transform: Transform, value: Array) -> Array:
    return logit(value) if isinstance(transform, SigmoidTransform) else transform.inv(value)


@register(dist.Delta)
def _delta(d: dist.Delta) -> PriorMap:
    shape = tuple(d.batch_shape)
    known = not isinstance(d.log_density, Tracer)
    flat = known and not np.asarray(d.log_density).any()

    def push(z: Array) -> Array:
        return jnp.broadcast_to(d.v, z.shape[:-1] + tuple(d.event_shape))

    def pull(value: Array) -> Array:
        return jnp.zeros((*value.shape[: value.ndim - d.event_dim], 0), jnp.result_type(float))

    def weight(z: Array, value: Array) -> Array:
        return jnp.broadcast_to(d.log_density, shape)

    return PriorMap("degenerate", (0,), push, pull, None if flat else weight)
