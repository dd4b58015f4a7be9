"""Several results beside a reference: one table, one plot.

How floors are taken. The halves of the reference are every other chain and the rest, or the first and the second
half of a single chain. Joint distances use at most `draws` draws of a tree and of the reference, evenly thinned, and
never more than a half of the reference holds, so that floors are taken at the very sizes of the scores; floors of
small ensembles are means over up to 5 disjoint subsets. Moments use all draws, and their floors are multiplied by
`sqrt((1/n + 1/N) / (1/a + 1/b))`, with n draws of the tree, N of the reference, a and b of its halves.

Draws count as independent: a tree whose chains mix worse than those of the reference scores above its floor. A
tree identical to the reference scores the floors. `c2st` is NaN for trees with fewer than 10 draws. Beyond 256
coordinates the joint distances use 256 evenly spaced ones, with a warning.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import metrics
from ._errors import ArgumentError, DataError

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas as pd
    import xarray as xr

ATTRIBUTES = (
    "log_evidence",
    "log_evidence_se",
    "evaluations",
    "gradient_evaluations",
    "compile_seconds",
    "run_seconds",
)


def compare(
    trees: Mapping[str, "xr.DataTree"],
    reference: "xr.DataTree",
    *,
    var_names: Sequence[str] | None = None,
    draws: int = 2000,
    projections: int = 200,
    key: int = 0,
) -> "pd.DataFrame":
    """Table of the distances of several results from a reference, with their Monte Carlo floors and costs.

    The coordinates compared are all elements of the variables that the reference and every tree hold,
    deterministic ones included, less those constant in the reference. One row per tree, with the columns

    * `mean_error`, `mean_error_variable`: largest `|mean - mean_ref| / sd_ref` and where;
    * `sd_error`, `sd_error_variable`: largest `|log(sd / sd_ref)|` and where (infinite for a single draw);
    * `sliced_wasserstein` (order 1), `energy_distance`, `c2st` with its standard error `c2st_se`: distances of the
      joint laws, see `pushforward.metrics`, after both samples were standardised by mean and sd of the reference;
    * `..._floor` for each of the five: what one half of the reference scores against the other, that is, what an
      exact method scores. A value well above its floor is an error of the method; one near it shows none;
    * `log_evidence`, `log_evidence_se`, `evaluations`, `gradient_evaluations`, `compile_seconds`, `run_seconds`:
      attributes of the tree, NaN where it has none.

    Draws count as independent. The module's docstring says how halves and floors are taken.

    Args:
        trees: results by name, as `infer` returns them: group `posterior`, dims (chain, draw, ...).
        reference: the result taken as exact, for instance a long run of NUTS; best with several chains.
        var_names: variables ("theta") or single elements ("theta[3]") to compare; all shared ones by default.
        draws: most draws of either sample in the joint distances, whose cost grows with its square.
        projections: directions of the sliced Wasserstein distance.
        key: seed of directions and of the classifier.

    Returns:
        A `pandas.DataFrame` whose index holds the names.

    Raises:
        ArgumentError: `trees` is no dict, or something in it is no DataTree.
        DataError: a tree has no posterior, no shared variables, other shapes, or draws that are not finite.

    Example:
        >>> import arviz as az, numpy as np, pushforward as pf
        >>> exact, other = (
        ...     az.from_dict({"posterior": {"a": np.random.default_rng(k).normal(size=(2, 500))}}) for k in (0, 1)
        ... )
        >>> table = pf.compare({"other": other}, reference=exact)
        >>> bool(table.loc["other", "mean_error"] < 0.3)
        True
    """
    import pandas as pd

    exact, samples, labels = _read(trees, reference, var_names)
    judge = metrics.Judge(exact, draws=draws, projections=projections, key=key)
    rows = {name: _row(judge, sample, labels, trees[name].attrs) for name, sample in samples.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _row(judge: metrics.Judge, sample: np.ndarray, labels: list[str], attributes: Mapping) -> dict[str, float | str]:
    """One row of the table of `compare`."""
    row = {}
    errors, floors = judge.moment_errors(sample)
    for column, error in errors.items():
        row[column] = float(error.max())
        row[f"{column}_variable"] = labels[error.argmax()]
        row[f"{column}_floor"] = floors[column]
    scores, floors = judge.joint_distances(sample)
    for column, score in scores.items():
        row[column] = score
        if column != "c2st_se":
            row[f"{column}_floor"] = floors[column]
    return row | {column: _number(attributes.get(column)) for column in ATTRIBUTES}


def _read(trees, reference, var_names) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """Draws of reference and trees, shape (chain, draw, coordinates), and the labels of the coordinates.

    Coordinates that are constant in the reference, up to rounding, are left out.
    """
    import xarray as xr

    if isinstance(trees, xr.DataTree) or not isinstance(trees, Mapping) or not trees:
        raise ArgumentError(
            f"`trees` is {'an empty' if isinstance(trees, dict) else 'a'} {type(trees).__name__}; expected a dict of "
            'results by name. Write {"name": tree}.'
        )
    everything = {"reference": reference} | {f"trees[{name!r}]": tree for name, tree in trees.items()}
    posteriors = {where: _posterior(where, tree) for where, tree in everything.items()}
    names, elements = _chosen(posteriors, var_names)
    exact = posteriors["reference"]
    columns, labels = [], []
    for name in names:
        own_labels = _labels(exact[name])
        keep = [i for i, label in enumerate(own_labels) if name in elements or label in elements]
        draws = {where: _values(where, tree[name], exact[name])[..., keep] for where, tree in posteriors.items()}
        moving = metrics.varies(draws["reference"])
        columns.append({where: values[..., moving] for where, values in draws.items()})
        labels += [own_labels[i] for i, moves in zip(keep, moving, strict=True) if moves]
    if not labels:
        raise DataError(
            f"all of {sorted(elements)} are constant in the reference, so nothing is left to compare. "
            "Choose other variables with var_names=."
        )
    joined = {where: np.concatenate([c[where] for c in columns], axis=2) for where in posteriors}
    return joined.pop("reference"), dict(zip(trees, joined.values(), strict=True)), labels


def _posterior(where: str, tree) -> "xr.Dataset":
    """The group `posterior` of a tree, checked."""
    import xarray as xr

    if not isinstance(tree, xr.DataTree):
        raise ArgumentError(
            f"{where} is a {type(tree).__name__}; expected an xarray.DataTree as `infer` returns it. "
            'A dict of arrays (chain, draw, ...) becomes one by arviz.from_dict({"posterior": arrays}).'
        )
    if "posterior" not in tree.children:
        raise DataError(
            f"{where} has the groups {sorted(tree.children)}; expected a group `posterior`. "
            "Give a result of `infer`, not of `prior` or `predict`."
        )
    return tree["posterior"].to_dataset()


def _chosen(posteriors, var_names) -> tuple[list[str], set[str]]:
    """Variables to read, in order, and the names of all variables or elements wanted among them."""
    exact = posteriors["reference"]
    shared = [name for name in map(str, exact.data_vars) if all(name in p for p in posteriors.values())]
    held = "; ".join(f"{where}: {sorted(map(str, p.data_vars))}" for where, p in posteriors.items())
    if var_names is None:
        if not shared:
            raise DataError(f"no variable is in the reference and in every tree. They hold {held}.")
        return shared, set(shared)
    wanted = [var_names] if isinstance(var_names, str) else list(var_names)
    owners = {label: name for name in shared for label in [name, *_labels(exact[name])]}
    missing = [name for name in wanted if name not in owners]
    if missing or not wanted:
        raise DataError(
            f"var_names={wanted}: {missing or 'an empty list'} cannot be compared. They hold {held}. "
            'Name variables that all hold ("theta"), or elements of them ("theta[0]").'
        )
    return list(dict.fromkeys(owners[name] for name in wanted)), set(wanted)


def _labels(variable: "xr.DataArray") -> list[str]:
    """Names of the elements of a variable, such as theta[3], by coordinate values where it has them."""
    dims = [dim for dim in variable.dims if dim not in ("chain", "draw")]
    if not dims:
        return [str(variable.name)]
    values = [variable[dim].values for dim in dims]
    return [f"{variable.name}[{','.join(map(str, index))}]" for index in itertools.product(*values)]


def _values(where: str, variable: "xr.DataArray", exact: "xr.DataArray") -> np.ndarray:
    """Draws of one variable as floats of shape (chain, draw, elements), checked against the reference's."""
    name = variable.name
    if not {"chain", "draw"} <= set(variable.dims):
        raise DataError(
            f"{name!r} of {where} has the dims {variable.dims}; expected (chain, draw, ...). Add them with expand_dims."
        )
    variable = variable.transpose("chain", "draw", ...)
    shape, exact_shape = variable.shape[2:], exact.transpose("chain", "draw", ...).shape[2:]
    if shape != exact_shape:
        raise DataError(
            f"{name!r} has shape {shape} in {where} and {exact_shape} in the reference; expected equal shapes. "
            "Choose other variables with var_names=, or compare results of one model."
        )
    values = variable.values.reshape(*variable.shape[:2], -1)
    if values.dtype.kind not in "fiub":
        raise DataError(f"{name!r} of {where} has dtype {values.dtype}; expected real numbers.")
    values = values if values.dtype.kind == "f" else values.astype(np.float64)
    if values.size == 0 or not np.all(np.isfinite(values)):
        bad = np.count_nonzero(~np.isfinite(values))
        raise DataError(
            f"{name!r} of {where} holds {bad} NaN or infinite values out of {values.size}; expected finite draws. "
            "Drop those draws, or leave the variable out with var_names=."
        )
    return values


