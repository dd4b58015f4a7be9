"""Parts of FlowVI: schedule, optimiser, noise, corrections; several modes; FlowJAX's bijections; models that fail."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pushforward as pf
from pushforward._errors import ArgumentError, InferenceError, MethodError
from pushforward.learned.training import WINDOW, Adam, Schedule
from pushforward.methods import _correction
from pushforward.methods.flow_vi import _wide_noise

SMALL = pf.Flow("coupling", layers=2, width=8)


def normal(y=None):
    x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


DATA = np.array([0.4, -0.2])


def test_the_rate_falls_when_nothing_is_gained_and_training_ends():
    schedule = Schedule(steps=1000, rate=0.1, tolerance=0.01)
    for loss in (5.0, 4.0, 3.0, 2.995, 2.999):
        np.testing.assert_array_equal(schedule.rates(), np.full(WINDOW, 0.1))
        schedule.note(loss)
    assert schedule.stalled
    assert (schedule.taken, schedule.end) == (5 * WINDOW, 10 * WINDOW)
    rates = []
    while schedule.taken < schedule.end:
        rates.append(schedule.rates())
        schedule.note(3.0)
    rates = np.concatenate(rates)
    assert len(rates) == 5 * WINDOW
    np.testing.assert_allclose([rates[0], rates[len(rates) // 2], rates[-1]], [0.1, 0.05, 0], atol=1e-5)


def test_training_that_still_gains_is_cooled_in_time_and_says_so():
    schedule = Schedule(steps=6 * WINDOW, rate=0.1, tolerance=0.01)
    for loss in (5.0, 4.0, 3.0):
        schedule.note(loss)
    assert schedule.end == 6 * WINDOW
    assert schedule.turned == 3 * WINDOW
    assert not schedule.stalled
    with pytest.warns(UserWarning, match="steps"):
        tree = pf.infer(normal, method=pf.FlowVI(SMALL, samples=32, steps=1), y=DATA, draws=5, progress=False)
    assert pf.attributes(tree)["outcome"] == "maximum_steps"


def test_tempering_is_not_cut_short():
    schedule = Schedule(steps=40 * WINDOW, rate=0.1, tolerance=0.01, patient=4 * WINDOW)
    for _ in range(6):
        schedule.note(1.0)
        assert schedule.turned is None
    schedule.note(1.0)
    assert schedule.turned == 7 * WINDOW


def test_adam_is_that_of_optax():
    import optax

    weights, slopes = jnp.array([1.0, -2.0, 3.0]), np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    slopes[3] *= 100
    reference = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(0.01))
    state, ours, expected = reference.init(weights), Adam.start(weights), weights
    for i, slope in enumerate(slopes):
        change, state = reference.update(jnp.asarray(slope), state)
        expected = optax.apply_updates(expected, change)
        ours = ours.moved(jnp.asarray(slope), jnp.asarray(i), jnp.asarray(0.01))
    np.testing.assert_allclose(ours.weights, expected, rtol=1e-5)
    broken = ours.moved(jnp.array([jnp.nan, 1.0, 1.0]), jnp.asarray(6), jnp.asarray(0.01))
    assert np.isfinite(broken.weights).all()


@pytest.mark.parametrize("d", [1, 2, 50])
def test_weights_of_wide_noise_restore_the_standard_normal(d):
    e, weights = _wide_noise(np.random.default_rng(0), 4000, d)
    # Squares of the weights are importance weights: at most 2, with mean 1 and the moments of N(0, I).
    assert weights.max() ** 2 <= 2 + 1e-12
    # 200,000 points: one standard error of either mean is below 0.004; five of them.
    assert abs(np.mean(weights**2) - 1) < 0.02
    np.testing.assert_allclose(np.mean(weights[..., None] ** 2 * e**2), 1, atol=0.02)
    np.testing.assert_allclose(e.mean((0, 1)), 0, atol=1e-12)
    assert np.mean(e**2) > 1.05


def proposals(sd, n=40_000):
    """Draws of N(0, sd^2) and log weights for N(0, 1), in two replicates."""
    x = sd * np.random.default_rng(0).normal(size=(2, n // 2, 1))
    log_weights = -0.5 * x[..., 0] ** 2 + 0.5 * x[..., 0] ** 2 / sd**2 + np.log(sd)
    return jnp.asarray(x, jnp.float32), jnp.asarray(log_weights, jnp.float32)


@pytest.mark.parametrize("name", ["smoothed", "independence"])
def test_corrections_turn_a_wide_normal_into_the_standard_one(name):
    x, log_weights = proposals(1.5)
    corrected, numbers = getattr(_correction, name)(x, log_weights, 20_000, jax.random.key(0))
    assert corrected.shape == (20_000, 1)
    # Effective draws are some 20,000 (weights) and 9,000 (chain); five standard errors of 5,000.
    assert abs(float(corrected.mean())) < 5 / 5000**0.5
    assert abs(float(corrected.var()) - 1) < 5 * (2 / 5000) ** 0.5
    if name == "smoothed":
        # E w^2 = s^2 / sqrt(2 s^2 - 1), so that the effective share is sqrt(2 s^2 - 1) / s^2.
        assert float(numbers["importance_ess"]) / 40_000 == pytest.approx(3.5**0.5 / 2.25, abs=0.02)
    else:
        # Acceptance is 1 - E|w(a) - w(b)| / 2 for independent proposals a, b, by another sample here.
        w = np.exp(np.asarray(log_weights)).ravel()
        rng = np.random.default_rng(1)
        expected = np.mean(np.minimum(w, rng.permutation(w)))
        assert float(numbers["acceptance_rate"]) == pytest.approx(expected, abs=0.02)


def moons(share):
    """Two arcs; `share` of the mass is near (2, 0)."""
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    ring = -0.5 * ((jnp.hypot(z[0], z[1]) - 2) / 0.3) ** 2
    right = jnp.log(share) - 0.5 * ((z[0] - 2) / 0.5) ** 2
    left = jnp.log1p(-share) - 0.5 * ((z[0] + 2) / 0.5) ** 2
    numpyro.factor("moons", ring + jnp.logaddexp(right, left))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FlowVI. Pareto k-hat")
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_tempering_finds_both_modes(share):
    # The density is symmetric but for the shares, so the arcs have exactly these masses; the evidence by quadrature.
    # The gap between the arcs makes k-hat large for some keys (0.8 for one in six).
    tree = pf.infer(moons, share, method=pf.FlowVI(tempering=1000, correct="psis"), draws=4000, progress=False)
    found, right = pf.attributes(tree), (tree["posterior"]["z"].to_numpy()[..., 0] > 0).mean()
    assert abs(right - share) < 0.1 * share
    assert found["log_evidence"] == pytest.approx(-3.1108207, abs=0.02)


def test_a_bijection_of_flowjax(tmp_path):
    from flowjax.bijections import Affine
    from flowjax.distributions import Normal
    from flowjax.flows import triangular_spline_flow

    given = Affine(jnp.zeros(2), jnp.ones(2))
    method = pf.FlowVI(given, samples=64).fit(normal, y=DATA, progress=False)
    tree = pf.infer(normal, method=method, y=DATA, draws=20, progress=False)
    evidence = float(dist.Normal(0, 1.25**0.5).log_prob(DATA).sum())
    assert pf.attributes(tree)["elbo"] == pytest.approx(evidence, abs=1e-3)
    with pytest.raises(ArgumentError, match="pf.save cannot write a field of type Affine"):
        pf.save(tmp_path / "flow.pf", method)
    with pytest.raises(MethodError, match=r"bijection of shape \(3,\), and the model has 2 latent"):
        pf.infer(normal, method=pf.FlowVI(Affine(jnp.zeros(3))), y=DATA, progress=False)
    distribution = triangular_spline_flow(jax.random.key(0), base_dist=Normal(jnp.zeros(2)), flow_layers=1)
    with pytest.raises(MethodError, match="takes the bijection of a FlowJAX distribution, flow.bijection"):
        pf.FlowVI(distribution)


def test_a_density_that_is_not_finite_at_draws_is_said():
    def broken(y=None):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("nowhere", jnp.where(jnp.abs(x) < 0.5, 0.0, -jnp.inf))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)

    with pytest.raises(InferenceError, match="FlowVI"):
        pf.infer(broken, method=pf.FlowVI(SMALL, samples=16, steps=50), y=0.3, progress=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 1}, "samples=.*at least 2"),
        ({"steps": 0}, "steps=.*at least 1"),
        ({"tempering": -1}, "tempering=.*at least 0"),
        ({"tolerance": 0.0}, "tolerance=.*positive"),
        ({"learning_rate": -1.0}, "learning_rate=.*positive"),
        ({"flow": 3}, "flow= takes one of .*got 3"),
        ({"transport": "map"}, r"transport=...\) is set by FlowVI\(\).fit"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(MethodError, match=text):
        pf.FlowVI(**options)
