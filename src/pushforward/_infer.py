"""`infer`: read the model, check that the method fits, run it, package the result."""

import hashlib
import warnings
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pushforward import _batches, _evaluate, _states, _surrogates, filter_diagnostics, parallel, posterior
from pushforward._choice import choose
from pushforward._errors import ArgumentError, DataError, InferenceError, Outcome
from pushforward._runner import Runner
from pushforward._types import Key, Model
from pushforward.methods._base import Draws, Method, content
from pushforward.methods._pseudo_marginal import OverStates
from pushforward.methods._state import StateMethod
from pushforward.methods.amortized_flow import AmortizedFlow
from pushforward.model._arguments import bound, split
from pushforward.model._fingerprint import fingerprint, stable_text
from pushforward.model.inverse import InverseProblem, check_data, diagnose, read_problem, shape_warnings
from pushforward.model.simulator import Watch

_LIBRARIES = ("pushforward", "jax", "numpyro", "blackjax", "arviz", "equinox")


def infer(
    model: Model,
    *args: Any,
    method: str | Method = "auto",
    states: Any = None,
    surrogate: Any = None,
    observed: tuple[str, ...] | None = None,
    key: int | Key = 0,
    draws: int = 1000,
    predictive: bool = False,
    coords: dict[str, Any] | None = None,
    dims: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    throw: bool = True,
    progress: bool = True,
    mesh: Mesh | None = None,
    **kwargs: Any,
) -> Any:
    """Infer the posterior of a NumPyro model.

    Args:
        model: a NumPyro model. Sites are data when an argument makes them observed; NaN in data means missing.
        *args: the model's positional arguments. Arrays are traced, so that data of equal shapes do not
            recompile; all else is static.
        method: an instance such as ``pf.NUTS(chains=2)``, a name such as ``"laplace"``, or ``"auto"``.
        states: a state method such as ``pf.Kalman()`` that integrates the trajectory of a `scan` out while `method`
            infers the parameters; the result holds both.
        surrogate: `pf.Surrogate(...)`, fitted or not, which stands in for the model's predictions; its error is added
            to the noise. Only ``pf.NUTS(corrected=True)`` then runs the model.
        observed: names of the sites that must be data; an error names those that no argument observes.
        key: an integer or a typed JAX key.
        draws: draws per chain.
        predictive: whether to add the group ``posterior_predictive``.
        coords: coordinate values by dimension, as in ArviZ.
        dims: names of the axes of variables, as in ArviZ; plates name their own.
        checkpoint: file to which long runs write their state, and from which they resume.
        throw: whether a run without a usable result raises; otherwise the partial result is returned.
        progress: whether to show a progress bar.
        mesh: devices that share chains, particles, samples or draws.
        **kwargs: the model's named arguments.

    Returns:
        An `xarray.DataTree` in ArviZ 1.x schema; see `pf.attributes` for method, seconds, warnings and evidence.

    Raises:
        ArgumentError: an argument of `infer`, or the call of the model, is wrong.
        ModelError: the model cannot be read; the text names the site.
        DataError: the data cannot be used; the text names the site.
        MethodError: the method or its options do not fit.
        InferenceError: the run gave no usable result; its `partial` holds what there is.

    Example:
        >>> import numpyro, numpyro.distributions as dist, pushforward as pf
        >>> def model(y=None):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 10))
        ...     numpyro.sample("y", dist.Normal(mean, 1), obs=y)
        >>> import numpy as np
        >>> tree = pf.infer(model, method="laplace", y=np.array([1.0, 2.0, 3.0]))
        >>> round(float(tree["posterior"]["mean"].mean()), 1)
        2.0
    """
    _check_options(draws, throw, progress, predictive)
    mesh, key, label = parallel.check_mesh(mesh), *_typed_key(key)
    given = bound(model, args, kwargs)
    observed = observed or getattr(method, "observed", None)
    if surrogate is None and isinstance(method, AmortizedFlow) and _batches.is_batch(method, given):
        return _batches.infer_batch(method, model, given, key, label, draws, coords, dims)
    problem = read_problem(model, args, kwargs, observed)
    notes = _check_problem(problem, observed)
    labels = posterior.Labels(problem.sites, coords, dims, _argument_names(model, args, kwargs))
    stand_in = _surrogates.read(surrogate, method, states, predictive, problem, (model, args, kwargs), key)
    method, states, reason = choose(method, states, stand_in.problem if stand_in else problem)
    _states.check_needed(method, states)
    _surrogates.check_method(method, stand_in)
    method.check_call(given)
    watch = Watch(problem)
    path = _checkpoint_path(checkpoint)
    identity = _identity(model, args, kwargs, (method, states, surrogate), key, draws) if path else ""
    runner = Runner(progress=progress, checkpoint=path, identity=identity, mesh=mesh, label=type(method).__name__)
    found, groups = _run(problem, method, states, stand_in, key, draws, labels, runner, notes, predictive)
    watch.check()
    groups["constant_data"] = posterior.group(_constants(problem, model, args, kwargs), labels, sampled=False)
    outcome = _outcome(found)
    cautions = shape_warnings(problem) + _usage_warnings(method, runner) + method.warnings(found) + watch.notes()
    cautions += _convergence(found, groups["posterior"])
    cautions += stand_in.warnings(method, found) if stand_in else []
    cautions += [outcome.text] if outcome == Outcome.MAXIMUM_STEPS else []
    attributes = _attributes(method, runner, found, outcome, label) | {"warnings": cautions, "notes": notes}
    attributes |= {"reason": reason} if reason else {}
    attributes |= {"simulators": watch.counts()} if watch.counts() else {}
    attributes |= {"states": repr(states)} if states is not None else {}
    attributes |= stand_in.attributes() if stand_in else {}
    tree = posterior.tree(groups, attributes)
    if throw and outcome not in (Outcome.SUCCESS, Outcome.MAXIMUM_STEPS):
        known = method.failure(found)
        if known is None and not watch.notes():
            diagnose(problem)
        said = " ".join([known or outcome.text, *watch.notes()])
        raise InferenceError(f"{type(method).__name__}: {said}", outcome, tree)
    for caution in cautions if outcome in (Outcome.SUCCESS, Outcome.MAXIMUM_STEPS) else ():
        warnings.warn(f"{type(method).__name__}: {caution}", UserWarning, stacklevel=2)
    return tree


