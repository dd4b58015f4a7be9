"""Learned gains of `ThreeDVar`: the objective against exact likelihoods, the learned against Riccati's, failures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import linalg

import pushforward as pf
from pushforward._errors import ArgumentError, CheckpointError, DataError, MethodError
from pushforward._runner import Runner
from pushforward.learned import quasi_newton
from pushforward.math import learned_gain
from pushforward.math import three_dvar as equations
from pushforward.methods import _gain_fit
from pushforward.methods._base import Draws
from pushforward.methods._gains import Units
from pushforward.problems import lorenz96

A = np.array([[0.9, 0.3], [-0.2, 0.8]])
ROOT = np.array([[0.5, 0.0], [0.2, 0.4]])
H = np.array([[1.0, 0.5]])
R = np.array([[0.6]])


def linear(y, start):
    def step(x, y):
        x = numpyro.sample("x", dist.MultivariateNormal(A @ x, scale_tril=ROOT))
        numpyro.sample("y", dist.Normal(H @ x, R[0, 0] ** 0.5).to_event(1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.MultivariateNormal(jnp.zeros(2), start)), y)


def steady():
    """Gain and analysis covariance of the Kalman filter in the long run."""
    P = linalg.solve_discrete_are(A.T, H.T, ROOT @ ROOT.T, R)
    gain = P @ H.T @ np.linalg.inv(H @ P @ H.T + R)
    return gain, (np.eye(2) - gain @ H) @ P


def simulated(steps, seed):
    rng = np.random.default_rng(seed)
    x = np.linalg.cholesky(steady()[1]) @ rng.normal(size=2)
    data = []
    for _ in range(steps):
        x = A @ x + ROOT @ rng.normal(size=2)
        data.append(H @ x + R**0.5 @ rng.normal(size=1))
    return np.array(data)


def ring(y=None, size=8):
    """A short Lorenz-96 ring with noise in each step."""

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(lorenz96.step(x), 0.3).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.ones(size), 1.0).to_event(1)), y)


def ring_data(steps=60, size=8, seed=0):
    return lorenz96.simulate(jax.random.key(seed), steps, size=size, model_noise=0.3)


def infer(model, method, **inputs):
    return pf.infer(model, method=method, progress=False, **inputs)


# -------------------------------------------------------------------------------------------------------- the objective


def test_with_kalman_gains_it_is_the_likelihood(float64):
    """Gains that vary in time, from a start far from the steady state; every other gain is worse in expectation."""
    y, Q = simulated(30, 1), ROOT @ ROOT.T

    def run(change):
        mean, cov, total, expected = np.zeros(2), 4 * np.eye(2), 0.0, 0.0
        for row in y:
            m, P = A @ mean, A @ cov @ A.T + Q
            S = H @ P @ H.T + R
            gain = P @ H.T @ np.linalg.inv(S) + change
            d = row - H @ m
            expected += 0.5 * (d @ np.linalg.solve(S, d) + np.linalg.slogdet(2 * np.pi * S)[1])
            mean, cov = m + gain @ d, np.asarray(equations.joseph(P, gain, H, R))
            residual = row - H @ mean
            total += equations.variational_increment((m, P), (mean, cov), residual, H, R, np.ones(1))
        return float(total), float(expected)

    total, expected = run(0.0)
    assert abs(total - expected) < 1e-8
    for change in (np.array([[0.2], [0.0]]), np.array([[0.0], [-0.2]])):
        assert run(change)[0] > expected + 0.1


def test_perturbed_gains_are_worse_in_expectation(float64):
    """400 steps; the loss grows with the square of the change, so that a fourfold change costs about 16 times more."""
    y, (gain, cov) = simulated(400, 2), steady()

    def evidence(K):
        return pf.attributes(infer(linear, pf.ThreeDVar(gain=K), y=y, start=cov))["log_evidence"]

    best = evidence(gain)
    for change in (np.array([[0.1], [0.0]]), np.array([[0.0], [0.1]])):
        near = best - 0.5 * (evidence(gain + change) + evidence(gain - change))
        far = best - 0.5 * (evidence(gain + 4 * change) + evidence(gain - 4 * change))
        assert near > 0.5
        assert 8 < far / near < 32


def test_missing_data_drop_out_of_the_objective(float64):
    """A row of data that is missing is as if it had not been observed, whatever its noise is correlated with."""
    C, H3 = np.array([[1.0, 0.3], [0.3, 0.5]]), np.array([[1.0, 0.0], [0.3, 1.0], [0.0, 2.0]])
    R3 = np.array([[0.5, 0.1, 0.0], [0.1, 0.7, 0.2], [0.0, 0.2, 0.9]])
    rows, a = np.array([True, False, True]), np.array([0.1, -0.2])
    residual = np.array([0.3, 0.0, -0.4])
    law = (np.zeros(2), C), (a, 0.5 * C)
    found = equations.variational_increment(*law, residual, H3, R3, rows.astype(float))
    some = equations.variational_increment(*law, residual[rows], H3[rows], R3[np.ix_(rows, rows)], np.ones(2))
    np.testing.assert_allclose(found, some, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- the learned


@pytest.fixture(scope="module")
def errors():
    """Root mean square distance of learned gains from Riccati's, by number of steps (24 series each)."""
    from pushforward.methods._gains import FullGain
    from pushforward.model.inverse import read_problem
    from pushforward.model.state_space import read_state_space

    found = {}
    with jax.enable_x64(True):
        gain, cov = steady()
        for steps in (50, 200, 800):
            y = np.stack([simulated(steps, seed) for seed in range(24)])
            space = read_state_space(read_problem(linear, (), {"y": y[0], "start": cov}))
            units, _, _ = _gain_fit.measure(space, True)

            def loss(weights, y, space=space, units=units):
                arrays = tuple(y if a.shape == y.shape else a for a in space.arrays)
                moved = type(space)(arrays, space.structure)
                return _gain_fit._loss(weights, FullGain(), units, moved, True)[0]

            @jax.jit
            @jax.vmap
            def learned(y, loss=loss, start=jnp.ravel(jnp.asarray(gain))):
                # Newton's steps from Riccati's gain: which of the two optimisers found the minimum is not in question.
                def newton(_, w):
                    return w - jnp.linalg.solve(jax.hessian(loss)(w, y), jax.grad(loss)(w, y))

                return jax.lax.fori_loop(0, 4, newton, start)

            found[steps] = float(np.sqrt(np.mean((np.asarray(learned(y)) - gain.ravel()) ** 2)))
    return found


