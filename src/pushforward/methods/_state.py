"""What a state method is: it integrates the trajectory of a `StateSpace` out, and draws it."""

from abc import abstractmethod
from typing import Any, ClassVar, Self

import equinox as eqx

from pushforward._errors import MethodError
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
        stats: numbers about each step (T,), such as ``ess`` and ``log_likelihood_increment``.
    """

    posterior: dict[str, Array]
    filtering: dict[str, Array]
    one_step: dict[str, Array]
    log_prior: dict[str, Array]
    log_likelihood: dict[str, Array]
    last: tuple[Array, list[Array]]
    log_evidence: Array
    summary: dict[str, Array]
    stats: dict[str, Array] = eqx.field(default_factory=dict)


class Increment(eqx.Module):
    """What one step of a stream gives: moments of the filtering law of its sites, and how likely its data were.

    Attributes:
        mean: filtering mean by site of the step, latent and deterministic; parameters that are part of the state, too.
        sd: standard deviations, likewise.
        log_likelihood: log p(y_t given y_1..t-1), a scalar.
        summary: numbers about the step, scalars. Where a method has them, under the names ``ess`` (effective sample
            size) and ``surprise`` (squared innovations over their expectation).
    """

    mean: dict[str, Array]
    sd: dict[str, Array]
    log_likelihood: Array
    summary: dict[str, Array]


class StateMethod(Method):
    """Base of filters and smoothers; subclasses are final.

    Attributes:
        differentiable: whether `log_likelihood` has a gradient in the parameters.
        densities: whether draws come with their log prior and log likelihood.
        augments: whether free parameters may join the state.
    """

    accepts: ClassVar[type] = StateSpace
    differentiable: ClassVar[bool] = True
    densities: ClassVar[bool] = True
    augments: ClassVar[bool] = True
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

    def why_not_alone(self, problem: Any) -> str | None:
        """Why the method cannot give a result of its own, where it may serve under `states=`; or None."""
        return None

    def trained_on(self, space: StateSpace, runner: Any) -> tuple[Self, dict[str, Any], int]:
        """The method ready to run by itself; one that learns and is not trained learns from these data first.

        Args:
            space: the model with its data.
            runner: compiles, times, shows progress and checkpoints.

        Returns:
            The method, numbers about the training for the result's attributes, and how often the training ran the
            model over all steps, with gradients; nothing and 0 where there was none.
        """
        return self, {}, 0

    def members_of(self, draws: int) -> int:
        """How many times each step of the model is run."""
        return 1 + draws

    def run(self, problem: StateSpace, key: Key, draws: int, runner: Any) -> Any:
        """`infer` runs state methods through `trajectories`; this is the same for a caller with a `Runner`."""
        return runner.call(lambda space, key: self.trajectories(space.chain(), key, draws, self.store), problem, key)

    @property
    def online(self) -> bool:
        """Whether the method assimilates one step at a time, for `pf.online`."""
        return type(self).advance is not StateMethod.advance

    def begin(self, chain: Chain, key: Key) -> tuple[Any, Array]:
        """The belief about the initial state given the data that depend on it, and their log likelihood.

        Args:
            chain: the model with the data of its first step.
            key: typed JAX key.

        Returns:
            A pytree of arrays of fixed shapes, without NaN and +infinity while all is well, and a scalar.
        """
        raise not_online(self)

    def advance(self, chain: Chain, belief: Any, key: Key) -> tuple[Any, Increment]:
        """The belief after one more step.

        Args:
            chain: the model with the data of this step alone, step 0 of `chain.step`.
            belief: that of `begin`, or of the step before.
            key: typed JAX key of the step.
        """
        raise not_online(self)


def not_online(method: StateMethod) -> MethodError:
    return MethodError(
        f"{type(method).__name__} has no online form: it does not assimilate one step at a time. Use pf.online with "
        "pf.Kalman() or pf.EnKF(members=100), or pf.infer with all data."
    )
