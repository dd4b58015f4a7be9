"""Reading a scan: which sites are what, forms of writing beyond `problems.linear_state_space`, and JAX transformations.

Exact answers come from one dense Gaussian (`problems._gaussian`), written out for each model; "exact" means to 1e-8.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer.reparam import LocScaleReparam

import pushforward as pf
from pushforward.model import _trace
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems._gaussian import Joint, Noise

NORMAL, sample = dist.Normal, numpyro.sample
Y = np.array([0.5, 1.0, 0.2, -0.4, 0.9])
KEY = jax.random.key(0)


def read(model, *args, **kwargs):
    return read_state_space(read_problem(model, args, kwargs))


def start(mean=0.2, sd=1.3):
    return sample("x0", NORMAL(mean, sd))


def move(x, y):
    x = sample("x", NORMAL(0.8 * x + 0.1, 0.7))
    sample("y", NORMAL(x, 0.5), obs=y)
    return x, x


def exact(y=Y, mean=0.2, sd=1.3, drift=lambda t: 0.1, gain=lambda t: 1.0, noise=lambda t: 0.5):
    """x_t = 0.8 x + drift(t) + 0.7 e, y_t = gain(t) x_t + noise(t) v; t counts from 0."""
    made, xs, ys = Noise(), [], []
    x = x0 = made.normal([mean], [[sd]])
    for t in range(len(y)):
        x = 0.8 * x + made.normal([drift(t)], [[0.7]])
        xs.append(x)
        ys.append(gain(t) * x + made.normal([0.0], [[noise(t)]]))
    return Joint({"x0": x0, "x": xs}, {"y": ys}, {"y": np.asarray(y, float)}, xs)


def log_likelihood(space, **values):
    chain = space.chain({n: jnp.asarray(v) for n, v in values.items()})
    return float(jax.jit(pf.Kalman().log_likelihood)(chain))


# ---------------------------------------------------------------------------------- forms of writing, exactly read

FORMS = {}


def form(law, y=Y, **arguments):
    """Registers a model of data `y` with its exact law."""

    def add(model):
        FORMS[model.__name__] = (model, law, {"y": y} | arguments)
        return model

    return add


@form(exact())
def returns_and_sites_after(y):
    def step(x, y):
        x, _ = move(x, y)
        numpyro.deterministic("double", 2 * x)
        return x, {"x": x, "square": x**2, "three": 3}

    last, back = scan(step, start(), y)
    numpyro.deterministic("squares", jnp.sum(back["square"]))
    numpyro.deterministic("last", last)


@form(exact())
def reparameterised_inside(y):
    scan(handlers.reparam(move, config={"x": LocScaleReparam(0.3)}), start(), y)


@form(exact())
def start_reparameterised(y):
    with handlers.reparam(config={"x0": LocScaleReparam(0.0)}):
        x0 = start()
    scan(move, x0, y)


PARTLY = np.array([0.5, np.nan, 0.2, -0.4, np.nan])


@form(exact(PARTLY), y=np.nan_to_num(PARTLY, nan=7.0), seen=~np.isnan(PARTLY))
def masked_by_obs_mask(y, seen):
    def step(x, row):
        y, seen = row
        x = sample("x", NORMAL(0.8 * x + 0.1, 0.7))
        sample("y", NORMAL(x, 0.5), obs=y, obs_mask=seen)
        return x, None

    scan(step, start(), (y, seen))


@form(exact())
def closure_and_length(y):
    def step(carry, _):
        x, t = carry
        x, _ = move(x, jnp.asarray(y)[t])
        return (x, t + 1), None

    scan(step, (start(), 0), None, length=len(Y))


@form(exact(drift=lambda t: 0.1 + 0.2 * t, gain=lambda t: 1 + 0.5 * t))
def python_numbers_in_the_carry(y):
    def step(carry, y):
        x, time, gain = carry["x"], carry["time"], carry["gain"]
        x = sample("x", NORMAL(0.8 * x + 0.1 + 0.2 * time, 0.7))
        sample("y", NORMAL(gain * x, 0.5), obs=y)
        return {"x": x, "time": time + 1.0, "gain": gain + 0.5}, None

    scan(step, {"x": start(), "time": 0.0, "gain": 1.0}, y)


@form(exact(noise=lambda t: 0.5 * 0.9**t))
def float_counter_in_the_noise(y):
    def step(carry, y):
        x, sd = carry
        x = sample("x", NORMAL(0.8 * x + 0.1, 0.7))
        sample("y", NORMAL(x, sd), obs=y)
        return (x, 0.9 * sd), None

    scan(step, (start(), 0.5), y)


@form(exact(np.array([0.5, 1.0, np.nan, np.nan, np.nan])), y=np.array([0.5, 1.0, np.nan, np.nan, np.nan]))
def forecast_by_nan(y):
    scan(move, start(), y)


@form(exact(np.array([0.5, 1.0, np.nan, np.nan])), y=np.array([0.5, 1.0]))
def forecast_by_length(y):
    handlers.condition(lambda: scan(lambda x, _: move(x, None), start(), None, length=4), data={"y": jnp.asarray(y)})()


@form(exact())
def observed_after(y):
    _, xs = scan(lambda x, _: (sample("x", NORMAL(0.8 * x + 0.1, 0.7)),) * 2, start(), None, length=len(Y))
    sample("y", NORMAL(xs, 0.5), obs=y)


@form(exact())
def observed_after_as_one_event(y):
    _, xs = scan(lambda x, _: (sample("x", NORMAL(0.8 * x + 0.1, 0.7)),) * 2, start(), None, length=len(Y))
    sample("y", NORMAL(xs, 0.5).to_event(1), obs=y)


@form(exact(PARTLY, gain=lambda t: 1 + 0.5 * t), y=PARTLY)
def observed_after_through_known_gains(y):
    _, xs = scan(lambda x, _: (sample("x", NORMAL(0.8 * x + 0.1, 0.7)),) * 2, start(), None, length=len(Y))
    sample("y", NORMAL(numpyro.deterministic("mean", xs * (1 + 0.5 * jnp.arange(len(Y)))), 0.5), obs=y)


def three_lags():
    made, ys, xs = Noise(), [], []
    start = made.normal([0.1, 0.2, 0.3], np.eye(3))
    one, two, three = start[0:1], start[1:2], start[2:3]
    for _ in Y:
        x = 0.5 * one + (-0.3) * two + 0.2 * three + made.normal([0.0], [[0.7]])
        one, two, three = x, one, two
        xs.append(x)
        ys.append(x + made.normal([0.0], [[0.5]]))
    return Joint({"start": start, "x": xs}, {"y": ys}, {"y": Y}, xs)


@form(three_lags())
def several_lags(y):
    def step(carry, y):
        one, (two, three) = carry
        x = sample("x", NORMAL(0.5 * one - 0.3 * two + 0.2 * three, 0.7))
        sample("y", NORMAL(x, 0.5), obs=y)
        return (x, (one, two)), None

    first = sample("start", NORMAL(jnp.array([0.1, 0.2, 0.3]), 1.0).to_event(1))
    scan(step, (first[0], (first[1], first[2])), y)


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_writing_are_exact(name, float64):
    model, law, arguments = FORMS[name]
    space = read(model, **arguments)
    assert space.parameters == ()
    assert log_likelihood(space) == pytest.approx(law.log_evidence(), abs=1e-8)


def draws_of(model, draws=4000, **arguments):
    tree = pf.infer(model, method=pf.Kalman(), draws=draws, progress=False, **arguments)
    return tree["posterior"], tree


def check_mean_and_sd(x, mean, sd):
    """Means and standard deviations of independent draws at 5 standard errors: false alarm 6e-7 each."""
    assert np.abs((x.mean(0) - mean) / sd).max() < 5 / np.sqrt(len(x))
    assert np.abs(x.std(0) / sd - 1).max() < 5 / np.sqrt(2 * len(x))


def moments(law):
    found = law.smoothing()
    return found.mean[:, 0], np.sqrt(found.covariance[:, 0, 0])


def test_a_forecast_is_part_of_the_posterior(float64):
    """Data end after two steps; draws of later states and data are those of the model."""
    model, law, arguments = FORMS["forecast_by_length"]
    posterior, _ = draws_of(model, **arguments)
    x = posterior["x"].to_numpy()[0]
    assert x.shape == (4000, 4)
    check_mean_and_sd(x, *moments(law))


def test_deterministic_sites_and_returned_values(float64):
    model, law, arguments = FORMS["returns_and_sites_after"]
    posterior, _ = draws_of(model, draws=500, **arguments)
    x = posterior["x"].to_numpy()[0]
    assert posterior["double"].to_numpy()[0] == pytest.approx(2 * x)
    assert posterior["squares"].to_numpy()[0] == pytest.approx((x**2).sum(1))
    assert posterior["last"].to_numpy()[0] == pytest.approx(x[:, -1])
    check_mean_and_sd(x, *moments(law))


def test_latent_sites_after_the_scan(float64):
    """A site drawn from the trajectory's law keeps it: z = last + sum of x / 10 + 0.3 e; nothing observes it."""

    def model(y):
        last, xs = scan(move, start(), y)
        sample("z", NORMAL(last + 0.1 * jnp.sum(xs), 0.3))

    space = read(model, y=Y)
    assert (space.structure.late, space.structure.initial, space.parameters) == (("z",), ("x0",), ())
    assert log_likelihood(space) == pytest.approx(exact().log_evidence(), abs=1e-8)
    posterior, _ = draws_of(model, y=Y)
    mean, cov = exact().posterior("x")
    weights = np.full(5, 0.1)
    weights[-1] += 1
    sd = np.sqrt(weights @ cov @ weights + 0.09)
    z, x = posterior["z"].to_numpy()[0], posterior["x"].to_numpy()[0]
    check_mean_and_sd(z[:, None], weights @ mean, sd)
    check_mean_and_sd((z - x @ weights)[:, None], 0.0, 0.3)


