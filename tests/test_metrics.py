"""Distances against closed forms, quadrature and other libraries."""

import jax
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats

from pushforward import metrics
from pushforward.math.classifier import Layer, cross_entropy, held_out_accuracies, initial_layers

MEAN, OTHER_MEAN = np.array([0.3, -1.0, 0.2]), np.array([0.0, 0.5, -0.4])
COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 2.0, -0.3], [0.0, -0.3, 0.5]])
OTHER_COVARIANCE = np.array([[0.8, -0.2, 0.1], [-0.2, 1.0, 0.4], [0.1, 0.4, 1.5]])
PAIR = (MEAN, COVARIANCE, OTHER_MEAN, OTHER_COVARIANCE)


def normals(key, *shape):
    return np.random.default_rng(key).standard_normal(shape)


def area_between(first, second, power):
    """`int |F - G|^power` of two empirical distribution functions, exactly."""
    points = np.sort(np.concatenate([first, second]))
    gaps = [np.searchsorted(np.sort(sample), points[:-1], "right") / len(sample) for sample in (first, second)]
    return np.sum(np.diff(points) * np.abs(gaps[0] - gaps[1]) ** power)


@pytest.mark.parametrize("sizes", [(40, 40), (40, 27), (7, 100)])
def test_on_the_line_distances_are_areas_between_distribution_functions(sizes):
    first, second = normals(0, sizes[0]), 1.3 * normals(1, sizes[1]) + 0.4
    assert metrics.sliced_wasserstein(first, second) == pytest.approx(area_between(first, second, 1), rel=1e-12)
    squared = 2 * area_between(first, second, 2)
    assert metrics.energy_distance(first, second) ** 2 == pytest.approx(squared, rel=1e-10)
    assert metrics.energy_distance(first, second) == pytest.approx(scipy.stats.energy_distance(first, second))


def test_sliced_wasserstein_of_a_shift():
    # W_p along u is |u.m| whatever the draws, so SW_2 = |m| / sqrt(d), SW_1 = |m| E|u_1|; E|u_1| = 1/2 for d = 3.
    # Relative standard error over 20,000 directions 0.003 and 0.004; tolerance 4 of them (false alarm 1e-4 each).
    shift, draws = np.array([1.0, -2.0, 0.5]), normals(2, 20, 3)
    length = np.linalg.norm(shift)
    found = metrics.sliced_wasserstein(draws + shift, draws, order=2, projections=20_000)
    assert found == pytest.approx(length / 3**0.5, rel=0.012)
    found = metrics.sliced_wasserstein(draws + shift, draws, projections=20_000)
    assert found == pytest.approx(length / 2, rel=0.016)


def test_sliced_wasserstein_agrees_with_ott():
    sliced = pytest.importorskip("ott.tools.sliced")
    first, second = normals(3, 100, 2), normals(4, 60, 2) @ np.array([[1.0, 0.5], [0.0, 2.0]])
    squared, _ = sliced.sliced_wasserstein(first, second, n_proj=3000, rng=jax.random.key(0))
    found = metrics.sliced_wasserstein(first, second, order=2, projections=3000)
    # Both are Monte Carlo over 3,000 directions; relative standard error of the squared distance below 0.02.
    assert found**2 == pytest.approx(float(squared), rel=0.08)


def test_energy_distance_is_made_of_energy_scores():
    first, second = normals(5, 30, 3), 0.5 * normals(6, 45, 3) + 0.2
    gain = np.mean([metrics.energy_score(first, y) - metrics.energy_score(second, y) for y in second])
    assert gain == pytest.approx(metrics.energy_distance(first, second) ** 2 / 2, rel=1e-10)
    assert metrics.energy_distance(first, first[::-1]) == pytest.approx(0, abs=1e-6)


def test_energy_distance_in_blocks_equals_one_block():
    first, second = normals(7, 50, 2), normals(8, 33, 2)
    assert metrics._mean_distance(first, second, block=7) == pytest.approx(metrics._mean_distance(first, second))


def test_energy_score_on_the_line_is_the_crps_of_a_normal():
    # Draws at the quantiles (i + 1/2)/n: no Monte Carlo error, only the 1/n of the rule.
    mean, deviation, count = 0.7, 1.6, 4000
    draws = scipy.stats.norm.ppf((np.arange(count) + 0.5) / count, mean, deviation)
    for observation in (-2.0, 0.7, 3.1):
        w = (observation - mean) / deviation
        normal = scipy.stats.norm
        crps = deviation * (w * (2 * normal.cdf(w) - 1) + 2 * normal.pdf(w) - np.pi**-0.5)
        assert metrics.energy_score(draws, observation) == pytest.approx(crps, abs=1e-3)


