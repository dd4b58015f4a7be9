"""Reading a model once: its sites, their roles and shapes, and where each lives in `z`."""

import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.core
import jax.extend
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import biject_to

from pushforward._errors import ArgumentError, DataError, ModelError, PushforwardError
from pushforward._types import Array, Model
from pushforward.model import _trace, coordinates
from pushforward.model._arguments import Arguments, split
from pushforward.model._fingerprint import array_digest, fingerprint
from pushforward.model._laws import broadcast_shape, concrete_support, innermost, outside_domain
from pushforward.model._missing import missing_kind
from pushforward.model._refusals import check_latent

_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_CACHE_SIZE = 128
_structures: "OrderedDict[Any, Structure]" = OrderedDict()


@dataclass(frozen=True)
class Site:
    """What was read about one site.

    `dims` names its axes where plates or a `scan` do; `broadcast` is the shape of data once NumPyro has
    broadcast them against their law; `discrete` says whether a latent site takes separate values, and `states` which,
    where they are finitely many.
    """

    name: str
    role: str
    distribution: str
    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    coordinates: str = ""
    exact: bool = True
    support: Any = None
    event_dim: int = 0
    missing: str = "elements"
    broadcast: tuple[int, ...] = ()
    discrete: bool = False
    states: tuple[int, ...] | None = None


@dataclass(eq=False)
class Structure:
    """The static part of a problem, one object per model, argument shapes and contents.

    It is compared by identity: the cache returns the same object for equal content, so compiled
    functions are found again. With `keyed` the last array is a JAX key that the model draws from. `without_density`
    names data that are deterministic sites, whose values an argument gives.
    """

    model: Model
    arguments: Arguments
    sites: dict[str, Site] = field(default_factory=dict)
    slots: dict[str, _trace.Slot] = field(default_factory=dict)
    data: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    passed_through: dict[str, int] | None = None
    without_density: frozenset[str] = frozenset()
    remembered: dict[Any, Any] = field(default_factory=dict)
    keyed: bool = False

    @property
    def discrete(self) -> tuple[str, ...]:
        """Latent sites that take separate values."""
        return tuple(n for n in self.slots if self.sites[n].discrete)

    @property
    def dimension(self) -> int:
        """Length of `z`."""
        return sum(slot.size for slot in self.slots.values())

    def call(self, arrays: tuple[Array, ...]) -> _trace.Call:
        """The model with its arguments bound."""
        args, kwargs = self.arguments.rebuild(arrays)
        return lambda: self.model(*args, **kwargs)


def read(model: Model, args: tuple, kwargs: dict, observed: tuple[str, ...] | None) -> tuple[Structure, tuple]:
    """Return the structure of a model, read or remembered, and its traced arrays."""
    named = _check_names(observed)
    content = fingerprint(model)
    precision = jnp.result_type(float).name
    for constant in (False, True):
        arguments = split(args, kwargs, constant=constant)
        cache_key = (content, arguments.static, named, precision)
        if cache_key in _structures:
            _structures.move_to_end(cache_key)
            # Of two functions of equal content the latest lives longest: the first one's module may be gone.
            _structures[cache_key].model = model
            return _structures[cache_key], arguments.arrays
        structure = Structure(model, arguments)
        try:
            _fill(structure, arguments.arrays, named)
        except _NEEDS_VALUES as error:
            if constant or not arguments.arrays:
                raise ModelError(
                    "the model's Python code branches on, or takes the length of, a value that depends on a latent "
                    f"site ({error.__notes__[-1]}). Write the branch with jax.numpy.where or "
                    f"jax.lax.cond. JAX said: {str(error).splitlines()[0]}"
                ) from error
            continue
        if constant and any(hasattr(x, "shape") for x in jax.tree.leaves((args, kwargs))):
            warnings.warn(
                "the model needs concrete arrays (it branches on data), so it is compiled with its data as "
                "constants and again for every new data set. Use jax.numpy.where, or pass sizes as Python integers.",
                UserWarning,
                stacklevel=4,
            )
        _structures[cache_key] = structure
        if len(_structures) > _CACHE_SIZE:
            _structures.popitem(last=False)
        return structure, arguments.arrays
    raise AssertionError("unreachable")


def _check_names(observed: Any) -> tuple[str, ...]:
    names = (observed,) if isinstance(observed, str) else tuple(observed or ())
    wrong = [n for n in names if not isinstance(n, str)]
    if wrong:
        raise ArgumentError(f"observed= takes names of sites such as ('y',); got {wrong[0]!r}.")
    return names


