"""Predictions of a Gaussian likelihood as one vector in units of its noise: what ensemble inversion sees of a model."""

from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.math.noise import DataNoise, whiten
from pushforward.model.inverse import InverseProblem

_HUGE = 1e6
"""Residuals that many times the median member's count as a failure."""


class Units(eqx.Module):
    """Data of all observed sites with their noise, which does not depend on latent sites.

    Attributes:
        noise: by site, in one of the forms of `math.noise`.
        data: by site, NaN where missing.
    """

    noise: dict[str, DataNoise]
    data: dict[str, Array]

    @classmethod
    def of(cls, problem: InverseProblem) -> Self:
        """Noise and data of a problem."""
        found = problem.forward(jnp.zeros(problem.dimension))
        dtype = jnp.result_type(float)
        return cls(found.noise, {name: jnp.asarray(value, dtype) for name, value in found.data.items()})

    @property
    def whitened(self) -> Array:
        """Data (m,) in units of the noise, NaN where missing."""
        present = jnp.concatenate([jnp.ravel(~jnp.isnan(v)) for v in self.data.values()])
        return jnp.where(present, self.whiten(self.data), jnp.nan)

    def whiten(self, values: dict[str, Array]) -> Array:
        """R^-1/2 of values that are shaped like the data, as one vector (m,), 0 where data are missing."""
        present = {name: ~jnp.isnan(v) for name, v in self.data.items()}
        return jnp.concatenate([jnp.ravel(whiten(values[n], noise, present[n])) for n, noise in self.noise.items()])


def predict(problem: InverseProblem, units: Units, z: Array) -> Array:
    """Predicted data (m,) at z, in units of the noise."""
    return units.whiten(problem.forward(z).mean)


def predict_both(problem: InverseProblem, units: Units, z: Array) -> tuple[Array, Array]:
    """Predicted data (m,) at z, in units of the noise and in their own."""
    mean = problem.forward(z).mean
    return units.whiten(mean), flat({name: mean[name] for name in units.data})


def simulate_twice(problem: InverseProblem, z: Array, key: Key) -> tuple[Array, Array]:
    """Two independent simulations of the data at z, (m,) each."""

    def one(k: Array) -> Array:
        found = problem.simulate_at(z, k)
        named = found.data | {n: v for n, v in found.deterministics.items() if n in problem.structure.data}
        return flat({name: named[name] for name in problem.observed_values()})

    first, second = jax.vmap(one)(jax.random.split(key))
    return first, second


def flat(values: dict[str, Array]) -> Array:
    """All values as one vector of floating numbers."""
    return jnp.concatenate([jnp.ravel(v).astype(jnp.result_type(float)) for v in values.values()])


def succeeded(outputs: Array, data: Array) -> Array:
    """Which members have usable outputs: finite, and no residual of absurd size; (members,).

    A residual is absurd if it is a million times as long as the median member's.
    """
    present = ~jnp.isnan(data)
    size = jnp.linalg.norm(jnp.where(present, outputs - jnp.where(present, data, 0.0), 0.0), axis=-1)
    finite = jnp.isfinite(size)
    typical = jnp.nanmedian(jnp.where(finite, size, jnp.nan))
    return finite & (size <= _HUGE * jnp.maximum(typical, 1.0))
