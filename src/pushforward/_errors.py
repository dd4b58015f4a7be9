"""What can go wrong, as exceptions and as outcomes of a run.

Exceptions are raised at the door: they say what was given, what was expected and what to write
instead. An `Outcome` is a value that a compiled run returns; its text is diagnosis and remedy.
"""

from enum import IntEnum
from typing import Any


class PushforwardError(Exception):
    """Base of all errors that this library raises on purpose."""


class ArgumentError(PushforwardError, TypeError):
    """An argument of a public function has the wrong type or name."""


class ModelError(PushforwardError, ValueError):
    """The NumPyro model cannot be read; the text names the site and the way out."""


class DataError(PushforwardError, ValueError):
    """The data cannot be used; the text names the site."""


class MethodError(PushforwardError, ValueError):
    """The method or its options do not fit the problem."""


class CheckpointError(PushforwardError, ValueError):
    """A file written by `pushforward` is damaged or belongs to another run."""


class InferenceError(PushforwardError, RuntimeError):
    """A run ended without a usable result.

    Attributes:
        outcome: the `Outcome` of the run.
        partial: the `xarray.DataTree` of what there is, as `throw=False` would return it.
    """

    def __init__(self, message: str, outcome: "Outcome", partial: Any = None):
        super().__init__(message)
        self.outcome = outcome
        self.partial = partial


class Outcome(IntEnum):
    """How a run ended. `text` says what it means and what to do about it."""

    SUCCESS = 0
    MAXIMUM_STEPS = 1
    NONFINITE_START = 2
    NONFINITE = 3
    NOT_POSITIVE_DEFINITE = 4

    @property
    def text(self) -> str:
        """Diagnosis and remedy, one sentence each."""
        return _TEXTS[self]


_TEXTS = {
    Outcome.SUCCESS: "The run reached its goal.",
    Outcome.MAXIMUM_STEPS: (
        "The run used up its steps before its stopping rule was met. "
        "Give the method more steps, or look at the model for parameters that the data do not inform."
    ),
    Outcome.NONFINITE_START: (
        "No starting point with a finite log density was found. "
        "Check the observed data against the support and scale of their distributions."
    ),
    Outcome.NONFINITE: (
        "The log density or its gradient became infinite or NaN during the run. "
        "Look for a division by zero, a logarithm of a negative number or an overflow in the model; "
        "float64 (JAX_ENABLE_X64=1) may help."
    ),
    Outcome.NOT_POSITIVE_DEFINITE: (
        "The curvature at the mode is not positive definite, so there is no Gaussian there. "
        "A sampler (NUTS, TemperedSMC) handles such posteriors."
    ),
}
