"""Jumps: a mean-reverting state whose increments are small most of the time and large now and then.

    x_0 ~ N(0, 1),    x_t = 0.9 x_{t-1} + e_t,    y_t = x_t + N(0, 0.3^2),    t = 1, 2, ...,
    e_t ~ 0.95 N(0, 0.2^2) + 0.05 N(0, 3^2)    (`model`, compound Poisson as a Levy process is)    or
    e_t ~ 0.3 times Student's t with 1.5 degrees of freedom    (`model_student`, no variance).

What is smoothed across a jump is far from Gaussian: between two data of different level the state has two modes, before
and after the jump. The state is one number, so that a grid filter and smoother is exact. Both increments have a density
and no discrete site.

Sources: constructed here. Textbooks: Applebaum (2009), Levy Processes and Stochastic Calculus, 2nd edition, CUP,
section 1.3 (compound Poisson and stable increments); Kitagawa (1987), Non-Gaussian state-space modeling of
nonstationary time series, JASA 82, 1032-1063 (heavy tails, grids). Data are numpy's `default_rng(0)`.
"""

import math

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._grid import GridAnswer, grid_filter, normal_density, normal_log_density
from pushforward.problems._problem import constant

DECAY, NOISE, START_SD = 0.9, 0.3, 1.0
SMALL, LARGE, SELDOM = 0.2, 3.0, 0.05
"""Deviations of small and of large increments, probability of the large ones."""
DEGREES, SCALE = 1.5, 0.3
"""Degrees of freedom and scale of Student's t."""
STEPS = 64


def mixture(centre):
    """The law of x_t in `model` with 0.9 x_{t-1} = centre."""
    weights = dist.Categorical(probs=jnp.array([1 - SELDOM, SELDOM]))
    scales = jnp.array([SMALL, LARGE])
    return dist.MixtureSameFamily(weights, dist.Normal(jnp.asarray(centre)[..., None], scales))


def student(centre):
    """The law of x_t in `model_student` with 0.9 x_{t-1} = centre."""
    return dist.StudentT(DEGREES, centre, SCALE)


def model(y=None, steps=STEPS):
    """Increments small and seldom large; y, shape (n,), NaN = missing, None to simulate `steps` data."""
    _chain(y, steps, mixture)


def model_student(y=None, steps=STEPS):
    """The same with increments of Student's t."""
    _chain(y, steps, student)


def _chain(y, steps, law):
    def step(x, y):
        x = numpyro.sample("x", law(DECAY * x))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, START_SD)), y, length=steps if y is None else len(y))


def simulate(seed: int = 0, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Trajectory and data of `model`, t = 1 .. steps, each of shape (steps,), from numpy's `default_rng(seed)`.

    One normal for x_0, then per step one uniform (large below 0.05), one normal for x and one for y.
    """
    rng = np.random.default_rng(seed)
    x, xs, ys = START_SD * rng.normal(), [], []
    for _ in range(steps):
        scale = LARGE if rng.uniform() < SELDOM else SMALL
        x = DECAY * x + scale * rng.normal()
        xs.append(x)
        ys.append(x + NOISE * rng.normal())
    return np.array(xs), np.array(ys)


def grid(y, nodes: int = 801, width: float = 40.0) -> GridAnswer:
    """Exact filtering, smoothing and evidence of `model` with the data y, shape (n,), NaN = missing.

    `grid(y).moments("smoothing")` are the means and deviations of x_t given all data, t = 1 .. n.

    Args:
        y: data.
        nodes: of the grid.
        width: the grid spans -width .. width.

    Raises:
        ValueError: the spacing passes 0.8 times the small increments, where sums are no longer good integrals.
    """
    small, large = (lambda x, m, sd=sd: normal_density(x, m, sd) for sd in (SMALL, LARGE))
    return _grid(y, nodes, width, lambda x, m: (1 - SELDOM) * small(x, m) + SELDOM * large(x, m))


def grid_student(y, nodes: int = 1001, width: float = 40.0) -> GridAnswer:
    """The same of `model_student`. Tails beyond the grid are cut.

    Evidence and means are exact to 1e-8, deviations between missing data to 1e-4. Where the last data are missing no
    deviation exists: what the grid gives then depends on its width.
    """
    norm = math.exp(math.lgamma((DEGREES + 1) / 2) - math.lgamma(DEGREES / 2)) / math.sqrt(DEGREES * math.pi) / SCALE

    def density(x, m):
        return norm * (1 + ((x - m) / SCALE) ** 2 / DEGREES) ** (-(DEGREES + 1) / 2)

    return _grid(y, nodes, width, density)


def _grid(y, nodes, width, density):
    if 2 * width > 0.8 * SMALL * (nodes - 1):
        needed = math.ceil(2 * width / (0.8 * SMALL)) + 1
        raise ValueError(f"{nodes} nodes are too few for width {width}: the grid needs at least {needed}")
    y = np.asarray(y, np.float64)
    x = np.linspace(-width, width, nodes)
    moves = density(x[:, None], DECAY * x)
    log_likelihood = normal_log_density(y[:, None], x, NOISE)
    return grid_filter(x, normal_density(x, 0.0, START_SD), lambda t: moves, log_likelihood)


TRUTH, DATA = map(constant, simulate())
"""Trajectory and data of `model`, shape (64,)."""

LOG_EVIDENCE = -50.56197
STUDENT_LOG_EVIDENCE = -55.94759
"""log p(DATA) under `model` and `model_student`, by grids of 801 to 2401 nodes."""
