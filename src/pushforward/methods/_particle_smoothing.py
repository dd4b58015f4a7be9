"""Trajectories from a particle filter's history: backward in time, by transition densities or by ancestors."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.math.particles import backward_moves, backward_weights, distinct
from pushforward.math.resampling import systematic_from
from pushforward.methods._particle_parts import BackwardMoves, BackwardSimulation, ParticleSmoother
from pushforward.methods._particles import Cloud, Record, scaled
from pushforward.model import by_value, trajectories
from pushforward.model.by_value import Valued
from pushforward.model.state_space import Chain

_PAIRS = 2**20


class History(eqx.Module):
    """What smoothing needs of a run, leading axis time.

    Attributes:
        before: the particles before each step.
        ancestors: index among them of each particle after the step, (T, N).
        sites: values of the step's sites (T, N, ...).
    """

    before: Cloud
    ancestors: Array
    sites: dict[str, Array]


class Paths(eqx.Module):
    """Trajectories as values.

    Attributes:
        values: latent sites of the scan (T, draw, ...).
        first: index of each trajectory among the initial particles (draw,).
        last: the same among the last ones.
        acceptance: share of accepted moves.
    """

    values: dict[str, Array]
    first: Array
    last: Array
    acceptance: Array


def draw_last(end: Cloud, key: Key, draws: int) -> Array:
    """Indices of particles after the last step, drawn by their weights; in random order."""
    first, second = jax.random.split(key)
    uniform = jax.random.uniform(first, (), end.weights.dtype)
    return jax.random.permutation(second, systematic_from(uniform, end.weights, draws))


def trace(history: History, last: Array) -> Paths:
    """The particles' own histories."""

    def back(after: Array, item: tuple) -> tuple[Array, dict[str, Array]]:
        ancestors, sites = item
        return ancestors[after], {n: v[after] for n, v in sites.items()}

    first, values = jax.lax.scan(back, last, (history.ancestors, history.sites), reverse=True)
    return Paths(values, first, last, jnp.zeros(()))


def simulate(chain: Chain, smoother: ParticleSmoother, history: History, last: Array, key: Key) -> Paths:
    """Backward in time each trajectory chooses its predecessor by filter weight and density of what came later.

    The density is that of the latent sites and data of the next `memory` steps, run from the candidate with the sites
    at the trajectory's values: after these the carry no longer depends on the candidate.
    """
    s = chain.structure
    window, given = by_value.memory(s), by_value.valued(chain)
    assert window is not None
    draws = last.shape[0]
    latent = {n: history.sites[n] for n in s.latent}
    later = {n: jnp.zeros((window, draws, *v.shape[2:]), v.dtype) for n, v in latent.items()}

    def back(carry: tuple, item: tuple) -> tuple[tuple, tuple]:
        after, later = carry
        t, before, ancestors, sites, step_key = item
        now = {n: v[after] for n, v in sites.items()}
        later = {n: jnp.concatenate([now[n][None], v[:-1]]) for n, v in later.items()}

        def density(index: Array, values: dict[str, Array]) -> Array:
            return _density(given, before, index, t, values)

        chosen, rate = _choose(smoother, density, before, ancestors[after], later, step_key)
        return (chosen, later), (now, rate)

    keys = jax.random.split(key, s.length)
    items = (jnp.arange(s.length), history.before, history.ancestors, latent, keys)
    (first, _), (values, rates) = jax.lax.scan(back, (last, later), items, reverse=True)
    return Paths(values, first, last, jnp.mean(rates))


def _density(given: Valued, before: Cloud, index: Array, t: Array, later: dict[str, Array]) -> Array:
    """Log density of the later values (window, ...) from one particle before step `t`."""
    s = given.chain.structure
    riders = [r[index] for r in before.riders] if s.discrete else before.riders
    state, total = before.state[index], jnp.zeros(())
    window = jax.tree.leaves(later)[0].shape[0]
    for ahead in range(window):
        values = {n: v[ahead] for n, v in later.items()}
        found, state, riders = given.log_density(state, riders, jnp.minimum(t + ahead, s.length - 1), values)
        total = total + jnp.where(t + ahead < s.length, found, 0.0)
    return jnp.where(jnp.isnan(total), -jnp.inf, total)


