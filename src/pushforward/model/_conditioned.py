"""A model as a function of its data, and whether data can be simulated from it."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from numpyro import handlers
from numpyro.primitives import Messenger

from pushforward._types import Array, Key, Model
from pushforward.model import _flow
from pushforward.model.inverse import InverseProblem


def with_data(model: Model) -> Model:
    """The model as a function `(data, *args, **kwargs)` of data for its sites, by name, and of its own arguments.

    Values take the place of data that arguments give, too. Data of equal shapes are one program: they are arguments.
    A `numpyro.deterministic` site named in the data gets its value, so that a model without noise can be observed.
    """

    def conditioned(data: Mapping[str, Array], /, *args: Any, **kwargs: Any) -> Any:
        return handlers.condition(_Deterministics(model, data), data=data)(*args, **kwargs)

    # Arguments keep their names, by which errors and trained methods know them.
    with suppress(TypeError, ValueError):
        own = list(inspect.signature(model).parameters.values())
        first = inspect.Parameter("data_of_sites", inspect.Parameter.POSITIONAL_ONLY)
        conditioned.__signature__ = inspect.Signature([first, *own])  # type: ignore[reportFunctionMemberAccess]
    return conditioned


class _Deterministics(Messenger):
    """Sets values of deterministic sites, which `handlers.condition` leaves alone; those of a `scan` when it ends."""

    def __init__(self, fn: Model, data: Mapping[str, Array]):
        super().__init__(fn)
        self.data = data

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "deterministic" and msg["name"] in self.data:
            msg["value"] = self.data[msg["name"]]


def draw_jointly(problem: InverseProblem, key: Key) -> tuple[dict[str, Array], dict[str, Array]]:
    """One draw of latent sites with deterministics, and of the data given them, by NumPyro's own samplers.

    The prior map of this library has no part in it, so that it is tested with what is inferred from the data.
    """
    found = problem.predict_at({}, key)
    named = problem.structure.data
    late = {n: v for n, v in found.deterministics.items() if n in named}
    rest = {n: v for n, v in found.deterministics.items() if n not in named}
    return found.sites | rest, found.data | late


def why_not_simulated(problem: InverseProblem) -> str | None:
    """Why draws from the model's statements are not draws from the law that its density defines, or None."""
    factors = [s.name for s in problem.sites.values() if s.role == "factor"]
    if factors:
        return f"numpyro.factor '{factors[0]}' changes its density, and nothing says how to simulate that"
    scaled = eqx.filter_eval_shape(_scaled, problem)
    if scaled:
        return f"site '{scaled[0]}' stands under handlers.scale or in a subsampled plate, which is no law to simulate"
    moving = _moving(problem)
    if moving:
        return (
            f"site '{moving[0]}' is fixed by handlers.substitute, and its law depends on the latent sites {moving[1]}: "
            "it acts as data. Make it an observed site, with handlers.condition or obs=, and name it in observed="
        )
    return None


def _scaled(problem: InverseProblem) -> list[str]:
    trace = problem._with_laws(jnp.zeros(problem.dimension))
    return [n for n, s in trace.items() if s["type"] == "sample" and s["scale"] is not None]


def _moving(problem: InverseProblem) -> tuple[str, list[str]] | None:
    """The first site fixed inside the model whose density depends on latent sites, with their names."""
    fixed = problem.structure.fixed
    if not fixed:
        return None
    zeros = {n: jnp.zeros(s.shape) for n, s in problem.structure.slots.items()}

    def densities(**pieces: Array) -> dict[str, Array]:
        trace = problem._with_laws(pieces)
        return {n: jnp.sum(trace[n]["fn"].log_prob(trace[n]["value"])) for n in fixed}

    found = _flow.data_flow(densities, zeros)
    return next(((name, sorted(sources)) for name, sources in found.items() if sources), None)
