"""Climatology: the covariance of a model's states over free runs, the usual first background covariance."""

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float, Key
from pushforward.math.normals import normals
from pushforward.model.state_space import Chain

STEPS = 1000
RUNS = 32
"""Runs made together, so that a model whose states never move has a climatology, too: its initial law."""


def climatology(chain: Chain, key: Key, steps: int = STEPS) -> Float[Array, "n n"]:
    """Covariance of the states of `RUNS` free runs of the model, whose first half is left out.

    The runs start from draws of the initial law and move by the model's own step, with its noise; data are not looked
    at. Series that the scan runs over start anew when they end. Sums are updated step by step, so memory does not grow
    with the steps. A constant for gradients.

    Args:
        chain: the model at its parameters.
        key: typed JAX key.
        steps: of each run.
    """
    first, second = jax.random.split(key)
    states, riders, _ = jax.vmap(chain.start)(normals(first, (RUNS, chain.initial_dimension)))
    length, n = chain.structure.length, states.shape[1]

    def move(carry: tuple[Array, list[Array]], t: Array) -> tuple[tuple[Array, list[Array]], None]:
        noise = normals(jax.random.fold_in(second, t), (RUNS, chain.noise_dimension))
        moved = jax.vmap(chain.step, (0, None, None, 0))(carry[0], carry[1], t % length, noise)
        return (moved.state, [r[0] for r in moved.riders]), None

    half = steps // 2
    settled, _ = jax.lax.scan(move, (states, [r[0] for r in riders]), jnp.arange(half))
    # Sums about a point near the mean: squares of states far from 0 would cancel.
    centre = jnp.mean(settled[0], 0)

    def add(carry: tuple, t: Array) -> tuple[tuple, None]:
        running, total, squares = carry
        running, _ = move(running, t)
        away = running[0] - centre
        return (running, total + jnp.sum(away, 0), squares + away.T @ away), None

    start = (settled, jnp.zeros(n, states.dtype), jnp.zeros((n, n), states.dtype))
    (_, total, squares), _ = jax.lax.scan(add, start, jnp.arange(half, steps))
    count = RUNS * (steps - half)
    return jax.lax.stop_gradient((squares - jnp.outer(total, total) / count) / (count - 1))
