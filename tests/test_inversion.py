"""`EKI`, `EKS`, `ALDI` and `UKI` through `infer`: exact answers for linear models, failures, and what is refused.

Laws of the updates themselves are in `test_inversion_math.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import exact
import pushforward as pf
from pushforward._errors import ArgumentError, InferenceError, MethodError
from pushforward._runner import Runner
from pushforward.methods._inversion import UPDATES, Inversion, Step, moved
from pushforward.model.inverse import read_problem
from pushforward.problems import bod

D, M = 3, 5
GENERATOR = np.random.default_rng(7)
FORWARD = GENERATOR.normal(size=(M, D))
ROOT = np.tril(0.3 * GENERATOR.normal(size=(M, M)), -1) + np.diag([0.5, 0.8, 0.4, 0.6, 1.0])
DATA = GENERATOR.normal(size=M)


def linear(y=None, dense=True):
    """x ~ N(1, 4 I), y ~ N(A x, R), R dense or its diagonal."""
    x = numpyro.sample("x", dist.Normal(1.0, 2.0).expand([D]).to_event(1))
    covariance = ROOT @ ROOT.T
    law = dist.MultivariateNormal(FORWARD @ x, covariance) if dense else dist.Normal(FORWARD @ x, np.diag(ROOT))
    numpyro.sample("y", law if dense else law.to_event(1), obs=y)


def truth(dense=True, data=DATA):
    return posterior(np.ones(D), 4 * np.eye(D), dense, data)


def posterior(mean, covariance, dense, data):
    """Mean and covariance of x given data by Kalman's formulas, for the prior N(mean, covariance)."""
    noise = ROOT @ ROOT.T if dense else np.diag(np.diag(ROOT) ** 2)
    keep = ~np.isnan(data)
    forward = FORWARD[keep]
    gain = np.linalg.solve(forward @ covariance @ forward.T + noise[np.ix_(keep, keep)], forward @ covariance).T
    return mean + gain @ (data[keep] - forward @ mean), covariance - gain @ forward @ covariance


def draws_of(tree):
    return tree["posterior"]["x"].to_numpy()[0]


def run(method, data=DATA, **options):
    return pf.infer(linear, method=method, y=data, progress=False, **options)


