"""State-space problems: exact answers against a textbook Kalman filter and NumPyro's own density; published scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import stats
from scipy.integrate import solve_ivp

from pushforward.problems import air_passengers, lorenz63, lorenz96, nile
from pushforward.problems import linear_state_space as linear
from pushforward.problems import local_linear as one

# ------------------------------------------------------------------------------------------------ textbook filter


def kalman(A, b, Q, C, R, m, P, ys):
    """Kalman filter and Rauch-Tung-Striebel smoother, Särkkä and Svensson (2023), with missing entries.

    Returns log evidence and (means, covariances) of filtering, one-step prediction and smoothing.
    """
    log_evidence, filtered, predicted = 0.0, [], []
    for y in ys:
        m, P = A @ m + b, A @ P @ A.T + Q
        predicted.append((m, P))
        seen = ~np.isnan(y)
        if seen.any():
            H, S = C[seen], C[seen] @ P @ C[seen].T + R[np.ix_(seen, seen)]
            log_evidence += stats.multivariate_normal(H @ m, S).logpdf(y[seen])
            K = P @ H.T @ np.linalg.inv(S)
            m, P = m + K @ (y[seen] - H @ m), P - K @ S @ K.T
        filtered.append((m, P))
    smoothed = [filtered[-1]]
    for (m, P), (m_next, P_next) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        G = P @ A.T @ np.linalg.inv(P_next)
        m_s, P_s = smoothed[-1]
        smoothed.append((m + G @ (m_s - m_next), P + G @ (P_s - P_next) @ G.T))
    return log_evidence, filtered, predicted, smoothed[::-1]


def of_system(s, ys, m0=None, P0=None):
    start = (s.m0 if m0 is None else m0, s.P0 if P0 is None else P0)
    return kalman(s.A, s.b, s.Q, s.C, np.diag(s.r**2), *start, ys)


def close(actual, expected, absolute=1e-10):
    for a, e in zip(actual, zip(*expected, strict=True), strict=True):
        assert a == pytest.approx(np.stack(e), rel=1e-9, abs=absolute)


# ------------------------------------------------------------------------------------------ linear Gaussian forms

SYSTEMS = {
    "default": {},
    "small": {"n": 2, "m": 3, "q": 2, "steps": 9, "seed": 5},
    "wide": {"n": 4, "m": 2, "q": 4, "steps": 7, "seed": 2},
}


def test_a_system_is_stable_and_full():
    s = linear.system(n=4, m=3, q=2, steps=6, seed=1)
    assert np.max(np.abs(np.linalg.eigvals(s.A))) == pytest.approx(0.9)
    assert (s.x.shape, s.y.shape, s.B.shape, s.C.shape) == ((6, 4), (6, 3), (4, 2), (3, 4))
    assert np.linalg.matrix_rank(s.Q) == 2
    assert np.array_equal(s.y, linear.system(n=4, m=3, q=2, steps=6, seed=1).y)
    assert not np.array_equal(s.A, linear.system(n=4, m=3, q=2, steps=6, seed=2).A)


@pytest.mark.parametrize("sizes", [{"n": 0}, {"n": 2, "q": 3}, {"steps": 0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1, and q is at most n"):
        linear.system(**sizes)


@pytest.mark.parametrize("sizes", SYSTEMS.values(), ids=SYSTEMS)
def test_the_exact_law_is_that_of_a_kalman_filter(sizes):
    s = linear.system(**sizes)
    for form in ("centred", "noncentred", "missing", "masked"):
        exact = linear.joint(s, form)
        log_evidence, filtered, predicted, smoothed = of_system(s, exact.values["y"])
        assert exact.log_evidence() == pytest.approx(log_evidence, abs=1e-10)
        close(exact.filtering(), filtered)
        close(exact.one_step(), predicted)
        close(exact.smoothing(), smoothed)
    assert np.isnan(linear.joint(s, "missing").values["y"]).any()


def test_singular_noise_against_a_kalman_filter():
    s = linear.system(n=3, m=2, q=1, steps=8, seed=4)
    log_evidence, filtered, _, smoothed = of_system(s, s.y)
    exact = linear.joint(s, "noncentred")
    assert exact.log_evidence() == pytest.approx(log_evidence, abs=1e-10)
    close(exact.filtering(), filtered)
    close(exact.smoothing(), smoothed)
    with pytest.raises(ValueError, match="needs q = n"):
        linear.joint(s, "centred")
    assert {"noncentred", "plate"} <= set(linear.form_names(s))
    assert "centred" not in linear.form_names(s)


def test_observe_then_move_is_one_step_ahead():
    s = linear.system()
    exact = linear.joint(s, "observe_then_move")
    log_evidence, filtered, *_ = of_system(s, s.y)
    assert exact.log_evidence() == pytest.approx(log_evidence, abs=1e-10)
    close(exact.filtering(), [(s.A @ m + s.b, s.A @ P @ s.A.T + s.Q) for m, P in filtered])


def test_observed_start_is_assimilated_first():
    s = linear.system()
    exact = linear.joint(s, "observed_start")
    R = np.diag(s.r**2)
    first, start, *_ = kalman(np.eye(s.n), 0, 0, s.C, R, s.m0, s.P0, exact.values["y0"][None])
    log_evidence, filtered, predicted, smoothed = of_system(s, s.y, *start[0])
    assert exact.log_evidence() == pytest.approx(first + log_evidence, abs=1e-10)
    close(exact.filtering(), filtered)
    close(exact.one_step(), predicted)
    close(exact.smoothing(), smoothed)


def test_forms_of_one_law_agree_on_the_data():
    s = linear.system(seed=3)
    reference = linear.joint(s, "centred")
    added_or_missing = {"missing", "masked", "observed_start"}
    for form in set(linear.SAME_LAW) - added_or_missing:
        exact = linear.joint(s, form)
        assert exact.log_evidence() == pytest.approx(reference.log_evidence(), abs=1e-10), form
        if form != "observe_then_move":
            assert exact.smoothing().mean == pytest.approx(reference.smoothing().mean, abs=1e-10), form


def sites_of(form_call, rng):
    """A random point: values of every latent site in the model's shapes."""
    model, args, kwargs = form_call

    def values():
        with handlers.block(), handlers.seed(rng_seed=0):
            trace = handlers.trace(model).get_trace(*args, **kwargs)
        return {n: m["value"] for n, m in trace.items() if m["type"] == "sample" and not m["is_observed"]}

    return {name: jnp.asarray(rng.normal(size=value.shape)) for name, value in jax.eval_shape(values).items()}


