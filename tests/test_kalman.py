"""Kalman against exact answers: every form of a linear Gaussian model, parameters, linearisations, what is stored.

`problems.linear_state_space.joint` conditions one dense Gaussian without recursion. Statistical tests use fixed keys;
their false-alarm rates stand beside them. "Exact" means up to rounding: 1e-8 in float64, 1e-3 in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import stats

import pushforward as pf
from pushforward.math import kalman as equations
from pushforward.methods._kalman_filter import joint_moments
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import linear_state_space as linear
from pushforward.problems import local_linear, nile
from pushforward.problems._gaussian import Affine, Noise, join

KEY = jax.random.key(0)
NORMAL = dist.Normal


def read(model, *args, **kwargs):
    return read_state_space(read_problem(model, args, kwargs))


def read_form(s, form):
    model, args, kwargs = linear.FORMS[form](s)
    return read(model, *args, **kwargs)


@partial(jax.jit, static_argnames="schedule")
def exact_laws(chain, schedule="sequential"):
    """Log likelihood, and mean and covariance of the site "x" of each step under three laws."""
    method = pf.Kalman(schedule=schedule)
    found = method._followed(chain)
    records = found.filtered.records
    _, _, smooth = equations.smooth_series(records)
    now, before = jax.vmap(joint_moments)(records)
    top = jnp.concatenate([smooth[1], smooth[4]], axis=2)
    bottom = jnp.concatenate([jnp.swapaxes(smooth[4], 1, 2), smooth[3]], axis=2)
    all_data = jnp.concatenate([smooth[0], smooth[2]], 1), jnp.concatenate([top, bottom], 1)
    n, riders, times = records.mean.shape[1], found.riders, jnp.arange(chain.structure.length)

    def of_site(law):
        def at(mean, cov, riding, t):
            def site(u):
                return jnp.ravel(chain.step(u[:n], riding, t, u[n:]).sites["x"])

            slopes = jax.jacfwd(site)(mean)
            return site(mean), slopes @ cov @ slopes.T

        return jax.vmap(at)(*law, riders, times)

    laws = {"filtering": of_site(now), "one_step": of_site(before), "smoothing": of_site(all_data)}
    return method.log_likelihood(chain), found.first.log_likelihood + found.filtered.log_likelihood, laws


def check_form(s, form, tolerance, schedule="sequential"):
    space, exact = read_form(s, form), linear.joint(s, form)
    *values, laws = exact_laws(space.chain(), schedule)
    scale = abs(exact.log_evidence())
    assert [float(v) for v in values] == pytest.approx([exact.log_evidence()] * 2, abs=tolerance * scale)
    for name, (mean, cov) in laws.items():
        expected = getattr(exact, name)()
        size = max(1.0, np.abs(expected.covariance).max())
        assert np.asarray(mean) == pytest.approx(expected.mean, abs=tolerance * max(1, np.abs(expected.mean).max()))
        assert np.asarray(cov) == pytest.approx(expected.covariance, abs=tolerance * size), name


SMALL = linear.system(n=2, m=2, q=2, steps=7, seed=1)


@pytest.mark.parametrize("form", linear.form_names(SMALL))
def test_every_form_is_exact(form, float64):
    check_form(SMALL, form, 1e-8)


def fresh():
    """The same system in other arrays: JAX remembers the precision in which it first met a closed-over numpy array."""
    return linear.system(n=2, m=2, q=2, steps=7, seed=1)


PARALLEL = ("missing", "counter")


@pytest.mark.parametrize("form", PARALLEL)
def test_the_parallel_schedule_is_exact(form, float64):
    check_form(SMALL, form, 1e-8, "parallel")


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in linear.form_names(SMALL) if f not in PARALLEL])
def test_the_parallel_schedule_is_exact_for_every_form(form, float64):
    check_form(SMALL, form, 1e-8, "parallel")


@pytest.mark.parametrize("form", ["noncentred", "deterministic_carry"])
def test_forms_in_single_precision(form):
    check_form(fresh(), form, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("form", linear.form_names(SMALL))
def test_every_form_in_single_precision(form):
    check_form(fresh(), form, 1e-3)


SYSTEMS = {
    "twenty, with singular noise": ({"n": 20, "m": 3, "q": 4, "steps": 10, "seed": 2}, "noncentred"),
    "more data than states": ({"n": 2, "m": 14, "q": 1, "steps": 5, "seed": 4}, "noncentred"),
    "one step": ({"n": 2, "m": 1, "q": 2, "steps": 1, "seed": 5}, "centred"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_other_sizes_are_exact(name, float64):
    sizes, form = SYSTEMS[name]
    check_form(linear.system(**sizes), form, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("form", linear.form_names(linear.system(n=20, m=8, q=20, steps=15, seed=7)))
def test_every_form_of_a_large_system_is_exact(form, float64):
    check_form(linear.system(n=20, m=8, q=20, steps=15, seed=7), form, 1e-8)


# ----------------------------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def one_parameter():
    """Log likelihoods of `local_linear` and their slopes at 64 values of u, by one compiled `vmap` of `grad`."""
    with jax.enable_x64(True):
        space = read(local_linear.model, y=local_linear.DATA)
        run = jax.value_and_grad(lambda u: pf.Kalman().log_likelihood(space.chain({"u": u})))
        us = jnp.linspace(-1.5, 0.5, 64).at[5].set(-0.4)
        return us, *jax.jit(jax.vmap(run))(us)


def test_log_likelihood_and_gradient_of_a_parameter(one_parameter, float64):
    value, slope = (v[5] for v in one_parameter[1:])
    h = 1e-4
    exact = [local_linear.log_likelihood(-0.4 + k * h, local_linear.DATA) for k in (-2, -1, 0, 1, 2)]
    assert float(value) == pytest.approx(exact[2], abs=1e-10)
    assert float(slope) == pytest.approx((exact[0] - 8 * exact[1] + 8 * exact[3] - exact[4]) / (12 * h), rel=1e-8)


def test_sixty_four_parameter_values_at_once(one_parameter, float64):
    us, values, slopes = one_parameter
    assert np.isfinite(slopes).all()
    for i in (0, 20, 63):
        assert float(values[i]) == pytest.approx(local_linear.log_likelihood(float(us[i]), local_linear.DATA), abs=1e-9)


def test_gradient_of_two_variances(float64):
    space = read(nile.local_level_unknown, y=nile.DATA)
    point = {"noise_sd": jnp.asarray(120.0), "level_sd": jnp.asarray(40.0)}
    slope = jax.jit(jax.grad(lambda p: pf.Kalman().log_likelihood(space.chain(p))))(point)

    def exact(noise_sd, level_sd):
        return nile.joint(noise_variance=noise_sd**2, level_variance=level_sd**2).log_evidence()

    def difference(a, b):
        near, far = (exact(120 + k * a, 40 + k * b) - exact(120 - k * a, 40 - k * b) for k in (1, 2))
        return (8 * near - far) / 12 / (a + b)

    assert float(slope["noise_sd"]) == pytest.approx(difference(0.5, 0), abs=1e-7)
    assert float(slope["level_sd"]) == pytest.approx(difference(0, 0.5), abs=1e-7)


# ------------------------------------------------------------------------------------------ draws of trajectories

DRAWS = 4000


def check_gaussian(draws, mean, cov, false_alarm=1e-6):
    """Draws (count, d) have this law: tests of the whitened mean, variances and correlations, each at the rate given.

    Whitened, count |mean|^2 is chi squared with d degrees; count c_ij^2 (i < j) and count (c_ii - 1)^2 / 2 sum to
    chi squared with d (d + 1) / 2 degrees up to terms of order 1 / count (the limits are widened by a tenth for them).
    """
    white = np.linalg.solve(np.linalg.cholesky(cov), (np.asarray(draws) - mean).T).T
    count, d = white.shape
    assert stats.chi2(d).sf(count * np.sum(white.mean(0) ** 2)) > false_alarm
    c = white.T @ white / count
    score = count * np.sum(np.triu(c, 1) ** 2) + count / 2 * np.sum((np.diag(c) - 1) ** 2)
    degrees = d * (d + 1) / 2
    assert score < 1.1 * stats.chi2(degrees).isf(false_alarm)
    assert score > stats.chi2(degrees).ppf(false_alarm) / 1.1


def check_draws(s, form, method=None):
    """The joint law of all latent sites over all times, and the laws of "x" step by step."""
    space, exact = read_form(s, form), linear.joint(s, form)
    method = method or pf.Kalman()
    found = jax.jit(lambda c, k: method.trajectories(c, k, DRAWS))(space.chain(), KEY)
    assert float(found.log_evidence) == pytest.approx(exact.log_evidence(), abs=1e-8)
    sites = {n: np.asarray(v) for n, v in found.posterior.items()}
    latent = np.concatenate([sites[n].reshape(DRAWS, -1) for n in exact.latent], 1)
    variable = join(*(v for b in exact.latent.values() for v in ([b] if isinstance(b, Affine) else b)))
    check_gaussian(latent, *posterior_of(exact, variable))
    # "x" is an affine function of the latent sites, draw by draw.
    state = join(*exact.state)
    size = max(variable.root.shape[1], state.root.shape[1])
    roots = [np.pad(v.root, ((0, 0), (0, size - v.root.shape[1]))) for v in (variable, state)]
    noise = np.linalg.lstsq(roots[0], (latent - variable.mean).T)[0]
    assert sites["x"].reshape(DRAWS, -1) == pytest.approx((state.mean[:, None] + roots[1] @ noise).T, abs=1e-8)
    for name in ("filtering", "one_step"):
        x = np.asarray(getattr(found, name)["x"]).reshape(DRAWS, s.steps, -1)
        law = getattr(exact, name)()
        for t in range(s.steps):
            spread = law.covariance[t] + 1e-12 * np.eye(x.shape[2])
            check_gaussian(x[:, t], law.mean[t], spread, false_alarm=1e-7)
    return found, exact


def posterior_of(exact, variable):
    """Mean and covariance, given all data, of any variable of the model."""
    data, y, _ = exact._present()
    size = max(variable.root.shape[1], data.root.shape[1])
    x, y_root = (np.pad(v.root, ((0, 0), (0, size - v.root.shape[1]))) for v in (variable, data))
    gain = np.linalg.solve(y_root @ y_root.T, y_root @ x.T).T
    return variable.mean + gain @ (y - data.mean), x @ x.T - gain @ y_root @ x.T


FAST_DRAWS = ("deterministic_carry",)


@pytest.mark.parametrize("form", FAST_DRAWS)
def test_draws_have_the_joint_law(form, float64):
    """False alarms: 2 tests at 1e-6 and 4 T at 1e-7 for each form."""
    found, exact = check_draws(SMALL, form)
    for i in (0, 17):
        sites = {n: np.asarray(found.posterior[n][i]) for n in exact.latent}
        parts = (found.log_prior, found.log_likelihood)
        total = sum(float(jnp.sum(v[i])) for part in parts for v in part.values())
        assert total == pytest.approx(exact.log_density(sites), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in linear.form_names(SMALL) if f not in FAST_DRAWS])
def test_draws_of_every_form_have_the_joint_law(form, float64):
    check_draws(SMALL, form)


# -------------------------------------------------------------------------------------------------- end to end


def test_infer_gives_a_tree(float64):
    model, args, kwargs = linear.FORMS["deterministic_sites"](SMALL)
    tree = pf.infer(model, *args, method="auto", draws=1000, progress=False, **kwargs)
    exact = linear.joint(SMALL, "deterministic_sites")
    groups = {"posterior", "filtering", "one_step", "log_prior", "log_likelihood", "observed_data"}
    assert groups <= set(tree.children)
    assert dict(tree["posterior"].sizes) | {"time": 7} == dict(tree["posterior"].sizes)
    assert {"x0", "x", "signal", "last", "total"} == set(tree["posterior"].data_vars)
    assert tree["posterior"]["x"].dims == ("chain", "draw", "time", "x_dim_1")
    assert tree["log_likelihood"]["y"].shape == (1, 1000, 7)
    assert tree["observed_data"]["y"].dims[0] == "time"
    assert {"x", "signal"} == set(tree["filtering"].data_vars)
    assert {"x", "signal", "y"} == set(tree["one_step"].data_vars)
    found = pf.attributes(tree)
    assert found["log_evidence"] == pytest.approx(exact.log_evidence(), abs=1e-8)
    assert (found["method"], found["outcome"], found["returns"]) == ("Kalman", "success", "posterior")
    assert "linear-Gaussian scan" in found["reason"]
    x = tree["posterior"]["x"].to_numpy()[0]
    assert tree["posterior"]["last"].to_numpy()[0] == pytest.approx(x[:, -1])
    assert tree["posterior"]["total"].to_numpy()[0] == pytest.approx(x.sum(1))
    # False alarm below 1e-5: 14 means at 5 standard errors.
    law = exact.smoothing()
    sd = np.sqrt(np.diagonal(law.covariance, axis1=1, axis2=2))
    assert np.abs((x.mean(0) - law.mean) / sd * np.sqrt(1000)).max() < 5


def test_moments_are_exact_and_the_last_step_is_drawn(float64):
    """False alarm of the draws of the last step: 2 tests at 1e-6."""
    model, args, kwargs = linear.FORMS["missing"](SMALL)
    exact = linear.joint(SMALL, "missing")
    tree = pf.infer(model, *args, method=pf.Kalman(store="moments"), draws=DRAWS, progress=False, **kwargs)
    for name in ("filtering", "one_step"):
        law = getattr(exact, name)()
        assert tree[name]["x"].to_numpy() == pytest.approx(law.mean, abs=1e-8)
        sd = np.sqrt(np.diagonal(law.covariance, axis1=1, axis2=2))
        assert tree[name]["x_sd"].to_numpy() == pytest.approx(sd, abs=1e-8)
    last = tree["posterior"]["x"].to_numpy()[0]
    check_gaussian(last, exact.filtering().mean[-1], exact.filtering().covariance[-1])
    assert pf.attributes(tree)["log_evidence"] == pytest.approx(exact.log_evidence(), abs=1e-8)


def test_last_keeps_the_last_step_alone(float64):
    """False alarm: 2 tests at 1e-6."""
    model, args, kwargs = linear.FORMS["deterministic_carry"](SMALL)
    exact = linear.joint(SMALL, "deterministic_carry")
    tree = pf.infer(model, *args, method=pf.Kalman(store="last"), draws=DRAWS, progress=False, **kwargs)
    assert not {"filtering", "one_step", "log_likelihood"} & set(tree.children)
    law = exact.smoothing()
    check_gaussian(tree["posterior"]["x"].to_numpy()[0], law.mean[-1], law.covariance[-1])
    assert tree["last_carry"]["state"].shape == (1, DRAWS, 4)
    assert pf.attributes(tree)["log_evidence"] == pytest.approx(exact.log_evidence(), abs=1e-8)


# -------------------------------------------------------------------------------------------------- parameters


def parameter_draws(method, draws, **options):
    tree = pf.infer(
        local_linear.model, y=local_linear.DATA, method=method, states=pf.Kalman(), draws=draws, progress=False,
        **options,
    )  # fmt: skip
    return tree, tree["posterior"]["u"].to_numpy()


def check_parameter(u, size, false_alarm_z=4.5):
    """Mean and sd of u at an effective size: two-sided false alarm 7e-6 each (the sd's, of a near-normal law)."""
    assert abs(u.mean() - local_linear.MEAN_U) < false_alarm_z * local_linear.SD_U / np.sqrt(size)
    assert abs(u.std() / local_linear.SD_U - 1) < false_alarm_z / np.sqrt(2 * size) * 1.2


def test_nuts_over_kalman(float64):
    """The posterior of u, and trajectories given it: E[x | y] is the mean of E[x | y, u] over the posterior of u."""
    tree, u = parameter_draws(pf.NUTS(chains=2, warmup=200), 1000)
    check_parameter(u, 400)
    groups = {"posterior", "log_prior", "log_likelihood", "sample_stats", "observed_data"}
    assert groups <= set(tree.children)
    x = tree["posterior"]["x"]
    assert x.dims == ("chain", "draw", "time")
    us = np.linspace(-1.2, 0.3, 31)
    weights = [local_linear.log_likelihood(v, local_linear.DATA) + stats.norm(-0.5, 0.5).logpdf(v) for v in us]
    weights = np.exp(weights - np.max(weights)) / np.sum(np.exp(weights - np.max(weights)))
    joints = [local_linear.joint(v, local_linear.DATA) for v in us]
    laws = [posterior_of(j, join(*j.latent["x"])) for j in joints]
    mean = weights @ [m for m, _ in laws]
    second = weights @ [np.diag(c) + m**2 for m, c in laws]
    sd = np.sqrt(second - mean**2)
    draws = x.to_numpy().reshape(-1, 40)
    # 80 comparisons at z = 5 with half the draws counted: false alarm below 1e-4.
    assert np.abs((draws.mean(0) - mean) / sd).max() < 5 / np.sqrt(1000)
    assert np.abs(draws.std(0) / sd - 1).max() < 5 / np.sqrt(2 * 1000)


@pytest.mark.slow
def test_tempered_smc_over_kalman(float64):
    tree, u = parameter_draws(pf.TemperedSMC(particles=2000), 2000)
    check_parameter(u, 500)
    assert pf.attributes(tree)["log_evidence"] == pytest.approx(local_linear.LOG_EVIDENCE, abs=0.3)


@pytest.mark.slow
def test_laplace_over_kalman(float64):
    """The Gaussian at the mode: the posterior is skew by about 0.15, hence the tolerance of a fifth of an sd."""
    _, u = parameter_draws(pf.Laplace(), 4000)
    assert abs(u.mean() - local_linear.MEAN_U) < 0.2 * local_linear.SD_U
    assert abs(u.std() / local_linear.SD_U - 1) < 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GaussianVI. Pareto k-hat:UserWarning")
def test_gaussian_vi_over_kalman(float64):
    _, u = parameter_draws(pf.GaussianVI(), 4000)
    assert abs(u.mean() - local_linear.MEAN_U) < 0.2 * local_linear.SD_U
    assert abs(u.std() / local_linear.SD_U - 1) < 0.15


def test_a_linear_parameter_in_the_state_is_exact(float64):
    """An unknown drift with a normal prior: the augmented model is linear, so parameter and states are exact.

    False alarm: 2 tests at 1e-6.
    """

    def model(y=None):
        drift = numpyro.sample("drift", NORMAL(0.5, 2.0))
        x0 = numpyro.sample("x0", NORMAL(1.0, 1.5))

        def step(x, y):
            x = numpyro.sample("x", NORMAL(0.9 * x + drift, 0.4))
            numpyro.sample("y", NORMAL(x + 0.3 * drift, 0.5), obs=y)
            return x, None

        scan(step, x0, y)

    y = np.array([1.0, 1.4, np.nan, 2.5, 2.2, 3.0])
    noise, xs, ys = Noise(), [], []
    drift = noise.normal([0.5], [[2.0]])
    x = x0 = noise.normal([1.0], [[1.5]])
    for _ in y:
        x = 0.9 * x + drift + noise.normal([0.0], [[0.4]])
        xs.append(x)
        ys.append(x + 0.3 * drift + noise.normal([0.0], [[0.5]]))
    exact = linear.Joint({"drift": drift, "x0": x0, "x": xs}, {"y": ys}, {"y": y}, xs)
    tree = pf.infer(model, method=pf.Kalman(augment=True), y=y, draws=DRAWS, progress=False)
    assert pf.attributes(tree)["log_evidence"] == pytest.approx(exact.log_evidence(), abs=1e-8)
    found = [tree["posterior"][n].to_numpy().reshape(DRAWS, -1) for n in exact.latent]
    check_gaussian(np.concatenate(found, 1), *posterior_of(exact, join(drift, x0, *xs)))


@pytest.mark.slow
def test_a_nonlinear_parameter_in_the_state(float64):
    """x_t = a x + e with unknown a: near a sharp posterior the tangent is right (200 data, truth 0.7)."""

    def model(y=None):
        a = numpyro.sample("a", NORMAL(0.5, 0.3))

        def step(x, y):
            x = numpyro.sample("x", NORMAL(a * x, 1.0))
            numpyro.sample("y", NORMAL(x, 0.1), obs=y)
            return x, None

        scan(step, 0.0, y)

    rng, x, y = np.random.default_rng(3), 0.0, []
    for _ in range(200):
        x = 0.7 * x + rng.normal()
        y.append(x + 0.1 * rng.normal())
    method = pf.Kalman(pf.Extended(), augment=True)
    tree = pf.infer(model, method=method, y=np.array(y), draws=500, progress=False)
    a = tree["posterior"]["a"].to_numpy()
    assert a.shape == (1, 500)
    assert abs(a.mean() - 0.7) < 4 * np.sqrt((1 - 0.7**2) / 200)
    assert a.std() == pytest.approx(np.sqrt((1 - 0.7**2) / 200), rel=0.3)


# ---------------------------------------------------------------------------------------------- linearisations

LINEARIZATIONS = {
    "extended": pf.Extended(),
    "iterated": pf.Iterated(3),
    "unscented": pf.Unscented(),
    "unscented with options": pf.Unscented(alpha=0.5, beta=1.0, kappa=2.0),
    "cubature": pf.Cubature(),
}


def check_linearisations(form):
    space, exact = read_form(SMALL, form), linear.joint(SMALL, form)

    @jax.jit
    def all_values(chain):
        return {n: pf.Kalman(lin).log_likelihood(chain) for n, lin in LINEARIZATIONS.items()}

    for name, value in all_values(space.chain()).items():
        assert float(value) == pytest.approx(exact.log_evidence(), abs=1e-8), name


def test_linearisations_of_a_linear_model_are_exact(float64):
    """With a singular covariance, for which sigma points use a root with 1e-12 added."""
    check_linearisations("deterministic_carry")


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in linear.form_names(SMALL) if f != "deterministic_carry"])
def test_linearisations_of_every_linear_form_are_exact(form, float64):
    check_linearisations(form)


