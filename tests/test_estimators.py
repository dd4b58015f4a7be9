"""Estimators and embeddings: densities against change of variables, losses against closed forms, invariances."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import pushforward as pf
from pushforward._errors import DataError, MethodError
from pushforward._runner import Runner
from pushforward.learned.amortized import Shape
from pushforward.learned.estimators import ConditionalFlow, EnergyMap, FlowMatching, PointEstimate
from pushforward.learned.fitting import Training, fit

DENSE = [
    ConditionalFlow(pf.Flow("coupling_spline", layers=2, width=8)),
    ConditionalFlow(pf.Flow("autoregressive", layers=2, width=8)),
    FlowMatching(width=8, depth=2, steps=40),
    PointEstimate(width=8, depth=1),
]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def shaken(network):
    """Flows start at the identity: weights as after some training."""
    leaves, tree = jax.tree.flatten(network)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [
        w + 0.2 * jax.random.normal(k, w.shape, w.dtype) if eqx.is_inexact_array(w) else w
        for w, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


@pytest.mark.parametrize("estimator", DENSE, ids=lambda e: type(e).__name__)
def test_density_is_that_of_the_push(estimator, float64):
    """log q(T(e)) = log N(e) - log|det dT/de|, by the full Jacobian."""
    network = shaken(estimator.build(jax.random.key(1), 3, 2))
    e, c = jnp.array([0.3, -0.8, 0.5]), jnp.array([0.4, -1.0])
    u, log_q = estimator.weighed(network, e, c)
    jacobian = jax.jacfwd(lambda v: estimator.push(network, v, c))(e)
    expected = norm.logpdf(np.asarray(e)).sum() - np.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(log_q, expected, atol=1e-6)
    np.testing.assert_allclose(estimator.log_density(network, u, c), expected, atol=1e-6)
    # Data that do not matter would pass all of the above.
    assert not np.allclose(estimator.push(network, e, c + 1.0), u)


def test_one_dimension(float64):
    estimator = ConditionalFlow(pf.Flow("coupling_spline", layers=2, width=8))
    network = shaken(estimator.build(jax.random.key(1), 1, 2))
    grid, c = np.linspace(-12, 12, 4001), jnp.array([0.4, -1.0])
    density = np.exp(jax.vmap(lambda u: estimator.log_density(network, u[None], c))(jnp.asarray(grid)))
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-4)


def zeroed(network):
    return jax.tree.map(lambda w: jnp.zeros_like(w) if eqx.is_array(w) else w, network)


def test_energy_loss_is_unbiased():
    """For T(e, c) = e and u = 1: E|e - 1| - E|e - e'| / 2 in closed form; 4000 keys, false-alarm rate 6e-5."""
    estimator = EnergyMap(width=4, depth=1, samples=3)
    network = zeroed(estimator.build(jax.random.key(0), 1, 1))
    network = eqx.tree_at(lambda n: n[0].weight, network, jnp.array([[1.0, 0.0]]))
    losses = jax.vmap(lambda k: estimator.loss(network, jnp.ones(1), jnp.zeros(1), k))(
        jax.random.split(jax.random.key(2), 4000)
    )
    folded = 2 * norm.pdf(1.0) + 1.0 * (2 * norm.cdf(1.0) - 1)
    expected = folded - 0.5 * 2 / np.pi**0.5
    assert losses.mean() == pytest.approx(expected, abs=4 * float(losses.std()) / 4000**0.5)


def test_flow_matching_loss_and_path():
    """A velocity that is constant moves every point by it; its loss is the mean of |v - (u - e)|^2."""
    estimator = FlowMatching(width=4, depth=1, steps=7)
    network = zeroed(estimator.build(jax.random.key(0), 2, 1))
    network = eqx.tree_at(lambda n: n.layers[-1].bias, network, jnp.array([1.0, -2.0]))
    e = jnp.array([0.3, 0.1])
    np.testing.assert_allclose(estimator.push(network, e, jnp.zeros(1)), e + jnp.array([1.0, -2.0]), rtol=1e-5)
    losses = jax.vmap(lambda k: estimator.loss(network, jnp.array([0.5, 0.0]), jnp.zeros(1), k))(
        jax.random.split(jax.random.key(2), 4000)
    )
    # E|b + e|^2 with b = v - u = (0.5, -2) is |b|^2 + 2; false-alarm rate 6e-5.
    assert losses.mean() == pytest.approx(4.25 + 2, abs=4 * float(losses.std()) / 4000**0.5)


def test_sets_do_not_see_the_order_and_padding_is_no_element():
    sets = pf.Sets(outputs=3, width=8, depth=1, varying=True)
    network = sets.build(jax.random.key(0), (4, 2))
    values, present = jax.random.normal(jax.random.key(1), (4, 2)), jnp.ones((4, 2), bool)
    np.testing.assert_allclose(network(values, present), network(values[::-1], present), rtol=1e-5, atol=1e-6)
    fewer = present.at[2:].set(False)
    other = values.at[2:].set(7.0)
    np.testing.assert_allclose(network(values, fewer), network(other, fewer), rtol=1e-5, atol=1e-6)
    assert not np.allclose(network(values, fewer), network(values, present))
    # A set of two equal pairs is not the pair: the number of elements says how sure one may be.
    doubled = values.at[2:].set(values[:2])
    assert not np.allclose(network(doubled, present), network(doubled, fewer))


