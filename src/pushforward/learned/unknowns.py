"""The unknown numbers of a state-space model as one flat vector, and what may be maximised over it.

Latent sites that are parameters enter by their noise ``z`` (so a prior of any scale is of size 1), `numpyro.param`
sites by their unconstrained values.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.model._chain import ChainStructure, explored_by_value
from pushforward.model._program import Program
from pushforward.model.by_value import Valued, valued
from pushforward.model.state_space import Chain, StateSpace, _split, nothing

_AT_ONCE = 64


class Unknowns(eqx.Module):
    """Where each unknown number lives.

    Attributes:
        space: the model, read with its `numpyro.param` sites as arguments.
        leaves: which of its arrays are trained.
    """

    space: StateSpace
    leaves: tuple[int, ...] = eqx.field(static=True)

    def start(self) -> Array:
        """The prior's centre, and the initial values of `numpyro.param` sites."""
        slots = self.space.structure.joint.slots
        noise = [jnp.zeros(slots[n].size) for n in self.space.parameters]
        parts = [*noise, *(jnp.ravel(self.space.arrays[i]) for i in self.leaves)]
        return jnp.concatenate([p.astype(jnp.result_type(float)) for p in parts])

    def cut(self, flat: Array) -> tuple[dict[str, Array], list[Array]]:
        """Noise by site, and trained arrays."""
        slots, offset, noise, arrays = self.space.structure.joint.slots, 0, {}, []
        for name in self.space.parameters:
            noise[name] = flat[offset : offset + slots[name].size].reshape(slots[name].shape)
            offset += slots[name].size
        for i in self.leaves:
            like = self.space.arrays[i]
            arrays.append(flat[offset : offset + like.size].reshape(like.shape).astype(like.dtype))
            offset += like.size
        return noise, arrays

    def at(self, flat: Array) -> tuple[Chain, Array]:
        """The chain at given unknowns, and the log prior of its latent parameters in their own coordinates."""
        values, log_prior, arrays = self._set(flat)
        return StateSpace(arrays, self.space.structure).chain(values), log_prior

    def values(self, flat: Array) -> dict[str, Array]:
        """Values of the latent parameters."""
        return self._set(flat)[0]

    def log_prior(self, flat: Array) -> Array:
        """Log prior density of the latent parameters."""
        return self._set(flat)[1]

    def _set(self, flat: Array) -> tuple[dict[str, Array], Array, tuple[Array, ...]]:
        s = self.space.structure
        noise, trained = self.cut(flat)
        arrays = list(self.space.arrays)
        for i, value in zip(self.leaves, trained, strict=True):
            arrays[i] = value
        still = {n: jnp.zeros(slot.shape) for n, slot in s.joint.slots.items() if slot.steps is None}
        found = s.by_noise(arrays=tuple(arrays), outer=still | noise, **nothing(s))
        prior = [jnp.sum(found["log_prior"][n]) for n in self.space.parameters]
        return {n: found["values"][n] for n in self.space.parameters}, sum(prior, jnp.zeros(())), tuple(arrays)


class Objective(eqx.Module):
    """What is maximised: a function of the unknowns (p,) and of the number of the step."""

    unknowns: eqx.AbstractVar[Unknowns]

    @abstractmethod
    def __call__(self, flat: Array, number: Array) -> Array:
        """A log density."""


class Marginal(Objective):
    """log p(data given unknowns) by a state method, with the log prior of latent parameters or without.

    Attributes:
        unknowns: of the model.
        states: the state method; it draws from the key.
        key: typed JAX key.
        prior: whether the log prior is added.
        fresh: whether each step draws anew; otherwise all use the same key, and this is a function of the unknowns.
    """

    unknowns: Unknowns
    states: Any
    key: Key
    prior: bool = eqx.field(static=True)
    fresh: bool = eqx.field(static=True)

    def __call__(self, flat: Array, number: Array) -> Array:
        """See `Objective`."""
        chain, log_prior = self.unknowns.at(flat)
        key = jax.random.fold_in(self.key, number) if self.fresh else self.key
        value = self.states.log_likelihood(chain, key) + chain.static_log_likelihood()
        return value + log_prior if self.prior else value


