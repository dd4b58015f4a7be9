"""Data flow: what depends on what in a model."""

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.interpreters.partial_eval import dce_jaxpr

from pushforward._errors import DataError
from pushforward._types import Array
from pushforward.model._trace import Call, Slot, at_time, from_noise, run


def dependence(call: Call, slots: Mapping[str, Slot], z: Array, names: tuple[str, ...]) -> dict[str, set]:
    """Which of the observed sites `names` each other site depends on, by data flow.

    Args:
        call: the model with its arguments bound.
        slots: latent sites.
        z: any point of noise space.
        names: observed sites whose values are followed.
    """
    base = from_noise(slots, z)
    observed = run(call, base, fill_missing=False)
    for site in observed.values():
        if site["type"] in ("sample", "deterministic") and any(map(_has_nan, _inputs(site))):
            raise DataError(
                f"data {list(names)} have missing values, and site '{site['name']}' becomes NaN by them. Impute them "
                f"with numpyro.sample('{names[0]}', ..., obs=..., obs_mask=...) and use its result, or keep NaN out of "
                "all other arguments and of what is computed from the data."
            )
    values = {name: observed[name]["value"] for name in names if _has_unmasked_nan(observed[name])}
    if not values:
        return {}

    def others(**data: Array) -> dict[str, list]:
        def assign(site: dict) -> Array | None:
            if site["name"] in data and site["type"] == "sample":
                return at_time(site, data[site["name"]], "_scan_current_index" in site["infer"])
            return base(site)

        trace = run(call, assign, fill_missing=False)
        return {n: _inputs(s) for n, s in trace.items() if s["type"] in ("sample", "deterministic")}

    return data_flow(others, values)


def data_flow(fn: Callable, values: dict[str, Array]) -> dict[str, set[str]]:
    """Which of the named `values` each output of `fn(**values)` depends on.

    An input counts where it survives dead-code elimination, inside `jit`, `scan` and `cond` too.
    """
    outputs: list[tuple[str, int]] = []

    def flat(given: list[Array]) -> list[Array]:
        parts = {n: jax.tree.leaves(v) for n, v in fn(**dict(zip(values, given, strict=True))).items()}
        outputs.extend((n, len(leaves)) for n, leaves in parts.items())
        return [leaf for leaves in parts.values() for leaf in leaves]

    program = jax.make_jaxpr(flat)(list(values.values())).jaxpr
    found, start = {}, 0
    for name, length in outputs:
        wanted = [start <= i < start + length for i in range(len(program.outvars))]
        _, used = dce_jaxpr(program, wanted)
        found[name] = {source for source, u in zip(values, used, strict=True) if u}
        start += length
    return found


def _has_unmasked_nan(site: dict) -> bool:
    """Whether data are missing where no mask leaves them out (as `obs_mask` does)."""
    law, missing = site["fn"], jnp.isnan(site["value"])
    missing = jnp.any(missing, axis=tuple(range(missing.ndim - law.event_dim, missing.ndim)))
    return bool(jnp.any(missing & law._mask if isinstance(law, dist.MaskedDistribution) else missing))


def _has_nan(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) and bool(jnp.any(jnp.isnan(array)))


def _inputs(site: dict) -> list:
    """The arrays that make the site's law (its value for a deterministic site)."""
    if site["type"] == "deterministic":
        return [site["value"]]
    arrays = [leaf for leaf in jax.tree.leaves(site["fn"]) if eqx.is_array(leaf)]
    return arrays if site["is_observed"] else [*arrays, site["value"]]
