"""The body of a scan as a program of one step: by noise, by the values of its latent sites, or with new data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from pushforward._errors import ModelError
from pushforward._types import Array
from pushforward.model import _scan_trace, _trace
from pushforward.model._observed import family, observation
from pushforward.model._program import Program
from pushforward.model._reading import Structure
from pushforward.model._refusals import check_law, check_unscaled


@dataclass(frozen=True)
class Mode:
    """How the latent sites of a step have their values.

    Attributes:
        assign: `assign(slots, data, **given)`, where `data` names the observed sites.
        example: by name, what is given.
        replicates: whether the data are drawn anew, and nothing else is wanted.
    """

    assign: Callable[..., _trace.Assign]
    example: Callable[[dict[str, _trace.Slot]], dict[str, Any]]
    replicates: bool = False


def _noise(slots: dict[str, _trace.Slot]) -> dict[str, Any]:
    return {"noise": {n: jnp.zeros(s.noise_shape) for n, s in slots.items()}}


BY_NOISE = Mode(lambda slots, data, noise: _trace.from_noise(slots, noise), _noise)


def by_value(values: dict[str, jax.ShapeDtypeStruct]) -> Mode:
    """Latent sites set to given values of these shapes and types."""
    shapes = dict(values)
    return Mode(lambda slots, data, values: _trace.from_values(slots, values), lambda slots: {"values": shapes})


def _key(slots: dict[str, _trace.Slot]) -> dict[str, Any]:
    return _noise(slots) | {"key": jax.eval_shape(lambda: jax.random.key(0))}


REPLICATED = Mode(
    lambda slots, data, noise, key: _trace.simulating(_trace.from_noise(slots, noise), data, key), _key, replicates=True
)


def is_data(site: dict) -> bool:
    return site["type"] == "sample" and site["is_observed"] and not isinstance(site["fn"], dist.Unit)


def is_factor(site: dict) -> bool:
    return site["type"] == "sample" and isinstance(site["fn"], dist.Unit)


def read_body(
    structure: Structure,
    scan: _scan_trace.Scan,
    tree: Any,
    consts: list,
    carry: list[Array],
    seen: dict | None = None,
    mode: Mode = BY_NOISE,
) -> Program:
    """One step of the scan as a program; what it closes over is appended to `consts`."""
    slots = {n: replace(s, steps=None) for n, s in structure.slots.items() if s.steps is not None}
    xs_leaves, xs_tree = jax.tree.flatten(scan.xs)
    x = [jax.ShapeDtypeStruct(jnp.shape(v)[1:], jnp.result_type(v)) for v in xs_leaves]

    def run(carry: list, x: list, step: Array, **given: Any) -> dict[str, Any]:
        before = jax.tree.unflatten(tree, carry), jax.tree.unflatten(xs_tree, x)
        moved, returned, sites = scan.body(*before, step, mode.assign(slots, structure.data, **given))
        if seen is not None:
            seen["families"] = {n: family(s) for n, s in sites.items() if is_data(s) and n not in structure.fixed}
            seen["factors"] = [n for n, s in sites.items() if is_factor(s) and not _trace._is_jacobian(n)]
            _check_step(structure, sites, frozenset(slots))
        data = {n: s for n, s in sites.items() if is_data(s) and n not in structure.fixed}
        if mode.replicates:
            return {"data": {n: jnp.asarray(s["value"]) for n, s in data.items()}}
        kinds = {n: s["type"] for n, s in sites.items()}
        drawn = {n: s for n, s in sites.items() if n in slots}
        return {
            "carry": [jnp.asarray(v) for v in jax.tree.leaves(moved)],
            "returned": returned,
            "sites": {n: s["value"] for n, s in sites.items() if n in slots or kinds[n] == "deterministic"},
            "observed": {n: observation(s) for n, s in data.items()},
            "log_prior": {n: _trace._log_prob(s) for n, s in drawn.items()},
            "factor": sum((jnp.sum(_trace._log_prob(s)) for s in sites.values() if is_factor(s)), jnp.zeros(())),
        }

    return Program.closing(run, consts, carry=carry, x=x, step=jnp.asarray(0), **mode.example(slots))


def _check_step(structure: Structure, sites: dict, latent: frozenset[str]) -> None:
    """Raise where a site of a step has a law that filters cannot use."""
    for name, site in sites.items():
        if site["type"] != "sample" or is_factor(site):
            continue
        check_law(site)
        if name in latent:
            check_unscaled(site)
        elif name in structure.fixed:
            raise ModelError(
                f"site '{name}' of the scan has its value from handlers.substitute, which does not say whether it is "
                f"data. Give data by obs= or handlers.condition(model, {{'{name}': ...}}), and a known value by "
                "numpyro.deterministic."
            )
