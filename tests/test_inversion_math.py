"""Ensemble Kalman inversion and sampling against the exact laws of linear Gaussian problems.

Fixed keys throughout. Deterministic identities have no false alarms; statistical ones state theirs. Where a law is one
of infinitely many members, the noise is a quadrature instead: see `balanced`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pushforward.math import ensemble, ensemble_sampling, inversion, unscented_inversion
from pushforward.math.normals import normals

pytestmark = pytest.mark.usefixtures("float64")

PARTITIONS = [[1.0], [0.5, 0.5], [0.01, 0.09, 0.9], [0.25] * 4, [1 / 9.333, 1 / 7, 1 / 4, 1 / 2]]
SMALL = [(2, 1), (4, 9)]  # d, m: fewer and more data than members
transform, perturbed, unperturbed, flow, tikhonov, tikhonov_unperturbed = (
    jax.jit(getattr(inversion, name))
    for name in ("transform", "perturbed", "unperturbed", "unperturbed_flow", "tikhonov", "tikhonov_unperturbed")
)
eks_step, aldi_step = jax.jit(ensemble_sampling.eks_step), jax.jit(ensemble_sampling.aldi_step)
points, update = jax.jit(unscented_inversion.points), jax.jit(unscented_inversion.update)
update_without_prior = jax.jit(unscented_inversion.update_without_prior)


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


def linear(d, m, seed=0):
    """Operator (m, d) and data (m,), both in units of the noise."""
    r = np.random.default_rng(seed)
    return r.standard_normal((m, d)), 2.0 * r.standard_normal(m)


def conditioned(condition, d=3, seed=0):
    """Operator and data whose posterior precision has this condition number (1 for the unit matrix times 2)."""
    r = np.random.default_rng(seed)
    left, right = (np.linalg.qr(r.standard_normal((d, d)))[0] for _ in range(2))
    precisions = 2.0 * np.geomspace(1.0, condition, d)
    return left @ (np.sqrt(precisions - 1.0)[:, None] * right), r.standard_normal(d)


def draws(members, d, seed=1):
    r = np.random.default_rng(seed)
    return r.standard_normal((members, d)) @ (np.eye(d) + 0.3 * r.standard_normal((d, d))) + 0.5


def covariance(z):
    """By 1 / J."""
    return np.cov(np.asarray(z).T, ddof=0).reshape(z.shape[1], z.shape[1])


def posterior(operator, data):
    """Mean and precision with the prior N(0, I)."""
    precision = np.eye(operator.shape[1]) + operator.T @ operator
    return np.linalg.solve(precision, operator.T @ data), precision


def curved(z):
    """A nonlinear map to three outputs."""
    return jnp.stack([jnp.sin(z[..., 0]) + z[..., 1] ** 2, jnp.exp(0.3 * z[..., 2]), z[..., 0] * z[..., -1]], -1)


# ------------------------------------------------------------------------------------------------------------- steps


def test_adaptive_step_check_values():
    phi = jnp.array([10.0, 20.0, 30.0])
    close(inversion.adaptive_step(phi, 6, 1.0), 0.1732050808, 1e-10)
    # All members alike in misfit, and the rest of the way.
    close(inversion.adaptive_step(phi, 6, 0.1), 0.1)
    close(inversion.adaptive_step(jnp.full(3, 20.0), 6, 1.0), 1.0)
    # The first term: m / (2 mean) = 0.0375 beside sqrt(m / (2 var)) = 0.0354.
    close(inversion.adaptive_step(jnp.array([0.0, 40.0]), 1.5, 1.0), 0.0375)
    close(inversion.adaptive_step(jnp.zeros(3), 0, 0.7), 0.7)


def test_adaptive_step_counts_only_the_present():
    phi = jnp.array([10.0, jnp.nan, 20.0, jnp.inf, 30.0])
    present = jnp.array([True, False, True, False, True])
    step = jax.jit(lambda m: inversion.adaptive_step(phi, m, 1.0, present=present))
    close(step(6), 0.1732050808, 1e-10)
    large = jnp.array([1e30, 2e30, 3e30], jnp.float32)
    actual = inversion.adaptive_step(large, 6, 1.0)
    assert actual.dtype == jnp.float32
    close(actual * 1e30, np.sqrt(3.0), 1e-6)


def test_misfit_leaves_missing_data_out():
    outputs, data = jnp.array([[1.0, 5.0], [3.0, jnp.nan]]), jnp.array([2.0, jnp.nan])
    close(inversion.misfit(outputs, data), [0.5, 0.5])
    close(inversion.misfit(outputs[:1], jnp.array([0.0, 1.0])), [8.5])


# --------------------------------------------------------------------------------------------------------- inversion


@pytest.mark.parametrize(("d", "m"), SMALL)
@pytest.mark.parametrize("steps", PARTITIONS, ids=len)
@pytest.mark.parametrize("members", [2, 3, 10, 50])
def test_transform_is_exact_for_any_members_and_steps(members, steps, d, m):
    operator, data = linear(d, m)
    z = draws(members, d)
    prior = np.cov(z.T)
    gain = prior @ operator.T @ np.linalg.inv(operator @ prior @ operator.T + np.eye(m))
    mean = z.mean(0) + gain @ (data - operator @ z.mean(0))
    steps = np.array(steps) / np.sum(steps)
    for h in steps:
        z = transform(z @ operator.T, data, h) @ z
    close(np.mean(z, 0), mean)
    close(np.cov(z.T), prior - gain @ operator @ prior)


def test_transform_without_a_step_and_with_missing_data():
    operator, data = linear(2, 4)
    z = draws(6, 2)
    close(transform(z @ operator.T, data, 0.0), np.eye(6))
    outputs, missing = (z @ operator.T).copy(), data.copy()
    missing[[1, 3]], outputs[2, 1] = np.nan, np.nan
    kept = [0, 2]
    for scheme in (transform, unperturbed):
        close(scheme(outputs, missing, 0.4), scheme(outputs[:, kept], data[kept], 0.4))
    close(flow(outputs, missing), flow(outputs[:, kept], data[kept]))


def perturbed_moments(members, steps, keys, operator, data):
    """Sample moments (keys, d + d^2) of members after steps from independent prior draws."""
    d, m = operator.shape[1], operator.shape[0]

    def run(key):
        first, key = jax.random.split(key)
        z = jax.random.normal(first, (members, d))

        def step(z, this):
            noise = jax.random.normal(this[1], (members, m))
            return inversion.perturbed(z @ operator.T, data, this[0], noise) @ z, None

        z = jax.lax.scan(step, z, (jnp.array(steps), jax.random.split(key, len(steps))))[0]
        a = z - z.mean(0)
        return jnp.concatenate([z.mean(0), (a.T @ a / (members - 1)).ravel()])

    return np.asarray(jax.jit(lambda k: jax.lax.map(run, k))(jax.random.split(jax.random.key(7), keys)))


def test_perturbed_error_falls_as_the_root_of_the_members():
    # The slope's sd is about .03 (from halves of the keys): a false alarm in about 1e4.
    operator, data = linear(3, 2)
    mean, precision = posterior(operator, data)
    exact = np.concatenate([mean, np.linalg.inv(precision).ravel()])
    sizes = [25, 100, 400]
    errors = [
        np.sqrt(np.mean((perturbed_moments(j, [0.2, 0.3, 0.5], 100, operator, data) - exact) ** 2)) for j in sizes
    ]
    assert abs(np.polyfit(np.log(sizes), np.log(errors), 1)[0] + 0.5) < 0.12
    assert errors[-1] < 0.06
    # The prior, or data of a wrong weight, is far off.
    assert np.abs(exact - np.concatenate([np.zeros(3), np.eye(3).ravel()])).max() > 0.5


@pytest.mark.slow
def test_perturbed_spread_shrinks_more_in_more_steps_of_few_members():
    # The same prior draws for both: z > 5 of the paired difference.
    operator, data = linear(3, 6)
    trace = np.trace(np.linalg.inv(posterior(operator, data)[1]))
    one, four = (
        perturbed_moments(15, steps, 600, operator, data)[:, [3, 7, 11]].sum(1) / trace for steps in ([1.0], [0.25] * 4)
    )
    difference = one - four
    assert difference.mean() > 5 * difference.std() / np.sqrt(600)
    assert four.mean() < one.mean() < 1.0


def test_perturbed_mean_is_kalmans_whatever_the_noise():
    operator, data = linear(3, 2)
    z, noise = draws(7, 3), np.random.default_rng(4).standard_normal((7, 2)) + 3.0
    close(np.mean(perturbed(z @ operator.T, data, 0.3, noise), 0), np.mean(transform(z @ operator.T, data, 0.3), 0))


@pytest.mark.parametrize("h", [pytest.param(1.0, marks=pytest.mark.slow), 0.2])
def test_perturbations_of_dense_noise_have_its_covariance(h):
    # Observation of the whole state: what a member moves beyond the gain times its residual is K e, e the perturbation.
    # z < 5 for six entries: a false alarm in 3e5 runs.
    r = np.random.default_rng(1)
    members = 4000
    root = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.6, 0.9, 0.3]])
    noise_covariance, data = root @ root.T, np.array([0.3, -1.0, 2.0])
    x = r.standard_normal((members, 3)) @ r.standard_normal((3, 3))
    prior = np.cov(x.T)
    gain = prior @ np.linalg.inv(prior + noise_covariance / h)
    xi = r.standard_normal((members, 3))

    def deviation(outputs, innovation):
        analysis = perturbed(outputs, innovation, h, xi) @ x
        drawn = np.linalg.solve(gain, np.asarray(analysis - x - (data - x) @ gain.T).T)
        target = noise_covariance / h
        error = np.sqrt((target**2 + np.outer(np.diag(target), np.diag(target))) / members)
        return np.abs((np.cov(drawn) - target) / error).max()

    whitened = ensemble.whiten(jnp.asarray(x), jnp.asarray(data), jnp.asarray(noise_covariance))
    assert deviation(whitened.anomalies, whitened.innovation) < 5
    # The transposed factor is told apart.
    wrong = np.linalg.solve(root.T, np.concatenate([x, data[None]]).T).T
    assert deviation(wrong[:-1] - x.mean(0) @ np.linalg.inv(root), wrong[-1] - x.mean(0) @ np.linalg.inv(root)) > 50


@pytest.mark.parametrize(("d", "m"), SMALL)
@pytest.mark.parametrize("members", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_unperturbed_step_against_the_dense_update(members, d, m):
    operator, data = linear(d, m)
    z, h = draws(members, d), 0.3
    c = covariance(z)
    gain = c @ operator.T @ np.linalg.inv(operator @ c @ operator.T + np.eye(m) / h)
    close(unperturbed(z @ operator.T, data, h) @ z, z + (data - z @ operator.T) @ gain.T)
    close(flow(z @ operator.T, data) @ z, (data - z @ operator.T) @ operator @ c)


def test_unperturbed_covariance_law():
    operator, data = linear(3, 5)
    z = draws(8, 3)
    precision = operator.T @ operator
    first = np.linalg.inv(covariance(z))
    # One step: C^-1 + 2 h P + h^2 P C P.
    after = covariance(unperturbed(z @ operator.T, data, 0.3) @ z)
    close(np.linalg.inv(after), first + 0.6 * precision + 0.09 * precision @ covariance(z) @ precision)
    # Small steps: C0^-1 + 2 t P, the error first order in h; the posterior's C0^-1 + t P is elsewhere.
    errors = []
    for n in (200, 400):
        moved = iterate(lambda z, n=n: inversion.unperturbed(z @ operator.T, data, 1.0 / n) @ z, z, n)
        errors.append(np.abs(np.linalg.inv(covariance(moved)) - first - 2.0 * precision).max())
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert errors[1] < 0.02 * np.abs(precision).max()


def iterate(step, z, n):
    return np.asarray(jax.jit(lambda z: jax.lax.fori_loop(0, n, lambda _, z: step(z), z))(jnp.asarray(z)))


def test_unperturbed_closed_form_in_one_dimension():
    g, z, n = 1.7, draws(5, 1), 4000
    c0 = covariance(z)[0, 0]
    moved = iterate(lambda z: inversion.unperturbed(g * z, jnp.array([0.4]), 2.0 / n) @ z, z, n)
    # First order in h; halves the error when n is doubled, see the matrix law.
    close(covariance(moved)[0, 0] / (c0 / (1 + 2 * c0 * g**2 * 2.0)), 1.0, 2e-3)


def flowed(z, precision, best, t):
    """Members at time t of dz_j / dt = -C P (z_j - best), C their covariance by 1 / J.

    ``z_j(t) - best = C0^1/2 (I + 2 t C0^1/2 P C0^1/2)^-1/2 C0^-1/2 (z_j(0) - best)``, which has the law of C(t).
    """
    values, vectors = np.linalg.eigh(covariance(z))
    root = (vectors * np.sqrt(values)) @ vectors.T
    values, vectors = np.linalg.eigh(root @ precision @ root)
    shrunk = (vectors / np.sqrt(1.0 + 2.0 * t * values)) @ vectors.T
    return best + (z - best) @ np.linalg.solve(root, shrunk @ root)


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_unperturbed_collapses_and_fits(condition):
    # Data without noise: misfit and spread fall as 1 / t, from when the slowest direction has begun to move.
    r = np.random.default_rng(5)
    d = 6
    left, right = (np.linalg.qr(r.standard_normal((d, d)))[0] for _ in range(2))
    operator = left @ (np.sqrt(np.geomspace(1.0, 1.0 / condition, d))[:, None] * right)
    z, best = draws(12, d), r.standard_normal(d)
    data, precision = operator @ best, operator.T @ operator

    def measures(z):
        """Mean misfit, and the trace of the outputs' covariance."""
        fit = np.mean(inversion.misfit(z @ operator.T, data))
        return np.array([fit, np.trace(precision @ covariance(z))])

    def step(z):
        return inversion.unperturbed(z @ operator.T, data, 0.25) @ z

    early = iterate(step, z, 4000)
    late = iterate(step, early, 36_000)
    for members, t in ((early, 1e3), (late, 1e4)):
        # The start's h P C = 1 / 4 leaves about h log(t) / t in the end.
        close(measures(members) / measures(flowed(z, precision, best, t)), 1.0, 0.01)
    slopes = np.log10(measures(late) / measures(early))
    if condition == 1.0:
        # The least variance c of the start is .04 and adds 1 / (2 c t log 10) = .005.
        close(slopes, -1.0, 0.01)
    else:
        assert np.all((slopes > -0.97) & (slopes < -0.5))


