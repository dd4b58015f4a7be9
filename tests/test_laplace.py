"""Laplace against the exact mode, curvature and evidence (bars 1 and 2)."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pushforward as pf
from pushforward._errors import InferenceError, MethodError, Outcome
from pushforward._runner import Runner
from pushforward.methods import laplace
from pushforward.model.inverse import read_problem
from pushforward.problems import bod, problem


def run(inverse, method=None, draws=10):
    return (method or pf.Laplace()).run(inverse, jax.random.key(0), draws, Runner())


def bod_problem():
    return read_problem(bod.model, (), {"t": bod.TIMES.copy(), "y": bod.DATA.copy()})


@pytest.mark.parametrize("double", [False, True])
def test_mode_covariance_and_evidence_of_bod(double):
    with jax.enable_x64(double):
        inverse = bod_problem()
        found = run(inverse)
        z, root, _, _ = laplace._polish(inverse, jnp.asarray(bod.MAP_U, jnp.result_type(float)), laplace._hessian)
        covariance = np.linalg.inv(np.asarray(root @ root.T, float))
        mode = mode_of(inverse)
    np.testing.assert_allclose(z, bod.MAP_U, atol=1e-4)
    np.testing.assert_allclose(mode, bod.MAP_U, atol=1e-4)
    np.testing.assert_allclose(covariance, bod.LAPLACE_COVARIANCE_U, atol=1e-4)
    assert abs(float(found.summary["log_evidence"]) - bod.LAPLACE_LOG_EVIDENCE) < 1e-3
    assert int(found.outcome) == Outcome.SUCCESS


def mode_of(inverse):
    """The mode that `infer` finds: the mean of its symmetric draws with the noise's mean taken out."""
    key, n = jax.random.key(0), 100_000
    positions = np.asarray(pf.Laplace().run(inverse, key, n, Runner()).positions[0], float)
    noise = np.asarray(jax.random.normal(key, (n, 2)), float)
    design = np.column_stack([np.ones(n), noise])
    return np.linalg.lstsq(design, positions, rcond=None)[0][0]


@pytest.mark.parametrize("dimension", [2, 20, 200])
def test_exact_for_linear_gaussian_models(dimension):
    chosen = problem(f"linear_gaussian_{dimension}")
    inverse = read_problem(chosen.model, (), {**chosen.inputs, **chosen.data})
    found = run(inverse, draws=200_000)
    constrain = jax.jit(lambda z: jax.vmap(lambda one: inverse.constrain(one)["theta"])(z))
    theta = np.asarray(constrain(found.positions[0]), float)
    sd = chosen.numbers["sd"]["theta"]
    # One standard error of a mean is 0.0022 sd; 200 means are inside 4.5 of them but for 1 run in 1000.
    assert np.max(np.abs(theta.mean(0) - chosen.numbers["mean"]["theta"]) / sd) < 0.01
    assert np.max(np.abs(np.log(theta.std(0) / sd))) < 0.01
    assert abs(float(found.summary["log_evidence"]) - chosen.numbers["log_evidence"]) < 1e-2


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    chosen = problem("linear_gaussian_20")
    with jax.enable_x64(True):
        inverse = read_problem(chosen.model, (), {k: np.array(v) for k, v in {**chosen.inputs, **chosen.data}.items()})
        z = jax.random.normal(jax.random.key(0), (20,))
        np.testing.assert_allclose(laplace._gauss_newton(inverse, z), laplace._hessian(inverse, z), atol=1e-8)


def test_gauss_newton_with_dense_noise_and_missing_data():
    noise = np.array([[1.0, 0.5, 0.2], [0.5, 2.0, 0.3], [0.2, 0.3, 1.5]])

    def model(x, y=None):
        a = numpyro.sample("a", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.MultivariateNormal(x @ a, noise), obs=y)

    x = np.array([[1.0, 2.0], [0.0, 1.0], [1.0, -1.0]])
    for y in (np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, 3.0])):
        with jax.enable_x64(True):
            inverse = read_problem(model, (), {"x": x.copy(), "y": y.copy()})
            exact = laplace._hessian(inverse, jnp.zeros(2))
            np.testing.assert_allclose(laplace._gauss_newton(inverse, jnp.zeros(2)), exact, atol=1e-8)


def test_gauss_newton_refuses_other_likelihoods():
    def model(y=None):
        rate = numpyro.sample("rate", dist.LogNormal(0, 1))
        numpyro.sample("y", dist.Poisson(rate), obs=y)

    with pytest.raises(MethodError, match="Laplace does not fit this model: site 'y' is Poisson"):
        pf.infer(model, method=pf.Laplace(curvature="gauss_newton"), y=np.array([1.0, 2.0]), progress=False)


def test_a_ridge_is_reported_not_returned():
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.factor("ring", 0.5 * x @ x - 10 * (x @ x - 1) ** 2)

    # The density is constant along the circle |x| = 1, so its curvature there is singular.
    with pytest.raises(InferenceError, match="not positive definite"):
        pf.infer(model, method="laplace", progress=False)


@pytest.mark.parametrize("method", ["laplace", "gaussian_vi"])
def test_scouts_find_the_major_mode(method):
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        near, far = -20 - 0.5 * ((x - 0.5) / 0.3) ** 2, -0.5 * ((x + 2.5) / 0.3) ** 2
        numpyro.factor("bumps", jnp.logaddexp(near, far))

    # From the prior's centre a local climb ends at x = 0.46, whose mass is e^-17 of that at -2.5 / 1.09.
    tree = pf.infer(model, method=method, progress=False)
    assert abs(float(tree["posterior"]["x"].mean()) + 2.5 / 1.09) < 4 * 0.3 / np.sqrt(1000)


def test_many_dimensions_use_limited_memory():
    def model(y=None):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([600]))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    y = np.linspace(-1, 1, 600)
    tree = pf.infer(model, method="laplace", y=y, draws=2000, progress=False)
    # Posterior N(0.8 y, 0.2); 600 means with standard error 0.01 stay within 5 of them but for 4 runs in 10,000.
    assert np.max(np.abs(tree["posterior"]["x"].to_numpy()[0].mean(0) - 0.8 * y)) < 0.05


@pytest.mark.parametrize(
    ("options", "text"),
    [({"curvature": "exact"}, "curvature=.*one of"), ({"tolerance": 0}, "positive"), ({"max_steps": 1.5}, "integer")],
)
def test_bad_options(options, text):
    with pytest.raises(MethodError, match=text):
        pf.Laplace(**options)
