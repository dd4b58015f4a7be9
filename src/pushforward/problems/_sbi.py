"""What the four tasks of simulation-based inference share: checks, numpy streams of JAX keys, exact rejection."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

_BLOCK = 1 << 18
_PATIENCE = 1 << 22


class Exact(NamedTuple):
    """The exact posterior of `theta`: its mean and standard deviations, shape (d,), and log p(x)."""

    mean: np.ndarray
    sd: np.ndarray
    log_evidence: float


def first(observations: np.ndarray, n: int) -> np.ndarray:
    """The first n of the stored data sets, shape (n, ...).

    Raises:
        ValueError: n is not between 1 and the number of data sets that are stored.
    """
    if not 1 <= n <= len(observations):
        raise ValueError(f"n is {n}; {len(observations)} data sets are stored, so write 1 <= n <= {len(observations)}")
    return observations[:n]


def checked(x: ArrayLike, n: int, shape: tuple[int, ...]) -> np.ndarray:
    """One data set as float64 numpy.

    Raises:
        ValueError: x has not that shape or holds NaN or infinity, or n, the number of draws, is below 1.
    """
    x = np.asarray(x, np.float64)
    if x.shape != shape:
        raise ValueError(f"x has shape {x.shape}; one data set has shape {shape}: pass one row of `observations()`")
    if not np.isfinite(x).all():
        raise ValueError(f"x is {x.tolist()}; exact draws need finite data, none of them missing")
    if n < 1:
        raise ValueError(f"n is {n}; write a number of draws of at least 1")
    return x


def generator(key: int | jax.Array) -> np.random.Generator:
    """A numpy generator for an int or a typed JAX key: exact draws are made in float64, whatever JAX's precision."""
    typed = jax.random.key(key) if isinstance(key, int | np.integer) else key
    return np.random.default_rng(np.asarray(jax.random.key_data(typed)).ravel())


def rejection(propose: Callable[[int], np.ndarray], n: int) -> np.ndarray:
    """The first n accepted draws, shape (n, d).

    Args:
        propose: makes that many proposals and returns those it accepts, shape (at most that many, d).
        n: number of draws.

    Raises:
        ValueError: fewer than one in a million proposals is accepted.
    """
    parts, accepted, proposed, size = [], 0, 0, min(2 * n + 64, _BLOCK)
    while accepted < n:
        parts.append(propose(size))
        accepted, proposed = accepted + len(parts[-1]), proposed + size
        if proposed >= _PATIENCE and accepted < proposed * 1e-6:
            raise ValueError(
                f"{accepted} of {proposed} proposals were accepted: these data have almost no probability under the "
                "model; pass data that the model can produce"
            )
        size = int(np.clip(1.1 * (n - accepted) * proposed / max(accepted, 1) + 64, 0, _BLOCK))
    return np.concatenate(parts)[:n]
