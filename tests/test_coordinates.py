"""The prior map: laws, densities, shapes, wrappers and refusals.

Laws: 1e5 pushed normals against 1e5 draws of NumPyro's sampler (in some cases NumPy's or SciPy's), two-sample
Kolmogorov-Smirnov on the marginals, a sum and a product of elements. A test fails below p = 1e-5; with about 110 of
them a correct library fails with probability 1e-3 per choice of keys, and the keys are fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

from pushforward.model.coordinates import correction, describe_map, is_exact, noise_shape, pull, push

DRAWS = 100_000
TRIL = np.array([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.4, 0.6]], np.float32)
CORRELATION = np.array([[1.0, 0.6, -0.2], [0.6, 1.0, 0.3], [-0.2, 0.3, 1.0]], np.float32)
TIMES = np.linspace(0.0, 1.0, 4, dtype=np.float32)
ROW = np.array([1.0, 0.4, 0.1, 0.1, 0.4], np.float32)
ADJACENCY = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32)


def drift(x, t):
    return -x * (1.0 + t), 0.3 + 0.1 * jnp.tanh(x)


UNIVARIATE = {
    "normal": lambda: dist.Normal(1.0, 2.0),
    "uniform": lambda: dist.Uniform(0.4, 1.2),
    "log normal": lambda: dist.LogNormal(0.3, 0.5),
    "exponential": lambda: dist.Exponential(2.0),
    "half normal": lambda: dist.HalfNormal(2.0),
    "student t": lambda: dist.StudentT(3.0, 1.0, 2.0),
    "asymmetric laplace by quantile": lambda: dist.AsymmetricLaplaceQuantile(1.0, 2.0, 0.3),
    "gumbel": lambda: dist.Gumbel(1.0, 2.0),
    "gamma": lambda: dist.Gamma(2.5, 3.0),
    "beta": lambda: dist.Beta(0.5, 2.0),
    "beta by mean": lambda: dist.BetaProportion(0.3, 4.0),
    "lower power law": lambda: dist.LowerTruncatedPowerLaw(-2.5, 1.0),
    "left logistic": lambda: dist.LeftTruncatedDistribution(dist.Logistic(1.0, 2.0), 0.5),
    "two-sided t": lambda: dist.TwoSidedTruncatedDistribution(dist.StudentT(3.0), -1.0, 2.0),
    "two-sided gamma": lambda: dist.TruncatedGamma(2.0, 1.0, low=1.0, high=3.0),
    "folded cauchy": lambda: dist.FoldedDistribution(dist.Cauchy(0.0, 2.0)),
    "relaxed bernoulli": lambda: dist.RelaxedBernoulli(0.7, probs=0.4),
    "decreasing transform": lambda: dist.TransformedDistribution(
        dist.Gamma(2.0, 1.0), dist.transforms.AffineTransform(1.0, -2.0)
    ),
}

MULTIVARIATE = {
    "multivariate normal": lambda: dist.MultivariateNormal(np.ones(3), scale_tril=TRIL),
    "low rank normal": lambda: dist.LowRankMultivariateNormal(np.ones(3), TRIL[:, :1], np.array([1.0, 2.0, 0.5])),
    "random walk": lambda: dist.GaussianRandomWalk(0.7, 4),
    "matrix normal": lambda: dist.MatrixNormal(np.ones((3, 2)), TRIL, TRIL[:2, :2]),
    "conditional autoregression": lambda: dist.CAR(1.0, 0.5, 2.0, ADJACENCY),
    "state space": lambda: dist.GaussianStateSpace(3, TRIL[:2, :2], scale_tril=TRIL[:2, :2]),
    "circulant": lambda: dist.CirculantNormal(np.ones(5), ROW),
    "zero sum": lambda: dist.ZeroSumNormal(2.0, (3, 4)),
    "multivariate t": lambda: dist.MultivariateStudentT(3.0, np.ones(3), TRIL),
    "dirichlet": lambda: dist.Dirichlet(np.array([0.5, 2.0, 1.0, 5.0])),
    "lkj cholesky": lambda: dist.LKJCholesky(4, 1.5),
    "lkj": lambda: dist.LKJ(3, 0.8),
    "wishart cholesky": lambda: dist.WishartCholesky(4.0, scale_tril=TRIL),
    "inverse wishart": lambda: dist.InverseWishart(5.0, scale_tril=TRIL),
    "gaussian copula": lambda: dist.GaussianCopula(dist.Gamma(np.array([0.5, 2.0, 4.0]), 1.0), CORRELATION),
    "euler maruyama": lambda: dist.EulerMaruyama(TIMES, drift, dist.Normal(1.0, 0.5)),
    "euler maruyama of vectors": lambda: dist.EulerMaruyama(TIMES, drift, dist.Normal(np.ones(2), 0.5).to_event(1)),
    "expanded": lambda: dist.Gamma(np.array([[0.5], [3.0]]), 2.0).expand([2, 2]).to_event(2),
    "expanded vectors": lambda: dist.Dirichlet(np.array([[[1.0, 2.0]], [[4.0, 0.5]]])).expand([2, 2]).to_event(2),
    "plated": lambda: dist.MultivariateNormal(np.ones(3), scale_tril=TRIL).expand([2]).to_event(1),
}


def compiled(function, *arguments):
    """Runs a function under jit, compiled without optimisation: the tests here spend their time in the compiler."""
    program = jax.jit(function).lower(*arguments)
    return program.compile(compiler_options={"xla_backend_optimization_level": 0})(*arguments)


def summaries(draws):
    """First, middle and last coordinate, a sum with unequal weights and a product, of draws of any shape."""
    flat = np.asarray(draws, np.float64).reshape(len(draws), -1)
    if flat.shape[1] == 1:
        return (flat[:, 0],)
    moving = flat[:, flat.std(axis=0) > 1e-6]
    first, last = moving[:, 0], moving[:, -1]
    middle = moving[:, moving.shape[1] // 2]
    return first, middle, last, moving @ np.linspace(1.0, 2.0, moving.shape[1]), first * middle + middle * last


def assert_same_law(pushed, sampled):
    for ours, theirs in zip(summaries(pushed), summaries(sampled), strict=True):
        assert scipy.stats.ks_2samp(ours, theirs, method="asymp").pvalue > 1e-5


def copula(rng, marginals):
    z = rng.multivariate_normal(np.zeros(3), CORRELATION, DRAWS)
    return np.stack([law.ppf(scipy.stats.norm.cdf(column)) for law, column in zip(marginals, z.T, strict=True)], -1)


def between(draws, low, high):
    return draws[(draws > low) & (draws < high)]


def onion(rng, size, concentration):
    """Cholesky factors of LKJ matrices by the extended onion method, NumPyro's other algorithm."""
    tril = np.zeros((DRAWS, size, size))
    tril[:, 0, 0] = 1.0
    for row in range(1, size):
        square = rng.beta(row / 2, concentration + (size - 1 - row) / 2, DRAWS)
        direction = rng.standard_normal((DRAWS, row))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        tril[:, row, :row] = np.sqrt(square)[:, None] * direction
        tril[:, row, row] = np.sqrt(1 - square)
    return tril