def test_unperturbed_follows_its_flow():
    z, data, h = jnp.asarray(draws(6, 3)), jnp.array([0.3, 1.0, -0.5]), 1e-5
    close((unperturbed(curved(z), data, h) @ z - z) / h, flow(curved(z), data) @ z, 1e-3)
    close(flow(curved(z), data).sum(1), 0.0)


@pytest.mark.parametrize(("d", "m"), SMALL)
def test_tikhonov_goes_to_the_map(d, m):
    operator, data = linear(d, m)
    z = draws(7, d) + 3.0
    first, error = np.linalg.inv(covariance(z) * 7 / 6), z.mean(0)
    best, precision = posterior(operator, data)
    error, t, norms = error - best, 0.0, []
    for h in (0.5, 1.5, 8.0, 90.0, 900.0):
        z = tikhonov(z, z @ operator.T, data, h)
        t += h
        after = first + t * precision
        close(np.linalg.inv(np.cov(z.T)), after)
        close(np.mean(z, 0) - best, np.linalg.solve(after, first @ error))
        norms.append(np.linalg.norm(np.mean(z, 0) - best))
    assert abs(np.log(norms[-1] / norms[-2]) / np.log(10.0) + 1.0) < 0.02


def test_tikhonov_unperturbed_goes_to_the_map_more_slowly():
    operator, data = linear(3, 2)
    z = draws(9, 3)
    best, precision = posterior(operator, data)
    close(tikhonov_unperturbed(z, z @ operator.T, data, 1e-6), z + 1e-6 * (best - z) @ precision @ covariance(z), 1e-9)

    def step(z):
        return inversion.tikhonov_unperturbed(z, z @ operator.T, data, 0.05)

    early = iterate(step, z, 2000)
    late = iterate(step, early, 18_000)
    for members, t in ((early, 100.0), (late, 1000.0)):
        exact = flowed(z, precision, best, t)
        close(np.linalg.inv(covariance(members)) / t, np.linalg.inv(covariance(exact)) / t, 0.02)
        close((members.mean(0) - best) * np.sqrt(t), (exact.mean(0) - best) * np.sqrt(t), 0.02)
    slope = np.log10(np.linalg.norm(late.mean(0) - best) / np.linalg.norm(early.mean(0) - best))
    assert abs(slope + 0.5) < 0.05


