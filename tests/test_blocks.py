"""Independent blocks are found by structure, never by the values of one step."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from pushforward.model.blocks import blocks
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space

SERIES = 3


def chain(move, observe=lambda x: x):
    """A plate of series, each with a state of two entries that `move` takes to the next mean."""

    def model(y):
        x0 = numpyro.sample("x0", dist.Normal(0, 1).expand([SERIES, 2]).to_event(2))

        def step(carry, y):
            x, t = carry
            with numpyro.plate("series", SERIES):
                x = numpyro.sample("x", dist.Normal(move(x, t), 0.5).to_event(1))
                numpyro.sample("y", dist.Normal(observe(x)[:, 0], 1.0), obs=y)
            return (x, t + 1), None

        scan(step, (x0, 0), y)

    return read_state_space(read_problem(model, (), {"y": np.ones((6, SERIES))}))


def rotate(x, t):
    return x @ jnp.array([[0.9, 0.2], [-0.2, 0.9]])


def test_members_of_a_plate_are_blocks():
    found = blocks(chain(rotate))
    assert found.count == SERIES
    np.testing.assert_array_equal(found.state, [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(found.data, [[0], [1], [2]])
    np.testing.assert_array_equal(found.initial, found.state)


@pytest.mark.parametrize(
    "move",
    [
        lambda x, t: x + 0.1 * jnp.sum(x, 0),
        lambda x, t: jnp.where(t == 4, x[::-1], x),
        lambda x, t: x[jnp.where(t == 4, jnp.array([2, 0, 1]), jnp.arange(SERIES))],
        lambda x, t: jnp.concatenate([x[:1] + x[1:2], x[1:]]),
    ],
    ids=["sum", "swapped at one time", "indexed by time", "two of three"],
)
def test_whatever_may_couple_at_any_time_is_one_block_or_uneven(move):
    assert blocks(chain(move)) is None


def test_data_couple_states():
    assert blocks(chain(rotate, lambda x: x + jnp.mean(x, 0))) is None
