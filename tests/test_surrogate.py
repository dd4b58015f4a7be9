"""`Surrogate`: the emulator's likelihood, its runs, its error, what it refuses, and draws without the simulator."""

import arviz as az
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from scipy import stats

import exact
import pushforward as pf
from pushforward import _surrogates
from pushforward._errors import ArgumentError, DataError, MethodError
from pushforward.learned._rows import from_runs
from pushforward.learned.emulator import Components, Emulator
from pushforward.learned.regressors import Regressor, relevance
from pushforward.math.noise import LowRank
from pushforward.model.inverse import read_problem
from pushforward.problems import bod

X = np.linspace(-1.0, 1.0, 6)
Y = 0.7 * X + 0.3 + np.array([0.2, -0.4, 0.1, 0.5, -0.3, 0.0])
BOD = {**bod.PROBLEM.inputs, **bod.PROBLEM.data}
QUICK = pf.Training(epochs=5, batch_size=8)


def line(x, y=None, sd=0.5, scale=1.0):
    slope = numpyro.sample("slope", dist.Normal(0.0, scale))
    offset = numpyro.sample("offset", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(slope * x + offset, sd), obs=y)


def line_posterior():
    """Mean and covariance of (slope, offset) by Gaussian conditioning."""
    g = np.stack([X, np.ones_like(X)], -1)
    covariance = np.linalg.inv(np.diag([1.0, 0.25]) + g.T @ g / 0.25)
    return covariance @ g.T @ Y / 0.25, covariance


def simulated(forward):
    """The same with a forward map that is no JAX program, a deterministic site that needs it, and one that does not."""

    def model(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        offset = numpyro.sample("offset", dist.Normal(0.0, 2.0))
        mean = numpyro.deterministic("mean", forward(slope, offset, x))
        numpyro.deterministic("total", slope + offset)
        numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    return model


def straight(slope, offset, x):
    return slope * x + offset


def members(outputs, z, **sites):
    """A result of EKI with one step, as far as `fit` reads it."""
    group = xr.Dataset({"z": (("step", "member", "z_dim"), z[None]), "y": (("step", "member", "a"), outputs[None])})
    return xr.DataTree.from_dict({"ensemble": group})


def draws_of_z(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 2))


def outputs_at(z):
    return z[:, :1] * X + 2.0 * z[:, 1:]


@pytest.fixture(scope="module")
def fitted():
    return pf.Surrogate(simulations=40).fit(line, x=X, y=Y, progress=False)


# ------------------------------------------------------------------------------------------------- the likelihood


class Fixed(Regressor):
    """Knows nothing: the same mean and variances everywhere."""

    mean: jax.Array
    variance: jax.Array

    def __call__(self, x):
        return self.mean, self.variance


@pytest.mark.parametrize("kind", ["sd", "covariance", "low_rank"])
def test_the_error_of_the_emulator_is_added_to_the_noise(float64, kind):
    """N(mean, R + D (V S V^T + residual) D), with a missing datum left out, and two sites."""
    rng = np.random.default_rng(2)
    m, k = 6, 2
    components = Components(*map(jnp.asarray, (rng.normal(size=m), np.full(m, 0.5), rng.normal(size=(m, k)), X**2)))
    regressor = Fixed(jnp.asarray(rng.normal(size=k)), jnp.array([0.3, 2.0]))
    emulator = Emulator(components, regressor, jnp.zeros(1), jnp.ones(1))
    root = np.tril(rng.normal(size=(4, 4))) + 2 * np.eye(4)
    noise = {
        "sd": (jnp.full(4, 0.7), 0.49 * np.eye(4)),
        "covariance": (jnp.asarray(root @ root.T), root @ root.T),
        "low_rank": (
            LowRank(jnp.asarray(root[:, :2]), jnp.full(4, 0.3)),
            root[:, :2] @ root[:, :2].T + 0.3 * np.eye(4),
        ),
    }[kind]
    data = rng.normal(size=m)
    data[2] = np.nan
    found = emulator.likelihood(
        {"a": noise[0], "b": jnp.full(2, 0.4)}, {"a": jnp.asarray(data[:4]), "b": jnp.asarray(data[4:])}
    )
    v = 0.5 * np.asarray(components.directions)
    covariance = v * np.array([0.3, 2.0]) @ v.T + np.diag(0.25 * X**2)
    covariance[:4, :4] += noise[1]
    covariance[4:, 4:] += 0.16 * np.eye(2)
    keep = ~np.isnan(data)
    mean = np.asarray(components.centre) + v @ np.asarray(regressor.mean)
    expected = stats.multivariate_normal(mean[keep], covariance[np.ix_(keep, keep)]).logpdf(data[keep])
    np.testing.assert_allclose(found(jnp.zeros(1)), expected, rtol=1e-10)