# ------------------------------------------------------------------------------------------------- EKS and ALDI


def balanced(z, seed=0):
    """Noise xi (J, J) that acts as its expectation on the moments of z, for J - 1 >= 2 d.

    ``E = xi A`` has E^T E = J A^T A, E^T A = 0 and E^T 1 = 0, A the anomalies.
    """
    members, d = z.shape
    left = np.linalg.svd(z - z.mean(0), full_matrices=False)[0]
    taken = np.column_stack([np.ones(members), left, np.random.default_rng(seed).standard_normal((members, d))])
    free = np.linalg.qr(taken)[0][:, d + 1 :]
    return np.sqrt(members) * free @ left.T


@pytest.mark.parametrize(("members", "d"), [(3, 6), pytest.param(6, 6, marks=pytest.mark.slow), (15, 6)])
@pytest.mark.parametrize("growing", [False, True])
def test_sampler_step_against_the_dense_step(members, d, growing):
    r = np.random.default_rng(2)
    operator, data = linear(d, 4)
    z, xi, slope, h = draws(members, d), r.standard_normal((members, members)), r.standard_normal((members, d)), 0.2
    c, a = covariance(z), z - z.mean(0)
    explicit = z + h * ((data - z @ operator.T) @ operator + slope) @ c + growing * h * (d + 1) / members * a
    expected = np.linalg.solve(np.eye(d) + h * c, explicit.T).T + np.sqrt(2 * h / members) * xi @ a
    step = aldi_step if growing else eks_step
    close(step(z, z @ operator.T, data, h, xi, slope), expected)
    close(
        step(z, z @ operator.T, data, h, xi),
        expected - np.linalg.solve(np.eye(d) + h * c, (h * slope @ c).T).T,
    )


