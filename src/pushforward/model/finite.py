"""A chain whose latent sites take finitely many values: its states in tables, and steps to given values.

The state is the tuple of the last `order` values of the step's latent sites, numbered with the latest fastest. All
steps have the same table: before there were `order` steps, places of values that are not there yet are taken by the
number 0, and by that of the initial state. Latent sites that nothing follows from (such as the missing part of data
with `obs_mask`) are not summed over: their density integrates to one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from pushforward._types import Array
from pushforward.model import _chain, _trace, by_value
from pushforward.model._body import Mode
from pushforward.model._chain import ChainStructure
from pushforward.model._program import Program
from pushforward.model.state_space import Chain, Moved, StateSpace, _cut, _split, join, nothing

LIMIT = 4096
"""Largest number of states."""

_AT_ONCE = 65_536
"""Pairs of a state and a value that are evaluated at the same time."""


@dataclass(frozen=True, eq=False)
class Support:
    """Which values the latent sites take.

    Attributes:
        summed: latent sites of a step that are summed over.
        free: those that nothing follows from, with values from noise.
        order: number of steps that the state remembers.
        starts: number of initial states.
        values: number of values K of a step.
        initial: values of the initial sites by number, shape (slots, ...); the last is repeated.
        step: values of the step's sites by number, likewise.
    """

    summed: tuple[str, ...]
    free: tuple[str, ...]
    order: int
    starts: int
    values: int
    initial: dict[str, np.ndarray]
    step: dict[str, np.ndarray]

    @property
    def slots(self) -> int:
        """Numbers that a value can have."""
        return max(self.starts, self.values)

    @property
    def states(self) -> int:
        """Numbers that a state can have."""
        return self.slots**self.order


def support(s: ChainStructure) -> Support | str:
    """The values of a chain's latent sites, or why they are not finitely many."""
    return s.remember("finite", lambda: _support(s))


def why_not(space: StateSpace) -> str | None:
    """Why the states of a model are not finitely many, or None where they are."""
    found = support(space.structure)
    if isinstance(found, str):
        return found
    programs(space.structure)  # read here, since inside a model that is being traced its sites would be met twice
    return None


def _support(s: ChainStructure) -> Support | str:
    free = _free(s)
    summed = tuple(n for n in s.latent if n not in free)
    for name in (*s.initial, *summed):
        reason = _why_not_finite(s, name)
        if reason:
            return reason
    order = by_value.memory(s)
    if order is None:
        return _never_forgets(s)
    counts = [_count(s, names) for names in (s.initial, summed)]
    slots = max(counts)
    if slots**order > LIMIT:
        names = list(summed if counts[1] == slots else s.initial)
        each = "" if order == 1 else f" over {order} steps"
        return (
            f"the sites {names} take {slots:,} values jointly, which makes {slots**order:,} states{each}, more than "
            f"{LIMIT:,}. Write fewer or smaller discrete sites, or use pf.ParticleFilter()"
        )
    tables = [_tuples(s, names, slots) for names in (s.initial, summed)]
    return Support(summed, free, order, counts[0], counts[1], tables[0], tables[1])


def _free(s: ChainStructure) -> tuple[str, ...]:
    """Latent sites of a step from which neither the carry nor data nor sites that matter follow."""
    body = by_value.programs(s)[1]
    # What the scan returns matters where something after it depends on it.
    ends = ("carry", "observed", "factor", *(("returned",) if s.fused or s.late else ()))
    reached = set().union(*(body.sources(end) for end in ends))
    needed = {n for n in s.latent if ("values", n) in reached}
    while True:
        reached = set().union(*(body.sources("log_prior", n) for n in needed))
        more = {n for n in s.latent if ("values", n) in reached} | needed
        if more == needed:
            return tuple(n for n in s.latent if n not in needed)
        needed = more


