"""Resampling against numpy's inversion and exact expectations; derivatives against closed forms and differences.

Expectations over one uniform are integrated on a grid of midpoints, whose error is below 1 / points for each particle.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from pushforward.math import resampling

SCHEMES = ("systematic", "stratified", "residual", "multinomial")
POINTS = 2000
WEIGHTS = np.array([0.02, 0.31, 0.0, 0.17, 0.25, 0.05, 0.2])
COUNT = 9


@pytest.fixture(autouse=True)
def strict():
    """Float64, and neither ranks nor types promoted in silence."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def compiled(name):
    """A scheme, jitted; one program for each shape and type."""
    return jax.jit(getattr(resampling, name), static_argnums=2)


def over_grid(name, shape=()):
    """Copies (POINTS, N) of each particle with all uniforms equal to each midpoint of a grid."""
    grid = (jnp.arange(POINTS, dtype=jnp.float64) + 0.5) / POINTS
    uniforms = jnp.broadcast_to(grid.reshape((POINTS,) + (1,) * len(shape)), (POINTS, *shape))
    log_weights = jnp.log(jnp.array(WEIGHTS)) + 3.0
    scheme = getattr(resampling, name)
    ancestors = jax.jit(jax.vmap(lambda u: scheme(u, log_weights, COUNT)))(uniforms)
    assert ancestors.dtype == jnp.int32
    assert np.all(np.diff(ancestors, axis=1) >= 0)
    return np.stack([np.bincount(a, minlength=len(WEIGHTS)) for a in np.asarray(ancestors)])


@pytest.mark.parametrize(
    ("name", "shape"), [("systematic_at", ()), ("residual_at", (COUNT,)), ("stratified_at", (COUNT,))]
)
def test_expected_copies_are_exact(name, shape):
    # With equal uniforms in all strata, each slot still has its own law: expectations of the copies are these.
    copies = over_grid(name, shape)
    np.testing.assert_array_equal(copies.sum(1), COUNT)
    np.testing.assert_allclose(copies.mean(0), COUNT * WEIGHTS, atol=1.0 / POINTS)


def test_systematic_copies_are_floor_or_ceiling_with_the_least_variance():
    copies, expected = over_grid("systematic_at"), COUNT * WEIGHTS
    assert np.all((copies == np.floor(expected)) | (copies == np.ceil(expected)))
    part = expected - np.floor(expected)
    np.testing.assert_allclose(copies.var(0), part * (1.0 - part), atol=2.0 / POINTS)


def test_residual_keeps_the_sure_copies_and_stratifies_the_rest():
    expected = COUNT * WEIGHTS
    whole = np.floor(expected).astype(int)
    left = COUNT - whole.sum()
    cumulative = np.cumsum(expected - whole)
    for u in np.random.default_rng(1).random((50, COUNT)):
        extra = np.searchsorted(cumulative, np.arange(left) + u[:left], side="right")
        copies = np.bincount(compiled("residual_at")(jnp.array(u), jnp.log(jnp.array(WEIGHTS)), COUNT), minlength=7)
        np.testing.assert_array_equal(copies, whole + np.bincount(extra, minlength=7))


def test_stratified_and_multinomial_invert_the_cumulative_weights():
    uniforms = np.random.default_rng(0).random((50, COUNT + 1))
    cumulative, log_weights = np.cumsum(WEIGHTS), jnp.log(jnp.array(WEIGHTS)) - 700.0
    sums = np.cumsum(-np.log1p(-uniforms), 1)
    for u, ordered in zip(uniforms, sums[:, :-1] / sums[:, -1:], strict=True):
        strata = (np.arange(COUNT) + u[:-1]) / COUNT
        found = compiled("stratified_at")(jnp.array(u[:-1]), log_weights, COUNT)
        np.testing.assert_array_equal(found, np.searchsorted(cumulative, strata, side="right"))
        found = compiled("multinomial_at")(jnp.array(u), log_weights, COUNT)
        np.testing.assert_array_equal(found, np.searchsorted(cumulative, ordered, side="right"))


