"""The file that touches NumPyro's messengers and messages (with `_scan_trace.py`, for the message of a `scan`).

A model is run with an *assignment*: a function that gives each latent site its value, from noise
`z`, from NumPyro's unconstrained coordinates or from values themselves. Assignments ride on
`numpyro.handlers.substitute`, which NumPyro carries into the body of a `scan`; there the site knows
its step through `infer["_scan_current_index"]`. That key has no public specification:
`tests/test_trace.py` fails loudly when it changes.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import potential_energy

from pushforward._errors import ModelError
from pushforward._types import Array
from pushforward.model import coordinates
from pushforward.model._missing import without_missing
from pushforward.model._refusals import refuse

Call = Callable[[], Any]
Assign = Callable[[dict], Array | None]

_CORRECTION = "_pushforward_correction_"
_LAST_STEP = "_pushforward_last_step"


@dataclass(frozen=True)
class Slot:
    """Where a latent site lives in the flat vector `z` and in unconstrained coordinates."""

    name: str
    noise_shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    steps: int | None
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the site's noise, with the time axis of its `scan` first."""
        return self.noise_shape if self.steps is None else (self.steps, *self.noise_shape)

    @property
    def size(self) -> int:
        """Number of noise coordinates of the site."""
        return math.prod(self.shape)


class Evaluation(eqx.Module):
    """What one run of a model with all latent sites given says.

    Attributes:
        sites: values of the latent sites.
        deterministics: values of the deterministic sites.
        data: values of the observed sites, simulated ones included.
        log_prior: per latent site, its log density in the user's coordinates, element by element.
        log_likelihood: per observed site, its log density, element by element; 0 where data are missing.
        correction: sum of `numpyro.factor` terms, of scaled priors, of what inexact prior maps owe, and of the
            densities of latent sites that the model itself fixes.
    """

    sites: dict[str, Array]
    deterministics: dict[str, Array]
    data: dict[str, Array]
    log_prior: dict[str, Array]
    log_likelihood: dict[str, Array]
    correction: Array

    @property
    def total_log_likelihood(self) -> Array:
        """Sum over everything but the prior N(0, I) of `z`."""
        return sum((jnp.sum(v) for v in self.log_likelihood.values()), start=self.correction)


def evaluate(
    call: Call, assign: Assign, *, fixed: frozenset[str] = frozenset(), fill_missing: bool = True
) -> Evaluation:
    """Run the model once, each latent site set by `assign`, and collect values and densities.

    Args:
        call: the model with its arguments bound.
        assign: values of latent sites.
        fixed: latent sites that `numpyro.handlers.substitute` sets inside the model.
        fill_missing: whether missing data are filled and masked.
    """
    trace = run(call, assign, fill_missing=fill_missing)
    parts: dict[str, dict[str, Array]] = {k: {} for k in ("sites", "values", "data", "prior", "likelihood")}
    correction = jnp.zeros(())
    for name, site in trace.items():
        if site["type"] == "deterministic":
            parts["values"][name] = site["value"]
        if site["type"] != "sample":
            continue
        density = _log_prob(site)
        if name in fixed:
            correction += jnp.sum(density)
        elif not site["is_observed"]:
            parts["sites"][name], parts["prior"][name] = site["value"], density
            if site["scale"] is not None:
                correction += jnp.sum((1 - 1 / site["scale"]) * density)
        elif isinstance(site["fn"], dist.Unit):
            correction += jnp.sum(density)
        else:
            parts["data"][name], parts["likelihood"][name] = site["value"], density
    return Evaluation(*parts.values(), correction)  # type: ignore[reportCallIssue]


def run(call: Call, assign: Assign, *, fill_missing: bool = True) -> "OrderedDict[str, dict]":
    """Trace of the model with values set by `assign`, missing data filled and masked."""
    prepared = _Prepared(call, fill_missing)
    with handlers.trace() as trace:
        handlers.substitute(prepared, substitute_fn=assign)()
    return trace


def _log_prob(site: dict) -> Array:
    intermediates = site["intermediates"]
    extra = (intermediates,) if intermediates else ()
    density = site["fn"].log_prob(site["value"], *extra)
    return density if site["scale"] is None else site["scale"] * density


