"""Inflation and localisation radius of an ensemble filter, learned from observations by the filter's own likelihood."""

import hashlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import DataError, MethodError
from pushforward._runner import Runner, progress_bar
from pushforward._types import Array, Key
from pushforward.methods import _ensemble_filter
from pushforward.methods._base import check_integer, check_positive, content
from pushforward.methods._ensemble_filter import Ensemble, Filter
from pushforward.methods._ensemble_parts import LETKF, RTPP, RTPS, Additive, Multiplicative
from pushforward.model._arguments import bound, check_model
from pushforward.model._fingerprint import stable_text
from pushforward.model.inverse import check_data, read_problem
from pushforward.model.state_space import StateSpace, read_state_space

if TYPE_CHECKING:
    from pushforward.methods.enkf import EnKF

PARTS = ("inflation", "radius")
_SPREAD = 0.5
"""Size of the first simplex, in logarithms."""
_LEAST = 0.01
"""Inflation that a search from a factor of 1 starts at."""
_NEAR = 0.1
"""Width, in logarithms, of the averages over neighbours by which the best run is chosen."""
_FALL = 0.01
"""Loss of log likelihood per datum that counts at most in them."""
_BLOCKS = 20
"""Stretches of the series whose scores tell how sure a difference is."""


class FilterTraining(eqx.Module):
    """How inflation and radius of a filter are learned.

    Args:
        steps: runs of the filter over the data, at most.
        repeats: ensembles, each with random numbers of its own, whose likelihoods are averaged.
        skip: steps at the start that do not count, where the ensemble still finds the truth; at most half of them.
        tolerance: the search ends when its points differ by less, in logarithms of the options and in the log
            likelihood of a hundred data.

    The likelihood has small waves, from the chaos of filter and model: the best run is the one whose neighbours in the
    search did well too, not the luckiest. Of the runs that are within one standard error of it, the one with the most
    inflation per radius is taken: a little too much costs little, too little loses the truth once in some thousand
    cycles, which a series of training may not show (one-standard-error rule: Breiman et al. 1984, section 3.4.3).

    Example:
        >>> import pushforward as pf
        >>> pf.FilterTraining(steps=20).repeats
        2
    """

    steps: int = 40
    repeats: int = 2
    skip: int = 100
    tolerance: float = 0.1

    def __check_init__(self):
        check_integer("FilterTraining", 1, steps=self.steps, repeats=self.repeats)
        check_integer("FilterTraining", 0, skip=self.skip)
        check_positive("FilterTraining", tolerance=self.tolerance)


class _Option(NamedTuple):
    """A number of a method: where it is, and how it follows from an unbounded coordinate."""

    where: Callable[[Any], Any]
    inward: Callable[[Any], Any]
    outward: Callable[[float], float]


def _log(where: Callable[[Any], Any]) -> _Option:
    return _Option(where, jnp.exp, math.log)


def _above_one(where: Callable[[Any], Any]) -> _Option:
    return _Option(where, lambda u: 1 + jnp.exp(u), lambda v: math.log(max(v - 1, _LEAST)))


def _fraction(where: Callable[[Any], Any]) -> _Option:
    return _Option(where, jax.nn.sigmoid, lambda v: math.log(v / (1 - v)) if 0 < v < 1 else math.copysign(2.0, v - 0.5))


_INFLATIONS: dict[type, _Option] = {
    Multiplicative: _above_one(lambda m: m.inflation.factor),
    Additive: _log(lambda m: m.inflation.sd),
    RTPS: _fraction(lambda m: m.inflation.relaxation),
    RTPP: _fraction(lambda m: m.inflation.relaxation),
}
_RADIUS = _log(lambda m: m.analysis.radius)


def options(method: "EnKF", learn: tuple[str, ...]) -> list[_Option]:
    """The numbers that are to be learned.

    Raises:
        MethodError: names other than `PARTS`, or a method without such a number.
    """
    if isinstance(learn, str) or not learn or any(name not in PARTS for name in learn) or len({*learn}) < len(learn):
        raise MethodError(f"EnKF.fit(learn=...) takes a tuple of names out of {list(PARTS)}; got {learn!r}.")
    found = []
    for name in learn:
        if name == "radius":
            if not isinstance(method.analysis, LETKF):
                raise MethodError(
                    f"EnKF.fit learns the radius of pf.LETKF(), and analysis={method.analysis!r} has none. Write "
                    "analysis=pf.LETKF(radius=4.0), or learn=('inflation',)."
                )
            found.append(_RADIUS)
        elif type(method.inflation) in _INFLATIONS:
            found.append(_INFLATIONS[type(method.inflation)])
        else:
            raise MethodError(
                f"EnKF.fit learns the number of an inflation, and inflation={method.inflation!r} has none to learn. "
                "Write inflation=pf.Multiplicative(1.05), or learn=('radius',)."
            )
    return found


