"""What is read of a model: roles, dims, kinds of arguments, when it is read again, and what is refused."""

import functools
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from numpyro import handlers
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward._errors import DataError, ModelError
from pushforward.model.inverse import read_problem

X, Y = np.linspace(-1.0, 1.0, 4), np.array([0.1, 0.2, 0.5, 0.9])


def normal(name="m", location=0.0, scale=1.0):
    return numpyro.sample(name, dist.Normal(location, scale))


def observe(location, y, scale=1.0):
    numpyro.sample("y", dist.Normal(location, scale), obs=y)


def slope(x, y=None):
    observe(normal() * x, y)


def posterior_mean(model, *args, **kwargs):
    """Posterior mean of m by quadrature over our own density."""
    problem = read_problem(model, args, kwargs)
    grid = jnp.linspace(-6, 6, 201)
    weights = jax.nn.softmax(jax.jit(jax.vmap(lambda m: problem.log_density(m[None])))(grid))
    return float(weights @ grid)


EXACT = X @ Y / (1 + X @ X)


# --------------------------------------------------------------------------------------------------- roles and dims


def test_roles_shapes_and_dims():
    def model(x, groups, y=None):
        mu = normal("mu")
        with numpyro.plate("group", groups):
            theta = normal("theta", mu)
            with numpyro.plate("repeat", 2, dim=-2):
                eta = numpyro.sample("eta", dist.Normal(theta[..., None], 1.0).expand([2, 3, 5]).to_event(1))
        numpyro.deterministic("twice", 2 * mu)
        numpyro.factor("penalty", -(eta.sum() ** 2))
        observe(mu * x, y)

    sites = pf.describe(model, X, 3, y=Y).sites
    assert {n: (s.role, s.shape, s.dims) for n, s in sites.items()} == {
        "mu": ("parameter", (), ()),
        "theta": ("parameter", (3,), ("group",)),
        "eta": ("parameter", (2, 3, 5), ("repeat", "group", None)),
        "twice": ("deterministic", (), ()),
        "penalty": ("factor", (0,), (None,)),
        "y": ("data", (4,), (None,)),
    }
    assert pf.describe(model, X, 3, observed="y").sites["y"].role == "data"


def test_dims_in_a_scan(series):
    model, data = series
    sites = pf.describe(model, **data).sites
    assert (sites["x"].dims, sites["y"].dims) == (("time",), ("time",))
    assert pf.describe(model, steps=7, observed="y").sites["x"].shape == (7,)


# --------------------------------------------------------------------------------------------------------- arguments


def indexed(d):
    observe(normal() * d["x"], d["y"])


class Grid(eqx.Module):
    x: jax.Array
    power: int

    @property
    def values(self):
        return self.x**self.power


class Slope:
    def __init__(self, x):
        self.x = x

    def __call__(self, y):
        observe(normal() * self.x, y)


def by_grid(grid, y):
    observe(normal() * grid.values, y)


@pytest.mark.parametrize(
    ("model", "args", "kwargs"),
    [
        (slope, (X, Y), {}),
        (slope, (pd.Series(X), pd.Series(Y)), {}),
        (slope, (xr.DataArray(X, dims="t"),), {"y": xr.DataArray(Y, dims="t")}),
        (indexed, ({"x": X, "y": Y},), {}),
        (by_grid, (Grid(jnp.asarray(X), 1), Y), {}),
        (functools.partial(slope, X), (), {"y": Y}),
        (Slope(X), (Y,), {}),
        (Slope(X).__call__, (Y,), {}),
        (lambda y: observe(normal() * X, y), (Y,), {}),
        (handlers.condition(slope, {"y": jnp.asarray(Y)}), (X,), {}),
    ],
    ids=["positional", "pandas", "xarray", "dict", "equinox", "partial", "callable", "method", "lambda", "condition"],
)
def test_every_kind_of_argument_and_model(model, args, kwargs):
    # quadrature on 201 points is exact to far below float32
    assert posterior_mean(model, *args, **kwargs) == pytest.approx(EXACT, abs=1e-5)