COMPLETE = {"missing": "centred", "dense_noise_missing": "dense_noise"}


@pytest.mark.parametrize("form", [form for form in linear.FORMS if form not in COMPLETE])
def test_numpyro_has_the_density_and_the_state_of_the_exact_law(form, float64):
    """log p(latent sites, data) at a random point; and x, affine in the latent sites, is what the law says of it."""
    s = linear.system(n=3, m=2, q=3, steps=7, seed=6)
    exact, (model, args, kwargs) = linear.joint(s, form), linear.FORMS[form](s)
    sites = sites_of((model, args, kwargs), np.random.default_rng(8))
    assert set(sites) == set(exact.latent)
    actual, trace = log_density(model, args, kwargs, sites)
    assert float(actual) == pytest.approx(exact.log_density(sites), rel=1e-11)

    variables = [v for block in exact.latent.values() for v in parts(block)]
    size = max(v.root.shape[1] for v in variables)
    roots = np.concatenate([np.pad(v.root, ((0, 0), (0, size - v.root.shape[1]))) for v in variables])
    values = np.concatenate([np.ravel(sites[name]) for name in exact.latent])
    noise = np.linalg.lstsq(roots, values - np.concatenate([v.mean for v in variables]))[0]
    expected = np.stack([v.mean + v.root @ noise[: v.root.shape[1]] for v in exact.state])
    assert np.reshape(trace["x"]["value"], expected.shape) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("form", COMPLETE)
