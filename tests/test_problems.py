"""Every number that `pushforward.problems` prints is computed again here, by another road."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.util import log_density
from scipy import stats
from scipy.integrate import solve_ivp

import exact
from pushforward import problems
from pushforward.problems import bod, eight_schools, linear_gaussian, lynx_hare


def printed(value, digits):
    """Equality to a number of printed decimals."""
    return pytest.approx(value, abs=0.5001 * 10.0**-digits, rel=0)


def log_joint(model, inputs, data, sites):
    """NumPyro's log density in float64."""
    with jax.enable_x64(True):
        arguments = {name: jnp.asarray(np.array(value)) for name, value in {**inputs, **data}.items()}
        return float(jax.jit(lambda sites, arguments: log_density(model, (), arguments, sites)[0])(sites, arguments))


# ---------------------------------------------------------------------------------------------------- the list


def test_the_names_are_this_list():
    assert problems.NAMES == (
        "linear_gaussian_2",
        "linear_gaussian_20",
        "linear_gaussian_200",
        "bod",
        "eight_schools",
        "lynx_hare",
        "darcy",
        "gaussian_linear",
        "gaussian_mixture",
        "slcp",
    )


@pytest.mark.parametrize("name", problems.NAMES)
def test_a_problem_is_complete(name):
    problem = problems.problem(name)
    assert problem.name == name
    assert problem.source
    means = problem.numbers["mean"]
    assert set(means) == set(problem.numbers["sd"])
    if name not in ("lynx_hare", "darcy"):
        assert np.isfinite(problem.numbers["log_evidence"])
    assert np.isfinite(log_joint(problem.model, problem.inputs, problem.data, means))
    with pytest.raises(ValueError, match="read-only"):
        next(iter(problem.data.values()))[0] = 0.0


def test_a_wrong_name_is_answered_with_the_list():
    with pytest.raises(ValueError, match=r"'bode'.*eight_schools"):
        problems.problem("bode")


