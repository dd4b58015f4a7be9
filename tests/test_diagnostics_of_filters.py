"""Numbers about filters: innovations against a dense Gaussian, ranks and scores of predicted data, and the figure."""

import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scoringrules
import xarray as xr
from numpyro.contrib.control_flow import scan
from scipy import stats
from scipy.linalg import solve_triangular

import pushforward as pf
from pushforward import filter_diagnostics
from pushforward._errors import ArgumentError, DataError
from pushforward.filter_diagnostics import predictive_scores, ranks, scores, spread_and_skill, with_scores
from pushforward.math.ensemble import log_likelihood, whiten
from pushforward.math.innovations import ensemble_chi_square
from pushforward.plot_diagnostics import plot_diagnostics

T, DRAWS, MEMBERS, SD = 400, 399, 100, 0.5
DYNAMICS, NOISE, SENSORS = 0.8, 0.6, np.array([1.0, -0.5])


def sensors(sd, y):
    """One state, two sensors."""

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(DYNAMICS * x, NOISE))
        numpyro.sample("y", dist.Normal(x * SENSORS, sd).to_event(1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


def simulated():
    """States and data, a gap of three steps and a single missing datum among them."""
    rng = np.random.default_rng(1)
    x, states = rng.normal(), []
    for _ in range(T):
        x = DYNAMICS * x + NOISE * rng.normal()
        states.append(x)
    y = np.array(states)[:, None] * SENSORS + SD * rng.normal(size=(T, 2))
    y[10:13], y[20, 0] = np.nan, np.nan
    return np.array(states), y


STATES, Y = simulated()


def dense():
    """Chi-square and log density of each step, from one Cholesky factor of all data: no recursion."""
    powers = np.subtract.outer(np.arange(T), np.arange(T))
    maps = np.where(powers >= 0, DYNAMICS ** np.maximum(powers, 0), 0.0)
    root = np.column_stack([DYNAMICS ** np.arange(1, T + 1), NOISE * maps])
    cov = np.kron(root @ root.T, np.outer(SENSORS, SENSORS)) + SD**2 * np.eye(2 * T)
    present = ~np.isnan(Y.ravel())
    factor = np.linalg.cholesky(cov[np.ix_(present, present)])
    white = solve_triangular(factor, Y.ravel()[present], lower=True)
    step = np.repeat(np.arange(T), 2)[present]
    square, count = np.bincount(step, white**2, T), np.bincount(step, minlength=T)
    log_root = np.bincount(step, np.log(np.diag(factor)), T)
    return square, count, -0.5 * square - log_root - 0.5 * count * np.log(2 * np.pi)


def run(method, sd):
    return pf.infer(sensors, np.asarray(sd), method=method, y=Y.copy(), draws=DRAWS, progress=False)


@pytest.fixture(scope="module")
def filtered():
    """Results by name, in float64; `wrong` believes less than half of the data's noise."""
    ways = {
        "kalman": (pf.Kalman(), SD),
        "wrong": (pf.Kalman(), 0.4 * SD),
        "particles": (pf.ParticleFilter(1000, smoother=pf.AncestorTracing()), SD),
    }
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ParticleFilter: the trajectories go back")  # which nothing here looks at
        return {name: run(method, sd) for name, (method, sd) in ways.items()}


@pytest.fixture(scope="module")
def ensemble():
    """The same by an ensemble filter."""
    with jax.enable_x64(True):
        return run(pf.EnKF(MEMBERS, smoother=pf.EnKS(lag=1)), SD)


# ------------------------------------------------------------------------------------------------- innovations


def check_innovations(found):
    square, count, increments = dense()
    np.testing.assert_array_equal(found["innovation_count"], count)
    np.testing.assert_allclose(found["log_likelihood_increment"], increments, atol=1e-8)
    np.testing.assert_allclose(found["innovation_chi_square"], np.where(count > 0, square, np.nan), atol=1e-8)


def test_innovations_of_kalman_are_those_of_the_joint_law(filtered):
    found = filtered["kalman"]["filter_stats"]
    assert found["innovation_chi_square"].dims == ("time",)
    check_innovations(found)
    total = float(found["log_likelihood_increment"].sum())
    assert total == pytest.approx(pf.attributes(filtered["kalman"])["log_evidence"], abs=1e-8)


@pytest.mark.slow
def test_innovations_do_not_depend_on_what_is_stored(float64):
    check_innovations(run(pf.Kalman(store="last"), SD)["filter_stats"])


def test_the_sum_of_squares_is_chi_square(filtered):
    """False alarm 1e-6; 793 data. The wrong filter's sum is some 4 times as large, 60 standard deviations off."""
    sums = {n: float(filtered[n]["filter_stats"]["innovation_chi_square"].sum()) for n in ("kalman", "wrong")}
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], 793)
    assert low < sums["kalman"] < high
    assert sums["wrong"] > 2 * high


