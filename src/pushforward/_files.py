"""Files of this library: arrays and a versioned JSON header in one `.npz`, never pickle."""

import dataclasses
import json
import os
import tempfile
import zlib
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import ArgumentError, CheckpointError

FORMAT = 1
_HEADER = "header"


def _write(path: Path, header: dict[str, Any], arrays: list[np.ndarray]) -> None:
    """Write to a temporary file and rename, so that an interrupted write destroys nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = np.frombuffer(json.dumps(header | {"format": FORMAT}).encode(), np.uint8)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            named: dict[str, Any] = {_HEADER: text} | {f"array_{i}": a for i, a in enumerate(arrays)}
            np.savez(file, **named)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(bytes(file[_HEADER]).decode())
            arrays = [file[f"array_{i}"] for i in range(len(file.files) - 1)]
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is not a file of pushforward, or is damaged: {error}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {header.get('format')}; this version reads format {FORMAT}.")
    return header, arrays


def _to_numpy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _like(array: np.ndarray, leaf: Any) -> Any:
    if jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
    return jnp.asarray(array, leaf.dtype)


def write_checkpoint(path: Path, identity: str, step: int, state: Any) -> None:
    """Write a run's state after `step` steps; `identity` says which run it belongs to."""
    arrays = [_to_numpy(leaf) for leaf in jax.tree.leaves(state)]
    _write(path, {"kind": "checkpoint", "identity": identity, "step": int(step)}, arrays)


def read_checkpoint(path: Path, identity: str, like: Any) -> tuple[int, Any]:
    """Return the step and state of a checkpoint, shaped like `like`."""
    header, arrays = _read(path)
    leaves, tree = jax.tree.flatten(like)
    if header.get("kind") != "checkpoint" or header.get("identity") != identity:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another run: model, data, method, options, key and draws must be the "
            "same. Delete it to start anew, or give checkpoint= another path."
        )
    if [a.shape for a in arrays] != [_to_numpy(leaf).shape for leaf in leaves]:
        raise CheckpointError(f"the checkpoint {path} was written by another version. Delete it to start anew.")
    return header["step"], jax.tree.unflatten(tree, [_like(a, leaf) for a, leaf in zip(arrays, leaves, strict=True)])


class Stored(ABC):
    """Base of what `save` writes beside methods: it says what a file holds, and is made anew from that.

    Attributes:
        needs_model: whether `load` must be given the model, which no file holds.
        described: what a file holds, for messages.
    """

    needs_model: ClassVar[bool] = True
    described: ClassVar[str] = "a stream"

    @abstractmethod
    def stored(self, arrays: list[np.ndarray]) -> dict[str, Any]:
        """What JSON can hold; arrays are appended to the list."""

    @classmethod
    @abstractmethod
    def restored(cls, value: dict[str, Any], arrays: list[np.ndarray], model: Any) -> "Stored":
        """The object from what `stored` gave, with the model if it `needs_model`."""


def save(path: str | os.PathLike, method: "eqx.Module | Stored") -> None:
    """Write a method, trained or not, a stream, a `pf.FlowPrior` or what `pf.learn` found to a file that `load` reads.

    The file is written beside its place and then renamed, so that a process that is killed leaves the old or the new.

    Args:
        path: file to write; its folder is made if need be.
        method: an instance of one of this library's methods, a stream, a flow prior, or what `pf.learn` returned.

    Raises:
        ArgumentError: `method` is something else; a result is written with `tree.to_netcdf(path)`.

    Example:
        >>> import pushforward as pf, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "nuts.pf"
        >>> pf.save(path, pf.NUTS(chains=2))
        >>> pf.load(path).chains
        2
    """
    arrays: list[np.ndarray] = []
    if isinstance(method, Stored):
        kind = type(method)
        header = {"kind": "stored", "class": [kind.__module__, kind.__qualname__], "value": method.stored(arrays)}
        _write(Path(path), header, arrays)
        return
    if not isinstance(method, eqx.Module) or not _is_ours(type(method)):
        raise ArgumentError(
            f"pf.save writes methods and streams of pushforward; got {type(method).__name__}. "
            "Of distributions it writes a FlowPrior, and of what pf.learn returns the whole, not its parts; a result "
            "is written with tree.to_netcdf('result.nc')."
        )
    _write(Path(path), {"kind": "method", "value": _encode(method, arrays)}, arrays)


def load(path: str | os.PathLike, *, model: Any = None) -> Any:
    """Read a method, a stream, a flow prior or what `pf.learn` found, as `save` wrote it.

    Args:
        path: the file.
        model: for a stream and for what was learned, the model that `pf.online` or `pf.learn` was given, since
            functions are never written to files.

    Raises:
        ArgumentError: a stream, or what was learned, without its model, or anything else with one.
        CheckpointError: the file is missing, damaged, or holds something else, or belongs to another model.
    """
    header, arrays = _read(Path(path))
    if header.get("kind") not in ("method", "stored"):
        raise CheckpointError(f"{path} holds a {header.get('kind')}, not a method. Pass it to infer(checkpoint=...).")
    if header["kind"] == "method":
        if model is not None:
            raise ArgumentError(f"{path} holds a method, which needs no model. Write pf.load(path).")
        return _decode(header["value"], arrays)
    kind = _stored_class(header.get("class"), path)
    if kind.needs_model and not callable(model):
        raise ArgumentError(
            f"{path} holds {kind.described}. Write pf.load(path, model=model), with the model that it belongs to."
        )
    if not kind.needs_model and model is not None:
        raise ArgumentError(f"{path} holds a {kind.__name__}, which needs no model. Write pf.load(path).")
    try:
        return kind.restored(header["value"], arrays, model)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, or was written by another version: {error}") from error


def _stored_class(named: Any, path: Any) -> type[Stored]:
    module, name = named if isinstance(named, list) and len(named) == 2 else (None, None)
    kind = getattr(_module(str(module)), str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, Stored)):
        raise CheckpointError(
            f"{path}: the file names {module}.{name}, which this version of pushforward does not have."
        )
    return kind


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def _encode(value: Any, arrays: list[np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_encode(v, arrays) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, arrays)] for k, v in value.items()]}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        arrays.append(_to_numpy(value))
        return {"array": len(arrays) - 1}
    if isinstance(value, eqx.Module) and _is_ours(type(value)):
        fields = {f.name: _encode(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}
        return {"class": [type(value).__module__, type(value).__qualname__], "fields": fields}
    raise ArgumentError(f"pf.save cannot write a field of type {type(value).__name__}.")


def _module(name: str) -> Any:
    if not name.startswith("pushforward."):
        return None
    try:
        return import_module(name)
    except ImportError:
        return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _decode(value: Any, arrays: list[np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    if "list" in value:
        return [_decode(v, arrays) for v in value["list"]]
    if "tuple" in value:
        return tuple(_decode(v, arrays) for v in value["tuple"])
    if "dict" in value:
        return {k: _decode(v, arrays) for k, v in value["dict"]}
    if "array" in value:
        return jnp.asarray(arrays[value["array"]])
    module, name = value["class"]
    kind = getattr(_module(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, eqx.Module)):
        raise CheckpointError(f"the file names {module}.{name}, which this version of pushforward does not have.")
    made = object.__new__(kind)
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    for field, content in value["fields"].items():
        found, default = _decode(content, arrays), defaults.get(field)
        # Equinox leaves out of a repr what *is* the default.
        same = type(found) is type(default) and _is_plain(found) and found == default
        object.__setattr__(made, field, default if same else found)
    return made
