"""`pf.simulator`: one call for each batch, failures as NaN with counts, pools, children with a limit, no gradient."""

import math
import multiprocessing
import os
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pushforward as pf
from pushforward._choice import choose
from pushforward._errors import ArgumentError, InferenceError, MethodError
from pushforward.model._simulator_worker import end_children
from pushforward.model.inverse import read_problem
from pushforward.model.simulator import holds_simulator, simulators
from simulators import crash_of_negatives, linear, process_of, slow_to_load, troubled, with_grandchild

X = jnp.arange(3.0)
Y = np.array([0.9, 1.4, 2.2], np.float32)
PCN = pf.PreconditionedCrankNicolson(chains=1, warmup=300, thinning=1)  # one chain: no word on convergence


def line(forward):
    """A linear Gaussian model of two numbers whose predictions come from `forward`."""

    def model(y=None):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        offset = numpyro.sample("offset", dist.Normal(0.0, 2.0))
        numpyro.sample("y", dist.Normal(forward(slope, offset, X), 0.5), obs=y)

    return model


def refused_by_method(method, model, **options):
    with pytest.raises(MethodError, match=r"has none\. Write method=\"eki\" \(EKI\), \"pcn\" .* or \"tempered_smc\""):
        pf.infer(model, method=method, progress=False, y=Y, **options)


class Inline:
    """A pool that runs what it is given at once, and counts."""

    def __init__(self):
        self.submitted = 0

    def submit(self, fn, *args):
        self.submitted += 1
        future = Future()
        future.set_result(fn(*args))
        return future


class Unreliable(Inline):
    """A pool whose every third task is lost."""

    def submit(self, fn, *args):
        future = super().submit(fn, *args)
        if self.submitted % 3 == 0:
            lost = Future()
            lost.set_exception(OSError("the node went away"))
            return lost
        return future


class Mortal(Inline):
    """A pool that is shut down after some tasks."""

    left = math.inf

    def submit(self, fn, *args):
        if self.left <= 0:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self.left -= 1
        return super().submit(fn, *args)


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
    end_children()