@pytest.mark.slow
def test_independent_blocks_are_summed(float64):
    def walks(y):
        def step(x, y):
            with numpyro.plate("places", 3):
                x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
                numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
            return x, None

        with numpyro.plate("places", 3):
            x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))
        scan(step, x0, y)

    y = np.random.default_rng(2).normal(size=(6, 3))
    y[2], y[4, 1] = np.nan, np.nan
    ways = (pf.Kalman(), pf.Kalman("extended", store="last"))
    blocks, whole = (pf.infer(walks, method=m, y=y.copy(), draws=2, progress=False)["filter_stats"] for m in ways)
    assert blocks["innovation_count"].to_numpy().tolist() == [3, 3, 0, 3, 2, 3]
    for name in ("innovation_chi_square", "log_likelihood_increment"):
        np.testing.assert_allclose(blocks[name], whole[name], atol=1e-10)


@pytest.mark.parametrize(
    ("members", "m", "noise"),
    [
        (5, 12, "covariance"),
        pytest.param(12, 5, "variances", marks=pytest.mark.slow),
        pytest.param(12, 5, "covariance", marks=pytest.mark.slow),
        pytest.param(5, 12, "variances", marks=pytest.mark.slow),
    ],
)
def test_chi_square_of_an_ensemble_is_its_definition(members, m, noise, float64):
    rng = np.random.default_rng(3)
    predicted, data = rng.normal(size=(members, m)), 3 * rng.normal(size=m)
    data[1] = np.nan
    root = rng.normal(size=(m, m))
    R = rng.uniform(0.5, 2, m) if noise == "variances" else root @ root.T + np.eye(m)
    keep = ~np.isnan(data)
    S = (np.cov(predicted.T) + (np.diag(R) if R.ndim == 1 else R))[np.ix_(keep, keep)]
    d = (data - predicted.mean(0))[keep]

    @jax.jit
    def both(*values):
        w = whiten(*values)
        return ensemble_chi_square(w), log_likelihood(w)

    square, found = map(float, both(predicted, data, R))
    assert square == pytest.approx(d @ np.linalg.solve(S, d), rel=1e-12)
    density = -0.5 * (square + np.linalg.slogdet(S)[1] + keep.sum() * np.log(2 * np.pi))
    assert found == pytest.approx(density, rel=1e-12)


@pytest.mark.slow
def test_chi_square_of_the_ensemble_filter_tends_to_kalmans(filtered, ensemble):
    """Variances of N members have a relative error of (2 / N)^1/2 = 14 % a step, and their inverses a bias of 4 / N.

    Over 400 steps, correlated over some three, the first averages out to 1.2 %: 10 % is the bias and 5 of that.
    """
    trees = (ensemble, filtered["kalman"])
    found, exact = (tree["filter_stats"]["innovation_chi_square"].to_numpy() for tree in trees)
    assert np.nanmean(np.abs(found - exact)) < 0.3 * np.nanmean(exact)
    assert np.nansum(found) == pytest.approx(np.nansum(exact), rel=0.1)
    evidence = pf.attributes(ensemble)["log_evidence"]
    assert float(ensemble["filter_stats"]["log_likelihood_increment"].sum()) == pytest.approx(evidence)


