"""Calibration: exact laws of ranks, methods that are right pass, methods that are wrong are found, and by what."""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import stats

import pushforward as pf
from conftest import line, walk
from pushforward import _runner
from pushforward._errors import ArgumentError, DataError, InferenceError, MethodError, ModelError, Outcome
from pushforward.calibration import calibrate
from pushforward.local_calibration import local_check
from pushforward.math import ranks
from pushforward.methods._base import Draws, Method
from pushforward.model._conditioned import with_data
from pushforward.plot_calibration import plot_calibration

X = np.linspace(-1.0, 1.0, 6)
Y = 0.7 * X + 0.3 + np.array([0.2, -0.4, 0.1, 0.5, -0.3, 0.0])


def _gaussian(problem, key, draws):
    """Mean, root of the covariance, and noise, for a linear-Gaussian problem: one Newton step is exact."""
    zero = jnp.zeros(problem.dimension)
    precision = -jax.hessian(problem.log_density)(zero)
    mean = jnp.linalg.solve(precision, jax.grad(problem.log_density)(zero))
    root = jnp.linalg.cholesky(jnp.linalg.inv(precision))
    return mean, root, jax.random.normal(key, (1, draws, problem.dimension))


class Gaussian(Method):
    """The exact posterior of a linear-Gaussian problem, and distortions of it in units of its standard deviation."""

    width: float = 1.0
    shift: float = 0.0
    only_prior: bool = False
    autocorrelation: float = 0.0
    fails: bool = False
    speaks: bool = False

    def run(self, problem, key, draws, runner):
        mean, root, noise = runner.call(_gaussian, problem, key, draws)
        if self.autocorrelation:
            noise = np.array(noise)
            for i in range(1, draws):
                fresh = math.sqrt(1 - self.autocorrelation**2) * noise[:, i]
                noise[:, i] = self.autocorrelation * noise[:, i - 1] + fresh
        positions = noise if self.only_prior else mean + (self.shift + self.width * noise) @ root.T
        one = np.ones(())
        bad = self.fails and float(next(iter(problem.observed_values().values()))[0]) > 3.0
        outcome = Outcome.NONFINITE if bad else Outcome.SUCCESS
        return Draws(positions, {}, {}, np.asarray(int(outcome)), one, one)

    def warnings(self, draws):
        return [f"the first draw is {float(draws.positions[0, 0, 0]):.3f}."] if self.speaks else []


def check(method, n=60, **options):
    return calibrate(method, line, n=n, progress=False, **({"x": X, "observed": "y"} | options))


# Equations


def test_rank_among_ties_is_spread_over_them():
    draws = np.array([0.0, 1.0, 1.0, 2.0])[:, None]
    for v, expected in ((0.0, 1 / 5), (0.5, 2.5 / 5), (1.0, 4 / 5)):
        assert ranks.randomised_pit(np.array([1.0]), draws, np.array([v])) == pytest.approx(expected)


def test_ranks_of_exchangeable_discrete_values_are_uniform():
    # Kolmogorov's test at 1e-4; a rank without a share of the ties has its mass on 8 points and fails.
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (8, 4000))
    pit = ranks.randomised_pit(values[0], values[1:], rng.uniform(size=4000))
    assert stats.kstest(pit, "uniform").pvalue > 1e-4


def test_probability_inside_is_the_multinomial_sum():
    n, points, first, last = 5, np.array([0.2, 0.5, 0.9]), np.array([0, 1, 3]), np.array([2, 4, 5])
    total = 0.0
    for counts in itertools.product(range(n + 1), repeat=3):
        below = np.cumsum(counts)
        if below[-1] <= n and np.all((below >= first) & (below <= last)):
            total += stats.multinomial.pmf([*counts, n - below[-1]], n, np.diff([0, *points, 1]))
    assert ranks.probability_inside(n, points, first, last) == pytest.approx(total, rel=1e-12)


def test_p_values_have_the_law_that_they_state():
    # P(p <= a) = a exactly for every value a that p takes; 4 standard errors of 20,000 runs, false alarm 6e-5 each.
    p = ranks.uniformity_p_value(np.random.default_rng(1).uniform(size=(20, 20_000)))
    for level in (0.01, 0.05, 0.3):
        attained = p[p <= level].max()
        assert attained > 0.8 * level
        assert np.mean(p <= attained) == pytest.approx(attained, abs=4 * math.sqrt(attained / 20_000))


