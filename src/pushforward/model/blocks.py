"""Independent blocks of a linear chain, such as the members of a plate: each is filtered by itself.

Which entries of state, noise and data hang together is read off the program of the step, not off numbers: NaN is
put into one input at a time and followed, every choice taking all of its cases.
"""

from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pushforward._types import Array
from pushforward.math.kalman import Step
from pushforward.model.state_space import Chain, StateSpace

_LIMIT = 4000
_INDEXED = frozenset({"gather", "scatter", "scatter-add", "dynamic_slice", "dynamic_update_slice"})
_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint"}
)


class Blocks(NamedTuple):
    """Indices of the blocks' entries, one row per block: in the state, the step's noise and data, z_0 and y_0."""

    state: np.ndarray
    noise: np.ndarray
    data: np.ndarray
    initial: np.ndarray
    first: np.ndarray

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.state)


def blocks(space: StateSpace) -> Blocks | None:
    """The independent blocks of a chain with a plate in its step, or None: there is but one, or they differ in size."""
    return space.structure.remember(("blocks", space.joined), lambda: _concretely(space))


def _concretely(space: StateSpace) -> Blocks | None:
    """The blocks are facts about the program, also where they are asked for inside a trace."""
    with jax.ensure_compile_time_eval():
        return _blocks(space)


def _blocks(space: StateSpace) -> Blocks | None:
    n, q, k = space.state_dimension, space.noise_dimension, space.initial_dimension
    s = space.structure
    plated = any(d not in (None, "time") for v in (*s.latent, *s.families) for d in s.joint.sites[v].dims)
    if space.joined or not plated or n < 2 or n + q + k > _LIMIT:
        return None
    chain = jax.eval_shape(space.chain, {v: jnp.zeros(s.joint.sites[v].shape) for v in space.parameters})
    rng = np.random.default_rng(0)
    chain = jax.tree.map(lambda v: _filled(rng, v), chain)
    zero = jnp.zeros(k)
    state, riders, observed = chain.start(zero)

    def start(z: Array) -> Array:
        moved, _, seen = chain.start(z)
        return jnp.concatenate([moved, seen.mean])

    def move(joint: Array) -> Array:
        moved = chain.step(joint[:n], riders, jnp.asarray(0), joint[n:])
        return jnp.concatenate([moved.state, moved.observed.mean])

    step = chain.step(state, riders, jnp.asarray(0), jnp.zeros(q))
    m, m0 = step.observed.mean.shape[0], observed.mean.shape[0]
    links = _links(move, n + q), _links(start, k)
    groups = (_correlated(step.observed.noise, m), _correlated(observed.noise, m0))
    return _grouped(links, groups, (n, q, m, k, m0))


def _filled(rng: np.random.Generator, v: Any) -> Array:
    if jnp.issubdtype(v.dtype, jnp.floating):
        return jnp.asarray(rng.uniform(0.5, 1.0, v.shape), v.dtype)
    if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(v.shape, v.dtype)


def _correlated(noise: Array, m: int) -> np.ndarray:
    """Pairs of data whose noise may be correlated."""
    if noise.ndim == 1:
        return np.zeros((2, 0), int)
    return np.stack(np.nonzero(np.asarray(noise) != 0)) if m else np.zeros((2, 0), int)


def _links(fn: Any, size: int) -> np.ndarray:
    """Whether each output depends on each input: shape (outputs, inputs)."""
    program = jax.make_jaxpr(fn)(jnp.zeros(size))
    if not size:
        return np.zeros((jax.eval_shape(fn, jnp.zeros(size)).size, 0), bool)

    def poisoned(i: Array) -> Array:
        return jnp.isnan(_follow(program.jaxpr, program.consts, [jnp.zeros(size).at[i].set(jnp.nan)])[0])

    return np.asarray(jax.lax.map(poisoned, jnp.arange(size), batch_size=64)).T