def test_missing_forms_are_complete_ones_with_holes(form):
    """NumPyro's own density of NaN is nan, so these are compared with the form that has all values."""
    s = linear.system(steps=7)
    y, complete = linear.joint(s, form).values["y"], linear.joint(s, COMPLETE[form]).values["y"]
    holes = np.isnan(y)
    assert holes.all(axis=1).any()
    assert (holes.any(axis=1) & ~holes.all(axis=1)).any()
    assert np.array_equal(y[~holes], complete[~holes])
    assert linear.joint(s, form).log_density(zeros(s)) != linear.joint(s, COMPLETE[form]).log_density(zeros(s))


def zeros(s):
    return {"x0": np.zeros(s.n), "x": np.zeros((s.steps, s.n))}


def parts(block):
    return block if isinstance(block, list | tuple) else [block]


def test_data_are_arguments_in_the_shapes_of_the_exact_law():
    s = linear.system()
    for form in set(linear.FORMS) - {"conditioned", "masked"}:
        _, args, kwargs = linear.FORMS[form](s)
        values = linear.joint(s, form).values
        assert args == ()
        assert all(np.array_equal(kwargs[name], values[name], equal_nan=True) for name in values), form


@pytest.mark.parametrize(
    "form", ["scalar", "plate_of_vectors", "deterministic_carry", "several_lags", "irregular_times"]
)
def test_data_of_other_laws_are_simulated_from_them(form):
    """Twice (evidence at the mean minus evidence) is chi squared with as many degrees as data: false alarm 1e-6."""
    exact = linear.joint(linear.system(steps=20), form)
    count = sum(np.size(value) for value in exact.values.values())
    mean = {name: np.concatenate([v.mean for v in parts(block)]) for name, block in exact.data.items()}
    at_mean = type(exact)(exact.latent, exact.data, mean, exact.state)
    chi = 2 * (at_mean.log_evidence() - exact.log_evidence())
    assert 1e-6 / 2 < stats.chi2(count).cdf(chi) < 1 - 1e-6 / 2


def test_initial_state_given_all_data():
    s = linear.system(steps=4)
    R, zero = np.diag(s.r**2), np.zeros((s.n, s.n))
    mean, covariance = linear.joint(s, "centred").posterior("x0")
    no_data = np.full((1, s.m), np.nan)
    # an augmented system (x_t, x_0): what smoothing says of x_0 is what filtering says at the end
    A = np.block([[s.A, zero], [zero, np.eye(s.n)]])
    Q = np.block([[s.Q, zero], [zero, zero]])
    C = np.concatenate([s.C, np.zeros_like(s.C)], axis=1)
    P = np.block([[s.P0, s.P0], [s.P0, s.P0]])
    b = np.concatenate([s.b, np.zeros(s.n)])
    _, filtered, *_ = kalman(A, b, Q, C, R, np.tile(s.m0, 2), P, np.concatenate([s.y, no_data]))
    assert mean == pytest.approx(filtered[-1][0][s.n :], abs=1e-10)
    assert covariance == pytest.approx(filtered[-1][1][s.n :, s.n :], abs=1e-10)


def test_a_form_that_does_not_exist_and_one_that_does_not_fit():
    with pytest.raises(ValueError, match=r"'centered'.*noncentred"):
        linear.joint(linear.system(), "centered")
    with pytest.raises(ValueError, match="m is 1"):
        linear.FORMS["several_observed"](linear.system(m=1))


# ------------------------------------------------------------------------------------------ one unknown parameter