def _run(
    problem: InverseProblem,
    method: Method,
    states: StateMethod | None,
    stand_in: _surrogates.StandIn | None,
    key: Key,
    draws: int,
    labels: posterior.Labels,
    runner: Runner,
    notes: list[str],
    predictive: bool,
) -> tuple[Draws, dict[str, Any]]:
    """Run the method on the model, on its states, or on a surrogate of it, and make the groups of the result."""
    if stand_in:
        found = _with_khat(stand_in.run(method, key, draws, runner))
        return found, stand_in.groups(found, labels, runner, notes)
    if isinstance(method, StateMethod) or states is not None:
        found, groups = _state_groups(problem, method, states, key, draws, labels, runner, notes)
        if predictive and _states.reproducible(states or method, notes):
            groups["posterior_predictive"] = _replicated(problem, groups["posterior"], labels, runner, key)
        return found, groups
    found = _with_khat(method.run(problem, key, draws, runner))
    return found, _groups(problem, found, labels, runner, key if predictive else None, notes)


def _check_options(draws: Any, throw: Any, progress: Any, predictive: Any) -> None:
    if isinstance(draws, bool) or not isinstance(draws, int | np.integer) or draws < 1:
        raise ArgumentError(f"draws= takes a positive integer, the number of draws per chain; got {draws!r}.")
    for name, value in (("throw", throw), ("progress", progress), ("predictive", predictive)):
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}= takes True or False; got {value!r}.")


