"""The table and the plot: exact moment columns, floors, what is read, what is drawn, what is refused."""

import json

import arviz as az
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from pushforward import metrics
from pushforward.compare import compare, plot_compare

mpl.use("agg")

COLUMNS = [
    "mean_error",
    "mean_error_variable",
    "mean_error_floor",
    "sd_error",
    "sd_error_variable",
    "sd_error_floor",
    "sliced_wasserstein",
    "sliced_wasserstein_floor",
    "energy_distance",
    "energy_distance_floor",
    "c2st",
    "c2st_floor",
    "c2st_se",
    "log_evidence",
    "log_evidence_se",
    "evaluations",
    "gradient_evaluations",
    "compile_seconds",
    "run_seconds",
]
JOINT = ["sliced_wasserstein", "energy_distance", "c2st"]


def tree(draws, attrs=None, **options):
    result = az.from_dict({"posterior": draws}, **options)
    result.attrs = attrs or {}
    return result


def normals(key, *shape):
    return np.random.default_rng(key).standard_normal(shape)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def quick(monkeypatch):
    """A classifier that costs nothing, for tests of everything else."""
    monkeypatch.setattr(metrics, "c2st", lambda draws, reference, key: metrics.C2ST(0.5, 0.01))


@pytest.mark.usefixtures("quick")
def test_moment_columns_are_exact_and_name_the_element():
    theta, sigma = normals(0, 4, 50, 5), 3 + normals(1, 4, 50)
    exact = tree({"theta": theta, "sigma": sigma})
    other = theta.copy()
    other[..., 3] += 0.7 * theta[..., 3].std(ddof=1)
    stretched = 5 + 2.0 * (sigma - sigma.mean())  # mean off by 2 of about 1, sd by log 2
    table = compare(
        {"shift": tree({"theta": other, "sigma": sigma}), "wide": tree({"sigma": stretched, "theta": theta})}, exact
    )
    assert list(table.columns) == COLUMNS
    assert list(table.index) == ["shift", "wide"]
    assert table.loc["shift", "mean_error"] == pytest.approx(0.7)
    assert table.loc["shift", "mean_error_variable"] == "theta[3]"
    assert table.loc["shift", "sd_error"] == pytest.approx(0, abs=1e-12)
    assert table.loc["wide", "sd_error"] == pytest.approx(np.log(2))
    assert table.loc["wide", "sd_error_variable"] == "sigma"
    assert table.loc["wide", "mean_error"] == pytest.approx(abs(5 - sigma.mean()) / sigma.std(ddof=1))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("chains", [1, 2, 3])
def test_moment_floors_compare_halves_of_the_reference_at_the_sizes_of_the_score(chains):
    a = normals(2, chains, 60) + np.arange(chains)[:, None]
    first, second = (a[:, :30], a[:, 30:]) if chains == 1 else (a[0::2], a[1::2])
    row = compare({"small": tree({"a": normals(3, 1, 25)})}, tree({"a": a})).loc["small"]
    size = (1 / 25 + 1 / a.size) / (1 / first.size + 1 / second.size)
    gap = abs(first.mean() - second.mean()) / a.std(ddof=1)
    assert row["mean_error_floor"] == pytest.approx(gap * size**0.5)
    gap = abs(np.log(first.std(ddof=1) / second.std(ddof=1)))
    assert row["sd_error_floor"] == pytest.approx(gap * size**0.5)


def test_joint_columns_stay_at_the_floor_for_the_same_law_only():
    # Over 200 keys the energy and sliced Wasserstein distance of an exact method exceeded 2 floors in none (mean
    # 1.03), and those of the wrong one 3.7 floors in all.
    reference = tree({"a": normals(4, 4, 500, 3)})
    wrong = tree({"a": 1.5 * normals(5, 4, 500, 3) + 0.3})
    table = compare({"same": tree({"a": normals(6, 4, 500, 3)}), "wrong": wrong}, reference)
    for column in ("sliced_wasserstein", "energy_distance"):
        assert table.loc["same", column] < 2 * table.loc["same", f"{column}_floor"]
        assert table.loc["wrong", column] > 2.5 * table.loc["wrong", f"{column}_floor"]
    # Both standard errors are 0.011; tolerance 4 sqrt(2) of them (false alarm 1e-4).
    assert table.loc["same", "c2st"] == pytest.approx(table.loc["same", "c2st_floor"], abs=0.064)
    assert table.loc["same", "c2st_floor"] == pytest.approx(0.5, abs=0.045)
    assert table.loc["wrong", "c2st"] > 0.6
    assert table.loc["wrong", "c2st_se"] == pytest.approx(0.011, abs=1e-3)


