"""A NumPyro model of nothing but noise and a log likelihood, for methods that need a problem made here."""

from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
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
        arrays: pytree that it needs; arrays are traced, all else is hashed.
        identity: what tells one `log_likelihood` from another.
    """
    traced, static = eqx.partition(arrays, eqx.is_array)
    values, tree = jax.tree.flatten(traced)
    shapes = tuple((v.shape, v.dtype.name) for v in values)
    name = (identity, size, tree, tuple(jax.tree.leaves(static)), shapes)
    if name not in _KNOWN:

        def model(given: tuple) -> None:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            whole = eqx.combine(jax.tree.unflatten(tree, given), static)
            _scan_trace.add_log_density("log_likelihood", log_likelihood(whole, z))

        structure = Structure(model, Arguments(tuple(values), lambda given: ((given,), {}), None))
        with numpyro.validation_enabled(False):
            _fill(structure, tuple(values), ())
        _KNOWN.clear()
        _KNOWN[name] = structure
    return InverseProblem(tuple(values), _KNOWN[name])
