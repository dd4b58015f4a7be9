"""Rational-quadratic splines: exact identities of the map, its slope and its inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushforward.math.splines import positive, spline, spline_inverse

BOUND = 3.0


@pytest.fixture
def numbers():
    """Free numbers of a strongly bent spline of 6 bins."""
    return 3.0 * np.random.default_rng(0).normal(size=17)


@jax.jit
def at(x, numbers):
    return spline(x, jnp.broadcast_to(jnp.asarray(numbers), (len(x), len(numbers))), BOUND)


def test_zeros_give_the_identity():
    with jax.enable_x64(True):
        x = np.linspace(-4, 4, 101)
        y, slope = at(x, np.zeros(17))
        np.testing.assert_allclose(y, x, atol=1e-14)
        np.testing.assert_allclose(slope, 1, atol=1e-13)


def test_slope_is_the_derivative_and_positive(numbers):
    with jax.enable_x64(True):
        x = np.linspace(-3.5, 3.5, 203)
        _, slope = at(x, numbers)
        exact = jax.jit(jax.vmap(jax.grad(lambda v: at(v[None], numbers)[0][0])))(x)
        np.testing.assert_allclose(slope, exact, rtol=1e-10)
        assert slope.min() > 0
        assert slope.max() / slope.min() > 20  # bent strongly


def test_value_and_slope_are_continuous_and_meet_the_identity(numbers):
    with jax.enable_x64(True):
        bins = np.asarray(positive(jnp.asarray(numbers[:6])))
        knots = -BOUND + 2 * BOUND * np.cumsum(bins) / bins.sum()
        below, above = at(knots - 1e-9, numbers), at(knots + 1e-9, numbers)
        np.testing.assert_allclose(below[0], above[0], atol=1e-6)
        np.testing.assert_allclose(below[1], above[1], rtol=1e-4)
        np.testing.assert_allclose(at(np.array([-BOUND, BOUND, 7.0]), numbers)[0], [-BOUND, BOUND, 7.0], atol=1e-12)


def test_inverse(numbers):
    with jax.enable_x64(True):
        x = jnp.linspace(-3.5, 3.5, 203)
        y, slope = at(x, numbers)
        many = jnp.broadcast_to(jnp.asarray(numbers), (len(x), 17))
        back, again = jax.jit(spline_inverse, static_argnums=2)(y, many, BOUND)
        np.testing.assert_allclose(back, x, atol=1e-9)
        np.testing.assert_allclose(again, slope, rtol=1e-6)


def test_positive_is_increasing_and_one_at_zero():
    x = jnp.linspace(-50.0, 50.0, 1001)
    assert float(positive(jnp.zeros(()))) == 1
    assert np.all(np.diff(positive(x)) > 0)
    assert float(positive(x).min()) > 1e-3
