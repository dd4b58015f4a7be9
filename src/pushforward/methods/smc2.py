"""`SMC2`: sequential Monte Carlo on the parameters, each with a particle filter."""

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.math.particles import covariance_root, effective_sample_size
from pushforward.math.resampling import systematic
from pushforward.methods._base import Draws, check_fraction, check_integer, count
from pushforward.methods._particle_parts import NoJitter
from pushforward.methods._particles import Cloud, ParticleSteps, scaled
from pushforward.methods._pseudo_marginal import Groups, OverStates, Parameters, acceptance_of, parameters
from pushforward.methods._state import StateMethod
from pushforward.methods.particle_filter import ParticleFilter
from pushforward.model.state_space import StateSpace

_SCALES = (0.2, 1.0)
_BEST = 2.38
_BATCH = 8
_FEW = 0.02


class SMC2(OverStates):
    """Sequential Monte Carlo squared (Chopin, Jacob and Papaspiliopoulos 2013): parameters over particle filters.

    Draws of the prior take in the data one step after another. Each is weighted by its own filter's estimate of
    log p(y_t given y_1..t-1). Where the effective sample size falls below a fraction of the particles they are
    resampled and moved by steps of `pf.PMMH` on the data so far, whose filters run again from the start. The product of
    the mean weights estimates the evidence, without bias were the schedule fixed in advance; adaptation adds a bias of
    order 1 / particles. No starting point and no warm-up are needed, several modes are found, but the error is seen
    only by running again with another key: there is one chain.

    A parameter particle is a pair of parameters and a key, from which all its filter's random numbers follow, those of
    later steps too. Copies of a particle stay equal until they are moved; the last resampling and moves come after the
    last datum. Each draw's trajectory is that of one particle of its own filter, so that the draws are those of the
    joint posterior as the number of parameter particles grows, for any number of state particles. That number stays
    what `states=` says: raise it where `acceptance_rate` is low.

    Args:
        particles: number of parameter particles, which gives at most that many draws; fewer are evenly spaced ones.
        moves: PMMH steps of each particle at each resampling.
        threshold: fraction of the particles below which the effective sample size starts resampling.

    Example:
        >>> import pushforward as pf
        >>> pf.SMC2(particles=1000).moves
        5
    """

    particles: int = 400
    moves: int = 5
    threshold: float = 0.5

    shards = "particles"

    def __check_init__(self):
        check_integer("SMC2", 10, particles=self.particles)
        check_integer("SMC2", 1, moves=self.moves)
        check_fraction("SMC2", threshold=self.threshold)

    def why_not_states(self, space: StateSpace, states: StateMethod) -> str | None:
        """See `OverStates.why_not_states`."""
        if not isinstance(states, ParticleFilter):
            given = type(states).__name__
            return f"it weighs parameters step by step with filters: states=pf.ParticleFilter(100). Got {given}"
        if not isinstance(states.regularization, NoJitter):
            return f"it needs a filter without regularization; got {states.regularization!r}"
        return None

    def run_with_states(
        self, space: StateSpace, states: StateMethod, key: Key, draws: int, runner: Runner
    ) -> tuple[Draws, Groups]:
        """See `OverStates.run_with_states`."""
        assert isinstance(states, ParticleFilter)
        given, steps = parameters(space), states.steps
        first = runner.call(_start, self, given, steps, key)
        last = runner.loop(_advance, first, space.steps + 1, self, given, steps, key)
        draws = min(draws, self.particles)
        rows = jnp.arange(draws) * self.particles // draws
        z, keys = last.z[rows], last.keys[rows]
        groups = runner.call(_groups, given, states, z, keys)
        lp = last.value[rows] + jax.vmap(given.problem.log_prior)(z)
        stats = {"lp": lp[None]}
        summary = {
            "log_evidence": last.log_evidence,
            "acceptance_rate": last.accepted / jnp.maximum(last.proposed, 1),
            "acceptance_rate_last": last.rate,
            "resamplings": last.resamplings,
            "ess_lowest": last.ess_lowest,
        }
        lost = jnp.where(last.resamplings == 1, int(Outcome.NONFINITE_START), int(Outcome.NONFINITE))
        outcome = jnp.where(jnp.isfinite(last.log_evidence), int(Outcome.SUCCESS), lost)
        runs = (last.runs + draws * space.steps) * states.particles / space.steps
        found = Draws(z[None], stats, summary, outcome, count(runs), count(0))
        return found, jax.tree.map(lambda v: v[None], groups) | {"sample_stats": stats}

    def warnings(self, draws: Draws) -> list[str]:
        """Moves that do not move, and weights that fall on few particles."""
        notes = []
        rate = float(draws.summary["acceptance_rate_last"])
        if rate * self.moves < 0.2:
            notes.append(
                f"acceptance of the last moves is {rate:.3f}: copies of parameters remain. Give the filter more "
                f"particles, or more moves (now {self.moves})."
            )
        lowest = float(draws.summary["ess_lowest"])
        if lowest < max(2.0, _FEW * self.particles):
            notes.append(
                f"the effective sample size fell to {lowest:.3g} of {self.particles} parameter particles at one step: "
                "the evidence is noisy. Give more particles, or a narrower prior."
            )
        return notes


