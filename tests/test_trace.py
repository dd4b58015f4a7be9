"""The densities that are read equal NumPyro's, for every kind of statement and in both coordinate systems.

The yardstick is `numpyro.infer.util.log_density` in float64 plus the logarithm of the Jacobian determinant of our map
from coordinates to sites, by automatic differentiation. All comparisons are exact up to rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density

from pushforward.model import _trace
from pushforward.model.inverse import read_problem

MODELS = {}


def model(data):
    """Registers a model of one argument `y`."""

    def add(fn):
        MODELS[fn.__name__] = (fn, data)
        return fn

    return add


THREE = [0.5, 1.0, -0.3]
SERIES = [0.5, 1.0, 0.2, -0.4]


def normal(name, location=0.0, scale=1.0):
    return numpyro.sample(name, dist.Normal(location, scale))


def observe(location, y, scale=1.0):
    numpyro.sample("y", dist.Normal(location, scale), obs=y)


@model([THREE, THREE])
def nested_plates(y):
    with numpyro.plate("rows", 2, dim=-2):
        a = normal("a")
        with numpyro.plate("columns", 3):
            b = numpyro.sample("b", dist.Gamma(2.0, 1.0 + a**2))
            observe(b, y)


@model(THREE)
def deterministic_and_factor(y):
    square = numpyro.deterministic("square", normal("m", 1.0, 2.0) ** 2)
    numpyro.factor("penalty", -square)
    observe(square, y)


@model(THREE)
def scaled(y):
    # HalfCauchy has an exact map; a mixture goes through `biject_to` and owes a correction, which must not be scaled.
    with handlers.scale(scale=2.5):
        a = numpyro.sample("a", dist.HalfCauchy(1.0))
        mixture = dist.MixtureSameFamily(
            dist.Categorical(probs=jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-1, 1.0]), 1.0)
        )
        b = numpyro.sample("b", mixture)
    with handlers.scale(scale=0.3):
        observe(a + b, y)


@model(THREE)
def masked_data(y):
    m = normal("m")
    with handlers.mask(mask=jnp.array([True, False, True])):
        observe(m, y)


@model(THREE)
def reparametrised(y):
    location, scale = normal("location"), numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with handlers.reparam(config={"t": LocScaleReparam(0.3)}):
        t = numpyro.sample("t", dist.Normal(location, scale).expand([3]).to_event(1))
    observe(t, y)


@model(THREE)
def sample_shapes(y):
    t = numpyro.sample("t", dist.Normal(0, 1), sample_shape=(3,))
    u = numpyro.sample("u", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2) + 0.3), sample_shape=(2,))
    observe(t + u.sum(), y)


@model(THREE)
def vector_and_matrix_events(y):
    root = jnp.array([[1.0, 0], [0.5, 2]])
    w = numpyro.sample("w", dist.MatrixNormal(jnp.zeros((2, 3)), root, jnp.eye(3)))
    with numpyro.plate("p", 2):
        v = numpyro.sample("v", dist.MultivariateNormal(jnp.ones(3), 2 * jnp.eye(3)))
    numpyro.sample("y", dist.Normal(w.sum(0) + v.sum(0), 1).to_event(1), obs=y)


@model(THREE)
def supports_that_depend_on_parameters(y):
    a = numpyro.sample("a", dist.LogNormal(0.0, 1.0))
    u = numpyro.sample("u", dist.Uniform(0.0, a))
    w = numpyro.sample("w", dist.Uniform(-a, u + 1).expand([3]).to_event(1))
    t = numpyro.sample("t", dist.TruncatedNormal(0.0, 1.0, low=a))
    observe(w + t, y, u)


@model(THREE)
def sites_in_cond(y):
    m = normal("m")
    observe(cond(m > 0, lambda _: normal("c", 0.0, 1.0), lambda _: normal("c", 5.0, 2.0), None), y)


@model(SERIES)
def walk_with_parameters(y):
    rho, x0 = numpyro.sample("rho", dist.Uniform(0, 1)), normal("x0", 0, 2)
    s = numpyro.sample("s", dist.HalfNormal(1.0))

    def step(x, y):
        x = normal("x", rho * x, s)
        observe(x, y, 0.3)
        return x, x

    scan(step, x0, y)


@model([SERIES[:2], SERIES[2:], SERIES[:2]])
def scan_with_a_pytree_as_carry(y):
    x0 = numpyro.sample("x0", dist.Normal(0, 1).expand([2]).to_event(1))

    def step(carry, y):
        x = numpyro.sample("x", dist.Normal(carry["x"] + carry["v"], 1.0).to_event(1))
        v = numpyro.sample("v", dist.MultivariateNormal(0.1 * x, 0.5 * jnp.eye(2)))
        g = numpyro.sample("g", dist.Gamma(2.0 + carry["steps"], 1.0))
        numpyro.deterministic("total", x.sum())
        numpyro.factor("penalty", -(v[0] ** 4))
        numpyro.sample("y", dist.Normal(x, g).to_event(1), obs=y)
        return {"x": x, "v": v, "steps": carry["steps"] + 1}, None

    scan(step, {"x": x0, "v": jnp.zeros(2), "steps": 0}, y)


@model(SERIES)
def scan_with_moving_supports(y):
    a = numpyro.sample("a", dist.LogNormal(0.0, 0.3))

    def step(x, y):
        x = numpyro.sample("x", dist.Uniform(0.0, a + x**2))
        observe(x, y, 0.3)
        return x, None

    scan(step, 1.0, y)


@model([SERIES[:2], SERIES[2:], SERIES[:2]])
def scan_with_plate_and_scale(y):
    def step(x, y):
        with numpyro.plate("p", 2), handlers.scale(scale=0.5):
            x = numpyro.sample("x", dist.Gamma(1 + x, 1.0))
            observe(x, y, 0.3)
        return x, None

    with handlers.scale(scale=3.0):
        scan(step, jnp.ones(2), y)


@model(SERIES)
def reversed_scan(y):
    r = normal("r")

    def step(x, y):
        x = normal("x", r * x, 1.0)
        observe(x, y, 0.3)
        return x, None

    scan(step, 1.0, y, reverse=True)


@model(SERIES)
def two_scans(y):
    def step(x, y):
        x = normal("x", x, 1.0)
        observe(x, y, 0.3)
        return x, x

    def second(w, x):
        with handlers.reparam(config={"w": LocScaleReparam(0.0)}):
            w = numpyro.sample("w", dist.Normal(x, 1.0))
        return w, None

    _, xs = scan(step, 1.0, y)
    last, _ = scan(second, 0.0, xs)
    numpyro.factor("penalty", -(last**2))


def numpyro_density(fn, y, sites):
    """NumPyro's log density; it hands the values of a reversed scan out in the order of the run, not of time."""
    if fn is reversed_scan:
        sites = sites | {"x": sites["x"][::-1]}
    return log_density(fn, (y,), {}, sites)[0]


