"""ParticleFilter against exact answers: evidence, moments, smoothing, options, storage, failures.

Random tests have fixed keys; the chance of a false alarm stands beside the tolerance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward._errors import InferenceError, MethodError
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import linear_state_space as linear
from pushforward.problems import local_linear, nile
from pushforward.problems import stochastic_volatility as volatility

KEY = jax.random.key(0)
NORMAL = dist.Normal
SMALL = linear.system(n=2, m=1, q=2, steps=6, seed=3)
NILE = np.where(np.arange(20) % 7 == 3, np.nan, nile.DATA[:20])


def read(model, *args, **kwargs):
    return read_state_space(read_problem(model, args, kwargs))


def form(name):
    model, args, kwargs = linear.FORMS[name](SMALL)
    return read(model, *args, **kwargs), linear.joint(SMALL, name)


def log_likelihoods(space, method, keys, seed=0):
    run = jax.jit(lambda s, k: jax.vmap(lambda k: method.log_likelihood(s.chain(), k))(k))
    return np.asarray(run(space, jax.random.split(jax.random.key(seed), keys)))


def ratio_test(values, exact):
    """How many standard errors the mean of the likelihood's estimates over its exact value lies from one."""
    ratios = np.exp(values - exact)
    return (ratios.mean() - 1) / (ratios.std(ddof=1) / len(ratios) ** 0.5)


# ------------------------------------------------------------------------------------------------- evidence

SCHEMES = ["systematic", "stratified", "residual", "multinomial", "stop_gradient"]


@pytest.mark.parametrize(
    "scheme", [s if s in ("systematic",) else pytest.param(s, marks=pytest.mark.slow) for s in SCHEMES]
)
def test_evidence_is_unbiased(scheme, float64):
    """Against Kalman over 200 keys: |z| < 4, false alarm 1e-4."""
    space, law = read(nile.local_level, y=NILE), nile.joint(NILE)
    method = pf.ParticleFilter(100, resampling=scheme)
    assert abs(ratio_test(log_likelihoods(space, method, 200), law.log_evidence())) < 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["missing", "observed_start", "deterministic_carry", "several_lags", "likelihood_after", "masked", "counter"],
)
def test_evidence_is_unbiased_for_all_ways_of_writing(name, float64):
    space, law = form(name)
    values = log_likelihoods(space, pf.ParticleFilter(200), 200)
    assert abs(ratio_test(values, law.log_evidence())) < 4


@pytest.mark.slow
def test_error_falls_with_the_root_of_the_particles(float64):
    """Slope of the error of log evidence in N: -1/2 within 0.15, known to 0.06 with 100 keys at each size."""
    space, exact = read(nile.local_level, y=NILE), nile.joint(NILE).log_evidence()
    sizes = (50, 200, 800)
    errors = [np.sqrt(np.mean((log_likelihoods(space, pf.ParticleFilter(n), 100, seed=n) - exact) ** 2)) for n in sizes]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.15)


@pytest.mark.slow
def test_volatility_of_a_thousand_days(float64):
    """Log evidence at N = 10,000: within 3 of its own sd (over 24 keys) of the exact one, with its bias -sd^2 / 2."""
    _, y = volatility.simulate()
    method = pf.ParticleFilter(10_000)
    run = jax.jit(lambda s, k: jax.lax.map(lambda k: method.log_likelihood(s.chain(), k), k))
    values = np.asarray(run(read(volatility.model, y=y), jax.random.split(KEY, 24)))
    exact, sd = volatility.grid_log_evidence(y), values.std(ddof=1)
    print(values.mean(), sd)
    assert exact == pytest.approx(-937.0827, abs=1e-3)
    assert (np.abs(values - exact) < 3 * sd).mean() > 0.9
    assert abs(values.mean() + sd**2 / 2 - exact) < 4 * sd / len(values) ** 0.5
    assert sd < 0.25


# ------------------------------------------------------------------------------------------------- smoothing