def test_one_parameter_posterior_by_quadrature():
    us = np.linspace(-1.5, 0.7, 111)
    mean, eye = np.zeros(1), np.eye(1)
    A, Q0, R = one.DECAY * eye, 0 * eye, one.NOISE**2 * eye

    def log_likelihood(u):  # y_0 observes x_0, the others follow it
        first, start, *_ = kalman(eye, mean, Q0, eye, R, mean, eye, one.DATA[:1, None])
        return first + kalman(A, mean, np.exp(2 * u) * eye, eye, R, *start[0], one.DATA[1:, None])[0]

    log_likelihoods = np.array([log_likelihood(u) for u in us])
    assert one.log_likelihood(us[40], one.DATA) == pytest.approx(log_likelihoods[40], abs=1e-10)
    joint = log_likelihoods + stats.norm(-0.5, 0.5).logpdf(us)
    weights = np.exp(joint - joint.max())
    mean_u = weights @ us / weights.sum()
    assert mean_u == pytest.approx(one.MEAN_U, abs=5.1e-7)
    assert np.sqrt(weights @ (us - mean_u) ** 2 / weights.sum()) == pytest.approx(one.SD_U, abs=5.1e-7)
    log_evidence = joint.max() + np.log(weights.sum() * (us[1] - us[0]))
    assert log_evidence == pytest.approx(one.LOG_EVIDENCE, abs=5.1e-7)
    assert one.PROBLEM.numbers["mean"]["u"] == one.MEAN_U


def test_one_parameter_models_have_the_exact_density(float64):
    rng, u = np.random.default_rng(1), -0.3
    x0, x = rng.normal(), rng.normal(size=40)
    prior = stats.norm(-0.5, 0.5).logpdf(u)
    expected = prior + one.joint(u, one.DATA).log_density({"x0": x0, "x": x})
    sites = {"u": u, "x0": jnp.asarray(x0), "x": jnp.asarray(x)}
    assert float(log_density(one.model, (jnp.asarray(one.DATA),), {}, sites)[0]) == pytest.approx(expected, rel=1e-11)
    # without the last move the other form is left
    shorter = expected - stats.norm(one.DECAY * x[-2], np.exp(u)).logpdf(x[-1])
    sites["x"] = sites["x"][:-1]
    actual = log_density(one.model_first_outside, (one.DATA[0], jnp.asarray(one.DATA[1:])), {}, sites)[0]
    assert float(actual) == pytest.approx(shorter, rel=1e-11)


# ----------------------------------------------------------------------------------------------------------- Nile


def test_nile_data():
    assert (len(nile.DATA), nile.DATA.sum(), nile.DATA[0], nile.DATA[-1]) == (100, 91935.0, 1120.0, 740.0)
    assert (nile.DATA.argmin(), nile.DATA.min()) == (42, 456.0)  # 1913
    assert (nile.YEARS[0], nile.YEARS[-1]) == (1871, 1970)
    statsmodels = pytest.importorskip("statsmodels.datasets.nile.data")
    assert np.array_equal(nile.DATA, statsmodels.load_pandas().data["volume"])


def nile_filter(noise_sd, level_sd, mean=nile.START_MEAN, variance=nile.START_SD**2):
    """Log likelihoods on a grid of standard deviations, and the innovations' sum of squares and log variances."""
    total, squares, logs = 0.0, 0.0, 0.0
    for y in nile.DATA:
        variance = variance + level_sd**2
        innovation, s = y - mean, variance + noise_sd**2
        total = total - 0.5 * (np.log(2 * np.pi * s) + innovation**2 / s)
        squares, logs = squares + innovation**2 / s, logs + np.log(s)
        mean, variance = mean + variance / s * innovation, variance * noise_sd**2 / s
    return total, squares, logs


