"""What methods share that infer parameters over a state method whose likelihood is an estimate."""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key, Noise
from pushforward.methods._base import Draws, Method
from pushforward.methods._state import StateDraws, StateMethod
from pushforward.model._trace import Evaluation
from pushforward.model.inverse import InverseProblem
from pushforward.model.marginal import marginal
from pushforward.model.state_space import Chain, StateSpace

Groups = dict[str, dict[str, Array]]

SCOUTS, TRIES = 20, 200
"""Draws of the prior of which the likeliest starts a chain, and how many are tried while all are impossible."""
_BATCH = 10
_MEMORY, _FIRST = 3.0, 10.0
_GAIN, _DECAY = 2.0, 0.6


class OverStates(Method):
    """Base of methods that draw parameters and trajectory together, by a state method; subclasses are final."""

    def why_not(self, problem: InverseProblem) -> str | None:
        """See `Method.why_not`."""
        if any("time" in site.dims for site in problem.sites.values()):
            return None
        return "it draws parameters and a trajectory, and the model has no numpyro scan"

    def why_not_states(self, space: StateSpace, states: StateMethod) -> str | None:
        """Why the method does not fit a state method on a model, or None."""
        return None

    @abstractmethod
    def run_with_states(
        self, space: StateSpace, states: StateMethod, key: Key, draws: int, runner: Runner
    ) -> tuple[Draws, Groups]:
        """Draw from the joint posterior of parameters and trajectory.

        Args:
            space: the state-space model.
            states: what estimates the likelihood, or moves the trajectory.
            key: typed JAX key.
            draws: number of draws (per chain).
            runner: compiles, times, shows progress and checkpoints.

        Returns:
            The result, whose positions are noise z of the parameters, and the groups of draws by site, all with
            leading axes (chain, draw).
        """

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """These methods need the chain itself: `infer` calls `run_with_states`."""
        raise MethodError(needs_states(self))


def needs_states(method: Method) -> str:
    """What to write when `states=` is missing."""
    name = type(method).__name__
    return (
        f"{name} needs states=pf.ParticleFilter(...), which estimates the likelihood of its parameters. Write "
        f"infer(model, method=pf.{name}(), states=pf.ParticleFilter(200)); for a model without a scan use "
        "pf.PreconditionedCrankNicolson() or pf.NUTS()."
    )


class Parameters(eqx.Module):
    """The parameters of a state-space model as functions of noise z ~ N(0, I).

    Attributes:
        space: the state-space model.
        problem: its parameters alone, with what is observed outside the scan and depends on nothing else.
    """

    space: StateSpace
    problem: InverseProblem

    @property
    def dimension(self) -> int:
        """Length d of z."""
        return self.problem.dimension

    def at(self, z: Noise) -> tuple[Chain, Evaluation]:
        """The chain at z, and the sites outside it."""
        found = self.problem.evaluate(z)
        return self.space.chain(found.sites), found

    def log_likelihood(self, states: Any, z: Noise, source: Any) -> Array:
        """Estimate of log p(all data given parameters); NaN counts as zero likelihood.

        Args:
            states: has `log_likelihood(chain, source)`.
            z: noise of the parameters.
            source: what the estimate is drawn from, a key or random numbers.
        """
        chain, found = self.at(z)
        value = found.total_log_likelihood + states.log_likelihood(chain, source)
        return jnp.where(value < jnp.inf, value, -jnp.inf)

    def groups(self, states: Any, z: Noise, source: Any) -> Groups:
        """All sites at z with one trajectory drawn from the particles of `log_likelihood` at the same source."""
        chain, found = self.at(z)
        drawn: StateDraws = states.trajectories(chain, source, 1, states.store)
        parts = (drawn.posterior, drawn.log_prior, drawn.log_likelihood, drawn.last)
        return grouped(found, *jax.tree.map(lambda v: v[0], parts))


def grouped(found: Evaluation, posterior: dict, log_prior: dict, log_likelihood: dict, last: tuple) -> Groups:
    """The groups of one draw."""
    state, riders = last
    return {
        "posterior": found.sites | found.deterministics | posterior,
        "log_prior": log_prior,
        "log_likelihood": log_likelihood,
        "last_carry": {"state": state} | {f"rider_{i}": r for i, r in enumerate(riders)},
    }


def parameters(space: StateSpace) -> Parameters:
    """The parameters of a model, its trajectory left out."""
    return Parameters(space, marginal(space, _nothing, jax.random.key(0), "parameters"))


def _nothing(chain: Chain, key: Key) -> Array:
    return jnp.zeros(())


