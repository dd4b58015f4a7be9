"""One analysis of an ensemble against dense formulas in numpy; laws by many keys, derivatives by differences.

Fixed keys throughout. Deterministic identities have no false alarms; statistical ones state theirs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushforward.math import ensemble, ensemble_inflation, ensemble_iterative, ensemble_local, ensemble_roots

pytestmark = pytest.mark.usefixtures("float64")

# Members and data on both sides of the switch between the N x N and the m x m factorisation, and beyond two blocks.
PROBLEMS = [((2, 1), "variances"), ((6, 3), "covariance"), ((7, 30), "covariance"), ((45, 50), "variances")]
SQUARE_ROOTS = {"etkf": ensemble.etkf, "serial": ensemble.serial_ensrf}
SCHEMES = {
    **SQUARE_ROOTS,
    "denkf": ensemble.denkf,
    "rotated": lambda w: ensemble.etkf_rotated(w, jax.random.key(3)),
    "perturbed": lambda w: ensemble.perturbed(w, jax.random.key(3)),
    "rescaled": lambda w: ensemble.perturbed_rescaled(w, jax.random.key(3)),
    "finite_size": ensemble_iterative.finite_size,
}


def thorough(value, slow):
    """A parameter that is left to the full run where the fast tests have enough of its kind."""
    return pytest.param(value, marks=pytest.mark.slow) if slow else value


NOISES = ["variances", "covariance"]
inflation_square = jax.jit(ensemble_iterative.inflation_square)


def problem(members, m, kind="variances", seed=0, state=5):
    """State ensemble, its predicted data (linear), data, noise as given and as a matrix."""
    r = np.random.default_rng(seed)
    x = r.standard_normal((members, state)) @ r.standard_normal((state, state)) + 1.0
    predicted = x @ r.standard_normal((state, m)) + 0.3 * r.standard_normal((members, m))
    data = predicted.mean(0) + 2.0 * r.standard_normal(m)
    if kind == "variances":
        noise = 0.5 + r.random(m)
        return x, predicted, data, noise, np.diag(noise)
    root = r.standard_normal((m, m)) / np.sqrt(m) + np.eye(m)
    noise = root @ root.T
    return x, predicted, data, noise, noise


def gain(x, predicted, covariance):
    """Kalman gain of the sample moments."""
    a, y = x - x.mean(0), predicted - predicted.mean(0)
    less = len(x) - 1
    return np.linalg.solve(y.T @ y / less + covariance, y.T @ a / less).T


def kalman(x, predicted, data, covariance):
    """Mean and covariance of the Kalman update of the sample moments."""
    k = gain(x, predicted, covariance)
    cross = np.atleast_2d(np.cov(x.T, predicted.T))[x.shape[1] :, : x.shape[1]]
    return x.mean(0) + k @ (data - predicted.mean(0)), np.cov(x.T) - k @ cross


def close(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


def weights_of(scheme, predicted, data, noise):
    run = jax.jit(lambda p, d, r: SCHEMES[scheme](ensemble.whiten(p, d, r)))
    return np.asarray(run(predicted, data, noise))


# ------------------------------------------------------------------------------------------------ global schemes


@pytest.mark.parametrize(("shape", "kind"), PROBLEMS)
@pytest.mark.parametrize("scheme", ["etkf", "serial", "rotated"])
def test_square_roots_have_the_kalman_moments(scheme, shape, kind):
    x, predicted, data, noise, covariance = problem(*shape, kind)
    analysis = weights_of(scheme, predicted, data, noise) @ x
    mean, cov = kalman(x, predicted, data, covariance)
    close(analysis.mean(0), mean)
    close(np.cov(analysis.T), cov)


@pytest.mark.parametrize(("shape", "kind"), PROBLEMS)
def test_denkf_covariance(shape, kind):
    x, predicted, data, noise, covariance = problem(*shape, kind)
    analysis = weights_of("denkf", predicted, data, noise) @ x
    mean, cov = kalman(x, predicted, data, covariance)
    k = gain(x, predicted, covariance)
    close(analysis.mean(0), mean)
    close(np.cov(analysis.T), cov + k @ np.atleast_2d(np.cov(predicted.T)) @ k.T / 4)


@pytest.mark.parametrize("shape", [(6, 3), (7, 30)])
def test_etkf_root_is_the_symmetric_one(shape):
    _, predicted, data, noise, _ = problem(*shape)
    weights = weights_of("etkf", predicted, data, noise)
    members = len(predicted)
    anomalies = weights - weights.mean(0)
    y = (predicted - predicted.mean(0)) / np.sqrt(noise * (members - 1))
    values, vectors = np.linalg.eigh(np.eye(members) + y @ y.T)
    close(anomalies, vectors / np.sqrt(values) @ vectors.T - 1.0 / members)


@pytest.mark.parametrize("kind", NOISES)
def test_serial_order_does_not_change_moments(kind):
    x, predicted, data, noise, _ = problem(7, 9, kind)
    order = np.random.default_rng(5).permutation(9)
    other = noise[np.ix_(order, order)] if noise.ndim == 2 else noise[order]
    first = weights_of("serial", predicted, data, noise) @ x
    second = weights_of("serial", predicted[:, order], data[order], other) @ x
    close(first.mean(0), second.mean(0))
    close(np.cov(first.T), np.cov(second.T))
    assert np.abs(first - second).max() > 1e-3  # members do depend on the order


@pytest.mark.parametrize(("shape", "kind"), PROBLEMS)
@pytest.mark.parametrize("scheme", ["perturbed", "rescaled"])
def test_perturbed_mean_is_exact(scheme, shape, kind):
    x, predicted, data, noise, covariance = problem(*shape, kind)
    analysis = weights_of(scheme, predicted, data, noise) @ x
    close(analysis.mean(0), kalman(x, predicted, data, covariance)[0])


@pytest.mark.parametrize("shape", [(6, 3), (7, 30)])
@pytest.mark.parametrize("scheme", ["perturbed", "perturbed_rescaled"])
def test_perturbed_expected_covariance(scheme, shape):
    # z < 5 for 15 distinct entries: a false alarm in 1e5 runs.
    x, predicted, data, noise, covariance = problem(*shape, "covariance")
    w = ensemble.whiten(jnp.asarray(predicted), jnp.asarray(data), jnp.asarray(noise))
    keys = jax.random.split(jax.random.key(0), 8000)
    weights = jax.jit(jax.vmap(getattr(ensemble, scheme), (None, 0)))(w, keys)
    analyses = np.asarray(weights) @ x
    anomalies = analyses - analyses.mean(1, keepdims=True)
    covs = np.einsum("kia,kib->kab", anomalies, anomalies) / (len(x) - 1)
    expected = kalman(x, predicted, data, covariance)[1]
    if scheme == "perturbed_rescaled":
        k = gain(x, predicted, covariance)
        expected = expected + k @ covariance @ k.T / (len(x) - 1)
    z = (covs.mean(0) - expected) / (covs.std(0) / np.sqrt(len(keys)))
    assert np.abs(z).max() < 5
    # The two schemes are told apart.
    assert np.abs((covs.mean(0) - kalman(x, predicted, data, covariance)[1]) / covs.std(0)).max() < 0.06 or (
        scheme == "perturbed_rescaled"
    )


def test_dense_noise_perturbations_have_covariance_r():
    # Direct observation of the whole state: subtracting the deterministic part leaves e K^T, e the perturbations.
    r = np.random.default_rng(1)
    members, m = 4000, 3
    x = r.standard_normal((members, m)) @ r.standard_normal((m, m))
    root = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.6, 0.9, 0.3]])
    covariance, data = root @ root.T, np.array([0.3, -1.0, 2.0])
    analysis = weights_of("perturbed", x, data, covariance) @ x
    k = gain(x, x, covariance)
    drawn = np.linalg.solve(k, (analysis - x - (data - x) @ k.T).T)
    error = np.cov(drawn) - covariance
    se = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / members)
    assert np.abs(error / se).max() < 5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(6, 3), (7, 30)])
def test_rows_sum_to_one(scheme, shape):
    _, predicted, data, noise, _ = problem(*shape)
    close(weights_of(scheme, predicted, data, noise).sum(1), 1.0, 1e-12)


@pytest.mark.parametrize(
    ("shape", "kind"), [((7, 30), "covariance"), pytest.param((20, 22), "variances", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("scheme", ["etkf", "denkf", "serial", "rotated", "finite_size"])
def test_missing_data_drop_out(scheme, shape, kind):
    _, predicted, data, noise, _ = problem(*shape, kind)
    gone = np.arange(shape[1]) % 3 == 1
    with_gaps, holes = np.where(gone, np.nan, data), noise.copy()
    # What belongs to missing data must not matter, whatever it is.
    predicted_holes = np.where(gone, np.nan, predicted)
    if kind == "variances":
        holes[gone] = np.nan
        kept = noise[~gone]
    else:
        holes[gone], holes[:, gone] = np.nan, np.nan
        kept = noise[np.ix_(~gone, ~gone)]
    close(
        weights_of(scheme, predicted_holes, with_gaps, holes),
        weights_of(scheme, predicted[:, ~gone], data[~gone], kept),
        1e-9 if scheme == "finite_size" else 1e-11,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_observed_changes_nothing(scheme):
    _, predicted, data, noise, _ = problem(6, 8)
    weights = weights_of(scheme, predicted, np.full_like(data, np.nan), noise)
    if scheme == "rotated":
        close(weights @ weights.T, np.eye(6), 1e-12)
    else:
        close(weights, np.eye(6), 1e-12)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("shape", "kind"), PROBLEMS)
def test_log_likelihood_is_the_dense_one(shape, kind, gaps):
    _, predicted, data, noise, covariance = problem(*shape, kind)
    kept = np.arange(shape[1]) % 3 != 1 if gaps else np.ones(shape[1], bool)
    run = jax.jit(lambda p, d, r: ensemble.log_likelihood(ensemble.whiten(p, d, r)))
    actual = run(predicted, np.where(kept, data, np.nan), noise)
    cov = np.atleast_2d(np.cov(predicted[:, kept].T)) + covariance[np.ix_(kept, kept)]
    d = data[kept] - predicted[:, kept].mean(0)
    expected = -0.5 * (d @ np.linalg.solve(cov, d) + np.linalg.slogdet(cov)[1] + len(d) * np.log(2 * np.pi))
    close(actual, expected)


@pytest.mark.slow
def test_enkf_tends_to_kalman_at_root_n():
    # Slope of the rms error of the analysis mean over N = 16 .. 1024 with 400 keys; its sd is about .03, so 5 sd.
    truth_cov, noise, data = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([0.5]), np.array([1.5])
    root = np.linalg.cholesky(truth_cov)
    k = truth_cov[:, :1] / (truth_cov[0, 0] + noise)
    exact = (k * data)[:, 0]

    def error(key, members):
        first, second = jax.random.split(key)
        x = jax.random.normal(first, (members, 2)) @ jnp.asarray(root).T
        weights = ensemble.perturbed(ensemble.whiten(x[:, :1], jnp.asarray(data), jnp.asarray(noise)), second)
        return jnp.sum((jnp.mean(weights @ x, 0) - exact) ** 2)

    sizes = np.array([16, 64, 256, 1024])
    keys = jax.random.split(jax.random.key(2), 400)
    errors = [np.sqrt(np.mean(jax.lax.map(lambda key, n=int(n): error(key, n), keys))) for n in sizes]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.15


# ------------------------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("members", [2, 7, 40])
def test_rotation_leaves_mean_and_covariance(members):
    x = np.random.default_rng(0).standard_normal((members, 5)) + 3.0
    omega = np.asarray(ensemble.rotation(jax.random.key(1), members))
    close(omega @ omega.T, np.eye(members), 1e-12)
    close(omega.sum(1), 1.0, 1e-12)
    close((omega @ x).mean(0), x.mean(0), 1e-12)
    close(np.cov((omega @ x).T), np.cov(x.T), 1e-12)


def test_rotation_is_haar():
    # On the complement of 1, of dimension n: E Q_ij = 0, E Q_ij^2 = 1/n, E Q_ij^4 = 3 / (n (n + 2)), E tr(Q)^2 = 1.
    # Without the signs of R's diagonal E Q_11 is far from 0. About 50 z values below 5: false alarm in 3e4 runs.
    n, draws = 4, 20000
    omega = jax.jit(jax.vmap(lambda k: ensemble.rotation(k, n + 1)))(jax.random.split(jax.random.key(0), draws))
    basis = np.linalg.qr(np.concatenate([np.ones((n + 1, 1)), np.eye(n + 1)[:, :n]], 1))[0][:, 1:]
    q = basis.T @ np.asarray(omega) @ basis
    statistics = {0.0: q, 1 / n: q**2, 3 / (n * (n + 2)): q**4, 1.0: np.trace(q, axis1=1, axis2=2) ** 2}
    for expected, values in statistics.items():
        z = (values.mean(0) - expected) / (values.std(0) / np.sqrt(draws))
        assert np.abs(z).max() < 5


@pytest.mark.slow
def test_rotated_etkf_has_the_law_of_rotation_after_etkf():
    # Means and second moments of all weights over keys; 98 z values below 5: false alarm in 1e4 runs.
    _, predicted, data, noise, _ = problem(7, 9)
    w = ensemble.whiten(jnp.asarray(predicted), jnp.asarray(data), jnp.asarray(noise))
    keys = jax.random.split(jax.random.key(0), 2 * 8000).reshape(2, 8000)
    fast = np.asarray(jax.jit(jax.vmap(ensemble.etkf_rotated, (None, 0)))(w, keys[0]))

    def plain(key, weights):
        mean = jnp.mean(weights, 0)
        return ensemble.rotation(key, 7) @ (weights - mean) + mean

    slow = np.asarray(jax.jit(jax.vmap(plain, (0, None)))(keys[1], ensemble.etkf(w)))
    for power in (1, 2):
        a, b = fast**power, slow**power
        z = (a.mean(0) - b.mean(0)) / np.sqrt((a.var(0) + b.var(0)) / 8000)
        assert np.abs(z).max() < 5


# ------------------------------------------------------------------------------------------------- localisation


def test_gaspari_cohn_values():
    close(ensemble_local.gaspari_cohn(jnp.array([0.0, 1.0, 2.0, 2.5, -1.0])), [1.0, 5 / 24, 0.0, 0.0, 5 / 24], 1e-12)
    values = ensemble_local.gaspari_cohn(1 / jnp.array([1.7386, 1.82]))
    close(values, [np.exp(-0.5), 0.6335], 1e-4)
    r = np.linspace(1.0, 2.0, 11)
    far = 4 - 5 * r + 5 / 3 * r**2 + 5 / 8 * r**3 - r**4 / 2 + r**5 / 12 - 2 / (3 * r)
    close(ensemble_local.gaspari_cohn(jnp.asarray(r)), far, 1e-12)
    # The two pieces meet with their slopes.
    slope = jax.vmap(jax.grad(ensemble_local.gaspari_cohn))(jnp.array([1.0 - 1e-9, 1.0 + 1e-9, 0.0, 2.0]))
    close(slope[0], slope[1], 1e-7)
    close(slope[2:], 0.0)


@pytest.mark.parametrize("radius", [2.0, 4.0, 5.49])
def test_gaspari_cohn_is_positive_semi_definite_on_the_ring(radius):
    # The whole support, 2 x 1.82 radius each way, has to fit on half the ring.
    correlation = ensemble_local.localisation_taper(ensemble_local.ring_distances(40, jnp.arange(40.0)), radius)
    close(correlation[0, 1], ensemble_local.gaspari_cohn(jnp.array(1 / (1.82 * radius))), 1e-14)
    assert np.linalg.eigvalsh(np.asarray(correlation)).min() > -1e-12


def test_distances():
    ring = ensemble_local.ring_distances(10, jnp.array([0.0, 2.5, 9.0]))
    close(ring[:, 0], [0, 1, 2, 3, 4, 5, 4, 3, 2, 1], 1e-14)
    close(ring[np.array([0, 5, 9])], [[0, 2.5, 1], [5, 2.5, 4], [1, 3.5, 0]], 1e-14)
    a, b = jnp.array([[0.0, 0.0], [350.0, 1.0]]), jnp.array([[10.0, 3.0]])
    close(ensemble_local.distances(a, b)[:, 0], [np.sqrt(109), np.sqrt(340**2 + 4)], 1e-14)
    around = ensemble_local.distances(a, b, periods=jnp.array([360.0, jnp.inf]))
    close(around[:, 0], [np.sqrt(109), np.sqrt(404)], 1e-14)


@pytest.mark.parametrize("shape", [(2, 3), (7, 40), (14, 9), (24, 40)])
def test_letkf_with_infinite_radius_is_etkf(shape):
    _, predicted, data, noise, _ = problem(*shape)
    data[1] = np.nan
    taper = ensemble_local.localisation_taper(ensemble_local.ring_distances(3, jnp.arange(shape[1]) % 3.0), jnp.inf)
    weights = jax.jit(ensemble_local.letkf_weights)(predicted, data, noise, taper)
    expected = weights_of("etkf", predicted, data, noise)
    for local in np.asarray(weights):
        close(local, expected)


@pytest.mark.parametrize("members", [2, 7, 14])
def test_letkf_is_etkf_with_tapered_precision(members):
    x, predicted, data, noise, _ = problem(members, 8, state=6)
    taper = np.asarray(ensemble_local.localisation_taper(ensemble_local.ring_distances(6, jnp.arange(8) * 0.75), 0.7))
    assert (taper == 0).any()
    weights = jax.jit(ensemble_local.letkf_weights)(predicted, data, noise, taper)
    triangular = jax.jit(ensemble_local.letkf_weights_triangular)(predicted, data, noise, taper)
    analysis = ensemble_local.apply_local(weights, jnp.asarray(x))
    close(np.asarray(triangular).sum(2), 1.0, 1e-12)
    for place in range(6):
        kept = taper[place] > 0
        with np.errstate(divide="ignore"):
            variances = (noise / taper[place])[kept]
        expected = weights_of("etkf", predicted[:, kept], data[kept], variances)
        close(weights[place], expected)
        close(analysis[:, place], expected @ x[:, place])
        both = triangular[place] @ x, expected @ x
        close(both[0].mean(0), both[1].mean(0))
        close(np.cov(both[0].T), np.cov(both[1].T))


@pytest.mark.parametrize("n", [1, 6, 12, 13])
@pytest.mark.parametrize("strength", [0.0, 1.0, 1e4, 1e8])
def test_batched_roots_against_eigenvectors(n, strength):
    y = np.sqrt(strength) * np.random.default_rng(0).standard_normal((5, n, 3)) / np.sqrt(3)
    a = np.eye(n) + y @ y.transpose(0, 2, 1)
    values, vectors = np.linalg.eigh(a)
    expected = (vectors / np.sqrt(values)[:, None]) @ vectors.transpose(0, 2, 1)
    tolerance = max(1e-10, 1e-15 * strength)  # of the eigenvectors' own accuracy at the eigenvalue 1
    close(np.moveaxis(jax.jit(ensemble_roots.inverse_roots)(np.moveaxis(a, 0, -1)), -1, 0), expected, tolerance)
    factor = np.moveaxis(np.asarray(jax.jit(ensemble_roots.inverse_factors)(np.moveaxis(a, 0, -1))), -1, 0)
    close(factor.transpose(0, 2, 1) @ factor, expected @ expected, tolerance)
    close(np.triu(factor, 1), 0.0)


# ------------------------------------------------------------------------------------- finite size and iterative


def dual_minimum(predicted, data, noise):
    """l of the EnKF-N by brute force over the dual cost as DAPPER writes it, on a fine grid then refined."""
    members = len(predicted)
    y, d = (predicted - predicted.mean(0)) / np.sqrt(noise), (data - predicted.mean(0)) / np.sqrt(noise)
    _, s, vt = np.linalg.svd(y, full_matrices=False)
    less, du = members - 1, vt @ d
    e, c = (members + 1) / members, members / less
    padded = np.concatenate([s**2, np.zeros(members - len(s))]) + less
    correction = np.sqrt((e / c) ** (np.mean(1 / padded) * less))
    e, c = e / correction, c * correction

    def cost(l):
        return np.sum(du**2 / ((l[:, None] * s) ** 2 + less), 1) + e / l**2 + c * np.log(l**2)

    low, high = np.log(0.5), np.log(900.0)
    for _ in range(12):
        grid = np.exp(np.linspace(low, high, 4001))
        best = np.log(grid[np.argmin(cost(grid))])
        low, high = best - (high - low) / 1000, best + (high - low) / 1000
    return np.exp(best)


@pytest.mark.parametrize("stretch", [0.3, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("shape", [(6, 3), (7, 30), pytest.param((24, 40), marks=pytest.mark.slow)])
def test_finite_size_minimises_the_dual_cost(shape, stretch):
    x, predicted, data, noise, _ = problem(*shape)
    data = predicted.mean(0) + stretch * (data - predicted.mean(0))
    l = dual_minimum(predicted, data, noise)
    w = ensemble.whiten(jnp.asarray(predicted), jnp.asarray(data), jnp.asarray(noise))
    # A flat minimum is located by its values to the root of the rounding error only.
    close(np.sqrt(inflation_square(w)), l, 1e-6)
    # Kalman's update of the forecast inflated by l.
    exact = float(jnp.sqrt(inflation_square(w)))
    inflated = [v.mean(0) + exact * (v - v.mean(0)) for v in (x, predicted)]
    mean, cov = kalman(*inflated, data, np.diag(noise))
    analysis = weights_of("finite_size", predicted, data, noise) @ x
    # Inflation up to 300 makes the dense formula itself lose digits.
    close(analysis.mean(0), mean, 1e-6)
    close(np.cov(analysis.T), cov, 1e-6)


def test_finite_size_finds_the_global_minimum():
    # One direction with a huge innovation beside many accurate ones: J has two minima here.
    found = 0
    for seed in range(20):
        r = np.random.default_rng(seed)
        predicted = r.standard_normal((8, 6)) * 10.0 ** r.uniform(-3, 1, 6)
        data = predicted.mean(0) + r.standard_normal(6) * 10.0 ** r.uniform(-1, 2, 6)
        l = dual_minimum(predicted, data, np.ones(6))
        w = ensemble.whiten(jnp.asarray(predicted), jnp.asarray(data), jnp.ones(6))
        actual = float(jnp.sqrt(inflation_square(w)))
        if l < 800:
            found += 1
            close(actual, l, 1e-4)
    assert found > 10


def test_finite_size_certainty_pulls_towards_no_inflation():
    _, predicted, data, noise, _ = problem(7, 30)
    w = ensemble.whiten(jnp.asarray(predicted), jnp.asarray(data), jnp.asarray(noise))
    z = [float(inflation_square(w, certainty=c)) for c in (1.0, 2.0, 1e6)]
    assert z[0] > z[1] > z[2] > 0.9
    members = 7
    e, c = (members + 1) / members, members / (members - 1)
    y = w.anomalies
    prior = np.mean((members - 1) / (np.linalg.eigvalsh(y @ y.T) + members - 1))
    close(z[2], (e / c) ** (1 - prior), 1e-4)


@pytest.mark.parametrize(("shape", "kind"), [((6, 3), "covariance"), ((7, 30), "variances")])
def test_iterative_steps_are_etkf_when_linear(shape, kind):
    x, _, data, noise, _ = problem(*shape, kind)
    operator = np.random.default_rng(7).standard_normal((5, shape[1]))
    expected = weights_of("etkf", x @ operator, data, noise)
    state = ensemble_iterative.iterative_start(shape[0])
    step = jax.jit(ensemble_iterative.iterative_step)
    for _ in range(3):
        trial = ensemble_iterative.iterative_weights(state) @ x
        state = step(state.mean, state.transform, trial @ operator, data, noise)
        close(ensemble_iterative.iterative_weights(state), expected)
    close(state.increment, 0.0)


def test_iterative_steps_solve_a_nonlinear_problem():
    # Stationary point of |d(w)|^2 / 2 + (N - 1) |w|^2 / 2, its gradient by automatic differentiation (bundle form).
    x, _, _, _, _ = problem(6, 4, state=4)
    noise = jnp.full(4, 0.5)
    mean, anomalies = jnp.asarray(x.mean(0)), jnp.asarray(x - x.mean(0))
    data = jnp.sin(0.3 * (mean + 1.0)) + jnp.array([0.3, -0.2, 0.1, 0.4])

    def forward(state):
        return jnp.sin(0.3 * state)

    state, epsilon = ensemble_iterative.iterative_start(6), 1e-6
    step = jax.jit(ensemble_iterative.iterative_step)
    for _ in range(60):
        trial = mean + state.mean @ anomalies + epsilon * anomalies
        state = step(state.mean, epsilon * jnp.eye(6), forward(trial), data, noise)

    def cost(w):
        return jnp.sum((data - forward(mean + w @ anomalies)) ** 2 / noise) + 5 * jnp.sum(w**2)

    assert np.abs(jax.grad(cost)(state.mean)).max() < 1e-4
    assert np.abs(jax.grad(cost)(jnp.zeros(6))).max() > 1e-1
    sensitivity = anomalies * (0.3 * jnp.cos(0.3 * (mean + state.mean @ anomalies))) / jnp.sqrt(noise)
    inverse = np.linalg.inv(np.eye(6) + sensitivity @ sensitivity.T / 5)
    close(state.transform @ state.transform, inverse, 1e-4)


# ------------------------------------------------------------------------------------------------------ inflation


def test_multiplicative_and_relaxation():
    r = np.random.default_rng(0)
    forecast, analysis = 2.0 * r.standard_normal((6, 4)) + 1.0, r.standard_normal((6, 4)) - 2.0
    inflated = np.asarray(ensemble_inflation.multiplicative(jnp.asarray(analysis), 1.3))
    close(inflated.mean(0), analysis.mean(0), 1e-12)
    close(np.cov(inflated.T), 1.69 * np.cov(analysis.T), 1e-12)
    relaxed = np.asarray(ensemble_inflation.rtps(jnp.asarray(forecast), jnp.asarray(analysis), 0.3))
    close(relaxed.mean(0), analysis.mean(0), 1e-12)
    close(relaxed.std(0, ddof=1), 0.7 * analysis.std(0, ddof=1) + 0.3 * forecast.std(0, ddof=1), 1e-12)
    close(np.corrcoef(relaxed.T), np.corrcoef(analysis.T), 1e-12)
    mixed = np.asarray(ensemble_inflation.rtpp(jnp.asarray(forecast), jnp.asarray(analysis), 0.3))
    expected = analysis.mean(0) + 0.7 * (analysis - analysis.mean(0)) + 0.3 * (forecast - forecast.mean(0))
    close(mixed, expected, 1e-12)


def test_rtps_without_spread_is_finite():
    forecast = jnp.ones((4, 3)).at[0, 0].set(2.0)
    analysis = jnp.ones((4, 3)).at[1, 1].set(2.0)
    close(ensemble_inflation.rtps(forecast, analysis, 0.5).std(0, ddof=1), [0.0, 0.25, 0.0], 1e-12)
    gradient = jax.grad(lambda f, a: jnp.sum(ensemble_inflation.rtps(f, a, 0.5) ** 2), (0, 1))(forecast, analysis)
    assert all(np.isfinite(g).all() for g in gradient)


def test_additive_keeps_the_mean_and_adds_variance():
    # 8000 keys, z < 5 for 6 entries.
    x = np.random.default_rng(0).standard_normal((5, 3))
    sd = np.array([0.5, 1.0, 2.0])
    keys = jax.random.split(jax.random.key(0), 8000)
    many = np.asarray(jax.vmap(lambda k: ensemble_inflation.additive(jnp.asarray(x), k, jnp.asarray(sd)))(keys))
    close(many.mean(1), np.broadcast_to(x.mean(0), (8000, 3)), 1e-12)
    a = many - many.mean(1, keepdims=True)
    covs = np.einsum("kia,kib->kab", a, a) / 4
    z = (covs.mean(0) - np.cov(x.T) - np.diag(sd**2)) / (covs.std(0) / np.sqrt(8000))
    assert np.abs(z).max() < 5


def test_adaptive_update_by_hand():
    w = ensemble.Whitened(jnp.array([[1.0, 2.0], [-1.0, -2.0]]), jnp.array([3.0, 1.0]), jnp.array(2.0), jnp.array(0.0))
    # t = 10, seen (10 - 2) / 10 = 0.8, error (2 / 2) ((1.2 * 10 + 2) / 10)^2 = 1.96, gain 0.04 / 2.
    rho, variance = ensemble_inflation.adaptive_update(jnp.array(1.2), jnp.array(0.04), w)
    close(rho, 1.2 - 0.4 * 0.02, 1e-12)
    close(variance, 0.04 * 0.98, 1e-12)
    none = w._replace(anomalies=0.0 * w.anomalies, innovation=0.0 * w.innovation, count=jnp.array(0.0))
    close(jnp.stack(ensemble_inflation.adaptive_update(jnp.array(1.2), jnp.array(0.04), none)), [1.2, 0.04], 1e-14)


def test_adaptive_update_finds_the_inflation():
    # 3000 cycles with true factor 1.5 and v growing by 1.03 a cycle up to 0.01; the stationary sd is about .07.
    _, predicted, _, noise, _ = problem(7, 12)
    noise = 3.0 * noise
    cov = 1.5 * np.cov(predicted.T) + np.diag(noise)
    root = np.linalg.cholesky(cov)
    data = predicted.mean(0) + np.random.default_rng(3).standard_normal((3000, 12)) @ root.T

    def step(carry, y):
        rho, variance = carry
        w = ensemble.whiten(jnp.asarray(predicted), y, jnp.asarray(noise))
        rho, variance = ensemble_inflation.adaptive_update(rho, variance, w)
        return (rho, jnp.minimum(1.03 * variance, 0.01)), rho

    _, path = jax.lax.scan(step, (jnp.array(1.0), jnp.array(0.01)), jnp.asarray(data))
    assert abs(float(path[500:].mean()) - 1.5) < 0.2


# ------------------------------------------------------------------------------------ derivatives and precision


def differences(function, argument, h=1e-5):
    """Central differences of a scalar function along every entry."""
    gradient = np.zeros_like(argument)
    for index in np.ndindex(argument.shape):
        up, down = argument.copy(), argument.copy()
        up[index] += h
        down[index] -= h
        gradient[index] = (function(up) - function(down)) / (2 * h)
    return gradient


@pytest.mark.parametrize("shape", [pytest.param((5, 2), marks=pytest.mark.slow), (5, 9)])
@pytest.mark.parametrize("scheme", [thorough(s, s not in ("etkf", "finite_size")) for s in SCHEMES])
def test_gradients_are_those_of_differences(scheme, shape):
    # N - 1 - m eigenvalues of I + S S^T are equal to 1: an eigendecomposition alone gives NaN.
    x, predicted, data, noise, _ = problem(*shape)
    data[-1] = np.nan
    target = np.random.default_rng(9).standard_normal((shape[0], x.shape[1]))

    def value(predicted, noise):
        w = ensemble.whiten(predicted, jnp.asarray(data), noise)
        return jnp.sum(target * (SCHEMES[scheme](w) @ x)) + ensemble.log_likelihood(w)

    value = jax.jit(value)
    by_predicted, by_noise = jax.jit(jax.grad(value, (0, 1)))(predicted, noise)
    close(by_predicted, differences(lambda p: float(value(p, noise)), predicted), 1e-6)
    close(by_noise, differences(lambda r: float(value(predicted, r)), noise), 1e-6)
    assert np.abs(by_predicted).max() > 1e-2


@pytest.mark.parametrize("members", [4, pytest.param(14, marks=pytest.mark.slow)])
def test_gradients_of_local_weights(members):
    _, predicted, data, noise, _ = problem(members, 5)
    ring = ensemble_local.ring_distances(5, jnp.arange(5.0))
    target = np.random.default_rng(9).standard_normal((5, members, members))

    def value(radius, predicted):
        taper = ensemble_local.localisation_taper(ring, radius)
        return jnp.sum(target * ensemble_local.letkf_weights(predicted, jnp.asarray(data), jnp.asarray(noise), taper))

    value = jax.jit(value)
    by_radius, by_predicted = jax.jit(jax.grad(value, (0, 1)))(1.1, predicted)
    close(by_radius, differences(lambda r: float(value(r, predicted)), np.array(1.1)), 1e-6)
    close(by_predicted, differences(lambda p: float(value(1.1, p)), predicted), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["etkf", "finite_size", "local"])
def test_second_derivatives_are_those_of_differences(scheme):
    # Three data missing of five leave the eigenvalue 1 three times or more on either side of the switch.
    _, predicted, data, noise, _ = problem(6, 5)
    data[1:4] = np.nan
    target, direction = np.random.default_rng(9).standard_normal((2, 6, 6))

    @jax.jit
    def slope(scale, predicted, direction):
        def value(s):
            moved = predicted + s * direction[:, :5]
            if scheme == "local":
                return jnp.sum(target * ensemble_local.letkf_weights(moved, data, noise, jnp.ones((1, 5))))
            return jnp.sum(target * SCHEMES[scheme](ensemble.whiten(moved, data, noise)))

        return jax.grad(value)(scale)

    second = jax.jit(jax.grad(slope))(0.0, predicted, direction)
    close(second, (slope(1e-5, predicted, direction) - slope(-1e-5, predicted, direction)) / 2e-5, 1e-6)
    assert abs(second) > 1e-3


@pytest.mark.parametrize("shape", [(6, 3), pytest.param((24, 40), marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in ("rotated", "perturbed", "rescaled")])
def test_float32(scheme, shape):
    _, predicted, data, noise, _ = problem(*shape)
    exact = weights_of(scheme, predicted, data, noise)
    single = weights_of(scheme, *(jnp.asarray(v, jnp.float32) for v in (predicted, data, noise)))
    assert single.dtype == np.float32
    close(single, exact, 1e-4)


@pytest.mark.parametrize("scheme", ["rotated", "perturbed", "rescaled"])
def test_float32_of_random_schemes(scheme):
    x, predicted, data, noise, covariance = problem(7, 30)
    single = weights_of(scheme, *(jnp.asarray(v, jnp.float32) for v in (predicted, data, noise)))
    assert single.dtype == np.float32
    close((single @ x).mean(0), kalman(x, predicted, data, covariance)[0], 1e-4)


def test_float32_of_local_weights():
    _, predicted, data, noise, _ = problem(7, 30)
    taper = ensemble_local.localisation_taper(ensemble_local.ring_distances(30, jnp.arange(30.0)), 4.0)
    for function in (ensemble_local.letkf_weights, ensemble_local.letkf_weights_triangular):
        exact = jax.jit(function)(predicted, data, noise, taper)
        single = jax.jit(function)(*(jnp.asarray(v, jnp.float32) for v in (predicted, data, noise, taper)))
        assert single.dtype == np.float32
        close(single, exact, 1e-4)