@pytest.mark.parametrize(("n", "count"), [(30, 40), (1100, 3)])
def test_a_curve_leaves_the_band_where_its_p_value_is_small(n, count):
    rng = np.random.default_rng(2)
    pit = rng.uniform(size=(n, count)) ** np.linspace(0.6, 1.0, count)
    low, high = ranks.simultaneous_band(n, 0.05)
    curves = ranks.distribution(pit, ranks.grid(n))
    inside = np.all((curves >= low[:, None] - 1e-12) & (curves <= high[:, None] + 1e-12), axis=0)
    rejected = ranks.uniformity_p_value(pit) <= 0.05
    assert 0 < rejected.sum() < count
    np.testing.assert_array_equal(rejected, ~inside)


def test_holm_by_hand():
    np.testing.assert_allclose(ranks.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])


def test_central_coverage_of_a_normal_that_is_too_narrow():
    # With the standard deviation s times the right one the c-interval covers 2 Phi(s Phi^-1((1 + c) / 2)) - 1.
    truth = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    c = np.array([0.2, 0.5, 0.9])
    found = ranks.central_coverage(stats.norm.cdf(truth / 0.6), c)
    np.testing.assert_allclose(found, 2 * stats.norm.cdf(0.6 * stats.norm.ppf((1 + c) / 2)) - 1, atol=1e-3)


def test_distances_find_what_marginals_do_not():
    # Truths have a correlation of 0.9, draws none: marginal ranks are exactly uniform, TARP's are not, which takes many
    # data sets to see: with 1000 the p-value was below 0.025 in 29 of 30 studies, and it falls with their number.
    rng = np.random.default_rng(3)
    n, root = 2000, np.linalg.cholesky([[1.0, 0.9], [0.9, 1.0]])
    truth, draws, points = rng.normal(size=(n, 2)) @ root.T, rng.normal(size=(n, 50, 2)), rng.normal(size=(n, 2))
    uniform = rng.uniform(size=n)

    def found(sample):
        rows = zip(truth, sample, points, uniform, strict=True)
        return ranks.uniformity_p_value(np.array([ranks.distance_pit(*r[:3], np.ones(2), r[3]) for r in rows]))

    marginal = ranks.randomised_pit(truth, draws.swapaxes(0, 1), rng.uniform(size=(n, 2)))
    assert ranks.uniformity_p_value(marginal).min() > 1e-4  # false alarm 2e-4
    assert found(draws) < 1e-2
    assert found(draws @ root.T) > 1e-4  # false alarm 1e-4


# Methods that are right


def test_an_exact_method_passes_and_is_compiled_once():
    before = len(_runner._compiled)
    tree = check(pf.GaussianVI(), n=40)
    compiled = len(_runner._compiled) - before
    attributes = pf.attributes(tree)
    assert attributes["p_value"] > 1e-3  # false alarm 1e-3 (Holm)
    assert attributes["calibrated"] is (attributes["p_value"] > 0.05)
    assert attributes["compilations"] <= 1
    assert compiled <= 4  # simulating, the method, its groups, the likelihood of the truth
    assert (attributes["tests"], attributes["datasets"], attributes["failed"]) == (4, 40, 0)
    assert tree["calibration"]["slope"].dims == ("dataset",)
    again = check(pf.GaussianVI(), n=20, key=1)
    assert pf.attributes(again)["compilations"] == 0
    assert not np.array_equal(again["prior"]["slope"], tree["prior"]["slope"][:20])


def test_values_of_given_data_are_not_used_but_their_gaps_are():
    open_data, given = check(Gaussian(), n=20), check(Gaussian(), n=20, y=Y)
    np.testing.assert_allclose(given["calibration"]["slope"], open_data["calibration"]["slope"])
    gaps = check(Gaussian(), n=20, y=np.where(X > 0.5, np.nan, Y))
    absent = np.isnan(gaps["prior_predictive"]["y"].to_numpy())
    np.testing.assert_array_equal(absent, np.broadcast_to(X > 0.5, (20, 6)))


def test_correlated_draws_are_thinned_to_their_effective_number():
    # 4000 draws of an autoregression of 0.8 are worth 4000 * 0.2 / 1.8 = 444; the estimate has an error of some 10 %.
    tree = check(Gaussian(autocorrelation=0.8), n=20, draws=4000)
    assert np.median(tree["sample_stats"]["independent_draws"]) == pytest.approx(444, rel=0.2)
    assert np.median(check(Gaussian(), n=20)["sample_stats"]["independent_draws"]) == 500


