"""What a model may not contain, each with the text that says what to write instead."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from pushforward._errors import DataError, ModelError
from pushforward.model._laws import innermost, outside_domain


def refuse(msg: dict) -> None:
    """Raise where a message cannot be read, before NumPyro handles it."""
    kind, value = msg["type"], msg.get("value")
    name = msg.get("name")
    if kind == "param" and value is None:
        raise ModelError(
            f"site '{name}' is a numpyro.param, which has no prior. Estimate it with pf.learn(model, ...), give it a "
            f"prior with numpyro.sample('{name}', ...), or fix it with "
            f"numpyro.handlers.substitute(model, {{'{name}': value}})."
        )
    if kind == "plate" and value is None:
        size, part = msg["args"]
        raise ModelError(
            f"plate '{name}' subsamples {part} of {size} rows; inference uses all data. "
            "Drop subsample_size (batch_size= of a method bounds memory)."
        )
    if kind in ("mutable", "prng_key"):
        raise ModelError(
            f"the model calls numpyro.{kind}{'' if name is None else f' ({name!r})'}, so it changes from run to run. "
            "Draw random numbers with numpyro.sample, or make them an argument of the model."
        )
    if kind == "sample" and msg["is_observed"] and not isinstance(msg["fn"], dist.Unit):
        _check_array(name, value)
    if kind == "control_flow" and len(msg["args"]) == 5:
        _check_lengths(*msg["args"][2:4])


def _check_lengths(xs: Any, length: Any) -> None:
    """Raise where a scan does not know its number of steps, or knows two, or is given text."""
    for path, x in jax.tree_util.tree_flatten_with_path(xs)[0]:
        if isinstance(x, str | bytes | np.ndarray) and np.asarray(x).dtype.kind in "USO":
            raise DataError(
                f"xs{jax.tree_util.keystr(path)} of the scan is an array of {np.asarray(x).dtype}, where numbers are "
                "needed. Convert it with numpy.asarray(..., dtype=float)."
            )
    leaves = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_flatten_with_path(xs)[0]}
    if not leaves and length is None:
        raise ModelError(
            "the scan has neither xs nor length, so its number of steps is unknown. Write scan(step, x0, ys), or "
            "scan(step, x0, None, length=steps)."
        )
    single = next((path for path, shape in leaves.items() if not shape), None)
    if single is not None:
        raise ModelError(
            f"xs{single} of the scan is a single number, where an axis of time is needed. Close over it in the body, "
            "or repeat it for each step."
        )
    if len({shape[0] for shape in leaves.values()} | ({length} - {None})) > 1:
        given = ", ".join(f"xs{path} has {shape[0]}" for path, shape in leaves.items())
        given += "" if length is None else f", length is {length}"
        raise ModelError(
            f"the scan is given different numbers of steps: {given}. Pass data and covariates of one length (NaN for "
            "data that are missing), and leave length out where there are xs."
        )


def _check_array(name: Any, value: Any) -> None:
    if isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float):
        dtype = jnp.result_type(value) if isinstance(value, jax.Array) else np.asarray(value).dtype
        if any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
            return
        given = f"an array of {dtype}"
    else:
        given = f"a {type(value).__name__}"
    raise DataError(
        f"data '{name}' are {given}, where an array of real numbers is needed. Convert them with "
        "numpy.asarray(..., dtype=float) before they reach obs=."
    )


def check_latent(site: dict) -> None:
    """Raise `ModelError` where a latent site has no proper law of its own."""
    name, law = site["name"], site["fn"]
    if "_scan_current_index" in site["infer"] and site["kwargs"].get("sample_shape"):
        raise ModelError(
            f"latent site '{name}' stands in a scan and has a sample_shape, which NumPyro cannot give a density there. "
            f"Write numpyro.sample('{name}', distribution.expand({list(site['kwargs']['sample_shape'])}))."
        )
    if isinstance(law, dist.MaskedDistribution) and law._mask is not True:
        raise ModelError(
            f"latent site '{name}' stands under numpyro.handlers.mask, which drops its prior where the "
            "mask is False and so leaves it improper. Put the mask around the observed sites only."
        )


def discrete(name: str, distribution: str, *, in_scan: bool) -> str:
    """What to say of a discrete latent site, to a method that has no use for it."""
    states = "use method=pf.DiscreteHMM() or pf.ParticleFilter(), which take discrete states, " if in_scan else ""
    return (
        f"latent site '{name}' ({distribution}) is discrete: {states}sum it out by hand "
        "(numpyro.distributions.MixtureSameFamily), or observe it"
    )


def check_unscaled(site: dict) -> None:
    """Raise where a latent site that is integrated out has a scaled density."""
    if site["scale"] is not None:
        raise ModelError(
            f"latent site '{site['name']}' stands under handlers.scale, which leaves it a density that nothing can be "
            "drawn from. Put the scale around observed sites only, or use method=pf.NUTS() on the joint density."
        )


def check_law(site: dict) -> None:
    """Raise where a parameter of a site's law is known and not usable."""
    name, law, what = site["name"], innermost(site["fn"]), "noise" if site["is_observed"] else "law"
    bad = outside_domain(law)
    for parameter in law.arg_constraints:
        value = vars(law).get(parameter)
        if value is None or isinstance(value, jax.core.Tracer):
            continue
        array = np.asarray(value)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad.append((parameter, float(array[~np.isfinite(array)].flat[0])))
    if bad:
        raise (DataError if site["is_observed"] else ModelError)(
            f"the {what} of site '{name}' ({type(law).__name__}) is not usable: its {bad[0][0]} is {bad[0][1]:.6g}, "
            "where a finite value inside its domain is needed."
        )


def refuse_flow(msg: dict, *, is_scan: bool, again: bool, around: list) -> None:
    """Raise where a `control_flow` message is not the one forward scan that state methods read."""
    if not is_scan:
        raise ModelError(
            "state methods read one numpyro scan, and the model has a numpyro cond outside it. Use jax.numpy.where or "
            "jax.lax.cond on values, or method=pf.NUTS() on the joint density."
        )
    if again:
        raise ModelError(
            "the model has two scans, and state methods read one. Put both states into the carry of a single scan, or "
            "use method=pf.NUTS() on the joint density."
        )
    _, _, _, _, reverse = msg["args"]
    if reverse:
        raise ModelError(
            "the scan has reverse=True, and filters run forward in time. Flip the data (ys[::-1]) and scan forward, "
            "or use method=pf.NUTS() on the joint density."
        )
    if msg["kwargs"].get("history", 1) != 1:
        raise ModelError(
            f"the scan has history={msg['kwargs']['history']}, which is for enumerated discrete sites. Put the earlier "
            "values into the carry, as in carry = (x_t, x_t-1)."
        )
    for handler in around:
        kind = type(handler).__name__
        if kind in ("scale", "mask"):
            raise ModelError(
                f"handlers.{kind} stands around the scan, where filters cannot see it. Put it inside the body of the "
                "scan, around the sites it is meant for (missing data may also be NaN)."
            )