@pytest.mark.parametrize("step", [eks_step, aldi_step])
def test_noise_of_d_numbers_for_each_member_has_the_same_covariance(step):
    operator, data = linear(3, 2)
    z, h = draws(8, 3), 0.2
    rows = step(z, z @ operator.T, data, h, np.eye(8, 3)) - step(z, z @ operator.T, data, h, np.zeros((8, 3)))
    close(rows.T @ rows, 2 * h * covariance(z))
    close(rows[3:], 0.0)


def law_errors(condition, h, steps):
    """Errors of precision and mean in the posterior's units after steps, with their exact values at small h."""
    operator, data = conditioned(condition)
    best, precision = posterior(operator, data)
    root = np.linalg.cholesky(np.linalg.inv(precision))
    # A start off by factors in the posterior's own units, turned against its axes.
    r = np.random.default_rng(3)
    start = (r.standard_normal((9, 3)) @ np.diag([0.5, 1.0, 2.0])) @ root.T + best + root @ np.array([2.0, -1.0, 1.0])
    z = start
    for i in range(steps):
        z = np.asarray(eks_step(z, z @ operator.T, data, h, balanced(z, i)))

    def measures(mean, inverse_covariance):
        return root.T @ inverse_covariance @ root - np.eye(3), np.linalg.solve(root, mean - best)

    t = steps * h
    exact = precision + (np.linalg.inv(covariance(start)) - precision) * np.exp(-2 * t)
    first = measures(start.mean(0), np.linalg.inv(covariance(start)))
    # d(mean error) / dt = -C P (mean error) with C(t)^-1 = P + (C0^-1 - P) e^-2t, solved in the axes of first[0].
    values, vectors = np.linalg.eigh(first[0])
    factor = np.exp(-t) * np.sqrt((1.0 + values) / (1.0 + values * np.exp(-2 * t)))
    return measures(z.mean(0), np.linalg.inv(covariance(z))), (
        measures(best, exact)[0],
        vectors @ (factor * (vectors.T @ first[1])),
    )


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_eks_rates_whatever_the_conditioning(condition):
    # First-order errors of the step are extrapolated away; the rest is second order.
    coarse, exact = law_errors(condition, 0.02, 50)
    fine, _ = law_errors(condition, 0.01, 100)
    for i in (0, 1):
        close(2 * fine[i] - coarse[i], exact[i], 5e-3)
        assert np.abs(fine[i] - exact[i]).max() < 0.05 < np.abs(exact[i]).max()
        assert 1.7 < np.abs(coarse[i] - exact[i]).max() / np.abs(fine[i] - exact[i]).max() < 2.3


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_stable_step_reaches_the_posterior_from_the_prior(condition):
    operator, data = conditioned(condition)
    best, precision = posterior(operator, data)
    z, t, count = draws(9, 3), 0.0, 0
    first = np.linalg.inv(covariance(z))
    size = jax.jit(ensemble_sampling.stable_step)
    while t < 4.0:
        h = float(size(z @ operator.T, data, 0.1))
        z, t, count = np.asarray(eks_step(z, z @ operator.T, data, h, balanced(z, count))), t + h, count + 1
    assert count < 700
    root = np.linalg.cholesky(np.linalg.inv(precision))
    exact = precision + (first - precision) * np.exp(-2 * t)
    # The bias of the step is about h / 2, and h is at most 0.1.
    assert np.abs(root.T @ (np.linalg.inv(covariance(z)) - exact) @ root).max() < 0.06
    assert np.linalg.norm(np.linalg.solve(root, z.mean(0) - best)) < 0.2


