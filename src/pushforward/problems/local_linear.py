"""A linear Gaussian state-space model with one unknown parameter, and its exact posterior.

    u ~ N(-0.5, 0.5^2),    x_0 ~ N(0, 1),    x_t = 0.8 x_{t-1} + exp(u) e_t,    y_t = x_t + 0.25 v_t,    t = 0..39.

Given u the log likelihood is exact (dense Gaussian), so the posterior of u is a one-dimensional integral.

Source: constructed here; data are numpy's `default_rng(0)` with exp(u) = 0.6. Where an inexact "particle MCMC"
shows: re-estimating the likelihood of the current point at each move gives mean -0.335 and sd 0.176 here.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._gaussian import Joint, Noise
from pushforward.problems._problem import Problem, constant

DECAY = 0.8
NOISE = 0.25
TRUE_U = float(np.log(0.6))


def model(y=None, steps=None):
    """All data in one scan: a step observes the incoming state and moves it (40 data, the last x is a forecast)."""
    u = numpyro.sample("u", dist.Normal(-0.5, 0.5))
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y):
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y)
        return numpyro.sample("x", dist.Normal(DECAY * x, jnp.exp(u))), None

    scan(step, x0, y, length=steps)


def model_first_outside(y0=None, y=None, steps=None):
    """The same law of data, written centred: y0 observes x0 before the scan, the 39 others are in it."""
    u = numpyro.sample("u", dist.Normal(-0.5, 0.5))
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))
    numpyro.sample("y0", dist.Normal(x0, NOISE), obs=y0)

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(DECAY * x, jnp.exp(u)))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y)
        return x, None

    scan(step, x0, y, length=steps)


def simulate(steps: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truth x and data y at exp(u) = 0.6, each of shape (steps,), in the order of numpy's stream given below.

    x_0, then y_0, then per step one normal for x and one for y.
    """
    rng = np.random.default_rng(seed)
    x, xs, ys = rng.normal(), [], []
    for t in range(steps):
        if t > 0:
            x = DECAY * x + 0.6 * rng.normal()
        xs.append(x)
        ys.append(x + NOISE * rng.normal())
    return np.array(xs), np.array(ys)


def joint(u: float, y) -> Joint:
    """The exact law at a known u of `model`; `state` is the trajectory x_0..x_{T-1} in step with the data.

    The site "x" of `model` of step t is x_{t+1}.
    """
    noise = Noise()
    x = x0 = noise.normal(np.zeros(1), np.eye(1))
    xs, ys = [x], []
    for _ in range(len(y)):
        ys.append(x + noise.normal(np.zeros(1), [[NOISE]]))
        x = DECAY * x + noise.normal(np.zeros(1), [[np.exp(u)]])
        xs.append(x)
    return Joint({"x0": x0, "x": xs[1:]}, {"y": ys}, {"y": np.asarray(y)}, xs[:-1])


def log_likelihood(u: float, y) -> float:
    """log p(y given u), exact."""
    return joint(u, y).log_evidence()


TRUTH, DATA = map(constant, simulate())
"""Trajectory and data, shape (40,)."""

# The posterior by quadrature over u; tests/test_state_problems.py computes them again.
MEAN_U = -0.456386
SD_U = 0.131115
LOG_EVIDENCE = -43.596295

PROBLEM = Problem(
    name="local_linear",
    model=model,
    inputs={},
    data={"y": DATA},
    source="constructed; exact by quadrature over u",
    numbers={"mean": {"u": MEAN_U}, "sd": {"u": SD_U}, "log_evidence": LOG_EVIDENCE},
    truth={"u": TRUE_U},
)