# ----------------------------------------------------------------------------------------------- roles of the sites


def roles(model, **arguments):
    s = read(model, **arguments).structure
    return {"parameters": s.parameters, "initial": s.initial, "late": s.late, "latent": s.latent}


def test_hyperparameters_of_the_start_are_parameters(float64):
    def model(y):
        mean0, sd0 = sample("mean0", NORMAL(0.0, 1.0)), sample("sd0", dist.HalfNormal(1.0))
        scan(move, start(mean0, sd0), y)

    found = roles(model, y=Y)
    assert found == {"parameters": ("mean0", "sd0"), "initial": ("x0",), "late": (), "latent": ("x",)}
    value = log_likelihood(read(model, y=Y), mean0=0.4, sd0=0.9)
    assert value == pytest.approx(exact(mean=0.4, sd=0.9).log_evidence(), abs=1e-8)


def test_a_start_that_the_body_uses_is_a_parameter():
    def model(y):
        x0 = start()
        scan(lambda x, y: move(x + 0.01 * x0, y), x0, y)

    assert roles(model, y=Y)["parameters"] == ("x0",)


def test_a_covariate_that_is_latent_is_a_parameter():
    def model(y):
        u = sample("u", NORMAL(0.0, 1.0).expand([5]).to_event(1))
        scan(lambda x, row: move(x + row[1], row[0]), start(), (y, u))

    assert roles(model, y=Y)["parameters"] == ("u",)