def test_stable_step_by_hand():
    outputs, data = jnp.array([[1.0], [3.0]]), jnp.array([5.0])
    # D = [[g_k - 2][g_j - 5]] / 2 = [[2, -2], [1, -1]].
    close(ensemble_sampling.stable_step(outputs, data, 0.3), 0.3 / (np.sqrt(10.0) + 1.0))
    close(ensemble_sampling.stable_step(outputs, jnp.array([jnp.nan]), 0.3), 0.3)


@functools.cache
def stationary_run(name, members):
    step = getattr(ensemble_sampling, name)
    operator, data = linear(2, 3)
    best, precision = posterior(operator, data)
    root = np.linalg.cholesky(np.linalg.inv(precision))
    inverse = np.linalg.inv(root)

    def run(key, h, n, skipped):
        first, key = jax.random.split(key)
        z = best + jax.random.normal(first, (members, 2)) @ root.T

        def body(i, state):
            z, spread, second = state
            xi = normals(jax.random.fold_in(key, i), (members, members), jnp.float32).astype(z.dtype)
            z = step(z, z @ operator.T, data, h, xi)
            x = (z - best) @ inverse.T
            a = x - x.mean(0)
            share = jnp.where(i >= skipped, 1.0 / ((n - skipped) * members), 0.0)
            return z, spread + share * a.T @ a, second + share * x.T @ x

        z, spread, second = jax.lax.fori_loop(0, n, body, (z, jnp.zeros((2, 2)), jnp.zeros((2, 2))))
        return spread, second, (z - best) @ inverse.T

    return jax.jit(jax.vmap(run, (0, None, None, None)))