def test_nile_evidence_and_published_likelihoods():
    sds = nile.NOISE_VARIANCE**0.5, nile.LEVEL_VARIANCE**0.5
    assert nile_filter(*sds)[0] == pytest.approx(nile.LOG_EVIDENCE, abs=5.1e-7)
    assert nile.joint().log_evidence() == pytest.approx(nile.LOG_EVIDENCE, abs=5.1e-7)
    wide = 1e6
    diffuse = nile.joint(start_sd=wide).log_evidence() + np.log(np.sqrt(2 * np.pi) * wide)
    assert diffuse == pytest.approx(nile.DIFFUSE_LOG_LIKELIHOOD, abs=5e-5)
    # Durbin and Koopman, section 2.10.2: the likelihood in q = level / noise variance, noise variance maximised out;
    # the first datum initialises the diffuse filter
    q, mean, variance = nile.LEVEL_VARIANCE / nile.NOISE_VARIANCE, nile.DATA[0], 1.0
    squares = logs = 0.0
    for y in nile.DATA[1:]:
        f = variance + q + 1
        squares, logs = squares + (y - mean) ** 2 / f, logs + np.log(f)
        mean, variance = mean + (variance + q) / f * (y - mean), (variance + q) / f
    assert squares / 99 == pytest.approx(nile.NOISE_VARIANCE, rel=1e-4)  # their noise variance is the maximiser
    concentrated = -99 / 2 * np.log(squares / 99) - logs / 2
    assert concentrated == pytest.approx(nile.DIFFUSE_CONCENTRATED_LOG_LIKELIHOOD, abs=0.005)
    assert concentrated - 99 / 2 * np.log(2 * np.pi * np.e) == pytest.approx(nile.DIFFUSE_LOG_LIKELIHOOD, abs=5e-4)


def test_nile_filter_and_smoother_with_missing_years():
    y = np.array(nile.DATA)
    y[20:40] = np.nan  # as in Durbin and Koopman, section 2.7
    exact = nile.joint(y)
    one_by_one = [np.array([[value]]) for value in (1.0, nile.LEVEL_VARIANCE, 1.0, nile.NOISE_VARIANCE)]
    A, Q, C, R = one_by_one
    log_evidence, filtered, _, smoothed = kalman(
        A, np.zeros(1), Q, C, R, np.array([nile.START_MEAN]), np.array([[nile.START_SD**2]]), y[:, None]
    )
    assert exact.log_evidence() == pytest.approx(log_evidence, abs=1e-8)
    close(exact.filtering(), filtered, 1e-7)
    close(exact.smoothing(), smoothed, 1e-7)


def test_nile_posterior_of_the_unknown_deviations():
    log_noise = np.linspace(np.log(5), np.log(300), 201)
    log_level = np.linspace(np.log(0.02), np.log(300), 201)
    noise, level = np.meshgrid(np.exp(log_noise), np.exp(log_level), indexing="ij")
    joint = nile_filter(noise, level)[0] + np.log(noise * level)
    joint += stats.halfnorm(scale=200).logpdf(noise) + stats.halfnorm(scale=100).logpdf(level)
    weights = np.exp(joint - joint.max())
    cell = (log_noise[1] - log_noise[0]) * (log_level[1] - log_level[0])
    assert joint.max() + np.log(weights.sum() * cell) == pytest.approx(nile.UNKNOWN_LOG_EVIDENCE, abs=1e-6)
    weights /= weights.sum()
    for name, value in (("noise_sd", noise), ("level_sd", level)):
        mean = np.sum(weights * value)
        assert mean == pytest.approx(nile.UNKNOWN_MEAN[name], abs=1e-4)
        assert np.sqrt(np.sum(weights * (value - mean) ** 2)) == pytest.approx(nile.UNKNOWN_SD[name], abs=1e-4)


def test_nile_models_have_the_exact_density(float64):
    rng = np.random.default_rng(2)
    sites = {"x0": jnp.asarray(900.0), "x": jnp.asarray(900 + 100 * rng.normal(size=100))}
    y = jnp.asarray(nile.DATA)
    known = nile.joint().log_density(sites)
    assert float(log_density(nile.local_level, (y,), {}, sites)[0]) == pytest.approx(known, rel=1e-11)
    expected = nile.joint(noise_variance=130.0**2, level_variance=30.0**2).log_density(sites)
    expected += stats.halfnorm(scale=200).logpdf(130) + stats.halfnorm(scale=100).logpdf(30)
    actual = log_density(nile.local_level_unknown, (y,), {}, {**sites, "noise_sd": 130.0, "level_sd": 30.0})[0]
    assert float(actual) == pytest.approx(expected, rel=1e-11)


# ------------------------------------------------------------------------------------------------- air passengers

AIR_SD = {"level_sd": 0.026, "slope_sd": 0.002, "season_sd": 0.008, "noise_sd": 0.011}