def _follow(jaxpr: Any, consts: Any, inputs: list) -> list:
    """Evaluate a program so that NaN reaches all that may depend on it."""
    known = dict(zip([*map(id, jaxpr.constvars), *map(id, jaxpr.invars)], [*consts, *inputs], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else known[id(v)]

    for equation in jaxpr.eqns:
        found = _evaluate(jaxpr, equation, [read(v) for v in equation.invars])
        known |= {id(v): x for v, x in zip(equation.outvars, found, strict=True)}
    return [read(v) for v in jaxpr.outvars]


def _evaluate(jaxpr: Any, equation: Any, values: list) -> list:
    name, params = equation.primitive.name, equation.params
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if name in _CALLS and inner is not None:
        return _follow(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
    if name == "select_n" and _is_float(values[1]):
        return [sum(values[2:], start=values[1])]
    own = {id(v): (v, x) for v, x in zip(equation.invars, values, strict=True) if not isinstance(v, jex.Literal)}
    alone = jaxpr.replace(
        constvars=[], invars=[v for v, _ in own.values()], outvars=equation.outvars, eqns=[equation],
        effects=equation.effects,
    )  # fmt: skip
    found = list(jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))(*(x for _, x in own.values())))
    spreads = name in _INDEXED or any(_holds_program(p) for p in jax.tree.leaves(params, is_leaf=_holds_program))
    if not spreads:
        return found
    bad = jnp.any(jnp.stack([jnp.any(jnp.isnan(v)) for v in values if _is_float(v)] or [jnp.asarray(False)]))
    return [jnp.where(bad, jnp.nan, x) if _is_float(x) else x for x in found]


def _holds_program(value: Any) -> bool:
    return isinstance(value, jex.ClosedJaxpr | jex.Jaxpr)


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _grouped(links: tuple, groups: tuple, sizes: tuple[int, ...]) -> Blocks | None:
    """Connected components of state, noise, data, z_0 and y_0, as blocks of equal sizes."""
    n, q, m, k, m0 = sizes
    offsets = np.cumsum([0, n, q, m, k, m0])
    state, noise, data, initial, first = offsets[:5]
    out, into = np.nonzero(links[0])
    rows = [np.where(out < n, state + out, data + out - n)]
    columns = [np.where(into < n, state + into, noise + into - n)]
    out, into = np.nonzero(links[1])
    rows.append(np.where(out < n, state + out, first + out - n))
    columns.append(initial + into)
    for base, pairs in ((data, groups[0]), (first, groups[1])):
        rows.append(base + pairs[0])
        columns.append(base + pairs[1])
    a, b = np.concatenate(rows), np.concatenate(columns)
    total = int(offsets[-1])
    _, label = connected_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(total, total)), directed=False)
    kinds = np.repeat(np.arange(5), sizes)
    owners = np.unique(label[kinds == 0])
    if len(owners) < 2 or not np.isin(label, owners).all():
        return None
    parts = []
    for kind in range(5):
        rows_of = [np.nonzero(label[kinds == kind] == owner)[0] for owner in owners]
        if len({len(r) for r in rows_of}) > 1:
            return None
        parts.append(np.stack(rows_of))
    return Blocks(*parts)


def block_step(chain: Chain, found: Blocks, riders: list[Array], step: Array) -> Step:
    """The matrices of all blocks, leading axis block, by one tangent for all blocks at once."""
    n, q = found.state.size, found.noise.size

    def run(joint: Array) -> tuple[tuple[Array, Array], Array]:
        moved = chain.step(joint[:n], riders, step, joint[n:])
        return (moved.state, moved.observed.mean), moved.observed.noise

    inputs = np.concatenate([found.state, n + found.noise], 1)
    return _compressed(run, inputs, n + q, found.state, found.data, found.state.shape[1])


def block_first(chain: Chain, found: Blocks) -> Step:
    """The same for the initial law."""

    def run(z: Array) -> tuple[tuple[Array, Array], Array]:
        state, _, observed = chain.start(z)
        return (state, observed.mean), observed.noise

    return _compressed(run, found.initial, found.initial.size, found.state, found.first, 0)


def _compressed(run: Any, inputs: np.ndarray, size: int, state: np.ndarray, data: np.ndarray, n: int) -> Step:
    zero = jnp.zeros(size)
    (value, mean), push, noise = jax.linearize(run, zero, has_aux=True)
    seeds = np.zeros((inputs.shape[1], size))
    seeds[np.arange(inputs.shape[1])[None], inputs] = 1.0
    slopes, data_slopes = jax.vmap(push)(jnp.asarray(seeds, zero.dtype))
    maps, data_maps = (jnp.moveaxis(s[:, i], 0, -1) for s, i in ((slopes, state), (data_slopes, data)))
    R = noise[data] if noise.ndim == 1 else noise[data[:, :, None], data[:, None, :]]
    return Step(maps[..., :n], maps[..., n:], value[state], data_maps[..., :n], data_maps[..., n:], mean[data], R)