# ---------------------------------------------------------------------------------------------- predicted data


def check_predicted(tree):
    """False alarm: 3 Kolmogorov-Smirnov tests and a correlation at 1e-6 each."""
    one_step = tree["one_step"]
    x, y = one_step["x"].to_numpy()[0], one_step["y"].to_numpy()[0]
    assert one_step["y"].dims == ("chain", "draw", *tree["observed_data"]["y"].dims)
    white = (y - x[..., None] * SENSORS) / SD
    for part in (white[:, 5, 0], white[:, 11, 1], white[7, :, 0]):
        assert stats.kstest(part, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(white[:, 5, 0], x[:, 5])[0, 1]) < 4.9 / np.sqrt(len(x))
    assert y[:, 5, 0].std() > 1.2 * SD


@pytest.mark.parametrize("name", ["kalman", "particles"])
def test_predicted_data_lie_around_the_predicted_states(filtered, name):
    check_predicted(filtered[name])


@pytest.mark.slow
def test_members_predict_data_around_their_states(ensemble):
    check_predicted(ensemble)


def counts(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.3))
        numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(1.0, 0.3)), y)


COUNTS = np.array([3, 2, 4, 1, 0, 2])


def check_counts(tree):
    """Standardised counts have mean 0 and variance 1; kurtosis 3 + 1 / rate. False alarm 2e-6."""
    rate, y = np.exp(tree["one_step"]["x"].to_numpy()), tree["one_step"]["y"].to_numpy()
    assert y.dtype.kind == "i"
    z = ((y - rate) / np.sqrt(rate)).ravel()
    assert abs(z.mean()) < 4.9 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 4.9 * np.sqrt((2 + np.mean(1 / rate)) / z.size)


@pytest.mark.slow
def test_data_that_are_not_gaussian_are_drawn_by_the_model(float64):
    tree = pf.infer(counts, method=pf.ParticleFilter(500), y=COUNTS.copy(), draws=500, progress=False)
    check_counts(tree)
    assert set(scores(tree)) == {"rank_y", "crps_y"}


@pytest.mark.slow
@pytest.mark.parametrize("proposal", [pf.Newton(), pf.Auxiliary()])
def test_guided_particles_predict_by_the_models_own_law(proposal, float64):
    method = pf.ParticleFilter(500, proposal=proposal)
    check_counts(pf.infer(counts, method=method, y=COUNTS.copy(), draws=500, progress=False))


@pytest.mark.slow
def test_particles_that_are_moved_apart_predict_no_data(float64):
    method = pf.ParticleFilter(300, regularization=pf.Jitter(1.0))
    tree = pf.infer(counts, method=method, y=COUNTS.copy(), draws=100, progress=False)
    assert set(tree["one_step"].data_vars) == {"x"}
    assert scores(tree) == {}


# ------------------------------------------------------------------------------------------------------ scores


def uniformity(tree):
    """p value of ten bins of ranks 0..399 of the first sensor."""
    found = scores(tree)["rank_y"][:, 0]
    known = found[~np.isnan(found)]
    assert len(known) == T - 4
    return stats.chisquare(np.histogram(known, np.arange(11) * 40)[0]).pvalue


@pytest.mark.parametrize("name", ["kalman", "particles"])
def test_ranks_of_a_right_filter_are_uniform(filtered, name):
    """False alarm 1e-5: given the past, the place of a sensor's datum in its predictive law is uniform."""
    assert uniformity(filtered[name]) > 1e-5


