"""Windows of 4DVar, one after the other: each starts from a background, is minimised, and hands its mode on.

All data in one window is the case of a single one. Windows have one length; steps of the last one that lie beyond the
data do not count.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.math import variational
from pushforward.methods._climatology import climatology
from pushforward.methods._four_dvar import (
    Around,
    Path,
    Stretch,
    around,
    end_root,
    first_stretch,
    laplace_draws,
    later_stretch,
    minimise,
    randomised_draws,
    site_moments,
)
from pushforward.model.state_space import Chain


class Plan(NamedTuple):
    """Options of a run.

    Attributes:
        strong: whether step noise is held at zero.
        length: steps of a window.
        shift: steps between the starts of two windows.
        covariance: "climatology", "flow", or the background covariance (n, n).
        scale: factor of it.
        sampler: "randomised", "laplace" or "mode".
        iterations: outer iterations at most.
        solver_steps: steps of conjugate gradients at most.
    """

    strong: bool
    length: int
    shift: int
    covariance: Any
    scale: float
    sampler: str
    iterations: int
    solver_steps: int

    def count(self, steps: int) -> int:
        """Number of windows."""
        return 1 + -(-(steps - self.length) // self.shift)


class Background(NamedTuple):
    """N(mean, root root^T) of the state where a window starts, and what rides along there."""

    mean: Array
    root: Array
    riders: list[Array]


class Rows(NamedTuple):
    """Some steps of draws of a trajectory: states before them (draw, rows, n), their noise, riders (rows, ...)."""

    states: Array
    noise: Array
    riders: list[Array]


class Drawn(NamedTuple):
    """Draws of a window: controls (draw, d), states before and after its steps (draw, L + 1, n), noise, riders."""

    controls: Array
    states: Array
    noise: Array
    riders: list[Array]

    def rows(self, start: int, stop: int) -> Rows:
        """Some of the window's steps."""
        return Rows(self.states[:, start:stop], self.noise[:, start:stop], [r[start:stop] for r in self.riders])


class Totals(eqx.Module):
    """Sums over windows; `decrement` is the largest, `late` counts windows that did not converge."""

    evidence: Array
    evidence_variance: Array
    objective: Array
    iterations: Array
    solver_steps: Array
    decrement: Array
    late: Array
    late_draws: Array


class Cycled(NamedTuple):
    """What a run found.

    Attributes:
        initial: noise of the initial state, (draw, k).
        smoothing: all steps, each from the last window that holds it.
        filtering: all steps, each from the window that assimilates its data.
        moments: mean and standard deviation of sites in that window, (2, T, ...).
        last: draws of the last window.
        stretch: the last window.
        offset: steps of the last window within the data.
        totals: sums.
    """

    initial: Array
    smoothing: Rows
    filtering: Rows
    moments: dict[str, Array]
    last: Drawn
    stretch: Stretch
    offset: int
    totals: Totals


def cycle(chain: Chain, plan: Plan, key: Key, draws: int, store: str) -> Cycled:
    """Run all windows.

    Args:
        chain: the model at its parameters.
        plan: options.
        key: typed JAX key.
        draws: draws of the control; with `store="draws"` in each window, else in the last.
        store: as of state methods.
    """
    steps, length, shift = chain.structure.length, plan.length, plan.shift
    count, each = plan.count(steps), draws if store == "draws" else 0
    own, of_root, of_last = jax.random.split(key, 3)
    static = _static_root(chain, plan, of_root) if count > 1 else jnp.zeros((0, 0))
    moments = store == "moments"

    def solve(stretch: Stretch, j: Array | int, fresh: int) -> tuple:
        found = minimise(stretch, plan.iterations, plan.solver_steps)
        keys = jax.random.split(jax.random.fold_in(own, j), 2)
        at = around(stretch, found, keys[0], plan.solver_steps, columns=moments or plan.covariance == "flow")
        mode = stretch.path(found.z)
        drawn, late = _sample(stretch, at, mode, plan, keys[1], each)
        kept = site_moments(stretch, at, slice(length - fresh, length)) if moments else {}
        after = _hand_on(stretch, plan, at, mode, static) if count > 1 else ()
        return drawn, kept, after, _sums(at, late)

    first = first_stretch(chain, plan.strong, length)
    drawn, kept, background, totals = solve(first, 0, length)
    head, fresh = drawn.rows(0, shift), drawn.rows(0, length)
    initial, last, stretch = drawn.controls[:, : first.size], drawn, first
    if count > 1:

        def move(carry: tuple, j: Array) -> tuple[tuple, tuple]:
            now, totals = carry
            drawn, kept, after, sums = solve(_later(chain, plan, now, j), j, shift)
            whole = (drawn, now)
            return (after, _plus(totals, sums)), (drawn.rows(0, shift), drawn.rows(length - shift, length), kept, whole)

        carry, out = jax.lax.scan(move, (background, totals), jnp.arange(1, count))
        totals = carry[1]
        last, now = jax.tree.map(lambda v: v[-1], out[3])
        stretch = _later(chain, plan, now, jnp.asarray(count - 1))
        head = _joined([head, _unrolled(out[0]), last.rows(shift, length)], steps)
        fresh = _joined([fresh, _unrolled(out[1])], steps)
        kept = {n: jnp.concatenate([v, _flat(out[2][n])], 1)[:, :steps] for n, v in kept.items()}
    else:
        head = fresh
    if not each:
        last = _again(stretch, plan, last.controls[0], of_last, draws)
        initial = jnp.broadcast_to(initial, (last.controls.shape[0], first.size)) if count > 1 else last.controls
    offset = steps - (count - 1) * shift
    return Cycled(initial[:, : first.size], head, fresh, kept, last, stretch, offset, totals)