@pytest.fixture
def gone(tmp_path, monkeypatch):
    """A file where processes leave their numbers, and a function that says which of them live."""
    path = tmp_path / "processes"
    monkeypatch.setenv("PUSHFORWARD_TEST_FILE", str(path))
    end_children()  # those that live know another environment

    def living():
        numbers = [int(word) for word in path.read_text().split()]
        assert numbers
        deadline = time.monotonic() + 2.0
        while (alive := [n for n in numbers if _lives(n)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return alive

    return living


def _lives(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# What comes out, and how often it is called.


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_the_value_is_that_of_the_function(transform):
    forward = pf.simulator(linear, (3,))
    found = transform(forward)(2.0, offset=1.0, x=X)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 2 * X + 1)
    assert (forward.calls, forward.batches) == (1, 1)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_a_batch_is_one_call_and_shared_arguments_stay_as_they_are(transform):
    shapes = []

    def fn(slope, offset, x):
        shapes.append((slope.shape, offset.shape, x.shape, type(x)))
        x += offset  # its own copy: compiled codes write into their arguments
        return slope * x

    forward = pf.simulator(fn, (3,))
    slopes = jnp.arange(5.0)
    found = transform(jax.vmap(forward, (0, None, None)))(slopes, 1.0, X)
    np.testing.assert_array_equal(found, slopes[:, None] * (X + 1))
    assert shapes == 5 * [((), (), (3,), np.ndarray)]
    assert (forward.calls, forward.batches) == (5, 1)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_nested_vmaps_are_one_call(transform):
    forward = pf.simulator(linear, (3,))
    slopes, offsets, xs = jnp.arange(4.0), jnp.array([0.5, 7.0]), jnp.arange(15.0).reshape(3, 5)
    # x has its batch on its second axis, and the offsets none in the inner vmap.
    inner = jax.vmap(forward, (0, None, None))
    nested = jax.vmap(jax.vmap(inner, (None, 0, None)), (None, None, 1))
    found = transform(nested)(slopes, offsets, xs)
    expected = slopes[None, None, :, None] * xs.T[:, None, None, :] + offsets[None, :, None, None]
    np.testing.assert_array_equal(found, expected)
    assert (forward.calls, forward.batches) == (5 * 2 * 4, 1)


def test_a_batch_of_one_a_scan_and_scalar_outputs():
    forward = pf.simulator(lambda pair: pair["a"] - pair["b"], ())
    found = jax.vmap(lambda a: forward({"a": a, "b": jnp.float32(2.0)}))(jnp.array([5.0]))
    np.testing.assert_array_equal(found, [3.0])

    @jax.jit
    @jax.vmap
    def thrice(a):
        return jax.lax.scan(lambda c, _: (forward({"a": c, "b": 1.0}), None), a, length=3)[0]

    np.testing.assert_array_equal(thrice(jnp.array([5.0, 6.0])), [2.0, 3.0])
    assert (forward.calls, forward.batches) == (1 + 6, 1 + 3)


def test_dtype_follows_the_precision(float64):
    forward = pf.simulator(linear, (3,))
    assert forward(1.0, 1 / 3, X).dtype == jnp.float64
    assert float(forward(0.0, 1 / 3, X)[0]) == 1 / 3
    assert pf.simulator(linear, (3,), dtype="float32")(1.0, 1.0, X).dtype == jnp.float32


@pytest.mark.parametrize(
    "method", [PCN, pytest.param(pf.TemperedSMC(particles=64), marks=pytest.mark.slow)], ids=["pcn", "tempered_smc"]
)
def test_draws_are_those_of_the_model_in_jax(method):
    """Exact: the same keys and the same numbers, so the same draws."""
    forward = pf.simulator(linear, (3,))
    options = {"method": method, "draws": 64, "progress": False, "y": Y, "key": 1}
    with_simulator, without = pf.infer(line(forward), **options), pf.infer(line(linear), **options)
    for group in ("posterior", "log_likelihood"):
        for name in without[group].data_vars:
            np.testing.assert_allclose(with_simulator[group][name], without[group][name], rtol=2e-4, atol=2e-4)
    assert forward.calls > 64
    assert sum(forward.failures.values()) == 0


# What goes wrong.

KINDS = {1: "exception", 2: "nonfinite", 3: "shape", 6: "exception", 7: "shape", 8: "exception", 9: "nonfinite"}
TEXTS = {
    1: "ValueError: the solver did not converge",
    2: "returned 1 of 2 numbers as NaN or infinity",
    3: r"returned shape \(3,\), where shape=\(2,\) was promised",
    6: "SystemExit: licence not found",
    7: "returned list, which is no array",
    8: "Unsendable: a",
    9: r"returned numbers up to 1e\+300, beyond float32",
}


def check_failures(forward, also=None):
    """Each failure costs its own row and is counted under its kind; the others keep their values."""
    kinds = KINDS | (also or {})
    codes = jnp.array([0, *kinds, 10])
    found = jax.jit(jax.vmap(forward))(codes)
    np.testing.assert_array_equal(np.isnan(found).all(-1), [False] + len(kinds) * [True] + [False])
    np.testing.assert_array_equal(found[np.array([0, -1])], [[1.0, 2.0], [1.0, 2.0]])
    counts = {kind: list(kinds.values()).count(kind) for kind in forward.failures}
    assert forward.failures == counts
    assert forward.calls == len(codes)


def test_failures_cost_one_member_and_are_counted():
    forward = pf.simulator(troubled, (2,))
    check_failures(forward)
    forward.reset()
    assert (forward.calls, forward.batches, forward.messages) == (0, 0, {})
    assert sum(forward.failures.values()) == 0


@pytest.mark.parametrize("code", KINDS)
def test_the_first_messages_are_kept(code):
    forward = pf.simulator(troubled, (2,))
    jax.vmap(forward)(jnp.full(5, code))
    assert list(forward.messages) == [KINDS[code]]
    assert len(forward.messages[KINDS[code]]) == 3
    with pytest.raises(AssertionError, match=TEXTS[code]):
        raise AssertionError(forward.messages[KINDS[code]][0])


def test_counts_are_right_from_many_threads():
    forward = pf.simulator(troubled, (2,))
    program = jax.jit(jax.vmap(forward))
    program(jnp.zeros(30, int))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: program(jnp.arange(30) % 3).block_until_ready(), range(20)))
    assert (forward.calls, forward.batches) == (21 * 30, 21)
    assert (forward.failures["exception"], forward.failures["nonfinite"]) == (200, 200)


