"""`plot_filter`: trajectories of a state-space posterior in time, with bands, truth, data and forecast."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pushforward import posterior
from pushforward._errors import ArgumentError, DataError

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

_GROUPS = ("posterior", "filtering", "one_step")
_SHOWN, _MOST = 3, 6
_COLORS = {"past": "#2b6ca3", "forecast": "#c8611a"}
_INK = {"truth": "#1a1a1a", "data": "#5a5a5a"}
_NAMES = {"posterior": "posterior", "filtering": "filtering law", "one_step": "one-step prediction"}


class Law(NamedTuple):
    """Laws in time: `bands` has shape (level, 2, time, ...), `median` (time, ...)."""

    time: np.ndarray
    bands: np.ndarray
    median: np.ndarray


def plot_filter(
    tree: Any,
    variable: str = "x",
    *,
    group: str = "posterior",
    index: int | Sequence[Any] | None = None,
    truth: Any = None,
    data: str | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    ax: "Axes | Sequence[Axes] | None" = None,
    figsize: tuple[float, float] | None = None,
) -> "matplotlib.figure.Figure":
    """Trajectories in time: one panel per component, with bands, medians, truth and data.

    Where the tree has the group ``predictions`` (see `forecast`), the forecast continues each panel in another colour
    behind a dashed line; with `data=`, dotted lines bound the widest band of the data that are forecast.

    Args:
        tree: a result of `infer`, with or without a forecast.
        variable: a variable with time as its first axis after chain and draw.
        group: "posterior" (given all data), "filtering" (given the data so far) or "one_step" (given the data before).
            Bands are quantiles over all draws; of means and standard deviations (``store="moments"``), normal ones.
        index: which components to show, 6 at most: positions such as ``[0, 5]``, or tuples of positions where the
            variable has several axes after time. None shows the first 3.
        truth: true values, shape (time, ...) as the variable, or with the steps of the forecast as well.
        data: name of an observed site of the variable's shape, shown as points.
        levels: masses of the central bands.
        ax: a matplotlib Axes per component to draw in, instead of a new figure.
        figsize: width and height of a new figure in inches.

    Returns:
        The matplotlib figure; save it with ``.savefig(path)``.

    Raises:
        ArgumentError: an unknown group or variable, too many components, or options that do not fit.
        DataError: a variable without time, or truth or data of another shape.

    Example:
        >>> import numpy as np, xarray as xr, pushforward as pf
        >>> draws = np.random.default_rng(0).normal(size=(1, 200, 30, 2)).cumsum(2)
        >>> x = xr.Dataset({"x": (("chain", "draw", "time", "component"), draws)}, {"time": np.arange(30)})
        >>> figure = pf.plot_filter(xr.DataTree.from_dict({"posterior": x}), truth=draws[0, 0])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['x[0]', 'x[1]']
    """
    levels = _levels(levels)
    past = _law(tree, group, variable, levels)
    shape = past.median.shape[1:]
    shown = _components(variable, shape, index)
    forecast = variable in _variables(tree, "predictions")
    later = _law(tree, "predictions", variable, levels) if forecast else None
    if later is not None and later.median.shape[1:] != shape:
        raise DataError(
            f"'{variable}' has shape {shape} at a step of '{group}' and {later.median.shape[1:]} at one of "
            "'predictions'. Forecast with the model that was inferred."
        )
    time = past.time if later is None else np.concatenate([past.time, later.time])
    points = _points(tree, data, past.median.shape)
    future = _data_bounds(tree, data, later, levels)
    true = _truth(truth, len(past.time), len(time), shape)
    axis, ticks = _axis(time)
    figure, panels = _panels(ax, len(shown), figsize)
    for panel, where in zip(panels, shown, strict=True):
        _draw(panel, _at(past, where), None if later is None else _at(later, where), axis)
        at = (slice(None), *where)
        if future is not None:
            style = {"color": _COLORS["forecast"], "linewidth": 1, "linestyle": ":"}
            panel.plot(axis[len(past.time) :], future[(slice(None), *at)].T, **style)
        if points is not None:
            panel.plot(axis[: len(past.time)], points[at], ".", color=_INK["data"], markersize=4, zorder=4)
        if true is not None:
            panel.plot(axis[: len(true)], true[at], color=_INK["truth"], linewidth=1.1, zorder=3)
        panel.set_ylabel(_name(variable, where))
        panel.margins(x=0.01)
        panel.spines[["top", "right"]].set_visible(False)
        ticks(panel)
    panels[-1].set_xlabel(_time_name(tree, group, variable))
    all_shown = index is not None or len(shown) == math.prod(shape)
    note = "" if all_shown else f"first {len(shown)} of {math.prod(shape)} components, choose with index="
    entries = _entries(group, later is not None, levels, true is not None, data, future is not None)
    _legend(figure, panels, entries, note, own=ax is None)
    return figure


def _levels(levels: Any) -> tuple[float, ...]:
    given = tuple(np.ravel(levels).tolist())
    if not given or not all(isinstance(p, float) and 0 < p < 1 for p in given):
        raise ArgumentError(f"levels= takes masses between 0 and 1, such as (0.5, 0.9); got {levels!r}.")
    return tuple(sorted(given, reverse=True))


def _variables(tree: Any, group: str) -> list[str]:
    return list(tree[group].data_vars) if group in tree.children else []


def _law(tree: Any, group: str, variable: str, levels: tuple[float, ...]) -> Law:
    """Bands of a variable from its draws, or from its means and standard deviations."""
    _check_group(tree, group, variable)
    values = tree[group][variable]
    sampled = {"chain", "draw"} <= set(values.dims)
    tails = [((1 - p) / 2, (1 + p) / 2) for p in levels]
    if sampled:
        draws = values.transpose("chain", "draw", ...).to_numpy()
        draws = draws.reshape(-1, *draws.shape[2:])
    else:
        draws = values.to_numpy()[None]
    if draws.ndim < 2 or (group == "posterior" and _without_time(tree)):
        raise DataError(
            f"'{variable}' in '{group}' has no time axis: its dims are {values.dims}. Show a trajectory: "
            f"group='filtering', or a result with store='draws'."
        )
    time = values[next(d for d in values.dims if d not in ("chain", "draw"))].to_numpy()
    if sampled:
        bands = np.quantile(draws, np.ravel(tails), axis=0).reshape(len(levels), 2, *draws.shape[1:])
        return Law(time, bands, np.median(draws, axis=0))
    mean, sd = draws[0], tree[group][f"{variable}_sd"].to_numpy()
    bands = [[mean + NormalDist().inv_cdf(p) * sd for p in pair] for pair in tails]
    return Law(time, np.asarray(bands), mean)


def _check_group(tree: Any, group: str, variable: str) -> None:
    if not hasattr(tree, "children"):
        raise ArgumentError(f"plot_filter takes a result of infer (an xarray.DataTree); got {type(tree).__name__}.")
    if group not in _GROUPS and group != "predictions":
        raise ArgumentError(f"group= takes one of {list(_GROUPS)}; got {group!r}.")
    if group not in tree.children:
        has = [g for g in _GROUPS if g in tree.children]
        raise ArgumentError(
            f"the result has no group {group!r}; of those that can be plotted it has {has}. State methods such as "
            "pf.Kalman() write 'filtering' and 'one_step'."
        )
    if variable not in tree[group].data_vars:
        raise ArgumentError(f"{group!r} has no variable {variable!r}; it has {_variables(tree, group)}.")
    if not {"chain", "draw"} <= set(tree[group][variable].dims) and f"{variable}_sd" not in tree[group].data_vars:
        raise DataError(
            f"'{variable}' in '{group}' has the dims {tree[group][variable].dims} and no '{variable}_sd' beside it. "
            "Expected draws (chain, draw, time, ...), or means with standard deviations."
        )


def _without_time(tree: Any) -> bool:
    """Whether the posterior holds the last step alone."""
    options = posterior.attributes(tree).get("options", {})
    return isinstance(options, dict) and options.get("store") in ("moments", "last")


def _components(variable: str, shape: tuple[int, ...], index: Any) -> list[tuple[int, ...]]:
    if index is None:
        return list(np.ndindex(*shape))[:_SHOWN]
    given = [index] if isinstance(index, int | np.integer) else list(index)
    wanted = [tuple(np.ravel(np.asarray(i)).tolist()) for i in given]
    example = tuple(s // 2 for s in shape)
    if not 1 <= len(wanted) <= _MOST:
        raise ArgumentError(f"index= names {len(wanted)} components; expected 1 to {_MOST}. Draw several figures.")
    for where in wanted:
        fits = len(where) == len(shape) and all(isinstance(i, int) for i in where)
        if not fits or not all(-s <= i < s for i, s in zip(where, shape, strict=True)):
            raise ArgumentError(
                f"index= names the component {where}, but '{variable}' has shape {shape} at one step. Write "
                + (f"index=[{example[0] if len(shape) == 1 else example}]." if shape else "no index= for a scalar.")
            )
    return [tuple(i % s for i, s in zip(where, shape, strict=True)) for where in wanted]


def _at(law: Law, where: tuple[int, ...]) -> Law:
    return Law(law.time, law.bands[(..., *where)] if where else law.bands, law.median[(slice(None), *where)])


def _points(tree: Any, data: str | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if data is None:
        return None
    if data not in _variables(tree, "observed_data"):
        raise ArgumentError(f"data= names {data!r}; 'observed_data' has {_variables(tree, 'observed_data')}.")
    values = tree["observed_data"][data].to_numpy()
    if values.shape != shape:
        raise DataError(
            f"data '{data}' have shape {values.shape} and the variable {shape}, so points cannot be set beside its "
            "components. Leave out data=."
        )
    return values


def _data_bounds(tree: Any, data: str | None, later: Law | None, levels: tuple[float, ...]) -> np.ndarray | None:
    """The widest band of the data that are forecast, shape (2, time, ...)."""
    if data is None or later is None or data not in _variables(tree, "predictions"):
        return None
    law = _law(tree, "predictions", data, levels[:1])
    return law.bands[0] if law.median.shape == later.median.shape else None


def _truth(truth: Any, length: int, total: int, shape: tuple[int, ...]) -> np.ndarray | None:
    if truth is None:
        return None
    values = np.asarray(truth, float)
    if values.shape not in ((length, *shape), (total, *shape)):
        longer = f" or {(total, *shape)}" if total > length else ""
        raise DataError(f"truth= has shape {values.shape}; expected {(length, *shape)}{longer}, time first.")
    return values


def _axis(time: np.ndarray) -> tuple[np.ndarray, Any]:
    """Positions on the time axis, and what sets a panel's ticks: labels that are no numbers or dates get positions."""
    if time.dtype.kind in "iufM":
        return time, lambda panel: None
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def label(position: float, _: Any) -> str:
        inside = position == int(position) and 0 <= position < len(time)
        return str(time[int(position)]) if inside else ""

    def ticks(panel: Any) -> None:
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        panel.xaxis.set_major_formatter(FuncFormatter(label))

    return np.arange(len(time)), ticks