def gram(tril):
    return tril @ np.swapaxes(tril, -1, -2)


COVARIANCE = gram(TRIL.astype(float))
# NumPyro's gamma draws are slow on a CPU, and two of its samplers need a library that is not installed.
OWN_SAMPLERS = {
    "two-sided t": lambda rng: between(rng.standard_t(3.0, DRAWS), -1.0, 2.0),
    "student t": lambda rng: 1.0 + 2.0 * rng.standard_t(3.0, DRAWS),
    "gamma": lambda rng: rng.gamma(2.5, 1 / 3.0, DRAWS),
    "beta": lambda rng: rng.beta(0.5, 2.0, DRAWS),
    "beta by mean": lambda rng: rng.beta(1.2, 2.8, DRAWS),
    "left logistic": lambda rng: between(rng.logistic(1.0, 2.0, 2 * DRAWS), 0.5, np.inf),
    "decreasing transform": lambda rng: 1.0 - 2.0 * rng.gamma(2.0, 1.0, DRAWS),
    "multivariate t": lambda rng: scipy.stats.multivariate_t(np.ones(3), COVARIANCE, 3.0).rvs(DRAWS, rng),
    "two-sided gamma": lambda rng: between(rng.gamma(2.0, 1.0, 2 * DRAWS), 1.0, 3.0),
    "gaussian copula": lambda rng: copula(rng, [scipy.stats.gamma(a) for a in (0.5, 2.0, 4.0)]),
    "dirichlet": lambda rng: rng.dirichlet([0.5, 2.0, 1.0, 5.0], DRAWS),
    "expanded": lambda rng: rng.gamma([[0.5], [3.0]], 0.5, (DRAWS, 2, 2)),
    "expanded vectors": lambda rng: np.stack([rng.dirichlet(a, (DRAWS, 2)) for a in ((1.0, 2.0), (4.0, 0.5))], 1),
    "lkj cholesky": lambda rng: onion(rng, 4, 1.5),
    "lkj": lambda rng: gram(onion(rng, 3, 0.8)),
    "wishart cholesky": lambda rng: np.linalg.cholesky(scipy.stats.wishart(4.0, COVARIANCE).rvs(DRAWS, rng)),
    "inverse wishart": lambda rng: scipy.stats.invwishart(5.0, COVARIANCE).rvs(DRAWS, rng),
}


