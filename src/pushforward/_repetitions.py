"""Many data sets simulated from a model, and the posterior of each: what `calibrate` and `local_check` share."""

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pushforward import _evaluate, posterior
from pushforward._errors import ArgumentError, DataError, InferenceError, MethodError, ModelError, Outcome
from pushforward._infer import infer
from pushforward._runner import Runner, progress_bar
from pushforward._types import Key, Model
from pushforward.model._conditioned import draw_jointly, why_not_simulated, with_data
from pushforward.model.inverse import InverseProblem, read_problem

FAILED_SHARE = 0.1
"""Share of data sets without a usable posterior above which there is no result."""


class Study(NamedTuple):
    """What is run on each data set: the call of `infer` but for its data, and the model as it was read."""

    method: Any
    model: Model
    args: tuple
    kwargs: dict[str, Any]
    states: Any
    draws: int
    problem: InverseProblem

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the data sites."""
        return tuple(sorted(self.problem.structure.data))


class Simulated(NamedTuple):
    """Draws of (parameters, data), arrays by name with the data set first, and which of them are finite."""

    truth: dict[str, np.ndarray]
    data: dict[str, np.ndarray]
    finite: np.ndarray


class Posterior(NamedTuple):
    """The posterior of one data set, or why there is none.

    Attributes:
        index: which data set.
        draws: arrays (chain, draw, ...) by name.
        log_likelihood: of each draw, shape (chain, draw), and of the truth, where the method gives them.
        cautions: what the run warned of.
        failure: why there are no draws.
        attributes: of the result, decoded.
    """

    index: int
    draws: dict[str, np.ndarray]
    log_likelihood: tuple[np.ndarray, float] | None
    cautions: list[str]
    failure: str
    attributes: dict[str, Any]


def prepare(
    owner: Any, method: Any, model: Model, args: tuple, kwargs: dict, states: Any, draws: int, observed: Any
) -> Study:
    """Read the model and refuse what cannot be simulated and inferred again.

    Args:
        owner: the public function, whose own options no parameter of the model may share.

    Raises:
        ArgumentError: a parameter of the model has the name of an option.
        DataError: no data site, or nothing else.
        ModelError: the model's statements do not simulate what its density says.
        MethodError: the method is not trained.
    """
    if isinstance(draws, bool) or not isinstance(draws, int | np.integer) or draws < 1:
        raise ArgumentError(f"draws= takes a positive integer, the number of draws per chain; got {draws!r}.")
    _check_names(owner, model)
    problem = read_problem(model, args, kwargs, observed or getattr(method, "observed", None))
    name = owner.__name__
    if not problem.structure.data:
        raise DataError(
            f"{name} simulates data, but nothing says which of the sites {list(problem.structure.slots)} are data. "
            f"Name them, as in {name}(method, model, ..., observed=('y',))."
        )
    if problem.dimension == 0:
        raise DataError("the model has no latent site, so there is nothing to infer. Add numpyro.sample(...).")
    reason = why_not_simulated(problem)
    if reason:
        raise ModelError(f"{name} needs a model that simulates what its density says: {reason}.")
    if callable(getattr(method, "fit", None)) and not getattr(method, "trained", True):
        raise MethodError(
            f"{type(method).__name__} is not trained, and would be trained anew for each data set. Train it once, "
            f"method = method.fit(model, ..., observed={tuple(problem.structure.data)}), and pass what fit returns."
        )
    if getattr(getattr(method, "trained", None), "local", False):
        raise MethodError(
            f"{type(method).__name__} was trained for one data set only (rounds above 1), and {name} runs it on "
            "others. Train it with rounds=1."
        )
    return Study(method, model, args, kwargs, states, int(draws), problem)


def _check_names(owner: Any, model: Model) -> None:
    """Options of the owner that are no options of `infer` would be taken out of the model's arguments."""
    try:
        bound = getattr(model, "keywords", {})
        taken = [n for n in inspect.signature(model).parameters if n not in bound]
    except (TypeError, ValueError):
        return
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    options = [n for n, p in inspect.signature(owner).parameters.items() if p.kind in kinds]
    clash = [n for n in taken if n in options]
    if clash:
        raise ArgumentError(
            f"the model has a parameter {clash[0]!r}, which is an option of {owner.__name__}. Bind it first: "
            f"functools.partial(model, {clash[0]}=...), or rename it."
        )


