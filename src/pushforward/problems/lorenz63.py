"""Lorenz (1963): three variables, chaotic, seldom observed.

    dx/dt = sigma (y - x),    dy/dt = x (rho - z) - y,    dz/dt = x y - beta z,    (sigma, rho, beta) = (10, 28, 8/3),

by Runge-Kutta steps of order 4 and length 0.01. Every variable is observed with variance 2 at the end of each cycle
of 0.25 (25 steps); nothing is observed at t = 0; x_0 ~ N((1.509, -1.531, 25.46), 2 I); truth without noise.

Sources: Lorenz (1963), Deterministic nonperiodic flow, J. Atmos. Sci. 20; setting, Sakov, Oliver and Bertino (2012), An
iterative EnKF for strongly nonlinear systems, Mon. Wea. Rev. 140, doi:10.1175/MWR-D-11-00176.1; scores, DAPPER 1.8
(Raanes 2024, JOSS 9(94), 5150) with its `mods/Lorenz63/sakov2012.py`.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._anchor import Anchor

SIGMA, RHO, BETA = 10.0, 28.0, 8.0 / 3.0
SUBSTEP = 0.01
SUBSTEPS = 25
INTERVAL = SUBSTEP * SUBSTEPS
NOISE = 2.0**0.5
START_MEAN = (1.509, -1.531, 25.46)
START_SD = 2.0**0.5
BURN_IN = 64
"""Cycles (t = 16) left out of scores."""


def derivative(x, rho=RHO):
    """d(x, y, z)/dt; x, shape (..., 3)."""
    a, b, c = x[..., 0], x[..., 1], x[..., 2]
    return jnp.stack([SIGMA * (b - a), a * (rho - c) - b, a * b - BETA * c], axis=-1)


def substep(x, rho=RHO, interval=SUBSTEP):
    """One Runge-Kutta step of order 4."""
    k1 = derivative(x, rho)
    k2 = derivative(x + 0.5 * interval * k1, rho)
    k3 = derivative(x + 0.5 * interval * k2, rho)
    k4 = derivative(x + interval * k3, rho)
    return x + interval / 6 * (k1 + 2 * (k2 + k3) + k4)


def step(x, rho=RHO, substeps=SUBSTEPS):
    """The state one cycle later; x, shape (..., 3). `substeps` is a Python int, so reverse mode works."""
    return jax.lax.fori_loop(0, substeps, lambda _, x: substep(x, rho), jnp.asarray(x))


def start():
    """The law of x_0: N((1.509, -1.531, 25.46), 2 I)."""
    return dist.Normal(jnp.array(START_MEAN), START_SD).to_event(1)


def model(y=None, steps=None, substeps=SUBSTEPS, noise=NOISE):
    """Deterministic dynamics: the only latent site is x0, x is a deterministic site; y, shape (cycles, 3)."""

    def cycle(x, y):
        x = numpyro.deterministic("x", step(x, substeps=substeps))
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)
        return x, None

    scan(cycle, numpyro.sample("x0", start()), y, length=steps)


def model_noise(y=None, steps=None, substeps=SUBSTEPS, noise=NOISE, model_noise=0.5):
    """The same with noise of standard deviation `model_noise` in every cycle; x is a latent site."""
    _noisy(y, steps, substeps, noise, model_noise, RHO)


def model_rho(y=None, steps=None, substeps=5, noise=NOISE, model_noise=0.2):
    """An unknown parameter, rho ~ N(28, 2^2), model noise, and short cycles of 0.05 for a small problem."""
    rho = numpyro.sample("rho", dist.Normal(RHO, 2.0))
    _noisy(y, steps, substeps, noise, model_noise, rho)


def _noisy(y, steps, substeps, noise, model_noise, rho):
    def cycle(x, y):
        x = numpyro.sample("x", dist.Normal(step(x, rho, substeps), model_noise).to_event(1))
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)
        return x, None

    scan(cycle, numpyro.sample("x0", start()), y, length=steps)


def simulate(key, cycles, *, substeps=SUBSTEPS, noise=NOISE, model_noise=0.0, rho=RHO):
    """Truth and data of `cycles` cycles, each of shape (cycles, 3).

    Args:
        key: a JAX key.
        cycles: number of cycles; 1000 are 250 time units.
        substeps: Runge-Kutta steps in a cycle.
        noise: standard deviation of the data.
        model_noise: standard deviation of the noise of a cycle; published scores are for 0.
        rho: the parameter rho.
    """
    key_start, key_model, key_data = jax.random.split(key, 3)

    def cycle(x, e):
        x = step(x, rho, substeps) + model_noise * e
        return x, x

    _, truth = jax.lax.scan(cycle, start().sample(key_start), jax.random.normal(key_model, (cycles, 3)))
    return truth, truth + noise * jax.random.normal(key_data, truth.shape)


NUMBERS = {
    "3dvar": Anchor("3DVar", {"scale": 0.1}, 1.02, None, 1.039, 0.015),
    "etkf": Anchor("ETKF", {"members": 10, "inflation": 1.02, "rotate": True}, 0.57, None, 0.580, 0.041),
    "perturbed": Anchor("EnKF, perturbed observations", {"members": 100, "inflation": 1.01}, 0.557, None, 0.556, 0.022),
    "ienks": Anchor("iterative EnKS", {"members": 10, "inflation": 1.02, "rotate": True}, 0.317),
    "particle_100": Anchor(
        "particle filter", {"particles": 100, "jitter": 2.4, "resample_below": 0.3}, 0.38, None, 0.377, 0.021
    ),
    "particle_4000": Anchor("particle filter", {"particles": 4000, "jitter": 0.7, "resample_below": 0.05}, 0.268),
}
"""Analysis scores (see `Anchor`); `resample_below` is a fraction of the particles.

Do not anchor on a particle filter with 800 to 1000 particles and jitter 0.9: it loses the truth now and then.
"""