def test_static_fields_of_a_module_count():
    power = X**2 @ Y / (1 + X**2 @ X**2)
    assert posterior_mean(by_grid, Grid(jnp.asarray(X), 2), Y) == pytest.approx(power, abs=1e-5)


def test_integers_size_plates_and_booleans_branch():
    def model(n, flip, y):
        with numpyro.plate("p", n):
            normal("w")
        m = normal()
        observe(-m if flip else m, y)

    for n in (3, np.int64(5)):
        assert pf.describe(model, n, False, Y).sites["w"].shape == (n,)
    forward, backward = (posterior_mean_of_m(model, flip) for flip in (False, np.bool_(True)))
    assert forward == pytest.approx(Y.sum() / 5, abs=1e-5)
    assert backward == pytest.approx(-forward, abs=1e-6)


def posterior_mean_of_m(model, flip):
    problem = read_problem(model, (1, flip, Y))
    gradient = jax.grad(problem.log_density)(jnp.zeros(2))
    return float(gradient[1] / (1 + len(Y)))


FACTOR = np.array(1.0)


def by_global(y):
    observe(normal() * FACTOR, y)


def test_a_changed_global_array_is_seen(monkeypatch):
    expected = {1.0: Y.sum() / 5, 2.0: 2 * Y.sum() / 17}
    assert posterior_mean(by_global, Y) == pytest.approx(expected[1.0], abs=1e-5)
    monkeypatch.setitem(globals(), "FACTOR", np.array(2.0))
    assert posterior_mean(by_global, Y) == pytest.approx(expected[2.0], abs=1e-5)
    FACTOR[...] = 1.0
    assert posterior_mean(by_global, Y) == pytest.approx(expected[1.0], abs=1e-5)


def test_a_changed_closure_or_attribute_is_seen():
    factor, instance = 1.0, Slope(X)

    def model(y):
        observe(normal() * factor, y)

    before = posterior_mean(model, Y), posterior_mean(instance, Y)
    factor, instance.x = 2.0, -X
    after = posterior_mean(model, Y), posterior_mean(instance, Y)
    assert before == pytest.approx((Y.sum() / 5, EXACT), abs=1e-5)
    assert after == pytest.approx((2 * Y.sum() / 17, -EXACT), abs=1e-5)


def test_equal_models_are_one_structure():
    def make():
        return lambda y: observe(normal(), y)

    first, second = read_problem(make(), (Y,)), read_problem(make(), (Y + 1,))
    assert first.structure is second.structure
    assert read_problem(make(), (Y[:3],)).structure is not first.structure


