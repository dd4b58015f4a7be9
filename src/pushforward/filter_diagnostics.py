"""How well a filter predicted: ranks, CRPS and energy score of its data, and its spread beside its error."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pushforward._errors import DataError

LIMIT = 10_000_000
"""Draws of predicted data up to which `infer` scores them."""
_PAIRS = 200_000_000
_BLOCK = 4_000_000
_FEWEST, _MOST = 20, 200


def predictive_scores(draws: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores of one-step predictions, for each step and observed site.

    CRPS and energy score are the fair estimates of Ferro (2014), which do not depend on the number of draws on average;
    smaller is better, both are in units of the data. The energy score takes at most 200 of the draws, fewer for long
    series of many data, and is left out below 20. Ranks of data that equal draws, as counts do, are drawn at random
    among them, always in the same way.

    Args:
        draws: draws of y_t given y_1..t-1 by site, shape (draw, time, ...).
        data: the data by site, shape (time, ...), NaN where missing.

    Returns:
        By site: ``rank_<site>``, how many draws lie below each datum, of the data's shape; ``crps_<site>`` (time,), the
        mean over the step's data; ``energy_<site>`` (time,), of all the step's data together, where there are several.
        NaN where data are missing.

    Reference:
        Gneiting and Raftery (2007), J. Am. Stat. Assoc. 102, eqs. 21 and 22; Ferro (2014), Q. J. R. Meteorol. Soc. 140,
        eq. 7; Hamill (2001), Mon. Weather Rev. 129, on ranks.
    """
    found: dict[str, np.ndarray] = {}
    for name, drawn in draws.items():
        values, drawn = np.asarray(data[name], float), np.asarray(drawn, float)
        if drawn.shape[1:] != values.shape:
            raise DataError(
                f"the predictions of '{name}' have shape {drawn.shape[1:]} and its data {values.shape}; "
                "expected one shape."
            )
        found[f"rank_{name}"] = ranks(drawn, values)
        if len(drawn) < 2:
            continue
        found[f"crps_{name}"] = _crps(drawn, values)
        flat, columns = drawn.reshape(*drawn.shape[:2], -1), values.reshape(len(values), -1)
        used = _energy_draws(flat.shape)
        if columns.shape[1] > 1 and used >= _FEWEST:
            rows = np.arange(used) * len(flat) // used
            found[f"energy_{name}"] = _energy(flat[rows], columns)
    return found


