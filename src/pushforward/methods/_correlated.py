"""Likelihood estimates of a particle filter as functions of normals, for correlated pseudo-marginal methods."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from pushforward._types import Array, Key
from pushforward.math.normals import normals
from pushforward.methods._particle_parts import NoJitter, Systematic
from pushforward.methods._particle_smoothing import History, draw_last, sites_of, trace
from pushforward.methods._particles import Cloud, Random, Record
from pushforward.methods._state import StateDraws
from pushforward.methods.particle_filter import ParticleFilter
from pushforward.model.state_space import Chain, StateSpace


class Source(eqx.Module):
    """All random numbers of one run, N(0, 1) but for the key, which draws the trajectory.

    Attributes:
        start: noise z_0 (N, k).
        steps: noise (T, N, q).
        resampling: (T,); their normal probabilities are the uniforms of systematic resampling.
        key: typed JAX key.
    """

    start: Array
    steps: Array
    resampling: Array
    key: Key


class Correlated(eqx.Module):
    """Estimates whose random numbers move by u' = rho u + sqrt(1 - rho^2) e (Deligiannidis, Doucet and Pitt 2018).

    The move is reversible for the law N(0, I) of u, so that parameters and u together follow an exact Metropolis chain.
    Particles are sorted before each step, which does not change the estimate's law: the uniform of systematic
    resampling and the noise then go to neighbors of those they went to before, and the estimate moves little.
    """

    states: ParticleFilter
    correlation: float

    @property
    def store(self) -> str:
        """See `StateMethod`."""
        return self.states.store

    def draw(self, space: StateSpace, key: Key) -> Source:
        """Independent random numbers."""
        first, second, third, fourth = jax.random.split(key, 4)
        n, length = self.states.particles, space.steps
        return Source(
            normals(first, (n, space.initial_dimension)),
            normals(second, (length, n, space.noise_dimension)),
            jax.random.normal(third, (length,)),
            fourth,
        )

    def renewed(self, source: Source, key: Key) -> Source:
        """Random numbers near those given."""
        first, second, third, fourth = jax.random.split(key, 4)
        rho, rest = self.correlation, (1 - self.correlation**2) ** 0.5

        def near(u: Array, k: Key) -> Array:
            return rho * u + rest * normals(k, u.shape, u.dtype)

        parts = (near(source.start, first), near(source.steps, second), near(source.resampling, third))
        return Source(*parts, fourth)

    def log_likelihood(self, chain: Chain, source: Source) -> Array:
        """The same estimate as `ParticleFilter.log_likelihood`, at given random numbers."""
        start, times = self.states.steps.start_at(chain, source.start), jnp.arange(chain.structure.length)
        end, _ = jax.lax.scan(
            lambda c, item: (self._step(chain, c, item, source)[0], None),
            start,
            (times, source.steps, source.resampling),
        )
        return end.log_likelihood

    def trajectories(self, chain: Chain, source: Source, draws: int, store: str) -> StateDraws:
        """One trajectory of the particles of `log_likelihood` at the same random numbers; `draws` is 1."""
        start, times = self.states.steps.start_at(chain, source.start), jnp.arange(chain.structure.length)

        def move(cloud: Cloud, item: tuple) -> tuple[Cloud, History]:
            after, record = self._step(chain, cloud, item, source)
            return after, History(cloud, record.ancestors, record.sites)

        end, history = jax.lax.scan(move, start, (times, source.steps, source.resampling))
        first, second = jax.random.split(source.key)
        paths = trace(history, draw_last(end, first, draws))
        parts = sites_of(chain, start, source.start, paths, second)
        evidence = end.log_likelihood + chain.static_log_likelihood()
        return StateDraws(parts[0], {}, {}, parts[1], parts[2], parts[3], evidence, {})

    def _step(self, chain: Chain, cloud: Cloud, item: tuple, source: Source) -> tuple[Cloud, Record]:
        t, noise, resampling = item
        order = _order(cloud)
        discrete = chain.structure.discrete
        parts = (cloud.state, cloud.memory, cloud.log_weights, cloud.weights, cloud.riders if discrete else [])
        state, memory, log_weights, weights, riders = jax.tree.map(lambda v: v[order], parts)
        ordered = eqx.tree_at(
            lambda c: (c.state, c.memory, c.log_weights, c.weights, c.riders),
            cloud,
            (state, memory, log_weights, weights, riders if discrete else cloud.riders),
        )
        # A uniform below one: the normal's probability rounds to one in its far tail.
        uniform = jnp.minimum(ndtr(resampling), 1 - jnp.finfo(noise.dtype).epsneg)
        random = Random(noise, uniform, source.key)
        after, record = self.states.steps.step(chain, ordered, t, random)
        return after, eqx.tree_at(lambda r: r.ancestors, record, order[record.ancestors])


def _order(cloud: Cloud) -> Array:
    """Particles by their state, in more dimensions by their projection on the cloud's longest axis.

    The axis is scaled by the states' standard deviations and its sign fixed, so that it moves with the cloud.
    """
    x = cloud.state
    if x.shape[1] == 1:
        return jnp.argsort(x[:, 0])
    weights = cloud.weights / jnp.sum(cloud.weights)
    used = jnp.where(weights[:, None] > 0, x, 0.0)
    off = jnp.where(weights[:, None] > 0, x - weights @ used, 0.0)
    sd = jnp.sqrt(weights @ off**2)
    unit = off / jnp.where(sd > 0, sd, 1.0)
    axis = jnp.linalg.eigh(unit.T @ (weights[:, None] * unit))[1][:, -1]
    axis = axis * jnp.sign(axis[jnp.argmax(jnp.abs(axis))])
    return jnp.argsort(unit @ axis)


def why_not_correlated(space: StateSpace, states: Any) -> str | None:
    """Why `PMMH(correlation=...)` does not fit, or None."""
    if not isinstance(states, ParticleFilter):
        return "correlation= needs the random numbers of a particle filter: states=pf.ParticleFilter(...)"
    if not isinstance(states.resampling, Systematic):
        return (
            f"correlation= needs resampling=pf.Systematic(), whose one uniform moves little; got {states.resampling!r}"
        )
    if not isinstance(states.regularization, NoJitter):
        return f"correlation= needs a filter without regularization; got {states.regularization!r}"
    if space.structure.discrete:
        return "correlation= sorts particles by their state, and the state has discrete entries. Leave it out"
    return None
