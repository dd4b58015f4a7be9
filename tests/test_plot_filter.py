"""What `plot_filter` draws: bands are quantiles, the forecast stands apart, and what does not fit is refused."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from scipy import stats

from pushforward import plot_filter
from pushforward._errors import ArgumentError, DataError

T, H = 12, 5


@pytest.fixture(autouse=True)
def closed():
    """Figures off the screen, closed after each test."""
    with plt.rc_context({"backend": "agg"}):
        yield
    plt.close("all")


def sampled(values, start=0, times=None):
    """A group with draws of x, shape (chain, draw, time, component)."""
    times = np.arange(start, start + values.shape[2]) if times is None else times
    dims = ("chain", "draw", "time", "x_dim_1")[: values.ndim]
    return xr.Dataset({"x": (dims, values)}, {"time": times})


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(T, 4))
    groups = {
        "posterior": sampled(rng.normal(size=(2, 300, T, 4))),
        "filtering": xr.Dataset({"x": (("time", "i"), mean), "x_sd": (("time", "i"), 0.5 + mean**2)}),
        "observed_data": xr.Dataset({"y": (("time", "i"), mean), "z": ("time", mean[:, 0])}),
    }
    return xr.DataTree.from_dict(groups)


@pytest.fixture
def forecast(tree):
    rng = np.random.default_rng(1)
    later = sampled(rng.normal(size=(2, 300, H, 4)), T)
    later["y"] = later["x"] * 2
    tree["predictions"] = xr.DataTree(later)
    return tree


def band(collection):
    """Times, lower and upper edge of a `fill_between`."""
    vertices = collection.get_paths()[0].vertices
    times = np.unique(vertices[:, 0])
    edges = [[f(vertices[vertices[:, 0] == t, 1]) for t in times] for f in (np.min, np.max)]
    return times, *np.asarray(edges)


def test_bands_are_quantiles_of_all_draws(tree):
    figure = plot_filter(tree)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert [a.get_ylabel() for a in figure.axes] == ["x[0]", "x[1]", "x[2]"]
    draws = tree["posterior"]["x"].to_numpy().reshape(600, T, 4)
    for i, panel in enumerate(figure.axes):
        for collection, mass in zip(panel.collections, (0.9, 0.5), strict=True):
            times, low, high = band(collection)
            np.testing.assert_array_equal(times, np.arange(T))
            np.testing.assert_allclose([low, high], np.quantile(draws[..., i], [(1 - mass) / 2, (1 + mass) / 2], 0))
        np.testing.assert_allclose(panel.lines[0].get_ydata(), np.median(draws[..., i], 0))
    assert figure.axes[-1].get_xlabel() == "time"
    legend = figure.legends[0]
    assert [t.get_text() for t in legend.get_texts()] == ["posterior, median", "50 %, 90 %"]
    assert legend.get_title().get_text() == "first 3 of 4 components, choose with index="
    figure.canvas.draw()


def test_bands_of_moments_are_normal(tree):
    figure = plot_filter(tree, group="filtering", index=[3], levels=(0.8,))
    mean, sd = (tree["filtering"][n].to_numpy()[:, 3] for n in ("x", "x_sd"))
    (panel,) = figure.axes
    assert panel.get_ylabel() == "x[3]"
    _, low, high = band(panel.collections[0])
    np.testing.assert_allclose([low, high], stats.norm.ppf([[0.1], [0.9]], mean, sd))
    np.testing.assert_allclose(panel.lines[0].get_ydata(), mean)
    assert figure.legends[0].get_texts()[0].get_text() == "filtering law, median"
    assert figure.legends[0].get_title().get_text() == ""


def test_truth_and_data_are_drawn(tree):
    truth = np.arange(4.0 * T).reshape(T, 4)
    figure = plot_filter(tree, index=[1], truth=truth, data="y")
    points, line = figure.axes[0].lines[1:]
    np.testing.assert_array_equal(line.get_ydata(), truth[:, 1])
    np.testing.assert_array_equal(points.get_ydata(), tree["observed_data"]["y"][:, 1])
    assert (points.get_linestyle(), points.get_marker()) == ("None", ".")
    assert [t.get_text() for t in figure.legends[0].get_texts()][2:] == ["truth", "data y"]


def test_the_forecast_continues_in_another_colour(forecast):
    truth = np.zeros((T + H, 4))
    panel = plot_filter(forecast, index=[2], truth=truth, data="y", levels=(0.5, 0.9)).axes[0]
    past, _, later, _ = panel.collections
    assert not np.allclose(past.get_facecolor(), later.get_facecolor())
    times, low, high = band(later)
    np.testing.assert_array_equal(times, np.arange(T - 1, T + H))  # it starts where the other bands end
    draws = forecast["predictions"]["x"].to_numpy().reshape(600, H, 4)[..., 2]
    np.testing.assert_allclose([low[1:], high[1:]], np.quantile(draws, [0.05, 0.95], 0))
    np.testing.assert_allclose([low[0], high[0]], [e[-1] for e in band(past)[1:]])
    boundary = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in boundary] == [T - 1]
    dotted = [line for line in panel.lines if line.get_linestyle() == ":"]
    np.testing.assert_allclose(
        [line.get_ydata() for line in dotted], np.quantile(2 * draws, [0.05, 0.95], 0), rtol=1e-12
    )
    assert len(panel.lines[-1].get_xdata()) == T + H
    names = [t.get_text() for t in panel.figure.legends[0].get_texts()]
    assert names[-2:] == ["forecast", "forecast of y, 90 %"]


def test_the_time_axis_has_the_coordinates():
    draws = np.random.default_rng(2).normal(size=(1, 50, T))
    years = xr.DataTree.from_dict({"posterior": sampled(draws, times=np.arange(1900, 1900 + T))})
    np.testing.assert_array_equal(plot_filter(years).axes[0].lines[0].get_xdata(), np.arange(1900, 1900 + T))
    names = [f"m{i}" for i in range(T)]
    panel = plot_filter(xr.DataTree.from_dict({"posterior": sampled(draws, times=names)})).axes[0]
    panel.figure.canvas.draw()
    shown = [t.get_text() for t in panel.get_xticklabels() if t.get_text()]
    assert 2 < len(shown) <= 9
    assert set(shown) <= set(names)
    dates = np.datetime64("2020-01-01", "ns") + np.arange(T) * np.timedelta64(1, "D")
    plot_filter(xr.DataTree.from_dict({"posterior": sampled(draws, times=dates)})).canvas.draw()


def test_axes_may_be_given(tree):
    figure, axes = plt.subplots(1, 2)
    before = dict(matplotlib.rcParams)
    assert plot_filter(tree, index=[0, 1], ax=axes) is figure
    assert [a.get_ylabel() for a in axes] == ["x[0]", "x[1]"]
    assert axes[0].get_legend() is not None
    assert dict(matplotlib.rcParams) == before
    assert plot_filter(tree, index=0, ax=axes[0]) is figure
    assert plot_filter(tree, figsize=(3, 7)).get_size_inches().tolist() == [3, 7]
    with pytest.raises(ArgumentError, match="ax= has 2 axes for 3 components"):
        plot_filter(tree, ax=axes)


def test_components_of_several_axes(tree):
    values = np.random.default_rng(3).normal(size=(1, 40, T, 2, 3))
    dims = ("chain", "draw", "time", "a", "b")
    grid = xr.DataTree.from_dict({"posterior": xr.Dataset({"x": (dims, values)}, {"time": np.arange(T)})})
    panel = plot_filter(grid, index=[(1, -1)]).axes[0]
    assert panel.get_ylabel() == "x[1,2]"
    np.testing.assert_allclose(panel.lines[0].get_ydata(), np.median(values[0, :, :, 1, 2], 0))
    with pytest.raises(ArgumentError, match=r"component \(1,\), but 'x' has shape \(2, 3\).*index=\[\(1, 1\)\]"):
        plot_filter(grid, index=[1])


def test_what_does_not_fit_is_refused(forecast):
    tree = forecast

    def refused(kind, message, variable="x", **kwargs):
        with pytest.raises(kind, match=message):
            plot_filter(kwargs.pop("tree", tree), variable, **kwargs)

    refused(ArgumentError, "takes a result of infer.*got dict", tree={})
    refused(ArgumentError, "'posterior' has no variable 'w'; it has", "w")
    refused(ArgumentError, r"group= takes one of .*'one_step'\]; got 'prior'", group="prior")
    refused(ArgumentError, r"no group 'one_step'; .*it has \['posterior', 'filtering'\]", group="one_step")
    refused(ArgumentError, "names 7 components; expected 1 to 6", index=range(7))
    refused(ArgumentError, "names 0 components", index=[])
    refused(ArgumentError, r"component \(4,\), but 'x' has shape \(4,\).*index=\[2\]", index=[4])
    refused(ArgumentError, r"component \(0.5,\)", index=[0.5])
    refused(ArgumentError, "levels= takes masses between 0 and 1", levels=(0.5, 90))
    refused(ArgumentError, "levels= takes masses", levels=())
    refused(ArgumentError, r"data= names 'w'; 'observed_data' has \['y', 'z'\]", data="w")
    refused(DataError, r"data 'z' have shape \(12,\) and the variable \(12, 4\)", data="z")
    refused(DataError, r"truth= has shape \(12,\); expected \(12, 4\) or \(17, 4\)", truth=np.zeros(12))
    last = xr.DataTree.from_dict({"posterior": xr.Dataset({"x": (("chain", "draw"), np.zeros((1, 9)))})})
    refused(DataError, "no time axis: its dims are .*store='draws'", tree=last)
    last = xr.DataTree.from_dict({"posterior": sampled(np.zeros((1, 9, 4)))})
    last.attrs["options"] = '{"store": "moments"}'
    refused(DataError, "no time axis", tree=last)
    bare = xr.DataTree.from_dict({"filtering": xr.Dataset({"x": ("time", np.zeros(3))})})
    refused(DataError, "no 'x_sd' beside it", tree=bare, group="filtering")
    tree["predictions"] = xr.DataTree(sampled(np.zeros((2, 300, H, 3)), T))
    refused(DataError, r"shape \(4,\) at a step of 'posterior' and \(3,\)")
