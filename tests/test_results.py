"""Results are ArviZ 1.x trees: names, dims, coordinates, ArviZ's own functions, files, prediction and prior."""

import arviz as az
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import pushforward as pf
from pushforward import posterior
from pushforward._errors import ArgumentError
from pushforward.diagnostics import worst_convergence

SCHOOLS = ["a", "b", "c", "d"]
EFFECTS, ERRORS = np.array([28.0, 8.0, -3.0, 7.0]), np.array([15.0, 10.0, 16.0, 11.0])


def schools(errors, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfNormal(5))
    with numpyro.plate("school", len(errors)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, errors), obs=y)
    numpyro.deterministic("spread", theta.max() - theta.min())


@pytest.fixture(scope="module")
def tree():
    return pf.infer(
        schools, method="laplace", draws=1600, predictive=True, progress=False,
        coords={"school": SCHOOLS}, errors=ERRORS.copy(), y=EFFECTS.copy(),
    )  # fmt: skip


def test_groups_dims_and_coordinates(tree):
    assert set(tree.children) == {
        "posterior", "sample_stats", "log_likelihood", "log_prior", "observed_data", "constant_data",
        "posterior_predictive",
    }  # fmt: skip
    dims = {
        "posterior": {"mu": (), "tau": (), "theta": ("school",), "spread": ()},
        "log_prior": {"mu": (), "tau": (), "theta": ("school",)},
        "log_likelihood": {"y": ("school",)},
        "posterior_predictive": {"y": ("school",)},
    }
    for group, variables in dims.items():
        assert {n: v.dims[2:] for n, v in tree[group].data_vars.items()} == variables
        assert (tree[group].sizes["chain"], tree[group].sizes["draw"]) == (1, 1600)
    assert tree["observed_data"]["y"].dims == ("school",)
    for group in ("posterior", "observed_data", "posterior_predictive"):
        assert list(tree[group]["school"].to_numpy()) == SCHOOLS
    np.testing.assert_allclose(tree["constant_data"]["errors"], ERRORS)


