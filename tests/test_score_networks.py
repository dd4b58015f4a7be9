"""Networks of score-based trajectory sampling: shapes, symmetries, what they depend on, and what they refuse."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from pushforward._errors import MethodError
from pushforward.learned.flows import trainable
from pushforward.learned.score_networks import WindowMLP, check_network
from pushforward.learned.score_transformer import TrajectoryTransformer
from pushforward.learned.score_unets import FieldUNet, TemporalUNet

KEY = jax.random.key(0)
NETWORKS = {
    "window": (WindowMLP(width=8, depth=2), (5, 3), 2),
    "temporal": (TemporalUNet(channels=(4, 6), blocks=2), (7, 3), 2),
    "field": (FieldUNet(channels=(4,), blocks=1), (3, 4, 6, 2), 1),
    "transformer": (TrajectoryTransformer(width=8, depth=2, heads=2), (6, 3), 2),
}


def perturbed(options, shape, parameters):
    """The network with random weights everywhere, so that nothing is zero."""
    rng = np.random.default_rng(1)

    def filled(leaf):
        size = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.3
        return jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(filled, eqx.filter_eval_shape(options.build, KEY, shape, parameters))


def compiled(options, shape, parameters):
    return eqx.filter_jit(perturbed(options, shape, parameters))


def inputs(shape, parameters, batch=()):
    rng = np.random.default_rng(2)
    return tuple(jnp.asarray(rng.normal(size=(*batch, *part)), float) for part in (shape, (), (parameters,)))


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_derivatives_and_what_a_network_depends_on(name):
    options, shape, parameters = NETWORKS[name]
    assert options.why_not(shape) is None
    initial = eqx.filter_jit(options.build)(KEY, shape, parameters)
    check_network(initial, shape, parameters)
    x, condition, given = inputs(shape, parameters, (3,))

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, 0, 0, 0))
    def everything(network, x, condition, given, direction):
        out, push = jax.linearize(lambda v: network(v, condition, given), x)
        _, pull = jax.vjp(lambda n, *a: n(*a), network, x, condition, given)
        return out, push(direction), pull(direction)

    np.testing.assert_array_equal(everything(initial, x, condition, given, x)[0], np.zeros((3, *shape)))
    network = perturbed(options, shape, parameters)
    assert ravel_pytree(trainable(network)[0])[0].dtype == jnp.float32
    out, pushed, (weights, pulled, by_level, by_given) = everything(network, x, condition, given, x[::-1])
    assert out.shape == (3, *shape)
    assert out.dtype == jnp.float32
    # c . (J c) forward is (J^t c) . c backward.
    np.testing.assert_allclose(np.sum(pushed * x[::-1]), np.sum(pulled * x[::-1]), rtol=1e-3)
    assert np.all(np.abs(by_level) > 1e-3)
    assert np.all(np.abs(by_given) > 1e-3)
    unused = [path for path, v in jax.tree_util.tree_leaves_with_path(weights) if not np.any(np.asarray(v))]
    assert unused == []


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NETWORKS)
def test_float64_is_kept(name):
    options, shape, parameters = NETWORKS[name]
    network = perturbed(options, shape, parameters)
    x, condition, given = inputs(shape, parameters)
    program = str(jax.make_jaxpr(network)(x, condition, given))
    assert "f64[" in program
    assert "f32[" not in program
    assert eqx.filter_eval_shape(network, x.astype("float32"), condition, given).dtype == jnp.float32


@pytest.mark.parametrize(
    "network", [TemporalUNet(channels=(4, 6, 5)), TrajectoryTransformer(width=8, depth=1, heads=2)]
)
@pytest.mark.parametrize("length", [1, 2, 9, 24])
def test_networks_of_trajectories_take_other_lengths(network, length):
    assert network.any_length
    built = perturbed(network, (7, 2), 0)
    check_network(built, (length, 2), 0)


def check_shape(options, built, called):
    """The call of a network built for one shape with another, by shapes alone."""
    eqx.filter_eval_shape(lambda *a: options.build(KEY, built, 0)(*a), *inputs(called, 0))


def test_windows_and_fields_refuse_other_lengths():
    assert not WindowMLP.any_length
    assert not FieldUNet.any_length
    for options, shape in ((WindowMLP(width=4, depth=1), (5, 3)), (FieldUNet(channels=(4,), blocks=1), (5, 2, 2))):
        with pytest.raises(MethodError, match=r"built for windows of shape \(5, .*got \(6, "):
            check_shape(options, shape, (6, *shape[1:]))
    for options in (TemporalUNet(channels=(4,)), TrajectoryTransformer(width=8, heads=2)):
        with pytest.raises(MethodError, match=r"built for states of shape \(3,\); got \(2,\)"):
            check_shape(options, (5, 3), (5, 2))


# ------------------------------------------------------------------------------------------------------ symmetries


@pytest.mark.usefixtures("float64")
def test_circular_fields_commute_with_shifts_by_coarse_cells():
    network = compiled(FieldUNet(channels=(4, 6), blocks=1), (3, 4, 6, 2), 0)
    x, condition, given = inputs((3, 4, 6, 2), 0)
    out = network(x, condition, given)
    for shift in ((2, 0), (0, 2), (2, 4)):
        moved = network(jnp.roll(x, shift, (1, 2)), condition, given)
        np.testing.assert_allclose(moved, jnp.roll(out, shift, (1, 2)), atol=1e-12)
    # A shift by less than a coarse cell is no symmetry, and neither is any with edges.
    moved = network(jnp.roll(x, 1, 1), condition, given)
    assert jnp.max(jnp.abs(moved - jnp.roll(out, 1, 1))) > 1e-3
    edges = compiled(FieldUNet(channels=(4, 6), blocks=1, padding="zero"), (3, 4, 6, 2), 0)
    moved = edges(jnp.roll(x, 2, 1), condition, given)
    assert jnp.max(jnp.abs(moved - jnp.roll(edges(x, condition, given), 2, 1))) > 1e-3


def test_fields_take_states_in_their_order():
    # One scale and kernels of one cell: a cell's result depends on the same cell alone.
    network = compiled(FieldUNet(channels=(4,), blocks=1, kernel=1), (3, 2, 4, 2), 0)
    x, condition, given = inputs((3, 2, 4, 2), 0)
    change = network(x.at[:, 1, 2].add(1.0), condition, given) - network(x, condition, given)
    np.testing.assert_array_equal(np.argwhere(np.abs(change).sum((0, 3)) > 0), [[1, 2]])


@pytest.mark.usefixtures("float64")
def test_trajectories_commute_with_shifts_in_their_interior():
    network = compiled(TemporalUNet(channels=(4, 6), blocks=1), (80, 2), 0)
    x, condition, given = inputs((84, 2), 0)
    whole, later = network(x[:80], condition, given), network(x[4:], condition, given)
    # A state sees at most 5 convolutions of one step at the fine scale, 2 at the coarse, and one cell: 10 steps.
    np.testing.assert_allclose(whole[16:64], later[12:60], atol=1e-12)
    assert jnp.max(jnp.abs(whole[4:8] - later[:4])) > 1e-3, "the start is not seen"
    odd = network(x[1:81], condition, given)
    assert jnp.max(jnp.abs(whole[17:64] - odd[16:63])) > 1e-3, "a shift by less than a coarse cell is no symmetry"


@pytest.mark.usefixtures("float64")
def test_what_is_padded_does_not_matter():
    built = perturbed(TemporalUNet(channels=(4, 6), blocks=2), (7, 2), 0)
    x, condition, given = inputs((7, 2), 0)
    run = eqx.filter_jit(built.unet)
    padded = jnp.pad(x, ((0, 9), (0, 0)))
    found = [run(padded, (jnp.arange(16) < n)[:, None] * 1.0, condition, given, "zero")[:7] for n in (7, 8)]
    out = eqx.filter_jit(built)(x, condition, given)
    np.testing.assert_allclose(out, found[0], atol=1e-12)
    assert jnp.max(jnp.abs(out - found[1])) > 1e-3, "the end is not told apart from a state that happens to be zero"


@pytest.mark.usefixtures("float64")
def test_attention_knows_how_far_apart_states_are():
    network = compiled(TrajectoryTransformer(width=16, depth=1, heads=2), (30, 1), 0)
    x = jnp.zeros((30, 1))
    at = jnp.zeros(()), jnp.zeros(0)
    out = network(x, *at)
    effect = [jnp.abs(network(x.at[i].set(1.0), *at) - out)[15, 0] for i in (5, 10, 22)]
    # Far above 1e-16, the rounding of float64. Without positions states 5 and 10, off the ends, would do the same.
    assert min(effect) > 1e-10, "all states are seen"
    assert abs(effect[0] / effect[1] - 1) > 0.01, "and told apart by their distance"


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WindowMLP(width=0), r"WindowMLP\(width=\.\.\.\) takes an integer of at least 1; got 0"),
        (lambda: WindowMLP(depth=True), r"WindowMLP\(depth=\.\.\.\) takes an integer of at least 1; got True"),
        (lambda: TemporalUNet(channels=64), r"TemporalUNet\(channels=\.\.\.\) takes a positive integer for each scale"),
        (lambda: TemporalUNet(channels=()), r"such as \(64, 128\); got \(\)"),
        (lambda: TemporalUNet(channels=(8, True)), r"channels=\.\.\..*got \(8, True\)"),
        (lambda: TemporalUNet(kernel=4), r"TemporalUNet\(kernel=\.\.\.\) takes an odd number; got 4"),
        (lambda: FieldUNet(blocks=0), r"FieldUNet\(blocks=\.\.\.\) takes an integer of at least 1; got 0"),
        (lambda: FieldUNet(padding="same"), r"one of \['circular', 'zero'\]; got 'same'"),
        (lambda: TrajectoryTransformer(width=12, heads=4), r"a multiple of 2 heads, here 8; got 12"),
        (lambda: FieldUNet(channels=(4, 4, 4)).build(KEY, (5, 6, 8), 0), r"divisible by 4; got 6 x 8. Use fewer"),
        (lambda: FieldUNet().build(KEY, (5, 3), 0), r"takes states of shape \(rows, columns\).*got \(3,\)"),
        (lambda: WindowMLP().build(KEY, (5, 0), 0), r"each of at least 1; got the shape \(5, 0\)"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, match):
    with pytest.raises(MethodError, match=match):
        make()


def test_options_are_values():
    assert TemporalUNet(channels=[48, 64, 96]) == TemporalUNet()
    assert hash(TemporalUNet(kernel=5)) == hash(TemporalUNet(kernel=5))
    assert TemporalUNet(kernel=5) != TemporalUNet()
    assert jax.tree.leaves(FieldUNet()) == []


class Own(eqx.Module):
    """A network as a user writes it: `kind` says what is wrong with it."""

    kind: str = eqx.field(static=True)

    def __call__(self, x, condition, given):
        results = {
            "good": lambda: x * condition + jnp.sum(given),
            "transposed": lambda: x.T,
            "integer": lambda: jnp.zeros(x.shape, int),
            "pair": lambda: (x, x),
            "failing": lambda: x @ x,
        }
        return results[self.kind]()


class Uncalled(eqx.Module):
    """No network."""


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (Own("transposed"), r"given Own, which returned float32 of shape \(3, 5\) for x of shape \(5, 3\).*shape of x"),
        (Own("integer"), r"returned int32 of shape \(5, 3\).*of floating point"),
        (Own("pair"), r"given Own, which returned \(.*given of shape \(2,\)\. Expected"),
        (Own("failing"), r"whose call with x of shape \(5, 3\), a scalar condition .* failed: TypeError: .*Expected"),
        (eqx.nn.MLP(3, 3, 4, 1, key=KEY), r"given MLP, whose call with .* failed: "),
        (Uncalled(), r"takes pf\.WindowMLP\(\).*got Uncalled\(\)"),
        (jnp.sin, r"an Equinox module with a __call__"),
    ],
)
def test_a_network_of_the_users_own_is_checked(network, match):
    check_network(Own("good"), (5, 3), 2)
    with pytest.raises(MethodError, match=match):
        check_network(network, (5, 3), 2)