def test_a_model_that_branches_on_data_is_read_with_one_warning():
    def model(y):
        m = normal()
        observe(m if y[0] > 0 else -m, y)

    with pytest.warns(UserWarning, match="needs concrete arrays") as caught:
        up = posterior_mean(model, Y)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="needs concrete arrays"):
        assert posterior_mean(model, -Y) == pytest.approx(up, abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior_mean(model, Y)


# ------------------------------------------------------------------------------------- simulation and prediction


def test_simulate_draws_from_prior_and_likelihood():
    problem = read_problem(slope, (X,), {}, ("y",))
    sites, data, noise = problem.simulate(jax.random.key(0), 4000)
    np.testing.assert_allclose(sites["m"], noise[:, 0], rtol=1e-6)
    # m ~ N(0, 1), y - m x ~ N(0, 1). Five means at |z| < 4: false-alarm rate 3e-4; variances within 6 sd.
    residual = np.asarray(data["y"] - sites["m"][:, None] * X)
    for values in (np.asarray(sites["m"])[:, None], residual):
        np.testing.assert_allclose(values.mean(0), 0, atol=4 / 4000**0.5)
        np.testing.assert_allclose(values.var(0), 1, atol=6 * (2 / 4000) ** 0.5)


def test_a_deterministic_site_may_be_data():
    def model(x):
        numpyro.deterministic("prediction", normal() * x)

    problem = read_problem(model, (X,), {}, ("prediction",))
    sites, data, _ = problem.simulate(jax.random.key(0), 3)
    np.testing.assert_allclose(data["prediction"], sites["m"][:, None] * X, rtol=1e-6)
    assert problem.why_not_gaussian() == "site 'prediction' is a numpyro.deterministic, which has no noise"


def test_forward_is_mean_and_noise():
    def model(x, y):
        m = normal()
        numpyro.sample("y", dist.Normal(m * x, 0.5).to_event(1), obs=y)
        covariance = jnp.eye(2) + 0.3
        numpyro.sample("w", dist.MultivariateNormal(m * jnp.ones(2), covariance), obs=y[:2])

    found = read_problem(model, (X, Y)).forward(jnp.array([2.0]))
    np.testing.assert_allclose(found.mean["y"], 2 * X, rtol=1e-6)
    np.testing.assert_allclose(found.noise["y"], np.full(4, 0.5), rtol=1e-6)
    np.testing.assert_allclose(found.noise["w"], np.eye(2) + 0.3, rtol=1e-6)
    np.testing.assert_allclose(found.data["w"], Y[:2], rtol=1e-6)


@jax.jit
def tangled(a, b):
    """Outputs that each depend on one input; provenance through `jit` must not mix them."""
    return 2 * a, b + 1


def noise_in_scan(y, latent):
    s = numpyro.sample("s", dist.HalfNormal(1.0))

    def step(x, y):
        x = normal("x", x, s)
        observe(x, y, s if latent else 0.1)
        return x, None

    scan(step, 0.0, y)


def jitted_mean(y):
    mean, scale = tangled(normal(), 1.0)
    observe(mean, y, scale)


GAUSSIAN = {
    "jitted mean": (jitted_mean, None),
    "jitted noise": (lambda y: observe(0.0, y, tangled(1.0, normal() ** 2)[1]), r"noise of site 'y' depends .*\['m'\]"),
    "scan": (lambda y: noise_in_scan(y, False), None),
    "scan with latent noise": (lambda y: noise_in_scan(y, True), r"depends on the latent sites \['s'\]"),
    "family": (lambda y: numpyro.sample("y", dist.StudentT(3.0, normal()), obs=y), "is StudentT, not Normal"),
    "mask": (lambda y: numpyro.sample("y", dist.Normal(normal()).mask(y > 0.3), obs=y), "stands under handlers.mask"),
    "factor": (lambda y: (observe(normal(), y), numpyro.factor("f", 1.0)), "is a numpyro.factor"),
}


@pytest.mark.parametrize("name", GAUSSIAN)
def test_why_not_gaussian(name):
    model, reason = GAUSSIAN[name]
    found = read_problem(model, (Y,)).why_not_gaussian()
    assert found is None if reason is None else re.search(reason, found)


# ----------------------------------------------------------------------------------------------------------- refusals


def masked_latent(y):
    with handlers.mask(mask=jnp.array(False)):
        m = normal()
    observe(m, y)


def masked_in_scan(y):
    def step(x, y):
        with handlers.mask(mask=y > 0):
            x = normal("x", x)
        observe(x, y)
        return x, None

    scan(step, 0.0, y)


def subsampled(y):
    m = normal()
    with numpyro.plate("rows", 4, subsample_size=2):
        observe(m, numpyro.subsample(y, 0))


def subsampled_in_scan(y):
    def step(x, y):
        with numpyro.plate("rows", 4, subsample_size=2):
            normal("w")
        x = normal("x", x)
        observe(x, y)
        return x, None

    scan(step, 0.0, y)


def nested_scan(y):
    def inner(x, _):
        return normal("x", x), None

    def outer(x, y):
        x, _ = scan(inner, x, jnp.zeros(2))
        observe(x, y)
        return x, None

    scan(outer, 0.0, y)


def plain_scan(y):
    jax.lax.scan(lambda x, _: (normal("x", x), None), 0.0, y)
    observe(0.0, y)


def sample_shape_in_scan(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(0, 1), sample_shape=(2,))
        observe(x.sum(), y)
        return x, None

    scan(step, jnp.zeros(2), y)


def branching(y):
    m = normal()
    observe(m if m > 0 else -m, y)


counter = iter(range(1000))
generator = np.random.default_rng(0)

REFUSED = {
    "improper": (
        lambda y: observe(numpyro.sample("k", dist.ImproperUniform(dist.constraints.real, (), ())), y),
        "'k' .*ImproperUniform.*proper",
    ),
    "param": (lambda y: observe(numpyro.param("k", 1.0) + normal(), y), r"'k' is a numpyro.param.*substitute"),
    "subsample": (subsampled, r"plate 'rows' subsamples 2 of 4 rows.*Drop subsample_size"),
    "subsample in scan": (subsampled_in_scan, r"plate 'rows' subsamples 2 of 4 rows"),
    "mask": (masked_latent, r"latent site 'm' stands under numpyro.handlers.mask.*around the observed sites"),
    "mask in scan": (masked_in_scan, r"latent site 'x' stands under numpyro.handlers.mask"),
    "other sites": (
        lambda y: observe(normal(f"m{next(counter)}"), y),
        r"changes from run to run: sites \['m\d+', 'm\d+'\]",
    ),
    "other constants": (lambda y: observe(normal() * generator.normal(), y), r"changes from run to run: a constant"),
    "prng_key": (lambda y: observe(normal() + jax.random.normal(numpyro.prng_key()), y), r"numpyro.prng_key.*argument"),
    "branch": (branching, r"depends on a latent site \(after site 'm'\).*jax.numpy.where"),
    "nested scan": (nested_scan, "inside the body of a scan.*jax.lax.scan"),
    "jax scan": (plain_scan, r"'x'.*stands inside jax.lax.scan.*control_flow.scan"),
    "sample_shape in scan": (sample_shape_in_scan, r"'x' stands in a scan and has a sample_shape.*expand"),
    "two of a name": (lambda y: observe(normal() + normal(), y), r"after site 'm' with AssertionError.*`m` duplicated"),
    "prior": (lambda y: observe(normal("m", 0.0, -1.0), y), r"prior of site 'm' \(Normal\).*scale is -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_site_and_the_way_out(name):
    model, text = REFUSED[name]
    with pytest.raises(ModelError, match=text):
        read_problem(model, (Y,))


def test_errors_of_the_model_keep_their_cause():
    def model(x, y):
        observe(normal() * (x @ jnp.ones(2)), y)

    with pytest.raises(
        ModelError, match=r"stopped after site 'm' with TypeError.*arrays of shape \(4,\), \(4,\)"
    ) as caught:
        read_problem(model, (X, Y))
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize(
    ("law", "y", "text"),
    [
        (dist.Normal(jnp.zeros(3)), Y, r"shape \(4,\), but the model predicts shape \(3,\) \(Normal\)"),
        (dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3)), Y, r"shape \(4,\).*\(3,\) \(MultivariateNormal\)"),
        (dist.Normal(jnp.zeros(3)).to_event(1), Y[0], r"shape \(\).*\(3,\)"),
    ],
)
def test_data_of_the_wrong_shape(law, y, text):
    def model(y):
        normal()
        numpyro.sample("y", law, obs=y)

    with pytest.raises(DataError, match=text):
        read_problem(model, (y,))


def test_silent_broadcasting_of_data_is_pointed_out():
    def model(x, y):
        observe(normal() * x[:, None], y)

    with pytest.warns(UserWarning, match=r"'y' of shape \(4,\) are compared with predictions of shape \(4, 4\)"):
        pf.infer(model, method="laplace", draws=2, progress=False, x=X, y=Y)
