"""`ScoreModel`: a trained denoiser of trajectories, with the scales of its states and their covariance in time."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from pushforward._types import Array, Float, Key
from pushforward.learned.score_networks import ScoreNetwork
from pushforward.math.diffusion import Denoiser, preconditioned
from pushforward.math.guidance import Errors, positive_part
from pushforward.math.window_scores import composed

_DENSE = 1500
"""Numbers of a trajectory up to which its covariance is kept whole."""
_LAGS = 256
_LEVELS = (2e-3, 80.0)
_TABLE = 24
_ERRORS = 512
"""Numbers that the network sees up to which its errors are kept."""
_CHANNELS = 64


class ScoreShape(eqx.Module):
    """What a network is built from.

    Attributes:
        network: a `ScoreNetwork`, or a module of the user's own, whose weights are where training starts.
        shape: (length, *state) of what it sees: a window or a whole trajectory.
        parameters: number of static parameters that it is given.
        windowed: whether it sees windows, and its results are composed to trajectories of any length.
    """

    network: Any
    shape: tuple[int, ...]
    parameters: int
    windowed: bool

    def initial(self, key: Key) -> Any:
        """The network with random weights."""
        if isinstance(self.network, ScoreNetwork):
            return self.network.build(key, self.shape, self.parameters)
        return self.network

    def weights(self, key: Key) -> Array:
        """Weights at the start as one flat vector."""
        # A generator that compiles in half the time of the default one; initial weights need no better.
        bits = jax.random.key_data(key)
        quick = jax.random.wrap_key_data(jnp.concatenate([bits, bits])[:4], impl="unsafe_rbg")
        return ravel_pytree(eqx.filter(self.initial(quick), eqx.is_inexact_array))[0]

    def module(self, weights: Array) -> Any:
        """The network with given weights."""
        changing, rest = eqx.partition(self.initial(jax.random.key(0)), eqx.is_inexact_array)
        return eqx.combine(ravel_pytree(changing)[1](weights), rest)

    def denoiser(self, weights: Array, given: Array) -> Denoiser:
        """D(x, s) of a window or trajectory of standardised states."""
        module = self.module(weights)
        return preconditioned(lambda x, condition: module(x, condition, given))


class ScoreModel(eqx.Module):
    """A trained prior of trajectories.

    Attributes:
        shape: of its network.
        weights: of its network, one flat vector.
        location: mean of the states, of a shape that broadcasts to theirs.
        spread: standard deviation of the states.
        given_location: mean of the static parameters, (p,).
        given_spread: standard deviation of the static parameters.
        covariance: of standardised states: of the whole trajectory (rows, c, rows, c) for a network of the whole,
            autocovariances (lags, c, c) for one of windows; empty where states are large.
        errors: mean squared errors of the denoiser at levels from 2e-3 to 80, (levels, length, c, length, c) for what
            the network sees; empty where that is large.
    """

    shape: ScoreShape
    weights: Array
    location: Array
    spread: Array
    given_location: Array
    given_spread: Array
    covariance: Array
    errors: Array

    @property
    def state(self) -> tuple[int, ...]:
        """Shape of a state."""
        return self.shape.shape[1:]

    def standardised(self, trajectory: Array) -> Array:
        """States in units of the network."""
        return (trajectory - self.location) / self.spread

    def raw(self, standardised: Array) -> Array:
        """States in their own units."""
        return self.location + self.spread * standardised

    def denoiser(self, given: Array) -> Denoiser:
        """D(x, s) of standardised trajectories at static parameters `given`, (p,)."""
        local = self.shape.denoiser(self.weights, (given - self.given_location) / self.given_spread)
        if not self.shape.windowed:
            return local
        k = self.shape.shape[0] // 2
        return lambda x, s: composed(lambda part: local(part, s), x, k)

    def covariance_of(self, rows: int) -> Array:
        """Covariance of a standardised trajectory of `rows` states, flat and symmetric; empty where it is not known."""
        if self.covariance.size == 0:
            return self.covariance
        if self.covariance.ndim == 4:
            size = self.covariance.shape[0] * self.covariance.shape[1]
            return self.covariance.reshape(size, size)
        lags, c, _ = self.covariance.shape
        step = jnp.arange(rows)[None, :] - jnp.arange(rows)[:, None]
        lag = jnp.abs(step)
        blocks = jnp.where((lag < lags)[..., None, None], self.covariance[jnp.minimum(lag, lags - 1)], 0.0)
        blocks = jnp.where((step < 0)[..., None, None], jnp.swapaxes(blocks, -1, -2), blocks)
        return jnp.moveaxis(blocks, 2, 1).reshape(rows * c, rows * c)

    def errors_of(self, rows: int) -> Errors | None:
        """Mean squared errors of D for trajectories of `rows` states, or None where they are not known.

        For a network of windows the errors of a window stand for all, as a function of the time between two states, and
        the matrix is made positive.
        """
        if self.errors.size == 0:
            return None
        levels, length, c = self.errors.shape[:3]
        if rows == length:
            return Errors(self.errors.reshape(levels, rows * c, rows * c), *_LEVELS)
        if not self.shape.windowed:
            return None
        step = jnp.arange(rows)[None, :] - jnp.arange(rows)[:, None]
        k = length // 2
        # Errors of the middle state with those around it.
        centre = jnp.moveaxis(self.errors[:, k], 2, 1)
        # (levels, length, c, c): middle state, then the other.
        blocks = jnp.where((jnp.abs(step) <= k)[..., None, None], centre[:, jnp.clip(step + k, 0, length - 1)], 0.0)
        whole = jnp.moveaxis(blocks, 3, 2).reshape(levels, rows * c, rows * c)
        return Errors(jax.lax.map(positive_part, whole), *_LEVELS)


def scales(trajectories: Float[Array, "n rows ..."]) -> tuple[Array, Array]:
    """Mean and standard deviation of states, over trajectories and time, and over space where they are fields; 1 for
    entries that are constant.
    """
    fields = trajectories.ndim - 2
    axes = (0, 1) if fields < 2 else (0, 1, 2, 3)
    mean, spread = jnp.mean(trajectories, axes), jnp.std(trajectories, axes)
    return mean, jnp.where(spread > 0, spread, 1.0)


def errors(shape: ScoreShape, weights: Array, windows: Array, given: Array, key: Key) -> Array:
    """What `ScoreModel.errors` holds, from standardised windows (n, length, *state) and parameters (n, p)."""
    n, length = windows.shape[:2]
    size = windows[0].size
    if size > _ERRORS:
        return jnp.zeros(0)
    levels = jnp.geomspace(*_LEVELS, _TABLE, dtype=windows.dtype)

    def one(window: Array, parameters: Array, level: Array, noise: Array) -> Array:
        return window - shape.denoiser(weights, parameters)(window + level * noise, level)

    def at(item: tuple[Array, Key]) -> Array:
        level, k = item
        noise = jax.random.normal(k, windows.shape, windows.dtype)
        missed = jax.lax.map(lambda v: one(v[0], v[1], level, v[2]), (windows, given, noise), batch_size=256)
        flat = missed.reshape(n, size)
        return (flat.T @ flat / n).reshape(length, -1, length, size // length)

    return jax.lax.map(at, (levels, jax.random.split(key, _TABLE)))


def covariance(standardised: Float[Array, "n rows ..."], windowed: bool) -> Array:
    """What `ScoreModel.covariance` holds, from standardised trajectories."""
    n, rows = standardised.shape[:2]
    flat = standardised.reshape(n, rows, -1)
    c = flat.shape[-1]
    if not windowed and rows * c <= _DENSE:
        centred = (flat - jnp.mean(flat, 0)).reshape(n, rows * c)
        return (centred.T @ centred / n).reshape(rows, c, rows, c)
    if c > _CHANNELS:
        return jnp.zeros(0)

    def lagged(lag: Array) -> Array:
        # The mean over pairs `lag` steps apart; those around the end are left out.
        ahead = jnp.roll(flat, -lag, 1)
        inside = (jnp.arange(rows) < rows - lag).astype(flat.dtype)
        return jnp.einsum("ntc,t,ntd->cd", flat, inside, ahead) / (n * (rows - lag))

    return jax.lax.map(lagged, jnp.arange(min(rows, _LAGS)))
