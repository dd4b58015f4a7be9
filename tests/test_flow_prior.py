"""`FlowPrior`: a density that is exact for its map, a fit judged by known laws, a distribution like NumPyro's own."""

import functools
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from jax.flatten_util import ravel_pytree
from numpyro.contrib.control_flow import scan
from numpyro.distributions import biject_to, constraints
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.util import log_density
from scipy import stats

import pushforward as pf
from pushforward import _files
from pushforward._errors import ArgumentError, CheckpointError, DataError, InferenceError, MethodError
from pushforward.learned import flow_prior
from pushforward.learned.fitting import Training
from pushforward.learned.flow_prior import FlowPrior
from pushforward.learned.flows import Flow
from pushforward.metrics import c2st
from pushforward.model import coordinates
from pushforward.model._fingerprint import fingerprint
from pushforward.model.inverse import read_problem

FLOW = Flow("coupling", layers=3, width=16)
SUPPORTS = {
    "real": (constraints.real, (2,)),
    "matrix": (constraints.real_matrix, (2, 1)),
    "positive": (constraints.positive, (2,)),
    "bounds by coordinate": (constraints.interval(np.array([0.0, -5.0]), np.array([1.0, 7.0])), (2,)),
    "below": (constraints.independent(constraints.less_than(3.0), 1), (2,)),
    "simplex": (constraints.simplex, (3,)),
    "ordered": (constraints.ordered_vector, (2,)),
}


def banana(size, seed=0):
    """x0 ~ N(0, 1), x1 given x0 ~ N(x0^2 / 2, 1/2)."""
    x = np.random.default_rng(seed).normal(size=(size, 2))
    x[:, 1] = 0.5 * x[:, 1] + 0.5 * x[:, 0] ** 2
    return x


def banana_log_density(x):
    return stats.norm.logpdf(x[:, 0]) + stats.norm.logpdf(x[:, 1], 0.5 * x[:, 0] ** 2, 0.5)


@pytest.fixture(scope="module")
def prior():
    """Fitted to 1000 samples of the banana."""
    return FlowPrior.fit(banana(1000), flow=FLOW, progress=False)


def supported(prior, name):
    """The same flow, with another support and shape."""
    support, event = SUPPORTS[name]
    push = prior.transforms[0]
    shape = biject_to(support).inverse_shape(event)
    return FlowPrior(push.flow, push.weights, push.mean, push.root, shape, support)


def grid(low, high, size):
    axes = [np.linspace(a, b, size) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    return points, np.prod([a[1] - a[0] for a in axes])


# ------------------------------------------------------------------------------------------- the density of a given map


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_density_is_that_of_the_pushed_noise(prior, name):
    """log p(T(e)) = log N(e) - log|det T'(e)| with the determinant of the derivative that JAX takes, at 5 points."""
    law = supported(prior, name)
    support, event = SUPPORTS[name]
    assert law.event_shape == event
    assert law.batch_shape == ()
    noise = jax.random.normal(jax.random.key(3), (5, 2))
    value = coordinates.push(law, noise)
    assert value.shape == (5, *event)
    # The last coordinate of a simplex follows from the others.
    flat = lambda e: coordinates.push(law, e).reshape(-1)[:2]  # noqa: E731
    log_det = jnp.linalg.slogdet(jax.vmap(jax.jacfwd(flat))(noise))[1]
    expected = jnp.sum(stats.norm.logpdf(noise), -1) - log_det
    assert np.allclose(law.log_prob(value), expected, atol=1e-4)
    assert np.allclose(coordinates.pull(law, value), noise, atol=1e-3)
    assert coordinates.is_exact(law), "its coordinates are standard normal"
    assert bool(jnp.all(support(value)))


def test_densities_integrate_to_one(prior):
    points, area = grid((-8, -8), (8, 12), 250)
    density = np.exp(np.asarray(prior.log_prob(points), np.float64))
    assert np.sum(density) * area == pytest.approx(1, abs=1e-3)
    law = supported(prior, "bounds by coordinate")
    points, area = grid((0.001, -4.99), (0.999, 6.99), 400)
    assert np.sum(np.exp(np.asarray(law.log_prob(points), np.float64))) * area == pytest.approx(1, abs=5e-3)


def test_moments_of_draws_are_those_of_the_density(prior):
    """Mean and second moments of 20,000 draws against quadrature, at 5 standard errors: false alarm 3e-6."""
    points, area = grid((-8, -8), (8, 12), 250)
    weights = np.exp(np.asarray(prior.log_prob(points), np.float64)) * area
    draws = np.asarray(prior.sample(jax.random.key(1), (20_000,)), np.float64)

    def moments(x):
        return np.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], -1)

    error = np.mean(moments(draws), 0) - weights @ moments(points)
    assert np.all(np.abs(error) < 5 * np.std(moments(draws), 0) / np.sqrt(len(draws)) + 1e-3)


