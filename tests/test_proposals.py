"""Proposals of the particle filter against exact answers: unbiased evidence, exact weights, less variance, refusals.

Random tests have fixed keys; false-alarm rates, where a test is statistical, stand beside the tolerance. Programs are
shared between assertions: compiling is what costs here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import stats

import pushforward as pf
from pushforward._errors import MethodError
from pushforward.methods._guide import Guide
from pushforward.methods._guided import Auxiliary, Linearized, Newton, Optimal
from pushforward.methods._particle_parts import NoJitter, Systematic
from pushforward.methods._particles import ParticleSteps
from pushforward.methods._proposals import Bootstrap
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import linear_state_space as linear
from pushforward.problems import nile, stochastic_volatility
from pushforward.problems._grid import grid_filter, normal_density

KEY = jax.random.key(0)
SMALL = linear.system(n=2, m=2, q=2, steps=10, seed=1)


def read(model, *args, **kwargs):
    return read_state_space(read_problem(model, args, kwargs))


def compiled(run, *arguments):
    """The result of a program compiled without optimisation, which takes half the time; compiling is what costs."""
    program = jax.jit(run).lower(*arguments)
    found = program.compile(compiler_options={"xla_backend_optimization_level": 0})(*arguments)
    return jax.tree.map(np.asarray, found)


def estimates(space, proposals, keys, particles=50):
    """Log likelihood estimates (keys,) of each proposal at the same keys, in one program."""

    def each(key):
        chain = space.chain()
        return {n: pf.ParticleFilter(particles, proposal=p).log_likelihood(chain, key) for n, p in proposals.items()}

    return compiled(jax.vmap(each), jax.random.split(KEY, keys))


def score(log_estimates, exact):
    """How many standard errors the mean of the estimates is from the exact likelihood."""
    ratio = np.exp(log_estimates - exact)
    return (ratio.mean() - 1) / (ratio.std(ddof=1) / np.sqrt(len(ratio)))


# -------------------------------------------------------------------------------------------- linear Gaussian


def wide_guide(x, y):
    """Somewhat wider than the transition; its mean is drawn towards the data by hand."""
    mean = SMALL.A @ x + SMALL.b
    pull = jnp.linalg.solve(SMALL.C, jnp.where(jnp.isnan(y), SMALL.C @ mean, y))
    numpyro.sample("x", dist.MultivariateNormal(0.9 * mean + 0.1 * pull, 1.5 * SMALL.Q))


LINEAR = {
    "bootstrap": Bootstrap(),
    "adapted": Auxiliary(Optimal()),
    "guide": Guide(wide_guide),
    "optimal": Optimal(),
    "linearized": Linearized(2),
    "newton": Newton(1),
    "auxiliary": Auxiliary(),
}


@pytest.mark.parametrize("count", [2, pytest.param(7, marks=pytest.mark.slow)])
def test_evidence_is_unbiased_and_guided_proposals_vary_less(count, float64):
    """200 keys: |score| > 4 has probability 6e-5 for each of 7 proposals.

    The log of a ratio of two sample deviations over 200 keys has a standard error of at most 0.07 (less, since the keys
    are shared): 0.6 is more than 7 of them from 1.
    """
    model, args, kwargs = linear.FORMS["missing"](SMALL)
    space, exact = read(model, *args, **kwargs), linear.joint(SMALL, "missing").log_evidence()
    proposals = dict(list(LINEAR.items())[:count])
    for proposal in proposals.values():
        assert proposal.why_not(space) is None
    found = estimates(space, proposals, 200)
    for name, values in found.items():
        assert abs(score(values, exact)) < 4, name
    for name in {"optimal", "newton", "adapted"} & set(found):
        assert found[name].std() < 0.6 * found["bootstrap"].std(), name
    if count == len(LINEAR):
        np.testing.assert_allclose(found["linearized"], found["optimal"], atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimal", "guide"])
def test_all_laws_of_a_guided_filter_are_exact(name, float64):
    """Means over 40 keys of 400 particles: |t| with 39 degrees of freedom above 5.5 has probability 2e-6, times 60
    numbers 2e-4; 0.02 allows for the bias of order 1 / N. The prediction is not a reweighting of the guided particles,
    which would have infinite variance."""
    model, args, kwargs = linear.FORMS["missing"](SMALL)
    space, exact = read(model, *args, **kwargs), linear.joint(SMALL, "missing")
    method = pf.ParticleFilter(400, proposal=LINEAR[name])

    def each(key):
        found = method.trajectories(space.chain(), key, 200)
        return {
            "smoothing": found.posterior["x"].mean(0),
            "filtering": found.filtering["x"].mean(0),
            "one_step": found.one_step["x"].mean(0),
        }

    found = compiled(lambda keys: jax.lax.map(each, keys), jax.random.split(KEY, 40))
    for law, values in found.items():
        spread = values.std(0, ddof=1) / 40**0.5
        assert np.all(np.abs(values.mean(0) - getattr(exact, law)().mean) < 5.5 * spread + 0.02), law
        assert np.max(spread) < 0.05, law


def test_optimal_weights_are_the_predictive_density_and_adapted_ones_are_equal(float64):
    model, args, kwargs = linear.FORMS["centred"](SMALL)
    space = read(model, *args, **kwargs)
    size = 40

    def run(key):
        chain = space.chain()
        steps = ParticleSteps(size, Auxiliary(Optimal()), Systematic(threshold=1), NoJitter())
        first, second, third = jax.random.split(key, 3)
        cloud, _ = steps.start(chain, first)
        normals = jax.random.normal(second, (2, size, chain.noise_dimension))
        moved = [Optimal().move(chain, cloud.state, cloud.riders, (), jnp.asarray(1), z) for z in normals]
        after, record = steps.step(chain, cloud, jnp.asarray(1), steps.random(chain, third))
        prediction = jax.vmap(lambda x: chain.step(x, [], jnp.asarray(1), jnp.zeros(2)).observed)(cloud.state)
        return [m.log_weight for m in moved], [m.state for m in moved], after, record, prediction

    weights, states, after, record, predicted = compiled(run, KEY)
    assert np.abs(states[0] - states[1]).max() > 0.1
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-10)
    covariance = SMALL.C @ SMALL.Q @ SMALL.C.T + np.diag(predicted.noise[0])
    law = stats.multivariate_normal(np.zeros(2), covariance)
    density = law.logpdf(np.asarray(predicted.data - predicted.mean))
    np.testing.assert_allclose(weights[0], density, atol=1e-9)
    np.testing.assert_allclose(after.ess, size, rtol=1e-9)
    np.testing.assert_allclose(record.increment, np.log(np.mean(np.exp(density))), atol=1e-9)


# --------------------------------------------------------------------------------------- beyond linear Gaussian


def counts(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(0.8 * x, 0.7))
        numpyro.sample("y", dist.Poisson(jnp.exp(1.5 + x)), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


COUNTS = np.array([3, 0, 9, 25, 60, 30, 5, 2])


def counts_evidence():
    nodes = np.linspace(-6, 6, 400)
    moves = normal_density(nodes[:, None], 0.8 * nodes, 0.7)
    seen = stats.poisson(np.exp(1.5 + nodes)).logpmf(COUNTS[:, None])
    return grid_filter(nodes, normal_density(nodes, 0.0, 1.0), lambda t: moves, seen).log_evidence


def count_guide(x, y, parameters):
    assert parameters == {}
    numpyro.sample("x", dist.StudentT(5.0, 0.4 * x + 0.5 * (jnp.log(y + 0.5) - 1.5), 0.5))


COUNTING = {
    "newton": Newton(3),
    "bootstrap": Bootstrap(),
    "linearized": Linearized(3),
    "guide": Guide(count_guide),
    "both": Auxiliary(Newton(3)),
}


@pytest.mark.parametrize("number", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_counts_by_tangent_newton_and_a_guide(number, float64):
    """As above; the standard deviation falls by more than a factor of 2, 10 standard errors from 1."""
    found = estimates(read(counts, COUNTS), dict(list(COUNTING.items())[:number]), 200)
    for name, values in found.items():
        assert abs(score(values, counts_evidence())) < 4, name
        if name != "bootstrap" and "bootstrap" in found:
            assert values.std() < 0.5 * found["bootstrap"].std(), name


@pytest.mark.slow
def test_newton_on_stochastic_volatility(float64):
    """Data whose mean says nothing. 400 keys: the log of a ratio of deviations has a standard error of 0.05."""
    y = stochastic_volatility.simulate(50, seed=3, sigma=1.0)[1]
    space = read(stochastic_volatility.model, y, sigma=1.0)
    exact = stochastic_volatility.grid_log_evidence(y, sigma=1.0)
    found = estimates(space, {"bootstrap": Bootstrap(), "newton": Newton(2)}, 400, 100)
    for name, values in found.items():
        assert abs(score(values, exact)) < 4, name
    assert found["newton"].std() < 0.8 * found["bootstrap"].std()


def test_look_is_the_likelihood_at_the_predicted_state(float64):
    space = read(nile.local_level, nile.DATA[:5])
    chain = space.chain()
    states = jnp.array([[900.0], [1100.0], [1e5]])
    look = compiled(lambda x: Auxiliary().look(chain, x, [], (), jnp.asarray(2)), states)
    exact = stats.norm(np.asarray(states[:, 0]), nile.NOISE_VARIANCE**0.5).logpdf(nile.DATA[2])
    np.testing.assert_allclose(look[:2], exact[:2], rtol=1e-10)
    assert look[2] == pytest.approx(look.max() - 10)


# ------------------------------------------------------------------------------------------------------- guides


def regimes(y):
    def step(carry, y):
        regime, x = carry
        regime = numpyro.sample("regime", dist.Bernoulli(jnp.where(regime == 1, 0.8, 0.3)))
        rate = numpyro.sample("rate", dist.Uniform(0.0, 1.0 + regime))
        x = numpyro.sample("x", dist.Normal(rate * x, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return (regime, x), None

    scan(step, (jnp.asarray(0), jnp.asarray(0.5)), y)


def regime_guide(carry, y):
    x = carry[1]
    numpyro.sample("regime", dist.Bernoulli(0.6))
    rate = numpyro.sample("rate", dist.Uniform(-0.5, 2.5))
    numpyro.sample("x", dist.Normal(0.5 * (rate * x + y), 1.0))


def test_a_guide_of_discrete_and_bounded_sites_is_weighed_inside_the_support_alone(float64):
    """One step; the exact likelihood is an integral over two regimes and the rate. |score| > 4: 6e-5."""
    space = read(regimes, np.array([1.2]))
    rates = np.linspace(0, 2, 2001)
    sd = np.sqrt(1.25)
    terms = [0.7 * stats.norm(0.5 * rates, sd).pdf(1.2) * (rates <= 1), 0.3 * stats.norm(0.5 * rates, sd).pdf(1.2) / 2]
    exact = np.log(np.trapezoid(terms[0][:1001], rates[:1001]) + np.trapezoid(terms[1], rates))
    size = 4000
    start = space.chain().start(jnp.zeros(0))
    given = jnp.broadcast_to(start[0], (size, *start[0].shape)), [jnp.broadcast_to(r, size) for r in start[1]]

    def weights(key):
        return (
            Guide(regime_guide)
            .move(space.chain(), *given, (), jnp.asarray(0), jax.random.normal(key, (size, 6)))
            .log_weight
        )

    assert space.structure.discrete
    assert abs(score(compiled(weights, KEY), exact)) < 4


def test_a_guide_may_see_parameters(series):
    model, kwargs = series

    def guide(x, y, parameters):
        numpyro.sample("x", dist.Normal(parameters["rho"] * x, 0.5))

    space = read(model, **kwargs)
    chain = space.chain({"rho": jnp.asarray(0.5)})
    state, normals = jnp.array([[1.0], [2.0]]), jnp.array([[0.3], [-1.0]])
    given, twice = (chain, state, [], (), jnp.asarray(0)), jnp.concatenate([normals, normals], 1)
    own, plain = compiled(lambda *g: (Guide(guide).move(*g, twice), Bootstrap().move(*g, normals)), *given)
    np.testing.assert_allclose(own.state, plain.state, rtol=1e-6)
    np.testing.assert_allclose(own.log_weight, plain.log_weight, rtol=1e-5)
    np.testing.assert_allclose(own.predicted["x"], plain.sites["x"], rtol=1e-6)
    assert Guide(guide).noise_dimension(chain) == 2


# ------------------------------------------------------------------------------------------- refusals and names


def no_site(x, y):
    numpyro.sample("z", dist.Normal())


def extra_site(x, y):
    numpyro.sample("x", dist.Normal())
    numpyro.sample("w", dist.Normal())


def wrong_shape(x, y):
    numpyro.sample("x", dist.Normal().expand([2]))


def wrong_type(x, y):
    numpyro.sample("x", dist.Poisson(2.0))


def observing(x, y):
    numpyro.sample("x", dist.Normal(x))
    numpyro.sample("y", dist.Normal(x), obs=y)


def failing(x, y):
    first, second = x
    numpyro.sample("x", dist.Normal(first, second))


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (no_site, r"does not sample \['x'\]"),
        (extra_site, r"samples \['w'\], which the step does not"),
        (wrong_shape, r"'x' has shape \(2,\), the model's has \(\)"),
        (wrong_type, "'x' is int.*the model's is float"),
        (observing, "observes 'y'.*may only sample"),
        (failing, "the guide stopped with TypeError"),
    ],
)
def test_guides_that_do_not_fit(guide, words):
    with pytest.raises(MethodError, match=words):
        pf.infer(nile.local_level, nile.DATA[:4], method=pf.ParticleFilter(10, proposal=Guide(guide)))


def test_proposals_that_do_not_fit():
    volatility = read(stochastic_volatility.model, stochastic_volatility.DATA[:5])
    poisson = read(counts, COUNTS)
    assert "variance of observed site 'y' depends" in Optimal().why_not(volatility)
    assert "Newton" in Linearized().why_not(volatility)
    assert "'y' is Poisson, not Normal" in Optimal().why_not(poisson)

    def rounded(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(jnp.round(x), 0.5), obs=y)
            return x, None

        scan(step, 0.0, y)

    def squared(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x**2, 0.5), obs=y)
            return x, None

        scan(step, 0.0, y)

    y = np.array([1.0, 2.0])
    assert "contains jax's 'round'" in Optimal().why_not(read(rounded, y))
    assert "mean of observed site 'y' is not linear" in Optimal().why_not(read(squared, y))


def test_options():
    with pytest.raises(MethodError, match="iterations"):
        Linearized(0)
    with pytest.raises(MethodError, match="iterations"):
        Newton(1.5)
    with pytest.raises(MethodError, match="another proposal"):
        Auxiliary(Auxiliary())
    with pytest.raises(MethodError, match="function"):
        Guide(3)
    with pytest.raises(MethodError, match=r"\['x'\]"):
        Guide(lambda x: None)
    with pytest.raises(MethodError, match="proposal"):
        pf.ParticleFilter(proposal="best")
    assert pf.ParticleFilter(proposal="newton").proposal == Newton()