def smoothed(space, method, keys, draws=400):
    """Means over draws of the smoothed state, and of its lag-one product, for each key."""

    def one(key):
        x = method.trajectories(space.chain(), key, draws).posterior["x"].reshape(draws, space.steps, -1)
        return jnp.mean(x, 0), jnp.mean(x[:, 1:] * x[:, :-1], 0)

    run = jax.jit(lambda k: jax.lax.map(one, k))
    return [np.asarray(v) for v in run(jax.random.split(KEY, keys))]


def check_smoothing(space, law, method, keys=24):
    """Means and lag-one products of draws equal the exact ones within 4.5 errors over keys; false alarm < 1e-3."""
    exact = law.smoothing()
    means, products = smoothed(space, method, keys)
    error = means.std(0, ddof=1) / keys**0.5
    bias = means.mean(0) - exact.mean
    # The particle system's own bias is of the order 1 / N: a hundredth of the sd is allowed for it.
    sd = np.sqrt(np.diagonal(exact.covariance, axis1=1, axis2=2))
    assert (np.abs(bias) < 4.5 * error + 0.02 * sd).all(), np.max(np.abs(bias) / error)
    return products.mean(0), products.std(0, ddof=1) / keys**0.5


@pytest.mark.parametrize(
    "smoother",
    [
        pf.BackwardMoves(),
        pytest.param(pf.BackwardSimulation(), marks=pytest.mark.slow),
        pytest.param(pf.AncestorTracing(), marks=pytest.mark.slow),
    ],
    ids=["moves", "simulation", "tracing"],
)
def test_smoothing_of_the_nile(smoother, float64):
    space, law = read(nile.local_level, y=NILE), nile.joint(NILE)
    check_smoothing(space, law, pf.ParticleFilter(400, smoother=smoother))


@pytest.mark.slow
@pytest.mark.parametrize("smoother", [pf.BackwardMoves(), pf.BackwardSimulation()], ids=["moves", "simulation"])
@pytest.mark.parametrize("name", ["centred", "several_lags", "observe_then_move", "missing"])
def test_smoothing_of_other_forms(name, smoother, float64):
    space, law = form(name)
    check_smoothing(space, law, pf.ParticleFilter(1000, smoother=smoother))


# ---------------------------------------------------------------------------------------- groups and storage


@pytest.fixture(scope="module")
def stored():
    with jax.enable_x64(True):
        ways = {s: pf.ParticleFilter(500, store=s) for s in ("draws", "moments", "last")}
        return {s: pf.infer(nile.local_level, method=m, y=NILE, draws=300, progress=False) for s, m in ways.items()}


def test_groups_agree_with_kalman(stored, float64):
    exact = nile.joint(NILE)
    for group, law in (("filtering", exact.filtering()), ("one_step", exact.one_step())):
        mean, sd = law.mean[:, 0], np.sqrt(law.covariance[:, 0, 0])
        drawn, moments = stored["draws"][group]["x"].to_numpy()[0], stored["moments"][group]
        assert drawn.shape == (300, 20)
        assert moments["x"].dims == moments["x_sd"].dims == ("time",)
        assert np.abs(moments["x"].to_numpy() - mean).max() < 0.5 * sd.max()
        assert np.abs(moments["x_sd"].to_numpy() / sd - 1).max() < 0.35
        assert np.abs(drawn.mean(0) - moments["x"].to_numpy()).max() < 0.35 * sd.max()
    assert not {"filtering", "one_step"} & set(stored["last"].children)


def test_one_run_whatever_is_stored(stored):
    evidences = {s: pf.attributes(t)["log_evidence"] for s, t in stored.items()}
    assert len(set(evidences.values())) == 1
    stats = stored["draws"]["filter_stats"]
    assert stats["ess"].dims == ("time",)
    assert float(stats["log_likelihood_increment"].sum()) == pytest.approx(evidences["draws"], abs=1e-8)
    assert 0 < float(stats["ess"].min()) <= float(stats["ess"].max()) <= 500
    last = stored["last"]["posterior"]["x"].to_numpy()[0]
    assert last.shape == (300,)
    assert last == pytest.approx(stored["last"]["last_carry"]["state"].to_numpy()[0, :, 0], rel=1e-10)


