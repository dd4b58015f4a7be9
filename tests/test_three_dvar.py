"""`ThreeDVar` with a given covariance or gain: exact answers of linear models, published scores, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import linalg

import pushforward as pf
from pushforward._errors import InferenceError, MethodError
from pushforward.math import three_dvar as equations
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import StateSpace, read_state_space
from pushforward.problems import lorenz63, lorenz96

A = np.array([[0.9, 0.3], [-0.2, 0.8]])
ROOT = np.array([[0.5, 0.0], [0.2, 0.4]])
PLACES = {"one": np.array([[1.0, 0.5]]), "three": np.array([[1.0, 0.0], [0.3, 1.0], [0.0, 2.0]])}
NOISE = {"one": np.array([[0.6]]), "three": np.array([[0.5, 0.1, 0.0], [0.1, 0.7, 0.2], [0.0, 0.2, 0.9]])}


def linear(y, H, R, start=None):
    """x' = A x + noise, y = H x' + noise; `start` is the covariance of x0."""
    start = np.eye(2) if start is None else start

    def step(x, y):
        x = numpyro.sample("x", dist.MultivariateNormal(A @ x, scale_tril=ROOT))
        numpyro.sample("y", dist.MultivariateNormal(H @ x, R), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.MultivariateNormal(jnp.zeros(2), start)), y)


def steady(H, R):
    """Forecast and analysis covariance and gain of the Kalman filter in the long run, by the Riccati equation."""
    P = linalg.solve_discrete_are(A.T, H.T, ROOT @ ROOT.T, R)
    gain = P @ H.T @ np.linalg.inv(H @ P @ H.T + R)
    return P, (np.eye(2) - gain @ H) @ P, gain


def walk(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(x, 2.0**0.5), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


def infer(model, method, **inputs):
    return pf.infer(model, method=method, progress=False, **inputs)


def data(name, steps=30, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, len(PLACES[name])))


# -------------------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("name", ["one", pytest.param("three", marks=pytest.mark.slow)])
def test_with_the_steady_covariance_it_is_the_kalman_filter(name, float64):
    """Started at the steady state, gain, means, standard deviations and the evidence are those of Kalman's filter."""
    H, R = PLACES[name], NOISE[name]
    P, C, gain = steady(H, R)
    inputs = {"y": data(name), "H": H, "R": R, "start": C}
    expected = infer(linear, pf.Kalman(store="moments"), **inputs)
    for method in (pf.ThreeDVar(P), pf.ThreeDVar(gain=gain), pf.ThreeDVar(lambda v: jnp.asarray(P) @ v)):
        found = infer(linear, method, **inputs)
        for group in ("filtering", "one_step"):
            np.testing.assert_allclose(found[group]["x"], expected[group]["x"], atol=1e-8)
            if not callable(method.covariance):
                np.testing.assert_allclose(found[group]["x_sd"], expected[group]["x_sd"], atol=1e-8)
        np.testing.assert_allclose(found["posterior"]["x"][0, 0], expected["filtering"]["x"], atol=1e-8)
        evidence = pf.attributes(found)["log_evidence"]
        if callable(method.covariance):
            assert np.isnan(evidence)
        else:
            np.testing.assert_allclose(evidence, pf.attributes(expected)["log_evidence"], atol=1e-8)


@pytest.mark.parametrize(("gain", "variance"), [(0.3, 0.67 / 0.51), (0.5, 1.0), (0.8, 1.375)])
def test_error_variance_of_fixed_gains(gain, variance, float64):
    """Brownian motion, Q = 1, R = 2 (`filters.md`: 1.3137, 1, 1.3750)."""
    found = infer(walk, pf.ThreeDVar(gain=[[gain]]), y=np.zeros(200))
    assert abs(float(found["filtering"]["x_sd"][-1]) ** 2 - variance) < 1e-12
    # The forecast has the variance of the analysis before and of the step.
    assert abs(float(found["one_step"]["x_sd"][-1]) ** 2 - variance - 1) < 1e-12


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("missing", [False, True])
def test_forms_of_the_gain_agree(name, missing, float64):
    """By the data, by the state and by conjugate gradients; missing data are rows that are not there."""
    H, R, B = PLACES[name], NOISE[name], np.array([[1.0, 0.3], [0.3, 0.5]])
    present = np.ones(len(H)) if not missing else np.array([0.0, 1.0, 1.0])[: len(H)]
    rows = present > 0
    d = present * np.arange(1.0, 4.0)[: len(H)]
    S = (H @ B @ H.T + R)[np.ix_(rows, rows)]
    expected = np.zeros((2, len(H)))
    expected[:, rows] = B @ H[rows].T @ np.linalg.inv(S)
    found = equations.background_gain(B, H, R, present)
    np.testing.assert_allclose(found.gain, expected, atol=1e-12)
    np.testing.assert_allclose(found.log_determinant, np.linalg.slogdet(S)[1], atol=1e-12)
    density = -0.5 * (d[rows] @ np.linalg.solve(S, d[rows]) + np.linalg.slogdet(2 * np.pi * S)[1])
    np.testing.assert_allclose(equations.innovation_log_density(d, found, H, R, present), density, atol=1e-12)
    moved, square = equations.analysis_by_operator(
        lambda v: B @ v, lambda x: H @ x, lambda w: H.T @ w, R, d, present, 1e-12
    )
    np.testing.assert_allclose(moved, expected @ d, atol=1e-10)
    np.testing.assert_allclose(square, d[rows] @ np.linalg.solve(S, d[rows]), atol=1e-10)


