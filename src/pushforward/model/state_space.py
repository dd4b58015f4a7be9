"""`StateSpace`: a NumPyro model with one `scan`, read as initial state, step and observation.

Given its parameters the model is a chain: ``(x_0, y_0)`` is a function of noise ``z_0`` and ``(x_t, y_t)`` of
``x_{t-1}`` and noise ``z_t``, all noise N(0, I). The state ``x`` holds the random leaves of the carry as one flat
vector; counters and other known leaves ride along.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array
from pushforward.model._chain import ChainStructure, read_chain
from pushforward.model._observed import flat
from pushforward.model.inverse import InverseProblem


class Observed(eqx.Module):
    """Data of one step with their prediction: ``data ~ (mean, noise)``.

    Attributes:
        mean: predicted data, shape (m,).
        noise: variances (m,), or a covariance (m, m).
        data: data (m,), NaN where missing.
        log_prob: per observed site, its log density element by element.
    """

    mean: Array
    noise: Array
    data: Array
    log_prob: dict[str, Array]


class Moved(eqx.Module):
    """What one step gives: the next state (n,), what rides along, site values, and the step's data."""

    state: Array
    riders: list[Array]
    sites: dict[str, Array]
    returned: Any
    observed: Observed
    log_prior: dict[str, Array]
    factor: Array


