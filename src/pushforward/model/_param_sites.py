"""`numpyro.param` sites as arguments of a model: found by one run, then set from unconstrained values."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.primitives import Messenger

from pushforward._errors import ModelError, PushforwardError
from pushforward._types import Array, Key, Model
from pushforward.model._trace import is_scan


class ParamSites(NamedTuple):
    """The `numpyro.param` sites of a model.

    Attributes:
        values: by name, a pytree in unconstrained coordinates; what is no floating array in it (such as the activation
            function of a network) stays as it is.
        constraints: by name, the constraint that the site was given.
    """

    values: dict[str, Any]
    constraints: dict[str, Any]

    def constrained(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values as the model sees them, from unconstrained ones."""
        return {n: _constrain(self.constraints[n], v) for n, v in values.items()}


def param_sites(model: Model, args: tuple, kwargs: dict[str, Any], key: Key) -> ParamSites:
    """The `numpyro.param` sites of a model at their initial values; nothing else of it is computed.

    Args:
        model: a NumPyro model.
        args: its positional arguments.
        kwargs: its named arguments.
        key: what initial values and latent sites are drawn from.

    Raises:
        ModelError: a `numpyro.param` in the body of a scan, or an initial value outside its constraint.
    """
    rest: dict[str, Any] = {}
    outside = _Outside(model)

    def run() -> dict[str, Any]:
        with handlers.trace() as trace:
            handlers.seed(outside, key)(*args, **kwargs)
        found = {n: s for n, s in trace.items() if s["type"] == "param"}
        rest["constraints"] = {n: s["kwargs"].get("constraint", dist.constraints.real) for n, s in found.items()}
        values = {n: _unconstrain(rest["constraints"][n], s["value"]) for n, s in found.items()}
        arrays, rest["static"] = eqx.partition(values, eqx.is_array)
        return arrays

    try:
        arrays = jax.jit(run)()
    except PushforwardError:
        raise
    except Exception as error:
        if not outside.met:
            return ParamSites({}, {})  # the reader, which runs next, says where the model stopped
        said = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ModelError(
            f"the model stopped after numpyro.param '{outside.met[-1]}' with {type(error).__name__}: {said}. Look at "
            "the statements that use it, and at its initial value."
        ) from error
    values = eqx.combine(arrays, rest["static"])
    for name, value in values.items():
        floats = [v for v in jax.tree.leaves(value) if is_trained(v)]
        if not all(bool(jnp.all(jnp.isfinite(v))) for v in floats):
            raise ModelError(
                f"the initial value of numpyro.param '{name}' is not finite or lies outside its constraint "
                f"{rest['constraints'][name]}. Start it inside."
            )
    return ParamSites(values, rest["constraints"])


def shapes(model: Model, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Values of `numpyro.param` sites as the model sees them, with shapes in place of arrays; no number is computed.

    Args:
        model: a NumPyro model.
        args: its positional arguments, `jax.ShapeDtypeStruct` in place of arrays.
        kwargs: its named arguments, likewise.
    """
    given, rest = eqx.partition((args, kwargs), lambda v: isinstance(v, jax.ShapeDtypeStruct))
    static: list[Any] = []

    def run(given: Any) -> dict[str, Any]:
        args, kwargs = eqx.combine(given, rest)
        with handlers.trace() as trace:
            handlers.seed(_Outside(model), jax.random.key(0))(*args, **kwargs)
        found = {}
        for name, site in trace.items():
            if site["type"] == "param":
                constraint = site["kwargs"].get("constraint", dist.constraints.real)
                found[name] = _constrain(constraint, _unconstrain(constraint, site["value"]))
        arrays, other = eqx.partition(found, eqx.is_array)
        static.append(other)
        return arrays

    arrays = jax.eval_shape(run, given)
    return eqx.combine(arrays, static[-1])


def is_trained(leaf: Any) -> bool:
    """Whether a leaf of a parameter is a floating array."""
    return eqx.is_inexact_array(leaf)


def is_network(value: Any) -> bool:
    """Whether a parameter has Equinox modules in which trained arrays belong to two layers or more."""
    if not any(isinstance(v, eqx.Module) for v in jax.tree.leaves(value, is_leaf=lambda v: isinstance(v, eqx.Module))):
        return False
    places = [path[:-1] for path, v in jax.tree_util.tree_leaves_with_path(value) if is_trained(v)]
    return len({*places}) > 1


def lifted(model: Model) -> Callable[..., Any]:
    """The model as a function `(params, args, kwargs)` of unconstrained values of its `numpyro.param` sites."""

    def run(params: Mapping[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        return _Params(model, params)(*args, **kwargs)

    return run


def fixed(model: Model, estimates: Mapping[str, Any]) -> Model:
    """The model with sites of both kinds at given values."""
    return handlers.substitute(model, data=dict(estimates))


class _Params(Messenger):
    def __init__(self, fn: Model, params: Mapping[str, Any]):
        super().__init__(fn)
        self.params = params

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "param" and msg["name"] in self.params:
            constraint = msg["kwargs"].get("constraint", dist.constraints.real)
            msg["value"] = _constrain(constraint, self.params[msg["name"]])


class _Outside(Messenger):
    """Refuses parameters in the body of a scan, where their values would be those of one step; notes the others."""

    def __init__(self, fn: Model):
        super().__init__(fn)
        self.met: list[str] = []

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "param":
            self.met.append(msg["name"])
            # Under training it is an array, too: 1 / (a - 1) is then infinite and no ZeroDivisionError.
            msg["args"] = tuple(jnp.asarray(v) if isinstance(v, float) else v for v in msg["args"])
        if msg["type"] == "control_flow" and is_scan(msg):
            f: Any = msg["args"][0]
            msg["args"] = (_Inside(f), *msg["args"][1:])


class _Inside(Messenger):
    def process_message(self, msg: dict) -> None:
        if msg["type"] == "param":
            raise ModelError(
                f"numpyro.param '{msg['name']}' stands in the body of the scan. Write it in front of the scan; the "
                "body may use its value."
            )


def _constrain(constraint: Any, value: Any) -> Any:
    to = biject_to(constraint)
    return jax.tree.map(lambda v: to(v) if is_trained(v) else v, value)


def _unconstrain(constraint: Any, value: Any) -> Any:
    to = biject_to(constraint)

    def one(v: Any) -> Any:
        if isinstance(v, float):
            v = jnp.asarray(v)
        v = jnp.asarray(v) if eqx.is_array(v) else v
        return jnp.asarray(to.inv(v)) if is_trained(v) else v

    return jax.tree.map(one, value)


def arrays_of(values: Mapping[str, Any]) -> list[Array]:
    """The array leaves of parameters, in the order in which `lifted` has them as arguments."""
    return [v for v in jax.tree.leaves(dict(values)) if eqx.is_array(v)]
