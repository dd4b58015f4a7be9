"""Models read as densities of whole trajectories: against NumPyro's own density, site by site, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from pushforward._errors import ModelError
from pushforward.model import series
from pushforward.model.inverse import read_problem


def everything(y=None, y0=None, counts=None, steps=6):
    """Two parameters, a counter in the carry, two kinds of data, the first state observed, a factor of all states."""
    decay = numpyro.sample("decay", dist.Normal(0.9, 0.1))
    gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.1))
    x0 = numpyro.sample("x0", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("y0", dist.Normal(x0[0], 0.3), obs=y0)

    def step(carry, data):
        (x, t), (seen, counted) = carry, (None, None) if data is None else data
        x = numpyro.sample("x", dist.Normal(decay * x[::-1], 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x[0] * gain, 0.1), obs=seen)
        numpyro.sample("counts", dist.Poisson(jnp.exp(x[1] + 0.1 * t)), obs=counted)
        return (x, t + 1), x

    _, xs = scan(step, (x0, 0), None if y is None else (y, counts), length=steps)
    numpyro.factor("mean", dist.Normal(xs[:, 0].mean(), 0.1).log_prob(0.3))


def data():
    r = np.random.default_rng(0)
    y = r.normal(size=6)
    y[2] = np.nan
    return {"y": y, "y0": 0.2, "counts": r.poisson(1.0, 6).astype(float)}


def read(model, **arguments):
    problem = read_problem(model, (), arguments)
    return problem, series.read_series(problem)


def drawn(problem, key=0):
    sites, _, _ = problem.simulate(jax.random.key(key), 1)
    return {n: v[0] for n, v in sites.items()}


def test_densities_are_those_of_the_model(float64):
    problem, read_model = read(everything, **data())
    values = drawn(problem)
    trajectory = read_model.trajectory(values)
    assert trajectory.shape == (7, 2)
    np.testing.assert_array_equal(trajectory[0], values["x0"])
    for name, value in read_model.values(trajectory).items():
        np.testing.assert_array_equal(value, values[name])
    reading = read_model.reading({n: values[n] for n in ("decay", "gain")})
    whole = problem.evaluate_sites(values)
    np.testing.assert_allclose(reading.log_likelihood(trajectory), whole.total_log_likelihood, rtol=1e-12)
    prior = sum(jnp.sum(whole.log_prior[n]) for n in ("x", "x0"))
    np.testing.assert_allclose(reading.log_prior(trajectory), prior, rtol=1e-12)


def test_what_is_seen_and_which_parameters_it_needs(float64):
    problem, read_model = read(everything, **data())
    values = drawn(problem)
    seen = read_model.reading({n: values[n] for n in ("decay", "gain")}).seen(read_model.trajectory(values))
    assert seen.mean.shape == (13,)
    assert seen.terms.shape == (1,)
    assert int(jnp.isnan(seen.data).sum()) == 1
    # y, y0, counts, in the order of the names.
    names = read_model.structure.remembered["kinds"][0]
    assert sorted(names) == ["counts", "y", "y0"]
    where = names.index("counts")
    start = sum({"y": 6, "y0": 1, "counts": 6}[n] for n in names[:where])
    rates = jnp.exp(values["x"][:, 1] + 0.1 * jnp.arange(6))
    np.testing.assert_allclose(seen.mean[start : start + 6], rates, rtol=1e-12)
    np.testing.assert_allclose(seen.variances[start : start + 6], rates, rtol=1e-12)
    needed = series.needed_parameters(read_model)
    assert needed == {"y": {"gain"}, "counts": set(), "y0": set(), "mean": set()}


def positive(y=None, steps=5):
    """A state with a support that is not the whole line, and a first state with another law."""

    def step(x, y):
        x = numpyro.sample("x", dist.LogNormal(0.5 * jnp.log(x), 0.3))
        numpyro.sample("y", dist.Normal(jnp.sqrt(x), 0.1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Gamma(2.0, 1.0)), y, length=steps)


def test_unconstrained_coordinates_are_numpyros(float64):
    problem, read_model = read(positive, y=np.arange(1.0, 6.0))
    trajectory = 0.3 * jax.random.normal(jax.random.key(1), (6, 1))
    positions = read_model.positions(trajectory)
    reading = read_model.reading({})
    joint = reading.log_prior(trajectory) + reading.log_likelihood(trajectory)
    np.testing.assert_allclose(joint, -problem.potential(positions), rtol=1e-12)
    np.testing.assert_allclose(read_model.trajectory(read_model.values(trajectory)), trajectory, rtol=1e-12)


def test_correlated_noise_is_whitened_without_what_is_missing(float64):
    noise = np.array([[1.0, 0.8, 0.1], [0.8, 1.0, 0.2], [0.1, 0.2, 0.5]])

    def model(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
            numpyro.sample("y", dist.MultivariateNormal(x, noise), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0, 1).expand([3]).to_event(1)), y)

    y = np.random.default_rng(0).normal(size=(4, 3))
    y[1, 1] = np.nan
    problem, read_model = read(model, y=y)
    values = drawn(problem)
    trajectory = read_model.trajectory(values)
    seen = read_model.reading({}).seen(trajectory)
    away = jnp.where(jnp.isnan(seen.data), 0.0, seen.data - seen.mean)
    differences = problem.evaluate_sites(values).log_likelihood["y"]
    # Constants aside, the log density is minus half of the squares.
    rows = [0, 2, 3]
    constant = -0.5 * np.linalg.slogdet(noise)[1] - 1.5 * np.log(2 * np.pi)
    squares = jnp.sum(away.reshape(4, 3) ** 2, 1)
    np.testing.assert_allclose(differences[np.array(rows)], constant - 0.5 * squares[np.array(rows)], rtol=1e-10)
    part = noise[np.ix_([0, 2], [0, 2])]
    constant = -0.5 * np.linalg.slogdet(part)[1] - np.log(2 * np.pi)
    np.testing.assert_allclose(differences[1], constant - 0.5 * squares[1], rtol=1e-10)


def observed_by(law):
    def model(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", law(x), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(0, 1)), y)

    return model


@pytest.mark.parametrize(
    ("law", "described"),
    [
        (lambda x: dist.Normal(x**2, 0.1), True),
        (lambda x: dist.Poisson(jnp.exp(x)), True),
        (lambda x: dist.NegativeBinomial2(jnp.exp(x), 3.0), True),
        (lambda x: dist.Normal(0.0, jnp.exp(x)), False),
        (lambda x: dist.StudentT(4.0, x, 0.1), True),
        (lambda x: dist.Bernoulli(logits=x), True),
        (lambda x: dist.Cauchy(x, 1.0), False),
        (lambda x: dist.StudentT(4.0, 0.0, jnp.exp(x)), False),
    ],
)
def test_mean_and_variance_describe_sites_whose_mean_follows_the_state(law, described):
    _, read_model = read(observed_by(law), y=np.array([1.0, 0.0, 1.0]))
    assert read_model.structure.remembered["kinds"] == ((("y",), ()) if described else ((), ("y",)))


def test_a_known_first_state_is_no_row():
    def model(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.1), obs=y)
            return x, None

        scan(step, 1.5, y)

    problem, read_model = read(model, y=np.zeros(4))
    values = drawn(problem)
    trajectory = read_model.trajectory(values)
    assert trajectory.shape == (4, 1)
    prior = jnp.sum(problem.evaluate_sites(values).log_prior["x"])
    np.testing.assert_allclose(read_model.reading({}).log_prior(trajectory), prior, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- refusals


def chain(step, first=lambda: numpyro.sample("x0", dist.Normal(0, 1))):
    def model(y):
        scan(step, first(), y)

    return model


def non_centred(x, y):
    e = numpyro.sample("e", dist.Normal(0, 1))
    x = 0.9 * x + 0.5 * e
    numpyro.sample("y", dist.Normal(x, 0.1), obs=y)
    return x, None


def without_noise(x, y):
    x = numpyro.deterministic("x", 0.9 * x)
    numpyro.sample("y", dist.Normal(x, 0.1), obs=y)
    return x, None


def centred(x, y):
    x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
    numpyro.sample("y", dist.Normal(x, 0.1), obs=y)
    return x, None


def switching(x, y):
    regime = numpyro.sample("regime", dist.Bernoulli(0.3))
    x = numpyro.sample("x", dist.Normal(0.9 * x + regime, 0.5))
    numpyro.sample("y", dist.Normal(x, 0.1), obs=y)
    return x, None


def late(y):
    x, _ = scan(centred, numpyro.sample("x0", dist.Normal(0, 1)), y)
    numpyro.sample("end", dist.Normal(x, 1.0))


def unscanned(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (chain(non_centred), r"carry of the scan is not what its step samples, \['e'\]"),
        (chain(without_noise), "no site of the scan is sampled"),
        (chain(switching), "'regime' .* is discrete"),
        (chain(centred, lambda: 2 * numpyro.sample("x0", dist.Normal(0, 1))), r"first carry is not what .*\['x0'\]"),
        (late, "'end' is sampled after the scan"),
        (unscanned, "no numpyro scan"),
    ],
)
def test_what_is_no_trajectory_is_refused(model, said):
    problem = read_problem(model, (), {"y": np.zeros(4)})
    with pytest.raises(ModelError, match=said):
        series.read_series(problem)