@pytest.mark.usefixtures("quick")
def test_joint_distances_are_those_of_metrics_after_standardising():
    theta, other = normals(7, 2, 40, 2) * [10.0, 0.1], normals(8, 1, 15, 2) * [10.0, 0.1]
    flat = theta.reshape(-1, 2)
    center, scale = flat.mean(0), flat.std(0, ddof=1)
    row = compare({"m": tree({"theta": other})}, tree({"theta": theta}), draws=30).loc["m"]
    kept = metrics.thin((flat - center) / scale, 30)
    expected = metrics.energy_distance((other[0] - center) / scale, kept)
    assert row["energy_distance"] == pytest.approx(expected)
    expected = metrics.sliced_wasserstein((other[0] - center) / scale, kept, projections=200)
    assert row["sliced_wasserstein"] == pytest.approx(expected)
    # Two disjoint subsets of 15 draws of the first half, each against 30 draws of the second.
    halves = (theta - center) / scale
    halves_thinned = [metrics.thin(halves[0, i::2], 15) for i in (0, 1)]
    floors = [metrics.energy_distance(half, metrics.thin(halves[1], 30)) for half in halves_thinned]
    assert row["energy_distance_floor"] == pytest.approx(np.mean(floors))


@pytest.mark.usefixtures("quick")
def test_the_reference_itself_scores_its_floors():
    reference = tree({"a": normals(9, 2, 100, 2)})
    row = compare({"nuts": reference}, reference).loc["nuts"]
    assert row["mean_error"] == row["sd_error"] == 0
    for column in JOINT:
        assert row[column] == row[f"{column}_floor"]
    assert row["energy_distance"] > 0


@pytest.mark.usefixtures("quick")
def test_small_ensembles_and_single_draws():
    reference = tree({"a": normals(10, 2, 200)})
    table = compare({"point": tree({"a": np.full((1, 1), 0.5)}), "nine": tree({"a": normals(11, 1, 9)})}, reference)
    assert np.isinf(table.loc["point", "sd_error"])
    assert np.isnan(table["c2st"]).all()
    assert np.isnan(table["c2st_floor"]).all()
    assert np.isfinite(table[["mean_error", "sliced_wasserstein_floor", "energy_distance"]].to_numpy()).all()


@pytest.mark.usefixtures("quick")
def test_attributes_are_read_as_numbers_or_json_and_are_nan_when_missing():
    draws = {"a": normals(12, 2, 30)}
    attrs = {
        "log_evidence": 4.5,
        "evaluations": 1000,
        "gradient_evaluations": json.dumps(None),
        "compile_seconds": json.dumps(2.5),
        "run_seconds": np.float32(0.5),
        "log_evidence_se": "unknown",
        "method": "eks",
    }
    row = compare({"eks": tree(draws, attrs)}, tree(draws)).loc["eks"]
    assert row["log_evidence"] == 4.5
    assert row["evaluations"] == 1000
    assert row["compile_seconds"] == 2.5
    assert row["run_seconds"] == 0.5
    assert np.isnan(row["gradient_evaluations"])
    assert np.isnan(row["log_evidence_se"])
    assert np.isnan(compare({"eks": tree(draws)}, tree(draws)).loc["eks", "log_evidence"])


@pytest.mark.usefixtures("quick")
def test_constant_and_unshared_variables_are_left_out():
    draws = {"a": normals(13, 2, 50), "one": np.full((2, 50), 1.0), "count": np.arange(100).reshape(2, 50)}
    rounded = np.full((2, 50), 0.1, np.float32) * np.float32(3)
    rounded[0, 0] = np.nextafter(rounded[0, 0], np.float32(1))
    reference = tree(draws | {"rounded": rounded, "only_here": normals(14, 2, 50)})
    other = tree(draws | {"one": np.full((2, 50), 7.0), "rounded": rounded + 1, "elsewhere": normals(15, 2, 50)})
    assert compare({"m": other}, reference).loc["m", "mean_error"] == 0
    with pytest.raises(ValueError, match="constant in the reference, so nothing is left"):
        compare({"m": other}, reference, var_names=["one"])


@pytest.mark.usefixtures("quick")
def test_var_names_choose_variables_and_elements_by_coordinates():
    options = {"coords": {"school": ["A", "B"]}, "dims": {"theta": ["school"]}}
    theta = normals(16, 2, 50, 2)
    reference = tree({"theta": theta, "mu": theta[..., 0]}, **options)
    other = tree({"theta": theta + np.array([1.0, 5.0]), "mu": theta[..., 0]}, **options)
    assert compare({"m": other}, reference).loc["m", "mean_error_variable"] == "theta[B]"
    assert compare({"m": other}, reference, var_names=["theta[A]", "mu"]).loc["m", "mean_error_variable"] == "theta[A]"
    assert compare({"m": other}, reference, var_names=["mu"]).loc["m", "mean_error"] == 0
    assert compare({"m": other}, reference, var_names="mu").loc["m", "mean_error_variable"] == "mu"


@pytest.mark.usefixtures("quick")
def test_many_coordinates_are_thinned_with_a_warning():
    reference = tree({"x": normals(17, 2, 20, 300)})
    with pytest.warns(UserWarning, match="of 300 coordinates the joint distances use 256"):
        compare({"m": tree({"x": normals(18, 2, 20, 300)})}, reference)


