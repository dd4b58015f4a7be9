"""Arguments of a model, split into traced arrays and static rest.

Arrays (numpy, jax, pandas, xarray) are traced; everything else is static and compared by content.
"""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import ArgumentError
from pushforward._types import Array, Model
from pushforward.model._fingerprint import array_digest, fingerprint

RESERVED = (
    "method", "states", "surrogate", "observed", "key", "draws", "predictive", "coords", "dims",
    "checkpoint", "throw", "progress", "mesh", "group",
)  # fmt: skip
"""Names that `infer` and its companions take for themselves."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a model call: `arrays` are traced, `static` is a hashable description.

    Attributes:
        arrays: array leaves in order.
        rebuild: puts arrays (or tracers) back into `(args, kwargs)`.
        static: hashable content of everything else, tree structure and array types included.
    """

    arrays: tuple[Array, ...]
    rebuild: Callable[[tuple], tuple[tuple, dict]]
    static: Hashable


def check_model(model: Model, args: tuple, kwargs: dict) -> None:
    """Refuse what is not a model, reserved parameter names, and calls that do not bind."""
    if not callable(model):
        raise ArgumentError(
            f"model must be a NumPyro model, a function with numpyro.sample statements; got {_kind(model)}."
        )
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return
    # `functools.partial` keeps in its signature what it binds by name.
    free = [name for name in signature.parameters if name not in getattr(model, "keywords", {})]
    taken = [name for name in free if name in RESERVED]
    if taken:
        raise ArgumentError(
            f"the model has a parameter {taken[0]!r}, a name that pushforward keeps for itself. Bind it first: "
            f"functools.partial(model, {taken[0]}=...), or rename it."
        )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [f"{len(args)} positional"] * bool(args) + list(kwargs)
        raise ArgumentError(
            f"the model cannot be called: {error}. It takes {_name(model)}{signature}; "
            f"given: {', '.join(given) or 'nothing'}. Pass the model's arguments by name to the same call."
        ) from None


def split(args: tuple, kwargs: dict, *, constant: bool = False) -> Arguments:
    """Split a call's arguments; with `constant=True` arrays too are static, compared by content."""
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_labelled)
    leaves = [_plain(leaf) for leaf in leaves]
    traced = [not constant and _is_traced(leaf) for leaf in leaves]
    arrays = tuple(jnp.asarray(leaf) for leaf, t in zip(leaves, traced, strict=True) if t)
    rest = [None if t else leaf for leaf, t in zip(leaves, traced, strict=True)]

    def rebuild(values: tuple) -> tuple[tuple, dict]:
        supply = iter(values)
        return jax.tree.unflatten(tree, [next(supply) if t else r for t, r in zip(traced, rest, strict=True)])

    shapes = tuple((a.shape, str(a.dtype)) for a in arrays)
    static = (tree, tuple(traced), shapes, tuple(_static_key(leaf) for leaf in rest))
    return Arguments(arrays, rebuild, static)


def bound(model: Model, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a call by the names of the model's parameters."""
    try:
        return dict(inspect.signature(model).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return kwargs


def _is_labelled(value: Any) -> bool:
    return hasattr(value, "to_numpy") and hasattr(value, "shape")


def _plain(value: Any) -> Any:
    """Take the array out of pandas and xarray objects; numpy integer scalars become Python's."""
    if _is_labelled(value):
        value = value.to_numpy()
    if isinstance(value, np.generic) and not isinstance(value, np.floating):
        return value.item()
    return value


def _is_traced(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.floating):
        return value.dtype.kind in "biufc"
    return isinstance(value, jax.Array)


def _static_key(value: Any) -> Hashable:
    return array_digest(value) if isinstance(value, np.ndarray | jax.Array) else fingerprint(value)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def _name(model: Model) -> str:
    return getattr(model, "__name__", "model")
