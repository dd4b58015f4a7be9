"""`plot_calibration`: ranks of true parameters beside what exact posteriors give, and coverage."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pushforward import posterior
from pushforward._errors import ArgumentError
from pushforward.math import ranks

if TYPE_CHECKING:
    import matplotlib.figure

_COLORS = ("#2b6ca3", "#5b8a3c", "#8b5aa0", "#3a9a9a", "#7a6a55", "#4a4a8a")
_FAILED, _INK, _BAND = "#c8611a", "#1a1a1a", "0.87"
_JOINT = {"log_likelihood": "log likelihood", "tarp": "TARP"}
_SHOWN, _MOST, _COLUMNS, _NAMED = 6, 12, 4, 6


def plot_calibration(
    tree: Any,
    parameters: str | Sequence[str] | None = None,
    *,
    figsize: tuple[float, float] | None = None,
) -> "matplotlib.figure.Figure":
    """Ranks and coverage of a calibration in one figure.

    - A panel for each parameter, and one for the log likelihood: how far the distribution function of its ranks, as
      numbers in (0, 1), is from the diagonal, with a line for each element. Above zero on the left and below on the
      right (ranks at both ends): draws too narrow. The other way round: too wide. On one side of zero throughout:
      draws biased, upwards where above.
    - Coverage of central intervals by their credibility, and of TARP's regions for all parameters together. Below the
      diagonal: intervals too small.

    A curve that leaves the gray band anywhere is significant. The band is that of the test of `calibrate`: all curves
    of an exact method stay in theirs, all over, with probability ``1 - level`` at least. Curves of elements that are
    rejected, after Holm's adjustment, are orange.

    Args:
        tree: a result of `calibrate`.
        parameters: sites to show, 12 at most; None shows the first 6.
        figsize: width and height in inches.

    Returns:
        The matplotlib figure; save it with ``.savefig(path)``.

    Raises:
        ArgumentError: no result of `calibrate`, or an unknown parameter.

    Example:
        >>> import numpyro, numpyro.distributions as dist, pushforward as pf
        >>> def model(y=None):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 2))
        ...     numpyro.sample("y", dist.Normal(mean, 1), obs=y)
        >>> tree = pf.calibrate("laplace", model, observed="y", n=30, progress=False)
        >>> [axes.get_title(loc="left") for axes in pf.plot_calibration(tree).axes]
        ['mean', 'log likelihood', 'central intervals', 'TARP, all parameters']
    """
    known = _check(tree)
    names, more = _chosen(known, parameters)
    joint = ["log_likelihood"] if "log_likelihood" in tree["calibration"] else []
    attributes = posterior.attributes(tree)
    band = ranks.simultaneous_band(attributes["datasets"], attributes["level"] / attributes["tests"])
    points = ranks.grid(attributes["datasets"])
    figure, panels = _panels(len(names) + len(joint) + 2, figsize)
    shown = list(zip(panels, names + joint, strict=False))
    reaches = [_differences(panel, tree, name, points, band, attributes["level"]) for panel, name in shown]
    widest = float(np.max(np.maximum(band[1] - points, points - band[0])))
    for panel, _ in shown:
        panel.set_ylim(-1.12 * max(widest, *reaches), 1.12 * max(widest, *reaches))
    _coverage(panels[-2], tree, names, points, band)
    _tarp(panels[-1], tree, points, band, attributes["level"])
    figure.suptitle(_headline(attributes, more), fontsize=10, x=0.01, ha="left")
    return figure


def _check(tree: Any) -> list[str]:
    if not hasattr(tree, "children") or not {"calibration", "p_value_adjusted", "coverage"} <= set(tree.children):
        has = f"groups {list(tree.children)}" if hasattr(tree, "children") else type(tree).__name__
        raise ArgumentError(f"plot_calibration takes a result of calibrate; got {has}.")
    return [n for n in tree["calibration"].data_vars if n not in _JOINT]


def _chosen(known: list[str], parameters: Any) -> tuple[list[str], str]:
    if parameters is None:
        note = f"; first {_SHOWN} of {len(known)} parameters, choose with parameters=" if len(known) > _SHOWN else ""
        return known[:_SHOWN], note
    given = [parameters] if isinstance(parameters, str) else list(parameters)
    unknown = [n for n in given if n not in known]
    if unknown:
        raise ArgumentError(f"parameters= names {unknown[0]!r}; the result has {known}.")
    if not 1 <= len(given) <= _MOST:
        raise ArgumentError(f"parameters= names {len(given)} sites; expected 1 to {_MOST}. Draw several figures.")
    return given, ""


def _panels(count: int, figsize: tuple[float, float] | None) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    columns = min(count, _COLUMNS) if count != 5 else 3
    rows = math.ceil(count / columns)
    size = figsize or (2.9 * columns, 0.5 + 2.6 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    panels = list(grid.ravel())
    for panel in panels[count:]:
        panel.remove()
    for panel in panels[:count]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(0, 1)
        panel.set_xticks([0, 0.5, 1])
        panel.tick_params(labelsize=8)
    return figure, panels[:count]


def _title(panel: Any, text: str, note: str = "") -> None:
    panel.set_title(text, loc="left", fontsize=9)
    panel.set_title(note, loc="right", fontsize=8, color="0.35")


def _whole(points: np.ndarray, band: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The band with its ends, where every distribution function is 0 or 1."""
    x = np.concatenate([[0.0], points, [1.0]])
    return x, np.concatenate([[0.0], band[0], [1.0]]), np.concatenate([[0.0], band[1], [1.0]])


