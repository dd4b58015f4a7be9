"""Gaussian mixture: one location seen through a wide or a narrow Gaussian, nobody knows which.

    theta ~ U(-10, 10)^2,    x ~ 0.5 N(theta, I) + 0.5 N(theta, 0.01 I),    both of shape (2,),

one component for the pair. The posterior is a narrow peak on a broad base, half of the mass each unless the box cuts:

    p(theta given x) ~ 1[theta in the box] (0.5 N(theta; x, I) + 0.5 N(theta; x, 0.01 I)).

Source: Lueckmann, Boelts, Greenberg, Goncalves, Macke (2021), Benchmarking simulation-based inference, AISTATS,
arXiv:2101.04653, task T.7, after Sisson, Fan, Tanaka (2007), PNAS 104, 1760-1765. `OBSERVATIONS` are our own, not the
ten of that benchmark: the model run in float64 with `jax.random.key(i)`, i = 0, ..., 9, rounded to 6 decimals. Scores
are comparable on average over data only.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpy.typing import ArrayLike
from scipy.special import log_ndtr, logsumexp, ndtri_exp

from pushforward.problems._grid import normal_log_density
from pushforward.problems._problem import Problem, constant
from pushforward.problems._sbi import Exact, checked, first, generator

PARAMETER = "theta"
DATA = "x"
"""Names of the site of parameters and of the site, and argument, of data."""
BOUND = 10.0
SD = (1.0, 0.1)
"""Standard deviations of the components, each with probability one half."""


def model(x=None):
    """Data x, shape (2,), None to simulate."""
    theta = numpyro.sample("theta", dist.Uniform(-BOUND, BOUND).expand([2]).to_event(1))
    components = dist.Normal(theta, jnp.array(SD)[:, None]).to_event(1)
    numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.5, 0.5])), components), obs=x)


def observations(n: int = 10) -> np.ndarray:
    """The first n of ten data sets, shape (n, 2); `TRUTHS` holds their parameters."""
    return first(OBSERVATIONS, n)


def reference(x: ArrayLike, n: int, key: int | jax.Array) -> np.ndarray:
    """n exact, independent draws of theta given x, shape (2,); shape (n, 2), float64.

    A component by its mass inside the box, then each coordinate by the inverse distribution function of a normal
    truncated to (-10, 10), in logarithms, so that data far outside the box are as exact as any.

    Example:
        >>> reference(observations()[0], 1000, key=0).shape
        (1000, 2)
    """
    x, rng = checked(x, n, (2,)), generator(key)
    low, high, log_mass = _truncation(x)
    narrow = rng.uniform(size=n) < _weights(log_mass)[1]
    u = rng.uniform(size=(n, 2))
    pick = narrow.astype(int)
    with np.errstate(divide="ignore"):  # log 0 = -inf is the end of the interval
        log_p = np.logaddexp(np.log1p(-u) + log_ndtr(low[pick]), np.log(u) + log_ndtr(high[pick]))
    # `_truncation` measured from the side of x, where the lower tail has all its digits
    theta = np.abs(x) + np.array(SD)[pick, None] * ndtri_exp(log_p)
    return np.where(x < 0, -1.0, 1.0) * np.clip(theta, -BOUND, BOUND)


def exact(x: ArrayLike) -> Exact:
    """Moments and evidence in closed form, by the truncated normals of the two components."""
    x = checked(x, 1, (2,))
    low, high, log_mass = _truncation(x)
    weights, sd, sign = _weights(log_mass)[:, None], np.array(SD)[:, None], np.where(x < 0, -1.0, 1.0)
    at_low, at_high = (np.exp(normal_log_density(z, 0.0, 1.0) - log_mass) for z in (low, high))
    mean = sign * (np.abs(x) + sd * (at_low - at_high))
    variance = sd**2 * (1 + low * at_low - high * at_high - (at_low - at_high) ** 2)
    average = np.sum(weights * mean, axis=0)
    spread = np.sqrt(np.sum(weights * (variance + (mean - average) ** 2), axis=0))
    log_evidence = float(logsumexp(log_mass.sum(axis=1)) - np.log(2 * (2 * BOUND) ** 2))
    return Exact(average, spread, log_evidence)


def log_posterior(theta: ArrayLike, x: ArrayLike) -> np.ndarray:
    """log p(theta) + log p(x given theta) for theta of shape (..., 2): normalised as a joint density; shape (...)."""
    theta, x = np.asarray(theta, np.float64), checked(x, 1, (2,))
    components = [normal_log_density(x, theta, sd).sum(axis=-1) for sd in SD]
    inside = np.all(np.abs(theta) <= BOUND, axis=-1)
    return np.where(inside, np.logaddexp(*components) - np.log(2 * (2 * BOUND) ** 2), -np.inf)


def problem() -> Problem:
    """The first data set with its exact answer."""
    mean, sd, log_evidence = exact(OBSERVATIONS[0])
    return Problem(
        name="gaussian_mixture",
        model=model,
        inputs={},
        data={"x": OBSERVATIONS[0]},
        source="Lueckmann et al. (2021), T.7; data our own; closed form",
        numbers={"mean": {"theta": constant(mean)}, "sd": {"theta": constant(sd)}, "log_evidence": log_evidence},
        truth={"theta": TRUTHS[0]},
    )


def _truncation(x):
    """Ends of the box in standard deviations around abs(x), and log masses between; each (component, coordinate)."""
    sd = np.array(SD)[:, None]
    low, high = (-BOUND - np.abs(x)) / sd, (BOUND - np.abs(x)) / sd
    log_low, log_high = log_ndtr(low), log_ndtr(high)
    return low, high, log_high + np.log1p(-np.exp(log_low - log_high))


def _weights(log_mass):
    """Posterior probability of the two components."""
    log_weights = log_mass.sum(axis=1)
    return np.exp(log_weights - logsumexp(log_weights))


# fmt: off
TRUTHS = constant([
    [-8.387513, 8.478977],
    [5.259374, 0.315559],
    [9.792723, 2.033565],
    [-1.954269, -1.854219],
    [-4.546448, 6.56275],
    [-6.070164, -0.734216],
    [-3.964212, 4.367177],
    [-3.974085, -2.500817],
    [9.188998, -4.782348],
    [-8.434028, 5.073848],
])
"""The parameters of `OBSERVATIONS`, shape (10, 2)."""
OBSERVATIONS = constant([
    [-9.223784, 9.918693],
    [3.494395, 0.664864],
    [9.79745, 2.17178],
    [-1.949983, -1.697002],
    [-4.25861, 6.543419],
    [-8.18234, -1.474987],
    [-3.833024, 4.542942],
    [-3.800348, -3.342819],
    [9.350715, -4.675453],
    [-7.802872, 3.861675],
])
# fmt: on
