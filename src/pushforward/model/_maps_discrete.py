"""Maps of discrete families: the quantile function at Phi(z), so that a state with a regime is a function of noise.

They have no inverse and no density in ``z``: particle filters push noise through them, and methods that need a
density of the noise refuse models with discrete latent sites.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import betainc, gammainc, gammaincc, ndtr, ndtri

from pushforward.model._maps import PriorMap, register


def _quantile(push: Callable[[Array], Array]) -> PriorMap:
    def pull(value: Array) -> Array:
        raise TypeError("a discrete value does not determine its noise")

    return PriorMap("quantile, discrete", (), push, pull)


@register(dist.BernoulliProbs, dist.BernoulliLogits)
def _bernoulli(d: dist.Distribution) -> PriorMap:
    # The threshold in z keeps both tails: 1 - Phi(z) < p exactly where z > -ndtri(p).
    return _quantile(lambda z: (z > -ndtri(d.probs)).astype(_integer(d)))


@register(dist.CategoricalProbs, dist.CategoricalLogits)
def _categorical(d: dist.Distribution) -> PriorMap:
    def push(z: Array) -> Array:
        total = jnp.cumsum(d.probs, -1)
        # Dividing by the last sum makes it exactly 1, so that classes of probability 0 are not met.
        below = ndtr(z)[..., None] > (total / total[..., -1:])[..., :-1]
        return jnp.sum(below, -1).astype(_integer(d))

    return _quantile(push)


@register(dist.DiscreteUniform)
def _uniform(d: dist.DiscreteUniform) -> PriorMap:
    def push(z: Array) -> Array:
        found = d.low + jnp.floor(ndtr(z) * (d.high - d.low + 1))
        return jnp.minimum(found, d.high).astype(_integer(d))

    return _quantile(push)


@register(dist.GeometricProbs, dist.GeometricLogits)
def _geometric(d: dist.Distribution) -> PriorMap:
    """P(X >= k) = (1 - p)^k."""
    return _quantile(lambda z: jnp.floor(_log_upper(z) / jnp.log1p(-d.probs)).astype(_integer(d)))


@register(dist.Poisson)
def _poisson(d: dist.Poisson) -> PriorMap:
    def push(z: Array) -> Array:
        rate = jnp.broadcast_to(d.rate, z.shape)
        return _searched(z, d, lambda k: gammaincc(k + 1, rate), lambda k: gammainc(k + 1, rate), jnp.inf)

    return _quantile(push)


@register(dist.GammaPoisson, dist.NegativeBinomial2, dist.NegativeBinomialProbs, dist.NegativeBinomialLogits)
def _gamma_poisson(d: dist.GammaPoisson) -> PriorMap:
    def push(z: Array) -> Array:
        a, p = jnp.broadcast_to(d.concentration, z.shape), jnp.broadcast_to(d.rate / (1 + d.rate), z.shape)
        return _searched(z, d, lambda k: betainc(a, k + 1, p), lambda k: betainc(k + 1, a, 1 - p), jnp.inf)

    return _quantile(push)


@register(dist.BinomialProbs, dist.BinomialLogits)
def _binomial(d: dist.Distribution) -> PriorMap:
    def push(z: Array) -> Array:
        n = jnp.broadcast_to(jnp.asarray(d.total_count, z.dtype), z.shape)
        p = jnp.broadcast_to(d.probs, z.shape)

        def lower(k: Array) -> Array:
            return jnp.where(k >= n, 1.0, betainc(jnp.maximum(n - k, 1e-3), k + 1, 1 - p))

        def upper(k: Array) -> Array:
            return jnp.where(k >= n, 0.0, betainc(k + 1, jnp.maximum(n - k, 1e-3), p))

        return _searched(z, d, lower, upper, n)

    return _quantile(push)


def _searched(
    z: Array,
    d: dist.Distribution,
    lower: Callable[[Array], Array],
    upper: Callable[[Array], Array],
    largest: Array | float,
) -> Array:
    """The smallest k with P(X <= k) >= Phi(z), by bisection; for z > 0 through P(X > k) <= Phi(-z).

    Above the median the tail falls at least like that of a gamma law of the same mean and variance, which bounds the
    bracket.
    """
    mean, variance = jnp.broadcast_to(d.mean, z.shape), jnp.broadcast_to(d.variance, z.shape)
    spread = variance / jnp.maximum(mean, 1e-30)
    far = mean + 2 * jnp.sqrt(variance) * (jnp.abs(z) + 1) + (spread + 1) * (z**2 + 4)
    high = jnp.where(jnp.isfinite(far), jnp.minimum(jnp.ceil(far), largest), 0.0)

    def open_(state: tuple[Array, Array]) -> Array:
        return jnp.any(state[1] - state[0] > 1)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        k = jnp.floor((low + high) / 2)
        reached = jnp.where(z > 0, upper(k) <= ndtr(-z), lower(k) >= ndtr(z))
        going = high - low > 1
        return jnp.where(going & ~reached, k, low), jnp.where(going & reached, k, high)

    _, found = jax.lax.while_loop(open_, halve, (jnp.full_like(high, -1.0), high))
    return found.astype(_integer(d))


def _log_upper(z: Array) -> Array:
    return jax.scipy.special.log_ndtr(-z)


def _integer(d: dist.Distribution) -> jnp.dtype:
    """The dtype that NumPyro's own draws have."""
    return jax.eval_shape(lambda key: d.sample(key), jax.random.key(0)).dtype