def _differences(panel: Any, tree: Any, name: str, points: np.ndarray, band: Any, level: float) -> float:
    """ECDF of the ranks minus the diagonal, a line for each element; returns how far they reach."""
    x, low, high = _whole(points, band)
    panel.fill_between(x, low - x, high - x, color=_BAND, linewidth=0, zorder=1)
    panel.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    values = tree["calibration"][name].to_numpy()
    curves = ranks.distribution(values.reshape(len(values), -1), points)
    adjusted = np.ravel(tree["p_value_adjusted"][name].to_numpy())
    many = curves.shape[1] > 1
    for curve, p in zip(curves.T, adjusted, strict=True):
        failed = p <= level
        style = {"color": _FAILED if failed else _COLORS[0], "linewidth": 0.9 if many else 1.3}
        style |= {"alpha": max(0.15, min(1.0, 4 / len(adjusted))) if many and not failed else 1.0}
        panel.plot(x, np.concatenate([[0.0], curve, [1.0]]) - x, zorder=3 if failed else 2, **style)
    least = int(np.argmin(adjusted))
    where = np.unravel_index(least, tree["p_value_adjusted"][name].shape)
    element = f"[{','.join(str(int(i)) for i in where)}] " if many else ""
    _title(panel, _JOINT.get(name, name), f"{element}p = {_number(float(adjusted[least]))}")
    panel.set_xlabel("rank / draws", fontsize=8)
    panel.set_ylabel("ECDF − rank / draws", fontsize=8)
    return float(max(np.max(np.abs(line.get_ydata())) for line in panel.lines))


def _number(p: float) -> str:
    return "1" if p == 1 else f"{p:.2g}" if p >= 1e-3 else f"{p:.0e}"


def _diagonal(panel: Any, points: np.ndarray, band: Any) -> None:
    x, low, high = _whole(points, band)
    panel.fill_between(x, low, high, color=_BAND, linewidth=0, zorder=1)
    panel.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, zorder=1)
    panel.set_ylim(0, 1)
    panel.set_yticks([0, 0.5, 1])
    panel.set_aspect("equal")
    panel.set_xlabel("credibility", fontsize=8)
    panel.set_ylabel("coverage", fontsize=8)


def _coverage(panel: Any, tree: Any, names: list[str], points: np.ndarray, band: Any) -> None:
    """Coverage of central intervals, a line for each scalar."""
    _diagonal(panel, points, band)
    group = tree["coverage"]
    x = group["credibility"].to_numpy()
    curves = {name: group[name].to_numpy().reshape(len(x), -1) for name in names}
    for color, (name, lines) in zip(_COLORS * _MOST, curves.items(), strict=False):
        alpha = max(0.2, min(1.0, 4 / lines.shape[1]))
        for i, line in enumerate(lines.T):
            label = name if i == 0 and len(names) <= _NAMED else None
            panel.plot(x, line, color=color, linewidth=1.2, alpha=alpha, label=label, zorder=2)
    if 1 < len(names) <= _NAMED:
        legend = panel.legend(fontsize=7, frameon=False, loc="upper left", handlelength=1.2)
        for handle in legend.get_lines():
            handle.set_alpha(1.0)
    _title(panel, "central intervals")


def _tarp(panel: Any, tree: Any, points: np.ndarray, band: Any, level: float) -> None:
    _diagonal(panel, points, band)
    p = float(tree["p_value_adjusted"]["tarp"])
    color = _FAILED if p <= level else _COLORS[0]
    panel.plot(tree["coverage"]["credibility"], tree["coverage"]["tarp"], color=color, linewidth=1.3, zorder=2)
    _title(panel, "TARP, all parameters", f"p = {_number(p)}")


def _headline(attributes: dict[str, Any], more: str) -> str:
    verdict = "no departure from calibration found" if attributes["calibrated"] else "not calibrated"
    worst = "" if attributes["calibrated"] else f" ({attributes['worst']}: p = {_number(attributes['p_value'])})"
    return (
        f"{attributes['method']}: {verdict}{worst} in {attributes['datasets']} data sets, {attributes['tests']} tests "
        f"at level {attributes['level']:g} together{more}"
    )
