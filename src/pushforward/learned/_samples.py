"""What a density is fitted to: samples looked at before the fit, their support, and its coordinates without bounds."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to, constraints

from pushforward._errors import ArgumentError, CheckpointError, DataError, MethodError

FEWEST, FEWEST_PER_DIMENSION = 100, 10
_DISTINCT = 20
_REPEATED = 0.1
_SINGULAR = 1e-8
"""Smallest eigenvalue of a correlation matrix: below it float32 cannot tell the matrix from a singular one."""
_BOUNDED = ("interval", "open_interval", "greater_than", "greater_than_eq", "less_than", "less_than_eq")


def checked(samples: Any) -> np.ndarray:
    """Samples as an array of reals, one per row.

    Raises:
        ArgumentError: no array, or none of reals.
        DataError: too few, or not finite.
    """
    if not isinstance(samples, np.ndarray | jax.Array):
        hint = ".values.reshape(-1, *shape of one sample)" if hasattr(samples, "dims") else ""
        given = f"np.asarray({'samples' if not hint else 'array'}{hint})"
        raise ArgumentError(
            f"samples takes an array with a sample in each row, (samples, *event shape); got "
            f"{type(samples).__name__}. Write {given}."
        )
    values = np.asarray(samples)
    if values.dtype.kind not in "fiu" and values.dtype.name != "bfloat16":
        raise ArgumentError(f"samples takes real numbers; got an array of {values.dtype}.")
    values = values.astype(np.float64)
    size = int(np.prod(values.shape[1:], dtype=int))
    if values.ndim == 0 or size == 0:
        raise DataError(f"samples takes the shape (samples, *event shape); got {values.shape}.")
    fewest = max(FEWEST, FEWEST_PER_DIMENSION * size)
    if len(values) < fewest:
        raise DataError(
            f"{len(values)} samples of {size} numbers are too few to fit a flow to; give at least {fewest}, or use a "
            "distribution with few parameters, such as dist.MultivariateNormal."
        )
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise DataError(
            f"{np.count_nonzero(wrong)} values of samples are not finite, the first is {_first(values, wrong)}. "
            "Leave these samples out."
        )
    return values


def free_coordinates(values: np.ndarray, support: Any) -> np.ndarray:
    """The inverse image of samples under NumPyro's bijection to the support, (samples, *shape).

    Raises:
        DataError: samples outside the support, or on its edge.
    """
    if support.event_dim > values.ndim - 1:
        raise DataError(
            f"support= {support} is of values with {support.event_dim} dimensions; one of the samples has the shape "
            f"{values.shape[1:]}."
        )
    rounded = np.asarray(jnp.asarray(values))
    inside = np.asarray(support(rounded))
    outside = ~np.broadcast_to(inside.reshape(inside.shape + (1,) * support.event_dim), values.shape)
    if outside.any():
        raise DataError(
            f"{_events(outside)} of {len(values)} samples lie outside the support {support}, the first value is "
            f"{_first(values, outside)}. Give another support=, or leave them out."
        )
    free = np.asarray(biject_to(support).inv(jnp.asarray(rounded)), np.float64)
    edge = ~np.isfinite(free)
    if edge.any():
        where = int(np.argwhere(edge)[0][0])
        raise DataError(
            f"{_events(edge)} of {len(values)} samples lie on the edge of the support {support} (in "
            f"{rounded.dtype}), where a density has no limit: the first is samples[{where}]. Move them inside, or "
            "give a wider support=."
        )
    return free


def standardisation(values: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and Cholesky factor (d, d) of the covariance of the coordinates without bounds.

    Raises:
        DataError: coordinates that are constant, discrete, or linear combinations of others.
    """
    rows = free.reshape(len(free), -1)
    label = _labels(values, free)
    for i, column in enumerate(rows.T):
        distinct = np.unique(column)
        if len(distinct) == 1 or np.std(column) < 1e-6 * np.max(np.abs(column)):
            raise DataError(
                f"{label(i)} is constant, {_value(values, free, i)}, up to rounding. Leave it out of samples and set "
                "it in the model."
            )
        if len(distinct) < _DISTINCT:
            raise DataError(
                f"{label(i)} takes {len(distinct)} distinct values only. A flow is a density: model it by a discrete "
                "distribution, such as dist.Categorical."
            )
    deviations = np.std(rows, axis=0)
    values_, vectors = np.linalg.eigh(np.atleast_2d(np.corrcoef(rows.T)))
    if values_[0] < _SINGULAR:
        involved = np.flatnonzero(np.abs(vectors[:, 0]) > 0.01)
        names = ", ".join(label(i) for i in involved[:8]) + (", ..." if len(involved) > 8 else "")
        raise DataError(
            f"samples have a singular covariance: a linear combination of {names} is constant up to rounding. Leave "
            "one of them out and compute it in the model, or, for a sum of one, give support=constraints.simplex."
        )
    repeated = 1 - len(np.unique(rows, axis=0)) / len(rows)
    if repeated > _REPEATED:
        warnings.warn(
            f"{repeated:.0%} of samples repeat others. The flow is judged by samples held out, which it has then seen: "
            "thin the chain that they come from.",
            stacklevel=3,
        )
    root = np.linalg.cholesky(np.atleast_2d(np.corrcoef(rows.T)))
    return rows.mean(axis=0), deviations[:, None] * root


