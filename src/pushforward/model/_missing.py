"""Missing data: NaN in an observed array, decided on the value and inside `jit`.

Factorised distributions drop the missing elements; a multivariate normal is replaced by its
marginal over the elements that are present; other events are dropped whole. The value is filled
*before* a density is evaluated, so that gradients stay finite.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from pushforward._types import Array


def without_missing(distribution: dist.Distribution, value: Array) -> tuple[dist.Distribution, Array]:
    """The law of the elements that are present, and the value with the others filled.

    Args:
        distribution: law of the observed site.
        value: observed array of a floating dtype; NaN means missing.

    Returns:
        A distribution whose `log_prob` at the returned value is that of the present elements.
    """
    missing = jnp.isnan(value)
    if isinstance(distribution, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        filled = jnp.where(missing, 0.0, value)
        return _MarginalNormal(distribution, missing), filled
    filled = jnp.where(missing, _feasible(distribution, value), value)
    return _drop(distribution, missing), filled


def missing_kind(distribution: dist.Distribution) -> str:
    """How NaN is treated: "elements" are dropped one by one, or only whole "events"."""
    if isinstance(distribution, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return "elements"
    if isinstance(distribution, dist.MaskedDistribution):
        return missing_kind(distribution.base_dist)
    if isinstance(distribution, dist.Independent):
        return missing_kind(distribution.base_dist)
    return "elements" if distribution.event_dim == 0 else "events"


def _drop(distribution: dist.Distribution, missing: Array) -> dist.Distribution:
    if isinstance(distribution, dist.MaskedDistribution):
        return _drop(distribution.base_dist, missing).mask(distribution._mask)
    if isinstance(distribution, dist.Independent):
        inner = _drop(distribution.base_dist, missing)
        return dist.Independent(inner, distribution.reinterpreted_batch_ndims)
    axes = tuple(range(missing.ndim - distribution.event_dim, missing.ndim))
    dropped = jnp.any(missing, axis=axes)
    # A value may have more batch dimensions than its distribution, which then broadcasts.
    shape = jnp.broadcast_shapes(distribution.batch_shape, dropped.shape)
    return distribution.expand(shape).mask(~dropped)


def _feasible(distribution: dist.Distribution, value: Array) -> Array:
    while isinstance(distribution, dist.MaskedDistribution):
        distribution = distribution.base_dist
    filled = jax.lax.stop_gradient(distribution.support.feasible_like(jnp.zeros_like(value)))
    return jnp.asarray(filled, value.dtype)


class _MarginalNormal(dist.Distribution):
    """The marginal of a multivariate normal over the elements that are not missing.

    Rows and columns of missing elements are replaced by those of the identity and their residual
    by zero, so that each contributes exactly -log(2 pi) / 2, which is taken off again.
    """

    support = dist.constraints.real_vector

    def __init__(self, normal: dist.Distribution, missing: Array):
        self.normal, self.missing = normal, missing
        batch = jnp.broadcast_shapes(normal.batch_shape, missing.shape[:-1])
        super().__init__(batch, normal.event_shape)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.normal.sample(key, sample_shape)

    def log_prob(self, value: Array, intermediates: object = None) -> Array:
        return jax.lax.cond(jnp.any(self.missing), self._marginal, self.normal.log_prob, value)

    def _marginal(self, value: Array) -> Array:
        present = ~self.missing
        both = present[..., :, None] & present[..., None, :]
        covariance = jnp.where(both, self.normal.covariance_matrix, jnp.eye(value.shape[-1]))
        residual = jnp.where(present, value - self.normal.loc, 0.0)
        joint = dist.MultivariateNormal(0.0, covariance_matrix=covariance).log_prob(residual)
        return joint + 0.5 * jnp.log(2 * jnp.pi) * jnp.sum(self.missing, -1)
