"""A function traced once, whose outputs can be computed again and whose data flow can be asked about."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jax.tree_util import DictKey, SequenceKey

from pushforward._types import Array

# What has no derivative although its output follows its input: an affine function contains none of these.
_STEPS = frozenset({"sign", "floor", "ceil", "round", "nextafter", "stop_gradient", "is_finite", "argmax", "argmin"})


class Program:
    """A function of keyword arguments (pytrees of arrays) that returns a dictionary, as a jaxpr.

    The function is traced once, at construction; it may not close over tracers.

    Args:
        fn: pure function of the named inputs.
        inputs: an example (or shapes) of each input.
    """

    def __init__(self, fn: Callable[..., dict[str, Any]], **inputs: Any):
        leaves, self._tree = jax.tree.flatten(inputs)
        self._names = [_head(path) for path, _ in jax.tree_util.tree_flatten_with_path(inputs)[0]]
        self._inputs = [tuple(p) for p, _ in jax.tree_util.tree_flatten_with_path(inputs)[0]]
        self.inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), inputs)
        made: list[Any] = []

        def flat(*values: Array) -> list[Array]:
            result = fn(**jax.tree.unflatten(self._tree, values))
            found, tree = jax.tree.flatten(result)
            made.append((tree, [tuple(p) for p, _ in jax.tree_util.tree_flatten_with_path(result)[0]]))
            return found

        self._closed = jax.make_jaxpr(flat)(*leaves)
        self._out_tree, self._outputs = made[-1]

    @classmethod
    def closing(cls, fn: Callable[..., dict[str, Any]], consts: list[Array], **inputs: Any) -> "Program":
        """A program whose closed-over values are its input ``consts``; their present values are appended to a list."""
        program = cls(fn, **inputs)
        consts.extend(program._closed.consts)
        jaxpr = program._closed.jaxpr
        opened = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
        program._closed = jex.ClosedJaxpr(opened, ())
        paths = [(DictKey("consts"), SequenceKey(i)) for i in range(len(jaxpr.constvars))]
        program._inputs = [*paths, *program._inputs]
        program._names = ["consts"] * len(paths) + program._names
        return program

    def __call__(self, consts: list[Array] | None = None, **inputs: Any) -> dict[str, Any]:
        """Compute all outputs; what is not used is removed when compiled."""
        leaves, tree = jax.tree.flatten(inputs)
        if tree != self._tree:
            raise AssertionError(f"inputs {tree} differ from those traced, {self._tree}")
        return jax.tree.unflatten(self._out_tree, jex.jaxpr_as_fun(self._closed)(*(consts or []), *leaves))

    @property
    def shapes(self) -> dict[str, Any]:
        """Shapes and dtypes of the outputs."""
        avals: list[Any] = self._closed.out_avals
        return jax.tree.unflatten(self._out_tree, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals])

    def same(self, output: tuple, other: tuple) -> bool:
        """Whether two outputs are one and the same value."""
        paths = [_keys(path) for path in self._outputs]
        return self._closed.jaxpr.outvars[paths.index(output)] is self._closed.jaxpr.outvars[paths.index(other)]

    def sources(self, *output: str | int) -> set[tuple]:
        """Which inputs an output depends on, by data flow, as tuples (name, key, ...).

        Args:
            output: path of the output, such as ``"carry", 0``; a prefix stands for all outputs below it.
        """
        wanted = [_keys(path)[: len(output)] == output for path in self._outputs]
        _, used = dce_jaxpr(self._closed.jaxpr, wanted)
        return {_keys(path) for path, u in zip(self._inputs, used, strict=True) if u}

    def steps_of(self, *inputs: str) -> str | None:
        """A primitive without derivative that works on the named inputs and reaches an output, or None."""
        live, _ = dce_jaxpr(self._closed.jaxpr, [True] * len(self._outputs), instantiate=True)
        return _stepping(live, [name in inputs for name in self._names])[0]


def _head(path: tuple) -> str:
    return _keys(path)[0]


def _keys(path: tuple) -> tuple:
    return tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path)


def _stepping(jaxpr: Any, tainted: list[bool]) -> tuple[str | None, list[bool]]:
    """Follow tainted inputs through a program; the first primitive that loses their derivative, and tainted outputs."""
    reached = {id(v): t for v, t in zip(jaxpr.invars, tainted, strict=True)}

    def is_tainted(v: Any) -> bool:
        return not isinstance(v, jex.Literal) and reached.get(id(v), False)

    for equation in jaxpr.eqns:
        marks = [is_tainted(v) for v in equation.invars]
        if not any(marks):
            continue
        inner = [p for p in jax.tree.leaves(equation.params, is_leaf=_is_program) if _is_program(p)]
        outs = [True] * len(equation.outvars)
        if inner and not equation.primitive.name.startswith("custom_"):
            for program in inner:
                body = getattr(program, "jaxpr", program)
                # Operands of loops and branches line up with the inner program at the end (a cond has its index first).
                found, _ = _stepping(
                    body, ([False] * len(body.invars) + marks)[-len(body.invars) :] if body.invars else []
                )
                if found:
                    return found, outs
        elif equation.primitive.name in _STEPS or all(v.aval.dtype.kind in "biu" for v in equation.outvars):
            return equation.primitive.name, outs
        reached |= {id(v): True for v in equation.outvars}
    return None, [is_tainted(v) for v in jaxpr.outvars]


def _is_program(value: Any) -> bool:
    return isinstance(value, jex.ClosedJaxpr | jex.Jaxpr)
