"""Distances between two samples, and between two Gaussians.

All functions take arrays whose rows are draws and whose columns are coordinates; none standardises its input
except `c2st`. `pushforward.compare` applies them to results.

Two formulas that tie them together, for laws P and Q on the line with distribution functions F and G:
the 1-Wasserstein distance is the area between F and G, and the squared energy distance is
`2 int (F - G)^2`. In any dimension the energy score ES of which it is made satisfies
`E_{y ~ Q}[ES(P, y) - ES(Q, y)] = energy_distance(P, Q)^2 / 2`.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike

from ._errors import DataError
from .math.classifier import held_out_accuracies

JOINT_COORDINATES = 256
FLOOR_REPEATS = 5
SMALLEST_SAMPLE = 10
CLASSIFIER_STEPS = 2000
CLASSIFIER_BATCH = 200
CLASSIFIER_LEARNING_RATE = 1e-2
CLASSIFIER_WEIGHT_DECAY = 0.15
CLASSIFIER_WIDTHS = (50, 100)


class C2ST(NamedTuple):
    """Classifier two-sample score and its standard error (see `c2st`)."""

    accuracy: float
    standard_error: float


def generator(key) -> np.random.Generator:
    """NumPy generator of an integer or of a typed JAX key."""
    if isinstance(key, jax.Array):
        return np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    return np.random.default_rng(key)


def sliced_wasserstein(
    draws: ArrayLike, reference: ArrayLike, *, order: int = 1, projections: int = 200, key: int = 0
) -> float:
    """Sliced Wasserstein distance between two empirical laws.

    `SW_p(P, Q)^p = E_u[W_p(u.P, u.Q)^p]`, u uniform on the unit sphere, estimated with the same `projections`
    directions for equal keys. Each W_p on the line is exact, `W_p^p = int_0^1 |F^-1(s) - G^-1(s)|^p ds`, also
    for samples of different size. For laws that differ by a shift m alone `SW_2 = |m| / sqrt(d)`.

    Use it to see how far mass must move, in units of the coordinates. It averages over directions: a
    discrepancy in one of d coordinates is diluted by about `1 / sqrt(d)`.

    Args:
        draws: shape (draws, dimension), or (draws,) on the line.
        reference: shape (other draws, dimension).
        order: p >= 1; 1 is hardly moved by a single stray draw.
        projections: number of directions; on the line one is enough and is used.
        key: seed of the directions.

    Returns:
        SW_p, not its p-th power.

    Reference:
        Bonneel, Rabin, Peyre and Pfister (2015), J. Math. Imaging Vis. 51, definition 4.
    """
    draws, reference = _samples(draws, reference)
    if order < 1 or projections < 1:
        raise DataError(f"sliced_wasserstein needs order >= 1 and projections >= 1, got {order}, {projections}.")
    dimension = draws.shape[1]
    directions = generator(key).standard_normal((dimension, 1 if dimension == 1 else projections))
    directions /= np.linalg.norm(directions, axis=0)
    left = np.sort(draws @ directions, axis=0)
    right = np.sort(reference @ directions, axis=0)
    if len(left) == len(right):
        cost = np.mean(np.abs(left - right) ** order, axis=0)
    else:
        # Both quantile functions are constant between neighbours of the merged levels i/n and j/m.
        levels = np.union1d(np.arange(len(left) + 1) / len(left), np.arange(len(right) + 1) / len(right))
        middle = (levels[1:] + levels[:-1]) / 2
        gap = left[(middle * len(left)).astype(int)] - right[(middle * len(right)).astype(int)]
        cost = np.diff(levels) @ np.abs(gap) ** order
    return float(np.mean(cost) ** (1 / order))


def energy_distance(draws: ArrayLike, reference: ArrayLike) -> float:
    """Energy distance between two empirical laws.

    `D(P, Q) = sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|)`, X, X' ~ P and Y, Y' ~ Q independent. It is the maximum
    mean discrepancy of the kernel `-|x - y|` times sqrt(2) (Sejdinovic, Sriperumbudur, Gretton and Fukumizu
    2013, Ann. Stat. 41, theorem 22), free of a bandwidth, and zero only for P = Q. On the line it equals
    `scipy.stats.energy_distance`.

    The sums run over all pairs, those of a draw with itself included, so that the result is the exact distance of
    the empirical laws, never negative, and of size `sqrt(1/n + 1/m)` for two samples of one law. The cost is
    O(n m d) time, O(n + m) memory per row block.

    Args:
        draws: shape (draws, dimension), or (draws,) on the line.
        reference: shape (other draws, dimension).

    Reference:
        Szekely and Rizzo (2013), J. Stat. Plan. Inference 143, eq. 2.5 (there squared).
    """
    draws, reference = _samples(draws, reference)
    squared = 2 * _mean_distance(draws, reference) - _mean_distance(draws, draws) - _mean_distance(reference, reference)
    return float(np.sqrt(max(squared, 0.0)))


def energy_score(draws: ArrayLike, observation: ArrayLike) -> float:
    """Energy score of a sample as a forecast of one observation; on the line the CRPS. Smaller is better.

    `ES(P, y) = E|X - y| - E|X - X'| / 2`. For P = N(m, s^2) and `w = (y - m) / s` on the line it is
    `s (w (2 Phi(w) - 1) + 2 phi(w) - 1 / sqrt(pi))`.

    Args:
        draws: shape (draws, dimension), or (draws,) on the line.
        observation: shape (dimension,), or a number on the line.

    Reference:
        Gneiting and Raftery (2007), J. Am. Stat. Assoc. 102, eqs. 21 and 22.
    """
    draws, observation = _samples(draws, np.atleast_1d(np.asarray(observation))[None])
    return _mean_distance(draws, observation) - _mean_distance(draws, draws) / 2


def c2st(draws: ArrayLike, reference: ArrayLike, *, folds: int = 5, key: int = 0) -> C2ST:
    """Classifier two-sample score: held-out accuracy of a network told to tell two samples apart.

    0.5 means that the classifier sees no difference, 1 that it tells the samples apart without error. For enough
    draws the score tends to `(1 + TV(P, Q)) / 2`, TV the total variation distance, from below; for
    N(0, I) and N((1, 0), I) that is Phi(1/2) = 0.6915.

    The classifier is the benchmark's: two hidden layers of 10 units per dimension (at least 50, at most 100),
    inputs z-scored by the reference, 5 stratified random folds; here all folds are trained in one compiled loop.
    A sample that is larger than the other is thinned to its size. Draws of a slowly mixing chain are told apart
    by their clusters, whatever their law: read the score beside the one of two halves of the reference.

    Args:
        draws: shape (draws, dimension), or (draws,) on the line; at least 2 `folds` draws.
        reference: shape (other draws, dimension).
        folds: number of folds.
        key: seed of folds, initial weights and batches: an integer or a typed JAX key.

    Returns:
        Accuracy, and its binomial standard error over all held-out items, `sqrt(a (1 - a) / (2 n))`.

    Reference:
        Lopez-Paz and Oquab (2017), Revisiting classifier two-sample tests, ICLR, eq. 2; settings of Lueckmann,
        Boelts, Greenberg, Goncalves and Macke (2021), arXiv 2101.04653.
    """
    draws, reference = _samples(draws, reference)
    size = min(len(draws), len(reference)) // folds * folds
    if folds < 2 or size < 2 * folds:
        raise DataError(
            f"c2st got {len(draws)} and {len(reference)} draws for {folds} folds; it needs at least 2 folds and "
            "2 draws a fold in each sample. Give more draws or fewer folds."
        )
    center, scale = reference.mean(0), reference.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    first, second = (((thin(sample, size) - center) / scale).astype(np.float32) for sample in (draws, reference))
    width = int(np.clip(10 * draws.shape[1], *CLASSIFIER_WIDTHS))
    jax_key = key if isinstance(key, jax.Array) else jax.random.key(key)
    accuracies = _compiled_classifier(folds, width)(first, second, jax_key)
    accuracy = float(np.mean(np.asarray(accuracies)))
    return C2ST(accuracy, float(np.sqrt(accuracy * (1 - accuracy) / (2 * size))))


def thin(draws: np.ndarray, size: int) -> np.ndarray:
    """`size` rows of a sample, evenly spaced (all rows if there are no more than that)."""
    if len(draws) <= size:
        return draws
    return draws[np.arange(size) * len(draws) // size]


def gaussian_kl(mean, covariance, other_mean, other_covariance) -> float:
    """Kullback-Leibler divergence KL(N(m, C), N(n, D)).

    `KL = (tr(D^-1 C) + |n - m|^2_D - d + log det D - log det C) / 2`.

    Args:
        mean: m, shape (d,).
        covariance: C, shape (d, d), positive definite.
        other_mean: n, shape (d,).
        other_covariance: D, shape (d, d), positive definite.
    """
    mean, covariance, other_mean, other_covariance = _gaussians(mean, covariance, other_mean, other_covariance)
    root, other_root = np.linalg.cholesky(covariance), np.linalg.cholesky(other_covariance)
    ratio = np.linalg.solve(other_root, root)
    shift = np.linalg.solve(other_root, other_mean - mean)
    log_determinants = 2 * np.sum(np.log(np.diag(other_root)) - np.log(np.diag(root)))
    return float((np.sum(ratio**2) + shift @ shift - len(mean) + log_determinants) / 2)


def gaussian_hellinger(mean, covariance, other_mean, other_covariance) -> float:
    """Hellinger distance between N(m, C) and N(n, D): `H^2 = 1 - int sqrt(p q)`, so that 0 <= H <= 1.

    `H^2 = 1 - det(C)^(1/4) det(D)^(1/4) / det(S)^(1/2) exp(-|m - n|^2_S / 8)`, S = (C + D) / 2. It satisfies
    `H^2 <= KL / 2`, and `KL = 4 H^2` to leading order for near laws.

    Args:
        mean: m, shape (d,).
        covariance: C, shape (d, d), positive definite.
        other_mean: n, shape (d,).
        other_covariance: D, shape (d, d), positive definite.
    """
    mean, covariance, other_mean, other_covariance = _gaussians(mean, covariance, other_mean, other_covariance)
    roots = [np.linalg.cholesky(c) for c in (covariance, other_covariance, (covariance + other_covariance) / 2)]
    half_log = [np.sum(np.log(np.diag(root))) for root in roots]
    shift = np.linalg.solve(roots[2], mean - other_mean)
    # expm1 keeps the digits of near laws.
    return float(np.sqrt(-np.expm1((half_log[0] + half_log[1]) / 2 - half_log[2] - shift @ shift / 8)))


def gaussian_wasserstein(mean, covariance, other_mean, other_covariance) -> float:
    """2-Wasserstein distance between N(m, C) and N(n, D).

    `W^2 = |m - n|^2 + tr C + tr D - 2 tr((C^(1/2) D C^(1/2))^(1/2))`.

    Args:
        mean: m, shape (d,).
        covariance: C, shape (d, d), positive definite.
        other_mean: n, shape (d,).
        other_covariance: D, shape (d, d), positive definite.

    Reference:
        Givens and Shortt (1984), Michigan Math. J. 31, proposition 7.
    """
    mean, covariance, other_mean, other_covariance = _gaussians(mean, covariance, other_mean, other_covariance)
    # With C = A A^T and D = B B^T the last trace is the nuclear norm of A^T B, for any square roots A and B.
    roots = [np.linalg.cholesky(c) for c in (covariance, other_covariance)]
    overlap = np.sum(np.linalg.svd(roots[0].T @ roots[1], compute_uv=False))
    squared = np.sum((mean - other_mean) ** 2) + np.trace(covariance + other_covariance) - 2 * overlap
    return float(np.sqrt(max(squared, 0.0)))


class Judge:
    """A reference, standardised and halved once, that scores other samples and knows its own floors.

    The rules are those of `pushforward.compare`.

    Args:
        reference: draws, shape (chain, draw, coordinates), none of them constant.
        draws: most draws of either sample in the joint distances.
        projections: directions of the sliced Wasserstein distance.
        key: seed of directions and of the classifier.
    """

    def __init__(self, reference: np.ndarray, *, draws: int = 2000, projections: int = 200, key: int = 0):
        chains, length, coordinates = reference.shape
        if chains > 1:
            halves = (reference[0::2], reference[1::2])
        else:
            halves = (reference[:, : length // 2], reference[:, length // 2 :])
        if chains * length < 2 * SMALLEST_SAMPLE or draws < SMALLEST_SAMPLE:
            raise DataError(
                f"the reference has {chains} x {length} draws and draws={draws}; expected at least "
                f"{2 * SMALLEST_SAMPLE} draws of the reference, of which draws={SMALLEST_SAMPLE} or more are used."
            )
        self.projections, self.key = projections, key
        self.moments = _moments(reference)
        self.half_errors = self._errors(*map(_moments, halves))
        used = min(coordinates, JOINT_COORDINATES)
        self.chosen = np.arange(used) * coordinates // used
        if coordinates > JOINT_COORDINATES:
            warnings.warn(
                f"of {coordinates} coordinates the joint distances use {JOINT_COORDINATES} evenly spaced ones; "
                "choose others with var_names=.",
                stacklevel=3,
            )
        self.whole = self._standardise(reference)
        self.halves = [self._standardise(half) for half in halves]
        self.most = min(draws, *map(len, self.halves))
        self.floors: dict[int, dict[str, float]] = {}

    def moment_errors(self, sample: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """`mean_error` and `sd_error` of each coordinate, and the floor of the largest."""
        errors = self._errors(_moments(sample), self.moments)
        size = sample.shape[0] * sample.shape[1]
        ratio = np.sqrt((1 / size + 1 / len(self.whole)) / sum(1 / len(half) for half in self.halves))
        return errors, {name: float(ratio * error.max()) for name, error in self.half_errors.items()}

    def joint_distances(self, sample: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        """Distances of a sample of shape (chain, draw, coordinates) from the reference, and their floors."""
        standard = self._standardise(sample)
        size = min(len(standard), self.most)
        if size not in self.floors:
            self.floors[size] = self._floor(size)
        if np.array_equal(standard, self.whole):
            return self.floors[size], self.floors[size]
        return self._score(thin(standard, size), self.whole), self.floors[size]

    def _floor(self, size: int) -> dict[str, float]:
        """Scores of `size` draws of one half against the other, averaged over at most 5 disjoint subsets."""
        first, second = self.halves
        repeats = min(FLOOR_REPEATS, len(first) // size)
        scores = [self._score(thin(first[i::repeats], size), second) for i in range(repeats)]
        return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}

    def _score(self, draws: np.ndarray, exact: np.ndarray) -> dict[str, float]:
        exact = thin(exact, self.most)
        classifier = C2ST(np.nan, np.nan)
        if len(draws) >= SMALLEST_SAMPLE:
            classifier = c2st(draws, exact, key=self.key)
        return {
            "sliced_wasserstein": sliced_wasserstein(draws, exact, projections=self.projections, key=self.key),
            "energy_distance": energy_distance(draws, exact),
            "c2st": classifier.accuracy,
            "c2st_se": classifier.standard_error,
        }

    def _errors(self, moments, other_moments) -> dict[str, np.ndarray]:
        (mean, deviation), (other_mean, other_deviation) = moments, other_moments
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = np.abs(np.log(deviation) - np.log(other_deviation))
        return {
            "mean_error": np.abs(mean - other_mean) / self.moments[1],
            "sd_error": np.nan_to_num(log_ratio, nan=np.inf, posinf=np.inf),
        }

    def _standardise(self, sample: np.ndarray) -> np.ndarray:
        """The chosen coordinates in units of the reference, chains one after another."""
        mean, deviation = (moment[self.chosen] for moment in self.moments)
        return (sample[..., self.chosen].reshape(-1, len(self.chosen)) - mean) / deviation


def varies(draws: np.ndarray) -> np.ndarray:
    """Which coordinates of draws (chain, draw, coordinates) vary by more than rounding errors."""
    largest = np.max(np.abs(draws), axis=(0, 1))
    return np.ptp(draws, axis=(0, 1)) > 8 * np.finfo(draws.dtype).eps * largest


def _moments(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (0 for a single draw) of each coordinate of (chain, draw, coordinates)."""
    mean = np.mean(draws, axis=(0, 1), dtype=np.float64)
    size = draws.shape[0] * draws.shape[1]
    return mean, np.std(draws, axis=(0, 1), dtype=np.float64, mean=mean[None, None], ddof=min(1, size - 1))


