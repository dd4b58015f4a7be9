"""`pf.learn`: maximum likelihood, posterior mode and EM against exact answers; parameters of both kinds; failures."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward._errors import ArgumentError, CheckpointError, InferenceError, MethodError, ModelError, Outcome
from pushforward._runner import Runner
from pushforward.learn import _read
from pushforward.learned import _likelihood_training as training
from pushforward.learned.unknowns import Marginal
from pushforward.math.expectation_maximisation import quadratic_points
from pushforward.methods._expectation import Moments, SmoothingDraws
from pushforward.model._param_sites import is_network, param_sites

POSITIVE = dist.constraints.positive


def data(length, rho=0.9, q=0.4, r=0.5, seed=1):
    rng = np.random.default_rng(seed)
    x, ys = 0.0, []
    for _ in range(length):
        x = rho * x + q * rng.normal()
        ys.append(x + r * rng.normal())
    return np.array(ys)


def autoregression(y):
    """One parameter with a prior, two `numpyro.param`."""
    rho = numpyro.sample("rho", dist.Uniform(0.0, 1.0))
    q = numpyro.param("q", 1.0, constraint=POSITIVE)
    r = numpyro.param("r", jnp.array(0.6), constraint=POSITIVE)

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(rho * x, q))
        numpyro.sample("y", dist.Normal(x, r), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


def dense_log_likelihood(theta, y):
    """log p(y) of `autoregression` from the covariance matrix of all data, without any recursion."""
    rho, q, r = theta
    length = len(y)
    # x = weights @ (x0, e_1..e_T), x_t = rho x_{t-1} + q e_t
    weights = np.zeros((length, length + 1))
    row = np.eye(length + 1)[0]
    for t in range(length):
        row = rho * row
        row[t + 1] += q
        weights[t] = row
    present = ~np.isnan(y)
    cov = (weights @ weights.T + r**2 * np.eye(length))[np.ix_(present, present)]
    return scipy.stats.multivariate_normal.logpdf(y[present], np.zeros(present.sum()), cov)


@functools.cache
def exact_maximum():
    y = series()

    def loss(u):
        return -dense_log_likelihood((1 / (1 + np.exp(-u[0])), np.exp(u[1]), np.exp(u[2])), y)

    options = {"xatol": 1e-8, "fatol": 1e-11, "maxiter": 2000}
    found = scipy.optimize.minimize(loss, [2.0, -1.0, -0.7], method="Nelder-Mead", options=options)
    return 1 / (1 + np.exp(-found.x[0])), np.exp(found.x[1]), np.exp(found.x[2]), -found.fun


def series():
    y = data(150)
    y[10:13] = np.nan
    return y


@functools.cache
def likeliest():
    """Maximum likelihood of `autoregression` in float64."""
    method = pf.Likelihood(tolerance=1e-7)
    return pf.learn(autoregression, y=series(), states=pf.Kalman(), method=method, progress=False)


def unknowns_of(model, **kwargs):
    return _read(model, (), kwargs, param_sites(model, (), kwargs, jax.random.key(0)), None)


def test_maximum_likelihood_is_that_of_the_dense_covariance(float64):
    found = likeliest()
    rho, q, r, value = exact_maximum()
    assert found.log_likelihood[0] == pytest.approx(dense_log_likelihood((0.5, 1.0, 0.6), series()), abs=1e-9)
    assert found.log_likelihood[-1] == pytest.approx(value, abs=1e-6)
    got = [float(found.estimates[n]) for n in ("rho", "q", "r")]
    np.testing.assert_allclose(got, [rho, q, r], rtol=2e-3)
    assert found.outcome == Outcome.SUCCESS
    assert found.attributes["failed_step"] is None
    # Standard errors: the inverse of a Hessian by differences of the dense log likelihood.
    steps, center = 1e-3 * np.eye(3), np.array(got)

    def second(a, b):
        f = lambda s: dense_log_likelihood(center + s, series())  # noqa: E731
        return (f(a + b) - f(a - b) - f(b - a) + f(-a - b)) / 4e-6

    hessian = np.array([[second(a, b) for b in steps] for a in steps])
    expected = np.sqrt(np.diag(np.linalg.inv(-hessian)))
    np.testing.assert_allclose([float(found.standard_errors[n]) for n in ("rho", "q", "r")], expected, rtol=1e-3)
    # The trained model is a model without unknowns.
    tree = pf.infer(found.model, method=pf.Kalman(store="last"), y=series(), progress=False)
    density = dist.Uniform(0.0, 1.0).log_prob(found.estimates["rho"])
    assert tree.attrs["log_evidence"] == pytest.approx(value + float(density), abs=1e-6)


def test_em_never_lowers_the_exact_likelihood_and_ends_at_its_maximum(float64):
    method = pf.EM(steps=300, tolerance=1e-7)
    found = pf.learn(autoregression, y=series(), states=pf.Kalman(), method=method, progress=False)
    assert len(found.log_likelihood) > 5
    assert np.diff(found.log_likelihood).min() > -1e-10
    assert found.log_likelihood[-1] == pytest.approx(exact_maximum()[3], abs=1e-3)


def plane(y):
    """Two states, noise that they share, a first datum, and data that are missing in part."""
    a = numpyro.param("a", 0.7)
    q = numpyro.param("q", jnp.array([0.4, 0.9]), constraint=POSITIVE)
    mean = numpyro.param("mean", jnp.array([1.0, -1.0]))
    noise = numpyro.param("noise", 0.5, constraint=POSITIVE)
    start = numpyro.sample("start", dist.Normal(mean, 1.5).to_event(1))
    numpyro.sample("first", dist.Normal(start[0], noise), obs=0.3)

    def step(x, y):
        new = jnp.stack([a * x[0] + 0.3 * x[1], 0.9 * x[1] - 0.2 * a * x[0]])
        x = numpyro.sample("x", dist.MultivariateNormal(new, jnp.diag(q**2) + 0.1))
        numpyro.sample("y", dist.Normal(x, noise).to_event(1).mask(True), obs=y)
        return x, None

    scan(step, start, y)


def test_gradient_of_the_expected_density_is_that_of_the_likelihood(float64):
    # Fisher's identity: at the parameters of the E step the two gradients agree, if the moments are the exact ones.
    y = np.random.default_rng(0).normal(size=(12, 2))
    y[4] = np.nan
    unknowns = unknowns_of(plane, y=y)
    flat, zero = unknowns.start() + 0.1, jnp.zeros((), int)

    @jax.jit
    def both(flat):
        objective, value = Moments(pf.Kalman())(unknowns, flat, jax.random.key(0))
        marginal = Marginal(unknowns, pf.Kalman(), jax.random.key(0), False, False)
        return jax.grad(objective)(flat, zero), jax.value_and_grad(marginal)(flat, zero), value

    expected, (value, exact), evidence = both(flat)
    assert float(jnp.max(jnp.abs(exact))) > 1.0
    np.testing.assert_allclose(expected, exact, atol=1e-8)
    np.testing.assert_allclose(evidence, value, atol=1e-9)


@pytest.mark.slow
def test_gradient_of_expected_paths_is_that_of_the_likelihood_up_to_its_draws(float64):
    y = np.random.default_rng(0).normal(size=(12, 2))
    unknowns = unknowns_of(plane, y=y)
    flat, zero = unknowns.start() + 0.1, jnp.zeros((), int)

    @jax.jit
    def monte_carlo(key):
        return jax.grad(SmoothingDraws(pf.Kalman(), 2000)(unknowns, flat, key)[0])(flat, zero)

    marginal = Marginal(unknowns, pf.Kalman(), jax.random.key(0), False, False)
    exact = jax.jit(jax.grad(marginal))(flat, zero)
    draws = np.stack([monte_carlo(jax.random.key(i)) for i in range(8)])
    error = draws.std(0, ddof=1) / np.sqrt(8)
    # Six t-values of 7 degrees of freedom: |t| > 8 has probability 6 x 1e-4.
    assert np.all(np.abs(draws.mean(0) - exact) < 8 * error)


def test_points_carry_moments_of_singular_laws(float64):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 2))
    mean, cov = rng.normal(size=4), root @ root.T
    points = np.asarray(quadratic_points(jnp.asarray(mean), jnp.asarray(cov)))
    np.testing.assert_allclose(points.mean(0), mean, atol=1e-12)
    np.testing.assert_allclose(np.cov(points.T, ddof=0), cov, atol=1e-12)


def test_gradient_of_the_ensemble_filter_tends_to_the_exact_one(float64):
    y = series()[:20]
    unknowns = unknowns_of(autoregression, y=y)
    flat, zero = unknowns.start() + 0.2, jnp.zeros((), int)
    exact = jax.jit(jax.grad(Marginal(unknowns, pf.Kalman(), jax.random.key(0), False, False)))(flat, zero)
    sizes, errors = (25, 400), []
    for members in sizes:

        def slope(key, members=members):
            return jax.grad(Marginal(unknowns, pf.EnKF(members=members), key, False, False))(flat, zero)

        found = jax.jit(lambda keys, slope=slope: jax.lax.map(slope, keys))(jax.random.split(jax.random.key(1), 24))
        errors.append(float(jnp.sqrt(jnp.mean(jnp.sum((found - exact) ** 2, -1)))))
    # Root mean squares over 24 keys of 3 numbers: their logarithms are off by about 0.15 each, the slope by 0.08.
    order = np.log(errors[1] / errors[0]) / np.log(sizes[1] / sizes[0])
    assert -0.85 < order < -0.3


def drifting(y):
    drift = numpyro.sample("drift", dist.Normal(0.0, 0.5))

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(x + drift, 0.3))
        numpyro.sample("y", dist.Normal(x, 0.1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


def drift_data():
    rng = np.random.default_rng(3)
    return np.cumsum(0.4 + 0.3 * rng.normal(size=80)) + 0.1 * rng.normal(size=80)


def test_map_of_a_linear_parameter_is_its_posterior_mean(float64):
    # y = drift t + x0 + sum of noise + v: a Gaussian regression with a known covariance.
    y = drift_data()
    times = np.arange(1, len(y) + 1)
    cov = 1.0 + 0.3**2 * np.minimum.outer(times, times) + 0.1**2 * np.eye(len(y))
    precision = 1 / 0.5**2 + times @ np.linalg.solve(cov, times)
    mean = times @ np.linalg.solve(cov, y) / precision
    found = pf.learn(drifting, y=y, states="kalman", method=pf.MAP(tolerance=1e-9), progress=False)
    assert float(found.estimates["drift"]) == pytest.approx(mean, abs=1e-6)
    assert float(found.standard_errors["drift"]) == pytest.approx(precision**-0.5, rel=1e-6)


def test_increments_find_a_drift_that_the_first_filter_does_not_have():
    # The mean of 79 increments has the standard error 0.3 / sqrt(79) = 0.034: false alarm 1e-5 at 0.15.
    method = pf.Increments(steps=6, inner=10)
    found = pf.learn(drifting, y=drift_data(), states=pf.Kalman(), method=method, progress=False)
    assert abs(float(found.estimates["drift"]) - 0.4) < 0.15
    assert found.standard_errors == {}


def corrected(y, force):
    """A step that lacks -0.3 x + 0.5, and a network for it."""
    net = numpyro.param("net", lambda key: eqx.nn.MLP(1, 1, 4, 1, activation=jnp.tanh, key=key))

    def step(x, item):
        y, push = item
        x = numpyro.sample("x", dist.Normal(x + push + net(x[None])[0], 0.1))
        numpyro.sample("y", dist.Normal(x, 0.1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(1.7, 1.0)), (y, force))


def test_a_network_in_the_step_is_learned():
    rng = np.random.default_rng(5)
    force = np.where(np.arange(150) % 10 == 5, 3.0, 0.0)
    x, ys = 1.7, []
    for push in force:
        x = 0.7 * x + 0.5 + push + 0.1 * rng.normal()
        ys.append(x + 0.1 * rng.normal())
    ys = np.array(ys)
    ys[::7] = np.nan
    method = pf.Likelihood(steps=150, optimizer="adam", learning_rate=0.05)
    found = pf.learn(corrected, y=ys, force=force, states=pf.Kalman("extended"), method=method, progress=False)
    net = found.estimates["net"]
    assert isinstance(net, eqx.nn.MLP)
    # Where the data are: each of the 15 pulses decays through this range.
    points = np.linspace(1.7, 4.0, 7)
    error = np.array([float(net(jnp.array([v]))[0]) for v in points]) - (0.5 - 0.3 * points)
    assert np.abs(error).mean() < np.abs(0.5 - 0.3 * points).mean() / 3
    assert found.log_likelihood[-1] > found.log_likelihood[0] + 50


def test_networks_of_several_layers_have_no_standard_errors():
    """They take as long to compile as the training, and the weights' curvature is never that of a maximum."""
    found = with_network()
    assert found.standard_errors == {}
    assert found.outcome == Outcome.SUCCESS
    assert found.attributes["warnings"][0].startswith("there are no standard errors: ['net'] are networks")
    key = jax.random.key(0)
    linear, deep = eqx.nn.Linear(2, 1, key=key), eqx.nn.MLP(1, 1, 2, 1, key=key)
    arrays = {"a": jnp.ones(2), "b": {"c": jnp.ones(2)}}
    for value in (deep, {"net": deep}, [linear, linear], eqx.nn.Sequential([linear, linear])):
        assert is_network(value)
    for value in (1.0, jnp.ones(3), arrays, linear, {"a": linear}, eqx.nn.MLP(1, 1, 2, 0, key=key)):
        assert not is_network(value)