def _panels(ax: Any, count: int, figsize: tuple[float, float] | None) -> tuple[Any, list[Any]]:
    if ax is None:
        import matplotlib.pyplot as plt

        figsize = figsize or (8.0, 1.2 + (2.4 if count == 1 else 1.7 * count))
        figure, grid = plt.subplots(count, 1, figsize=figsize, sharex=True, squeeze=False, layout="constrained")
        return figure, list(grid[:, 0])
    panels = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(panels) != count:
        raise ArgumentError(f"ax= has {len(panels)} axes for {count} components; give one for each, or choose index=.")
    return panels[0].figure, panels


def _draw(panel: Any, past: Law, later: Law | None, axis: np.ndarray) -> None:
    """Bands and medians of one component; the forecast's bands start where the others end."""
    length = len(past.time)
    parts = [("past", axis[:length], past.bands, past.median)]
    if later is not None:
        bands = np.concatenate([past.bands[..., -1:], later.bands], axis=-1)
        median = np.concatenate([past.median[-1:], later.median])
        parts.append(("forecast", axis[length - 1 :], bands, median))
        panel.axvline(axis[length - 1], color="0.55", linewidth=0.9, linestyle="--", zorder=1)
    for name, time, bands, median in parts:
        for band in bands:  # over each other, so that inner ones come out darker
            panel.fill_between(time, *band, color=_COLORS[name], alpha=0.22, linewidth=0, zorder=1)
        panel.plot(time, median, color=_COLORS[name], linewidth=1.4, zorder=2)