@pytest.mark.slow
def test_a_learned_gain_tends_to_that_of_riccati(errors):
    """Error as J^-1/2: slope -0.5 within 0.15 over a factor of 16 (two standard errors of 24 series are 0.1)."""
    slope = np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]
    assert abs(slope + 0.5) < 0.15
    assert errors[800] < 0.05


def test_fit_finds_the_minimum(float64):
    """On 800 steps `fit` comes within 0.12 of Riccati's gain (4 standard errors), and no gain nearby is better."""
    y, (gain, cov) = simulated(800, 3), steady()
    method = pf.ThreeDVar(gain="full", training=pf.GainTraining(tolerance=1e-9))
    trained = method.fit(linear, y=y, start=cov, progress=False)
    learned = trained.trained.weights.reshape(2, 1)
    np.testing.assert_allclose(learned, gain, atol=0.12)
    best = pf.attributes(infer(linear, trained, y=y, start=cov))["log_evidence"]
    assert abs(best / len(y) + np.nanmin(trained.trained.losses)) < 1e-10
    for change in 0.01 * np.eye(2):
        for sign in (1, -1):
            other = pf.ThreeDVar(gain=np.asarray(learned) + sign * change[:, None])
            assert pf.attributes(infer(linear, other, y=y, start=cov))["log_evidence"] < best


