"""`EnKF.fit`: learned inflation and localisation radius, their objective, files, resuming, and failures."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward._errors import DataError, MethodError
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


def test_learned_values_become_options(tmp_path):
    """They are better than those before in the objective of the training, and they are all that changes."""
    y = data()
    training = pf.FilterTraining(steps=12, repeats=1, skip=5)
    learned = METHOD.fit(ring, y=y, training=training, progress=False)
    assert type(learned.inflation.factor) is type(learned.analysis.radius) is float
    restored = eqx.tree_at(lambda m: (m.inflation.factor, m.analysis.radius), learned, (1.1, 3.0))
    assert restored == METHOD

    def value(method):
        key = jax.random.split(jax.random.key(0), 1)[0]
        return float(_learned_filter.score(space_of(y), method.filter, key, 5).value)

    assert value(learned) > value(METHOD) + 0.002
    pf.save(tmp_path / "filter.pf", learned)
    assert pf.load(tmp_path / "filter.pf") == learned
    tree = pf.infer(ring, method=learned, y=y, progress=False)
    assert tree["filtering"]["x"].shape == (1, 8, 60, 8)


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
    found = np.full((2, 6), np.nan)
    trials = _learned_filter._Trials(found)
    trials.points = [np.array([float(i), 0.0]) for i in range(3)]
    found[:, :3] = [[-1.5, -np.inf, -1.4], [-1, 17, -1]]
    with pytest.warns(
        UserWarning, match="in 1 of 3 runs .* last in run 1 at time step 17; the best values of the other"
    ):
        _learned_filter._warn(trials)
    np.testing.assert_array_equal(trials.best(), [2.0, 0.0])
    with pytest.raises(MethodError, match=r"before training diverged at time step \d+. Start from more members"):
        METHOD.fit(ring, y=y, growth=1e30, progress=False)


def test_the_best_run_has_good_neighbours():
    """A lucky run amid bad ones loses to a steady group; a run that lost the truth counts for no more than others."""
    trials = _learned_filter._Trials(np.full((2, 7), np.nan))
    trials.points = [np.array([v]) for v in (0.0, 0.02, -0.02, 1.0, 1.02, 0.98, 1.1)]
    trials.found[0] = [-1.400, -1.409, -1.409, -1.402, -1.402, -1.403, -9.0]
    assert trials.best()[0] != 0.0


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