def stationary(name, members, h, ensembles, time=20.0, burn=5.0):
    """Moments of independent ensembles from posterior draws on, in units of the posterior.

    Returns time averages of C_J and of the members' second moments about the posterior's mean, and the last members.
    """
    keys = jax.random.split(jax.random.key(11), ensembles)
    return [np.asarray(o) for o in stationary_run(name, members)(keys, h, round(time / h), round(burn / h))]


@pytest.mark.parametrize(
    ("name", "members"), [("eks", 10), pytest.param("aldi", 10, marks=pytest.mark.slow), ("aldi", 5)]
)
def test_stationary_law_of_finitely_many_members(name, members):
    # The bias of the step is extrapolated away. z < 5 for six entries of independent ensembles.
    coarse, fine = (stationary(f"{name}_step", members, h, 500) for h in (0.08, 0.04))
    expected = (members - 4, members - 3) if name == "eks" else (members - 1, members)
    for i in (0, 1):
        values = 2 * fine[i] - coarse[i]
        error = np.sqrt((4 * fine[i].var(0) + coarse[i].var(0)) / len(values))
        assert error.max() < 0.05  # EKS and ALDI differ by 0.3 and more
        assert np.abs((values.mean(0) - expected[i] / members * np.eye(2)) / error).max() < 5


@pytest.mark.slow
def test_eks_covariance_is_wishart():
    # J C_J ~ Wishart(J - d - 2): for d = 2 the determinant's root, twice, is chi^2 with 2 (dof - 1) degrees.
    # Kolmogorov-Smirnov, a false alarm in 1e4; the step's bias is 1 %.
    last = stationary("eks_step", 10, 0.02, 2000, time=6.0)[2]
    a = last - last.mean(1, keepdims=True)
    determinant = np.linalg.det(a.transpose(0, 2, 1) @ a)
    assert stats.kstest(2.0 * np.sqrt(determinant), stats.chi2(2 * 5).cdf).pvalue > 1e-4
    assert stats.kstest(2.0 * np.sqrt(determinant), stats.chi2(2 * 6).cdf).pvalue < 1e-4


def test_aldi_members_are_posterior_draws():
    # Kolmogorov-Smirnov against N(0, 1) of one member's coordinates: a false alarm in 1e4; the step's bias is 2 %.
    last = stationary("aldi_step", 5, 0.04, 1500, time=6.0)[2][:, 0]
    for x in (last[:, 0], last[:, 1], (last[:, 0] + last[:, 1]) / np.sqrt(2.0)):
        assert stats.kstest(x, "norm").pvalue > 1e-4
        assert stats.kstest(1.2 * x + 0.1, "norm").pvalue < 1e-4


