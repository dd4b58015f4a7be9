"""`EnKF.fit`: learned inflation and localisation radius, their objective, files, resuming, and failures."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.linalg
import scipy.stats
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward._errors import DataError, MethodError
from pushforward._runner import Runner
from pushforward.methods import _learned_filter
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import lorenz96

METHOD = pf.EnKF(8, pf.LETKF(3.0), inflation=pf.Multiplicative(1.1), rotate=True)


def ring(y, growth=1.0):
    """Eight independent walks."""

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(growth * x, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(8), 1.0).to_event(1)), y)


def data(steps=60, seed=0):
    rng = np.random.default_rng(seed)
    y = np.cumsum(0.5 * rng.normal(size=(steps, 8)), 0) + rng.normal(size=(steps, 8))
    y[3, 2] = y[7] = np.nan
    return y


def space_of(y):
    return read_state_space(read_problem(ring, (), {"y": y}))


def test_the_objective_is_the_log_likelihood_per_datum(float64):
    y = data()
    space, key, method = space_of(y), jax.random.key(3), pf.EnKF(8, inflation=pf.Multiplicative(1.1))
    found = jax.jit(lambda: _learned_filter.score(space, method.filter, key, 0))()
    expected = jax.jit(method.log_likelihood)(space.chain(), key) / np.sum(~np.isnan(y))
    np.testing.assert_allclose(found.value, expected, rtol=1e-12)
    assert found.failed_at == -1


TURN = np.linalg.qr(np.random.default_rng(4).normal(size=(8, 8)))[0]


def turning(y):
    """Eight numbers that a fixed matrix turns, without noise: all that is random is the first ensemble."""

    def step(x, y):
        x = numpyro.deterministic("x", 1.1 * TURN @ x)
        numpyro.sample("y", dist.Normal(x, 0.7).to_event(1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(8), 1.0).to_event(1)), y)


def gaspari_cohn(r):
    """The two pieces as Gaspari and Cohn (1999, eq. 4.10) print them."""
    near = -(r**5) / 4 + r**4 / 2 + 5 * r**3 / 8 - 5 * r**2 / 3 + 1
    safe = np.maximum(r, 1.0)
    far = safe**5 / 12 - safe**4 / 2 + 5 * safe**3 / 8 + 5 * safe**2 / 3 - 5 * safe + 4 - 2 / (3 * safe)
    return np.where(r < 1, near, np.where(r < 2, far, 0.0))


def local_filter(members, y, factor, radius, skip):
    """Mean log likelihood per datum of an LETKF on a ring with inflated analyses, by covariances and loops."""
    size, total, count = len(members), 0.0, 0
    for t, row in enumerate(y):
        members = 1.1 * members @ TURN.T
        mean, kept = members.mean(0), ~np.isnan(row)
        anomalies, innovation = members - mean, (row - mean)[kept]
        if t >= skip and kept.any():
            cov = np.atleast_2d(np.cov(members[:, kept].T)) + 0.7**2 * np.eye(kept.sum())
            total += scipy.stats.multivariate_normal.logpdf(innovation, np.zeros(kept.sum()), cov)
            count += kept.sum()
        analysis = np.empty_like(members)
        for i in range(8):
            apart = np.abs(i - np.arange(8))[kept]
            precision = gaspari_cohn(np.minimum(apart, 8 - apart) / (1.82 * radius)) / 0.7**2
            seen = anomalies[:, kept]
            inner = np.linalg.inv((size - 1) * np.eye(size) + seen * precision @ seen.T)
            weights = scipy.linalg.sqrtm((size - 1) * inner).real
            shift = inner @ (seen * precision) @ innovation
            analysis[:, i] = mean[i] + shift @ anomalies[:, i] + factor * (weights @ anomalies[:, i])
        members = analysis
    return total / count


@pytest.mark.parametrize(("factor", "radius"), [(1.05, 1.2), (1.05, 3.0), (1.4, 1.2)])
def test_the_objective_is_that_of_a_filter_written_out(factor, radius, float64):
    """At other values than the method's, so that both numbers are in it; it is what the search raises."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=8), []
    for _ in range(9):
        x = 1.1 * TURN @ x
        y.append(x + 0.7 * rng.normal(size=8))
    y = np.array(y)
    y[2, 3] = y[5] = np.nan
    method = pf.EnKF(6, pf.LETKF(2.0), inflation=pf.Multiplicative(1.2))
    space = read_state_space(read_problem(turning, (), {"y": y}))
    point = jnp.log(jnp.array([factor - 1, radius]))
    given = (method, ("inflation", "radius"), space, jax.random.key(1), 2, 3)
    found = Runner().call(_learned_filter._mean_score, point, *given)
    starts = [method.filter.start(space.chain(), jax.random.split(k)[0])[0] for k in jax.random.split(given[3], 2)]
    expected = [local_filter(np.asarray(s.members), y, factor, radius, 3) for s in starts]
    assert abs(expected[0] - expected[1]) > 1e-5
    np.testing.assert_allclose(found.value, np.mean(expected), rtol=1e-9)
    assert found.failed_at == -1


