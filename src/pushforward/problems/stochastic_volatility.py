"""Stochastic volatility: the log variance of returns is an autoregression.

    x_0 ~ N(mu, sigma^2 / (1 - rho^2)),    x_t = mu + rho (x_{t-1} - mu) + sigma e_t,    y_t = exp(x_t / 2) v_t,

e and v ~ N(0, 1). Data say nothing of the sign of anything linear in x: an extended Kalman filter is of no use here,
a particle filter is what the model asks for. The state is one number, so that a grid filter is exact.

A step of `scan` moves and observes. The law of x_0 is stationary, so that x_1 has it too: data from the first step on
have the law of data that observe x_0 itself, and `simulate` and `LOG_EVIDENCE` may be written in that way.

Sources: Taylor (1986), Modelling Financial Time Series, Wiley; Kim, Shephard and Chib (1998), Stochastic volatility:
likelihood inference and comparison with ARCH models, Review of Economic Studies 65, 361-393. Simulated data are numpy's
`default_rng(1)`; returns are those that matplotlib ships.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import expit
from numpyro.contrib.control_flow import scan

from pushforward.problems._grid import GridAnswer, grid_filter, normal_density, normal_log_density
from pushforward.problems._problem import constant

MU, RHO, SIGMA = -1.0, 0.95, 0.3
"""The values that made `DATA`."""


def model(y=None, steps=None, mu=MU, rho=RHO, sigma=SIGMA):
    """Known parameters; y, shape (n,), NaN = missing, None to simulate `steps` returns."""
    x0 = numpyro.sample("x0", dist.Normal(mu, sigma / (1 - rho**2) ** 0.5))

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(mu + rho * (x - mu), sigma))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y)
        return x, None

    scan(step, x0, y, length=steps)


def model_parameters(y=None, steps=None):
    """Unknown parameters, and the noise e as the site in the scan: the form in which NUTS samples everything.

    mu ~ N(0, 1), logit rho ~ N(2.5, 0.7^2) and spread ~ HalfNormal(1), the stationary deviation of x; then sigma =
    spread sqrt(1 - rho^2). 95 % of rho are in 0.75 .. 0.98. With sigma and rho ~ Beta(20, 2) instead, some draws
    diverge: as rho tends to 1 a given sigma lets x wander off, and mu with it, whereas a given spread does not.
    """
    mu, rho, sigma = _parameters()
    e0 = numpyro.sample("e0", dist.Normal(0.0, 1.0))

    def step(x, y):
        e = numpyro.sample("e", dist.Normal(0.0, 1.0))
        x = numpyro.deterministic("x", mu + rho * (x - mu) + sigma * e)
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y)
        return x, None

    scan(step, mu + sigma / jnp.sqrt(1 - rho**2) * e0, y, length=steps)


def model_parameters_centred(y=None, steps=None):
    """The same law with the trajectory x as the site: for methods that need a density of x given the x before."""
    model(y, steps, *_parameters())


def _parameters():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    rho = numpyro.deterministic("rho", expit(numpyro.sample("logit_rho", dist.Normal(2.5, 0.7))))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    sigma = numpyro.deterministic("sigma", spread * jnp.sqrt(1 - rho**2))
    return mu, rho, sigma


def simulate(
    steps: int = 1000, seed: int = 1, mu: float = MU, rho: float = RHO, sigma: float = SIGMA
) -> tuple[np.ndarray, np.ndarray]:
    """Trajectory x and returns y, each of shape (steps,), the first of them at t = 0, from numpy's `default_rng(seed)`.

    One normal for x_0 and one for y_0, then per step one for x and one for y.
    """
    rng = np.random.default_rng(seed)
    x, xs, ys = mu + sigma / np.sqrt(1 - rho**2) * rng.normal(), [], []
    for t in range(steps):
        if t > 0:
            x = mu + rho * (x - mu) + sigma * rng.normal()
        xs.append(x)
        ys.append(np.exp(x / 2) * rng.normal())
    return np.array(xs), np.array(ys)


def grid(y, mu: float = MU, rho: float = RHO, sigma: float = SIGMA, nodes: int = 200) -> GridAnswer:
    """Exact filtering, smoothing and evidence of `model` with the returns y, shape (n,), NaN = missing.

    The grid spans 8 stationary deviations on either side of mu: 200 nodes are exact to 1e-9 up to rho = 0.99.

    Raises:
        ValueError: the spacing passes 0.8 sigma, where sums over nodes are no longer good integrals.
    """
    y = np.asarray(y, np.float64)
    width = 8 * sigma / np.sqrt(1 - rho**2)
    if 2 * width > 0.8 * sigma * (nodes - 1):
        needed = int(np.ceil(2 * width / (0.8 * sigma))) + 1
        raise ValueError(f"{nodes} nodes are too few at rho = {rho}: the grid needs at least {needed}")
    x = mu + np.linspace(-width, width, nodes)
    moves = normal_density(x[:, None], mu + rho * (x - mu), sigma)
    log_likelihood = normal_log_density(y[:, None], 0.0, np.exp(x / 2))
    return grid_filter(x, normal_density(x, mu, width / 8), lambda t: moves, log_likelihood)


def grid_log_evidence(y, mu: float = MU, rho: float = RHO, sigma: float = SIGMA, nodes: int = 200) -> float:
    """log p(y) under `model`; see `grid`.

    Example:
        >>> round(grid_log_evidence(DATA), 4)
        -937.0827
    """
    return grid(y, mu, rho, sigma, nodes).log_evidence


def returns() -> tuple[np.ndarray, np.ndarray]:
    """Daily log returns of Google's share, 2004-08-20 to 2008-10-14: dates and returns, each of shape (1046,).

    Percent, differences of the log of the adjusted close (`adj_close`), less their mean; from the file `goog.npz`
    of matplotlib's sample data, whose prices were taken from Yahoo Finance. The first date is the second day of trade.

    Raises:
        FileNotFoundError: the matplotlib installed here comes without that file.
    """
    from matplotlib import cbook  # the only user; models need no plots

    try:
        archive: Any = cbook.get_sample_data("goog.npz")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "the installed matplotlib ships no sample data goog.npz, from which the returns are read: install "
            "matplotlib from its own wheel, or use stochastic_volatility.DATA"
        ) from error
    prices = archive["price_data"]
    change = 100 * np.diff(np.log(prices["adj_close"]))
    return prices["date"][1:], change - change.mean()


TRUTH, DATA = map(constant, simulate())
"""Trajectory and returns, shape (1000,)."""
SHORT = 200
"""How many of `DATA` the posterior of the parameters below has seen."""

LOG_EVIDENCE = -937.0827
"""log p(DATA) under `model`, by grids of 64 to 800 nodes, which agree to 1e-10."""

# Exact, by the trapezoid rule over mu, logit rho and log spread; the tests compute them again.
PARAMETERS_LOG_EVIDENCE = -103.464
PARAMETERS_MEAN = {"mu": -1.617, "rho": 0.9360, "sigma": 0.3248, "spread": 0.978}
PARAMETERS_SD = {"mu": 0.449, "rho": 0.0344, "sigma": 0.0953, "spread": 0.254}
"""Log evidence and posterior moments of `model_parameters` given the first `SHORT` of DATA."""