def test_densities_belong_to_the_draws(tree):
    theta, mu, tau = (tree["posterior"][n].to_numpy() for n in ("theta", "mu", "tau"))
    exact = dist.Normal(theta, ERRORS.astype(np.float32)).log_prob(EFFECTS.astype(np.float32))
    np.testing.assert_allclose(tree["log_likelihood"]["y"], exact, rtol=1e-4)
    exact = dist.Normal(mu[..., None], tau[..., None]).log_prob(theta)
    np.testing.assert_allclose(tree["log_prior"]["theta"], exact, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(tree["posterior"]["spread"], theta.max(-1) - theta.min(-1), rtol=1e-4, atol=1e-5)


def test_predictive_draws_have_the_law_of_the_data_given_the_draws(tree):
    residual = (tree["posterior_predictive"]["y"] - tree["posterior"]["theta"]) / ERRORS
    # 1600 independent N(0, 1) for each of four schools: |z| < 4.5 eight times, false-alarm rate 5e-5.
    np.testing.assert_allclose(residual.mean(("chain", "draw")), 0, atol=4.5 / 1600**0.5)
    np.testing.assert_allclose(residual.std(("chain", "draw")), 1, rtol=4.5 / 3200**0.5)


# One datum to each theta: leaving it out changes its posterior much, whatever the method.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
def test_arviz_reads_it(tree):
    summary = az.summary(tree)
    assert list(summary.index) == ["mu", "spread", "tau", *(f"theta[{s}]" for s in SCHOOLS)] or set(summary.index) >= {
        "mu", "tau", "theta[a]",
    }  # fmt: skip
    loo = az.loo(tree)
    assert np.isfinite(loo.elpd)
    assert loo.n_data_points == 4
    sensitivity = az.psense_summary(tree, var_names=["mu", "tau"])
    assert {"prior", "likelihood"} <= set(sensitivity.columns)


@pytest.mark.parametrize("plot", ["plot_trace_dist", "plot_ppc_dist"])
def test_arviz_plots_it(tree, plot):
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    getattr(az, plot)(tree)
    plt.close("all")


def test_files_hold_all_of_it(tree, tmp_path):
    # every method's result goes through netCDF in the contract test; here with coordinates of text and predictions
    tree.to_netcdf(tmp_path / "result.nc")
    with xr.open_datatree(tmp_path / "result.nc") as opened:
        back = opened.load()
    for group in tree.children:
        assert back[group].dataset.equals(tree[group].dataset), group
    assert pf.attributes(back) == pf.attributes(tree)
    assert type(pf.attributes(back)["warnings"]) is list


def test_attributes_survive_encoding():
    values = {
        "a": 1,
        "b": 2.5,
        "c": "text",
        "d": None,
        "e": True,
        "f": {"x": [1, None]},
        "g": [],
        "h": "[not json",
        "i": "",
    }
    tree = posterior.tree({}, values)
    assert all(isinstance(v, int | float | str) and not isinstance(v, bool) for v in tree.attrs.values())
    assert pf.attributes(tree) == values


# ------------------------------------------------------------------------------------------------- prediction, prior


def test_predict_with_the_same_and_with_new_arguments(tree):
    same = pf.predict(tree, schools, ERRORS.copy(), key=1)
    assert same["posterior_predictive"]["y"].shape == (1, 1600, 4)
    assert not np.allclose(same["posterior_predictive"]["y"], tree["posterior_predictive"]["y"])
    new = pf.predict(tree, schools, ERRORS / 1000, group="predictions")
    np.testing.assert_allclose(new["predictions"]["y"], tree["posterior"]["theta"], atol=0.2)
    assert "predictions" not in tree.children
    assert new["posterior"].dataset.equals(tree["posterior"].dataset)


def test_predict_draws_sites_that_the_posterior_does_not_have():
    def model(x, new=False, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        shift = numpyro.sample("shift", dist.Normal(0, 1)) if new else 0.0
        with numpyro.plate("datum", len(x)):
            numpyro.sample("y", dist.Normal(slope * x + shift, 0.1), obs=y)

    x = np.arange(5.0)
    tree = pf.infer(model, method="laplace", draws=2000, progress=False, x=x[:3], y=2 * x[:3])
    predicted = pf.predict(tree, model, x=x, group="predictions")["predictions"]["y"]
    assert predicted.shape == (1, 2000, 5)
    assert predicted.dims[2:] == ("datum",)
    line = tree["posterior"]["slope"].to_numpy()[..., None] * x
    np.testing.assert_allclose(predicted, line, atol=0.1 * 6)
    shifted = pf.predict(tree, model, x=x, new=True, group="predictions")["predictions"]["y"]
    # shift + noise ~ N(0, 1.01) over 2000 draws: within 4.5 sd of its standard deviation, false-alarm rate 7e-6
    assert (shifted.to_numpy() - line)[..., 0].std() == pytest.approx(1.01**0.5, rel=4.5 / 4000**0.5)


def test_prior_and_prior_predictive():
    tree = pf.prior(schools, ERRORS.copy(), observed="y", draws=4000)
    assert set(tree.children) == {"prior", "prior_predictive", "constant_data"}
    assert set(tree["prior"].data_vars) == {"mu", "tau", "theta", "spread"}
    # mu ~ N(0, 25), y - theta ~ N(0, errors^2): |z| < 4.5 five times, false-alarm rate 3e-5.
    assert float(tree["prior"]["mu"].mean()) == pytest.approx(0, abs=4.5 * 5 / 4000**0.5)
    residual = (tree["prior_predictive"]["y"] - tree["prior"]["theta"]) / ERRORS
    np.testing.assert_allclose(residual.std(("chain", "draw")), 1, rtol=4.5 / 8000**0.5)
    assert set(pf.prior(schools, ERRORS.copy(), y=EFFECTS.copy(), draws=3).children) == {
        "prior", "prior_predictive", "observed_data", "constant_data",
    }  # fmt: skip


def test_a_large_log_likelihood_is_left_out_and_can_be_added(regression, monkeypatch):
    model, inputs = regression
    monkeypatch.setattr(posterior, "LIKELIHOOD_LIMIT", 59)
    small = pf.infer(model, method="laplace", draws=9, progress=False, **inputs)
    assert "log_likelihood" in small.children
    tree = pf.infer(model, method="laplace", draws=10, progress=False, **inputs)
    assert "log_likelihood" not in tree.children
    assert "would have 60 entries and was left out; pf.add_log_likelihood" in pf.attributes(tree)["notes"][0]
    added = pf.add_log_likelihood(tree, model, **inputs)
    line = (
        tree["posterior"]["slope"].to_numpy()[..., None] * inputs["x"]
        + tree["posterior"]["offset"].to_numpy()[..., None]
    )
    exact = -0.5 * ((inputs["y"] - line) / 0.5) ** 2 - np.log(0.5) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(added["log_likelihood"]["y"], exact, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- names of axes


def test_dims_and_coords_of_the_user(regression):
    model, inputs = regression
    dates = np.array(["2020-01-01", "2020-01-02"] * 3, dtype="datetime64[ns]")
    tree = pf.infer(
        model, method="laplace", draws=3, progress=False,
        dims={"y": ["date"], "x": "date"}, coords={"date": dates}, **inputs
    )  # fmt: skip
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "date")
    assert tree["constant_data"]["x"].dims == ("date",)
    np.testing.assert_array_equal(tree["observed_data"]["date"], dates)


def test_axes_without_a_name_get_one(regression):
    model, inputs = regression
    tree = pf.infer(model, method="laplace", draws=3, progress=False, **inputs)
    assert tree["observed_data"]["y"].dims == ("y_dim_0",)
    with pytest.raises(ArgumentError, match="coords= names the dimension 'date'"):
        pf.infer(model, method="laplace", draws=3, progress=False, coords={"date": [1]}, **inputs)


def test_chains_that_stand_still_have_no_finite_rhat():
    """Without a warning of NumPy's; a short run of a noisy method may leave them."""
    still = xr.Dataset({"a": (("chain", "draw"), np.repeat([[1.0], [2.0]], 20, axis=1))})
    found = worst_convergence(still)
    assert found["rhat_max"] == np.inf
    assert found["rhat_variable"] == "a"
    assert found["ess_min"] < 5