def parameter_names(study: Study, parameters: Any) -> tuple[str, ...]:
    """Sites to look at, in the order of the model."""
    sites = study.problem.sites
    latent = list(study.problem.structure.slots)
    if parameters is None:
        inferred = getattr(getattr(study.method, "trained", None), "sites", None) or latent
        wanted = [n for n in latent if n in inferred]
    else:
        wanted = [parameters] if isinstance(parameters, str) else list(parameters)
        known = [*latent, *(n for n, s in sites.items() if s.role == "deterministic")]
        unknown = [n for n in wanted if n not in known]
        if unknown or not wanted:
            given = f"names {unknown[0]!r}" if unknown else "is empty"
            raise ArgumentError(f"parameters= {given}; the model has {known}.")
    return tuple(n for n in sites if n in wanted)


def simulate(study: Study, key: Key, n: int, runner: Runner) -> Simulated:
    """Draw n pairs of parameters and data; values that are NaN in given data are NaN in simulated data too."""
    truth, data = jax.device_get(runner.call(_drawn, study.problem, jax.random.split(key, n)))
    finite = np.ones(n, bool)
    for part in (truth, data):
        for value in part.values():
            if value.dtype.kind == "f":
                finite &= np.isfinite(value.reshape(n, -1)).all(1)
    for name, given in study.problem.observed_values().items():
        absent = np.isnan(given) if np.asarray(given).dtype.kind == "f" else np.zeros((), bool)
        if absent.any():
            data[name] = np.where(absent, np.nan, data[name]).astype(data[name].dtype)
    return Simulated(truth, data, finite)


def _drawn(problem: InverseProblem, keys: Key) -> tuple[dict, dict]:
    return _evaluate.many(lambda key: draw_jointly(problem, key), keys, None)


