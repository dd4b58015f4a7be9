"""Lynx and hare: the Lotka-Volterra equations fitted to the pelts of the Hudson's Bay Company, 1900-1920.

    du/dt = (alpha - beta v) u,    dv/dt = (-gamma + delta u) v,    (u, v)(0) = z_init,
    y_t ~ LogNormal(log (u, v)(t), sigma),

u hares and v lynxes (thousands of pelts), t years since 1900. Priors: alpha, gamma ~ N(1, 0.5^2) and
beta, delta ~ N(0.05, 0.05^2), all truncated at 0; sigma ~ LogNormal(-1, 1); z_init ~ LogNormal(log 10, 1).

Sources: model and priors, Carpenter (2018), Predator-Prey Population Dynamics: the Lotka-Volterra model in Stan,
mc-stan.org/users/documentation/case-studies/lotka-volterra-predator-prey.html; data, the case study's
`hudson-bay-lynx-hare.csv` (repository stan-dev/example-models), from Howard (2009), Modeling Basics, after
Elton and Nicholson (1942), J. Animal Ecology 11; numbers, posteriordb's `hudson_lynx_hare-lotka_volterra`, which agree
with the case study's to its printed digits within Monte Carlo error.

The equations are solved by diffrax in log u and log v, so that populations stay positive, by Tsit5 with a
fixed number of steps in a `lax.scan`: it compiles in about a second and can be differentiated in forward and in
reverse mode, which diffrax's adaptive solves allow only one at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pushforward.problems._problem import Problem, constant

_STEPS_PER_INTERVAL = 20
"""Largest error of log u and log v in float64: 1.4e-10 at the posterior mean, 1.2e-5 at 99 % of prior draws (against
`solve_ivp`, rtol 1e-11). In float32 rounding leaves about 5e-6."""

_LOG_LARGEST_RATE = float(np.log(1000.0))


def model(t, y=None):
    """Pelts of hares and lynxes at times t (years), shape (n,), increasing; y, shape (n, 2), None to simulate."""
    alpha = numpyro.sample("alpha", dist.TruncatedNormal(1.0, 0.5, low=0.0))
    beta = numpyro.sample("beta", dist.TruncatedNormal(0.05, 0.05, low=0.0))
    gamma = numpyro.sample("gamma", dist.TruncatedNormal(1.0, 0.5, low=0.0))
    delta = numpyro.sample("delta", dist.TruncatedNormal(0.05, 0.05, low=0.0))
    species = numpyro.plate("species", 2, dim=-1)
    with species:
        sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
        z_init = numpyro.sample("z_init", dist.LogNormal(np.log(10.0), 1.0))
    log_z = log_populations(t, jnp.log(z_init), (alpha, beta, gamma, delta))
    with numpyro.plate("year", len(t), dim=-2), species:
        numpyro.sample("y", dist.LogNormal(log_z, sigma), obs=y)


def log_populations(t, log_z_init, parameters):
    """log of hares and lynxes, shape (n, 2), at times t (years), from log_z_init, shape (2,), at t[0].

    Rates per head (beta v and delta u, per year) count as 1000 where they are larger: nothing can overflow, so
    that value and gradient are finite at any 8 standard deviations of the prior. Where rates pass some 60 per year
    the fixed step is too long and the answer is rough; the worst of 200 draws of the prior is off by 3e-4, and under
    the posterior rates stay near 2.

    Args:
        t: times (years), shape (n,), increasing.
        log_z_init: log of thousands of pelts, hares and lynxes, shape (2,).
        parameters: alpha, gamma (per year), beta, delta (per year and thousand pelts), in the order of the
            alphabet: (alpha, beta, gamma, delta).

    Raises:
        ImportError: diffrax is not installed.
    """
    diffrax = _diffrax()
    t = jnp.asarray(t)
    term = diffrax.ODETerm(_field)
    solver = diffrax.Tsit5(scan_kind="bounded")  # the kind of inner loop that has both derivatives
    lengths = jnp.repeat(jnp.diff(t) / _STEPS_PER_INTERVAL, _STEPS_PER_INTERVAL)

    def step(carry, length):
        z, state = carry
        # the field does not depend on time, so that each step may start at 0
        z, _, _, state, _ = solver.step(term, 0.0 * length, length, z, parameters, state, made_jump=True)
        return (z, state), z

    state = solver.init(term, 0.0 * t[0], lengths[0], log_z_init, parameters)
    _, path = jax.lax.scan(step, (log_z_init, state), lengths)
    return jnp.concatenate([log_z_init[None], path[_STEPS_PER_INTERVAL - 1 :: _STEPS_PER_INTERVAL]])


def _field(t, log_z, parameters):
    """Time derivative of (log u, log v)."""
    alpha, beta, gamma, delta = parameters
    hunted = jnp.exp(jnp.minimum(jnp.log(beta) + log_z[1], _LOG_LARGEST_RATE))
    fed = jnp.exp(jnp.minimum(jnp.log(delta) + log_z[0], _LOG_LARGEST_RATE))
    return jnp.stack([alpha - hunted, fed - gamma])


def _diffrax():
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            'the lynx-hare problem solves its equations with diffrax: pip install "pushforward[examples]"'
        ) from error
    return diffrax


YEARS = tuple(range(1900, 1921))
TIMES = constant(np.arange(21))
"""Years since 1900."""
# fmt: off
HARE = constant([
    30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1,
    40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7,
])
LYNX = constant([
    4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4,
    8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6,
])
# fmt: on
DATA = constant(np.stack([HARE, LYNX], axis=-1))
"""Thousands of pelts, shape (21, 2): hares, lynxes."""

# Published by posteriordb (reference draws of Stan): posterior means and their Monte Carlo standard errors.
MEAN = {
    "alpha": 0.546864,
    "beta": 0.0277473,
    "gamma": 0.800095,
    "delta": 0.0240859,
    "z_init": constant([34.0352, 5.93590]),
    "sigma": constant([0.248057, 0.251017]),
}
MEAN_STANDARD_ERROR = {
    "alpha": 0.000626,
    "beta": 0.0000412,
    "gamma": 0.000885,
    "delta": 0.0000350,
    "z_init": constant([0.0293, 0.00534]),
    "sigma": constant([0.000439, 0.000440]),
}
# Published by the case study (4000 draws, good to about 2 %).
SD = {
    "alpha": 0.064,
    "beta": 0.004,
    "gamma": 0.092,
    "delta": 0.004,
    "z_init": constant([2.856, 0.535]),
    "sigma": constant([0.045, 0.044]),
}

PROBLEM = Problem(
    name="lynx_hare",
    model=model,
    inputs={"t": TIMES},
    data={"y": DATA},
    source="Carpenter (2018), Stan case study; numbers of posteriordb and of the case study",
    numbers={"mean": MEAN, "sd": SD},
)
