"""SLCP, simple likelihood and complex posterior: four points of a Gaussian whose scales are squares.

    theta ~ U(-3, 3)^5,    x_i ~ N((theta_1, theta_2), S),  i = 1, ..., 4,
    S = [[s_1^2, r s_1 s_2], [r s_1 s_2, s_2^2]],    s_1 = theta_3^2,  s_2 = theta_4^2,  r = tanh theta_5.

The signs of theta_3 and theta_4 cannot be known: four modes of exactly one quarter each. A Markov chain that stays in
one of them reports perfect convergence, which makes exact draws worth having.

They follow from integrals in closed form. With A the sum of squares and products of x around its mean m, the likelihood
integrated over all means is in proportion to det(S)^(-3/2) exp(-tr(A S^-1) / 2). In polar coordinates

    A_11 / s_1^2 = q cos(phi)^2,    A_22 / s_2^2 = q sin(phi)^2,    b = A_12 (A_11 A_22)^(-1/2) sin(2 phi),

the uniform law of (theta_3, theta_4, theta_5) turns it into

    sin(2 phi)^(3/2) (1 - b r)^(-5/2) dphi dr    times    q ~ Gamma(5/2, rate (1 - b r) / (2 (1 - r^2))) given both.

The law of r given phi has a distribution function with an inverse, that of phi rises up to pi/4 and is symmetric there,
so that steps over it make an envelope. Then the mean is drawn from N(m, S / 4), and all is rejected unless s_1 and s_2
are at most 9 and the mean is in the box. Signs of theta_3 and theta_4 are coins. No approximation anywhere.

Sources: Papamakarios, Sterratt, Murray (2019), Sequential neural likelihood, AISTATS, arXiv:1805.07226 (the model);
Lueckmann, Boelts, Greenberg, Goncalves, Macke (2021), Benchmarking simulation-based inference, AISTATS,
arXiv:2101.04653, task T.3. `OBSERVATIONS`
are our own, not the ten of that benchmark: the model run in float64 with `jax.random.key(i)`, i = 0, ..., 9, rounded to
6 decimals. Scores are comparable on average over data only. Numbers: quadrature, computed again in
`tests/test_sbi_problems.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpy.typing import ArrayLike

from pushforward.problems._problem import Problem, constant
from pushforward.problems._sbi import checked, first, generator, rejection

PARAMETER = "theta"
DATA = "x"
"""Names of the site of parameters and of the site, and argument, of data."""
BOUND = 3.0
FLOOR = 1e-10
"""Least s_1 and s_2: keeps value and gradient finite in float32. Only sizes of theta_3 or theta_4 below 1e-5 reach it:
7 of a million simulations, and no posterior."""


def model(x=None):
    """Data x, shape (4, 2), None to simulate; the four points are exchangeable."""
    theta = numpyro.sample("theta", dist.Uniform(-BOUND, BOUND).expand([5]).to_event(1))
    s_1, s_2 = jnp.maximum(theta[2] ** 2, FLOOR), jnp.maximum(theta[3] ** 2, FLOOR)
    # 1 - tanh(t)^2 = 1 / cosh(t)^2, which keeps its digits
    rows = [jnp.stack([s_1, jnp.zeros_like(s_1)]), s_2 * jnp.stack([jnp.tanh(theta[4]), 1 / jnp.cosh(theta[4])])]
    with numpyro.plate("point", 4):
        numpyro.sample("x", dist.MultivariateNormal(theta[:2], scale_tril=jnp.stack(rows)), obs=x)


def observations(n: int = 10) -> np.ndarray:
    """The first n of ten data sets, shape (n, 4, 2); `TRUTHS` holds their parameters."""
    return first(OBSERVATIONS, n)


def reference(x: ArrayLike, n: int, key: int | jax.Array) -> np.ndarray:
    """n exact, independent draws of theta given x, shape (4, 2); shape (n, 5), float64.

    By rejection from a law in closed form: see the head of this file. At the stored data 7 to 93 % of the proposals are
    accepted; at one in a hundred data sets of the model fewer than 0.3 %, at one in a thousand fewer than 0.02 %.

    Raises:
        ValueError: all points have the same first or the same second coordinate, so that the density has no bound, or
            the model can almost never produce them.

    Example:
        >>> reference(observations()[0], 1000, key=0).shape
        (1000, 5)
    """
    x, rng = checked(x, n, (4, 2)), generator(key)
    mean = x.mean(axis=0)
    products = (x - mean).T @ (x - mean)
    width = np.sqrt(np.diag(products))
    if not width.all():
        raise ValueError(f"x is {x.tolist()}; points that share a coordinate have a likelihood without bound")
    correlation = np.clip(products[0, 1] / width.prod(), -1.0, 1.0)

    def propose(size):
        phi = _angles(rng, correlation, size)
        r = _correlations(rng.uniform(size=len(phi)), correlation * np.sin(2 * phi))
        q = rng.gamma(2.5, 2 * (1 - r) * (1 + r) / (1 - correlation * np.sin(2 * phi) * r))
        s = width / (np.sqrt(q)[:, None] * np.stack([np.cos(phi), np.sin(phi)], axis=-1))
        e = rng.normal(size=(len(phi), 2))
        e[:, 1] = r * e[:, 0] + np.sqrt((1 - r) * (1 + r)) * e[:, 1]
        signs = np.where(rng.uniform(size=s.shape) < 0.5, -1.0, 1.0)
        theta = np.concatenate([mean + 0.5 * s * e, signs * np.sqrt(s), np.arctanh(r)[:, None]], axis=-1)
        return theta[np.all(np.abs(theta) <= BOUND, axis=-1)]

    return rejection(propose, n)


def log_posterior(theta: ArrayLike, x: ArrayLike) -> np.ndarray:
    """log p(theta) + log p(x given theta) for theta of shape (..., 5): normalised as a joint density; shape (...)."""
    theta, x = np.asarray(theta, np.float64), checked(x, 1, (4, 2))
    s = np.maximum(theta[..., 2:4] ** 2, FLOOR)
    z = (x - theta[..., None, :2]) / s[..., None, :]
    t = theta[..., 4:]
    across = z[..., 1] * np.cosh(t) - z[..., 0] * np.sinh(t)
    log_determinant = 4 * (np.log(s).sum(axis=-1) - np.log(np.cosh(t[..., 0])))
    squares = np.sum(z[..., 0] ** 2 + across**2, axis=-1)
    inside = np.all(np.abs(theta) <= BOUND, axis=-1)
    constants = 4 * np.log(2 * np.pi) + 5 * np.log(2 * BOUND)
    return np.where(inside, -0.5 * squares - log_determinant - constants, -np.inf)


def problem() -> Problem:
    """The first data set with moments and evidence by quadrature."""
    return Problem(
        name="slcp",
        model=model,
        inputs={},
        data={"x": OBSERVATIONS[0]},
        source="Papamakarios et al. (2019); Lueckmann et al. (2021), T.3; data our own; quadrature",
        numbers={"mean": {"theta": MEAN}, "sd": {"theta": SD}, "log_evidence": LOG_EVIDENCE},
        truth={"theta": TRUTHS[0]},
    )


def _angles(rng, correlation, size):
    """Draws of phi, at most `size`: equal cells of (0, pi/4), each under its value at the right end, and a mirror."""
    ends = np.linspace(0.0, np.pi / 4, 257)
    height = _angle_density(ends[1:], correlation)
    cell = rng.choice(len(height), size, p=height / height.sum())
    phi = ends[cell] + rng.uniform(size=size) * ends[1]
    phi = phi[rng.uniform(size=size) * height[cell] < _angle_density(phi, correlation)]
    return np.where(rng.uniform(size=len(phi)) < 0.5, phi, np.pi / 2 - phi)


def _angle_density(phi, correlation):
    """Density of phi up to a constant: that of (phi, r), integrated over r between the ends -tanh 3 and tanh 3."""
    sine = np.sin(2 * phi)
    low, high, b = _ends(correlation * sine)
    return sine**1.5 * (high - low) / b


def _correlations(u, b):
    """Draws of r, of density in proportion to (1 - b r)^(-5/2), from uniform u: (1 - b r)^(-3/2) is uniform."""
    low, high, b = _ends(b)
    return np.clip((1 - (low + u * (high - low)) ** (-2 / 3)) / b, -np.tanh(BOUND), np.tanh(BOUND))


def _ends(b):
    """(1 - b r)^(-3/2) at the ends of r, and b, kept off 0, where all is flat in r to 1 part in 10^8."""
    b = np.copysign(np.maximum(np.abs(b), 1e-8), b)
    return (1 + b * np.tanh(BOUND)) ** -1.5, (1 - b * np.tanh(BOUND)) ** -1.5, b


# fmt: off
TRUTHS = constant([
    [-2.516254, 2.543693, 1.403714, 0.476701, 0.585618],
    [1.577812, 0.094668, 1.569262, -0.934301, -1.921148],
    [2.937817, 0.610069, 1.603129, 2.825275, 2.814364],
    [-0.586281, -0.556266, -1.375626, -1.301093, 0.066102],
    [-1.363934, 1.968825, 2.589118, -2.605257, 1.406331],
    [-1.821049, -0.220265, -0.543213, 1.510651, 1.283956],
    [-1.189263, 1.310153, -0.96766, -1.208445, 0.651868],
    [-1.192226, -0.750245, 1.583657, 0.695527, -0.481869],
    [2.756699, -1.434704, 2.841276, -2.081999, 0.475486],
    [-2.530209, 1.522154, 0.775467, 0.968258, -1.945703],
])
"""The parameters of `OBSERVATIONS`, shape (10, 5)."""
OBSERVATIONS = constant([
    [[-1.642947, 2.731733], [-5.509569, 2.627344], [-2.464226, 2.683182], [-2.373733, 2.422763]],
    [[0.229636, 0.511824], [3.141732, -0.513091], [2.122644, 0.078803], [-1.279892, 1.618734]],
    [[4.902617, 6.996133], [2.207141, -1.119434], [1.571406, -2.220816], [3.899841, 3.017068]],
    [[-2.71835, -2.276387], [-0.760016, 0.374057], [-2.373222, 0.115169], [-1.482677, -1.976927]],
    [[-7.138947, -6.114755], [-6.85996, 1.845289], [-3.73889, 1.969101], [5.026716, 7.33003]],
    [[-1.420026, 2.66527], [-1.496496, 2.258847], [-1.992346, -3.304901], [-1.814201, -2.500358]],
    [[-0.359789, 2.445953], [-0.595784, 3.752564], [-0.93724, 2.532442], [-0.195013, 0.685092]],
    [[4.294724, -1.445718], [-2.217065, -0.374781], [-1.924134, -0.285299], [1.19252, -1.427309]],
    [[-0.28624, 3.314146], [-7.665292, 2.422058], [11.368496, 3.293175], [0.778914, -7.552758]],
    [[-1.904121, 0.902176], [-2.500614, 1.771662], [-2.693353, 1.500755], [-2.437433, 0.977311]],
])
# fmt: on

# The exact posterior at the first data set.
LOG_EVIDENCE = -14.9256017
MEAN = constant([-1.8223442, 2.6053081, 0.0, 0.0, 0.0381069])
SD = constant([1.0826032, 0.1679095, 1.7679453, 0.5327185, 0.7597439])
