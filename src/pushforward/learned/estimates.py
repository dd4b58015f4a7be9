"""What `pf.learn` found: estimates, the model at them, and how both go to a file and come back."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward import _files
from pushforward._errors import ArgumentError, CheckpointError, Outcome, PushforwardError
from pushforward._types import Model
from pushforward.model import _param_sites
from pushforward.model._arguments import _is_labelled, _is_traced, _plain
from pushforward.model._fingerprint import fingerprint, stable_text


class Shape(eqx.Module):
    """An array of which shape and type alone are kept."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """As JAX writes it, in the precision at hand."""
        return jax.ShapeDtypeStruct(self.shape, jax.dtypes.canonicalize_dtype(np.dtype(self.dtype)))


@dataclass(frozen=True, eq=False)
class Origin:
    """How a model was called when it was learned.

    Attributes:
        digest: of the model's code and what it takes from outside.
        call: its arguments `(args, kwargs)`, with a `Shape` for each array.
        params: names of its `numpyro.param` sites.
    """

    digest: str
    call: tuple[tuple, dict[str, Any]]
    params: tuple[str, ...]

    @classmethod
    def of(cls, model: Model, args: tuple, kwargs: dict[str, Any], params: tuple[str, ...]) -> "Origin":
        """That of a call."""
        call = jax.tree.map(_shape_alone, (args, kwargs), is_leaf=_is_labelled)
        return cls(_digest(model), call, params)


@dataclass(frozen=True, eq=False)
class Learned(_files.Stored):
    """What `pf.learn` found; `pf.save` writes it, and ``pf.load(path, model=model)`` reads it.

    No file holds functions: networks among the estimates are made anew by the model that `load` is given, and get the
    numbers of the file.

    Attributes:
        estimates: values by site, latent parameters and `numpyro.param` sites (pytrees) alike.
        standard_errors: by site, from the observed information by the delta method; empty where there are more than 50
            unknown numbers or a network of several layers (Equinox), whose weights are not told apart, where the
            curvature is not that of a maximum, and for `pf.Increments`.
        model: the user's model with its unknowns at the estimates, which `pf.infer(model, method=...)` takes.
        log_likelihood: by step, log p(data given unknowns) as the state method sees it; with `pf.MAP` the log prior is
            added.
        outcome: how the run ended; NOT_POSITIVE_DEFINITE where the curvature was worked out for standard errors and
            there is no maximum in every direction.
        attributes: method, states, steps, seconds, `failed_step` (None while all went well) and warnings.
    """

    described: ClassVar[str] = "what pf.learn found"

    estimates: dict[str, Any]
    standard_errors: dict[str, Any]
    model: Model
    log_likelihood: np.ndarray
    outcome: Outcome
    attributes: dict[str, Any] = field(default_factory=dict)
    origin: Origin | None = field(default=None, repr=False)

    def stored(self, arrays: list[np.ndarray]) -> dict[str, Any]:
        """See `Stored.stored`."""
        if self.origin is None:
            raise ArgumentError("pf.save writes what pf.learn returned, and this `Learned` was made by hand.")
        return {
            "digest": self.origin.digest,
            "precision": _precision(),
            "params": list(self.origin.params),
            # Only networks are made anew by a call of the model.
            "call": _encoded_call(self.origin.call) if self.origin.params else None,
            "estimates": _put(self.estimates, arrays),
            "standard_errors": _put(self.standard_errors, arrays),
            "log_likelihood": _put({"": self.log_likelihood}, arrays),
            "outcome": int(self.outcome),
            "attributes": self.attributes,
        }

    @classmethod
    def restored(cls, value: dict[str, Any], arrays: list[np.ndarray], model: Any) -> "Learned":
        """See `Stored.restored`."""
        if value["precision"] != _precision():
            raise CheckpointError(
                f"it was learned in {value['precision']}, and JAX is in {_precision()}. Set JAX_ENABLE_X64 as it was."
            )
        params = tuple(value["params"])
        call = ((), {}) if value["call"] is None else _files._decode(value["call"], arrays)
        shapes = _shapes(model, call, params) if params else {}
        parts = {n: _taken(value[n], arrays) for n in ("estimates", "standard_errors", "log_likelihood")}
        estimates = {
            n: _filled(n, shapes[n], v) if n in shapes else jnp.asarray(v[0]) for n, v in parts["estimates"].items()
        }
        errors = {
            n: _filled(n, _floating(shapes[n]), v, on_device=False) if n in shapes else v[0][()]
            for n, v in parts["standard_errors"].items()
        }
        digest = _digest(model)
        if digest != value["digest"]:
            warnings.warn(
                "the code of the model, or what it takes from outside (globals, closures, bound arguments), is not "
                "what it was when the estimates were learned. Go on if no number that matters has changed; otherwise "
                "pass the model of then, or learn again.",
                UserWarning,
                stacklevel=3,
            )
        return cls(
            estimates,
            errors,
            _param_sites.fixed(model, estimates),
            parts["log_likelihood"][""][0],
            Outcome(value["outcome"]),
            value["attributes"],
            Origin(digest, call, params),
        )


def _digest(model: Model) -> str:
    return hashlib.blake2b(stable_text(fingerprint(model)).encode(), digest_size=16).hexdigest()


def _precision() -> str:
    return jnp.result_type(float).name


def _shape_alone(leaf: Any) -> Any:
    leaf = _plain(leaf)
    return Shape(tuple(leaf.shape), str(leaf.dtype)) if _is_traced(leaf) else leaf


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, Shape | jax.ShapeDtypeStruct)


def _encoded_call(call: tuple[tuple, dict[str, Any]]) -> Any:
    arrays: list[np.ndarray] = []
    problem = ""
    try:
        encoded = _files._encode(call, arrays)
        same = jax.tree.structure(_files._decode(encoded, arrays)) == jax.tree.structure(call)
    except ArgumentError as error:
        encoded, same, problem = None, False, f" {error}"
    if not same or arrays:
        raise ArgumentError(
            "what pf.learn found is saved with the arguments of the model, by which networks are made anew. Those that "
            f"are no arrays must be numbers, text, or plain lists, tuples and dicts.{problem} Bind others to the "
            "model, functools.partial(model, name=...), and learn with that."
        )
    return encoded


def _put(values: dict[str, Any], arrays: list[np.ndarray]) -> dict[str, list[list]]:
    """Where arrays of each value are in the file, and their types, which files of NumPy do not know all."""
    found: dict[str, list[list]] = {}
    for name, value in values.items():
        found[name] = []
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, jax.Array | np.ndarray | np.generic):
                arrays.append(np.asarray(leaf))
                found[name].append([len(arrays) - 1, str(arrays[-1].dtype)])
    return found


def _taken(where: dict[str, list[list]], arrays: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    return {n: [arrays[i].view(jnp.dtype(kind)) for i, kind in places] for n, places in where.items()}


def _shapes(model: Model, call: tuple[tuple, dict[str, Any]], params: tuple[str, ...]) -> dict[str, Any]:
    """Values of `numpyro.param` sites with shapes in place of arrays, as the model makes them."""
    args, kwargs = jax.tree.map(lambda v: v.abstract if isinstance(v, Shape) else v, call, is_leaf=_is_shape)
    try:
        found = _param_sites.shapes(model, args, kwargs)
    except PushforwardError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0].rstrip(".")
        raise CheckpointError(
            f"the model, called with arguments of the shapes that it was learned with, stopped with "
            f"{type(error).__name__}: {said}. Pass the model that was given to pf.learn."
        ) from error
    if set(found) != set(params):
        raise CheckpointError(
            f"it was learned of a model with numpyro.param sites {sorted(params)}, and this one has {sorted(found)}. "
            "Pass the model that was given to pf.learn."
        )
    return found


def _filled(name: str, like: Any, found: list[np.ndarray], on_device: bool = True) -> Any:
    """A pytree with arrays of the file in place of its shapes."""
    leaves, tree = jax.tree.flatten(like, is_leaf=_is_shape)
    expected = [(v.shape, str(v.dtype) if on_device else "") for v in leaves if _is_shape(v)]
    given = [(v.shape, str(v.dtype) if on_device else "") for v in found]
    if expected != given:
        raise CheckpointError(
            f"numpyro.param '{name}' has arrays {given} in the file, and this model makes {expected}. Pass the model "
            "that was given to pf.learn."
        )
    supply: Iterator[Any] = iter(found)
    put = jnp.asarray if on_device else lambda v: v[()]
    return jax.tree.unflatten(tree, [put(next(supply)) if _is_shape(v) else v for v in leaves])


def _floating(like: Any) -> Any:
    """The shapes of floating arrays alone."""
    return jax.tree.map(lambda v: v if _is_shape(v) and jnp.issubdtype(v.dtype, jnp.inexact) else None, like)
