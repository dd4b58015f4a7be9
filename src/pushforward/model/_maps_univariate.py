"""Prior maps of univariate families: quantile pairs of a standard law, shifted and scaled."""

from __future__ import annotations

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.nn import sigmoid

from pushforward.math import quantiles
from pushforward.math.beta_quantile import logit_beta, logit_beta_score
from pushforward.math.gamma_quantile import log_gamma, log_gamma_score
from pushforward.math.special import half_normal, half_normal_score, log1mexp, normal_score
from pushforward.model._maps import PriorMap, inside_support, register


def quantile(distribution: dist.Distribution, push, pull) -> PriorMap:
    """Builds the map of a scalar event, rounded into the support."""
    support = distribution.support
    return PriorMap("quantile", (), lambda z: inside_support(support, push(z)), pull)


def location_scale(d: dist.Distribution, standard, score) -> PriorMap:
    """Builds the map loc + scale * standard(z)."""
    return quantile(d, lambda z: d.loc + d.scale * standard(z), lambda x: score((x - d.loc) / d.scale))


@register(dist.Normal)
def _normal(d: dist.Normal) -> PriorMap:
    return PriorMap("affine", (), lambda z: d.loc + d.scale * z, lambda x: (x - d.loc) / d.scale)


@register(dist.Uniform)
def _uniform(d: dist.Uniform) -> PriorMap:
    return quantile(
        d,
        lambda z: quantiles.between(z, d.low, d.high),
        lambda x: quantiles.between_score(x, d.low, d.high),
    )


@register(dist.Exponential)
def _exponential(d: dist.Exponential) -> PriorMap:
    return quantile(d, lambda z: quantiles.exponential(z) / d.rate, lambda x: quantiles.exponential_score(x * d.rate))


@register(dist.HalfNormal)
def _half_normal(d: dist.HalfNormal) -> PriorMap:
    return quantile(d, lambda z: d.scale * half_normal(z), lambda x: half_normal_score(x / d.scale))


@register(dist.HalfCauchy)
def _half_cauchy(d: dist.HalfCauchy) -> PriorMap:
    return quantile(d, lambda z: d.scale * quantiles.half_cauchy(z), lambda x: quantiles.half_cauchy_score(x / d.scale))


@register(dist.Cauchy)
def _cauchy(d: dist.Cauchy) -> PriorMap:
    return location_scale(d, quantiles.cauchy, quantiles.cauchy_score)


@register(dist.Laplace)
def _laplace(d: dist.Laplace) -> PriorMap:
    return location_scale(d, quantiles.laplace, quantiles.laplace_score)


@register(dist.Logistic)
def _logistic(d: dist.Logistic) -> PriorMap:
    return location_scale(d, quantiles.logistic, quantiles.logistic_score)


@register(dist.SoftLaplace)
def _soft_laplace(d: dist.SoftLaplace) -> PriorMap:
    return location_scale(d, quantiles.soft_laplace, quantiles.soft_laplace_score)


@register(dist.Gumbel)
def _gumbel(d: dist.Gumbel) -> PriorMap:
    return location_scale(d, quantiles.gumbel, quantiles.gumbel_score)


@register(dist.Levy)
def _levy(d: dist.Levy) -> PriorMap:
    return location_scale(d, quantiles.levy, quantiles.levy_score)


@register(dist.StudentT)
def _student_t(d: dist.StudentT) -> PriorMap:
    return location_scale(d, lambda z: quantiles.student_t(z, d.df), lambda y: quantiles.student_t_score(y, d.df))


@register(dist.AsymmetricLaplace)
def _asymmetric_laplace(d: dist.AsymmetricLaplace) -> PriorMap:
    left, right = d.left_scale, d.right_scale
    return quantile(
        d,
        lambda z: d.loc + quantiles.asymmetric_laplace(z, left, right),
        lambda x: quantiles.asymmetric_laplace_score(x - d.loc, left, right),
    )


