"""Loops over time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pushforward._types import Array


def checkpointed_scan(move: Callable[[Any, Array], tuple[Any, Any]], start: Any, length: int) -> Any:
    """The last carry of a scan over 0..length-1 whose gradient keeps O(sqrt length) carries (Griewank 1992)."""
    rows = max(1, int(length**0.5))
    full = length - length % rows

    @jax.checkpoint
    def row(carry: Any, times: Array) -> tuple[Any, None]:
        return jax.lax.scan(move, carry, times)[0], None

    carry, _ = jax.lax.scan(row, start, jnp.arange(full).reshape(-1, rows))
    return jax.lax.scan(move, carry, jnp.arange(full, length))[0] if full < length else carry
