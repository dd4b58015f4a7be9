"""Looking into a distribution: its innermost family, the domain of its parameters, and whether data fit its shape."""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from pushforward._errors import DataError

_WRAPPERS = (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution)


def innermost(law: dist.Distribution) -> dist.Distribution:
    """The family under `expand`, `to_event` and `mask`."""
    while isinstance(law, _WRAPPERS):
        law = law.base_dist
    return law


def concrete_support(law: dist.Distribution) -> object:
    """The support if it does not depend on other sites or arguments, else None."""
    support = law.support
    return None if any(isinstance(x, jax.Array) for x in jax.tree.leaves(support)) else support


def outside_domain(law: dist.Distribution) -> list[tuple[str, float]]:
    """Parameters whose values are known and outside their domain, each with an offending value."""
    law, found = innermost(law), []
    for name, constraint in law.arg_constraints.items():
        value = vars(law).get(name)
        if value is None or isinstance(value, jax.core.Tracer):
            continue
        try:
            if constraint.is_discrete or constraint.event_dim:
                continue
            bad = ~np.asarray(constraint(value)) | np.isnan(np.asarray(value, float))
        except (TypeError, ValueError, NotImplementedError):
            continue
        if bad.any():
            found.append((name, float(np.broadcast_to(np.asarray(value), bad.shape)[bad].flat[0])))
    return found


def broadcast_shape(name: str, law: dist.Distribution, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of data once broadcast against their law.

    Raises:
        DataError: they do not fit.
    """
    event = tuple(law.event_shape)
    batch = shape[: len(shape) - len(event)]
    try:
        if len(shape) < len(event) or shape[len(batch) :] != event:
            raise ValueError
        return (*jnp.broadcast_shapes(batch, tuple(law.batch_shape)), *event)
    except ValueError:
        raise DataError(
            f"data '{name}' have shape {shape}, but the model predicts shape {tuple(law.shape())} "
            f"({type(innermost(law)).__name__}) for them. Pass data of that shape, or look at the shapes of the "
            "model's other arguments."
        ) from None
