"""Delayed acceptance: the emulator proposes, the model decides, and the draws are those of the exact posterior.

A few transitions of NUTS, whose adaptation is over, are a kernel K that is reversible with respect to the emulator's
posterior q (each transition is, and so is a power of it). A proposal x' of K from x is accepted with probability

    min(1, p(x') q(x) / (p(x) q(x'))),

p the exact posterior: detailed balance for p, since q(x) K(x, x') = q(x') K(x', x). One run of the model decides on
each; its gradient is not needed. A run that fails is a rejection.

Reference: Christen and Fox (2005), doi:10.1198/106186005X76983; Efendiev, Hou and Luo (2006),
doi:10.1137/050628568 (two-stage MCMC).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods import nuts
from pushforward.methods._base import Draws, count
from pushforward.methods.nuts import NUTS
from pushforward.model.inverse import InverseProblem

TRANSITIONS = 3
"""Transitions of the emulator for one run of the model."""
_SETTLING = 0.1
"""Share of the draws made before the first: chains come from the emulator's posterior, and go to the exact one."""


class _Chain(eqx.Module):
    """A chain of NUTS with what the model says; leading axes are those of `nuts._State`.

    Attributes:
        state: of the emulator's chain; its kernel stands at the last accepted point.
        ratio: log p - log q there, -inf before the first run that did not fail.
        exact: log p there.
        lp: log p of the draws.
        rate: acceptance probabilities of the model's decisions.
    """

    state: Any
    ratio: Array
    exact: Array
    lp: Array
    rate: Array


def run(method: NUTS, emulated: InverseProblem, exact: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
    """Draw from the exact posterior.

    Args:
        method: options of NUTS.
        emulated: the emulator's posterior, in z.
        exact: the model.
        key: typed JAX key.
        draws: number of draws per chain.
        runner: compiles, times, shows progress and checkpoints.
    """
    settling = max(1, round(_SETTLING * draws))
    state = runner.call(nuts._start, method, emulated, key, draws, runner.mesh)
    if not bool(jnp.all(state.started)):
        return nuts._draws(method, state, Outcome.NONFINITE_START, runner)
    nothing = jnp.full(method.chains, -jnp.inf)
    per_draw = jnp.zeros((method.chains, draws))
    first = _Chain(state, nothing, nothing, per_draw, per_draw)
    total = method.warmup + settling + draws
    last = runner.loop(_advance, first, total, method, emulated, exact, settling, runner.mesh)
    usable = bool(jnp.all(jnp.isfinite(last.lp)))
    found = nuts._draws(method, last.state, Outcome.SUCCESS if usable else Outcome.NONFINITE_START, runner)
    rate = np.asarray(last.rate)
    stats = found.stats | {"lp": last.lp, "second_stage_acceptance_rate": last.rate}
    summary = {"second_stage_acceptance_rate": rate.mean()}
    return Draws(found.positions, stats, summary, found.outcome, count(method.chains * (settling + draws)), count(0))


def _advance(
    chains: _Chain,
    start: Array,
    stop: Array,
    method: NUTS,
    emulated: InverseProblem,
    exact: InverseProblem,
    settling: int,
    mesh: Mesh | None,
) -> _Chain:
    """Steps up to `warmup` adapt to the emulator and never run the model; each later one runs it once."""

    def chain(one: _Chain) -> _Chain:
        step = nuts._stepper(method, emulated, one.state.kernel)

        def advance(i: Array, c: _Chain) -> _Chain:
            adapting = i < method.warmup
            turns = jnp.where(adapting, 1, TRANSITIONS)
            there = jax.lax.fori_loop(0, turns, lambda _, kernel: step(kernel), c.state.kernel)
            # The number of the step is the same for all chains, so that only one branch is run.
            return jax.lax.cond(
                adapting,
                lambda: eqx.tree_at(lambda v: v.state, c, nuts._record(method, c.state, there, i)),
                lambda: _decide(c, there, i, method, emulated, exact, settling),
            )

        return jax.lax.fori_loop(start, stop, advance, one)

    return parallel.vmap(chain, mesh)(chains)


def _decide(
    c: _Chain, there: Any, i: Array, method: NUTS, emulated: InverseProblem, exact: InverseProblem, settling: int
) -> _Chain:
    """The model's decision on where the emulator went."""
    here = c.state.kernel
    z = _noise(method, there.z)
    log_p = exact.log_density(z).astype(c.exact.dtype)
    usable = jnp.isfinite(log_p)
    ratio = log_p - emulated.log_density(z).astype(c.exact.dtype)
    started = jnp.isfinite(c.exact)
    rate = jnp.where(started, jnp.exp(jnp.minimum(ratio - c.ratio, 0.0)), 1.0)
    rate = jnp.where(usable, rate, 0.0)
    # Numbers 0 and 1 of this key went to the start and to the kernel.
    uniform = jax.random.uniform(jax.random.fold_in(c.state.key, i + 2), (), rate.dtype)
    accepted = uniform < rate
    z, gradient, energy = jax.tree.map(
        lambda a, b: jnp.where(accepted, a, b),
        (there.z, there.z_grad, there.potential_energy),
        (here.z, here.z_grad, here.potential_energy),
    )
    kernel = there._replace(z=z, z_grad=gradient, potential_energy=energy)
    state = nuts._record(method, c.state, kernel, i - settling)
    first = method.warmup + settling
    slot = jnp.where(i < first, c.lp.shape[0], i - first)
    log_p = jnp.where(accepted, log_p, c.exact)
    return _Chain(
        state,
        jnp.where(accepted, ratio, c.ratio),
        log_p,
        c.lp.at[slot].set(log_p, mode="drop"),
        c.rate.at[slot].set(rate, mode="drop"),
    )


def _noise(method: NUTS, position: Any) -> Array:
    """z of a position of the kernel; the emulator's model has the one latent site z."""
    if method.transport is not None:
        return method.transport.bend(position)[0]
    return position["z"] if isinstance(position, dict) else position
