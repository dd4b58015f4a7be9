"""Kolmogorov flow: incompressible Navier-Stokes on a periodic square, driven at one wave number; states 0.2 apart.

    du/dt + (u . grad) u = -grad p + viscosity Laplace u - drag u + (sin 4 x_2, 0),    div u = 0,    x in [0, 2 pi)^2,

viscosity 1 / 1000, drag 0.1. A state is a velocity field, shape (n, n, 2): axes x_1, x_2, component. States have
additive model noise, x_i = M(x_{i-1}) + N(0, 0.01^2 I), so that a trajectory has a density; velocities have deviation
1, and change by 0.2 in a step. The noise is white in space, hence not free of divergence: the next step projects it.

Solver: pseudo-spectral in velocities, rotational form u x curl u (energy is conserved exactly between modes), 2/3 rule,
Runge-Kutta of order 4 with the linear terms integrated exactly. Grids of 32 or 64 do not resolve viscosity 1 / 1000
(which takes about 128): a damping of order 8, `CLOSURE` at the largest wave number, stops the cascade there. The paper
has finite volumes on 256 x 256 cells, averaged to 64 x 64, and no model noise: `trajectories(..., resolution=256)`.

Scenarios, of the paper's code, in the states named, averages over cells of a grid of 8 x 8 or 16 x 16 whatever n is:
"coarse", velocities of 8 x 8 cells in every 4th state with noise 0.1; "extrapolation", the inner 8 x 8 of 16 x 16 in
every 3rd with noise 0.01; "saturating", w / (1 + |w|) of the vorticity w of the inner 12 x 12 of 16 x 16 cells, by
differences with the cell as unit, in every 3rd with noise 0.05: the text speaks of x / (1 + |x|), the code has w.

Sources: Rozet and Louppe (2023), Score-based data assimilation, NeurIPS 36, arXiv:2306.10574, section 4.2 and its code
(equation, forcing, scenarios); Kochkov et al. (2021), Machine learning-accelerated computational fluid dynamics, PNAS
118, doi:10.1073/pnas.2101784118 (the flow); Canuto et al. (2006), Spectral Methods, Springer, sections 3.3 and D.2
(solver). Numbers: see `NUMBERS`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._scenario import scenario as _scenario

VISCOSITY, DRAG, FORCE, WAVE = 1e-3, 0.1, 1.0, 4
INTERVAL = 0.2
SIZE = 32
STEPS = 8
MODEL_NOISE = 0.01
START_SD = 1.0
"""Of velocities of x_0 in `model`: white, since a density is needed; the first step smoothes it."""
CLOSURE = 20.0
"""Rate of the damping at the largest wave number kept, n / 3; it falls with the 8th power of the wave number."""
SPIN_UP = 64
"""States from a random field to the first that is kept."""


class Flow(NamedTuple):
    """Coefficients of the equation, and steps within an interval: 0 stands for n / 6, 5 at least, enough for 0.2."""

    viscosity: float = VISCOSITY
    drag: float = DRAG
    force: float = FORCE
    closure: float = CLOSURE
    substeps: int = 0


def step(x, flow=Flow(), interval=INTERVAL):
    """M(x), the state an interval later; x, shape (..., n, n, 2), n even. Any divergence of x is removed first.

    Raises:
        ValueError: the field is of another shape.
    """
    n = x.shape[-2]
    if x.ndim < 3 or x.shape[-1] != 2 or x.shape[-3] != n or n % 2:
        raise ValueError(f"a field of shape {x.shape}: write shape (..., n, n, 2) with n even")
    substeps = flow.substeps or max(5, -(-n // 6))
    h = interval / substeps
    rate = flow.viscosity * _grid(n).square + flow.drag + flow.closure * (_grid(n).square / (n / 3) ** 2) ** 4
    half = jnp.exp(-0.5 * h * jnp.asarray(rate, x.dtype))[..., None]
    slope = functools.partial(_slope, n=n, force=flow.force)

    def advance(_, u):
        a = slope(u)
        b = slope(half * (u + 0.5 * h * a))
        c = slope(half * u + 0.5 * h * b)
        d = slope(half * (half * u + h * c))
        return half * (half * u + h / 6 * (half * a + 2 * (b + c))) + h / 6 * d

    u = _project(jnp.fft.rfft2(x, axes=(-3, -2)), n)
    return _to_grid(jax.lax.fori_loop(0, substeps, advance, u), n)


class _Waves(NamedTuple):
    first: np.ndarray
    second: np.ndarray
    square: np.ndarray
    kept: np.ndarray


@functools.cache
def _grid(n):
    """Wave numbers of both axes, |k|^2 and the modes of the 2/3 rule, each of shape (n, n / 2 + 1)."""
    first, second = np.meshgrid(np.fft.fftfreq(n, 1 / n), np.fft.rfftfreq(n, 1 / n), indexing="ij")
    kept = (np.abs(first) < n / 3) & (second < n / 3)
    return _Waves(first, second, first**2 + second**2, kept)


def _to_grid(u, n):
    return jnp.fft.irfft2(u, s=(n, n), axes=(-3, -2))


def _project(u, n):
    """Modes kept, free of divergence: u - k (k . u) / |k|^2."""
    waves = np.stack([_grid(n).first, _grid(n).second], -1)
    kind = jnp.real(u).dtype
    direction = jnp.asarray(waves / np.sqrt(np.maximum(_grid(n).square, 1))[..., None], kind)
    kept = jnp.asarray(np.array(_grid(n).kept[..., None]), kind)
    return kept * (u - direction * jnp.sum(direction * u, -1, keepdims=True))


def _slope(u, n, force):
    """Everything in du/dt that is not linear: u x curl u and the force, projected."""
    kind = jnp.real(u).dtype
    first, second = (jnp.asarray(np.array(k), kind) for k in (_grid(n).first, _grid(n).second))
    curl = _to_grid((1j * (first * u[..., 1] - second * u[..., 0]))[..., None], n)[..., 0]
    velocity = _to_grid(u, n)
    wave = jnp.asarray(np.sin(WAVE * 2 * np.pi * np.arange(n) / n), kind)
    turned = jnp.stack([curl * velocity[..., 1] + force * wave, -curl * velocity[..., 0]], -1)
    return _project(jnp.fft.rfft2(turned, axes=(-3, -2)), n)


# ----------------------------------------------------------------------------------------------------- observations


def coarsen(x, factor):
    """Means over squares of factor x factor cells; x, shape (..., n, n, 2).

    Raises:
        ValueError: the factor does not divide n.
    """
    *batch, n, m, components = x.shape
    if n % factor or m % factor:
        raise ValueError(f"{n} x {m} cells cannot be averaged by {factor}: write a divisor of both")
    return x.reshape(*batch, n // factor, factor, m // factor, factor, components).mean((-4, -2))


def vorticity(x):
    """d u_2 / d x_1 - d u_1 / d x_2 by central differences, a cell as unit, shape (..., n, n)."""
    first = jnp.roll(x[..., 1], -1, -2) - jnp.roll(x[..., 1], 1, -2)
    second = jnp.roll(x[..., 0], -1, -1) - jnp.roll(x[..., 0], 1, -1)
    return 0.5 * (first - second)


def saturate(x):
    """x / (1 + |x|)."""
    return x / (1 + jnp.abs(x))


class Scenario(NamedTuple):
    """Observations `operator(state)` with Gaussian noise in every `every`-th state, the first included."""

    operator: Callable
    noise: float
    every: int

    def mask(self, states: int) -> np.ndarray:
        """True where one of `states` states is observed, shape (states,)."""
        return np.arange(states) % self.every == 0


def _coarse(x):
    return coarsen(x, x.shape[-2] // 8)


def _inner(x):
    return coarsen(x, x.shape[-2] // 16)[..., 4:12, 4:12, :]


def _saturating(x):
    return saturate(vorticity(coarsen(x, x.shape[-2] // 16)))[..., 2:14, 2:14]


SCENARIOS = {
    "coarse": Scenario(_coarse, 0.1, 4),
    "extrapolation": Scenario(_inner, 0.01, 3),
    "saturating": Scenario(_saturating, 0.05, 3),
}


def scenario(name: str) -> Scenario:
    """The scenario "coarse", "extrapolation" or "saturating"; each takes states with n a multiple of 16.

    Raises:
        ValueError: there is no such scenario.
    """
    return _scenario(SCENARIOS, name)


# ------------------------------------------------------------------------------------------------- model and truth


def model(y=None, steps=STEPS, size=SIZE, name="coarse", flow=Flow()):
    """Trajectories of velocity fields; sites "x0", "x" (all later states), "y0" (observes x0) and "y" (the rest).

    x_0 is white noise, `START_SD` in each cell: far from the flow's own law, which is `trajectories`'.

    Args:
        y: data of all states, shape (steps + 1, ...), NaN = missing; None to simulate.
        steps: transitions, where y is not given.
        size: n.
        name: the scenario.
        flow: coefficients.
    """
    known = scenario(name)
    first, rest = (None, None) if y is None else (y[0], y[1:])

    def look(x):
        seen = known.operator(x)
        return dist.Normal(seen, known.noise).to_event(seen.ndim)

    x0 = numpyro.sample("x0", dist.Normal(0.0, START_SD).expand([size, size, 2]).to_event(3))
    numpyro.sample("y0", look(x0), obs=first)

    def advance(x, y):
        x = numpyro.sample("x", dist.Normal(step(x, flow), MODEL_NOISE).to_event(3))
        numpyro.sample("y", look(x), obs=y)
        return x, None

    scan(advance, x0, rest, length=steps if y is None else len(y) - 1)


def random_field(key, size=SIZE):
    """A field without divergence, energy about wave number 4, root mean square velocity 1, shape (size, size, 2)."""
    square = _grid(size).square
    amplitude = np.sqrt(square) * np.exp(-square / WAVE**2)
    white = jnp.fft.rfft2(jax.random.normal(key, (size, size, 2)), axes=(0, 1))
    field = _to_grid(_project(jnp.asarray(amplitude, jnp.real(white).dtype)[..., None] * white, size), size)
    return field / jnp.sqrt(jnp.mean(jnp.sum(field**2, -1)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), static_argnames=("resolution", "noise", "flow", "batch"))
def trajectories(
    key, n, length=STEPS + 1, size=SIZE, spin_up=SPIN_UP, *, resolution=0, noise=MODEL_NOISE, flow=Flow(), batch=16
):
    """Independent trajectories of the flow, shape (n, length, size, size, 2).

    Args:
        key: a JAX key.
        n: trajectories.
        length: states of each.
        size: cells along an axis of the answer.
        spin_up: states before the first, from `random_field`.
        resolution: cells along an axis of the solver, a multiple of size, averaged for the answer; 0 is size itself.
        noise: model noise; 0 is the paper's.
        flow: coefficients.
        batch: trajectories that run together; memory grows with it.
    """
    cells = resolution or size

    def one(key):
        key_start, key_steps = jax.random.split(key)

        def advance(i, x):
            return step(x, flow) + noise * jax.random.normal(jax.random.fold_in(key_steps, i), x.shape)

        x = jax.lax.fori_loop(0, spin_up, advance, random_field(key_start, cells))
        return jax.lax.scan(lambda x, i: (advance(i, x), coarsen(x, cells // size)), x, spin_up + jnp.arange(length))[1]

    return jax.lax.map(one, jax.random.split(key, n), batch_size=min(batch, n))


def simulate(key, name="coarse", steps=STEPS, size=SIZE):
    """A trajectory, shape (steps + 1, size, size, 2), and its data, NaN in states that are not observed.

    Raises:
        ValueError: there is no such scenario.
    """
    known = scenario(name)
    key_states, key_data = jax.random.split(key)
    x = trajectories(key_states, 1, steps + 1, size)[0]
    seen = known.operator(x)
    noisy = seen + known.noise * jax.random.normal(key_data, seen.shape)
    return x, jnp.where(known.mask(steps + 1).reshape(-1, *[1] * (seen.ndim - 1)), noisy, jnp.nan)


def residual_ratio(x, y, name="coarse"):
    """Deviation of data from the states' observations, over the noise: 1 where states are draws given the data.

    Args:
        x: trajectories, shape (..., states, n, n, 2).
        y: data of all states, NaN = missing.
        name: the scenario.
    """
    known = scenario(name)
    return jnp.nanstd(y - known.operator(x)) / known.noise


NUMBERS = {
    "published": {"coarse": 1.10, "extrapolation": 1.79, "saturating": 1.22},
    "published, DPS": {"coarse": 8.6, "extrapolation": 49.0, "saturating": 11.0},
}
"""`residual_ratio` of draws of a trained score network, 64 x 64, by the paper's guidance and by the one of DPS."""

ENERGY = {32: 0.90, 64: 1.00}
"""Mean kinetic energy, |u|^2 / 2, of `trajectories` by n; deviation over trajectories 0.1. Grids of 64 and 128 averaged
to 32 and 64 have 1.04 and 0.93.
"""