def affine(y):
    """An autoregression whose step is a module of one layer."""
    layer = numpyro.param("layer", lambda key: eqx.nn.Linear(1, 1, key=jax.random.key(0)))
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(layer(x[None])[0], 0.4))
        numpyro.sample("y", dist.Normal(x + mean[0], 0.5), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(mean[1], 1.0)), y)


@pytest.mark.slow
def test_standard_errors_are_pytrees_like_their_parameters():
    found = pf.learn(affine, y=data(60), states=pf.Kalman(), method=pf.MAP(steps=60), progress=False)
    layer = found.standard_errors["layer"]
    assert isinstance(layer, eqx.nn.Linear)
    assert (layer.weight.shape, layer.bias.shape, found.standard_errors["mean"].shape) == ((1, 1), (1,), (2,))
    # x0 is nearly as uncertain as its prior, so that its mean is, too; the slope is that of 60 data, about 0.1.
    assert 0.7 < found.standard_errors["mean"][1] < 1.0
    assert 0.03 < layer.weight[0, 0] < 0.3


# ----------------------------------------------------------------------------------------------------------- files


def closure(hidden=3, name="net", slope=0.5):
    """A model whose network has a class, and an activation, that no import finds."""

    class Correction(eqx.Module):
        layers: list
        half: jax.Array
        count: jax.Array
        bend: Callable

        def __call__(self, x):
            return self.half.astype(x.dtype) * self.layers[1](self.bend(self.layers[0](x)))

    def built(key):
        first, second = jax.random.split(key)
        layers = [eqx.nn.Linear(1, hidden, key=first), eqx.nn.Linear(hidden, 1, key=second)]
        return Correction(layers, jnp.asarray(0.5, jnp.bfloat16), jnp.arange(2), lambda v: jnp.tanh(v))

    def model(y, names=("a", "b"), scale=1.0):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        net = numpyro.param(name, built)
        sd = numpyro.param("sd", 0.5, constraint=POSITIVE)

        def step(x, y):
            x = numpyro.sample("x", dist.Normal(slope * rate * x + net(x[None])[0], scale * sd))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)

    return model