@register(dist.AsymmetricLaplaceQuantile)
def _asymmetric_laplace_quantile(d: dist.AsymmetricLaplaceQuantile) -> PriorMap:
    return _asymmetric_laplace(d._ald)


@register(dist.Gompertz)
def _gompertz(d: dist.Gompertz) -> PriorMap:
    return quantile(
        d,
        lambda z: quantiles.gompertz(z, d.concentration) / d.rate,
        lambda x: quantiles.exponential_score(d.concentration * jnp.expm1(d.rate * x)),
    )


@register(dist.Weibull)
def _weibull(d: dist.Weibull) -> PriorMap:
    return PriorMap(
        "closed form",
        (),
        lambda z: inside_support(d.support, d.scale * jnp.exp(quantiles.log_weibull(z) / d.concentration)),
        lambda x: quantiles.exponential_score((x / d.scale) ** d.concentration),
    )


@register(dist.Kumaraswamy)
def _kumaraswamy(d: dist.Kumaraswamy) -> PriorMap:
    a, b = d.concentration1, d.concentration0

    def pull(x: Array) -> Array:
        upper = b * jnp.log1p(-(x**a))
        return normal_score(log1mexp(upper), upper)

    push = lambda z: inside_support(d.support, jnp.exp(quantiles.log_kumaraswamy(z, a, b)))  # noqa: E731
    return PriorMap("closed form", (), push, pull)


@register(dist.Dagum)
def _dagum(d: dist.Dagum) -> PriorMap:
    return quantile(
        d,
        lambda z: d.scale * jnp.exp(quantiles.log_dagum(z, d.concentration, d.sharpness)),
        lambda x: quantiles.log_dagum_score(jnp.log(x / d.scale), d.concentration, d.sharpness),
    )


@register(dist.Pareto)
def _pareto(d: dist.Pareto) -> PriorMap:
    return quantile(
        d,
        lambda z: d.scale * jnp.exp(quantiles.exponential(z) / d.alpha),
        lambda x: quantiles.exponential_score(d.alpha * jnp.log(x / d.scale)),
    )


@register(dist.LowerTruncatedPowerLaw)
def _lower_truncated_power_law(d: dist.LowerTruncatedPowerLaw) -> PriorMap:
    decay = -1.0 - d.alpha
    return quantile(
        d,
        lambda z: d.low * jnp.exp(quantiles.exponential(z) / decay),
        lambda x: quantiles.exponential_score(decay * jnp.log(x / d.low)),
    )


@register(dist.DoublyTruncatedPowerLaw)
def _doubly_truncated_power_law(d: dist.DoublyTruncatedPowerLaw) -> PriorMap:
    exponent, width = 1.0 + d.alpha, jnp.log(d.high) - jnp.log(d.low)
    return quantile(
        d,
        lambda z: d.low * jnp.exp(quantiles.log_power_law(z, exponent, width)),
        lambda x: quantiles.log_power_law_score(jnp.log(x / d.low), exponent, width),
    )


@register(dist.Gamma)
def _gamma(d: dist.Gamma) -> PriorMap:
    return quantile(
        d,
        lambda z: jnp.exp(log_gamma(z, d.concentration)) / d.rate,
        lambda x: log_gamma_score(jnp.log(x) + jnp.log(d.rate), d.concentration),
    )


@register(dist.InverseGamma)
def _inverse_gamma(d: dist.InverseGamma) -> PriorMap:
    return quantile(
        d,
        lambda z: d.rate * jnp.exp(-log_gamma(-z, d.concentration)),
        lambda x: -log_gamma_score(jnp.log(d.rate) - jnp.log(x), d.concentration),
    )


@register(dist.Beta)
def _beta(d: dist.Beta) -> PriorMap:
    a, b = d.concentration1, d.concentration0
    return quantile(
        d,
        lambda z: sigmoid(logit_beta(z, a, b)),
        lambda x: logit_beta_score(jnp.log(x) - jnp.log1p(-x), a, b),
    )