def test_air_passengers_data():
    y = air_passengers.DATA
    assert (len(y), y.sum()) == (144, 40363.0)
    assert y[:12].tolist() == [112, 118, 132, 129, 121, 135, 148, 148, 136, 119, 104, 118]
    assert y[-6:].tolist() == [622, 606, 508, 461, 390, 432]
    assert (air_passengers.MONTHS[0], air_passengers.MONTHS[-1]) == ("1949-01", "1960-12")
    totals = [1520, 1676, 2042, 2364, 2700, 2867, 3408, 3939, 4421, 4572, 5140, 5714]
    assert y.reshape(12, 12).sum(1).tolist() == totals
    assert np.array_equal(air_passengers.LOG_DATA, np.log(y))


def air_matrices(sd):
    A = np.zeros((13, 13))
    A[0, :2] = A[1, 1] = 1
    A[2, 2:] = -1
    A[3:, 2:-1] = np.eye(10)
    Q = np.zeros((13, 13))
    Q[range(3), range(3)] = sd["level_sd"] ** 2, sd["slope_sd"] ** 2, sd["season_sd"] ** 2
    C = np.zeros((1, 13))
    C[0, [0, 2]] = 1
    P = np.diag([1.0, 0.1**2, *[0.3**2] * 11])
    return A, np.zeros(13), Q, C, np.array([[sd["noise_sd"] ** 2]]), np.eye(13)[0] * 5, P


def test_air_passengers_exact_law_is_that_of_a_kalman_filter():
    y = np.array(air_passengers.LOG_DATA[:40])
    y[-6:] = np.nan  # the last six months are a forecast
    exact = air_passengers.joint(AIR_SD, y)
    log_evidence, filtered, predicted, _ = kalman(*air_matrices(AIR_SD), y[:, None])
    assert exact.log_evidence() == pytest.approx(log_evidence, abs=1e-8)
    close(exact.filtering(), [(m[:3], P[:3, :3]) for m, P in filtered], 1e-8)
    close(exact.one_step(), [(m[:3], P[:3, :3]) for m, P in predicted], 1e-8)


def test_air_passengers_model_has_the_exact_density(float64):
    rng, y = np.random.default_rng(3), air_passengers.LOG_DATA[:30]
    names = {"level0": (), "slope0": (), "season0": (11,), "level": (30,), "slope": (30,), "season": (30,)}
    sites = {name: jnp.asarray(0.1 * rng.normal(size=shape)) for name, shape in names.items()}
    expected = air_passengers.joint(AIR_SD, y).log_density(sites)
    scales = {"level_sd": 0.1, "slope_sd": 0.01, "season_sd": 0.05, "noise_sd": 0.1}
    expected += sum(stats.halfnorm(scale=scale).logpdf(AIR_SD[name]) for name, scale in scales.items())
    actual = log_density(air_passengers.model, (jnp.asarray(y),), {}, {**sites, **AIR_SD})[0]
    assert float(actual) == pytest.approx(expected, rel=1e-10)


def test_air_passengers_forecast_of_the_last_year():
    y = np.array(air_passengers.LOG_DATA)
    y[-12:] = np.nan
    exact = air_passengers.joint(AIR_SD, y).smoothing()
    truth, signal = air_passengers.LOG_DATA, exact.mean[-12:, 0] + exact.mean[-12:, 2]
    naive = np.mean((truth[-12:] - truth[-24:-12]) ** 2)  # the year before, repeated
    assert np.mean((signal - truth[-12:]) ** 2) < 0.25 * naive


@pytest.mark.parametrize("model", [nile.local_level, nile.local_level_unknown, air_passengers.model, one.model])
def test_models_simulate_without_data(model):
    with handlers.seed(rng_seed=1):
        y = handlers.trace(model).get_trace(steps=6)["y"]["value"]
    assert y.shape == (6,)
    assert np.isfinite(y).all()


# --------------------------------------------------------------------------------------------------------- Lorenz


def lorenz96_right(_, x):
    return [(x[(i + 1) % len(x)] - x[i - 2]) * x[i - 1] - x[i] + 8.0 for i in range(len(x))]