@functools.cache
def with_network():
    """Learned where working out curvature is an error."""
    options = {"states": pf.Kalman("extended"), "method": pf.Likelihood(steps=2, optimizer="adam"), "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "curvature", None)
        return pf.learn(closure(), y=data(20), names=("a", "b"), **options)


def same(a, b):
    """Whether two pytrees have equal arrays of equal types."""
    pairs = zip(jax.tree.leaves(eqx.filter(a, eqx.is_array)), jax.tree.leaves(eqx.filter(b, eqx.is_array)), strict=True)
    return all(u.dtype == v.dtype and np.array_equal(np.asarray(u), np.asarray(v)) for u, v in pairs)


def test_what_was_learned_is_read_as_it_was_written(float64, tmp_path):
    found = likeliest()
    pf.save(tmp_path / "folder" / "learned.pf", found)
    back = pf.load(tmp_path / "folder" / "learned.pf", model=autoregression)
    assert list(back.estimates) == list(found.estimates)
    assert same(back.estimates, found.estimates)
    assert back.standard_errors == found.standard_errors
    np.testing.assert_array_equal(back.log_likelihood, found.log_likelihood)
    assert back.log_likelihood.dtype == found.log_likelihood.dtype
    assert (back.outcome, back.attributes) == (found.outcome, found.attributes)
    assert isinstance(back.outcome, Outcome)
    trees = [pf.infer(f.model, method=pf.Kalman(store="last"), y=series(), progress=False) for f in (found, back)]
    assert trees[0].attrs["log_evidence"] == trees[1].attrs["log_evidence"]
    with jax.enable_x64(False), pytest.raises(CheckpointError, match="learned in float64, and JAX is in float32"):
        pf.load(tmp_path / "folder" / "learned.pf", model=autoregression)


def test_networks_are_made_anew_by_the_model(tmp_path):
    """The class of `closure()` is another one in each call, as in another process, and so is its activation."""
    found, path = with_network(), tmp_path / "learned.pf"
    pf.save(path, found)
    back = pf.load(path, model=closure())
    net = back.estimates["net"]
    assert type(net).__name__ == "Correction"
    assert type(net) is not type(found.estimates["net"])
    assert net.half.dtype == jnp.bfloat16
    assert same(back.estimates, found.estimates)
    state = jnp.array([0.7])
    assert net(state) == found.estimates["net"](state)
    options = {"method": pf.Kalman("extended", store="last"), "y": data(20), "progress": False}
    trees = [pf.infer(f.model, **options) for f in (found, back)]
    assert trees[0].attrs["log_evidence"] == trees[1].attrs["log_evidence"]
    # Standard errors have the layout of the floating arrays of their sites.
    errors = jax.tree.map(lambda v: np.asarray(v, float)[()] / 3, eqx.filter(back.estimates, eqx.is_inexact_array))
    pf.save(path, dataclasses.replace(back, standard_errors=errors))
    again = pf.load(path, model=closure())
    assert same(again.estimates, found.estimates)
    assert all(map(np.array_equal, *(jax.tree.leaves(e["net"].layers) for e in (again.standard_errors, errors))))
    assert again.standard_errors["net"].count is again.standard_errors["net"].bend is None
    assert type(again.standard_errors["sd"]) is type(errors["sd"]) is np.float64


def test_files_of_other_models_are_refused(tmp_path):
    found, path = with_network(), tmp_path / "learned.pf"
    pf.save(path, found)

    def broken(y, names=()):
        numpyro.param("net", lambda key: {}["missing"])

    with pytest.raises(ArgumentError, match=r"holds what pf.learn found. Write pf.load\(path, model=model\)"):
        pf.load(path)
    with pytest.raises(CheckpointError, match=r"sites \['net', 'sd'\], and this one has \['other', 'sd'\]"):
        pf.load(path, model=closure(name="other"))
    with pytest.raises(CheckpointError, match="'net' has arrays .*and this model makes .*4, 1.*given to pf.learn"):
        pf.load(path, model=closure(hidden=4))
    with pytest.raises(CheckpointError, match="stopped with KeyError: 'missing'. Pass the model"):
        pf.load(path, model=broken)
    with pytest.warns(UserWarning, match="not what it was when the estimates were learned"):
        assert same(pf.load(path, model=closure(slope=0.4)).estimates, found.estimates)


def test_save_says_what_it_cannot_write(tmp_path):
    found: Any = with_network()
    args, kwargs = found.origin.call
    odd = dataclasses.replace(found.origin, call=(args, kwargs | {"names": object()}))
    with pytest.raises(ArgumentError, match=r"no arrays must be numbers.*type object. .*functools.partial\(model"):
        pf.save(tmp_path / "learned.pf", dataclasses.replace(found, origin=odd))
    pair = collections.namedtuple("pair", "a b")
    odd = dataclasses.replace(found.origin, call=(args, kwargs | {"names": pair(1, 2)}))
    with pytest.raises(ArgumentError, match="plain lists, tuples and dicts"):
        pf.save(tmp_path / "learned.pf", dataclasses.replace(found, origin=odd))
    with pytest.raises(ArgumentError, match="made by hand"):
        pf.save(tmp_path / "learned.pf", dataclasses.replace(found, origin=None))
    with pytest.raises(ArgumentError, match=r"of what pf.learn returns the whole, not its parts"):
        pf.save(tmp_path / "learned.pf", found.model)
    assert not (tmp_path / "learned.pf").exists()


# -------------------------------------------------------------------------------------------------------- failures


def breaking(y):
    """Its likelihood rises with `a` and is not a number from a = 1.18 on."""
    a = numpyro.param("a", 1.0)

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(0.5 * x + a + 0.0 * jnp.log(1.18 - a), 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


def test_divergence_is_reported_at_its_step_with_the_last_good_estimates():
    options = {
        "y": np.full(20, 6.0),
        "states": pf.Kalman(),
        "method": pf.Likelihood(optimizer="adam", learning_rate=0.05, steps=50),
        "progress": False,
    }
    with pytest.raises(InferenceError, match="at step 4 .*not finite: the filter diverged") as raised:
        pf.learn(breaking, **options)
    found = raised.value.partial
    assert found.outcome == raised.value.outcome == Outcome.NONFINITE
    assert found.attributes["failed_step"] == 4
    # Adam's steps are 0.05 long at first: 1, 1.05, 1.1, 1.15, and then 1.2.
    assert float(found.estimates["a"]) == pytest.approx(1.15, abs=0.005)
    assert np.isfinite(found.log_likelihood[:4]).all()
    assert not np.isfinite(found.log_likelihood[4])
    assert float(pf.learn(breaking, throw=False, **options).estimates["a"]) == float(found.estimates["a"])


def test_a_start_without_a_likelihood_is_refused():
    with pytest.raises(InferenceError, match="not finite at the start") as raised:
        pf.learn(functools.partial(never, 0.0), y=np.ones(5), states=pf.Kalman(), progress=False)
    assert raised.value.outcome == Outcome.NONFINITE_START


def never(zero, y):
    a = numpyro.param("a", 1.0)

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(x + a / (a - 1.0 + zero), 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


def without_scan(y):
    numpyro.sample("y", dist.Normal(numpyro.param("a", 1.0), 1.0), obs=y)


def nothing_unknown(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


def inside(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(numpyro.param("a", 1.0) * x, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


def outside_its_constraint(y):
    numpyro.param("a", -1.0, constraint=POSITIVE)
    nothing_unknown(y)


def non_centred(y):
    q = numpyro.param("q", 1.0, constraint=POSITIVE)

    def step(x, y):
        x = x + q * numpyro.sample("e", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


def without_noise(y):
    a = numpyro.param("a", 0.9)

    def step(x, y):
        x = a * x
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (without_scan, {}, ModelError, "no numpyro scan"),
        (nothing_unknown, {}, ModelError, "nothing to learn.*numpyro.param"),
        (inside, {}, ModelError, "'a' stands in the body of the scan"),
        (outside_its_constraint, {}, ModelError, "'a' is not finite or lies outside its constraint"),
        (autoregression, {"states": pf.ParticleFilter()}, MethodError, "choice of particles is a jump.*method='em'"),
        (autoregression, {"states": pf.Kalman(augment=True)}, MethodError, "Leave augment out"),
        (autoregression, {"states": pf.NUTS()}, MethodError, "states= takes an instance of a state method"),
        (autoregression, {"method": "newton"}, MethodError, "method= takes one of"),
        (non_centred, {"method": "em", "states": "kalman"}, MethodError, "non-centred.*method='likelihood'"),
        (without_noise, {"method": "em"}, MethodError, "samples nothing.*method='likelihood'"),
        (without_noise, {"method": "increments"}, MethodError, "samples nothing"),
    ],
)
def test_what_does_not_fit_is_refused(model, options, error, match):
    with pytest.raises(error, match=f"(?s){match}"):
        pf.learn(model, y=np.ones(4), progress=False, **options)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: pf.Likelihood(steps=0), r"Likelihood\(steps=...\)"),
        (lambda: pf.MAP(learning_rate=-1.0), r"MAP\(learning_rate=...\)"),
        (lambda: pf.Likelihood(optimizer="sgd"), r"optimizer=...\) takes one of"),
        (lambda: pf.Likelihood(optimizer="lbfgs", noise="fresh"), "do not go together"),
        (lambda: pf.EM(draws=0), r"EM\(draws=...\)"),
        (lambda: pf.Increments(tolerance=0.0), r"Increments\(tolerance=...\)"),
    ],
)
def test_options_are_checked(make, match):
    with pytest.raises(MethodError, match=match):
        make()


def test_an_interrupted_run_resumes_to_the_identical_result(tmp_path, monkeypatch):
    options = {
        "y": drift_data(),
        "states": pf.Kalman(),
        "method": pf.Likelihood(optimizer="adam", steps=50),
        "progress": False,
    }
    whole = pf.learn(drifting, **options)
    saves, save = [], Runner.save

    def interrupted(self, step, state):
        save(self, step, state)
        saves.append(step)
        if len(saves) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pf.learn(drifting, checkpoint=tmp_path / "run", **options)
    resumed = pf.learn(drifting, checkpoint=tmp_path / "run", **options)
    assert saves[-1] < 50
    np.testing.assert_array_equal(resumed.log_likelihood, whole.log_likelihood)
    assert float(resumed.estimates["drift"]) == float(whole.estimates["drift"])


@pytest.mark.slow
@pytest.mark.parametrize("states", [pf.EnKF(members=200), pf.ParticleFilter(particles=300)])
def test_monte_carlo_em_is_em_but_for_its_draws(states):
    """After as many rounds; over keys its estimates have standard deviations of about .003, .009 and .006."""
    method = pf.EM(steps=40, draws=100)
    exact, found = (
        pf.learn(autoregression, y=series(), states=s, method=method, progress=False) for s in (pf.Kalman(), states)
    )
    assert len(found.log_likelihood) == 40, "noise ended it early"
    for name, sd in (("rho", 0.003), ("q", 0.009), ("r", 0.006)):
        assert abs(float(found.estimates[name]) - float(exact.estimates[name])) < 5 * sd


@pytest.mark.slow
def test_fresh_noise_climbs_too():
    method = pf.Likelihood(noise="fresh", steps=200)
    found = pf.learn(drifting, y=drift_data(), states=pf.EnKF(members=60), method=method, progress=False)
    assert abs(float(found.estimates["drift"]) - 0.4) < 0.15
