"""Training data of `ScoreTrajectory`, and the fit: simulated, given, or read from an archive chunk by chunk."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import DataError, MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned import score_training
from pushforward.learned.score_model import ScoreModel, ScoreShape, covariance, errors, scales
from pushforward.learned.score_networks import ScoreNetwork, WindowMLP, check_network
from pushforward.learned.score_training import Chunks, ScoreTraining
from pushforward.learned.score_transformer import TrajectoryTransformer
from pushforward.learned.score_unets import FieldUNet, TemporalUNet
from pushforward.model.inverse import InverseProblem
from pushforward.model.series import Series

NETWORKS = {"mlp": WindowMLP, "unet": TemporalUNet, "field": FieldUNet, "transformer": TrajectoryTransformer}
_BATCH = 256
_FAILED = 0.1
_ERRORS = 2048
"""Windows at which the errors of the network are measured."""
_COVARIANCE = 2**22
"""Numbers of trajectories from which covariances are computed."""


class Simulated(eqx.Module):
    """Trajectories simulated anew at each call; see `ScoreTraining`."""

    series: Series
    conditions: tuple[str, ...] = eqx.field(static=True)
    size: int = eqx.field(static=True)
    scaling: tuple[Array, Array, Array, Array]

    def __call__(self, key: Key) -> tuple[Array, Array]:
        location, spread, given_location, given_spread = self.scaling
        trajectories, given = simulate(self.series, self.conditions, self.size, key)
        clean = (trajectories - location) / spread
        # A simulation that failed is shown as the mean of all.
        axes = tuple(range(1, clean.ndim))
        finite = jnp.all(jnp.isfinite(clean), axes, keepdims=True)
        return jnp.where(finite, clean, 0.0), (given - given_location) / given_spread


def simulate(series: Series, conditions: tuple[str, ...], size: int, key: Key) -> tuple[Array, Array]:
    """Trajectories (size, rows, *state) from the model, with the parameters that are conditions (size, p)."""
    problem, batch = series.problem, min(size, _BATCH)

    def some(k: Key) -> tuple[Array, Array]:
        sites, _, _ = problem.simulate(k, batch)
        given = [sites[n].reshape(batch, -1) for n in conditions]
        return jax.vmap(series.trajectory)(sites), jnp.concatenate([jnp.zeros((batch, 0)), *given], 1)

    made = jax.lax.map(some, jax.random.split(key, -(-size // batch)))
    rows = made[0].shape[0] * batch
    return jax.tree.map(lambda v: v.reshape(rows, *v.shape[2:])[:size], made)


def fit(
    series: Series,
    network: Any,
    window: int,
    options: ScoreTraining,
    simulations: int,
    given: Any,
    conditions: tuple[str, ...],
    key: Key,
    runner: Runner,
) -> tuple[ScoreModel, np.ndarray]:
    """A prior of trajectories, and its losses.

    Args:
        series: the model.
        network: a `ScoreNetwork` or a module of the user's.
        window: states of a window, 0 for whole trajectories.
        options: of the training.
        simulations: number of trajectories where they are simulated.
        given: trajectories, an iterable of such, or None.
        conditions: names of parameters that the network is given.
        key: typed JAX key.
        runner: compiles, shows and checkpoints.
    """
    data_key, fit_key = jax.random.split(key)
    chunks = None
    if given is None:
        data = _kept(*runner.call(simulate, series, conditions, simulations, data_key))
    else:
        if conditions:
            raise MethodError(
                "fit(trajectories=..., conditions=...) do not go together: trajectories do not say at which parameters "
                "they were made. Leave trajectories= out, and the model is simulated."
            )
        single = isinstance(given, Mapping) or hasattr(given, "shape")
        if not single:
            chunks = given
            given = _first(given)
        data = _checked(series, given)
    trajectories, parameters = data
    length = window or trajectories.shape[1]
    shape = _shape(network, (length, *series.layout.state), parameters.shape[1], bool(window), trajectories.shape[1])
    location, spread = runner.call(scales, trajectories)
    about = jnp.mean(parameters, 0), jnp.std(parameters, 0)
    scaling = (location, spread, about[0], jnp.where(about[1] > 0, about[1], 1.0))
    clean = (trajectories - location) / spread
    parameters = (parameters - scaling[2]) / scaling[3]
    held = max(1, min(round(options.held_out * len(clean)), len(clean) - 1))
    train: Any = (clean[held:], parameters[held:])
    if chunks is not None:
        train = Chunks(chunks, lambda chunk: _scaled(series, chunk, location, spread))
    elif given is None and options.source == "stream":
        train = Simulated(series, conditions, simulations, scaling)
    few = max(2, _COVARIANCE // clean[0].size)
    known = runner.call(covariance, clean[:few], bool(window))
    found = score_training.fit(shape, options, train, (clean[:held], parameters[:held]), fit_key, runner)
    if not np.isfinite(np.asarray(found.lowest)):
        raise MethodError(
            "ScoreTrajectory: the held-out loss was never finite. Lower ScoreTraining(learning_rate=...), or look at "
            "the trajectories for extreme values."
        )
    source = train[0] if isinstance(train, tuple) else clean
    windows, about = runner.call(_windows, source, _given(train, parameters), length, jax.random.fold_in(fit_key, 2))
    missed = runner.call(errors, shape, found.best, windows, about, jax.random.fold_in(fit_key, 3))
    return ScoreModel(shape, found.best, *scaling, known, missed), score_training.losses(found)


def _given(train: Any, parameters: Array) -> Array:
    return train[1] if isinstance(train, tuple) else parameters


def _windows(trajectories: Array, given: Array, length: int, key: Key) -> tuple[Array, Array]:
    """Random windows, and the parameters of their trajectories."""
    row_key, start_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (_ERRORS,), 0, trajectories.shape[0])
    starts = jax.random.randint(start_key, (_ERRORS,), 0, trajectories.shape[1] - length + 1)
    return trajectories[rows[:, None], starts[:, None] + jnp.arange(length)], given[rows]


def _shape(network: Any, shape: tuple[int, ...], parameters: int, windowed: bool, rows: int) -> ScoreShape:
    """What is trained, once it is known to fit."""
    if shape[0] > rows:
        raise DataError(
            f"window={shape[0]} is longer than the trajectories, which have {rows} states. Give a shorter window, or "
            "longer trajectories."
        )
    if isinstance(network, ScoreNetwork):
        reason = network.why_not(shape)
        if reason:
            raise MethodError(f"ScoreTrajectory(network={type(network).__name__}) does not fit: {reason}.")
    else:
        check_network(network, shape, parameters)
    return ScoreShape(network, shape, parameters, windowed)


def _kept(trajectories: Array, parameters: Array) -> tuple[Array, Array]:
    """The simulations that did not fail."""
    bad = ~np.isfinite(np.asarray(trajectories).reshape(len(trajectories), -1)).all(1)
    if bad.mean() > _FAILED:
        raise DataError(
            f"{bad.mean():.0%} of {len(bad)} simulated trajectories are not finite (NaN or infinite), above "
            f"{_FAILED:.0%}. Narrow the priors to where the model works, or shorten its steps."
        )
    return (trajectories, parameters) if not bad.any() else (trajectories[~bad], parameters[~bad])


def _scaled(series: Series, chunk: Any, location: Array, spread: Array) -> tuple[Array, Array]:
    trajectories, parameters = _checked(series, chunk)
    return (trajectories - location) / spread, parameters


def _checked(series: Series, given: Any) -> tuple[Array, Array]:
    """Trajectories from outside, in unconstrained coordinates.

    Raises:
        DataError: of another shape, or not finite.
    """
    layout = series.layout
    if isinstance(given, Mapping):
        lacking = [n for n in layout.names if n not in given]
        if lacking:
            raise DataError(
                f"trajectories= lacks the site '{lacking[0]}'; it needs {list(layout.names)} and has {list(given)}."
            )
        parts = [np.asarray(given[n], float) for n in layout.names]
    elif len(layout.names) == 1:
        parts = [np.asarray(given, float)]
    else:
        raise DataError(
            f"trajectories= takes a dictionary of arrays by site name, {list(layout.names)}, since a step samples more "
            f"than one site; got {type(given).__name__}."
        )
    for name, array, shape in zip(layout.names, parts, layout.shapes, strict=True):
        if array.ndim != 2 + len(shape) or array.shape[2:] != shape or array.shape[:2] != parts[0].shape[:2]:
            raise DataError(
                f"trajectories of '{name}' have shape {array.shape}; expected (n, time, {', '.join(map(str, shape))}) "
                "with one n and one number of times for all sites."
            )
        bad = ~np.isfinite(array)
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"trajectories of '{name}' have {int(bad.sum())} values that are not finite, the first at {index}. "
                "Leave these trajectories out, or fill the gaps: a network learns from complete states."
            )
    if len(parts[0]) < 2:
        raise DataError("trajectories= has one trajectory; at least two are needed, one of which judges.")
    free = [np.asarray(layout.free(i, jnp.asarray(p))).reshape(*p.shape[:2], -1) for i, p in enumerate(parts)]
    joined = jnp.asarray(np.concatenate(free, -1)).reshape(*parts[0].shape[:2], *layout.state)
    return joined, jnp.zeros((len(joined), 0))


def _first(chunks: Any) -> Any:
    """The first chunk of an archive."""
    if isinstance(chunks, str | bytes) or not isinstance(chunks, Iterable):
        raise DataError(
            "trajectories= takes an array (n, time, *state), a dictionary of arrays by site name, or an iterable of "
            f"such; got {type(chunks).__name__}."
        )
    for chunk in chunks:
        return chunk
    raise DataError("trajectories= is an iterable without a chunk.")


def digest(given: Any) -> str:
    """What tells one archive from another: its arrays, or the first chunk."""
    if given is None:
        return ""
    first = given if isinstance(given, Mapping) or hasattr(given, "shape") else _first(given)
    arrays = list(first.values()) if isinstance(first, Mapping) else [first]
    made = hashlib.blake2b(digest_size=16)
    for array in arrays:
        made.update(np.ascontiguousarray(np.asarray(array, float)).tobytes())
    return made.hexdigest()


def with_missing_data(problem: InverseProblem) -> dict[str, np.ndarray]:
    """Data sites that no argument observes, all missing."""
    known = problem.observed_values()
    return {n: np.full(problem.sites[n].shape, np.nan) for n in sorted(problem.structure.data) if n not in known}
