"""A stretch of a trajectory as a function of its control vector, its minimum, and what is known around it.

The control is noise: of where the stretch starts, then of each step where step noise is free. Derivatives go through
the model's own step by `jax.linearize` and its transpose; long stretches are checkpointed, so that memory is
O(sqrt steps).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.math import variational
from pushforward.math.noise import whiten
from pushforward.math.variational import Minimum, Tangent
from pushforward.model import trajectories
from pushforward.model.state_space import Chain, Observed

_LONG = 64
_SHORT = 16
_DENSE = 1000
_BATCH = 64
_PROBED = 128


class Begun(NamedTuple):
    """Where a stretch starts: the chain at its parameters, state, riders, and what the data seen with it say."""

    chain: Chain
    state: Array
    riders: list[Array]
    w: Array
    phi: Array


class Path(NamedTuple):
    """A trajectory along a stretch: states (L + 1, n) and riders before each step and at the end, noise (L, q)."""

    states: Array
    noise: Array
    riders: list[Array]


class Stretch(NamedTuple):
    """A stretch of steps.

    Attributes:
        begin: where it starts, as a function of noise (size,).
        size: length of that noise.
        times: numbers of the steps, shape (L,).
        counted: which steps' data count, shape (L,).
        width: length of the free noise of a step, 0 where there is none.
        full: length q of the noise of a step.
        horizon: steps that are run, a number that may be traced; None for all. Data beyond it do not count.
    """

    begin: Callable[[Array], Begun]
    size: int
    times: Array
    counted: Array
    width: int
    full: int
    horizon: Array | None = None

    @property
    def dimension(self) -> int:
        """Length d of the control."""
        return self.size + self.times.shape[0] * self.width

    def noise(self, z: Array) -> Array:
        """Noise of the steps (L, q) at a control."""
        length = self.times.shape[0]
        if not self.width:
            return jnp.zeros((length, self.full), z.dtype)
        return z[self.size :].reshape(length, self.width)

    def run(self, z: Array) -> tuple[Array, Array]:
        """Predictions less data in units of their noise (m,), and minus the log likelihood: see `math.variational`."""
        begun = self.begin(z[: self.size])

        def move(carry: tuple, item: tuple) -> tuple[tuple, Array]:
            state, riding, phi = carry
            noise, t, counted = item
            moved = begun.chain.step(state, riding, t, noise)
            w, cost = misfit(moved.observed)
            phi = phi + jnp.where(counted, cost, 0.0)
            return (moved.state, moved.riders, phi), jnp.where(counted, w, 0.0)

        start = (begun.state, begun.riders, begun.phi)
        items = (self.noise(z), self.times, self.counted)
        move = move if self.horizon is None else _until(move, self.horizon, self.times[0])
        (_, _, phi), w = _scan(move, start, items)
        return jnp.concatenate([begun.w, jnp.ravel(w)]), phi

    def path(self, z: Array) -> Path:
        """The trajectory at a control."""
        begun, noise = self.begin(z[: self.size]), self.noise(z)

        def move(carry: tuple, item: tuple) -> tuple[tuple, tuple]:
            moved = begun.chain.step(carry[0], carry[1], item[1], item[0])
            return (moved.state, moved.riders), (moved.state, moved.riders)

        _, (states, riders) = jax.lax.scan(move, (begun.state, begun.riders), (noise, self.times))
        states = jnp.concatenate([begun.state[None], states])
        return Path(states, noise, [jnp.concatenate([r[None], v]) for r, v in zip(begun.riders, riders, strict=True)])


def _until(move: Callable, horizon: Array, first: Array) -> Callable:
    """A step that does nothing beyond a horizon: not run, so that its overflow cannot reach a derivative."""

    def until(carry: tuple, item: tuple) -> tuple[tuple, Array]:
        kept = jax.eval_shape(move, carry, item)[1]
        return jax.lax.cond(item[1] - first < horizon, move, lambda c, _: (c, jnp.zeros_like(kept)), carry, item)

    return until


def misfit(observed: Observed) -> tuple[Array, Array]:
    """R^-1/2 (mean - data), 0 where missing, R held fixed; and minus the log density of the data."""
    present = ~jnp.isnan(observed.data)
    noise = jax.lax.stop_gradient(observed.noise)
    spread = jnp.sqrt(noise) if noise.ndim == 1 else noise
    difference = observed.mean - jnp.where(present, observed.data, 0.0)
    cost = -sum((jnp.sum(v) for v in observed.log_prob.values()), jnp.zeros(()))
    return whiten(difference, spread, present), cost


def first_stretch(chain: Chain, strong: bool, length: int) -> Stretch:
    """The first steps of a chain, from the model's own initial law; noise of parameters in the state comes first."""
    k, q = chain.joined_size, chain.noise_dimension

    def begin(z: Array) -> Begun:
        inner = chain.at(z[:k])
        state, riders, observed = inner.start(z[k:])
        w, phi = misfit(observed)
        phi = phi - inner.static_log_likelihood() if k else phi
        return Begun(inner, state, riders, w, phi)

    times = jnp.arange(length)
    return Stretch(begin, chain.initial_dimension, times, times < chain.structure.length, 0 if strong else q, q)


