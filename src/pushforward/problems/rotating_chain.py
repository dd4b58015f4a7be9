"""Rotating chain: a linear Gaussian trajectory of 65 states, whose smoothing law is one dense Gaussian.

    x_0 ~ N(0, I),    x_i = rho Rot(2 pi / 30) x_{i-1} + N(0, (1 - rho^2) I),    x_i in R^2,
    y_i = first coordinate of x_i + N(0, noise^2),    i = 0, 1, ..., 64,

so that every x_i is N(0, I) and cov(x_i, x_j) = rho^(i - j) Rot(2 pi (i - j) / 30) for i >= j. The chain turns once in
30 steps; rho = 0.995 is "smooth" (correlations last 200 steps), rho = 0.9 is "rough" (10 steps). Observed are every 8th
state with noise 0.05 ("lo") or all states with noise 0.25 ("hi"); the first state is observed in both.

With the exact score every sampler of diffusion models is an affine map, so that its law, too, is known without Monte
Carlo. `NUMBERS` holds what that costs the guidance of the literature.

Sources: the chain is our own; scenarios, Rozet and Louppe (2023), Score-based data assimilation, NeurIPS 36,
arXiv:2306.10574, section 4.1, whose guidance is the one of `NUMBERS` (figures are our own); conditioning: Rasmussen and
Williams (2006), Gaussian Processes for Machine Learning, eq. (A.6).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from scipy.linalg import cho_factor, cho_solve

from pushforward.problems._scenario import Scenario
from pushforward.problems._scenario import scenario as _scenario

ANGLE = 2 * np.pi / 30
SMOOTH, ROUGH = 0.995, 0.9
STEPS = 64
"""Transitions: a trajectory has 65 states."""
SCENARIOS = {"lo": Scenario(0.05, 8), "hi": Scenario(0.25, 1)}


def scenario(name: str) -> Scenario:
    """Noise and mask of "lo" or "hi".

    Example:
        >>> lo = scenario("lo")
        >>> lo.noise, int(lo.mask(65).sum())
        (0.05, 9)

    Raises:
        ValueError: there is no such scenario.
    """
    return _scenario(SCENARIOS, name)


def rotation(rho=SMOOTH):
    """The matrix rho Rot(2 pi / 30), shape (2, 2)."""
    c, s = rho * np.cos(ANGLE), rho * np.sin(ANGLE)
    return np.array([[c, -s], [s, c]])


def model(y=None, steps=STEPS, rho=SMOOTH, noise=SCENARIOS["lo"].noise):
    """The chain; sites "x0", "x" (all later states), "y0" (observes x0) and "y" (the rest).

    Args:
        y: data of all states, shape (steps + 1,), NaN = missing; None to simulate.
        steps: transitions, where y is not given.
        rho: decay of a step, between 0 and 1.
        noise: standard deviation of the data.
    """
    move, spread = jnp.asarray(rotation(rho)), (1 - rho**2) ** 0.5
    first, rest = (None, None) if y is None else (y[0], y[1:])
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y0", dist.Normal(x0[0], noise), obs=first)

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(move @ x, spread).to_event(1))
        numpyro.sample("y", dist.Normal(x[0], noise), obs=y)
        return x, None

    scan(step, x0, rest, length=steps if y is None else len(y) - 1)


def trajectories(key, n, steps=STEPS, rho=SMOOTH):
    """Independent draws of the chain, shape (n, steps + 1, 2)."""
    move, spread = jnp.asarray(rotation(rho)), (1 - rho**2) ** 0.5

    def step(x, e):
        x = x @ move.T + spread * e
        return x, x

    noise = jax.random.normal(key, (steps + 1, n, 2))
    _, later = jax.lax.scan(step, noise[0], noise[1:])
    return jnp.concatenate([noise[:1], later]).swapaxes(0, 1)


def simulate(key, name="lo", steps=STEPS, rho=SMOOTH):
    """A trajectory, shape (steps + 1, 2), and its data, shape (steps + 1,), NaN where nothing is observed.

    Raises:
        ValueError: there is no such scenario.
    """
    known = scenario(name)
    key_states, key_data = jax.random.split(key)
    x = trajectories(key_states, 1, steps, rho)[0]
    return x, known.observe(key_data, x[:, 0])


def covariance(states=STEPS + 1, rho=SMOOTH):
    """Of the chain before data, states one below the other, shape (2 states, 2 states)."""
    lag = np.subtract.outer(np.arange(states), np.arange(states))
    c, s = np.cos(ANGLE * lag), np.sin(ANGLE * lag)
    blocks = rho ** np.abs(lag)[..., None, None] * np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    return blocks.transpose(0, 2, 1, 3).reshape(2 * states, 2 * states)


class Exact(NamedTuple):
    """The law of all states given data.

    Attributes:
        mean: shape (states, 2).
        covariance: states one below the other, shape (2 states, 2 states).
        log_evidence: log p(data that are present).
    """

    mean: np.ndarray
    covariance: np.ndarray
    log_evidence: float

    @property
    def sd(self) -> np.ndarray:
        """Of the coordinates of all states, shape (states, 2)."""
        return np.sqrt(np.diag(self.covariance)).reshape(self.mean.shape)


def exact(y, rho: float = SMOOTH, noise: float = SCENARIOS["lo"].noise) -> Exact:
    """The law of `model` given y, by conditioning one dense Gaussian, in float64.

        m = C A^T (A C A^T + noise^2 I)^-1 y,    P = C - C A^T (A C A^T + noise^2 I)^-1 A C.

    Args:
        y: data of all states, shape (states,), NaN = missing.
        rho: as in `model`.
        noise: as in `model`.

    Example:
        >>> answer = exact(np.full(65, np.nan))
        >>> answer.mean.shape, answer.covariance.shape, answer.log_evidence
        ((65, 2), (130, 130), -0.0)
    """
    y = np.asarray(y, np.float64)
    prior = covariance(len(y), rho)
    seen = 2 * np.flatnonzero(~np.isnan(y))
    data = y[seen // 2]
    factor = cho_factor(prior[np.ix_(seen, seen)] + noise**2 * np.eye(len(seen)), lower=True)
    gain = cho_solve(factor, prior[seen]).T
    determinant = 2 * np.sum(np.log(np.diag(factor[0])))
    log_evidence = -0.5 * (data @ cho_solve(factor, data) + determinant + len(data) * np.log(2 * np.pi))
    return Exact((gain @ data).reshape(-1, 2), prior - gain @ prior[seen], float(log_evidence))


class Guidance(NamedTuple):
    """Law of 256 steps of DDIM with the exact score against the exact law, over 130 coordinates.

    Attributes:
        mean_error: root mean square of errors of means in standard deviations.
        sd_ratio: mean ratio of standard deviations.
        divergence: Kullback-Leibler divergence over 130.
        wasserstein: W2 over the root of the trace of the exact covariance.
    """

    mean_error: float
    sd_ratio: float
    divergence: float
    wasserstein: float


NUMBERS = {
    ("smooth", "lo", "exact"): Guidance(0.001, 0.982, 0.002, 0.019),
    ("smooth", "hi", "exact"): Guidance(0.001, 0.982, 0.002, 0.021),
    ("rough", "lo", "exact"): Guidance(0.002, 0.990, 0.0004, 0.007),
    ("rough", "hi", "exact"): Guidance(0.001, 0.989, 0.0002, 0.008),
    ("smooth", "lo", "gamma"): Guidance(0.138, 0.785, 0.191, 0.309),
    ("smooth", "hi", "gamma"): Guidance(0.352, 0.741, 0.328, 0.561),
    ("rough", "lo", "gamma"): Guidance(0.119, 0.850, 0.887, 0.183),
    ("rough", "hi", "gamma"): Guidance(0.376, 0.752, 0.993, 0.387),
}
"""Of likelihood scores that are exact, and of the published approximation with gamma = 0.03, without corrections.

Those of "gamma" depend on the data that are drawn: means over six draws of smooth lo are 0.12 for the mean error and
0.21 for the divergence.
"""