# ------------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize(
    ("options", "dense", "gap"),
    [
        ({}, True, False),
        ({"schedule": 3}, True, True),
        ({"schedule": [9.333, 7.0, 4.0, 2.0]}, False, False),
        ({"schedule": 2, "minibatch": 2}, True, True),
        ({"schedule": [4.0, 4.0, 2.0], "minibatch": 1}, False, False),
    ],
)
def test_transform_is_exact_for_the_ensembles_own_prior(float64, options, dense, gap):
    """For any schedule, in batches of the data or not, with a dense noise and a missing datum."""
    data = DATA.copy()
    data[1 if gap else []] = np.nan
    method, key = pf.EKI(10, **options), jax.random.key(3)
    problem = read_problem(linear, (), {"y": jnp.asarray(data), "dense": dense})
    found = method.run(problem, key, 10, Runner())
    z = np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (10, D)))
    prior = 1 + 2 * z
    mean, covariance = posterior(prior.mean(0), np.cov(prior.T), dense, data)
    x = 1 + 2 * np.asarray(found.positions)[0]
    np.testing.assert_allclose(x.mean(0), mean, rtol=1e-9)
    np.testing.assert_allclose(np.cov(x.T), covariance, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", [pf.EKI(4000, update="perturbed"), pf.ALDI(1500), pf.EKS(1500)])
def test_many_members_are_right(method):
    """Means within .1 sd (4 standard errors are .065 and .1), sds within a tenth: Langevin steps add h / 4."""
    x = draws_of(run(method, draws=4000))
    mean, covariance = truth()
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((x.mean(0) - mean) / sd, 0, atol=0.1)
    np.testing.assert_allclose(x.std(0) / sd, 1, atol=0.1)
    np.testing.assert_allclose(np.corrcoef(x.T), covariance / np.outer(sd, sd), atol=0.1)


@pytest.mark.parametrize("step", [0.3, 0.7])
def test_unscented_inversion_is_exact(float64, step):
    problem = read_problem(linear, (), {"y": jnp.asarray(DATA)})
    method = pf.UKI(60, step=step)
    found = method.run(problem, jax.random.key(0), 200_000, Runner())
    x = 1 + 2 * np.asarray(found.positions)[0]
    mean, covariance = truth()
    # Draws of the exact Gaussian: five standard errors.
    np.testing.assert_allclose((x.mean(0) - mean) / np.sqrt(np.diag(covariance)), 0, atol=5 / 200_000**0.5)
    np.testing.assert_allclose(x.std(0), np.sqrt(np.diag(covariance)), rtol=0.008)
    assert float(found.summary["last_change"]) < 1e-6 or step < 0.5


def test_optimisers_find_their_minimum():
    """Least squares without the prior, the mode with it; the spread is no posterior, and the result says so."""
    mode = pf.infer(bod.model, method=pf.EKI(50, update="tikhonov", time=1e3), t=bod.TIMES, y=bod.DATA, progress=False)
    found = [float(mode["posterior"][n].mean()) for n in ("A", "B")]
    np.testing.assert_allclose(found, bod.MAP_PARAMETERS, rtol=0.02)
    least = pf.infer(
        bod.model, method=pf.EKI(50, update="unperturbed", time=1e3), t=bod.TIMES, y=bod.DATA, progress=False
    )
    A, B = (float(least["posterior"][n].mean()) for n in ("A", "B"))
    best = exact.bod_log_likelihood(*bod.MAXIMUM_LIKELIHOOD, np.asarray(bod.DATA))
    assert best - exact.bod_log_likelihood(A, B, np.asarray(bod.DATA)) < 0.02
    assert pf.attributes(mode)["returns"] == pf.attributes(least)["returns"] == "minimiser"
    assert pf.attributes(mode)["method"] == "EKI"
    assert pf.EKI().returns == "posterior"


def test_members_stay_in_the_span_unless_noise_is_added():
    """Four members span three directions: new ones lie in them, for a nonlinear model too."""

    def curved(y=None):
        x = numpyro.sample("x", dist.Normal().expand([6]).to_event(1))
        numpyro.sample("y", dist.Normal(jnp.sin(x[:3]) + x[3:] ** 2, 0.5).to_event(1), obs=y)

    problem = read_problem(curved, (), {"y": jnp.ones(3)})
    key = jax.random.key(1)
    first = np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (4, 6)))
    basis = np.linalg.svd(first - first.mean(0))[2][:3]

    def outside(method):
        z = np.asarray(method.run(problem, key, 4, Runner()).positions)[0] - first.mean(0)
        return np.abs(z - z @ basis.T @ basis).max()

    for update in ("transform", "perturbed", "unperturbed"):
        assert outside(pf.EKI(4, update=update)) < 1e-5
    assert outside(pf.EKI(4, inflation=pf.Additive(0.1))) > 1e-2
    assert outside(pf.EKI(4, inflation=pf.Multiplicative(1.1))) < 1e-5


def test_one_draw_per_member_and_thinning():
    assert draws_of(run(pf.EKI(30))).shape == (30, D)
    assert draws_of(run(pf.EKI(30), draws=10)).shape == (10, D)
    found = pf.attributes(run(pf.EKI(30)))
    assert found["evaluations"] == 30 * found["steps"]
    assert found["time"] == pytest.approx(1.0)
    assert sum(found["step_sizes"]) == pytest.approx(1.0)
    assert len(found["misfits"]) == found["steps"]


# --------------------------------------------------------------------------------------------- simulated noise


def test_simulated_noise_gives_the_linear_gaussian_posterior():
    """In one step and in four: four standard errors of 4000 members are .065 sd."""
    mean, covariance = truth(dense=False)
    for schedule in (1, 4):
        tree = run(pf.EKI(4000, noise="simulated", schedule=schedule), draws=4000, dense=False)
        x = draws_of(tree)
        np.testing.assert_allclose((x.mean(0) - mean) / np.sqrt(np.diag(covariance)), 0, atol=0.1)
        np.testing.assert_allclose(x.std(0), np.sqrt(np.diag(covariance)), rtol=0.1)
        assert pf.attributes(tree)["evaluations"] == 2 * 4000 * schedule


