"""Climbing an objective over unknown numbers: Adam or L-BFGS, with the last good numbers kept where it breaks down."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._runner import Runner
from pushforward._types import Array
from pushforward.learned.unknowns import Objective

OPTIMIZERS = ("auto", "adam", "lbfgs")
_CLIP = 10.0
_MEMORY, _SEARCH = 10, 20
_SHARE, _TYPICAL, _LEAST = 0.03, 0.03, 1e-5
"""Share of a standard error over which curvature is measured, the standard error first taken, and the least length."""
_ROUNDING = 8.0
"""Gains below so many units of rounding of the objective count as none."""


class Climb(eqx.Module):
    """Where a climb stands.

    Attributes:
        flat: the unknowns.
        moments: of the optimiser.
        best: unknowns of the highest value so far.
        highest: that value.
        curve: value by step (steps,), NaN where none was taken.
        broken: the step at which value or gradient were not finite; -1 while all is well.
        idle: steps in a row that brought nothing.
        steps: steps taken.
    """

    flat: Array
    moments: Any
    best: Array
    highest: Array
    curve: Array
    broken: Array
    idle: Array
    steps: Array

    @property
    def done(self) -> Array:
        """Whether a step broke down, or nothing more is gained."""
        return (self.broken >= 0) | (self.idle >= 2)


def climb(
    objective: Objective, start: Array, kind: str, steps: int, rate: float, tolerance: float, runner: Runner
) -> Climb:
    """Maximise an objective.

    Args:
        objective: what is maximised.
        start: the unknowns (p,).
        kind: "adam" or "lbfgs".
        steps: at most.
        rate: of Adam; it falls to zero along half a cosine.
        tolerance: gain of a step of L-BFGS below which, twice in a row, it ends.
        runner: compiles, shows progress and checkpoints.
    """
    state = begin(objective, start, kind, steps)
    return runner.loop(_advance, state, steps, objective, kind, steps, rate, tolerance)


def begin(objective: Objective, start: Array, kind: str, steps: int) -> Climb:
    """A climb before its first step."""
    low = jnp.full((), -jnp.inf, start.dtype)
    moments = _optimiser(kind).init(start)
    none, zero = jnp.full((), -1), jnp.zeros((), int)
    return Climb(start, moments, start, low, jnp.full(steps, jnp.nan, start.dtype), none, zero, zero)


def _optimiser(kind: str) -> Any:
    import optax

    if kind == "adam":
        return optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam())
    return optax.lbfgs(memory_size=_MEMORY, linesearch=optax.scale_by_zoom_linesearch(_SEARCH))


def _advance(
    state: Climb, start: Array, stop: Array, objective: Objective, kind: str, steps: int, rate: float, tolerance: float
) -> Climb:
    def going(carry: tuple[Array, Climb]) -> Array:
        return (carry[0] < stop) & ~carry[1].done

    step = _adam(objective, steps, rate) if kind == "adam" else _newton(objective, tolerance)
    return jax.lax.while_loop(going, lambda c: (c[0] + 1, step(c[1], c[0])), (start, state))[1]


def _adam(objective: Objective, steps: int, rate: float) -> Callable[[Climb, Array], Climb]:
    optimiser = _optimiser("adam")

    def step(s: Climb, i: Array) -> Climb:
        value, slope = jax.value_and_grad(objective)(s.flat, i)
        good = jnp.isfinite(value) & jnp.all(jnp.isfinite(slope))
        change, moments = optimiser.update(jnp.where(good, slope, 0.0), s.moments)
        now = 0.5 * rate * (1 + jnp.cos(jnp.pi * i / steps))
        return _noted(s, value, good, i, s.flat + jnp.where(good, now * change, 0.0), moments)

    return step


def _newton(objective: Objective, tolerance: float) -> Callable[[Climb, Array], Climb]:
    import optax

    optimiser = _optimiser("lbfgs")
    zero = jnp.zeros((), int)

    def loss(flat: Array) -> Array:
        value = -objective(flat, zero)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    ask = optax.value_and_grad_from_state(loss)

    def step(s: Climb, i: Array) -> Climb:
        asked: Any = ask(s.flat, state=s.moments)
        value, slope = asked
        good = jnp.isfinite(value) & jnp.all(jnp.isfinite(slope))
        found: Any = optimiser.update(slope, s.moments, s.flat, value=value, grad=slope, value_fn=loss)
        change, moments = found
        moved = jnp.where(good & jnp.all(jnp.isfinite(change)), s.flat + change, s.flat)
        least = jnp.maximum(tolerance, _ROUNDING * jnp.finfo(value.dtype).eps * jnp.abs(value))
        idle = jnp.where(-value - s.highest < least, s.idle + 1, 0)
        after = _noted(s, -value, good, i, moved, moments)
        return eqx.tree_at(lambda c: c.idle, after, idle)

    return step


def _noted(s: Climb, value: Array, good: Array, i: Array, moved: Array, moments: Any) -> Climb:
    """The state after a step; where it broke down the unknowns are those of the highest value before."""
    better = good & (value > s.highest)
    return Climb(
        jnp.where(good, moved, s.best),
        moments,
        jnp.where(better, s.flat, s.best),
        jnp.where(better, value, s.highest),
        s.curve.at[i].set(value),
        jnp.where(good, s.broken, i),
        s.idle,
        s.steps + 1,
    )


def maximise(objective: Objective, start: Array, steps: int) -> Array:
    """The highest point that some steps of L-BFGS from `start` find; never one below it. For use inside `jit`."""
    state = begin(objective, start, "lbfgs", steps)
    return _advance(state, jnp.zeros((), int), jnp.asarray(steps), objective, "lbfgs", steps, 0.0, 0.0).best


class Rounds(eqx.Module):
    """Where EM stands.

    Attributes:
        flat: the unknowns.
        curve: log likelihood of the unknowns that each round began with.
        broken: the round at which it was not finite; -1 while all is well.
        good: unknowns of the last round whose log likelihood was finite.
        steps: rounds taken.
        idle: rounds in a row that gained less than the tolerance.
    """

    flat: Array
    curve: Array
    broken: Array
    good: Array
    steps: Array
    idle: Array


def rounds(
    expect: Any, unknowns: Any, start: Array, total: int, inner: int, tolerance: float, key: Any, runner: Runner
) -> Rounds:
    """Rounds of EM.

    Args:
        expect: the E step, ``expect(unknowns, flat, key) -> (objective, log likelihood)``.
        unknowns: of the model.
        start: (p,).
        total: rounds at most.
        inner: steps of L-BFGS in an M step.
        tolerance: gain of the log likelihood in a round below which, three times in a row, it ends.
        key: typed JAX key; each round draws from one of its own.
        runner: compiles, shows progress and checkpoints.
    """
    none, zero = jnp.full((), -1), jnp.zeros((), int)
    state = Rounds(start, jnp.full(total, jnp.nan, start.dtype), none, start, zero, zero)
    return runner.loop(_rounds, state, total, expect, unknowns, inner, tolerance, key)


def _rounds(
    state: Rounds, start: Array, stop: Array, expect: Any, unknowns: Any, inner: int, tolerance: float, key: Any
) -> Rounds:
    def going(carry: tuple[Array, Rounds]) -> Array:
        return (carry[0] < stop) & (carry[1].broken < 0) & (carry[1].idle < 3)

    def step(carry: tuple[Array, Rounds]) -> tuple[Array, Rounds]:
        i, s = carry
        objective, value = expect(unknowns, s.flat, jax.random.fold_in(key, i))
        fine = jnp.isfinite(value)
        moved = maximise(objective, s.flat, inner)
        gain = value - jnp.where(i > 0, s.curve[i - 1], -jnp.inf)
        return i + 1, Rounds(
            jnp.where(fine, moved, s.good),
            s.curve.at[i].set(value),
            jnp.where(fine, s.broken, i),
            jnp.where(fine, s.flat, s.good),
            s.steps + 1,
            jnp.where(gain < tolerance, s.idle + 1, 0),
        )

    return jax.lax.while_loop(going, step, (start, state))[1]


def curvature(objective: Objective, flat: Array) -> tuple[Array, Array]:
    """Gradient and negative Hessian of an objective.

    Central differences of the gradient over 3 % of each unknown's standard error: second derivatives through an
    ensemble filter take minutes to compile, and at a point they say more of its few random numbers than of the data.
    """
    zero = jnp.zeros((), int)
    unit = jnp.eye(flat.size, dtype=flat.dtype)

    def better(_: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        size = jnp.maximum(jnp.abs(jnp.diagonal(found[1])), _SHARE**2)
        lengths = jnp.clip(_SHARE / jnp.sqrt(size), _LEAST, 1.0)[:, None]
        moves = jnp.concatenate([lengths * unit, -lengths * unit, jnp.zeros_like(unit[:1])])
        slopes = jax.lax.map(lambda move: jax.grad(objective)(flat + move, zero), moves)
        matrix = (slopes[flat.size : -1] - slopes[: flat.size]) / (2 * lengths)
        return slopes[-1], 0.5 * (matrix + matrix.T)

    # The first pass knows no standard errors; it takes those of numbers that a thousand data inform.
    return jax.lax.fori_loop(0, 3, better, (jnp.zeros_like(flat), unit / _TYPICAL**2))
