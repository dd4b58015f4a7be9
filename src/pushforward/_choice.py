"""Which method a call of `infer` asks for, and whether it fits the model."""

from typing import Any

from pushforward import _states, methods
from pushforward._errors import MethodError, ModelError
from pushforward.methods import NAMES
from pushforward.methods._base import Method
from pushforward.methods._state import StateMethod
from pushforward.model.inverse import InverseProblem
from pushforward.model.simulator import WITHOUT_GRADIENT, holds_simulator, simulators
from pushforward.model.state_space import read_state_space


def choose(method: Any, states: Any, problem: InverseProblem) -> tuple[Method, Any, str]:
    """The instances of method and state method, and for "auto" the reason of the choice."""
    reason = ""
    if isinstance(states, str) and states in NAMES:
        states = NAMES[states]()
    if isinstance(method, str):
        if method == "auto":
            method, states, reason = _automatic(states, problem)
        elif method in NAMES:
            method = NAMES[method]()
        else:
            raise MethodError(f"unknown method {method!r}. Methods: {', '.join(['auto', *NAMES])}.")
    if isinstance(method, type):
        raise MethodError(f"method= takes an instance; write method=pf.{method.__name__}() with its options.")
    if not isinstance(method, Method):
        raise MethodError(
            f"method= takes a name ({', '.join(['auto', *NAMES])}) or an instance such as pf.NUTS(); "
            f"got {type(method).__name__}."
        )
    _check_gradient(method, problem)
    if states is not None:
        _states.check_given(states, method, problem)
    elif method.needs_density and not isinstance(method, StateMethod) and problem.why_not_continuous:
        raise ModelError(f"{problem.why_not_continuous}.")
    misfit = None if isinstance(method, StateMethod) else fits(method, problem)
    if misfit:
        raise MethodError(f"{type(method).__name__} does not fit this model: {misfit}.")
    return method, states, reason


def _automatic(states: Any, problem: InverseProblem) -> tuple[Method, Any, str]:
    if isinstance(states, StateMethod) and not states.differentiable:
        reason = "the state method's likelihood has no gradient: PMMH is exact for the parameters"
        return methods.PMMH(), states, reason
    if states is not None:
        return methods.NUTS(), states, "the state method integrates the trajectory out: NUTS for the parameters"
    if holds_simulator(problem):
        return _without_gradient(problem)
    if problem.structure.discrete:
        return _discrete(problem)
    space, reason = _states.automatic(problem)
    if space is not None and not space.structure.parameters:
        return methods.Kalman(), None, f"{reason} without parameters: the Kalman smoother is exact"
    if space is not None:
        return methods.NUTS(), methods.Kalman(), f"{reason} with parameters: NUTS over the exact Kalman likelihood"
    if reason:
        reason = f"the model has a scan, sampled as one joint density over the whole trajectory ({reason})"
        return methods.NUTS(), None, reason
    return methods.NUTS(), None, "differentiable model: NUTS is the reference"


def _check_gradient(method: Method, problem: InverseProblem) -> None:
    if method.gradients and method.needs_density and holds_simulator(problem):
        raise MethodError(
            f"{type(method).__name__} needs the gradient of the log density, and the model calls "
            f"{', '.join(map(repr, simulators(problem)))}, which has none. Write {WITHOUT_GRADIENT}."
        )


def _without_gradient(problem: InverseProblem) -> tuple[Method, Any, str]:
    """For a model with a simulator; the method's own `why_not` has the last word."""
    if methods.EKI().why_not(problem) is None:
        return methods.EKI(), None, "the model calls a simulator without gradient and its likelihood is Gaussian: EKI"
    reason = "the model calls a simulator without gradient: TemperedSMC is exact, in many runs"
    return methods.TemperedSMC(), None, reason


def _discrete(problem: InverseProblem) -> tuple[Method, Any, str]:
    """For a model with discrete latent sites; NUTS, which `choose` then refuses, where their states are not finite."""
    try:
        space = read_state_space(problem)
    except ModelError:
        return methods.NUTS(), None, ""
    if methods.DiscreteHMM().why_not(space):
        return methods.NUTS(), None, ""
    reason = "the model is a scan with finitely many states"
    if space.structure.parameters:
        reason = f"{reason} and with parameters: NUTS over the exact sum over the states"
        return methods.NUTS(), methods.DiscreteHMM(), reason
    return methods.DiscreteHMM(), None, f"{reason} and without parameters: the sum over them is exact"


def fits(method: Method, problem: Any) -> str | None:
    """Why a method cannot run on a problem, or None where it can."""
    if not isinstance(problem, method.accepts):
        return f"it works on {method.accepts.__name__}, and the model was read as {type(problem).__name__}"
    if method.needs_density and problem.structure.without_density:
        name = min(problem.structure.without_density)
        return (
            f"the data '{name}' are a numpyro.deterministic, which has no density. Use a method that learns from "
            "simulations, such as pf.AmortizedFlow()"
        )
    return method.why_not(problem)