def lorenz63_right(_, x):
    return [10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]]


def test_lorenz96_step_is_runge_kutta_of_order_four(float64):
    x = np.asarray(jax.lax.fori_loop(0, 200, lambda _, x: lorenz96.step(x), jnp.zeros(40).at[0].set(1.0)))
    assert np.asarray(lorenz96.derivative(x)) == pytest.approx(lorenz96_right(0, x), abs=1e-12)
    errors = []
    for parts in (2, 4):
        h = 0.1 / parts
        y = jax.lax.fori_loop(0, parts, lambda _, x, h=h: lorenz96.step(x, interval=h), jnp.asarray(x))
        exact = solve_ivp(lorenz96_right, (0, 0.1), x, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
        errors.append(np.abs(np.asarray(y) - exact).max())
    assert errors[0] < 0.01
    assert 3.5 < np.log2(errors[0] / errors[1]) < 4.7


def test_lorenz63_step_is_runge_kutta_of_order_four(float64):
    x = np.array([1.5, -1.5, 25.0])
    assert np.asarray(lorenz63.derivative(x)) == pytest.approx(lorenz63_right(0, x), abs=1e-12)
    exact = solve_ivp(lorenz63_right, (0, 0.25), x, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    assert np.asarray(lorenz63.step(x)) == pytest.approx(exact, abs=1e-4)
    errors = []
    for parts in (12, 24):
        y = jnp.asarray(x)
        for _ in range(parts):
            y = lorenz63.substep(y, interval=0.24 / parts)
        exact = solve_ivp(lorenz63_right, (0, 0.24), x, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
        errors.append(np.abs(np.asarray(y) - exact).max())
    assert 3.5 < np.log2(errors[0] / errors[1]) < 4.7


@pytest.mark.parametrize(("module", "size"), [(lorenz96, 40), (lorenz63, 3)])
def test_lorenz_steps_map_and_differentiate(module, size, float64):
    xs = jnp.asarray(np.random.default_rng(4).normal(size=(3, size)))
    together = jax.jit(module.step)(xs)
    assert np.asarray(jax.vmap(module.step)(xs)) == pytest.approx(np.asarray(together), abs=1e-12)
    x, direction = xs[0], xs[1]
    tangent = jax.jvp(module.step, (x,), (direction,))[1]
    difference = (module.step(x + 1e-5 * direction) - module.step(x - 1e-5 * direction)) / 2e-5
    assert np.asarray(tangent) == pytest.approx(np.asarray(difference), rel=1e-6, abs=1e-6)
    gradient = jax.grad(lambda x: jnp.vdot(direction, module.step(x)))(x)
    assert float(gradient @ xs[2]) == pytest.approx(
        float(direction @ jax.jvp(module.step, (x,), (xs[2],))[1]), rel=1e-9
    )


def test_lorenz_climatology():
    # long-run means and deviations; tolerance 5 standard errors of 100 (L96) and 2500 (L63) time units, found by runs
    truth, y = lorenz96.simulate(jax.random.key(1), 2400)
    assert truth.shape == y.shape == (2400, 40)
    assert float(truth[400:].mean()) == pytest.approx(2.34, abs=0.1)
    assert float(truth[400:].std()) == pytest.approx(3.64, abs=0.06)
    assert float((y - truth).std()) == pytest.approx(1.0, abs=0.01)
    truth, y = lorenz63.simulate(jax.random.key(2), 10064)
    assert np.asarray(truth[64:].mean(0)) == pytest.approx([0, 0, 23.55], abs=0.6)
    assert np.asarray(truth[64:].std(0)) == pytest.approx([7.92, 9.01, 8.61], rel=0.02)
    assert float((y - truth).std()) == pytest.approx(2**0.5, abs=0.03)


def three_dvar(module, key, cycles=1000):
    """Scores after the burn-in of 3DVar whose B is `scale` times the covariance of the truth."""
    truth, y = module.simulate(key, cycles)
    B = module.NUMBERS["3dvar"].options["scale"] * jnp.cov(truth.T)
    K = jnp.linalg.solve(B + module.NOISE**2 * jnp.eye(len(B)), B).T

    def cycle(x, y):
        x = module.step(x)
        x = x + K @ (y - x)
        return x, x

    _, mean = jax.lax.scan(cycle, module.start().mean, y)
    return jnp.mean(jnp.sqrt(jnp.mean((mean - truth) ** 2, axis=1))[module.BURN_IN :])


@pytest.mark.parametrize("module", [lorenz96, lorenz63])
def test_three_dvar_has_its_published_score(module):
    """Ours from 20 seeds, theirs from 20: the difference is within 5 standard errors."""
    scores = jax.jit(jax.vmap(lambda key: three_dvar(module, key)))(jax.random.split(jax.random.key(3), 20))
    anchor = module.NUMBERS["3dvar"]
    assert float(scores.mean()) == pytest.approx(anchor.rmse_1000, abs=5 * anchor.sd_1000 * (2 / 20) ** 0.5)


def test_scores_are_complete():
    numbers = lorenz96.NUMBERS | {f"63 {name}": anchor for name, anchor in lorenz63.NUMBERS.items()}
    assert len(numbers) == 15
    for anchor in numbers.values():
        assert 0 < anchor.rmse < 1.1
        assert anchor.spread is None or 0.9 < anchor.spread / anchor.rmse < 1.3
        assert anchor.rmse_1000 is None or abs(anchor.rmse_1000 - anchor.rmse) < 0.08 * anchor.rmse


NORMAL = stats.norm.logpdf


@pytest.mark.parametrize(("module", "parameter", "prior"), [(lorenz96, "F", (8, 0.5)), (lorenz63, "rho", (28, 2))])
def test_lorenz_models_by_hand(module, parameter, prior, float64):
    truth, y = (np.asarray(value) for value in module.simulate(jax.random.key(5), 4))
    x0 = np.asarray(module.start().mean) + 0.1
    start = NORMAL(x0, np.asarray(module.start().mean), module.START_SD).sum()
    # deterministic: the trajectory is a function of x0
    path, x = [], jnp.asarray(x0)
    for _ in range(4):
        x = module.step(x)
        path.append(np.asarray(x))
    actual = log_density(module.model, (jnp.asarray(y),), {}, {"x0": jnp.asarray(x0)})
    assert float(actual[0]) == pytest.approx(start + NORMAL(y, path, module.NOISE).sum(), rel=1e-11)
    assert np.asarray(actual[1]["x"]["value"]) == pytest.approx(np.stack(path), abs=1e-12)

    # with noise, and with an unknown parameter
    before = jnp.asarray(np.concatenate([x0[None], truth[:-1]]))
    sites = {"x0": jnp.asarray(x0), "x": jnp.asarray(truth)}
    look = start + NORMAL(y, truth, module.NOISE).sum()
    expected = look + NORMAL(truth, module.step(before), 0.7).sum()
    actual = log_density(module.model_noise, (jnp.asarray(y),), {"model_noise": 0.7}, sites)[0]
    assert float(actual) == pytest.approx(expected, rel=1e-11)
    value = prior[0] + 0.3
    substeps = {} if module is lorenz96 else {"substeps": 5}
    expected = look + NORMAL(truth, module.step(before, value, **substeps), 0.7).sum() + NORMAL(value, *prior)
    unknown = lorenz96.model_forcing if module is lorenz96 else lorenz63.model_rho
    actual = log_density(unknown, (jnp.asarray(y),), {"model_noise": 0.7}, {**sites, parameter: value})[0]
    assert float(actual) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("module", [lorenz96, lorenz63])
def test_simulate_adds_noise_when_asked(module):
    truth, _ = module.simulate(jax.random.key(6), 400, model_noise=0.3)
    error = truth[1:] - module.step(truth[:-1])
    assert float(error.std()) == pytest.approx(0.3, rel=0.1)
    same, _ = module.simulate(jax.random.key(6), 20)
    assert np.asarray(same[1:]) == pytest.approx(np.asarray(module.step(same[:-1])), abs=1e-3)