def test_state_false_makes_the_start_a_parameter(float64):
    def model(y):
        scan(move, sample("x0", NORMAL(0.2, 1.3), infer={"state": False}), y)

    assert roles(model, y=Y)["parameters"] == ("x0",)
    value = log_likelihood(read(model, y=Y), x0=0.4)
    assert value == pytest.approx(exact(mean=0.4, sd=1e-12).log_evidence(), abs=1e-8)


def test_integers_and_known_numbers_ride_along():
    space = read(FORMS["python_numbers_in_the_carry"][0], y=Y)
    assert space.state_dimension == 1
    assert next(c.dtype for c in space.structure.carry) == jnp.result_type(float)
    chain = space.chain()
    state, riders, _ = chain.start(jnp.zeros(1))
    assert float(state[0]) == pytest.approx(0.2)
    moved = chain.step(state, riders, jnp.asarray(0), jnp.zeros(1))
    assert sorted(float(r) for r in moved.riders) == [1.0, 1.5]


def test_sites_that_depend_on_parameters_alone_count_once(float64):
    """Data outside the scan on a parameter: in the marginal model's density, not in the filter's."""

    def model(y, z):
        a = sample("a", NORMAL(0.0, 1.0))
        sample("z", NORMAL(a, 0.5), obs=z)
        scan(lambda x, y: move(x + a, y), start(), y)

    space = read(model, y=Y, z=np.array([0.3, 0.4]))
    assert space.structure.static == ("z",)
    from_normal = NORMAL(0.6, 0.5).log_prob(jnp.array([0.3, 0.4])).sum()
    assert float(space.chain({"a": jnp.asarray(0.6)}).static_log_likelihood()) == pytest.approx(float(from_normal))