def test_missing_data_leave_the_forecast(float64):
    y = np.array([1.0, np.nan, -2.0])
    found = infer(walk, pf.ThreeDVar([[3.0]]), y=y)
    x = found["filtering"]["x"].to_numpy()
    np.testing.assert_allclose(x, [0.6, 0.6, 0.6 * 0.4 - 0.6 * 2.0], atol=1e-12)
    np.testing.assert_allclose(found["filtering"]["x_sd"], np.sqrt([1.2, 3.0, 1.2]), atol=1e-12)
    assert np.isnan(found["filter_stats"]["innovation_chi_square"][1])


def curved(y):
    def step(x, y):
        x = numpyro.deterministic("x", 0.5 * x)
        numpyro.sample("y", dist.Normal(jnp.stack([x[0] + 0.3 * x[1] ** 2, jnp.sin(x[1])]), 0.5).to_event(1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.array([1.0, 1.0]), 1.0).to_event(1)), y)


@pytest.mark.parametrize("kind", ["array", "operator"])
def test_gauss_newton_finds_the_minimum(kind, float64):
    """The analysis of a nonlinear observation is a stationary point of the cost; one step is not."""
    B, y, forecast = np.array([[0.4, 0.1], [0.1, 0.6]]), np.array([[1.4, 0.9]]), np.array([0.5, 0.5])
    covariance = B if kind == "array" else (lambda v: jnp.asarray(B) @ v)

    def cost(x):
        h = jnp.stack([x[0] + 0.3 * x[1] ** 2, jnp.sin(x[1])])
        return 0.5 * (x - forecast) @ jnp.linalg.solve(B, x - forecast) + 0.5 * jnp.sum((y[0] - h) ** 2) / 0.25

    slopes = [
        np.abs(
            jax.grad(cost)(jnp.asarray(infer(curved, pf.ThreeDVar(covariance, iterations=i), y=y)["filtering"]["x"][0]))
        )
        for i in (1, 12)
    ]
    assert slopes[0].max() > 1e-2
    assert slopes[1].max() < 1e-7


def test_climatology_is_the_covariance_of_the_model(float64):
    """Of a stationary model it is the stationary covariance; 16000 correlated states, errors of 5 % seen."""
    H, R = PLACES["one"], NOISE["one"]
    expected = linalg.solve_discrete_lyapunov(A, ROOT @ ROOT.T)
    found = infer(linear, pf.ThreeDVar(scale=0.5), y=data("one"), H=H, R=R)
    sd = found["one_step"]["x_sd"].to_numpy()
    np.testing.assert_allclose(sd[0] ** 2, 0.5 * np.diagonal(expected), rtol=0.15)
    assert np.ptp(sd, 0).max() == 0


def test_steps_of_a_stream_are_those_of_a_series(float64):
    y, H, R = data("three", 6), PLACES["three"], NOISE["three"]
    y[2, 1:] = np.nan
    y[2, 0] = np.nan
    P, _, gain = steady(H, R)
    for method in (pf.ThreeDVar(P), pf.ThreeDVar(gain=gain)):
        whole = infer(linear, method, y=y, H=H, R=R)
        chain = _chain(y[:1], H, R)
        belief, total = method.begin(chain, jax.random.key(0))

        @jax.jit
        def advance(row, belief, chain=chain, method=method):
            arrays = tuple(row[None] if a.shape == (1, 3) else a for a in chain.arrays)
            moved = StateSpace(arrays, chain.structure).chain()
            return method.advance(moved, belief, jax.random.key(0))

        for row in y:
            belief, found = advance(jnp.asarray(row), belief)
            total = total + found.log_likelihood
        np.testing.assert_allclose(found.mean["x"], whole["filtering"]["x"][-1], atol=1e-10)
        np.testing.assert_allclose(found.sd["x"], whole["filtering"]["x_sd"][-1], atol=1e-10)
        np.testing.assert_allclose(total, pf.attributes(whole)["log_evidence"], atol=1e-10)


def _chain(y, H, R):
    return read_state_space(read_problem(linear, (), {"y": y, "H": H, "R": R})).chain()