def test_failures_are_said_by_infer():
    def sometimes(slope, offset, x):
        if slope < 0:
            raise ValueError("negative slope")
        return linear(slope, offset, x)

    forward = pf.simulator(sometimes, (3,))
    with pytest.warns(
        UserWarning, match=r"\d+ of \d+ calls of the simulator 'sometimes' failed .*ValueError: negative"
    ):
        tree = pf.infer(line(forward), method=PCN, draws=50, progress=False, y=Y)
    assert bool((tree["posterior"]["slope"] >= 0).all())
    assert forward.failures["exception"] > 0


def test_a_run_without_a_success_says_what_the_function_said():
    def never(slope, offset, x):
        raise OSError("no such mesh")

    with pytest.raises(InferenceError, match="failed .*the first exception: OSError: no such mesh"):
        pf.infer(line(pf.simulator(never, (3,))), method=PCN, draws=10, progress=False, y=Y)


# Pools.


@pytest.mark.parametrize("pool", [Inline, lambda: ThreadPoolExecutor(3)], ids=["inline", "threads"])
def test_members_go_to_any_pool(pool):
    pool = pool()
    seen = []  # closures reach pools of this process, which do not pickle them
    forward = pf.simulator(lambda a: (seen.append(1), a)[1], (), executor=pool)
    np.testing.assert_array_equal(jax.vmap(forward)(jnp.arange(9.0)), np.arange(9.0))
    assert len(seen) == 9


def test_lost_members_are_submitted_once_more():
    pool = Unreliable()
    forward = pf.simulator(process_of, (), executor=pool)
    program = jax.jit(jax.vmap(forward))
    program(jnp.zeros(7))
    pool.submitted, before = 0, forward.failures["worker"]
    found = program(jnp.zeros(7))
    # Tasks 3 and 6 of 7 are lost, and of the two that are submitted again (8 and 9) the second.
    assert pool.submitted == 9
    assert (int(np.isnan(found).sum()), forward.failures["worker"] - before) == (1, 1)
    assert "OSError: the node went away" in forward.messages["worker"][-1]


def test_a_process_pool_runs_the_members(processes):
    forward = pf.simulator(process_of, (), executor=processes)
    found = jax.jit(jax.vmap(forward))(jnp.zeros(20))
    assert os.getpid() not in set(np.asarray(found))
    scale = 3.0
    by_value = pf.simulator(lambda a: scale * a, (), executor=processes)
    np.testing.assert_array_equal(jax.vmap(by_value)(jnp.arange(3.0)), [0.0, 3.0, 6.0])
    check_failures(pf.simulator(troubled, (2,), executor=processes))


def test_a_worker_that_dies_ends_a_process_pool_with_a_clear_error():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        forward = pf.simulator(crash_of_negatives, (3,), executor=pool)
        with pytest.raises(MethodError, match=r"takes no more work \(BrokenProcessPool.*timeout=.*costs one member"):
            pf.infer(line(forward), method=PCN, draws=20, progress=False, y=Y)
        assert forward.failures["worker"] > 0
        with pytest.raises(MethodError, match="takes no more work"):
            forward(1.0, 1.0, X)


def test_a_pool_that_ends_is_named_before_a_run_and_after_it():
    pool = Mortal()
    forward = pf.simulator(linear, (3,), executor=pool)
    options = {"method": PCN, "draws": 20, "progress": False, "y": Y}
    model = line(forward)
    first, second = (pf.infer(model, **options) for _ in range(2))
    assert pf.attributes(second)["compile_seconds"] < 0.1 * pf.attributes(first)["compile_seconds"]
    # Nothing is traced again in what follows: the door and the end of the run look at the pool.
    calls, pool.left = forward.calls, 50
    with pytest.raises(MethodError, match="'linear' takes no more work .*shut down.*Make a new executor"):
        pf.infer(model, **options)
    assert forward.calls > calls
    calls = forward.calls
    with pytest.raises(MethodError, match="takes no more work"):
        pf.infer(model, **options)
    assert forward.calls == calls