def later_stretch(
    chain: Chain, strong: bool, background: tuple[Array, Array], riders: list[Array], times: Array, counted: Array
) -> Stretch:
    """Steps from a background N(mean, root root^T)."""
    mean, root = background
    q = chain.noise_dimension

    def begin(z: Array) -> Begun:
        return Begun(chain, mean + root @ z, riders, jnp.zeros(0), jnp.zeros(()))

    return Stretch(begin, mean.shape[0], times, counted, 0 if strong else q, q)


def _scan(move: Callable, start: Any, items: tuple) -> tuple[Any, Array]:
    """`lax.scan`; long ones in rows that are computed again for the adjoint (Griewank 1992)."""
    length = items[1].shape[0]
    if length <= _LONG:
        return jax.lax.scan(move, start, items)
    rows = int(length**0.5)
    full = length - length % rows
    inner = jax.checkpoint(lambda carry, item: jax.lax.scan(move, carry, item))
    cut = jax.tree.map(lambda v: v[:full].reshape(rows, full // rows, *v.shape[1:]), items)
    carry, out = jax.lax.scan(inner, start, cut)
    out = out.reshape(full, *out.shape[2:])
    if full == length:
        return carry, out
    carry, rest = jax.lax.scan(move, carry, jax.tree.map(lambda v: v[full:], items))
    return carry, jnp.concatenate([out, rest])


def minimise(stretch: Stretch, iterations: int, solver_steps: int) -> Minimum:
    """The mode; a long stretch is taken up bit by bit, each part from the minimum of the one before.

    Where errors grow, J over many steps has minima that J over few has not; data of a horizon that doubles keep the
    start near the right one. A horizon whose minimum took a single step, as in a linear model, grows eightfold.

    Source: Pires, Vautard and Talagrand 1996, "On extending the limits of variational assimilation in nonlinear chaotic
    systems", Tellus A 48, doi:10.3402/tellusa.v48i1.11634 (quasi-static variational assimilation).
    """
    length = stretch.times.shape[0]
    options = {"iterations": iterations, "solver_steps": solver_steps}
    nothing = jnp.zeros(stretch.dimension)
    if length <= _SHORT:
        return variational.gauss_newton(stretch.run, nothing, **options)

    def grow(state: tuple) -> tuple:
        before, horizon, took = state
        horizon = jnp.minimum(horizon * jnp.where(took <= 2, 8, 2), length)
        found = variational.gauss_newton(stretch._replace(horizon=horizon).run, before.z, **options)
        iterations, solved = before.iterations + found.iterations, before.solver_steps + found.solver_steps
        return found._replace(iterations=iterations, solver_steps=solved), horizon, found.iterations

    zero, none = jnp.zeros(()), jnp.asarray(0)
    first = Minimum(nothing, zero, zero, none, none, jnp.asarray(False))
    return jax.lax.while_loop(lambda s: s[1] < length, grow, (first, jnp.asarray(1), none))[0]


class Around(NamedTuple):
    """The posterior of a stretch: its mode, the tangent there, columns K with K K^T = H^-1, and the evidence.

    K is exact up to 1000 dimensions, else the scaled deviations of draws.
    """

    mode: Minimum
    tangent: Tangent
    columns: Array
    evidence: Array
    error: Array


def around(stretch: Stretch, mode: Minimum, key: Key, solver_steps: int, *, columns: bool) -> Around:
    """Curvature and evidence at a mode: ``log p(y) = -J(z) - log det H / 2``, Laplace's.

    Args:
        stretch: the stretch.
        mode: its minimum.
        key: typed JAX key, of the estimates in large dimensions.
        solver_steps: steps of conjugate gradients at most.
        columns: whether the columns of large problems are needed.
    """
    tangent, d = variational.linearize(stretch.run, mode.z), stretch.dimension
    if d <= _DENSE:
        root, log_det = variational.covariance_root(tangent, d)
        return Around(mode, tangent, root, -mode.objective - 0.5 * log_det, jnp.zeros(()))
    first, second = jax.random.split(key)
    log_det, error = variational.log_determinant(tangent, d, first)
    spread = jnp.zeros((d, 0))
    if columns:
        drawn = laplace_draws(tangent, mode.z, second, _PROBED, solver_steps)
        spread = (drawn - mode.z).T / _PROBED**0.5
    return Around(mode, tangent, spread, -mode.objective - 0.5 * log_det, 0.5 * error)


def laplace_draws(tangent: Tangent, mode: Array, key: Key, draws: int, solver_steps: int) -> Array:
    """Draws (draws, d) of N(mode, H^-1) by conjugate gradients."""

    def one(k: Array) -> Array:
        noise = variational.perturbation(k, mode.shape[0], tangent.w.shape[0])
        return variational.laplace_draw(tangent, mode, noise, solver_steps=solver_steps)

    return jax.lax.map(one, jax.random.split(key, draws), batch_size=min(_BATCH, draws))


def randomised_draws(
    stretch: Stretch, at: Around, key: Key, draws: int, iterations: int, solver_steps: int
) -> tuple[Array, Array]:
    """Draws (draws, d) by minimising again with perturbed data and prior mean, and how many did not converge."""
    mode = at.mode.z

    def one(k: Array) -> tuple[Array, Array]:
        noise = variational.perturbation(k, mode.shape[0], at.tangent.w.shape[0])
        start = variational.laplace_draw(at.tangent, mode, noise, solver_steps=solver_steps)
        options = {"iterations": iterations, "solver_steps": solver_steps}
        found = variational.randomised_draw(stretch.run, start, noise, **options)
        return found.z, ~found.converged

    drawn, late = jax.lax.map(one, jax.random.split(key, draws), batch_size=min(_BATCH, draws))
    return drawn, jnp.sum(late)


def end_root(stretch: Stretch, at: Around, steps: int) -> tuple[Array, Array]:
    """State after some steps at the mode (n,), and a root (n, n) of its covariance by the tangent."""

    def end(z: Array) -> Array:
        return stretch.path(z).states[steps]

    state, push = jax.linearize(end, at.mode.z)
    moved = jax.vmap(push)(at.columns.T)
    return state, jnp.linalg.qr(moved, mode="r").T


def site_moments(stretch: Stretch, at: Around, rows: slice) -> dict[str, Array]:
    """Sites of some steps at the mode, and their standard deviations by the tangent there, (2, rows, ...)."""

    def sites(z: Array) -> dict[str, Array]:
        return path_sites(stretch, z, rows)

    mean, push = jax.linearize(sites, at.mode.z)

    def add(total: dict[str, Array], column: Array) -> tuple[dict[str, Array], None]:
        return jax.tree.map(lambda s, v: s + v**2, total, push(column)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, mean), at.columns.T)
    return jax.tree.map(lambda m, v: jnp.stack([m, jnp.sqrt(v)]), mean, total)


def path_sites(stretch: Stretch, z: Array, rows: slice) -> dict[str, Array]:
    """Floating sites of some steps at a control, leading axis time."""
    inner, path = stretch.begin(z[: stretch.size]).chain, stretch.path(z)
    before = [r[:-1][rows] for r in path.riders]
    states, noise = path.states[:-1][rows], path.noise[rows]
    found = trajectories.along(inner, before, states[:, None], noise[:, None], stretch.times[rows])["values"]
    return {n: v[:, 0] for n, v in found.items() if jnp.issubdtype(v.dtype, jnp.floating)}