def test_learned_values_become_options(tmp_path):
    """They are better than those before in the objective of the training, and they are all that changes."""
    y = data()
    training = pf.FilterTraining(steps=12, repeats=1, skip=5)
    learned = METHOD.fit(ring, y=y, training=training, progress=False)
    assert type(learned.inflation.factor) is type(learned.analysis.radius) is float
    restored = eqx.tree_at(lambda m: (m.inflation.factor, m.analysis.radius), learned, (1.1, 3.0))
    assert restored == METHOD

    def value(method):
        point = jnp.log(jnp.array([method.inflation.factor - 1, method.analysis.radius]))
        given = (METHOD, ("inflation", "radius"), space_of(y), jax.random.key(0), 1, 5)
        return float(Runner().call(_learned_filter._mean_score, point, *given).value)

    assert value(learned) > value(METHOD) + 0.002
    pf.save(tmp_path / "filter.pf", learned)
    assert pf.load(tmp_path / "filter.pf") == learned
    tree = pf.infer(ring, method=learned, y=y, progress=False)
    assert tree["filtering"]["x"].shape == (1, 8, 60, 8)


@pytest.mark.parametrize("inflation", [pf.Multiplicative(1.3), pf.Additive(0.3), pf.RTPS(0.9), pf.RTPP(0.2)])
def test_the_search_starts_at_the_method(inflation):
    """Each number is found again from its unbounded coordinate, and a larger coordinate is a larger number."""
    method = pf.EnKF(8, pf.LETKF(3.0), inflation=inflation)
    parts = _learned_filter.options(method, ("inflation", "radius"))
    start = [part.outward(part.where(method)) for part in parts]
    for move in (-0.5, 0.0, 0.5):
        moved = _learned_filter.with_values(method, parts, [u + move for u in start])
        for part in parts:
            before, after = part.where(method), part.where(moved)
            assert after == pytest.approx(before, rel=1e-6) if move == 0 else (after - before) * move > 0.01


def scored(value):
    """A score without differences between its blocks."""
    blocks = _learned_filter._BLOCKS
    return _learned_filter._Score(jnp.full(blocks, value / blocks), jnp.asarray(-1))


def tried(points, values):
    """Trials at points with the scores given, all of whose blocks are alike."""
    blocks = _learned_filter._BLOCKS
    trials = _learned_filter._Trials(np.full((1 + blocks, len(points)), np.nan))
    trials.points = [np.array(p) for p in points]
    trials.found[0], trials.found[1:] = -1, np.array(values) / blocks
    return trials


def test_the_search_climbs(monkeypatch):
    """On a parabola, in the logarithms of factor - 1 and radius, it comes within its tolerance of the top."""
    top = np.log([1.4 - 1, 6.0])

    def parabola(self, fn, point, *given):
        return scored(-0.03 * float(jnp.sum((point - top) ** 2)))

    monkeypatch.setattr(_learned_filter.Runner, "call", parabola)
    learned = METHOD.fit(ring, y=data(9), training=pf.FilterTraining(steps=60), progress=False)
    found = np.log([learned.inflation.factor - 1, learned.analysis.radius])
    assert np.abs(found - top).max() < 0.1


@pytest.mark.parametrize(
    ("method", "name", "part"),
    [
        pytest.param(METHOD, "radius", lambda m: m.analysis.radius, marks=pytest.mark.slow),
        (pf.EnKF(8, inflation=pf.Additive(0.3)), "inflation", lambda m: m.inflation.sd),
        pytest.param(
            pf.EnKF(8, inflation=pf.RTPS(0.9)), "inflation", lambda m: m.inflation.relaxation, marks=pytest.mark.slow
        ),
        pytest.param(
            pf.EnKF(8, inflation=pf.RTPP(0.9)), "inflation", lambda m: m.inflation.relaxation, marks=pytest.mark.slow
        ),
    ],
)
def test_one_number_alone(method, name, part):
    learned = method.fit(ring, y=data(), learn=(name,), training=pf.FilterTraining(4, 1, skip=5), progress=False)
    assert part(learned) != part(method)
    assert eqx.tree_at(part, learned, part(method)) == method


