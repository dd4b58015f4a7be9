"""Influenza in a boarding school, 1978: boys in bed on 14 days, and an epidemic whose transmission rate wanders.

    dS/dt = -b_t S I / N,    dI/dt = b_t S I / N - gamma I,    N = 763,    (S, I)(day 0) = (N - i0, i0),
    log b_t = log beta + noise_sd (e_1 + ... + e_t) on day t,    e_t ~ N(0, 1),
    y_t ~ NegativeBinomial(mean I(day t), variance I + I^2 / concentration),    t = 1 .. 14.

Priors, wide around what is known of influenza: beta ~ LogNormal(log 2, 0.5) and gamma ~ LogNormal(log 0.5, 0.5) per day
(a stay of 2 days within a factor of 2.7; R0 = beta / gamma is 4 within a factor of 4, as schools are crowded), i0 ~
LogNormal(0, 0.5) boys a day before the first count, concentration ~ LogNormal(log 20, 0.7) (counts are good to some 11
to 45 %), noise_sd ~ LogNormal(log 0.05, 0.5) (0.2 in log beta over the two weeks, within a factor of 2.7). At an
acceptance of 0.9 at most 0.05 % of NUTS's draws diverge; with the wider HalfNormal(0.1) 0.2 % do.

The noise e is the site in the scan: NUTS on everything then sees no funnel, and a particle filter moves by it. The
flow is solved in (log S, log I) by Runge-Kutta steps of order 4, so that both stay positive; no exact answer is known.
Counts fall faster at the end than the model's: the last day alone lies outside 90 % of the posterior's predictions.

Sources: Anonymous (1978), Influenza in a boarding school, British Medical Journal, 4 March, 587 (data, also in the R
package `outbreaks`); Grinsztajn, Semenova, Margossian and Riou (2021), Bayesian workflow for disease transmission
modeling in Stan, Statistics in Medicine 40, 6209-6234 (the model without noise in the rate, with other priors).
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._problem import constant

BOYS = 763
SUBSTEPS = 4
"""Runge-Kutta steps in a day; the tests bound the error."""


def model(y=None, steps=None):
    """The transmission rate walks from day to day; y, shape (n,), None to simulate `steps` days."""
    beta, gamma, concentration, log_start = _parameters()
    noise_sd = numpyro.sample("noise_sd", dist.LogNormal(np.log(0.05), 0.5))

    def step(carry, y):
        log_state, walk = carry
        walk = walk + noise_sd * numpyro.sample("e", dist.Normal(0.0, 1.0))
        # beta enters here, not in the first carry: a site that only the first carry knows counts as initial state
        log_beta = numpyro.deterministic("log_beta", jnp.log(beta) + walk)
        log_state = day(log_state, jnp.exp(log_beta), gamma)
        _count(log_state, concentration, y)
        return (log_state, walk), None

    scan(step, (log_start, jnp.zeros_like(beta)), y, length=steps)


def model_fixed_rate(y=None, steps=None):
    """The same without noise: the only latent sites are the four parameters."""
    beta, gamma, concentration, log_start = _parameters()

    def step(log_state, y):
        log_state = day(log_state, beta, gamma)
        _count(log_state, concentration, y)
        return log_state, None

    scan(step, log_start, y, length=steps)


def _parameters():
    beta = numpyro.sample("beta", dist.LogNormal(np.log(2.0), 0.5))
    gamma = numpyro.sample("gamma", dist.LogNormal(np.log(0.5), 0.5))
    concentration = numpyro.sample("concentration", dist.LogNormal(np.log(20.0), 0.7))
    i0 = numpyro.sample("i0", dist.LogNormal(0.0, 0.5))
    numpyro.deterministic("r0", beta / gamma)
    return beta, gamma, concentration, jnp.log(jnp.stack([BOYS - i0, i0]))


def _count(log_state, concentration, y):
    numpyro.deterministic("in_bed", jnp.exp(log_state[1]))
    numpyro.sample("y", dist.NegativeBinomial2(jnp.exp(log_state[1]), concentration), obs=y)


def derivative(log_state, beta, gamma):
    """d(log S, log I)/dt per day; log_state, shape (..., 2)."""
    log_s, log_i = log_state[..., 0], log_state[..., 1]
    return jnp.stack([-beta * jnp.exp(log_i) / BOYS, beta * jnp.exp(log_s) / BOYS - gamma], axis=-1)


def day(log_state, beta, gamma, substeps=SUBSTEPS):
    """(log S, log I) a day later; log_state, shape (..., 2), beta and gamma per day."""
    interval = 1.0 / substeps

    def substep(_, x):
        k1 = derivative(x, beta, gamma)
        k2 = derivative(x + 0.5 * interval * k1, beta, gamma)
        k3 = derivative(x + 0.5 * interval * k2, beta, gamma)
        k4 = derivative(x + interval * k3, beta, gamma)
        return x + interval / 6 * (k1 + 2 * (k2 + k3) + k4)

    return jax.lax.fori_loop(0, substeps, substep, log_state)


DATES = tuple(f"1978-01-{day}" for day in range(22, 32)) + tuple(f"1978-02-0{day}" for day in range(1, 5))
DATA = constant([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])
"""Boys in bed, shape (14,)."""