def test_densities_are_those_of_the_joint_model(stored, float64):
    problem = read_problem(nile.local_level, (), {"y": NILE})
    posterior = stored["draws"]["posterior"]
    values = {n: jnp.asarray(posterior[n].to_numpy()[0]) for n in ("x0", "x")}
    found = jax.vmap(problem.evaluate_sites)(values)
    assert stored["draws"]["log_prior"]["x"].to_numpy()[0] == pytest.approx(np.asarray(found.log_prior["x"]), abs=1e-8)
    density = stored["draws"]["log_likelihood"]["y"].to_numpy()[0]
    assert density == pytest.approx(np.asarray(found.log_likelihood["y"]), abs=1e-8)


# ------------------------------------------------------------------------------------- other models, parameters


def counts(y=None):
    """Two lags, a regime and counts: a discrete site, a site that is squared, data that are no Gaussian."""
    matrix = jnp.array([[0.9, 0.1], [0.2, 0.8]])
    s = numpyro.sample("s0", dist.Categorical(jnp.array([0.5, 0.5])))

    def step(carry, y):
        s, x, before = carry
        s = numpyro.sample("s", dist.Categorical(matrix[s]))
        x, before = numpyro.sample("x", NORMAL(0.9 * x - 0.2 * before + s, 1.0)), x
        numpyro.deterministic("square", x**2)
        numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)
        return (s, x, before), None

    scan(step, (s, jnp.zeros(()), jnp.zeros(())), y)


@pytest.mark.slow
def test_discrete_states_and_lags():
    """Against the sum over regimes of quadratures over x, T = 2: E[x_1], E[x_2] and P(s_2 = 1) by importance sampling
    with 4e5 draws of the prior; both are known to 0.01, so 0.05 is 5 errors."""
    y = np.array([1, 4])
    tree = pf.infer(counts, method=pf.ParticleFilter(20_000), y=y, draws=20_000, progress=False)
    rng, n = np.random.default_rng(0), 400_000
    s0 = rng.random(n) < 0.5
    s1 = rng.random(n) < np.where(s0, 0.8, 0.1)
    s2 = rng.random(n) < np.where(s1, 0.8, 0.1)
    x1 = s1 + rng.normal(size=n)
    x2 = 0.9 * x1 + s2 + rng.normal(size=n)
    weights = np.exp(y[0] * x1 - np.exp(x1) + y[1] * x2 - np.exp(x2))
    weights /= weights.sum()
    x, s = (tree["posterior"][k].to_numpy()[0] for k in ("x", "s"))
    assert x.mean(0) == pytest.approx([weights @ x1, weights @ x2], abs=0.05)
    assert s.mean(0) == pytest.approx([weights @ s1, weights @ s2], abs=0.03)
    assert np.corrcoef(x.T)[0, 1] == pytest.approx(
        np.cov(x1, x2, aweights=weights)[0, 1] / np.sqrt(np.cov(x1, aweights=weights) * np.cov(x2, aweights=weights)),
        abs=0.05,
    )
    assert tree["posterior"]["square"].to_numpy()[0] == pytest.approx(x**2, rel=1e-5)
    assert s.dtype.kind == "i"