class _Prepared(numpyro.primitives.Messenger):
    """Refuses what cannot be read, fills missing data, and sets right three things.

    `obs_mask` splits a site into `<name>_observed` and `<name>_unobserved`, the second with the
    observed elements masked; their prior would be improper although nothing depends on them: it gets
    its whole prior. `handlers.scale` around a latent site scales its density, not the Jacobian of its
    coordinates. The body of a `scan` is hidden from handlers outside, and is given one of its own.
    """

    def __init__(self, fn: Call, fill_missing: bool = True):
        super().__init__(fn)
        self.fill_missing = fill_missing

    def process_message(self, msg: dict) -> None:
        refuse(msg)
        if msg["type"] == "control_flow" and is_scan(msg):
            msg["args"] = _with_body(*msg["args"])
            steps = steps_of(*msg["args"][2:4])
            stack = msg["kwargs"]["substitute_stack"]
            msg["kwargs"]["substitute_stack"] = [(kind, _padded(given, kind, steps)) for kind, given in stack]
        if msg["type"] != "sample":
            return
        fn, value = msg["fn"], msg["value"]
        if isinstance(fn, dist.Unit):
            if _is_jacobian(msg["name"]):
                msg["scale"] = None
        elif not msg["is_observed"]:
            msg["fn"] = _whole_prior(msg["name"], fn)
        elif self.fill_missing and _is_float(value):
            msg["fn"], msg["value"] = without_missing(fn, jnp.asarray(value))


class _Body(numpyro.primitives.Messenger):
    """Stands inside the body of a `scan`; tells sites of a reversed scan the index of the last step."""

    def __init__(self, fn: Callable, last: int | None):
        super().__init__(fn)
        self.last = last

    def process_message(self, msg: dict) -> None:
        refuse(msg)
        if msg["type"] == "control_flow":
            raise ModelError(
                "the model has a numpyro scan or cond inside the body of a scan, which NumPyro does not support. Use "
                "jax.lax.scan or jax.lax.cond for an inner loop without sites, or flatten the two loops into one."
            )
        if msg["type"] != "sample":
            return
        if self.last is not None:
            msg["infer"] = msg["infer"] | {_LAST_STEP: self.last}
        if not msg["is_observed"]:
            msg["fn"] = _whole_prior(msg["name"], msg["fn"])


def _whole_prior(name: str, law: dist.Distribution) -> dist.Distribution:
    masked = name.endswith("_unobserved") and isinstance(law, dist.MaskedDistribution)
    return law.base_dist if masked else law


def _with_body(f: Callable, init: Any, xs: Any, length: int | None, reverse: bool) -> tuple:
    return _Body(f, steps_of(xs, length) - 1 if reverse else None), init, xs, length, reverse


def is_scan(msg: dict) -> bool:
    """Whether a `control_flow` message is that of a scan (a cond has the same type)."""
    return len(msg["args"]) == 5


def steps_of(xs: Any, length: int | None) -> int:
    return jnp.shape(jax.tree.leaves(xs)[0])[0] if length is None else length


def _padded(given: Any, kind: str, steps: int) -> Any:
    """Data of `handlers.condition` that end before the scan does, with NaN (missing) after their end."""
    if kind != "condition" or not isinstance(given, Mapping):
        return given

    def pad(value: Any) -> Any:
        lacking = steps - jnp.shape(value)[0] if jnp.ndim(value) else 0
        if lacking <= 0:
            return value
        value = jnp.asarray(value, jnp.result_type(value, float))
        return jnp.concatenate([value, jnp.full((lacking, *value.shape[1:]), jnp.nan, value.dtype)])

    return {name: pad(value) for name, value in given.items()}


def _is_jacobian(name: str) -> bool:
    """Whether a factor is a change of variables: ours, or that of NumPyro's unconstrained coordinates."""
    return name.startswith(_CORRECTION) or (name.startswith("_") and name.endswith("_log_det"))


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def site_law(site: dict) -> dist.Distribution:
    """The distribution of a site with its `sample_shape` made part of the batch."""
    fn, sample_shape = site["fn"], site["kwargs"].get("sample_shape", ())
    return fn.expand(tuple(sample_shape) + tuple(fn.batch_shape)) if sample_shape else fn


def is_fixed(site: dict) -> bool:
    """Whether a latent site, seen where it is sampled, has its value from a handler inside the model."""
    return not site["is_observed"] and site["value"] is not None


def _at_step(site: dict, series: Array, in_scan: bool) -> Array:
    """The entry of a series that the site's step needs, counted in the order of the run."""
    return series[site["infer"]["_scan_current_index"]] if in_scan else series


def at_time(site: dict, series: Array, in_scan: bool) -> Array:
    """The same in the order of the data, which a reversed scan runs through backwards."""
    if not in_scan:
        return series
    step, last = site["infer"]["_scan_current_index"], site["infer"].get(_LAST_STEP)
    return series[step if last is None else last - step]


