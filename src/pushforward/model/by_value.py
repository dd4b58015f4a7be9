"""A chain at given values of its latent sites: transition densities, trajectories and replicated data.

Filters push noise through a step; smoothers need the density of the values that came next. Both are the user's body,
read with its latent sites set in two ways.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.model._body import REPLICATED, by_value
from pushforward.model._chain import ChainStructure, read_again
from pushforward.model._program import Program
from pushforward.model.state_space import Chain, Moved, _cut, join, nothing


class Valued(eqx.Module):
    """A chain whose steps take values of latent sites instead of noise.

    `consts` and `xs` are what the body closes over and scans over, in the order of this reading of it.
    """

    chain: Chain
    consts: list[Array]
    xs: list[Array]

    def step(self, state: Array, riders: list[Array], step: Array, values: dict[str, Array]) -> Moved:
        """One step from a state (n,) to given values of the step's latent sites."""
        s = self.chain.structure
        found = programs(s)[1](
            self.consts,
            carry=join(s, state, riders),
            x=[v[step] for v in self.xs],
            step=jnp.asarray(step),
            values={n: values[n] for n in s.latent},
        )
        return self.chain.moved(found, step)

    def log_density(self, state: Array, riders: list[Array], step: Array, values: dict[str, Array]) -> tuple:
        """log p(values, data of the step | state), and the state and riders that follow."""
        moved = self.step(state, riders, step, values)
        parts = [jnp.sum(v) for v in (*moved.log_prior.values(), *moved.observed.log_prob.values())]
        return sum(parts, moved.factor), moved.state, moved.riders


def programs(s: ChainStructure) -> tuple[Program, Program]:
    """The programs around the scan and of the body by values, read when they are first needed."""
    shapes = {n: s.body.shapes["sites"][n] for n in s.latent}
    return s.remember("by_value", lambda: read_again(s, by_value(shapes)))


def valued(chain: Chain) -> Valued:
    """The chain by values of its latent sites; its parameters may not be part of the state."""
    s = chain.structure
    found = programs(s)[0](arrays=chain.arrays, outer=chain.outer, **nothing(s))
    return Valued(chain, found["consts"], found["xs"])


def memory(s: ChainStructure) -> int | None:
    """How many steps it takes until the carry follows from the values of later latent sites alone.

    1 where a step's latent sites determine the carry (`carry = x_t`), 2 where the carry also holds the values before
    (`(x_t, x_t-1)`), None where it never forgets, as with a non-centred site or a state that moves without noise.
    """
    return s.remember("memory", lambda: _memory(s))


def _memory(s: ChainStructure) -> int | None:
    body = programs(s)[1]
    random = {*s.state, *s.discrete}
    sources = {i: {k[1] for k in body.sources("carry", i) if k[0] == "carry"} & random for i in random}
    reach = {i: {i} for i in random}
    for steps in range(1, len(random) + 1):
        reach = {i: set().union(*(sources[j] for j in found)) for i, found in reach.items()}
        if not any(reach.values()):
            return steps
    return None if random else 1


class Replicated(eqx.Module):
    """A chain whose steps draw new data."""

    chain: Chain
    consts: list[Array]
    xs: list[Array]

    def data(self, state: Array, riders: list[Array], step: Array, noise: Array, key: Key) -> dict[str, Array]:
        """Data of one step drawn from their law, by site, at a state (n,) and noise (q,)."""
        s = self.chain.structure
        found = _replicating(s)[1](
            self.consts,
            carry=join(s, state, riders),
            x=[v[step] for v in self.xs],
            step=jnp.asarray(step),
            noise=_cut(s, s.latent, noise, inner=True),
            key=key,
        )
        return found["data"]


def _replicating(s: ChainStructure) -> tuple[Program, Program]:
    return s.remember("replicated", lambda: read_again(s, REPLICATED))


def replicated(chain: Chain) -> Replicated:
    """The chain with data to be drawn; its parameters may not be part of the state."""
    s = chain.structure
    found = _replicating(s)[0](arrays=chain.arrays, outer=chain.outer, **nothing(s))
    return Replicated(chain, found["consts"], found["xs"])


def along(chain: Chain, start: tuple[Array, list[Array]], values: dict[str, Array]) -> dict[str, Any]:
    """Run trajectories given by the values of their latent sites.

    Args:
        chain: the model at its parameters.
        start: first states (draw, n), and what rides along with them (draw, ...).
        values: latent sites of the scan, axes (draw, time, ...).

    Returns:
        With axes (draw, time, ...): `values`, `log_prior`, `log_likelihood`, `returned`; `last`, the carry at the end.
    """
    given = valued(chain)

    def one(state: Array, riders: list[Array], series: dict[str, Array]) -> dict[str, Any]:
        def move(carry: tuple, item: tuple) -> tuple[tuple, dict[str, Any]]:
            t, now = item
            moved = given.step(carry[0], carry[1], t, now)
            kept = {"values": moved.sites, "log_prior": moved.log_prior, "log_likelihood": moved.observed.log_prob}
            return (moved.state, moved.riders), kept | {"returned": moved.returned}

        steps = jnp.arange(chain.structure.length)
        last, found = jax.lax.scan(move, (state, riders), (steps, series))
        return found | {"last": last}

    return jax.vmap(one)(*start, values)