def flat_sites(sites):
    return jnp.concatenate([jnp.ravel(value) for _, value in sorted(sites.items())])


@pytest.mark.parametrize("name", MODELS)
def test_density_in_both_coordinates(name, float64):
    fn, data = MODELS[name]
    y = jnp.array(data)
    problem = read_problem(fn, (y,))
    rng = np.random.default_rng(3)
    z = jnp.asarray(rng.normal(size=problem.dimension))
    position = {n: jnp.asarray(rng.normal(size=s)) for n, s in problem.unconstrained_shapes().items()}

    @jax.jit
    def both(z, position):
        start, unravel = ravel_pytree(position)

        def sites_at(v):
            return flat_sites(problem.evaluate_unconstrained(unravel(v)).sites)

        by_noise = jnp.linalg.slogdet(jax.jacfwd(lambda z: flat_sites(problem.constrain(z)))(z))[1]
        by_position = jnp.linalg.slogdet(jax.jacfwd(sites_at)(start))[1]
        found, other = problem.evaluate(z), problem.evaluate_unconstrained(position)
        given = problem.evaluate_sites(found.sites)
        return {
            "z": (problem.log_density(z), numpyro_density(fn, y, found.sites) + by_noise),
            "numpyro": (-problem.potential(position), numpyro_density(fn, y, other.sites) + by_position),
            "values": (sum(map(jnp.sum, given.log_prior.values())), sum(map(jnp.sum, found.log_prior.values()))),
            "values, data": (given.log_likelihood["y"], found.log_likelihood["y"]),
        }

    for coordinates, (density, exact) in both(z, position).items():
        np.testing.assert_allclose(density, exact, rtol=1e-9, atol=1e-9, err_msg=coordinates)


def test_condition_and_substitute_outside_the_model(float64):
    y = jnp.array(THREE)
    model = handlers.substitute(handlers.condition(walk_free, {"y": y}), {"s": 1.3})
    problem = read_problem(model)
    assert list(problem.structure.slots) == ["m"]
    z = jnp.array([0.4])
    expected = log_density(walk_free, (), {}, {"m": 0.4, "s": 1.3, "y": y})[0]
    np.testing.assert_allclose(problem.log_density(z), expected, rtol=1e-10)
    np.testing.assert_allclose(-problem.potential({"m": z[0]}), expected, rtol=1e-10)
    assert set(problem.evaluate(z).sites) == {"m"}
    assert problem.predict_at({"m": z[0]}, jax.random.key(0)).data["y"].shape == (3,)


