"""A state-space model with its trajectory integrated out: a NumPyro model of the parameters alone.

It samples the parameters as the user's model does and adds one factor, the log likelihood that a state method
gives. Every method for inverse problems runs on it unchanged.
"""

from collections.abc import Callable, Hashable

import jax.numpy as jnp
import numpyro

from pushforward._types import Array, Key
from pushforward.model import _scan_trace
from pushforward.model._arguments import Arguments
from pushforward.model._chain import ChainStructure
from pushforward.model._reading import Structure, _fill
from pushforward.model.inverse import InverseProblem
from pushforward.model.state_space import Chain, StateSpace, nothing

FACTOR = "log_likelihood_of_states"


def marginal(
    space: StateSpace, log_likelihood: Callable[[Chain, Key], Array], key: Key, identity: Hashable
) -> InverseProblem:
    """The model of the parameters alone.

    Args:
        space: the state-space model.
        log_likelihood: log p(data given parameters) at a chain.
        key: what stochastic methods draw from, the same at every evaluation; `InverseProblem.with_key` changes it.
        identity: what tells one `log_likelihood` from another.
    """
    s = space.structure
    arrays = (*space.arrays, key)

    def make() -> Structure:
        hidden = _hidden(s)

        def model(arrays: tuple) -> None:
            *own, key = arrays
            scanned = nothing(s)
            stand_in = (scanned["last"], scanned["stacked"], s.length)
            values = _scan_trace.parameters_only(s.joint.call(tuple(own)), hidden, stand_in, s.parameters)
            chain = StateSpace(tuple(own), s).chain(values)
            _scan_trace.add_log_density(FACTOR, log_likelihood(chain, key))

        arguments = Arguments(arrays, lambda given: ((given,), {}), None)
        structure = Structure(model, arguments, keyed=True)
        with numpyro.validation_enabled(False):
            _fill(structure, arrays, ())
        return structure

    structure = s.remember(("marginal", identity, jnp.result_type(float).name), make)
    return InverseProblem(arrays, structure)


def _hidden(s: ChainStructure) -> frozenset[str]:
    """Sites outside the scan that are integrated out or follow from what is."""
    gone = {*s.initial, *s.late}
    names = {*gone, *s.first, *s.fused}
    for name in s.around.shapes["values"]:
        sources = s.around.sources("values", name)
        if {k[0] for k in sources} & {"last", "stacked"} or any(k[0] == "outer" and k[1] in gone for k in sources):
            names.add(name)
    return frozenset(names)