def test_components_hold_the_variance_that_was_asked_for():
    outputs, scale = draws_of_z(50) @ np.array([[3.0, 1.0, 0.0], [0.0, 0.1, 0.2]]) + 5.0, np.array([1.0, 2.0, 0.5])
    both, one = Components.of(outputs, scale, 1.0), Components.of(outputs, scale, 0.9)
    assert both.directions.shape == (3, 2)
    assert one.directions.shape == (3, 1)
    np.testing.assert_allclose(both.residual, 0.0, atol=1e-10)
    back = both.centre + both.scale * (both.scores(outputs) @ both.directions.T)
    np.testing.assert_allclose(back, outputs, rtol=1e-5)
    left = (outputs - one.centre) / scale - one.scores(outputs) @ one.directions.T
    np.testing.assert_allclose(one.residual, np.mean(left**2, 0), rtol=1e-4)
    np.testing.assert_allclose(both.scores(outputs).std(0), 1.0, rtol=1e-5)


def test_many_inputs_are_scaled_by_what_they_do():
    """Ridge coefficients, here of independent inputs: those that do nothing keep a fiftieth of the largest."""
    x = np.random.default_rng(0).normal(size=(4000, 30))
    y = np.stack([3 * x[:, 4], 4 * x[:, 4] + 2.5 * x[:, 11]], -1)
    found = relevance(x, y)
    np.testing.assert_allclose(np.mean(found**2), 1.0)
    np.testing.assert_allclose(
        found / found[4], np.where(np.arange(30) == 11, 0.5, 1 / 50) ** (np.arange(30) != 4), rtol=0.02
    )


def density_of(surrogate, model, z, **given):
    """Log density in z under a surrogate, less that of the model."""
    problem = read_problem(model, (), given)
    stand_in = _surrogates.read(surrogate, None, None, False, problem, (model, (), given), jax.random.key(0))
    return jax.vmap(stand_in.problem.log_density)(z) - jax.vmap(problem.log_density)(z)


def test_a_linear_model_is_emulated_exactly(fitted):
    """Also at data and a noise that it was not fitted with, some of them missing."""
    z = jnp.asarray(draws_of_z(20, seed=9), jnp.float32)
    np.testing.assert_allclose(density_of(fitted, line, z, x=X, y=Y), 0.0, atol=0.02)
    other = np.where(np.arange(6) == 1, np.nan, Y + 1)
    np.testing.assert_allclose(density_of(fitted, line, z, x=X, y=other, sd=jnp.asarray(0.3)), 0.0, atol=0.05)
    assert fitted.error.rmse["y"] < 0.01
    assert (fitted.error.training, fitted.error.held_out, fitted.error.failed) == (32, 8, 0)
    mean, sd = fitted.predict(z[0])["y"]
    np.testing.assert_allclose(mean, outputs_at(z[:1])[0], atol=0.01)
    assert mean.shape == sd.shape == (6,)


# ------------------------------------------------------------------------------------------- where runs come from


