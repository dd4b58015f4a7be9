"""Scores of long trajectories from a network that knows windows of 2 k + 1 states.

Each state takes what the window centred on it says of it; the first and last k states take theirs from the first and
the last window. For a Markov chain this is exact as the noise vanishes, since then a state's score depends on its
neighbours alone; at higher levels distant states matter, and the composed law has too little correlation across
more than k states. No sampler mends that: take k at least the correlation time, or a network of the whole trajectory.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float

Trajectory = Float[Array, "time ..."]


def windows(x: Trajectory, k: int) -> Float[Array, "window width ..."]:
    """All windows of ``min(2 k + 1, T)`` consecutive states, T the number of states in x."""
    width = min(2 * k + 1, x.shape[0])
    return x[jnp.arange(x.shape[0] - width + 1)[:, None] + jnp.arange(width)[None]]


def compose(parts: Float[Array, "window width ..."], k: int) -> Trajectory:
    """One trajectory from what all its windows say: centres, and the ends of the first and the last window.

    Args:
        parts: for each window of `windows`, its score, noise, or clean states.
        k: as in `windows`.
    """
    if parts.shape[0] == 1:
        return parts[0]
    return jnp.concatenate([parts[0, :k], parts[:, k], parts[-1, k + 1 :]])


def composed(local: Callable[[Trajectory], Trajectory], x: Trajectory, k: int) -> Trajectory:
    """The score (or noise, or clean states) of a trajectory from a function of windows.

    ``s_i(x) = local(x_{i-k : i+k})_k`` for k <= i < T - k. The clean states of a trajectory at one level are an affine
    function of the score state by state, so a denoiser composes as a score does. A trajectory of at most
    2 k + 1 states is handed to `local` whole, and the result is then what `local` says.

    Args:
        local: from states of one window, (width, ...), to a score of the same shape; it is mapped over windows.
        x: states, (T, ...), time first.
        k: states on either side of a window's centre; 0 treats the states as independent.

    Source: Rozet and Louppe 2023, "Score-based data assimilation", arXiv:2306.10574, algorithm 2.
    """
    return compose(jax.vmap(local)(windows(x, k)), k)
