"""The one training loop: Adam on a stochastic loss, a learning rate that falls when the loss does not, and an end."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key

_CLIP = 10.0
_DECAY, _DECAYS = 0.3, 3

type Loss = Callable[[Any, Key, Array], tuple[Array, Array]]
"""(weights, key, number of the step) -> a number whose slope is followed, and the loss, whose slope is not needed."""


class Training(eqx.Module):
    """Where a training stands.

    Attributes:
        weights: what is trained.
        moments: of the optimiser.
        step: number of the next step.
        rate: factor of the learning rate.
        decays: how often it was lowered.
        mark: the lowest mean loss of a window so far.
        total: sum of the losses of the window under way.
        curve: mean loss of each window, NaN where there was none.
        done: whether the last lowering brought nothing either.
    """

    weights: Any
    moments: Any
    step: Array
    rate: Array
    decays: Array
    mark: Array
    total: Array
    curve: Array
    done: Array


class Trainer(eqx.Module):
    """How to train.

    After each window of steps its mean loss is compared with the lowest before it. A gain below the tolerance
    lowers the learning rate by a factor of 0.3; the third time that this happens the training ends.

    Attributes:
        steps: at most.
        rate: learning rate of Adam at the start (Kingma and Ba 2015).
        window: number of steps.
        tolerance: gain of the mean loss over a window.
        patient: number of the first step that may lower the rate.
    """

    steps: int
    rate: float
    window: int = 50
    tolerance: float = 1e-3
    patient: int = 0

    def start(self, weights: Any) -> Training:
        """The training before its first step."""
        real = jnp.zeros(())
        windows = -(-self.steps // self.window)
        return Training(
            weights,
            self._optimiser().init(weights),
            jnp.zeros((), int),
            jnp.ones(()),
            jnp.zeros((), int),
            jnp.full((), jnp.inf),
            real,
            jnp.full(windows, jnp.nan),
            jnp.zeros((), bool),
        )

    def advance(self, state: Training, stop: Array, loss: Loss, key: Key) -> Training:
        """Carry a training on to step `stop`, or to its end; the key of a step depends on its number alone."""

        def going(s: Training) -> Array:
            return (s.step < stop) & ~s.done

        def step(s: Training) -> Training:
            slopes, value = jax.grad(loss, has_aux=True)(s.weights, jax.random.fold_in(key, s.step), s.step)
            return self._judged(self._moved(s, slopes, value), value)

        return jax.lax.while_loop(going, step, state)

    def _optimiser(self) -> Any:
        import optax

        return optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam())

    def _moved(self, s: Training, slopes: Any, value: Array) -> Training:
        """One step of Adam; a step whose loss or slope is not finite changes nothing."""
        good = jnp.isfinite(value)
        for leaf in jax.tree.leaves(slopes):
            good &= jnp.all(jnp.isfinite(leaf))
        found, moments = self._optimiser().update(slopes, s.moments)
        scale = self.rate * s.rate
        weights = jax.tree.map(lambda w, u: (w - scale * u).astype(w.dtype), s.weights, found)
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), (weights, moments), (s.weights, s.moments))
        return eqx.tree_at(lambda t: (t.weights, t.moments), s, kept)

    def _judged(self, s: Training, value: Array) -> Training:
        """Note the loss; at the end of a window decide on the learning rate."""
        total = s.total + value / self.window
        ends = (s.step + 1) % self.window == 0
        better = total < s.mark - self.tolerance
        stalled = ends & ~better & (s.step >= self.patient)
        decays = s.decays + stalled
        return Training(
            s.weights,
            s.moments,
            s.step + 1,
            jnp.where(stalled, _DECAY * s.rate, s.rate),
            decays,
            # What was reached at a noisier rate or an easier loss is no mark for what comes after.
            jnp.where(ends & (better | stalled | (s.step < self.patient)), total, s.mark),
            jnp.where(ends, 0.0, total),
            s.curve.at[jnp.where(ends, s.step // self.window, len(s.curve))].set(total, mode="drop"),
            stalled & (decays >= _DECAYS),
        )