def test_members_of_an_inversion_are_learned_from():
    tree = pf.infer(line, method=pf.EKI(12, schedule=3), x=X, y=Y, progress=False)
    surrogate = pf.Surrogate().fit(line, x=X, y=Y, runs=[tree, tree], progress=False)
    steps = tree["ensemble"].sizes["step"]
    assert surrogate.error.training + surrogate.error.held_out == 2 * 12 * steps
    assert surrogate.fitted.simulations == 0
    z = tree["ensemble"]["z"].to_numpy()[-1]
    np.testing.assert_allclose(surrogate.predict(z[0])["y"][0], outputs_at(z[:1])[0], atol=0.02)


def test_failed_runs_are_left_out_and_counted():
    z = draws_of_z(30)
    outputs = outputs_at(z)
    outputs[:7, 3] = np.nan
    surrogate = pf.Surrogate(held_out=0.3).fit(line, x=X, y=Y, runs=members(outputs, z), progress=False)
    assert (surrogate.error.failed, surrogate.error.training, surrogate.error.held_out) == (7, 16, 7)
    assert surrogate.error.rmse["y"] < 0.05


def test_runs_are_kept_at_a_checkpoint(tmp_path):
    forward = pf.simulator(straight, (6,))
    model, surrogate = simulated(forward), pf.Surrogate(simulations=70)
    first = surrogate.fit(model, x=X, y=Y, checkpoint=tmp_path / "runs", progress=False)
    assert forward.calls == 70
    again = surrogate.fit(model, x=X, y=Y, checkpoint=tmp_path / "runs", progress=False)
    assert forward.calls == 70
    assert eqx.tree_equal(first.fitted.emulator, again.fitted.emulator)
    assert surrogate.fit(model, x=X, y=Y, progress=False).error.rmse == pytest.approx(first.error.rmse)


@pytest.mark.parametrize(
    "kind",
    [
        "gaussian_process",
        pytest.param("random_features", marks=pytest.mark.slow),
        pytest.param("neural_network", marks=pytest.mark.slow),
    ],
)
def test_a_file_keeps_the_surrogate(tmp_path, kind, fitted):
    surrogate = pf.Surrogate(kind, simulations=24, features=20, training=QUICK)
    if kind == "neural_network":
        with pytest.warns(UserWarning, match="held-out error of 'y' is .* times its noise"):
            surrogate = surrogate.fit(line, x=X, y=Y, progress=False)
    else:
        surrogate = fitted if kind == "gaussian_process" else surrogate.fit(line, x=X, y=Y, progress=False)
    pf.save(tmp_path / "surrogate.pf", surrogate)
    again = pf.load(tmp_path / "surrogate.pf")
    z = jnp.array([0.4, -1.0])
    np.testing.assert_array_equal(again.predict(z)["y"], surrogate.predict(z)["y"])
    assert repr(again) == repr(surrogate)
    assert f"{surrogate.error.rmse['y']:.3g} noise sd" in repr(again)
    assert density_of(again, line, z[None], x=X, y=Y).shape == (1,)


# ------------------------------------------------------------------------------------------------ accuracy on BOD


@pytest.fixture(scope="module")
def posterior():
    return exact.bod_posterior(bod.DATA, bound=7.0, points=141)


def emulated_weights(surrogate, posterior):
    """Weights of the emulated posterior on the grid of the exact one."""
    problem = read_problem(bod.model, (), BOD)
    likelihood = _surrogates._likelihood(surrogate.fitted.emulator, ("y",), problem)
    u = np.stack(np.meshgrid(posterior.grid, posterior.grid, indexing="ij"), -1).reshape(-1, 2)
    log_density = jax.jit(lambda u: jax.lax.map(likelihood, u, batch_size=2048))(jnp.asarray(u, jnp.float32))
    log_density = np.asarray(log_density, float) - 0.5 * np.sum(u**2, -1)
    weights = np.exp(log_density - log_density.max()).reshape(posterior.log_density.shape)
    return weights / weights.sum()


def hellinger(surrogate, posterior):
    return np.sqrt(max(0.0, 1 - np.sum(np.sqrt(posterior.probability * emulated_weights(surrogate, posterior)))))


