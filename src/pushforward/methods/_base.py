"""What a method is, and what it returns.

A method is an immutable value: its fields are its options. It sees a problem only through functions
of noise ``z`` (or NumPyro's own coordinates) and knows nothing of groups, files or plots.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.model._fingerprint import fingerprint
from pushforward.model.inverse import InverseProblem


class Draws(eqx.Module):
    """What a run of a method returns; every leaf is an array.

    Attributes:
        positions: draws of the posterior. An array of shape (chain, draw, d) holds noise ``z``; a
            dictionary of arrays (chain, draw, ...) holds NumPyro's unconstrained coordinates.
        stats: per draw, arrays of shape (chain, draw), under ArviZ's names.
        summary: numbers about the whole run, such as ``log_evidence``, ``elbo``, ``khat``.
        outcome: an `Outcome` as an integer array.
        evaluations: number of runs of the model, all members counted.
        gradient_evaluations: number of those that also gave a gradient.
        log_weights: log p(z, y) - log q(z) of draws of a proposal q, shape (replicate, draw), from which
            `infer` adds Pareto k-hat to `summary`; None for methods without a proposal.
        sites: names of the latent sites that were inferred, where the others were integrated out; their entries of
            `positions` mean nothing.
        ran: runs of the model that an ensemble method made, step by step: noise (step, member, d) and the means of the
            data, all sites in one vector (step, member, m), NaN where a member failed; None where they were not kept.
    """

    positions: Any
    stats: dict[str, Any]
    summary: dict[str, Any]
    outcome: Array | np.ndarray
    evaluations: Array
    gradient_evaluations: Array
    log_weights: Array | None = None
    sites: tuple[str, ...] | None = eqx.field(static=True, default=None)
    ran: tuple[Array | np.ndarray, Array | np.ndarray] | None = None


class Method(eqx.Module):
    """Base of all methods. Subclasses are final; their fields are options with good defaults.

    Attributes:
        accepts: the kind of problem that the method works on.
        returns: "posterior", or what the draws are instead (said in the result's attributes).
        shards: what `mesh=` splits over devices ("chains", "particles", "samples").
        gradients: whether it needs the gradient of the log density.
        needs_density: whether it needs the density of the data; otherwise it only simulates.
    """

    accepts: ClassVar[type] = InverseProblem
    returns: ClassVar[str] = "posterior"
    shards: ClassVar[str] = "draws"
    gradients: ClassVar[bool] = False
    needs_density: ClassVar[bool] = True

    @abstractmethod
    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """Draw from the posterior of the problem.

        Args:
            problem: what to infer.
            key: typed JAX key.
            draws: number of draws (per chain).
            runner: compiles, times, shows progress and checkpoints.
        """

    def why_not(self, problem: Any) -> str | None:
        """Why the method does not fit the problem, or None where it does."""
        return None

    def check_call(self, given: Mapping[str, Any]) -> None:
        """Refuse arguments of the model that are not those that the method was trained with."""

    def failure(self, draws: Draws) -> str | None:
        """What went wrong in a run without a usable result, where the method knows more than `Outcome` says."""
        return None

    def warnings(self, draws: Draws) -> list[str]:
        """What a careful reader of the diagnostics would point out."""
        return []


def content(value: Any) -> Any:
    """Options of a method and the arrays that it has learned, by content (a repr shows neither all nor exactly)."""
    if isinstance(value, eqx.Module):
        return (type(value).__qualname__, *((f.name, content(getattr(value, f.name))) for f in fields(value)))
    return fingerprint(value)


def check_positive(owner: str, **options: Any) -> None:
    """Refuse options that are not positive numbers."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise MethodError(f"{owner}({name}=...) takes a positive number; got {value!r}.")


def check_fraction(owner: str, **options: Any) -> None:
    """Refuse options that are not numbers between 0 and 1, ends excluded."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise MethodError(f"{owner}({name}=...) takes a number between 0 and 1; got {value!r}.")


def check_integer(owner: str, minimum: int = 1, **options: Any) -> None:
    """Refuse options that are not integers of at least `minimum`."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise MethodError(f"{owner}({name}=...) takes an integer of at least {minimum}; got {value!r}.")


def check_choice(owner: str, choices: Mapping[str, str] | tuple[str, ...], **options: Any) -> None:
    """Refuse options that are none of the choices."""
    for name, value in options.items():
        if value not in tuple(choices):
            raise MethodError(f"{owner}({name}=...) takes one of {list(choices)}; got {value!r}.")


def check_boolean(owner: str, **options: Any) -> None:
    """Refuse options that are not True or False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise MethodError(f"{owner}({name}=...) takes True or False; got {value!r}.")


def outcome_of(finite: Array, converged: Array | bool = True) -> Array:
    """SUCCESS, MAXIMUM_STEPS where not converged, NONFINITE where not finite."""
    late = jnp.where(converged, int(Outcome.SUCCESS), int(Outcome.MAXIMUM_STEPS))
    return jnp.where(finite, late, int(Outcome.NONFINITE))


def count(number: Any) -> Any:
    """A number of evaluations as a floating array, inside `jit` and out of it."""
    if isinstance(number, jax.Array):
        return jnp.asarray(number, jnp.result_type(float))
    return np.asarray(number, float)