class StateSpace(eqx.Module):
    """A state-space model with its data.

    Attributes:
        arrays: the model's array arguments.
        structure: what was read.
        joined: parameters that are part of the state (augmentation): their noise is carried along unchanged.
    """

    arrays: tuple[Array, ...]
    structure: ChainStructure = eqx.field(static=True)
    joined: tuple[str, ...] = eqx.field(static=True, default=())

    @property
    def problem(self) -> InverseProblem:
        """The same model as one joint density."""
        return InverseProblem(self.arrays, self.structure.joint)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Latent sites that the chain needs values of."""
        return tuple(n for n in self.structure.parameters if n not in self.joined)

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return self.structure.length

    @property
    def initial_dimension(self) -> int:
        """Length of the noise z_0 behind the initial state."""
        return _size(self.structure, (*self.joined, *self.structure.initial))

    @property
    def noise_dimension(self) -> int:
        """Length q of the noise of one step."""
        return sum(math.prod(self.structure.joint.slots[n].noise_shape) for n in self.structure.latent)

    @property
    def late_dimension(self) -> int:
        """Length of the noise of latent sites whose law follows from the trajectory."""
        return _size(self.structure, self.structure.late)

    @property
    def state_dimension(self) -> int:
        """Length n of the state."""
        own = sum(math.prod(self.structure.carry[i].shape) for i in self.structure.state)
        return own + _size(self.structure, self.joined)

    def chain(self, values: dict[str, Array] | None = None) -> "Chain":
        """The chain at given values of the parameters (none where the model has none)."""
        s, slots = self.structure, self.structure.joint.slots
        given = {n: jnp.asarray(v) for n, v in (values or {}).items() if n in self.parameters}
        own = {n: jnp.zeros(slots[n].shape) for n in _outer(s) if n not in s.parameters}
        free = {n: jnp.zeros(s.joint.sites[n].shape) for n in self.joined}
        return Chain.build(self.arrays, own | given | free, s, self.joined)

    def augmented(self) -> "StateSpace":
        """The same model with its parameters in the state."""
        return StateSpace(self.arrays, self.structure, self.structure.parameters)


class Chain(eqx.Module):
    """A state-space model at given parameters; `outer` holds their values and the noise of other outer sites.

    `bound` holds what the body closes over and scans over; with joined parameters these follow from the state.
    """

    arrays: tuple[Array, ...]
    outer: dict[str, Array]
    bound: dict[str, list[Array]]
    structure: ChainStructure = eqx.field(static=True)
    joined: tuple[str, ...] = eqx.field(static=True, default=())

    @classmethod
    def build(cls, arrays: tuple, outer: dict, structure: ChainStructure, joined: tuple[str, ...] = ()) -> "Chain":
        """The chain at given outer values."""
        found = structure.around(arrays=arrays, outer=outer, **nothing(structure))
        bound = {} if joined else {name: found[name] for name in ("consts", "xs")}
        return cls(arrays, outer, bound, structure, joined)

    def at(self, noise: Array) -> "Chain":
        """The chain whose joined parameters have the values at their noise."""
        if not self.joined:
            return self
        s, slots = self.structure, self.structure.joint.slots
        zeros = {n: jnp.zeros(slots[n].shape) for n in _outer(s)}
        found = s.by_noise(arrays=self.arrays, outer=zeros | _cut(s, self.joined, noise), **nothing(s))
        return Chain.build(self.arrays, self.outer | {n: found["values"][n] for n in self.joined}, s)

    @property
    def joined_size(self) -> int:
        """Length of the noise of the parameters in the state, which comes first in it."""
        return _size(self.structure, self.joined)

    @property
    def initial_dimension(self) -> int:
        """Length of the noise z_0."""
        return self.joined_size + _size(self.structure, self.structure.initial)

    @property
    def noise_dimension(self) -> int:
        """Length q of the noise of one step."""
        return sum(math.prod(self.structure.joint.slots[n].noise_shape) for n in self.structure.latent)

    @property
    def late_dimension(self) -> int:
        """Length of the noise of latent sites after the scan."""
        return _size(self.structure, self.structure.late)

    def around(self, initial: Array, returned: Any = None, last: Any = None, late: Array | None = None) -> dict:
        """What stands around the scan, at noise z_0 and, where given, at what the scan returned."""
        s, k = self.structure, self.joined_size
        outer = self.at(initial[:k]).outer | _cut(s, s.initial, initial[k:])
        if late is not None:
            outer |= _cut(s, s.late, late)
        scanned = nothing(s) if last is None else {"last": last, "stacked": returned}
        return s.around(arrays=self.arrays, outer=outer, **scanned)

    def start(self, initial: Array) -> tuple[Array, list[Array], Observed]:
        """The first state (n,), what rides along, and the data that depend on the first state, at noise z_0 (k,)."""
        found, k = self.around(initial), self.joined_size
        state, riders = _split(self.structure, found["init"])
        observed = _observed({n: found["observed"][n] for n in self.structure.first})
        return jnp.concatenate([initial[:k], state]), riders, observed

    def static_log_likelihood(self) -> Array:
        """Log density of what is observed outside the scan and depends on parameters alone."""
        s = self.structure
        found = s.around(arrays=self.arrays, outer=self.outer, **nothing(s))
        parts = [jnp.sum(found["observed"][n].log_prob) for n in s.static]
        parts += [jnp.sum(v) for v in found["factors"].values()]
        return sum(parts, jnp.zeros(()))

    def step(self, state: Array, riders: list[Array], step: Array, noise: Array) -> Moved:
        """One step from a state (n,) with noise (q,); `step` counts from 0."""
        k = self.joined_size
        if self.joined:
            moved = self.at(state[:k]).step(state[k:], riders, step, noise)
            return eqx.tree_at(lambda m: m.state, moved, jnp.concatenate([state[:k], moved.state]))
        s = self.structure
        found = s.body(
            self.bound["consts"],
            carry=join(s, state, riders),
            x=[v[step] for v in self.bound["xs"]],
            step=jnp.asarray(step),
            noise=_cut(s, s.latent, noise, inner=True),
        )
        return self.moved(found, step)

    def moved(self, found: dict[str, Any], step: Array) -> Moved:
        """What the body of the scan gave at one step."""
        s = self.structure
        observed = dict(found["observed"])
        if s.fused:
            observed |= self._fused(found["returned"], step)
        moved, riding = _split(s, found["carry"])
        return Moved(
            moved, riding, found["sites"], found["returned"], _observed(observed), found["log_prior"], found["factor"]
        )

    def _fused(self, returned: Any, step: Array) -> dict[str, Any]:
        """Sites observed after the scan, at one step: they are local in time, so that all steps may hold this one."""
        s = self.structure
        tiled = jax.tree.map(lambda v: jnp.broadcast_to(v, (s.length, *jnp.shape(v))), returned)
        found = s.around(arrays=self.arrays, outer=self.outer, last=_zeros(s.carry, s.carry_tree), stacked=tiled)
        return {n: jax.tree.map(lambda v: jnp.asarray(v)[step], found["observed"][n]) for n in s.fused}


def _observed(sites: dict[str, Any]) -> Observed:
    mean, noise, data = flat(sites)
    return Observed(mean, noise, data, {n: o.log_prob for n, o in sites.items()})


def _outer(s: ChainStructure) -> tuple[str, ...]:
    return tuple(n for n, slot in s.joint.slots.items() if slot.steps is None)


def _size(s: ChainStructure, names: tuple[str, ...]) -> int:
    return sum(s.joint.slots[n].size for n in names)


def nothing(s: ChainStructure) -> dict[str, Any]:
    """Zeros in the place of what the scan returns."""
    stacked = jax.tree.map(lambda v: jnp.zeros((s.length, *v.shape), v.dtype), s.body.shapes["returned"])
    return {"last": _zeros(s.carry, s.carry_tree), "stacked": stacked}


def _zeros(shapes: list, tree: Any) -> Any:
    return jax.tree.unflatten(tree, [jnp.zeros(v.shape, v.dtype) for v in shapes])


def _cut(
    s: ChainStructure, names: tuple[str, ...], noise: Array, batch: tuple[int, ...] = (), inner: bool = False
) -> dict[str, Array]:
    """Noise by site from a flat vector, whose leading axes are `batch`."""
    found, offset = {}, 0
    for name in names:
        slot = s.joint.slots[name]
        shape = slot.noise_shape if inner or batch else slot.shape
        size = math.prod(shape)
        found[name] = noise[..., offset : offset + size].reshape(*batch, *shape)
        offset += size
    return found


def _split(s: ChainStructure, carry: list[Array]) -> tuple[Array, list[Array]]:
    random = [jnp.ravel(carry[i]) for i in s.state]
    state = jnp.concatenate(random) if random else jnp.zeros(0)
    return state, [
        jnp.asarray(v, c.dtype) for i, (v, c) in enumerate(zip(carry, s.carry, strict=True)) if i not in s.state
    ]


def join(s: ChainStructure, state: Array, riders: list[Array]) -> list[Array]:
    riding, found, offset = iter(riders), [], 0
    for i, shape in enumerate(s.carry):
        if i not in s.state:
            found.append(next(riding))
            continue
        size = math.prod(shape.shape)
        found.append(state[offset : offset + size].reshape(shape.shape).astype(shape.dtype))
        offset += size
    return found


def read_state_space(problem: InverseProblem) -> StateSpace:
    """Read the scan of a model.

    Raises:
        ModelError: no scan, two scans, a nested or reversed one, or a likelihood that is not local in time.
    """
    known = problem.structure.remembered
    if "chain" not in known:
        known["chain"] = read_chain(problem.structure, problem.arrays)
    return StateSpace(problem.arrays, known["chain"])
