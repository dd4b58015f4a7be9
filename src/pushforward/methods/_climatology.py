"""Climatology: the covariance of a model's state over a long free run, the usual first background covariance."""

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float, Key
from pushforward.model.state_space import Chain

STEPS, BURN = 10_000, 1_000


def climatology(chain: Chain, key: Key, steps: int = STEPS, burn: int = BURN) -> Float[Array, "n n"]:
    """Covariance of the state over a free run that starts from a draw of the initial law.

    The state moves by the model's own step, with its noise; data are not looked at. Series that the scan runs over
    start anew when they end. Mean and squares are updated step by step (Welford 1962), so memory does not grow.

    Args:
        chain: the model at its parameters.
        key: typed JAX key.
        steps: number of steps that count.
        burn: number of steps before those.
    """
    first, second = jax.random.split(key)
    state, riders, _ = chain.start(jax.random.normal(first, (chain.initial_dimension,)))
    n, length = state.shape[0], chain.structure.length

    def move(carry: tuple, t: Array) -> tuple[tuple, None]:
        x, riding, mean, squares = carry
        noise = jax.random.normal(jax.random.fold_in(second, t), (chain.noise_dimension,))
        moved = chain.step(x, riding, t % length, noise)
        count = t - burn + 1
        away = moved.state - mean
        share = jnp.where(count > 0, 1.0 / jnp.maximum(count, 1), 0.0)
        after = mean + share * away
        weight = jnp.where(count > 0, 1.0, 0.0)
        squares = squares + weight * jnp.outer(away, moved.state - after)
        return (moved.state, moved.riders, after, squares), None

    start = (state, riders, jnp.zeros(n), jnp.zeros((n, n)))
    (_, _, _, squares), _ = jax.lax.scan(move, start, jnp.arange(burn + steps))
    return 0.5 * (squares + squares.T) / (steps - 1)
