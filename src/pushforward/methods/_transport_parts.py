"""The interchangeable part of a transport filter: which map carries forecasts to analyses, and how it is learned."""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from pushforward._types import Array, Key
from pushforward.learned.training import Adam
from pushforward.math import transport_maps
from pushforward.math.transport_maps import Shift
from pushforward.methods._base import check_integer, check_positive


class TransportMap(eqx.Module):
    """Base of analysis maps; subclasses are final.

    Attributes:
        differentiable: whether the analysis has a gradient in what it is given.
    """

    differentiable: ClassVar[bool] = False

    @abstractmethod
    def moved(self, x: Array, y: Array, data: Array, key: Key) -> Array:
        """Analysis members from pairs of forecast and simulated data.

        Args:
            x: forecast in units of its sample, (N, n).
            y: simulated data in units of theirs, (N, m); zero where data are missing.
            data: in the same units, (m,).
            key: for training by random choices.
        """


class AffineMap(TransportMap):
    """The affine map of greatest likelihood: the stochastic ensemble Kalman update with sampled gain."""

    differentiable: ClassVar[bool] = True

    def moved(self, x: Array, y: Array, data: Array, key: Key) -> Array:
        """See `TransportMap.moved`."""
        return transport_maps.affine(x, y, data)


class TriangularMap(TransportMap):
    """A triangular map of greatest likelihood, fitted at each step (Spantini, Baptista and Marzouk 2022).

    Location, width and shape of each entry change with the data and the entries before it, so that a posterior may
    have two modes. A convex problem for each entry, of (1 + (n + m) bumps)(1 + steps) numbers: for states of a few
    entries, and some hundred members.

    Args:
        bumps: functions of each coordinate that an entry depends on.
        rises: smooth steps that shape an entry's own law.
        penalty: of what is not affine, times 1 / sqrt N; larger for fewer members.
    """

    bumps: int = 6
    rises: int = 12
    penalty: float = 0.03

    def __check_init__(self):
        check_integer("TriangularMap", 2, bumps=self.bumps)
        check_integer("TriangularMap", 1, rises=self.rises)
        check_positive("TriangularMap", penalty=self.penalty)

    def moved(self, x: Array, y: Array, data: Array, key: Key) -> Array:
        """See `TransportMap.moved`."""
        return transport_maps.triangular(x, y, data, self.bumps, self.rises, self.penalty)


class EnergyTransport(TransportMap):
    """A map by a small network, trained at each step by energy distance; no density appears anywhere.

    The joint law of (T(x, y, y'), y'), y' independent of (x, y), is brought near the law of the pairs (Bach, Baptista,
    Sanz-Alonso and Stuart 2024, arXiv:2410.10523). It starts from the affine map. Costs steps x N^2 distances a step.

    Args:
        width: of the network's one layer.
        steps: of Adam.
        learning_rate: at the start; it falls to zero along half a cosine.
    """

    width: int = 32
    steps: int = 300
    learning_rate: float = 0.02

    def __check_init__(self):
        check_integer("EnergyTransport", 1, width=self.width, steps=self.steps)
        check_positive("EnergyTransport", learning_rate=self.learning_rate)

    def moved(self, x: Array, y: Array, data: Array, key: Key) -> Array:
        """See `TransportMap.moved`."""
        first, second = jax.random.split(key)
        trained = self._trained(self._start(x, y, first), x, y, second)
        return transport_maps.shifted(trained, x, y, jnp.broadcast_to(data, y.shape))

    def _start(self, x: Array, y: Array, key: Key) -> Shift:
        n, m = x.shape[1], y.shape[1]
        seen = n + 2 * m
        inner = jax.random.normal(key, (self.width, seen), x.dtype) * (2.0 / seen**0.5)
        offset = jax.random.normal(jax.random.fold_in(key, 1), (self.width,), x.dtype)
        outer = 1e-3 * jax.random.normal(jax.random.fold_in(key, 2), (n, self.width), x.dtype)
        return Shift(transport_maps.regression(x, y), inner, offset, outer)

    def _trained(self, start: Shift, x: Array, y: Array, key: Key) -> Shift:
        flat, back = ravel_pytree(start)
        pairs = jnp.concatenate([x, y], 1)

        def loss(weights: Array, own: Key) -> Array:
            new = jax.random.permutation(own, y)
            moved = transport_maps.shifted(back(weights), x, y, new)
            return transport_maps.energy_distance(jnp.concatenate([moved, new], 1), pairs)

        def step(number: Array, adam: Adam) -> Adam:
            slope = jax.grad(loss)(adam.weights, jax.random.fold_in(key, number))
            rate = 0.5 * self.learning_rate * (1 + jnp.cos(jnp.pi * number / self.steps))
            return adam.moved(slope, number, rate)

        return back(jax.lax.fori_loop(0, self.steps, step, Adam.start(flat)).weights)


MAPS: dict[str, type[TransportMap]] = {"affine": AffineMap, "triangular": TriangularMap, "energy": EnergyTransport}
