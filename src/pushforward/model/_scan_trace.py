"""The message of a `scan`, answered in place: what state methods need of NumPyro's internals.

The message has no public specification. The scan is answered by replacing the message's function, which NumPyro
calls last, when handlers have added their data to it. Its body closes over values of the enclosing trace and must
not outlive the model's call.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.ops.pytree import PytreeTrace

from pushforward._types import Array
from pushforward.model import coordinates
from pushforward.model._refusals import refuse_flow
from pushforward.model._trace import Assign, Call, is_scan, run, site_law, steps_of


class Scan(NamedTuple):
    """The one scan of a model, met where it stands; good only until the model's call returns.

    Attributes:
        body: `body(carry, x, step, assign) -> (carry, returned, sites)` runs one step; `sites` is its trace.
        init: the first carry.
        xs: what is scanned over, or None.
        length: number of steps.
    """

    body: Callable
    init: Any
    xs: Any
    length: int


def run_around(call: Call, assign: Assign, instead: Callable[[Scan], tuple[Any, Any]]) -> "OrderedDict[str, dict]":
    """Trace of the sites outside the scan, with `instead(scan) -> (last carry, stacked outputs)` run in its place."""
    around = _Around(call, assign, instead)
    return run(around, assign, fill_missing=False)


class _Around(numpyro.primitives.Messenger):
    def __init__(self, fn: Call, assign: Assign, instead: Callable):
        super().__init__(fn)
        self.assign, self.instead, self.met = assign, instead, False

    def process_message(self, msg: dict) -> None:
        if msg["type"] != "control_flow":
            return
        refuse_flow(msg, is_scan=is_scan(msg), again=self.met, around=numpyro.primitives._PYRO_STACK)
        self.met = True
        msg["fn"] = self._answer

    def _answer(
        self, f: Callable, init: Any, xs: Any, length: int | None, reverse: bool, *, substitute_stack: list, **_: Any
    ) -> tuple:
        steps = steps_of(xs, length)
        stack = [(kind, given) for kind, given in substitute_stack if given is not self.assign]
        last, stacked = self.instead(Scan(partial(_step, f, stack, steps), init, xs, steps))
        return (steps, None, last), (PytreeTrace({}), stacked)


def _step(f: Callable, stack: list, steps: int, carry: Any, x: Any, step: Array, assign: Assign) -> tuple:
    """One step of the body with latent sites from `assign` and data from the handlers around the scan."""

    def series(given: Any, site: dict) -> Array | None:
        value: Any = given(site) if callable(given) else given.get(site["name"])
        if site["type"] != "sample" or value is None:
            return None
        whole = jnp.ndim(value) == len(site_law(site).shape()) + 1 and jnp.shape(value)[0] == steps
        return value[step] if whole else value

    fn = handlers.infer_config(f, config_fn=lambda _: {"_scan_current_index": step})
    for kind, given in stack:
        option = {"condition": "condition_fn", "substitute": "substitute_fn"}[kind]
        fn = getattr(handlers, kind)(fn, **{option: partial(series, given)})
    with handlers.block(), handlers.trace() as sites:
        carry, returned = handlers.substitute(fn, substitute_fn=assign)(carry, x)
    return carry, returned, sites


class _Hidden(numpyro.primitives.Messenger):
    """Leaves of a model what depends on parameters alone: hides the named sites and skips the scan."""

    def __init__(self, fn: Call, hidden: frozenset[str], scanned: tuple[Any, Any, int]):
        super().__init__(fn)
        self.hidden, self.scanned = hidden, scanned

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "control_flow":
            last, stacked, steps = self.scanned
            msg["fn"] = lambda *_, **__: ((steps, None, last), (PytreeTrace({}), stacked))
        elif msg.get("name") in self.hidden:
            msg["stop"] = True
            if msg["type"] == "sample" and msg["value"] is None:
                law = site_law(msg)
                msg["value"] = coordinates.push(law, jnp.zeros(coordinates.noise_shape(law)))


def parameters_only(
    call: Call, hidden: frozenset[str], scanned: tuple[Any, Any, int], names: Mapping[str, Any] | tuple[str, ...]
) -> dict[str, Array]:
    """Run a model without its trajectory, inside whatever handlers are active, and return its parameters.

    Args:
        call: the model with its arguments bound.
        hidden: sites outside the scan that depend on the trajectory or are integrated out.
        scanned: what stands in for the scan's last carry and stacked outputs, and its number of steps.
        names: parameters to return.
    """
    with handlers.trace() as sites:
        _Hidden(call, hidden, scanned)()
    return {name: sites[name]["value"] for name in names}


def add_log_density(name: str, value: Array) -> None:
    """`numpyro.factor`, for models that are made here."""
    numpyro.factor(name, value)
