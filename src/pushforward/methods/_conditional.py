"""Conditional sequential Monte Carlo: a particle filter one of whose particles follows a given trajectory."""

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.math.normals import normals
from pushforward.math.resampling import draws_from
from pushforward.methods._particle_parts import Multinomial, NoJitter
from pushforward.methods._particle_smoothing import History, _density, trace
from pushforward.methods._particles import Cloud, ParticleSteps, weighed
from pushforward.methods._proposals import Bootstrap, log_likelihood, riders_of, step_all
from pushforward.model import by_value
from pushforward.model.state_space import Chain, Moved


class Path(eqx.Module):
    """One trajectory.

    Attributes:
        start: noise z_0 of the initial state (k,).
        values: latent sites of the scan by value (T, ...).
    """

    start: Array
    values: dict[str, Array]


def log_density(chain: Chain, path: Path) -> Array:
    """log p(trajectory, data given parameters), the initial state as its noise; NaN counts as zero density."""
    given = by_value.valued(chain)
    state, riders, observed = chain.start(path.start)
    first = sum((jnp.sum(v) for v in observed.log_prob.values()), jnp.zeros(()))

    def move(carry: tuple, item: tuple) -> tuple[tuple, Array]:
        t, values = item
        state, riders = carry
        found, state, riders = given.log_density(state, riders, t, values)
        return (state, riders), found

    steps = jnp.arange(chain.structure.length)
    parts = jax.lax.scan(move, (state, riders), (steps, path.values))[1]
    total = first + jnp.sum(parts)
    return jnp.where(total < jnp.inf, total, -jnp.inf)


def sweep(chain: Chain, path: Path, key: Key, particles: int, conditional: bool = True) -> tuple[Path, Array]:
    """A new trajectory given the old one: particle Gibbs with ancestor sampling (Lindsten, Jordan and Schön 2014).

    The last particle follows `path`. The others are drawn as in a bootstrap filter with multinomial resampling at every
    step, for which the kernel leaves p(trajectory given parameters and data) as it is, for any number of particles.
    At each step the past of `path` is drawn anew among all particles, by weight times the density of what `path` does
    next: otherwise the trajectories share their early part. Where the carry never forgets there is no such density, and
    they do: conditional SMC without ancestor sampling (Andrieu, Doucet and Holenstein 2010).

    Args:
        chain: the model at its parameters.
        path: the trajectory to start from.
        key: typed JAX key.
        particles: number N, at least 2.
        conditional: False for an ordinary filter, where `path` gives shapes only.

    Returns:
        The trajectory, and the share of its steps that are not those of `path`.
    """
    first, second, third = jax.random.split(key, 3)
    noise = normals(first, (particles, chain.initial_dimension))
    noise = noise.at[-1].set(path.start) if conditional else noise
    start = _start(chain, noise)
    windows = _windows(chain, path)

    def move(cloud: Cloud, item: tuple) -> tuple[Cloud, History]:
        t, step_key, later = item
        after, history = _step(chain, cloud, t, later, step_key, conditional)
        return after, history

    length = chain.structure.length
    items = (jnp.arange(length), jax.random.split(second, length), windows)
    end, history = jax.lax.scan(move, start, items)
    last = draws_from(jax.random.uniform(third, (1,), end.weights.dtype), end.weights)
    paths = trace(history, last)
    values = {n: paths.values[n][:, 0] for n in chain.structure.latent}
    same = [jnp.all((v == path.values[n]).reshape(length, -1), 1) for n, v in values.items()]
    changed = 1 - jnp.mean(jnp.all(jnp.stack(same), 0), dtype=noise.dtype)
    return Path(noise[paths.first[0]], values), changed


def _start(chain: Chain, noise: Array) -> Cloud:
    """The initial particles at noise (N, k), weighted by what is observed there."""
    return ParticleSteps(noise.shape[0], Bootstrap(), Multinomial(), NoJitter()).start_at(chain, noise)


def _windows(chain: Chain, path: Path) -> dict[str, Array]:
    """Values of each step and of those after it as far as the carry remembers, (T, window, ...)."""
    s = chain.structure
    window = by_value.memory(s) or 1
    rows = jnp.minimum(jnp.arange(s.length)[:, None] + jnp.arange(window), s.length - 1)
    return {n: path.values[n][rows] for n in s.latent}


def _step(
    chain: Chain, cloud: Cloud, t: Array, later: dict[str, Array], key: Key, conditional: bool
) -> tuple[Cloud, History]:
    n, discrete = cloud.log_weights.shape[0], chain.structure.discrete
    first, second, third = jax.random.split(key, 3)
    ancestors = draws_from(jax.random.uniform(first, (n,), cloud.weights.dtype), cloud.weights)
    given = by_value.valued(chain)
    if conditional and by_value.memory(chain.structure) is None:
        ancestors = ancestors.at[-1].set(n - 1)
    elif conditional:
        # Weight zero times density zero of every particle but its own past: that past stays.
        density = jax.vmap(lambda i: _density(given, cloud, i, t, later))(jnp.arange(n))
        log_weights = cloud.log_weights + density
        top = jnp.max(log_weights)
        weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(top), top, 0.0))
        drawn = draws_from(jax.random.uniform(second, (), weights.dtype), weights)
        ancestors = ancestors.at[-1].set(jnp.where(jnp.isfinite(top), drawn, n - 1).astype(ancestors.dtype))
    state = cloud.state[ancestors]
    riders = [r[ancestors] for r in cloud.riders] if discrete else cloud.riders
    moved = step_all(chain, state, riders, t, normals(third, (n, chain.noise_dimension)))
    if conditional:
        now = {name: v[0] for name, v in later.items()}
        own = given.step(state[-1], [r[-1] for r in riders] if discrete else riders, t, now)
        moved = _with_last(moved, own)
    good = jnp.all(jnp.isfinite(moved.state), 1)
    after = eqx.tree_at(lambda c: (c.state, c.riders), cloud, (moved.state, riders_of(chain, moved)))
    after, _ = weighed(after, jnp.where(good, log_likelihood(moved), -jnp.inf), t)
    return after, History(cloud, ancestors, moved.sites)


def _with_last(moved: Moved, own: Moved) -> Moved:
    """The moves of all particles, the last of them replaced."""
    return jax.tree.map(lambda v, w: v.at[-1].set(jnp.asarray(w, v.dtype)), moved, own)