def test_aldi_paths_are_affine_invariant():
    # ALDI written in other coordinates v = A z + b, with the prior N(b, A A^T), from the same random numbers.
    r = np.random.default_rng(6)
    operator, data = linear(3, 2)
    z, d, members, h = draws(7, 3), 3, 7, 0.05
    a, b = np.array([[10.0, 0.0, 0.3], [3.0, 0.1, 0.0], [-1.0, 0.0, 2.0]]), np.array([1.0, -2.0, 5.0])
    precision = np.linalg.inv(a @ a.T)
    changed = operator @ np.linalg.inv(a)
    v = z @ a.T + b
    for _ in range(20):
        xi = r.standard_normal((members, members))
        c, w = covariance(v), v - v.mean(0)
        right = v + h * ((data - (v - b) @ changed.T) @ changed + b @ precision) @ c + h * (d + 1) / members * w
        v = np.linalg.solve(np.eye(d) + h * c @ precision, right.T).T + np.sqrt(2 * h / members) * xi @ w
        z = np.asarray(aldi_step(z, z @ operator.T, data, h, xi))
    close(v, z @ a.T + b, 1e-8)


def test_prior_slope_changes_the_target():
    # log prior = log N(0, I) - |z|^2 / 2 in all: the precision 2 I + G^T G, at finite J by the balanced noise.
    operator, data = conditioned(5.0)
    precision = 2.0 * np.eye(3) + operator.T @ operator
    z = draws(9, 3)
    errors = []
    for h, n in ((0.02, 250), (0.01, 500)):
        moved = z
        for i in range(n):
            moved = np.asarray(eks_step(moved, moved @ operator.T, data, h, balanced(moved, i), -moved))
        errors.append(np.linalg.inv(covariance(moved)) @ np.linalg.inv(precision) - np.eye(3))
    assert np.abs(2 * errors[1] - errors[0]).max() < 5e-3
    assert np.abs(moved.mean(0) - np.linalg.solve(precision, operator.T @ data)).max() < 0.02


# ------------------------------------------------------------------------------------------------------ subspace


STEPS = {
    "transform": lambda z, g, y, xi: transform(g, y, 0.3) @ z,
    "perturbed": lambda z, g, y, xi: perturbed(g, y, 0.3, xi[:, : len(y)]) @ z,
    "unperturbed": lambda z, g, y, xi: unperturbed(g, y, 0.3) @ z,
    "flow": lambda z, g, y, xi: z + 0.1 * flow(g, y) @ z,
    "tikhonov": lambda z, g, y, xi: tikhonov(z, g, y, 0.3),
    "tikhonov_unperturbed": lambda z, g, y, xi: tikhonov_unperturbed(z, g, y, 0.3),
    "eks": lambda z, g, y, xi: eks_step(z, g, y, ensemble_sampling.stable_step(g, y, 0.1), xi, -z),
    "aldi": lambda z, g, y, xi: aldi_step(z, g, y, ensemble_sampling.stable_step(g, y, 0.1), xi),
}


@pytest.mark.parametrize("name", STEPS)
def test_members_stay_in_their_subspace(name):
    data, rng = jnp.array([0.3, 1.0, -0.5]), np.random.default_rng(8)
    start = draws(5, 12)
    basis = np.linalg.svd(start - start.mean(0), full_matrices=False)[2][:4]
    z = jnp.asarray(start)
    for _ in range(5):
        z = STEPS[name](z, curved(z), data, rng.standard_normal((5, 5)))
    away = np.asarray(z) - start.mean(0)
    assert np.abs(away - away @ basis.T @ basis).max() < 1e-10
    assert np.abs(np.asarray(z) - start).max() > 0.1


@pytest.mark.parametrize("name", ["transform", "perturbed", "unperturbed"])
def test_rows_of_weights_sum_to_one(name):
    z, data = jnp.asarray(draws(5, 3)), jnp.array([0.3, 1.0, -0.5])
    noise = (np.random.default_rng(0).standard_normal((5, 3)),) if name == "perturbed" else ()
    close(getattr(inversion, name)(curved(z), data, 0.3, *noise).sum(1), 1.0, 1e-12)


# -------------------------------------------------------------------------------------- unscented Kalman inversion


def test_points_are_a_quadrature_of_the_predicted_law():
    root = np.array([[2.0, 0.0], [0.5, 0.1]])
    nodes = np.asarray(points(jnp.array([1.0, -1.0]), jnp.asarray(root), 0.2))
    close(nodes[0], [1.0, -1.0])
    away = nodes[1:] - nodes[0]
    close(away.sum(0), 0.0)
    close(away.T @ away / (2 * 2), root @ root.T / 0.8)
    # At most two standard deviations away, whatever the dimension.
    many = np.asarray(points(jnp.zeros(9), jnp.eye(9), 0.5))
    assert many.shape == (19, 9)
    close(np.abs(many).max(), 2.0 * np.sqrt(2.0))


