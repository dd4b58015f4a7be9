"""BOD: biochemical oxygen demand, two parameters and a strongly bent posterior.

    A ~ U(0.4, 1.2),    B ~ U(0.01, 0.31),    y_j ~ N(A (1 - exp(-B t_j)), 1e-3),    t = 1, ..., 5.

A is the demand in the end, B the rate (per unit of time). The data determine A B well and A and
B apart badly. `u` below are the standard normal coordinates: A = 0.4 + 0.8 Phi(u_1), B = 0.01 + 0.30 Phi(u_2).

Sources: Marzouk, Moselhy, Parno, Spantini (2016), arXiv:1602.05023 (problem); Bach, Baptista, Sanz-Alonso,
Stuart, Machine Learning for Inverse Problems and Data Assimilation, arXiv:2410.10523, and Baptista's tutorial
on it (CWI 2025): data. Numbers: quadrature and optimisation, all of them for DATA; `tests/exact.py` computes them
again, and for any other data.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from pushforward.problems._problem import Problem, constant


def model(t, y=None):
    """Oxygen demand y at times t, both of shape (n,); y is None to simulate."""
    A = numpyro.sample("A", dist.Uniform(0.4, 1.2))
    B = numpyro.sample("B", dist.Uniform(0.01, 0.31))
    numpyro.sample("y", dist.Normal(A * (1 - jnp.exp(-B * t)), 1e-3**0.5), obs=y)


TIMES = constant([1, 2, 3, 4, 5])
DATA = constant([0.1615, 0.1868, 0.3949, 0.3728, 0.4177])
SECOND_DATA = constant([-0.0072, 0.0427, 0.0505, 0.0638, 0.0729])
"""The tutorial's second data vector, for maps trained for all data at once."""

# The exact posterior at DATA.
LOG_EVIDENCE = 4.877902196
MEAN = constant([0.6825439197, 0.2264700727])
"""of (A, B)"""
COVARIANCE = constant([[0.0194165320, -0.0071367263], [-0.0071367263, 0.0030185108]])
"""of (A, B)"""
MEAN_U = constant([-0.3933825684, 0.7244896010])
COVARIANCE_U = constant([[0.2643641922, -0.2910139754], [-0.2910139754, 0.4693466048]])
SKEWNESS_U = constant([1.7231, 0.5609])
KURTOSIS_U = constant([7.3087, 3.2344])
"""Fourth standardised moment; 3 for a Gaussian."""
QUANTILE_LEVELS = constant([0.05, 0.25, 0.5, 0.75, 0.95])
QUANTILES_U = constant(
    [[-0.94938, -0.74578, -0.52615, -0.18490, 0.62825], [-0.29385, 0.22146, 0.66110, 1.15318, 1.95752]]
)
"""Marginal quantiles, one row for each of u_1, u_2; those of A and B follow by the increasing maps above."""
ENTROPY_U = 0.2353987
"""Differential entropy of the posterior of u (nats)."""
KL_FROM_PRIOR = 2.3091512
"""KL(posterior, prior) (nats)."""
EXPECTED_LOG_LIKELIHOOD = 7.1870534
"""Under the posterior."""
PRIOR_EFFECTIVE_SAMPLE_SIZE = 0.076010
"""Of importance sampling from the prior, as a fraction of the number of draws."""

# Points and Gaussian approximations at DATA. A maximum a posteriori point depends on coordinates: this one is in u.
MAP_U = constant([-0.4551289, 0.5451153])
MAP_PARAMETERS = constant([0.6596066, 0.2221489])
"""(A, B) at MAP_U; not the mode of the density of (A, B)."""
MAXIMUM_LIKELIHOOD = constant([0.5428572, 0.3087725])
"""(A, B)"""
LAPLACE_COVARIANCE_U = constant([[0.1750125, -0.2475280], [-0.2475280, 0.3711511]])
"""Inverse of the full Hessian of the negative log posterior of u at MAP_U."""
LAPLACE_LOG_EVIDENCE = 4.7615967

# The best Gaussians in u in the sense of reverse KL, i.e. the optima of Gaussian variational inference.
FULL_VI_MEAN_U = constant([-0.557102, 0.771647])
FULL_VI_COVARIANCE_U = constant([[0.0535184, -0.0758978], [-0.0758978, 0.1344903]])
FULL_VI_ELBO = 4.392499
FULL_VI_KL = 0.485403
"""KL(approximation, posterior) = LOG_EVIDENCE - ELBO."""
DIAGONAL_VI_MEAN_U = constant([-0.746339, 1.175876])
DIAGONAL_VI_VARIANCE_U = constant([0.0111134, 0.0796778])
DIAGONAL_VI_ELBO = 3.673579
DIAGONAL_VI_KL = 1.204323

DISTANCES = {
    "full_vi": (0.366, 0.408, 4.957),
    "diagonal_vi": (0.640, 0.620, 19.8),
    "laplace": (0.396, 0.496, 5.41),
    "moment_matched": (0.530, 0.525, 0.985348),
}
"""From the exact posterior of u: total variation, Hellinger (squared: half the integral of the squared difference of
root densities), KL(posterior, approximation). The moment-matched Gaussian is the optimum of the last."""

# Over all data: what a map trained on simulations of (u, y) can reach at best.
MUTUAL_INFORMATION = 2.45237
"""Between u and y (nats); 2.452374 +- 0.000005, from 8 scrambled Sobol sets of 2^17 data vectors, log p(y) of each by
quadrature."""
CONDITIONAL_ENTROPY_U = 0.38550
"""h(u given y) (nats): the least expected negative log density of u under any conditional density."""

PROBLEM = Problem(
    name="bod",
    model=model,
    inputs={"t": TIMES},
    data={"y": DATA},
    source="arXiv:2410.10523 and tutorial (CWI 2025); numbers by quadrature",
    numbers={
        "mean": {"A": float(MEAN[0]), "B": float(MEAN[1])},
        "sd": {"A": float(COVARIANCE[0, 0] ** 0.5), "B": float(COVARIANCE[1, 1] ** 0.5)},
        "covariance": COVARIANCE,
        "log_evidence": LOG_EVIDENCE,
    },
)