def test_a_pool_that_was_shut_down_is_refused_while_tracing():
    pool = ThreadPoolExecutor(1)
    forward = pf.simulator(linear, (3,), executor=pool)
    pool.shutdown()
    with pytest.raises(MethodError, match=r"takes no more work \(RuntimeError: cannot schedule new futures"):
        jax.jit(forward)(1.0, 1.0, X)
    assert forward.calls == 0


# Time limits.


@pytest.mark.parametrize("pool", ["none", "threads", "processes"])
def test_calls_with_a_limit_run_in_children(pool, processes):
    executor = {"none": None, "threads": ThreadPoolExecutor(2), "processes": processes}[pool]
    forward = pf.simulator(troubled, (2,), executor=executor, timeout=0.8)
    check_failures(forward, {4: "timeout", 5: "worker"})
    assert forward.messages["timeout"] == ["not done after 0.8 s"]
    assert "ended with code 7" in forward.messages["worker"][0]


def test_a_child_that_takes_too_long_is_killed_with_what_it_started(gone):
    forward = pf.simulator(with_grandchild, (), timeout=0.5)
    start = time.monotonic()
    assert math.isnan(float(forward(1.0)))
    assert time.monotonic() - start < 3.0
    assert gone() == []


def test_start_of_a_child_is_no_time_of_the_call():
    end_children()
    forward = pf.simulator(slow_to_load, (), timeout=0.3)
    assert float(forward(2.0)) == 2.0


def test_children_are_kept_for_the_next_call_and_end_on_request():
    end_children()
    forward = pf.simulator(process_of, (), timeout=5.0)
    found = set(np.asarray(jax.jit(jax.vmap(forward))(jnp.zeros(10))))
    assert len(found) == 1
    number = int(found.pop())
    assert number != os.getpid()
    assert _lives(number)
    end_children()
    assert not _lives(number)


# Dask.


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as local,
        distributed.Client(local) as client,
    ):
        yield client


def test_dask_runs_members_in_its_workers_and_their_children(cluster):
    forward = pf.simulator(process_of, (), executor=cluster.get_executor())
    workers = set(cluster.run(os.getpid).values())
    assert set(np.asarray(jax.jit(jax.vmap(forward))(jnp.zeros(16))).astype(int)) <= workers
    limited = pf.simulator(process_of, (), executor=cluster.get_executor(), timeout=10.0)
    children = set(np.asarray(jax.jit(jax.vmap(limited))(jnp.zeros(8))).astype(int))
    assert len(children) <= 2
    assert not children & (workers | {os.getpid()})
    check_failures(
        pf.simulator(troubled, (2,), executor=cluster.get_executor(), timeout=1.0), {4: "timeout", 5: "worker"}
    )
    with pytest.raises(ArgumentError, match=r"write executor=client\.get_executor\(\)"):
        pf.simulator(linear, (3,), executor=cluster)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_dask_worker_costs_one_member(cluster):
    """About 10 s: the scheduler gives a task to four workers before it gives up, and we do so twice."""
    forward = pf.simulator(troubled, (2,), executor=cluster.get_executor())
    found = jax.vmap(forward)(jnp.array([0, 5, 0, 0]))
    np.testing.assert_array_equal(np.isnan(found).all(-1), [False, True, False, False])
    assert forward.failures["worker"] == 1
    assert "KilledWorker" in forward.messages["worker"][0]
    # The cluster has new workers, and goes on.
    assert np.isfinite(jax.vmap(forward)(jnp.zeros(3))).all()


# No gradient.


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd, jax.hessian, lambda f: jax.jit(jax.grad(f))])
def test_derivatives_are_refused_while_tracing(derivative):
    forward = pf.simulator(linear, (3,))
    with pytest.raises(MethodError, match=r"'linear' has no gradient: use EKI, PreconditionedCrankNicolson \(pcn\)"):
        derivative(lambda s: forward(s, 1.0, X).sum())(1.0)
    assert forward.calls == 0


def test_derivatives_that_do_not_pass_through_it_are_right():
    forward = pf.simulator(linear, (3,))
    assert float(jax.grad(lambda s: s * forward(1.0, 1.0, X).sum())(2.0)) == 6.0
    assert float(jax.grad(lambda s: s**2 + forward(jax.lax.stop_gradient(s), 1.0, X).sum())(2.0)) == 4.0