def _why_not_finite(s: ChainStructure, name: str) -> str | None:
    site = s.joint.sites[name]
    if not site.discrete:
        where = "initial state" if name in s.initial else "step"
        return (
            f"latent site '{name}' ({site.distribution}) of the {where} is continuous, and DiscreteHMM sums over "
            "finitely many states. Integrate the site out by hand (Rao-Blackwellisation), or use pf.ParticleFilter(), "
            "which takes continuous and discrete states"
        )
    if site.states is None:
        return (
            f"the discrete state space is not finite: latent site '{name}' takes infinitely many values, or values "
            "that are not known before the model runs. Give it a law of fixed finite support, such as Categorical or "
            "a Binomial whose total_count is a number, or use pf.ParticleFilter()"
        )
    return None


def _never_forgets(s: ChainStructure) -> str:
    """Names the leaf of the carry whose value does not follow from the latest values."""
    body = by_value.programs(s)[1]
    random = {*s.state, *s.discrete}
    sources = {i: {k[1] for k in body.sources("carry", i) if k[0] == "carry"} & random for i in random}
    reach = dict(sources)
    for _ in random:
        reach = {i: found.union(*(sources[j] for j in found)) for i, found in reach.items()}
    leaf = min(i for i in random if i in reach[i])
    return (
        f"the discrete state space is not finite: leaf {leaf} of the carry ({s.carry[leaf].dtype.name}, shape "
        f"{s.carry[leaf].shape}) depends on all earlier values, as a running sum does. Let the "
        "carry follow from the values that the step samples (a bounded counter can be a discrete site of its own), or "
        "use pf.ParticleFilter()"
    )


def _elements(s: ChainStructure, names: tuple[str, ...]) -> list[int]:
    """Numbers of values of all elements of sites."""
    return [len(s.joint.sites[n].states or ()) for n in names for _ in range(math.prod(_shape(s, n)))]


def _shape(s: ChainStructure, name: str) -> tuple[int, ...]:
    shape = s.joint.sites[name].shape
    return shape[1:] if name in s.latent else shape


def _count(s: ChainStructure, names: tuple[str, ...]) -> int:
    return math.prod(_elements(s, names))