def test_what_training_hides():
    """The share of numbers left out is uniform up to `missing`: its mean is half of that; false-alarm rate 1e-4."""
    keys, present = jax.random.split(jax.random.key(0), 2000), jnp.ones((20, 2), bool)
    hidden = jax.vmap(lambda k: pf.Vector(missing=0.6).hide(k, present[:, 0]))(keys)
    assert 1 - hidden.mean() == pytest.approx(0.3, abs=0.02)
    times = jax.vmap(lambda k: pf.Series(missing=0.6).hide(k, present))(keys)
    assert 1 - times.mean() == pytest.approx(0.3, abs=0.02)
    np.testing.assert_array_equal(times[..., 0], times[..., 1])
    sizes = jax.vmap(lambda k: pf.Sets(varying=True).hide(k, present))(keys)[..., 0].sum(1)
    assert (sizes.min(), sizes.max()) == (1, 20)
    assert sizes.mean() == pytest.approx(10.5, abs=0.6)
    for embedding in (pf.Vector(), pf.Series(), pf.Sets(), pf.Image()):
        assert embedding.hide(keys[0], present).all()
        assert not embedding.reads_missing


@pytest.mark.parametrize(
    ("embedding", "shapes", "layout", "size"),
    [
        (pf.Vector(), {"a": (), "b": (2, 3)}, (7,), 7),
        (pf.Vector(), {"a": (100,)}, (100,), 32),
        (pf.Vector(missing=0.1), {"a": (5,)}, (5,), 10),
        (pf.Sets(outputs=4), {"a": (6,), "b": (6, 2)}, (6, 3), 4),
        (pf.Series(outputs=5), {"a": (33, 2)}, (33, 2), 5),
        (pf.Image(outputs=6), {"a": (9, 12)}, (9, 12, 1), 6),
    ],
)
def test_layouts(embedding, shapes, layout, size):
    assert embedding.layout(shapes) == layout
    assert embedding.size(layout) == size
    data = {name: np.full(shape, i) for i, (name, shape) in enumerate(sorted(shapes.items()))}
    arranged = embedding.arrange(data, layout)
    assert arranged.shape == layout
    out = embedding.build(jax.random.key(0), layout)(arranged, jnp.ones(layout, bool))
    assert out.shape == (size,)
    assert np.isfinite(out).all()


def test_embeddings_refuse_what_they_cannot_read():
    with pytest.raises(DataError, match=r"Sets reads data sites that share their first axis.*'a': \(3,\)"):
        pf.Sets().layout({"a": (3,), "b": (4,)})
    with pytest.raises(DataError, match="Series reads data sites"):
        pf.Series().layout({"a": ()})
    with pytest.raises(DataError, match=r"Image reads data of shape \(rows, columns\)"):
        pf.Image().layout({"a": (3,)})
    for kind, options in (
        (pf.Vector, {"width": 0}),
        (pf.Sets, {"outputs": 0}),
        (pf.Series, {"kernel": 1}),
        (pf.Image, {"width": True}),
    ):
        with pytest.raises(MethodError, match=rf"{kind.__name__}\({next(iter(options))}=...\) takes an integer"):
            kind(**options)
    with pytest.raises(MethodError, match=r"Vector\(missing=...\) takes a share from 0 to below 1; got 1"):
        pf.Vector(missing=1)
    with pytest.raises(MethodError, match=r"Sets\(varying=...\) takes True or False"):
        pf.Sets(varying=1)
    for kind, name in ((pf.FlowMatching, "steps"), (pf.EnergyMap, "samples"), (pf.PointEstimate, "width")):
        with pytest.raises(MethodError, match=rf"{kind.__name__}\({name}=...\) takes an integer of at least"):
            kind(**{name: 0})


def test_networks_are_rebuilt_from_a_flat_vector():
    shape = Shape(DENSE[0], pf.Sets(width=8), 3, (4, 2))
    weights = shape.weights(jax.random.key(0))
    weights = weights + 0.1 * jax.random.normal(jax.random.key(1), weights.shape)
    embedding, estimator = shape.networks(weights)
    again = shape.networks(jnp.zeros_like(weights))
    values, present = jnp.ones((4, 2)), jnp.ones((4, 2), bool)
    assert not np.allclose(embedding(values, present), again[0](values, present))
    other = shape.networks(shape.weights(jax.random.key(1)))[0]
    assert not np.allclose(embedding(values, present), other(values, present))
    assert shape.estimator.push(estimator, jnp.zeros(3), jnp.zeros(16)).shape == (3,)


def square_loss(weights, batch, key):
    inputs, outputs = batch
    return (inputs @ weights - outputs) ** 2


def test_a_fit_finds_least_squares_and_stops():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((1000, 3))
    outputs = inputs @ np.array([1.0, -2.0, 0.5]) + 0.1 * rng.standard_normal(1000)
    train, held = (inputs[100:], outputs[100:]), (inputs[:100], outputs[:100])
    train, held = jax.tree.map(jnp.asarray, (train, held))
    options = Training(epochs=500, learning_rate=0.02, batch_size=50)
    found = fit(square_loss, jnp.zeros(3), train, held, options, jax.random.key(0), Runner())
    exact = np.linalg.lstsq(inputs[100:], outputs[100:])[0]
    # The held-out loss chooses among weights near the optimum, so the limit is a standard error, .1 / sqrt(900) = .003.
    np.testing.assert_allclose(found.best, exact, atol=0.01)
    losses = np.asarray(found.losses)
    epochs = np.isfinite(losses[1]).sum()
    assert bool(found.done)
    assert epochs < 400
    assert found.lowest == np.nanmin(losses[1])
    assert found.lowest == pytest.approx(0.01, rel=0.5)
