"""Two moons: two crescents of posterior mass, from a model that has no likelihood as written.

    theta ~ U(-1, 1)^2,    angle ~ U(-pi/2, pi/2),    radius ~ N(0.1, 0.01^2),
    x = (radius cos(angle) + 0.25, radius sin(angle)) + (-abs(theta_1 + theta_2), theta_2 - theta_1) / sqrt(2).

x is a deterministic function of latent sites, so that only methods which learn from simulations can infer; methods
that need a density see a model without data. For that reason `pushforward.problems.problem` does not list it.

The exact posterior follows by inversion. On either side of theta_1 + theta_2 = 0 the map from theta to x, given noise
p = (radius cos(angle) + 0.25, radius sin(angle)) is a rotation with a reflection, its Jacobian is 1, and

    theta = (s - d, s + d) / 2,    s = +-sqrt(2) (p_1 - x_1), where p_1 > x_1,    d = sqrt(2) (x_2 - p_2).

So theta given x is that image of p under its own law, with either sign, restricted to the box. The box is symmetric
under the change of sign of s, which makes the signs equally probable.

Source: Lueckmann, Boelts, Greenberg, Goncalves, Macke (2021), Benchmarking simulation-based inference, AISTATS,
arXiv:2101.04653, task T.8, after Greenberg, Nonnenmacher, Macke (2019), arXiv:1905.07488. `OBSERVATIONS` are our own,
not the ten of that benchmark: the model run in float64 with `jax.random.key(i)`, i = 0, ..., 9, rounded to 6 decimals.
Scores are comparable on average over data only.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpy.typing import ArrayLike

from pushforward.problems._grid import normal_log_density
from pushforward.problems._problem import constant
from pushforward.problems._sbi import checked, first, generator, rejection

PARAMETER = "theta"
DATA = "x"
"""Names of the site of parameters and of the site, and argument, of data."""
RADIUS = (0.1, 0.01)
"""Mean and standard deviation."""
CENTRE = 0.25


def model(x=None):
    """Data x, shape (2,), None to simulate. Data that are given change nothing but the value of their site."""
    theta = numpyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    angle = numpyro.sample("angle", dist.Uniform(-jnp.pi / 2, jnp.pi / 2))
    radius = numpyro.sample("radius", dist.Normal(*RADIUS))
    noise = jnp.stack([radius * jnp.cos(angle) + CENTRE, radius * jnp.sin(angle)])
    shift = jnp.stack([-jnp.abs(theta[0] + theta[1]), theta[1] - theta[0]]) / 2**0.5
    numpyro.deterministic("x", noise + shift if x is None else x)


def observations(n: int = 10) -> np.ndarray:
    """The first n of ten data sets, shape (n, 2); `TRUTHS` holds their parameters."""
    return first(OBSERVATIONS, n)


def reference(x: ArrayLike, n: int, key: int | jax.Array) -> np.ndarray:
    """n exact, independent draws of theta given x, shape (2,); shape (n, 2), float64.

    By inversion of the model at draws of the noise, and rejection outside the box: see the head of this file.

    Raises:
        ValueError: the model cannot, or can almost never, produce x.

    Example:
        >>> reference(observations()[0], 1000, key=0).shape
        (1000, 2)
    """
    x, rng = checked(x, n, (2,)), generator(key)

    def propose(size):
        angle, radius = rng.uniform(-np.pi / 2, np.pi / 2, size), rng.normal(*RADIUS, size)
        s = 2**0.5 * (radius * np.cos(angle) + CENTRE - x[0])
        d = 2**0.5 * (x[1] - radius * np.sin(angle))
        signed = np.where(rng.uniform(size=size) < 0.5, -s, s)
        theta = np.stack([signed - d, signed + d], axis=-1) / 2
        return theta[(s >= 0) & np.all(np.abs(theta) <= 1, axis=-1)]

    return rejection(propose, n)


def log_posterior(theta: ArrayLike, x: ArrayLike) -> np.ndarray:
    """log p(theta) + log p(x given theta) for theta of shape (..., 2): normalised as a joint density; shape (...).

    The noise v = x - shift(theta) - (0.25, 0) in polar coordinates has density N(r; 0.1, 0.01^2) / (pi abs(v)), where
    r = abs(v) with the sign of v_1: a negative radius, ten standard deviations out, points to the left.
    """
    theta, x = np.asarray(theta, np.float64), checked(x, 1, (2,))
    v_1 = x[0] - CENTRE + np.abs(theta[..., 0] + theta[..., 1]) / 2**0.5
    v_2 = x[1] - (theta[..., 1] - theta[..., 0]) / 2**0.5
    length = np.maximum(np.hypot(v_1, v_2), np.finfo(np.float64).tiny)
    log_noise = normal_log_density(np.copysign(length, v_1), *RADIUS) - np.log(np.pi * length)
    return np.where(np.all(np.abs(theta) <= 1, axis=-1), log_noise - np.log(4), -np.inf)


# fmt: off
TRUTHS = constant([
    [-0.838751, 0.847898],
    [0.525937, 0.031556],
    [0.979272, 0.203356],
    [-0.195427, -0.185422],
    [-0.454645, 0.656275],
    [-0.607016, -0.073422],
    [-0.396421, 0.436718],
    [-0.397409, -0.250082],
    [0.9189, -0.478235],
    [-0.843403, 0.507385],
])
"""The parameters of `OBSERVATIONS`, shape (10, 2)."""
OBSERVATIONS = constant([
    [0.326145, 1.241916],
    [-0.075536, -0.40215],
    [-0.512384, -0.460665],
    [0.015401, -0.073159],
    [0.165299, 0.70291],
    [-0.198417, 0.493947],
    [0.278499, 0.674211],
    [-0.203724, 0.195581],
    [0.035387, -1.036151],
    [0.057675, 1.04477],
])
# fmt: on
