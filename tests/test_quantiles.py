"""Univariate maps against SciPy's quantiles, for z = -8, -7.75, ..., 8 in both precisions.

The reference is ppf(Phi(z)) below the median and isf(Phi(-z)) above it. Values are compared relative to the
reference, or (families marked `scale`) to the spread of the law, because a law that crosses zero, or whose bound
does, has no relative accuracy there.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special
import scipy.stats

from pushforward.math import beta_quantile, gamma_quantile, quantiles, special, truncation
from pushforward.model.coordinates import pull, push

Z = np.arange(-8.0, 8.01, 0.25)
LOW, HIGH = scipy.stats.norm.cdf(Z), scipy.stats.norm.sf(Z)


@dataclass
class Law:
    """A quantile function by its two tails, where SciPy lacks the law or its isf is 1 - ppf."""

    ppf: object
    isf: object


def kumaraswamy(a, b):
    return Law(
        lambda p: (-np.expm1(np.log1p(-p) / b)) ** (1 / a),
        lambda q: (-np.expm1(np.log(q) / b)) ** (1 / a),
    )


def half_normal(scale):
    return Law(
        lambda p: scale * np.sqrt(2) * scipy.special.erfinv(p),
        lambda q: scale * scipy.stats.norm.isf(q / 2),
    )


def soft_laplace(loc, scale):
    return Law(
        lambda p: loc + scale * np.log(np.tan(np.pi * p / 2)),
        lambda q: loc - scale * np.log(np.tan(np.pi * q / 2)),
    )


def left_normal(loc, scale, low):
    norm = scipy.stats.norm(loc, scale)
    truncated = scipy.stats.truncnorm((low - loc) / scale, np.inf, loc, scale)
    return Law(truncated.ppf, lambda q: norm.isf(q * norm.sf(low)))


def right_normal(loc, scale, high):
    reflected = left_normal(-loc, scale, -high)
    return Law(lambda p: -reflected.isf(p), lambda q: -reflected.ppf(q))


def within(base, low, high):
    """A symmetric law about zero truncated to an interval around zero."""
    left, right = base.cdf(low), base.sf(high)
    return Law(
        lambda p: base.ppf(left + p * (1 - left - right)),
        lambda q: base.isf(right + q * (1 - left - right)),
    )


S = scipy.stats
FAMILIES = {
    "normal": (dist.Normal, [(1.0, 2.0)], S.norm, "scale"),
    "uniform": (dist.Uniform, [(0.0, 1.0), (0.4, 1.2), (-3.0, 5.0)], lambda a, b: S.uniform(a, b - a), "scale"),
    "log normal": (dist.LogNormal, [(0.5, 0.7)], lambda m, s: S.lognorm(s, scale=np.exp(m)), ""),
    "log uniform": (dist.LogUniform, [(0.5, 7.0)], S.loguniform, ""),
    "exponential": (dist.Exponential, [(2.0,)], lambda r: S.expon(scale=1 / r), ""),
    "half normal": (dist.HalfNormal, [(2.0,)], half_normal, ""),
    "half cauchy": (dist.HalfCauchy, [(2.0,)], lambda s: S.halfcauchy(scale=s), ""),
    "cauchy": (dist.Cauchy, [(1.0, 2.0)], S.cauchy, "scale"),
    "laplace": (dist.Laplace, [(1.0, 2.0)], S.laplace, "scale"),
    "asymmetric laplace": (
        dist.AsymmetricLaplace,
        [(0.7, 2.0, 3.0)],
        lambda m, s, k: S.laplace_asymmetric(k, m, s),
        "scale",
    ),
    "logistic": (dist.Logistic, [(1.0, 2.0)], S.logistic, "scale"),
    "soft laplace": (dist.SoftLaplace, [(1.0, 2.0)], soft_laplace, "scale"),
    "gumbel": (dist.Gumbel, [(1.0, 2.0)], S.gumbel_r, "scale"),
    "gompertz": (dist.Gompertz, [(0.7, 2.0)], lambda c, r: S.gompertz(c, scale=1 / r), ""),
    "weibull": (dist.Weibull, [(0.7, 2.0), (1.0, 0.5)], lambda s, c: S.weibull_min(c, scale=s), ""),
    "kumaraswamy": (dist.Kumaraswamy, [(0.7, 2.0)], kumaraswamy, ""),
    "pareto": (dist.Pareto, [(0.7, 2.0)], lambda s, a: S.pareto(a, scale=s), ""),
    "levy": (dist.Levy, [(0.7, 2.0)], S.levy, ""),
    "dagum": (dist.Dagum, [(0.7, 2.0, 3.0)], lambda d, c, s: S.burr(c, d, scale=s), ""),
    "power law": (
        dist.DoublyTruncatedPowerLaw,
        [(-2.0, 1.0, 4.0), (-1.0001, 1.0, 4.0), (-30.0, 1.0, 4.0)],
        lambda k, a, b: S.truncpareto(-1 - k, b / a, scale=a),
        "",
    ),
    "gamma": (
        dist.Gamma,
        [(a, 2.0) for a in (0.05, 0.5, 1.0, 2.5, 30.0, 1000.0)],
        lambda a, r: S.gamma(a, scale=1 / r),
        "",
    ),
    "inverse gamma": (dist.InverseGamma, [(0.7, 2.0), (5.0, 1.0)], lambda a, r: S.invgamma(a, scale=r), ""),
    "beta": (dist.Beta, [(0.3, 0.7), (0.5, 0.5), (1.0, 1.0), (2.0, 5.0), (30.0, 3.0), (200.0, 300.0)], S.beta, ""),
    "student t": (dist.StudentT, [(v, 0.0, 1.0) for v in (0.8, 1.0, 2.0, 3.0, 4.5, 30.0, 300.0)], S.t, ""),
    "left normal": (
        lambda m, s, a: dist.TruncatedNormal(m, s, low=a),
        [(1.0, 2.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 5.0), (0.0, 1.0, -6.0)],
        left_normal,
        "scale",
    ),
    "right normal": (lambda m, s, b: dist.TruncatedNormal(m, s, high=b), [(0.0, 1.0, 0.5)], right_normal, "scale"),
    "two-sided normal": (
        lambda m, s, a, b: dist.TruncatedNormal(m, s, low=a, high=b),
        [(0.0, 1.0, -1.0, 2.0), (0.0, 1.0, -0.001, 0.002), (0.0, 1.0, 5.0, 5.5)],
        lambda m, s, a, b: S.truncnorm((a - m) / s, (b - m) / s, m, s),
        "scale",
    ),
    "two-sided cauchy": (
        lambda a, b: dist.TruncatedCauchy(0.0, 1.0, low=a, high=b),
        [(-1.0, 2.0)],
        lambda a, b: within(S.cauchy, a, b),
        "scale",
    ),
}


def compiled(function, *arguments):
    """Runs a function under jit, compiled without optimisation: the tests here spend their time in the compiler."""
    program = jax.jit(function).lower(*arguments)
    return program.compile(compiler_options={"xla_backend_optimization_level": 0})(*arguments)


def evaluate(make, parameters, dtype):
    """T, dT/dz, dT/dparameters and (float64) log p and the score, for parameter sets (rows) and z (columns)."""
    rows = np.asarray(parameters, dtype)
    columns = [jnp.asarray(np.broadcast_to(c[:, None], (len(rows), Z.size))) for c in rows.T]

    def values(z, *columns):
        x = push(make(*columns), z)
        return jnp.sum(x), x

    def all_of_it(z, *columns):
        gradients, x = jax.grad(values, argnums=tuple(range(len(columns) + 1)), has_aux=True)(z, *columns)
        if dtype == np.float32:
            return x, gradients
        return x, gradients, make(*columns).log_prob(x), pull(make(*columns), x)

    z = jnp.asarray(np.broadcast_to(Z.astype(dtype), (len(rows), Z.size)))
    return jax.tree.map(np.asarray, compiled(all_of_it, z, *columns))


def reference(law, parameters):
    rows = [law(*p) for p in parameters]
    return np.stack([np.where(Z <= 0, row.ppf(np.minimum(LOW, 0.5)), row.isf(np.minimum(HIGH, 0.5))) for row in rows])


def support_bounds(make, parameters):
    """Ends of the support, per parameter set."""
    ends = []
    for row in parameters:
        support = make(*row).support
        zero_one = (0.0, 1.0) if support is dist.constraints.unit_interval else (-np.inf, np.inf)
        ends.append(
            [getattr(support, name, end) for name, end in zip(("lower_bound", "upper_bound"), zero_one, strict=True)]
        )
    return np.asarray(ends, float).T[..., None]


COMPOSED = ("two-sided cauchy",)  # of maps that are tested in float32 by themselves


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "bits"), [(f, bits) for f in FAMILIES for bits in (64, 32) if bits == 64 or f not in COMPOSED]
)
def test_quantiles_equal_scipys(family, bits):
    make, parameters, law, measure = FAMILIES[family]
    dtype = np.dtype(f"float{bits}")
    with jax.enable_x64(bits == 64):
        x, (in_z, *in_parameters), *rest = evaluate(make, parameters, dtype)
        low, high = support_bounds(make, parameters)
    expected = reference(law, np.asarray(parameters, dtype).astype(float))
    assert x.dtype == dtype
    finite = [np.isfinite(v).all() for v in (x, in_z, *in_parameters)]
    assert all(finite), finite
    assert (x > low.astype(dtype)).all()
    assert (x < high.astype(dtype)).all()

    # Order: strict wherever float64 can tell neighbours apart, never reversed in float32.
    gaps = np.diff(expected)
    grid = np.spacing(np.maximum(np.abs(expected[:, 1:]), np.abs(expected[:, :-1])))
    assert (np.diff(x) >= 0).all()
    if bits == 64:
        assert (np.diff(x)[gaps > 4 * grid] > 0).all()

    spread = (expected[:, 36] - expected[:, 28])[:, None] if measure else 0.0
    normal = np.abs(expected) >= np.finfo(dtype).tiny
    error = np.where(normal, np.abs(x - expected) / np.maximum(np.abs(expected), spread), 0.0)
    assert error.max() < (1e-8 if bits == 64 else 1e-4), (error.max(), np.unravel_index(error.argmax(), error.shape))

    if bits == 64:
        # p(T(z)) T'(z) = phi(z), where NumPyro's own log density does not run out of digits.
        (log_density, z), middle = rest, np.abs(Z) <= 2.0
        defect = log_density + np.log(in_z) - scipy.stats.norm.logpdf(Z)
        assert np.abs(defect[:, middle]).max() < 1e-5
        assert np.abs(z - Z)[:, middle].max() < 1e-6


DERIVATIVES = {
    "gamma": (lambda z, a: gamma_quantile.log_gamma(z, a), [(0.3,), (4.0,), (300.0,)]),
    "beta": (lambda z, a, b: beta_quantile.logit_beta(z, a, b), [(0.4, 3.0), (20.0, 7.0)]),
    "student t": (lambda z, v: jnp.arcsinh(quantiles.student_t(z, v)), [(1.5,), (40.0,)]),
    "left truncated, distance": (lambda z, a: truncation.above(z, a)[1], [(-1.0,), (4.0,)]),
    "truncated": (lambda z, a, b: truncation.within(z, a, b)[1], [(-1.0, 2.0), (3.0, 3.2)]),
    "power law": (lambda z, k, w: quantiles.log_power_law(z, k, w), [(0.0, 1.3), (-2.0, 1.3)]),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_equal_differences(name):
    """First and second derivatives along fixed directions in (z, parameters), against central differences."""
    function, parameters = DERIVATIVES[name]
    with jax.enable_x64(True):
        points = jnp.asarray([(z, *row) for row in parameters for z in (-5.0, -0.7, 0.3, 4.0)])
        signs = np.array([1.0, -1.0, 1.0])[: points.shape[1]]
        directions = jnp.asarray(signs * np.random.default_rng(0).uniform(0.3, 1.0, points.shape))

        def along(t):
            return jax.vmap(lambda point, direction: function(*(point + t * direction)))(points, directions)

        def both(t):
            first = lambda t: jax.jvp(along, (t,), (jnp.ones(()),))  # noqa: E731
            (value, slope), (_, bend) = jax.jvp(first, (t,), (jnp.ones(()),))
            return value, slope, bend

        value, slope, bend = map(np.asarray, compiled(lambda: jax.lax.map(both, jnp.asarray([-1e-5, 0.0, 1e-5]))))
    np.testing.assert_allclose(slope[1], (value[2] - value[0]) / 2e-5, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(bend[1], (slope[2] - slope[0]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_tails_reach_far_beyond_underflow():
    """log Phi and its inverse where Phi underflows, against SciPy's log_ndtr."""
    z = np.array([-1e3, -50.0, -20.0, -12.5, -3.0])

    def there_and_back(z):
        lower, upper = special.log_tails(z)
        return lower, special.normal_score(lower, upper), special.normal_score(upper, lower)

    with jax.enable_x64(True):
        lower, score, mirrored = map(np.asarray, compiled(there_and_back, jnp.asarray(z)))
    np.testing.assert_allclose(lower, scipy.special.log_ndtr(z), rtol=1e-9)
    np.testing.assert_allclose(score, z, rtol=1e-9)
    np.testing.assert_allclose(mirrored, -z, rtol=1e-9)
    single = compiled(special.tail_score, jnp.asarray(scipy.special.log_ndtr(z), jnp.float32))
    np.testing.assert_allclose(single, z, rtol=1e-6)


