"""Draws of trajectories from a trained denoiser, given the data of a series."""

import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.learned.score_model import ScoreModel
from pushforward.math.guidance import Observe, gaussian, with_terms
from pushforward.methods._score_guidance import Guidance, curvatures
from pushforward.methods._score_samplers import Sampler
from pushforward.model.series import Reading, Series

_MEMORY = 2**24
"""Numbers that the draws that are made at once may take."""


def observations(reading: Reading, model: ScoreModel) -> Observe:
    """What the data of a series say of standardised trajectories."""
    series = reading.series
    centre = reading.seen(model.raw(jnp.zeros((series.rows, *model.state), model.weights.dtype)))

    def observe(clean: Array):
        found = gaussian(
            lambda x: reading.seen(model.raw(x)).mean, centre.data, lambda x: reading.seen(model.raw(x)).variances
        )
        return found(clean)

    if centre.terms.size == 0:
        return observe
    return with_terms(observe, lambda x: reading.seen(model.raw(x)).terms)


def at_once(draws: int, size: int, dense: bool) -> int:
    """How many trajectories of `size` numbers are drawn together."""
    return max(1, min(draws, _MEMORY // (size * (size if dense else 256))))


def sample(
    series: Series,
    model: ScoreModel,
    chosen: Guidance,
    sampler: Sampler,
    parameters: dict[str, Array],
    given: Array,
    key: Key,
    draws: int,
) -> Array:
    """Trajectories given the data, (draws, rows, *state), in their own units.

    Args:
        series: the model with its data.
        model: the learned prior.
        chosen: how data are taken into account.
        sampler: how draws are made.
        parameters: values of the model's parameters.
        given: static parameters that the network is given, (p,).
        key: typed JAX key.
        draws: number of draws.
    """
    denoise, dtype = model.denoiser(given), model.weights.dtype
    shape = (series.rows, *model.state)
    observe = observations(series.reading(parameters), model)
    guided = chosen.guided(model, denoise, observe, series.rows)
    grid = sampler.grid().astype(dtype)
    bounds = jnp.ones(len(grid) - 1, dtype)
    if sampler.corrections:
        bounds = curvatures(chosen, observe, grid, jnp.zeros(shape, dtype))

    # At the highest level the law is that of mean plus noise. Started from noise alone, means are off by their share of
    # that level: .1 sd and more for slow trajectories with precise data.
    centre = guided(jnp.zeros(shape, dtype), grid[0])

    def one(k: Key) -> Array:
        first, second = jax.random.split(k)
        start = centre + grid[0] * jax.random.normal(first, shape, dtype)
        return model.raw(sampler.draw(guided, start, grid, second, bounds))

    size = jnp.zeros(shape).size
    return jax.lax.map(one, jax.random.split(key, draws), batch_size=at_once(draws, size, chosen.dense))
