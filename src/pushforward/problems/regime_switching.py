"""Two regimes that take turns: a hidden Markov model of growth and a switching linear model, both with exact answers.

*Hidden Markov model*, after Hamilton (1989): s_0 ~ `START`, p(s_t given s_{t-1}) = `STAY` on the diagonal,

    y_t ~ N(MEAN[s_t], SD[s_t]^2),

y the growth of real GNP of the United States in percent per quarter, regime 0 recession, regime 1 expansion. Hamilton's
own model adds four lags of y - MEAN[s] and has one deviation for both regimes; here data are independent given regimes,
so that a forward algorithm over two regimes is exact.

*Switching linear model*: the regime selects the dynamics of a continuous state,

    x_0 ~ N(0, 1),    x_t = A[s_t] x_{t-1} + B[s_t] + Q[s_t] e_t,    y_t = x_t + R v_t,

e and v ~ N(0, 1): given the regimes a Kalman filter is exact, and a short series allows a sum over all their paths.

Sources: Hamilton (1989), A new approach to the economic analysis of nonstationary time series and the business cycle,
Econometrica 57, 357-384 (data, 1951-II to 1984-IV, as printed in the tests of statsmodels); Rabiner (1989), A tutorial
on hidden Markov models, Proc. IEEE 77, 257-286 (forward and backward); Barber and Cemgil (2010), Graphical models for
time series, IEEE Signal Process. Mag. 27(6), 18-28 (switching linear models).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from scipy.special import logsumexp

from pushforward.problems._grid import normal_log_density
from pushforward.problems._problem import constant

STAY = (0.75, 0.89)
"""Probability that a quarter is in the regime of the one before, regime by regime."""
MEAN = (-0.22, 1.18)
SD = (0.97, 0.79)
"""Growth in percent per quarter. These six values are the maximum of the likelihood of `GROWTH`, to two decimals."""

A = (0.95, 0.5)
B = (0.0, 2.0)
Q = (0.2, 0.6)
R = 0.5
SWITCHING_STAY = (0.85, 0.7)


def transition_matrix(stay, array: Any = np):
    """p(next regime given regime), rows are the regime left; `stay`, shape (2,); `array` is numpy or jax.numpy."""
    stay = array.asarray(stay)
    return array.stack([array.stack([stay[0], 1 - stay[0]]), array.stack([1 - stay[1], stay[1]])])


def stationary(stay, array: Any = np):
    """The law of a regime that does not change from step to step, shape (2,)."""
    leave = 1 - array.asarray(stay)
    return leave[::-1] / leave.sum()


def _log_sum(values: np.ndarray, axis: int | None = None, keepdims: bool = False) -> np.ndarray:
    return np.asarray(logsumexp(values, axis=axis, keepdims=keepdims))


# ------------------------------------------------------------------------------------------- hidden Markov model


def model(y=None, steps=None):
    """Known parameters; y, shape (n,), NaN = missing, None to simulate `steps` quarters. Its exact answer: `exact`."""
    _hidden_markov(y, steps, STAY)


def model_stay(y=None, steps=None):
    """Unknown probabilities to stay, stay[0] ~ Beta(3, 1), stay[1] ~ Beta(9, 1); the rest is known."""
    _hidden_markov(y, steps, numpyro.sample("stay", dist.Beta(jnp.array([3.0, 9.0]), 1.0).to_event(1)))


def _hidden_markov(y, steps, stay):
    matrix, mean, sd = transition_matrix(stay, jnp), jnp.array(MEAN), jnp.array(SD)

    def step(regime, y):
        regime = numpyro.sample("regime", dist.Categorical(probs=matrix[regime]))
        numpyro.sample("y", dist.Normal(mean[regime], sd[regime]), obs=y)
        return regime, None

    scan(step, numpyro.sample("regime0", dist.Categorical(probs=stationary(stay, jnp))), y, length=steps)


class Exact(NamedTuple):
    """The exact answer of `model`: log p(y) and, each of shape (steps, 2), regimes' probabilities at each step."""

    log_evidence: float
    filtering: np.ndarray
    smoothing: np.ndarray