def _fill(structure: Structure, arrays: tuple, named: tuple[str, ...]) -> None:
    """Trace the model twice without computing, and keep what the first said."""
    first, jaxpr, names = _inspect(structure, arrays, named)
    second, again, _ = _inspect(structure, arrays, named)
    if [(s.name, s.role, s.shape) for s in first] != [(s.name, s.role, s.shape) for s in second]:
        changed = sorted({s.name for s in first} ^ {s.name for s in second}) or [
            a.name for a, b in zip(first, second, strict=True) if a != b
        ]
        raise ModelError(
            f"the model changes from run to run: sites {changed} differ between two runs. Draw random numbers with "
            "numpyro.sample, and keep no state outside the model."
        )
    if _constants(jaxpr) != _constants(again):
        raise ModelError(
            f"the model changes from run to run: a constant in it (sites {[s.name for s in first]}) differs between "
            "two runs. Draw random numbers with numpyro.sample, and keep no state outside the model."
        )
    structure.sites = {site.name: site for site in first}
    missing = [n for n in named if n not in structure.sites]
    if missing:
        raise DataError(f"observed= names {missing[0]!r}, but the model has the sites {list(structure.sites)}.")
    structure.data = frozenset(s.name for s in first if s.role == "data")
    structure.fixed = frozenset(s.name for s in first if s.role == "fixed")
    inputs = {id(v): i for i, v in enumerate(jaxpr.jaxpr.invars)}
    direct = {n: inputs.get(id(v)) for n, v in zip(names, jaxpr.jaxpr.outvars[: len(names)], strict=True)}
    # A deterministic site is given where an argument is its value; otherwise the model computes it.
    computed = {n for n in names if not structure.sites[n].distribution and direct[n] is None}
    structure.without_density = frozenset(n for n in names if not structure.sites[n].distribution) - computed
    known = {n: index for n, index in direct.items() if index is not None}
    if len(known) == len(direct.keys() - computed):
        structure.passed_through = known


def _inspect(structure: Structure, arrays: tuple, named: tuple[str, ...]) -> tuple[list[Site], Any, list[str]]:
    """Run the model on abstract values with z = 0, and record each site."""
    bodies: dict[str, dict[str, Any]] = {}
    sites: list[Site] = []
    names: list[str] = []

    reached: list[str] = []

    def assign(site: dict) -> Array | None:
        if site["type"] == "sample":
            reached.append(site["name"])
        if site["type"] != "sample" or site["is_observed"] or _trace.is_fixed(site):
            return None
        if site["name"] in named:
            return jnp.zeros(_trace.site_law(site).shape())
        return _record(site, bodies)

    def body(values: tuple) -> tuple[list[Array], list[Array]]:
        trace = _trace.run(structure.call(values), assign, fill_missing=False)
        kept = [s for s in trace.values() if _is_site(s)]
        sites.extend(_describe(s, bodies.get(s["name"]), named) for s in kept)
        if not structure.slots:
            structure.slots = _layout(kept, bodies)
        given = [s["name"] for s in kept if s["type"] == "sample" and s["is_observed"] and not _is_factor(s)]
        given += [s["name"] for s in kept if s["type"] == "deterministic" and s["name"] in named]
        names.extend(given)
        return [trace[n]["value"] for n in given], [s["value"] for s in kept if s["name"] not in given]

    try:
        # NumPyro's own validation says neither which site nor which value; `_describe` does.
        with numpyro.validation_enabled(False):
            jaxpr = jax.make_jaxpr(body)(arrays)
    except PushforwardError:
        raise
    except _NEEDS_VALUES as error:
        error.add_note(_place(reached))
        raise
    except Exception as error:
        raise _stopped(error, reached, arrays) from error
    if any(isinstance(c, jax.core.Tracer) for c in jaxpr.consts):
        raise _hidden(reached)
    return sites, jaxpr, names


def _place(reached: list[str]) -> str:
    return f"after site '{reached[-1]}'" if reached else "before the first site"


def _stopped(error: Exception, reached: list[str], arrays: tuple) -> ModelError:
    """What to say where the user's model, or NumPyro in it, raised."""
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return _hidden(reached)
    shapes = ", ".join(str(tuple(a.shape)) for a in arrays) or "none"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
    return ModelError(
        f"the model stopped {_place(reached)} with {type(error).__name__}: {said}. "
        f"Look at the statement that follows, and at the shapes of the arguments (arrays of shape {shapes} were given)."
    )


def _hidden(reached: list[str]) -> ModelError:
    return ModelError(
        f"one of the sites {reached} stands inside jax.lax.scan, jax.vmap, jax.jit or another transformation of JAX, "
        "which hides it. Use numpyro.contrib.control_flow.scan or numpyro.plate, and keep jit for functions without "
        "sites."
    )


