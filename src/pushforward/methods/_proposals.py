"""How particles move: a proposal gives each its next state and the log weight that it earns by the step's data.

All proposals push standard normal noise through the user's step, so that none needs the transition density.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.model._chain import ChainStructure
from pushforward.model.state_space import Chain, Moved, StateSpace


class Proposed(eqx.Module):
    """Particles after a step; every leaf has the leading axis N.

    Attributes:
        state: (N, n).
        riders: what rides along; without the axis N where nothing in it is random.
        memory: what the proposal itself carries along.
        sites: values of the step's latent and deterministic sites.
        predicted: values of the same sites drawn by the model's own law, for the one-step prediction. Weights p / q
            would make it of `sites`, with infinite variance where q is much narrower than p.
        log_weight: log of p(data given particle) p(particle) / q(particle).
    """

    state: Array
    riders: list[Array]
    memory: Any
    sites: dict[str, Array]
    predicted: dict[str, Array]
    log_weight: Array


class Begun(eqx.Module):
    """Particles at the start; every leaf has the leading axis N.

    Attributes:
        state: (N, n).
        riders: what rides along.
        memory: what the proposal carries along.
        log_weight: log density of the data that are observed with the initial state (N,).
    """

    state: Array
    riders: list[Array]
    memory: Any
    log_weight: Array


class Proposal(eqx.Module):
    """Base of proposals; subclasses are final."""

    @property
    def has_density(self) -> bool:
        """Whether particles are values of all latent sites, so that transition densities may weigh them."""
        return True

    def why_not(self, space: StateSpace) -> str | None:
        """Why the proposal does not fit a model, or None."""
        return None

    def noise_dimension(self, chain: Chain) -> int:
        """Length q of the standard normal noise of a particle's step."""
        return chain.noise_dimension

    def begin(self, chain: Chain, noise: Array) -> Begun:
        """Particles at the start, from noise z_0 (N, k)."""
        state, riders, observed = jax.vmap(chain.start)(noise)
        parts = [jnp.sum(v.reshape(v.shape[0], -1), 1) for v in observed.log_prob.values()]
        return Begun(state, riders, (), sum(parts, jnp.zeros(noise.shape[0], state.dtype)))

    def states(self, state: Array, memory: Any) -> Array:
        """The states (N, n) that go with the last step's sites, where a particle's state holds moments."""
        return state

    def smoothed(self, chain: Chain, noise: Array, history: Any, end: Any, last: Array, key: Key) -> Any:
        """Smoothing draws in the proposal's own way, where it has no density (see `has_density`).

        Args:
            chain: the model at its parameters.
            noise: noise of the initial particles (N, k).
            history: `History` of the run.
            end: particles after the last step.
            last: indices of the draws among them (draw,).
            key: typed JAX key.

        Returns:
            All sites, their log prior and log likelihood, the last carry, and the number of distinct initial particles.
        """
        raise NotImplementedError

    def look(self, chain: Chain, state: Array, riders: list[Array], memory: Any, t: Array) -> Array | None:
        """Log of first-stage weights (N,), a guess of how well each particle will fit the data; None: none."""
        return None

    @abstractmethod
    def move(self, chain: Chain, state: Array, riders: list[Array], memory: Any, t: Array, normals: Array) -> Proposed:
        """Move particles through step `t`.

        Args:
            chain: the model at its parameters.
            state: (N, n).
            riders: what rides along.
            memory: what the proposal carries along.
            t: number of the step, from 0.
            normals: standard normal noise (N, q), q from `noise_dimension`; zeros give the proposal's center.
        """


class Bootstrap(Proposal):
    """Particles move by the model's own law (Gordon, Salmond and Smith 1993); the data weigh them afterwards.

    Where a step observes the state that comes in and then moves it, the data weigh first: particles weighed after a
    move would be copied as they are, and the next data would see copies.
    """

    def look(self, chain: Chain, state: Array, riders: list[Array], memory: Any, t: Array) -> Array | None:
        """See `Proposal.look`; the exact weight, where the move has no part in it."""
        if _weighs_after_moving(chain.structure):
            return None
        still = jnp.zeros((state.shape[0], chain.noise_dimension), state.dtype)
        return log_likelihood(step_all(chain, state, riders, t, still))

    def move(self, chain: Chain, state: Array, riders: list[Array], memory: Any, t: Array, normals: Array) -> Proposed:
        """See `Proposal.move`."""
        moved = step_all(chain, state, riders, t, normals)
        value = log_likelihood(moved)
        return Proposed(moved.state, riders_of(chain, moved), memory, moved.sites, moved.sites, value)


def _weighs_after_moving(s: ChainStructure) -> bool:
    """Whether the density of a step's data depends on what is sampled in the step."""

    def find() -> bool:
        if s.fused or not s.body.shapes["observed"]:
            return True
        sources = s.body.sources("observed") | s.body.sources("factor")
        return any(k[0] == "noise" for k in sources)

    return s.remember("weighs after moving", find)


def step_all(chain: Chain, state: Array, riders: list[Array], t: Array, noise: Array) -> Moved:
    """The step of all particles."""
    axes = 0 if chain.structure.discrete else None
    return jax.vmap(chain.step, (0, axes, None, 0))(state, riders, t, noise)


def riders_of(chain: Chain, moved: Moved) -> list[Array]:
    """What rides along after a step; without the axis of particles where nothing in it is random."""
    return moved.riders if chain.structure.discrete else [r[0] for r in moved.riders]


def log_likelihood(moved: Moved) -> Array:
    """Log density of the step's data (N,), factors included."""
    parts = [jnp.sum(v.reshape(v.shape[0], -1), 1) for v in moved.observed.log_prob.values()]
    return sum(parts, moved.factor)


def example(space: StateSpace) -> dict[str, Any]:
    """Inputs of `Chain.step` by name, as shapes, for questions about its data flow."""
    values = {n: jnp.zeros(space.structure.joint.sites[n].shape) for n in space.structure.parameters}
    chain = jax.eval_shape(space.chain, values)
    state, riders, _ = jax.eval_shape(lambda c: c.start(jnp.zeros(c.initial_dimension)), chain)
    noise = jnp.zeros(space.noise_dimension)
    return {"chain": chain, "state": state, "riders": riders, "step": jnp.asarray(0), "noise": noise}
