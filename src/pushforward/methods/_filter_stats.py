"""What a filter leaves for judging it: numbers about each step's innovation, and draws of the data that it predicts."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.math.innovations import Innovations
from pushforward.model import by_value
from pushforward.model.state_space import Chain, Moved


def innovation_stats(found: Innovations) -> dict[str, Array]:
    """The group `filter_stats` of a Gaussian filter; the chi-square of a step without data is NaN."""
    return {
        "log_likelihood_increment": found.log_likelihood,
        "innovation_chi_square": jnp.where(found.count > 0, found.chi_square, jnp.nan),
        "innovation_count": found.count,
    }


def data_sites(chain: Chain) -> tuple[str, ...]:
    """Observed sites of a step, in the order of `Observed`: those of the body, then those after the scan."""
    s = chain.structure
    inside = sorted(n for n in s.families if n not in s.first and n not in s.fused)
    return (*inside, *s.fused)


def data_shapes(chain: Chain) -> dict[str, tuple[int, ...]]:
    """Shapes of the data of one step, by site."""
    sites = chain.structure.joint.sites
    return {n: tuple(sites[n].shape[1:]) for n in data_sites(chain)}


def split_data(values: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Data by site from flat vectors (..., m)."""
    found, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        found[name] = values[..., offset : offset + size].reshape(*values.shape[:-1], *shape)
        offset += size
    return found


def with_noise(mean: Array, noise: Array, key: Key) -> Array:
    """Gaussian data (..., m) around their means, from variances (m,) or a covariance (m, m)."""
    white = jax.random.normal(key, mean.shape, mean.dtype)
    if noise.ndim == 1:
        return mean + jnp.sqrt(noise) * white
    return mean + white @ jnp.linalg.cholesky(noise).T


def predicted(
    chain: Chain, state: Array, riders: list[Array], t: Array, noise: Array, key: Key
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sites of a step and new data drawn from their law, at draws of the state before it and of its noise.

    Gaussian data are their mean and noise; others need the body read once more, with data to be drawn. Sites observed
    after the scan have no such reading: where one of them is not Gaussian, no data are drawn.

    Args:
        chain: the model at its parameters.
        state: (draw, n).
        riders: what rides along; with leading axis draw where an entry is random.
        t: number of the step.
        noise: (draw, q).
        key: typed JAX key.

    Returns:
        Site values and data by site, leading axis draw.
    """
    s, shapes = chain.structure, data_shapes(chain)
    gaussian = all(s.families[n][0] == "gaussian" for n in shapes)
    axes = 0 if s.discrete else None
    keys = jax.random.split(key, state.shape[0])
    drawn = not gaussian and not s.fused

    def one(x: Array, riding: list[Array], z: Array, own: Key) -> tuple[dict[str, Array], dict[str, Array]]:
        moved: Moved = chain.step(x, riding, t, z)
        if gaussian:
            values = with_noise(moved.observed.mean, moved.observed.noise, own)
            return moved.sites, split_data(values, shapes)
        return moved.sites, _replicated(chain, x, riding, t, z, own) if drawn else {}

    return jax.vmap(one, (0, axes, 0, 0))(state, riders, noise, keys)


def _replicated(chain: Chain, state: Array, riders: list[Array], t: Array, noise: Array, key: Key) -> Any:
    k = chain.joined_size
    found = by_value.replicated(chain.at(state[:k])).data(state[k:], riders, t, noise, key)
    return {n: found[n] for n in data_sites(chain)}


def along(
    chain: Chain, riders: list[Array], states: Array, noise: Array, key: Key
) -> tuple[dict[str, Array], dict[str, Array]]:
    """`predicted` at each step of a chain whose riders are the same for all draws.

    Args:
        chain: the model at its parameters.
        riders: what rides along before each step, leading axis time.
        states: states before each step, (time, draw, n).
        noise: noise of the steps, (time, draw, q).
        key: typed JAX key.

    Returns:
        Site values and data by site, axes (time, draw, ...).
    """

    def at_time(item: tuple) -> tuple[dict[str, Array], dict[str, Array]]:
        t, riding, state, z = item
        return predicted(chain, state, riding, t, z, jax.random.fold_in(key, t))

    return jax.lax.map(at_time, (jnp.arange(states.shape[0]), riders, states, noise))
