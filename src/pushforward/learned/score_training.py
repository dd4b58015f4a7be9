"""The training of a denoiser: noisy windows of trajectories, a loss that is even over levels, averaged weights."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import DataError, MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned.score_model import ScoreShape
from pushforward.math.diffusion import preconditioning, training_levels

BLOCKS = 50
"""Judgements in a training."""
_CLIP = 1.0
_WARMUP = 0.02
_HELD = 1024
"""Windows that judge, at most; and at most a quarter of those that were trained on since."""


class ScoreTraining(eqx.Module):
    """How the network of `pf.ScoreTrajectory` is trained.

    AdamW (Loshchilov and Hutter 2019) with a short rise and a fall of the learning rate along a cosine. The weights
    that are kept are a running mean of those of the optimiser, judged 50 times by their loss on trajectories held out;
    the lowest is kept. Levels of noise are log-normal.

    Args:
        steps: of the optimiser.
        batch_size: windows (or whole trajectories) of a step.
        learning_rate: at its highest.
        patience: judgements without a lower held-out loss after which training ends early.
        held_out: share of the trajectories that judge and are not trained on.
        source: "buffer", trajectories are simulated once; "stream", new ones after each judgement.
        levels: mean and standard deviation of the logarithm of the level of noise, in units of the states' standard
            deviation. Lower the mean where the noise of a step of the dynamics is far below 1 % of it.

    Example:
        >>> import pushforward as pf
        >>> pf.ScoreTraining(steps=5000).batch_size
        128
    """

    steps: int = 20_000
    batch_size: int = 128
    learning_rate: float = 2e-3
    patience: int = 15
    held_out: float = 0.05
    source: str = "buffer"
    levels: tuple[float, float] = (-1.8, 1.8)

    def __check_init__(self):
        for name in ("steps", "batch_size", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MethodError(f"ScoreTraining({name}=...) takes an integer of at least 1; got {value!r}.")
        if not isinstance(self.learning_rate, float) or not self.learning_rate > 0:
            raise MethodError(f"ScoreTraining(learning_rate=...) takes a positive number; got {self.learning_rate!r}.")
        if not isinstance(self.held_out, float) or not 0 < self.held_out < 1:
            raise MethodError(f"ScoreTraining(held_out=...) takes a number between 0 and 1; got {self.held_out!r}.")
        if self.source not in ("buffer", "stream"):
            raise MethodError(f'ScoreTraining(source=...) takes "buffer" or "stream"; got {self.source!r}.')
        pair = self.levels
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(v, float) for v in pair) and pair[1] > 0):
            raise MethodError(
                f"ScoreTraining(levels=...) takes the mean and the positive standard deviation of log levels, such as "
                f"(-1.8, 1.8); got {pair!r}."
            )

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of judgements, and steps before each."""
        blocks = min(BLOCKS, self.steps)
        return blocks, -(-self.steps // blocks)


class ScoreFit(eqx.Module):
    """Where a training stands.

    Attributes:
        weights: those of the optimiser.
        moments: of the optimiser.
        mean: running mean of the weights.
        best: the mean with the lowest held-out loss.
        lowest: that loss.
        stale: judgements since.
        losses: training and held-out loss by judgement, (2, blocks), NaN where there was none.
    """

    weights: Array
    moments: Any
    mean: Array
    best: Array
    lowest: Array
    stale: Array
    losses: Array


type Data = tuple[Array, Array]
"""Standardised trajectories (n, rows, *state) and their static parameters (n, p)."""


def window_loss(shape: ScoreShape, weights: Array, clean: Array, given: Array, level: Array, noise: Array) -> Array:
    """Mean square error of the network F itself for one window: ``|D(x, s) - x0|^2 / c_out^2``.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 8 with its weighting.
    """
    scales = preconditioning(level)
    x = clean + level * noise
    predicted = shape.module(weights)(scales.inner * x, scales.condition, given)
    return jnp.mean((predicted - (clean - scales.skip * x) / scales.out) ** 2)


def _mean_loss(shape: ScoreShape, options: ScoreTraining, weights: Array, data: Data, size: int, key: Key) -> Array:
    """The loss of `size` random windows of the data at random levels."""
    row_key, start_key, level_key, noise_key = jax.random.split(key, 4)
    trajectories, given = data
    width = shape.shape[0]
    rows = jax.random.randint(row_key, (size,), 0, trajectories.shape[0])
    starts = jax.random.randint(start_key, (size,), 0, trajectories.shape[1] - width + 1)
    clean = trajectories[rows[:, None], starts[:, None] + jnp.arange(width)]
    # Stratified: the levels of a batch are spread evenly, which takes half of the noise out of its loss.
    even = (jax.random.permutation(level_key, size) + jax.random.uniform(level_key, (size,))) / size
    location, scale = options.levels
    normals = jax.scipy.special.ndtri(jnp.clip(even, 1e-6, 1 - 1e-6).astype(clean.dtype))
    levels = training_levels(normals, location=location, scale=scale)
    noise = jax.random.normal(noise_key, clean.shape, clean.dtype)
    return jnp.mean(jax.vmap(window_loss, (None, None, 0, 0, 0, 0))(shape, weights, clean, given[rows], levels, noise))


def _optimiser(options: ScoreTraining) -> Any:
    import optax

    blocks, every = options.blocks
    rise = max(1, int(_WARMUP * blocks * every))
    end = max(blocks * every, rise + 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, rise, end, 0.0)
    return optax.chain(optax.clip_by_global_norm(_CLIP), optax.adamw(rate, weight_decay=1e-4))


def fit(
    shape: ScoreShape,
    options: ScoreTraining,
    train: "Data | Callable[[Key], Data] | Chunks",
    held: Data,
    key: Key,
    runner: Runner,
) -> ScoreFit:
    """Train a network.

    Args:
        shape: what is trained.
        options: how.
        train: data, or a function of a key that simulates them anew for each block, or chunks of an archive.
        held: data to judge by.
        key: typed JAX key.
        runner: compiles, shows and checkpoints; a block of steps is a step of its loop.
    """
    start = runner.call(_start, shape, options, jax.random.fold_in(key, 0))
    blocks, _ = options.blocks
    feed = train if isinstance(train, Chunks) else None
    given = () if feed else (train,)
    return runner.loop(_advance, start, blocks, *given, held, jax.random.fold_in(key, 1), shape, options, feed=feed)


def _start(shape: ScoreShape, options: ScoreTraining, key: Key) -> ScoreFit:
    weights = shape.weights(key)
    return ScoreFit(
        weights,
        _optimiser(options).init(weights),
        weights,
        weights,
        jnp.full((), jnp.inf, weights.dtype),
        jnp.zeros((), int),
        jnp.full((2, options.blocks[0]), jnp.nan, weights.dtype),
    )


def _advance(
    state: ScoreFit, start: Array, stop: Array, train: Any, held: Data, key: Key, shape: ScoreShape, options: Any
) -> ScoreFit:
    def going(carry: tuple[Array, ScoreFit]) -> Array:
        return (carry[0] < stop) & (carry[1].stale < options.patience)

    def body(carry: tuple[Array, ScoreFit]) -> tuple[Array, ScoreFit]:
        block, s = carry
        return block + 1, _block(s, block, jax.random.fold_in(key, block), train, held, shape, options)

    return jax.lax.while_loop(going, body, (start, state))[1]


def _block(
    s: ScoreFit, block: Array, key: Key, train: Any, held: Data, shape: ScoreShape, options: ScoreTraining
) -> ScoreFit:
    """Steps of the optimiser between two judgements, and the judgement."""
    data: Any = train(jax.random.fold_in(key, 0)) if callable(train) else train
    optimiser, every = _optimiser(options), options.blocks[1]

    def step(carry: tuple, i: Array) -> tuple[tuple, Array]:
        weights, moments, mean = carry

        def loss(w: Array) -> Array:
            return _mean_loss(shape, options, w, data, options.batch_size, jax.random.fold_in(key, i + 1))

        value, slope = jax.value_and_grad(loss)(weights)
        good = jnp.isfinite(value) & jnp.all(jnp.isfinite(slope))
        change, moments = optimiser.update(jnp.where(good, slope, 0.0), moments, weights)
        weights = weights + jnp.where(good, change, 0.0)
        # The mean reaches back a tenth of the steps so far.
        forget = 10.0 / (10.0 + block * every + i)
        return (weights, moments, mean + forget * (weights - mean)), value

    (weights, moments, mean), values = jax.lax.scan(step, (s.weights, s.moments, s.mean), jnp.arange(every))
    # One key for all judgements: what is compared are weights.
    batches = max(1, min(_HELD // options.batch_size, every // 4))
    keys = jax.random.split(jax.random.key(0), batches)
    judged = jnp.mean(jax.lax.map(lambda k: _mean_loss(shape, options, mean, held, options.batch_size, k), keys))
    better = judged < s.lowest
    return ScoreFit(
        weights,
        moments,
        mean,
        jnp.where(better, mean, s.best),
        jnp.where(better, judged, s.lowest),
        jnp.where(better, 0, s.stale + 1),
        s.losses.at[:, block].set(jnp.stack([jnp.mean(values), judged])),
    )


class Chunks:
    """An archive read chunk by chunk, one for each block of steps, again from its start when it is at its end.

    Args:
        chunks: an iterable that can be read more than once.
        prepare: makes data of a chunk.
    """

    def __init__(self, chunks: Any, prepare: Callable[[Any], Data]):
        self.chunks, self.prepare = chunks, prepare
        self._at, self._reader = -1, iter(())

    def __call__(self, block: int) -> Data:
        """The chunk of a block; a run that goes on after an interrupt skips those before."""
        if self._at != block:
            self._at, self._reader = 0, self._read()
            for _ in range(block):
                next(self._reader)
        self._at = block + 1
        return self.prepare(next(self._reader))

    def _read(self) -> Iterator[Any]:
        while True:
            empty = True
            for chunk in self.chunks:
                empty = False
                yield chunk
            if empty:
                raise DataError(
                    "trajectories= ran out of chunks: it can be read only once. Pass a list, or an object whose "
                    "__iter__ begins anew, so that training may go through the archive again."
                )


def losses(fitted: ScoreFit) -> np.ndarray:
    """Training and held-out loss by judgement, up to the last."""
    found = np.asarray(fitted.losses)
    return found[:, np.isfinite(found[1])]
