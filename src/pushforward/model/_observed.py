"""Observed sites as data with a mean and a noise: what Gaussian and ensemble methods see of a likelihood."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from pushforward._types import Array
from pushforward.math.noise import DataNoise, LowRank
from pushforward.model._laws import concrete_support
from pushforward.model._missing import without_missing

# Families for whose noise a Gaussian of the same variance may stand: unimodal, with a mean that says where they are.
MATCHED = (
    dist.Poisson,
    dist.NegativeBinomial2,
    dist.GammaPoisson,
    dist.Gamma,
    dist.StudentT,
    dist.Laplace,
    dist.Logistic,
    dist.LogNormal,
)
GAUSSIAN = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)


class Observation(eqx.Module):
    """One observed site: ``data ~ (mean, noise)``, and its log density.

    Attributes:
        mean: predicted data, of the data's shape.
        noise: variances of the data's shape, or covariances with one more axis.
        data: data, NaN where missing or masked out.
        log_prob: log density, element by element; 0 where data are missing.
    """

    mean: Array
    noise: Array
    data: Array
    log_prob: Array


def observation(site: dict) -> Observation:
    """What one observed site says."""
    law, value = site["fn"], jnp.asarray(site["value"])
    bare, mask = _bare(law)
    data = value.astype(jnp.result_type(float, value.dtype if jnp.issubdtype(value.dtype, jnp.floating) else float))
    if mask is not True:
        keep = jnp.asarray(mask).reshape(jnp.shape(mask) + (1,) * law.event_dim)
        data = jnp.where(keep, data, jnp.nan)
    shape = data.shape
    try:
        mean = jnp.broadcast_to(jnp.broadcast_to(law.mean, law.shape()), shape)
        noise = _noise(law, bare, shape)
    except (NotImplementedError, AttributeError):
        mean = noise = jnp.full(shape, jnp.nan, data.dtype)
    full, filled = without_missing(law, data) if jnp.issubdtype(value.dtype, jnp.floating) else (law, value)
    density = full.log_prob(filled)
    if concrete_support(bare) is None:
        # NumPyro's densities do not look whether data lie within a support that moves with the parameters.
        density = jnp.where(full.support(filled) | (density == 0), density, -jnp.inf)
    density = density if site["scale"] is None else site["scale"] * density
    return Observation(mean.astype(data.dtype), noise.astype(data.dtype), data, density)


def time_in_batch(site: dict, length: int) -> dict:
    """A site after a scan whose event holds the axis of time, as in ``Normal(xs, sd).to_event(1)``, without that."""
    law, value = site["fn"], site["value"]
    whole = isinstance(law, dist.Independent) and law.event_dim == jnp.ndim(value) == law.reinterpreted_batch_ndims
    if not whole or jnp.shape(value)[:1] != (length,):
        return site
    return site | {"fn": law.base_dist.to_event(law.event_dim - 1)}


def gaussian_reason(site: dict) -> str | None:
    """Why an observed site is no Gaussian observation, or None where it is one."""
    if site["type"] != "sample":
        return "is a numpyro.deterministic, which has no noise"
    law = site["fn"]
    if isinstance(law, dist.Unit):
        return "is a numpyro.factor, which is no Gaussian observation"
    if isinstance(law, dist.MaskedDistribution) or site["scale"] is not None:
        return "stands under handlers.mask or handlers.scale; mark missing data by NaN instead"
    if not isinstance(_bare(law)[0], GAUSSIAN):
        return f"is {type(_bare(law)[0]).__name__}, not Normal or MultivariateNormal"
    return None


def family(site: dict) -> tuple[str, str | None]:
    """The family of an observed site of a state-space model, and why its noise has no Gaussian form.

    Returns:
        "gaussian", "matched" (a Gaussian of the same variance may stand for it) or "other", with the name of
        the distribution or the reason.
    """
    bare, _ = _bare(site["fn"])
    if site["scale"] is not None:
        return "other", "stands under handlers.scale, which no Gaussian noise has"
    if isinstance(bare, GAUSSIAN):
        return "gaussian", type(bare).__name__
    if isinstance(bare, MATCHED):
        return "matched", type(bare).__name__
    return "other", f"is {type(bare).__name__}, whose noise no Gaussian stands for"


def mean_and_noise(law: dist.Distribution, shape: tuple[int, ...]) -> tuple[Array, DataNoise]:
    """Mean of an observed law, and its noise as `math.noise` has it, for data of a shape."""
    bare, _ = _bare(law)
    mean = jnp.broadcast_to(jnp.broadcast_to(law.mean, law.shape()), shape)
    if isinstance(bare, dist.Normal):
        return mean, jnp.broadcast_to(jnp.sqrt(law.variance), shape)
    if isinstance(bare, dist.LowRankMultivariateNormal):
        factor = jnp.broadcast_to(bare.cov_factor, (*shape, bare.cov_factor.shape[-1]))
        return mean, LowRank(factor, jnp.broadcast_to(bare.cov_diag, shape))
    return mean, jnp.broadcast_to(bare.covariance_matrix, (*shape, shape[-1]))


def _bare(law: dist.Distribution) -> tuple[dist.Distribution, Any]:
    """The family under `expand`, `to_event` and `mask`, and the mask (True where there is none)."""
    mask: Any = True
    while isinstance(law, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        if isinstance(law, dist.MaskedDistribution):
            mask = law._mask if mask is True else jnp.logical_and(mask, law._mask)
        law = law.base_dist
    return law, mask


def _noise(law: dist.Distribution, bare: dist.Distribution, shape: tuple[int, ...]) -> Array:
    if isinstance(bare, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return jnp.broadcast_to(bare.covariance_matrix, (*shape, shape[-1]))
    return jnp.broadcast_to(jnp.broadcast_to(law.variance, law.shape()), shape)


def flat(observations: dict[str, Observation]) -> tuple[Array, Array, Array]:
    """Mean (m,), noise (variances (m,), or a covariance (m, m) where a site has one) and data (m,) of all sites."""
    sites = list(observations.values())
    if not sites:
        return jnp.zeros(0), jnp.zeros(0), jnp.zeros(0)
    mean = jnp.concatenate([jnp.ravel(s.mean) for s in sites])
    data = jnp.concatenate([jnp.ravel(s.data) for s in sites])
    if all(s.noise.ndim == s.mean.ndim for s in sites):
        return mean, jnp.concatenate([jnp.ravel(s.noise) for s in sites]), data
    blocks = [b for s in sites for b in _blocks(s)]
    return mean, jax.scipy.linalg.block_diag(*blocks), data


def _blocks(site: Observation) -> list[Array]:
    if site.noise.ndim == site.mean.ndim:
        return [jnp.diag(jnp.ravel(site.noise))]
    size = site.mean.shape[-1]
    return list(site.noise.reshape(-1, size, size))