def test_unusable_trees_are_refused():
    good = tree({"a": normals(19, 2, 30), "b": normals(20, 2, 30, 2)})
    broken = good.copy(deep=True)
    broken["posterior"]["b"].values[0, 3] = np.nan
    other = tree({"c": normals(21, 2, 30)})
    shaped = tree({"a": normals(22, 2, 30), "b": normals(23, 2, 30, 3)})
    prior = az.from_dict({"prior": {"a": normals(24, 2, 30)}})
    flat = xr.DataTree.from_dict({"posterior": xr.Dataset({"a": ("sample", normals(25, 30))})})
    words = tree({"a": np.full((2, 30), "x")})
    cases = [
        (TypeError, r"`trees` is a DataTree; .* Write \{\"name\": tree\}", good, good, {}),
        (TypeError, "`trees` is an empty dict", {}, good, {}),
        (TypeError, r"trees\['m'\] is a dict; expected an xarray.DataTree", {"m": {"a": 1}}, good, {}),
        (TypeError, "reference is a NoneType", {"m": good}, None, {}),
        (ValueError, r"reference has the groups \['prior'\]; expected a group `posterior`", {"m": good}, prior, {}),
        (ValueError, r"no variable is in .*reference: \['a', 'b'\]; trees\['m'\]: \['c'\]", {"m": other}, good, {}),
        (ValueError, r"'b' has shape \(3,\) in trees\['m'\] and \(2,\) in the reference", {"m": shaped}, good, {}),
        (ValueError, r"'b' of trees\['m'\] holds 2 NaN or infinite values out of 120", {"m": broken}, good, {}),
        (ValueError, r"has the dims \('sample',\); expected \(chain, draw", {"m": flat}, good, {}),
        (ValueError, "expected real numbers", {"m": words}, good, {}),
        (ValueError, r"\['tehta'\] cannot be compared. They hold", {"m": good}, good, {"var_names": ["a", "tehta"]}),
        (ValueError, "an empty list cannot be compared", {"m": good}, good, {"var_names": []}),
    ]
    for error, message, trees, reference, options in cases:
        with pytest.raises(error, match=message):
            compare(trees, reference, **options)
        with pytest.raises(error, match=message):
            plot_compare(trees, reference, **options)
    with pytest.raises(ValueError, match="draws=5; expected at least 20 draws of the reference"):
        compare({"m": good}, good, draws=5)
    with pytest.raises(ValueError, match="reference has 1 x 19 draws"):
        compare({"m": good}, tree({"a": normals(26, 1, 19)}))
    with pytest.raises(TypeError, match="probabilities between 0 and 1"):
        plot_compare({"m": good}, good, probabilities=(0.5, 90))


def test_plot_has_marginals_and_pairs_with_limits_from_the_reference():
    reference = tree({"theta": normals(27, 2, 500, 3), "mu": 5 + normals(28, 2, 500), "c": np.ones((2, 500))})
    far = tree({"theta": 100 + normals(29, 1, 100, 3), "mu": np.full((1, 100), 5.0), "c": np.ones((1, 100))})
    near = tree({"theta": normals(30, 2, 500, 3), "mu": 5 + normals(31, 2, 500), "c": np.ones((2, 500))})
    figure = plot_compare({"far": far, "near": near}, reference, max_variables=3)
    assert len(figure.axes) == 6
    assert [a.get_xlabel() for a in figure.axes if a.get_xlabel()] == ["theta[0]", "theta[1]", "theta[2]"]
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["reference", "far", "near"]
    assert "50 %, 90 %\nfirst 3 of 4 coordinates" in legend.get_title().get_text()
    low, high = np.quantile(reference["posterior"]["theta"].values[..., 0], [0.005, 0.995])
    assert figure.axes[0].get_xlim() == pytest.approx((low - 0.2 * (high - low), high + 0.2 * (high - low)))
    # A collapsed method does not hide the reference: the axis ends at 3 times its largest density, 0.4.
    alone = plot_compare({"far": far}, reference, var_names=["mu"])
    assert len(alone.axes) == 1
    assert alone.axes[0].get_ylim()[1] < 1.6
    figure.canvas.draw()


def test_plot_marginals_are_densities_and_contours_hold_the_stated_mass():
    draws = normals(32, 2, 3000, 2) @ np.array([[1.0, 0.9], [0.0, 0.3]])
    reference = tree({"x": draws})
    figure = plot_compare({"again": tree({"x": draws})}, reference, probabilities=(0.5, 0.9))
    panel = next(a for a in figure.axes if a.get_xlabel() == "x[0]" and a.get_ylabel() == "x[1]")
    contour = panel.collections[-1]
    for path, mass in zip(contour.get_paths()[::-1], (0.5, 0.9), strict=True):
        inside = path.contains_points(draws.reshape(-1, 2)).mean()
        # Smoothing widens contours a little; binomial standard error 0.0065.
        assert inside == pytest.approx(mass, abs=0.04)
    for line in figure.axes[0].lines:
        grid, density = line.get_data()
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.01)
        assert np.interp(0, grid, density) == pytest.approx(0.4, abs=0.04)