def test_import_needs_no_diffrax_and_no_device():
    program = """
import sys
sys.modules["diffrax"] = None
import jax
from pushforward import problems
assert not jax.live_arrays()
p = problems.problem("lynx_hare")
try:
    problems.lynx_hare.log_populations(p.inputs["t"], None, None)
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 'pip install "pushforward[examples]"' in out


# --------------------------------------------------------------------------------------------------------- BOD


@pytest.fixture(scope="module")
def posterior():
    return exact.bod_posterior(bod.DATA)


@pytest.mark.parametrize("y", [bod.DATA, bod.SECOND_DATA])
def test_two_quadratures_agree_on_the_evidence(y):
    assert exact.bod_posterior(y).log_evidence == pytest.approx(float(exact.bod_log_evidence(y)), abs=1e-11)
    assert exact.bod_posterior(y, points=801).log_evidence == pytest.approx(
        exact.bod_posterior(y).log_evidence, abs=1e-11
    )


def test_bod_model_has_the_density_that_the_quadrature_integrates():
    for A, B in ((0.5, 0.3), (0.7, 0.2), (1.1, 0.02)):
        prior = -np.log(0.8) - np.log(0.3)
        expected = prior + exact.bod_log_likelihood(np.array(A), np.array(B), bod.DATA)
        assert log_joint(bod.model, {"t": bod.TIMES}, {"y": bod.DATA}, {"A": A, "B": B}) == pytest.approx(
            float(expected), abs=1e-10
        )


def test_bod_evidence_and_moments(posterior):
    assert posterior.log_evidence == pytest.approx(bod.LOG_EVIDENCE, abs=1e-8)
    mean_u, covariance_u = posterior.moments_u()
    mean, covariance = posterior.moments()
    assert mean_u == printed(bod.MEAN_U, 10)
    assert covariance_u == printed(bod.COVARIANCE_U, 10)
    assert mean == printed(bod.MEAN, 10)
    assert covariance == printed(bod.COVARIANCE, 10)
    for axis in (0, 1):
        assert posterior.standardised_moment(axis, 3) == printed(bod.SKEWNESS_U[axis], 4)
        assert posterior.standardised_moment(axis, 4) == printed(bod.KURTOSIS_U[axis], 4)
        assert posterior.quantiles_u(axis, bod.QUANTILE_LEVELS) == printed(bod.QUANTILES_U[axis], 5)


def test_bod_quantiles_by_integrating_up_to_them(posterior):
    # P(u2 <= q) is a ratio of two integrals over B, each over its own interval: no interpolation.
    for level, q in zip(bod.QUANTILE_LEVELS, bod.QUANTILES_U[1], strict=True):
        below = exact.bod_log_evidence(bod.DATA, upper=q)
        assert np.exp(below - bod.LOG_EVIDENCE) == pytest.approx(level, abs=4e-6)
    assert posterior.quantiles(0, [0.5])[0] == pytest.approx(
        0.4 + 0.8 * stats.norm.cdf(bod.QUANTILES_U[0, 2]), abs=1e-5
    )


def test_bod_information(posterior):
    def log_likelihood(u1, u2):
        return exact.bod_log_likelihood(0.4 + 0.8 * stats.norm.cdf(u1), 0.01 + 0.3 * stats.norm.cdf(u2), bod.DATA)

    expected = posterior.expectation(log_likelihood)
    assert expected == printed(bod.EXPECTED_LOG_LIKELIHOOD, 7)
    assert expected - posterior.log_evidence == printed(bod.KL_FROM_PRIOR, 7)
    entropy = -np.sum(posterior.probability * posterior.log_density)
    assert entropy == printed(bod.ENTROPY_U, 7)
    # second moment of the weights: E_prior[L^2] = Z E_posterior[L]
    mean_likelihood = posterior.expectation(lambda u1, u2: np.exp(log_likelihood(u1, u2)))
    assert np.exp(posterior.log_evidence) / mean_likelihood == printed(bod.PRIOR_EFFECTIVE_SAMPLE_SIZE, 6)


def test_derivatives_by_hand_equal_finite_differences():
    u, h = np.array([-0.5, 0.6]), 1e-5
    _, gradient, hessian = exact.bod_derivatives(u, bod.DATA)
    for i, e in enumerate(h * np.eye(2)):
        up, down = exact.bod_derivatives(u + e, bod.DATA), exact.bod_derivatives(u - e, bod.DATA)
        assert (up[0] - down[0]) / (2 * h) == pytest.approx(gradient[i], rel=1e-7)
        assert (up[1] - down[1]) / (2 * h) == pytest.approx(hessian[i], rel=1e-7)


def test_bod_points_and_laplace():
    u, covariance, log_evidence = exact.bod_laplace_u(bod.DATA)
    assert u == printed(bod.MAP_U, 7)
    assert exact.bod_parameters(u) == printed(bod.MAP_PARAMETERS, 7)
    assert covariance == printed(bod.LAPLACE_COVARIANCE_U, 7)
    assert log_evidence == printed(bod.LAPLACE_LOG_EVIDENCE, 7)
    assert exact.bod_maximum_likelihood(bod.DATA) == printed(bod.MAXIMUM_LIKELIHOOD, 7)


def test_bod_gaussian_variational_optima():
    mean, covariance, elbo = exact.bod_full_vi_u(bod.DATA)
    assert mean == printed(bod.FULL_VI_MEAN_U, 6)
    assert covariance == printed(bod.FULL_VI_COVARIANCE_U, 7)
    assert elbo == printed(bod.FULL_VI_ELBO, 6)
    assert bod.LOG_EVIDENCE - elbo == printed(bod.FULL_VI_KL, 6)
    # at the optimum Sigma^-1 = I - E_q[Hessian of the log likelihood]  (Opper and Archambeau 2009)
    x, w = np.polynomial.hermite_e.hermegauss(40)
    xi = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    hessians = exact.bod_derivatives(mean + xi @ np.linalg.cholesky(covariance).T, bod.DATA)[2]
    average = np.tensordot(np.outer(w, w).ravel() / (2 * np.pi), hessians, 1)
    assert np.linalg.inv(covariance) == pytest.approx(np.eye(2) - average, rel=1e-5)

    mean, covariance, elbo = exact.bod_diagonal_vi_u(bod.DATA)
    assert mean == printed(bod.DIAGONAL_VI_MEAN_U, 6)
    assert covariance == printed(np.diag(bod.DIAGONAL_VI_VARIANCE_U), 7)
    assert elbo == printed(bod.DIAGONAL_VI_ELBO, 6)
    assert bod.LOG_EVIDENCE - elbo == printed(bod.DIAGONAL_VI_KL, 6)


def test_bod_distances(posterior):
    gaussians = {
        "full_vi": (bod.FULL_VI_MEAN_U, bod.FULL_VI_COVARIANCE_U),
        "diagonal_vi": (bod.DIAGONAL_VI_MEAN_U, np.diag(bod.DIAGONAL_VI_VARIANCE_U)),
        "laplace": (bod.MAP_U, bod.LAPLACE_COVARIANCE_U),
        "moment_matched": (bod.MEAN_U, bod.COVARIANCE_U),
    }
    assert set(gaussians) == set(bod.DISTANCES)
    digits = {"full_vi": 3, "diagonal_vi": 1, "laplace": 2, "moment_matched": 6}
    for name, gaussian in gaussians.items():
        variation, hellinger, kl = posterior.distances(*gaussian)
        assert variation == printed(bod.DISTANCES[name][0], 3)
        assert hellinger == printed(bod.DISTANCES[name][1], 3)
        assert kl == printed(bod.DISTANCES[name][2], digits[name])


def test_bod_information_over_all_data():
    # I(u; y) = h(y) - h(y given u), h(y) = -E log p(y) over 2^15 scrambled Sobol points, log p(y) by quadrature.
    # Over 8 scramblings the standard deviation was 8e-5: 5 of them, false alarms below 1e-6.
    draws = stats.norm.ppf(stats.qmc.Sobol(7, rng=0).random_base2(15))
    A, B = exact.bod_parameters(draws[:, :2]).T[..., None]
    noise = np.sqrt(exact.VARIANCE) * draws[:, 2:]
    y = A * (1 - np.exp(-B * exact.TIMES)) + noise
    log_evidence = np.concatenate([exact.bod_log_evidence(part, nodes=100) for part in np.split(y, 8)])
    # E log p(y given u) is known, so its sample mean is a control variate
    excess = stats.norm.logpdf(noise, scale=np.sqrt(exact.VARIANCE)).sum(-1) - log_evidence
    information = np.mean(excess)
    assert information == pytest.approx(bod.MUTUAL_INFORMATION, abs=4e-4)
    assert np.log(2 * np.pi * np.e) - bod.MUTUAL_INFORMATION == pytest.approx(bod.CONDITIONAL_ENTROPY_U, abs=1.1e-5)


def test_exact_draws_have_the_exact_moments(posterior):
    # 20,000 independent draws: 4.5 standard errors, false alarm 1e-5 each.
    draws = posterior.draws(20_000)
    mean, covariance = posterior.moments_u()
    error = 4.5 * np.sqrt(np.diag(covariance) / len(draws))
    assert np.all(np.abs(draws.mean(0) - mean) < error)
    assert stats.kstest(draws[:, 0], posterior.cdf_u(0)).pvalue > 1e-5
    assert stats.kstest(draws[:, 1], posterior.cdf_u(1)).pvalue > 1e-5


# --------------------------------------------------------------------------------------------- linear Gaussian


@pytest.mark.parametrize("dimension", [1, 2, 20, 200])
def test_linear_gaussian_by_scalar_updates(dimension):
    problem = linear_gaussian.linear_gaussian(dimension)
    inputs, y = problem.inputs, problem.data["y"]
    prior = inputs["prior_scale"] @ inputs["prior_scale"].T
    mean, covariance, log_evidence = exact.linear_gaussian_posterior(
        inputs["prior_mean"], prior, inputs["forward"], inputs["noise"], y
    )
    assert problem.numbers["mean"]["theta"] == pytest.approx(mean, abs=1e-9)
    assert problem.numbers["covariance"] == pytest.approx(covariance, abs=1e-10)
    assert problem.numbers["sd"]["theta"] == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-8)
    assert problem.numbers["log_evidence"] == pytest.approx(log_evidence, abs=1e-8)
    predictive = inputs["forward"] @ prior @ inputs["forward"].T + np.diag(inputs["noise"] ** 2)
    marginal = stats.multivariate_normal(inputs["forward"] @ inputs["prior_mean"], predictive)
    assert problem.numbers["log_evidence"] == pytest.approx(marginal.logpdf(y), abs=1e-7)


@pytest.mark.parametrize("dimension", [2, 200])
def test_linear_gaussian_model_has_that_posterior(dimension):
    # p(theta, y) = p(theta given y) p(y), at a point that is neither mean nor truth
    problem = linear_gaussian.linear_gaussian(dimension)
    theta = problem.inputs["prior_mean"] + 0.1
    joint = log_joint(problem.model, problem.inputs, problem.data, {"theta": theta})
    posterior = stats.multivariate_normal(problem.numbers["mean"]["theta"], problem.numbers["covariance"])
    assert joint == pytest.approx(posterior.logpdf(theta) + problem.numbers["log_evidence"], rel=1e-9)


@pytest.mark.parametrize("dimension", [2, 20, 200])
def test_linear_gaussian_data_inform_every_direction(dimension):
    # variances of the posterior relative to the prior, along the directions where that is most and least
    problem = linear_gaussian.linear_gaussian(dimension)
    root = np.linalg.inv(problem.inputs["prior_scale"])
    ratio = np.linalg.eigvalsh(root @ problem.numbers["covariance"] @ root.T)
    assert ratio[0] == pytest.approx(1 / 101, rel=1e-6)
    assert ratio[-1] == pytest.approx(1 / 1.09, rel=1e-6)
    # the truth is a plausible draw: chi square with `dimension` degrees of freedom
    error = problem.truth["theta"] - problem.numbers["mean"]["theta"]
    assert stats.chi2(dimension).sf(error @ np.linalg.solve(problem.numbers["covariance"], error)) > 1e-3


def test_linear_gaussian_depends_on_its_seed_only():
    first, again, other = (linear_gaussian.linear_gaussian(3, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.data["y"], again.data["y"])
    assert not np.allclose(first.inputs["forward"], other.inputs["forward"])
    with pytest.raises(ValueError, match="at least 1"):
        linear_gaussian.linear_gaussian(0)


# ----------------------------------------------------------------------------------------------- eight schools


def test_eight_schools_numbers():
    mean, sd, log_evidence = exact.eight_schools_posterior(eight_schools.DATA, eight_schools.SIGMA)
    assert log_evidence == printed(eight_schools.LOG_EVIDENCE, 10)
    for name in ("mu", "tau", "theta"):
        assert mean[name] == printed(eight_schools.MEAN[name], 10)
        assert sd[name] == printed(eight_schools.SD[name], 10)
        # 10 published means, each within 4 of its standard errors
        error = np.abs(mean[name] - eight_schools.PUBLISHED_MEAN[name])
        assert np.all(error < 4 * eight_schools.PUBLISHED_STANDARD_ERROR[name])


def test_eight_schools_evidence_by_quadrature_of_the_model():
    # Integrate theta out by hand in scipy, mu and tau on a grid: another road to the same evidence.
    y, sigma = eight_schools.DATA, eight_schools.SIGMA
    mu = np.linspace(-35, 35, 281)[:, None, None]
    v = (np.arange(2000) + 0.5) / 2000
    tau = 5 * np.tan(0.5 * np.pi * v)[:, None]
    log_p = stats.norm.logpdf(y, mu, np.hypot(sigma, tau)).sum(-1) + stats.norm.logpdf(mu[..., 0], 0, 5)
    evidence = np.exp(log_p).sum(0).mean() * (mu[1, 0, 0] - mu[0, 0, 0])
    assert np.log(evidence) == pytest.approx(eight_schools.LOG_EVIDENCE, abs=1e-6)


def test_eight_schools_two_forms_are_one_model():
    # theta = mu + tau noise has Jacobian tau^8, so the log densities differ by 8 log tau
    inputs, data = {"sigma": eight_schools.SIGMA}, {"y": eight_schools.DATA}
    rng = np.random.default_rng(0)
    for tau in (0.01, 1.0, 30.0):
        mu, noise = rng.normal(), rng.normal(size=8)
        theta = mu + tau * noise
        centred = log_joint(eight_schools.model, inputs, data, {"mu": mu, "tau": tau, "theta": theta})
        other = log_joint(eight_schools.non_centred, inputs, data, {"mu": mu, "tau": tau, "noise": noise})
        assert centred + 8 * np.log(tau) == pytest.approx(other, abs=1e-8)
        by_hand = (
            stats.norm.logpdf(mu, 0, 5)
            + stats.halfcauchy.logpdf(tau, scale=5)
            + stats.norm.logpdf(theta, mu, tau).sum()
            + stats.norm.logpdf(data["y"], theta, inputs["sigma"]).sum()
        )
        assert centred == pytest.approx(by_hand, abs=1e-8)


# ---------------------------------------------------------------------------------------------- lynx and hare

MEAN_PARAMETERS = tuple(lynx_hare.MEAN[name] for name in ("alpha", "beta", "gamma", "delta"))


def lynx_hare_by_scipy(parameters, z_init):
    """log populations at the problem's times by DOP853 in the populations themselves, rtol 1e-10."""
    alpha, beta, gamma, delta = parameters

    def field(t, z):
        return [(alpha - beta * z[1]) * z[0], (delta * z[0] - gamma) * z[1]]

    t = lynx_hare.TIMES
    solution = solve_ivp(field, t[[0, -1]], z_init, method="DOP853", t_eval=t, rtol=1e-10, atol=1e-12)
    return np.log(solution.y.T)


