"""Weighted moments, kernels and backward moves against numpy, closed forms and exact laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from pushforward.math import particles


@pytest.fixture(autouse=True)
def strict():
    """Float64, and neither ranks nor types promoted in silence."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def compiled(name, *static):
    return jax.jit(getattr(particles, name), static_argnums=static)


def cloud(size=9, n=3, seed=0):
    """Log weights, their weights and particles with correlated components."""
    r = np.random.default_rng(seed)
    log_weights = r.standard_normal(size)
    x = r.standard_normal((size, n)) @ r.standard_normal((n, n)) + 2.0
    return jnp.array(log_weights), np.exp(log_weights) / np.exp(log_weights).sum(), jnp.array(x)


def covariance(weights, x):
    """Sum of W (x - m)(x - m)^T over 1 - sum of W^2, in numpy."""
    x = np.asarray(x) - np.asarray(x)[0]
    a = x - weights @ x
    return (a * weights[:, None]).T @ a / (1.0 - weights @ weights)


def test_normalized_weights():
    log_weights, weights, _ = cloud()
    for shift in (0.0, 1e4, -1e4):
        found = compiled("normalized")(log_weights + shift)
        np.testing.assert_allclose(found.weights, weights, rtol=1e-11)
        np.testing.assert_allclose(found.log_weights, np.log(weights), rtol=1e-11)
        np.testing.assert_allclose(found.log_sum, shift + np.log(np.exp(np.asarray(log_weights)).sum()), rtol=1e-13)
        np.testing.assert_allclose(found.effective, 1.0 / np.sum(weights**2), rtol=1e-11)
    np.testing.assert_allclose(particles.effective_sample_size(log_weights), 1.0 / np.sum(weights**2), rtol=1e-12)


def test_weights_at_the_edge_stay_finite_and_nan_is_not_hidden():
    nothing, single = jnp.full(9, -jnp.inf), jnp.full(9, -jnp.inf).at[4].set(-3000.0)
    found = compiled("normalized")(nothing)
    assert found.log_sum == -jnp.inf
    np.testing.assert_allclose(found.weights, 1.0 / 9.0)
    np.testing.assert_allclose(found.log_weights, -np.log(9.0))
    found = compiled("normalized")(single)
    np.testing.assert_array_equal(found.weights, np.arange(9) == 4)
    assert (found.log_sum, found.effective) == (-3000.0, 1.0)
    assert jnp.isnan(compiled("normalized")(single.at[0].set(jnp.nan)).log_sum)

    def everything(log_weights):
        out = particles.normalized(log_weights)
        return out.log_sum, out.weights @ jnp.arange(9.0), out.effective, out.log_weights[4]

    slopes = jax.jit(jax.jacrev(everything))
    for log_weights in (nothing, single, cloud()[0]):
        assert all(np.all(np.isfinite(slope)) for slope in slopes(log_weights))
    np.testing.assert_allclose(slopes(cloud()[0])[0], cloud()[1], rtol=1e-12)
    np.testing.assert_array_equal(slopes(nothing)[0], 0.0)


def test_weighted_moments():
    log_weights, weights, x = cloud()
    mean, found = compiled("weighted_mean_and_covariance")(log_weights - 800.0, x)
    np.testing.assert_allclose(mean, weights @ x, rtol=1e-12)
    np.testing.assert_allclose(found, covariance(weights, x), rtol=1e-11)
    equal = compiled("weighted_mean_and_covariance")(jnp.zeros(9), x)[1]
    np.testing.assert_allclose(equal, np.cov(x.T), rtol=1e-12)


def test_one_particle_with_all_the_weight_gives_the_unweighted_covariance():
    _, _, x = cloud()
    for dtype, rest in ((np.float64, -jnp.inf), (np.float64, -40.0), (np.float32, -20.0)):
        log_weights = jnp.full(9, rest, dtype).at[2].set(0.0)
        mean, found = compiled("weighted_mean_and_covariance")(log_weights, x.astype(dtype))
        tolerance = 1e-12 if dtype == np.float64 else 1e-5
        np.testing.assert_allclose(mean, x[2], rtol=tolerance)
        np.testing.assert_allclose(found, np.cov(x.T), rtol=10 * tolerance)
    # Just outside the guard, 1 - max W = 8e-9, the weighted one.
    log_weights = jnp.full(9, np.log(1e-9)).at[2].set(0.0)
    weights = np.exp(log_weights) / np.exp(log_weights).sum()
    found = compiled("weighted_mean_and_covariance")(log_weights, x)[1]
    np.testing.assert_allclose(found, covariance(weights, x), rtol=1e-6)
    slope = jax.jit(jax.grad(lambda w, x: jnp.sum(particles.weighted_mean_and_covariance(w, x)[1]), (0, 1)))
    assert all(np.all(np.isfinite(s)) for s in slope(jnp.full(9, -jnp.inf).at[2].set(0.0), x))
    np.testing.assert_array_equal(particles.weighted_mean_and_covariance(jnp.zeros(1), x[:1])[1], 0.0)


def test_covariance_root_even_of_singular_covariances():
    for size, n in ((9, 3), (4, 4), (3, 7)):
        log_weights, weights, x = cloud(size, n)
        root = particles.covariance_root(log_weights, x)
        np.testing.assert_allclose(root.T @ root, covariance(weights, x), atol=1e-12)
    log_weights, weights, x = cloud()
    # A repeated component in other units, and one without spread.
    x = jnp.stack([x[:, 0], 1e8 * x[:, 0], jnp.full(9, 3.0), x[:, 1]], 1)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-4)):
        root = np.asarray(compiled("covariance_root")(log_weights.astype(dtype), x.astype(dtype)), float)
        exact = covariance(weights, x)
        scale = np.sqrt(np.diag(exact)) + (np.diag(exact) == 0)
        np.testing.assert_allclose(
            root.T @ root / np.outer(scale, scale), exact / np.outer(scale, scale), atol=tolerance
        )
        np.testing.assert_array_equal(root[:, 2], np.zeros(len(root)))


