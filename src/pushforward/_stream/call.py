"""What a step of a stream is given: values of the model's remaining parameters, as rows without an axis of time."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from pushforward._errors import ArgumentError, DataError
from pushforward._types import Model
from pushforward.model._arguments import _is_labelled, _plain

Rows = tuple[np.ndarray, ...]
"""Leaves of what one step gives, each with an axis of time of length 1."""


@dataclass(frozen=True)
class Field:
    """One argument of the model that a stream gives: its tree, and each leaf's shape, dtype and whether data come
    from it."""

    name: str
    tree: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    data: tuple[bool, ...] = ()

    def rows(self, value: Any, step: int) -> list[np.ndarray]:
        """The leaves of a value that is like the first one."""
        leaves, tree = jax.tree.flatten(value, is_leaf=_is_labelled)
        if tree != self.tree:
            raise DataError(
                f"'{self.name}' at step {step} is {_tree_text(tree)}, and at the first step it was "
                f"{_tree_text(self.tree)}. Give every step the same structure, NaN where nothing was measured."
            )
        return [self._row(v, s, d, step) for v, s, d in zip(leaves, self.shapes, self.dtypes, strict=True)]

    def _row(self, leaf: Any, shape: tuple[int, ...], dtype: np.dtype, step: int) -> np.ndarray:
        found = _numeric(self.name, leaf)
        if found.shape != shape:
            raise DataError(
                f"'{self.name}' has shape {found.shape} at step {step}, and {shape} at the first step. Rows have no "
                "axis of time, and their shape stays: give NaN where nothing was measured."
            )
        if dtype.kind != "f" and found.dtype.kind == "f" and not np.array_equal(found, np.round(found)):
            raise DataError(
                f"'{self.name}' is not whole at step {step}, and at the first step it was {dtype.name}. Give floats "
                "from the first step on."
            )
        # A copy: JAX may read the row later, and late data need it as it was.
        return np.array(found, dtype)[None]

    def missing(self) -> list[np.ndarray] | None:
        """Rows of NaN, or None where a leaf is no data."""
        if not all(dtype.kind == "f" and data for dtype, data in zip(self.dtypes, self.data, strict=True)):
            return None
        return [np.full((1, *shape), np.nan, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]


def _numeric(name: str, leaf: Any) -> np.ndarray:
    found = np.asarray(_plain(leaf))
    if found.dtype.kind not in "biuf":
        raise DataError(
            f"'{name}' holds {type(leaf).__name__}, and each step of a stream gives numbers: arrays, or trees of "
            "them. What does not change with time goes to pf.online."
        )
    return found


def _tree_text(tree: Any) -> str:
    return "one array" if tree == jax.tree.structure(0) else str(tree)


class Call(NamedTuple):
    """A model with what does not change with time."""

    model: Model
    args: tuple
    kwargs: dict[str, Any]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Parameters of the model that are still without a value, in order; empty where Python cannot tell."""
        try:
            signature = inspect.signature(self.model)
            bound = signature.bind_partial(*self.args, **self.kwargs).arguments
        except (TypeError, ValueError):
            return {}
        open_kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {n: p for n, p in signature.parameters.items() if n not in bound and p.kind not in open_kinds}

    def named(self, values: tuple[Any, ...], named: dict[str, Any], where: str) -> dict[str, Any]:
        """What a step was given, by name; one value without a name goes to the parameter that it must mean.

        Raises:
            ArgumentError: no parameter, or several, to which the value could go; one given twice, or unknown.
        """
        left = self.parameters
        needed = [n for n, p in left.items() if p.default is inspect.Parameter.empty]
        for name in named:
            if name in self.kwargs or (left and name not in left and not self._takes_any):
                raise self._wrong(name, left, where)
        if not values:
            return named
        value, *more = values
        places = [n for n in needed if n not in named] or [n for n in left if n not in named]
        if more or len(needed) > 1 or not places:
            names = ", ".join(f"{n}=..." for n in needed or places or ("y",))
            raise ArgumentError(
                f"{where} takes one value without a name, for the model's one parameter without a value; here "
                f"{len(values)} were given, and the parameters are {needed or list(left)}. Write {where[:-2]}({names})."
            )
        return {places[0]: value} | named

    @property
    def _takes_any(self) -> bool:
        kinds = [p.kind for p in inspect.signature(self.model).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def _wrong(self, name: str, left: Mapping[str, Any], where: str) -> ArgumentError:
        known = inspect.signature(self.model).parameters
        if name in self.kwargs or name in known:
            return ArgumentError(
                f"'{name}' is given twice: to pf.online, for all steps, and to {where}. Leave it out of one of them."
            )
        return ArgumentError(f"the model has no parameter '{name}'; {where} takes {list(left)}.")


def fields_of(given: dict[str, Any]) -> tuple[list[Field], Rows]:
    fields, rows = [], []
    for name, value in given.items():
        leaves, tree = jax.tree.flatten(value, is_leaf=_is_labelled)
        found = [_numeric(name, leaf) for leaf in leaves]
        found = [np.array(v, jax.dtypes.canonicalize_dtype(v.dtype)) for v in found]
        fields.append(Field(name, tree, tuple(v.shape for v in found), tuple(v.dtype for v in found)))
        rows += [v[None] for v in found]
    return fields, tuple(rows)


def floating(leaf: Any) -> np.ndarray:
    return np.asarray(_plain(leaf), float)


def unflatten(fields: list[Field], rows: Rows) -> dict[str, Any]:
    supply = iter(rows)
    return {f.name: jax.tree.unflatten(f.tree, [next(supply) for _ in f.shapes]) for f in fields}