def walk_free():
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    m = normal("m")
    numpyro.sample("y", dist.StudentT(3.0, m, s).expand([3]))


def test_a_parameter_that_is_substituted_is_a_constant(float64):
    def fitted(y):
        observe(normal("m") * numpyro.param("k", 1.0), y)

    problem = read_problem(handlers.substitute(fitted, {"k": 2.0}), (jnp.array(THREE),))
    expected = dist.Normal(0.8, 1.0).log_prob(jnp.array(THREE)).sum()
    np.testing.assert_allclose(problem.log_likelihood(jnp.array([0.4])), expected, rtol=1e-10)


# ---------------------------------------------------------------------------------------- the undocumented message


class Recorder(numpyro.primitives.Messenger):
    """Collects what NumPyro sends about a scan."""

    def __init__(self, fn):
        super().__init__(fn)
        self.messages, self.after = [], {}

    def process_message(self, msg):
        if msg["type"] == "control_flow":
            self.messages.append(dict(msg))
        elif msg["type"] == "sample":
            self.after[msg["name"]] = dict(msg)


def test_numpyro_still_sends_the_scan_as_we_read_it():
    """If this fails, NumPyro changed a message that has no public specification: read model/_trace.py again."""
    inside = []

    def step(x, y):
        x = normal("x", x, 1.0)
        observe(x, y, 0.3)
        return x, None

    def chain(y):
        scan(step, 0.0, y)

    def note(site):
        if site["type"] == "sample" and not site.get("_control_flow_done"):
            inside.append((site["name"], site["infer"].get("_scan_current_index")))
        return jnp.zeros(()) if site["name"] == "x" else None

    recorder = Recorder(chain)
    handlers.substitute(recorder, substitute_fn=note)(jnp.zeros(4))
    (message,) = recorder.messages
    body, start, xs, length, reverse = message["args"]
    assert callable(body)
    assert (start, xs.shape, length, reverse) == (0.0, (4,), None, False)
    assert "substitute_stack" in message["kwargs"]
    assert [name for name, _ in inside] == ["x", "y"]
    assert all(isinstance(step, jax.core.Tracer) for _, step in inside)
    assert recorder.after["x"]["_control_flow_done"] is True
    assert recorder.after["x"]["value"].shape == (4,)
    assert "_scan_current_index" in recorder.after["x"]["infer"]


def test_a_site_in_a_scan_is_found_there():
    problem = read_problem(walk_with_parameters, (np.array(SERIES),))
    slots = problem.structure.slots
    assert {n: (s.steps, s.shape) for n, s in slots.items()} == {
        "rho": (None, ()), "x0": (None, ()), "s": (None, ()), "x": (4, (4,)),
    }  # fmt: skip


def test_simulating_a_scan_draws_each_step_anew():
    problem = read_problem(walk_with_parameters, (np.array(SERIES),))
    sites, data, noise = problem.simulate(jax.random.key(1), 2000)
    assert (sites["x"].shape, data["y"].shape, noise.shape) == ((2000, 4), (2000, 4), (2000, 7))
    # y - x ~ N(0, 0.3^2), independent over steps. Seven tests at |z| < 4: false-alarm rate 5e-4.
    residual = np.asarray(data["y"] - sites["x"]) / 0.3
    np.testing.assert_allclose(residual.mean(0), 0, atol=4 / 2000**0.5)
    correlations = np.corrcoef(residual.T)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(correlations, 0, atol=4 / 2000**0.5)


def test_reversed_scan_is_predicted_in_the_order_of_time():
    problem = read_problem(reversed_scan, (np.array(SERIES),))
    values = {"r": jnp.zeros(()), "x": jnp.array([100.0, 200.0, 300.0, 400.0])}
    predicted = problem.predict_at(values, jax.random.key(0)).data["y"]
    np.testing.assert_allclose(predicted, values["x"], atol=0.3 * 6)


def test_correction_of_inexact_maps_is_no_site():
    problem = read_problem(scaled, (np.array(THREE),))
    found = problem.evaluate(jnp.zeros(problem.dimension))
    names = {*found.sites, *found.deterministics, *found.data, *found.log_prior, *found.log_likelihood}
    assert not any(name.startswith(_trace._CORRECTION) for name in names)
    assert not problem.exact_prior
