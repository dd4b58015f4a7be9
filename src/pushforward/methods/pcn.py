"""`PreconditionedCrankNicolson`: the random walk whose acceptance does not fall with the mesh."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods._base import Draws, Method, check_integer, count
from pushforward.model.inverse import InverseProblem

_FIRST_LOGIT = -1.0
_GAIN, _DECAY = 3.0, 0.6
_LEAST_ACCEPTANCE = 0.05


class PreconditionedCrankNicolson(Method):
    """Function-space random walk: proposes from the prior's own dynamics, accepts by the likelihood alone.

    ``z' = sqrt(1 - beta^2) z + beta xi`` with ``xi ~ N(0, I)`` leaves the prior N(0, I) of ``z`` unchanged, so
    it is accepted with probability ``min(1, p(y | z') / p(y | z))``. Nothing in this refers to the length of
    ``z``: acceptance and mixing do not change when a field is resolved on a finer mesh, where an ordinary
    random walk freezes. Each chain starts at its first prior draw with a finite likelihood and adapts its
    own ``beta`` during warm-up only, so that the draws come from a fixed kernel and their law is exact.

    Use it where parameters are a discretised field and the data inform few of its directions, or where
    the model has no gradient. It needs many more runs of the model than NUTS where data inform parameters
    strongly, and does not move between well separated modes.

    Args:
        chains: independent chains.
        warmup: steps of each chain that adapt ``beta`` and are dropped.
        thinning: steps per draw; neighbouring steps are strongly correlated.
        target_acceptance: mean acceptance that ``beta`` is adapted to.

    Reference:
        Cotter, Roberts, Stuart, White (2013), MCMC methods for functions: modifying old algorithms to make them
        faster, Statistical Science 28, equation 4.5 (pCN), doi:10.1214/13-STS421. Adaptation: Andrieu and
        Thoms (2008), A tutorial on adaptive MCMC, algorithm 4, doi:10.1007/s11222-008-9110-y.

    Example:
        >>> import pushforward as pf
        >>> pf.PreconditionedCrankNicolson(thinning=50).thinning
        50
    """

    chains: int = 4
    warmup: int = 1000
    thinning: int = 10
    target_acceptance: float = 0.25

    shards = "chains"

    def __check_init__(self):
        name = "PreconditionedCrankNicolson"
        check_integer(name, 1, chains=self.chains, warmup=self.warmup, thinning=self.thinning)
        if isinstance(self.target_acceptance, bool) or not 0 < self.target_acceptance < 1:
            raise MethodError(
                f"{name}(target_acceptance=...) takes a number between 0 and 1; got {self.target_acceptance!r}."
            )

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        steps = self.warmup + draws * self.thinning
        keys = jax.random.split(key, self.chains)
        first = _start(self.chains, draws, problem.dimension)
        last = runner.loop(_advance, first, steps, self, problem, keys, runner.mesh)
        return _package(last, steps)

    def warnings(self, draws: Draws) -> list[str]:
        """Acceptance far below what was asked for: the chains have hardly moved."""
        rate = float(draws.summary["acceptance_rate"])
        if rate >= min(_LEAST_ACCEPTANCE, self.target_acceptance / 2):
            return []
        return [
            f"Acceptance is {rate:.3f}, where {self.target_acceptance} was asked for: beta is not adapted yet. "
            f"Increase warmup (now {self.warmup}) and thinning (now {self.thinning})."
        ]


class _Chain(eqx.Module):
    """State of one chain with the draws it has kept; `log_likelihood` is -inf before its start is found."""

    z: Array
    log_likelihood: Array
    logit: Array
    kept: Array
    lp: Array
    acceptance: Array
    rejected_values: Array


def _start(chains: int, draws: int, d: int) -> _Chain:
    per_draw = jnp.zeros((chains, draws))
    return _Chain(
        z=jnp.zeros((chains, d)),
        log_likelihood=jnp.full((chains,), -jnp.inf, per_draw.dtype),
        logit=jnp.full((chains,), _FIRST_LOGIT, per_draw.dtype),
        kept=jnp.zeros((chains, draws, d)),
        lp=per_draw,
        acceptance=per_draw,
        rejected_values=jnp.zeros((chains,), int),
    )


def _advance(
    state: _Chain,
    start: Array,
    stop: Array,
    method: PreconditionedCrankNicolson,
    problem: InverseProblem,
    keys: Key,
    mesh: Mesh | None,
) -> _Chain:
    """Carry all chains from step `start` to step `stop`; the key of a step depends on its number alone."""

    def one(chain: _Chain, key: Key) -> _Chain:
        def step(i: Array, c: _Chain) -> _Chain:
            c, acceptance = _move(c, jax.random.fold_in(key, i), problem)
            return _record(_adapt(c, acceptance, i, method), acceptance, i, method, problem)

        return jax.lax.fori_loop(start, stop, step, chain)

    return parallel.vmap(one, mesh)(state, keys)


def _move(c: _Chain, key: Key, problem: InverseProblem) -> tuple[_Chain, Array]:
    """One pCN step; while no finite likelihood is known, an independent draw of the prior (beta = 1)."""
    noise_key, accept_key = jax.random.split(key)
    started = jnp.isfinite(c.log_likelihood)
    beta = jnp.where(started, jax.nn.sigmoid(c.logit), 1.0)
    z = jnp.sqrt(1 - beta**2) * c.z + beta * jax.random.normal(noise_key, c.z.shape, c.z.dtype)
    value = problem.log_likelihood(z).astype(c.log_likelihood.dtype)
    usable = value < jnp.inf  # false for NaN too; a likelihood of zero is an ordinary rejection
    acceptance = jnp.where(usable, jnp.exp(jnp.minimum(value - c.log_likelihood, 0.0)), 0.0)
    acceptance = jnp.where(started, acceptance, (usable & (value > -jnp.inf)).astype(acceptance.dtype))
    accepted = jax.random.uniform(accept_key, (), acceptance.dtype) < acceptance
    moved = (
        jnp.where(accepted, z, c.z),
        jnp.where(accepted, value, c.log_likelihood),
        c.rejected_values + ~usable,
    )
    return eqx.tree_at(lambda t: (t.z, t.log_likelihood, t.rejected_values), c, moved), acceptance


def _adapt(c: _Chain, acceptance: Array, i: Array, method: PreconditionedCrankNicolson) -> _Chain:
    """Robbins and Monro on logit(beta) during warm-up."""
    gain = _GAIN * (1.0 + i) ** -_DECAY
    active = (i < method.warmup) & jnp.isfinite(c.log_likelihood)
    change = jnp.where(active, gain * (acceptance - method.target_acceptance), 0.0)
    return eqx.tree_at(lambda t: t.logit, c, (c.logit + change).astype(c.logit.dtype))


def _record(
    c: _Chain, acceptance: Array, i: Array, method: PreconditionedCrankNicolson, problem: InverseProblem
) -> _Chain:
    """Write the state into the slot of its draw; the last of `thinning` steps stays there."""
    slot = jnp.where(i < method.warmup, c.lp.shape[0], (i - method.warmup) // method.thinning)
    lp = c.log_likelihood + problem.log_prior(c.z)
    recorded = (
        c.kept.at[slot].set(c.z, mode="drop"),
        c.lp.at[slot].set(lp, mode="drop"),
        c.acceptance.at[slot].add(acceptance / method.thinning, mode="drop"),
    )
    return eqx.tree_at(lambda t: (t.kept, t.lp, t.acceptance), c, recorded)


def _package(last: _Chain, steps: int) -> Draws:
    chains = last.z.shape[0]
    # A chain that found its start only after warm-up has zeros among its draws.
    started = jnp.all(jnp.isfinite(last.lp))
    outcome = jnp.where(started, int(Outcome.SUCCESS), int(Outcome.NONFINITE_START))
    beta = jax.nn.sigmoid(last.logit)
    summary: dict[str, Any] = {
        "acceptance_rate": jnp.mean(last.acceptance),
        "beta": jnp.mean(beta),
        "beta_min": jnp.min(beta),
        "beta_max": jnp.max(beta),
        "nonfinite_proposals": jnp.sum(last.rejected_values),
    }
    stats = {"lp": last.lp, "acceptance_rate": last.acceptance}
    return Draws(last.kept, stats, summary, outcome, count(chains * steps), count(0))