def solve(parameters, z_init):
    # a copy, since JAX 0.12 remembers the dtype of a numpy constant from the first precision that it was traced in
    return lynx_hare.log_populations(lynx_hare.TIMES.copy(), jnp.log(z_init), parameters)


def test_lynx_hare_data_have_the_check_sums_of_their_source():
    # sums, and sums weighted by year, of the columns of stan-dev/example-models' hudson-bay-lynx-hare.csv
    assert lynx_hare.DATA.sum(0) == pytest.approx([715.7, 423.5], abs=1e-9)
    weighted = lynx_hare.TIMES @ lynx_hare.DATA
    assert weighted == pytest.approx([6122.8, 4182.4], abs=1e-9)
    assert lynx_hare.YEARS[0] + lynx_hare.TIMES[-1] == lynx_hare.YEARS[-1] == 1920


def test_lynx_hare_solution():
    with jax.enable_x64(True):
        z = jax.jit(solve)(MEAN_PARAMETERS, jnp.asarray(lynx_hare.MEAN["z_init"]))
        assert np.asarray(z) == pytest.approx(lynx_hare_by_scipy(MEAN_PARAMETERS, lynx_hare.MEAN["z_init"]), abs=2e-9)
    z = jax.jit(solve)(MEAN_PARAMETERS, jnp.asarray(lynx_hare.MEAN["z_init"]))
    assert z.dtype == jnp.float32
    assert np.asarray(z) == pytest.approx(lynx_hare_by_scipy(MEAN_PARAMETERS, lynx_hare.MEAN["z_init"]), abs=3e-5)