@pytest.mark.parametrize(
    "method", [pf.NUTS(), "laplace", "gaussian_vi", "pathfinder", "flow_vi", pf.NUTS(coordinates="z")], ids=str
)
def test_methods_with_gradients_are_refused_at_the_door(method):
    forward = pf.simulator(linear, (3,))
    refused_by_method(method, line(forward))
    assert forward.calls == 0


def test_the_simulator_is_found_by_data_flow():
    forward = pf.simulator(linear, (3,))

    @jax.jit
    def hidden(slope, offset, x):
        return jax.lax.cond(slope > 0, lambda s: forward(s, offset, x), lambda s: 2 * forward(s, offset, x), slope)

    def of_constants(slope, offset, x):
        return slope * x + offset + 0 * forward(1.0, 1.0, x)

    for model, held, found in (
        (line(forward), True, (forward,)),
        (line(hidden), True, (forward,)),
        (line(of_constants), False, (forward,)),
        (line(linear), False, ()),
    ):
        problem = read_problem(model, (), {"y": Y})
        assert holds_simulator(problem) is held
        assert simulators(problem) == found
    tree = pf.infer(line(of_constants), method="laplace", draws=10, progress=False, y=Y)
    assert np.isfinite(tree["posterior"]["slope"]).all()


def test_auto_takes_a_method_without_gradients():
    def counts(y=None):
        rate = numpyro.sample("rate", dist.HalfNormal(2.0))
        numpyro.sample("y", dist.Poisson(forward(rate, 0.1, X)), obs=y)

    forward = pf.simulator(linear, (3,))
    method, _, reason = choose("auto", None, read_problem(line(forward), (), {"y": Y}))
    assert (type(method).__name__, "Gaussian" in reason) == ("EKI", True)
    method, _, reason = choose("auto", None, read_problem(counts, (), {"y": np.array([1, 2, 1])}))
    assert (type(method).__name__, "simulator" in reason) == ("TemperedSMC", True)


# Arguments.


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"fn": 3}, ArgumentError, "fn is a function of arrays; got int"),
        ({"shape": (2, -1)}, ArgumentError, r"shape is that of one output.*got \(2, -1\)"),
        ({"shape": None}, ArgumentError, "shape is that of one output.*got None"),
        ({"dtype": int}, ArgumentError, "floating type, because NaN marks .*got <class 'int'>"),
        ({"dtype": "dubble"}, ArgumentError, "floating type.*got 'dubble'"),
        ({"timeout": 0}, ArgumentError, "seconds above 0; got 0"),
        ({"timeout": True}, ArgumentError, "seconds above 0; got True"),
        ({"executor": 4}, ArgumentError, "pool with a method submit.*got 4"),
        ({"executor": ThreadPoolExecutor}, ArgumentError, "pool with a method submit"),
    ],
)
def test_options_are_checked_when_it_is_made(given, error, match):
    options = {"fn": linear, "shape": (3,)} | given
    with pytest.raises(error, match=match):
        pf.simulator(options.pop("fn"), options.pop("shape"), **options)


def test_a_pool_that_forks_is_refused():
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    with pytest.raises(MethodError, match=r'forks the process.*get_context\("spawn"\)'):
        pf.simulator(linear, (3,), executor=pool)


def test_calls_are_checked_while_tracing(processes):
    forward = pf.simulator(linear, (3,))
    with pytest.raises(ArgumentError, match=r"'linear' takes arrays of numbers; argument \[0\]\[1\] is str.*partial"):
        forward(1.0, "two", X)
    with pytest.raises(ArgumentError, match=r"argument \[1\]\['x'\] is"):
        forward(1.0, 1.0, x=jax.random.key(0))
    with pytest.raises(ArgumentError, match=r"dtype=float64.*JAX_ENABLE_X64=1"):
        pf.simulator(linear, (3,), dtype="float64")(1.0, 1.0, X)
    lock = threading.Lock()
    for options in ({"executor": processes}, {"timeout": 1.0}):
        with pytest.raises(MethodError, match="cannot be sent to another process: TypeError.*locks inside it"):
            pf.simulator(lambda a: (lock, a)[1], (), **options)(1.0)