@pytest.mark.slow
def test_parameters_in_the_state(float64):
    """Liu and West's kernel: the posterior of u within its own sd of the exact one (mean -0.456, sd 0.131)."""
    method = pf.ParticleFilter(
        4000, augment=True, regularization=pf.LiuWest(), smoother=pf.AncestorTracing(), store="last"
    )
    tree = pf.infer(local_linear.model, method=method, y=local_linear.DATA, progress=False)
    u = tree["posterior"]["u"].to_numpy()
    assert u.mean() == pytest.approx(local_linear.MEAN_U, abs=0.15)
    assert 0.5 < u.std() / local_linear.SD_U < 1.6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "allowed"), [(pf.StopGradient(), 0.05), (pf.Transport(epsilon=0.2, iterations=40), 0.2)]
)
def test_gradients_of_differentiable_resampling(scheme, allowed, float64):
    """Mean gradient over 60 keys: that of Kalman's log likelihood within 4 errors and the named share (bias)."""
    space = read(local_linear.model, y=local_linear.DATA[:12])
    u = jnp.asarray(-0.3)
    exact, slope = jax.value_and_grad(lambda u: pf.Kalman().log_likelihood(space.chain({"u": u}), KEY))(u)
    method = pf.ParticleFilter(64, resampling=scheme)
    both = jax.value_and_grad(lambda u, k: method.log_likelihood(space.chain({"u": u}), k))
    values, found = jax.jit(lambda k: jax.lax.map(lambda k: both(u, k), k))(jax.random.split(KEY, 60))
    found = np.asarray(found)
    assert abs(found.mean() - slope) < 4 * found.std(ddof=1) / 60**0.5 + allowed * abs(slope)
    # The log of an unbiased estimate is low by half its variance. An average of particles that is weighed as if it were
    # one of them, where the data of a step come before its move, would be 8 too high.
    assert exact - 1.5 < np.mean(values) < exact + 0.5


# ------------------------------------------------------------------------------------------ what can go wrong


