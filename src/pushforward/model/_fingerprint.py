"""What a Python object *contains*, as a hashable value: the key under which models are compiled.

A compiled model is valid as long as everything it closed over is unchanged. Two functions with the
same code, defaults, closure and globals have the same fingerprint, so a model that is defined again
in a notebook is not compiled again, and one whose global array was changed is.
"""

import functools
import hashlib
import re
import sys
import types
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.core
import numpy as np

_LIBRARIES = ("site-packages", "dist-packages")
_ATOMS = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis), np.dtype)


def fingerprint(value: Any) -> Hashable:
    """Return a hashable value that is equal for equal contents.

    Functions are followed into their code, defaults, closure cells and the globals that their code
    names; arrays count by shape, dtype and bytes; modules of installed packages count by name.
    Objects that cannot be looked into count by identity.
    """
    return _fingerprint(value, {})


def array_digest(array: Any) -> Hashable:
    """Shape, dtype and a 128-bit digest of the bytes of an array."""
    array = np.asarray(jax.random.key_data(array) if _is_key(array) else array)
    if array.dtype.hasobject:
        return ("objects", array.shape, tuple(map(repr, array.ravel().tolist())))
    data = np.ascontiguousarray(array)
    digest = hashlib.blake2b(data.view(np.uint8).reshape(-1).data, digest_size=16).digest()
    return ("array", array.shape, str(array.dtype), digest)


def stable_text(value: Any) -> str:
    """Text of a fingerprint that is the same in every process (objects known by identity count by type)."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _fingerprint(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    if isinstance(value, _ATOMS):
        return (type(value).__name__, value)
    if isinstance(value, jax.core.Tracer):
        return ("identity", _Identity(value))
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return array_digest(value)
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    if id(value) in seen:
        return ("seen", seen[id(value)][0])
    # The value is kept with its number: of one that is freed, another could have the same id.
    seen[id(value)] = len(seen), value
    handler: Any = next((h for kinds, h in _HANDLERS if isinstance(value, kinds)), _object)
    return handler(value, seen)


def _function(fn: types.FunctionType, seen: dict[int, tuple[int, Any]]) -> Hashable:
    if _is_library(getattr(fn, "__module__", None)):
        cells = tuple(_fingerprint(_contents(c), seen) for c in fn.__closure__ or ())
        return ("library", fn.__module__, fn.__qualname__, _code(fn.__code__), cells)
    return (
        "function",
        _code(fn.__code__),
        tuple(_fingerprint(d, seen) for d in fn.__defaults__ or ()),
        _fingerprint(fn.__kwdefaults__ or {}, seen),
        tuple(_fingerprint(_contents(c), seen) for c in fn.__closure__ or ()),
        _globals(fn.__code__, fn.__globals__, seen),
    )


def _code(code: types.CodeType) -> Hashable:
    constants = tuple(_constant(c) for c in code.co_consts)
    return (code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants)


def _constant(value: Any) -> Hashable:
    if isinstance(value, types.CodeType):
        return _code(value)
    # The order of a set differs from process to process, and fingerprints name checkpoints.
    return ("frozenset", tuple(sorted(map(repr, value)))) if isinstance(value, frozenset) else repr(value)


def _names(code: types.CodeType) -> list[str]:
    nested = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return [*code.co_names, *nested]


def _globals(code: types.CodeType, namespace: Mapping[str, Any], seen: dict[int, tuple[int, Any]]) -> Hashable:
    """Fingerprints of the globals that the code names, and of arrays inside its own modules."""
    names = sorted(set(_names(code)))
    found = []
    for name in names:
        if name not in namespace:
            continue
        value = namespace[name]
        found.append((name, _fingerprint(value, seen)))
        if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
            members = [(n, getattr(value, n)) for n in names if hasattr(value, n)]
            found.extend((f"{name}.{n}", _fingerprint(v, seen)) for n, v in members)
    return tuple(found)


def _is_library(module: str | None) -> bool:
    """Whether a module is installed or built in, hence taken as constant."""
    if module is None or module == "__main__":
        return False
    if module.partition(".")[0] in sys.stdlib_module_names:
        return True
    origin = getattr(sys.modules.get(module), "__file__", None) or ""
    return any(part in origin for part in _LIBRARIES)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _partial(value: functools.partial, seen: dict[int, tuple[int, Any]]) -> Hashable:
    return ("partial", *(_fingerprint(v, seen) for v in (value.func, value.args, value.keywords)))


def _method(value: types.MethodType, seen: dict[int, tuple[int, Any]]) -> Hashable:
    return ("method", _fingerprint(value.__func__, seen), _fingerprint(value.__self__, seen))


def _mapping(value: Mapping, seen: dict[int, tuple[int, Any]]) -> Hashable:
    return ("mapping", tuple((_fingerprint(k, seen), _fingerprint(v, seen)) for k, v in value.items()))


def _sequence(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    return (type(value).__name__, tuple(_fingerprint(v, seen) for v in value))


def _set(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    return ("set", tuple(sorted((_fingerprint(v, seen) for v in value), key=repr)))


def _class(value: type, seen: dict[int, tuple[int, Any]]) -> Hashable:
    if _is_library(value.__module__):
        return ("class", value.__module__, value.__qualname__)
    body = {n: v for n, v in vars(value).items() if isinstance(v, types.FunctionType)}
    return ("class", value.__module__, value.__qualname__, _fingerprint(body, seen))


def _code_object(value: types.CodeType, seen: dict[int, tuple[int, Any]]) -> Hashable:
    return _code(value)


class _Identity:
    """Equality by identity that keeps its object alive, so that no address is used twice."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"<{type(self.value).__qualname__}>"


def _object(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    # A weak reference is a cache, such as the inverse that a NumPyro transform remembers once it was used.
    attributes = {n: v for n, v in getattr(value, "__dict__", {}).items() if not isinstance(v, weakref.ref)}
    wrapped = getattr(value, "__wrapped__", None)
    if attributes:
        return ("object", _fingerprint(type(value), seen), _mapping(attributes, seen))
    if callable(wrapped):
        return ("wrapped", type(value).__qualname__, _fingerprint(wrapped, seen))
    if isinstance(value, types.BuiltinFunctionType):
        return ("builtin", value.__module__, value.__qualname__)
    return ("identity", _Identity(value))


_HANDLERS = (
    (types.FunctionType, _function),
    (types.MethodType, _method),
    (functools.partial, _partial),
    (types.CodeType, _code_object),
    (type, _class),
    (Mapping, _mapping),
    ((list, tuple), _sequence),
    ((set, frozenset), _set),
)