def test_vectors_and_chosen_parameters():
    def several(y=None):
        with numpyro.plate("place", 3):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.deterministic("total", a + b)
        numpyro.sample("y", dist.Normal(a + b, 0.5), obs=y)

    tree = calibrate(Gaussian(), several, observed="y", n=20, parameters=("total", "a"), progress=False)
    assert dict(tree["calibration"]["a"].sizes) == {"dataset": 20, "place": 3}
    assert list(tree["calibration"]) == ["a", "total", "log_likelihood", "tarp"]
    assert tree.attrs["tests"] == 8
    total = tree["prior"]["a"].to_numpy() + tree["prior"]["b"].to_numpy()[:, None]
    np.testing.assert_allclose(tree["prior"]["total"], total, rtol=1e-5)
    assert tree.attrs["p_value"] > 1e-3  # exact; false alarm 1e-3
    flat = np.concatenate([np.ravel(tree["p_value"][n]) for n in tree["p_value"]])
    assert tree.attrs["p_value"] == pytest.approx(min(1.0, 8 * flat.min()))


def test_values_of_deterministic_sites_are_set_too():
    def silent(x):
        total = numpyro.deterministic("total", x + numpyro.sample("a", dist.Normal(0.0, 1.0)))

        def step(c, _):
            c = numpyro.deterministic("c", c + numpyro.sample("e", dist.Normal(0.0, 1.0)))
            return c, None

        scan(step, total, None, length=3)

    data = {"total": jnp.asarray(5.0), "c": jnp.arange(3.0)}
    seeded = numpyro.handlers.seed(with_data(silent), 0)
    trace = numpyro.handlers.trace(seeded).get_trace(data, x=1.0)
    assert float(trace["total"]["value"]) == 5.0
    np.testing.assert_array_equal(trace["c"]["value"], np.arange(3.0))
    assert list(inspect.signature(with_data(silent)).parameters)[1:] == ["x"]


@pytest.mark.slow
def test_smoothers_alone():
    fixed = numpyro.handlers.substitute(walk, data={"rho": jnp.asarray(0.7)})
    tree = calibrate("kalman", fixed, observed="y", steps=4, n=20, parameters="x", progress=False)
    assert dict(tree["calibration"]["x"].sizes) == {"dataset": 20, "time": 4}
    assert dict(tree["p_value"]["x"].sizes) == {"time": 4}
    assert "x0" not in tree["calibration"]
    assert tree.attrs["p_value"] > 1e-3  # exact smoother; false alarm 1e-3


@pytest.mark.slow
def test_nuts_and_nuts_over_kalman_pass():
    # Both exact; false alarm 1e-3 each. 100 data sets.
    nuts = check(pf.NUTS(chains=2, warmup=500), n=100, draws=300)
    assert nuts.attrs["p_value"] > 1e-3
    tree = calibrate(pf.NUTS(chains=2, warmup=300), walk, observed="y", steps=5, states="kalman", n=60, progress=False)
    assert tree.attrs["p_value"] > 1e-3
    assert {"rho", "x0", "x", "log_likelihood", "tarp"} <= set(tree["calibration"])


# Methods that are wrong. In 100 studies of 60 data sets, made with NumPy alone, all of these were rejected at 0.01 but
# for draws of the prior, of which there were none; an exact method in one of them, at level 0.05 in 5.


def test_draws_too_narrow_are_found():
    tree = check(Gaussian(width=0.6))
    assert tree.attrs["p_value"] < 1e-2
    assert not pf.attributes(tree)["calibrated"]
    inner = tree["coverage"].sel(credibility=0.9)
    # The 90 % interval of a normal of 0.6 the width covers 0.676; 4 standard errors of 60 data sets.
    for name in ("slope", "offset"):
        assert float(inner[name]) == pytest.approx(0.676, abs=0.24)


def test_draws_too_wide_and_biased_are_found():
    assert check(Gaussian(width=2.0)).attrs["p_value"] < 1e-2
    biased = check(Gaussian(shift=0.7))
    assert biased.attrs["p_value"] < 1e-2
    # Draws too high: ranks of the truth are low.
    assert float(biased["calibration"]["offset"].mean()) < 0.4


def test_draws_of_the_prior_are_found_by_the_log_likelihood_alone():
    tree = check(Gaussian(only_prior=True))
    assert float(tree["p_value"]["slope"]) > 1e-4  # false alarm 1e-4 each
    assert float(tree["p_value"]["offset"]) > 1e-4
    assert float(tree["p_value"]["log_likelihood"]) < 1e-6
    assert tree.attrs["worst"] == "log_likelihood"


# Failures, warnings, errors


