"""`infer` compiles once, counts, names and times; keys, `auto`, scans under NUTS."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pushforward as pf
from pushforward.methods import NAMES


class Counter:
    """Counts runs of a model's Python body; without attributes of its own it does not change a fingerprint."""

    __slots__ = ("value",)

    def __init__(self):
        self.value = 0


def counted():
    counter = Counter()

    def model(x, y=None):
        counter.value += 1
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(m * x, 0.5), obs=y)

    return model, counter


X, Y = np.linspace(-1.0, 1.0, 4), np.array([0.1, 0.2, 0.5, 0.9])


def infer(model, **options):
    return pf.infer(model, **({"method": "laplace", "draws": 10, "progress": False} | options))


def test_other_data_of_the_same_shape_compile_nothing():
    model, counter = counted()
    first = infer(model, x=X, y=Y, predictive=True)
    compiled, before = [], counter.value
    # JAX has no public way to take a listener off again; this one outlives the test and only appends to a list.
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    second = infer(model, x=X + 1, y=2 * Y, predictive=True)
    assert counter.value == before
    assert compiled == []
    assert pf.attributes(first)["compile_seconds"] > 0
    assert pf.attributes(second)["compile_seconds"] == 0
    assert not np.allclose(first["posterior"]["m"], second["posterior"]["m"])
    infer(model, x=X[:3], y=Y[:3])
    assert counter.value > before


def test_attributes_of_a_result():
    tree = infer(counted()[0], method=pf.Laplace(tolerance=1e-4), x=X, y=Y, key=7)
    said = pf.attributes(tree)
    assert said["method"] == "Laplace"
    assert said["options"] == {"curvature": "hessian", "tolerance": 1e-4, "max_steps": 2000}
    assert said["versions"]["jax"] == jax.__version__
    assert (said["key"], said["returns"], said["outcome"], said["warnings"]) == (7, "posterior", "success", [])
    assert said["evaluations"] >= 1
    assert said["run_seconds"] > 0
    exact = -0.5 * (
        4 * np.log(2 * np.pi * 0.25) + np.log(1 + 4 * X @ X) + 4 * (Y @ Y - 4 * (X @ Y) ** 2 / (1 + 4 * X @ X))
    )
    assert said["log_evidence"] == pytest.approx(exact, abs=1e-4)


def test_a_typed_key_is_the_integer():
    model, _ = counted()
    integer, typed = infer(model, x=X, y=Y, key=3), infer(model, x=X, y=Y, key=jax.random.key(3))
    assert integer["posterior"].dataset.equals(typed["posterior"].dataset)
    assert pf.attributes(typed)["key"] == [0, 3]


def test_a_name_stands_for_the_class_with_its_defaults():
    model, _ = counted()
    by_name, by_class = infer(model, x=X, y=Y), infer(model, method=pf.Laplace(), x=X, y=Y)
    assert by_name["posterior"].dataset.equals(by_class["posterior"].dataset)
    for name, kind in NAMES.items():
        assert isinstance(kind(), pf.methods._base.Method), name


def test_auto_says_why(series):
    model, data = series
    _, _, reason = choose(model, **data)
    assert "scan" in reason
    method, states, reason = choose(counted()[0], x=X, y=Y)
    assert states is None
    assert isinstance(method, pf.NUTS)
    assert "NUTS" in reason


def choose(model, **inputs):
    from pushforward._choice import choose
    from pushforward.model.inverse import read_problem

    return choose("auto", None, read_problem(model, (), inputs))


def test_nuts_on_a_scan_agrees_with_the_exact_smoother():
    """x_t = 0.9 x_{t-1} + N(0, 0.5^2), y_t = x_t + N(0, 0.3^2): jointly normal, one value missing."""
    from numpyro.contrib.control_flow import scan

    y = np.array([0.5, 1.0, np.nan, -0.4, 0.1])

    def model(y):
        x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

        def step(x, y):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y)
            return x, None

        scan(step, x0, y)

    tree = infer(model, method=pf.NUTS(warmup=300), draws=1000, y=y)
    times = np.arange(1, 6)
    powers = np.tril(0.9 ** (times[:, None] - times[None, :]).clip(0))
    prior = 0.25 * powers @ powers.T + np.outer(0.9**times, 0.9**times)
    kept = ~np.isnan(y)
    gain = prior[:, kept] @ np.linalg.inv(prior[np.ix_(kept, kept)] + 0.09 * np.eye(4))
    mean, covariance = gain @ y[kept], prior - gain @ prior[kept]
    x = tree["posterior"]["x"]
    assert x.dims == ("chain", "draw", "time")
    # At least 1000 effective draws; ten tests at 4.5 standard errors: false-alarm rate 1e-4.
    np.testing.assert_allclose(x.mean(("chain", "draw")), mean, atol=4.5 * (np.diag(covariance).max() / 1000) ** 0.5)
    np.testing.assert_allclose(x.std(("chain", "draw")), np.diag(covariance) ** 0.5, rtol=4.5 / 2000**0.5)


def test_a_model_without_data_but_with_a_factor():
    def model():
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.factor("penalty", -0.5 * (m - 2.0) ** 2)

    tree = infer(model, draws=4000)
    # The posterior is N(1, 1/2): |z| < 4.5 twice, false-alarm rate 1.4e-5.
    assert float(tree["posterior"]["m"].mean()) == pytest.approx(1, abs=4.5 * (0.5 / 4000) ** 0.5)
    assert float(tree["posterior"]["m"].std()) == pytest.approx(0.5**0.5, rel=4.5 / 8000**0.5)
    assert "observed_data" not in tree.children


def test_positional_arguments_and_constants():
    model, _ = counted()
    tree = pf.infer(model, X, Y, method="laplace", draws=3, progress=False)
    np.testing.assert_allclose(tree["constant_data"]["x"], X, rtol=1e-6)
    assert list(tree["constant_data"].data_vars) == ["x"]
    np.testing.assert_allclose(tree["observed_data"]["y"], Y, rtol=1e-6)


def test_lp_is_the_joint_density_in_the_methods_coordinates():
    model, _ = counted()
    tree = infer(model, x=X, y=Y)
    prior, likelihood = tree["log_prior"]["m"], tree["log_likelihood"]["y"].sum("y_dim_0")
    np.testing.assert_allclose(tree["sample_stats"]["lp"], prior + likelihood, rtol=1e-5)
    assert jnp.zeros(()).dtype == tree["posterior"]["m"].dtype
