"""Fixtures that several files share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan


@pytest.fixture
def float64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


def line(x, y=None):
    """A regression with two parameters; cheap, and linear in the noise."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    offset = numpyro.sample("offset", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(slope * x + offset, 0.5), obs=y)


@pytest.fixture
def regression():
    """The model `line` with fresh copies of its arguments."""
    x = np.linspace(-1.0, 1.0, 6)
    y = 0.7 * x + 0.3 + np.array([0.2, -0.4, 0.1, 0.5, -0.3, 0.0])
    return line, {"x": x, "y": y}


def walk(y=None, steps=None):
    """A state-space model: parameters before the scan, initial state, latent and observed sites in it."""
    rho = numpyro.sample("rho", dist.Uniform(0.0, 1.0))
    x0 = numpyro.sample("x0", dist.Normal(0.0, 2.0))

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(rho * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y)
        return x, x

    scan(step, x0, y, length=steps)


@pytest.fixture
def series():
    """The model `walk` with five data."""
    return walk, {"y": np.array([0.5, 1.0, 0.2, -0.4, 0.1])}


@pytest.fixture
def counted():
    """A factory: a model that counts how often its Python body runs, and the list of counts."""

    def make(model):
        calls = []

        # A plain closure over `calls` would change the fingerprint at each run; a default of a partial would too.
        class Counter:
            def __getstate__(self):
                return {}

            def __call__(self):
                calls.append(1)

        count = jax.tree_util.Partial(functools.partial(calls.append, 1)) if False else Counter()
        return count, calls

    return make


@pytest.fixture
def as_float32():
    """Copies arrays, so that one that was traced in float64 is not met again in float32."""
    return lambda values: {name: jnp.asarray(np.array(value)) for name, value in values.items()}