def prior_draws(coordinates):
    """alpha, beta, gamma, delta and z_init, from standard normal coordinates of shape (n, 6)."""
    scale = np.array([0.5, 0.05, 0.5, 0.05])
    z = coordinates[:, :4]
    mean = np.array([1.0, 0.05, 1.0, 0.05])
    parameters = stats.truncnorm.isf(stats.norm.sf(z), -mean / scale, np.inf, mean, scale)
    return tuple(parameters.T), 10 * np.exp(coordinates[:, 4:])


def test_lynx_hare_solution_over_the_prior():
    parameters, z_init = prior_draws(np.random.default_rng(0).normal(size=(60, 6)))
    with jax.enable_x64(True):
        z = jax.jit(jax.vmap(solve))(jax.tree.map(jnp.asarray, parameters), jnp.asarray(z_init))
    errors = [
        np.abs(np.asarray(z[i]) - lynx_hare_by_scipy([p[i] for p in parameters], z_init[i])).max() for i in range(60)
    ]
    assert np.quantile(errors, 0.95) < 1e-5


def test_lynx_hare_conserves_its_integral():
    # delta u - gamma log u + beta v - alpha log v is constant along every solution
    alpha, beta, gamma, delta = MEAN_PARAMETERS
    with jax.enable_x64(True):
        log_u, log_v = np.asarray(jax.jit(solve)(MEAN_PARAMETERS, jnp.asarray(lynx_hare.MEAN["z_init"]))).T
    integral = delta * np.exp(log_u) - gamma * log_u + beta * np.exp(log_v) - alpha * log_v
    assert integral == pytest.approx(integral[0], abs=1e-9)
    assert np.ptp(log_u) > 1  # and the solution moves