def test_draws_never_leave_the_support(prior):
    """Even where the bijection has long rounded to the edge, in float32."""
    far = jnp.array([[-200.0, 200.0], [-17.0, 17.0]])
    assert bool(jnp.all(supported(prior, "positive").transforms[1](far) > 0))
    assert bool(jnp.all(supported(prior, "below").transforms[1](far) < 3.0))
    low, high = jnp.array([0.0, -5.0]), jnp.array([1.0, 7.0])
    value = supported(prior, "bounds by coordinate").transforms[1](far)
    assert bool(jnp.all((value > low) & (value < high)))


def test_the_gradient_is_that_of_differences(prior, float64):
    value = jnp.asarray(prior.sample(jax.random.key(2)), float)
    step = 1e-6 * jnp.eye(2)
    law = jax.tree.map(lambda x: jnp.asarray(x, float), prior)
    slope = [(law.log_prob(value + s) - law.log_prob(value - s)) / 2e-6 for s in step]
    assert np.allclose(jax.grad(law.log_prob)(value), slope, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- the fit


def test_a_fit_to_gaussian_samples_recovers_their_density():
    """KL(N(m, S), fit) by Gauss-Hermite quadrature is small.

    With 1000 samples the best Gaussian itself is off by 5 / 2000 on average. Over 20 other samples the fit's KL was
    0.0012 to 0.011; 0.22 is that of the Gaussian without correlation.
    """
    root, mean = np.array([[2.0, 0.0], [0.3, 0.4]]), np.array([30.0, -4.0])
    kl = []
    for seed in range(2):
        noise = np.random.default_rng(seed).normal(size=(1000, 2))
        law = FlowPrior.fit(mean + noise @ root.T, flow=FLOW, key=seed, progress=False)
        nodes, weights = np.polynomial.hermite_e.hermegauss(24)
        e = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
        probability = np.outer(weights, weights).reshape(-1) / (2 * np.pi)
        log_p = np.sum(stats.norm.logpdf(e), -1) - np.log(np.linalg.det(root))
        kl.append(probability @ (log_p - np.asarray(law.log_prob(mean + e @ root.T), np.float64)))
    assert min(kl) > 0
    assert max(kl) < 0.03


def test_a_fit_bends(prior, capfd):
    """KL from the banana, by 20,000 of its points: 0.006 to 0.044 over 20 samples; the best Gaussian's is 0.55."""
    fresh = banana(20_000, seed=7)
    gap = banana_log_density(fresh) - np.asarray(prior.log_prob(fresh), np.float64)
    assert np.mean(gap) < 0.1
    other = FlowPrior.fit(banana(1000), flow=FLOW, key=5)
    assert "FlowPrior" in capfd.readouterr().err
    same = FlowPrior.fit(banana(1000), flow=FLOW, key=jax.random.key(0), progress=False)
    assert jnp.array_equal(same.log_prob(fresh[:5]), prior.log_prob(fresh[:5]))
    assert not jnp.array_equal(other.log_prob(fresh[:5]), prior.log_prob(fresh[:5]))


def scalar_mass(law):
    """Points x > 0 with the integral of the density over them, and its logarithm."""
    x = np.linspace(0, 40, 20_001)[1:]
    log_q = np.asarray(law.log_prob(x), np.float64)
    return x, log_q, np.sum(np.exp(log_q)) * (x[1] - x[0])


def test_scalars_have_a_density_inside_their_bounds():
    """Splines with random weights, on (0, inf)."""
    flow = Flow("coupling_spline", layers=2, width=8)
    start = flow_prior._start(flow, 1, jax.random.key(0))
    weights = start + 0.3 * jax.random.normal(jax.random.key(1), start.shape)
    law = FlowPrior(flow, weights, jnp.zeros(1), 0.5 * jnp.eye(1), (), constraints.positive)
    assert law.event_shape == ()
    assert scalar_mass(law)[2] == pytest.approx(1, abs=2e-3)
    draws = law.sample(jax.random.PRNGKey(0), (500,))
    assert draws.shape == (500,)
    assert bool(jnp.all(draws > 0))


@pytest.mark.slow
def test_a_scalar_fit_recovers_a_gamma_law():
    """KL below 0.05 for 1000 samples of Gamma(2): 0.008 to 0.042 over 10 other samples."""
    samples = np.random.default_rng(0).gamma(2.0, size=1000)
    law = FlowPrior.fit(samples, support=constraints.positive, progress=False)
    x, log_q, mass = scalar_mass(law)
    assert mass == pytest.approx(1, abs=2e-3)
    p = stats.gamma.pdf(x, 2.0)
    assert 0 < np.sum(p * (np.log(p) - log_q)) * (x[1] - x[0]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coupling_spline", "autoregressive_spline"])
def test_draws_of_two_moons_are_hardly_told_from_samples(name):
    """c2st of 4000 draws against 4000 fresh samples is below 0.56 for 4000 samples to fit to (0.80 for a Gaussian)."""

    def moons(seed):
        rng = np.random.default_rng(seed)
        angle, upper = rng.uniform(0, np.pi, 4000), rng.integers(0, 2, 4000)[:, None]
        arc = np.stack([np.cos(angle), np.sin(angle)], 1)
        return np.where(upper, arc, np.array([1.0, 0.5]) - arc) + 0.1 * rng.normal(size=(4000, 2))

    law = FlowPrior.fit(moons(0), flow=name, progress=False)
    draws = np.asarray(law.sample(jax.random.key(1), (4000,)))
    assert 0.5 - 0.03 < c2st(draws, moons(1)).accuracy < 0.56
    assert c2st(np.random.default_rng(2).multivariate_normal(draws.mean(0), np.cov(draws.T), 4000), moons(1))[0] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coupling", "coupling_spline", "autoregressive", "autoregressive_spline"])
def test_every_architecture_fits_in_three_dimensions(name, tmp_path):
    """Permutations between layers, which two dimensions do not have, are in the file as well."""
    x = np.concatenate([banana(2000), banana(2000, seed=1)[:, :1] + 1], 1)
    law = FlowPrior.fit(x, flow=name, progress=False)
    fresh = np.concatenate([banana(4000, seed=3), banana(4000, seed=4)[:, :1] + 1], 1)
    expected = banana_log_density(fresh) + stats.norm.logpdf(fresh[:, 2], 1)
    assert np.mean(expected - np.asarray(law.log_prob(fresh), np.float64)) < 0.1
    pf.save(tmp_path / "prior.pf", law)
    assert jnp.array_equal(pf.load(tmp_path / "prior.pf").log_prob(fresh), law.log_prob(fresh))


# --------------------------------------------------------------------------------------------------------- in a model


def observed(prior, y=None):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[0], 0.5), obs=y)