def test_rounding_keeps_the_derivative():
    """A value on the end of its support moves one float inward; its derivative stays 1."""
    one = jnp.float32(1.0)
    value, slope = jax.value_and_grad(lambda x: special.inside(x, jnp.float32(0.0), one))(one)
    assert value == np.nextafter(np.float32(1), np.float32(0))
    assert slope == 1.0
    assert special.inside(jnp.float32(-1.0), jnp.float32(0.0), one) == np.finfo(np.float32).tiny


def test_equations_promote_neither_rank_nor_dtype():
    """Traced only: promotion errors are raised by the trace."""
    z, a = jnp.linspace(-2.0, 2.0, 3), jnp.asarray([2.0])
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for function in (
            lambda z, a: gamma_quantile.log_gamma(z, a),
            lambda z, a: beta_quantile.logit_beta(z, a, a),
            lambda z, a: quantiles.student_t(z, a),
            lambda z, a: quantiles.log_power_law(*special.broadcast_float(z, a, a)),
            lambda z, a: truncation.above(*special.broadcast_float(z, a))[0],
            lambda z, a: truncation.within(*special.broadcast_float(z, -a, a))[0],
            lambda z, a: quantiles.cauchy(z),
            lambda z, a: quantiles.levy(z),
        ):
            value = jax.eval_shape(jax.grad(lambda z, a, f=function: f(z, a).sum()), z, a)
            assert (value.shape, value.dtype) == (z.shape, z.dtype)
