"""Which states of a trajectory are observed, and how well: the scenarios of problems for trajectory sampling.

Source: Rozet and Louppe (2023), Score-based data assimilation, NeurIPS 36, arXiv:2306.10574, section 4.1.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Scenario(NamedTuple):
    """An observation in every `every`-th state, the first included.

    Attributes:
        noise: standard deviation of an observation.
        every: 1 observes all states.
        component: the coordinate that is seen.
    """

    noise: float
    every: int
    component: int = 0

    def mask(self, states: int) -> np.ndarray:
        """True where one of `states` states is observed, shape (states,)."""
        return np.arange(states) % self.every == 0

    def observe(self, key: jax.Array, seen: jax.Array) -> jax.Array:
        """Noisy observations of the component's values in all states, `seen`, shape (states,); NaN elsewhere."""
        noisy = seen + self.noise * jax.random.normal(key, seen.shape, seen.dtype)
        return jnp.where(self.mask(len(seen)), noisy, jnp.nan)


def scenario[Kind](known: Mapping[str, Kind], name: str) -> Kind:
    """The scenario of that name.

    Raises:
        ValueError: there is none; the text lists the names.
    """
    if name not in known:
        raise ValueError(f"no scenario is called {name!r}; the names are {', '.join(known)}")
    return known[name]