def test_energy_score_agrees_with_scoringrules():
    scoringrules = pytest.importorskip("scoringrules")
    draws, observation = normals(9, 25, 4), np.array([0.1, -0.5, 1.0, 2.0])
    expected = scoringrules.es_ensemble(observation, draws, backend="numpy")
    assert metrics.energy_score(draws, observation) == pytest.approx(float(expected))


def test_gaussian_closed_forms_on_the_line_against_quadrature():
    p, q = scipy.stats.norm(0.3, 0.8), scipy.stats.norm(-0.5, 1.7)
    arguments = (0.3, 0.8**2, -0.5, 1.7**2)

    def integral(function):
        return scipy.integrate.quad(function, -12, 12, epsabs=1e-12, limit=200)[0]

    kl = integral(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)))
    assert metrics.gaussian_kl(*arguments) == pytest.approx(kl, rel=1e-8)
    hellinger_squared = integral(lambda x: (p.pdf(x) ** 0.5 - q.pdf(x) ** 0.5) ** 2) / 2
    assert metrics.gaussian_hellinger(*arguments) ** 2 == pytest.approx(hellinger_squared, rel=1e-8)
    quantiles = scipy.integrate.quad(lambda s: (p.ppf(s) - q.ppf(s)) ** 2, 0, 1, limit=200)[0]
    assert metrics.gaussian_wasserstein(*arguments) ** 2 == pytest.approx(quantiles, rel=1e-6)


def test_gaussian_closed_forms_against_textbook_matrices():
    ratio = np.linalg.inv(OTHER_COVARIANCE) @ COVARIANCE
    shift = MEAN - OTHER_MEAN
    kl = (np.trace(ratio) - 3 - np.log(np.linalg.det(ratio)) + shift @ np.linalg.inv(OTHER_COVARIANCE) @ shift) / 2
    assert metrics.gaussian_kl(*PAIR) == pytest.approx(kl, rel=1e-10)
    middle = (COVARIANCE + OTHER_COVARIANCE) / 2
    determinants = np.linalg.det(COVARIANCE) * np.linalg.det(OTHER_COVARIANCE)
    overlap = determinants**0.25 / np.linalg.det(middle) ** 0.5
    overlap *= np.exp(-shift @ np.linalg.inv(middle) @ shift / 8)
    assert metrics.gaussian_hellinger(*PAIR) ** 2 == pytest.approx(1 - overlap, rel=1e-10)
    root = scipy.linalg.sqrtm(COVARIANCE)
    cross = np.real(scipy.linalg.sqrtm(root @ OTHER_COVARIANCE @ root))
    squared = shift @ shift + np.trace(COVARIANCE + OTHER_COVARIANCE - 2 * cross)
    assert metrics.gaussian_wasserstein(*PAIR) ** 2 == pytest.approx(squared, rel=1e-8)


def test_hellinger_is_bounded_by_kl_and_local_to_it():
    assert metrics.gaussian_hellinger(*PAIR) ** 2 < metrics.gaussian_kl(*PAIR) / 2
    step = 1e-4
    near = (MEAN, COVARIANCE, MEAN + step, COVARIANCE * (1 + step))
    assert metrics.gaussian_kl(*near) == pytest.approx(4 * metrics.gaussian_hellinger(*near) ** 2, rel=1e-3)


def test_gaussian_distances_vanish_for_equal_laws():
    equal = (MEAN, COVARIANCE, MEAN, COVARIANCE)
    for distance in (metrics.gaussian_kl, metrics.gaussian_hellinger, metrics.gaussian_wasserstein):
        assert distance(*equal) == pytest.approx(0, abs=1e-6)


def test_c2st_reaches_the_optimal_accuracy():
    # Optimal accuracy Phi(1/2) = 0.6915; binomial standard error 0.0073 at 2 x 2,000 draws, tolerance 4 of them (1e-4).
    shifted = normals(11, 2000, 2) + np.array([1.0, 0.0])
    score = metrics.c2st(shifted, normals(12, 2000, 2))
    assert score.accuracy == pytest.approx(scipy.stats.norm.cdf(0.5), abs=0.029)
    assert score.standard_error == pytest.approx(0.0073, abs=2e-4)
    # Rescaling both samples changes nothing, since inputs are standardised by the reference.
    units = np.array([1e-4, 1e4])
    again = metrics.c2st(units * shifted + 5, units * normals(12, 2000, 2) + 5)
    assert again.accuracy == pytest.approx(score.accuracy, abs=0.01)


def test_c2st_of_equal_laws_is_a_half_and_held_out():
    # Standard error 0.0079, tolerance 4 (false alarm 1e-4); accuracy on training draws would be above 0.6 here.
    score = metrics.c2st(normals(13, 2000, 10), normals(14, 2000, 10))
    assert score.accuracy == pytest.approx(0.5, abs=0.032)


