"""A short climb from many points of the prior at once, to find the basin in which a local method starts.

A posterior of a simulator often has minor modes with a large share of the prior: from the prior's centre a
local method ends in one of them, and nothing in its result tells. On the lynx and hare data 20 steps of 512
points reach the major mode, where the prior's centre and the best of 512 prior points lead to one whose
evidence is e^-34 of it.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from pushforward._types import Array, Float

STEPS = 20
_RATE = 0.3


def _optimiser() -> Any:
    # Adam works entry by entry, so one state for all points moves each on its own.
    import optax

    return optax.adam(optax.linear_schedule(_RATE, 0.0, STEPS), b1=0.8, b2=0.9)


class Scouts(eqx.Module):
    """Points on their way up, and the best that any of them has seen.

    Attributes:
        z: points of shape (n, d).
        moments: state of the optimiser.
        best: the point of highest log density so far, shape (d,).
        best_value: its log density; -inf while none was finite.
    """

    z: Float[Array, "n d"]
    moments: Any
    best: Float[Array, "d"]
    best_value: Array

    @classmethod
    def at(cls, z: Float[Array, "n d"]) -> "Scouts":
        """Scouts that start at given points."""
        return cls(z, _optimiser().init(z), z[0], jnp.full((), -jnp.inf, z.dtype))

    def climb(self, values: Float[Array, "n"], gradients: Float[Array, "n d"]) -> "Scouts":
        """Note the best point and move each along its gradient; points without a finite one stay."""
        finite = jnp.isfinite(values) & jnp.all(jnp.isfinite(gradients), axis=1)
        values = jnp.where(finite, values, -jnp.inf)
        top = jnp.argmax(values)
        higher = values[top] > self.best_value
        downhill = jnp.where(finite[:, None], -gradients, 0.0)
        moves, moments = _optimiser().update(downhill, self.moments)
        best = jnp.where(higher, self.z[top], self.best)
        z = self.z + moves
        return Scouts(z, moments, best, jnp.where(higher, values[top], self.best_value))
