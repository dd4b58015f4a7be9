"""E steps of EM: the complete-data log density over what a smoother knows, as an objective of the parameters."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.learned.unknowns import ExpectedPairs, ExpectedPaths, Objective, Unknowns, initial_program
from pushforward.math import kalman
from pushforward.math.expectation_maximisation import pair_law, quadratic_points
from pushforward.methods.kalman import Kalman
from pushforward.model.by_value import programs
from pushforward.model.state_space import StateSpace


class Moments(eqx.Module):
    """By the moments of a Kalman smoother, exact where it is exact."""

    states: Kalman

    def __call__(self, unknowns: Unknowns, flat: Array, key: Key) -> tuple[Objective, Array]:
        """Expected log density, and log p(data)."""
        chain, _ = unknowns.at(flat)
        found = self.states._followed(chain)
        records, n, q = found.filtered.records, found.filtered.records.mean.shape[1], chain.noise_dimension
        r, information, smoothed = kalman.smooth_series(records)
        pairs = jax.vmap(lambda s: quadratic_points(*pair_law(s, q)))(smoothed)
        _, _, first = kalman.smooth_step(found.first.record, r, information)
        z = quadratic_points(first.noise_mean, first.noise_cov)
        initial = jax.vmap(lambda e: chain.around(e)["values"])(z)

        def sites(t: Array, riding: list[Array], points: Array) -> dict[str, Array]:
            values = jax.vmap(lambda u: chain.step(u[:n], riding, t, u[n:]).sites)(points)
            return {name: values[name] for name in chain.structure.latent}

        values = jax.vmap(sites)(jnp.arange(pairs.shape[0]), found.riders, pairs)
        outer = {name: initial[name] for name in chain.structure.initial}
        objective = ExpectedPairs(unknowns, outer, pairs[..., :n], found.riders, values)
        held = jax.lax.stop_gradient(eqx.filter(objective, eqx.is_inexact_array))
        evidence = found.first.log_likelihood + found.filtered.log_likelihood + chain.static_log_likelihood()
        return eqx.combine(held, objective), evidence


class SmoothingDraws(eqx.Module):
    """By joint draws of a smoother: Monte Carlo EM (Wei and Tanner 1990)."""

    states: Any
    draws: int = eqx.field(static=True)

    def __call__(self, unknowns: Unknowns, flat: Array, key: Key) -> tuple[Objective, Array]:
        """Mean log density over the draws, and log p(data)."""
        chain, _ = unknowns.at(flat)
        found = self.states.trajectories(chain, key, self.draws, "draws")
        s = chain.structure
        initial = {n: found.posterior[n] for n in s.initial}
        values = {n: found.posterior[n] for n in s.latent}
        return ExpectedPaths(unknowns, initial, values, True), found.log_evidence


class FilterMeans(eqx.Module):
    """By the path of a filter's means, whose steps differ from the model's by its analysis increments."""

    states: Any

    def __call__(self, unknowns: Unknowns, flat: Array, key: Key) -> tuple[Objective, Array]:
        """Log density of the steps between the means, and log p(data)."""
        chain, _ = unknowns.at(flat)
        found = self.states.trajectories(chain, key, 2, "moments")
        s = chain.structure
        still = chain.around(jnp.zeros(chain.initial_dimension))["values"]
        initial = {n: still[n][None] for n in s.initial}
        values = {n: found.filtering[n][:1] for n in s.latent}
        return ExpectedPaths(unknowns, initial, values, False), found.log_evidence


def why_no_paths(space: StateSpace) -> str | None:
    """Why trajectories have no density given the parameters, which EM maximises, or None."""
    s = space.structure
    if not s.latent:
        return (
            "its step samples nothing, so that the trajectory follows from the parameters and has no density of its "
            "own; use method='likelihood'"
        )
    if s.late:
        return f"site '{s.late[0]}' depends on the whole trajectory; use method='likelihood'"
    if s.joint.discrete:
        return f"site '{s.joint.discrete[0]}' is discrete; use method='likelihood' with states=pf.DiscreteHMM()"
    return None


def why_no_pairs(space: StateSpace, trained: tuple[int, ...]) -> str | None:
    """Why pairs of a state and a step do not determine the complete-data density, or None."""
    s = space.structure
    around, body = programs(s)
    moving = {("outer", n) for n in s.parameters} | {("arrays", i) for i in trained}

    def follows(sources: set[tuple]) -> bool:
        consts = [k for k in sources if k[0] in ("consts", "xs", "x")]
        reached = [around.sources("consts" if k[0] == "consts" else "xs", k[1]) for k in consts]
        return any(moving & found for found in reached)

    for i in s.state:
        direct = {k[:2] for k in initial_program(s).sources("init", i)} & moving
        if follows(body.sources("carry", i)) or direct:
            return (
                "a part of the carry depends on the parameters beside the sampled sites (as in a non-centred step), so "
                "that the smoothed states would not keep under other parameters. Sample the state itself, as in "
                "x = numpyro.sample('x', dist.Normal(f(x), sd)), or use method='likelihood'"
            )
    return None