class _Particles(eqx.Module):
    """Parameter particles (M, ...) with their filters, and numbers about the run.

    `value` is the estimate of the log likelihood of all data so far.
    """

    z: Array
    keys: Key
    clouds: Cloud
    value: Array
    log_weights: Array
    log_evidence: Array
    accepted: Array
    proposed: Array
    rate: Array
    resamplings: Array
    ess_lowest: Array
    runs: Array


def _start(method: SMC2, given: Parameters, steps: ParticleSteps, key: Key) -> _Particles:
    """Draws of the prior, weighted by what is observed before the first step."""
    first, second = jax.random.split(key)
    z = jax.random.normal(first, (method.particles, given.dimension))
    keys = jax.random.split(second, method.particles)
    clouds, value = jax.vmap(lambda z, k: _begin(given, steps, z, k))(z, keys)
    zero, none = jnp.zeros((), value.dtype), jnp.zeros((), int)
    flat = jnp.full(value.shape, -jnp.log(float(method.particles)), value.dtype)
    lowest = jnp.full((), float(method.particles), value.dtype)
    blank = _Particles(z, keys, clouds, value, flat, zero, none, none, zero, none, lowest, zero)
    return _weighed(blank, value)


def _begin(given: Parameters, steps: ParticleSteps, z: Array, key: Key) -> tuple[Cloud, Array]:
    """A filter before the first step, its random numbers those of `ParticleFilter` at the key."""
    chain, found = given.at(z)
    cloud, _ = steps.start(chain, jax.random.split(key)[0])
    return cloud, _finite(found.total_log_likelihood + cloud.log_likelihood)


def _forward(
    given: Parameters, steps: ParticleSteps, z: Array, key: Key, cloud: Cloud, t: Array
) -> tuple[Cloud, Array]:
    """The same after step t; and the log of the step's increment."""
    chain, _ = given.at(z)
    random = steps.random(chain, jax.random.fold_in(jax.random.split(key)[1], t))
    after, record = steps.step(chain, cloud, t, random)
    return after, _finite(record.increment)


def _finite(value: Array) -> Array:
    return jnp.where(value < jnp.inf, value, -jnp.inf)


def _weighed(s: _Particles, increment: Array) -> _Particles:
    """Particles weighted by an increment; where all weights are zero, the evidence says so."""
    total = s.log_weights + increment
    _, log_sum, _ = scaled(total)
    lost = log_sum == -jnp.inf
    weights = jnp.where(lost, s.log_weights, total - jnp.where(lost, 0.0, log_sum))
    lowest = jnp.minimum(s.ess_lowest, effective_sample_size(weights))
    parts = (weights, s.log_evidence + log_sum, lowest)
    return eqx.tree_at(lambda p: (p.log_weights, p.log_evidence, p.ess_lowest), s, parts)


