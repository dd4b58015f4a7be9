"""`PMMH`: Metropolis-Hastings on the parameters with an estimated likelihood."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods._base import Draws, check_fraction, check_integer, count
from pushforward.methods._correlated import Correlated, why_not_correlated
from pushforward.methods._pseudo_marginal import (
    SCOUTS,
    TRIES,
    Groups,
    OverStates,
    Parameters,
    Walk,
    acceptance_of,
    buffers,
    likelihood_noise,
    parameters,
    started,
)
from pushforward.methods._state import StateMethod
from pushforward.methods.particle_filter import ParticleFilter
from pushforward.model.state_space import StateSpace

_REPEATS = 40
_NOISY, _FEW = 2.0, 0.02
_LEAST_SCALE = 0.25


class PMMH(OverStates):
    """Particle marginal Metropolis-Hastings: exact draws of parameters and trajectory by a noisy likelihood.

    The likelihood estimate of the point where a chain stands is kept until the chain moves, and every proposal gets an
    estimate from a new key. With an unbiased estimate (`pf.ParticleFilter` without `regularization`) the draws are
    exact for any number of particles; few of them only make the chains stand still for long. Each draw comes with the
    trajectory of one of the particles behind its estimate, so that (parameters, trajectory) is a draw of the joint
    posterior. With `pf.EnKF` the draws are those of its approximate likelihood, with `pf.Kalman` this is adaptive
    Metropolis.

    The proposal is a random walk whose covariance and scale adapt during warm-up only, from the likeliest of 20 draws
    of the prior. Each chain is a run of its own, and R-hat tells whether they agree.

    The number of particles is right where the log likelihood has a standard deviation of 1 to 1.7 at the posterior mean
    (Doucet, Pitt, Deligiannidis and Kohn 2015; Sherlock et al. 2015: 1.8); the attribute `log_likelihood_sd` has it.

    Args:
        chains: independent chains.
        warmup: steps of each chain that adapt the proposal and are dropped.
        thinning: steps per draw.
        target_acceptance: mean acceptance that the scale is adapted to. Between 0.23 (no noise, many dimensions) and
            0.07 (noise with the best number of particles) little is lost (Sherlock et al. 2015, figure 3).
        correlation: of the random numbers of successive estimates; 0 draws new ones. With 0.99 the noise of two
            estimates nearly cancels in the acceptance ratio, so that far fewer particles do (Deligiannidis, Doucet and
            Pitt 2018). Particles are sorted before they are resampled, which suits states of few dimensions. Needs
            `pf.ParticleFilter` with `pf.Systematic()`.

    Reference:
        Andrieu, Doucet and Holenstein (2010), Particle Markov chain Monte Carlo methods, section 2.4.2,
        doi:10.1111/j.1467-9868.2009.00736.x.

    Example:
        >>> import pushforward as pf
        >>> pf.PMMH(thinning=5).chains
        4
    """

    chains: int = 4
    warmup: int = 1000
    thinning: int = 1
    target_acceptance: float = 0.2
    correlation: float = 0.0

    shards = "chains"

    def __check_init__(self):
        check_integer("PMMH", 1, chains=self.chains, warmup=self.warmup, thinning=self.thinning)
        check_fraction("PMMH", target_acceptance=self.target_acceptance)
        rho = self.correlation
        if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0 <= rho < 1:
            raise MethodError(f"PMMH(correlation=...) takes a number from 0 to below 1, such as 0.99; got {rho!r}.")

    def why_not_states(self, space: StateSpace, states: StateMethod) -> str | None:
        """See `OverStates.why_not_states`."""
        return why_not_correlated(space, states) if self.correlation else None

    def run_with_states(
        self, space: StateSpace, states: StateMethod, key: Key, draws: int, runner: Runner
    ) -> tuple[Draws, Groups]:
        """See `OverStates.run_with_states`."""
        given = parameters(space)
        estimate = Independent(states)
        if self.correlation and isinstance(states, ParticleFilter):
            estimate = Correlated(states, self.correlation)
        keys = jax.random.split(jax.random.fold_in(key, 1), self.chains)
        last = runner.call(_start, given, estimate, jax.random.split(key, self.chains), draws, runner.mesh)
        steps = self.warmup + draws * self.thinning
        # A model without a start shows at once, not after all steps; the compiled program is that of the run.
        bounds = jnp.asarray(0), jnp.asarray(min(TRIES, steps))
        tried = runner.call(_advance, last, *bounds, self, given, estimate, keys, runner.mesh)
        outcome = started(tried.value)
        if int(outcome) == int(Outcome.SUCCESS):
            last = runner.loop(_advance, last, steps, self, given, estimate, keys, runner.mesh)
        summary = runner.call(_summary, given, estimate, last, jax.random.fold_in(key, 2))
        runs = self.chains * (steps + draws) + 2 * _REPEATS
        stats = {"lp": last.lp, "acceptance_rate": last.acceptance}
        found = Draws(last.kept, stats, summary, outcome, count(runs * states.members_of(1)), count(0))
        return found, last.groups | {"sample_stats": stats}

    def warnings(self, draws: Draws) -> list[str]:
        """A likelihood too noisy for the chains to move, and chains that have not moved."""
        notes = []
        # With correlated numbers it is the noise of a difference that counts; of independent ones it is sqrt(2) sd.
        noise = float(draws.summary["log_ratio_sd"]) / 2**0.5
        remedy = "Give more particles" if self.correlation else "Give more particles, or correlation=0.99"
        if noise > _NOISY:
            notes.append(
                f"the log likelihood is estimated with a standard deviation of {noise:.2g} at the posterior mean, "
                f"where 1 to 1.7 is best: the chains stand still for long. {remedy}."
            )
        rate = float(draws.summary["acceptance_rate"])
        if rate < _FEW:
            notes.append(f"acceptance is {rate:.3f}: the chains have hardly moved. {remedy}, and more warmup.")
        return notes


class Independent(eqx.Module):
    """Estimates from a new key each.

    `draw`, `renewed`, `log_likelihood` and `trajectories` are what PMMH asks of a source of estimates.
    """

    states: StateMethod

    @property
    def store(self) -> str:
        """See `StateMethod`."""
        return self.states.store

    def draw(self, space: StateSpace, key: Key) -> Key:
        """The source of a first estimate."""
        return key

    def renewed(self, source: Key, key: Key) -> Key:
        """The source of a proposal's estimate."""
        return key

    def log_likelihood(self, chain: Any, source: Key) -> Array:
        """See `StateMethod.log_likelihood`."""
        return self.states.log_likelihood(chain, source)

    def trajectories(self, chain: Any, source: Key, draws: int, store: str) -> Any:
        """See `StateMethod.trajectories`."""
        return self.states.trajectories(chain, source, draws, store)


