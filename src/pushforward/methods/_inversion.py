"""The engine of ensemble Kalman inversion: steps of a schedule, members that fail, and what is kept of a run.

Members z (J, d) move along ``prior * likelihood^t`` from t = 0. A step needs the outputs of all members; those that
failed take no part in it and are then drawn anew from the Gaussian of the others, in the span of the others' anomalies.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._types import Array, Key
from pushforward.math import inversion

LONGEST = 200
"""Steps at most."""
FEW, SAME_MEMBERS, SAME_OUTPUTS = 1, 2, 3
"""Why a run stopped early."""
_ROUNDING = 1e-6
"""What is left of the time is none."""

FAILURES = {
    FEW: (
        "fewer than 2 members have finite outputs of a credible size, so there is nothing to update. The result holds "
        "the last good ensemble. Look at the simulator's own errors, or narrow the prior to where it works."
    ),
    SAME_MEMBERS: (
        "all members are identical, so the ensemble has no spread that an update could use. "
        "Start from draws of the prior, with at least 2 different members."
    ),
    SAME_OUTPUTS: (
        "the outputs are the same for all members: the predictions do not depend on the latent sites within the "
        "ensemble. Check that the model uses them, and that the simulator does not round them away."
    ),
}


class Inversion(eqx.Module):
    """Where a run stands; arrays only.

    Attributes:
        z: members, (J, d).
        time: sum of the steps made.
        steps: their number.
        failed: members that failed so far, summed over the steps.
        stopped: why the run ended early, 0 where it did not.
        sizes: of the steps, (`LONGEST`,), NaN where there was none.
        misfits: mean of ``|y - G|^2 / 2`` before each step, alike.
    """

    z: Array
    time: Array
    steps: Array
    failed: Array
    stopped: Array
    sizes: Array
    misfits: Array

    @classmethod
    def start(cls, z: Array, longest: int = LONGEST) -> "Inversion":
        """Before the first step."""
        none, empty = jnp.zeros((), int), jnp.full(longest, jnp.nan, z.dtype)
        return cls(z, jnp.zeros((), z.dtype), none, none, none, empty, empty)


class Step(eqx.Module):
    """What one step is told.

    Attributes:
        outputs: whitened, (J, m).
        data: whitened, (m,), NaN where missing or not used in this step.
        noise: standard normal noise of the data, (J, m), for updates that perturb; None for others.
        present: which members succeeded, (J,).
    """

    outputs: Array
    data: Array
    noise: Array | None
    present: Array


type Update = Callable[[Array, Array, Array, Array, Array | None], Array]
"""(z, outputs, data, h, noise) -> z."""


def moved(s: Inversion, told: Step, h: Array, update: Update, key: Key) -> Inversion:
    """After an update of size h; the time is the caller's.

    With n successes of J members the anomalies of the successes are scaled by ``sqrt((J - 1) / (n - 1))`` and the
    others' are zero, so that every update sees the sample moments of the successes, and scaled back afterwards.
    """
    count, n = s.z.shape[0], jnp.sum(told.present)
    scale = jnp.sqrt((count - 1) / jnp.maximum(n - 1, 1)).astype(s.z.dtype)
    z, g = _masked(s.z, told.present, scale), _masked(told.outputs, told.present, scale)
    noise = told.noise
    if noise is not None:
        noise = _masked(noise, told.present, scale)
        noise = noise - jnp.mean(noise, 0)
    after = update(z, g, told.data, h, noise)
    mean = jnp.mean(after, 0)
    after = mean + (after - mean) / scale
    # The failed members are drawn anew from the Gaussian of the others.
    anomalies = jnp.where(told.present[:, None], after - mean, 0.0) / jnp.sqrt(jnp.maximum(n - 1.0, 1.0))

    def filled(after: Array) -> Array:
        drawn = mean + jax.random.normal(key, (count, count), after.dtype) @ anomalies
        return jnp.where(told.present[:, None], after, drawn)

    after = jax.lax.cond(n < count, filled, lambda x: x, after)
    stopped = jnp.where(n < 2, FEW, jnp.where(_same(s.z), SAME_MEMBERS, jnp.where(_same(g), SAME_OUTPUTS, 0)))
    size = jnp.where(jnp.isnan(told.data), 0.0, told.data - told.outputs)
    misfit = jnp.sum(jnp.where(told.present, 0.5 * jnp.sum(size**2, -1), 0.0)) / jnp.maximum(n, 1)
    return Inversion(
        jnp.where(stopped == 0, after, s.z).astype(s.z.dtype),
        s.time,
        s.steps + 1,
        s.failed + (count - n),
        stopped,
        s.sizes,
        s.misfits.at[s.steps].set(misfit),
    )


def _masked(rows: Array, present: Array, scale: Array) -> Array:
    """Rows whose mean is the successes', with their anomalies scaled and the others' zero."""
    known = jnp.where(present[:, None], rows, 0.0)
    mean = jnp.sum(known, 0) / jnp.maximum(jnp.sum(present), 1)
    return mean + jnp.where(present[:, None], scale * (known - mean), 0.0)


def _same(rows: Array) -> Array:
    """Whether all rows are equal, up to rounding."""
    spread = jnp.max(jnp.abs(rows - rows[0]))
    return spread <= 4 * jnp.finfo(rows.dtype).eps * jnp.max(jnp.abs(rows))


def ended(s: Inversion, time: float) -> Array:
    """Whether the time is used up."""
    return s.time >= time * (1 - _ROUNDING)


def next_step(s: Inversion, told: Step, schedule: str | int | tuple[float, ...], time: float, epoch: int) -> Array:
    """Size of the next step.

    Args:
        s: where the run stands.
        told: what the step is told.
        schedule: "adaptive", a number of equal steps (passes over the data), or the steps' alphas, h = 1 / alpha.
        time: the sum of all.
        epoch: steps in a pass over the data.
    """
    if schedule == "adaptive":
        misfits = inversion.misfit(told.outputs, told.data)
        count = jnp.sum(~jnp.isnan(told.data), dtype=misfits.dtype)
        h = inversion.adaptive_step(misfits, count, time - s.time, present=told.present)
        return h.astype(s.z.dtype)
    if isinstance(schedule, int):
        return jnp.asarray(time / schedule, s.z.dtype)
    sizes = 1 / np.asarray(schedule)
    return jnp.asarray(time * sizes / sizes.sum(), s.z.dtype)[s.steps // epoch]


def summary_of(s: Inversion) -> dict[str, Any]:
    """Numbers about a run, on the host."""
    steps = int(s.steps)
    return {
        "steps": steps,
        "time": float(s.time),
        "failed_evaluations": int(s.failed),
        "stopped": int(s.stopped),
        "step_sizes": np.asarray(s.sizes)[:steps],
        "misfits": np.asarray(s.misfits)[:steps],
    }