@pytest.mark.slow
def test_counts():
    """Poisson data, by quadrature: mean within .25 sd, sd within a quarter; the update is a linear approximation."""
    data = np.array([7.0, 4.0, 6.0, 9.0])

    def counts(y=None):
        rate = numpyro.sample("log_rate", dist.Normal(1.5, 0.5))
        numpyro.sample("y", dist.Poisson(jnp.exp(rate)).expand([4]), obs=y)

    grid = np.linspace(-1, 4, 2001)
    log_density = -0.5 * ((grid - 1.5) / 0.5) ** 2 + data.sum() * grid - 4 * np.exp(grid)
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    mean = weights @ grid
    sd = (weights @ (grid - mean) ** 2) ** 0.5
    tree = pf.infer(counts, method=pf.EKI(2000, noise="simulated"), y=data, draws=2000, progress=False)
    found = tree["posterior"]["log_rate"].to_numpy()
    assert abs(found.mean() - mean) < 0.25 * sd
    assert found.std() == pytest.approx(sd, rel=0.25)


# ----------------------------------------------------------------------------------------------------- failures


def fails(y=None, share=0.7):
    """A linear model that is NaN above a threshold of its prior."""
    x = numpyro.sample("x", dist.Normal(1.0, 2.0).expand([D]).to_event(1))
    mean = jnp.where(x[0] > 1 + 2 * share, jnp.nan, FORWARD @ x)
    numpyro.sample("y", dist.Normal(mean, np.diag(ROOT)).to_event(1), obs=y)


def test_failed_members_take_no_part(float64):
    """An update is that of the successes alone; the others are drawn anew within the successes' Gaussian."""
    r = np.random.default_rng(0)
    z, g = r.normal(size=(300, 2)), r.normal(size=(300, 4))
    g[:, :2] += 2 * z
    present = np.arange(300) % 3 > 0
    g[~present] = 1e30
    told = Step(jnp.asarray(g), jnp.ones(4), None, jnp.asarray(present))
    rule, h, key = UPDATES["transform"], jnp.asarray(0.4), jax.random.key(0)
    after = np.asarray(moved(Inversion.start(jnp.asarray(z)), told, h, rule, key).z)
    alone = Step(jnp.asarray(g[present]), jnp.ones(4), None, jnp.ones(200, bool))
    start = Inversion.start(jnp.asarray(z[present]))
    np.testing.assert_allclose(after[present], moved(start, alone, h, rule, key).z, rtol=1e-10)
    # A hundred draws of a Gaussian: five standard errors of mean and covariance.
    spread = after[present].std(0)
    assert np.abs((after[~present].mean(0) - after[present].mean(0)) / spread).max() < 0.5
    np.testing.assert_allclose(after[~present].std(0), spread, rtol=0.36)


@pytest.mark.parametrize("method", [pf.EKI(1000), pf.EKI(1000, update="perturbed"), pf.ALDI(500)], ids=repr)
def test_a_run_with_failures(method):
    """Data far from where the model fails: the posterior is the same, the failures are counted."""
    data = FORWARD @ np.array([-2.0, 1.0, 1.0])
    tree = pf.infer(fails, method=method, y=data, progress=False)
    mean, covariance = truth(dense=False, data=data)
    sd = np.sqrt(np.diag(covariance))
    found = pf.attributes(tree)
    assert 0 < found["failed_evaluations"] < 0.3 * found["evaluations"]
    # The prior's lost part shifts what the ensemble starts from: a quarter of a sd is allowed.
    np.testing.assert_allclose((draws_of(tree).mean(0) - mean) / sd, 0, atol=0.25)
    np.testing.assert_allclose(draws_of(tree).std(0) / sd, 1, atol=0.2)


