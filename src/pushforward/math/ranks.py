"""Ranks of true values among draws, tests of their uniformity, and coverage.

Let theta ~ p(theta), y ~ p(y | theta) and theta_1, ..., theta_L ~ p(theta | y) independently. Given y the L + 1 values
are exchangeable, so for any statistic T(theta, y) the rank of T(theta, y) among the T(theta_l, y) is uniform on
0, ..., L; with ties broken at random and one more uniform number V,

    pit = (rank + V) / (L + 1)

is uniform on (0, 1) exactly, whatever L, so that data sets with different L can be tested together (Talts,
Betancourt, Simpson, Vehtari and Gelman 2018, arXiv 1804.06788, theorem 1).

All arrays are NumPy's; the leading axis holds data sets, or draws where that is said.
"""

import functools

import numpy as np
from scipy.special import bdtr, bdtrik, gammaln, xlogy

FINEST_GRID = 1000
SMALLEST_P = 1e-12
"""p-values are 1 minus a sum of 64-bit numbers, hence known to about this absolute precision."""


def randomised_pit(truth: np.ndarray, draws: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """`(rank + V) / (L + 1)`, rank = number of draws below the truth, plus a uniform share of those equal to it.

    Args:
        truth: shape (...,).
        draws: shape (draw, ...).
        uniform: V in (0, 1), shape (...,); it breaks ties too.

    Returns:
        Shape (...,), uniform on (0, 1) where truth and draws are exchangeable.
    """
    below, equal = np.sum(draws < truth, axis=0), np.sum(draws == truth, axis=0)
    # floor(V (ties + 1)) is uniform on 0..ties, and its fractional part is uniform and independent of it.
    return (below + uniform * (equal + 1)) / (draws.shape[0] + 1)


def thinned(draws: np.ndarray, effective: float) -> np.ndarray:
    """Nearly independent draws of chains: every k-th of each, `k = round(all / effective)`, chains put together.

    Correlation of draws makes the law of ranks too wide at the ends, by an amount of order
    (autocorrelation) / L; thinning by the ratio of lengths leaves that below what a few thousand data sets show.

    Args:
        draws: shape (chain, draw, ...).
        effective: effective sample size of all chains together.

    Returns:
        Shape (chain * ceil(draw / k), ...).
    """
    chains, length = draws.shape[:2]
    step = int(np.clip(np.round(chains * length / max(effective, 1.0)), 1, length))
    kept = draws[:, ::step]
    return kept.reshape(-1, *kept.shape[2:])


def distance_pit(
    truth: np.ndarray, draws: np.ndarray, reference: np.ndarray, scale: np.ndarray, uniform: float
) -> float:
    """TARP: randomised rank of the truth's distance from a reference point among the draws' distances.

    `|x|^2 = sum_i (x_i / scale_i)^2`. The mass of the ball around the reference that has the truth on its surface is
    uniform where the posterior is exact, whatever law the reference has, as long as it knows nothing of the truth.

    Args:
        truth: shape (parameters,).
        draws: shape (draw, parameters).
        reference: shape (parameters,).
        scale: shape (parameters,).
        uniform: a number in (0, 1).

    Reference:
        Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), ICML, arXiv 2302.03026, algorithm 2.
    """
    far = np.sum(((draws - reference) / scale) ** 2, axis=-1)
    near = np.sum(((truth - reference) / scale) ** 2, axis=-1)
    return float(randomised_pit(near, far, np.asarray(uniform)))


def spread(values: np.ndarray) -> np.ndarray:
    """Scale of each column by its quartiles, `IQR / 1.349`; by its standard deviation, or 1, where that is 0."""
    quartiles = np.quantile(values, [0.25, 0.75], axis=0)
    scale = (quartiles[1] - quartiles[0]) / 1.349
    scale = np.where(scale > 0, scale, np.std(values, axis=0))
    return np.where(scale > 0, scale, 1.0)


def central_coverage(pit: np.ndarray, credibility: np.ndarray) -> np.ndarray:
    """Share of data sets whose truth lies in the central interval of each credibility, `|2 pit - 1| <= c`.

    Args:
        pit: shape (dataset, ...).
        credibility: c, shape (levels,).

    Returns:
        Shape (levels, ...).
    """
    return distribution(np.abs(2 * pit - 1), credibility)


def distribution(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Empirical distribution function of values of shape (dataset, ...) at points, shape (points, ...)."""
    ordered = np.sort(values.reshape(len(values), -1), axis=0)
    found = [np.searchsorted(column, points, side="right") for column in ordered.T]
    return (np.asarray(found, float).T / len(values)).reshape(len(points), *values.shape[1:])


def grid(n: int) -> np.ndarray:
    """Points i / K, i = 1..K-1, at which distribution functions of n values are judged; K = n up to 1000."""
    size = min(n, FINEST_GRID)
    return np.arange(1, size) / size


def uniformity_p_value(pit: np.ndarray) -> np.ndarray:
    """Exact p-values of the test of Säilynoja, Bürkner and Vehtari that values are uniform on (0, 1).

    With N_i values below z_i = i / K the statistic is the least pointwise p-value,

        gamma = min_i 2 min(P(Bin(n, z_i) <= N_i), P(Bin(n, z_i) >= N_i)),

    and its p-value the probability that n uniform values have a gamma as small. It looks at all parts of (0, 1) with
    the same care, so that it sees heavy ends (draws too narrow), which the test of Kolmogorov and Smirnov hardly does.

    Args:
        pit: shape (n, ...).

    Returns:
        Shape (...,). `P(p <= a) <= a` under uniformity; nearly equal, as gamma takes finitely many values.

    Reference:
        Säilynoja, Bürkner and Vehtari (2022), Stat. Comput. 32, 32, doi:10.1007/s11222-022-10090-6, eq. 7.
    """
    n = len(pit)
    points = grid(n)
    counts = np.rint(distribution(pit, points) * n)
    at = points.reshape(-1, *(1,) * (counts.ndim - 1))
    pointwise = 2 * np.minimum(bdtr(counts, n, at), bdtr(n - counts, n, 1 - at))
    gamma = np.min(pointwise, axis=0)
    values, where = np.unique(gamma, return_inverse=True)
    found = np.array([_p_value(n, float(value)) for value in values])
    return found[where].reshape(gamma.shape)


def simultaneous_band(n: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds within which the distribution function of n uniform values stays with probability 1 - level or more.

    Those of the test of `uniformity_p_value`: a function that leaves the band has a p-value of at most `level`, and
    one that stays has a larger one.

    Args:
        n: number of values.
        level: probability to leave.

    Returns:
        Lower and upper bound at `grid(n)`, each of shape (K - 1,), bounds included in the band.
    """
    low, high = np.log(SMALLEST_P), 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(n, float(np.exp(middle))) <= level else (low, middle)
    first, last = _bounds(n, float(np.exp(low)))
    return first / n, last / n


@functools.lru_cache(maxsize=4096)
def _p_value(n: int, gamma: float) -> float:
    first, last = _bounds(n, gamma)
    return float(np.clip(1 - probability_inside(n, grid(n), first, last), SMALLEST_P, 1.0))


def _bounds(n: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest count at each point of the grid whose pointwise p-value exceeds gamma."""
    points = grid(n)
    # Equality counts as small, up to rounding: gamma is itself one of these numbers.
    limit = gamma * (1 + 1e-9) / 2
    near = np.nan_to_num(np.ceil(bdtrik(limit, n, points))).astype(int) + np.arange(-2, 3)[:, None]
    near = np.clip(near, 0, n)
    first = near[np.argmax(bdtr(near, n, points) > limit, axis=0), np.arange(len(points))]
    # P(Bin(n, z) >= c) = P(Bin(n, 1 - z) <= n - c), and the grid is symmetric.
    return first, n - first[::-1]


def probability_inside(n: int, points: np.ndarray, first: np.ndarray, last: np.ndarray) -> float:
    """Probability that n uniform values have between `first` and `last` of them below each point.

    Counts of uniform values are those of a Poisson process of rate n, given that it has n points on (0, 1); its
    independent increments make the sum over all paths one convolution per point (Moscovich and Nadler 2017, Stat.
    Probab. Lett. 123, doi:10.1016/j.spl.2016.11.027).

    Args:
        n: number of values.
        points: increasing, inside (0, 1).
        first: least count at each point.
        last: largest count at each point.
    """
    if np.any(first > last):
        return 0.0
    state, start, before = np.ones(1), 0, 0.0
    for point, low, high in zip(np.append(points, 1.0), np.append(first, n), np.append(last, n), strict=True):
        step = np.convolve(state, _poisson(n * (point - before), high - start))
        state = step[max(low - start, 0) : high - start + 1]
        start, before = max(low, start), point
    return float(state[0] / _poisson(float(n), n)[n])


def _poisson(mean: float, largest: int) -> np.ndarray:
    """Probabilities of 0..largest."""
    counts = np.arange(largest + 1)
    return np.exp(xlogy(counts, mean) - mean - gammaln(counts + 1))


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted for their number: rejecting those at most a errs with probability a or less, however dependent.

    `adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))`; the least is Bonferroni's m p.

    Args:
        p_values: shape (m,).

    Reference:
        Holm (1979), Scand. J. Stat. 6.
    """
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    stepped = np.maximum.accumulate(np.minimum(1.0, factors * p_values[order]))
    adjusted = np.empty(len(p_values))
    adjusted[order] = stepped
    return adjusted