def _name(variable: str, where: tuple[int, ...]) -> str:
    return f"{variable}[{','.join(map(str, where))}]" if where else variable


def _time_name(tree: Any, group: str, variable: str) -> str:
    dim = str(next(d for d in tree[group][variable].dims if d not in ("chain", "draw")))
    return "time" if dim.startswith(f"{variable}_dim_") else dim


def _entries(
    group: str, forecast: bool, levels: tuple[float, ...], truth: bool, data: str | None, bounds: bool
) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    masses = ", ".join(f"{100 * p:g} %" for p in levels[::-1])
    found: list[Any] = [
        Line2D([], [], color=_COLORS["past"], label=f"{_NAMES[group]}, median"),
        Patch(facecolor=_COLORS["past"], alpha=0.4, label=masses),
    ]
    if truth:
        found.append(Line2D([], [], color=_INK["truth"], linewidth=1.1, label="truth"))
    if data is not None:
        found.append(Line2D([], [], color=_INK["data"], marker=".", linestyle="", label=f"data {data}"))
    if forecast:
        found.append(Patch(facecolor=_COLORS["forecast"], alpha=0.45, label="forecast"))
    if bounds:
        text = f"forecast of {data}, {100 * levels[0]:g} %"
        found.append(Line2D([], [], color=_COLORS["forecast"], linestyle=":", label=text))
    return found


def _legend(figure: Any, panels: list[Any], handles: list[Any], note: str, *, own: bool) -> None:
    style = {"handles": handles, "ncols": min(len(handles), 3), "frameon": False, "fontsize": 9}
    style |= {"title": note or None, "title_fontsize": 8, "alignment": "left"}
    if own:
        figure.legend(loc="outside upper left", **style)
    else:
        panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0, **style)
