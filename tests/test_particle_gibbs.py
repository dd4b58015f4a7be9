"""`ParticleGibbs`: exact law of parameters and trajectory, the conditional filter alone, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import pushforward as pf
from parameters import check_joint, infer, model_impossible, scores
from pushforward import _errors
from pushforward.methods import _conditional
from pushforward.methods._conditional import Path
from pushforward.methods.particle_gibbs import ParticleGibbs
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import local_linear


def test_joint_law_of_parameter_and_trajectory():
    tree = infer(ParticleGibbs(chains=2, warmup=300), pf.ParticleFilter(10), 2000)
    check_joint(tree)
    found = pf.attributes(tree)
    assert 0.2 < found["acceptance_rate"] < 0.4
    assert found["trajectory_changed_start"] > 0.5  # ancestor sampling: the start changes as often as the end


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chains": 0}, r"chains=...\) takes an integer of at least 1; got 0"),
        ({"parameter_moves": 0}, r"parameter_moves=...\) takes an integer of at least 1"),
        ({"target_acceptance": 0}, r"target_acceptance=...\) takes a number between 0 and 1; got 0"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(_errors.MethodError, match=match):
        ParticleGibbs(**options)


@pytest.mark.parametrize(
    ("model", "states", "match"),
    [
        (local_linear.model, None, r"ParticleGibbs needs states=pf.ParticleFilter\(...\)"),
        (local_linear.model, pf.Kalman(), "moves trajectories by particles"),
        (local_linear.model, pf.ParticleFilter(10, regularization=pf.Jitter()), "filter without regularization"),
    ],
)
def test_what_does_not_fit_is_refused(model, states, match):
    with pytest.raises(_errors.MethodError, match=match):
        pf.infer(model, method=ParticleGibbs(), states=states, y=np.array([0.1, 0.4, 0.3]), progress=False)


# ------------------------------------------------------------------------------------------------------------ full run


@pytest.mark.slow
@pytest.mark.parametrize("particles", [5, 50])
def test_any_number_of_particles_gives_the_exact_law(particles):
    check_joint(infer(ParticleGibbs(thinning=3), pf.ParticleFilter(particles), 5000))


@pytest.mark.slow
def test_data_of_the_incoming_state():
    # A step observes the state that comes in: its datum is part of what the ancestors are weighed by.
    y = np.array(local_linear.DATA)
    tree = pf.infer(
        local_linear.model,
        method=ParticleGibbs(thinning=3),
        states=pf.ParticleFilter(30),
        y=y,
        draws=5000,
        progress=False,
    )
    u = tree["posterior"]["u"].to_numpy().astype(float)
    off = (u - local_linear.MEAN_U) ** 2
    found = scores({"mean": (u, local_linear.MEAN_U), "variance": (off, local_linear.SD_U**2)})
    assert max(map(abs, found.values())) < 4, found


def _second_order(y=None):
    """x_t depends on the two states before: the carry forgets after two steps."""

    def step(carry, y):
        old, older = carry
        x = numpyro.sample("x", dist.Normal(0.9 * old - 0.4 * older, 0.7))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return (x, old), None

    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    scan(step, (x0[0], x0[1]), y)


@pytest.mark.slow
def test_conditional_filter_keeps_the_law_where_the_carry_remembers_two_steps():
    y = np.array([0.4, 1.1, -0.2, -1.0, 0.3, 0.8])
    space = read_state_space(read_problem(_second_order, (), {"y": y}))
    tree = pf.infer(_second_order, method=pf.Kalman(), y=y, draws=4000, progress=False)
    exact = tree["posterior"]["x"].to_numpy()[0]

    def run(key):
        def sweep(path, k):
            path, _ = _conditional.sweep(space.chain(), path, k, 4)
            return path, path.values["x"]

        start = Path(jnp.zeros(2), {"x": jnp.zeros(6)})
        return jax.lax.scan(sweep, start, jax.random.split(key, 5200))[1][200:]

    x = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4)))
    # 4000 exact draws: their own error is that of a mean of as many; means to 4 joint errors, 21 of them: 1e-3
    mean, error = exact.mean(0), exact.std(0) / len(exact) ** 0.5
    second = np.einsum("ni,nj->nij", exact - mean, exact - mean)
    import arviz as az

    for t in range(6):
        own = x[..., t].std() / float(az.ess(x[..., t])) ** 0.5
        assert abs(x[..., t].mean() - mean[t]) < 4 * np.hypot(own, error[t])
        for s in range(t + 1):
            product = (x[..., t] - mean[t]) * (x[..., s] - mean[s])
            own = product.std() / float(az.ess(product)) ** 0.5
            other = second[:, t, s].std() / len(exact) ** 0.5
            assert abs(product.mean() - second[:, t, s].mean()) < 4 * np.hypot(own, other)


@pytest.mark.slow
def test_discrete_states():
    # Three states of a switch seen through noise; exact by summation over all 2^6 paths and a grid of the parameter.
    y = np.array([0.1, 0.9, 1.2, -0.3, 0.2, 1.1])

    def model(y=None):
        stay = numpyro.sample("stay", dist.Beta(2.0, 2.0))

        def step(k, y):
            k = numpyro.sample("k", dist.Bernoulli(jnp.where(k == 1, stay, 1 - stay)))
            numpyro.sample("y", dist.Normal(1.0 * k, 0.6), obs=y)
            return k, None

        scan(step, 1, y)

    grid = (np.arange(400) + 0.5) / 400
    paths = (np.arange(64)[:, None] >> np.arange(6)) & 1
    same = np.concatenate([np.ones((64, 1), int), paths[:, :-1]], 1) == paths
    count = same.sum(1)
    likelihood = np.exp(-0.5 * ((y - paths) / 0.6) ** 2).prod(1)
    weights = grid[:, None] ** (1 + count) * (1 - grid[:, None]) ** (7 - count) * likelihood
    weights /= weights.sum()
    tree = pf.infer(
        model, method=ParticleGibbs(thinning=2), states=pf.ParticleFilter(10), y=y, draws=4000, progress=False
    )
    stay, k = (tree["posterior"][n].to_numpy().astype(float) for n in ("stay", "k"))
    columns = {"stay": (stay, (weights.sum(1) * grid).sum())}
    columns |= {"square": (stay**2, (weights.sum(1) * grid**2).sum())}
    columns |= {f"k{t}": (k[..., t], (weights.sum(0) * paths[:, t]).sum()) for t in range(6)}
    found = scores(columns)  # 8 means at 4 errors: a false alarm in 5e-4
    assert max(map(abs, found.values())) < 4, found


@pytest.mark.slow
def test_chunks_do_not_change_the_draws(tmp_path):
    method, states = ParticleGibbs(chains=2, warmup=30), pf.ParticleFilter(20)
    whole = infer(method, states, 40)
    chunked = infer(method, states, 40, checkpoint=tmp_path / "run")
    np.testing.assert_array_equal(whole["posterior"]["x"], chunked["posterior"]["x"])


@pytest.mark.slow
def test_impossible_data_are_said():
    with pytest.raises(_errors.InferenceError, match="No starting point with a finite log density"):
        pf.infer(
            model_impossible,
            method=ParticleGibbs(chains=1, warmup=10),
            states=pf.ParticleFilter(5),
            y=np.array([0.0, 0.1]),
            draws=10,
            progress=False,
        )


@pytest.mark.slow
def test_float64(float64):
    tree = infer(ParticleGibbs(chains=2, warmup=30), pf.ParticleFilter(20), 20)
    assert tree["posterior"]["u"].dtype == np.float64
