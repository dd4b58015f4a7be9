"""Rao-Blackwellised particles: some sites are sampled, the rest is a Gaussian of each particle's own."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.math import kalman
from pushforward.math.kalman import Step
from pushforward.methods._kalman_filter import joint_moments
from pushforward.methods._particle_smoothing import History, distinct_first, trace
from pushforward.methods._proposals import Begun, Proposal, Proposed
from pushforward.model import trajectories
from pushforward.model.conditionally_linear import Split, plain_log_density, split
from pushforward.model.state_space import Chain, Moved, StateSpace

_TINY = {8: 1e-12, 4: 1e-6}


class Memory(eqx.Module):
    """What particles carry along beside the means in their states; leading axis N.

    Attributes:
        cov: covariance of the entries that are integrated out (N, k, k).
        drawn: the state with these drawn, as the step's sites are (N, n).
        noise: noise of the last step, 0 where it is integrated out (N, q).
    """

    cov: Array
    drawn: Array
    noise: Array


class RaoBlackwell(Proposal):
    """Particles for some sites, a Kalman filter for the rest (Chen and Liu 2000; Doucet, Godsill and Andrieu 2000).

    For models that are linear and Gaussian once the sampled sites are known, such as a linear model whose regime
    switches; verified by data flow. The weight of a particle is the predictive density of its Kalman filter, so that
    the likelihood estimate stays unbiased and varies less than that of particles for everything. Smoothing draws follow
    the particles' ancestors, and simulate what was integrated out exactly given these (Carter and Kohn 1994).

    Args:
        sampled: names of the latent sites that particles sample; (): discrete ones, and as few others as leave the
            rest linear. Initial sites are integrated out where that is exact.
    """

    sampled: tuple[str, ...] = ()

    def __check_init__(self):
        if not isinstance(self.sampled, tuple) or not all(isinstance(n, str) for n in self.sampled):
            raise MethodError(
                f"RaoBlackwell(sampled=...) takes a tuple of site names, as in ('regime',); got {self.sampled!r}."
            )

    @property
    def has_density(self) -> bool:
        """Particles hold moments, which transition densities cannot weigh."""
        return False

    def why_not(self, space: StateSpace) -> str | None:
        """Refuses models that do not fall into a sampled and a linear Gaussian part."""
        if space.joined:
            return "pf.RaoBlackwell() cannot have parameters in the state (augment=True); use pf.Bootstrap()"
        found = split(space, self.sampled)
        return f"pf.RaoBlackwell({self._words()}) cannot integrate: {found}" if isinstance(found, str) else None

    def _words(self) -> str:
        return f"sampled={self.sampled!r}" if self.sampled else ""

    def _split(self, chain: Chain) -> Split:
        found = split(StateSpace(chain.arrays, chain.structure), self.sampled)
        if isinstance(found, str):
            raise MethodError(f"pf.RaoBlackwell({self._words()}) cannot integrate: {found}.")
        return found

    def noise_dimension(self, chain: Chain) -> int:
        """See `Proposal.noise_dimension`; the last k normals draw the state that is integrated out."""
        return chain.noise_dimension + len(self._split(chain).state)

    def begin(self, chain: Chain, noise: Array) -> Begun:
        """See `Proposal.begin`."""
        parts = self._split(chain)

        def one(z: Array) -> tuple[Array, Array, list[Array], Array, Array]:
            step, data, state, riders, log_weight = _first(chain, parts, z)
            if not len(parts.initial):
                k = len(parts.state)
                return state, jnp.zeros((k, k), state.dtype), riders, log_weight, state
            found = kalman.update(jnp.zeros(0, state.dtype), jnp.zeros((0, 0), state.dtype), step, data)
            mean = state.at[parts.state].set(found.mean)
            return mean, found.cov, riders, found.log_likelihood, chain.start(z)[0]

        state, cov, riders, log_weight, drawn = jax.vmap(one)(noise)
        still = jnp.zeros((noise.shape[0], chain.noise_dimension), state.dtype)
        return Begun(state, riders, Memory(cov, drawn, still), log_weight)

    def move(self, chain: Chain, state: Array, riders: list[Array], memory: Any, t: Array, normals: Array) -> Proposed:
        """See `Proposal.move`; sites are drawn from the particle's own law given the data."""
        parts, discrete = self._split(chain), bool(chain.structure.discrete)
        q = chain.noise_dimension

        def one(x: Array, riding: list[Array], cov: Array, e: Array) -> Proposed:
            noise = e[:q].at[parts.noise].set(0.0)
            step, data, moved = _tangent(chain, parts, x, riding, t, noise)
            found = kalman.update(x[parts.state], cov, step, data)
            log_weight = found.log_likelihood + plain_log_density(parts, moved)
            laws, white = joint_moments(found.record), jnp.concatenate([e[q:], e[parts.noise]])
            points = [mean + _root(joint) @ white for mean, joint in laws]
            drawn, predicted = (_at(chain, parts, x, riding, t, noise, point) for point in points)
            after = moved.state.at[parts.state].set(found.mean)
            kept = Memory(found.cov, drawn.state, noise)
            return Proposed(after, moved.riders, kept, drawn.sites, predicted.sites, log_weight)

        axes = 0 if discrete else None
        found = jax.vmap(one, (0, axes, 0, 0))(state, riders, memory.cov, normals)
        return replace(found, riders=found.riders if discrete else [r[0] for r in found.riders])

    def states(self, state: Array, memory: Any) -> Array:
        """See `Proposal.states`."""
        return memory.drawn

    def smoothed(self, chain: Chain, noise: Array, history: Any, end: Any, last: Array, key: Key) -> Any:
        """See `Proposal.smoothed`."""
        parts = self._split(chain)
        series = jnp.concatenate([history.before.memory.noise[1:], end.memory.noise[None]])
        paths = trace(History(history.before, history.ancestors, {"noise": series}), last)
        first, second = jax.random.split(key)
        keys = jax.random.split(first, last.shape[0])
        kept = jnp.moveaxis(paths.values["noise"], 0, 1)
        initial, found = jax.vmap(lambda *item: _drawn(chain, parts, *item))(noise[paths.first], kept, keys)
        late = jax.random.normal(second, (last.shape[0], chain.late_dimension))
        outside = trajectories.around(chain, initial, found["returned"], found["last"], late)
        groups = tuple(outside[name] | found[name] for name in ("values", "log_prior", "log_likelihood"))
        return *groups, found["last"], distinct_first(paths)