def _number(value) -> float:
    """An attribute as a number: it may be missing, a number, or JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return np.nan
    value = np.asarray(value)
    return float(value.item()) if value.size == 1 and value.dtype.kind in "fiu" else np.nan


def plot_compare(
    trees: Mapping[str, "xr.DataTree"],
    reference: "xr.DataTree",
    *,
    var_names: Sequence[str] | None = None,
    max_variables: int = 6,
    probabilities: Sequence[float] = (0.5, 0.9),
    panel_inches: float = 1.9,
) -> "matplotlib.figure.Figure":
    """Marginals on the diagonal and pair contours below it: each result as lines over the reference in grey.

    The contours enclose `probabilities` of the mass of a kernel density estimate. The axes end a little beyond the
    0.5 and 99.5 % quantiles of the reference, so that a result which lies far away shows nothing: `compare`
    says how far. Without `var_names` the first `max_variables` coordinates that are not constant are drawn, and
    the figure says out of how many.

    Args:
        trees: results by name, as `infer` returns them.
        reference: the result taken as exact.
        var_names: variables ("theta") or single elements ("theta[3]") to draw, in this order.
        max_variables: most coordinates drawn when `var_names` is not given.
        probabilities: mass inside the contours, each between 0 and 1.
        panel_inches: width and height of a panel.

    Returns:
        The matplotlib figure.

    Example:
        >>> import arviz as az, numpy as np, pushforward as pf
        >>> random = np.random.default_rng(0)
        >>> exact, other = (
        ...     az.from_dict({"posterior": {"a": random.normal(size=(2, 500, 2))}}) for _ in range(2)
        ... )
        >>> figure = pf.plot_compare({"other": other}, reference=exact)
        >>> len(figure.axes)
        3
    """
    if max_variables < 1 or not probabilities or not all(0 < p < 1 for p in probabilities):
        raise ArgumentError(
            f"plot_compare got max_variables={max_variables}, probabilities={probabilities}; expected at least one "
            "variable, and probabilities between 0 and 1 such as (0.5, 0.9)."
        )
    exact, samples, labels = _read(trees, reference, var_names)
    shown = len(labels) if var_names is not None else min(max_variables, len(labels))
    flat = {name: sample[..., :shown].reshape(-1, shown) for name, sample in samples.items()}
    heading = "contours: " + ", ".join(f"{100 * p:g} %" for p in probabilities) if shown > 1 else ""
    if shown < len(labels):
        heading += f"\nfirst {shown} of {len(labels)} coordinates,\nchoose with var_names="
    exact = exact[..., :shown].reshape(-1, shown)
    return _corner(flat, exact, labels[:shown], probabilities, panel_inches, heading)


def _corner(values, exact, labels, probabilities, panel_inches, heading) -> "matplotlib.figure.Figure":
    """Corner plot of samples of shape (draws, coordinates) over the reference `exact`."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    count = len(labels)
    low, high = np.quantile(exact, [0.005, 0.995], axis=0)
    low, high = np.where(high > low, [low, high], [exact.min(0), exact.max(0)])
    limits = np.stack([low, high], axis=1) + 0.2 * (high - low)[:, None] * np.array([-1, 1])
    side = panel_inches * max(count, 2)
    figure, grid = plt.subplots(count, count, figsize=(side, side), squeeze=False, layout="constrained")
    panels: Any = grid  # an array of Axes
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.02, h_pad=0.02, wspace=0.03, hspace=0.03)
    colors = {name: f"C{i}" for i, name in enumerate(values)}
    for row, column in np.ndindex(count, count):
        panel = panels[row, column]
        if column > row:
            panel.remove()
            continue
        if row == column:
            grid, density = _density(exact[:, row], limits[row])
            panel.fill_between(grid, density, color="0.85", linewidth=0)
            panel.plot(grid, density, color="0.45", linewidth=1)
            for name, sample in values.items():
                panel.plot(*_density(sample[:, row], limits[row]), color=colors[name], linewidth=1.4)
            # A collapsed ensemble has a density without bound; it must not hide the reference.
            panel.set_ylim(0, min(panel.get_ylim()[1], 3 * max(density, default=1.0)))
        else:
            pair, window = [column, row], limits[[column, row]]
            _contours(panel, exact[:, pair], window, probabilities, None)
            for name, sample in values.items():
                _contours(panel, sample[:, pair], window, probabilities, colors[name])
            panel.set_ylim(limits[row])
            panel.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
        panel.set_xlim(limits[column])
        panel.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
        panel.tick_params(labelsize=8, labelbottom=row == count - 1, labelleft=column == 0 < row)
        if row == column:
            panel.set_yticks([])
        if row == count - 1:
            panel.set_xlabel(labels[column])
        if column == 0 < row:
            panel.set_ylabel(labels[row])
    handles = [Patch(facecolor="0.85", edgecolor="0.45", label="reference")]
    handles += [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    legend = {"handles": handles, "frameon": False, "fontsize": 9}
    if count == 1:
        panels[0, 0].legend(**legend)
    else:
        corner = {"loc": "upper right", "bbox_to_anchor": (0.99, 0.99), "alignment": "left"}
        figure.legend(**legend, **corner, title=heading, title_fontsize=8)
    return figure


def _density(sample: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grid and kernel density estimate of one coordinate inside the limits (empty if nothing lies there)."""
    from arviz_stats.base import array_stats

    reach = (limits[1] - limits[0]) / 2
    near = sample[(sample > limits[0] - reach) & (sample < limits[1] + reach)]
    if near.size < 2 or np.ptp(near) == 0:
        return np.empty(0), np.empty(0)
    grid, density, _ = array_stats.kde(near)
    return grid, density * near.size / sample.size


def _contours(panel, pair: np.ndarray, window: np.ndarray, probabilities, color: str | None):
    """Contours of a pair of coordinates, filled with grey when there is no color.

    The density is a histogram smoothed by a Gaussian kernel of the sample's correlation and 0.85 of Scott's
    bandwidth; its levels are those that enclose the given mass.
    """
    from scipy.signal import fftconvolve

    bins = 128
    width = window[:, 1] - window[:, 0]
    outer = window + 0.25 * width[:, None] * np.array([-1, 1])
    counts, *edges = np.histogram2d(*pair.T, bins=bins, range=outer)
    bin_width = 1.5 * width / bins
    inside = np.all((pair > outer[:, 0]) & (pair < outer[:, 1]), axis=1)
    if inside.sum() < 10:
        return
    covariance = np.cov(pair[inside].T / bin_width[:, None]) * (0.85 * inside.sum() ** (-1 / 6)) ** 2
    inverse = np.linalg.inv(covariance + 0.5 * np.eye(2))
    offset = np.stack(np.meshgrid(*[np.arange(-bins // 2, bins // 2 + 1)] * 2, indexing="ij"), axis=-1)
    kernel = np.exp(-np.einsum("...i,ij,...j", offset, inverse, offset) / 2)
    density = np.maximum(fftconvolve(counts, kernel / kernel.sum(), mode="same"), 0) / len(pair)
    falling = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(falling)
    levels = np.unique([falling[np.searchsorted(mass, p)] for p in sorted(probabilities) if p < mass[-1]])
    centers = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    if levels.size == 0:
        return
    if color is None:
        greys = np.linspace(0.88, 0.7, levels.size).astype(str)
        panel.contourf(*centers, density.T, [*levels, np.inf], colors=list(greys))
    panel.contour(*centers, density.T, levels, colors=color or "0.45", linewidths=1.3 if color else 0.8)
