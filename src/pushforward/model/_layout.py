"""How the sites of a `scan` lie in the rows of its trajectory: read once, and refused where they do not say it."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to

from pushforward._errors import ModelError
from pushforward._types import Array
from pushforward.model._chain import ChainStructure, explored_by_value
from pushforward.model._program import Program
from pushforward.model.by_value import valued
from pushforward.model.inverse import InverseProblem
from pushforward.model.state_space import StateSpace


@dataclass(frozen=True, eq=False)
class Layout:
    """How sites lie in the rows of a trajectory.

    Attributes:
        names: latent sites of the scan.
        shapes: of one step of each, unconstrained.
        supports: of each.
        initial: sites of the initial state, which are row 0; none where it is not random.
        carry: entry of a row for each entry of the carry.
        first: for each entry of the carry, that of the initial sites in one vector.
        around: program around the scan by values of the sites outside.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    supports: tuple[Any, ...]
    initial: tuple[str, ...]
    carry: np.ndarray
    first: np.ndarray
    around: Program

    @property
    def state(self) -> tuple[int, ...]:
        """Shape of a row: that of the site where there is one, else all of them in one vector."""
        return self.shapes[0] if len(self.shapes) == 1 and self.shapes[0] else (self.size,)

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return sum(map(math.prod, self.shapes))

    def free(self, index: int, values: Array) -> Array:
        """Unconstrained coordinates of values of a site."""
        return biject_to(self.supports[index]).inv(values)


def read_layout(problem: InverseProblem, s: ChainStructure) -> Layout:
    sites = problem.structure.sites
    if not s.latent:
        raise ModelError(
            "no site of the scan is sampled: its dynamics have no noise, so a trajectory is a function of where it "
            "starts. Give it a little, as in x = numpyro.sample('x', dist.Normal(step(x), sd)), or infer the initial "
            "state with method=pf.NUTS()."
        )
    for name in (*s.latent, *s.initial):
        if sites[name].discrete:
            raise ModelError(f"site '{name}' ({sites[name].distribution}) is discrete, and a trajectory is continuous.")
        if sites[name].support is None:
            raise ModelError(
                f"the support of site '{name}' ({sites[name].distribution}) moves with other sites. Sample it in "
                "coordinates with a fixed support."
            )
    if s.late:
        raise ModelError(
            f"site '{s.late[0]}' is sampled after the scan and depends on the trajectory, of which it is no part. "
            "Leave it out, or sample it in the body of the scan."
        )
    slots = problem.structure.slots
    shapes = tuple(tuple(slots[n].unconstrained_shape) for n in s.latent)
    supports = tuple(sites[n].support for n in s.latent)
    if any(shape != sites[n].shape[1:] for n, shape in zip(s.latent, shapes, strict=True)):
        raise ModelError(f"sites {list(s.latent)} have fewer coordinates than numbers (such as a simplex).")
    around = explored_by_value(s, (*s.parameters, *s.initial))
    carry, first = _matched(problem, s, around)
    return Layout(tuple(s.latent), shapes, supports, tuple(s.initial), carry, first, around)


def _matched(problem: InverseProblem, s: ChainStructure, around: Program) -> tuple[np.ndarray, np.ndarray]:
    """Which entry of a step's sites, and of the initial sites, each entry of the carry is: tried at random values."""
    given = problem.constrain(jnp.zeros(problem.dimension))
    drawn = problem.constrain(jax.random.normal(jax.random.key(7), (problem.dimension,)))
    space = StateSpace(problem.arrays, s)
    chain = space.chain({n: given[n] for n in s.parameters})
    inside = {n: drawn[n][-1] for n in s.latent}

    def step() -> Array:
        start, riders, _ = chain.start(jnp.zeros(chain.initial_dimension))
        return valued(chain).step(start, riders, jnp.asarray(0), inside).state

    carry = _places(np.asarray(jax.jit(step)()), [inside[n] for n in s.latent])
    if carry is None:
        raise ModelError(
            f"the carry of the scan is not what its step samples, {list(s.latent)}: the trajectory of these sites does "
            "not say how it goes on. Sample the whole state and carry it:\n"
            "    def step(x, y):\n"
            "        x = numpyro.sample('x', dist.Normal(f(x), sd).to_event(1))\n"
            "        ...\n"
            "        return x, None\n"
            "(earlier values belong to the vector x, too). Data that the call leaves out are named: observed=('y',)."
        )
    if not s.initial:
        return carry, np.zeros(0, int)
    outer = {n: drawn[n] if n in s.initial else given[n] for n in (*s.parameters, *s.initial)}
    blank = {k: jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), around.inputs[k]) for k in ("last", "stacked")}
    init = jax.jit(lambda outer: around(arrays=problem.arrays, outer=outer, **blank)["init"])(outer)
    flat = np.concatenate([np.ravel(init[i]) for i in s.state])
    first = _places(flat, [drawn[n] for n in s.initial])
    if first is None:
        raise ModelError(
            f"the first carry is not what the sites {list(s.initial)} sample, so that the trajectory does not say what "
            "they are. Sample the whole initial state and pass it on, as in scan(step, numpyro.sample('x0', law), ys)."
        )
    return carry, first


def _places(state: np.ndarray, parts: list[Array]) -> np.ndarray | None:
    """For each entry of the state, the entry of the parts in one vector that it equals; None unless one to one."""
    flat = np.concatenate([np.ravel(p) for p in parts]).astype(state.dtype)
    if flat.shape != state.shape:
        return None
    order, sought = np.argsort(flat), np.argsort(state)
    if not np.array_equal(flat[order], state[sought]) or len(np.unique(flat)) != len(flat):
        return None
    places = np.empty(len(flat), int)
    places[sought] = order
    return places
