"""Coupling and autoregressive layers: inverse, log-determinant, normalisation, path slopes, in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pushforward as pf
from pushforward.learned import flows
from pushforward.learned._layers import _places

ARCHITECTURES = [a for a in flows.ARCHITECTURES if a != "block_autoregressive"]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def built(architecture, d, condition=None, fast="sampling", layers=3):
    """A map with weights as after some training: flows start at the identity."""
    bijection = pf.Flow(architecture, layers=layers, width=8).build(jax.random.key(0), d, condition, fast)
    changing, rest = flows.trainable(bijection)
    leaves, tree = jax.tree.flatten(changing)
    moved = [w + 0.2 * jax.random.normal(jax.random.key(i), w.shape, w.dtype) for i, w in enumerate(leaves)]
    return eqx.combine(jax.tree.unflatten(tree, moved), rest)


@pytest.mark.parametrize("fast", ["sampling", "density"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inverse_and_log_determinant(architecture, fast, float64):
    for d, condition in ((3, 2), (1, None)):
        bijection = built(architecture, d, condition, fast)
        c = None if condition is None else jnp.array([0.4, -1.0])
        for scale in (1.0, 9.0):  # 9: outside the interval of the splines
            e = scale * jnp.array([0.3, -0.8, 0.5])[:d]
            x, log_det = flows.transform(bijection, e, c)
            back, log_det_back = flows.inverse(bijection, x, c)
            np.testing.assert_allclose(back, e, atol=1e-8)
            np.testing.assert_allclose(log_det_back, -log_det, atol=1e-8)
            jacobian = jax.jacfwd(lambda v, b=bijection, c=c: flows.transform(b, v, c)[0])(e)
            np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], log_det, atol=1e-8)
            if c is not None:
                assert not np.allclose(flows.transform(bijection, e, c + 1)[0], x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_densities_integrate_to_one(architecture, float64):
    """Trapezoid on [-14, 14]^2; the kinks of splines limit it to about 1e-4."""
    bijection = built(architecture, 2, fast="density")
    axis = np.linspace(-14, 14, 401)
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    density = np.exp(jax.vmap(lambda x: flows.log_density(bijection, x))(jnp.asarray(points))).reshape(401, 401)
    assert np.trapezoid(np.trapezoid(density, axis), axis) == pytest.approx(1, abs=1e-3)


def test_the_network_of_blocks_has_its_log_determinant(float64):
    bijection = built("block_autoregressive", 3)
    e = jnp.array([0.3, -0.8, 0.5])
    jacobian = jax.jacfwd(lambda v: flows.transform(bijection, v)[0])(e)
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], flows.transform(bijection, e)[1], atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_path_slope_is_that_of_log_q(architecture, float64):
    bijection = built(architecture, 3)
    e = jnp.array([0.3, -0.8, 0.5])
    x, slope, log_det = flows.path(bijection, e)
    expected, log_det_expected = flows.transform(bijection, e)
    np.testing.assert_allclose(x, expected, atol=1e-10)
    np.testing.assert_allclose(log_det, log_det_expected, atol=1e-10)
    np.testing.assert_allclose(slope, jax.grad(lambda v: flows.log_density(bijection, v))(x), atol=1e-7)


@pytest.mark.parametrize("d", [3, 4, 5, 6, 8, 15])
@pytest.mark.parametrize("layers", [4, 5])
def test_every_coordinate_moves_and_is_seen(d, layers):
    at, first = np.arange(d), np.zeros(d, int)
    for order in _places(layers, d):
        assert sorted(order) == list(range(d))
        first[at[: d // 2]] += 1
        at = at[order]
    assert first.min() >= 1
    assert first.max() < layers
