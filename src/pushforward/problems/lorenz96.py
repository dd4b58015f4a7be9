"""Lorenz (1996): the standard test of ensemble filters, 40 variables on a ring.

    dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F,    F = 8,

by one Runge-Kutta step of order 4 per cycle of 0.05 (six hours). Every variable is observed with variance 1 at the
end of each cycle; nothing is observed at t = 0; x_0 ~ N(e_1, 0.001 I); truth without noise.

Sources: Lorenz (1996), Predictability: a problem partly solved, ECMWF; setting, Sakov and Oke (2008), A deterministic
formulation of the ensemble Kalman filter, Tellus A 60, doi:10.1111/j.1600-0870.2007.00299.x; scores, DAPPER 1.8
(Raanes 2024, JOSS 9(94), 5150) with its `mods/Lorenz96/sakov2008.py`.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._anchor import Anchor

SIZE = 40
FORCING = 8.0
INTERVAL = 0.05
NOISE = 1.0
START_SD = 0.001**0.5
BURN_IN = 400
"""Cycles (t = 20) left out of scores."""


def derivative(x, forcing=FORCING):
    """dx/dt on a ring, the last axis."""
    ring = jnp.concatenate([x[..., -2:], x, x[..., :1]], axis=-1)
    return (ring[..., 3:] - ring[..., :-3]) * ring[..., 1:-2] - x + forcing


def step(x, forcing=FORCING, interval=INTERVAL):
    """The state one cycle later: one Runge-Kutta step of order 4; x, shape (..., n), any n >= 4."""
    k1 = derivative(x, forcing)
    k2 = derivative(x + 0.5 * interval * k1, forcing)
    k3 = derivative(x + 0.5 * interval * k2, forcing)
    k4 = derivative(x + interval * k3, forcing)
    return x + interval / 6 * (k1 + 2 * (k2 + k3) + k4)


def start(size=SIZE):
    """The law of x_0: N(e_1, 0.001 I)."""
    return dist.Normal(jnp.zeros(size).at[0].set(1.0), START_SD).to_event(1)


def model(y=None, steps=None, size=SIZE, noise=NOISE):
    """Deterministic dynamics: the only latent site is x0, x is a deterministic site; y, shape (cycles, size)."""

    def cycle(x, y):
        x = numpyro.deterministic("x", step(x))
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)
        return x, None

    scan(cycle, numpyro.sample("x0", start(size)), y, length=steps)


def model_noise(y=None, steps=None, size=SIZE, noise=NOISE, model_noise=0.3):
    """The same with noise of standard deviation `model_noise` in every cycle; x is a latent site."""
    _noisy(y, steps, size, noise, model_noise, FORCING)


def model_forcing(y=None, steps=None, size=SIZE, noise=NOISE, model_noise=0.3):
    """`model_noise` with an unknown forcing F ~ N(8, 0.5^2)."""
    forcing = numpyro.sample("F", dist.Normal(FORCING, 0.5))
    _noisy(y, steps, size, noise, model_noise, forcing)


def _noisy(y, steps, size, noise, model_noise, forcing):
    def cycle(x, y):
        x = numpyro.sample("x", dist.Normal(step(x, forcing), model_noise).to_event(1))
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)
        return x, None

    scan(cycle, numpyro.sample("x0", start(size)), y, length=steps)


def simulate(key, cycles, *, size=SIZE, noise=NOISE, model_noise=0.0, forcing=FORCING):
    """Truth and data of `cycles` cycles, each of shape (cycles, size).

    Args:
        key: a JAX key.
        cycles: number of cycles; 1000 are 50 time units.
        size: number of variables.
        noise: standard deviation of the data.
        model_noise: standard deviation of the noise of a cycle; published scores are for 0.
        forcing: F.
    """
    key_start, key_model, key_data = jax.random.split(key, 3)

    def cycle(x, e):
        x = step(x, forcing) + model_noise * e
        return x, x

    disturbances = jax.random.normal(key_model, (cycles, size))
    _, truth = jax.lax.scan(cycle, start(size).sample(key_start), disturbances)
    return truth, truth + noise * jax.random.normal(key_data, truth.shape)


NUMBERS = {
    "3dvar": Anchor("3DVar", {"scale": 0.02}, 0.416, 0.443, 0.445, 0.010),
    "perturbed": Anchor("EnKF, perturbed observations", {"members": 40, "inflation": 1.06}, 0.219, 0.242, 0.219, 0.005),
    "denkf": Anchor("DEnKF", {"members": 40, "inflation": 1.01}, 0.179, 0.199, 0.180, 0.006),
    "etkf_24": Anchor("ETKF", {"members": 24, "inflation": 1.02, "rotate": True}, 0.180, 0.201, 0.179, 0.005),
    "etkf_20": Anchor("ETKF", {"members": 20, "inflation": 1.04, "rotate": True}, 0.195, 0.238, 0.195, 0.004),
    "letkf": Anchor(
        "LETKF", {"members": 7, "inflation": 1.04, "rotate": True, "radius": 4.0}, 0.22, 0.245, 0.220, 0.011
    ),
    "finite_size": Anchor("EnKF-N", {"members": 24, "rotate": True}, 0.216, 0.264),
    "ienks": Anchor("iterative EnKS", {"members": 40, "inflation": 1.01, "rotate": True, "lag": 1}, 0.192, 0.184),
    "extended": Anchor("extended Kalman filter", {"inflation_per_unit_time": 10.0}, 0.248, 0.264),
}
"""Analysis scores (see `Anchor`). DAPPER lists 0.17 for the iterative EnKS; 0.192 is what running it gives.

LETKF: Gaspari-Cohn taper of half-support 1.82 radius. Perturbations are centred and rescaled by sqrt(N / (N - 1)).
Do not anchor on ETKF with 24 members and inflation 1.013: it diverges in 2 of 6 seeds.
"""