# --------------------------------------------------------------------------------------- likelihood after the scan

LOCAL = {
    "elementwise": lambda xs: jnp.tanh(xs),
    "by a known series": lambda xs: xs * jnp.arange(6) + 1,
    "two columns": lambda xs: jnp.stack([xs, xs**2], axis=1),
}
GLOBAL = {
    "one step of delay": lambda xs: jnp.concatenate([xs[:1], xs[:-1]]),
    "differences": lambda xs: jnp.diff(xs, prepend=0.0),
    "reversed": lambda xs: xs[::-1],
    "one entry": lambda xs: xs.at[4].add(xs[1]),
    "a matrix": lambda xs: jnp.eye(6).at[5, 0].set(1e-3) @ xs,
    "shorter": lambda xs: xs[1:],
    "centred": lambda xs: xs - xs.mean(),
}


def observed_through(prediction):
    def model(y):
        _, xs = scan(lambda x, _: (sample("x", NORMAL(x, 1.0)),) * 2, start(), None, length=6)
        sample("y", NORMAL(prediction(xs), 1.0), obs=y)

    shape = jax.eval_shape(prediction, jax.ShapeDtypeStruct((6,), jnp.float32)).shape
    return model, np.zeros(shape)


@pytest.mark.parametrize("name", LOCAL)
def test_local_likelihoods_are_fused(name):
    model, y = observed_through(LOCAL[name])
    assert read(model, y=y).structure.fused == ("y",)


@pytest.mark.parametrize("name", GLOBAL)
def test_other_likelihoods_are_refused(name):
    model, y = observed_through(GLOBAL[name])
    with pytest.raises(ValueError, match="'y' after the scan is not local in time"):
        read(model, y=y)


# ---------------------------------------------------------------------------------------------- transformations


def test_jit_vmap_and_grad_through_a_chain(float64):
    def model(y):
        drift = sample("drift", NORMAL(0.0, 1.0))
        scan(lambda x, y: move(x + drift / 0.8, y), start(), y)

    space = read(model, y=Y)
    run = jax.value_and_grad(lambda v: pf.Kalman().log_likelihood(space.chain({"drift": v}), KEY))
    drifts = jnp.linspace(-1.0, 1.0, 64)
    values, slopes = jax.jit(jax.vmap(run))(drifts)

    def truth(drift):
        return exact(drift=lambda t: 0.1 + drift).log_evidence()

    for i in (0, 40):
        d, h = float(drifts[i]), 1e-4
        assert float(values[i]) == pytest.approx(truth(d), abs=1e-9)
        assert float(slopes[i]) == pytest.approx((truth(d + h) - truth(d - h)) / (2 * h), abs=1e-6)
    assert float(jax.jit(run)(drifts[40])[0]) == pytest.approx(float(values[40]), abs=1e-10)


def calls_of_the_body(length, y):
    """How often Python runs the body, in reading and in one compiled log likelihood."""
    count = {"reading": 0, "filtering": 0}
    phase = ["reading"]

    def model(y):
        def step(x, y):
            count[phase[0]] += 1
            return move(x, y)

        scan(step, start(), y)

    space = read(model, y=y)
    phase[0] = "filtering"
    run = jax.jit(pf.Kalman().log_likelihood)
    run(space.chain())
    run(space.chain())
    return tuple(count.values())


def test_the_body_is_traced_a_few_times_whatever_the_length():
    short, long = (calls_of_the_body(n, np.linspace(0.0, 1.0, n)) for n in (10, 1000))
    assert short == long
    assert short[0] <= 20
    assert short[1] == 0, "a filter runs what was read, not the user's Python"


