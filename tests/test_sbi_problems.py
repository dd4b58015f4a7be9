"""Tasks of simulation-based inference: models against their densities, and exact draws against other roads.

Every statistical check has a fixed key and states how often it would fail by chance under another one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import stats
from scipy.special import ndtr, owens_t

from pushforward import problems
from pushforward.problems import gaussian_linear, gaussian_mixture, slcp, two_moons

TASKS = {"two_moons": two_moons, "gaussian_linear": gaussian_linear, "gaussian_mixture": gaussian_mixture, "slcp": slcp}
SHAPES = {"two_moons": (2,), "gaussian_linear": (10,), "gaussian_mixture": (2,), "slcp": (4, 2)}
WITH_DENSITY = ("gaussian_linear", "gaussian_mixture", "slcp")

every = pytest.mark.parametrize("name", TASKS)
every_density = pytest.mark.parametrize("name", WITH_DENSITY)


@functools.cache
def runs(name):
    """theta and x of the model in float64: ten runs at the keys of the stored data, then 4,000 more."""

    def one(key):
        trace = handlers.trace(handlers.seed(TASKS[name].model, key)).get_trace()
        return trace["theta"]["value"], trace["x"]["value"]

    stored = jax.vmap(jax.random.key)(jnp.arange(10))
    keys = jnp.concatenate([stored, jax.random.split(jax.random.key(100), 4000)])
    with jax.enable_x64(True):
        return tuple(np.asarray(v) for v in jax.jit(jax.vmap(one))(keys))


def simulate(name, n):
    """n independent pairs of theta and x."""
    return tuple(v[10 : 10 + n] for v in runs(name))


def nodes_between(breaks, order=16):
    """Gauss-Legendre nodes and weights on each interval between breaks, joined; shapes (intervals * order,)."""
    z, w = np.polynomial.legendre.leggauss(order)
    middle, half = (breaks[1:] + breaks[:-1]) / 2, (breaks[1:] - breaks[:-1]) / 2
    return (middle[:, None] + half[:, None] * z).ravel(), (half[:, None] * w).ravel()


# ------------------------------------------------------------------------------------------------ what all promise


@every
def test_stored_data_are_the_model_at_its_keys(name):
    task = TASKS[name]
    assert (task.PARAMETER, task.DATA) == ("theta", "x")
    assert task.observations().shape == (10, *SHAPES[name])
    assert task.observations(3).shape == (3, *SHAPES[name])
    theta, x = (v[:10] for v in runs(name))
    assert theta == pytest.approx(task.TRUTHS, abs=5.1e-7)
    assert x == pytest.approx(task.OBSERVATIONS, abs=5.1e-7)
    with pytest.raises(ValueError, match="read-only"):
        task.observations()[0] = 0.0
    for n in (0, 11):
        with pytest.raises(ValueError, match=f"n is {n}.*1 <= n <= 10"):
            task.observations(n)


@every
def test_draws_depend_on_the_key_only(name):
    task = TASKS[name]
    x = task.observations()[0]
    draws = task.reference(x, 50, 3)
    assert draws.shape == (50, task.TRUTHS.shape[1])
    assert draws.dtype == np.float64
    assert np.array_equal(draws, task.reference(x, 50, jax.random.key(3)))
    with jax.enable_x64(True):
        assert np.array_equal(draws, task.reference(jnp.asarray(x.copy()), 50, 3))
    assert not np.array_equal(draws, task.reference(x, 50, 4))


@every
def test_wrong_data_are_refused(name):
    task = TASKS[name]
    x = np.array(task.observations()[0])
    with pytest.raises(ValueError, match=r"x has shape \(10, .*pass one row of `observations"):
        task.reference(task.observations(), 5, 0)
    with pytest.raises(ValueError, match="n is 0.*at least 1"):
        task.reference(x, 0, 0)
    x[0] = np.nan
    with pytest.raises(ValueError, match="nan.*finite data"):
        task.reference(x, 5, 0)
    with pytest.raises(ValueError, match="nan.*finite data"):
        task.log_posterior(task.TRUTHS[0], x)


@every
def test_the_true_parameter_ranks_like_a_draw(name):
    # Over pairs from the model, the rank of the true theta among 99 exact draws given its x is uniform, for each
    # coordinate and for the joint density. 10 bins, 500 pairs, chi square: each p-value below 1e-5 in 1e-5 of keys,
    # all 23 of the four tasks together below 3e-4. A sampler of the prior, or of half of the modes, fails the last.
    task = TASKS[name]
    truths, data = simulate(name, 500)
    ranks = []
    for i, (theta, x) in enumerate(zip(truths, data, strict=True)):
        draws = np.concatenate([task.reference(x, 99, i), theta[None]])
        quantities = np.concatenate([draws, task.log_posterior(draws, x)[:, None]], axis=1)
        ranks.append(np.sum(quantities[:-1] < quantities[-1], axis=0))
    for rank in np.array(ranks).T:
        assert stats.chisquare(np.bincount(rank // 10, minlength=10)).pvalue > 1e-5


@every_density
def test_density_is_that_of_the_model(name):
    task = TASKS[name]
    thetas, data = simulate(name, 20)
    with jax.enable_x64(True):
        density = jax.jit(lambda theta, x: log_density(task.model, (x,), {}, {"theta": theta})[0])
        # every theta with every x
        expected = jax.vmap(lambda x: jax.vmap(lambda theta: density(theta, x))(thetas))(data)
    actual = np.stack([task.log_posterior(thetas, x) for x in data])
    assert actual == pytest.approx(np.asarray(expected), rel=1e-9)
    if name != "gaussian_linear":
        assert task.log_posterior(100.0 * np.ones_like(thetas), data[0]).tolist() == [-np.inf] * 20


@every_density
def test_problem_holds_the_first_data_set(name):
    problem, task = problems.problem(name), TASKS[name]
    assert (problem.name, problem.model, dict(problem.inputs)) == (name, task.model, {})
    assert np.array_equal(problem.data["x"], task.OBSERVATIONS[0])
    assert np.array_equal(problem.truth["theta"], task.TRUTHS[0])
    assert problem.source
    # 20,000 independent draws: 4.5 standard errors, false alarm 7e-6 for each of 17 means; spreads to 5 %, where
    # their standard errors are below 1 %
    draws = task.reference(problem.data["x"], 20_000, 5)
    mean, sd = problem.numbers["mean"]["theta"], problem.numbers["sd"]["theta"]
    assert np.all(np.abs(draws.mean(0) - mean) < 4.5 * sd / np.sqrt(len(draws)))
    assert draws.std(0) == pytest.approx(sd, rel=0.05)
    for array in (problem.data["x"], mean, sd):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0


def test_two_moons_is_a_module_only():
    assert "two_moons" in problems.__all__
    assert "two_moons" not in problems.NAMES


# ------------------------------------------------------------------------------------------------------ two moons


def test_two_moons_noise_has_its_law():
    # The noise, recovered from theta and x alone, in polar coordinates. 4,000 pairs; each false alarm 1e-5.
    theta, x = simulate("two_moons", 4000)
    v_1 = x[:, 0] - 0.25 + np.abs(theta.sum(1)) / np.sqrt(2)
    v_2 = x[:, 1] - (theta[:, 1] - theta[:, 0]) / np.sqrt(2)
    assert stats.kstest(np.hypot(v_1, v_2), stats.norm(0.1, 0.01).cdf).pvalue > 1e-5
    assert stats.kstest(np.arctan2(v_2, v_1), stats.uniform(-np.pi / 2, np.pi).cdf).pvalue > 1e-5
    assert stats.kstest(theta.ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-5


def test_two_moons_data_are_a_deterministic_site():
    x = two_moons.observations()[0]
    trace = handlers.trace(handlers.seed(two_moons.model, 0)).get_trace(x)
    assert {name: site["type"] for name, site in trace.items()} == {
        "theta": "sample",
        "angle": "sample",
        "radius": "sample",
        "x": "deterministic",
    }
    assert trace["x"]["value"] is x


def test_two_moons_density_of_data_integrates_to_one():
    # over x in polar coordinates around each of three theta, where the noise is; its sign of v_1 is part of the law
    r, w_r = nodes_between(np.linspace(0.02, 0.18, 9))
    angle, w_angle = nodes_between(np.array([-np.pi / 2, np.pi / 2]))
    noise = np.stack([r[:, None] * np.cos(angle) + 0.25, r[:, None] * np.sin(angle)], axis=-1).reshape(-1, 2)
    weight = (w_r * r)[:, None] * w_angle
    for theta in np.array([[0.3, 0.5], [-0.3, 0.1], [-0.9, -0.9]]):
        shift = np.array([-np.abs(theta.sum()), theta[1] - theta[0]]) / np.sqrt(2)
        density = np.exp([two_moons.log_posterior(theta, x) for x in noise + shift])
        assert 4 * np.sum(weight.ravel() * density) == pytest.approx(1.0, abs=1e-10)
        # and the other half of the circle has nothing
        assert two_moons.log_posterior(theta, shift + np.array([0.25 - 0.09, 0.02])) < -150
    assert two_moons.log_posterior([1.01, 0.0], [0.0, 0.0]) == -np.inf


# the last two are cut: by the box, and by theta_1 + theta_2 = 0
@pytest.mark.parametrize("x", [*two_moons.observations(2), [-1.1, 0.05], [0.31, -0.4]])
def test_two_moons_draws_have_the_density(x):
    # marginal distribution functions by a sum over a grid of spacing 1e-3 (their error is below 1e-3, the tolerance
    # of 4,000 draws at this level 0.04), in both coordinates and along the diagonal; false alarm 1e-5 each
    grid = (np.arange(2000) + 0.5) / 1000 - 1
    first, second = np.meshgrid(grid, grid, indexing="ij")
    probability = np.exp(two_moons.log_posterior(np.stack([first, second], axis=-1), x))
    probability /= probability.sum()
    draws = two_moons.reference(x, 4000, 7)
    assert np.abs(draws).max() <= 1
    for of_grid, of_draws in ((first, draws[:, 0]), (second, draws[:, 1]), (first + second, draws.sum(1))):
        mass, edges = np.histogram(of_grid, bins=1000, range=(-2, 2), weights=probability)
        cdf = np.concatenate([[0.0], np.cumsum(mass)])
        assert stats.kstest(of_draws, lambda t, e=edges, c=cdf: np.interp(t, e, c)).pvalue > 1e-5
    positive = int(np.sum(draws.sum(1) > 0))
    assert stats.binomtest(positive, len(draws)).pvalue > 1e-5


def test_impossible_data_are_refused():
    with pytest.raises(ValueError, match="0 of .* proposals were accepted.*data that the model can produce"):
        two_moons.reference([5.0, 5.0], 10, 0)


# ------------------------------------------------------------------------------------------------ Gaussian linear


def test_gaussian_linear_posterior_and_evidence_make_the_joint():
    thetas, data = simulate("gaussian_linear", 5)
    for theta, x in zip(thetas, data, strict=True):
        mean, sd, log_evidence = gaussian_linear.exact(x)
        assert log_evidence == pytest.approx(stats.norm.logpdf(x, 0, np.sqrt(0.2)).sum(), abs=1e-10)
        posterior = stats.norm.logpdf(theta[::-1], mean, sd).sum()
        assert posterior + log_evidence == pytest.approx(gaussian_linear.log_posterior(theta[::-1], x), abs=1e-10)


def test_gaussian_linear_draws_are_independent_normals():
    # 100,000 standard normals by Kolmogorov-Smirnov; 45 correlations of 10,000, 5 standard errors: both below 3e-5
    x = gaussian_linear.observations()[4]
    z = (gaussian_linear.reference(x, 10_000, 1) - x / 2) / np.sqrt(0.05)
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > 1e-5
    correlation = np.corrcoef(z.T) - np.eye(10)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(z))


# ----------------------------------------------------------------------------------------------- Gaussian mixture

# in the middle, cut by the box (the stored one and a corner), and beyond it
MIXTURE_DATA = [[0.3, -2.0], gaussian_mixture.OBSERVATIONS[0], [9.95, 9.99], [-12.0, 10.1]]


def mixture_quadrature(x):
    """Nodes, shape (2, m), and probabilities, shape (m, m), and the evidence: intervals that shrink around x."""
    offsets = np.array([-20, -6, -3, -1.5, -0.7, -0.35, -0.15, 0, 0.15, 0.35, 0.7, 1.5, 3, 6, 20])
    rules = [nodes_between(np.unique(np.clip([-10, 10, *(t + offsets)], -10, 10))) for t in x]
    (first, w_first), (second, w_second) = rules
    theta = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1)
    mass = np.exp(gaussian_mixture.log_posterior(theta, x)) * w_first[:, None] * w_second
    return (first, second), mass / mass.sum(), mass.sum()


@pytest.mark.parametrize("x", MIXTURE_DATA)
def test_gaussian_mixture_moments_and_evidence(x):
    nodes, probability, evidence = mixture_quadrature(x)
    mean, sd, log_evidence = gaussian_mixture.exact(x)
    assert log_evidence == pytest.approx(np.log(evidence), abs=1e-9)
    for axis in (0, 1):
        marginal = probability.sum(axis=1 - axis)
        average = marginal @ nodes[axis]
        assert mean[axis] == pytest.approx(average, abs=1e-9)
        assert sd[axis] == pytest.approx(np.sqrt(marginal @ (nodes[axis] - average) ** 2), abs=1e-8)


@pytest.mark.parametrize("x", MIXTURE_DATA)
def test_gaussian_mixture_draws_have_the_law(x):
    # Chi square over at most 6 x 6 cells whose probabilities the quadrature gives (those with fewer than 5 draws to be
    # expected: their sum, Poisson), and Kolmogorov-Smirnov for each coordinate with scipy's truncated normals. 20,000
    # draws, false alarm 1e-5 each.
    x = np.asarray(x)
    draws = gaussian_mixture.reference(x, 20_000, 2)
    assert np.abs(draws).max() <= 10
    nodes, probability, _ = mixture_quadrature(x)
    # breaks of the rules, so that no interval is divided
    breaks = [np.unique(np.clip([-10, *(t + np.array([-0.7, -0.15, 0, 0.15, 0.7])), 10], -10, 10)) for t in x]
    cells = [np.searchsorted(b, n) - 1 for b, n in zip(breaks, nodes, strict=True)]
    expected = np.zeros([len(b) - 1 for b in breaks])
    np.add.at(expected, np.ix_(*cells), probability)
    observed, *_ = np.histogram2d(*draws.T, bins=breaks)
    enough = expected * len(draws) > 5
    rest = max(expected[~enough].sum(), 1e-300) * len(draws)
    statistic = np.sum((observed - len(draws) * expected)[enough] ** 2 / (len(draws) * expected[enough]))
    assert stats.chi2(enough.sum() - 1).sf(statistic) > 1e-5
    assert stats.poisson(rest).sf(observed[~enough].sum() - 1) > 1e-5
    ends = [(-10 - x) / np.array(gaussian_mixture.SD)[:, None], (10 - x) / np.array(gaussian_mixture.SD)[:, None]]
    mass = np.prod(ndtr(ends[1]) - ndtr(ends[0]), axis=1)
    for axis in (0, 1):

        def cdf(t, axis=axis):
            parts = [
                stats.truncnorm.cdf((t - x[axis]) / sd, low, high)
                for sd, low, high in zip(gaussian_mixture.SD, ends[0][:, axis], ends[1][:, axis], strict=True)
            ]
            return mass @ np.array(parts) / mass.sum()

        assert stats.kstest(draws[:, axis], cdf).pvalue > 1e-5


def test_gaussian_mixture_is_exact_far_outside_the_box():
    # at (60, -45) only the wide component counts: normals cut to more than 35 deviations from their mean
    x = [60.0, -45.0]
    draws = gaussian_mixture.reference(x, 5000, 0)
    assert np.abs(draws).max() <= 10
    for t, centre, values in ((50, 60, draws[:, 0]), (35, 45, -draws[:, 1])):
        # centre - theta lies between t and t + 20; its law beyond t has survival function sf / sf(t), false alarm 1e-5
        survival = np.exp(stats.norm.logsf(centre - values) - stats.norm.logsf(t))
        assert stats.kstest(survival, "uniform").pvalue > 1e-5
    expected = stats.norm.logsf(50) + stats.norm.logsf(35) - np.log(2 * 400)
    assert gaussian_mixture.exact(x).log_evidence == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------- SLCP


def rectangle(a, b, r):
    """P(a < X < b) and the first two moments over that rectangle of a standard normal pair with correlation r.

    Integration by parts: the integral of x_i f is minus the sum over j of S_ij times the flux of f through the sides
    across j, and likewise for x_i x_k f. The probability itself is by Owen's function.
    """
    q = np.sqrt((1 - r) * (1 + r))

    def below(h, k):
        return 0.5 * (ndtr(h) + ndtr(k)) - owens_t(h, (k / h - r) / q) - owens_t(k, (h / k - r) / q) - 0.5 * (h * k < 0)

    def side(j, c):
        low, high = (a[1 - j] - r * c) / q, (b[1 - j] - r * c) / q
        f, mass = stats.norm.pdf(c), ndtr(high) - ndtr(low)
        return np.stack([f * mass, f * (r * c * mass + q * (stats.norm.pdf(low) - stats.norm.pdf(high))), c * f * mass])

    probability = below(b[0], b[1]) - below(a[0], b[1]) - below(b[0], a[1]) + below(a[0], a[1])
    flux, across, along = zip(*(side(j, b[j]) - side(j, a[j]) for j in (0, 1)), strict=True)
    first = [-(flux[j] + r * flux[1 - j]) for j in (0, 1)]
    second = [probability - along[j] - r * across[1 - j] for j in (0, 1)]
    return probability, first, second


def slcp_quadrature(x, nodes):
    """Mean and sd of theta and the log evidence, by quadrature over (abs theta_3, abs theta_4, theta_5)."""
    z, w = np.polynomial.legendre.leggauss(nodes)
    t = np.meshgrid(1.5 + 1.5 * z, 1.5 + 1.5 * z, 3 * z, indexing="ij")
    log_weight = np.log(np.einsum("i,j,k->ijk", 1.5 * w, 1.5 * w, 3 * w))
    mean = x.mean(0)
    products = (x - mean).T @ (x - mean)
    s, cosh, sinh = [t[0] ** 2, t[1] ** 2], np.cosh(t[2]), np.sinh(t[2])
    trace = (products[0, 0] / s[0] ** 2 + products[1, 1] / s[1] ** 2) * cosh**2
    trace -= 2 * sinh * cosh * products[0, 1] / (s[0] * s[1])
    # the likelihood integrated over every mean: (2 pi)^-4 |S|^-2 times (2 pi / 4) |S|^(1/2)
    log_g = -3 * np.log(2 * np.pi) - np.log(4) - 3 * np.log(s[0] * s[1] / cosh) - trace / 2 + log_weight
    keep = log_g > log_g.max() - 40
    g, t, s = np.exp(log_g[keep]), [v[keep] for v in t], [v[keep] for v in s]
    low, high = ([(end - mean[j]) / (0.5 * s[j]) for j in (0, 1)] for end in (-3, 3))
    probability, first, second = rectangle(low, high, np.tanh(t[2]))
    total = np.sum(g * probability)
    m = [np.sum(g * (mean[j] * probability + 0.5 * s[j] * first[j])) / total for j in (0, 1)]
    squares = [
        np.sum(g * (mean[j] ** 2 * probability + mean[j] * s[j] * first[j] + 0.25 * s[j] ** 2 * second[j])) / total
        for j in (0, 1)
    ]
    squares += [np.sum(g * probability * v) / total for v in (*s, t[2] ** 2)]
    average = np.array([*m, 0.0, 0.0, np.sum(g * probability * t[2]) / total])
    return average, np.sqrt(np.array(squares) - average**2), np.log(4 * total) - 5 * np.log(6)  # 4: the signs


def test_slcp_numbers():
    mean, sd, log_evidence = slcp_quadrature(slcp.OBSERVATIONS[0], 96)
    assert log_evidence == pytest.approx(slcp.LOG_EVIDENCE, abs=6e-8)
    assert mean == pytest.approx(slcp.MEAN, abs=6e-8)
    assert sd == pytest.approx(slcp.SD, abs=6e-8)


def test_slcp_quadrature_agrees_with_importance_sampling_from_the_prior():
    # at the data with the widest posterior; 400,000 draws, weights from the density that NumPyro confirms; errors
    # within 5 standard errors, false alarm 6e-7 each, 6 of them
    x = slcp.OBSERVATIONS[4]
    theta = np.random.default_rng(0).uniform(-3, 3, (400_000, 5))
    log_weight = slcp.log_posterior(theta, x) + 5 * np.log(6)
    weight = np.exp(log_weight - log_weight.max())
    mean, sd, log_evidence = slcp_quadrature(x, 48)
    assert weight.sum() ** 2 / np.sum(weight**2) > 2000
    error = weight.std() / weight.mean() / np.sqrt(len(weight))
    assert np.log(weight.mean()) + log_weight.max() == pytest.approx(log_evidence, abs=5 * error)
    weight /= weight.sum()
    for values, exact in ((theta, mean), (theta**2, sd**2 + mean**2)):
        error = np.sqrt(weight**2 @ (values - exact) ** 2)
        assert np.all(np.abs(weight @ values - exact) < 5 * error)


@pytest.mark.parametrize("index", [2, 4, 5, 8])
def test_slcp_draws_have_the_moments_and_modes(index):
    # Moments of 50,000 independent draws within 4.5 of their standard errors (estimated from the draws), ten each:
    # false alarm 7e-5; four modes by the signs of theta_3 and theta_4 with a quarter each, 1e-5. At 4 and 8 the box
    # cuts deeply: without it theta_1 alone would be wrong by many errors.
    x = slcp.OBSERVATIONS[index]
    draws = slcp.reference(x, 50_000, 11)
    mean, sd, _ = slcp_quadrature(x, 48)
    for values, exact in ((draws, mean), ((draws - mean) ** 2, sd**2)):
        error = values.std(0) / np.sqrt(len(draws))
        assert np.all(np.abs(values.mean(0) - exact) < 4.5 * error)
    mode = 2 * (draws[:, 2] > 0) + (draws[:, 3] > 0)
    assert stats.chisquare(np.bincount(mode, minlength=4)).pvalue > 1e-5


def test_slcp_density_is_finite_where_a_scale_is_zero():
    # in float32, with value and gradient
    density = jax.jit(jax.value_and_grad(lambda theta, x: log_density(slcp.model, (x,), {}, {"theta": theta})[0]))
    x = jnp.asarray(slcp.OBSERVATIONS[0], jnp.float32)
    for theta in ([-3.0, -3.0, 0.0, 0.5, 3.0], [0.0, 0.0, 1e-4, 1e-4, -3.0], [-3.0, 3.0, 0.0, 0.0, 3.0]):
        value, gradient = density(jnp.array(theta, jnp.float32), x)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert value < -1e4
    assert np.isfinite(slcp.log_posterior([0.0] * 5, x))


def test_slcp_points_on_a_line_have_a_posterior_unless_it_is_parallel_to_an_axis():
    # the range of theta_5 bounds the correlation, so that a line is data like any other: theta_5 is near its end
    x = np.array([[-1.0, -1.0], [0.0, 0.5], [0.2, 0.8], [2.0, 3.5]])
    draws = slcp.reference(x, 20_000, 0)
    mean, sd, _ = slcp_quadrature(x, 64)
    assert 2.5 < mean[4] < 3
    # 4.5 standard errors, false alarm 7e-6 each
    assert np.all(np.abs(draws.mean(0) - mean) < 4.5 * sd / np.sqrt(len(draws)))
    # no correlation at all
    x = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    mean, sd, _ = slcp_quadrature(x + 1e-12, 64)
    draws = slcp.reference(x, 20_000, 1)
    assert np.all(np.abs(draws.mean(0) - mean) < 4.5 * sd / np.sqrt(len(draws)))
    x[:, 1] = 0.5
    with pytest.raises(ValueError, match="share a coordinate"):
        slcp.reference(x, 5, 0)
