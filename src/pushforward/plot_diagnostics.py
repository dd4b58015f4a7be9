"""`plot_diagnostics`: whether a filter's predictions and its spread agree with the data, and with the truth."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pushforward import filter_diagnostics, posterior
from pushforward._errors import ArgumentError, DataError
from pushforward.methods._particle_parts import RESAMPLINGS
from pushforward.plots import _axis

if TYPE_CHECKING:
    import matplotlib.figure

_COLORS = ("#2b6ca3", "#c8611a", "#5b8a3c", "#8b5aa0")
_INK, _GRAY, _MASS = "#1a1a1a", "0.55", 0.95
_STYLES = ("-", "--", "-.", ":")
_BINS, _MOST = 20, 4


class Time(NamedTuple):
    """The axis of time: positions, what sets the ticks, its name, and the steps of a running mean."""

    axis: np.ndarray
    ticks: Any
    name: str
    window: int


def plot_diagnostics(
    tree: Any,
    truth: Mapping[str, Any] | None = None,
    *,
    sites: str | Sequence[str] | None = None,
    figsize: tuple[float, float] | None = None,
) -> "matplotlib.figure.Figure":
    """Diagnostics of a filter in one figure, a panel for each that the result has the numbers for.

    - Effective sample size over time (particle filters), with the number of particles and where resampling starts.
    - Innovation chi-square per datum (Kalman and ensemble filters): 1 on average where the filter's means and
      covariances are right; above the band it trusts itself too much, below too little.
    - CRPS of the one-step predictions of the data, in units of the data; smaller is better.
    - Rank of each datum among its predictions, as a fraction of the draws: flat where predictions are calibrated,
      heaped at the ends where they are too narrow, in the middle where they are too wide.
    - With `truth`: error of the filtering mean beside the filter's spread, and the rank of the truth.

    Bands hold 95 % under a right filter, for each bin or window by itself. The band of ranks takes the data of one step
    as independent, and is too narrow where they are not. Ranks of the truth are correlated in time and have none.
    The numbers are in the group ``filter_stats`` of the result.

    Args:
        tree: a result of `infer` by a state method alone. Ranks and CRPS need ``store="draws"``.
        truth: true values of latent sites, shape (time, ...), by name: ``{"x": x}``.
        sites: observed sites whose predictions are shown, 4 at most; None shows the first 4.
        figsize: width and height in inches.

    Returns:
        The matplotlib figure; save it with ``.savefig(path)``.

    Raises:
        ArgumentError: no result of a filter, or an unknown site.
        DataError: truth of another shape.

    Example:
        >>> import numpy as np, xarray as xr, pushforward as pf
        >>> rng = np.random.default_rng(0)
        >>> stats = xr.Dataset({"ess": ("time", rng.uniform(200, 900, 50))}, {"time": np.arange(50)})
        >>> figure = pf.plot_diagnostics(xr.DataTree.from_dict({"filter_stats": stats}))
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['effective\\nsample size']
    """
    stats = _stats(tree)
    chosen = _sites(tree, sites)
    truths = _truths(tree, truth)
    found = filter_diagnostics.scores(tree, chosen)
    series, histograms = [], []
    if "ess" in stats:
        series.append(lambda panel, time: _ess(panel, time, stats["ess"].to_numpy(), posterior.attributes(tree)))
    if "innovation_chi_square" in stats:
        squares = (stats["innovation_chi_square"].to_numpy(), stats["innovation_count"].to_numpy())
        series.append(lambda panel, time: _chi_square(panel, time, *squares))
    crps = {n: found[f"crps_{n}"] for n in chosen if f"crps_{n}" in found}
    if crps:
        series.append(lambda panel, time: _crps(panel, time, crps))
    if truths:
        skills = {n: filter_diagnostics.spread_and_skill(tree["filtering"], n, v) for n, v in truths.items()}
        series.append(lambda panel, time: _skill(panel, time, skills))
    places = _places(found, tree["one_step"] if chosen else None, chosen)
    if places:
        histograms.append(lambda panel: _histogram(panel, places, "rank of data among\npredictions", band=True))
    ranked = _truth_places(tree, truths)
    if ranked:
        histograms.append(lambda panel: _histogram(panel, ranked, "rank of truth among\nfiltering draws", band=False))
    return _figure(series, histograms, _time(stats), figsize)


def _stats(tree: Any) -> Any:
    if not hasattr(tree, "children"):
        raise ArgumentError(
            f"plot_diagnostics takes a result of infer (an xarray.DataTree); got {type(tree).__name__}."
        )
    known = ("ess", "innovation_chi_square", "log_likelihood_increment")
    if "filter_stats" not in tree.children or not any(n in tree["filter_stats"] for n in known):
        raise ArgumentError(
            f"the result has no group 'filter_stats'; it has {list(tree.children)}. Run a state method by itself, as "
            "in infer(model, method=pf.Kalman(), ...) or pf.ParticleFilter(1000); with states= fix the parameters with "
            "numpyro.handlers.substitute."
        )
    return tree["filter_stats"]


def _sites(tree: Any, sites: str | Sequence[str] | None) -> list[str]:
    has = filter_diagnostics.predicted_sites(tree)
    if sites is None:
        return has[:_MOST]
    given = [sites] if isinstance(sites, str) else list(sites)
    unknown = [n for n in given if n not in has]
    if unknown:
        why = (
            "" if has else " Draws of predicted data are stored by Kalman, EnKF and ParticleFilter with store='draws'."
        )
        raise ArgumentError(f"sites= names {unknown[0]!r}; the result has predictions of the data {has}.{why}")
    if len(given) > _MOST:
        raise ArgumentError(f"sites= names {len(given)} sites; expected {_MOST} at most. Draw several figures.")
    return given


def _truths(tree: Any, truth: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    if truth is None:
        return {}
    if not isinstance(truth, Mapping):
        raise ArgumentError(f"truth= takes a dictionary such as {{'x': x}}; got {type(truth).__name__}.")
    if "filtering" not in tree.children:
        raise ArgumentError(
            "truth= is compared with the group 'filtering', which the result does not have. Use store='draws' or "
            "store='moments'."
        )
    group, found = tree["filtering"], {}
    names = [n for n in group.data_vars if "draw" in group[n].dims or f"{n}_sd" in group.data_vars]
    if len(truth) > _MOST:
        raise ArgumentError(f"truth= names {len(truth)} sites; expected {_MOST} at most. Draw several figures.")
    for name, given in truth.items():
        if name not in names:
            raise ArgumentError(f"truth= names {name!r}; 'filtering' has {names}.")
        shape = tuple(s for d, s in group[name].sizes.items() if d not in ("chain", "draw"))
        found[name] = np.asarray(given, float)
        if found[name].shape != shape:
            raise DataError(
                f"truth= of '{name}' has shape {found[name].shape}; expected {shape}, time first: the true values at "
                "the steps of the result, without the initial state."
            )
    return found


def _time(stats: Any) -> Time:
    axis, ticks = _axis(stats["time"].to_numpy())
    length = len(axis)
    return Time(axis, ticks, "time", max(1, min(length // 4, max(5, length // 20))))


def _running(values: np.ndarray, window: int) -> np.ndarray:
    """Sums over `window` steps around each, fewer at the ends; NaN counts as 0."""
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    steps = np.arange(len(values))
    first, last = np.maximum(steps - (window - 1) // 2, 0), np.minimum(steps + window // 2 + 1, len(values))
    return total[last] - total[first]


def _enough(count: np.ndarray) -> np.ndarray:
    """Counts of data in a window, NaN where it has less than half of what full ones have: a gap in the curves."""
    return np.where(2 * count >= max(np.max(count, initial=0), 1), count, np.nan)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    return _running(values, window) / _enough(_running(~np.isnan(values), window))


def _ess(panel: Any, time: Time, ess: np.ndarray, attributes: Mapping[str, Any]) -> None:
    panel.plot(time.axis, ess, color=_COLORS[0], linewidth=1.2, label="effective sample size")
    options = attributes.get("options", {})
    options = options if isinstance(options, Mapping) else {}
    particles = options.get("particles")
    threshold = _threshold(str(options.get("resampling", "")))
    if isinstance(particles, int):
        panel.axhline(particles, color=_INK, linewidth=0.9, label=f"{particles} particles")
        if 0 < threshold < 1:
            style = {"color": _COLORS[1], "linewidth": 1, "linestyle": "--"}
            panel.axhline(threshold * particles, label="resampling below", **style)
    panel.set_yscale("log")
    panel.set_ylabel("effective\nsample size")


def _threshold(resampling: str) -> float:
    """The fraction of particles below which a scheme resamples, from its repr, which leaves out what is by default."""
    said = re.search(r"threshold=([0-9.]+)", resampling)
    if said:
        return float(said[1])
    return next((kind().threshold for kind in RESAMPLINGS.values() if resampling.startswith(kind.__name__)), 0.0)


def _chi_square(panel: Any, time: Time, square: np.ndarray, count: np.ndarray) -> None:
    from scipy.stats import chi2

    ratio = square / np.where(count > 0, count, np.nan)
    panel.plot(time.axis, ratio, ".", color=_COLORS[0], alpha=0.35, markersize=4, label="each step")
    known = _enough(_running(count, time.window))
    edges = [chi2.ppf(p, known) / known for p in ((1 - _MASS) / 2, (1 + _MASS) / 2)]
    panel.fill_between(time.axis, *edges, color=_GRAY, alpha=0.3, linewidth=0, label="95 % of right filters")
    label = f"mean over {time.window} steps" if time.window > 1 else None
    panel.plot(time.axis, _running(square, time.window) / known, color=_COLORS[0], linewidth=1.4, label=label)
    panel.axhline(1.0, color=_INK, linewidth=0.8)
    panel.set_yscale("log")
    # A step with one datum may be as small as it likes; the eye needs the large ones.
    largest = np.nanmax(np.append(ratio, 2.0))
    panel.set_ylim(0.02, 2 * largest)
    panel.set_ylabel("innovation $\\chi^2$\nper datum")


def _crps(panel: Any, time: Time, crps: Mapping[str, np.ndarray]) -> None:
    for (name, values), color, style in zip(crps.items(), _COLORS, _STYLES, strict=False):
        panel.plot(time.axis, values, ".", color=color, alpha=0.35, markersize=4)
        mean = f"{np.nanmean(values):.3g}" if not np.isnan(values).all() else "no data"
        label = f"{name}, mean {mean}"
        panel.plot(
            time.axis, _running_mean(values, time.window), color=color, linestyle=style, linewidth=1.4, label=label
        )
    panel.set_ylim(bottom=0)
    panel.set_ylabel("CRPS of data\n(their units)")


def _skill(panel: Any, time: Time, skills: Mapping[str, filter_diagnostics.Skill]) -> None:
    one = len(skills) == 1
    for (name, skill), color in zip(skills.items(), _COLORS, strict=False):
        error, spread = (np.sqrt(_running_mean(v, time.window)) for v in skill)
        means = [np.sqrt(np.nanmean(v)) for v in skill]
        first = _INK if one else color
        panel.plot(
            time.axis, error, color=first, linewidth=1.3, label=f"{name}: error of the mean, {means[0]:.3g} overall"
        )
        label = f"{name}: spread, {means[1]:.3g} overall"
        panel.plot(time.axis, spread, color=color, linewidth=1.5, linestyle="--", label=label)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("error and spread\n(root mean square)")


def _places(found: Mapping[str, np.ndarray], one_step: Any, sites: list[str]) -> dict[str, np.ndarray]:
    """Ranks of data as fractions, by site."""
    spread = {}
    for name in sites:
        values = found.get(f"rank_{name}")
        if values is not None and not np.isnan(values).all():
            spread[name] = _fractions(values, one_step[name].sizes["chain"] * one_step[name].sizes["draw"])
    return spread


def _truth_places(tree: Any, truths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    spread = {}
    for name, true in truths.items():
        if "draw" in tree["filtering"][name].dims:
            draws = filter_diagnostics.flat_draws(tree["filtering"][name])
            spread[name] = _fractions(filter_diagnostics.ranks(draws, true), len(draws))
    return spread


def _fractions(ranks: np.ndarray, draws: int) -> np.ndarray:
    """Ranks 0..draws, spread over their cells of [0, 1] so that any number of bins is fair to them."""
    known = ranks[~np.isnan(ranks)]
    return (known + np.random.default_rng(0).random(known.shape)) / (draws + 1)


def _histogram(panel: Any, places: Mapping[str, np.ndarray], label: str, *, band: bool) -> None:
    from scipy.stats import binom

    count = min(len(v) for v in places.values())
    bins = int(np.clip(count // 10, 4, _BINS))
    edges = np.linspace(0, 1, bins + 1)
    if band:
        tails = [binom.ppf(p, count, 1 / bins) * bins / count for p in ((1 - _MASS) / 2, (1 + _MASS) / 2)]
        panel.axhspan(*tails, color=_GRAY, alpha=0.3, linewidth=0, label="95 % of right filters")
    panel.axhline(1.0, color=_INK, linewidth=0.8)
    one = len(places) == 1
    for (name, values), color, style in zip(places.items(), _COLORS, _STYLES, strict=False):
        heights = np.histogram(values, edges)[0] * bins / len(values)
        text = f"{name}, {len(values)} values"
        if one:
            panel.stairs(heights, edges, fill=True, color=color, alpha=0.45)
        panel.stairs(heights, edges, color=color, linewidth=1.4, linestyle=style, label=text)
    panel.set_xlim(0, 1)
    panel.set_ylim(bottom=0)
    panel.set_xlabel(label)
    panel.set_ylabel("density")


def _figure(series: list[Any], histograms: list[Any], time: Time, figsize: Any) -> Any:
    import matplotlib.pyplot as plt

    rows, columns = max(len(series), len(histograms), 1), 2 if histograms else 1
    figsize = figsize or (8.0 + 3.0 * (columns - 1), 0.8 + 1.9 * max(rows, 1.3 * len(histograms)))
    figure = plt.figure(figsize=figsize, layout="constrained")
    halves = figure.subfigures(1, columns, width_ratios=[2.6, 1][:columns], squeeze=False)[0]
    panels = halves[0].subplots(len(series), 1, sharex=True, squeeze=False)[:, 0] if series else []
    for panel, draw in zip(panels, series, strict=True):
        draw(panel, time)
        panel.margins(x=0.01)
        time.ticks(panel)
    if len(panels):
        panels[-1].set_xlabel(time.name)
    more = halves[-1].subplots(len(histograms), 1, squeeze=False)[:, 0] if histograms else []
    for panel, draw in zip(more, histograms, strict=True):
        draw(panel)
    for panel in (*panels, *more):
        panel.spines[["top", "right"]].set_visible(False)
        _, labels = panel.get_legend_handles_labels()
        style = {"frameon": False, "fontsize": 8, "handlelength": 1.6, "borderaxespad": 0, "columnspacing": 1.2}
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "ncols": 3 if panel in panels else 1}
        if labels:
            panel.legend(**style, **place)
    return figure