@functools.cache
def _compiled_classifier(folds: int, width: int):
    """The jitted classifier; kept, so that a second comparison of the same sizes compiles nothing."""
    return jax.jit(
        functools.partial(
            held_out_accuracies,
            folds=folds,
            width=width,
            steps=CLASSIFIER_STEPS,
            batch=CLASSIFIER_BATCH,
            learning_rate=CLASSIFIER_LEARNING_RATE,
            weight_decay=CLASSIFIER_WEIGHT_DECAY,
        )
    )


def _mean_distance(left: np.ndarray, right: np.ndarray, block: int = 1000) -> float:
    """Mean of |x - y| over all pairs, in blocks of rows to bound memory."""
    from scipy.spatial.distance import cdist

    total = sum(cdist(left[i : i + block], right).sum() for i in range(0, len(left), block))
    return float(total / (len(left) * len(right)))


def _samples(draws: ArrayLike, reference: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both samples as float64 arrays of shape (draws, dimension), checked."""
    samples = []
    for name, sample in (("draws", draws), ("reference", reference)):
        sample = np.asarray(sample, dtype=np.float64)
        sample = sample[:, None] if sample.ndim == 1 else sample
        if sample.ndim != 2 or sample.size == 0:
            raise DataError(
                f"`{name}` has shape {sample.shape}; expected (draws, dimension), rows are draws. "
                "Reshape with `x.reshape(chains * draws, -1)`."
            )
        if not np.all(np.isfinite(sample)):
            raise DataError(f"`{name}` holds NaN or infinite values; drop those draws first.")
        samples.append(sample)
    if samples[0].shape[1] != samples[1].shape[1]:
        raise DataError(
            f"the samples have {samples[0].shape[1]} and {samples[1].shape[1]} coordinates; expected equal numbers."
        )
    return samples[0], samples[1]


def _gaussians(mean, covariance, other_mean, other_covariance) -> list[np.ndarray]:
    """Means of shape (d,) and covariances of shape (d, d); numbers on the line."""
    arrays = [np.asarray(a, dtype=np.float64) for a in (mean, covariance, other_mean, other_covariance)]
    arrays = [np.atleast_1d(a) if i % 2 == 0 else np.atleast_2d(a) for i, a in enumerate(arrays)]
    size = len(arrays[0])
    if [a.shape for a in arrays] != [(size,), (size, size)] * 2:
        raise DataError(
            f"got shapes {[a.shape for a in arrays]}; expected mean (d,), covariance (d, d), twice, with one d."
        )
    return arrays