def test_ranks_of_a_wrong_filter_are_not(filtered):
    assert uniformity(filtered["wrong"]) < 1e-9
    assert np.nanmean(scores(filtered["wrong"])["crps_y"]) > np.nanmean(scores(filtered["kalman"])["crps_y"])


def test_scores_are_those_of_scoringrules_on_the_same_draws(filtered):
    found = scores(filtered["kalman"])
    draws, y = filtered["kalman"]["one_step"]["y"].to_numpy()[0], Y
    plain = scoringrules.crps_ensemble(y[5], draws[:, 5].T, estimator="fair", backend="numpy")
    assert found["crps_y"][5] == pytest.approx(plain.mean(), rel=1e-10)
    one = scoringrules.crps_ensemble(y[20, 1], draws[:, 20, 1], estimator="fair", backend="numpy")
    assert found["crps_y"][20] == pytest.approx(float(one), rel=1e-10)
    rows = np.arange(200) * DRAWS // 200
    joint = scoringrules.es_ensemble(y[5], draws[rows, 5], estimator="fair", backend="numpy")
    assert found["energy_y"][5] == pytest.approx(float(joint), rel=1e-10)
    single = scoringrules.crps_ensemble(y[20, 1], draws[rows, 20, 1], estimator="fair", backend="numpy")
    assert found["energy_y"][20] == pytest.approx(float(single), rel=1e-10)
    for name in ("crps_y", "energy_y"):
        np.testing.assert_array_equal(np.isnan(found[name]), np.isnan(y).all(1))


def test_ranks_count_draws_below_and_break_ties_at_random():
    draws = np.arange(5.0)[:, None] + np.zeros((5, 3))
    assert ranks(draws, np.array([-1.0, 2.5, 9.0])).tolist() == [0, 3, 5]
    assert np.isnan(ranks(draws, np.full(3, np.nan))).all()
    tied = ranks(np.zeros((4, 5000)), np.zeros(5000))
    assert stats.chisquare(np.bincount(tied.astype(int), minlength=5)).pvalue > 1e-6


def test_single_draws_and_other_shapes():
    assert set(predictive_scores({"y": np.zeros((1, 4))}, {"y": np.zeros(4)})) == {"rank_y"}
    with pytest.raises(DataError, match=r"'y' have shape \(4,\) and its data \(5,\)"):
        predictive_scores({"y": np.zeros((9, 4))}, {"y": np.zeros(5)})


def test_a_result_holds_its_scores(filtered, monkeypatch):
    groups = {name: filtered["kalman"][name].to_dataset() for name in ("filter_stats", "one_step", "observed_data")}
    notes = []
    held = with_scores(groups, notes)["filter_stats"]
    assert held["rank_y"].dims == filtered["kalman"]["observed_data"]["y"].dims
    assert held["crps_y"].dims == held["energy_y"].dims == held["innovation_chi_square"].dims == ("time",)
    for name, value in scores(filtered["kalman"]).items():
        np.testing.assert_array_equal(held[name], value)
    assert notes == []
    monkeypatch.setattr(filter_diagnostics, "LIMIT", 1000)
    assert "rank_y" not in with_scores({**groups, "filter_stats": groups["one_step"][["x"]]}, notes)["filter_stats"]
    assert "draws of data, so that their ranks" in notes[0]