class _Chain(eqx.Module):
    """State of one chain: where it stands with its estimate and the source of it, the walk, and the draws kept."""

    z: Array
    value: Array
    source: Any
    walk: Walk
    kept: Array
    lp: Array
    acceptance: Array
    groups: Groups


def _start(given: Parameters, estimate: Any, keys: Key, draws: int, mesh: Mesh | None) -> _Chain:
    def one(key: Key) -> _Chain:
        z, source = jnp.zeros(given.dimension), estimate.draw(given.space, key)
        per_draw = jnp.zeros(draws, z.dtype)
        nothing = jnp.full((), -jnp.inf, z.dtype)
        groups = buffers(lambda: given.groups(estimate, z, source), draws)
        return _Chain(z, nothing, source, Walk.start(z), jnp.zeros((draws, *z.shape)), per_draw, per_draw, groups)

    return parallel.vmap(one, mesh)(keys)


def _advance(
    state: _Chain,
    start: Array,
    stop: Array,
    method: PMMH,
    given: Parameters,
    estimate: Any,
    keys: Key,
    mesh: Mesh | None,
) -> _Chain:
    """Carry all chains from step `start` to step `stop`; the key of a step depends on its number alone."""

    def one(chain: _Chain, key: Key) -> _Chain:
        def step(i: Array, c: _Chain) -> _Chain:
            scouting = (i < min(SCOUTS, method.warmup)) | (c.value == -jnp.inf)
            c, acceptance = _move(c, jax.random.fold_in(key, i), scouting, given, estimate)
            active = (i < method.warmup) & ~scouting
            walk = c.walk.adapted(c.z, acceptance, i, active, method.target_acceptance, _LEAST_SCALE)
            return _record(eqx.tree_at(lambda t: t.walk, c, walk), acceptance, i, method, given, estimate)

        return jax.lax.fori_loop(start, stop, step, chain)

    return parallel.vmap(one, mesh)(state, keys)


