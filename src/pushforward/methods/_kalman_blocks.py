"""The Kalman filter of a chain whose step falls into independent blocks: one small filter for each, side by side."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._types import Array, Key
from pushforward.math import kalman, kalman_steady
from pushforward.math.innovations import Innovations, kalman_innovations
from pushforward.math.kalman import Step, Updated, Varying
from pushforward.methods._kalman_filter import AllDraws, CarryDraws, draw, over_time
from pushforward.model.blocks import Blocks, block_first, block_step
from pushforward.model.linear import Facts
from pushforward.model.state_space import Chain


class BlockSeries(NamedTuple):
    """A chain as linear steps of its blocks; the block is the first axis of constant leaves, the second of others."""

    first: Updated
    first_noise: Array
    riders: list[Array]
    steps: Step
    data: Array
    varying: Varying

    @property
    def axes(self) -> Any:
        """Where the block axis of each leaf of the steps is, as `jax.vmap` takes it."""
        where: list[Any] = [int(varies) for varies in self.varying]
        return Step(*where)


def block_series(chain: Chain, found: Blocks, known: Facts) -> BlockSeries:
    """Matrices, offsets and data of all blocks."""
    n, q, k = found.state.size, found.noise.size, found.initial.size
    _, riders, observed = chain.start(jnp.zeros(k))
    state, still, times = jnp.zeros(n), jnp.zeros(q), jnp.arange(chain.structure.length)
    beginning = block_first(chain, found)
    nothing = (jnp.zeros(0), jnp.zeros((0, 0)))
    first = jax.vmap(lambda step, y: kalman.update(*nothing, step, y))(beginning, observed.data[found.first])

    def move(riding: list[Array], t: Array) -> tuple[list[Array], list[Array]]:
        return chain.step(state, riding, t, still).riders, riding

    before = jax.lax.scan(move, riders, times)[1] if riders else []

    def offsets(riding: list[Array], t: Array) -> tuple[Array, Array, Array]:
        moved = chain.step(state, riding, t, still)
        return moved.state[found.state], moved.observed.mean[found.data], moved.observed.data[found.data]

    b, d, data = over_time(chain, offsets, before, times)
    if not known.constant:
        steps = over_time(chain, lambda riding, t: block_step(chain, found, riding, t), before, times)
        return BlockSeries(first, beginning.R, before, steps, data, Varying())
    one = block_step(chain, found, riders, jnp.asarray(0))
    varying = kalman.CONSTANT._replace(b=True, d=True)
    return BlockSeries(first, beginning.R, before, one._replace(b=b, d=d), data, varying)


def block_log_likelihood(chain: Chain, found: Blocks, known: Facts) -> Array:
    """log p(data), the sum over the blocks."""
    series = block_series(chain, found, known)
    varying = series.varying

    def one(mean: Array, cov: Array, steps: Step, ys: Array) -> Array:
        if not varying.A:
            return kalman_steady.filter_constant(mean, cov, steps, ys, steady=False).log_likelihood
        return kalman.filter_series(mean, cov, steps, ys, varying=varying).log_likelihood

    rest = jax.vmap(one, (0, 0, series.axes, 1))(series.first.mean, series.first.cov, series.steps, series.data)
    return jnp.sum(rest) + jnp.sum(series.first.log_likelihood)


def block_draws(
    chain: Chain, found: Blocks, known: Facts, key: Key, draws: int
) -> tuple[AllDraws, list[Array], Array, Innovations]:
    """Draws of all blocks put together, what rides along, log p(data), and the innovations of each step."""
    series = block_series(chain, found, known)

    def one(first: Updated, noise: Array, steps: Step, ys: Array, key: Key) -> tuple[AllDraws, Innovations]:
        filtered = kalman.filter_series(first.mean, first.cov, steps, ys, varying=series.varying)
        root = jax.vmap(kalman.noise_root)(steps.R) if series.varying.R else kalman.noise_root(steps.R)
        roots = (kalman.noise_root(noise), jnp.broadcast_to(root, (len(ys), *root.shape[-2:])))
        drawn = draw(first, filtered.records, filtered.means[-1], roots, key, draws)
        return drawn, jax.vmap(kalman_innovations)(filtered.records, ys)

    keys = jax.random.split(key, found.count)
    drawn, innovations = jax.vmap(one, (0, 0, series.axes, 1, 0))(
        series.first, series.first_noise, series.steps, series.data, keys
    )
    innovations = jax.tree.map(lambda v: jnp.sum(v, 0), innovations)
    evidence = jnp.sum(innovations.log_likelihood) + jnp.sum(series.first.log_likelihood)
    smooth = drawn.smoothing
    together = CarryDraws(
        _joined(smooth.initial, found.initial),
        _joined(smooth.states, found.state),
        _joined(smooth.noise, found.noise),
        _joined(smooth.last, found.state),
    )
    pairs = [(_joined(x, found.state), _joined(e, found.noise)) for x, e in (drawn.filtering, drawn.one_step)]
    return AllDraws(together, *pairs), series.riders, evidence, innovations


def _joined(parts: Array, index: np.ndarray) -> Array:
    """Values of the blocks (block, ..., size) in the order of the whole."""
    whole = jnp.moveaxis(parts, 0, -2).reshape(*parts.shape[1:-1], index.size)
    return whole[..., np.argsort(index.ravel())]