def test_few_failures_are_counted_and_many_raise():
    # y[0] ~ N(0, 29.25) is above 3 in 29 % of the data sets, then N(0, 4.26), in 7.3 %.
    with pytest.raises(InferenceError, match=r"of 60 data sets had no usable posterior so far, more than 10%"):
        check(Gaussian(fails=True), x=X + 6)
    with pytest.warns(UserWarning, match=r"calibrate: \d+ of 60 data sets had no usable posterior and are left out"):
        tree = check(Gaussian(fails=True), x=X * 0.1, key=3)
    attributes = pf.attributes(tree)
    assert attributes["failed"] == len(attributes["failures"]) == 60 - attributes["datasets"] > 0
    assert not set(map(int, attributes["failures"])) & set(tree["calibration"]["dataset"].to_numpy().tolist())
    assert attributes["datasets"] == tree["prior"].sizes["dataset"]


def test_simulations_that_are_not_finite_are_failures_not_missing_data():
    def overflowing(y=None):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(a, jnp.where(a > 1.8, jnp.nan, 1.0)), obs=y)

    with (
        numpyro.validation_enabled(False),
        pytest.warns(UserWarning, match="the simulated parameters or data are not finite"),
    ):
        tree = calibrate(Gaussian(), overflowing, observed="y", n=60, progress=False)
    assert float(tree["prior"]["a"].max()) <= 1.8


def test_warnings_of_the_runs_are_counted_by_kind():
    tree = check(Gaussian(speaks=True), n=20)
    (text,) = pf.attributes(tree)["warnings"]
    assert text.startswith("20 of 20 data sets, e.g.: Gaussian: the first draw is")


def test_ranks_among_few_draws_are_said_to_be_coarse():
    tree = check(Gaussian(), n=20, draws=5)
    assert "independent draws or fewer: ranks are coarse" in pf.attributes(tree)["warnings"][-1]


class Learned(Gaussian):
    """Has `fit`, and is not trained."""

    trained: None = None

    def fit(self, model):
        return self


def bare(x, y=None, n=None):
    return line(x, y)


def factored(x, y=None):
    line(x, y)
    numpyro.factor("more", jnp.sum(x))


def subsampled(y=None):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.handlers.scale(scale=2.0):
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def nested(y=None):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    a = numpyro.sample("a", dist.Normal(0.0, scale))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def test_errors():
    cases = [
        (DataError, r"which of the sites \['slope', 'offset', 'y'\] are data.*observed=", {"observed": None}),
        (DataError, r"observed= names 'z'", {"observed": "z"}),
        (ArgumentError, r"n= takes .*at least 20; got 10", {"n": 10}),
        (ArgumentError, r"n= takes", {"n": True}),
        (ArgumentError, r"draws= takes a positive integer", {"draws": 0}),
        (ArgumentError, r"level= takes a probability", {"level": 5}),
        (ArgumentError, r"progress= takes", {"progress": 1}),
        (ArgumentError, r"parameters= names 'z'; the model has \['slope', 'offset'\]", {"parameters": ["slope", "z"]}),
        (ArgumentError, r"parameters= is empty", {"parameters": ()}),
        (ArgumentError, r"key= takes an integer", {"key": "a"}),
        (ArgumentError, r"the model cannot be called", {"mesh": None}),
    ]
    for kind, text, options in cases:
        with pytest.raises(kind, match=text):
            calibrate(Gaussian(), line, x=X, **({"observed": "y", "n": 20, "progress": False} | options))
    quick = functools.partial(calibrate, n=20, progress=False)
    with pytest.raises(MethodError, match="unknown method 'nope'"):
        quick("nope", line, x=X, observed="y")
    with pytest.raises(MethodError, match=r"Learned is not trained.*method.fit"):
        quick(Learned(), line, x=X, observed="y")
    with pytest.raises(ArgumentError, match=r"parameter 'n', which is an option of calibrate.*functools.partial"):
        quick(Gaussian(), bare, x=X, observed="y")
    assert quick(Gaussian(), functools.partial(bare, n=3), x=X, observed="y").attrs["datasets"] == 20
    with pytest.raises(ModelError, match=r"numpyro.factor 'more' changes its density"):
        quick(Gaussian(), factored, x=X, observed="y")
    with pytest.raises(ModelError, match=r"site 'y' stands under handlers.scale"):
        quick(Gaussian(), subsampled, observed="y")
    with pytest.raises(ModelError, match=r"site 'a' is fixed by handlers.substitute.*\['scale'\]"):
        quick(Gaussian(), numpyro.handlers.substitute(nested, data={"a": jnp.ones(())}), observed="y")
    with pytest.raises(DataError, match="no latent site"):
        quick(Gaussian(), line, x=X, observed=("slope", "offset", "y"))


