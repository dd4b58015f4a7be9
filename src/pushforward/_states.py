"""Running state methods for `infer`: alone, or under a method for the parameters."""

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward import _evaluate, methods, posterior
from pushforward._errors import MethodError, ModelError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods import NAMES
from pushforward.methods._base import Draws, Method, count
from pushforward.methods._pseudo_marginal import OverStates, needs_states
from pushforward.methods._state import StateDraws, StateMethod
from pushforward.model._fingerprint import array_digest
from pushforward.model.inverse import InverseProblem
from pushforward.model.marginal import marginal
from pushforward.model.state_space import StateSpace, read_state_space

_BATCH = 8


def automatic(problem: InverseProblem) -> tuple[StateSpace | None, str]:
    """The state space that `method="auto"` may filter exactly, or None, with the reason."""
    if not any("time" in site.dims for site in problem.sites.values()):
        return None, ""
    try:
        space = read_state_space(problem)
        reason = methods.Kalman().why_not(space)
    except ModelError as error:
        return None, str(error).splitlines()[0]
    return (space, "the model is a linear-Gaussian scan") if reason is None else (None, reason)


def check_alone(method: StateMethod, problem: InverseProblem) -> StateSpace:
    """The state space of a model for a state method that is run by itself.

    Raises:
        ModelError: no scan, or one that cannot be read.
        MethodError: free parameters, or a model that the method does not fit.
    """
    space = read_state_space(problem)
    free = space.structure.parameters
    name = type(method).__name__
    if free and not method.augment:
        along = f"pf.{name}(..., augment=True) to carry them along in the state, " if method.augments else ""
        over = "pf.NUTS()" if method.differentiable else "pf.PMMH()"
        raise MethodError(
            f"{name} infers the trajectory, and the model has the free parameters {list(free)}. Write "
            f"infer(model, method={over}, states=pf.{name}(...)) to infer both, {along}or fix them with "
            "numpyro.handlers.substitute."
        )
    if free and space.structure.static:
        raise MethodError(
            f"{name}(augment=True) cannot use '{space.structure.static[0]}', data outside the scan that depend on "
            "parameters alone. Use infer(model, method=pf.NUTS(), states=...)."
        )
    space = space.augmented() if method.augment else space
    _check_fit(method, space)
    reason = method.why_not_alone(space)
    if reason:
        raise MethodError(f"{name} does not fit this model: {reason}.")
    return space


def check_given(states: Any, method: Method, problem: InverseProblem) -> StateSpace:
    """The same for `states=`, a state method under a method for the parameters."""
    if inspect.isclass(states) or not isinstance(states, StateMethod):
        given = states.__name__ if inspect.isclass(states) else repr(states)
        names = [name for name, kind in NAMES.items() if issubclass(kind, StateMethod)]
        raise MethodError(
            "states= takes an instance of a state method, such as pf.Kalman() or pf.EnKF(members=100), or one of "
            f"{names}; got {given}."
        )
    name = type(states).__name__
    if isinstance(method, StateMethod):
        raise MethodError(
            f"method={type(method).__name__} and states={name} are both state methods. Let method= infer the "
            f"parameters, as in infer(model, method=pf.NUTS(), states=pf.{name}())."
        )
    if states.augment:
        raise MethodError(
            f"states={name}(augment=True) would infer the parameters twice. Leave augment out, or write "
            f"method=pf.{name}(augment=True) without states=."
        )
    space = read_state_space(problem)
    if not space.structure.parameters:
        raise MethodError(
            f"the model has no parameters beside its states, so there is nothing for {type(method).__name__} to infer. "
            f"Write infer(model, method=pf.{name}(...))."
        )
    _check_fit(states, space)
    if method.gradients and not states.differentiable:
        raise MethodError(
            f"{type(method).__name__} follows the gradient of the log likelihood, and states={name}(...) has none: "
            "its choice of particles is a jump (or its map is trained in each step). Use method=pf.PMMH(), "
            "resampling=pf.StopGradient() or pf.Transport()."
        )
    reason = method.why_not_states(space, states) if isinstance(method, OverStates) else None
    if reason:
        raise MethodError(f"{type(method).__name__} does not fit: {reason}.")
    return space


def check_needed(method: Method, states: Any) -> None:
    """Refuse a method that needs `states=` and has none.

    Raises:
        MethodError: what to write.
    """
    if states is None and isinstance(method, OverStates):
        raise MethodError(needs_states(method))


def _check_fit(method: StateMethod, space: StateSpace) -> None:
    reason = method.why_not(space)
    if reason:
        raise MethodError(f"{type(method).__name__} does not fit this model: {reason}.")


def _content(method: StateMethod) -> tuple:
    """Options and arrays of a method, by content (a repr shows no values of arrays)."""
    leaves, tree = jax.tree.flatten(method)
    return (tree, *((array_digest(v) if eqx.is_array(v) else v) for v in leaves))


def marginal_problem(space: StateSpace, states: StateMethod, key: Key) -> InverseProblem:
    """The model of the parameters with the trajectory integrated out by a state method."""
    # What a method asks of the program's data flow is answered once, before the model is traced.
    _check_fit(states, space)
    return marginal(space, states.log_likelihood, key, _content(states))