def ranks(draws: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How many draws (draw, ...) lie below each value (...); 0 to the number of draws, NaN where a value is missing."""
    below, equal = np.sum(draws < values, axis=0), np.sum(draws == values, axis=0)
    found = below + np.random.default_rng(0).integers(0, equal + 1)
    return np.where(np.isnan(values), np.nan, found)


def _crps(draws: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Fair CRPS, mean over each step's data; the estimator by probability weighted moments is the fair one, sorted."""
    import scoringrules

    scores = scoringrules.crps_ensemble(values, np.moveaxis(draws, 0, -1), estimator="pwm", backend="numpy")
    scores = np.asarray(scores).reshape(len(values), -1)
    count = np.sum(~np.isnan(scores), axis=1)
    return np.where(count > 0, np.nansum(scores, axis=1) / np.maximum(count, 1), np.nan)


def _energy_draws(shape: tuple[int, ...]) -> int:
    draws, time, entries = shape
    return min(draws, _MOST, int(np.sqrt(_PAIRS / max(time * entries, 1))))


def _energy(draws: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Fair energy score of each step's data (time, m); coordinates whose data are missing are set to zero."""
    import scoringrules

    present = ~np.isnan(values)
    drawn = np.moveaxis(np.where(present, draws, 0.0), 0, 1)
    target = np.where(present, values, 0.0)
    size = max(1, _BLOCK // (draws.shape[0] ** 2 * draws.shape[2]))
    blocks = [slice(start, start + size) for start in range(0, len(values), size)]
    scores = [scoringrules.es_ensemble(target[b], drawn[b], estimator="fair", backend="numpy") for b in blocks]
    return np.where(present.any(1), np.concatenate([np.asarray(s) for s in scores]), np.nan)


def with_scores(groups: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Groups of a result whose `filter_stats` also hold the scores of the one-step predictions, where these are stored.

    Args:
        groups: datasets by name.
        notes: to which a text is added where there are too many draws to score.
    """
    needed = ("filter_stats", "one_step", "observed_data")
    sites = _scored(groups) if all(name in groups for name in needed) else []
    if not sites:
        return dict(groups)
    size = sum(groups["one_step"][name].size for name in sites)
    if size > LIMIT:
        notes.append(
            f"the one-step predictions hold {size} draws of data, so that their ranks, CRPS and energy score were left "
            "out of 'filter_stats'; pf.plot_diagnostics(tree, sites=[...]) computes them."
        )
        return dict(groups)
    stats, observed = groups["filter_stats"], groups["observed_data"]
    for name in sites:
        axes = list(observed[name].dims[1:])
        stats = stats.assign_coords({d: observed[d] for d in axes if d in observed.coords})
        for score, value in _computed(groups, [name]).items():
            stats[score] = (("time", *axes)[: value.ndim], value)
    return {**groups, "filter_stats": stats}


def scores(tree: Any, sites: list[str] | None = None) -> dict[str, np.ndarray]:
    """Scores of a result by name, as `predictive_scores` has them: stored ones, and the others computed."""
    stats = tree["filter_stats"] if "filter_stats" in tree.children else {}
    found: dict[str, np.ndarray] = {}
    for name in predicted_sites(tree) if sites is None else sites:
        stored = [f"{kind}_{name}" for kind in ("rank", "crps", "energy") if f"{kind}_{name}" in stats]
        found |= {n: stats[n].to_numpy() for n in stored} if stored else _computed(tree, [name])
    return found


def predicted_sites(tree: Any) -> list[str]:
    """Observed sites of which a result has draws of one-step predictions."""
    return _scored(tree) if {"one_step", "observed_data"} <= set(tree.children) else []


def _scored(groups: Any) -> list[str]:
    one_step, observed = groups["one_step"], groups["observed_data"]
    return [n for n in observed.data_vars if n in one_step.data_vars and "draw" in one_step[n].dims]


def _computed(groups: Any, sites: list[str]) -> dict[str, np.ndarray]:
    draws = {name: flat_draws(groups["one_step"][name]) for name in sites}
    return predictive_scores(draws, {name: groups["observed_data"][name].to_numpy() for name in sites})


def flat_draws(values: Any) -> np.ndarray:
    """Draws of a variable, shape (draw, time, ...), chains one after another."""
    array = values.transpose("chain", "draw", ...).to_numpy()
    return array.reshape(-1, *array.shape[2:])


class Skill(NamedTuple):
    """Per step, mean squares over the components: error of the mean, and the spread that ought to equal it."""

    error: np.ndarray
    spread: np.ndarray


def spread_and_skill(group: Any, name: str, truth: np.ndarray) -> Skill:
    """Squared error of a filter's mean, and its variance times (1 + 1 / draws), both averaged over the components.

    The factor counts the error of a mean of few draws (Fortin et al. 2014, J. Hydrometeorol. 15, eq. 15); over
    many steps the two are equal for a calibrated filter.

    Args:
        group: the dataset `filtering`, with draws or with moments.
        name: a variable in it.
        truth: true values (time, ...).
    """
    if "draw" in group[name].dims:
        draws = flat_draws(group[name]).astype(float)
        mean = draws.mean(0)
        variance = draws.var(0, ddof=1) * (1 + 1 / len(draws)) if len(draws) > 1 else np.zeros_like(mean)
    else:
        mean, variance = group[name].to_numpy(), group[f"{name}_sd"].to_numpy() ** 2
    parts = ((mean - truth) ** 2, variance)
    return Skill(*(part.reshape(len(part), -1).mean(1) for part in parts))