def _later(chain: Chain, plan: Plan, background: Background, j: Array) -> Stretch:
    """Window j, of which only the last `shift` steps have data that were not seen before."""
    within = jnp.arange(plan.length)
    times = j * plan.shift + within
    counted = (within >= plan.length - plan.shift) & (times < chain.structure.length)
    return later_stretch(chain, plan.strong, (background.mean, background.root), background.riders, times, counted)


def _static_root(chain: Chain, plan: Plan, key: Key) -> Array:
    """A root of the background covariance, which does not change; nothing where it follows the flow."""
    if isinstance(plan.covariance, str) and plan.covariance == "flow":
        return jnp.zeros((0, 0))
    given = climatology(chain, key) if isinstance(plan.covariance, str) else plan.covariance
    values, vectors = jnp.linalg.eigh(plan.scale * given)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T


def _hand_on(stretch: Stretch, plan: Plan, at: Around, mode: Path, static: Array) -> Background:
    """The next background: the mode `shift` steps into the window."""
    riders = [r[plan.shift] for r in mode.riders]
    if isinstance(plan.covariance, str) and plan.covariance == "flow":
        mean, root = end_root(stretch, at, plan.shift)
        return Background(mean, plan.scale**0.5 * root, riders)
    return Background(mode.states[plan.shift], static, riders)


def _sample(stretch: Stretch, at: Around, mode: Path, plan: Plan, key: Key, draws: int) -> tuple[Drawn, Array]:
    """Draws of a window, and how many of them did not converge; of none, the mode."""
    late = jnp.asarray(0)
    if not draws or plan.sampler == "mode":
        return Drawn(at.mode.z[None], mode.states[None], mode.noise[None], mode.riders), late
    if plan.sampler == "laplace":
        controls = laplace_draws(at.tangent, at.mode.z, key, draws, plan.solver_steps)
    else:
        controls, late = randomised_draws(stretch, at, key, draws, plan.iterations, plan.solver_steps)
    paths = jax.vmap(stretch.path)(controls)
    return Drawn(controls, paths.states, paths.noise, mode.riders), late


def _again(stretch: Stretch, plan: Plan, mode: Array, key: Key, draws: int) -> Drawn:
    """Draws of a window whose mode is known."""
    zero = jnp.zeros(())
    found = variational.Minimum(mode, zero, zero, jnp.asarray(0), jnp.asarray(0), jnp.asarray(True))
    tangent = variational.linearize(stretch.run, mode)
    return _sample(stretch, Around(found, tangent, zero, zero, zero), stretch.path(mode), plan, key, draws)[0]


def _sums(at: Around, late_draws: Array) -> Totals:
    mode = at.mode
    late = jnp.asarray(~mode.converged, int)
    work = (mode.iterations, mode.solver_steps, mode.decrement, late, late_draws)
    return Totals(at.evidence, at.error**2, mode.objective, *work)


def _plus(one: Totals, more: Totals) -> Totals:
    found = jax.tree.map(jnp.add, one, more)
    return eqx.tree_at(lambda t: t.decrement, found, jnp.maximum(one.decrement, more.decrement))


def _unrolled(rows: Rows) -> Rows:
    """Windows (window, draw, rows, ...) in a row: (draw, window rows, ...)."""

    def flat(v: Array) -> Array:
        return jnp.moveaxis(v, 0, 1).reshape(v.shape[1], v.shape[0] * v.shape[2], *v.shape[3:])

    riders = [r.reshape(r.shape[0] * r.shape[1], *r.shape[2:]) for r in rows.riders]
    return Rows(flat(rows.states), flat(rows.noise), riders)


def _joined(parts: list[Rows], steps: int) -> Rows:
    """One after the other, without what lies beyond the data."""
    riders = [jnp.concatenate(r)[:steps] for r in zip(*(p.riders for p in parts), strict=True)]
    states = jnp.concatenate([p.states for p in parts], 1)[:, :steps]
    return Rows(states, jnp.concatenate([p.noise for p in parts], 1)[:, :steps], riders)


def _flat(v: Array) -> Array:
    """Moments (window, 2, rows, ...) in a row: (2, window rows, ...)."""
    return jnp.moveaxis(v, 0, 1).reshape(2, -1, *v.shape[3:])