def _constants(jaxpr: Any) -> list:
    """Contents of the constants of a program, inner programs included."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    found = [array_digest(c) for c in getattr(jaxpr, "consts", ())]
    for equation in inner.eqns:
        found += [repr(v.val) for v in equation.invars if isinstance(v, jax.extend.core.Literal)]
        for parameter in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(parameter):
                found += _constants(parameter)
    return found


def _is_program(value: Any) -> bool:
    return isinstance(value, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr)


def _is_site(site: dict) -> bool:
    return site["type"] in ("sample", "deterministic") and not site["name"].startswith(_trace._CORRECTION)


def _is_factor(site: dict) -> bool:
    return site["type"] == "sample" and isinstance(site["fn"], dist.Unit)


def _record(site: dict, bodies: dict[str, dict[str, Any]]) -> Array:
    """Note a latent site as seen where it is sampled (inside the body of a scan: one step of it)."""
    name = site["name"]
    check_latent(site)
    law = _trace.site_law(site)
    try:
        noise_shape = tuple(coordinates.noise_shape(law))
        value = coordinates.push(law, jnp.zeros(noise_shape))
        unconstrained = () if law.is_discrete else tuple(biject_to(law.support).inverse_shape(law.shape()))
    except (TypeError, NotImplementedError) as error:
        raise ModelError(
            f"latent site '{name}' ({type(law).__name__}) has no map from noise: {error} "
            "Give it a proper distribution, continuous or of scalar events."
        ) from error
    bodies[name] = {
        "noise_shape": noise_shape,
        "unconstrained": unconstrained,
        "in_scan": "_scan_current_index" in site["infer"],
        "map": coordinates.describe_map(law),
        "exact": coordinates.is_exact(law),
        "shape": tuple(law.shape()),
        "discrete": law.is_discrete,
        "states": _states(law),
    }
    return value


def _states(law: dist.Distribution) -> tuple[int, ...] | None:
    """The values of a discrete law, where they are finitely many and known when the model is read."""
    if not law.is_discrete or not law.has_enumerate_support:
        return None
    try:
        with jax.ensure_compile_time_eval():
            return tuple(np.asarray(innermost(law).enumerate_support(expand=False)).ravel().tolist())
    except (NotImplementedError, *_NEEDS_VALUES):
        return None


def _layout(kept: list[dict], bodies: dict[str, dict[str, Any]]) -> dict[str, _trace.Slot]:
    slots, offset = {}, 0
    for site in kept:
        body = bodies.get(site["name"])
        if body is None or site["is_observed"]:
            continue
        steps = jnp.shape(site["value"])[0] if body["in_scan"] else None
        slot = _trace.Slot(site["name"], body["noise_shape"], body["unconstrained"], steps, offset)
        slots[slot.name] = slot
        offset += slot.size
    return slots


def _describe(site: dict, body: dict[str, Any] | None, named: tuple[str, ...]) -> Site:
    name, shape = site["name"], tuple(jnp.shape(site["value"]))
    if site["type"] == "deterministic":
        dims = tuple("time" if site.get("_control_flow_done") and axis == 0 else None for axis in range(len(shape)))
        return Site(name, "data" if name in named else "deterministic", "", shape, dims)
    law = site["fn"]
    kind = type(innermost(law)).__name__
    if _is_factor(site):
        return Site(name, "factor", "factor", shape, (None,) * len(shape))
    in_scan = bool(site.get("_control_flow_done"))
    _check_parameters(site)
    if site["is_observed"] or name in named:
        full = broadcast_shape(name, law, shape)
        dims, support = _dims(site, shape, in_scan), concrete_support(law)
        return Site(name, "data", kind, shape, dims, "", True, support, law.event_dim, missing_kind(law), full)
    dims = _dims(site, shape, in_scan)
    if body is not None and in_scan and isinstance(law, dist.MaskedDistribution):
        check_latent(site)
    if body is None:
        return Site(name, "fixed", kind, shape, dims)
    support = None if law.is_discrete else concrete_support(law)
    read = Site(name, "parameter", kind, shape, dims, body["map"], body["exact"], support, law.event_dim)
    return replace(read, discrete=body["discrete"], states=body["states"])


def _check_parameters(site: dict) -> None:
    for parameter, value in outside_domain(site["fn"]):
        kind, law = (DataError, "noise") if site["is_observed"] else (ModelError, "prior")
        raise kind(
            f"the {law} of site '{site['name']}' ({type(innermost(site['fn'])).__name__}) is not usable: its "
            f"{parameter} is {value:.6g}, outside its domain."
        )


def _dims(site: dict, shape: tuple[int, ...], in_scan: bool) -> tuple[str | None, ...]:
    """Names of axes: plates by NumPyro's negative batch dimensions, and time in a scan."""
    names: list[str | None] = [None] * len(shape)
    for frame in site["cond_indep_stack"]:
        axis = len(shape) + frame.dim - site["fn"].event_dim
        if 0 <= axis < len(shape) and shape[axis] == frame.size:
            names[axis] = frame.name
    if in_scan and shape:
        names[0] = "time"
    return tuple(names)
