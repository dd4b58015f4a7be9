"""A NumPyro model of nothing but noise and a log likelihood, for methods that need a problem made here."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from pushforward._types import Array
from pushforward.model import _scan_trace
from pushforward.model._arguments import Arguments
from pushforward.model._reading import Structure, _fill
from pushforward.model.inverse import InverseProblem

_KNOWN: dict[Any, Structure] = {}


def with_likelihood(
    log_likelihood: Callable[[Any, Array], Array], size: int, arrays: Any, identity: Hashable
) -> InverseProblem:
    """The problem z ~ N(0, I) with the log likelihood ``log_likelihood(arrays, z)``.

    Args:
        log_likelihood: pure function.
        size: length of z.
        arrays: pytree that it needs, traced.
        identity: what tells one `log_likelihood` from another.
    """
    leaves, tree = jax.tree.flatten(arrays)
    values = tuple(jnp.asarray(v) for v in leaves)
    shapes = tuple((v.shape, v.dtype.name) for v in values)
    name = (identity, size, tree, shapes)
    if name not in _KNOWN:

        def model(given: tuple) -> None:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            _scan_trace.add_log_density("log_likelihood", log_likelihood(jax.tree.unflatten(tree, given), z))

        structure = Structure(model, Arguments(values, lambda given: ((given,), {}), None))
        with numpyro.validation_enabled(False):
            _fill(structure, values, ())
        _KNOWN.clear()
        _KNOWN[name] = structure
    return InverseProblem(values, _KNOWN[name])
