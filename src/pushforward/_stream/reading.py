"""Reading the model of a stream once, for one step, and seeing that steps need nothing of each other."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.interpreters.partial_eval import dce_jaxpr

from pushforward import _states
from pushforward._errors import ArgumentError, DataError, ModelError, PushforwardError
from pushforward._stream.call import Call, Field, Rows, fields_of, floating, unflatten
from pushforward._types import Array
from pushforward.methods._state import StateMethod
from pushforward.model import _trace
from pushforward.model._arguments import _is_labelled, _plain, split
from pushforward.model.inverse import InverseProblem, _check_dependents, _check_events, _check_support, read_problem
from pushforward.model.state_space import Chain, StateSpace, read_state_space


class Reading:
    """The model read for one step.

    Attributes:
        problem: the model with the rows of the step at which it was read.
        space: its state space, of length 1.
        fields: what each step gives.
    """

    def __init__(self, call: Call, method: StateMethod, given: dict[str, Any]):
        fields, rows = fields_of(given)
        self._read(call, method, fields, rows)
        whole = [
            f for f in self.fields if any(d.kind != "f" and data for d, data in zip(f.dtypes, f.data, strict=True))
        ]
        if not whole:
            return
        # Counts are read as floats where their law allows it, so that they can be missing later.
        names = {f.name for f in whole}
        floats = {n: jax.tree.map(floating, v, is_leaf=_is_labelled) if n in names else v for n, v in given.items()}
        try:
            self._read(call, method, *fields_of(floats))
        except (PushforwardError, TypeError, ValueError):
            self._read(call, method, fields, rows)

    def _read(self, call: Call, method: StateMethod, fields: list[Field], rows: Rows) -> None:
        trees = unflatten(fields, rows)
        problem, places = _placed(call, trees, rows)
        if not any(site.role == "data" for site in problem.sites.values()):
            raise DataError(
                f"no site is observed: {list(problem.sites)} are all latent. Give data to the step, as in "
                "stream.step(y=...); numpyro.sample(..., obs=y) makes a site observed."
            )
        self.problem, self.space = problem, _states.check_alone(method, problem)
        if self.space.steps != 1:
            raise DataError(
                f"the scan has {self.space.steps} steps when the model is called for one. Give stream.step rows "
                "without an axis of time, and pf.online nothing that fixes the number of steps."
            )
        check_steps(call, self.space, fields, rows)
        direct, reaching = _observed_from(problem)
        marks = iter(p in reaching for p in places)
        self.fields = [replace(f, data=tuple(next(marks) for _ in f.shapes)) for f in fields]
        self._places, self._arrays = places, problem.arrays
        self._sites = [(n, i) for n, i in direct.items() if i in places]
        self._checked: set[str] = set()

    def rows(self, given: dict[str, Any], step: int) -> Rows:
        """Rows of one step; data that are not given are missing."""
        unknown = [n for n in given if n not in {f.name for f in self.fields}]
        if unknown:
            raise ArgumentError(
                f"'{unknown[0]}' was not given at the first step, which gave {[f.name for f in self.fields]}. Give the "
                "same names at each step, NaN where nothing was measured."
            )
        made: list[np.ndarray] = []
        for field in self.fields:
            found = field.rows(given[field.name], step) if field.name in given else field.missing()
            if found is None:
                raise DataError(
                    f"step {step} lacks '{field.name}', which cannot be missing: it is an input of the model, or data "
                    "that were integers at the first step (floats can be NaN). Give its value."
                )
            made += found
        return tuple(made)

    def late(self, rows: Rows, given: dict[str, Any], step: int) -> Rows:
        """Rows of an earlier step with the entries that came late."""
        old = unflatten(self.fields, tuple(r[0] for r in rows))
        new = self.rows(old | given, step)
        return tuple(np.where(np.isnan(n), o, n) if n.dtype.kind == "f" else n for o, n in zip(rows, new, strict=True))

    def arrays(self, rows: Rows) -> list[Any]:
        """The model's array arguments with the rows of a step in their places."""
        arrays: list[Any] = list(self._arrays)
        for place, row in zip(self._places, rows, strict=True):
            arrays[place] = row
        return arrays

    def check(self, rows: Rows, step: int) -> None:
        """Refuse data that no step may use.

        Raises:
            DataError: infinite, outside the support, missing in part of an event, or missing where needed.
        """
        at = dict(zip(self._places, rows, strict=True))
        for name, place in self._sites:
            row, site = at[place], self.problem.sites[name]
            if row.dtype.kind == "f":
                absent = np.isnan(row)
                if np.isinf(row).any():
                    raise DataError(
                        f"data '{name}' are infinite at step {step}. Correct them, or give NaN for missing."
                    )
                if absent.any():
                    _check_events(site, absent)
                    if name not in self._checked:
                        _check_dependents(self.problem, (name,))
                        self._checked.add(name)
                if absent.all():
                    continue
            else:
                absent = np.zeros(row.shape, bool)
            if not _all_reals(site.support):
                _check_support(site, row, ~absent)


def _all_reals(support: Any) -> bool:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is None or type(support).__name__.strip("_") in ("Real", "RealVector")