def _move(c: _Chain, key: Key, scouting: Array, given: Parameters, estimate: Any) -> tuple[_Chain, Array]:
    """One step; the estimate at the present point is never drawn again, which is what makes the draws exact.

    A scout is a draw of the prior, and the chain goes where the likelihood is largest so far: that saves warm-up, and
    the noise of estimates is largest where the likelihood is small.
    """
    first, second, third = jax.random.split(key, 3)
    z = jnp.where(scouting, jax.random.normal(first, c.z.shape, c.z.dtype), c.walk.propose(c.z, first))
    source = estimate.renewed(c.source, third)
    value = given.log_likelihood(estimate, z, source).astype(c.value.dtype)
    prior = given.problem.log_prior
    acceptance = acceptance_of(value + prior(z) - c.value - prior(c.z)).astype(c.value.dtype)
    acceptance = jnp.where(scouting, (value > c.value).astype(acceptance.dtype), acceptance)
    accepted = jax.random.uniform(second, (), acceptance.dtype) < acceptance
    now = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), (z, value, source), (c.z, c.value, c.source))
    return eqx.tree_at(lambda t: (t.z, t.value, t.source), c, now), acceptance


def _record(c: _Chain, acceptance: Array, i: Array, method: PMMH, given: Parameters, estimate: Any) -> _Chain:
    """Write the last of `thinning` steps into the slot of its draw, with the trajectory of one of its particles."""
    draws = c.lp.shape[0]
    slot = jnp.where(i < method.warmup, draws, (i - method.warmup) // method.thinning)
    last = (i >= method.warmup) & ((i - method.warmup) % method.thinning == method.thinning - 1)
    # The predicate is the same for all chains, so that nothing is drawn for steps that are not kept.
    groups = jax.lax.cond(
        last,
        lambda: given.groups(estimate, c.z, c.source),
        lambda: jax.tree.map(lambda v: jnp.zeros(v.shape[1:], v.dtype), c.groups),
    )
    target = jnp.where(last, slot, draws)
    recorded = (
        c.kept.at[target].set(c.z, mode="drop"),
        c.lp.at[target].set(c.value + given.problem.log_prior(c.z), mode="drop"),
        c.acceptance.at[slot].add(acceptance / method.thinning, mode="drop"),
        jax.tree.map(lambda b, v: b.at[target].set(v, mode="drop"), c.groups, groups),
    )
    return eqx.tree_at(lambda t: (t.kept, t.lp, t.acceptance, t.groups), c, recorded)


def _summary(given: Parameters, estimate: Any, last: _Chain, key: Key) -> dict[str, Array]:
    """Acceptance, and the noise of the estimates at the posterior mean of z."""
    center = jnp.mean(last.kept, (0, 1))
    first, second = jax.random.split(key)
    sources = jax.vmap(lambda k: estimate.draw(given.space, k))(jax.random.split(first, _REPEATS))
    renewed = jax.vmap(estimate.renewed)(sources, jax.random.split(second, _REPEATS))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), sources, renewed)
    values, others = jnp.split(likelihood_noise(given, estimate, center, both), 2)
    return {
        "acceptance_rate": jnp.mean(last.acceptance),
        "log_likelihood_sd": jnp.std(values, ddof=1),
        "log_ratio_sd": jnp.sqrt(jnp.mean((others - values) ** 2)),
        "scale": jnp.mean(jnp.exp(last.walk.log_scale)),
    }