def _tuples(s: ChainStructure, names: tuple[str, ...], slots: int) -> dict[str, np.ndarray]:
    """Values of sites by the number of their tuple, in the dtypes of the model."""
    sizes = _elements(s, names)
    number = np.minimum(np.arange(slots), math.prod(sizes) - 1)
    digits = [number // math.prod(sizes[i + 1 :]) % size for i, size in enumerate(sizes)]
    digits = np.stack(digits, 1) if digits else np.zeros((slots, 0), int)
    found, offset = {}, 0
    for name in names:
        shape = _shape(s, name)
        end = offset + math.prod(shape)
        kind = (s.body.shapes["sites"] if name in s.latent else s.around.shapes["values"])[name].dtype
        values = np.asarray(s.joint.sites[name].states, kind)
        found[name] = values[digits[:, offset:end]].reshape(slots, *shape)
        offset = end
    return found


def programs(s: ChainStructure) -> tuple[Program, Program]:
    """The programs around the scan, by the values of parameters and initial sites, and of one step.

    Raises:
        ValueError: the states are not finitely many; `why_not` says so beforehand.
    """
    given = support(s)
    if isinstance(given, str):
        raise ValueError(given)

    def read() -> tuple[Program, Program]:
        shapes = {n: s.body.shapes["sites"][n] for n in given.summed}

        def assign(slots: dict, data: frozenset, values: dict, noise: dict) -> _trace.Assign:
            at_values = _trace.from_values(slots, values)
            at_noise = _trace.from_noise({n: slots[n] for n in given.free}, noise)

            def found(site: dict) -> Array | None:
                value = at_values(site)
                return at_noise(site) if value is None else value

            return found

        def example(slots: dict) -> dict[str, Any]:
            return {"values": dict(shapes), "noise": {n: jnp.zeros(slots[n].noise_shape) for n in given.free}}

        seen: dict[str, Any] = {}
        inputs = dict(s.around.inputs)
        inputs["outer"] = inputs["outer"] | {n: s.around.shapes["values"][n] for n in s.initial}
        explored = {"carry": s.carry, "length": s.length}
        run = _chain._around(s.joint, (*s.parameters, *s.initial), explored, seen, Mode(assign, example))
        with numpyro.validation_enabled(False):
            around = Program(run, **inputs)
        return around, seen["body"]

    return s.remember("finite_programs", read)


class Table(eqx.Module):
    """Carries by the number of the state.

    Attributes:
        state: floating random leaves, shape (M, n).
        moving: other random leaves, shape (M, ...).
        known: leaves that are the same for all states.
    """

    state: Array
    moving: list[Array]
    known: list[Array]


class Potentials(eqx.Module):
    """Log densities of one step, -inf where impossible.

    Attributes:
        prior: log p(b given state before), shape (M, slots).
        data: log p(data of the step given both), likewise.
    """

    prior: Array
    data: Array


class Finite(eqx.Module):
    """A chain of finitely many states; `consts` and `xs` belong to this reading of its body."""

    chain: Chain
    consts: list[Array]
    xs: list[Array]
    support: Support = eqx.field(static=True)

    @property
    def noise_dimension(self) -> int:
        """Length of the noise of a step's free sites."""
        slots = self.chain.structure.joint.slots
        return sum(math.prod(slots[n].noise_shape) for n in self.support.free)

    def outside(self, number: Array, returned: Any = None, last: Any = None, late: Array | None = None) -> dict:
        """What stands around the scan, at the number of the initial state."""
        return _outside(self.chain, self.support, number, returned, last, late)

    def start(self) -> tuple[Table, Array]:
        """The table before the first step, and log p(initial state, data that depend on it), shape (M,)."""
        s, given = self.chain.structure, self.support
        found = jax.vmap(self.outside)(jnp.arange(given.slots))
        parts = [found["log_prior"][n] for n in s.initial] + [found["observed"][n].log_prob for n in s.first]
        density = sum((jnp.sum(v.reshape(given.slots, -1), 1) for v in parts), jnp.zeros(given.slots))
        density = _possible(jnp.where(jnp.arange(given.slots) < given.starts, density, -jnp.inf))
        rows = jnp.arange(given.states) % given.slots
        state, riders = jax.vmap(lambda carry: _split(s, carry))(found["init"])
        table = self._table(state, riders, lambda v: v[rows])
        return table, jnp.full(given.states, -jnp.inf, density.dtype).at[: given.slots].set(density)

    def _table(self, state: Array, riders: list[Array], of: Callable[[Array], Array]) -> Table:
        s = self.chain.structure
        marks = [i in s.discrete for i in range(len(s.carry)) if i not in s.state]
        moving = [of(v) for v, random in zip(riders, marks, strict=True) if random]
        known = [v[0] for v, random in zip(riders, marks, strict=True) if not random]
        return Table(of(state), moving, known)

    def row(self, table: Table, state: Array) -> tuple[Array, list[Array]]:
        """The state (n,) of the carry and what rides along, at the number of a state."""
        return self._carry(table.state[state], [v[state] for v in table.moving], table.known)

    def _carry(self, state: Array, moving: list[Array], known: list[Array]) -> tuple[Array, list[Array]]:
        s = self.chain.structure
        random, rest = iter(moving), iter(known)
        return state, [next(random if i in s.discrete else rest) for i in range(len(s.carry)) if i not in s.state]

    def step(self, before: tuple[Array, list[Array]], step: Array, value: Array, noise: Array | None = None) -> Moved:
        """One step from a carry to the value of a number; free sites at their noise."""
        s, given = self.chain.structure, self.support
        noise = jnp.zeros(self.noise_dimension) if noise is None else noise
        found = programs(s)[1](
            self.consts,
            carry=join(s, *before),
            x=[v[step] for v in self.xs],
            step=jnp.asarray(step),
            values={n: jnp.asarray(v)[value] for n, v in given.step.items()},
            noise=_cut(s, given.free, noise, inner=True),
        )
        return self.chain.moved(found, step)

    def pairs(self, table: Table, states: slice, at: Callable[[tuple, Array], Any]) -> Any:
        """`at(carry, number of the value)` for some states and all values, leading axes (state, value)."""
        numbers = jnp.arange(self.support.slots)
        rows = (table.state[states], [v[states] for v in table.moving])

        def of(row: tuple[Array, list[Array]]) -> Any:
            before = self._carry(row[0], row[1], table.known)
            # Mapping over the values inside leaves what does not depend on the state before evaluated once for each.
            return jax.vmap(lambda b: at(before, b))(numbers)

        count, each = len(rows[0]), len(numbers)
        batch = max(1, _AT_ONCE // each)
        if count <= batch:
            return jax.vmap(of)(rows)
        # `lax.map` with a batch size fails on arrays without elements, such as the state of a chain of integers.
        parts = jnp.minimum(jnp.arange(-(-count // batch) * batch), count - 1).reshape(-1, batch)
        found = jax.lax.map(lambda part: jax.vmap(of)(jax.tree.map(lambda v: v[part], rows)), parts)
        return jax.tree.map(lambda v: v.reshape(v.shape[0] * batch, *v.shape[2:])[:count], found)

    def potentials(self, table: Table, step: Array) -> Potentials:
        """Log densities of one step for all states and values."""
        given = self.support

        def at(before: tuple, value: Array) -> tuple[Array, Array]:
            moved = self.step(before, step, value)
            prior = sum((jnp.sum(moved.log_prior[n]) for n in given.summed), jnp.zeros(()))
            return prior, sum((jnp.sum(v) for v in moved.observed.log_prob.values()), moved.factor)

        prior, data = self.pairs(table, slice(None), at)
        prior = jnp.where(jnp.arange(given.slots) < given.values, prior, -jnp.inf)
        return Potentials(_possible(prior), _possible(data))

    def onward(self, table: Table, step: Array) -> Table:
        """The table after one step."""
        given = self.support

        def at(before: tuple, value: Array) -> tuple[Array, list[Array]]:
            moved = self.step(before, step, value)
            return moved.state, moved.riders

        # The oldest value does not matter to the carry that follows: that of number 0 stands for all.
        found = self.pairs(table, slice(given.states // given.slots), at)
        state, riders = jax.tree.map(lambda v: v.reshape(given.states, *v.shape[2:]), found)
        return self._table(state, riders, lambda v: v)


def finite(chain: Chain) -> Finite:
    """The chain by numbers of its states; `ValueError` where these are not finitely many (see `why_not`)."""
    found = support(chain.structure)
    if isinstance(found, str):
        raise ValueError(found)
    around = _outside(chain, found, jnp.asarray(0))
    return Finite(chain, around["consts"], around["xs"], found)


def _outside(
    chain: Chain, given: Support, number: Array, returned: Any = None, last: Any = None, late: Array | None = None
) -> dict[str, Any]:
    s = chain.structure
    outer = chain.outer | {n: jnp.asarray(v)[number] for n, v in given.initial.items()}
    if late is not None:
        outer |= _cut(s, s.late, late)
    scanned = nothing(s) if last is None else {"last": last, "stacked": returned}
    return programs(s)[0](arrays=chain.arrays, outer=outer, **scanned)


def _possible(log_density: Array) -> Array:
    """-inf for what is impossible: NumPyro's Categorical gives the lowest finite number there, which no sum may add."""
    return jnp.where(log_density <= jnp.finfo(log_density.dtype).min / 4, -jnp.inf, log_density)
