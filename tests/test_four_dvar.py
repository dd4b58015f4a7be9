"""`FourDVar` against exact answers: Kalman and RTS in linear models, finite differences, the law of its draws.

`problems.linear_state_space.joint` conditions one dense Gaussian without recursion. "Exact" is 1e-8 in float64.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from benchmarks import variational as benchmark
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward._errors import MethodError
from pushforward.math import variational
from pushforward.methods import _four_dvar
from pushforward.methods._climatology import climatology
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import linear_state_space as linear
from pushforward.problems import lorenz63, lorenz96

KEY = jax.random.key(0)
ANY: Any = 2.5
TURN = np.array([[0.8, 0.5], [-0.4, 0.9]])
START = np.array([[1.5, 0.4], [0.4, 0.7]])
LOOK = np.array([[1.0, 0.3]])
NOISE = 0.5
FAST = ("observed_start",)
DATA = np.array([0.3, np.nan, -0.8, 0.5, 1.1, -0.2])[:, None]


def read(model, *args, **kwargs):
    return read_state_space(read_problem(model, args, kwargs))


def silent(y, step_sd=0.0):
    """Two numbers that turn, one is seen; without step noise, or with noise of their first."""

    def step(x, y):
        x = TURN @ x
        if step_sd:
            x = x.at[0].add(step_sd * numpyro.sample("e", dist.Normal(0.0, 1.0)))
        x = numpyro.deterministic("x", x)
        numpyro.sample("y", dist.Normal(LOOK @ x, NOISE).to_event(1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.MultivariateNormal(jnp.ones(2), jnp.array(START.tolist()))), y)


def kalman(y, mean, cov, Q=0.0, backgrounds=None, window=1):
    """Filtering means and covariances by textbook equations; `backgrounds` replaces the covariance at window starts."""
    found = []
    for t, datum in enumerate(y[:, 0]):
        if backgrounds is not None and t and t % window == 0:
            cov = backgrounds
        mean, cov = TURN @ mean, TURN @ cov @ TURN.T + np.diag([Q, 0.0])
        if not np.isnan(datum):
            gain = cov @ LOOK.T / (LOOK @ cov @ LOOK.T + NOISE**2)
            mean, cov = mean + gain[:, 0] * (datum - LOOK @ mean), cov - gain @ LOOK @ cov
        found.append((mean, cov))
    return np.stack([m for m, _ in found]), np.stack([c for _, c in found])


@eqx.filter_jit
def run(method, chain, store="moments", draws=1):
    return method.trajectories(chain, KEY, draws, store)


# ------------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("form", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in linear.FORMS])
def test_weak_constraint_gives_the_smoother(form, float64):
    s = linear.system(n=2, m=2, q=2, steps=5, seed=0)
    model, args, kwargs = linear.FORMS[form](s)
    exact = linear.joint(s, form)
    found = run(pf.FourDVar(sampler="mode"), read(model, *args, **kwargs).chain())
    law = exact.smoothing()
    mean, sd = found.filtering["x"]
    np.testing.assert_allclose(mean, law.mean.reshape(mean.shape), atol=1e-8)
    variance = np.diagonal(law.covariance, axis1=-2, axis2=-1)
    np.testing.assert_allclose(sd**2, variance.reshape(sd.shape), atol=1e-8)
    assert float(found.log_evidence) == pytest.approx(exact.log_evidence(), abs=1e-8)
    assert bool(found.summary["converged"])


@pytest.mark.slow
def test_blocks_of_the_inverse_hessian_are_the_smoother_covariances(float64):
    """Weak constraint: all of it, not just variances; strong: at the window's end, the filter's."""
    space = read(silent, DATA, step_sd=0.7)
    _, law = kalman(DATA, np.ones(2), START, Q=0.49)
    for strong, want in ((False, law[-1]), (True, kalman(DATA, np.ones(2), START)[1][-1])):
        stretch = _four_dvar.first_stretch(space.chain(), strong, len(DATA))
        mode = variational.gauss_newton(stretch.run, jnp.zeros(stretch.dimension))
        at = _four_dvar.around(stretch, mode, KEY, 100, columns=False)
        state, root = _four_dvar.end_root(stretch, at, len(DATA))
        np.testing.assert_allclose(root @ root.T, want, atol=1e-10)
        end = kalman(DATA, np.ones(2), START, Q=0.0 if strong else 0.49)[0][-1]
        np.testing.assert_allclose(state, end, atol=1e-8)


def test_strong_constraint_ends_where_the_filter_ends(float64):
    means, covs = kalman(DATA, np.ones(2), START)
    chain = read(silent, DATA).chain()
    found = run(pf.FourDVar("strong", sampler="mode"), chain)
    mean, sd = found.filtering["x"]
    np.testing.assert_allclose(mean[-1], means[-1], atol=1e-8)
    np.testing.assert_allclose(sd[-1] ** 2, np.diag(covs[-1]), atol=1e-8)
    # One Gauss-Newton iteration is enough: the second only looks.
    assert int(found.summary["iterations"]) == 2


@pytest.mark.parametrize(
    ("window", "step_sd"),
    [pytest.param(1, 0.7, marks=pytest.mark.slow), (2, 0.7), pytest.param(4, 0.0, marks=pytest.mark.slow)],
)
def test_windows_that_follow_the_flow_are_the_filter(window, step_sd, float64):
    """The last step of each window has the filter's law, also where the last window is cut short by the data's end."""
    means, covs = kalman(DATA, np.ones(2), START, Q=step_sd**2)
    method = pf.FourDVar(window=pf.Window(window, covariance="flow"), sampler="mode")
    found = run(method, read(silent, DATA, step_sd=step_sd).chain())
    ends = [t for t in range(len(DATA)) if t % window == window - 1 or t == len(DATA) - 1]
    mean, sd = found.filtering["x"]
    np.testing.assert_allclose(mean[np.array(ends)], means[ends], atol=1e-8)
    np.testing.assert_allclose(sd[np.array(ends)] ** 2, np.diagonal(covs[ends], axis1=1, axis2=2), atol=1e-8)
    exact = run(pf.FourDVar(sampler="mode"), read(silent, DATA, step_sd=step_sd).chain())
    assert float(found.log_evidence) == pytest.approx(float(exact.log_evidence), abs=1e-8)


@pytest.mark.slow
def test_sliding_windows_use_each_datum_once(float64):
    """Without step noise a window that slides by one and follows the flow knows what the filter knows, at all steps."""
    means, covs = kalman(DATA, np.ones(2), START)
    method = pf.FourDVar("strong", pf.Window(3, shift=1, covariance="flow"), sampler="mode")
    mean, sd = run(method, read(silent, DATA).chain()).filtering["x"]
    np.testing.assert_allclose(mean[2:], means[2:], atol=1e-8)
    np.testing.assert_allclose(sd[2:] ** 2, np.diagonal(covs[2:], axis1=1, axis2=2), atol=1e-8)


def test_a_fixed_background(float64):
    """Windows of two steps with a given B: the filter whose covariance is set to `scale` B at each start."""
    B = np.array([[0.6, -0.2], [-0.2, 0.9]])
    means, covs = kalman(DATA, np.ones(2), START, backgrounds=0.5 * B, window=2)
    method = pf.FourDVar(window=pf.Window(2, covariance=B, scale=0.5), sampler="mode")
    mean, sd = run(method, read(silent, DATA).chain()).filtering["x"]
    np.testing.assert_allclose(mean[1::2], means[1::2], atol=1e-8)
    np.testing.assert_allclose(sd[1::2] ** 2, np.diagonal(covs[1::2], axis1=1, axis2=2), atol=1e-8)


def test_climatology_of_a_linear_model(float64):
    """The covariance of an AR(1) is q / (1 - a^2); correlation time 10 steps, so 2000 independent states of 20,000."""

    def model(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0.0, 9.0)), y)

    chain = read(model, np.zeros(7)).chain()
    found = float(jax.jit(lambda k: climatology(chain, k, 1250))(KEY)[0, 0])
    exact = 1 / (1 - 0.81)
    # Variance of an estimated variance: 2 exact^2 (1 + a^2) / (1 - a^2) / n; 4 standard errors, false-alarm rate 6e-5.
    assert abs(found - exact) < 4 * exact * (2 * 1.81 / 0.19 / 20_000) ** 0.5


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("length", [pytest.param(3, marks=pytest.mark.slow), 90])
def test_the_adjoint_through_the_reader(length, float64):
    """Tangent and adjoint of Lorenz-96 equal finite differences; 90 steps are checkpointed."""
    truth, y = lorenz96.simulate(KEY, length, size=6)
    chain = read(partial(lorenz96.model_noise, size=6, model_noise=0.1), y).chain()
    stretch = _four_dvar.first_stretch(chain, False, length)
    rng = np.random.default_rng(0)
    z, v = (jnp.asarray(0.1 * rng.normal(size=stretch.dimension)) for _ in range(2))
    h = 1e-5

    @jax.jit
    def both(z, v):
        tangent = variational.linearize(stretch.run, z)
        difference = (stretch.run(z + h * v)[0] - stretch.run(z - h * v)[0]) / (2 * h)
        u = jnp.sin(jnp.arange(tangent.w.size))
        return (
            tangent.push(v),
            difference,
            u @ tangent.push(v),
            tangent.pull(u) @ v,
            tangent.slope,
            tangent.pull(tangent.w),
        )

    push, difference, left, right, slope, misfit = both(z, v)
    np.testing.assert_allclose(push, difference, atol=1e-5 * float(jnp.abs(push).max()))
    assert float(left) == pytest.approx(float(right), rel=1e-10)
    np.testing.assert_allclose(slope, misfit, atol=1e-9 * float(jnp.abs(slope).max()))
    assert truth.shape == y.shape


# ----------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("sampler", [pytest.param("randomised", marks=pytest.mark.slow), "laplace"])
def test_draws_are_the_smoother(sampler, float64):
    """Means and covariances of x over the trajectory, by all draws; false-alarm rate 1e-5 at five standard errors."""
    n = 1000
    chain = read(silent, DATA, step_sd=0.7).chain()
    found = run(pf.FourDVar(sampler=sampler), chain, "draws", n)
    exact = run(pf.FourDVar(sampler="mode"), chain).filtering["x"]
    x = np.asarray(found.posterior["x"])
    assert x.shape == (n, len(DATA), 2)
    np.testing.assert_array_less(np.abs(x.mean(0) - exact[0]), 5 * exact[1] / n**0.5 + 1e-9)
    np.testing.assert_allclose(x.var(0), exact[1] ** 2, rtol=5 * (2 / n) ** 0.5)
    # Joint draws: the trajectory obeys the model's step, so its second number has no noise of its own.
    np.testing.assert_allclose(x[:, 1:, 1], x[:, :-1] @ TURN[1], atol=1e-10)


# ----------------------------------------------------------------------------------------------- results of `infer`


def test_infer_gives_trajectories_and_attributes():
    tree = pf.infer(silent, DATA, method="four_dvar", draws=3, progress=False)
    assert tree["posterior"]["x"].shape == (1, 3, 6, 2)
    assert tree["posterior"]["x"].dims[2] == "time"
    found = pf.attributes(tree)
    assert found["returns"] == "posterior"
    assert found["converged"] == 1
    assert found["iterations"] >= 1
    assert found["objective"] > 0
    assert found["gradient_evaluations"] > found["evaluations"] > 0


@pytest.mark.slow
def test_windows_give_filtering_too():
    method = pf.FourDVar(window=4, sampler="laplace")
    tree = pf.infer(silent, DATA, method=method, draws=30, progress=False)
    assert tree["posterior"]["x"].shape == tree["filtering"]["x"].shape == (1, 30, 6, 2)
    assert pf.attributes(tree)["returns"] == "filtering"


@pytest.mark.slow
def test_parameters_join_the_control(float64):
    """A drift that is the same at all steps: with `augment` its posterior is the linear model's."""

    def model(y):
        drift = numpyro.sample("drift", dist.Normal(0.0, 1.0))

        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x + drift, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.4), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)

    y = np.array([0.5, 1.1, 1.4, np.nan, 2.9])
    matrix = np.array([[1.0, t + 1.0] for t in range(5)])
    noise = 0.25 * np.minimum.outer(np.arange(1, 6), np.arange(1, 6)) + 0.16 * np.eye(5)
    seen = ~np.isnan(y)
    H, R = matrix[seen], noise[np.ix_(seen, seen)]
    cov = np.linalg.inv(np.eye(2) + H.T @ np.linalg.solve(R, H))
    mean = cov @ H.T @ np.linalg.solve(R, y[seen])
    tree = pf.infer(model, y, method=pf.FourDVar(augment=True), draws=3000, progress=False)
    drawn = tree["posterior"]["drift"].to_numpy()[0]
    # Five standard errors: false-alarm rate 1e-6.
    assert abs(drawn.mean() - mean[1]) < 5 * (cov[1, 1] / 3000) ** 0.5
    assert drawn.var() == pytest.approx(cov[1, 1], rel=5 * (2 / 3000) ** 0.5)
    mode = pf.infer(model, y, method=pf.FourDVar(augment=True, sampler="mode"), draws=1, progress=False)
    assert float(mode["posterior"]["drift"].to_numpy()[0, 0]) == pytest.approx(mean[1], abs=1e-8)


