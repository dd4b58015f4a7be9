"""Evaluating a problem at many draws: values, densities and predictions, with bounded memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._types import Array, Key
from pushforward.model.inverse import InverseProblem

_BATCH = 2048


def many(fn: Callable, draws: Any, mesh: Mesh | None, batch: int = _BATCH) -> Any:
    """`fn` at each draw (leading axis), at most `batch` at a time."""
    length = jax.tree.leaves(draws)[0].shape[0]
    if length <= batch:
        return parallel.vmap(fn, mesh)(draws)
    rows = -(-length // batch)
    padding = rows * batch - length

    def fold(x: Array) -> Array:
        return jnp.concatenate([x, jnp.repeat(x[-1:], padding, 0)]).reshape(rows, batch, *x.shape[1:])

    found = jax.lax.map(lambda part: parallel.vmap(fn, mesh)(part), jax.tree.map(fold, draws))
    # Sizes are written out: a result may have no elements, as the state of a chain that is all discrete.
    return jax.tree.map(lambda x: x.reshape(rows * batch, *x.shape[2:])[:length], found)


def at_positions(problem: InverseProblem, positions: Any, likelihood: bool, mesh: Mesh | None) -> dict[str, Any]:
    """What the groups of a result hold, at draws of shape (chain, draw, ...).

    Args:
        problem: the problem.
        positions: noise ``z``, or a dictionary of NumPyro's unconstrained coordinates.
        likelihood: whether to keep the log likelihood element by element.
        mesh: devices that share the draws.
    """
    chains, draws = jax.tree.leaves(positions)[0].shape[:2]

    def one(position: Any) -> dict[str, Any]:
        if isinstance(position, dict):
            found, prior = problem.evaluate_unconstrained(position), 0.0
        else:
            found, prior = problem.evaluate(position), problem.log_prior(position)
        values = {k: v for k, v in found.deterministics.items() if k not in problem.structure.data}
        return {
            "posterior": found.sites | values,
            "log_prior": found.log_prior,
            "log_likelihood": found.log_likelihood if likelihood else {},
            "lp": prior + found.total_log_likelihood,
        }

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), positions)
    return jax.tree.map(lambda x: x.reshape(chains, draws, *x.shape[1:]), many(one, flat, mesh))


def likelihood_at(problem: InverseProblem, values: dict[str, Array], mesh: Mesh | None) -> dict[str, Array]:
    """Elementwise log likelihood at draws of the latent sites, leading axis draws."""
    return many(lambda v: problem.evaluate_sites(v).log_likelihood, values, mesh)


def predictions_at(problem: InverseProblem, values: dict[str, Array], key: Key, mesh: Mesh | None) -> dict[str, Array]:
    """Data drawn at each draw of the latent sites, with deterministics that were named as data."""
    length = jax.tree.leaves(values)[0].shape[0]

    def one(item: tuple) -> dict[str, Array]:
        found = problem.predict_at(*item)
        named = {k: v for k, v in found.deterministics.items() if k in problem.structure.data}
        return found.data | named

    return many(one, (values, jax.random.split(key, length)), mesh)


def likelihood_entries(problem: InverseProblem) -> int:
    """Entries of the elementwise log likelihood of one draw."""
    shapes = [s.shape[: len(s.shape) - s.event_dim] for s in problem.sites.values() if s.role == "data"]
    return sum(math.prod(shape) for shape in shapes)