def test_lynx_hare_log_density_by_hand():
    sites = {**lynx_hare.MEAN}
    z = lynx_hare_by_scipy(MEAN_PARAMETERS, sites["z_init"])
    y, sigma = lynx_hare.DATA, sites["sigma"]
    expected = (
        stats.norm.logpdf(np.log(y), z, sigma).sum()
        - np.log(y).sum()
        + stats.lognorm.logpdf(sites["z_init"], 1, scale=10).sum()
        + stats.lognorm.logpdf(sigma, 1, scale=np.exp(-1)).sum()
    )
    for name, loc, scale in (("alpha", 1, 0.5), ("beta", 0.05, 0.05), ("gamma", 1, 0.5), ("delta", 0.05, 0.05)):
        expected += stats.truncnorm.logpdf(sites[name], -loc / scale, np.inf, loc, scale)
    actual = log_joint(lynx_hare.model, {"t": lynx_hare.TIMES}, {"y": y}, sites)
    assert actual == pytest.approx(expected, abs=1e-5)


def test_lynx_hare_published_mean_is_near_the_mode():
    # The published mean fits the data to the published noise: residuals of log y have that standard deviation,
    # within 4 standard errors sigma / sqrt(2 n).
    residual = np.log(lynx_hare.DATA) - lynx_hare_by_scipy(MEAN_PARAMETERS, lynx_hare.MEAN["z_init"])
    sigma = lynx_hare.MEAN["sigma"]
    assert np.sqrt(np.mean(residual**2, 0)) == pytest.approx(sigma, rel=4 / np.sqrt(2 * 21))