def test_counts_have_a_mode(float64):
    """Poisson data: the objective is their own density; its gradient vanishes at the mode."""

    def model(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.4))
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)

    y = np.array([3, 0, 2, 5, 1])
    with pytest.raises(MethodError, match=r"'y' is Poisson, not Normal.*sampler='laplace'"):
        pf.infer(model, y, method=pf.FourDVar(), progress=False)
    stretch = _four_dvar.first_stretch(read(model, y).chain(), False, len(y))

    def objective(z):
        return 0.5 * jnp.sum(z**2) - jnp.sum(dist.Poisson(jnp.exp(stretch.path(z).states[1:, 0])).log_prob(y))

    found = variational.gauss_newton(stretch.run, jnp.zeros(stretch.dimension))
    assert bool(found.converged)
    assert float(found.objective) == pytest.approx(float(objective(found.z)), rel=1e-10)
    assert float(jnp.linalg.norm(jax.grad(objective)(found.z))) < 1e-4


def test_a_long_window_of_a_chaotic_model_is_minimised(float64):
    """Over 3.5 time units of Lorenz-63 errors grow some 25-fold; the minimum is at most what the truth has.

    From the prior's mean, all data at once end in other minima, whose objective is 40 to 150 times that.
    """
    truth, y = lorenz63.simulate(jax.random.key(3), 70, substeps=5, noise=1.0)
    simulated = pf.FourDVar("strong", sampler="mode", iterations=40)
    tree = pf.infer(lorenz63.model, y, substeps=5, noise=1.0, method=simulated, draws=1, progress=False)
    found = tree["posterior"]

    def objective(x0, x):
        return 0.5 * np.sum((x0 - np.array(lorenz63.START_MEAN)) ** 2) / lorenz63.START_SD**2 + 0.5 * np.sum(
            (x - y) ** 2
        )

    x0 = lorenz63.start().sample(jax.random.split(jax.random.key(3), 3)[0])
    reached = objective(found["x0"].to_numpy()[0, 0], found["x"].to_numpy()[0, 0])
    assert reached <= objective(np.asarray(x0), np.asarray(truth))
    assert pf.attributes(tree)["converged"] == 1