@pytest.mark.parametrize("step", [0.5, 0.2])
@pytest.mark.parametrize("with_prior", [False, True])
def test_unscented_inversion_closed_form(with_prior, step):
    operator, data = linear(3, 4)
    precision = operator.T @ operator + with_prior * np.eye(3)
    best = np.linalg.solve(precision, operator.T @ data)
    mean, root = np.array([1.0, -2.0, 0.5]), np.linalg.cholesky(np.linalg.inv(np.diag([1.0, 9.0, 0.2]) + 0.1))
    first, error = np.linalg.inv(root @ root.T), mean - best
    advance = update if with_prior else update_without_prior
    for n in range(1, 12):
        mean, root = advance(mean, root, points(mean, root, step) @ operator.T, data, step)
        now = np.linalg.inv(root @ root.T)
        left = (1.0 - step) ** n
        close(now, precision + left * (first - precision))
        close(now @ (mean - best), left * first @ error)
    close(np.triu(root, 1), 0.0)
    assert np.diagonal(root).min() > 0


@pytest.mark.parametrize("step", [0.3, 0.8])
def test_unscented_inversion_ends_at_the_posterior_for_every_step(step):
    operator, data = conditioned(1e4, d=5)
    best, precision = posterior(operator, data)
    mean, root = np.zeros(5), np.eye(5)
    for _ in range(90):
        mean, root = update(mean, root, points(mean, root, step) @ operator.T, data, step)
    close(root @ root.T @ precision, np.eye(5), 1e-8)
    close(mean, best)


def test_unscented_inversion_with_missing_data_and_open_directions():
    operator, data = linear(3, 4)
    mean, root = np.array([1.0, -2.0, 0.5]), np.eye(3)
    outputs, missing = np.array(points(mean, root) @ operator.T), data.copy()
    expected = update(mean, root, outputs[:, :2], data[:2])
    missing[2:], outputs[:, 3] = np.nan, np.nan
    for actual, value in zip(update(mean, root, outputs, missing), expected, strict=True):
        close(actual, value)
    # Without data the prior is what is left; without both the variance doubles.
    for _ in range(40):
        mean, root = update(mean, root, points(mean, root) @ operator.T, np.full(4, np.nan))
    close(mean, 0.0)
    close(root, np.eye(3))
    close(update_without_prior(mean, root, points(mean, root) @ operator.T, np.full(4, np.nan))[1], np.sqrt(2.0) * root)


def test_unscented_update_counts_curvature_as_noise():
    # G(z) = z + z^2 / 2 at N(0, 1) predicted from variance 1/2: points 0, +-1, outputs 0, 1.5, -0.5.
    mean, root = jnp.zeros(1), jnp.sqrt(jnp.full((1, 1), 0.5))
    nodes = points(mean, root)
    close(nodes[:, 0], [0.0, 1.0, -1.0])
    mean, root = update_without_prior(mean, root, nodes + 0.5 * nodes**2, jnp.array([2.0]))
    gain = 1.0 / (0.5 * (1.5**2 + 0.5**2) + 2.0)
    close(mean, [2.0 * gain])
    close(root**2, [[1.0 - gain]])


# -------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "name", [s if s in ("transform", "eks") else pytest.param(s, marks=pytest.mark.slow) for s in STEPS]
)
def test_float32_stays_and_is_close(name):
    operator, data = linear(3, 5)
    z, xi = draws(8, 3), np.random.default_rng(0).standard_normal((8, 8))
    double = [jnp.asarray(v) for v in (z, z @ operator.T, data, xi)]
    actual = STEPS[name](*(v.astype(jnp.float32) for v in double))
    assert actual.dtype == jnp.float32
    close(actual, STEPS[name](*double), 1e-4)


def test_float32_of_the_unscented_update():
    operator, data = linear(3, 5)
    mean, root = jnp.array([1.0, -2.0, 0.5]), jnp.eye(3)
    double = [jnp.asarray(v) for v in (mean, root, points(mean, root) @ operator.T, data)]
    for actual, exact in zip(update(*(v.astype(jnp.float32) for v in double)), update(*double), strict=True):
        assert actual.dtype == jnp.float32
        close(actual, exact, 1e-4)