def _typed_key(key: Any) -> tuple[Key, int | list[int]]:
    """A typed key and how the result's attributes show it."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(int(key)), int(key)
    if isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return key, np.asarray(jax.random.key_data(key)).tolist()
    raise ArgumentError(f"key= takes an integer or one typed key, jax.random.key(0); got {type(key).__name__}.")


def _check_problem(problem: InverseProblem, observed: Any) -> list[str]:
    """Refuse a model without data or without latent sites, then look at the data."""
    roles = {role: [s.name for s in problem.sites.values() if s.role == role] for role in ("data", "factor")}
    given = set(problem.observed_values()) if roles["data"] else set()
    unset = [n for n in roles["data"] if n not in given]
    if unset:
        raise DataError(
            f"observed= names '{unset[0]}' as data, but no argument of the model observes it. "
            f"Pass its values to the model, or take it out of observed=."
        )
    if not roles["data"] and not roles["factor"]:
        names = list(problem.structure.slots)
        raise DataError(
            f"no site is observed: {names} are all latent. Pass the data to the model by name, as in "
            "infer(model, y=y); numpyro.sample(..., obs=y) makes a site observed. For prior draws use pf.prior."
        )
    if problem.dimension == 0:
        raise DataError("the model has no latent site, so there is nothing to infer. Add numpyro.sample(...).")
    return check_data(problem)


def _checkpoint_path(checkpoint: Any) -> Path | None:
    if checkpoint is None:
        return None
    if not isinstance(checkpoint, str | Path):
        raise ArgumentError(f"checkpoint= takes the path of a file; got {type(checkpoint).__name__}.")
    path = Path(checkpoint)
    if path.is_dir():
        raise ArgumentError(f"checkpoint= takes the path of a file; {path} is a folder.")
    return path


def _identity(model: Model, args: tuple, kwargs: dict, methods: tuple, key: Key, draws: int) -> str:
    """A digest of everything that determines the draws."""
    constant = split(args, kwargs, constant=True).static
    contents = tuple(map(content, methods))
    parts = (fingerprint(model), constant, contents, np.asarray(jax.random.key_data(key)).tolist(), draws)
    text = stable_text(parts) + jnp.result_type(float).name + _version("pushforward")
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _with_khat(found: Draws) -> Draws:
    if found.log_weights is None:
        return found
    from pushforward.diagnostics import pareto_khat

    khat = pareto_khat(np.asarray(found.log_weights))
    return Draws(**{**vars(found), "summary": found.summary | {"khat": np.asarray(khat)}})


def _usage_warnings(method: Method, runner: Runner) -> list[str]:
    notes = []
    if runner.checkpoint is not None and not runner.checkpoint.exists():
        notes.append("it runs in one piece, so checkpoint= was not used.")
    if runner.mesh is not None and isinstance(method, StateMethod):
        notes.append("mesh= was not used: a state method runs on one device in this version.")
    elif runner.mesh is not None and method.shards == "draws":
        notes.append("mesh= splits only the evaluation of its draws; the run itself used one device.")
    return notes


def _groups(
    problem: InverseProblem, found: Draws, labels: posterior.Labels, runner: Runner, key: Key | None, notes: list[str]
) -> dict[str, Any]:
    """All groups of the result but `constant_data`."""
    chains, draws = jax.tree.leaves(found.positions)[0].shape[:2]
    entries = chains * draws * _evaluate.likelihood_entries(problem)
    likelihood = entries <= posterior.LIKELIHOOD_LIMIT
    if not likelihood:
        notes.append(
            f"log_likelihood would have {entries} entries and was left out; pf.add_log_likelihood(tree, model, ...) "
            "computes it."
        )
    values = runner.call(_evaluate.at_positions, problem, found.positions, likelihood, runner.mesh)
    stats = {"lp": values["lp"]} | found.stats
    parts = {"posterior": values["posterior"], "sample_stats": stats} | {
        name: values[name] for name in ("log_likelihood", "log_prior")
    }
    if found.sites is not None:
        parts = {
            name: {k: v for k, v in parts[name].items() if k in found.sites} for name in ("posterior", "log_prior")
        }
        parts["sample_stats"] = found.stats
        notes.append(f"only {list(found.sites)} were inferred; log_likelihood and lp need all latent sites.")
    groups = {name: posterior.group(part, labels) for name, part in parts.items()}
    if found.ran is not None:
        groups["ensemble"] = posterior.ensemble(found.ran, problem.observed_values(), labels)
    if key is not None:
        groups["posterior_predictive"] = _replicated(problem, values["posterior"], labels, runner, key)
    return groups | {"observed_data": posterior.group(problem.observed_values(), labels, sampled=False)}


def _replicated(problem: InverseProblem, draws: Any, labels: posterior.Labels, runner: Runner, key: Key) -> Any:
    """The group of data drawn at each draw of the latent sites."""
    latent = {n: jnp.asarray(np.asarray(draws[n])) for n in problem.structure.slots if n in draws}
    shape = jax.tree.leaves(latent)[0].shape[:2]
    flat = {n: v.reshape(-1, *v.shape[2:]) for n, v in latent.items()}
    drawn = runner.call(_evaluate.predictions_at, problem, flat, jax.random.fold_in(key, 1), runner.mesh)
    return posterior.group({n: v.reshape(*shape, *v.shape[1:]) for n, v in drawn.items()}, labels)


def _state_groups(
    problem: InverseProblem,
    method: Method,
    states: StateMethod | None,
    key: Key,
    draws: int,
    labels: posterior.Labels,
    runner: Runner,
    notes: list[str],
) -> tuple[Draws, dict[str, Any]]:
    """Run a state method, alone or under a method for the parameters, and make the groups of the result."""
    if isinstance(method, StateMethod):
        space = _states.check_alone(method, problem)
        found, parts = _states.run_alone(method, space, key, draws, runner, notes)
    elif isinstance(method, OverStates):
        assert states is not None
        found, parts = method.run_with_states(_states.check_given(states, method, problem), states, key, draws, runner)
    else:
        assert states is not None
        space = _states.check_given(states, method, problem)
        marginal = _states.marginal_problem(space, states, jax.random.fold_in(key, 3))
        found = _with_khat(method.run(marginal, key, draws, runner))
        parts = _states.groups_given(space, states, found, marginal, jax.random.fold_in(key, 4), runner)
    parts = _states.limited(parts, notes)
    stats = parts.pop("filter_stats", None)
    groups = {name: posterior.group(part, labels, sampled=_states.is_sampled(part)) for name, part in parts.items()}
    if stats:
        groups["filter_stats"] = posterior.series(stats, labels)
    groups["observed_data"] = posterior.group(problem.observed_values(), labels, sampled=False)
    return found, filter_diagnostics.with_scores(groups, notes)


def _argument_names(model: Model, args: tuple, kwargs: dict) -> list[str]:
    return list(bound(model, args, kwargs))


def _constants(problem: InverseProblem, model: Model, args: tuple, kwargs: dict) -> dict[str, np.ndarray]:
    """Array arguments that are not themselves data, under the names of the model's parameters."""
    given = [np.asarray(v) for v in problem.observed_values().values()]
    found = {}
    for name, value in bound(model, args, kwargs).items():
        if name in problem.sites or not hasattr(value, "shape"):
            continue
        array = np.asarray(value)
        same = any(array.shape == g.shape and np.array_equal(array.astype(g.dtype), g, equal_nan=True) for g in given)
        if array.dtype.kind in "biuf" and not same:
            found[name] = array
    return found