def test_online_training_comes_near(float64):
    """One pass over 2000 steps, an update at each: within 0.1 of Riccati's gain, from a distance of 0.3."""
    y, (gain, cov) = simulated(2000, 4), steady()
    method = pf.ThreeDVar(gain="full", training=pf.GainTraining("online"))
    trained = method.fit(linear, y=y, start=cov, progress=False).trained
    assert np.abs(0.4 * np.linalg.pinv(H) - gain).max() > 0.1
    np.testing.assert_allclose(trained.weights.reshape(2, 1), gain, atol=0.1)
    assert np.isfinite(trained.losses).all()


STRUCTURES = {
    "full": (pf.FullGain(), 64),
    "banded": (pf.BandedGain(1), 24),
    "circulant": (pf.CirculantGain(2), 5),
    "low_rank": (pf.LowRankGain(2), 33),
    "network": (pf.NetworkGain(1, 2, 3, sees="both"), 10 * 3 + 3 + 3 * 3 + 3),
}


@pytest.mark.parametrize("name", [n if n == "network" else pytest.param(n, marks=pytest.mark.slow) for n in STRUCTURES])
def test_structures_learn(name, float64, tmp_path):
    """Each lowers its objective, counts as many numbers as it says, survives a file, and has missing data."""
    gain, numbers = STRUCTURES[name]
    _, y = ring_data()
    y = np.asarray(y).copy()
    y[3:6], y[10, 2] = np.nan, np.nan
    trained = pf.ThreeDVar(gain=gain, training=pf.GainTraining(steps=8)).fit(ring, y=y, size=8, progress=False)
    losses = np.asarray(trained.trained.losses)
    assert trained.trained.weights.shape == (numbers,)
    assert np.nanmin(losses) < losses[0] - 1e-3
    pf.save(tmp_path / "gain.pf", trained)
    trees = [infer(ring, m, y=y, size=8) for m in (trained, pf.load(tmp_path / "gain.pf"))]
    np.testing.assert_array_equal(trees[0]["filtering"]["x"], trees[1]["filtering"]["x"])
    np.testing.assert_allclose(pf.attributes(trees[0])["log_evidence"], -np.nanmin(losses) * np.sum(~np.isnan(y)))
    with pytest.raises(ArgumentError, match="trained with another value of the argument 'size'"):
        infer(ring, trained, y=np.zeros((60, 9)), size=9)


def test_an_untrained_gain_is_learned_first(float64):
    """`infer` does what `fit` and `infer` do, once, and says what it cost."""
    model, y = functools.partial(linear, start=steady()[1]), simulated(60, 5)
    method = pf.ThreeDVar(gain="full", training=pf.GainTraining(steps=9, tolerance=1e-3))
    trained = method.fit(model, y=y, progress=False)
    expected, found = infer(model, trained, y=y), infer(model, method, y=y)
    np.testing.assert_array_equal(found["filtering"]["x"], expected["filtering"]["x"])
    said, before = pf.attributes(found), pf.attributes(expected)
    losses = np.asarray(trained.trained.losses)
    runs = np.isfinite(losses).sum()
    assert 1 < runs < 9, "it ended early, and counts what it ran"
    assert said["training_runs"] == runs
    assert said["training_diverged"] == 0
    assert said["loss"] == losses[: int(runs)].min()
    assert said["gradient_evaluations"] == 60 * runs
    assert said["evaluations"] == before["evaluations"] + 60 * runs
    assert [n for n in said["notes"] if "trained on these data first" in n]
    assert "loss" not in before
    assert not [n for n in before["notes"] if "trained" in n]
    assert said["compile_seconds"] == 0, "programs of the fit serve again"


