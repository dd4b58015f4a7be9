"""Draws of a proposal made into draws of the target, by importance weights or by a Metropolis chain."""

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._types import Array, Key
from pushforward.math import resampling


def smoothed(proposals: Array, log_weights: Array, draws: int, key: Key) -> tuple[Array, dict[str, Array]]:
    """Draws resampled by Pareto smoothed importance weights (Vehtari, Simpson, Gelman, Yao and Gabry 2024).

    Args:
        proposals: draws of q, (replicate, n, d).
        log_weights: log p - log q at them, (replicate, n).
        draws: number of draws; above the effective sample size they repeat.
        key: typed JAX key.

    Returns:
        Draws (draw, d) in random order, and their effective sample size before resampling.
    """
    from blackjax.diagnostics import psis_weights

    flat = jnp.reshape(proposals, (-1, proposals.shape[-1]))
    weights, _ = psis_weights(jnp.ravel(log_weights))
    first, second = jax.random.split(key)
    chosen = jax.random.permutation(second, resampling.systematic(first, weights, draws))
    normal = jnp.exp(weights - jnp.max(weights))
    return flat[chosen], {"importance_ess": jnp.sum(normal) ** 2 / jnp.sum(normal**2)}


def independence(proposals: Array, log_weights: Array, draws: int, key: Key) -> tuple[Array, dict[str, Array]]:
    """Draws of an independence Metropolis chain that goes through all proposals (Tierney 1994, section 2.3).

    The chain starts at a proposal chosen by its weight; every (proposals / draws)-th state is kept.

    Args:
        proposals: draws of q, (replicate, n, d).
        log_weights: log p - log q at them, (replicate, n).
        draws: number of draws, at most that of proposals.
        key: typed JAX key.

    Returns:
        Draws (draw, d), and the mean acceptance.
    """
    flat, weights = jnp.reshape(proposals, (-1, proposals.shape[-1])), jnp.ravel(log_weights)
    first, second = jax.random.split(key)
    uniforms = jax.random.uniform(second, weights.shape)

    def step(at: Array, item: tuple) -> tuple[Array, tuple]:
        i, u = item
        accepted = jnp.log(u) < weights[i] - weights[at]
        at = jnp.where(accepted, i, at)
        return at, (at, accepted)

    begin = jax.random.categorical(first, weights)
    _, (path, accepted) = jax.lax.scan(step, begin, (jnp.arange(len(weights)), uniforms))
    kept = np.linspace(0, len(weights) - 1, draws).round().astype(int)
    return flat[path[kept]], {"acceptance_rate": jnp.mean(accepted)}
