"""The univariate nonlinear growth model: a filtering law with two modes, on which particle filters were first shown.

    x_0 ~ N(0, 5),    x_t = x_{t-1} / 2 + 25 x_{t-1} / (1 + x_{t-1}^2) + 8 cos(1.2 t) + N(0, 10),
    y_t = x_t^2 / 20 + N(0, 1),    t = 1, 2, ...

(second arguments are variances). The data do not see the sign of x, only the dynamics do.

Versions differ: Gordon, Salmond and Smith have these variances and 8 cos(1.2 (t - 1)); Kitagawa has 8 cos(1.2 t) and
x_0 ~ N(0, 5), with variances 1 of the state and 10 of the data; Andrieu, Doucet and Holenstein have 8 cos(1.2 t), where
N(0, 5) is the law of x_1, which they observe. Here x_0 comes before the first datum.

Sources: Kitagawa (1996), Monte Carlo filter and smoother for non-Gaussian nonlinear state space models, J. Comput.
Graph. Stat. 5, 1-25; Gordon, Salmond and Smith (1993), Novel approach to nonlinear/non-Gaussian Bayesian state
estimation, IEE Proceedings F 140, 107-113; Andrieu, Doucet and Holenstein (2010), Particle Markov chain Monte Carlo
methods, J. R. Statist. Soc. B 72, 269-342. Data are numpy's `default_rng(0)`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._grid import GridAnswer, grid_filter, normal_density, normal_log_density
from pushforward.problems._problem import constant

START_VARIANCE = 5.0
STATE_VARIANCE = 10.0
NOISE_VARIANCE = 1.0


def move(x, t, array: Any = np):
    """Mean of x_t given x_{t-1} = x; `array` is numpy or jax.numpy."""
    return x / 2 + 25 * x / (1 + x**2) + 8 * array.cos(1.2 * t)


def model(y=None, steps=None, state_variance=STATE_VARIANCE, noise_variance=NOISE_VARIANCE):
    """Known variances; y, shape (n,), NaN = missing, None to simulate `steps` data."""

    def step(carry, y):
        x, t = carry
        x = numpyro.sample("x", dist.Normal(move(x, t, jnp), state_variance**0.5))
        numpyro.sample("y", dist.Normal(x**2 / 20, noise_variance**0.5), obs=y)
        return (x, t + 1), None

    x0 = numpyro.sample("x0", dist.Normal(0.0, START_VARIANCE**0.5))
    scan(step, (x0, jnp.asarray(1)), y, length=steps)


def simulate(seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Trajectory and data of t = 1 .. steps, each of shape (steps,), from numpy's `default_rng(seed)`.

    One normal for x_0, then per step one for x and one for y.
    """
    rng = np.random.default_rng(seed)
    x, xs, ys = START_VARIANCE**0.5 * rng.normal(), [], []
    for t in range(1, steps + 1):
        x = move(x, t) + STATE_VARIANCE**0.5 * rng.normal()
        xs.append(x)
        ys.append(x**2 / 20 + NOISE_VARIANCE**0.5 * rng.normal())
    return np.array(xs), np.array(ys)


def grid(
    y, state_variance: float = STATE_VARIANCE, noise_variance: float = NOISE_VARIANCE, nodes: int = 1001
) -> GridAnswer:
    """Exact filtering, smoothing and evidence of `model` with the data y, shape (n,), NaN = missing.

    The grid spans -50 .. 50: a step's mean is at most 20.5 + |x| / 2 in size, so that nothing reaches the ends. 1001
    nodes are exact to 1e-8, 1 s for 50 data.

    Example:
        >>> round(grid(DATA).log_evidence, 5)
        -134.23817
    """
    y = np.asarray(y, np.float64)
    x = np.linspace(-50.0, 50.0, nodes)

    def transition(step):
        return normal_density(x[:, None], move(x, step + 1), state_variance**0.5)

    log_likelihood = normal_log_density(y[:, None], x**2 / 20, noise_variance**0.5)
    return grid_filter(x, normal_density(x, 0.0, START_VARIANCE**0.5), transition, log_likelihood)


TRUTH, DATA = map(constant, simulate(0, 50))
"""Trajectory and data, shape (50,)."""

LOG_EVIDENCE = -134.23817
"""log p(DATA) under `model`, by grids of 801 to 1401 nodes."""