def test_huge_outputs_are_failures():
    def explodes(y=None):
        x = numpyro.sample("x", dist.Normal())
        numpyro.sample("y", dist.Normal(jnp.where(x > 1.0, 1e25, x), 0.5), obs=y)

    tree = pf.infer(explodes, method=pf.EKI(500), y=-0.5, progress=False)
    assert pf.attributes(tree)["failed_evaluations"] > 20
    assert float(tree["posterior"]["x"].mean()) == pytest.approx(-0.4, abs=0.12)


def test_many_failures_are_said():
    with pytest.warns(UserWarning, match=r"runs of the model failed"):
        pf.infer(fails, method=pf.EKI(100), share=-0.8, y=DATA, progress=False)


def test_too_few_successes_keep_the_last_ensemble():
    with pytest.raises(InferenceError, match=r"fewer than 2 members have finite outputs") as caught:
        pf.infer(fails, method=pf.EKI(20), share=-10.0, y=DATA, progress=False)
    assert np.isfinite(draws_of(caught.value.partial)).all()


def test_outputs_that_are_all_the_same():
    def constant(y=None):
        x = numpyro.sample("x", dist.Normal())
        numpyro.sample("y", dist.Normal(0.0 * x + 1.0, 0.5), obs=y)

    for method in (pf.EKI(20), pf.EKS(20)):
        with pytest.raises(InferenceError, match=r"outputs are the same for all members"):
            pf.infer(constant, method=method, y=0.3, progress=False)


def test_unscented_inversion_needs_all_points():
    with pytest.raises(InferenceError, match=r"not finite at a sigma point.*pf.EKI"):
        pf.infer(fails, method=pf.UKI(), share=-0.5, y=DATA, progress=False)


def test_a_run_resumes_to_the_identical_result(tmp_path, monkeypatch):
    """Interrupted after its second step."""
    options = {"method": pf.EKI(20, schedule=4), "checkpoint": tmp_path / "run.ckpt"}
    whole = run(pf.EKI(20, schedule=4))
    saved, count = Runner.save, []

    def stop(self, step, state):
        saved(self, step, state)
        count.append(step)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        pf.infer(linear, y=DATA, progress=False, **options)
    monkeypatch.setattr(Runner, "save", saved)
    again = pf.infer(linear, y=DATA, progress=False, **options)
    assert count == [1, 2]
    np.testing.assert_array_equal(draws_of(again), draws_of(whole))


# ------------------------------------------------------------------------------------------------- ask and tell


def ask_and_tell(method, path, **options):
    """A run whose outputs are computed by numpy, its state written to a file and read again before each step."""
    state = method.start(linear, y=DATA, **options)
    while not state.finished:
        pf.save(path, state)
        state = pf.load(path)
        state = method.tell(state, np.asarray(state.members["x"]) @ FORWARD.T, linear, y=DATA, **options)
    return state