def _convergence(found: Draws, group: Any) -> list[str]:
    """Split R-hat and effective sample size of chains, with a plain warning where they are bad."""
    if jax.tree.leaves(found.positions)[0].shape[0] < 2:
        return []
    from pushforward.diagnostics import worst_convergence

    worst = worst_convergence(group)
    found.summary.update({k: v for k, v in worst.items() if k in ("rhat_max", "ess_min")})
    notes = []
    if worst["rhat_max"] > 1.01:
        notes.append(
            f"R-hat is {worst['rhat_max']:.3f} for {worst['rhat_variable']}, above 1.01: the chains do not agree. "
            "Give more warmup and draws, or other coordinates."
        )
    if worst["ess_min"] < 400:
        notes.append(
            f"the effective sample size is {worst['ess_min']:.0f} for {worst['ess_variable']}, below 400: "
            "quantiles and R-hat are unreliable. Give more draws."
        )
    return notes


def _outcome(found: Draws) -> Outcome:
    outcome = Outcome(int(found.outcome))
    finite = all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(found.positions))
    return Outcome.NONFINITE if outcome == Outcome.SUCCESS and not finite else outcome


def _attributes(method: Method, runner: Runner, found: Draws, outcome: Outcome, key: int | list[int]) -> dict[str, Any]:
    summary = {name: np.asarray(value, float).tolist() for name, value in found.summary.items()}
    return {
        "method": type(method).__name__,
        "options": {field.name: _plain(getattr(method, field.name)) for field in fields(method)},
        "returns": method.returns,
        "versions": {name: _version(name) for name in _LIBRARIES},
        "key": key,
        "devices": parallel.device_count(runner.mesh),
        "compile_seconds": runner.compile_seconds,
        "run_seconds": runner.run_seconds,
        "evaluations": float(found.evaluations),
        "gradient_evaluations": float(found.gradient_evaluations),
        "outcome": outcome.name.lower(),
    } | summary


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