def test_what_did_not_converge_is_said():
    def model(y):
        def step(x, y):
            x = 3.7 * x * (1 - x)
            numpyro.sample("y", dist.Normal(x, 0.01), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Uniform(0.0, 0.8)), y)

    y = np.array([0.9, 0.3, 0.8, 0.6])
    with pytest.warns(UserWarning, match="Gauss-Newton did not converge|used up its steps"):
        tree = pf.infer(model, y, method=pf.FourDVar(sampler="mode", iterations=1), draws=1, progress=False)
    assert pf.attributes(tree)["converged"] == 0
    assert pf.attributes(tree)["outcome"] == "maximum_steps"


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("covariance", "said"),
    [
        (np.ones(3), "got an array of shape"),
        (np.array([[1.0, 0.5], [0.2, 1.0]]), "not finite and symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "least eigenvalue of that given is -1"),
        ("static", "takes one of"),
    ],
)
def test_a_background_that_is_no_covariance_is_refused(covariance, said):
    with pytest.raises(MethodError, match=said):
        pf.Window(2, covariance=covariance)


@pytest.mark.parametrize(
    ("method", "step_sd", "said"),
    [
        (pf.FourDVar(window=7), 0.0, "window of 7 steps is longer than the data, which have 6"),
        (pf.FourDVar(window=pf.Window(2, covariance=np.eye(3))), 0.0, r"shape \(3, 3\), and the state 2 numbers"),
        (pf.FourDVar(window=pf.Window(2, shift=1)), 0.7, "overlap.*use constraint='strong'"),
        (pf.FourDVar(window=2, augment=True), 0.0, "windows carry the state only"),
    ],
)
def test_windows_that_do_not_fit_are_refused(method, step_sd, said):
    with pytest.raises(MethodError, match=said):
        pf.infer(silent, DATA, step_sd=step_sd, method=method, progress=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: pf.FourDVar("soft"), "FourDVar.constraint=.*takes one of"),
        (lambda: pf.FourDVar(sampler="nuts"), "FourDVar.sampler=.*takes one of"),
        (lambda: pf.FourDVar(window=ANY), "takes a number of steps, pf.Window"),
        (lambda: pf.Window(2, shift=3), "would skip data"),
        (lambda: pf.Window(0), "integer of at least 1"),
        (lambda: pf.Window(2, scale=-1.0), "positive number"),
    ],
)
def test_options_are_checked(make, said):
    with pytest.raises(MethodError, match=said):
        make()


# ------------------------------------------------------------------------------------------------------- benchmark


@pytest.mark.slow
@pytest.mark.parametrize("row", benchmark.ROWS[:4])
def test_published_scores(row):
    """Means over 10 seeds of 1000 cycles within 5 per cent of what is published; standard errors are about 0.5 %."""
    found = benchmark.scores(row)["rmse"].mean()
    assert abs(found - row.published) <= benchmark.TOLERANCE * row.published