def test_the_posterior_is_the_push_of_the_latent_posterior(prior):
    """Density in z: log N(z) + log likelihood(T(z)), nothing else."""
    problem = read_problem(functools.partial(observed, prior), (), {"y": 2.0})
    z = jnp.array([0.7, -0.4])
    expected = jnp.sum(stats.norm.logpdf(z)) + stats.norm.logpdf(2.0, coordinates.push(prior, z)[0], 0.5)
    assert problem.log_density(z) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.slow
def test_posteriors_have_the_moments_of_quadrature(prior):
    """Our NUTS in z, NumPyro's in x and Gaussian VI, against quadrature over x.

    For 4000 draws whose effective size is at least a tenth (the lowest seen was a fifth), means lie within 5 standard
    errors: false alarm 1e-6 each. The mean of x1, on which there are no data, is more than twice that of the prior.
    Gaussian VI is not exact: a tenth of a standard deviation.
    """
    model = functools.partial(observed, prior)
    points, _ = grid((-6, -4), (6, 14), 400)
    log_p = np.asarray(prior.log_prob(points), np.float64) + stats.norm.logpdf(2.0, points[:, 0], 0.5)
    weights = np.exp(log_p - log_p.max())
    weights /= weights.sum()
    mean = weights @ points
    sd = np.sqrt(weights @ points**2 - mean**2)
    assert mean[1] > 2 * np.asarray(prior.sample(jax.random.key(0), (2000,)))[:, 1].mean()
    tree = pf.infer(model, method=pf.NUTS(chains=2, warmup=500), y=2.0, draws=2000, progress=False)
    sampler = MCMC(NUTS(model), num_warmup=1000, num_samples=4000, progress_bar=False)
    sampler.run(jax.random.PRNGKey(0), y=2.0)
    for draws in (tree["posterior"]["x"].values.reshape(-1, 2), sampler.get_samples()["x"]):
        assert np.all(np.abs(np.asarray(draws).mean(0) - mean) < 5 * sd / np.sqrt(400))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tree = pf.infer(model, method="gaussian_vi", y=2.0, draws=4000, progress=False)
    assert np.all(np.abs(tree["posterior"]["x"].values.reshape(-1, 2).mean(0) - mean) < 0.1 * sd)