def posteriors(
    study: Study, simulated: Simulated, names: tuple[str, ...], key: Key, indices: Any, *, likelihood: bool = True
) -> Iterator[Posterior]:
    """Posterior draws of `names` for each of the data sets `indices`, one after the other.

    The one place that runs a method on many data sets. The data are arguments of one conditioned model, so only the
    first run compiles. A method that takes all data at once would have its branch here.
    """
    model, runner = with_data(study.model), Runner()
    for index in map(int, indices):
        if not simulated.finite[index]:
            yield _failed(index, "the simulated parameters or data are not finite.", [])
            continue
        data = {n: jnp.asarray(v[index]) for n, v in simulated.data.items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                tree = infer(
                    model,
                    data,
                    *study.args,
                    method=study.method,
                    states=study.states,
                    observed=study.observed,
                    key=jax.random.fold_in(key, index),
                    draws=study.draws,
                    progress=False,
                    **study.kwargs,
                )
            except (InferenceError, DataError) as error:
                yield _failed(index, str(error), [str(w.message) for w in caught])
                continue
        draws = _named(tree, names, study, simulated)
        found = _likelihoods(tree, study, model, data, simulated, index, runner) if likelihood else None
        cautions = [str(w.message) for w in caught]
        yield Posterior(index, draws, found, cautions, "", posterior.attributes(tree))


def _failed(index: int, text: str, cautions: list[str]) -> Posterior:
    return Posterior(index, {}, None, cautions, text, {})


def _named(tree: Any, names: tuple[str, ...], study: Study, simulated: Simulated) -> dict[str, np.ndarray]:
    """Draws by name, checked to be draws of what was simulated."""
    group, found = tree["posterior"], {}
    for name in names:
        shape = simulated.truth[name].shape[1:]
        values = group[name].transpose("chain", "draw", ...).to_numpy() if name in group else None
        if values is None or values.shape[2:] != shape:
            has = "none" if values is None else f"draws of shape {values.shape[2:]}"
            raise MethodError(
                f"the result of {type(study.method).__name__} has {has} of '{name}', and the model draws it with shape "
                f"{shape}. Use store='draws' where the method has that option, or choose others with parameters=: "
                f"it has {list(group.data_vars)}."
            )
        found[name] = values
    return found


def _likelihoods(
    tree: Any, study: Study, model: Model, data: dict, simulated: Simulated, index: int, runner: Runner
) -> tuple[np.ndarray, float] | None:
    """log p(data | parameters) of the draws, and of the truth."""
    if "log_likelihood" not in tree.children:
        return None
    parts = [v.transpose("chain", "draw", ...).to_numpy() for v in tree["log_likelihood"].data_vars.values()]
    drawn = sum(np.sum(v.reshape(*v.shape[:2], -1), -1, dtype=float) for v in parts)
    problem = read_problem(model, (data, *study.args), study.kwargs, study.observed)
    slots = problem.structure.slots
    values = {n: jnp.asarray(simulated.truth[n][index])[None] for n in slots if n in simulated.truth}
    if len(values) < len(slots):
        return None
    true = runner.call(_evaluate.likelihood_at, problem, values, None)
    return np.asarray(drawn), float(sum(np.sum(np.asarray(v, float)) for v in true.values()))


def columns(values: dict[str, np.ndarray], axes: int) -> np.ndarray:
    """All scalars of arrays with `axes` leading axes, in one last axis."""
    return np.concatenate([v.reshape(*v.shape[:axes], -1).astype(float) for v in values.values()], -1)


class Record:
    """Collects, over the data sets, attributes of runs, failures and warnings, and shows progress."""

    def __init__(self, label: str, n: int, *, progress: bool):
        self.label, self.n, self.progress = label, n, progress
        self.failures: dict[int, str] = {}
        self.compilations, self.compile_seconds, self.run_seconds = 0, 0.0, 0.0
        self.attributes: dict[str, Any] = {}
        self._kinds: Counter = Counter()
        self._first: dict[str, str] = {}

    def usable(self, runs: Iterator[Posterior]) -> Iterator[Posterior]:
        """The runs that gave draws.

        Raises:
            InferenceError: more than a tenth failed.
        """
        with progress_bar(self.progress, self.label, 0, self.n) as bar:
            for run in runs:
                bar.update(1)
                self._note(run.cautions)
                if run.failure:
                    self.failures[run.index] = run.failure
                    self._check_share()
                    continue
                self.attributes = self.attributes or run.attributes
                self.compile_seconds += run.attributes["compile_seconds"]
                self.run_seconds += run.attributes["run_seconds"]
                self.compilations += run.attributes["compile_seconds"] > 0
                yield run

    def _note(self, cautions: list[str]) -> None:
        for text in cautions:
            kind = re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", text)
            self._kinds[kind] += 1
            self._first.setdefault(kind, text)

    def _check_share(self) -> None:
        failed = len(self.failures)
        if failed > FAILED_SHARE * self.n:
            index, text = next(iter(self.failures.items()))
            raise InferenceError(
                f"{failed} of {self.n} data sets had no usable posterior so far, more than {FAILED_SHARE:.0%}. What is "
                f"left would not be draws from the model. Data set {index}: {text}",
                Outcome.NONFINITE,
            )

    @property
    def warnings(self) -> list[str]:
        """One text for each kind of warning, with the number of data sets and the first example."""
        return [f"{count} of {self.n} data sets, e.g.: {self._first[k]}" for k, count in self._kinds.most_common()]

    def failed_attributes(self) -> dict[str, Any]:
        """How many failed, which, and why."""
        failures = {str(k): v for k, v in self.failures.items()}
        return {"failed": len(self.failures), "failures": failures}

    def warn(self) -> None:
        """Say it where some data sets failed."""
        if self.failures:
            index, text = next(iter(self.failures.items()))
            warnings.warn(
                f"{self.label}: {len(self.failures)} of {self.n} data sets had no usable posterior and are left out: "
                f"the result holds for the others only. Data set {index}: {text}",
                UserWarning,
                stacklevel=3,
            )

    def run_attributes(self) -> dict[str, Any]:
        """What the result says about method and runs."""
        kept = ("method", "options", "states", "returns", "versions", "reason")
        return {k: self.attributes[k] for k in kept if k in self.attributes} | {
            "compile_seconds": self.compile_seconds,
            "run_seconds": self.run_seconds,
            "compilations": self.compilations,
        }
