"""Normals: the series to rounding error, the law, and independence of the numbers of a pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pushforward.math.normals import cos_sin, gaussian_pair, log_of_normal_float, normals

COUNT = 1_000_000


def test_series_are_exact_to_rounding(float64):
    rng = np.random.default_rng(0)
    powers = 2.0 ** -np.arange(53.0)
    x = np.concatenate([rng.uniform(size=100_000), powers, 1 - powers[1:], np.sqrt(0.5) * np.array([1 - 2e-16, 1.0])])
    np.testing.assert_allclose(log_of_normal_float(jnp.asarray(x)), np.log(x), rtol=1e-15)
    angle = np.concatenate([rng.uniform(-np.pi / 4, np.pi / 4, 100_000), [0.0, -np.pi / 4, np.pi / 4]])
    for found, exact in zip(cos_sin(jnp.asarray(angle)), (np.cos(angle), np.sin(angle)), strict=True):
        np.testing.assert_allclose(found, exact, rtol=4e-16)


def test_a_pair_is_a_radius_and_an_angle(float64):
    """Against NumPy's own functions: each word of 64 bits is one uniform number, two of its lowest bits turn."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 2**64, (2, 1000), dtype=np.uint64)
    radius = np.sqrt(-2 * np.log1p(-((first >> 12) * 2.0**-52)))
    angle = ((second >> 12) * 2.0**-52 - 0.5) * np.pi / 2
    x, y = np.where(second & 1, -1, 1) * radius * np.cos(angle), radius * np.sin(angle)
    x, y = np.where(second & 2, y, x), np.where(second & 2, x, y)
    for found, exact in zip(gaussian_pair(jnp.asarray(first), jnp.asarray(second)), (x, y), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-13, atol=1e-15)


def test_ends_of_the_bits_are_finite(float64):
    ends = jnp.array([0, 2**64 - 1], jnp.uint64)
    found = np.array(gaussian_pair(ends, ends))
    assert np.isfinite(found).all()
    assert np.hypot(*found).max() == pytest.approx(np.sqrt(2 * 52 * np.log(2)), rel=1e-12)


def test_law_and_independence(float64):
    """False alarms: 1e-6 for Kolmogorov and Smirnov, 6e-7 for each of the moments at 5 errors."""
    z = np.array(jax.jit(lambda k: normals(k, (COUNT // 2, 2)))(jax.random.key(0)))
    assert z.dtype == np.float64
    flat = z.ravel()
    assert stats.kstest(flat, "norm").pvalue > 1e-6
    for power, mean, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)):
        error = np.sqrt((square - mean**2) / COUNT)
        assert abs(np.mean(flat**power) - mean) < 5 * error, power
    # The two numbers of a pair stand half the vector apart.
    a, b = flat[: COUNT // 2], flat[COUNT // 2 :]
    for f in (np.asarray, np.square, np.abs):
        assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 5 / np.sqrt(COUNT / 2)
    quadrants = np.bincount(2 * (a > 0) + (b > 0), minlength=4)
    assert stats.chisquare(quadrants).pvalue > 1e-6


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (5, 0), (2, 3, 5)])
def test_shapes(shape, float64):
    assert normals(jax.random.key(0), shape).shape == shape


def test_single_precision():
    z = normals(jax.random.key(0), (4,))
    assert z.dtype == np.float32
    np.testing.assert_array_equal(z, jax.random.normal(jax.random.key(0), (4,)))


def test_many_keys_are_as_one(float64):
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(lambda k: normals(k, (5,)))(keys)
    for key, row in zip(keys, together, strict=True):
        np.testing.assert_allclose(row, normals(key, (5,)), rtol=1e-14)
