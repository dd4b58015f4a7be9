"""Streams against the same filters on all data at once, late data against data in time, restored against uninterrupted.

All comparisons are of one algorithm with itself, so that there are no false alarms: 1e-10 in float64 between a loop in
Python and one in `lax.scan`, and equal bits where the same program runs.
"""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward._errors import ArgumentError, CheckpointError, DataError, InferenceError, MethodError, ModelError
from pushforward.methods._state import StateMethod
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.online import Stream, online
from pushforward.problems import lorenz96

NORMAL = dist.Normal
TABLE = np.array([0.1, -0.3, 0.2, 0.5, -0.2, 0.4, 0.0, 0.3])
DATA = np.array([[0.3, np.nan], [1.0, 0.4], [np.nan, np.nan], [-0.5, 1.1], [0.2, 0.6], [0.9, -1.0]])
INPUT = np.array([0.5, -0.5, 1.0, 0.0, 0.3, -0.2])


def walk(y=None, steps=None):
    """The plainest state-space model."""

    def step(x, y):
        x = numpyro.sample("x", NORMAL(x, 1.0))
        numpyro.sample("y", NORMAL(x, 2.0), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", NORMAL(0.0, 5.0)), y, length=steps)


def curved(y, u, table, first=0.7, bend=0.0):
    """Two states, an input, a counter that rides along and looks into a table, data with the initial state, and a
    deterministic site; linear with bend=0. Site names are not in the order of the alphabet."""
    x0 = numpyro.sample("x0", NORMAL(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("begin", NORMAL(x0[0], 0.5), obs=first)

    def step(carry, row):
        (x, t), (y, u) = carry, row
        push = bend * jnp.sin(x[0]) if bend else 0.0
        mean = jnp.stack([0.9 * x[0] + 0.2 * x[1], 0.7 * x[1] + push]) + u * table[t]
        x = numpyro.sample("x", NORMAL(mean, jnp.array([0.3, 0.5])).to_event(1))
        numpyro.deterministic("total", x[0] + x[1] + 10.0 * t)
        numpyro.sample("y", NORMAL(x, jnp.array([0.4, 0.6])).to_event(1), obs=y)
        return (x, t + 1), None

    scan(step, (x0, 0), (y, u))


def with_parameter(y, known=False):
    """Noise of a walk with a drift that is not known."""
    drift = numpyro.sample("drift", NORMAL(0.0, 1.0))

    def step(x, y):
        x = numpyro.sample("x", NORMAL(x + drift, 0.3))
        numpyro.sample("y", NORMAL(x, 0.5), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", NORMAL(0.0, 1.0)), y)


def followed(stream, *rows, names=("y",)):
    """What the steps of a stream return."""
    return [stream.step(**dict(zip(names, row, strict=True))) for row in zip(*rows, strict=True)]


def bits(stream):
    """The belief of a stream, byte by byte."""
    return [np.asarray(v).tobytes() for v in stream._belief]


def batch(method, model, key=0, **given):
    """Filtering means and standard deviations by site, and log evidence, of a method run on all data."""
    space = read_state_space(read_problem(model, (), given))
    space = space.augmented() if method.augment else space
    run = jax.jit(lambda s: method.trajectories(s.chain(), jax.random.key(key), 8, "moments"))(space)
    return {n: np.asarray(v) for n, v in run.filtering.items()}, float(run.log_evidence)


def check_against_batch(method, model, streamed, constant, key=0, tolerance=1e-10):
    """A stream of a method, at each step, against the method on all data."""
    stream = online(model, method=method, key=key, **constant)
    found = followed(stream, *streamed.values(), names=tuple(streamed))
    moments, evidence = batch(method, model, key, **streamed, **constant)
    for name, (mean, sd) in moments.items():
        np.testing.assert_allclose([f.mean[name] for f in found], mean, atol=tolerance)
        np.testing.assert_allclose([f.sd[name] for f in found], sd, atol=tolerance)
    assert stream.log_evidence == pytest.approx(evidence, abs=10 * tolerance)
    assert sum(f.log_likelihood for f in found) == pytest.approx(evidence, abs=10 * tolerance)
    assert [f.step for f in found] == list(range(len(found)))
    return found


KALMAN = {
    "exact": (pf.Kalman(), 0.0),
    "extended": (pf.Kalman("extended", inflation=1.1), 0.8),
    "iterated": (pf.Kalman("iterated"), 0.8),
    "unscented": (pf.Kalman("unscented"), 0.8),
    "cubature": (pf.Kalman("cubature", inflation=1.05), 0.8),
}
SLOW = ("exact", "iterated", "unscented", "cubature")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in KALMAN])
def test_a_kalman_stream_is_the_filter_of_all_data(name, float64):
    method, bend = KALMAN[name]
    found = check_against_batch(method, curved, {"y": DATA, "u": INPUT}, {"table": TABLE, "bend": bend})
    assert set(found[0].mean) == set(found[0].sd) == {"x", "total"}
    assert found[0].mean["x"].shape == (2,)
    assert found[0].mean["total"].shape == ()
    assert found[2].summary["surprise"] == 1.0, "a step without data surprises nobody"


def test_means_and_sds_of_a_stream_are_exact():
    stream = online(walk, method=pf.Kalman())
    mean, variance = 0.0, 25.0
    for y in (1.0, np.nan, 3.0):
        variance += 1.0
        predicted, spread = mean, variance + 4.0
        found = stream.step(y)
        if np.isnan(y):
            assert found.log_likelihood == 0.0
            continue
        mean, variance = mean + variance / spread * (y - mean), 4.0 * variance / spread
        assert found.mean["x"] == pytest.approx(mean, rel=1e-5)
        assert found.sd["x"] == pytest.approx(variance**0.5, rel=1e-5)
        assert found.summary["surprise"] == pytest.approx((y - predicted) ** 2 / spread, rel=1e-5)
        expected = -0.5 * ((y - predicted) ** 2 / spread + np.log(2 * np.pi * spread))
        assert found.log_likelihood == pytest.approx(expected, rel=1e-5)


ENSEMBLES = {
    "adaptive": pf.EnKF(members=8, inflation=pf.Adaptive(), rotate=True),
    "perturbed": pf.EnKF(members=8, analysis="perturbed", inflation=pf.RTPS()),
    "denkf": pf.EnKF(members=8, analysis="denkf", inflation=pf.Additive(0.1)),
    "serial": pf.EnKF(members=8, analysis="serial", inflation=pf.Multiplicative(1.02)),
    "letkf": pf.EnKF(members=8, analysis=pf.LETKF(2.0), inflation=pf.RTPP(), rotate=True),
    "finite_size": pf.EnKF(members=8, analysis="finite_size"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_stream_runs_the_cycles_of_the_batch_filter(name, float64):
    # The same key gives the same members: `trajectories` and a stream split it alike.
    found = check_against_batch(ENSEMBLES[name], curved, {"y": DATA, "u": INPUT}, {"table": TABLE, "bend": 0.8}, key=3)
    assert {"surprise", "replaced_members"} <= set(found[0].summary)
    assert found[0].summary["replaced_members"] == 0.0


@pytest.mark.slow
def test_an_iterative_smoother_filters_in_a_stream(float64):
    _, y = lorenz96.simulate(jax.random.key(0), 4, size=6)
    method = pf.EnKF(members=8, smoother=pf.IterativeEnKS())
    check_against_batch(method, lorenz96.model, {"y": np.asarray(y)}, {"size": 6})


@pytest.mark.slow
def test_blocks_of_plates_are_filtered_as_one_state(float64):
    def stations(y):
        def step(x, y):
            with numpyro.plate("station", 3):
                x = numpyro.sample("x", NORMAL(0.9 * x, 1.0))
                numpyro.sample("y", NORMAL(x, 0.5), obs=y)
            return x, None

        with numpyro.plate("station", 3):
            x0 = numpyro.sample("x0", NORMAL(0.0, 1.0))
        scan(step, x0, y)

    check_against_batch(pf.Kalman(), stations, {"y": np.arange(12.0).reshape(4, 3) % 5}, {})


def test_free_parameters_join_the_state_or_are_refused(float64):
    y = np.array([0.5, 0.9, 1.6, 2.2])
    with pytest.raises(MethodError, match=r"free parameters \['drift'\].*augment=True"):
        online(with_parameter, method=pf.Kalman()).step(y[0])
    found = followed(online(with_parameter, method=pf.Kalman(augment=True)), y)
    # y_t = x_0 + t drift + walk: one Gaussian, conditioned without recursion.
    times = np.arange(1, 5)
    cov = 1.0 + np.outer(times, times) + 0.09 * np.minimum.outer(times, times) + 0.25 * np.eye(4)
    for size in (1, 4):
        gain = np.linalg.solve(cov[:size, :size], times[:size])
        assert found[size - 1].mean["drift"] == pytest.approx(gain @ y[:size])
        assert found[size - 1].sd["drift"] == pytest.approx((1 - gain @ times[:size]) ** 0.5)
    assert set(found[0].mean) == {"x", "drift"}


@pytest.mark.slow
def test_an_ensemble_carries_parameters_along(float64):
    method = pf.EnKF(members=50, augment=True)
    found = check_against_batch(method, with_parameter, {"y": np.array([0.5, 0.9, 1.6, 2.2])}, {})
    assert set(found[0].mean) == {"x", "drift"}
    assert found[3].sd["drift"] < found[0].sd["drift"]


ENSEMBLE = pf.EnKF(members=6, analysis="perturbed", inflation=pf.Adaptive())


def test_an_ensemble_stream_is_the_filter_of_all_data():
    y = np.array([1.0, 0.3, np.nan, 0.8, 1.5], np.float32)
    check_against_batch(ENSEMBLE, walk, {"y": y}, {}, key=4, tolerance=1e-4)


def test_late_data_give_the_stream_that_had_them_in_time():
    y = np.array([1.0, 0.3, -0.4, 0.8, 1.5], np.float32)
    whole = online(walk, method=ENSEMBLE, key=4)
    last = followed(whole, y)[-1]
    late = online(walk, method=ENSEMBLE, key=4, lag=3)
    followed(late, np.array([1.0, 0.3, np.nan, 0.8, 1.5], np.float32))
    assert bits(late) != bits(whole)
    again = late.late(2, y[2])
    assert bits(late) == bits(whole)
    assert late.log_evidence == whole.log_evidence
    assert again.mean["x"] == last.mean["x"]
    assert again.step == 4
    assert late.latest is again
    late.late(0, 7.0)
    late.late(0, 1.5)  # entries that are there are replaced
    assert bits(late) == bits(whole)
    assert late.count == 5
    # Beliefs that were kept for late data have been corrected, too.
    assert late.late(1, y=y[3]).mean["x"] == last.mean["x"]
    assert bits(late) == bits(whole)
    assert whole.step(0.1).mean["x"] == late.step(0.1).mean["x"]


def test_late_data_reach_the_first_step_and_fill_entries():
    constant = {"table": TABLE}
    whole = online(curved, method=pf.Kalman(), **constant)
    followed(whole, DATA[:2], INPUT[:2], names=("y", "u"))
    late = online(curved, method=pf.Kalman(), lag=1, **constant)
    followed(late, np.full((2, 2), np.nan), INPUT[:2], names=("y", "u"))
    late.late(1, y=DATA[0])
    late.late(0, y=np.array([DATA[1, 0], np.nan]))
    assert bits(late) != bits(whole)
    late.late(0, y=np.array([np.nan, DATA[1, 1]]))  # fills one entry and leaves the other
    assert bits(late) == bits(whole)
    assert late.log_evidence == whole.log_evidence


def test_late_data_that_cannot_be_used_are_refused():
    stream = online(walk, method=ENSEMBLE, key=4, lag=3)
    with pytest.raises(ArgumentError, match="has taken in 0 steps"):
        stream.late(0, 1.0)
    followed(stream, [1.0, 2.0])
    before = bits(stream)
    with pytest.raises(ArgumentError, match="late data of 2 steps ago.*has taken in 2 steps"):
        stream.late(2, 1.0)
    with pytest.raises(ArgumentError, match="late data of 4 steps ago.*keeps lag=3"):
        stream.late(4, 1.0)
    with pytest.raises(ArgumentError, match="late data of -1 steps"):
        stream.late(-1, 1.0)
    with pytest.raises(ArgumentError, match=r"missing. Write stream.late\(1, y\)"):
        stream.late(1)
    with pytest.raises(DataError, match=r"shape \(2,\) at step 0"):
        stream.late(1, np.zeros(2))
    assert bits(stream) == before


def test_steps_without_data_are_missing():
    stream, given = (online(walk, method=ENSEMBLE, key=4) for _ in range(2))
    with pytest.raises(ArgumentError, match="first step needs data"):
        stream.step()
    followed(given, [1.0, np.nan, 2.0])
    stream.step(1.0)
    assert stream.step().log_likelihood == 0.0
    stream.step(y=2.0)
    assert bits(stream) == bits(given)


def test_inputs_cannot_be_missing_and_names_stay():
    stream = online(curved, table=TABLE, method=pf.Kalman())
    with pytest.raises(ArgumentError, match=r"parameters are \['y', 'u'\]. Write stream.step\(y=..., u=...\)"):
        stream.step(DATA[0])
    with pytest.raises(ArgumentError, match="'table' is given twice"):
        stream.step(y=DATA[0], u=0.1, table=TABLE)
    with pytest.raises(ArgumentError, match="no parameter 'z'"):
        stream.step(y=DATA[0], u=0.1, z=1)
    assert stream.count == 0
    stream.step(y=DATA[0], u=0.1)
    with pytest.raises(DataError, match="step 1 lacks 'u', which cannot be missing"):
        stream.step(y=DATA[1])
    with pytest.raises(ArgumentError, match="'bend' was not given at the first step"):
        stream.step(y=DATA[1], u=0.1, bend=0.0)
    with pytest.raises(DataError, match=r"'y' has shape \(3,\) at step 1, and \(2,\) at the first step"):
        stream.step(y=np.zeros(3), u=0.1)
    with pytest.raises(DataError, match="'y' at step 1 is .* first step it was one array"):
        stream.step(y=[0.0, 1.0], u=0.1)
    with pytest.raises(DataError, match="'u' holds str"):
        stream.step(y=DATA[1], u="high")
    with pytest.raises(DataError, match="data 'y' are infinite at step 1"):
        stream.step(y=np.array([np.inf, 0.0]), u=0.1)
    assert stream.step(u=0.1).step == 1


def test_a_value_given_by_position_and_by_name_is_refused():
    with pytest.raises(ArgumentError, match="takes one value without a name"):
        online(walk, method=pf.Kalman()).step(1.0, 2.0)

    def only(y):
        walk(y)

    with pytest.raises(ArgumentError, match="takes one value without a name"):
        online(only, y=1.0, method=pf.Kalman()).step(2.0)


def test_options_are_checked():
    for method in (pf.NUTS(), pf.Kalman, "nuts"):
        with pytest.raises(MethodError, match="takes an instance of a state method"):
            online(walk, method=method)
    assert isinstance(online(walk, method="kalman").method, pf.Kalman)
    with pytest.raises(ArgumentError, match="lag= takes a number of steps"):
        online(walk, method=pf.Kalman(), lag=-1)
    with pytest.raises(ArgumentError, match="must be a NumPyro model"):
        online(3, method=pf.Kalman())
    with pytest.raises(ArgumentError, match=r"parameter 'lag'.*functools.partial"):
        online(lambda y, lag: None, method=pf.Kalman())

    class Whole(StateMethod):
        augment: bool = False
        store: str = "draws"

        def log_likelihood(self, chain, key):
            raise NotImplementedError

        def trajectories(self, chain, key, draws, store):
            raise NotImplementedError

    with pytest.raises(MethodError, match="Whole has no online form"):
        online(walk, method=Whole())
    for call in (Whole().begin, functools.partial(Whole().advance, None)):
        with pytest.raises(MethodError, match="Whole has no online form"):
            call(None, None)


def test_models_that_no_stream_can_read_are_refused():
    def regression(y):
        numpyro.sample("y", NORMAL(numpyro.sample("a", NORMAL(0.0, 1.0)), 1.0), obs=y)

    def numbered(y):
        def step(x, row):
            x = numpyro.sample("x", NORMAL(x + row[1], 1.0))
            numpyro.sample("y", NORMAL(x, 1.0), obs=row[0])
            return x, None

        scan(step, numpyro.sample("x0", NORMAL(0.0, 1.0)), (y, jnp.arange(len(y)) * 1.0))

    def standardised(y):
        middle = jnp.mean(y)

        def step(x, y):
            x = numpyro.sample("x", NORMAL(x, 1.0))
            numpyro.sample("y", NORMAL(x + middle, 1.0), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", NORMAL(0.0, 1.0)), y)

    def square(y):
        def step(x, y):
            x = numpyro.sample("x", NORMAL(x, 1.0))
            numpyro.sample("y", NORMAL(x**2, 1.0), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", NORMAL(0.0, 1.0)), y)

    for model, error, match in (
        (regression, ModelError, "no numpyro scan"),
        (numbered, ModelError, "an input of the scan depends on the number of the step"),
        (standardised, ModelError, "a value that the body uses of the scan depends on"),
        (square, MethodError, "Kalman does not fit this model"),
    ):
        with pytest.raises(error, match=match):
            online(model, method=pf.Kalman()).step(0.5)
    with pytest.raises(DataError, match="no site is observed"):
        online(lambda u, y=None: walk(y, 1), method=pf.Kalman()).step(u=1.0)


def observed_after(y, law=lambda xs: xs):
    """Data observed after the scan."""

    def step(x, _):
        x = numpyro.sample("x", NORMAL(x, 1.0))
        return x, x

    _, xs = scan(step, numpyro.sample("x0", NORMAL(0.0, 5.0)), None, length=len(y))
    numpyro.sample("y", NORMAL(law(xs), 2.0), obs=y)


@pytest.mark.slow
def test_data_after_the_scan_must_be_local_in_time():
    stream, same = online(observed_after, method=pf.Kalman()), online(walk, method=pf.Kalman())
    for row in (1.0, np.nan, 3.0):
        assert stream.step(row).mean["x"] == pytest.approx(float(same.step(row).mean["x"]), abs=1e-5)
    with pytest.raises(ModelError, match="read with two steps.*not local in time"):
        online(observed_after, law=jnp.cumsum, method=pf.Kalman()).step(0.5)


def indexed(y, take=lambda y, t: y[t]):
    """Data in the closure of the body, by a counter."""

    def step(carry, _):
        x, t = carry
        x = numpyro.sample("x", NORMAL(x, 1.0))
        numpyro.sample("y", NORMAL(x, 2.0), obs=take(y, t))
        return (x, t + 1), None

    scan(step, (numpyro.sample("x0", NORMAL(0.0, 5.0)), 0), None, length=len(y))


def test_data_behind_a_counter_are_found():
    # JAX keeps an index within its array, and the array of a stream has one row, while the counter goes on.
    y = np.array([1.0, -0.5, np.nan, 2.0], np.float32)
    counted, scanned = online(indexed, method=pf.Kalman()), online(walk, method=pf.Kalman())
    for row in y:
        assert counted.step(row).mean["x"] == pytest.approx(float(scanned.step(row).mean["x"]), abs=1e-5)
    assert counted.log_evidence == pytest.approx(scanned.log_evidence, abs=1e-4)
    with pytest.raises(ModelError, match="data become NaN after the first step"):
        online(indexed, take=lambda y, t: jnp.take(y, t), method=pf.Kalman()).step(1.0)


def test_counts_may_be_missing_later(float64):
    def counts(y):
        def step(x, y):
            x = numpyro.sample("x", NORMAL(x, 0.2))
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", NORMAL(1.0, 1.0)), y)

    stream, floats = (online(counts, method=pf.Kalman("extended")) for _ in range(2))
    stream.step(3), stream.step(), stream.step(2)
    followed(floats, [3.0, np.nan, 2.0])
    assert bits(stream) == bits(floats)
    with pytest.raises(DataError, match="outside the support of Poisson"):
        stream.step(-1.0)
    assert stream.count == 3


def fragile(y, u):
    """A model whose state has no real value at some inputs."""

    def step(x, row):
        x = numpyro.sample("x", NORMAL(0.5 * x + jnp.sqrt(row[1]), 1.0))
        numpyro.sample("y", NORMAL(x, 1.0), obs=row[0])
        return x, None

    scan(step, numpyro.sample("x0", NORMAL(0.0, 1.0)), (y, u))


def test_a_step_that_diverges_leaves_the_stream_as_it_was():
    stream = online(fragile, method=pf.Kalman("extended"), lag=2)
    with pytest.raises(InferenceError, match="step 0 gave .*not finite.* has not begun"):
        stream.step(y=1.0, u=-1.0)
    stream.step(y=1.0, u=1.0)
    stream.step(y=np.nan, u=1.0)
    before, evidence = bits(stream), stream.log_evidence
    with pytest.raises(InferenceError, match="step 2 gave .*not finite.*keeps its belief after step 1"):
        stream.step(y=1.0, u=-1.0)
    with pytest.raises(InferenceError, match="step 1 gave"):
        stream.late(0, u=-1.0)
    assert bits(stream) == before
    assert stream.log_evidence == evidence
    assert stream.count == 2
    assert stream.step(y=1.0, u=1.0).step == 2


def test_nothing_is_read_again_and_nothing_grows(monkeypatch):
    stream = online(walk, method=ENSEMBLE, lag=2)
    followed(stream, np.zeros(4))
    # What runs is compiled, so that JAX cannot trace the model again; nor may it be read.
    monkeypatch.setattr("pushforward._stream.reading.read_problem", None)
    monkeypatch.setattr("pushforward._runner.jax.jit", None)
    alive = len(jax.live_arrays())
    followed(stream, np.zeros(30))
    assert len(jax.live_arrays()) == alive
    assert len(stream._recent) == 3


def test_results_belong_to_the_caller():
    stream, same = (online(walk, method=ENSEMBLE) for _ in range(2))
    row = np.array(1.0)
    found = stream.step(row)
    row[...], found.mean["x"][...] = 5.0, 9.0
    same.step(1.0)
    assert stream.step(0.0).mean["x"] == same.step(0.0).mean["x"]
    assert "count=2" in repr(stream)
    assert "walk" in repr(stream)


def check_saved(path, begun, model, rows):
    """A stream that is saved and loaded now and then against one that is not."""
    whole, parted = begun(), begun()
    pf.save(path, parted)
    parted = pf.load(path, model=model)
    assert parted.count == 0
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.all(a == b), parted.method, whole.method))
    for t, row in enumerate(rows):
        a, b = whole.step(**row), parted.step(**row)
        assert a.mean["x"].tobytes() == b.mean["x"].tobytes()
        assert a.log_likelihood == b.log_likelihood
        if t in (0, 3):
            pf.save(path, parted)
            parted = pf.load(path, model=model)
            assert isinstance(parted, Stream)
            assert parted.count == t + 1
            assert parted.lag == 2
    return whole, parted


def test_a_saved_stream_goes_on_to_the_identical_bits(tmp_path):
    path, begun = tmp_path / "stream.pf", functools.partial(online, walk, method=ENSEMBLE, key=4, lag=2)
    whole, parted = check_saved(path, begun, walk, [{"y": y} for y in (1.0, 0.3, np.nan, 0.8, 1.5)])
    for stream in (whole, parted):
        stream.late(2, 0.4)
    assert bits(whole) == bits(parted)
    assert whole.log_evidence == parted.log_evidence
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_arrays_of_method_and_arguments_are_saved(tmp_path):
    method = pf.EnKF(members=6, analysis=pf.LETKF(1.0, coordinates=[0.0, 1.0]), inflation=pf.Adaptive(), rotate=True)
    begun = functools.partial(online, curved, method=method, key=jax.random.key(7), lag=2, table=TABLE, first=0.7)
    rows = [{"y": y, "u": u} for y, u in zip(DATA, INPUT, strict=True)]
    whole, parted = check_saved(tmp_path / "stream.pf", begun, curved, rows)
    assert bits(whole) == bits(parted)
    assert whole.log_evidence == parted.log_evidence


def test_files_that_cannot_be_continued_are_refused(tmp_path):
    path = tmp_path / "stream.pf"
    stream = online(walk, method=pf.Kalman())
    stream.step(1.0)
    pf.save(path, stream)
    with pytest.raises(ArgumentError, match=r"holds a stream. Write pf.load\(path, model=model\)"):
        pf.load(path)
    with pytest.raises(CheckpointError, match="stream of another model"):
        pf.load(path, model=with_parameter)
    with jax.enable_x64(True):
        with pytest.raises(CheckpointError, match="saved in float32, and JAX is in float64"):
            pf.load(path, model=walk)
        with pytest.raises(ArgumentError, match="the stream began in float32"):
            stream.step(1.0)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        pf.load(path, model=walk)
    pf.save(path, pf.Kalman())
    with pytest.raises(ArgumentError, match="holds a method, which needs no model"):
        pf.load(path, model=walk)

    def shaped(y, form):
        walk(form(y))

    with pytest.raises(ArgumentError, match=r"saved with its arguments.*functools.partial"):
        pf.save(path, online(shaped, form=jnp.abs, method=pf.Kalman()))


def test_a_file_with_another_belief_is_refused(tmp_path):
    path = tmp_path / "stream.pf"
    stream = online(walk, method=pf.Kalman())
    stream.step(1.0)
    stream._belief = stream._belief[:-1]
    pf.save(path, stream)
    with pytest.raises(CheckpointError, match="another version of pushforward, whose belief has other parts"):
        pf.load(path, model=walk)


SCRIPT = """
import os, signal, sys
import numpy as np, numpyro, numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
import pushforward as pf
from pushforward.online import online

def walk(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(x, 2.0), obs=y)
        return x, None
    scan(step, numpyro.sample("x0", dist.Normal(0.0, 5.0)), y)

path, begin, end, dies = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "dies"
method = pf.EnKF(members=6, analysis="perturbed")
stream = pf.load(path, model=walk) if begin else online(walk, method=method, key=2)
for y in np.sin(np.arange(begin, end)):
    stream.step(y)
    pf.save(path, stream)
if dies:
    stream.step(100.0)
    os.kill(os.getpid(), signal.SIGKILL)
np.save(path + ".npy", np.asarray(stream._belief[0]))
"""


@pytest.mark.slow
def test_a_killed_process_is_continued_by_another(tmp_path):
    script, path = tmp_path / "hourly.py", str(tmp_path / "stream.pf")
    script.write_text(SCRIPT)

    def run(*arguments):
        return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)

    assert run(path, "0", "3", "dies").returncode == -signal.SIGKILL
    assert run(path, "3", "6", "lives").returncode == 0
    whole = str(tmp_path / "whole.pf")
    assert run(whole, "0", "6", "lives").returncode == 0
    parted, uninterrupted = (np.load(p + ".npy") for p in (path, whole))
    assert parted.tobytes() == uninterrupted.tobytes()
    assert parted.size == 6
    assert os.listdir(tmp_path)
    assert not list(Path(tmp_path).glob("*.part"))