def test_draws_through_sigma_points_have_the_joint_law(float64):
    """Sigma points add noise columns, which the draws must not show. False alarms as above."""
    check_draws(SMALL, "scalar", pf.Kalman(pf.Cubature()))


@pytest.mark.slow
@pytest.mark.parametrize("lin", LINEARIZATIONS.values(), ids=LINEARIZATIONS)
def test_draws_through_linearisations_have_the_joint_law(lin, float64):
    check_draws(SMALL, "two_sites", pf.Kalman(lin))


def bent(y=None):
    """A mildly nonlinear scalar model with a parameter."""
    a = numpyro.sample("a", NORMAL(0.5, 0.2))

    def step(x, y):
        x = numpyro.sample("x", NORMAL(x + a * jnp.sin(x), 0.3))
        numpyro.sample("y", NORMAL(x + 0.1 * x**2, 0.4), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", NORMAL(0.5, 0.4)), y)


BENT_DATA = np.array([0.9, 1.1, 2.2, np.nan, 2.4, 3.5])


def bent_log_likelihood(a):
    """By the trapezoid rule on a grid of the state."""
    x = np.linspace(-4.0, 8.0, 1601)
    density = stats.norm(0.5, 0.4).pdf(x)
    move = stats.norm((x + a * np.sin(x))[:, None], 0.3).pdf(x[None])
    total = 0.0
    for y in BENT_DATA:
        density = density @ move * (x[1] - x[0])
        if not np.isnan(y):
            density = density * stats.norm(x + 0.1 * x**2, 0.4).pdf(y)
        total, density = total + np.log(density.sum() * (x[1] - x[0])), density / (density.sum() * (x[1] - x[0]))
    return total


@pytest.fixture(scope="module")
def bent_values():
    """Log likelihood, its derivative and a central difference for the ways of linearising."""
    ways = {"extended": pf.Extended(), "iterated": pf.Iterated(3), "unscented": pf.Unscented(), "one": pf.Iterated(1)}
    h, found = 1e-5, {}
    with jax.enable_x64(True):
        space = read(bent, y=BENT_DATA)
        for name, lin in ways.items():
            run = jax.value_and_grad(lambda a, lin=lin: pf.Kalman(lin).log_likelihood(space.chain({"a": a})))
            values, slopes = jax.jit(jax.vmap(run))(jnp.array([0.6 - h, 0.6, 0.6 + h]))
            found[name] = (float(values[1]), float(slopes[1]), float(values[2] - values[0]) / (2 * h))
    return found


def test_log_likelihood_of_a_nonlinear_model(bent_values):
    """Approximations have no exact test: within 0.2 of the truth, sigma points within 0.1."""
    exact = bent_log_likelihood(0.6)
    for name, (value, *_) in bent_values.items():
        assert value == pytest.approx(exact, abs=0.2), name
    assert bent_values["unscented"][0] == pytest.approx(exact, abs=0.1)
    assert bent_values["one"] == pytest.approx(bent_values["extended"], rel=1e-10)
    assert abs(bent_values["iterated"][0] - bent_values["extended"][0]) > 1e-4
    assert abs(bent_values["unscented"][0] - bent_values["extended"][0]) > 1e-4


def test_gradients_of_linearisations(bent_values):
    for name, (_, slope, difference) in bent_values.items():
        assert slope == pytest.approx(difference, rel=1e-5), name


def test_gradient_of_sigma_points_where_the_covariance_is_singular(float64):
    """The position p has no variance at first. Gradients must be finite there, and those of the exact filter."""

    def model(y=None):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))

        def step(carry, y):
            p, v = carry
            v = numpyro.sample("v", NORMAL(0.8 * v, scale))
            numpyro.sample("y", NORMAL(p + v, 0.3), obs=y)
            return (p + v, v), None

        scan(step, (jnp.zeros(()), numpyro.sample("v0", NORMAL(0.0, 1.0))), y)

    space = read(model, y=np.array([0.3, 0.5, 1.2, 0.7]))

    def both(scale):
        chain = space.chain({"scale": scale})
        return pf.Kalman(pf.Unscented()).log_likelihood(chain), pf.Kalman().log_likelihood(chain)

    slopes = jax.jit(jax.jacfwd(both))(jnp.asarray(0.6))
    assert float(slopes[0]) == pytest.approx(float(slopes[1]), rel=1e-5)


