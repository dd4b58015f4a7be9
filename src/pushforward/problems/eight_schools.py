"""Eight schools: the hierarchical model whose centred form is a funnel.

    mu ~ N(0, 5^2),    tau ~ HalfCauchy(5),    theta_j ~ N(mu, tau^2),    y_j ~ N(theta_j, sigma_j^2).

y_j is the estimated effect of coaching on a school's test scores (points), sigma_j its standard error, taken as
known. `model` is the centred form that users write; `non_centred` is the same model with the noise of theta as site.

Sources: data, Rubin (1981), Estimation in parallel randomized experiments, J. Educational Statistics 6,
table 1, doi:10.3102/10769986006004377; priors, posteriordb's `eight_schools-eight_schools_noncentered`, which
are those of Stan's and NumPyro's introductions. Numbers: given tau all is Gaussian, so one quadrature is exact
(`tests/exact.py`).
"""

import numpyro
import numpyro.distributions as dist

from pushforward.problems._problem import Problem, constant


def model(sigma, y=None):
    """Centred; sigma (standard errors) and y (effects) of shape (8,), y None to simulate."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def non_centred(sigma, y=None):
    """The same posterior of mu, tau and theta, with `noise` as latent site and theta = mu + tau noise."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(sigma)):
        noise = numpyro.sample("noise", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * noise)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


SIGMA = constant([15, 10, 16, 11, 9, 11, 10, 18])
DATA = constant([28, 8, -3, 7, -1, 1, 18, 12])

# The exact posterior.
# fmt: off
LOG_EVIDENCE = -31.3113473523
MEAN = {
    "mu": 4.3968207138,
    "tau": 3.5977054841,
    "theta": constant([
        6.2118842041, 4.9401784195, 3.9270044025, 4.7570982913,
        3.6154770154, 4.0426126358, 6.2967241276, 4.8542533199,
    ]),
}
SD = {
    "mu": 3.3177044631,
    "tau": 3.2199584147,
    "theta": constant([
        5.5931261953, 4.6742684622, 5.2626151055, 4.7802973368,
        4.6574525858, 4.8268655916, 5.0778487563, 5.2908010646,
    ]),
}
# fmt: on

# Published by posteriordb (reference draws of Stan): means and their Monte Carlo standard errors.
PUBLISHED_MEAN = {
    "mu": 4.4105,
    "tau": 3.6021,
    "theta": constant([6.1505, 4.9396, 3.9059, 4.7960, 3.6144, 4.0511, 6.3172, 4.8840]),
}
PUBLISHED_STANDARD_ERROR = {
    "mu": 0.0330,
    "tau": 0.0319,
    "theta": constant([0.0557, 0.0462, 0.0542, 0.0475, 0.0461, 0.0485, 0.0499, 0.0543]),
}

PROBLEM = Problem(
    name="eight_schools",
    model=model,
    inputs={"sigma": SIGMA},
    data={"y": DATA},
    source="Rubin (1981), table 1; priors of posteriordb; numbers by quadrature",
    numbers={"mean": MEAN, "sd": SD, "log_evidence": LOG_EVIDENCE},
)
