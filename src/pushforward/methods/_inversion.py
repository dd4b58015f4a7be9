"""The engine of ensemble Kalman inversion: steps of a schedule, members that fail, and what is kept of a run.

Members z (J, d) move along ``prior * likelihood^t`` from t = 0. A step needs the outputs of all members; those that
failed take no part in it and are then drawn anew from the Gaussian of the others, in the span of the others' anomalies.
All of that is one matrix of weights, so a step reads the members once; a localised update goes block by block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._types import Array, Key
from pushforward.math import inversion, inversion_local
from pushforward.math.inversion_local import Term

LONGEST = 200
"""Steps at most."""
FEW, SAME_MEMBERS, SAME_OUTPUTS = 1, 2, 3
"""Why a run stopped early."""
_ROUNDING = 1e-6
"""What is left of the time is none."""
_KEPT = 40
"""Steps whose runs are kept at most."""
_ENTRIES = 4_000_000
"""Numbers of kept runs at most."""

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
        ran: members and their outputs in the data's own units at the last steps, (steps, J, d) and (steps, J, m), step
            k in row k modulo their number; NaN for members that failed. None where they would be too large.
    """

    z: Array
    time: Array
    steps: Array
    failed: Array
    stopped: Array
    sizes: Array
    misfits: Array
    ran: tuple[Array, Array] | None = None

    @classmethod
    def start(cls, z: Array, longest: int = LONGEST, *, m: int = 0, steps: int = _KEPT) -> "Inversion":
        """Before the first step.

        Args:
            z: members, (J, d).
            longest: steps at most.
            m: number of data, for keeping the outputs; 0 keeps none.
            steps: number of steps, where it is known.
        """
        none, empty = jnp.zeros((), int), jnp.full(longest, jnp.nan, z.dtype)
        kept = min(steps, _KEPT, _ENTRIES // (len(z) * (z.shape[1] + m)))
        ran = (jnp.full((kept, *z.shape), jnp.nan), jnp.full((kept, len(z), m), jnp.nan)) if m and kept else None
        return cls(z, jnp.zeros((), z.dtype), none, none, none, empty, empty, ran)

    def recorded(self, outputs: Array | None, present: Array) -> tuple[Array, Array] | None:
        """`ran` with the members and the outputs (J, m) of the step that begins here."""
        if self.ran is None or outputs is None:
            return self.ran
        members, values = self.ran
        row = self.steps % len(members)
        known = jnp.where(present[:, None], outputs, jnp.nan)
        return members.at[row].set(self.z), values.at[row].set(known.astype(values.dtype))


class Step(eqx.Module):
    """What one step is told.

    Attributes:
        outputs: whitened, (J, m).
        data: whitened, (m,), NaN where missing or not used in this step.
        noise: standard normal noise of the data, (J, m), for updates that perturb; None for others.
        present: which members succeeded, (J,).
        plain: outputs in the data's own units, (J, m), where they are to be kept.
    """

    outputs: Array
    data: Array
    noise: Array | None
    present: Array
    plain: Array | None = None


class Update(NamedTuple):
    """An update rule.

    Attributes:
        weights: (z, outputs, data, h, noise) -> weights (J, J) of the new members.
        terms: (outputs, data, h, noise) -> its gains, which a localisation tapers; None where there is no such form.
    """

    weights: Callable[[Array, Array, Array, Array, Array | None], Array]
    terms: Callable[[Array, Array, Array, Array | None], tuple[Term, ...]] | None


UPDATES = {
    "transform": Update(
        lambda z, g, data, h, noise: inversion.transform(g, data, h),
        lambda g, data, h, noise: inversion_local.transform_terms(g, data, h),
    ),
    "perturbed": Update(
        lambda z, g, data, h, noise: inversion.perturbed(g, data, h, _given(noise)),
        lambda g, data, h, noise: inversion_local.perturbed_terms(g, data, h, _given(noise)),
    ),
    "unperturbed": Update(
        lambda z, g, data, h, noise: inversion.unperturbed(g, data, h),
        lambda g, data, h, noise: inversion_local.unperturbed_terms(g, data, h),
    ),
    "tikhonov": Update(
        lambda z, g, data, h, noise: inversion.transform(*inversion.with_prior(z, g, data), h),
        None,
    ),
}


def _given(noise: Array | None) -> Array:
    assert noise is not None
    return noise


def moved(s: Inversion, told: Step, h: Array, update: Update, key: Key, local: Any = None) -> Inversion:
    """After an update of size h; the time is the caller's.

    With n successes of J members the anomalies of the successes are scaled by ``sqrt((J - 1) / (n - 1))`` and the
    others' are zero, so that every update sees the sample moments of the successes, and scaled back afterwards.

    Args:
        s: where the run stands.
        told: what the step is told.
        h: size of the step.
        update: rule.
        key: for the members that are drawn anew.
        local: (z, outputs, terms, count) -> z after the terms of the update, localised; or None.
    """
    count, n = s.z.shape[0], jnp.sum(told.present)
    scale = jnp.sqrt((count - 1) / jnp.maximum(n - 1, 1)).astype(s.z.dtype)
    g = _masked(told.outputs, told.present, scale)
    noise = told.noise
    if noise is not None:
        noise = _masked(noise, told.present, scale)
        noise = noise - jnp.mean(noise, 0)
    stopped = jnp.where(n < 2, FEW, jnp.where(_same(s.z), SAME_MEMBERS, jnp.where(_same(g), SAME_OUTPUTS, 0)))
    # With more parameters than members everything is done to weights, which then meet the members once.
    few = count <= s.z.shape[1] and local is None
    own = jnp.eye(count, dtype=s.z.dtype) if few else s.z
    masked = _masked(own, told.present, scale)
    if local is None:
        after = update.weights(_masked(s.z, told.present, scale), g, told.data, h, noise) @ masked
    else:
        assert update.terms is not None
        after = local(masked, g, update.terms(g, told.data, h, noise), n)
    after = jnp.where(stopped == 0, _restored(after, told.present, scale, key), own)
    z = after @ s.z if few else after
    size = jnp.where(jnp.isnan(told.data), 0.0, told.data - told.outputs)
    misfit = jnp.sum(jnp.where(told.present, 0.5 * jnp.sum(size**2, -1), 0.0)) / jnp.maximum(n, 1)
    return Inversion(
        z.astype(s.z.dtype),
        s.time,
        s.steps + 1,
        s.failed + (count - n),
        stopped,
        s.sizes,
        s.misfits.at[s.steps].set(misfit),
        s.recorded(told.plain, told.present),
    )


def _restored(rows: Array, present: Array, scale: Array, key: Key) -> Array:
    """Rows after an update, anomalies scaled back; those that failed are drawn from the Gaussian of the others."""
    count, n, mean = len(rows), jnp.sum(present), jnp.mean(rows, 0)
    anomalies = jnp.where(present[:, None], (rows - mean) / scale, 0.0)

    def filled(anomalies: Array) -> Array:
        noise = jax.random.normal(key, (count, count), anomalies.dtype)
        drawn = noise @ anomalies / jnp.sqrt(jnp.maximum(n - 1.0, 1.0)).astype(anomalies.dtype)
        return jnp.where(present[:, None], anomalies, drawn)

    return mean + jax.lax.cond(n < count, filled, lambda x: x, anomalies)


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
