"""Fits of networks to simulations: epochs over a buffer, a held-out loss that lowers the learning rate, and an end.

The whole training is one compiled loop. Weights are one flat vector, so that the optimiser is a few operations whatever
the network.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key

_CLIP = 5.0
_DECAY = 0.2

type Loss = Callable[..., Array]
"""(*static, weights, batch with a leading axis, key) -> loss of each item of the batch."""


class Training(eqx.Module):
    """How a network is fitted to simulations.

    Adam (Kingma and Ba 2015) on mini-batches. The weights that are kept are a running mean of those of the optimiser
    (Polyak and Juditsky 1992), judged after each epoch by their loss on simulations held out. When it has not fallen
    for `patience` epochs, the learning rate is lowered by a factor of 5 and the best weights are taken up again; after
    the third time the training ends.

    Args:
        epochs: at most; one epoch sees every simulation once.
        batch_size: simulations per step.
        learning_rate: of Adam, at the start.
        patience: epochs without a better held-out loss.
        held_out: share of the simulations that judge and are not trained on.
        source: "buffer", simulations are drawn once and seen in each epoch; "stream", each epoch draws new ones, so
            that nothing can be learned by heart.

    Example:
        >>> import pushforward as pf
        >>> pf.Training(epochs=50).batch_size
        128
    """

    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 5e-3
    patience: int = 5
    held_out: float = 0.05
    source: str = "buffer"

    def __check_init__(self):
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MethodError(f"Training({name}=...) takes an integer of at least 1; got {value!r}.")
        if not isinstance(self.learning_rate, float) or not self.learning_rate > 0:
            raise MethodError(f"Training(learning_rate=...) takes a positive number; got {self.learning_rate!r}.")
        if not isinstance(self.held_out, float) or not 0 < self.held_out < 1:
            raise MethodError(f"Training(held_out=...) takes a number between 0 and 1; got {self.held_out!r}.")
        if self.source not in ("buffer", "stream"):
            raise MethodError(f'Training(source=...) takes "buffer" or "stream"; got {self.source!r}.')


class Fit(eqx.Module):
    """Where a fit stands.

    Attributes:
        weights: those of the optimiser.
        moments: of the optimiser.
        mean: running mean of the weights.
        best: weights of the lowest held-out loss, as a mean.
        lowest: that loss.
        stale: epochs since.
        decays: how often the learning rate was lowered.
        losses: training and held-out loss by epoch, (2, epochs), NaN where there was none.
    """

    weights: Array
    moments: Any
    mean: Array
    best: Array
    lowest: Array
    stale: Array
    decays: Array
    losses: Array

    @property
    def done(self) -> Array:
        """Whether the learning rate is so low that training brings nothing any more."""
        return self.decays > 2


def fit(
    loss: Loss,
    weights: Array,
    train: Any,
    held: Any,
    options: Training,
    key: Key,
    runner: Runner,
    static: tuple = (),
) -> Fit:
    """Fit weights to simulations.

    Args:
        loss: called as ``loss(*static, weights, batch, key)``, where `static` is hashable or arrays.
        weights: flat vector at the start.
        train: pytree of arrays with a leading axis, or with "stream" a function of a key that gives as many.
        held: the same, to judge by.
        options: how.
        key: typed JAX key.
        runner: compiles and checkpoints; an epoch is a step of its loop.
        static: what `loss` needs beside.
    """
    start = Fit(
        weights,
        _optimiser().init(weights),
        weights,
        weights,
        jnp.full((), jnp.inf, weights.dtype),
        jnp.zeros((), int),
        jnp.zeros((), int),
        jnp.full((2, options.epochs), jnp.nan, weights.dtype),
    )
    return runner.loop(_advance, start, options.epochs, train, held, key, loss, options, static)


def _optimiser() -> Any:
    import optax

    return optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam())


def _advance(
    state: Fit, start: Array, stop: Array, train: Any, held: Any, key: Key, loss: Loss, options: Training, static: tuple
) -> Fit:
    def going(carry: tuple[Array, Fit]) -> Array:
        epoch, s = carry
        return (epoch < stop) & ~s.done

    def body(carry: tuple[Array, Fit]) -> tuple[Array, Fit]:
        epoch, s = carry
        return epoch + 1, _epoch(s, epoch, jax.random.fold_in(key, epoch), train, held, loss, options, static)

    return jax.lax.while_loop(going, body, (start, state))[1]


def _epoch(s: Fit, epoch: Array, key: Key, train: Any, held: Any, loss: Loss, options: Training, static: tuple) -> Fit:
    """One pass over the simulations, then the judgement."""
    order, steps_key, data_key = jax.random.split(key, 3)
    data = train(data_key) if callable(train) else train
    size = jax.tree.leaves(data)[0].shape[0]
    batch = min(options.batch_size, size)
    steps = size // batch
    shuffled = jax.random.permutation(order, size)[: steps * batch].reshape(steps, batch)
    rate = options.learning_rate * _DECAY**s.decays
    optimiser = _optimiser()
    # The mean reaches back about a third of an epoch: long enough to average, short enough to follow.
    forget = jnp.minimum(1.0, 3.0 / steps)

    def mean_loss(w: Array, items: Any, k: Key) -> Array:
        return jnp.mean(loss(*static, w, items, k))

    def step(carry: tuple, item: tuple) -> tuple[tuple, Array]:
        w, moments, mean = carry
        rows, i = item
        items = jax.tree.map(lambda x: x[rows], data)
        value, slope = jax.value_and_grad(mean_loss)(w, items, jax.random.fold_in(steps_key, i))
        good = jnp.isfinite(value) & jnp.all(jnp.isfinite(slope))
        change, moved = optimiser.update(jnp.where(good, slope, 0.0), moments)
        w = w - jnp.where(good, rate * change, 0.0)
        return (w, moved, mean + forget * (w - mean)), value

    (w, moments, mean), values = jax.lax.scan(step, (s.weights, s.moments, s.mean), (shuffled, jnp.arange(steps)))
    judged = _held_out_loss(loss, static, mean, held, batch)
    better = judged < s.lowest
    stale = jnp.where(better, 0, s.stale + 1)
    lower = stale >= options.patience
    best = jnp.where(better, mean, s.best)
    return Fit(
        jnp.where(lower, best, w),
        moments,
        jnp.where(lower, best, mean),
        best,
        jnp.where(better, judged, s.lowest),
        jnp.where(lower, 0, stale),
        s.decays + lower,
        s.losses.at[:, epoch].set(jnp.stack([jnp.mean(values), judged])),
    )


def _held_out_loss(loss: Loss, static: tuple, weights: Array, held: Any, batch: int) -> Array:
    """Mean over the held-out simulations, a batch at a time; the last ones short of a batch are left out."""
    size = jax.tree.leaves(held)[0].shape[0]
    batch = min(batch, size)
    rows = size // batch
    folded = jax.tree.map(lambda x: x[: rows * batch].reshape(rows, batch, *x.shape[1:]), held)
    # One key for all epochs: what is compared are weights.
    keys = jax.random.split(jax.random.key(0), rows)
    return jnp.mean(jax.lax.map(lambda item: jnp.mean(loss(*static, weights, *item)), (folded, keys)))
