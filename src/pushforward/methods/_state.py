"""What a state method is: it integrates the trajectory of a `StateSpace` out, and draws it."""

from abc import abstractmethod
from typing import Any, ClassVar

import equinox as eqx

from pushforward._types import Array, Key
from pushforward.methods._base import Method
from pushforward.model.state_space import Chain, StateSpace

STORES = {
    "draws": "joint smoothing draws, and draws of the filtering and one-step laws",
    "moments": "means and standard deviations of the filtering and one-step laws, draws of the last step",
    "last": "draws of the last step",
}


class StateDraws(eqx.Module):
    """What a state method found at given parameters.

    Attributes:
        posterior: draws by site, leading axis draw; sites of the scan have time next.
        filtering: the same of p(x_t given y_1..t); with `store="moments"` the leading axis holds mean and sd.
        one_step: the same of p(x_t given y_1..t-1).
        log_prior: log density of latent sites, per draw; empty where not known.
        log_likelihood: log density of the observed sites, per draw; empty where not known.
        last: the carry after the last step, draws of its state (draw, n) and what rides along (draw, ...).
        log_evidence: log p(data given parameters), exact or estimated.
        summary: numbers about the run.
    """

    posterior: dict[str, Array]
    filtering: dict[str, Array]
    one_step: dict[str, Array]
    log_prior: dict[str, Array]
    log_likelihood: dict[str, Array]
    last: tuple[Array, list[Array]]
    log_evidence: Array
    summary: dict[str, Array]


class StateMethod(Method):
    """Base of filters and smoothers; subclasses are final.

    Attributes:
        differentiable: whether `log_likelihood` has a gradient in the parameters.
        densities: whether draws come with their log prior and log likelihood.
    """

    accepts: ClassVar[type] = StateSpace
    differentiable: ClassVar[bool] = True
    densities: ClassVar[bool] = True
    augment: eqx.AbstractVar[bool]
    store: eqx.AbstractVar[str]

    @abstractmethod
    def log_likelihood(self, chain: Chain, key: Key) -> Array:
        """log p(data of the trajectory given parameters); stochastic methods draw their noise from `key`.

        What is observed outside the scan and depends on parameters alone is not part of it.
        """

    @abstractmethod
    def trajectories(self, chain: Chain, key: Key, draws: int, store: str) -> StateDraws:
        """Draws of trajectories at given parameters.

        Args:
            chain: the model at its parameters.
            key: typed JAX key.
            draws: number of draws.
            store: one of `STORES`.
        """

    def members_of(self, draws: int) -> int:
        """How many times each step of the model is run."""
        return 1 + draws

    def run(self, problem: StateSpace, key: Key, draws: int, runner: Any) -> Any:
        """`infer` runs state methods through `trajectories`; this is the same for a caller with a `Runner`."""
        return runner.call(lambda space, key: self.trajectories(space.chain(), key, draws, self.store), problem, key)
