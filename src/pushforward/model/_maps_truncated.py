"""Prior maps of truncated and folded laws, through the map of the law they come from."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.core import Tracer

from pushforward.math.special import broadcast_float, half_normal, half_normal_score
from pushforward.math.truncation import above, above_score, within, within_score
from pushforward.model._maps import PriorMap, bijection, inside_support, prior_map, register

FAR = 40.0


def _bounds(d: dist.Distribution) -> tuple[PriorMap, Any, Any]:
    """Finds the base map and the normal scores of the bounds; no mass lies beyond a score of 40."""
    base = prior_map(d.base_dist)
    scores = []
    for name in ("low", "high"):
        bound = getattr(d, name, None)
        if bound is not None and d.base_dist.support is dist.constraints.positive:
            bound = jnp.asarray(bound, jnp.result_type(float, bound))
            positive = bound > 0
            scores.append(jnp.where(positive, base.pull(jnp.where(positive, bound, 1.0)), -FAR))
        else:
            scores.append(None if bound is None else base.pull(jnp.asarray(bound, jnp.result_type(float, bound))))
    return base, *scores


@register(dist.LeftTruncatedDistribution, dist.LeftTruncatedGamma)
def _left(d: dist.LeftTruncatedDistribution | dist.LeftTruncatedGamma) -> PriorMap:
    base, low, _ = _bounds(d)
    normal = isinstance(d.base_dist, dist.Normal)

    def push(z: Array) -> Array:
        score, distance = above(*broadcast_float(z, low))
        value = d.low + d.base_dist.scale * distance if normal else base.push(score)
        return inside_support(d.support, value)

    def pull(x: Array) -> Array:
        return above_score((x - d.low) / d.base_dist.scale if normal else base.pull(x) - low, low)

    return PriorMap("truncated quantile", (), push, pull)


@register(dist.RightTruncatedDistribution, dist.RightTruncatedGamma)
def _right(d: dist.RightTruncatedDistribution | dist.RightTruncatedGamma) -> PriorMap:
    base, _, high = _bounds(d)
    normal = isinstance(d.base_dist, dist.Normal)

    def push(z: Array) -> Array:
        score, distance = above(*broadcast_float(-z, -high))
        value = d.high - d.base_dist.scale * distance if normal else base.push(-score)
        return inside_support(d.support, value)

    def pull(x: Array) -> Array:
        return -above_score((d.high - x) / d.base_dist.scale if normal else high - base.pull(x), -high)

    return PriorMap("truncated quantile", (), push, pull)


@register(dist.TwoSidedTruncatedDistribution, dist.TwoSidedTruncatedGamma)
def _two_sided(d: dist.TwoSidedTruncatedDistribution | dist.TwoSidedTruncatedGamma) -> PriorMap:
    base, low, high = _bounds(d)
    normal = isinstance(d.base_dist, dist.Normal)

    def push(z: Array) -> Array:
        score, from_low, from_high = within(*broadcast_float(z, low, high))
        if normal:
            scale = d.base_dist.scale
            value = jnp.where(from_low <= from_high, d.low + scale * from_low, d.high - scale * from_high)
        else:
            value = base.push(score)
        return inside_support(d.support, value)

    def pull(x: Array) -> Array:
        if normal:
            return within_score((x - d.low) / d.base_dist.scale, (d.high - x) / d.base_dist.scale, low, high)
        score = base.pull(x)
        return within_score(score - low, high - score, low, high)

    return PriorMap("truncated quantile", (), push, pull)


@register(dist.FoldedDistribution)
def _folded(d: dist.FoldedDistribution) -> PriorMap:
    """|X| of a law symmetric about zero is T(|N|); any other folding gets the corrected bijection."""
    base = d.base_dist
    while isinstance(base, dist.ExpandedDistribution):
        base = base.base_dist
    symmetric = (dist.Normal, dist.Cauchy, dist.Laplace, dist.Logistic, dist.SoftLaplace, dist.StudentT)
    known = type(base) in symmetric and not isinstance(base.loc, Tracer)
    if len(d.transforms) != 1 or not known or np.asarray(base.loc).any():
        return bijection(d)
    mapped = prior_map(base)
    return PriorMap(
        "quantile",
        (),
        lambda z: inside_support(d.support, mapped.push(half_normal(z))),
        lambda x: half_normal_score(mapped.pull(x)),
    )