def _advance(
    state: _Particles, start: Array, stop: Array, method: SMC2, given: Parameters, steps: ParticleSteps, key: Key
) -> _Particles:
    """Take in the data of the steps from `start` to `stop`; the step after the last only resamples and moves."""
    length = given.space.steps

    def forward(t: Array, s: _Particles) -> _Particles:
        clouds, increment = jax.vmap(lambda z, k, c: _forward(given, steps, z, k, c, t))(s.z, s.keys, s.clouds)
        runs = s.runs + method.particles
        s = eqx.tree_at(lambda p: (p.clouds, p.value, p.runs), s, (clouds, s.value + increment, runs))
        return _weighed(s, increment)

    def step(t: Array, s: _Particles) -> _Particles:
        few = effective_sample_size(s.log_weights) < method.threshold * method.particles
        moving = (few & jnp.isfinite(s.log_evidence)) | (t == length)
        s = jax.lax.cond(moving, lambda s: _rejuvenated(s, t, method, given, steps, key), lambda s: s, s)
        return jax.lax.cond(t < length, lambda s: forward(t, s), lambda s: s, s)

    return jax.lax.fori_loop(start, stop, step, state)


def _rejuvenated(
    s: _Particles, t: Array, method: SMC2, given: Parameters, steps: ParticleSteps, key: Key
) -> _Particles:
    """Particles resampled systematically and moved by PMMH on the data of the steps before t.

    A random walk with the weighted covariance C, s (C / d)^1/2 2.38, whose s is drawn anew for each step and particle:
    noisy likelihoods and bent posteriors ask for different ones.
    """
    first, second = jax.random.split(jax.random.fold_in(key, t))
    size, d = s.z.shape
    root = covariance_root(s.log_weights, s.z)
    rows = systematic(first, s.log_weights, size)
    held = jax.tree.map(lambda v: v[rows], (s.z, s.keys, s.clouds, s.value))

    def propose(item: tuple, key: Key) -> tuple[tuple, Array]:
        z, _, _, value = item
        noise, scale, accept, source = jax.random.split(key, 4)
        low, high = jnp.log(jnp.asarray(_SCALES, z.dtype))
        factor = _BEST / d**0.5 * jnp.exp(jax.random.uniform(scale, (), z.dtype, low, high))
        proposal = z + factor * (jax.random.normal(noise, root.shape[:1], z.dtype) @ root)
        cloud, found = _run(given, steps, proposal, source, t)
        prior = given.problem.log_prior
        acceptance = acceptance_of(found + prior(proposal) - value - prior(z))
        accepted = jax.random.uniform(accept, (), acceptance.dtype) < acceptance
        made = (proposal, source, cloud, found)
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), made, item), accepted

    def move(i: Array, carry: tuple) -> tuple:
        held, total = carry
        keys = jax.random.split(jax.random.fold_in(second, i), size)
        held, accepted = jax.vmap(propose)(held, keys)
        return held, total + jnp.sum(accepted)

    (z, keys, clouds, value), accepted = jax.lax.fori_loop(0, method.moves, move, (held, jnp.zeros((), int)))
    proposed = size * method.moves
    flat = jnp.full_like(s.log_weights, -jnp.log(float(size)))
    return _Particles(
        *(z, keys, clouds, value, flat, s.log_evidence),
        *(s.accepted + accepted, s.proposed + proposed, (accepted / proposed).astype(s.rate.dtype)),
        *(s.resamplings + 1, s.ess_lowest, s.runs + (proposed * t).astype(s.runs.dtype)),
    )


def _run(given: Parameters, steps: ParticleSteps, z: Array, key: Key, t: Array) -> tuple[Cloud, Array]:
    """A filter from the start through the steps before t, a number that need not be known when compiled."""
    cloud, value = _begin(given, steps, z, key)

    def step(i: Array, carry: tuple) -> tuple:
        cloud, value = carry
        cloud, increment = _forward(given, steps, z, key, cloud, i)
        return cloud, value + increment

    return jax.lax.fori_loop(0, t, step, (cloud, value))


def _groups(given: Parameters, states: ParticleFilter, z: Array, keys: Key) -> Groups:
    return jax.lax.map(lambda item: given.groups(states, *item), (z, keys), batch_size=_BATCH)