def test_it_is_the_law_of_an_initial_state(prior):
    """The joint density of a state-space model in z, and the same model in NumPyro with the prior in every step."""

    def model(y=None):
        def step(x, y):
            w = numpyro.sample("w", prior)
            x = 0.9 * x + 0.3 * w
            numpyro.sample("y", dist.Normal(x[0], 0.3), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", prior), y)

    y = jnp.array([0.5, 0.2, -0.3])
    x = prior.sample(jax.random.key(0), (4,))
    states = [x[0]]
    for w in x[1:]:
        states.append(0.9 * states[-1] + 0.3 * w)
    likelihood = sum(stats.norm.logpdf(v, s[0], 0.3) for v, s in zip(y, states[1:], strict=True))
    found = log_density(model, (y,), {}, {"x0": x[0], "w": x[1:]})[0]
    assert found == pytest.approx(float(jnp.sum(prior.log_prob(x)) + likelihood), rel=1e-5)
    problem = read_problem(model, (), {"y": y})
    z = ravel_pytree([coordinates.pull(prior, v) for v in x])[0]
    assert problem.dimension == 8
    assert problem.log_density(z) == pytest.approx(float(jnp.sum(stats.norm.logpdf(z)) + likelihood), rel=1e-4)


def test_numpyro_takes_it(prior):
    """Raw keys, plates, `expand` and masks; every entry of a plate is a draw of its own."""

    def model():
        numpyro.sample("one", prior)
        with numpyro.plate("three", 3):
            numpyro.sample("many", prior)

    draws = Predictive(model, num_samples=50)(jax.random.PRNGKey(0))
    assert draws["one"].shape == (50, 2)
    assert draws["many"].shape == (50, 3, 2)
    assert len(np.unique(draws["many"].reshape(-1, 2), axis=0)) == 150
    wide = prior.expand((3,))
    x = prior.sample(jax.random.key(0), (3,))
    assert np.allclose(wide.log_prob(x), prior.log_prob(x), atol=1e-5)
    assert wide.sample(jax.random.key(1), (4,)).shape == (4, 3, 2)
    assert wide.to_event(1).log_prob(x) == pytest.approx(float(prior.log_prob(x).sum()), rel=1e-5)


def test_it_is_a_pytree(prior):
    x = prior.sample(jax.random.key(0), (3,))
    expected = prior.log_prob(x)
    assert np.allclose(jax.jit(lambda p, v: p.log_prob(v))(prior, x), expected, atol=1e-5)
    moved = jax.tree.map(lambda a, b: jnp.stack([a, b]), prior, FlowPrior.tree_unflatten(
        prior.tree_flatten()[1], (prior.transforms[0].weights, prior.transforms[0].mean + 1, prior.transforms[0].root)
    ))  # fmt: skip
    inside = jax.vmap(lambda p, v: p.log_prob(v))(moved, jnp.stack([x, x + 1]))
    assert np.allclose(inside, expected, atol=1e-4)
    leaves, tree = jax.tree.flatten(prior)
    again = jax.tree.unflatten(tree, leaves)
    assert type(again) is FlowPrior
    assert jax.tree.structure(again) == tree
    assert jnp.array_equal(again.sample(jax.random.key(4)), prior.sample(jax.random.key(4)))
    assert jax.tree.structure(supported(prior, "positive")) != tree


def model_of(prior):
    return functools.partial(observed, prior)


def test_models_are_known_by_the_content_of_their_prior(prior, tmp_path):
    """Equal content is not compiled again, whatever was evaluated with it before; other content is."""
    push = prior.transforms[0]
    fresh = supported(prior, "real")
    first = fingerprint(model_of(fresh))
    fresh.log_prob(fresh.sample(jax.random.key(0)))
    coordinates.pull(fresh, jnp.zeros(2))
    assert fingerprint(model_of(fresh)) == first
    pf.save(tmp_path / "prior.pf", prior)
    copy = pf.load(tmp_path / "prior.pf")
    assert fingerprint(model_of(copy)) == fingerprint(model_of(prior))
    others = [(push.weights.at[0, 0].add(1e-3), push.mean, push.root), (push.weights, push.mean + 1, push.root)]
    made = [FlowPrior(push.flow, *arrays, push.shape, constraints.real) for arrays in others]
    assert len({fingerprint(model_of(p)) for p in [*made, supported(prior, "positive"), prior]}) == 4


@pytest.mark.slow
def test_equal_priors_are_compiled_once(prior, tmp_path):
    pf.save(tmp_path / "prior.pf", prior)
    push = prior.transforms[0]
    moved = FlowPrior(push.flow, push.weights, push.mean + 1, push.root, push.shape, constraints.real)
    options = {"method": "laplace", "y": 0.3, "draws": 5, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pf.infer(model_of(prior), **options)
        again = pf.infer(model_of(pf.load(tmp_path / "prior.pf")), **options)
        other = pf.infer(model_of(moved), **options)
    assert pf.attributes(again)["compile_seconds"] == 0
    assert not np.allclose(other["posterior"]["x"].values, again["posterior"]["x"].values)


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_fresh_process_reads_what_was_written(prior, tmp_path):
    names = ["real", "bounds by coordinate", "simplex"]
    for name in names:
        pf.save(tmp_path / f"{name}.pf", supported(prior, name))
    code = f"""
import jax, numpy as np, pushforward as pf
for name in {names!r}:
    law = pf.load({str(tmp_path)!r} + "/" + name + ".pf")
    x = law.sample(jax.random.key(5))
    print(name, law.event_shape, np.asarray(x).tobytes().hex(), np.asarray(law.log_prob(x)).tobytes().hex(), sep=";")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        law = supported(prior, name)
        x = law.sample(jax.random.key(5))
        parts = (name, law.event_shape, np.asarray(x).tobytes().hex(), np.asarray(law.log_prob(x)).tobytes().hex())
        assert line == ";".join(map(str, parts))


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports_are_read_as_they_were_written(prior, name, tmp_path):
    law = supported(prior, name)
    pf.save(tmp_path / "prior.pf", law)
    assert jax.tree.structure(pf.load(tmp_path / "prior.pf")) == jax.tree.structure(law)


def test_load_refuses_what_would_be_another_density(prior, tmp_path, monkeypatch):
    path = tmp_path / "prior.pf"
    pf.save(path, prior)
    with pytest.raises(ArgumentError, match=r"holds a FlowPrior, which needs no model. Write pf.load\(path\)"):
        pf.load(path, model=model_of(prior))
    header, arrays = _files._read(path)
    value = header["value"]
    changed = list(arrays)
    changed[value["weights"]["array"]] = np.roll(changed[value["weights"]["array"]], 1, axis=1)
    _files._write(path, header, changed)
    with pytest.raises(CheckpointError, match="another map than when they were written.*Fit it again"):
        pf.load(path)
    changed[value["weights"]["array"]] = np.zeros(3)
    _files._write(path, header, changed)
    with pytest.raises(CheckpointError, match=r"weights of shape \(3,\), and this version of pushforward builds \(3, "):
        pf.load(path)
    _files._write(path, header | {"value": value | {"support": {"dict": [["name", "round"]]}}}, arrays)
    with pytest.raises(CheckpointError, match="names the support 'round', which this version of NumPyro lacks"):
        pf.load(path)
    _files._write(path, header | {"value": {"flow": value["flow"]}}, arrays)
    with pytest.raises(CheckpointError, match="is damaged, or was written by another version"):
        pf.load(path)
    for named in (["pushforward.learned.flow_prior", "IntoSupport"], ["os", "system"], "FlowPrior"):
        _files._write(path, header | {"class": named}, arrays)
        with pytest.raises(CheckpointError, match="which this version of pushforward does not have"):
            pf.load(path)
    with pytest.raises(ArgumentError, match=r"got Normal. Of distributions it writes a FlowPrior"):
        pf.save(path, dist.Normal(0, 1))


# --------------------------------------------------------------------------------------------------------------- errors

GOOD = banana(200)
EDGE = np.abs(GOOD) * (np.arange(200) > 2)[:, None]


def changed(**columns):
    x = np.concatenate([GOOD, banana(200, seed=1)[:, :1]], 1)
    for name, column in columns.items():
        x[:, int(name[1:])] = column
    return x


@pytest.mark.parametrize(
    ("samples", "error", "match"),
    [
        ([1.0, 2.0], ArgumentError, r"got list. Write np.asarray\(samples\)"),
        (np.array(["a"] * 200), ArgumentError, "takes real numbers; got an array of <U1"),
        (np.ones(200, complex), ArgumentError, "takes real numbers; got an array of complex128"),
        (np.array(1.0), DataError, r"takes the shape \(samples, \*event shape\); got \(\)"),
        (GOOD[:60], DataError, "60 samples of 2 numbers are too few .* at least 100, or use .*MultivariateNormal"),
        (GOOD.reshape(20, 20), DataError, "20 samples of 20 numbers are too few .* at least 200"),
        (np.where(np.arange(400).reshape(200, 2) == 7, np.nan, GOOD), DataError, r"1 values .*\[3, 1\] = nan"),
        (np.where(np.arange(400).reshape(200, 2) > 397, np.inf, GOOD), DataError, r"2 values .*\[199, 0\] = inf"),
        (changed(_1=3.0), DataError, r"samples\[:, 1\] is constant, 3, up to rounding"),
        (np.full(200, 2.5), DataError, r"samples is constant, 2.5"),
        (changed(_2=np.arange(200) % 4), DataError, r"samples\[:, 2\] takes 4 distinct values only.*Categorical"),
        (changed(_2=GOOD[:, 0] - 2), DataError, r"singular covariance: .* of samples\[:, 0\], samples\[:, 2\] is"),
        (changed(_2=GOOD @ [2, -1]), DataError, r"samples\[:, 0\], samples\[:, 1\], samples\[:, 2\] is constant"),
    ],
)  # fmt: skip
def test_samples_without_a_density_are_refused(samples, error, match):
    with pytest.raises(error, match=match):
        FlowPrior.fit(samples, progress=False)


def test_a_labelled_array_is_refused_with_its_way_out():
    with pytest.raises(ArgumentError, match=r"got DataArray. Write np.asarray\(array.values.reshape\(-1, \*shape"):
        FlowPrior.fit(xarray.DataArray(GOOD.reshape(4, 50, 2), dims=["chain", "draw", "i"]))


@pytest.mark.parametrize(
    ("samples", "support", "error", "match"),
    [
        (GOOD, constraints.positive, DataError, r"of 200 samples lie outside the support Positive.*first value is"),
        (EDGE, constraints.nonnegative, DataError, r"3 of .* edge .*samples\[0\]"),
        (GOOD, constraints.simplex, DataError, "200 of 200 samples lie outside the support Simplex"),
        (GOOD[:, 0], constraints.simplex, DataError, r"values with 1 dimensions; one of .* the shape \(\)"),
        (GOOD, constraints.positive_integer, MethodError, "with a bijection from the real line.*got"),
        (GOOD, constraints.sphere, MethodError, "with a bijection from the real line.*got Sphere"),
        (GOOD, "positive", MethodError, "with a bijection from the real line.*got 'positive'"),
        (GOOD, constraints.zero_sum(1), MethodError, "with a bijection from the real line.*got"),
    ],
)  # fmt: skip
def test_supports_are_checked(samples, support, error, match):
    with pytest.raises(error, match=match):
        FlowPrior.fit(samples, support=support)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"flow": "block_autoregressive"},
            MethodError,
            "sampler are both in closed form.*got Flow.*block_auto",
        ),
        ({"flow": "spline"}, MethodError, "flow= takes one of"),
        ({"training": 3}, ArgumentError, r"training= takes pf.Training\(...\); got int"),
        ({"training": Training(source="stream")}, MethodError, "cannot draw new ones; got source='stream'"),
        ({"key": 1.5}, ArgumentError, "key= takes an integer or one typed key"),
        ({"key": True}, ArgumentError, "got bool"),
        ({"progress": 1}, ArgumentError, "progress= takes True or False; got 1"),
    ],
)
def test_options_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        FlowPrior.fit(GOOD, **options)


def test_repeated_samples_are_warned_of(monkeypatch):
    monkeypatch.setattr(
        flow_prior, "_trained", lambda white, flow, *rest: flow_prior._start(flow, 2, jax.random.key(0))
    )
    with pytest.warns(UserWarning, match="75% of samples repeat others.*thin the chain"):
        FlowPrior.fit(np.repeat(GOOD, 4, axis=0), flow=FLOW, progress=False)


def test_a_fit_that_diverges_says_so(monkeypatch):
    monkeypatch.setattr(flow_prior, "_loss", lambda flow, d, shape, weights, batch, key: jnp.nan * batch[:, 0])
    with pytest.raises(InferenceError, match="no finite density of the samples held out"):
        FlowPrior.fit(GOOD, flow=FLOW, training=Training(epochs=1), progress=False)