def test_spread_counts_the_error_of_a_mean_of_few_draws():
    """Truth and 8 draws of one law: squared error and spread agree to 5 standard errors, 1 % each."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=(9, 20000, 2))
    group = xr.Dataset({"x": (("chain", "draw", "time", "i"), values[None, 1:])})
    skill = spread_and_skill(group, "x", values[0])
    assert skill.error.mean() == pytest.approx(1 + 1 / 8, rel=0.04)
    assert skill.spread.mean() == pytest.approx(1 + 1 / 8, rel=0.02)
    moments = xr.Dataset({"x": ("time", np.zeros(3)), "x_sd": ("time", np.full(3, 2.0))})
    found = spread_and_skill(moments, "x", np.array([1.0, 2.0, 3.0]))
    assert (found.error.tolist(), found.spread.tolist()) == ([1, 4, 9], [4, 4, 4])


# ------------------------------------------------------------------------------------------------------ figure


@pytest.fixture(autouse=True)
def closed():
    """Figures off the screen, closed after each test."""
    with plt.rc_context({"backend": "agg"}):
        yield
    plt.close("all")


def labels(figure):
    return [panel.get_ylabel().split("\n")[0] for panel in figure.axes], [p.get_xlabel() for p in figure.axes]


def test_a_panel_for_each_number(filtered):
    figure = plot_diagnostics(filtered["kalman"], {"x": STATES})
    left, below = labels(figure)
    assert left == ["innovation $\\chi^2$", "CRPS of data", "error and spread", "density", "density"]
    assert below[2:] == ["time", "rank of data among\npredictions", "rank of truth among\nfiltering draws"]
    figure.canvas.draw()
    line = figure.axes[0].lines[1].get_ydata()
    found = filtered["kalman"]["filter_stats"]
    window = slice(200 - 9, 200 + 11)
    mean = found["innovation_chi_square"][window].sum() / found["innovation_count"][window].sum()
    assert line[200] == pytest.approx(float(mean))
    particles = plot_diagnostics(filtered["particles"])
    assert labels(particles)[0] == ["effective", "CRPS of data", "density"]
    assert [float(np.mean(line.get_ydata())) for line in particles.axes[0].lines[1:]] == [1000, 500]


def test_moments_show_what_they_have(filtered):
    tree = filtered["kalman"]
    moments = {
        "x": tree["filtering"]["x"].mean(("chain", "draw")),
        "x_sd": tree["filtering"]["x"].std(("chain", "draw")),
    }
    groups = {"filter_stats": tree["filter_stats"].to_dataset(), "filtering": xr.Dataset(moments)}
    figure = plot_diagnostics(xr.DataTree.from_dict(groups), {"x": STATES})
    assert labels(figure)[0] == ["innovation $\\chi^2$", "error and spread"]


def test_what_does_not_fit_is_refused(filtered):
    tree = filtered["kalman"]
    with pytest.raises(ArgumentError, match="takes a result of infer .*got dict"):
        plot_diagnostics({})
    with pytest.raises(ArgumentError, match=r"no group 'filter_stats'; it has \['posterior'\]. Run a state method"):
        plot_diagnostics(xr.DataTree.from_dict({"posterior": xr.Dataset({"x": ("time", STATES)})}))
    with pytest.raises(ArgumentError, match=r"sites= names 'z'; the result has predictions of the data \['y'\]"):
        plot_diagnostics(tree, sites=["z"])
    with pytest.raises(ArgumentError, match=r"takes a dictionary such as \{'x': x\}; got ndarray"):
        plot_diagnostics(tree, STATES)
    with pytest.raises(ArgumentError, match=r"truth= names 'z'; 'filtering' has \['x'\]"):
        plot_diagnostics(tree, {"z": STATES})
    with pytest.raises(DataError, match=r"of 'x' has shape \(401,\); expected \(400,\), time first"):
        plot_diagnostics(tree, {"x": np.append(STATES, 0.0)})
    with pytest.raises(ArgumentError, match="5 sites; expected 4 at most"):
        plot_diagnostics(tree, sites=["y"] * 5)
    bare = xr.DataTree.from_dict({"filter_stats": tree["filter_stats"].to_dataset()})
    with pytest.raises(ArgumentError, match="'filtering', which the result does not have"):
        plot_diagnostics(bare, {"x": STATES})
    with pytest.raises(ArgumentError, match="stored by Kalman, EnKF and ParticleFilter with store='draws'"):
        plot_diagnostics(bare, sites="y")
