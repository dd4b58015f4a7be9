"""Flows of every architecture: inverse, log-determinant, normalisation, and the slope of log q along a path."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import pushforward as pf
from pushforward._errors import MethodError
from pushforward.learned import flows
from pushforward.learned.flows import ARCHITECTURES


def flow(name):
    return pf.Flow(name, layers=2, width=8, knots=4)


def bent(name, dimension, weights, condition=None, fast="sampling"):
    """A bijection with given weights, to be called inside `jit`."""
    changing, rest = flows.trainable(flow(name).build(jax.random.key(0), dimension, condition, fast))
    return eqx.combine(ravel_pytree(changing)[1](weights), rest)


def weights_far_from_the_identity(name, dimension, condition=None, fast="sampling", strength=0.4):
    start = jax.jit(lambda: flows.weights_of(flow(name).build(jax.random.key(0), dimension, condition, fast)))()
    return start + strength * np.random.default_rng(1).normal(size=start.shape)


def noise(n, d):
    return jnp.asarray(1.5 * np.random.default_rng(2).normal(size=(n, d)))


def each(f):
    """`f` for every row, compiled as a whole."""
    return jax.jit(jax.vmap(f))


FAST = [("coupling_spline", 3, "sampling"), ("autoregressive", 3, "sampling"), ("coupling", 1, "sampling")]
CASES = [(name, d, "sampling") for name in ARCHITECTURES[:4] for d in (1, 3)]
CASES += [("block_autoregressive", 3, "sampling"), ("autoregressive_spline", 3, "density")]
CASES = [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("name", "dimension", "fast"), CASES)
def test_inverse_log_determinants_and_slopes(name, dimension, fast):
    closed = name != "block_autoregressive"
    with jax.enable_x64(True):
        weights, e = weights_far_from_the_identity(name, dimension, fast=fast), noise(10, dimension)

        @each
        def everything(e):
            bijection = bent(name, dimension, weights, fast=fast)
            x, log_det = flows.transform(bijection, e)
            jacobian = jax.jacfwd(lambda v: flows.transform(bijection, v)[0])(e)
            base_slope = jax.grad(lambda v: -0.5 * jnp.sum(v**2) - flows.transform(bijection, v)[1])(e)
            back, log_det_back = flows.inverse(bijection, x)
            slope = jax.grad(lambda v: flows.log_density(bijection, v))(x) if closed else 0 * x
            return x, log_det, jacobian, base_slope, back, log_det_back, slope, flows.path(bijection, e)

        x, log_det, jacobian, base_slope, back, log_det_back, slope, path = everything(e)
        assert np.abs(x - e).max() > 0.1
        np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-8)
        # The inverse of the last architecture is a search by FlowJAX, which stops early.
        np.testing.assert_allclose(back, e, atol=1e-6 if closed else 2e-2)
        np.testing.assert_allclose(path[0], x, atol=1e-10)
        np.testing.assert_allclose(path[2], log_det, atol=1e-10)
        np.testing.assert_allclose(jnp.einsum("nji,nj->ni", jacobian, path[1]), base_slope, atol=1e-8)
        if closed:
            np.testing.assert_allclose(log_det_back, -log_det, atol=1e-5)
            np.testing.assert_allclose(path[1], slope, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("coupling_spline", 3),
        ("autoregressive", 1),
        pytest.param("coupling_spline", 1, marks=pytest.mark.slow),
        pytest.param("autoregressive_spline", 3, marks=pytest.mark.slow),
    ],
)
def test_conditions(name, dimension):
    with jax.enable_x64(True):
        weights, e = weights_far_from_the_identity(name, dimension, condition=2), noise(5, dimension)

        @each
        def both(e):
            bijection = bent(name, dimension, weights, condition=2)
            near, far = (flows.transform(bijection, e, c)[0] for c in (jnp.zeros(2), jnp.ones(2)))
            return near, far, flows.inverse(bijection, far, jnp.ones(2))[0]

        near, far, back = both(e)
        # Every coordinate sees the condition, the first of an autoregressive layer too.
        assert np.abs(near - far).min() > 1e-6
        np.testing.assert_allclose(back, e, atol=1e-6)


@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "coupling_spline" else pytest.mark.slow) for n in ARCHITECTURES[:4]]
)
def test_density_integrates_to_one(name, dimension):
    with jax.enable_x64(True):
        weights = weights_far_from_the_identity(name, dimension, strength=0.2)
        grid = np.linspace(-14, 14, {1: 3001, 2: 401}[dimension])
        x = jnp.asarray(np.stack(np.meshgrid(*[grid] * dimension, indexing="ij"), -1).reshape(-1, dimension))
        density = each(lambda v: jnp.exp(flows.log_density(bent(name, dimension, weights), v)))(x)
        # Kinks in the second derivative of splines slow the trapezoid rule down.
        assert abs(float(jnp.sum(density)) * (grid[1] - grid[0]) ** dimension - 1) < 2e-3


def test_block_autoregressive_pushes_noise_to_its_density():
    # Without an inverse the density is known where noise goes: in one dimension the map is increasing, so that its
    # values and log-determinants, integrated, give back the distance between its ends.
    with jax.enable_x64(True):
        weights = weights_far_from_the_identity("block_autoregressive", 1)
        e = jnp.linspace(-4, 4, 4001)[:, None]
        x, log_det = each(lambda v: flows.transform(bent("block_autoregressive", 1, weights), v))(e)
        np.testing.assert_allclose(np.trapezoid(np.exp(log_det), e[:, 0]), abs(x[-1, 0] - x[0, 0]), rtol=1e-5)


@functools.cache
def slopes_of_weights(name):
    """Slopes by the weights of the path term and of the scores, and what they must be."""
    with jax.enable_x64(True):
        weights, e = weights_far_from_the_identity(name, 3), noise(6, 3)

        def pushed(w, e):
            return flows.transform(bent(name, 3, w), e)[0]

        def reference(w):
            # log q at frozen weights through the inverse, as Roeder et al. (2017) write it
            x = jax.vmap(lambda v: pushed(w, v))(e)
            return jnp.sum(jnp.sin(x)) - jnp.sum(jax.vmap(lambda v: flows.log_density(bent(name, 3, weights), v))(x))

        def scores(w):
            x = jax.vmap(lambda v: pushed(weights, v))(e)
            return jnp.sum(jax.vmap(lambda v: flows.log_density(bent(name, 3, w), v))(x))

        def ours(w, score):
            x, slope, log_det = jax.vmap(lambda v: flows.path(bent(name, 3, w), v, score=True))(e)
            return jnp.sum(-log_det if score else jnp.sin(x)) - jnp.sum(slope * x)

        @jax.jit
        def all_slopes(w):
            found = jax.grad(ours)(w, False), jax.grad(ours)(w, True)
            return found, (jax.grad(reference)(w), jax.grad(scores)(w))

        return all_slopes(weights)


@pytest.mark.parametrize("term", [0, 1])
@pytest.mark.parametrize("name", ["coupling_spline", pytest.param("autoregressive", marks=pytest.mark.slow)])
def test_slopes_by_the_weights(name, term):
    found, exact = (np.asarray(values[term]) for values in slopes_of_weights(name))
    np.testing.assert_allclose(found, exact, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("name", ARCHITECTURES[:4])
def test_layers_begin_as_the_identity_but_for_places(name):
    e = jnp.arange(4.0)
    x, log_det = jax.jit(lambda v: flows.transform(pf.Flow(name).build(jax.random.key(3), 4), v))(e)
    np.testing.assert_allclose(np.sort(x), e, atol=1e-5)
    assert abs(float(log_det)) < 1e-4


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: pf.Flow("planar"), r"Flow\(architecture\) takes one of .*got 'planar'"),
        (lambda: pf.Flow(layers=0), r"Flow\(layers=...\) takes an integer of at least 1; got 0"),
        (lambda: pf.Flow(knots=2.5), r"Flow\(knots=...\) takes an integer of at least 1; got 2.5"),
    ],
)
def test_bad_flows(make, text):
    with pytest.raises(MethodError, match=text):
        make()