def test_counts_are_matched_by_moments(float64):
    """Extended filter of one Poisson count: a Gaussian of variance exp(mean) stands for the noise."""

    def model(y=None):
        def step(x, y):
            x = numpyro.sample("x", NORMAL(x, 0.3))
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", NORMAL(2.0, 0.4)), y)

    space = read(model, y=np.array([9]))
    value = jax.jit(pf.Kalman(pf.Extended()).log_likelihood)(space.chain())
    rate = np.exp(2.0)
    expected = stats.norm(rate, np.sqrt(rate**2 * (0.4**2 + 0.3**2) + rate)).logpdf(9)
    assert float(value) == pytest.approx(expected, abs=1e-9)


# --------------------------------------------------------------------------------------------------- options


def test_inflation_multiplies_the_covariance_per_unit_of_time(float64):
    """A scalar filter written out: P -> inflation^time_step P before each step."""
    model, args, kwargs = linear.FORMS["scalar"](SMALL)
    space = read(model, *args, **kwargs)
    scale, r = np.sqrt(SMALL.Q[0, 0]), SMALL.r[0]

    def by_hand(growth):
        m, P, total = float(SMALL.m0[0]), 1.0, 0.0
        for y in kwargs["y"]:
            m, P = 0.8 * m + 0.1, 0.64 * growth * P + scale**2
            total += stats.norm(m, np.sqrt(P + r**2)).logpdf(y)
            gain = P / (P + r**2)
            m, P = m + gain * (y - m), (1 - gain) * P
        return total

    inflated = pf.Kalman(inflation=1.5, time_step=2.0)
    assert float(jax.jit(inflated.log_likelihood)(space.chain())) == pytest.approx(by_hand(1.5**2), abs=1e-9)
    assert not inflated.exact
    assert pf.Kalman(time_step=2.0).exact


def test_names_stand_for_linearisations():
    for name, kind in {"extended": pf.Extended, "unscented": pf.Unscented, "cubature": pf.Cubature}.items():
        assert isinstance(pf.Kalman(name).linearization, kind)
    assert pf.Kalman("exact").exact
    assert not pf.Kalman("iterated").exact
