"""What a benchmark problem is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Problem:
    """A NumPyro model with its data and what is known about the answer.

    Attributes:
        name: the name that `pushforward.problems.problem` takes.
        model: a plain NumPyro model.
        inputs: keyword arguments of `model` that are not data (times, standard errors, matrices).
        data: keyword arguments of `model` that are observed; argument and site have the same name.
        source: where model, data and numbers come from.
        numbers: what is known of the posterior. `mean` and `sd` map each latent site to its value and
            `log_evidence` is a float, wherever they are known; the file of the problem holds the rest.
        truth: for synthetic data, the site values that generated them.

    Example:
        >>> from pushforward.problems import problem
        >>> bod = problem("bod")
        >>> sorted(bod.inputs), sorted(bod.data)
        (['t'], ['y'])

        `pf.infer(bod.model, **bod.inputs, **bod.data)` infers,
        `pf.AmortizedFlow().fit(bod.model, observed=tuple(bod.data), **bod.inputs)` trains.
    """

    name: str
    model: Callable[..., Any]
    inputs: Mapping[str, Any]
    data: Mapping[str, Any]
    source: str
    numbers: Mapping[str, Any]
    truth: Mapping[str, Any] = field(default_factory=dict)


def constant(values: Any) -> np.ndarray:
    """A float64 array that nobody can change by accident."""
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array
