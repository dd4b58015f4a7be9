"""What trained methods share: the arguments of the model that training held fixed."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from pushforward._errors import ArgumentError
from pushforward.methods._base import content
from pushforward.model._fingerprint import stable_text


def arguments_of(given: Mapping[str, Any], data: Collection[str]) -> dict[str, Any]:
    """Arguments of a model by name, those that are data or None left out: arrays, or text for their content."""
    return {name: _plain(value) for name, value in given.items() if name not in data and value is not None}


def check_arguments(owner: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a call whose arguments differ from those of the training.

    Raises:
        ArgumentError: an argument is missing or has another value.
    """
    for name, value in stored.items():
        if name not in given:
            raise ArgumentError(f"{owner} was trained with the argument {name!r}; pass the same value.")
        if not _same(value, _plain(given[name])):
            raise ArgumentError(
                f"{owner} was trained with another value of the argument {name!r}. Pass that value, or train it anew: "
                "what it learned holds for one value of all arguments that are not data."
            )


def _plain(value: Any) -> Any:
    """An array as NumPy's, all else as text that stands for its content."""
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    if isinstance(value, np.ndarray | jax.Array | np.floating):
        return np.asarray(value)
    return stable_text(content(value))


def _same(stored: Any, value: Any) -> bool:
    if isinstance(stored, str) or isinstance(value, str):
        return isinstance(stored, str) and isinstance(value, str) and stored == value
    stored, value = np.asarray(stored), np.asarray(value)
    # A file keeps float32 where JAX does; the same number given as float64 is no other value.
    return stored.shape == value.shape and np.allclose(stored, value, rtol=1e-6, atol=0, equal_nan=True)