def _at(chain: Chain, parts: Split, state: Array, riders: list[Array], t: Array, noise: Array, linear: Array) -> Moved:
    """A step with the linear part of state and noise at given values (k + p,)."""
    k = len(parts.state)
    return chain.step(state.at[parts.state].set(linear[:k]), riders, t, noise.at[parts.noise].set(linear[k:]))


def _tangent(
    chain: Chain, parts: Split, state: Array, riders: list[Array], t: Array, noise: Array
) -> tuple[Step, Array, Moved]:
    """The step of the linear part given the sampled noise, its Gaussian data, and the step at the state's means."""
    k, point = len(parts.state), jnp.concatenate([state[parts.state], noise[parts.noise]])

    def run(linear: Array) -> tuple[tuple[Array, Array], Moved]:
        moved = _at(chain, parts, state, riders, t, noise, linear)
        return (moved.state[parts.state], moved.observed.mean), moved

    (value, mean), push, moved = jax.linearize(run, point, has_aux=True)
    slopes, data_slopes = jax.vmap(push, out_axes=1)(jnp.eye(point.shape[0], dtype=point.dtype))
    data_slopes = jnp.where(parts.plain[:, None], 0.0, data_slopes)
    offset, data_offset = value - slopes @ point, jnp.where(parts.plain, 0.0, mean) - data_slopes @ point
    variance, data = moved.observed.noise, jnp.where(parts.plain, jnp.nan, moved.observed.data)
    if variance.ndim == 1:
        variance = jnp.where(parts.plain, 1.0, variance)
    else:
        other = parts.plain[:, None] | parts.plain[None]
        variance = jnp.where(other, jnp.eye(data.shape[0], dtype=variance.dtype), variance)
    H, D = data_slopes[:, :k], data_slopes[:, k:]
    return Step(slopes[:, :k], slopes[:, k:], offset, H, D, data_offset, variance), data, moved