@pytest.mark.parametrize("name", [*UNIVARIATE, *MULTIVARIATE])
def test_pushed_noise_has_the_law(name):
    d = {**UNIVARIATE, **MULTIVARIATE}[name]()
    assert is_exact(d)
    assert correction(d, jnp.zeros(noise_shape(d)), jnp.zeros(d.shape())) == 0.0
    noise, own = jax.random.split(jax.random.key(1))
    pushed = jax.jit(lambda z: push(d, z))(jax.random.normal(noise, (DRAWS, *noise_shape(d))))
    sampled = OWN_SAMPLERS[name](np.random.default_rng(5)) if name in OWN_SAMPLERS else d.sample(own, (DRAWS,))
    assert pushed.shape[1:] == sampled.shape[1:] == d.shape()
    assert_same_law(pushed, sampled)


def test_hierarchical_law():
    """Parameters that are earlier sites: a plate of Student t's in a random scale and degrees of freedom."""

    def model(z):
        scale = push(dist.HalfNormal(1.0), z[0])
        df = push(dist.Gamma(3.0, 0.5), z[1])
        return push(dist.StudentT(df + 1.0, scale, scale).expand([3]).to_event(1), z[2:])

    rng = np.random.default_rng(5)
    scale, df = np.abs(rng.standard_normal((DRAWS, 1))), rng.gamma(3.0, 2.0, (DRAWS, 1))
    sampled = scale * (1.0 + rng.standard_t(df + 1.0, (DRAWS, 3)))
    assert_same_law(jax.jit(jax.vmap(model))(jax.random.normal(jax.random.key(0), (DRAWS, 5))), sampled)


def free_coordinates(name, value):
    """Coordinates in which NumPyro states the density, for values on a lower-dimensional set."""
    if name == "dirichlet":
        return value[..., :-1]
    if name in ("lkj cholesky", "lkj"):
        return value[np.tril_indices(value.shape[-1], -1)]
    if name in ("wishart cholesky", "inverse wishart"):
        return value[np.tril_indices(value.shape[-1])]
    if name == "zero sum":
        return dist.transforms.ZeroSumTransform(2).inv(value)
    return value


@pytest.mark.parametrize("name", [n for n in MULTIVARIATE if "expanded" not in n])
def test_density_is_the_normal_one_over_the_jacobian(name):
    """log N(z) - log|det T'(z)| = log p(T(z)) and pull(push(z)) = z, in float64."""
    with jax.enable_x64(True):
        make = MULTIVARIATE[name]
        d = make()
        z = 0.8 * jax.random.normal(jax.random.key(3), noise_shape(d), jnp.float64)

        def free(flat):
            return free_coordinates(name, push(d, flat.reshape(z.shape))).ravel()

        def terms(flat):
            jacobian = jax.jacfwd(free)(flat)
            value = push(d, flat.reshape(z.shape))
            return jnp.linalg.slogdet(jacobian)[1], d.log_prob(value).sum(), pull(d, value).ravel()

        logdet, log_density, back = map(np.asarray, compiled(terms, z.ravel()))
        z = np.asarray(z)
    np.testing.assert_allclose(scipy.stats.norm.logpdf(z).sum() - logdet, log_density, atol=1e-5)
    np.testing.assert_allclose(back, z.ravel(), atol=1e-5)


