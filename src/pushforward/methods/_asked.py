"""Ask and tell: an `EKI` run whose simulations are made elsewhere, by a job scheduler or by hand."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import ArgumentError, InferenceError, MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods._inversion import FAILURES, Inversion, Step, ended
from pushforward.methods._outputs import Units, flat, succeeded
from pushforward.model.inverse import InverseProblem


class Asked(eqx.Module):
    """An ensemble that waits for the outputs of its members; `pf.save` and `pf.load` carry it to other processes.

    Attributes:
        members: values of the latent sites, by name, with a leading axis of the members: what is to be simulated.
        finished: whether the ensemble has arrived, so that `members` are the result.
        inversion: where the run stands.
        key: data of the key.
    """

    members: dict[str, Array]
    finished: bool
    inversion: Inversion
    key: Array


def start(method: Any, problem: InverseProblem, key: Key, first: Inversion) -> Asked:
    """Draws of the prior."""
    if method.noise == "simulated":
        raise MethodError('EKI(noise="simulated") simulates by itself; to ask and tell, leave noise= out.')
    return _asked(method, problem, first, jax.random.key_data(key))


def values_of(state: Asked, problem: InverseProblem, outputs: Any) -> dict[str, Array]:
    """The outputs of all members by site.

    Raises:
        ArgumentError: the run is over; outputs of another shape, or of other sites.
    """
    if state.finished:
        raise ArgumentError("the ensemble is finished: state.members are the result, and there is nothing to tell.")
    data = problem.observed_values()
    count, sites = state.inversion.z.shape[0], list(data)
    given = outputs if isinstance(outputs, dict) else {sites[0]: outputs}
    if set(given) != set(sites) or (len(sites) > 1 and not isinstance(outputs, dict)):
        found = sorted(given) if isinstance(outputs, dict) else "an array"
        raise ArgumentError(f"outputs are told by the names of the observed sites, {sites}; got {found}.")
    values = {}
    for name in sites:
        wanted = (count, *np.shape(data[name]))
        values[name] = jnp.asarray(np.asarray(given[name], float), jnp.result_type(float))
        if values[name].shape != wanted:
            raise ArgumentError(
                f"the outputs of '{name}' have shape {values[name].shape}; told must be the means of all members in "
                f"their order, {wanted}. Write NaN for a member that failed."
            )
    return values


def told_of(problem: InverseProblem, values: dict[str, Array], key: Key, perturbs: bool) -> Step:
    """The outputs of all members as a step takes them."""
    units = Units.of(problem)
    whitened = jax.vmap(units.whiten)(values)
    noise = jax.random.normal(key, whitened.shape, whitened.dtype) if perturbs else None
    plain = jax.vmap(lambda v: flat({name: v[name] for name in units.data}))(values)
    return Step(whitened, units.whitened, noise, succeeded(whitened, units.whitened), plain)


def after(method: Any, problem: InverseProblem, state: Asked, inversion: Inversion) -> Asked:
    """The state that asks for the next outputs.

    Raises:
        InferenceError: the run stopped; its `partial` is the state before, so that nothing is lost.
    """
    known = FAILURES.get(int(inversion.stopped))
    if known:
        raise InferenceError(f"EKI: {known}", Outcome.NONFINITE, state)
    return _asked(method, problem, inversion, state.key)


def _asked(method: Any, problem: InverseProblem, inversion: Inversion, key: Array) -> Asked:
    members = Runner().call(_members, problem, inversion.z)
    return Asked(members, bool(ended(inversion, method.time)), inversion, jnp.asarray(key))


def _members(problem: InverseProblem, z: Array) -> dict[str, Array]:
    return jax.vmap(problem.constrain)(z)