def exact(y, stay=STAY, mean=MEAN, sd=SD) -> Exact:
    """Forward and backward algorithm for `model` with the data y, shape (n,), NaN = missing; log domain."""
    log_seen = normal_log_density(np.asarray(y, np.float64)[:, None], np.array(mean), np.array(sd))
    log_matrix, alpha = np.log(transition_matrix(stay)), np.log(stationary(stay))
    alphas, betas = [], [np.zeros(2)]
    for seen in log_seen:
        alpha = seen + _log_sum(alpha[:, None] + log_matrix, axis=0)
        alphas.append(alpha)
    for seen in log_seen[:0:-1]:
        betas.append(_log_sum(log_matrix + seen + betas[-1], axis=1))
    filtering, smoothing = np.stack(alphas), np.stack(alphas) + np.stack(betas[::-1])
    return Exact(float(_log_sum(alpha)), *(np.exp(p - _log_sum(p, 1, keepdims=True)) for p in (filtering, smoothing)))


# ---------------------------------------------------------------------------------------- switching linear model


def switching_linear(y=None, steps=None):
    """Known parameters; y, shape (n,), NaN = missing, None to simulate `steps` data. See `exact_switching`."""
    matrix = transition_matrix(SWITCHING_STAY, jnp)
    a, b, q = jnp.array(A), jnp.array(B), jnp.array(Q)

    def step(carry, y):
        regime, x = carry
        regime = numpyro.sample("regime", dist.Categorical(probs=matrix[regime]))
        x = numpyro.sample("x", dist.Normal(a[regime] * x + b[regime], q[regime]))
        numpyro.sample("y", dist.Normal(x, R), obs=y)
        return (regime, x), None

    regime0 = numpyro.sample("regime0", dist.Categorical(probs=stationary(SWITCHING_STAY, jnp)))
    scan(step, (regime0, numpyro.sample("x0", dist.Normal(0.0, 1.0))), y, length=steps)