def test_multinomial_draws_are_independent_with_the_weights_as_law():
    # Copies over 4000 keys: chi-square with false-alarm rate 1e-6; the mean of (copies - expected)^2 / variance of
    # each particle has standard error about sqrt(2 / 4000) = 0.022 (more with kurtosis): 0.2 is beyond 5 of them.
    keys = jax.random.split(jax.random.key(0), 4000)
    log_weights = jnp.log(jnp.array(WEIGHTS))
    ancestors = np.asarray(jax.jit(jax.vmap(lambda k: resampling.multinomial(k, log_weights, COUNT)))(keys))
    copies = np.stack([np.bincount(a, minlength=len(WEIGHTS)) for a in ancestors])
    present = WEIGHTS > 0
    total, expected = copies.sum(0)[present], len(keys) * COUNT * WEIGHTS[present]
    assert np.sum((total - expected) ** 2 / expected) < chi2.isf(1e-6, present.sum() - 1)
    variance = COUNT * WEIGHTS * (1.0 - WEIGHTS)
    np.testing.assert_allclose(copies.var(0)[present] / variance[present], 1.0, atol=0.2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_vary_as_the_scheme_says(scheme):
    # Over 2000 keys: the mean within 5.5 standard errors, at most those of the multinomial scheme, rate 4e-8 each. The
    # total variance is below the multinomial scheme's, by a third and more.
    log_weights = jnp.log(jnp.array(WEIGHTS))
    keys = jax.random.split(jax.random.key(1), 2000)
    run = jax.jit(jax.vmap(lambda key: getattr(resampling, scheme)(key, log_weights, COUNT)))
    copies = np.stack([np.bincount(a, minlength=len(WEIGHTS)) for a in np.asarray(run(keys))])
    variance = COUNT * WEIGHTS * (1.0 - WEIGHTS)
    assert np.all(np.abs(copies.mean(0) - COUNT * WEIGHTS) <= 5.5 * np.sqrt(variance / len(keys)))
    ratio = copies.var(0).sum() / variance.sum()
    assert 0.9 < ratio < 1.1 if scheme == "multinomial" else 0.05 < ratio < 0.67


def extreme(scheme, count, dtype):
    """Uniforms at both ends of [0, 1) in the shape that a scheme takes."""
    shape = {"stratified": (count,), "residual": (count,), "multinomial": (count + 1,)}.get(scheme, ())
    return [jnp.full(shape, value, dtype) for value in (0.0, 0.5, np.nextafter(dtype(1), dtype(0)))]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weights", [(0, 1, 0), (1, 0, 0), (0, 0, 1), (0.5, 0, 0.5)])
def test_particles_without_weight_are_never_chosen(scheme, dtype, weights):
    allowed = np.flatnonzero(weights)
    for count in (1, 5):
        for uniforms in extreme(scheme, count, dtype):
            found = np.asarray(compiled(f"{scheme}_from")(uniforms, jnp.array(weights, dtype), count))
            assert found.shape == (count,)
            assert np.isin(found, allowed).all()


@pytest.mark.parametrize("spread", [0.1, 4.0])
@pytest.mark.parametrize("scheme", [SCHEMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SCHEMES[1:])])
def test_float32_with_many_particles(scheme, spread):
    size = 100_000
    r = np.random.default_rng(0)
    weights = np.exp(spread * r.standard_normal(size)).astype(np.float32) * (r.random(size) < 0.5)
    weights[-1] = 0.0
    for uniforms in [*extreme(scheme, size, np.float32), None]:
        if uniforms is None:
            uniforms = jax.random.uniform(jax.random.key(2), extreme(scheme, size, np.float32)[0].shape, jnp.float32)
        found = np.asarray(compiled(f"{scheme}_from")(uniforms, jnp.array(weights), size))
        assert found.min() >= 0
        assert found.max() < size - 1
        assert np.all(weights[found] > 0)
        assert np.all(np.diff(found) >= 0)
    expected = size * weights.astype(float) / weights.sum(dtype=float)
    copies = np.bincount(found, minlength=size)
    # Rounding of cumulative sums is about 1e5 * 6e-8 copies, with several terms.
    if scheme != "multinomial":
        assert np.all(copies - expected < (1.1 if scheme == "systematic" else 2.1))
        assert np.all(copies - expected > (-2.1 if scheme == "stratified" else -1.1))


def test_weights_that_are_all_zero_count_as_equal_and_any_scale_is_one():
    nothing = jnp.full(30, -jnp.inf)
    np.testing.assert_array_equal(compiled("systematic_at")(jnp.array(0.3), nothing, 30), np.arange(30))
    log_weights = jnp.array(np.random.default_rng(0).standard_normal(30))
    first, second = (compiled("systematic_at")(jnp.array(0.3), log_weights + s, 30) for s in (-1000.0, 1000.0))
    np.testing.assert_array_equal(first, second)


def test_running_sum_and_maximum():
    for size in (1, 10, 111):
        x = jnp.array(np.random.default_rng(size).integers(0, 1000, size))
        np.testing.assert_array_equal(jax.jit(lambda x: resampling.running(jnp.add, x))(x), np.cumsum(x))
        np.testing.assert_array_equal(
            jax.jit(lambda x: resampling.running(jnp.maximum, x))(x), np.maximum.accumulate(x)
        )