def moons(key, count, width):
    random = np.random.default_rng(key)
    angle, radius = random.uniform(-np.pi / 2, np.pi / 2, count), random.normal(0.4, width, count)
    side = random.choice([-1, 1], count)
    return np.stack([side * (radius * np.cos(angle) + 0.25), radius * np.sin(angle)], axis=1)


@pytest.mark.slow
def test_c2st_agrees_with_scikit_learn():
    """Thin moons against thick ones: a hard case, with equal means and covariances."""
    pytest.importorskip("sklearn")
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    draws, reference = moons(15, 1000, 0.12), moons(16, 1000, 0.04)
    items = (np.concatenate([draws, reference]) - reference.mean(0)) / reference.std(0)
    network = MLPClassifier((20, 20), max_iter=10_000, random_state=1)
    folds = KFold(5, shuffle=True, random_state=1)
    theirs = cross_val_score(network, items, np.repeat([0, 1], 1000), cv=folds).mean()
    ours = metrics.c2st(draws, reference)
    # One standard error is 0.01 for either; the draws are the same, so they differ by less. A linear rule stays at 0.5.
    assert theirs > 0.6
    assert ours.accuracy == pytest.approx(theirs, abs=0.04)


def test_c2st_follows_its_key_and_takes_samples_of_different_size():
    draws, reference = normals(17, 103, 2), normals(18, 400, 2)
    first = metrics.c2st(draws, reference, key=3)
    assert metrics.c2st(draws, reference, key=3) == first
    assert metrics.c2st(draws, reference, key=jax.random.key(3)) == first
    assert metrics.c2st(draws, reference, key=4) != first
    assert metrics.c2st(draws + 50, reference).accuracy == 1.0


@pytest.mark.parametrize("wide", [False, True])
def test_classifier_keeps_to_single_precision_without_implicit_promotion(wide):
    sample = normals(19, 20, 2).astype(np.float32)
    options = {"width": 4, "steps": 3, "batch": 5, "learning_rate": 0.01, "weight_decay": 0.1}
    with jax.enable_x64(wide), jax.numpy_rank_promotion("raise"):
        layers = initial_layers(jax.random.key(0), 2, 4)
        with jax.numpy_dtype_promotion("strict"):  # not for optax, which raises a float to an integer power
            gradient = jax.grad(cross_entropy)(layers, sample, np.ones(20, np.float32))
        accuracies = held_out_accuracies(sample, sample, jax.random.key(0), folds=4, **options)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((gradient, accuracies)))
    assert accuracies.shape == (4,)


def test_cross_entropy_of_a_known_network():
    # Zero weights and last bias b give the logit b, hence log(1 + e^-b) for label 1 and log(1 + e^b) for label 0.
    layers = jax.tree.map(np.zeros_like, initial_layers(jax.random.key(0), 2, 4))
    layers[-1] = Layer(layers[-1].weights, np.array([0.7], np.float32))
    items, labels = np.ones((4, 2), np.float32), np.array([1, 0, 0, 0], np.float32)
    expected = (np.log1p(np.exp(-0.7)) + 3 * np.log1p(np.exp(0.7))) / 4
    assert float(cross_entropy(layers, items, labels)) == pytest.approx(expected, rel=1e-6)


def test_thin_takes_evenly_spaced_rows():
    np.testing.assert_array_equal(metrics.thin(np.arange(10), 4), [0, 2, 5, 7])
    np.testing.assert_array_equal(metrics.thin(np.arange(3), 4), [0, 1, 2])


def test_unusable_samples_are_refused():
    good = normals(20, 30, 2)
    with pytest.raises(ValueError, match=r"`draws` has shape \(2, 3, 4\); expected \(draws, dimension\)"):
        metrics.energy_distance(np.zeros((2, 3, 4)), good)
    with pytest.raises(ValueError, match="`reference` holds NaN"):
        metrics.energy_distance(good, np.full((5, 2), np.nan))
    with pytest.raises(ValueError, match="2 and 3 coordinates"):
        metrics.sliced_wasserstein(good, normals(0, 30, 3))
    with pytest.raises(ValueError, match="order >= 1"):
        metrics.sliced_wasserstein(good, good, order=0)
    with pytest.raises(ValueError, match="at least 2 folds and 2 draws a fold"):
        metrics.c2st(good[:9], good)
    with pytest.raises(ValueError, match=r"expected mean \(d,\), covariance \(d, d\)"):
        metrics.gaussian_kl(MEAN, COVARIANCE, MEAN[:2], COVARIANCE)