def test_what_cannot_train_an_untrained_gain_says_so(float64):
    """Its gain belongs to known parameters and a whole series."""

    def free(y):
        rho = numpyro.sample("rho", dist.Normal(0.0, 1.0))

        def step(x, y):
            x = numpyro.sample("x", dist.Normal(rho * x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)

    def unknown(y):
        numpyro.handlers.substitute(free, data={"rho": numpyro.param("a", 0.5)})(y)

    known, method = numpyro.handlers.substitute(free, data={"rho": 0.5}), pf.ThreeDVar(gain="full")
    text = "its gain is not trained; write method.fit.*at known parameters"
    with pytest.raises(MethodError, match=text):
        infer(free, pf.NUTS(), states=method, y=np.zeros(4))
    with pytest.raises(MethodError, match=text):
        pf.learn(unknown, states=method, y=np.zeros(4), progress=False)
    with pytest.raises(MethodError, match=text):
        pf.online(known, method=method).step(0.0)


def test_shapes_of_the_structures(float64):
    n, m = 6, 3
    rows = jnp.eye(n)[::2]
    units = Units(learned_gain.spreading(rows), jnp.asarray(0.5), jnp.asarray(2.0), jnp.asarray(1.5))
    forecast, innovation, guess = jnp.arange(6.0), jnp.arange(3.0), 0.4 * rows.T
    for gain in (pf.FullGain(), pf.BandedGain(1), pf.CirculantGain(1), pf.LowRankGain(2), pf.NetworkGain(1, 2, 3)):
        start = gain.matrix(gain.start(units, guess), units, forecast, innovation)
        np.testing.assert_allclose(start, 0.4 * np.asarray(rows).T, atol=1e-12)
        moved = gain.start(units, guess) + jax.random.normal(jax.random.key(0), gain.start(units, guess).shape)
        found = np.asarray(gain.matrix(moved, units, forecast, innovation))
        assert found.shape == (n, m)
        again = np.asarray(gain.matrix(moved, units, jnp.roll(forecast, 2), jnp.roll(innovation, 1)))
        turned = np.roll(np.roll(found, 2, 0), 1, 1)
        if isinstance(gain, pf.CirculantGain | pf.NetworkGain):
            # What is the same for all coordinates commutes with a turn of the ring.
            np.testing.assert_allclose(again, turned, atol=1e-12)
        if isinstance(gain, pf.NetworkGain):
            assert np.abs(again - found).max() > 1e-3
        if isinstance(gain, pf.BandedGain | pf.CirculantGain | pf.NetworkGain):
            assert np.abs(found[3, 0]) == 0
            assert np.abs(found[1, 0]) > 0


@pytest.mark.slow
def test_a_training_resumes_from_its_file(float64, tmp_path):
    _, y = ring_data()
    method = pf.ThreeDVar(gain=pf.CirculantGain(1), training=pf.GainTraining(steps=6))
    whole = method.fit(ring, y=np.asarray(y), progress=False).trained
    for _ in range(2):
        found = method.fit(ring, y=np.asarray(y), checkpoint=tmp_path / "fit", progress=False).trained
        np.testing.assert_allclose(found.weights, whole.weights, atol=1e-12)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        method.fit(ring, y=np.asarray(y) + 1, checkpoint=tmp_path / "fit", progress=False)


# ------------------------------------------------------------------------------------------------- failure and refusals


def test_a_filter_that_diverges_is_reported_at_its_step(float64):
    def explodes(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x**3, 0.1))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0.5, 0.1)), y)

    y = np.zeros(40)
    y[20:] = 1e3
    with pytest.raises(MethodError, match=r"before training diverged at time step 2\d"):
        pf.ThreeDVar(gain="full").fit(explodes, y=y, progress=False)


