"""The compiled functions of a stream."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._runner import _compile
from pushforward._types import Array
from pushforward.methods._state import StateMethod
from pushforward.model.state_space import StateSpace


class Program:
    """The two compiled functions of a stream: `begin` and `advance`, on flat lists of arrays.

    One jitted call per step, with the moments in one packed vector, so that Python and transfers cost little.
    """

    def __init__(self, method: StateMethod, space: StateSpace, key: tuple[np.ndarray, str]):
        self.method, self.space = method, space
        self._key, self._impl = jnp.asarray(key[0]), key[1]
        shapes = jax.eval_shape(lambda s: _example(method, s, self._key, self._impl), space)
        self.belief, increment = jax.tree.leaves(shapes[0]), shapes[1]
        self._tree = _Static(jax.tree.structure(shapes[0]))
        self._places: list[tuple[str, str, tuple[int, ...], slice]] = []
        offset = 0
        for part in ("mean", "sd", "summary"):
            for name, value in getattr(increment, part).items():
                self._places.append((part, name, value.shape, slice(offset, offset + value.size)))
                offset += value.size
        self._advance: Any = None

    def begin(self, arrays: list[Any]) -> tuple[list[Array], float]:
        """The belief before the first step, and the log likelihood of data that depend on it or on nothing."""
        space = StateSpace(tuple(map(jnp.asarray, arrays)), self.space.structure, self.space.joined)
        compiled, leaves, _ = _compile(_begin, (self.method, space, self._key, self._impl))
        belief, value = compiled(*leaves)
        return belief, float(value)

    def advance(self, arrays: list[Any], belief: list[Array], count: int) -> tuple[list[Array], dict, float, bool]:
        """The belief after a step, its moments by kind and site, its log likelihood, and whether all is finite."""
        number = np.uint32(count)
        if self._advance is None:
            given = (self.method, tuple(map(jnp.asarray, arrays)), belief, self._key, jnp.asarray(number))
            static = (_Static(self.space.structure), self.space.joined, self._tree, self._impl)
            self._advance, leaves, _ = _compile(_advance, (*given, *static))
            self._head = leaves[: len(leaves) - len(arrays) - len(belief) - 2]
        after, packed = self._advance(*self._head, *arrays, *belief, self._key, number)
        # A copy of the one transfer, which the caller may write to.
        found = np.array(packed)
        moments: dict[str, dict[str, np.ndarray]] = {"mean": {}, "sd": {}, "summary": {}}
        for part, name, shape, place in self._places:
            moments[part][name] = found[place].reshape(shape)
        return after, moments, float(found[-2]), bool(found[-1])


class _Static:
    """A hashable value that `_compile` takes as it is; structures count by identity, as they do in `StateSpace`."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


def _keys(data: Array, impl: str) -> tuple[Any, Any]:
    first, second = jax.random.split(jax.random.wrap_key_data(data, impl=impl))
    return first, second


def _example(method: StateMethod, space: StateSpace, data: Array, impl: str) -> tuple[Any, Any]:
    keys, chain = _keys(data, impl), space.chain()
    belief, _ = method.begin(chain, keys[0])
    return belief, method.advance(chain, belief, keys[1])[1]


def _begin(method: StateMethod, space: StateSpace, data: Array, impl: str) -> tuple[list[Array], Array]:
    chain = space.chain()
    belief, value = method.begin(chain, _keys(data, impl)[0])
    # A type that is weak would differ from that of the next belief.
    return [v.astype(v.dtype) for v in jax.tree.leaves(belief)], value + chain.static_log_likelihood()


def _advance(
    method: StateMethod,
    arrays: tuple[Array, ...],
    belief: list[Array],
    data: Array,
    count: Array,
    structure: _Static,
    joined: tuple[str, ...],
    tree: _Static,
    impl: str,
) -> tuple[list[Array], Array]:
    """The next belief, and packed: means, standard deviations, summary, log likelihood, and 1 where all is finite."""
    chain = StateSpace(arrays, structure.value, joined).chain()
    key = jax.random.fold_in(_keys(data, impl)[1], count)
    moved, found = method.advance(chain, jax.tree.unflatten(tree.value, belief), key)
    after = [v.astype(old.dtype) for v, old in zip(jax.tree.leaves(moved), belief, strict=True)]
    floats = [v for v in after if jnp.issubdtype(v.dtype, jnp.floating)]
    # Minus infinity is a log weight of zero.
    fine = [jnp.isfinite(found.log_likelihood), *(jnp.all(v < jnp.inf) for v in floats)]
    # In the order of the tree, which sorts names, as `Program` reads them.
    parts = [*jax.tree.leaves((found.mean, found.sd, found.summary)), found.log_likelihood, jnp.all(jnp.stack(fine))]
    return after, jnp.concatenate([jnp.ravel(p).astype(jnp.result_type(float)) for p in parts])