def test_draws_keep_the_order_of_their_uniforms():
    uniforms = np.random.default_rng(0).random((4, 25))
    found = resampling.draws_from(jnp.array(uniforms), jnp.array(3.0 * WEIGHTS))
    np.testing.assert_array_equal(found, np.searchsorted(np.cumsum(WEIGHTS), uniforms, side="right"))


def test_stop_gradient_weights_have_an_unbiased_gradient():
    values, scores = jnp.array([1.0, -2.0, 0.5, 3.0]), jnp.array([0.3, -1.0, 0.1, 0.8])
    grid = (jnp.arange(POINTS, dtype=jnp.float64) + 0.5) / POINTS

    def estimate(theta, uniform):
        # Weights and values both depend on the parameter.
        log_weights, f = theta * scores, values * theta**2
        ancestors = resampling.systematic_at(uniform, log_weights, 6)
        weights = jnp.exp(resampling.stop_gradient_weights(log_weights, ancestors))
        return jnp.mean(weights * f[ancestors])

    def exact(theta):
        return jax.nn.softmax(theta * scores) @ (values * theta**2)

    estimates, gradients = jax.jit(jax.vmap(jax.value_and_grad(estimate), in_axes=(None, 0)))(1.3, grid)
    value, gradient = jax.value_and_grad(exact)(1.3)
    np.testing.assert_allclose(jnp.mean(estimates), value, atol=10.0 / POINTS)
    np.testing.assert_allclose(jnp.mean(gradients), gradient, atol=10.0 / POINTS)
    # The derivative of the values alone misses by far more than the tolerance.
    alone = jax.nn.softmax(1.3 * scores) @ (2.6 * values)
    assert abs(alone - gradient) > 0.2


@pytest.fixture(scope="module")
def moved():
    """`transport`, compiled once for each number of iterations."""
    return jax.jit(resampling.transport, static_argnums=3)


def cloud(size=8, n=2):
    r = np.random.default_rng(3)
    return jnp.array(r.standard_normal((size, n))), jnp.array(r.standard_normal(size))


def test_transport_keeps_the_mean_and_moves_with_the_particles(moved):
    particles, log_weights = cloud()
    mean = jax.nn.softmax(log_weights) @ particles
    for iterations in (1, 200):
        found = moved(particles, log_weights, 0.2, iterations)
        np.testing.assert_allclose(jnp.mean(found, 0), mean, atol=1e-13)
    shifted = moved(3.0 * particles + 5.0, log_weights + 2.0, 0.2, 200)
    np.testing.assert_allclose(shifted, 3.0 * found + 5.0, atol=1e-10)
    # All new particles are the mean when the entropy decides.
    np.testing.assert_allclose(moved(particles, log_weights, 1e6, 1), jnp.ones((8, 1)) * mean[None], atol=1e-4)


def test_transport_solves_the_regularised_problem(moved):
    # In one dimension with little entropy: the average of the weighted quantile function over each 1 / N.
    particles = jnp.array([[0.3], [-1.0], [2.0], [0.9], [-0.2]])
    weights = np.array([0.1, 0.35, 0.0, 0.25, 0.3])
    found = moved(particles, jnp.log(jnp.array(weights)), 0.002, 3000)
    order = np.argsort(particles[:, 0])
    edges = np.concatenate([[0.0], np.cumsum(weights[order])])
    overlap = [[max(0.0, min(b, (j + 1) / 5) - max(a, j / 5)) for a, b in itertools.pairwise(edges)] for j in range(5)]
    exact = np.empty(5)
    exact[order] = 5.0 * np.array(overlap) @ np.asarray(particles)[order, 0]
    np.testing.assert_allclose(found[:, 0], exact, atol=5e-3)


def test_transport_gradient_is_that_of_its_values(moved):
    particles, log_weights = cloud(6)
    projection = jnp.array(np.random.default_rng(4).standard_normal((6, 2)))
    value = jax.jit(lambda x, w: jnp.sum(projection * resampling.transport(x, w, 0.5, 15)))
    in_particles, in_weights = jax.jit(jax.grad(value, (0, 1)))(particles, log_weights)
    step = 1e-5
    for direction in np.random.default_rng(5).standard_normal((3, 6, 3)):
        dx, dw = jnp.array(direction[:, :2]), jnp.array(direction[:, 2])
        ahead = value(particles + step * dx, log_weights + step * dw)
        behind = value(particles - step * dx, log_weights - step * dw)
        exact = jnp.sum(in_particles * dx) + jnp.sum(in_weights * dw)
        np.testing.assert_allclose((ahead - behind) / (2 * step), exact, rtol=1e-7, atol=1e-8)