def test_online_training_keeps_the_last_good_gain(float64):
    """A rate that throws the gain far away: the step is named, and what was learned before it stays."""
    _, y = ring_data()
    method = pf.ThreeDVar(gain="full", training=pf.GainTraining("online", learning_rate=30.0))
    with pytest.warns(UserWarning, match=r"diverged at time step \d+ of the on-line training, and the last good gain"):
        found = method.fit(ring, y=np.asarray(y), progress=False).trained
    number, step = (int(v) for v in found.diverged)
    assert number == 1
    assert 0 < step < len(y)
    assert np.isfinite(found.weights).all()
    assert np.isfinite(found.losses[:step]).all()
    assert np.isnan(found.losses[step:]).all()
    # Where `infer` trains, its warning and its error say the same.
    numbers = {n: np.asarray(float(v)) for n, v in _gain_fit.numbers(found, method.training).items()}
    assert numbers["training_runs"] == 1
    assert numbers["loss"] == pytest.approx(np.mean(np.asarray(found.losses)[:step]))
    draws = Draws({}, {}, numbers, np.asarray(0), jnp.zeros(()), jnp.zeros(()))
    assert f"diverged at time step {step} of the on-line" in method.warnings(draws)[0]
    assert f"The filter diverged at time step {step} of the on-line" in method.failure(draws)
    assert pf.ThreeDVar().failure(Draws({}, {}, {}, np.asarray(3), jnp.zeros(()), jnp.zeros(()))).startswith("3DVar's")


def test_what_fit_refuses(float64):
    y = np.zeros((4, 8))
    with pytest.raises(MethodError, match="learns a gain, and gain=None. Write pf.ThreeDVar"):
        pf.ThreeDVar().fit(ring, y=y)
    with pytest.raises(DataError, match="learns from data"):
        pf.ThreeDVar(gain="full").fit(lorenz96.model_noise, observed=("y",), size=8, steps=4)
    with pytest.raises(DataError, match="infinite"):
        pf.ThreeDVar(gain="full").fit(ring, y=y + np.inf)
    with pytest.raises(MethodError, match="CirculantGain reaches 5 neighbours on each side, and the state has 8"):
        pf.ThreeDVar(gain="circulant").fit(ring, y=y, progress=False)
    with pytest.raises(MethodError, match=r"LowRankGain\(rank=9\) is larger than the gain, 8 x 8"):
        pf.ThreeDVar(gain=pf.LowRankGain(9)).fit(ring, y=y, progress=False)

    def free(y):
        rho = numpyro.sample("rho", dist.Normal(0.0, 1.0))

        def step(x, y):
            x = numpyro.sample("x", dist.Normal(rho * x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)

    with pytest.raises(MethodError, match=r"\['rho'\] are free"):
        pf.ThreeDVar(gain="full").fit(free, y=np.zeros(4))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: pf.GainTraining("batch"), "mode"),
        (lambda: pf.GainTraining(steps=0), "steps"),
        (lambda: pf.GainTraining(learning_rate=0.0), "learning_rate"),
        (lambda: pf.BandedGain(-1), "width"),
        (lambda: pf.LowRankGain(0), "rank"),
        (lambda: pf.NetworkGain(sees="past"), "sees"),
    ],
)
def test_options_are_checked(make, text):
    with pytest.raises(MethodError, match=text):
        make()


# -------------------------------------------------------------------------------------------------------- the optimiser


def valley(weights):
    """Rosenbrock's function, which fails to the right of 1.2."""
    x, y = weights
    value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    return jnp.where(x > 1.2, jnp.nan, value), jnp.where(x > 1.2, 7, -1)


def test_the_optimiser_finds_a_minimum_beside_failures(float64):
    found = quasi_newton.minimise(valley, jnp.array([-1.0, 1.0]), 200, 1e-14, Runner())
    np.testing.assert_allclose(found.point, 1.0, atol=1e-5)
    assert np.sum(np.isfinite(found.values)) < 100


def test_the_optimiser_says_when_it_cannot_start(float64):
    found = quasi_newton.minimise(valley, jnp.array([3.0, 1.0]), 20, 1e-8, Runner())
    assert not np.isfinite(found.value)
    assert int(found.failed_at) == 7
    assert int(found.failed) == 1