@pytest.mark.slow
def test_results_without_the_trajectory_are_refused():
    quick = functools.partial(calibrate, n=20, progress=False)
    fixed = numpyro.handlers.substitute(walk, data={"rho": jnp.asarray(0.7)})
    with pytest.raises(MethodError, match=r"has none of 'x0'.*store='draws'"):
        quick(pf.Kalman(store="last"), fixed, observed="y", steps=4)
    with pytest.raises(MethodError, match=r"has draws of shape .* of 'x', and the model draws it with shape \(4,\)"):
        quick(pf.Kalman(store="last"), fixed, observed="y", steps=4, parameters="x")


# The plot


@pytest.fixture
def closed():
    with plt.rc_context({"backend": "agg"}):
        yield
    plt.close("all")


def test_plot(closed):
    good, bad = check(Gaussian(), n=30, level=1e-3), check(Gaussian(width=0.4), n=30)
    # An exact method is called uncalibrated with probability 1e-3.
    titles = ["slope", "offset", "log likelihood", "central intervals", "TARP, all parameters"]
    for tree, color, words in ((good, "#2b6ca3", "no departure"), (bad, "#c8611a", "not calibrated")):
        figure = plot_calibration(tree)
        assert [a.get_title(loc="left") for a in figure.axes] == titles
        assert [line.get_color() for line in figure.axes[2].lines if len(line.get_xdata()) > 2] == [color]
        assert words in figure.get_suptitle()
    curve = next(line for line in figure.axes[0].lines if len(line.get_xdata()) > 2)
    pit = bad["calibration"]["slope"].to_numpy()
    x = curve.get_xdata()[20]
    assert curve.get_ydata()[20] == pytest.approx(np.mean(pit <= x) - x)
    # The band is that of all tests together.
    low, high = ranks.simultaneous_band(30, 0.05 / 4)
    edge = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert edge.max() == pytest.approx(np.max(high - ranks.grid(30)))
    assert edge.min() == pytest.approx(np.min(low - ranks.grid(30)))
    assert len(plot_calibration(bad, "slope").axes) == 4
    with pytest.raises(ArgumentError, match=r"parameters= names 'z'; the result has \['slope', 'offset'\]"):
        plot_calibration(bad, "z")
    with pytest.raises(ArgumentError, match="takes a result of calibrate; got dict"):
        plot_calibration({})


# The local check


def local(method, n=200, **options):
    return local_check(method, line, progress=False, n=n, **({"x": X, "y": Y} | options))


def test_local_check_of_right_and_wrong_posteriors():
    # Exact permutation p-values: false alarm 0.02. For 0.6 of the width 15 of 16 studies of 200 pairs had p <= 0.05.
    assert local(Gaussian()).attrs["p_value"] > 0.02
    tree = local(Gaussian(width=0.5))
    assert tree.attrs["p_value"] <= 0.05
    assert pf.attributes(tree)["calibrated"] is False
    assert tree["posterior"]["probability"].dims == ("chain", "draw")
    # Draws near their mean are more the method's than the model's; those far out are neither's or the model's.
    far = np.abs(tree["posterior"]["slope"] - tree["posterior"]["slope"].mean())
    assert float(np.corrcoef(far.to_numpy()[0], tree["posterior"]["probability"].to_numpy()[0])[0, 1]) < 0


def test_local_check_says_where_data_are_unlike_simulations():
    tree = local(Gaussian(), y=Y + 100.0)
    assert "6 of 6 data lie outside" in pf.attributes(tree)["warnings"][-1]


@pytest.mark.slow
def test_local_check_rejects_exact_methods_as_often_as_it_says():
    # 60 studies at level 0.2: 12 expected, standard deviation 3.1; 4 of them.
    rejected = sum(local(Gaussian(), n=60, key=key).attrs["p_value"] <= 0.2 for key in range(60))
    assert rejected <= 24


def test_errors_of_the_local_check():
    cases = [
        (DataError, "no argument of the model observes 'y'", {"y": None, "observed": "y"}),
        (ArgumentError, "n= takes .* at least 50; got 20", {"n": 20}),
        (ArgumentError, "level= takes a probability of at least 0.01", {"level": 0.005}),
        (ArgumentError, "parameters= names 'z'", {"parameters": "z"}),
    ]
    for kind, text, options in cases:
        with pytest.raises(kind, match=text):
            local(Gaussian(), **options)
