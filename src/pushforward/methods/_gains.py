"""What a learned gain of `ThreeDVar` may look like, from every entry to a small network of the forecast."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from pushforward._errors import MethodError
from pushforward._types import Array
from pushforward.math import learned_gain
from pushforward.methods._base import check_choice, check_integer


class Units(eqx.Module):
    """What a gain is relative to.

    Attributes:
        spreading: (n, m), carries an innovation to the state.
        location: mean of the forecasts before training, over times and coordinates, a scalar.
        scale: their standard deviation.
        innovation: standard deviation of innovations carried to the state.
    """

    spreading: Array
    location: Array
    scale: Array
    innovation: Array


class Gain(eqx.Module):
    """Base of the structures of a learned gain; subclasses are final."""

    @abstractmethod
    def start(self, units: Units, guess: Array) -> Array:
        """The numbers that are learned, a flat vector, before training: near to a gain `guess` (n, m)."""

    @abstractmethod
    def matrix(self, weights: Array, units: Units, forecast: Array, innovation: Array) -> Array:
        """The gain (n, m) at a forecast (n,) and an innovation (m,), 0 where data are missing."""


class FullGain(Gain):
    """Every entry of the gain is learned: n m numbers."""

    def start(self, units: Units, guess: Array) -> Array:
        """See `Gain.start`."""
        return jnp.ravel(guess)

    def matrix(self, weights: Array, units: Units, forecast: Array, innovation: Array) -> Array:
        """See `Gain.matrix`."""
        return weights.reshape(units.spreading.shape)


class BandedGain(Gain):
    """Each coordinate takes over data of its neighbours on a ring: n (2 width + 1) numbers.

    Args:
        width: neighbours on each side.
    """

    width: int = 3

    def __check_init__(self):
        check_integer("BandedGain", 0, width=self.width)

    def start(self, units: Units, guess: Array) -> Array:
        """See `Gain.start`."""
        _ring("BandedGain", units, self.width)
        return jnp.ravel(learned_gain.bands_of(_of_state(units, guess), self.width))

    def matrix(self, weights: Array, units: Units, forecast: Array, innovation: Array) -> Array:
        """See `Gain.matrix`."""
        return learned_gain.band(weights.reshape(units.spreading.shape[0], -1)) @ units.spreading


class CirculantGain(Gain):
    """One stencil for all coordinates of a ring, a convolution: 2 width + 1 numbers.

    Args:
        width: neighbours on each side.
    """

    width: int = 5

    def __check_init__(self):
        check_integer("CirculantGain", 0, width=self.width)

    def start(self, units: Units, guess: Array) -> Array:
        """See `Gain.start`."""
        _ring("CirculantGain", units, self.width)
        return _stencil(units, guess, self.width)

    def matrix(self, weights: Array, units: Units, forecast: Array, innovation: Array) -> Array:
        """See `Gain.matrix`."""
        n = units.spreading.shape[0]
        return learned_gain.band(jnp.broadcast_to(weights, (n, weights.shape[0]))) @ units.spreading


class LowRankGain(Gain):
    """A multiple of the plain transfer of data to the state, plus a matrix of rank k: k (n + m) + 1 numbers.

    Args:
        rank: k.
    """

    rank: int = 5

    def __check_init__(self):
        check_integer("LowRankGain", 1, rank=self.rank)

    def start(self, units: Units, guess: Array) -> Array:
        """See `Gain.start`."""
        n, m = units.spreading.shape
        if self.rank > min(n, m):
            raise MethodError(
                f"LowRankGain(rank={self.rank}) is larger than the gain, {n} x {m}. Write pf.FullGain(), or a rank of "
                f"at most {min(n, m)}."
            )
        share = jnp.sum(guess * units.spreading) / jnp.sum(units.spreading**2)
        left, sizes, right = jnp.linalg.svd(guess - share * units.spreading, full_matrices=False)
        parts = left[:, : self.rank], sizes[: self.rank, None] * right[: self.rank]
        return jnp.concatenate([share[None], *map(jnp.ravel, parts)])

    def matrix(self, weights: Array, units: Units, forecast: Array, innovation: Array) -> Array:
        """See `Gain.matrix`."""
        n, m = units.spreading.shape
        left = weights[1 : 1 + self.rank * n].reshape(n, self.rank)
        right = weights[1 + self.rank * n :].reshape(self.rank, m)
        return weights[0] * units.spreading + left @ right


class NetworkGain(Gain):
    """A stencil on a ring that a small network makes of what surrounds the coordinate: the gain follows the forecast.

    One hidden layer, the same for all coordinates, sees the forecast, or the innovation, or both, at the 2 radius + 1
    nearest coordinates and gives 2 width + 1 numbers.

    Args:
        width: neighbours on each side whose data a coordinate takes over.
        radius: neighbours on each side that the network sees.
        hidden: size of the hidden layer.
        sees: "forecast", "innovation" or "both".
    """

    width: int = 4
    radius: int = 3
    hidden: int = 16
    sees: str = "forecast"

    def __check_init__(self):
        check_integer("NetworkGain", 0, width=self.width, radius=self.radius)
        check_integer("NetworkGain", 1, hidden=self.hidden)
        check_choice("NetworkGain", ("forecast", "innovation", "both"), sees=self.sees)

    def _layers(self, stencil: Array) -> tuple[Array, Array, Array, Array]:
        dtype = stencil.dtype
        seen = (2 * self.radius + 1) * (2 if self.sees == "both" else 1)
        # A fixed key: what is random at the start is part of the structure, not of the fit.
        first = jax.random.normal(jax.random.key(0), (seen, self.hidden), dtype) / seen**0.5
        last = jnp.zeros((self.hidden, 2 * self.width + 1), dtype)
        return first, jnp.zeros(self.hidden, dtype), last, stencil

    def start(self, units: Units, guess: Array) -> Array:
        """See `Gain.start`."""
        _ring("NetworkGain", units, max(self.width, self.radius))
        return ravel_pytree(self._layers(_stencil(units, guess, self.width)))[0]

    def matrix(self, weights: Array, units: Units, forecast: Array, innovation: Array) -> Array:
        """See `Gain.matrix`."""
        first, offset, last, stencil = ravel_pytree(self._layers(jnp.zeros(2 * self.width + 1, weights.dtype)))[1](
            weights
        )
        parts = []
        if self.sees != "innovation":
            parts.append(learned_gain.neighbours((forecast - units.location) / units.scale, self.radius))
        if self.sees != "forecast":
            parts.append(learned_gain.neighbours(units.spreading @ innovation / units.innovation, self.radius))
        hidden = jnp.tanh(jnp.concatenate(parts, 1) @ first + offset)
        return learned_gain.band(hidden @ last + stencil) @ units.spreading


class FixedGain(Gain):
    """A gain that is known.

    Args:
        values: shape (n, m).
    """

    values: Array

    def start(self, units: Units, guess: Array) -> Array:
        """Nothing is learned."""
        return jnp.zeros(0)

    def matrix(self, weights: Array, units: Units, forecast: Array, innovation: Array) -> Array:
        """See `Gain.matrix`."""
        return self.values


GAINS: dict[str, type[Gain]] = {
    "full": FullGain,
    "banded": BandedGain,
    "circulant": CirculantGain,
    "low_rank": LowRankGain,
    "network": NetworkGain,
}


def _of_state(units: Units, gain: Array) -> Array:
    """The matrix C (n, n) of K = C S; S is a pseudo-inverse, and so has its own."""
    return gain @ jnp.linalg.pinv(units.spreading)


def _stencil(units: Units, guess: Array, width: int) -> Array:
    """What the rows around each coordinate are on average, as a stencil; columns without data do not count."""
    seen = jnp.mean(jnp.diagonal(units.spreading @ jnp.linalg.pinv(units.spreading)))
    return jnp.mean(learned_gain.bands_of(_of_state(units, guess), width), 0) / seen


def _ring(owner: str, units: Units, width: int) -> int:
    """Number of coordinates of a ring that a stencil fits on."""
    n = units.spreading.shape[0]
    if 2 * width + 1 > n:
        raise MethodError(
            f"{owner} reaches {width} neighbours on each side, and the state has {n} coordinates. Give at most "
            f"{(n - 1) // 2}."
        )
    return n
