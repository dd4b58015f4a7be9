"""Gaussian linear: ten parameters, ten data, everything Gaussian.

    theta ~ N(0, 0.1 I),    x ~ N(theta, 0.1 I),    both of shape (10,); 0.1 is a variance.

The posterior is N(x / 2, 0.05 I). The task asks whether a method scales to ten dimensions, nothing else.

Source: Lueckmann, Boelts, Greenberg, Goncalves, Macke (2021), Benchmarking simulation-based inference, AISTATS,
arXiv:2101.04653, task T.1. `OBSERVATIONS` are our own, not the ten of that benchmark: the model run in float64 with
`jax.random.key(i)`, i = 0, ..., 9, rounded to 6 decimals. Scores are comparable on average over data only.
"""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpy.typing import ArrayLike

from pushforward.problems._problem import Problem, constant
from pushforward.problems._sbi import Exact, checked, first, generator

PARAMETER = "theta"
DATA = "x"
"""Names of the site of parameters and of the site, and argument, of data."""
PRIOR_VARIANCE = 0.1
VARIANCE = 0.1


def model(x=None):
    """Data x, shape (10,), None to simulate."""
    theta = numpyro.sample("theta", dist.Normal(0.0, PRIOR_VARIANCE**0.5).expand([10]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, VARIANCE**0.5).to_event(1), obs=x)


def observations(n: int = 10) -> np.ndarray:
    """The first n of ten data sets, shape (n, 10); `TRUTHS` holds their parameters."""
    return first(OBSERVATIONS, n)


def reference(x: ArrayLike, n: int, key: int | jax.Array) -> np.ndarray:
    """n exact, independent draws of theta given x, shape (10,); shape (n, 10), float64.

    Example:
        >>> reference(observations()[0], 1000, key=0).shape
        (1000, 10)
    """
    mean, sd, _ = exact(checked(x, n, (10,)))
    return mean + sd * generator(key).normal(size=(n, 10))


def exact(x: ArrayLike) -> Exact:
    """Moments and evidence in closed form: precisions add, and x ~ N(0, 0.2 I)."""
    x = checked(x, 1, (10,))
    total = PRIOR_VARIANCE + VARIANCE
    log_evidence = -0.5 * float(10 * np.log(2 * np.pi * total) + x @ x / total)
    return Exact(PRIOR_VARIANCE / total * x, np.full(10, np.sqrt(PRIOR_VARIANCE * VARIANCE / total)), log_evidence)


def log_posterior(theta: ArrayLike, x: ArrayLike) -> np.ndarray:
    """log p(theta) + log p(x given theta) for theta of shape (..., 10): normalised as a joint density; shape (...)."""
    theta, x = np.asarray(theta, np.float64), checked(x, 1, (10,))
    squares = theta**2 / PRIOR_VARIANCE + (x - theta) ** 2 / VARIANCE
    return -0.5 * np.sum(squares + np.log(4 * np.pi**2 * PRIOR_VARIANCE * VARIANCE), axis=-1)


def problem() -> Problem:
    """The first data set with its exact answer."""
    mean, sd, log_evidence = exact(OBSERVATIONS[0])
    return Problem(
        name="gaussian_linear",
        model=model,
        inputs={},
        data={"x": OBSERVATIONS[0]},
        source="Lueckmann et al. (2021), T.1; data our own; closed form",
        numbers={"mean": {"theta": constant(mean)}, "sd": {"theta": constant(sd)}, "log_evidence": log_evidence},
        truth={"theta": TRUTHS[0]},
    )


# fmt: off
TRUTHS = constant([
    [-0.442998, 0.452884, 0.197582, 0.0634, 0.078155, 0.165854, 0.272547, 0.386973, -0.452381, 0.360501],
    [0.226383, 0.01251, 0.224925, -0.126745, -0.289695, 0.074987, 0.269597, -0.256058, 0.567414, -0.095809],
    [0.731406, 0.08149, 0.230725, 0.598895, 0.590449, 0.283183, -0.145095, 0.076711, -0.214481, 0.627634],
    [-0.078245, -0.074163, -0.193092, -0.181358, 0.008734, -0.33361, -0.105155, 0.052827, -0.286835, 0.057219],
    [-0.191234, 0.299414, 0.470295, -0.476839, 0.198003, -0.3069, -0.168168, -0.245816, 0.163831, 0.086866],
    [-0.270128, -0.029141, -0.072392, 0.215062, 0.178696, -0.334006, 0.176053, -0.056467, -0.519755, 0.235675],
    [-0.164205, 0.182771, -0.131535, -0.167111, 0.087212, 0.306262, -0.087547, -0.145574, 0.125957, -0.237557],
    [-0.164653, -0.100797, 0.227381, 0.093219, -0.064096, -0.171746, 0.117393, -0.379779, -0.644747, 0.457382],
    [0.551608, -0.202584, 0.612113, -0.323707, 0.063236, 0.746298, 0.099662, 0.451798, -0.084084, 0.168501],
    [-0.447971, 0.216981, 0.104309, 0.131621, -0.294666, 0.061734, -0.258401, 0.124756, 0.598715, -0.38555],
])
"""The parameters of `OBSERVATIONS`, shape (10, 10)."""
OBSERVATIONS = constant([
    [-0.302843, 0.673873, -0.282809, 0.498028, 0.086505, 0.389037, 0.29542, 0.174826, -0.719033, 0.426033],
    [0.053259, -0.038874, 0.425753, -0.22361, -0.219731, 0.288704, -0.09737, 0.443409, 0.237176, -0.117683],
    [0.973164, 0.190046, 0.14082, 0.772556, 0.42232, 0.741722, -0.026722, -0.108855, 0.039603, 0.431615],
    [-0.434533, -0.37262, -0.222125, -0.005271, -0.289879, -0.188156, -0.25495, -0.203227, -0.34361, 0.012794],
    [-0.46366, 0.00729, 0.21103, 0.007973, 0.085968, -0.091995, 0.133301, -0.283741, -0.100205, 0.383945],
    [0.159635, 0.031732, 0.275421, 0.303065, -0.004877, -0.858902, 0.183392, -0.68289, -0.009545, 0.334542],
    [0.115924, 0.287038, 0.068894, 0.33808, 0.172325, 0.569701, 0.24823, -0.545435, 0.167446, 0.268337],
    [0.527192, -0.2628, 0.09816, 0.303001, -0.156382, 0.121947, 0.418084, -0.724189, -0.474547, 0.62416],
    [0.432411, 0.242598, 0.203866, 0.191576, 0.400575, 0.964425, 0.022189, -0.007699, -0.333981, -0.283752],
    [-0.118735, 0.598843, 0.119871, 0.485476, -0.380458, -0.258119, -0.209614, -0.364222, 1.017983, -0.25199],
])
# fmt: on