def test_what_it_stores_and_says(float64):
    y = np.array([1.0, 2.0])
    found = {s: infer(walk, pf.ThreeDVar([[1.0]], store=s), y=y) for s in ("moments", "draws", "last")}
    assert pf.attributes(found["draws"])["returns"] == "filtering"
    assert found["draws"]["filtering"]["x"].shape == (1, 1, 2)
    assert "filtering" not in found["last"].children
    assert found["last"]["posterior"]["x"].shape == (1, 1, 2)
    means = [found[s]["posterior"]["x"].to_numpy() for s in found]
    assert np.array_equal(means[0], means[1])
    assert np.array_equal(means[0], means[2])
    bare = infer(walk, pf.ThreeDVar(gain=[[0.5]], store="draws"), y=y)
    assert np.isnan(pf.attributes(bare)["log_evidence"])
    spread = infer(walk, pf.ThreeDVar(gain=[[0.5]]), y=y)
    np.testing.assert_allclose(bare["filtering"]["x"][0, 0], spread["filtering"]["x"], atol=1e-14)


def test_under_a_method_for_parameters():
    """The innovations' log density has a gradient in the parameters."""

    def model(y):
        drift = numpyro.sample("drift", dist.Normal(0.0, 1.0))

        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x + drift, 0.1))
            numpyro.sample("y", dist.Normal(x, 0.1), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0.0, 0.1)), y)

    tree = pf.infer(model, method=pf.Laplace(), states=pf.ThreeDVar([[0.02]]), y=np.arange(1.0, 9.0) * 0.5, draws=20)
    assert abs(float(tree["posterior"]["drift"].mean()) - 0.5) < 0.1


# ------------------------------------------------------------------------------------------------------------ published


def published(problem, scale, seeds, cycles=1000):
    """rmse of the analysis for each seed, with B = scale x covariance of the truth."""
    keys = jax.random.split(jax.random.key(20), seeds)
    scores = []
    for key in keys:
        truth, y = problem.simulate(key, cycles)
        B = scale * np.cov(np.asarray(truth).T)
        mean = infer(problem.model, pf.ThreeDVar(B, store="moments"), y=np.asarray(y))["filtering"]["x"].to_numpy()
        scores.append(np.mean(np.sqrt(np.mean((mean - np.asarray(truth)) ** 2, 1))[problem.BURN_IN :]))
    return np.array(scores)


@pytest.mark.parametrize("problem", [lorenz63, pytest.param(lorenz96, marks=pytest.mark.slow)])
def test_scores_of_lorenz_models(problem, float64):
    """Within 4 standard errors of published scores of 1000 cycles (20 seeds; 3 here): false alarm 1e-3."""
    anchor = problem.NUMBERS["3dvar"]
    found = published(problem, anchor.options["scale"], 3)
    assert abs(found.mean() - anchor.rmse_1000) < 4 * anchor.sd_1000 * (1 / 3 + 1 / 20) ** 0.5


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"covariance": np.array([[1.0, 2.0], [2.0, 1.0]])}, "is not positive definite: its lowest eigenvalue is -1"),
        ({"covariance": np.array([[1.0, 2.0], [0.0, 1.0]])}, "is not symmetric"),
        ({"covariance": np.array([1.0, 2.0])}, r"got an array of shape \(2,\)"),
        ({"covariance": np.array([[np.nan]])}, "entries that are not finite"),
        ({"covariance": "identity"}, "takes 'climatology', a covariance matrix"),
        ({"covariance": 3.0}, "takes 'climatology', a covariance matrix"),
        ({"gain": "dense"}, r"takes an array \(n, m\), one of \['full'"),
        ({"gain": np.array([1.0])}, r"a matrix \(n, m\) of finite numbers"),
        ({"covariance": np.eye(1), "gain": [[0.5]]}, "not both"),
        ({"scale": -1.0}, "scale"),
        ({"iterations": 0}, "iterations"),
        ({"free_run": 2}, "free_run"),
        ({"store": "all"}, "store"),
        ({"training": "online"}, "takes pf.GainTraining"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(MethodError, match=text):
        pf.ThreeDVar(**options)


def observed_first(y):
    def step(x, y):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return numpyro.sample("x", dist.Normal(0.9 * x, 1.0)), None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


@pytest.mark.parametrize(
    ("model", "method", "text"),
    [
        (walk, pf.ThreeDVar(np.eye(2)), r"covariance= has shape \(2, 2\), and the state has 1 entries"),
        (walk, pf.ThreeDVar(gain=np.eye(2)), r"gain has shape \(2, 2\), and 1 entries of the state with 1 data"),
        (observed_first, pf.ThreeDVar(), "the data 'y' of a step depend on more than the state that the step leads to"),
    ],
)
def test_models_that_do_not_fit(model, method, text):
    with pytest.raises(MethodError, match=text):
        infer(model, method, y=np.zeros(3))


def test_an_exploding_model_is_said(float64):
    def explodes(y):
        def step(x, y):
            x = numpyro.deterministic("x", x**3)
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(3.0, 1.0)), y)

    with pytest.raises(InferenceError, match="free runs of the model must stay finite"):
        infer(explodes, pf.ThreeDVar(), y=np.zeros(3))
