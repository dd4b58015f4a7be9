"""Options of `ThreeDVar` as they are kept, and its sites with their standard deviations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import MethodError
from pushforward._types import Array
from pushforward.methods._gain_filter import Estimate
from pushforward.methods._gains import GAINS, FixedGain, Gain
from pushforward.methods._online import site_moments
from pushforward.model.observing import observed_at
from pushforward.model.state_space import Chain, StateSpace

_SYMMETRIC = 1e-5
"""Asymmetry of a covariance, relative to its largest entry, that counts as rounding."""


def covariance_option(value: Any) -> Any:
    """ "climatology", a symmetric positive definite matrix as an array, or a function.

    Raises:
        MethodError: anything else.
    """
    if value is None or (isinstance(value, str) and value == "climatology"):
        return "climatology"
    if callable(value):
        return value
    expected = "'climatology', a covariance matrix (n, n) or a function v -> B v"
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise MethodError(f"ThreeDVar(covariance=...) takes {expected}; got {value!r}.")
    matrix = np.asarray(value, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise MethodError(f"ThreeDVar(covariance=...) takes {expected}; got an array of shape {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise MethodError("ThreeDVar(covariance=...) has entries that are not finite.")
    if np.abs(matrix - matrix.T).max() > _SYMMETRIC * np.abs(matrix).max():
        raise MethodError("ThreeDVar(covariance=...) is not symmetric. Give (B + B.T) / 2 where that is what is meant.")
    matrix = (matrix + matrix.T) / 2
    lowest = float(np.linalg.eigvalsh(matrix)[0])
    if not lowest > 0:
        raise MethodError(
            f"ThreeDVar(covariance=...) is not positive definite: its lowest eigenvalue is {lowest:.3g}. A covariance "
            "of fewer samples than states is singular: localise it, or add a multiple of the identity."
        )
    return jnp.asarray(matrix)


def gain_option(value: Any) -> Gain | None:
    """An instance, from a name or an array.

    Raises:
        MethodError: anything else, or an array that is no matrix of finite numbers.
    """
    if value is None or isinstance(value, Gain):
        return value
    if isinstance(value, str) and value in GAINS:
        return GAINS[value]()
    if isinstance(value, str) or callable(value) or not hasattr(value, "__len__"):
        raise MethodError(
            f"ThreeDVar(gain=...) takes an array (n, m), one of {list(GAINS)}, or an instance such as "
            f"pf.CirculantGain(width=5); got {value!r}."
        )
    matrix = np.asarray(value, float)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise MethodError(
            f"ThreeDVar(gain=...) takes a matrix (n, m) of finite numbers; got an array of shape {matrix.shape}."
        )
    return FixedGain(jnp.asarray(matrix))


def sizes(space: StateSpace) -> tuple[int, int]:
    """Entries n of the state, and data m of a step."""
    values = {n: jnp.zeros(space.structure.joint.sites[n].shape) for n in space.parameters}

    def data() -> Array:
        chain = space.chain(values)
        state, riders, _ = chain.start(jnp.zeros(chain.initial_dimension))
        return chain.step(state, riders, jnp.asarray(0), jnp.zeros(chain.noise_dimension)).observed.data

    return space.state_dimension, jax.eval_shape(data).shape[0]


def law_of_sites(
    chain: Chain, before: Estimate, t: Array, law: tuple[Array, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sites of a step at the mean of the state that it leads to, and their standard deviations, NaN without covariance.

    Args:
        chain: the model at its parameters.
        before: the estimate before the step.
        t: its number.
        law: mean (n,) and covariance (n, n) of the state after it.
    """
    mean, cov = law

    def sites(after: Array) -> dict[str, Array]:
        return observed_at(chain, before.mean, before.riders, t, after)[1]

    if not cov.size:
        found = sites(mean)
        return found, jax.tree.map(lambda v: jnp.full_like(v, jnp.nan), found)
    return site_moments(sites, mean, cov)


def kept(chain: Chain, before: Estimate, t: Array, law: tuple[Array, Array], store: str) -> dict[str, Array]:
    """What a group holds of a step: mean and standard deviation, the mean as one draw, or nothing."""
    if store == "last":
        return {}
    if store == "moments":
        return jax.tree.map(lambda *v: jnp.stack(v), *law_of_sites(chain, before, t, law))
    return {n: v[None] for n, v in observed_at(chain, before.mean, before.riders, t, law[0])[1].items()}
