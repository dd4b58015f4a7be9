"""Forecasts: laws of the new steps against closed forms, both routes to the last carry, and what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.contrib.control_flow import scan

import pushforward as pf
from conftest import line, walk
from pushforward import forecast
from pushforward._errors import ArgumentError, DataError, ModelError
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import air_passengers, lorenz96, nile

pytestmark = pytest.mark.usefixtures("float64")


def dataset(variables):
    """Variables of shape (chain, draw, ...) as a group."""
    dims = {n: ("chain", "draw", *(f"{n}_dim_{i}" for i in range(np.ndim(v) - 2))) for n, v in variables.items()}
    return xr.Dataset({n: (dims[n], np.asarray(v)) for n, v in variables.items()})


def result(draws, data, last=None):
    """A result by hand: draws with leading axis draw, data, and the last carry (state, riders)."""
    groups = {"posterior": dataset({n: np.asarray(v)[None] for n, v in draws.items()})}
    groups["observed_data"] = xr.Dataset({n: ([f"{n}_{i}" for i in range(v.ndim)], v) for n, v in data.items()})
    if last is not None:
        state, riders = last
        riding = {f"rider_{i}": np.broadcast_to(r, (len(state), *np.shape(r)))[None] for i, r in enumerate(riders)}
        groups["last_carry"] = dataset({"state": np.asarray(state)[None]} | riding)
    return xr.DataTree.from_dict(groups)


def without_carry(tree):
    return xr.DataTree.from_dict({n: g.to_dataset() for n, g in tree.children.items() if n != "last_carry"})


def kalman(model, draws=200, values=None, **kwargs):
    """A result of the Kalman smoother at given parameters, with the last carry."""
    space = read_state_space(read_problem(model, (), kwargs))
    found = eqx.filter_jit(pf.Kalman().trajectories)(space.chain(values), jax.random.key(1), draws)
    given = {n: np.broadcast_to(v, (draws, *np.shape(v))) for n, v in (values or {}).items()}
    return result(given | found.posterior, space.problem.observed_values(), found.last)


def drawn(tree, name):
    """Draws of a prediction, shape (draw, time, ...)."""
    return tree["predictions"][name].to_numpy()[0]


def assert_normal(z, limit=5.0):
    """Columns of independent rows are N(0, 1): z scores of means and variances are below 5 (6e-7 each)."""
    n = len(z)
    assert np.abs(z.mean(0) * n**0.5).max() < limit
    assert np.abs((z.var(0) - 1) * (n / 2) ** 0.5).max() < limit


@pytest.fixture(scope="module")
def nile_tree():
    with jax.enable_x64(True):
        return pf.infer(nile.local_level, method=pf.Kalman(), y=nile.DATA, draws=4000)


def nile_filter():
    """Mean and variance of the last level, by the textbook recursion."""
    mean, variance = nile.START_MEAN, nile.START_SD**2
    for y in nile.DATA:
        variance += nile.LEVEL_VARIANCE
        gain = variance / (variance + nile.NOISE_VARIANCE)
        mean, variance = mean + gain * (y - mean), variance * (1 - gain)
    return mean, variance


@pytest.mark.parametrize("new", [{"steps": 110}, {"y": np.append(nile.DATA, np.full(10, np.nan))}])
@pytest.mark.parametrize("carry", [True, False])
def test_local_level_has_the_closed_form(nile_tree, new, carry):
    tree = without_carry(nile_tree)
    if carry:
        last = tree["posterior"]["x"].to_numpy()[0, :, -1:]
        tree["last_carry"] = xr.DataTree(dataset({"state": last[None]}))
    found = forecast(tree, nile.local_level, **new, key=3)
    mean, variance = nile_filter()
    level = variance + nile.LEVEL_VARIANCE * np.arange(1, 11)
    assert_normal((drawn(found, "x") - mean) / level**0.5)
    assert_normal((drawn(found, "y") - mean) / (level + nile.NOISE_VARIANCE) ** 0.5)
    assert_normal((drawn(found, "y") - drawn(found, "x")) / nile.NOISE_VARIANCE**0.5)
    assert_normal(np.diff(drawn(found, "x")) / nile.LEVEL_VARIANCE**0.5)
    assert found["predictions"]["x"].dims == ("chain", "draw", "time")
    np.testing.assert_array_equal(found["predictions"]["time"], np.arange(100, 110))
    assert set(found.children) == {*tree.children, "predictions"}
    assert "predictions" not in tree.children


def test_draws_follow_the_key_and_not_the_way_of_calling(nile_tree):
    calls = [{"steps": 103}, {"y": np.append(nile.DATA, [np.nan] * 3)}, {"y": np.append(nile.DATA, [1.0, 2.0, 3.0])}]
    found = [drawn(forecast(nile_tree, nile.local_level, **c), "y") for c in calls]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.allclose(found[0], drawn(forecast(nile_tree, nile.local_level, steps=103, key=1), "y"))


def test_deterministic_steps_start_at_the_last_carry_and_not_at_x0():
    model = lorenz96.model
    rng = np.random.default_rng(0)
    draws = {"x0": rng.normal(size=(5, 6)), "x": rng.normal(size=(5, 4, 6))}
    tree = result(draws, {"y": np.zeros((4, 6))}, (draws["x"][:, -1], []))
    x, expected = draws["x"][:, -1], []
    for _ in range(3):
        x = lorenz96.step(x)
        expected.append(x)
    found = forecast(tree, model, steps=7, size=6)
    np.testing.assert_allclose(drawn(found, "x"), np.stack(expected, 1), rtol=1e-12)
    x, expected = draws["x0"], []
    for _ in range(7):
        x = lorenz96.step(x)
        expected.append(x)
    again = forecast(without_carry(tree), model, steps=7, size=6)
    np.testing.assert_allclose(drawn(again, "x"), np.stack(expected, 1)[:, 4:], rtol=1e-12)


def test_carries_of_several_parts_agree_with_running_the_sites_again():
    values = {n: jnp.asarray(s) for n, s in air_passengers.SCALES.items()}
    y = air_passengers.LOG_DATA[:30]
    tree = kalman(air_passengers.model, values=values, draws=50, y=y)
    assert tree["last_carry"]["state"].shape == (1, 50, 13)
    by_carry, by_sites = (forecast(t, air_passengers.model, steps=36) for t in (tree, without_carry(tree)))
    assert set(by_carry["predictions"].data_vars) == {"level", "slope", "season", "y"}
    for name in by_carry["predictions"].data_vars:
        np.testing.assert_allclose(drawn(by_carry, name), drawn(by_sites, name), rtol=1e-7, atol=1e-9)
    assert_normal((drawn(by_carry, "y") - drawn(by_carry, "level") - drawn(by_carry, "season")) / 0.1, limit=4.5)


def test_parameters_in_the_state_are_taken_from_it():
    y = np.array([0.5, 1.0, 0.2, -0.4, 0.1])
    rho = np.linspace(0.1, 0.9, 50)
    noise = jax.scipy.special.ndtri(rho)  # the prior of rho is uniform
    draws = {"rho": np.zeros(50), "x0": np.zeros(50), "x": np.ones((50, 5))}
    tree = result(draws, {"y": y}, (np.stack([noise, np.ones(50)], 1), []))
    found = forecast(tree, walk, steps=6)
    fixed = result(draws | {"rho": rho}, {"y": y}, (np.ones((50, 1)), []))
    np.testing.assert_allclose(drawn(found, "x"), drawn(forecast(fixed, walk, steps=6), "x"), rtol=1e-10)


def counts(y=None, steps=None):
    """Poisson data, a counter in the carry, and a step that is not centred."""

    def step(carry, y):
        x, t = carry
        e = numpyro.sample("e", dist.Normal(0, 1))
        x = numpyro.deterministic("x", 0.9 * x + 0.5 * e)
        numpyro.deterministic("t", t)
        numpyro.sample("y", dist.Poisson(jnp.exp(1 + x)), obs=y)
        return (x, t + 1), None

    scan(step, (numpyro.sample("x0", dist.Normal(0, 1)), 0), y, length=steps)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("new", [{"steps": 7}, {"y": np.array([1.0, 3, 2, 0, np.nan, np.nan, np.nan])}])
def test_laws_that_are_not_gaussian_are_drawn_exactly(carry, new):
    rng = np.random.default_rng(1)
    x0, e, x = rng.normal(size=4000), rng.normal(size=(4000, 4)), []
    for t in range(4):
        x.append(0.9 * (x[-1] if t else x0) + 0.5 * e[:, t])
    draws = {"x0": x0, "e": e, "x": np.stack(x, 1)}
    tree = result(draws, {"y": np.array([1, 3, 2, 0])}, (x[-1][:, None], [np.asarray(4)]) if carry else None)
    found = forecast(tree, counts, **new)
    np.testing.assert_array_equal(drawn(found, "t"), np.broadcast_to([4, 5, 6], (4000, 3)))
    y, rate = drawn(found, "y"), np.exp(1 + drawn(found, "x"))
    np.testing.assert_array_equal(y, np.round(y))
    np.testing.assert_allclose(drawn(found, "x")[:, 0], 0.9 * x[-1] + 0.5 * drawn(found, "e")[:, 0], rtol=1e-9)
    # Mean, variance and third cumulant of a Poisson law are its rate; z scores below 5.
    for moment in (y - rate, (y - rate) ** 2 - rate, (y - rate) ** 3 - rate):
        assert np.abs(moment.mean(0) / moment.std(0) * 4000**0.5).max() < 5


def driven(u, y=None, gain=2.0):
    """Inputs u, and a step that depends on the last datum."""

    def step(carry, item):
        x, before = carry
        u, y = item
        x = numpyro.sample("x", dist.Normal(gain * u + 0.5 * before, 1e-6))
        y = numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return (x, y), None

    scan(step, (numpyro.sample("x0", dist.Normal(0, 1)), 0.0), (u, y))


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_inputs_continue_and_steps_may_depend_on_data(carry, padded):
    u, y = np.arange(6.0), np.array([1.0, 3.0, 2.0, 5.0])
    draws = {"x0": np.zeros(300), "x": np.ones((300, 4))}
    tree = result(draws, {"y": y}, (np.ones((300, 1)), [np.asarray(5.0)]) if carry else None)
    found = forecast(tree, driven, u, **({"y": np.append(y, [np.nan] * 2)} if padded else {}))
    x, new = drawn(found, "x"), drawn(found, "y")
    np.testing.assert_allclose(x[:, 0], 8 + 2.5, atol=1e-5)
    np.testing.assert_allclose(x[:, 1], 10 + 0.5 * new[:, 0], atol=1e-5)
    np.testing.assert_array_equal(found["predictions_constant_data"]["u"], u)


def after(y=None, steps=None):
    """The likelihood stands after the scan."""

    def step(x, _):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        return x, x

    _, xs = scan(step, numpyro.sample("x0", dist.Normal(0, 1)), None, length=steps)
    numpyro.sample("y", dist.Normal(xs, 0.3), obs=y)


def test_data_after_the_scan_are_forecast():
    y = np.array([0.1, 0.2, -0.3, 0.4])
    tree = kalman(after, draws=4000, y=y, steps=4)
    for t in (tree, without_carry(tree)):
        found = forecast(t, after, steps=7)
        assert found["predictions"]["y"].shape == (1, 4000, 3)
        assert_normal((drawn(found, "y") - drawn(found, "x")) / 0.3)
        x = drawn(found, "x")
        assert_normal((x[:, 1:] - 0.9 * x[:, :-1]) / 0.5)


def masked(y, mask):
    def step(x, item):
        y, seen = item
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y, obs_mask=seen)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0, 1)), (y, mask))


def test_data_under_a_mask_are_forecast():
    mask = np.array([True, False, True])
    draws = {"x0": np.zeros(2000), "x": np.ones((2000, 3)), "y_unobserved": np.zeros((2000, 3))}
    tree = result(draws, {"y_observed": np.zeros(3)})
    found = forecast(tree, masked, np.zeros(5), np.append(mask, [False, False]))
    assert_normal((drawn(found, "y") - drawn(found, "x")) / 0.3)


def test_posteriors_of_nuts_are_continued(series):
    model, data = series
    tree = pf.infer(model, method=pf.NUTS(chains=2, warmup=200), draws=500, progress=False, throw=False, **data)
    found = forecast(tree, model, steps=8)["predictions"]
    assert found["x"].shape == (2, 500, 3)
    rho, last = tree["posterior"]["rho"].to_numpy(), tree["posterior"]["x"].to_numpy()[..., -1:]
    path = np.concatenate([last, found["x"].to_numpy()], -1)
    assert_normal(((path[..., 1:] - rho[..., None] * path[..., :-1]) / 0.5).reshape(1000, 3))
    assert_normal(((found["y"] - found["x"]).to_numpy() / 0.3).reshape(1000, 3))


def test_names_and_coordinates_of_time_are_continued():
    y, years = np.array([1.0, 2.0, np.nan, 3.0]), [1871, 1872, 1873, 1874]
    known = {"y": y, "steps": None, "method": pf.Kalman(), "draws": 20}
    tree = pf.infer(nile.local_level, **known, coords={"time": years})
    np.testing.assert_array_equal(forecast(tree, nile.local_level, steps=6)["predictions"]["time"], [1875, 1876])
    tree = pf.infer(nile.local_level, **known, dims={"x": "year", "y": "year"}, coords={"year": years})
    found = forecast(tree, nile.local_level, steps=6)["predictions"]
    assert found["x"].dims == found["y"].dims == ("chain", "draw", "year")
    np.testing.assert_array_equal(found["year"], [1875, 1876])
    months = np.array(["2020-01", "2020-02", "2020-03", "2020-04"], "datetime64[ns]")
    tree = pf.infer(nile.local_level, **known, coords={"time": months})
    expected = np.array(["2020-05", "2020-06"], "datetime64[ns]")
    np.testing.assert_array_equal(forecast(tree, nile.local_level, steps=6)["predictions"]["time"], expected)
    tree = pf.infer(nile.local_level, **known, coords={"time": ["a", "b", "c", "d"]})
    with pytest.raises(ArgumentError, match=r"ending in \['c', 'd'\].*coords=\{'time': \[...\]\}"):
        forecast(tree, nile.local_level, steps=6)
    for labels in (["e", "f"], ["a", "b", "c", "d", "e", "f"]):
        found = forecast(tree, nile.local_level, steps=6, coords={"time": labels})["predictions"]
        np.testing.assert_array_equal(found["time"], ["e", "f"])
    with pytest.raises(ArgumentError, match="3 values, but 'x' has length 2"):
        forecast(tree, nile.local_level, steps=6, coords={"time": [1, 2, 3]})
    with pytest.raises(ArgumentError, match="coords= names the dimension 'years'"):
        forecast(tree, nile.local_level, steps=6, coords={"time": [1, 2], "years": [1, 2]})
    with pytest.raises(ArgumentError, match="coords= takes a dictionary"):
        forecast(tree, nile.local_level, steps=6, coords=[1, 2])


def test_results_that_keep_the_last_step_alone_are_continued():
    tree = pf.infer(nile.local_level, method=pf.Kalman(store="last"), y=nile.DATA, draws=4000)
    assert tree["posterior"]["x"].dims == ("chain", "draw")
    mean, variance = nile_filter()
    found = forecast(tree, nile.local_level, steps=102)
    assert_normal((drawn(found, "x") - mean) / (variance + nile.LEVEL_VARIANCE * np.array([1, 2])) ** 0.5)


def test_what_cannot_be_continued_is_refused(nile_tree, regression):
    def call(tree, model=nile.local_level, **kwargs):
        return forecast(tree, model, **kwargs)

    with pytest.raises(ArgumentError, match="forecast takes a result of infer.*got dict"):
        call({}, steps=110)
    with pytest.raises(ArgumentError, match="key= takes an integer"):
        call(nile_tree, steps=110, key=0.5)
    with pytest.raises(ModelError, match=r"no numpyro scan.*pf.predict"):
        call(nile_tree, regression[0], **regression[1])
    with pytest.raises(DataError, match="the model has 100 steps, and the posterior has 100 already"):
        call(nile_tree, y=nile.DATA)
    with pytest.raises(DataError, match="the model has 90 steps, and the posterior has 100 already"):
        call(nile_tree, steps=90)
    with pytest.raises(DataError, match="samples 'noise_sd', which the posterior does not have"):
        call(nile_tree, nile.local_level_unknown, steps=110)
    with pytest.raises(DataError, match="neither data nor sites"):
        call(result({"a": np.zeros(3)}, {}), steps=110)
    rng = np.random.default_rng(0)
    draws = {"x0": rng.normal(size=(5, 6)), "x": rng.normal(size=(5, 4, 6))}
    tree = result(draws, {"y": np.zeros((4, 6))})
    with pytest.raises(DataError, match=r"'y' with shape \(4, 6\).*shape \(7, 8\)"):
        call(tree, lorenz96.model_noise, steps=7, size=8)
    with pytest.raises(DataError, match=r"'x' with shape \(4, 6\).*shape \(7, 8\)"):
        call(result(draws, {"y": np.zeros((4, 8))}), lorenz96.model_noise, steps=7, size=8)
    with pytest.raises(DataError, match=r"different numbers of steps: .*'y': 3"):
        call(result(draws, {"y": np.zeros((3, 6))}), lorenz96.model_noise, steps=7, size=6)
    wrong = result(draws | {"x0": np.zeros((5, 2))}, {"y": np.zeros((4, 6))})
    with pytest.raises(DataError, match=r"'x0' with shape \(2,\).*shape \(6,\)"):
        call(wrong, lorenz96.model_noise, steps=7, size=6)
    with pytest.raises(DataError, match=r"last carry.*\{'state': \(5,\)\}.*\{'state': \(6,\)\}"):
        call(result(draws, {"y": np.zeros((4, 6))}, (np.zeros((5, 5)), [])), lorenz96.model_noise, steps=7, size=6)
    with pytest.raises(DataError, match=r"posterior has \(1, 5\) chains and draws, and the last carry \(1, 4\)"):
        call(result(draws, {"y": np.zeros((4, 6))}, (np.zeros((4, 6)), [])), lorenz96.model_noise, steps=7, size=6)


def test_line_has_no_trajectory():
    with pytest.raises(ModelError, match="no numpyro scan"):
        forecast(result({"slope": np.zeros(3), "offset": np.zeros(3)}, {}), line, np.arange(3.0))
