"""Limited-memory BFGS for objectives that may fail: one evaluation a step, so that a run is shown and checkpointed.

A trial point is taken where the objective fell enough (Armijo); where it is not finite or too high, the step is cut.
The direction is the two-loop recursion of Nocedal (1980), Math. Comp. 35, doi:10.1090/S0025-5718-1980-0572855-7; pairs
of steps and slopes enter where their curvature is positive.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._runner import Runner
from pushforward._types import Array

_MEMORY = 12
_ENOUGH = 1e-4
_CUT = 0.3
_SHORTEST = 1e-9
_FIRST = 0.1
"""Length of the first step as a share of the weights' own."""
_QUIET = 2
"""Accepted steps in a row with less gain than the tolerance that end a run."""

type Objective = Callable[..., tuple[Array, Array]]
"""(weights, *static) -> value, and the number of the time step at which it failed, or -1."""


class Search(eqx.Module):
    """Where a run stands.

    Attributes:
        point: best weights so far.
        value: the objective there.
        slope: its gradient there.
        direction: of the present step.
        length: share of it to try next.
        moves: differences of accepted weights, (memory, p), latest last.
        changes: those of slopes.
        quiet: accepted steps in a row that gained little.
        failed: trials that were not finite.
        failed_at: time step at which the last of them failed, -1 for none.
        stuck: whether no step however short was any better.
        values: objective of each evaluation, NaN where it failed or was not needed.
    """

    point: Array
    value: Array
    slope: Array
    direction: Array
    length: Array
    moves: Array
    changes: Array
    quiet: Array
    failed: Array
    failed_at: Array
    stuck: Array
    values: Array

    @property
    def done(self) -> Array:
        """Whether there is nothing more to gain."""
        return (self.quiet >= _QUIET) | self.stuck


def minimise(
    objective: Objective, weights: Array, steps: int, tolerance: float, runner: Runner, static: tuple = ()
) -> Search:
    """Lower an objective from a starting point, where it must be finite (`Search.value` says whether it was).

    Args:
        objective: see `Objective`.
        weights: flat vector at the start.
        steps: evaluations at most, each with its gradient.
        tolerance: gain, in units of the objective, below which an accepted step counts as none.
        runner: compiles, shows and checkpoints.
        static: what `objective` needs beside the weights.
    """
    zero, none = jnp.zeros((_MEMORY, weights.size), weights.dtype), jnp.zeros((), int)
    start = Search(
        point=weights,
        value=jnp.asarray(jnp.inf, weights.dtype),
        slope=jnp.zeros_like(weights),
        direction=jnp.zeros_like(weights),
        length=jnp.zeros((), weights.dtype),
        moves=zero,
        changes=zero,
        quiet=none,
        failed=none,
        failed_at=jnp.full((), -1),
        stuck=jnp.zeros((), bool),
        values=jnp.full(steps, jnp.nan, weights.dtype),
    )
    return runner.loop(_advance, start, steps, objective, tolerance, static)


def _advance(state: Search, start: Array, stop: Array, objective: Objective, tolerance: float, static: tuple) -> Search:
    def going(carry: tuple[Array, Search]) -> Array:
        return (carry[0] < stop) & ~carry[1].done

    def body(carry: tuple[Array, Search]) -> tuple[Array, Search]:
        number, s = carry
        trial = s.point + s.length * s.direction
        (value, at), slope = jax.value_and_grad(lambda w: objective(w, *static), has_aux=True)(trial)
        return number + 1, _judged(s, number, trial, value, slope, at, tolerance)

    return jax.lax.while_loop(going, body, (start, state))[1]


def _judged(s: Search, number: Array, trial: Array, value: Array, slope: Array, at: Array, tolerance: float) -> Search:
    """The state after one evaluation."""
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(slope))
    first = number == 0
    taken = finite & (first | (value <= s.value + _ENOUGH * s.length * (s.slope @ s.direction)))
    move, change = trial - s.point, slope - s.slope
    curved = taken & ~first & (move @ change > 1e-10 * (move @ move))
    moves, changes = (
        jnp.where(curved, jnp.roll(old, -1, 0).at[-1].set(new), old)
        for old, new in ((s.moves, move), (s.changes, change))
    )
    gained = s.value - value
    quiet = jnp.where(taken & ~first, jnp.where(gained < tolerance, s.quiet + 1, 0), s.quiet)
    best, lowest, downhill = (
        jnp.where(taken, new, old) for new, old in ((trial, s.point), (value, s.value), (slope, s.slope))
    )
    direction = jnp.where(taken, _direction(best, downhill, moves, changes), s.direction)
    length = jnp.where(taken, 1.0, _CUT * s.length)
    return Search(
        point=best,
        value=lowest,
        slope=downhill,
        direction=direction,
        length=length,
        moves=moves,
        changes=changes,
        quiet=quiet,
        failed=s.failed + ~finite,
        failed_at=jnp.where(finite, s.failed_at, at),
        stuck=(first & ~finite) | (length < _SHORTEST),
        values=s.values.at[number].set(jnp.where(finite, value, jnp.nan)),
    )


def _direction(point: Array, slope: Array, moves: Array, changes: Array) -> Array:
    """- H slope by the two-loop recursion; without memory, downhill by a share of the weights' own length."""
    curvature = jnp.sum(moves * changes, 1)
    known = curvature > 0
    weight = jnp.where(known, 1 / jnp.where(known, curvature, 1.0), 0.0)

    def back(q: Array, item: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        move, change, rho = item
        a = rho * (move @ q)
        return q - a * change, a

    def forth(q: Array, item: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        move, change, rho, a = item
        return q + move * (a - rho * (change @ q)), None

    q, shares = jax.lax.scan(back, slope, (moves, changes, weight), reverse=True)
    last = changes[-1] @ changes[-1]
    size = jnp.sqrt(jnp.maximum(slope @ slope, jnp.finfo(slope.dtype).tiny))
    reach = _FIRST * jnp.maximum(jnp.sqrt(point @ point), 1e-2)
    scale = jnp.where(known[-1], curvature[-1] / jnp.where(known[-1], last, 1.0), reach / size)
    q, _ = jax.lax.scan(forth, scale * q, (moves, changes, weight, shares))
    return -q
