"""What a model may not contain, each with the text that says what to write instead."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from pushforward._errors import DataError, ModelError


def refuse(msg: dict) -> None:
    """Raise where a message cannot be read, before NumPyro handles it."""
    kind, value = msg["type"], msg.get("value")
    name = msg.get("name")
    if kind == "param" and value is None:
        raise ModelError(
            f"site '{name}' is a numpyro.param, which has no prior. Give it one with "
            f"numpyro.sample('{name}', ...), or fix it with "
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
    """Raise `ModelError` where a latent site has no continuous, proper law."""
    name, law = site["name"], site["fn"]
    if "_scan_current_index" in site["infer"] and site["kwargs"].get("sample_shape"):
        raise ModelError(
            f"latent site '{name}' stands in a scan and has a sample_shape, which NumPyro cannot give a density there. "
            f"Write numpyro.sample('{name}', distribution.expand({list(site['kwargs']['sample_shape'])}))."
        )
    if law.is_discrete:
        raise ModelError(
            f"latent site '{name}' ({type(law).__name__}) is discrete. Sum it out by hand "
            "(numpyro.distributions.MixtureSameFamily), or observe it."
        )
    if isinstance(law, dist.MaskedDistribution) and law._mask is not True:
        raise ModelError(
            f"latent site '{name}' stands under numpyro.handlers.mask, which drops its prior where the "
            "mask is False and so leaves it improper. Put the mask around the observed sites only."
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