def test_jitter_has_the_scaled_covariance_of_the_particles_before_resampling():
    # 200,000 draws: entries of the correlation matrix have standard errors of at most sqrt(2 / 2e5) = 0.0032; 5.5 of
    # them is a false-alarm rate of 4e-8 each.
    log_weights, weights, x = cloud()
    ancestors = jnp.sort(jax.random.randint(jax.random.key(1), (200_000,), 0, 9, jnp.int32))
    noise = np.asarray(compiled("jitter")(jax.random.key(0), x, log_weights, ancestors, 2.4) - x[ancestors])
    exact = (2.4 * 9 ** (-1 / 7)) ** 2 * covariance(weights, x)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    np.testing.assert_allclose(noise.T @ noise / len(noise) / scale, exact / scale, atol=0.0175)
    np.testing.assert_allclose(noise.mean(0) / np.sqrt(np.diag(exact)), 0.0, atol=5.5 / np.sqrt(len(noise)))


def test_jitter_moves_those_it_is_told_to():
    log_weights, _, x = cloud()
    ancestors = jnp.array([0, 0, 1, 3, 3, 3, 5, 8, 8], jnp.int32)
    twice = [True, True, False, True, True, True, False, True, True]
    np.testing.assert_array_equal(particles.copied(ancestors), twice)
    assert particles.distinct(ancestors) == 5
    found = compiled("jitter")(jax.random.key(0), x, log_weights, ancestors, 1.0, particles.copied(ancestors))
    np.testing.assert_array_equal(np.any(found != x[ancestors], axis=1), twice)
    # A collapsed ensemble is spread again, without NaN.
    single = jnp.full(9, -jnp.inf).at[2].set(0.0)
    found = compiled("jitter")(jax.random.key(0), x, single, jnp.full(9, 2, jnp.int32), 1.0, True)
    assert np.all(np.isfinite(found))
    assert np.all(found != x[2][None])


def test_liu_west_keeps_mean_and_covariance():
    # Means over 20,000 keys with standard errors from the keys: 5.5 of them is a false-alarm rate of 4e-8 each.
    log_weights, weights, x = cloud()
    keys = jax.random.split(jax.random.key(0), 20_000)

    def moments(key):
        return particles.weighted_mean_and_covariance(log_weights, particles.liu_west(key, x, log_weights, 0.7))

    means, covariances = jax.jit(jax.vmap(moments))(keys)
    for found, exact in ((means, weights @ x), (covariances, covariance(weights, x))):
        error = np.std(found, axis=0) / np.sqrt(len(keys))
        assert np.all(np.abs(np.mean(found, axis=0) - exact) < 5.5 * error)
    assert float(jnp.std(means[:, 0])) > 0.01
    np.testing.assert_allclose(particles.liu_west(keys[0], x, log_weights, 1.0), x, atol=1e-12)


PRIOR = np.array([0.1, 0.0, 0.3, 0.35, 0.25])
DENSITY = np.array([2.0, 5.0, 0.2, 0.7, 0.0])


def chains(current, moves, seed):
    """Moves of many trajectories that share one next state."""
    with np.errstate(divide="ignore"):
        log_weights, log_density = jnp.array(np.log(PRIOR)) + 2.0, jnp.array(np.log(DENSITY))
    run = jax.jit(lambda k, a, w, d: particles.backward_moves(k, a, w, lambda i: d[i], moves))
    return run(jax.random.key(seed), current, log_weights, log_density)


def distance(found, law):
    """Chi-square of independent indices against their law, and its quantile at false-alarm rate 1e-6."""
    present = law > 0
    count = np.bincount(found, minlength=len(law))
    assert np.all(count[~present] == 0)
    expected = len(found) * law[present]
    return np.sum((count[present] - expected) ** 2 / expected), chi2.isf(1e-6, present.sum() - 1)


def test_backward_moves_keep_and_reach_the_smoothing_law():
    law = PRIOR * DENSITY / (PRIOR @ DENSITY)
    with np.errstate(divide="ignore"):
        weights = particles.backward_weights(jnp.array(np.log(PRIOR)), jnp.array(np.log(DENSITY)))
    np.testing.assert_allclose(jnp.exp(weights), law, atol=1e-14)
    size = 40_000
    start = np.random.default_rng(0).choice(5, size, p=law)
    found, accepted = chains(jnp.array(start, jnp.int32), 1, 1)
    assert found.dtype == jnp.int32
    value, bound = distance(np.asarray(found), law)
    assert value < bound
    # The rate of acceptance is known: 5.5 standard errors of independent trials.
    ratio = np.divide(DENSITY[None], DENSITY[:, None], out=np.zeros((5, 5)), where=DENSITY[:, None] > 0)
    rate = law @ np.minimum(1.0, ratio) @ PRIOR
    assert abs(float(accepted) - rate) < 5.5 * np.sqrt(rate * (1.0 - rate) / size)
    # From any start 60 moves come within (1 - PRIOR @ DENSITY / 2)^60 = 3e-8 of the law, 2 being the largest density.
    found, _ = chains(jnp.full(size, 4, jnp.int32), 60, 2)
    value, bound = distance(np.asarray(found), law)
    assert value < bound
    # One move from there is far from it, so that the test can tell.
    value, bound = distance(np.asarray(chains(jnp.full(size, 3, jnp.int32), 1, 3)[0]), law)
    assert value > 10.0 * bound