def test_a_search_resumes_where_it_stopped(tmp_path):
    y, path = data(), tmp_path / "search.pf"
    training = pf.FilterTraining(steps=8, repeats=1)
    whole = METHOD.fit(ring, y=y, training=training, progress=False)

    class Stopped(Exception):
        pass

    runs = []

    def stop(self, fn, *args, call=_learned_filter.Runner.call):
        if len(runs) == 5:
            raise Stopped
        runs.append(args)
        return call(self, fn, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_learned_filter.Runner, "call", stop)
        with pytest.raises(Stopped):
            METHOD.fit(ring, y=y, training=training, checkpoint=path, progress=False)
        runs[:] = [()]
        again = METHOD.fit(ring, y=y, training=training, checkpoint=path, progress=False)
    assert len(runs) == 4, "the five runs before were done again"
    assert again == whole


def test_divergence_is_reported_with_the_best_other_values_kept():
    """A run that failed is named with its time step; a step that grows without bound fails before training."""
    y = data(12)
    trials = tried([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], [-1.5, -np.inf, -1.4])
    trials.found[0, 1] = 17
    with pytest.warns(
        UserWarning, match="in 1 of 3 runs .* last in run 1 at time step 17; the best values of the other"
    ):
        _learned_filter._warn(trials)
    np.testing.assert_array_equal(trials.best(("inflation", "radius")), [2.0, 0.0])
    with pytest.raises(MethodError, match=r"before training diverged at time step \d+. Start from more members"):
        METHOD.fit(ring, y=y, growth=1e30, progress=False)


@pytest.mark.parametrize(
    ("learn", "direction"),
    [
        (("inflation", "radius"), [1.0, 0.0]),
        (("inflation", "radius"), [0.0, -1.0]),
        (("radius", "inflation"), [1.0, 2.0]),
        (("radius",), [-1.0]),
    ],
)
def test_of_what_is_as_good_the_safest_is_taken(learn, direction):
    """One standard error of the paired difference by blocks; neither the best nor what is clearly worse is taken."""
    points = np.arange(4.0)[:, None] * np.array(direction)
    wave = 0.001 * np.tile([1.0, -1.0], _learned_filter._BLOCKS // 2)
    trials = tried(points, [-1.0, -1.004, -1.004, -1.006])
    # The standard error of a difference is 0.0046 where blocks differ, 0 where they do not.
    trials.found[1:, [1, 3]] += wave[:, None]
    np.testing.assert_array_equal(trials.best(learn), points[1])


def test_the_best_run_has_good_neighbours():
    """A lucky run amid bad ones loses to a steady group; a run that lost the truth counts for no more than others."""
    points = [[v] for v in (0.0, 0.02, -0.02, 1.0, 1.02, 0.98, 1.1)]
    trials = tried(points, [-1.400, -1.409, -1.409, -1.402, -1.402, -1.403, -9.0])
    assert trials.best(("inflation",))[0] != 0.0


def test_refusals():
    y = data(9)
    for learn in ("radius", (), ("spread",), ("radius", "radius")):
        with pytest.raises(MethodError, match="takes a tuple of names"):
            METHOD.fit(ring, y=y, learn=learn)
    with pytest.raises(MethodError, match="learns the radius of pf.LETKF"):
        pf.EnKF(8, inflation=pf.Multiplicative()).fit(ring, y=y)
    with pytest.raises(MethodError, match="has none to learn. Write inflation=pf.Multiplicative"):
        pf.EnKF(8, pf.LETKF()).fit(ring, y=y)
    with pytest.raises(MethodError, match="takes pf.FilterTraining"):
        METHOD.fit(ring, y=y, training=3)
    with pytest.raises(MethodError, match="steps"):
        pf.FilterTraining(steps=0)
    with pytest.raises(DataError, match="learns from data"):
        METHOD.fit(lorenz96.model, observed=("y",), steps=4, size=8)

    def free(y):
        ring(y, numpyro.sample("growth", dist.Normal(0.0, 1.0)))

    with pytest.raises(MethodError, match=r"\['growth'\] are free"):
        METHOD.fit(free, y=y)