def with_values(method: "EnKF", parts: list[_Option], point: Any) -> "EnKF":
    """The method with its numbers at a point of the search."""
    values = [part.inward(u) for part, u in zip(parts, point, strict=True)]
    values = [float(v) if isinstance(u, float) else v for u, v in zip(point, values, strict=True)]
    return eqx.tree_at(lambda m: [part.where(m) for part in parts], method, values)


class _Score(NamedTuple):
    """Log likelihood per datum after the skipped steps, and the time step at which it was not finite, or -1.

    Of each of `_BLOCKS` stretches of time, as shares (blocks,) whose sum is the mean over all data.
    """

    shares: Array
    failed_at: Array

    @property
    def value(self) -> Array:
        """The mean over all data."""
        return jnp.sum(self.shares)


def score(space: StateSpace, parts: Filter, key: Key, skip: int) -> _Score:
    """How well the forecasts of a filter predict the data.

    The mean over data of log N(y_t; mean of the predicted data, their sample covariance + R). With fewer members than
    data it tends to the squared innovations in units of the noise, so that it cannot be raised by a spread, or by
    spurious correlations, that do not help the forecast.
    """
    chain = space.chain()
    first, second = jax.random.split(key)
    start, _, _ = parts.start(chain, first)
    columns = _ensemble_filter.layout(chain, False)

    def move(before: Ensemble, t: Array) -> tuple[Ensemble, tuple[Array, Array]]:
        after, cycle = parts.cycle(chain, columns, before, t, jax.random.fold_in(second, t))
        assert cycle.seen is not None
        return after, (cycle.seen.log_likelihood, cycle.seen.whitened.count)

    _, (found, count) = jax.lax.scan(move, start, jnp.arange(space.steps))
    bad = ~jnp.isfinite(found)
    skip = min(skip, space.steps // 2)
    block = jnp.arange(space.steps - skip) * _BLOCKS // (space.steps - skip)
    sums = jax.ops.segment_sum(found[skip:], block, _BLOCKS)
    step = jnp.where(jnp.any(bad), jnp.argmax(bad), -1)
    return _Score(jnp.where(step < 0, sums / jnp.maximum(jnp.sum(count[skip:]), 1.0), -jnp.inf), step)


def _mean_score(
    point: Array, method: "EnKF", learn: tuple[str, ...], space: StateSpace, key: Key, repeats: int, skip: int
) -> _Score:
    parts = with_values(method, options(method, learn), list(point)).filter
    found = jax.lax.map(lambda k: score(space, parts, k, skip), jax.random.split(key, repeats))
    return _Score(jnp.mean(found.shares, 0), jnp.max(found.failed_at))


def fit(
    method: "EnKF", learn: tuple[str, ...], training: FilterTraining, space: StateSpace, key: Key, runner: Runner
) -> "EnKF":
    """The method at the best values that a simplex search finds (Nelder and Mead 1965).

    The likelihood has a cliff where the filter loses the truth, and small waves from its chaos, on which derivatives
    mean nothing; two numbers need few runs without them. Random numbers are the same in all runs.

    Raises:
        MethodError: the filter diverges at the values that it starts from; the text names the time step.
    """
    from scipy import optimize

    parts = options(method, learn)
    trials = _Trials(np.full((1 + _BLOCKS, training.steps), np.nan))
    known, state = runner.resume(jnp.asarray(trials.found))
    trials.found[:] = np.asarray(state)

    def loss(point: np.ndarray) -> float:
        number = len(trials.points)
        if number >= training.steps:
            return math.inf
        trials.points.append(np.array(point))
        if number >= known:
            given = (method, learn, space, key, training.repeats, training.skip)
            found = runner.call(_mean_score, jnp.asarray(point), *given)
            trials.found[:, number] = int(found.failed_at), *np.asarray(found.shares)
            runner.save(number + 1, jnp.asarray(trials.found))
        bar.update(1)
        step, value = trials.found[0, number], trials.found[1:, number].sum()
        if number == 0 and step >= 0:
            raise MethodError(
                f"the filter with the values before training diverged at time step {int(step)}. Start from more "
                "members, more inflation or a smaller radius, or look at the step of the model there."
            )
        return math.inf if step >= 0 else -100 * value

    start = np.array([part.outward(float(part.where(method))) for part in parts])
    simplex = start + _SPREAD * np.concatenate([np.zeros((1, len(parts))), np.eye(len(parts))])
    settings = {"maxfev": training.steps, "initial_simplex": simplex}
    settings |= {"xatol": training.tolerance, "fatol": training.tolerance}
    with progress_bar(runner.progress, "EnKF.fit", 0, training.steps) as bar:
        optimize.minimize(loss, start, method="Nelder-Mead", options=settings)
    _warn(trials)
    return with_values(method, parts, [float(v) for v in trials.best(learn)])


def fit_model(
    method: "EnKF",
    learn: tuple[str, ...],
    training: FilterTraining,
    called: tuple[Any, tuple, dict[str, Any]],
    observed: tuple[str, ...] | None,
    key: Any,
    checkpoint: Any,
    progress: bool,
) -> "EnKF":
    """`fit` of a model with its arguments; see `EnKF.fit`."""
    options(method, learn)
    if not isinstance(training, FilterTraining):
        raise MethodError(f"EnKF.fit(training=...) takes pf.FilterTraining(steps=40); got {training!r}.")
    model, args, kwargs = called
    check_model(model, args, kwargs)
    problem = read_problem(model, args, kwargs, observed)
    if not problem.observed_values():
        raise DataError("EnKF.fit learns from data: pass them among the model's arguments.")
    check_data(problem)
    space = read_state_space(problem)
    if space.parameters and not method.augment:
        raise MethodError(
            f"EnKF.fit learns at known parameters, and {list(space.parameters)} are free. Fix them with "
            "numpyro.handlers.substitute, or carry them along with augment=True."
        )
    space = space.augmented() if method.augment else space
    reason = method.why_not(space)
    if reason:
        raise MethodError(f"EnKF does not fit this model: {reason}.")
    typed = jax.random.key(key) if isinstance(key, int) else key
    path = None if checkpoint is None else Path(checkpoint)
    runner = Runner(progress=progress, checkpoint=path, identity="", label="EnKF")
    if path is not None:
        given = {n: v for n, v in bound(model, args, kwargs).items() if v is not None}
        keyed = jax.random.key_data(typed).tolist()
        text = (content(method), content(training), learn, content(given), keyed, problem.structure.arguments.static)
        runner.identity = hashlib.blake2b(stable_text(text).encode(), digest_size=16).hexdigest()
    return fit(method, learn, training, space, typed, runner)


class _Trials:
    """Points that were tried, and of each the time step at which the filter failed, and its score by blocks."""

    def __init__(self, found: np.ndarray):
        self.points: list[np.ndarray] = []
        self.found = found

    def best(self, learn: tuple[str, ...]) -> np.ndarray:
        """The safest of the points that are within one standard error of the best; failures are left out.

        Scores are means over neighbours, each weighted by how near it is. The safest has the most inflation per radius.
        """
        points = np.array(self.points)
        shares = self.found[1:, : len(points)].T
        good = np.isfinite(shares.sum(1))
        points, shares = points[good], shares[good]
        # One that lost the truth tells neighbours to keep away, however far it fell.
        fallen = np.maximum(np.max(shares.sum(1)) - _FALL - shares.sum(1), 0.0)
        shares = shares + fallen[:, None] / _BLOCKS
        weights = np.exp(-0.5 * np.sum((points[:, None] - points[None]) ** 2, -1) / _NEAR**2)
        means = weights @ shares / weights.sum(1, keepdims=True)
        behind = means[np.argmax(means.sum(1))] - means
        error = np.std(behind, axis=1, ddof=1) * _BLOCKS**0.5
        near = points[behind.sum(1) <= error]
        signs = [1 if name == "inflation" else -1 for name in learn]
        return near[int(np.argmax(near @ signs))]


def _warn(trials: _Trials) -> None:
    """Tell of trials in which the filter diverged."""
    steps = trials.found[0, : len(trials.points)]
    failed = np.flatnonzero(steps >= 0)
    if failed.size:
        warnings.warn(
            f"in {failed.size} of {len(steps)} runs of the training the filter diverged, last in run {failed[-1]} at "
            f"time step {int(steps[failed[-1]])}; the best values of the other runs are kept.",
            UserWarning,
            stacklevel=4,
        )