# ------------------------------------------------------------------------------------------- NumPyro's internals


class Listener(numpyro.primitives.Messenger):
    """Keeps the messages of control flow as they arrive and as they leave."""

    def __init__(self, fn):
        super().__init__(fn)
        self.arrived, self.left = [], []

    def process_message(self, msg):
        if msg["type"] == "control_flow":
            self.arrived.append(dict(msg))

    def postprocess_message(self, msg):
        if msg["type"] == "control_flow":
            self.left.append(dict(msg, kwargs=dict(msg["kwargs"])))


def test_the_message_of_a_scan_is_the_one_that_is_read():
    """NumPyro does not document it. If this fails, read `numpyro.contrib.control_flow.scan` and `_scan_trace.py`."""
    data = {"y": jnp.asarray(Y)}
    listener = Listener(lambda: scan(move, 0.3, None, length=5))
    with handlers.seed(rng_seed=0), handlers.substitute(data={"x": jnp.zeros(5)}), handlers.condition(data=data):
        listener()
    (arrived,), (left,) = listener.arrived, listener.left
    assert set(arrived) == {"type", "fn", "args", "kwargs", "value"}
    assert arrived["fn"] is importlib.import_module("numpyro.contrib.control_flow.scan").scan_wrapper
    f, init, xs, length, reverse = arrived["args"]
    assert (f, init, xs, length, reverse) == (move, 0.3, None, 5, False)
    assert set(arrived["kwargs"]) == {"rng_key", "substitute_stack", "history"}
    assert (arrived["kwargs"]["history"], arrived["value"]) == (1, None)
    assert [kind for kind, _ in left["kwargs"]["substitute_stack"]] == ["condition", "substitute"]
    assert left["kwargs"]["rng_key"] is not None
    (steps, _, last), (trace, back) = left["value"]
    assert (steps, back.shape, set(trace.trace)) == (5, (5,), {"x", "y"})
    assert last.shape == ()


def test_the_answer_to_the_message_is_taken_as_it_is():
    """Replacing `fn` in the message: it is called with what handlers have added, and its answer is the scan's."""
    seen = {}

    def answer(f, init, xs, length, reverse, **kwargs):
        seen.update(kwargs)
        return (5, None, 7.0), (numpyro.ops.pytree.PytreeTrace({}), jnp.arange(5))

    class Answering(numpyro.primitives.Messenger):
        def process_message(self, msg):
            if msg["type"] == "control_flow":
                msg["fn"] = answer

    with handlers.seed(rng_seed=0):
        last, back = Answering(lambda: scan(move, 0.3, None, length=5))()
    assert last == 7.0
    assert back.tolist() == [0, 1, 2, 3, 4]
    assert set(seen) == {"rng_key", "substitute_stack", "history"}


def test_a_step_is_told_its_number_inside_the_body():
    numbers = []

    def step(x, _):
        x = sample("x", NORMAL(x, 1.0))
        return x, x

    def note(site):
        if site["name"] == "x":
            numbers.append(site["infer"]["_scan_current_index"])

    with handlers.seed(rng_seed=0):
        handlers.substitute(lambda: scan(step, 0.0, None, length=3), substitute_fn=note)()
    assert numbers


def test_a_scan_is_told_from_a_cond():
    branches = [lambda x, sd=sd: sample("a", NORMAL(x, sd)) for sd in (1.0, 2.0)]
    listener = Listener(lambda: cond(True, *branches, 0.0))
    with handlers.seed(rng_seed=0):
        listener()
    assert not _trace.is_scan(listener.arrived[0])


def test_a_site_after_a_scan_that_returns_nothing_reads_the_last_carry():
    def model(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
            return x, None

        last, _ = scan(step, numpyro.sample("x0", dist.Normal(0, 1)), y)
        numpyro.deterministic("end", 2 * last)

    tree = pf.infer(model, method=pf.Kalman(), draws=5, y=np.array([1.0, 2.0, 0.5]))
    np.testing.assert_allclose(tree["posterior"]["end"], 2 * tree["posterior"]["x"][..., -1], rtol=1e-5)