def fit_bod(kind, n, key, way):
    runs = pf.infer(bod.model, method=pf.EKI(n // 4, schedule=4), key=key, progress=False, **BOD) if way else None
    return pf.Surrogate(kind, simulations=n).fit(bod.model, runs=runs, key=key, progress=False, **BOD)


def test_more_runs_are_nearer_to_the_posterior(posterior):
    few, many = (hellinger(fit_bod("gaussian_process", n, 0, False), posterior) for n in (20, 100))
    assert many < 0.05
    assert many < few / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Surrogate")
@pytest.mark.parametrize("way", [False, True], ids=["prior", "eki"])
@pytest.mark.parametrize("kind", ["gaussian_process", "random_features", "neural_network"])
def test_the_error_falls_with_the_number_of_runs(posterior, kind, way):
    """Measured slopes are in docs/surrogates.md; half of the smallest one must be there."""
    sizes = (20, 40, 80, 160)
    found = [hellinger(fit_bod(kind, n, 0, way), posterior) for n in sizes]
    assert np.polyfit(np.log(sizes), np.log(found), 1)[0] < -0.3
    assert found[-1] < 0.5 * found[0]


# ---------------------------------------------------------------------------------------------------- through infer


def errors_of(tree, names, exact_mean):
    """Errors of means in their standard errors, by effective sample size."""
    draws = np.stack([tree["posterior"][n].to_numpy() for n in names], -1)
    sizes = [float(az.ess(draws[..., i])) for i in range(len(names))]
    return (draws.mean((0, 1)) - exact_mean) / (draws.std((0, 1)) / np.sqrt(sizes))


@pytest.fixture(scope="module")
def biased():
    """Runs of another simulator, 0.4 noise sd too high: an emulator that is wrong and sure of itself."""
    z = draws_of_z(40)
    return members(outputs_at(z) + 0.2, z)


@pytest.mark.filterwarnings("ignore:NUTS. (the effective|R-hat)")
def test_nuts_runs_without_the_simulator_and_is_set_right_by_it(biased):
    forward = pf.simulator(straight, (6,))
    model, (mean, covariance) = simulated(forward), line_posterior()
    surrogate = pf.Surrogate().fit(model, x=X, y=Y, runs=biased, progress=False)
    assert forward.calls == 0
    method = pf.NUTS(chains=2, warmup=200)
    tree = pf.infer(model, method=method, surrogate=surrogate, draws=1100, x=X, y=Y, progress=False)
    found = pf.attributes(tree)
    assert (forward.calls, found["evaluations"], found["gradient_evaluations"]) == (0, 0, 0)
    assert sorted(tree["posterior"].data_vars) == ["offset", "slope", "total"]
    assert any("['mean'] need the simulator" in note for note in found["notes"])
    assert any("log_likelihood was left out" in note for note in found["notes"])
    assert "log_likelihood" not in tree.children
    assert found["surrogate_kind"] == "gaussian_process"
    assert found["surrogate_error"]["y"] < 0.05
    assert found["surrogate_sd"] < 0.1
    # Data that are 0.2 too low all along: the intercept is 0.2 too low, shrunk by the prior. Off by 10 standard errors.
    shift = covariance @ np.stack([X, np.ones(6)]) @ np.full(6, -0.2) / 0.25
    assert np.abs(errors_of(tree, ("slope", "offset"), mean + shift)).max() < 4
    assert np.abs(errors_of(tree, ("slope", "offset"), mean)).max() > 10

    method = pf.NUTS(chains=2, warmup=200, corrected=True)
    tree = pf.infer(model, method=method, surrogate=surrogate, draws=600, x=X, y=Y, progress=False)
    found, stats_ = pf.attributes(tree), tree["sample_stats"]
    assert forward.calls == found["evaluations"] == 2 * (60 + 600)
    # Two means: a false alarm in 8000.
    assert np.abs(errors_of(tree, ("slope", "offset"), mean)).max() < 4
    np.testing.assert_allclose(tree["posterior"]["offset"].std(), covariance[1, 1] ** 0.5, rtol=0.15)
    np.testing.assert_array_equal(stats_["step_size"], np.broadcast_to(stats_["step_size"][:, :1], (2, 600)))
    rate = stats_["second_stage_acceptance_rate"]
    assert float(rate.min()) >= 0.0
    assert float(rate.mean()) == pytest.approx(found["second_stage_acceptance_rate"], abs=1e-5)
    # A move is made with the second stage's probability, not the first's.
    moved = np.diff(tree["posterior"]["slope"].to_numpy(), axis=1) != 0
    assert moved.mean() == pytest.approx(float(rate.mean()), abs=0.05)
    # lp is the exact log density, in z.
    z = jnp.array([tree["posterior"]["slope"][0, 5], tree["posterior"]["offset"][0, 5] / 2])
    exact_lp = read_problem(line, (), {"x": X, "y": Y}).log_density(z)
    assert float(stats_["lp"][0, 5]) == pytest.approx(float(exact_lp), abs=1e-3)


@pytest.mark.slow
def test_runs_that_fail_are_rejected(fitted):
    def broken(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        offset = numpyro.sample("offset", dist.Normal(0.0, 2.0))
        mean = jnp.where(slope > 0.7, jnp.nan, slope * x + offset)
        numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    method = pf.NUTS(chains=1, warmup=100, corrected=True)
    tree = pf.infer(broken, method=method, surrogate=fitted, draws=200, x=X, y=Y, progress=False)
    slope = tree["posterior"]["slope"].to_numpy()
    assert slope.max() <= 0.7
    assert np.isfinite(tree["sample_stats"]["lp"]).all()
    assert 0.1 < pf.attributes(tree)["second_stage_acceptance_rate"] < 0.9


@pytest.mark.slow
def test_a_surrogate_that_is_not_fitted_is_fitted_first():
    surrogate = pf.Surrogate(simulations=40)
    tree = pf.infer(line, method="laplace", surrogate=surrogate, x=X, y=Y, draws=50, progress=False)
    assert pf.attributes(tree)["evaluations"] == 40
    assert pf.attributes(tree)["surrogate_runs"] == 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:NUTS", "ignore:Surrogate")
def test_a_poor_surrogate_of_bod_is_corrected():
    """Means of A, B, A^2, B^2 within 4 standard errors: a false alarm in 4000. The surrogate alone misses by more."""
    z = np.random.default_rng(0).normal(size=(30, 2))
    demand = np.stack([a * -np.expm1(-b * exact.TIMES) for a, b in exact.bod_parameters(z)])
    surrogate = pf.Surrogate().fit(bod.model, runs=members(demand + 0.02, z), progress=False, **BOD)
    expected = np.concatenate([bod.MEAN, bod.MEAN**2 + bod.COVARIANCE.diagonal()])

    def errors(method, draws):
        tree = pf.infer(bod.model, method=method, surrogate=surrogate, draws=draws, progress=False, **BOD)
        tree["posterior"] = tree["posterior"].assign(AA=tree["posterior"]["A"] ** 2, BB=tree["posterior"]["B"] ** 2)
        return np.abs(errors_of(tree, ("A", "B", "AA", "BB"), expected))

    options = {"target_acceptance": 0.95, "warmup": 1000}
    assert errors(pf.NUTS(**options), 2000).max() > 8
    assert errors(pf.NUTS(corrected=True, **options), 4000).max() < 4


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "kriging"}, "kind=.*gaussian_process.*got 'kriging'"),
        ({"kernel": "cubic"}, "kernel=.*matern52.*got 'cubic'"),
        ({"components": 0}, "components=.*at least 1.*got 0"),
        ({"components": 1.5}, "components=.*share of variance.*got 1.5"),
        ({"held_out": 1.0}, "held_out=.*between 0 and 1; got 1.0"),
        ({"simulations": 3}, "simulations=.*at least 10; got 3"),
        ({"features": 0}, "features=.*at least 1; got 0"),
        ({"training": pf.Training(source="stream")}, 'training=.*source="buffer"'),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(MethodError, match=text):
        pf.Surrogate(**options)


def moving(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(slope * x, sd), obs=y)


def counts(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Poisson(jnp.exp(slope * x)), obs=y)


def constant(x, y=None):
    numpyro.sample("slope", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(0 * x, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "given", "error", "text"),
    [
        (moving, {}, MethodError, "noise of site 'y' depends on the latent sites .*'sd'"),
        (counts, {"y": np.arange(6)}, MethodError, "site 'y' is Poisson"),
        (constant, {}, DataError, "outputs are the same in all rows"),
        (line, {"y": None}, DataError, "no site of the model is data.*observed="),
        (line, {"sd": jnp.asarray(0.0)}, (MethodError, DataError), "noise of site 'y'"),
    ],
)
def test_models_that_are_refused(model, given, error, text):
    with pytest.raises(error, match=text):
        pf.Surrogate(simulations=12).fit(model, progress=False, **({"x": X, "y": Y} | given))


def test_runs_that_are_refused():
    z = draws_of_z(30)
    surrogate, outputs = pf.Surrogate(), outputs_at(z)

    def refused(runs, error, text):
        with pytest.raises(error, match=text):
            surrogate.fit(line, x=X, y=Y, runs=runs, progress=False)

    refused(3, ArgumentError, "result of pf.infer.*got int")
    refused([], ArgumentError, "runs= is empty")
    refused(xr.DataTree(), ArgumentError, "needs the group 'ensemble'")
    refused(
        members(outputs, z[:, :1]), DataError, r"has 'z' of shape \(1,\) for each member, and this model has \(2,\)"
    )
    refused(members(outputs[:, :5], z), DataError, r"'y' of shape \(5,\).*\(6,\)")
    other = xr.DataTree.from_dict({"ensemble": members(outputs, z)["ensemble"].to_dataset().drop_vars("y")})
    refused(other, DataError, "has no 'y'")
    refused(members(outputs[:9], z[:9]), DataError, "9 runs with finite outputs are too few")
    refused(members(np.full_like(outputs, np.nan), z), DataError, "0 runs with finite outputs .*30 failed")


def test_the_group_of_a_result_and_steps_of_it_are_taken_as_runs():
    z = draws_of_z(12)
    tree, problem = members(outputs_at(z), z), read_problem(line, (), {"x": X, "y": Y})
    for runs in (tree, tree["ensemble"], tree["ensemble"].to_dataset()):
        np.testing.assert_allclose(from_runs(problem, ("y",), runs)[0], z, rtol=1e-6)
    part = [tree["ensemble"].isel(member=slice(0, 5)), tree["ensemble"].isel(member=slice(5, 12))]
    np.testing.assert_allclose(from_runs(problem, ("y",), part)[0], z, rtol=1e-6)


def test_surrogates_of_other_models_are_refused(fitted):
    def refused(model, text, error=MethodError, method="nuts", surrogate=fitted, **given):
        with pytest.raises(error, match=text):
            pf.infer(model, method=method, surrogate=surrogate, progress=False, **({"x": X, "y": Y} | given))

    refused(line, "shapes {'y': \\(6,\\)}, and this model has {'y': \\(5,\\)}", x=X[:5], y=Y[:5])
    refused(line, "another value of the argument 'x'", x=X + 1)
    refused(line, "prior of 'slope' is another", scale=3.0)
    refused(moving, "noise of site 'y' depends")
    refused(line, "surrogate= takes pf.Surrogate", ArgumentError, surrogate=3)
    refused(line, "surrogate= takes pf.Surrogate.*got Surrogate", ArgumentError, surrogate=pf.Surrogate)
    refused(line, "states= and surrogate= were both given", states=pf.Kalman())
    refused(line, "predictive=True runs the model", predictive=True)
    refused(line, "AmortizedFlow needs the model itself", method=pf.AmortizedFlow())
    refused(line, "NUTS.corrected=True. corrects a surrogate", method=pf.NUTS(corrected=True), surrogate=None)
    with pytest.raises(MethodError, match="corrected=.*True or False"):
        pf.NUTS(corrected=1)
    with pytest.raises(MethodError, match="not fitted"):
        _ = pf.Surrogate().error