def _choose(
    smoother: ParticleSmoother, density: Any, before: Cloud, ancestors: Array, later: dict[str, Array], key: Key
) -> tuple[Array, Array]:
    """Indices of predecessors (draw,), and the share of accepted moves."""
    if isinstance(smoother, BackwardMoves):

        def of_each(indices: Array) -> Array:
            return jax.vmap(density, (0, dict.fromkeys(later, 1)))(indices, later)

        return backward_moves(key, ancestors, before.log_weights, of_each, smoother.moves)
    assert isinstance(smoother, BackwardSimulation)
    size, draws = before.log_weights.shape[0], ancestors.shape[0]
    uniforms = jax.random.uniform(key, (draws,), before.log_weights.dtype)

    def one(item: tuple) -> Array:
        values, uniform = item
        log_transition = jax.vmap(density, (0, None))(jnp.arange(size), values)
        running = jnp.cumsum(jnp.exp(backward_weights(before.log_weights, log_transition)))
        return jnp.minimum(jnp.sum(running <= uniform * running[-1], dtype=jnp.int32), size - 1)

    swapped = {n: jnp.moveaxis(v, 1, 0) for n, v in later.items()}
    chosen = jax.lax.map(one, (swapped, uniforms), batch_size=max(1, min(draws, _PAIRS // size)))
    return chosen, jnp.ones((), before.log_weights.dtype)


def sites_of(
    chain: Chain, first: Cloud, noise: Array, paths: Paths, key: Key
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array], tuple]:
    """All sites at trajectories given by value, their log densities, and the last carry; leading axis draw.

    Args:
        chain: the model at its parameters.
        first: the initial particles.
        noise: their noise z_0 (N, k).
        paths: the trajectories.
        key: for sites after the scan.
    """
    draws = paths.first.shape[0]
    discrete = chain.structure.discrete
    riders = [r[paths.first] if discrete else jnp.broadcast_to(r, (draws, *r.shape)) for r in first.riders]
    values = {n: jnp.moveaxis(v, 0, 1) for n, v in paths.values.items() if n in chain.structure.latent}
    found = by_value.along(chain, (first.state[paths.first], riders), values)
    late = jax.random.normal(key, (draws, chain.late_dimension))
    outside = trajectories.around(chain, noise[paths.first], found["returned"], found["last"], late)
    posterior = outside["values"] | found["values"]
    return posterior, outside["log_prior"] | found["log_prior"], _likelihood(outside, found), found["last"]


def _likelihood(outside: dict[str, Any], found: dict[str, Any]) -> dict[str, Array]:
    return outside["log_likelihood"] | found["log_likelihood"]


def distinct_first(paths: Paths) -> Array:
    """Number of distinct initial particles among the trajectories."""
    return distinct(jnp.sort(paths.first))


def kept(after: Cloud, record: Record, key: Key, draws: int, store: str) -> tuple[dict, dict]:
    """Draws, or means and standard deviations, of the filtering and the one-step law of one step's sites."""
    if store == "last":
        return {}, {}
    laws = (after.weights, scaled(record.log_predictive)[0])
    groups = (record.sites, record.predicted)
    if store == "moments":
        return tuple(_moments(g, w) for g, w in zip(groups, laws, strict=True))  # type: ignore[reportReturnType]
    uniforms = jax.random.uniform(key, (2,), after.weights.dtype)
    rows = [systematic_from(u, w, draws) for u, w in zip(uniforms, laws, strict=True)]
    return tuple({n: v[r] for n, v in g.items()} for g, r in zip(groups, rows, strict=True))  # type: ignore[reportReturnType]


def _moments(sites: dict[str, Array], weights: Array) -> dict[str, Array]:
    """Weighted mean and standard deviation of each site; particles of weight zero may hold anything."""
    total = weights / jnp.sum(weights)

    def of(value: Array) -> Array:
        flat = jnp.where(total[:, None] > 0, value.reshape(value.shape[0], -1), 0)
        mean = total @ flat
        sd = jnp.sqrt(total @ (flat - mean) ** 2)
        return jnp.stack([mean, sd]).reshape(2, *value.shape[1:])

    return {n: of(v) for n, v in sites.items()}


def split_moments(sites: dict[str, Array], weights: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weighted means and standard deviations of sites with leading axis N."""
    found = _moments(sites, weights)
    return {n: v[0] for n, v in found.items()}, {n: v[1] for n, v in found.items()}


def riders_at(chain: Chain, cloud: Cloud, rows: Array) -> list[Array]:
    """What rides along with some particles, leading axis draw."""
    if chain.structure.discrete:
        return [r[rows] for r in cloud.riders]
    return [jnp.broadcast_to(r, (rows.shape[0], *r.shape)) for r in cloud.riders]


def joined_of(chain: Chain, states: Array) -> dict[str, Array]:
    """Parameters that are part of states (draw, n)."""
    if not chain.joined:
        return {}
    found = jax.vmap(lambda x: chain.at(x[: chain.joined_size]).outer)(states)
    return {n: found[n] for n in chain.joined}