FALLBACKS = {
    "von mises": lambda: dist.VonMises(0.3, 2.0),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(np.array([0.3, 0.7])), dist.Gamma(np.array([1.0, 5.0]), 2.0)
    ),
    "folded normal off centre": lambda: dist.FoldedDistribution(dist.Normal(1.0, 2.0)),
    "batch of mixtures": lambda: dist.MixtureSameFamily(
        dist.Categorical(np.full((2, 2), 0.5)), dist.Normal(np.array([[0.0, 3.0], [1.0, 2.0]]), 1.0)
    ).to_event(1),
    "transformed mixture": lambda: dist.TransformedDistribution(
        dist.MixtureSameFamily(dist.Categorical(np.array([0.3, 0.7])), dist.Normal(np.array([0.0, 3.0]), 1.0)),
        dist.transforms.ExpTransform(),
    ),
    "bivariate von mises": lambda: dist.SineBivariateVonMises(0.1, 0.2, 2.0, 3.0, 0.5),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_correction_of_the_bijection(name):
    """log N(z) + correction = log p(T(z)) + log|det T'(z)|, with T' by differentiation."""
    with jax.enable_x64(True):
        d = FALLBACKS[name]()
        z = jax.random.normal(jax.random.key(0), noise_shape(d), jnp.float64)

        def terms(z):
            value = push(d, z)
            jacobian = jax.jacfwd(lambda flat: push(d, flat.reshape(z.shape)).ravel())(z.ravel())
            right = d.log_prob(value).sum() + jnp.linalg.slogdet(jacobian)[1]
            return value, correction(d, z, value), right, pull(d, value)

        value, total, right, back = map(np.asarray, compiled(terms, z))
        z = np.asarray(z)
    np.testing.assert_allclose(scipy.stats.norm.logpdf(z).sum() + total, right, atol=1e-9)
    np.testing.assert_allclose(back, z, atol=1e-9)
    assert not is_exact(d)
    assert "corrected" in describe_map(d)
    assert value.shape == d.shape()


@pytest.mark.parametrize("mask", [np.array([True, False, True]), False, np.array(False)])
def test_masked_elements_are_flat(mask):
    """log N + correction = NumPyro's masked log density + log|T'|, element by element."""
    with jax.enable_x64(True):
        base = dist.Gamma(np.array([0.5, 2.0, 4.0]), 1.0)
        d = base.mask(mask)
        z = jnp.asarray([0.3, -1.0, 0.8])

        def terms(z):
            value, slope = jax.jvp(lambda z: push(d, z), (z,), (jnp.ones(3),))
            expected = (d.log_prob(value) + jnp.log(slope)).sum()
            return expected, correction(d, z, value), value, push(base, z)

        expected, total, value, unmasked = map(np.asarray, compiled(terms, z))
        z = np.asarray(z)
    np.testing.assert_allclose(scipy.stats.norm.logpdf(z).sum() + total, expected, atol=1e-9)
    np.testing.assert_array_equal(value, unmasked)
    assert not is_exact(d)


def test_a_mask_of_true_changes_nothing():
    for mask in (True, np.ones(3, bool)):
        d = dist.Normal(np.zeros(3), 1.0).mask(mask)
        assert is_exact(d)
        assert correction(d, jnp.zeros(3), jnp.zeros(3)) == 0.0
        assert isinstance(correction(d, jnp.zeros(3), jnp.zeros(3)), float)


def test_mask_and_independent_sum_once():
    """A fallback inside to_event and expand, masked: one term per element."""
    mixture = dist.MixtureSameFamily(dist.Categorical(np.array([0.3, 0.7])), dist.Normal(np.array([0.0, 3.0]), 1.0))
    d = mixture.expand([2, 3]).mask(np.array([[True], [False]])).to_event(1)
    z = jax.random.normal(jax.random.key(0), noise_shape(d))
    total, expected = compiled(lambda z: (correction(d, z, push(d, z)), d.log_prob(push(d, z)).sum()), z)
    np.testing.assert_allclose(scipy.stats.norm.logpdf(z).sum() + total, expected, rtol=1e-5)


