"""`learn`: point estimates of what a state-space model does not know, by likelihood, posterior mode or EM."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from pushforward._errors import DataError, InferenceError, MethodError, ModelError, Outcome
from pushforward._infer import _checkpoint_path, _identity, _typed_key
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.learned import _likelihood_training as training
from pushforward.learned.estimates import Learned, Origin
from pushforward.learned.learning import EM, MAP, NAMES, Increments, Learner, Likelihood
from pushforward.learned.unknowns import Marginal, Objective, Unknowns
from pushforward.methods import NAMES as METHODS
from pushforward.methods import _expectation
from pushforward.methods._state import StateMethod
from pushforward.methods.discrete_hmm import DiscreteHMM
from pushforward.methods.enkf import EnKF
from pushforward.methods.kalman import Kalman
from pushforward.model import _param_sites
from pushforward.model._arguments import check_model
from pushforward.model._param_sites import ParamSites
from pushforward.model.inverse import check_data, read_problem
from pushforward.model.state_space import StateSpace, read_state_space

_FEW = 50
"""Unknown numbers up to which standard errors are computed."""


def learn(
    model: Model,
    *args: Any,
    states: StateMethod | str = "auto",
    method: Learner | str = "likelihood",
    observed: tuple[str, ...] | None = None,
    key: int | Key = 0,
    checkpoint: str | Path | None = None,
    throw: bool = True,
    progress: bool = True,
    **kwargs: Any,
) -> Learned:
    """Point estimates of the static unknowns of a state-space model, with its trajectory integrated out.

    Unknown are the latent sites that are no states (`numpyro.sample` outside the scan), and all `numpyro.param` sites,
    which may be networks: ``net = numpyro.param("net", lambda key: equinox.nn.MLP(3, 3, 16, 1, key=key))`` in front of
    the scan, used in its body like any function. Everything that is trained moves in unconstrained coordinates.

    Args:
        model: a NumPyro model with one `scan`.
        *args: its positional arguments, data included; NaN means missing.
        states: the state method that integrates the trajectory out, such as ``pf.Kalman()`` or
            ``pf.EnKF(members=50)``, or its name; "auto": Kalman where that is exact, else ``pf.EnKF(members=100)``.
        method: `pf.Likelihood(...)`, `pf.MAP(...)`, `pf.EM(...)`, `pf.Increments(...)`, or "likelihood", "map", "em",
            "increments".
        observed: names of the sites that must be data.
        key: an integer or a typed JAX key.
        checkpoint: file to which long runs write their state, and from which they resume.
        throw: whether a run that broke down raises; otherwise the last good estimates are returned.
        progress: whether to show a progress bar.
        **kwargs: the model's named arguments.

    Returns:
        A `Learned` with estimates, standard errors, the trained model and the curve of the log likelihood. `pf.save`
        writes it; ``pf.load(path, model=model)`` reads it.

    Raises:
        ModelError: no scan, or nothing to learn.
        MethodError: a state method or method that does not fit; the text says what to use.
        InferenceError: the log likelihood was not finite at the start, or became so; `partial` holds the last good.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def walk(y):
        ...     sd = numpyro.sample("sd", dist.LogNormal(0, 1))
        ...     def step(x, y):
        ...         x = numpyro.sample("x", dist.Normal(x, sd))
        ...         numpyro.sample("y", dist.Normal(x, 0.1), obs=y)
        ...         return x, None
        ...     scan(step, numpyro.sample("x0", dist.Normal(0, 1)), y)
        >>> y = np.cumsum(np.random.default_rng(0).normal(0, 0.5, 200))
        >>> learned = pf.learn(walk, states=pf.Kalman(), y=y, progress=False)
        >>> bool(abs(learned.estimates["sd"] - 0.5) < 3 * learned.standard_errors["sd"])
        True
    """
    check_model(model, args, kwargs)
    (typed, _), path = _typed_key(key), _checkpoint_path(checkpoint)
    method = _method(method)
    sites = _param_sites.param_sites(model, args, kwargs, jax.random.fold_in(typed, 1))
    unknowns = _read(model, args, kwargs, sites, observed)
    states = _states(states, unknowns.space)
    _check_fit(method, states, unknowns)
    identity = _identity(model, args, kwargs, (method, states), typed, 0) if path else ""
    runner = Runner(progress=progress, checkpoint=path, identity=identity, label=type(method).__name__)
    flat, curve, broken, notes = _run(method, states, unknowns, jax.random.fold_in(typed, 2), runner)
    known, errors, outcome = _judge(method, states, unknowns, sites, flat, typed, broken, runner, notes)
    attributes = {
        "method": repr(method),
        "states": repr(states),
        "steps": len(curve),
        "failed_step": broken,
        "compile_seconds": runner.compile_seconds,
        "run_seconds": runner.run_seconds,
        "warnings": notes,
    }
    origin = Origin.of(model, args, kwargs, tuple(sites.values))
    found = Learned(known, errors, _param_sites.fixed(model, known), curve, outcome, attributes, origin)
    if throw and outcome in (Outcome.NONFINITE, Outcome.NONFINITE_START):
        raise InferenceError(f"{type(method).__name__}: {_said(broken, states)} {outcome.text}", outcome, found)
    return found


def _said(broken: int | None, states: StateMethod) -> str:
    if broken == 0:
        return f"the log likelihood by {type(states).__name__}, or its gradient, is not finite at the start."
    return (
        f"at step {broken} the log likelihood by {type(states).__name__}, or its gradient, was not finite: the filter "
        "diverged. The estimates of the steps before are in the error's `partial`, and are returned with throw=False. "
        "Take a smaller learning rate, more members or inflation."
    )


def _method(method: Any) -> Learner:
    if isinstance(method, str) and method in NAMES:
        kind: Any = NAMES[method]
        return kind()
    if not isinstance(method, Learner):
        raise MethodError(f"method= takes one of {list(NAMES)} or an instance such as pf.EM(); got {method!r}.")
    return method


def _read(model: Model, args: tuple, kwargs: dict, sites: ParamSites, observed: tuple[str, ...] | None) -> Unknowns:
    """The model as a state space whose `numpyro.param` sites are arguments."""
    if sites.values:
        problem = read_problem(_param_sites.lifted(model), (sites.values, args, kwargs), {}, observed)
    else:
        problem = read_problem(model, args, kwargs, observed)
    check_data(problem)
    space = read_state_space(problem)
    arrays = _param_sites.arrays_of(sites.values)
    leaves = tuple(i for i, v in enumerate(arrays) if _param_sites.is_trained(v))
    if leaves and len(space.arrays) < len(arrays):
        raise ModelError(
            "the model needs concrete arrays (it branches on data), so that its numpyro.param sites cannot be trained. "
            "Use jax.numpy.where, or pass sizes as Python integers."
        )
    if not leaves and not space.parameters:
        raise ModelError(
            "the model has nothing to learn: no latent site outside its scan besides the initial state, and no "
            "numpyro.param. Write numpyro.sample('sd', dist.LogNormal(0, 1)) or numpyro.param('sd', 1.0, "
            "constraint=dist.constraints.positive) in front of the scan, and use it in the body."
        )
    if not any(s.role == "data" for s in problem.sites.values()):
        raise DataError("no site is observed. Pass the data to the model by name, as in pf.learn(model, y=y).")
    return Unknowns(space, leaves)


def _states(states: Any, space: StateSpace) -> StateMethod:
    if isinstance(states, str) and states == "auto":
        states = Kalman() if Kalman().why_not(space) is None else EnKF(members=100)
    elif isinstance(states, str) and states in METHODS:
        states = METHODS[states]()
    if not isinstance(states, StateMethod):
        names = ["auto", *(name for name, kind in METHODS.items() if issubclass(kind, StateMethod))]
        raise MethodError(
            "states= takes an instance of a state method, such as pf.Kalman() or pf.EnKF(members=100), or one of "
            f"{names}; got {states!r}."
        )
    name = type(states).__name__
    if states.augment:
        raise MethodError(f"states={name}(augment=True) would hold the unknowns in the state. Leave augment out.")
    reason = states.why_not(space)
    if reason:
        raise MethodError(f"{name} does not fit this model: {reason}.")
    return states


def _check_fit(method: Learner, states: StateMethod, unknowns: Unknowns) -> None:
    name = type(states).__name__
    if isinstance(method, Likelihood | MAP):
        if not states.differentiable:
            raise MethodError(
                f"{type(method).__name__} follows the gradient of the log likelihood, and states={name}(...) has none: "
                "its choice of particles is a jump. Use method='em', resampling=pf.StopGradient() or pf.Transport(), "
                "or states=pf.EnKF()."
            )
        return
    reason = _expectation.why_no_paths(unknowns.space)
    if reason is None and isinstance(method, EM) and isinstance(states, Kalman):
        reason = _expectation.why_no_pairs(unknowns.space, unknowns.leaves)
    if reason:
        raise MethodError(f"{type(method).__name__} does not fit this model: {reason}.")


def _without_noise(states: StateMethod) -> bool:
    return isinstance(states, Kalman | DiscreteHMM)


def _run(
    method: Learner, states: StateMethod, unknowns: Unknowns, key: Key, runner: Runner
) -> tuple[Array, np.ndarray, int | None, list[str]]:
    """The unknowns, the curve, the step that broke down, and warnings."""
    start, notes = unknowns.start(), []
    if isinstance(method, Likelihood | MAP):
        objective = _marginal(method, states, unknowns, key)
        kind = method.optimizer
        if kind == "auto":
            kind = "lbfgs" if _without_noise(states) and method.noise == "common" else "adam"
        found = training.climb(
            objective, start, kind, method.steps, method.learning_rate, method.tolerance / 10, runner
        )
        # With fresh noise the highest value is the luckiest draw, and the last step the most settled.
        flat = found.best if method.noise == "common" or int(found.broken) >= 0 else found.flat
        curve = np.asarray(found.curve)[: int(found.steps)]
        return flat, curve, _broken(found.broken), notes
    assert isinstance(method, EM | Increments)
    if isinstance(method, Increments):
        expect: Any = _expectation.FilterMeans(states)
    elif isinstance(states, Kalman):
        expect = _expectation.Moments(states)
    else:
        expect = _expectation.SmoothingDraws(states, method.draws)
    # Where log likelihoods are noisy, three small gains in a row are chance.
    tolerance = method.tolerance if _without_noise(states) else -math.inf
    found = training.rounds(expect, unknowns, start, method.steps, method.inner, tolerance, key, runner)
    if int(found.steps) == method.steps and int(found.idle) < 3 and _without_noise(states):
        notes.append("the log likelihood was still rising when the rounds were used up. Give the method more steps.")
    return found.good, np.asarray(found.curve)[: int(found.steps)], _broken(found.broken), notes


def _broken(step: Array) -> int | None:
    return None if int(step) < 0 else int(step)


def _marginal(method: Learner, states: StateMethod, unknowns: Unknowns, key: Key) -> Marginal:
    prior = isinstance(method, MAP)
    fresh = isinstance(method, Likelihood | MAP) and method.noise == "fresh"
    return Marginal(unknowns, states, key, prior, fresh)


def _judge(
    method: Learner,
    states: StateMethod,
    unknowns: Unknowns,
    sites: ParamSites,
    flat: Array,
    key: Key,
    broken: int | None,
    runner: Runner,
    notes: list[str],
) -> tuple[dict[str, Any], dict[str, np.ndarray], Outcome]:
    """Estimates, standard errors, and whether the climb arrived."""

    def estimates(flat: Array) -> dict[str, Any]:
        return unknowns.values(flat) | sites.constrained(_params(unknowns, sites, flat))

    known = estimates(flat)
    if broken is not None:
        return known, {}, Outcome.NONFINITE_START if broken == 0 else Outcome.NONFINITE
    if flat.size > _FEW or isinstance(method, Increments) or not states.differentiable:
        return known, {}, Outcome.SUCCESS
    networks = [n for n, v in sites.values.items() if _param_sites.is_network(v)]
    if networks:
        notes.append(
            f"there are no standard errors: {networks} are networks of several layers, whose weights data do not tell "
            "apart, and those of other unknowns at fixed weights would be too small."
        )
        return known, {}, Outcome.SUCCESS
    objective: Objective = _marginal(method, states, unknowns, jax.random.fold_in(key, 2))
    slope, information = (np.asarray(v, float) for v in runner.call(training.curvature, objective, flat))
    try:
        root = np.linalg.cholesky(information)
    except np.linalg.LinAlgError:
        notes.append(
            "the log likelihood is not curved downwards at the estimates in every direction, so there are no standard "
            "errors. Unknowns that the data do not tell apart do this, and too few steps."
        )
        return known, {}, Outcome.NOT_POSITIVE_DEFINITE
    left = 0.5 * float(np.sum(np.linalg.solve(root, slope) ** 2))
    inverse = np.linalg.solve(root, np.eye(len(root)))
    errors = _delta(estimates, flat, inverse)
    late = isinstance(method, Likelihood | MAP) and method.noise == "common" and left > method.tolerance
    if late:
        notes.append(f"about {left:.2g} nats are left to gain. Give the method more steps.")
    return known, errors, Outcome.MAXIMUM_STEPS if late else Outcome.SUCCESS


def _params(unknowns: Unknowns, sites: ParamSites, flat: Array) -> dict[str, Any]:
    """Unconstrained values of `numpyro.param` sites."""
    trained = iter(unknowns.cut(flat)[1])
    leaves, tree = jax.tree.flatten(dict(sites.values))
    return jax.tree.unflatten(tree, [next(trained) if _param_sites.is_trained(v) else v for v in leaves])


def _delta(estimates: Any, flat: Array, inverse: np.ndarray) -> dict[str, np.ndarray]:
    """Standard errors of the estimates: rows of their Jacobian times a root of the covariance of the unknowns."""

    def floating(flat: Array) -> dict[str, list[Array]]:
        found: Mapping[str, Any] = estimates(flat)
        return {n: eqx.filter(v, eqx.is_inexact_array) for n, v in found.items()}

    def size(slope: Array) -> np.ndarray:
        return np.linalg.norm(np.asarray(slope, float) @ inverse.T, axis=-1)

    return jax.tree.map(size, jax.jit(jax.jacfwd(floating))(flat))
