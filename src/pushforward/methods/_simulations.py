"""Simulations to learn from: what is inferred, from what, and where the pairs come from."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import DataError, MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned.amortized import Shape, Stream, kept, simulate
from pushforward.learned.embeddings import Embedding
from pushforward.learned.estimators import Estimator
from pushforward.model import _flow
from pushforward.model.inverse import InverseProblem

_LEAST = 100


def data_shapes(problem: InverseProblem) -> dict[str, tuple[int, ...]]:
    """Shapes of the data sites by name.

    Raises:
        DataError: the model has none.
    """
    names = sorted(problem.structure.data)
    if not names:
        raise DataError(
            f"no site of the model is data: it has {list(problem.sites)}. Name the data that are simulated in "
            "training, as in .fit(model, observed=('y',), ...)."
        )
    wrong = [n for n in names if math.prod(problem.sites[n].shape) == 0]
    if wrong:
        raise DataError(f"data '{wrong[0]}' have no elements (shape {problem.sites[wrong[0]].shape}).")
    return {n: tuple(problem.sites[n].shape) for n in names}


def why_not_simulated(problem: InverseProblem) -> str | None:
    """Why the data cannot be simulated: one is a deterministic site whose value an argument gives."""
    if not problem.structure.without_density:
        return None
    name = min(problem.structure.without_density)
    return (
        f"it is not trained, and cannot simulate '{name}', a numpyro.deterministic, where an argument gives its value. "
        f"Train it without that argument: .fit(model, observed=({name!r},))"
    )


def why_not_shapes(problem: InverseProblem, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why data of other shapes than those of training do not fit, or None where they are the same."""
    found = {n: tuple(problem.sites[n].shape) for n in sorted(problem.structure.data)}
    trained = {n: tuple(shape) for n, shape in shapes.items()}
    return None if found == trained else f"it was trained on data of the shapes {trained}, and these are {found}"


def check_sites(owner: str, problem: InverseProblem, sites: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the latent sites that are inferred, in the order of the model.

    Raises:
        MethodError: one is unknown or discrete, or its prior depends on a site that is left out.
    """
    slots = problem.structure.slots
    unknown = [n for n in sites or () if n not in slots]
    if unknown:
        raise MethodError(f"{owner}(sites=...) names {unknown[0]!r}; the model's latent sites are {list(slots)}.")
    chosen = tuple(n for n in slots if sites is None or n in sites)
    discrete = [n for n in chosen if problem.sites[n].discrete]
    if discrete:
        raise MethodError(
            f"{owner}: the latent site '{discrete[0]}' is discrete, and this method infers continuous ones. Name "
            f"those that it should infer, and the others are integrated out: sites={_others(slots, discrete)!r}."
        )
    if len(chosen) == len(slots):
        return chosen
    found = _flow.data_flow(
        lambda **pieces: {n: v for n, v in problem.constrain(pieces).items() if n in chosen},
        {n: jnp.zeros(s.shape) for n, s in slots.items()},
    )
    for name, sources in found.items():
        beyond = sorted(set(sources) - set(chosen))
        if beyond:
            raise MethodError(
                f"{owner}(sites=...) leaves out '{beyond[0]}', on which the prior of '{name}' depends. Name it as well."
            )
    return chosen


def _others(slots: Mapping[str, Any], left_out: list[str]) -> tuple[str, ...]:
    return tuple(n for n in slots if n not in left_out)


def columns_of(problem: InverseProblem, sites: tuple[str, ...]) -> tuple[int, ...]:
    """Entries of z that belong to the sites."""
    slots = (problem.structure.slots[n] for n in sites)
    return tuple(i for slot in slots for i in range(slot.offset, slot.offset + slot.size))


def shape_of(problem: InverseProblem, estimator: Estimator, embedding: Embedding, columns: tuple[int, ...]) -> Shape:
    """What is to be fitted."""
    return Shape(estimator, embedding, len(columns), embedding.layout(data_shapes(problem)))


def drawn(
    problem: InverseProblem, shape: Shape, columns: tuple[int, ...], size: int, key: Key, runner: Runner
) -> tuple[Array, Array]:
    """Pairs from prior and likelihood, those that failed left out."""
    u, values = runner.call(simulate, problem, shape.embedding, shape.layout, columns, size, key)
    return kept(u, values, shape.embedding, "simulations from the prior")


def stream(problem: InverseProblem, shape: Shape, columns: tuple[int, ...], size: int) -> Stream:
    """The source of new pairs."""
    zero = jnp.zeros(shape.layout)
    return Stream(problem, shape.embedding, shape.layout, columns, size, zero, zero)


def given(
    problem: InverseProblem, shape: Shape, sites: tuple[str, ...], simulations: Any, runner: Runner
) -> tuple[Array, Array]:
    """Pairs from outside: arrays by site name with a leading axis, or an iterable of such dictionaries.

    Raises:
        DataError: a site is missing, or of another shape.
    """
    chunks = [simulations] if isinstance(simulations, Mapping) else simulations
    if isinstance(simulations, str | bytes) or not isinstance(chunks, Iterable):
        raise DataError(
            "simulations= takes a dictionary of arrays by site name, or an iterable of such dictionaries; "
            f"got {type(simulations).__name__}."
        )
    found = [_pairs(problem, shape, sites, chunk, runner) for chunk in chunks]
    total = sum(len(u) for u, _ in found)
    if total < _LEAST:
        raise DataError(f"simulations= has {total} simulations; at least {_LEAST} are needed.")
    u, values = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    return kept(u, values, shape.embedding, "simulations given")


def _pairs(
    problem: InverseProblem, shape: Shape, sites: tuple[str, ...], chunk: Any, runner: Runner
) -> tuple[Array, Array]:
    if not isinstance(chunk, Mapping):
        raise DataError(f"simulations= takes dictionaries of arrays by site name; got {type(chunk).__name__}.")
    names = (*sites, *sorted(problem.structure.data))
    missing = [n for n in names if n not in chunk]
    if missing:
        raise DataError(f"simulations= lacks the site '{missing[0]}'; it needs {list(names)} and has {list(chunk)}.")
    arrays = {n: jnp.asarray(np.asarray(chunk[n]), float) for n in names}
    lengths = {n: v.shape[:1] for n, v in arrays.items()}
    for name, value in arrays.items():
        expected = tuple(problem.sites[name].shape)
        if value.shape[1:] != expected or len(set(lengths.values())) != 1:
            raise DataError(
                f"simulations['{name}'] has shape {value.shape}; expected {('n', *expected)} with one n "
                f"for all sites. Their first axes are {[v.shape[:1] for v in arrays.values()]}."
            )
    return runner.call(_coordinates, problem, shape, sites, arrays)


def _coordinates(
    problem: InverseProblem, shape: Shape, sites: tuple[str, ...], arrays: dict[str, Array]
) -> tuple[Array, Array]:
    def one(row: dict[str, Array]) -> tuple[Array, Array]:
        pieces = problem.noise_of({n: row[n] for n in sites})
        data = {n: row[n] for n in problem.structure.data}
        return jnp.concatenate([pieces[n].reshape(-1) for n in sites]), shape.embedding.arrange(data, shape.layout)

    return jax.lax.map(one, arrays, batch_size=1024)