def test_lynx_hare_derivatives_forward_and_reverse():
    def of_parameters(x):
        return jnp.sum(solve(tuple(x), jnp.asarray(lynx_hare.MEAN["z_init"])) ** 2)

    with jax.enable_x64(True):
        x = jnp.asarray(MEAN_PARAMETERS)
        reverse, forward = jax.jit(lambda x: (jax.grad(of_parameters)(x), jax.jacfwd(of_parameters)(x)))(x)
        assert np.asarray(forward) == pytest.approx(np.asarray(reverse), rel=1e-10)
        step = 1e-6 * np.asarray(x)
        values = jax.jit(jax.vmap(of_parameters))(jnp.concatenate([x + jnp.diag(step), x - jnp.diag(step)]))
        differences = np.asarray(values[:4] - values[4:]) / (2 * step)
        assert np.asarray(reverse) == pytest.approx(differences, rel=1e-6)


def test_lynx_hare_is_finite_in_every_corner_of_the_prior():
    # all 64 corners at 8 prior standard deviations, in float32
    corners = 8 * np.stack(np.meshgrid(*6 * [[-1, 1]]), -1).reshape(-1, 6)
    parameters, z_init = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), prior_draws(corners))

    def value(parameters, z_init):
        return jnp.mean(solve(parameters, z_init) ** 2)

    out = jax.jit(jax.vmap(jax.value_and_grad(value, argnums=(0, 1))))(parameters, z_init)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