def buffers(draw: Any, *lead: int) -> Any:
    """Zeros for what `draw` (a function without arguments) returns, with leading axes `lead`."""
    return jax.tree.map(lambda v: jnp.zeros((*lead, *v.shape), v.dtype), jax.eval_shape(draw))


def find_start(given: Parameters, states: StateMethod, key: Key) -> tuple[Array, Array]:
    """The likeliest of 20 draws of the prior; where all are impossible, the first possible one of 200.

    Starting in the bulk saves warm-up, and the noise of an estimate is largest where the likelihood is small.

    Returns:
        z (d,), and the log of its likelihood estimate, -inf where none was found.
    """

    def better(carry: tuple) -> tuple:
        i, z, value = carry
        first, second = jax.random.split(jax.random.fold_in(key, i))
        proposal = jax.random.normal(first, z.shape, z.dtype)
        found = given.log_likelihood(states, proposal, second).astype(value.dtype)
        return i + 1, jnp.where(found > value, proposal, z), jnp.maximum(found, value)

    def searching(carry: tuple) -> Array:
        return (carry[0] < SCOUTS) | ((carry[0] < TRIES) & (carry[2] == -jnp.inf))

    z = jnp.zeros(given.dimension)
    return jax.lax.while_loop(searching, better, (jnp.asarray(0), z, jnp.full((), -jnp.inf, z.dtype)))[1:]


def started(values: Array) -> Array:
    """SUCCESS where all chains have a start, else NONFINITE_START."""
    return jnp.where(jnp.all(jnp.isfinite(values)), int(Outcome.SUCCESS), int(Outcome.NONFINITE_START))


class Walk(eqx.Module):
    """A random walk z' = z + s C^1/2 xi that adapts while it is told to.

    The covariance C is the chain's own, of about its latest third (Haario, Saksman and Tamminen 2001, with weights
    that forget the start), and log s follows the acceptance by Robbins and Monro (Andrieu and Thoms 2008, algorithm 4).
    s stays within a factor of 2.562 / sqrt(d), optimal for a noisy likelihood in many dimensions (Sherlock, Thiery,
    Roberts and Rosenthal 2015): noise alone can keep the acceptance low, and no small step would then raise it.

    Attributes:
        mean: (d,).
        covariance: C (d, d).
        log_scale: log s.
    """

    mean: Array
    covariance: Array
    log_scale: Array

    @classmethod
    def start(cls, z: Array) -> "Walk":
        """A walk from z with the prior's covariance."""
        d = z.shape[0]
        return cls(z, jnp.eye(d, dtype=z.dtype), jnp.asarray(_log_best(d), z.dtype))

    def propose(self, z: Array, key: Key) -> Array:
        """A proposal from z."""
        d = z.shape[0]
        # A chain that has not moved has C = 0 but for rounding.
        floor = 1e-8 + 1e-5 * jnp.trace(self.covariance) / d
        root = jnp.linalg.cholesky(self.covariance + floor * jnp.eye(d, dtype=z.dtype))
        return z + jnp.exp(self.log_scale) * (root @ jax.random.normal(key, z.shape, z.dtype))

    def adapted(self, z: Array, acceptance: Array, i: Array, active: Array, target: float, least: float) -> "Walk":
        """The walk after step i of warm-up; itself where not `active`.

        Args:
            z: where the chain is.
            acceptance: probability of the step.
            i: number of the step.
            active: whether the chain is in warm-up.
            target: acceptance that is aimed at.
            least: lower bound of s, times 2.562 / sqrt(d).
        """
        gain = jnp.where(active, _MEMORY / (i + _FIRST), 0.0)
        off = z - self.mean
        best = _log_best(z.shape[0])
        change = jnp.where(active, _GAIN * (1.0 + i) ** -_DECAY * (acceptance - target), 0.0)
        found = (
            self.mean + gain * off,
            self.covariance + gain * (jnp.outer(off, off) - self.covariance),
            jnp.clip(self.log_scale + change, best + jnp.log(least), best + jnp.log(2.0)),
        )
        return Walk(*jax.tree.map(lambda new, old: new.astype(old.dtype), found, tuple(vars(self).values())))


def _log_best(d: int) -> Array:
    return jnp.log(2.562 / d**0.5)


def acceptance_of(log_ratio: Array) -> Array:
    """min(1, exp(log ratio)), 0 for NaN."""
    return jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))


def likelihood_noise(given: Parameters, states: Any, z: Array, sources: Any) -> Array:
    """Estimates of the log likelihood at one point, one for each source."""
    return jax.lax.map(lambda source: given.log_likelihood(states, z, source), sources, batch_size=_BATCH)