def window(y=None):
    """Data within 0.1 of the state: few particles have any density."""

    def step(x, y):
        x = numpyro.sample("x", NORMAL(x, 1.0))
        numpyro.sample("y", dist.Uniform(x - 0.1, x + 0.1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", NORMAL(0.0, 1.0)), y)


def not_a_number(y=None):
    """The transition gives NaN once the counter is at 2."""

    def step(carry, y):
        x, t = carry
        x = numpyro.sample("x", NORMAL(jnp.where(t == 2, jnp.nan, x), 1.0))
        numpyro.sample("y", NORMAL(x, 1.0), obs=y)
        return (x, t + 1), None

    scan(step, (numpyro.sample("x0", NORMAL(0.0, 1.0)), 0), y)


def scaled_noise(y=None):
    """A non-centred body: the carry does not follow from the sampled site."""

    def step(x, y):
        e = numpyro.sample("e", NORMAL(0.0, 1.0))
        x = numpyro.deterministic("x", 0.9 * x + 0.5 * e)
        numpyro.sample("y", NORMAL(x, 1.0), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", NORMAL(0.0, 1.0)), y)


Y = np.array([0.1, 0.2, 0.3, 0.1])
LAST = pf.ParticleFilter(200, store="last")


def test_all_weights_zero_names_the_step():
    with pytest.raises(InferenceError, match="all weights are zero at step 3 of the scan"):
        pf.infer(window, method=LAST, y=np.array([0.1, 0.2, 0.3, 40.0]), progress=False)


def test_nan_of_the_transition_names_the_step():
    with pytest.raises(InferenceError, match="all weights are zero at step 2 of the scan.*or the model gave NaN"):
        pf.infer(not_a_number, method=LAST, y=Y, progress=False)


def test_a_failed_run_keeps_what_there_is():
    tree = pf.infer(not_a_number, method=LAST, y=Y, progress=False, throw=False)
    assert pf.attributes(tree)["outcome"] == "nonfinite"
    assert int(pf.attributes(tree)["failed_step"]) == 2


def test_collapse_is_said():
    data = np.where(np.arange(20) == 10, 1e5, nile.DATA[:20])
    with pytest.warns(UserWarning, match="effective sample size fell to .* of 200 particles"):
        pf.infer(nile.local_level, method=LAST, y=data, progress=False)


@pytest.mark.filterwarnings("ignore:ParticleFilter. the effective sample size")
def test_few_ancestors_are_said():
    with pytest.warns(UserWarning, match="go back to .* distinct initial particles"):
        pf.infer(nile.local_level, method=pf.ParticleFilter(30, smoother=pf.AncestorTracing()), y=NILE, progress=False)


def test_a_carry_without_density():
    with pytest.raises(MethodError, match="the carry does not follow from the sites sampled in the step.*AncestorTr"):
        pf.infer(scaled_noise, method=pf.ParticleFilter(50), y=Y, progress=False)
    tree = pf.infer(scaled_noise, method=pf.ParticleFilter(2000, smoother=pf.AncestorTracing()), y=Y, progress=False)
    x, e, x0 = (tree["posterior"][k].to_numpy()[0] for k in ("x", "e", "x0"))
    assert x[:, 0] == pytest.approx(0.9 * x0 + 0.5 * e[:, 0], abs=1e-5)


def test_gradient_methods_refuse_hard_resampling():
    arguments = {"states": pf.ParticleFilter(20), "y": local_linear.DATA, "progress": False}
    with pytest.raises(MethodError, match=r"(?s)NUTS follows the gradient.*pf.PMMH"):
        pf.infer(local_linear.model, method=pf.NUTS(), **arguments)


def test_discrete_states_refused_elsewhere():
    with pytest.raises(MethodError, match=r"is discrete; use pf.ParticleFilter\(\) or pf.DiscreteHMM\(\)"):
        pf.infer(counts, method=pf.EnKF(), y=np.array([1, 2]), progress=False)
    with pytest.raises(Exception, match=r"is discrete: use method=pf.DiscreteHMM\(\) or pf.ParticleFilter\(\)"):
        pf.infer(counts, method=pf.NUTS(), y=np.array([1, 2]), progress=False)
    with pytest.raises(MethodError, match="Transport.. averages particles, and the state has discrete entries"):
        pf.infer(counts, method=pf.ParticleFilter(resampling="transport"), y=np.array([1, 2]), progress=False)


def discrete_parameter(y=None):
    k = numpyro.sample("k", dist.Poisson(3.0))

    def step(x, y):
        x = numpyro.sample("x", NORMAL(0.1 * k * x, 1.0))
        numpyro.sample("y", NORMAL(x, 1.0), obs=y)
        return x, None

    scan(step, 0.0, y)


def test_discrete_parameters_are_refused():
    with pytest.raises(Exception, match="'k' .* is discrete and stands outside the scan"):
        pf.infer(discrete_parameter, method=pf.ParticleFilter(20), y=Y, progress=False)


OPTIONS = {
    "one particle": (lambda: pf.ParticleFilter(1), "particles"),
    "no integer": (lambda: pf.ParticleFilter(10.5), "particles"),
    "scheme": (lambda: pf.ParticleFilter(resampling="sytematic"), "systematic"),
    "proposal": (lambda: pf.ParticleFilter(proposal="bootstrapped"), "bootstrap"),
    "class": (lambda: pf.ParticleFilter(resampling=pf.Systematic), r"takes an instance such as pf.Systematic\(\)"),
    "jitter": (lambda: pf.ParticleFilter(regularization=0.5), r"takes an instance such as pf.Jitter\(1.0\)"),
    "smoother": (lambda: pf.ParticleFilter(smoother="backward"), "takes an instance such as pf.BackwardMoves"),
    "threshold": (lambda: pf.Systematic(threshold=50), "fraction between 0 and 1"),
    "scale": (lambda: pf.Jitter(-1.0), "scale"),
    "discount": (lambda: pf.LiuWest(1.2), "discount"),
    "moves": (lambda: pf.BackwardMoves(0), "moves"),
    "epsilon": (lambda: pf.Transport(epsilon=0.0), "epsilon"),
    "store": (lambda: pf.ParticleFilter(store="all"), "moments"),
    "kernel": (lambda: pf.ParticleFilter(regularization=pf.LiuWest()), "Add augment=True"),
    "both": (
        lambda: pf.ParticleFilter(resampling="transport", regularization=pf.Jitter()),
        "transport leaves no copies",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_checked(name):
    make, text = OPTIONS[name]
    with pytest.raises(ValueError, match=text):
        make()
