"""The Rao-Blackwellised particle filter against exact answers and against particles for everything.

Random tests have fixed keys; false-alarm rates, where a test is statistical, stand beside the tolerance. Programs are
shared between assertions and compiled without optimisation: compiling is what costs here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward._errors import MethodError
from pushforward.methods._guided import Auxiliary
from pushforward.methods._proposals import Bootstrap
from pushforward.methods._rao_blackwell import RaoBlackwell, _root
from pushforward.model.conditionally_linear import split
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import nile, regime_switching
from pushforward.problems._gaussian import Joint, Noise, join

KEY = jax.random.key(0)


def read(model, *args, **kwargs):
    return read_state_space(read_problem(model, args, kwargs))


def compiled(run, *arguments):
    program = jax.jit(run).lower(*arguments)
    found = program.compile(compiler_options={"xla_backend_optimization_level": 0})(*arguments)
    return jax.tree.map(np.asarray, found)


def score(values, exact):
    """How many standard errors the mean over keys is from an exact value."""
    return (np.mean(values, 0) - exact) / (np.std(values, 0, ddof=1) / np.sqrt(len(values)))


# -------------------------------------------------------------------------------------------- switching regimes


@pytest.mark.slow
def test_switching_evidence_is_unbiased_and_varies_less_than_bootstrap(float64):
    """200 keys, |score| > 4: 6e-5. The log of a ratio of deviations has a standard error of 0.07."""
    space = read(regime_switching.switching_linear, regime_switching.SWITCHING_DATA)
    proposals = {"all": RaoBlackwell(), "ahead": Auxiliary(RaoBlackwell()), "bootstrap": Bootstrap()}

    def each(key):
        return {n: pf.ParticleFilter(50, proposal=p).log_likelihood(space.chain(), key) for n, p in proposals.items()}

    found = compiled(jax.vmap(each), jax.random.split(KEY, 200))
    for name, values in found.items():
        assert abs(score(np.exp(values - regime_switching.SWITCHING_LOG_EVIDENCE), 1.0)) < 4, name
    assert found["all"].std() < 0.7 * found["bootstrap"].std()


@pytest.mark.slow
def test_switching_smoothing_and_filtering_are_exact(float64):
    """Means over 16 keys of 500 draws of 2000 particles: |t| with 15 degrees of freedom above 7 has probability 4e-6,
    times 60 numbers 3e-4; 0.01 allows for the bias of order 1 / N."""
    exact = regime_switching.exact_switching(regime_switching.SWITCHING_DATA)
    space = read(regime_switching.switching_linear, regime_switching.SWITCHING_DATA)
    method = pf.ParticleFilter(2000, proposal=RaoBlackwell())

    def each(key):
        found = method.trajectories(space.chain(), key, 500)
        x, regime = found.posterior["x"], found.posterior["regime"]
        return {
            "mean": x.mean(0),
            "square": (x**2).mean(0),
            "regime": (regime == 1).mean(0),
            "filtering": found.filtering["x"].mean(0),
        }

    found = compiled(lambda keys: jax.lax.map(each, keys), jax.random.split(KEY, 16))
    wanted = {
        "mean": exact.mean,
        "square": exact.sd**2 + exact.mean**2,
        "regime": exact.regime[:, 1],
        "filtering": exact.filtering_mean,
    }
    for name, value in wanted.items():
        spread = found[name].std(0, ddof=1) / 4
        assert np.all(np.abs(found[name].mean(0) - value) < 7 * spread + 0.01), name


# ------------------------------------------------------------------- a linear model, of which one part is sampled


Y = np.array([0.4, 1.3, np.nan, -0.6, 0.9])
Y0 = 0.7


def two_parts(y, y0=Y0):
    u0 = numpyro.sample("u0", dist.Normal(0.3, 0.8))
    v0 = numpyro.sample("v0", dist.Normal(jnp.array([0.5, -0.2]), jnp.array([1.0, 0.6])).to_event(1))
    numpyro.sample("y0", dist.Normal(v0[0] + v0[1], 0.5), obs=y0)

    def step(carry, y):
        u, v = carry
        u = numpyro.sample("u", dist.Normal(0.8 * u, 0.6))
        w = numpyro.sample("w", dist.Normal(0.0, 0.5))
        v = numpyro.deterministic("x", jnp.array([0.7 * v[0] + 0.2 * v[1] + 0.4 * u + w, v[1]]))
        numpyro.sample("y", dist.Normal(v[0] + 0.5 * u, 0.4), obs=y)
        return (u, v), None

    scan(step, (u0, v0), y)


def exact_two_parts():
    """The same in dense Gaussians: no recursion."""
    noise = Noise()
    u0, v0 = noise.normal([0.3], [[0.8]]), noise.normal([0.5, -0.2], np.diag([1.0, 0.6]))
    y0 = np.array([[1.0, 1.0]]) @ v0 + noise.normal([0.0], [[0.5]])
    u, v, us, ws, vs, ys = u0, v0, [], [], [], []
    for _ in Y:
        u = 0.8 * u + noise.normal([0.0], [[0.6]])
        w = noise.normal([0.0], [[0.5]])
        v = join(np.array([[0.7, 0.2]]) @ v + 0.4 * u + w, v[1:])
        us, ws, vs = [*us, u], [*ws, w], [*vs, v]
        ys.append(v[:1] + 0.5 * u + noise.normal([0.0], [[0.4]]))
    latent = {"u0": u0, "v0": v0, "u": us, "w": ws}
    return Joint(latent, {"y0": y0, "y": ys}, {"y0": np.array([Y0]), "y": Y}, vs)


def test_parts_of_a_linear_model_have_their_exact_laws(float64):
    """All laws at once: the initial state that is integrated out, a quiet leaf, missing data, an observed start.

    Means over 60 keys of 200 draws of 300 particles: |t| with 59 degrees of freedom above 5 has probability 6e-6, times
    about 60 numbers 4e-4; 0.01 allows for the bias of order 1 / N.
    """
    space, exact = read(two_parts, Y), exact_two_parts()
    parts = split(space, ("u",))
    assert (list(parts.state), list(parts.noise), list(parts.initial)) == ([1, 2], [1], [1, 2])
    method = pf.ParticleFilter(300, proposal=RaoBlackwell(("u",)))

    def each(key):
        found = method.trajectories(space.chain(), key, 200)
        groups = {"smoothing": found.posterior["x"], "filtering": found.filtering["x"], "one_step": found.one_step["x"]}
        means = {n: x.reshape(200, 5, 2).mean(0) for n, x in groups.items()}
        means |= {f"{n} square": (x.reshape(200, 5, 2) ** 2).mean(0) for n, x in groups.items()}
        means["v0"], means["u"] = found.posterior["v0"].mean(0), found.posterior["u"].mean(0)
        means["last"] = found.last[0][:, 1:].mean(0)
        density = sum(jnp.sum(v.reshape(200, -1), 1) for v in (found.log_prior | found.log_likelihood).values())
        return means, found.log_evidence, {n: v[0] for n, v in found.posterior.items()}, density[0]

    means, evidence, draw, density = compiled(jax.vmap(each), jax.random.split(KEY, 60))
    assert abs(score(np.exp(evidence - exact.log_evidence()), 1.0)) < 4
    assert evidence.std() < 0.15
    wanted = {"v0": exact.posterior("v0")[0], "u": exact.posterior("u")[0]}
    for name in ("smoothing", "filtering", "one_step"):
        law = getattr(exact, name)()
        wanted[name] = law.mean
        wanted[f"{name} square"] = law.mean**2 + np.diagonal(law.covariance, axis1=1, axis2=2)
    wanted["last"] = wanted["smoothing"][-1]
    for name, value in wanted.items():
        spread = means[name].std(0, ddof=1) / np.sqrt(60)
        assert np.all(np.abs(means[name].mean(0) - value) < 5 * spread + 0.01), name
    one = exact.log_density({n: v[0] for n, v in draw.items() if n in exact.latent})
    assert density[0] == pytest.approx(one, abs=1e-8)


# ------------------------------------------------------------------------------- a mixed nonlinear model, counts


def mixed(y, counts):
    def step(carry, row):
        u, v = carry
        y, count = row
        u = numpyro.sample("u", dist.Normal(jnp.sin(u), 0.5))
        v = numpyro.sample("v", dist.Normal((0.5 + 0.4 * jnp.cos(u)) * v, 0.7))
        numpyro.sample("count", dist.Poisson(jnp.exp(u)), obs=count)
        numpyro.sample("y", dist.Normal(v + u**2 / 5, 0.3), obs=y)
        return (u, v), None

    u0 = numpyro.sample("u0", dist.Normal(0.0, 1.0))
    scan(step, (u0, numpyro.sample("v0", dist.Normal(0.0, 1.0))), (y, counts))


@pytest.mark.slow
def test_a_mixed_model_agrees_with_particles_for_everything(float64):
    """Two unbiased estimates of the likelihood, 100 keys each: the difference beyond 4 standard errors has 6e-5."""
    space = read(mixed, np.array([0.3, np.nan, -1.0, 1.5]), np.array([1, 0, 3, 2]))
    assert split(space).sampled == ("u",)
    sizes = {"all": (200, RaoBlackwell()), "bootstrap": (2000, Bootstrap())}

    def each(key):
        return {n: pf.ParticleFilter(k, proposal=p).log_likelihood(space.chain(), key) for n, (k, p) in sizes.items()}

    found = compiled(lambda keys: jax.lax.map(each, keys), jax.random.split(KEY, 100))
    ratio = {n: np.exp(v - found["bootstrap"].mean()) for n, v in found.items()}
    error = np.hypot(*(r.std(ddof=1) / 10 for r in ratio.values()))
    assert abs(ratio["all"].mean() - ratio["bootstrap"].mean()) < 4 * error
    small = found["all"].std() * 200**0.5
    assert small < found["bootstrap"].std() * 2000**0.5


# ------------------------------------------------------------------------------------------- parts and refusals


def test_which_sites_are_sampled():
    switching = read(regime_switching.switching_linear, regime_switching.SWITCHING_DATA)
    assert split(switching).sampled == ("regime",)
    assert split(read(mixed, np.zeros(3), np.zeros(3, int))).plain_sites == ("count",)


@pytest.mark.parametrize(
    ("sampled", "words"),
    [
        (("x",), "'regime' cannot be integrated out"),
        (("z",), r"names \['z'\], which are no latent sites"),
        (("regime", "x"), "leaves none to integrate out"),
    ],
)
def test_sampled_sites_that_do_not_fit(sampled, words):
    method = pf.ParticleFilter(10, proposal=RaoBlackwell(sampled))
    with pytest.raises(MethodError, match=words):
        pf.infer(regime_switching.switching_linear, regime_switching.SWITCHING_DATA, method=method)


def test_models_that_do_not_fit():
    def feedback(y):
        def step(x, y):
            regime = numpyro.sample("regime", dist.Bernoulli(logits=x))
            x = numpyro.sample("x", dist.Normal(x + regime, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
            return x, None

        scan(step, 0.0, y)

    def volatility(y):
        def step(x, y):
            regime = numpyro.sample("regime", dist.Bernoulli(0.5))
            x = numpyro.sample("x", dist.Normal(0.9 * x + regime, 1.0))
            numpyro.sample("y", dist.Normal(x, jnp.exp(x)), obs=y)
            return x, None

        scan(step, 0.0, y)

    def square(y):
        def step(x, y):
            regime = numpyro.sample("regime", dist.Bernoulli(0.5))
            x = numpyro.sample("x", dist.Normal(x**2 + regime, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
            return x, None

        scan(step, 0.0, y)

    y = np.array([0.1, 0.2])
    given = RaoBlackwell()
    assert "not linear in site ['x']" in given.why_not(read(square, y))
    assert "law of the sampled site 'regime' depends on site ['x']" in given.why_not(read(feedback, y))
    assert "variance of observed sites ['y'] depends on site ['x']" in given.why_not(read(volatility, y))
    assert "use pf.Kalman()" in given.why_not(read(nile.local_level, nile.DATA[:3]))
    hidden = read(regime_switching.model, y)
    assert "use pf.DiscreteHMM()" in given.why_not(hidden)
    unknown = read(regime_switching.model_stay, y).augmented()
    assert "(augment=True)" in given.why_not(unknown)
    with pytest.raises(MethodError, match="tuple of site names"):
        RaoBlackwell("regime")
    method = pf.ParticleFilter(10, proposal=given, regularization=pf.Jitter())
    with pytest.raises(MethodError, match="would move apart"):
        pf.infer(regime_switching.switching_linear, regime_switching.SWITCHING_DATA, method=method)


def test_a_root_of_a_singular_covariance(float64):
    given = np.array([[1.0, 2.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    cov = given @ given.T
    root = np.asarray(_root(jnp.asarray(cov)))
    np.testing.assert_allclose(root @ root.T, cov, atol=1e-12)
    assert np.allclose(_root(jnp.zeros((2, 2))), 0)