def from_noise(slots: Mapping[str, Slot], z: Array | Mapping[str, Array]) -> Assign:
    """Latent sites as the pushforward of noise `z` of shape (d,), or of one array for each slot."""

    def assign(site: dict) -> Array | None:
        slot = slots.get(site["name"])
        if slot is None or site["type"] != "sample":
            return None
        flat: Any = (
            z[slot.name] if isinstance(z, Mapping) else jax.lax.slice_in_dim(z, slot.offset, slot.offset + slot.size)
        )
        noise = _at_step(site, flat.reshape(slot.shape), slot.steps is not None)
        law = site_law(site)
        value = coordinates.push(law, noise)
        owed = coordinates.correction(law, noise, value)
        if not (isinstance(owed, float) and owed == 0.0):
            numpyro.factor(_CORRECTION + site["name"], owed)
        return value

    return assign


def from_unconstrained(slots: Mapping[str, Slot], position: Mapping[str, Array]) -> Assign:
    """Latent sites from NumPyro's unconstrained coordinates."""

    def assign(site: dict) -> Array | None:
        if site["type"] != "sample" or site["name"] not in slots:
            return None
        slot = slots[site["name"]]
        value = _at_step(site, position[site["name"]], slot.steps is not None)
        return biject_to(site["fn"].support)(value)

    return assign


def from_values(slots: Mapping[str, Slot], values: Mapping[str, Array]) -> Assign:
    """Latent sites set to given values; sites without one are left to sample."""

    def assign(site: dict) -> Array | None:
        if site["type"] != "sample" or site["name"] not in values:
            return None
        in_scan = slots[site["name"]].steps is not None
        return at_time(site, values[site["name"]], in_scan)

    return assign


def noise_of(
    call: Call, slots: Mapping[str, Slot], data: frozenset[str], values: Mapping[str, Array]
) -> dict[str, Array]:
    """The noise of sites at given values; the sites on which they depend are at their own, or at noise 0."""
    zero = from_noise(slots, {n: jnp.zeros(s.shape) for n, s in slots.items()})
    set_to = from_values(slots, values)
    assign = with_data(lambda site: set_to(site) if site["name"] in values else zero(site), data)
    trace = run(call, assign, fill_missing=False)
    stacked = [n for n in values if slots[n].steps is not None]
    if stacked:
        raise ModelError(
            f"site '{stacked[0]}' belongs to a scan, and the noise of its values is not read in this version. "
            "Leave simulations= out, and the model itself is simulated."
        )
    return {n: coordinates.pull(site_law(trace[n]), trace[n]["value"]) for n in values}


def simulating(assign: Assign, data: frozenset[str], key: Array) -> Assign:
    """Like `assign`, with data and every site left open drawn from its distribution."""

    def extended(site: dict) -> Array | None:
        value = assign(site)
        if value is not None or site["type"] != "sample" or isinstance(site["fn"], dist.Unit):
            return value
        if (site["is_observed"] and site["name"] not in data) or is_fixed(site):
            return None
        site_key = jax.random.fold_in(key, crc32(site["name"].encode()) & 0x7FFFFFFF)
        step = site["infer"].get("_scan_current_index")
        if step is not None:
            site_key = jax.random.fold_in(site_key, step)
        return _sample_like(site, site_key)

    return extended


def with_data(assign: Assign, data: frozenset[str]) -> Assign:
    """Like `assign`, with data that no argument observes set to zero."""

    def extended(site: dict) -> Array | None:
        value = assign(site)
        if value is None and site["type"] == "sample" and site["name"] in data and not site["is_observed"]:
            return jnp.zeros(site_law(site).shape())
        return value

    return extended


def _sample_like(site: dict, key: Array) -> Array:
    """A draw of the site, as large as its observed value where that is larger than the law."""
    law = site_law(site)
    if site["value"] is not None:
        batch = jnp.shape(site["value"])[: jnp.ndim(site["value"]) - law.event_dim]
        batch = jnp.broadcast_shapes(batch, law.batch_shape)
        law = law.expand(batch) if batch != tuple(law.batch_shape) else law
    return law.sample(key)


def conditioned(model: Callable) -> Callable[[dict, tuple, dict], Any]:
    """The model as a function of data for its sites (NaN = missing), and of its own arguments."""

    def run(data: dict[str, Array], args: tuple, kwargs: dict) -> Any:
        return handlers.condition(model, data=data)(*args, **kwargs)

    return run


def potential(call: Call, position: Mapping[str, Array]) -> Array:
    """NumPyro's own potential energy in its unconstrained coordinates, missing data dropped."""
    return potential_energy(_Prepared(call), (), {}, position)
