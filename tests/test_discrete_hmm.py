"""`DiscreteHMM` against the sum over all paths of NumPyro's joint density."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import stats

import pushforward as pf
from pushforward._errors import InferenceError, MethodError
from pushforward.methods.discrete_hmm import DiscreteHMM
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.online import online

sample, deterministic = numpyro.sample, numpyro.deterministic
START = np.array([0.5, 0.3, 0.2])
MOVES = np.array([[0.8, 0.2, 0.0], [0.1, 0.7, 0.2], [0.0, 0.3, 0.7]])
MEANS = np.array([-1.0, 0.5, 2.0])
Y = np.array([-0.7, 0.4, 1.9, 0.6, 2.2])
GAPS = np.array([-0.7, np.nan, 1.9, np.nan, 2.2])


def look(mean, y):
    sample("y", dist.Normal(mean, 0.8), obs=y)


def move(s, name="s"):
    return sample(name, dist.Categorical(probs=jnp.array(MOVES.tolist())[s]))


def begin():
    return sample("s0", dist.Categorical(probs=jnp.array(START.tolist())))


def plain(y):
    def step(s, y):
        s = move(s)
        deterministic("mean", jnp.array(MEANS.tolist())[s])
        look(jnp.array(MEANS.tolist())[s], y)
        return s, None

    scan(step, begin(), y)


def covariates(y, u):
    """Transition and observation change with a covariate and with a counter in the carry; the start is fixed."""

    def step(carry, row):
        s, t = carry
        y, u = row
        s = sample("s", dist.Categorical(logits=u * jnp.arange(3.0) + jnp.log(jnp.array(MOVES.tolist()) + 0.1)[s]))
        look(jnp.array(MEANS.tolist())[s] + 0.3 * t * u, y)
        return (s, t + 1), None

    scan(step, (1, 0), (y, u))


def two_sites(y):
    """Two sites of a step, the second in a plate and dependent on the first and on its own past."""

    def step(carry, y):
        s, b = carry
        s = sample("s", dist.Bernoulli(0.2 + 0.5 * s))
        with numpyro.plate("units", 2):
            b = sample("b", dist.Categorical(probs=jnp.stack([0.3 + 0.2 * s + 0.1 * b, 0.7 - 0.2 * s - 0.1 * b], -1)))
        deterministic("mean", s + b.sum())
        look(s + b @ jnp.array([1.0, -2.0]), y)
        return (s, b), None

    b0 = sample("b0", dist.Bernoulli(jnp.array([0.3, 0.6])).to_event(1))
    scan(step, (0, b0), y)


def observed_first(y):
    """Data of the initial state, and steps that observe before they move."""

    def step(s, y):
        look(jnp.array(MEANS.tolist())[s], y)
        return move(s), None

    s0 = begin()
    sample("y0", dist.Normal(jnp.array(MEANS.tolist())[s0], 1.0), obs=0.3)
    scan(step, s0, y)


def floating_carry(y):
    """The carry holds a function of the state, and a factor stands in the step."""

    def step(mean, y):
        s = sample("s", dist.Categorical(logits=-((mean - jnp.array(MEANS.tolist())) ** 2)))
        numpyro.factor("f", -0.3 * s * mean)
        mean = jnp.array(MEANS.tolist())[s]
        look(mean, y)
        return mean, None

    scan(step, jnp.array(MEANS.tolist())[begin()], y)


def second_order(y):
    def step(carry, y):
        before, s = carry
        new = sample(
            "s", dist.Categorical(probs=0.5 * jnp.array(MOVES.tolist())[s] + 0.5 * jnp.array(MOVES.tolist())[before])
        )
        look(jnp.array(MEANS.tolist())[new] + 0.3 * before, y)
        return (s, new), None

    scan(step, (2, begin()), y)


def more_starts(y):
    """More initial states than states."""

    def step(b, y):
        b = sample("b", dist.Bernoulli(0.2 + 0.15 * b))
        look(1.5 * b, y)
        return b, None

    scan(step, sample("s0", dist.DiscreteUniform(0, 4)), y)


def seen_after(y):
    def step(s, _):
        s = move(s)
        return s, jnp.array(MEANS.tolist())[s]

    _, means = scan(step, begin(), None, length=len(Y))
    last = deterministic("total", means.sum())
    sample("late", dist.Normal(last, 1.0))
    look(means, y)


FORMS = {
    "missing data": (plain, {"y": GAPS}),
    "two sites": (two_sites, {"y": Y[:3]}),
    "second order": (second_order, {"y": Y}),
    "covariates": (covariates, {"y": Y, "u": np.array([0.1, -0.4, 0.3, 0.2, 0.5])}),
    "observed first": (observed_first, {"y": Y}),
    "floating carry": (floating_carry, {"y": Y}),
    "more starts": (more_starts, {"y": Y}),
    "seen after": (seen_after, {"y": Y}),
}
FAST = ("missing data", "second order")


class Paths:
    """All values of the latent sites, with their weights given the data up to a step."""

    def __init__(self, model, given):
        self.problem = problem = read_problem(model, (), given)
        self.space = read_state_space(problem)
        names = problem.structure.discrete
        shapes = [problem.sites[n].shape for n in names]
        sizes = [int(np.prod(shape)) for shape in shapes]
        ranges: list[Any] = [problem.sites[n].states for n, size in zip(names, sizes, strict=True) for _ in range(size)]
        rows = np.array(list(itertools.product(*ranges)))
        ends = np.cumsum(sizes)
        parts = np.split(rows, ends[:-1], 1)
        self.values = {n: p.reshape(-1, *s) for n, p, s in zip(names, parts, shapes, strict=True)}

        def one(values):
            late = {n: jnp.zeros(problem.sites[n].shape) for n in problem.structure.slots if n not in names}
            found = problem.evaluate_sites(values | late)
            prior = sum(jnp.sum(v) for n, v in found.log_prior.items() if n in names)
            timed = {
                n: v for n, v in found.log_likelihood.items() if problem.sites[n].dims[:1] == ("time",) or n == "y"
            }
            fixed = sum((jnp.sum(v) for n, v in found.log_likelihood.items() if n not in timed), found.correction)
            return prior + fixed, sum(v.reshape(v.shape[0], -1).sum(1) for v in timed.values()), found.deterministics

        self.fixed, self.data, found = map(jax.device_get, jax.jit(jax.vmap(one))(self.values))
        self.sites = self.values | found

    def law(self, until):
        """Probabilities of the paths given the data of the first steps, and the log likelihood of these."""
        density = self.fixed + self.data[:, :until].sum(1)
        weights = np.exp(density - density.max())
        return weights / weights.sum(), np.log(weights.sum()) + density.max()


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FORMS])
def test_everything_is_the_sum_over_all_paths(name, float64):
    model, given = FORMS[name]
    paths = Paths(model, given)
    steps, draws = len(given["y"]), 4000
    method = DiscreteHMM()

    @jax.jit
    def run(arrays):
        chain = type(paths.space)(arrays, paths.space.structure).chain()
        moments = method.trajectories(chain, jax.random.key(1), 1, "moments")
        return method.log_likelihood(chain), moments, method.trajectories(chain, jax.random.key(0), draws, "draws")

    likelihood, moments, found = run(paths.problem.arrays)
    weights, evidence = paths.law(steps)
    np.testing.assert_allclose([likelihood, found.log_evidence, moments.log_evidence], evidence, atol=1e-10)
    if model is not floating_carry:  # its factor has no place in time
        for site, (mean, sd) in moments.filtering.items():
            forecast = moments.one_step[site]
            for t in range(steps):
                at = paths.sites[site][:, t]
                for (m, d), law in (((mean, sd), paths.law(t + 1)[0]), (forecast, paths.law(t)[0])):
                    exact = np.tensordot(law, at, 1)
                    np.testing.assert_allclose(m[t], exact, atol=1e-10)
                    np.testing.assert_allclose(d[t] ** 2, np.tensordot(law, (at - exact) ** 2, 1), atol=1e-10)
    check_draws(paths, found, weights)
    # Means of draws of the marginal laws: 6 standard errors of each of up to 30 numbers, false alarms 1e-7.
    for drawn, (mean, sd) in zip((found.filtering, found.one_step), pairs(moments), strict=True):
        for site in drawn:
            error = np.abs(drawn[site].mean(0) - mean[site])
            assert (error <= 6 * sd[site] / np.sqrt(draws) + 1e-10).all(), site


def pairs(moments):
    for group in (moments.filtering, moments.one_step):
        yield {n: v[0] for n, v in group.items()}, {n: v[1] for n, v in group.items()}


def check_draws(paths, found, weights):
    """Chi-squared of whole trajectories, rare ones pooled, false-alarm rate 1e-6; densities as NumPyro has them."""
    flat = [
        np.concatenate([v[n].reshape(len(v[n]), -1) for n in paths.values], 1) for v in (paths.values, found.posterior)
    ]
    number = {tuple(row): i for i, row in enumerate(flat[0].tolist())}
    index = np.array([number[tuple(row)] for row in np.asarray(flat[1]).tolist()])
    counts, expected = np.bincount(index, minlength=len(weights)), weights * len(index)
    assert not counts[weights == 0].any()
    common = expected > 5
    seen, wanted = (np.append(v[common], v[~common].sum()) for v in (counts, expected))
    assert common.sum() > 10
    assert stats.chisquare(seen, wanted).pvalue > 1e-6
    total = sum(
        v.reshape(len(index), -1).sum(1)
        for part in (found.log_prior, found.log_likelihood)
        for n, v in part.items()
        if n != "late"
    )
    density = (paths.fixed + paths.data.sum(1))[index]
    if "f" not in paths.problem.sites:
        np.testing.assert_allclose(total, density, atol=1e-10)
    for name, value in paths.sites.items():
        np.testing.assert_allclose(found.posterior[name], value[index], atol=1e-12)


# ------------------------------------------------------------------------------------------ parameters and gradients


def with_parameter(y):
    """A left-to-right chain, whose moves back have probability 0."""
    p = sample("p", dist.Beta(2.0, 2.0))
    moves = jnp.stack([jnp.stack([1 - p, p, 0.0]), jnp.stack([0.0, 1 - p, p]), jnp.array([0.0, 0.0, 1.0])])

    def step(s, y):
        s = sample("s", dist.Categorical(probs=moves[s]))
        look(jnp.array(MEANS.tolist())[s], y)
        return s, None

    scan(step, 0, y)


def of_parameter(y):
    """The log likelihood of `with_parameter` as a function of p and y."""
    space = read_state_space(read_problem(with_parameter, (), {"y": y}))
    assert DiscreteHMM().why_not(space) is None
    structure = space.structure
    return lambda p, y: DiscreteHMM().log_likelihood(type(space)((y,), structure).chain({"p": p}))


def dense(p, y):
    """The forward algorithm by matrices, in NumPy."""
    moves = np.array([[1 - p, p, 0.0], [0.0, 1 - p, p], [0.0, 0.0, 1.0]])
    law, total = np.array([1.0, 0.0, 0.0]), 0.0
    for value in y:
        law = (law @ moves) * (1.0 if np.isnan(value) else stats.norm.pdf(value, MEANS, 0.8))
        total += np.log(law.sum())
        law /= law.sum()
    return total


def test_gradient_and_single_precision_of_a_long_series(float64):
    rng = np.random.default_rng(3)
    y = MEANS[np.minimum(np.arange(2000) // 300, 2)] + 0.8 * rng.normal(size=2000)
    y[rng.random(2000) < 0.1] = np.nan
    run = jax.jit(jax.value_and_grad(of_parameter(y)))
    value, slope = run(jnp.asarray(0.01), jnp.asarray(y))
    np.testing.assert_allclose(value, dense(0.01, y), atol=1e-8)
    step = 1e-6
    np.testing.assert_allclose(slope, (dense(0.01 + step, y) - dense(0.01 - step, y)) / (2 * step), rtol=1e-6)
    with jax.enable_x64(False):
        rough, also = jax.jit(jax.value_and_grad(of_parameter(y.astype("float32"))))(
            jnp.float32(0.01), jnp.asarray(y, "float32")
        )
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, value, rtol=1e-6)
    np.testing.assert_allclose(also, slope, rtol=1e-3)


@pytest.mark.slow
def test_nuts_over_the_sum_agrees_with_quadrature():
    """Mean and sd of p in 5 Monte Carlo standard errors each (false alarm 1e-6), and the shares of a state."""
    y = np.array([-1.2, -0.3, -0.8, 0.7, 0.2, np.nan, 1.1, 2.3, 1.6, 2.2])
    tree = pf.infer(with_parameter, y=y, progress=False, draws=1000)
    assert pf.attributes(tree)["reason"].startswith("the model is a scan with finitely many states and with parameters")
    grid = np.linspace(0.0, 1.0, 2001)[1:-1]
    density = np.array([dense(p, y) for p in grid]) + stats.beta.logpdf(grid, 2, 2)
    weights = np.exp(density - density.max())
    weights /= weights.sum()
    mean = weights @ grid
    sd = np.sqrt(weights @ (grid - mean) ** 2)
    draws = tree["posterior"]["p"].to_numpy()
    size = pf.attributes(tree)["ess_min"]
    assert abs(draws.mean() - mean) < 5 * sd / np.sqrt(size)
    assert abs(draws.std() - sd) < 5 * sd / np.sqrt(size)
    assert (np.diff(tree["posterior"]["s"].to_numpy(), axis=-1) >= 0).all()
    assert tree["posterior"]["s"].dtype.kind == "i"


# --------------------------------------------------------------------------------------------------------- for users


def test_infer_and_forecast(float64):
    """`infer` picks the method, and `forecast` goes on from its carry, which has integers alone."""
    tree = pf.infer(plain, y=GAPS, draws=4000, progress=False)
    attributes = pf.attributes(tree)
    assert attributes["method"] == "DiscreteHMM"
    assert attributes["reason"].startswith("the model is a scan with finitely many states and without parameters")
    assert tree["posterior"]["s"].dims == ("chain", "draw", "time")
    np.testing.assert_allclose(
        tree["sample_stats"]["lp"][0, :3],
        [
            sum(float(tree[g][n][0, i].sum()) for g in ("log_prior", "log_likelihood") for n in tree[g].data_vars)
            for i in range(3)
        ],
    )
    ahead = pf.forecast(tree, plain, y=np.concatenate([GAPS, [np.nan, np.nan]]))["predictions"]
    paths = Paths(plain, {"y": GAPS})
    last = np.bincount(paths.values["s"][:, -1], paths.law(5)[0], 3)
    # Shares of three states among 4000 draws: 6 standard errors, false alarm 1e-8.
    share = np.bincount(ahead["s"].to_numpy()[0, :, 1], minlength=3) / 4000
    assert (np.abs(share - last @ MOVES @ MOVES) < 6 * 0.5 / np.sqrt(4000)).all()


def counts(y, seen):
    """Counts with gaps that `obs_mask` imputes."""

    def step(s, row):
        y, seen = row
        s = move(s)
        sample("y", dist.Poisson(1.0 + 2.0 * s), obs=y, obs_mask=seen)
        return s, None

    scan(step, 0, (y, seen))


def counts_with_nan(y):
    def step(s, y):
        s = move(s)
        sample("y", dist.Poisson(1.0 + 2.0 * s), obs=y)
        return s, None

    scan(step, 0, y)


@pytest.mark.slow
def test_imputed_counts_are_not_summed_over(float64):
    """The missing part has infinitely many values, and nothing follows from it; it is drawn from its law."""
    y, seen = np.array([1, 3, 0, 6]), np.array([True, False, True, True])
    tree = pf.infer(counts, method=DiscreteHMM(), y=y, seen=seen, draws=4000, progress=False)
    other = pf.infer(counts_with_nan, method=DiscreteHMM(), y=np.where(seen, y, np.nan), draws=4000, progress=False)
    same = [pf.attributes(t)["log_evidence"] for t in (tree, other)]
    np.testing.assert_allclose(*same, atol=1e-12)
    drawn, s = (tree["posterior"][n].to_numpy()[0] for n in ("y", "s"))
    np.testing.assert_array_equal(drawn[:, seen], np.broadcast_to(y[seen], (4000, 3)))
    # The mean of y - E(y | s) in 6 standard errors, at most sqrt(5 / 4000) each; false alarm 1e-8.
    assert abs((drawn[:, 1] - 1.0 - 2.0 * s[:, 1]).mean()) < 6 * np.sqrt(5 / 4000)
    moments = pf.infer(counts, method=DiscreteHMM(store="moments"), y=y, seen=seen, draws=1, progress=False)
    assert set(moments["filtering"].data_vars) == {"s", "s_sd"}


def test_impossible_data_are_named():
    def model(y):
        def step(s, y):
            s = move(s)
            sample("y", dist.Categorical(probs=jnp.eye(3)[s]), obs=y)
            return s, None

        scan(step, 0, y)

    y = np.array([0, 1, 2, 0])  # a move from 2 to 0 has probability 0
    tree = pf.infer(model, method=DiscreteHMM(store="last"), y=y, draws=2, progress=False, throw=False)
    attributes = pf.attributes(tree)
    assert attributes["outcome"] == "nonfinite"
    assert attributes["impossible_step"] == 3
    with pytest.raises(InferenceError, match="data of step 3 .counted from 0. are impossible"):
        pf.infer(model, method=DiscreteHMM(store="last"), y=y, draws=2, progress=False)


@pytest.mark.slow
def test_evaluation_in_batches(monkeypatch, float64):
    """Many states are evaluated in parts; the numbers stay."""
    model, given = FORMS["second order"]
    space = read_state_space(read_problem(model, (), given))
    whole = jax.jit(lambda: DiscreteHMM().log_likelihood(space.chain()))()
    monkeypatch.setattr("pushforward.model.finite._AT_ONCE", 7)
    monkeypatch.setattr("pushforward.methods.discrete_hmm._STORED", 1)
    parts = jax.jit(lambda: DiscreteHMM().log_likelihood(space.chain()))()
    np.testing.assert_allclose(parts, whole, atol=1e-12)


@pytest.mark.slow
def test_a_stream_is_the_same_filter(float64):
    stream = online(observed_first, method=DiscreteHMM())
    found = [stream.step(y=y) for y in Y]
    space = read_state_space(read_problem(observed_first, (), {"y": Y}))
    whole = jax.jit(lambda: DiscreteHMM().trajectories(space.chain(), jax.random.key(0), 1, "moments"))()
    np.testing.assert_allclose(stream.log_evidence, whole.log_evidence, atol=1e-12)
    np.testing.assert_allclose([(f.mean["s"], f.sd["s"]) for f in found], whole.filtering["s"].T, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ errors


def body(law, start: Any = 0, carry=lambda s, before: s):
    def model(y):
        def step(before, y):
            s = sample("s", law(before))
            look(jnp.sum(s) * 1.0, y)
            return carry(s, before), None

        scan(step, start, y)

    return model


def continuous_start(y):
    def step(carry, y):
        s, x = carry
        s = move(s)
        look(s + x, y)
        return (s, x), None

    scan(step, (0, sample("x0", dist.Normal(0.0, 1.0))), y)


def running_sum(y):
    def step(carry, y):
        s, total = carry
        s = move(s)
        look(total, y)
        return (s, total + s), None

    scan(step, (0, 0.0), y)


MISFITS = {
    "infinitely many values": (
        body(lambda s: dist.Poisson(1.0 + s)), "not finite: latent site 's' takes infinitely many.*ParticleFilter"
    ),
    "a support that is not known": (
        body(lambda s: dist.Binomial(1 + s, 0.5)), "'s' takes infinitely many values, or values that are not known"
    ),
    "a continuous site": (
        body(lambda s: dist.Normal(s, 1.0), 0.0), r"latent site 's' \(Normal\) of the step is cont.*ParticleFilter"
    ),
    "a continuous start": (continuous_start, r"'x0' \(Normal\) of the initial state is continuous"),
    "a running sum": (running_sum, r"leaf 1 of the carry \(float32, shape \(\)\) depends on all earlier values"),
    "too many states": (
        body(lambda s: dist.Bernoulli(jnp.full(13, 0.5)).to_event(1), jnp.zeros(13, int)),
        r"\['s'\] take 8,192 values jointly, which makes 8,192 states, more than 4,096",
    ),
    "too many states of two steps": (
        body(
            lambda c: dist.Bernoulli(jnp.full(7, 0.5)).to_event(1),
            (jnp.zeros(7, int), jnp.zeros(7, int)),
            lambda s, before: (s, before[0]),
        ),
        "take 128 values jointly, which makes 16,384 states over 2 steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_models_that_do_not_fit(name):
    model, text = MISFITS[name]
    with pytest.raises(MethodError, match=f"DiscreteHMM does not fit this model: .*{text}"):
        pf.infer(model, method=DiscreteHMM(), y=Y, draws=2, progress=False)


def test_options_and_parameters():
    with pytest.raises(MethodError, match=r"no place for parameters.*states=pf.DiscreteHMM\(\)"):
        DiscreteHMM(augment=True)
    with pytest.raises(MethodError, match=r"store=...\) takes one of .*got 'all'"):
        DiscreteHMM(store="all")
    with pytest.raises(MethodError, match=r"free parameters \['p'\].*states=pf.DiscreteHMM"):
        pf.infer(with_parameter, method=DiscreteHMM(), y=Y, progress=False)