class ExpectedPairs(Objective):
    """The mean log density of initial state, states and data over points that stand for (state before a step, step).

    Attributes:
        unknowns: of the model.
        initial: values of the sites of the initial state, leading axis point.
        states: states before each step (T, point, n).
        riders: what rides along (T, ...).
        values: latent sites of each step (T, point, ...).
    """

    unknowns: Unknowns
    initial: dict[str, Array]
    states: Array
    riders: list[Array]
    values: dict[str, Array]

    def __call__(self, flat: Array, number: Array) -> Array:
        """See `Objective`."""
        chain, _ = self.unknowns.at(flat)
        given = valued(chain)

        def at_time(item: tuple) -> Array:
            t, states, riding, values = item
            one = lambda state, v: given.log_density(state, riding, t, v)[0]  # noqa: E731
            return jnp.mean(jax.vmap(one)(states, values))

        times = jnp.arange(self.states.shape[0])
        steps = jax.lax.map(at_time, (times, self.states, self.riders, self.values), batch_size=_AT_ONCE)
        first = jax.vmap(lambda v: _initial(chain, v)[0])(self.initial)
        return jnp.sum(steps) + jnp.mean(first)


class ExpectedPaths(Objective):
    """The mean log density of trajectories, with their data or without.

    Attributes:
        unknowns: of the model.
        initial: values of the sites of the initial state, leading axis path.
        values: latent sites of the scan (path, T, ...).
        observed: whether the density of the data is part of it, and that of the initial state and the first step.
    """

    unknowns: Unknowns
    initial: dict[str, Array]
    values: dict[str, Array]
    observed: bool = eqx.field(static=True)

    def __call__(self, flat: Array, number: Array) -> Array:
        """See `Objective`."""
        chain, _ = self.unknowns.at(flat)
        given = valued(chain)

        def one(initial: dict[str, Array], series: dict[str, Array]) -> Array:
            first, state, riders = _initial(chain, initial)
            return (first if self.observed else 0.0) + self._along(given, state, riders, series)

        return jnp.mean(jax.vmap(one)(self.initial, self.values))

    def _along(self, given: Valued, state: Array, riders: list[Array], series: dict[str, Array]) -> Array:
        def move(carry: tuple, item: tuple) -> tuple[tuple, Array]:
            moved = given.step(carry[0], carry[1], *item)
            parts = [jnp.sum(v) for v in moved.log_prior.values()]
            if self.observed:
                parts += [moved.factor, *(jnp.sum(v) for v in moved.observed.log_prob.values())]
            return (moved.state, moved.riders), sum(parts, jnp.zeros(()))

        times = jnp.arange(given.chain.structure.length)
        terms = jax.lax.scan(move, (state, riders), (times, series))[1]
        return jnp.sum(terms if self.observed else terms[1:])


def initial_program(s: ChainStructure) -> Program:
    """What stands around the scan, by values of its parameters and of the sites of the initial state."""
    return s.remember("initial_by_value", lambda: explored_by_value(s, (*s.parameters, *s.initial)))


def _initial(chain: Chain, values: dict[str, Array]) -> tuple[Array, Array, list[Array]]:
    """log p(initial state, data outside the scan | parameters), and the first state with what rides along."""
    s = chain.structure
    outer = {n: chain.outer[n] for n in s.parameters} | {n: values[n] for n in s.initial}
    found = initial_program(s)(arrays=chain.arrays, outer=outer, **nothing(s))
    parts = [jnp.sum(found["log_prior"][n]) for n in s.initial]
    parts += [jnp.sum(found["observed"][n].log_prob) for n in (*s.first, *s.static)]
    parts += [jnp.sum(v) for v in found["factors"].values()]
    return sum(parts, jnp.zeros(())), *_split(s, found["init"])
