"""One step of a particle filter on a chain: resample where weights are uneven, move, weigh."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.math.normals import normals
from pushforward.methods._particle_parts import Regularization, Resampling, random_uniforms
from pushforward.methods._proposals import Proposal
from pushforward.model.state_space import Chain


class Random(eqx.Module):
    """What one step draws: noise (N, q), the uniforms of resampling, and a key for the regularization."""

    normals: Array
    uniforms: Array
    key: Key


class Cloud(eqx.Module):
    """Weighted particles, carried from step to step.

    Attributes:
        state: (N, n).
        riders: what rides along; with leading axis N where an entry is random.
        memory: what the proposal carries along.
        log_weights: normalized log weights (N,).
        weights: exp(log_weights) times a positive constant, so that no exp is computed twice.
        ess: effective sample size 1 / sum W^2.
        log_likelihood: log of the likelihood estimate of all data so far.
        failed: number of the first step at which all weights were zero, else -1.
    """

    state: Array
    riders: list[Array]
    memory: Any
    log_weights: Array
    weights: Array
    ess: Array
    log_likelihood: Array
    failed: Array


class Record(eqx.Module):
    """What a step leaves for moments, draws and smoothing.

    Attributes:
        ancestors: index of each particle's predecessor (N,).
        sites: values of the step's sites, leading axis N.
        predicted: values of the same sites drawn from the one-step prediction, up to weights.
        log_predictive: log weights of these, up to a constant.
        increment: log p(y_t given y_1..t-1), estimated.
    """

    ancestors: Array
    sites: dict[str, Array]
    predicted: dict[str, Array]
    log_predictive: Array
    increment: Array


class ParticleSteps(eqx.Module):
    """The parts of a particle filter, as a step uses them."""

    size: int = eqx.field(static=True)
    proposal: Proposal
    resampling: Resampling
    regularization: Regularization

    def start(self, chain: Chain, key: Key) -> tuple[Cloud, Array]:
        """The particles at the start, weighted by what is observed there, and their noise z_0 (N, k)."""
        noise = normals(key, (self.size, chain.initial_dimension))
        return self.start_at(chain, noise), noise

    def start_at(self, chain: Chain, noise: Array) -> Cloud:
        """The same at given noise (N, k)."""
        begun = self.proposal.begin(chain, noise)
        state, riders = begun.state, begun.riders
        if not chain.structure.discrete:
            riders = [r[0] for r in riders]
        uniform = jnp.full(self.size, -jnp.log(float(self.size)), state.dtype)
        zero, never = jnp.zeros((), state.dtype), jnp.asarray(-1)
        blank = Cloud(state, riders, begun.memory, uniform, uniform, uniform[0], zero, never)
        return weighed(blank, uniform + begun.log_weight, never)[0]

    def random(self, chain: Chain, key: Key) -> Random:
        """What one step draws, from a key."""
        first, second, third = jax.random.split(key, 3)
        noise = normals(first, (self.size, self.proposal.noise_dimension(chain)))
        return Random(noise, random_uniforms(self.resampling, second, self.size, noise.dtype), third)

    def step(self, chain: Chain, before: Cloud, t: Array, random: Random) -> tuple[Cloud, Record]:
        """Resample, move and weigh; `t` numbers the step's row of data and covariates."""
        (state, riders, memory), log_weights, ancestors = self._select(chain, before, t, random)
        moved = self.proposal.move(chain, state, riders, memory, t, random.normals)
        good = jnp.all(jnp.isfinite(moved.state), 1)
        total = jnp.where(good, log_weights + moved.log_weight, -jnp.inf)
        predictive = jnp.where(good, log_weights, -jnp.inf)
        after = eqx.tree_at(lambda c: (c.state, c.riders, c.memory), before, (moved.state, moved.riders, moved.memory))
        cloud, increment = weighed(after, total, t)
        return cloud, Record(ancestors, moved.sites, moved.predicted, predictive, increment)

    def _select(self, chain: Chain, before: Cloud, t: Array, random: Random) -> tuple[tuple, Array, Array]:
        """State, riders and memory of the particles that go on, their log weights and ancestors.

        With first-stage weights v_i = W_i m_i the copies of particle a have the weight W_a / v_a sum v / N, so that the
        likelihood estimate stays unbiased (Pitt and Shephard 1999).
        """
        look = self.proposal.look(chain, before.state, before.riders, before.memory, t)
        n = self.size
        log_total = jnp.zeros((), before.log_weights.dtype)
        stage, weights, ess = before.log_weights, before.weights, before.ess
        if look is not None:
            stage = before.log_weights + jnp.where(jnp.isnan(look), -jnp.inf, look)
            weights, log_total, ess = scaled(stage)

        def resampled() -> tuple[tuple, Array, Array]:
            ancestors = self.resampling.ancestors(random.uniforms, weights, n)
            state, log_weights = self.resampling.moved(before.state, stage, ancestors)
            joined = chain.joined_size
            state = self.regularization.spread(random.key, before.state, stage, state, ancestors, joined)
            riders = [r[ancestors] for r in before.riders] if chain.structure.discrete else before.riders
            memory = jax.tree.map(lambda v: v[ancestors], before.memory)
            spent = stage - before.log_weights
            if look is not None:
                # An average has looked with its own eyes, not with those of one of its parts.
                own = self.proposal.look(chain, state, riders, memory, t) if self.resampling.averages else None
                log_weights = log_weights - (spent[ancestors] if own is None else own)
            return (state, riders, memory), log_weights + (log_total - jnp.log(float(n))), ancestors

        def kept() -> tuple[tuple, Array, Array]:
            going = (before.state, before.riders, before.memory)
            return going, before.log_weights, jnp.arange(n, dtype=jnp.int32)

        if self.resampling.threshold == 0:
            return kept()
        if self.resampling.threshold == 1:
            return resampled()
        return jax.lax.cond(ess < self.resampling.threshold * n, resampled, kept)


def scaled(log_weights: Array) -> tuple[Array, Array, Array]:
    """Weights of maximum 1, the log of the sum of exp(log weights), and the effective sample size.

    Where all weights are zero the sum's log is -inf and the weights are equal.
    """
    top = jnp.max(log_weights)
    weights = jnp.where(jnp.isfinite(top), jnp.exp(log_weights - jnp.where(jnp.isfinite(top), top, 0.0)), 1.0)
    total = jnp.sum(weights)
    return weights, top + jnp.log(total), total**2 / jnp.sum(weights**2)


def weighed(cloud: Cloud, log_weights: Array, t: Array) -> tuple[Cloud, Array]:
    """The cloud with new log weights, whose sum is the likelihood's increment; and that increment's log."""
    log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    weights, increment, ess = scaled(log_weights)
    lost = increment == -jnp.inf
    flat = jnp.full_like(log_weights, -jnp.log(float(log_weights.shape[0])))
    normalized = jnp.where(lost, flat, log_weights - jnp.where(lost, 0.0, increment))
    failed = jnp.where(lost & (cloud.failed < 0), t, cloud.failed)
    parts = (normalized, weights, ess, cloud.log_likelihood + increment, failed)
    return eqx.tree_at(lambda c: (c.log_weights, c.weights, c.ess, c.log_likelihood, c.failed), cloud, parts), increment