def _first(chain: Chain, parts: Split, noise: Array) -> tuple[Step, Array, Array, list[Array], Array]:
    """The law of the linear part at the start, its data, the start at the means, and the log density of its data."""
    noise = noise.at[parts.initial].set(0.0)

    def run(z: Array) -> tuple[tuple[Array, Array], tuple]:
        state, riders, observed = chain.start(noise.at[parts.initial].set(z))
        return (state[parts.state], observed.mean), (state, riders, observed)

    point = noise[parts.initial]
    (value, mean), push, (state, riders, observed) = jax.linearize(run, point, has_aux=True)
    B, D = jax.vmap(push, out_axes=1)(jnp.eye(point.shape[0], dtype=point.dtype))
    empty, data_empty = jnp.zeros((value.shape[0], 0), value.dtype), jnp.zeros((mean.shape[0], 0), mean.dtype)
    step = Step(empty, B, value, data_empty, D, mean, observed.noise)
    log_weight = sum((jnp.sum(v) for v in observed.log_prob.values()), jnp.zeros((), state.dtype))
    return step, observed.data, state, riders, log_weight


def _drawn(chain: Chain, parts: Split, initial: Array, series: Array, key: Key) -> tuple[Array, dict[str, Any]]:
    """One trajectory given the sampled noise z_0 (k,) and (T, q): the rest of it is drawn given all data.

    Returns:
        z_0, and by time what the body gives; `last` is the carry at the end.
    """
    first, data, state, riders, _ = _first(chain, parts, initial)
    times = jnp.arange(chain.structure.length)

    def linear(carry: tuple, item: tuple) -> tuple[tuple, tuple[Step, Array]]:
        step, y, moved = _tangent(chain, parts, *carry, *item)
        return (moved.state, moved.riders), (step, y)

    _, (steps, ys) = jax.lax.scan(linear, (state, riders), (times, series))
    if not len(parts.initial):  # what is observed at the start is then known, and of any law
        none = jnp.zeros((0, 0), state.dtype)
        first, data = first._replace(H=none, D=none, d=none[0:0, 0], R=none[0:0, 0]), none[0:0, 0]
    found = kalman.simulation_smoother(first, steps, ys, data, key, 1)
    initial = initial.at[parts.initial].set(found[0][0])
    series = series.at[:, parts.noise].set(found[1][0])
    state, riders, _ = chain.start(initial)

    def move(carry: tuple, item: tuple) -> tuple[tuple, dict[str, Any]]:
        moved = chain.step(*carry, *item)
        kept = {"values": moved.sites, "log_prior": moved.log_prior, "log_likelihood": moved.observed.log_prob}
        return (moved.state, moved.riders), kept | {"returned": moved.returned}

    last, along = jax.lax.scan(move, (state, riders), (times, series))
    return initial, along | {"last": last}


def _root(cov: Array) -> Array:
    """A lower triangular root of a covariance (n, n) that may be singular."""
    columns = []
    limit = _TINY[cov.dtype.itemsize] * jnp.max(jnp.abs(jnp.diagonal(cov)), initial=0.0)
    for i in range(cov.shape[0]):
        pivot = cov[i, i]
        good = pivot > limit
        column = jnp.where(good, cov[:, i], 0.0) / jnp.sqrt(jnp.where(good, pivot, 1.0))
        cov = cov - column[:, None] * column
        columns.append(column)
    return jnp.stack(columns, 1) if columns else cov