def _placed(call: Call, trees: dict[str, Any], rows: Rows) -> tuple[InverseProblem, list[int]]:
    """The problem of a call, and where its rows are among the model's array arguments."""
    problem = read_problem(call.model, call.args, call.kwargs | trees)
    arguments = (call.args, call.kwargs | trees)
    if len(problem.arrays) != len(split(*arguments).arrays):
        raise ModelError(
            "the model needs concrete arrays (it branches on data), so it would be compiled anew at each step. Write "
            "the branch with jax.numpy.where, and pass sizes as Python integers."
        )
    leaves = [_plain(leaf) for leaf in jax.tree.leaves(arguments, is_leaf=_is_labelled)]
    arrays = [leaf for leaf in leaves if split((leaf,), {}).arrays]
    return problem, [next(i for i, a in enumerate(arrays) if a is row) for row in rows]


def _observed_from(problem: InverseProblem) -> tuple[dict[str, int], set[int]]:
    """Observed sites that are an array argument as it is, with its number; numbers of all that data come from."""
    s, names = problem.structure, sorted(problem.structure.data)

    def observed(arrays: tuple) -> dict[str, Array]:
        trace = _trace.run(s.call(arrays), _trace.from_noise(s.slots, jnp.zeros(s.dimension)), fill_missing=False)
        return {n: trace[n]["value"] for n in names}

    with numpyro.validation_enabled(False):
        jaxpr = jax.make_jaxpr(observed)(problem.arrays).jaxpr
    inputs = {id(v): i for i, v in enumerate(jaxpr.invars)}
    found = {n: inputs[id(v)] for n, v in zip(names, jaxpr.outvars, strict=True) if id(v) in inputs}
    _, used = dce_jaxpr(jaxpr, [True] * len(names))
    return found, {i for i, u in enumerate(used) if u}


def check_steps(call: Call, space: StateSpace, fields: list[Field], rows: Rows) -> None:
    """See that a step needs nothing but its own rows and the state, by reading the model with two steps.

    Raises:
        ModelError: what the scan uses depends on the number of the step or on the data of others.
    """
    first = tuple(np.where(np.isnan(r), 1.0, r).astype(r.dtype) if r.dtype.kind == "f" else r for r in rows)
    second = tuple(1.25 * r + 0.5 if r.dtype.kind == "f" else r for r in first)
    both = tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))
    try:
        pair, _ = _placed(call, unflatten(fields, both), both)
        double = read_state_space(pair)
    except PushforwardError as error:
        if space.structure.fused:
            raise ModelError(f"a stream needs a model that can be read with two steps, too: {error}") from error
        return
    double = StateSpace(double.arrays, double.structure, space.joined)
    if double.steps != 2:
        return
    spaces = [
        StateSpace(_placed(call, unflatten(fields, r), r)[0].arrays, space.structure, space.joined)
        for r in (first, second)
    ]
    found, ends = jax.device_get(jax.jit(_bounds)(*spaces, double))
    wrong = _unlike(*found)
    if wrong:
        raise ModelError(
            f"{wrong} of the scan depends on the number of the step or on data of other steps (numpy.arange, a lag, a "
            "mean over time), and a stream calls the model with one step at a time. Count steps in the carry, carry "
            "earlier values along, and pass tables for all steps to pf.online."
        )
    if ends:
        raise ModelError(
            "the data become NaN after the first step: the body of the scan takes them by an index past their end "
            "(jax.numpy.take). Scan over the data, or index them by y[t], which stays at their one row."
        )


def _bounds(*spaces: StateSpace) -> tuple[list[dict[str, list[Array]]], Array]:
    """What the body closes over and scans over, with parameters at the centre of their prior, and `_ends`."""
    chains = [_chain(space) for space in spaces]
    ends = jnp.asarray(False) if spaces[0].structure.joint.discrete else _ends(chains[0])
    return [chain.bound for chain in chains], ends


def _chain(space: StateSpace) -> Chain:
    chain = space.chain()
    return chain.at(jnp.zeros(chain.joined_size))


def _ends(chain: Chain) -> Array:
    """Whether data that are there at the first step are missing at the second, of the same rows."""
    state, riders, _ = chain.start(jnp.zeros(chain.initial_dimension))
    noise, step = jnp.zeros(chain.noise_dimension), jnp.asarray(0)
    first = chain.step(state, riders, step, noise)
    second = chain.step(state, first.riders, step, noise)
    return jnp.any(jnp.isnan(second.observed.data) & ~jnp.isnan(first.observed.data))


def _unlike(first: dict, second: dict, both: dict) -> str | None:
    """What of two steps read together differs from the two read alone."""
    if any(len(first[k]) != len(both[k]) for k in first):
        return None
    for x, y, xy in zip(first.get("xs", ()), second.get("xs", ()), both.get("xs", ()), strict=True):
        if not _close(np.concatenate([x, y]), xy):
            return "an input"
    for x, y, xy in zip(first.get("consts", ()), second.get("consts", ()), both.get("consts", ()), strict=True):
        same = _close(x, xy) and _close(y, xy)
        if x.shape == xy.shape and not same:
            return "a value that the body uses"
    return None


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype.kind not in "fc":
        return np.array_equal(a, b)
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
