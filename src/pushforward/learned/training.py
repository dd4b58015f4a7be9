"""What trains `FlowVI`: Adam in windows of steps, at a constant rate until it brings nothing more, then ever slower."""

from dataclasses import dataclass, field

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from pushforward._types import Array

WINDOW = 50
"""Steps between two decisions."""
_IDLE = 2
"""Windows without a gain that end the constant rate."""
_CLIP = 10.0
_FIRST, _SECOND, _SMALL = 0.9, 0.999, 1e-8


class Adam(eqx.Module):
    """Weights and the moments of their slopes (Kingma and Ba 2015), all of shape (p,).

    Attributes:
        weights: what is trained.
        first: running mean of the slopes.
        second: running mean of their squares.
    """

    weights: Array
    first: Array
    second: Array

    @classmethod
    def start(cls, weights: Array) -> "Adam":
        """Before the first step."""
        return cls(weights, jnp.zeros_like(weights), jnp.zeros_like(weights))

    def moved(self, slope: Array, step: Array, rate: Array) -> "Adam":
        """After step number `step`, counted from 0; a slope that is not finite counts as none, a long one is cut."""
        norm = jnp.sqrt(jnp.sum(slope**2))
        good = jnp.isfinite(norm)
        slope = jnp.where(good, slope, 0.0) * jnp.where(good, jnp.minimum(1.0, _CLIP / jnp.maximum(norm, _CLIP)), 0.0)
        first = _FIRST * self.first + (1 - _FIRST) * slope
        second = _SECOND * self.second + (1 - _SECOND) * slope**2
        mean, square = first / (1 - _FIRST ** (step + 1.0)), second / (1 - _SECOND ** (step + 1.0))
        return Adam(self.weights - rate * mean / (jnp.sqrt(square) + _SMALL), first, second)


@dataclass
class Schedule:
    """Learning rates, and when to end; lives on the host, between windows.

    The rate is constant until two windows bring the mean loss less than `tolerance` below its lowest before, or half of
    the steps are used up. From then on it falls to zero along half a period of a cosine, over as many steps as were
    taken before.

    Attributes:
        steps: at most.
        rate: at the start.
        tolerance: gain that is worth more windows.
        patient: number of the first step that may end the constant rate.
        losses: mean loss of each window so far.
        turned: steps taken when the rate began to fall, None before.
        stalled: whether it fell because training brought nothing more.
    """

    steps: int
    rate: float
    tolerance: float
    patient: int = 0
    losses: list[float] = field(default_factory=list)
    turned: int | None = None
    stalled: bool = False

    @property
    def taken(self) -> int:
        """Steps so far."""
        return min(WINDOW * len(self.losses), self.end)

    @property
    def end(self) -> int:
        """Number of all steps, as far as is known."""
        return self.steps if self.turned is None else min(2 * self.turned, self.steps)

    def rates(self) -> np.ndarray:
        """Learning rates of the next window, zero after the end."""
        step = self.taken + np.arange(WINDOW)
        if self.turned is None:
            return np.full(WINDOW, self.rate)
        share = np.clip((step - self.turned) / (self.end - self.turned), 0, 1)
        return 0.5 * self.rate * (1 + np.cos(np.pi * share))

    def note(self, loss: float) -> None:
        """Take in the mean loss of the window that `rates` was for."""
        self.losses.append(loss)
        judged = np.nan_to_num(self.losses[self.patient // WINDOW :], nan=np.inf)
        before, last = judged[:-_IDLE], judged[-_IDLE:]
        idle = len(before) > 0 and not min(last) < min(before) - self.tolerance
        late = self.taken >= max(self.steps // 2, self.patient)
        if self.turned is None and (idle or late):
            self.turned, self.stalled = self.taken, bool(idle)