def run_alone(
    method: StateMethod, space: StateSpace, key: Key, draws: int, runner: Runner, notes: list[str]
) -> tuple[Draws, dict[str, Any]]:
    """Run a state method by itself, trained first where it needs that: its result and its groups, chain first."""
    method, training, trained = method.trained_on(space, runner)
    if training:
        notes.append("it was trained on these data first; method.fit(model, ...) trains once, for data to come.")
    found = runner.call(_alone, method, space, key, draws)
    groups: dict[str, Any] = {
        name: one_chain(getattr(found, name)) for name in ("posterior", "log_prior", "log_likelihood")
    }
    pack = _moments if method.store == "moments" else one_chain
    groups |= {"filtering": pack(found.filtering), "one_step": pack(found.one_step)}
    groups["last_carry"] = one_chain(carry(found))
    groups["filter_stats"] = found.stats
    if found.log_prior or found.log_likelihood:
        groups["sample_stats"] = one_chain({"lp": _total(found.log_prior) + _total(found.log_likelihood)})
    summary = {"log_evidence": found.log_evidence} | found.summary | training
    result = Draws(
        positions=groups["posterior"],
        stats={},
        summary=summary,
        outcome=np.asarray(int(_outcome(found))),
        evaluations=count(space.steps * (method.members_of(draws) + trained)),
        gradient_evaluations=count(space.steps * trained),
    )
    return result, {name: part for name, part in groups.items() if part}


def _total(part: dict[str, Array]) -> Array:
    """Sum over everything but the leading axis of draws."""
    return sum((jnp.sum(v.reshape(v.shape[0], -1), 1) for v in part.values()), jnp.zeros(()))


def one_chain(part: dict[str, Array]) -> dict[str, Array]:
    """Draws with an axis for their single chain."""
    return {name: value[None] for name, value in part.items()}


def is_sampled(part: Any) -> bool:
    """Whether a group holds draws, not moments."""
    return not isinstance(part, Moments)


class Moments(dict):
    """Means and standard deviations by site, the second under the name with `_sd`."""


def _alone(method: StateMethod, space: StateSpace, key: Key, draws: int) -> StateDraws:
    return method.trajectories(space.chain(), key, draws, method.store)


def _moments(part: dict[str, Array]) -> Moments:
    return Moments({n: v[0] for n, v in part.items()} | {f"{n}_sd": v[1] for n, v in part.items()})


def _outcome(found: StateDraws) -> Outcome:
    """Whether the run gave finite values, and converged where it iterates."""
    leaves = [found.log_evidence, *jax.tree.leaves((found.posterior, found.log_prior, found.log_likelihood))]
    good = all(np.isfinite(np.asarray(v)).all() for v in leaves if np.asarray(v).dtype.kind == "f")
    if not good:
        return Outcome.NONFINITE
    return Outcome.SUCCESS if bool(found.summary.get("converged", True)) else Outcome.MAXIMUM_STEPS


def groups_given(
    space: StateSpace, states: StateMethod, result: Draws, problem: InverseProblem, key: Key, runner: Runner
) -> dict[str, Any]:
    """Groups of a result whose parameters were inferred: one trajectory is drawn for each draw of them."""
    positions = result.positions
    chains, draws = jax.tree.leaves(positions)[0].shape[:2]
    flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), positions)
    found = runner.call(_given, space, states, problem, flat, jax.random.split(key, chains * draws))
    shaped = jax.tree.map(lambda v: v.reshape(chains, draws, *v.shape[1:]), found)
    shaped["sample_stats"] = shaped["sample_stats"] | result.stats
    return {name: part for name, part in shaped.items() if part}


def _given(
    space: StateSpace, states: StateMethod, problem: InverseProblem, positions: Any, keys: Key
) -> dict[str, dict[str, Array]]:
    def one(item: tuple) -> dict[str, Any]:
        position, key = item
        if isinstance(position, dict):
            found = problem.evaluate_unconstrained(position)
            prior = jnp.zeros(())
        else:
            found, prior = problem.evaluate(position), problem.log_prior(position)
        drawn = states.trajectories(space.chain(found.sites), key, 1, states.store)
        parts = (drawn.posterior, drawn.log_prior, drawn.log_likelihood, carry(drawn))
        first = jax.tree.map(lambda v: v[0], parts)
        return {
            "posterior": found.sites | found.deterministics | first[0],
            "log_prior": first[1],
            "log_likelihood": first[2],
            "last_carry": first[3],
            "sample_stats": {"lp": prior + found.total_log_likelihood},
        }

    return _evaluate.many(one, (positions, keys), None, _BATCH)


def carry(found: StateDraws) -> dict[str, Array]:
    """The carry after the last step, from which `forecast` goes on: draws of its state and what rides along."""
    state, riders = found.last
    return {"state": state} | {f"rider_{i}": r for i, r in enumerate(riders)}


def reproducible(states: Any, notes: list[str]) -> bool:
    """Whether the model run at the draws of its latent sites gives back the trajectories, as replicated data need."""
    exact = (isinstance(states, methods.Kalman) and states.exact) or isinstance(states, methods.DiscreteHMM)
    if exact and states.store == "draws":
        return True
    notes.append(
        "posterior_predictive was left out: trajectories of an approximate or unstored smoother do not follow from the "
        "draws of its latent sites alone. pf.forecast gives predictions beyond the data."
    )
    return False


def limited(groups: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Groups without the elementwise log likelihood where that is too large."""
    size = sum(v.size for v in groups.get("log_likelihood", {}).values())
    if size <= posterior.LIKELIHOOD_LIMIT:
        return groups
    notes.append(
        f"log_likelihood would have {size} entries and was left out; pf.add_log_likelihood(tree, model, ...) "
        "computes it."
    )
    return {name: part for name, part in groups.items() if name != "log_likelihood"}