def simulate_switching(steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regimes, states and data of `switching_linear`, each of shape (steps,), from numpy's `default_rng(seed)`.

    One uniform for s_0 and one normal for x_0; then per step one uniform for the regime (1 where it is at least the
    probability of regime 0), one normal for x and one for y.
    """
    rng = np.random.default_rng(seed)
    matrix = transition_matrix(SWITCHING_STAY)
    regime, x, rows = int(rng.uniform() >= stationary(SWITCHING_STAY)[0]), rng.normal(), []
    for _ in range(steps):
        regime = int(rng.uniform() >= matrix[regime, 0])
        x = A[regime] * x + B[regime] + Q[regime] * rng.normal()
        rows.append((regime, x, x + R * rng.normal()))
    regimes, states, data = np.array(rows).T
    return regimes.astype(int), states, data


class ExactSwitching(NamedTuple):
    """The exact answer of `switching_linear`: a sum over every path of regimes.

    Attributes:
        log_evidence: log p(y).
        regime: p(s_t given all data), shape (steps, 2).
        mean: E[x_t given all data], shape (steps,).
        sd: the standard deviation of x_t given all data, shape (steps,).
        filtering_regime, filtering_mean: p(s_t) and E[x_t] given the data up to and including step t.
    """

    log_evidence: float
    regime: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    filtering_regime: np.ndarray
    filtering_mean: np.ndarray


def exact_switching(y) -> ExactSwitching:
    """All 2^n paths of s_1 .. s_n, each with its Kalman filter and smoother; y, shape (n,), NaN = missing.

    Raises:
        ValueError: y has more than 16 entries, and more than 65,536 paths.
    """
    y = np.asarray(y, np.float64)
    if len(y) > 16:
        raise ValueError(f"y has {len(y)} entries: 2^{len(y)} paths of regimes are too many to sum over, at most 16")
    paths = np.stack(np.meshgrid(*[[0, 1]] * len(y), indexing="ij"), axis=-1).reshape(-1, len(y))
    matrix = np.log(transition_matrix(SWITCHING_STAY))
    log_weight = np.log(stationary(SWITCHING_STAY) @ np.exp(matrix))[paths[:, 0]]
    mean, variance, filtered, predicted, seen = 0.0, 1.0, [], [], []
    for t, s in enumerate(paths.T):
        if t > 0:
            log_weight = log_weight + matrix[paths[:, t - 1], s]
        a, b, q = np.array(A)[s], np.array(B)[s], np.array(Q)[s]
        mean, variance = a * mean + b, a**2 * variance + q**2
        predicted.append((a, mean, variance))
        if not np.isnan(y[t]):
            log_weight = log_weight + normal_log_density(y[t], mean, np.sqrt(variance + R**2))
            gain = variance / (variance + R**2)
            mean, variance = mean + gain * (y[t] - mean), gain * R**2
        filtered.append((mean, variance))
        weight = np.exp(log_weight - _log_sum(log_weight))
        seen.append((_regimes(weight, s), weight @ mean))
    smoothed = [filtered[-1]]
    for (m, P), (a, m_next, P_next) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        G = P * a / P_next
        smoothed.append((m + G * (smoothed[-1][0] - m_next), P + G**2 * (smoothed[-1][1] - P_next)))
    means, variances = (np.stack(part) for part in zip(*smoothed[::-1], strict=True))
    average = means @ weight
    spread = np.sqrt((variances + (means - average[:, None]) ** 2) @ weight)
    regime = np.stack([_regimes(weight, s) for s in paths.T])
    filtering_regime, filtering_mean = (np.stack(part) for part in zip(*seen, strict=True))
    return ExactSwitching(float(_log_sum(log_weight)), regime, average, spread, filtering_regime, filtering_mean)


def _regimes(weight, s):
    return np.bincount(s, weight, minlength=2)


# ---------------------------------------------------------------------------------------------------------- data
# fmt: off
GROWTH = constant([
    2.59316421, 2.20217133, 0.45827562, 0.9687438, -0.24130757, 0.89647478, 2.05393219, 1.73353648, 0.93871289,
    -0.46477833, -0.80983406, -1.39763689, -0.39886093, 1.1918416, 1.45620048, 2.11808228, 1.08957863, 1.32390273,
    0.87296367, -0.19773273, 0.45420215, 0.07221876, 1.1030364, 0.82097489, -0.05795795, 0.58447772, -1.56192672,
    -2.05041027, 0.53637183, 2.33676839, 2.34014559, 1.2339263, 1.8869648, -0.45920792, 0.84940469, 1.70139849,
    -0.28756312, 0.09594627, -0.86080289, 1.03447127, 1.23685944, 1.42004502, 2.22410631, 1.30210173, 1.03517699,
    0.9253425, -0.16559951, 1.3444382, 1.37500131, 1.73222184, 0.71605635, 2.21032143, 0.85333031, 1.00238776,
    0.42725441, 2.14368343, 1.43789184, 1.57959926, 2.27469826, 1.95962656, 0.25992399, 1.01946914, 0.49016398,
    0.5636338, 0.5959546, 1.43082857, 0.56230122, 1.15388393, 1.68722844, 0.77438205, -0.09647045, 1.39600146,
    0.13646798, 0.55223715, -0.39944872, -0.61671102, -0.08722561, 1.2101835, -0.90729755, 2.64916158, -0.0080694,
    0.51111895, -0.00401437, 2.16821432, 1.92586732, 1.03504717, 1.85897219, 2.32004929, 0.25570789, -0.09855274,
    0.89073682, -0.55896485, 0.28350255, -1.31155407, -0.88278776, -1.97454941, 1.01275265, 1.68264723, 1.38271284,
    1.86073637, 0.4447377, 0.41449001, 0.99202275, 1.36283576, 1.59970522, 1.98845816, -0.25684232, 0.87786949,
    3.1095655, 0.85324478, 1.23337317, 0.00314302, -0.09433369, 0.89883322, -0.19036628, 0.99772376, -2.39120054,
    0.06649673, 1.26136017, 1.91637838, -0.3348029, 0.44207108, -1.40664911, -1.52129889, 0.29919869, -0.80197448,
    0.15204792, 0.98585027, 2.13034606, 1.34397924, 1.61550522, 2.70930099, 1.24461412, 0.50835466, 0.14802167,
])
# fmt: on
"""Growth of real GNP, percent per quarter, 1951-II to 1984-IV, shape (135,)."""

SWITCHING_REGIMES, SWITCHING_TRUTH, SWITCHING_DATA = map(constant, simulate_switching(10))
"""Regimes, states and data of `switching_linear`, shape (10,)."""

# Exact; the tests compute them again.
LOG_EVIDENCE = -190.690352
"""log p(GROWTH) under `model`."""
STAY_LOG_EVIDENCE = -192.687336
STAY_MEAN = (0.749333, 0.891942)
STAY_SD = (0.087935, 0.041582)
"""Log evidence and posterior moments of `stay` in `model_stay` given GROWTH, by two-dimensional quadrature."""
SWITCHING_LOG_EVIDENCE = -12.784902
"""log p(SWITCHING_DATA) under `switching_linear`."""