@pytest.mark.parametrize("method", [pf.EKI(12), pf.EKI(12, update="perturbed", schedule=2, minibatch=3)], ids=repr)
def test_asking_and_telling_is_the_same_run(method, tmp_path):
    state = ask_and_tell(method, tmp_path / "state.pf")
    np.testing.assert_allclose(state.members["x"], draws_of(run(method)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"the ensemble is finished: state.members are the result"):
        method.tell(state, np.zeros((12, M)), linear, y=DATA)


def test_what_is_told_wrongly(tmp_path):
    method = pf.EKI(6)
    state = method.start(linear, y=DATA)
    assert state.members["x"].shape == (6, D)
    with pytest.raises(ArgumentError, match=r"outputs of 'y' have shape \(5, 5\); told must be .*\(6, 5\). Write NaN"):
        method.tell(state, np.zeros((5, M)), linear, y=DATA)
    with pytest.raises(ArgumentError, match=r"names of the observed sites, \['y'\]; got \['z'\]"):
        method.tell(state, {"z": np.zeros((6, M))}, linear, y=DATA)
    with pytest.raises(InferenceError, match=r"fewer than 2 members") as caught:
        method.tell(state, {"y": np.full((6, M), np.nan)}, linear, y=DATA)
    assert caught.value.partial is state
    with pytest.raises(InferenceError, match=r"outputs are the same for all members"):
        method.tell(state, np.ones((6, M)), linear, y=DATA)
    same = eqx.tree_at(lambda s: s.inversion.z, state, jnp.ones_like(state.inversion.z))
    with pytest.raises(InferenceError, match=r"all members are identical"):
        method.tell(same, GENERATOR.normal(size=(6, M)), linear, y=DATA)
    with pytest.raises(MethodError, match=r"to ask and tell, leave noise= out"):
        pf.EKI(noise="simulated").start(linear, y=DATA)
    with pytest.raises(MethodError, match=r"EKI does not fit this model: the noise of site 'y' depends on"):
        method.start(scaled, y=np.ones(3))


# ------------------------------------------------------------------------------------------------ what is refused


def scaled(y=None):
    x = numpyro.sample("x", dist.Normal())
    s = numpyro.sample("s", dist.HalfNormal())
    numpyro.sample("y", dist.Normal(x, s).expand([3]), obs=y)


@pytest.mark.parametrize("method", [pf.EKI(), pf.EKS(), pf.ALDI()])
def test_a_latent_scale_is_refused_with_both_ways_out(method):
    with pytest.raises(
        MethodError, match=r"noise of site 'y' depends on the latent sites \['s'\]; fix them; or .*simul"
    ):
        pf.infer(scaled, method=method, y=np.ones(3), progress=False)


def test_other_likelihoods_are_refused():
    def counts(y=None):
        numpyro.sample("y", dist.Poisson(jnp.exp(numpyro.sample("x", dist.Normal()))), obs=y)

    with pytest.raises(MethodError, match=r"is Poisson, not Normal.*noise=\"simulated\""):
        pf.infer(counts, method="eki", y=np.array(3), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 1}, r"EKI\(members=...\) takes an integer of at least 2"),
        ({"update": "square"}, r"takes one of \['transform', 'perturbed'"),
        ({"schedule": [4.0, 4.0]}, r"must sum to 1, these sum to 0.5000. Multiply each by 0.5"),
        ({"schedule": "slow"}, r"takes \"adaptive\", a number of equal steps, or a list of positive alphas"),
        ({"schedule": []}, r"takes \"adaptive\", a number of equal steps, or a list of positive alphas"),
        ({"time": 2.0}, r"the posterior is at time=1.0. Other times are for the optimisers"),
        ({"inflation": 1.1}, r"inflation=...\) takes pf.Multiplicative"),
        ({"inflation": pf.Adaptive()}, r"inflation=...\) takes pf.Multiplicative"),
        ({"noise": "simulated", "update": "tikhonov"}, r"perturbs the data itself"),
        ({"minibatch": 2}, r"needs the number of passes over the data"),
        ({"noise": "none"}, r"takes one of \['given', 'simulated'\]"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(MethodError, match=message):
        pf.EKI(**options)


def test_wrong_ensembles_and_noises():
    with pytest.raises(MethodError, match=r"3 latent numbers, for which EKS needs 8 members or more; it has 7"):
        run(pf.EKS(7))
    with pytest.raises(MethodError, match=r"needs 5 members or more; it has 4. Write pf.ALDI\(members=10\)"):
        run(pf.ALDI(4))
    with pytest.raises(MethodError, match=r"minibatch=9\): the model has 5 data"):
        run(pf.EKI(minibatch=9, schedule=2))
    with pytest.raises(MethodError, match=r"UKI\(step=...\) takes a number between 0 and 1"):
        pf.UKI(step=1.0)
    with pytest.raises(MethodError, match=r"ALDI\(time=...\) takes a positive number"):
        pf.ALDI(time=0)

    def indefinite(y=None):
        x = numpyro.sample("x", dist.Normal().expand([2]).to_event(1))
        law = dist.MultivariateNormal(x, jnp.array([[1.0, 2.0], [2.0, 1.0]]))
        numpyro.sample("y", law, obs=y)

    with pytest.raises(MethodError, match=r"noise of site 'y' cannot be used: its covariance is not positive definite"):
        pf.infer(indefinite, method="eki", y=np.zeros(2), progress=False)
