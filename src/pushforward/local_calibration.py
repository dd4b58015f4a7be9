"""`local_check`: whether the posterior is right at the data at hand."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushforward import posterior
from pushforward._errors import ArgumentError, DataError
from pushforward._infer import _typed_key, infer
from pushforward._repetitions import (
    Posterior,
    Record,
    Simulated,
    columns,
    parameter_names,
    posteriors,
    prepare,
    simulate,
)
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.math import classifier, ranks

SMALLEST_STUDY = 50
_PERMUTATIONS = 99
_DRAWS = 100
_TRAINING = {"width": 32, "steps": 150, "batch": 128, "learning_rate": 3e-3, "weight_decay": 0.15}
_FARTHEST = 8.0


def local_check(
    method: Any,
    model: Model,
    *args: Any,
    n: int = 500,
    draws: int = 1000,
    states: Any = None,
    observed: tuple[str, ...] | str | None = None,
    parameters: Sequence[str] | str | None = None,
    level: float = 0.05,
    key: int | Key = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """Local classifier two-sample test of a method at the data that are given.

    Pairs (theta, y) are drawn n times from the model, and for each y one draw theta' of the method's posterior. A
    classifier d(theta, y) learns to tell the two kinds of pairs apart; where the method is right nobody can. How well
    it does *at the observed data* is the statistic

        t = mean_j (d(theta_j, y_observed) - 1/2)^2,    theta_j the method's draws given y_observed.

    Its law under an exact method is that of classifiers trained with theta and theta' exchanged in a random half of
    the pairs, 99 times, so that the p-value ``(1 + number of t_permuted >= t) / 100`` is exact: whatever the
    classifier, an exact method is rejected with a probability of at most `level`. An inexact one may pass: what the
    classifier cannot learn from n pairs is not found.

    `calibrate` tells whether a method is right on average over the prior; this, whether it is near these data.

    Args:
        method: an instance or a name, as in `infer`; trained, if it learns.
        model: a NumPyro model.
        *args: its positional arguments.
        n: number of pairs, at least 50. The cost is n runs of the method with 100 draws, and 100
            small classifiers.
        draws: draws per chain at the observed data.
        states: a state method, as in `infer`.
        observed: names of the sites that must be data, as in `infer`.
        parameters: sites to look at; None takes all latent sites.
        level: probability to reject an exact method, at least 0.01.
        key: an integer or a typed JAX key.
        progress: whether to show a progress bar.
        **kwargs: the model's named arguments, its data among them.

    Returns:
        An `xarray.DataTree` with the group ``posterior`` (draws at the observed data, with `probability`, what the
        classifier says of each), the group ``null`` (`statistic` of each permutation) and the attributes `calibrated`,
        `p_value`, `statistic`, `level`, `datasets`, `failed`, `failures`, `warnings`.

    Raises:
        ArgumentError: a wrong option, or a parameter that the model does not have.
        DataError: the data are not given.
        ModelError: the model does not simulate what its density says.
        InferenceError: more than a tenth of the simulated data sets, or the observed one, had no usable posterior.

    Reference:
        Linhart, Gramfort and Rodrigues (2023), L-C2ST: local diagnostics for posterior approximations in
        simulation-based inference, NeurIPS, arXiv 2306.03580, algorithm 1; with labels permuted within pairs.

    Example:
        >>> import numpyro, numpyro.distributions as dist, pushforward as pf
        >>> def model(y=None):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 2))
        ...     numpyro.sample("y", dist.Normal(mean, 1).expand([3]), obs=y)
        >>> import numpy as np
        >>> tree = pf.local_check("gaussian_vi", model, y=np.array([0.3, 1.0, 0.8]), n=100, progress=False)
        >>> pf.attributes(tree)["calibrated"]
        True
    """
    _check_options(n, level, progress)
    key, label = _typed_key(key)
    study = prepare(local_check, method, model, args, kwargs, states, draws, observed)
    given = _given(study.problem)
    names = parameter_names(study, parameters)
    keys = jax.random.split(key, 5)
    tree = infer(
        model, *args, method=method, states=states, observed=study.observed, key=keys[0], draws=draws,
        progress=False, **kwargs,
    )  # fmt: skip
    simulated = simulate(study, keys[1], n, Runner())
    record = Record("local_check", n, progress=progress)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(keys[2])).tolist())
    pairs = _Pairs(simulated, names, rng)
    runs = posteriors(study._replace(draws=_DRAWS), simulated, names, keys[3], range(n), likelihood=False)
    for run in record.usable(runs):
        pairs.add(run)
    here = columns({name: _values(tree, name) for name in names}, 2)
    items, features, notes = _features(simulated, pairs, here, given)
    swapped = rng.integers(0, 2, (_PERMUTATIONS + 1, len(pairs.datasets)))
    swapped[0] = 0
    arrays = [jnp.asarray(v, jnp.float32) for v in (features, swapped, items)]
    found = Runner().call(_statistics, *arrays, jax.random.split(keys[4], len(swapped)))
    statistics, probability = map(np.asarray, found)
    p_value = float(np.mean(statistics >= statistics[0]))
    groups = _groups(tree, names, probability.reshape(here.shape[:2]), statistics[1:])
    attributes = {
        "calibrated": bool(p_value > level),
        "p_value": p_value,
        "statistic": float(statistics[0]),
        "level": float(level),
        "datasets": len(pairs.datasets),
        "key": label,
        "warnings": record.warnings + notes,
    }
    result = posterior.tree(groups, attributes | record.failed_attributes() | record.run_attributes())
    record.warn()
    return result


def _check_options(n: Any, level: Any, progress: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < SMALLEST_STUDY:
        raise ArgumentError(f"n= takes the number of pairs, an integer of at least {SMALLEST_STUDY}; got {n!r}.")
    least = 1 / (_PERMUTATIONS + 1)
    if isinstance(level, bool) or not isinstance(level, int | float) or not least <= level < 1:
        raise ArgumentError(
            f"level= takes a probability of at least {least}, the least p-value of {_PERMUTATIONS} permutations; got "
            f"{level!r}."
        )
    if not isinstance(progress, bool):
        raise ArgumentError(f"progress= takes True or False; got {progress!r}.")


def _given(problem: Any) -> dict[str, np.ndarray]:
    found = {n: np.asarray(v) for n, v in problem.observed_values().items()}
    absent = [n for n in problem.structure.data if n not in found]
    if absent:
        raise DataError(
            f"local_check looks at the data at hand, and no argument of the model observes '{absent[0]}'. Pass its "
            "values to the model; pf.calibrate needs none."
        )
    return found


def _values(tree: Any, name: str) -> np.ndarray:
    return tree["posterior"][name].transpose("chain", "draw", ...).to_numpy()


class _Pairs:
    """True parameters and a draw for each data set, both relative to other draws of that posterior."""

    def __init__(self, simulated: Simulated, names: tuple[str, ...], rng: np.random.Generator):
        self.truth = columns({name: simulated.truth[name] for name in names}, 1)
        self.rng, self.unit = rng, ranks.spread(self.truth[np.isfinite(self.truth).all(1)])
        self.datasets: list[int] = []
        self.rows: list[np.ndarray] = []

    def add(self, run: Posterior) -> None:
        """Pick the last draw of a chain; the first half of all chains says where the posterior is and how wide."""
        drawn = columns(run.draws, 2)
        others = drawn[:, : drawn.shape[1] // 2]
        picked = drawn[self.rng.integers(len(drawn)), -1]
        self.datasets.append(run.index)
        self.rows.append(self.relative(np.stack([self.truth[run.index], picked]), others))

    def relative(self, values: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """(values - mean) / sd of draws of shape (chain, draw, parameters), within 8."""
        flat = draws.reshape(-1, draws.shape[-1])
        width = np.std(flat, 0)
        return np.clip((values - flat.mean(0)) / np.where(width > 0, width, self.unit), -_FARTHEST, _FARTHEST)


def _features(
    simulated: Simulated, pairs: _Pairs, here: np.ndarray, given: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """What the classifier sees: relative parameters, and data centred and scaled by quartiles, missing ones left out.

    Returns:
        Items at the observed data, shape (all draws, features); pairs, shape (2, n, features), the model's first; and
        what to warn of.
    """
    sites = sorted(given)
    data = columns({name: simulated.data[name][pairs.datasets] for name in sites}, 1)
    at = columns({name: given[name][None] for name in sites}, 1)
    present = ~np.isnan(at[0])
    data, at = data[:, present], at[:, present]
    outside = int(np.sum((at < data.min(0)) | (at > data.max(0))))
    notes = [
        f"{outside} of {at.size} data lie outside all {len(data)} simulated ones: the classifier extrapolates, and the "
        "model itself may be wrong."
    ] * (outside > 0)
    centre, width = np.median(data, 0), ranks.spread(data)
    seen, now = (np.clip((v - centre) / width, -_FARTHEST, _FARTHEST) for v in (data, at))
    theta = np.asarray(pairs.rows).swapaxes(0, 1)
    flat = pairs.relative(here.reshape(-1, here.shape[-1]), here)
    items = np.concatenate([flat, np.repeat(now, len(flat), 0)], 1)
    return items, np.stack([np.concatenate([t, seen], 1) for t in theta]), notes


def _statistics(pairs: Array, swapped: Array, items: Array, keys: Key) -> tuple[Array, Array]:
    """The statistic of each permutation, and what the first classifier says of each item.

    Args:
        pairs: shape (2, n, features).
        swapped: 1 where the two of a pair are exchanged, shape (permutation, n).
        items: draws with the observed data, shape (draws, features).
        keys: one for each permutation.
    """
    flat = pairs.reshape(-1, pairs.shape[-1])

    def probabilities(swap: Array, key: Key) -> Array:
        layers = classifier.train(key, flat, jnp.concatenate([swap, 1 - swap]), **_TRAINING)  # type: ignore[arg-type]
        return jax.nn.sigmoid(jax.vmap(classifier.logit, in_axes=(None, 0))(layers, items))

    found = jax.vmap(probabilities)(swapped, keys)
    return jnp.mean((found - 0.5) ** 2, axis=1), found[0]


def _groups(tree: Any, names: tuple[str, ...], probability: np.ndarray, null: np.ndarray) -> dict[str, Any]:
    import xarray as xr

    drawn = tree["posterior"].to_dataset()[list(names)]
    return {
        "posterior": drawn.assign(probability=(("chain", "draw"), probability)),
        "null": xr.Dataset({"statistic": ("permutation", null)}, {"permutation": np.arange(len(null))}),
    }
