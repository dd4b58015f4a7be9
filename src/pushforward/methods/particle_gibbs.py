"""`ParticleGibbs`: trajectory and parameters in turn, by conditional sequential Monte Carlo."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods import _conditional
from pushforward.methods._base import Draws, check_fraction, check_integer, count
from pushforward.methods._conditional import Path
from pushforward.methods._particle_parts import NoJitter
from pushforward.methods._proposals import Bootstrap
from pushforward.methods._pseudo_marginal import (
    Groups,
    OverStates,
    Parameters,
    Walk,
    acceptance_of,
    buffers,
    find_start,
    grouped,
    parameters,
    started,
)
from pushforward.methods._state import StateMethod
from pushforward.methods.particle_filter import ParticleFilter
from pushforward.model import by_value, trajectories
from pushforward.model.state_space import StateSpace

_LEAST_SCALE = 0.01
_FEW = 0.05


class ParticleGibbs(OverStates):
    """Particle Gibbs with ancestor sampling (Lindsten, Jordan and Schön 2014): exact for any number of particles.

    In turn, a conditional particle filter draws a trajectory given parameters and the trajectory before, and
    random-walk Metropolis steps draw parameters given the trajectory. Few particles do even for long series, where
    `pf.PMMH` needs a number that grows with the length; 20 to 100 are usual. Ancestor sampling needs the density of a
    transition: where the model samples noise that the state is computed from, not the state itself, it is left out
    (Andrieu, Doucet and Holenstein 2010), and the particles must grow with the length here, too. It mixes slowly where
    trajectory and parameters determine each other, as where the noise of the states is small or itself unknown;
    `pf.PMMH` is better there.

    `states=pf.ParticleFilter(N)` gives the number of particles. They move by the model's own law and are resampled
    multinomially at every step, whatever the filter's `resampling` and `smoother`. The walk's covariance and scale
    adapt during warm-up only. The initial state takes part as its noise, on which parameters may act.

    Args:
        chains: independent chains.
        warmup: sweeps of each chain that adapt the walk and are dropped.
        thinning: sweeps per draw.
        parameter_moves: Metropolis steps of the parameters in each sweep; they cost one run of the model each, a
            filter costs N.
        target_acceptance: mean acceptance that the walk's scale is adapted to; 0.234 is best in many dimensions, 0.44
            in one (Roberts and Rosenthal 2001).

    Example:
        >>> import pushforward as pf
        >>> pf.ParticleGibbs(parameter_moves=20).chains
        4
    """

    chains: int = 4
    warmup: int = 1000
    thinning: int = 1
    parameter_moves: int = 10
    target_acceptance: float = 0.3

    shards = "chains"

    def __check_init__(self):
        numbers = {"chains": self.chains, "warmup": self.warmup, "thinning": self.thinning}
        check_integer("ParticleGibbs", 1, **numbers, parameter_moves=self.parameter_moves)
        check_fraction("ParticleGibbs", target_acceptance=self.target_acceptance)

    def why_not_states(self, space: StateSpace, states: StateMethod) -> str | None:
        """See `OverStates.why_not_states`."""
        if not isinstance(states, ParticleFilter):
            return f"it moves trajectories by particles: states=pf.ParticleFilter(50). Got {type(states).__name__}"
        if not isinstance(states.proposal, Bootstrap):
            return f"it moves particles by the model's own law, proposal=pf.Bootstrap(); got {states.proposal!r}"
        if not isinstance(states.regularization, NoJitter):
            return f"it needs a filter without regularization; got {states.regularization!r}"
        if not space.structure.latent:
            return "no site is sampled in the step, so that there is no trajectory to draw; use pf.PMMH()"
        by_value.memory(space.structure)  # read before the model is traced
        return None

    def run_with_states(
        self, space: StateSpace, states: StateMethod, key: Key, draws: int, runner: Runner
    ) -> tuple[Draws, Groups]:
        """See `OverStates.run_with_states`."""
        given = parameters(space)
        keys = jax.random.split(jax.random.fold_in(key, 1), self.chains)
        first = runner.call(_start, given, states, jax.random.split(key, self.chains), draws, runner.mesh)
        steps = self.warmup + draws * self.thinning
        outcome, last = started(first.value), first
        if int(outcome) == 0:
            last = runner.loop(_advance, first, steps, self, given, states.members_of(1), keys, runner.mesh)
        stats = {"lp": last.lp, "acceptance_rate": last.acceptance, "changed": last.changed}
        summary = {
            "acceptance_rate": jnp.mean(last.acceptance),
            "trajectory_changed": jnp.mean(last.changed),
            "trajectory_changed_start": jnp.mean(last.early),
            "scale": jnp.mean(jnp.exp(last.walk.log_scale)),
        }
        runs = count(self.chains * steps * (states.members_of(1) + self.parameter_moves))
        return Draws(last.kept, stats, summary, outcome, runs, count(0)), last.groups | {"sample_stats": stats}

    def warnings(self, draws: Draws) -> list[str]:
        """Trajectories or parameters that hardly move."""
        notes = []
        changed = float(draws.summary["trajectory_changed_start"])
        if changed < _FEW:
            notes.append(
                f"the first step of the trajectory changes in {changed:.3f} of the sweeps: give the filter more "
                "particles."
            )
        rate = float(draws.summary["acceptance_rate"])
        if rate < _FEW:
            notes.append(f"acceptance of parameters is {rate:.3f}: give more warmup (now {self.warmup}).")
        return notes


class _Chain(eqx.Module):
    """State of one chain: parameters, trajectory, log p(data, trajectory given parameters), and the draws kept."""

    z: Array
    path: Path
    value: Array
    walk: Walk
    kept: Array
    lp: Array
    acceptance: Array
    changed: Array
    early: Array
    groups: Groups


def _start(given: Parameters, states: ParticleFilter, keys: Key, draws: int, mesh: Mesh | None) -> _Chain:
    def one(key: Key) -> _Chain:
        first, second = jax.random.split(key)
        z, value = find_start(given, states, first)
        path = _blank(given)
        path, _ = _conditional.sweep(given.at(z)[0], path, second, states.particles, conditional=False)
        value = jnp.where(jnp.isfinite(value), _value(given, z, path), value)
        zero = jnp.zeros(draws, value.dtype)
        groups = buffers(lambda: _groups(given, z, path, key), draws)
        kept = jnp.zeros((draws, *z.shape), z.dtype)
        return _Chain(z, path, value, Walk.start(z), kept, zero, zero, zero, zero, groups)

    return parallel.vmap(one, mesh)(keys)


def _blank(given: Parameters) -> Path:
    """A path of zeros."""
    s = given.space.structure
    shapes = s.body.shapes["sites"]
    values = {n: jnp.zeros((s.length, *shapes[n].shape), shapes[n].dtype) for n in s.latent}
    return Path(jnp.zeros(given.space.initial_dimension), values)


def _value(given: Parameters, z: Array, path: Path) -> Array:
    """log p(data, trajectory given parameters)."""
    chain, found = given.at(z)
    value = found.total_log_likelihood + _conditional.log_density(chain, path)
    return jnp.where(value < jnp.inf, value, -jnp.inf)


def _groups(given: Parameters, z: Array, path: Path, key: Key) -> Groups:
    """All sites at parameters and trajectory; `key` draws sites after the scan."""
    chain, outside = given.at(z)
    state, riders, _ = chain.start(path.start)
    one = jax.tree.map(lambda v: v[None], (path.start, (state, riders), path.values))
    found = by_value.along(chain, one[1], one[2])
    late = jax.random.normal(key, (1, chain.late_dimension))
    around = trajectories.around(chain, one[0], found["returned"], found["last"], late)
    parts = [around[k] | found[k] for k in ("values", "log_prior")]
    parts += [around["log_likelihood"] | found["log_likelihood"], found["last"]]
    return grouped(outside, *jax.tree.map(lambda v: v[0], parts))


def _advance(
    state: _Chain,
    start: Array,
    stop: Array,
    method: ParticleGibbs,
    given: Parameters,
    particles: int,
    keys: Key,
    mesh: Mesh | None,
) -> _Chain:
    """Carry all chains from sweep `start` to sweep `stop`; the key of a sweep depends on its number alone."""

    def one(chain: _Chain, key: Key) -> _Chain:
        def step(i: Array, c: _Chain) -> _Chain:
            first, second, third = jax.random.split(jax.random.fold_in(key, i), 3)
            path, changed = _conditional.sweep(given.at(c.z)[0], c.path, first, particles)
            early = jnp.any(jnp.stack([jnp.any(v[0] != c.path.values[n][0]) for n, v in path.values.items()]))
            c = eqx.tree_at(lambda t: (t.path, t.value), c, (path, _value(given, c.z, path).astype(c.value.dtype)))
            c, acceptance = _move(c, second, i, method, given)
            return _record(c, (acceptance, changed, early), i, method, given, third)

        return jax.lax.fori_loop(start, stop, step, chain)

    return parallel.vmap(one, mesh)(state, keys)


def _move(c: _Chain, key: Key, i: Array, method: ParticleGibbs, given: Parameters) -> tuple[_Chain, Array]:
    """Metropolis steps of the parameters given the trajectory; and their mean acceptance."""

    def move(j: Array, carry: tuple) -> tuple:
        z, value, total = carry
        first, second = jax.random.split(jax.random.fold_in(key, j))
        proposal = c.walk.propose(z, first)
        found = _value(given, proposal, c.path).astype(value.dtype)
        prior = given.problem.log_prior
        acceptance = acceptance_of(found + prior(proposal) - value - prior(z)).astype(value.dtype)
        accepted = jax.random.uniform(second, (), acceptance.dtype) < acceptance
        return jnp.where(accepted, proposal, z), jnp.where(accepted, found, value), total + acceptance

    first = (c.z, c.value, jnp.zeros_like(c.value))
    z, value, total = jax.lax.fori_loop(0, method.parameter_moves, move, first)
    acceptance = total / method.parameter_moves
    walk = c.walk.adapted(z, acceptance, i, i < method.warmup, method.target_acceptance, _LEAST_SCALE)
    return eqx.tree_at(lambda t: (t.z, t.value, t.walk), c, (z, value, walk)), acceptance


def _record(c: _Chain, numbers: tuple, i: Array, method: ParticleGibbs, given: Parameters, key: Key) -> _Chain:
    """Write the last of `thinning` sweeps into the slot of its draw."""
    draws = c.lp.shape[0]
    slot = jnp.where(i < method.warmup, draws, (i - method.warmup) // method.thinning)
    last = (i >= method.warmup) & ((i - method.warmup) % method.thinning == method.thinning - 1)
    groups = jax.lax.cond(
        last,
        lambda: _groups(given, c.z, c.path, key),
        lambda: jax.tree.map(lambda v: jnp.zeros(v.shape[1:], v.dtype), c.groups),
    )
    target = jnp.where(last, slot, draws)
    kept: tuple[Any, ...] = (
        c.kept.at[target].set(c.z, mode="drop"),
        c.lp.at[target].set(c.value + given.problem.log_prior(c.z), mode="drop"),
        jax.tree.map(lambda b, v: b.at[target].set(v, mode="drop"), c.groups, groups),
    )
    means = tuple(
        b.at[slot].add(v / method.thinning, mode="drop")
        for b, v in zip((c.acceptance, c.changed, c.early), numbers, strict=True)
    )
    return eqx.tree_at(lambda t: (t.kept, t.lp, t.groups, t.acceptance, t.changed, t.early), c, (*kept, *means))