def test_delta_needs_no_noise():
    d = dist.Delta(jnp.arange(3.0), event_dim=1)
    assert noise_shape(d) == (0,)
    np.testing.assert_array_equal(push(d, jnp.zeros(0)), np.arange(3.0))
    assert pull(d, jnp.arange(3.0)).shape == (0,)
    assert is_exact(d)
    assert describe_map(d) == "degenerate"
    weighted = dist.Delta(jnp.zeros(2), log_density=jnp.array([1.0, 2.0]))
    assert noise_shape(weighted) == (2, 0)
    assert correction(weighted, jnp.zeros((2, 0)), jnp.zeros(2)) == 3.0
    assert not is_exact(weighted)


@pytest.mark.parametrize(
    ("d", "shape", "words"),
    [
        (dist.Normal(0.0, np.ones((2, 1))).expand([2, 3]).to_event(1), (2, 3), "affine"),
        (dist.Beta(1.0, 2.0), (), "quantile"),
        (dist.Dirichlet(np.ones((2, 4))), (2, 3), "stick-breaking"),
        (dist.LKJCholesky(4, np.ones(2)), (2, 6), "C-vine"),
        (dist.LKJ(3).expand([5]), (5, 3), "C-vine, transformed"),
        (dist.ZeroSumNormal(1.0, (3, 4)), (2, 3), "affine, transformed"),
        (dist.Weibull(1.0, 2.0), (), "closed form"),
        (dist.Wishart(4.0, scale_tril=TRIL), (6,), "Bartlett, transformed"),
        (dist.VonMises(0.0, 1.0).expand([4]), (4,), "bijection, corrected"),
    ],
)
def test_shapes_and_words(d, shape, words):
    assert noise_shape(d) == shape
    assert describe_map(d) == words
    assert jax.eval_shape(lambda z: push(d, z), jnp.zeros(shape)).shape == d.shape()


def test_expanding_broadcasts_parameters():
    """A smaller batch of parameters meets the noise of the expanded shape, row by row."""
    scales = np.array([[1.0], [10.0]])
    z = jax.random.normal(jax.random.key(0), (5, 2, 3))
    np.testing.assert_allclose(push(dist.Normal(0.0, scales).expand([5, 2, 3]), z), scales * z, rtol=1e-6)


@pytest.mark.parametrize(
    "d",
    [
        dist.Multinomial(5, np.ones(3) / 3),
        dist.HurdleGamma(0.3, 1.0, 1.0),
        dist.ImproperUniform(dist.constraints.real, (), ()),
        dist.ProjectedNormal(np.ones(3)),
        dist.LeftCensoredDistribution(dist.Normal(0.0, 1.0), np.array(0)),
    ],
)
def test_refusals_name_the_class(d):
    inner = getattr(getattr(d, "base_dist", d), "base_dist", getattr(d, "base_dist", d))
    name = type(d).__name__ if "Censored" in type(d).__name__ else type(inner).__name__
    with pytest.raises(TypeError, match=name):
        noise_shape(d)


def test_a_subclass_with_another_density_is_not_taken_for_its_parent():
    class Squared(dist.Normal):
        def log_prob(self, value):
            return 2.0 * super().log_prob(value)

    class Renamed(dist.Normal):
        pass

    assert is_exact(Renamed(0.0, 1.0))
    assert describe_map(Squared(0.0, 1.0)) == "bijection, corrected"


def test_gradients_of_a_hierarchy_under_vmap_and_jit():
    """d push / d(parameters) when parameters are pushed themselves, in reverse and forward mode."""

    def value(z):
        concentration = push(dist.LogNormal(0.0, 0.5), z[0])
        weights = push(dist.Dirichlet(concentration * jnp.ones(3)), z[1:3])
        return push(dist.TruncatedNormal(weights[0], weights[1], low=0.0), z[3])

    z = jax.random.normal(jax.random.key(0), (4, 4))
    direction = jnp.ones(4)

    def both(z):
        gradient = jax.grad(value)(z)
        return gradient, gradient @ direction, jax.jvp(value, (z,), (direction,))[1]

    gradient, reverse, forward = compiled(jax.vmap(both), z)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(reverse, forward, rtol=1e-4, atol=1e-6)