def described(support: Any) -> dict[str, Any]:
    """A constraint by name and bounds, for a file.

    Raises:
        MethodError: a constraint that has no bijection from R^d, or that is not in NumPyro's list.
    """
    found = None
    if isinstance(support, constraints.independent):
        found = {"independent": described(support.base_constraint), "dimensions": support.reinterpreted_batch_ndims}
    elif isinstance(support, constraints.Constraint) and not support.is_discrete:
        named = (n for n in constraints.__all__ if vars(constraints)[n] is support)
        bounded = (n for n in _BOUNDED if type(support) is vars(constraints)[n])
        name, kind = next(named, None), next(bounded, None)
        if name:
            found = {"name": name}
        elif kind:
            found = {"name": kind, "bounds": [np.asarray(b).tolist() for b in _bounds(support)]}
    try:
        known = found is not None and biject_to(support) is not None
    except NotImplementedError:
        known = False
    if not known or found is None or support is constraints.complex:
        raise MethodError(
            "support= takes a constraint of numpyro.distributions.constraints with a bijection from the real line, "
            f"such as constraints.positive or constraints.interval(0, 1); got {support!r}."
        )
    return found


def named(value: dict[str, Any]) -> Any:
    """The constraint that `described` gave."""
    if "independent" in value:
        return constraints.independent(named(value["independent"]), value["dimensions"])
    found = vars(constraints).get(value["name"])
    if found is None:
        raise CheckpointError(f"the file names the support {value['name']!r}, which this version of NumPyro lacks.")
    # Bounds in NumPy, whose arrays NumPyro compares by content.
    bounds = [np.asarray(b) if isinstance(b, list) else b for b in value.get("bounds", ())]
    return found(*bounds) if bounds else found


def _bounds(support: Any) -> list[Any]:
    return [getattr(support, n) for n in ("lower_bound", "upper_bound") if hasattr(support, n)]


def _events(marked: np.ndarray) -> int:
    return int(np.count_nonzero(marked.reshape(len(marked), -1).any(axis=1)))


def _first(values: np.ndarray, marked: np.ndarray) -> str:
    index = tuple(int(i) for i in np.argwhere(marked)[0])
    return f"samples[{', '.join(map(str, index))}] = {values[index]:g}"


def _labels(values: np.ndarray, free: np.ndarray) -> Any:
    """Names of flat coordinates: those of samples where the bijection keeps the shape."""

    def label(i: int) -> str:
        index = ", ".join(str(k) for k in np.unravel_index(i, free.shape[1:]))
        if not index:
            return "samples"
        return f"samples[:, {index}]" if free.shape == values.shape else f"coordinate {index} without bounds"

    return label


def _value(values: np.ndarray, free: np.ndarray, i: int) -> str:
    shown = values if values.shape == free.shape else free
    return f"{shown.reshape(len(shown), -1)[0, i]:g}"
