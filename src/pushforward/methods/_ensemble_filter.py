"""One cycle of an ensemble filter on a chain: forecast, analysis, inflation, and what is kept of it.

The columns of an ensemble are the state, the step's sites and what the step returns, all updated by the same
weights; a site that is itself part of the carry is not stored twice.
"""

import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array, Key
from pushforward.math import ensemble
from pushforward.math.ensemble import Whitened, whiten
from pushforward.math.ensemble_iterative import iterative_start, iterative_step, iterative_weights
from pushforward.math.normals import normals
from pushforward.methods._ensemble_parts import LETKF, Analysis, Inflation, IterativeEnKS, Smoother
from pushforward.model._chain import ChainStructure
from pushforward.model.state_space import Chain, Moved


@dataclass(frozen=True)
class Column:
    """Where one site lies among the columns: `start` and `shape`, and whether it follows the state's coordinates."""

    start: int
    shape: tuple[int, ...]
    local: bool

    @property
    def size(self) -> int:
        """Number of columns."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The columns of an ensemble: the state (n), then sites and returned leaves that are not part of it.

    With `all_data` some of them have no coordinates, and a local analysis gives them weights of all data.
    """

    n: int
    sites: dict[str, Column]
    returned: tuple[Column, ...]
    extra: tuple[tuple[str, Any], ...]
    all_data: bool

    def pack(self, moved: Moved) -> Array:
        """All columns of one member."""
        leaves = jax.tree.leaves(moved.returned)
        parts = [moved.sites[k] if kind == "sites" else leaves[k] for kind, k in self.extra]
        return jnp.concatenate([moved.state, *[jnp.ravel(p).astype(moved.state.dtype) for p in parts]])

    def values(self, columns: Array) -> dict[str, Array]:
        """Site values from columns (..., K)."""
        return {n: _take(columns, c) for n, c in self.sites.items()}

    def back(self, columns: Array, tree: Any) -> Any:
        """What the step returned, from columns (..., K)."""
        return jax.tree.unflatten(tree, [_take(columns, c) for c in self.returned])


def _take(columns: Array, column: Column) -> Array:
    part = columns[..., column.start : column.start + column.size]
    return part.reshape(*columns.shape[:-1], *column.shape)


def layout(chain: Chain, keep_returned: bool) -> Layout:
    """The columns of a chain's ensemble."""
    s = chain.structure
    shapes = s.body.shapes
    leaves = jax.tree.leaves(shapes["returned"])
    places, offset = {}, chain.joined_size
    for i in s.state:
        places[i] = offset
        offset += math.prod(s.carry[i].shape)
    n = offset
    extra: list[tuple[str, Any]] = []
    paths = jax.tree_util.tree_flatten_with_path(shapes["returned"])[0]

    def place(path: tuple, shape: tuple[int, ...], item: tuple[str, Any]) -> Column:
        nonlocal offset
        for i, start in places.items():
            if s.carry[i].shape == shape and s.body.same(path, ("carry", i)):
                return Column(start, shape, True)
        extra.append(item)
        start, offset = offset, offset + math.prod(shape)
        return Column(start, shape, math.prod(shape) == n)

    sites = {k: place(("sites", k), v.shape, ("sites", k)) for k, v in shapes["sites"].items()}
    returned: tuple[Column, ...] = ()
    if keep_returned:
        from pushforward.model._program import _keys

        pairs = zip(paths, leaves, strict=True)
        returned = tuple(
            place(("returned", *_keys(p)), v.shape, ("returned", i)) for i, ((p, _), v) in enumerate(pairs)
        )
    sizes = [math.prod(v.shape) for k, v in s.around.shapes["values"].items() if k in s.initial]
    loose = any(not c.local for c in (*sites.values(), *returned)) or any(size != n for size in sizes)
    return Layout(n, sites, returned, tuple(extra), loose)


class Ensemble(eqx.Module):
    """What is carried from cycle to cycle: members (N, n), what rides along, inflation's memory, and sums over cycles.

    `surprise` sums |d|^2 over its expectation: its mean over cycles is about 1 for an ensemble that follows the truth.
    """

    members: Array
    riders: list[Array]
    memory: Any
    log_likelihood: Array
    replaced: Array
    surprise: Array


class Seen(eqx.Module):
    """What a cycle knew of its data: what the members predict (N, m), the noise taken for it, and their log density."""

    predicted: Array
    noise: Array
    whitened: Whitened
    log_likelihood: Array


class Cycle(eqx.Module):
    """What one cycle leaves: columns before and after the analysis (N, K), and the weights of earlier ensembles."""

    forecast: Array
    analysis: Array
    weights: Array
    seen: Seen | None


class Filter(eqx.Module):
    """The parts of an ensemble filter, as the cycle uses them."""

    size: int
    analysis: Analysis
    inflation: Inflation
    rotate: bool
    smoother: Smoother

    def start(self, chain: Chain, key: Key) -> tuple[Ensemble, Array, Array]:
        """The ensemble at the start given what is observed there, its prior noise z_0, and that update's weights."""
        first, second = jax.random.split(key)
        noise = normals(first, (self.size, chain.initial_dimension))
        members, riders, observed = jax.vmap(chain.start)(noise)
        if not chain.structure.discrete:
            riders = [r[0] for r in riders]
        ensemble_ = Ensemble(members, riders, self.inflation.start(), *(jnp.zeros(()) for _ in range(3)))
        if not chain.structure.first:
            return ensemble_, noise, jnp.eye(self.size)
        w = whiten(observed.mean, observed.data[0], jnp.mean(observed.noise, 0))
        weights, value = self.analysis.analysed(w, second)
        updated = eqx.tree_at(lambda e: (e.members, e.log_likelihood), ensemble_, (weights @ members, value))
        return updated, noise, weights

    def move(self, chain: Chain, before: Ensemble, t: Array, noise: Array) -> Moved:
        """The forecast of all members."""
        axes = 0 if chain.structure.discrete else None
        return jax.vmap(chain.step, (0, axes, None, 0))(before.members, before.riders, t, noise)

    def cycle(self, chain: Chain, columns: Layout, before: Ensemble, t: Array, key: Key) -> tuple[Ensemble, Cycle]:
        """Forecast, analysis and inflation of step `t`."""
        keys = jax.random.split(key, 5)
        noise = normals(keys[0], (self.size, chain.noise_dimension))
        if isinstance(self.smoother, IterativeEnKS):
            return self._iterative(chain, columns, before, t, keys)
        moved = self.move(chain, before, t, noise)
        forecast = jax.vmap(columns.pack)(moved)
        predicted, variances = moved.observed.mean, jnp.mean(moved.observed.noise, 0)
        # Without the barriers XLA computes the step and what follows from it anew for each of their uses.
        forecast, predicted = jax.lax.optimization_barrier((forecast, predicted))
        forecast, predicted, replaced = _mend(forecast, predicted, keys[3])
        data = moved.observed.data[0]
        w = jax.lax.optimization_barrier(whiten(predicted, data, variances))
        factor, memory = self.inflation.before(before.memory, w)
        if not isinstance(factor, float):
            forecast, predicted = (_inflate(x, factor) for x in (forecast, predicted))
            w = w._replace(anomalies=factor * w.anomalies)
        analysis, weights, value = self._update(columns, forecast, predicted, data, variances, w, keys[1])
        analysis = self.inflation.after(forecast, analysis, keys[2])
        analysis, weights = self._turn_late(analysis, weights, keys[4])
        riders = moved.riders if chain.structure.discrete else [r[0] for r in moved.riders]
        total = before.log_likelihood + value
        after = Ensemble(
            analysis[:, : columns.n], riders, memory, total, before.replaced + replaced, before.surprise + surprise(w)
        )
        return after, Cycle(forecast, analysis, weights, Seen(predicted, variances, w, value))

    def _update(
        self, columns: Layout, forecast: Array, predicted: Array, data: Array, noise: Array, w: Any, key: Key
    ) -> tuple[Array, Array, Array]:
        if isinstance(self.analysis, LETKF):
            return self._update_locally(columns, forecast, predicted, data, noise, w, key)
        turned = self.rotate and not self.inflation.by_member
        weights, value = (self.analysis.rotated if turned else self.analysis.analysed)(w, key)
        return weights @ forecast, weights, value

    def _turn_late(self, analysis: Array, weights: Array, key: Key) -> tuple[Array, Array]:
        """The rotation, where inflation mixes members of forecast and analysis and so must come before it."""
        if not (self.rotate and self.inflation.by_member):
            return analysis, weights
        turn = ensemble.rotation(key, self.size)
        return turn @ analysis, turn @ weights

    def _update_locally(
        self, columns: Layout, forecast: Array, predicted: Array, data: Array, noise: Array, w: Any, key: Key
    ) -> tuple[Array, Array, Array]:
        assert isinstance(self.analysis, LETKF)
        n = columns.n
        local = self.analysis.local_weights(predicted, data, noise, self.analysis.taper(n, data.shape[0]))
        if columns.all_data:
            local = jnp.concatenate([local, self.analysis.weights(w, key)[None]])
        if self.rotate and not self.inflation.by_member:
            local = ensemble.rotation(key, self.size) @ local
        return apply(local, forecast, columns), local, ensemble.log_likelihood(w)

    def _iterative(
        self, chain: Chain, columns: Layout, before: Ensemble, t: Array, keys: Key
    ) -> tuple[Ensemble, Cycle]:
        """Gauss-Newton on the ensemble one step back, which is then moved through the model."""
        smoother = self.smoother
        assert isinstance(smoother, IterativeEnKS)
        still = jnp.zeros((self.size, chain.noise_dimension))
        first = before.members
        moved = self.move(chain, before, t, still)
        data, variances = moved.observed.data[0], jnp.mean(moved.observed.noise, 0)
        w = whiten(moved.observed.mean, data, variances)
        unchanged = smoother.tolerance

        def going(state: tuple) -> Array:
            i, iterate = state
            change = jnp.sqrt(jnp.mean(iterate.increment**2))
            return (i < smoother.iterations) & ((i == 0) | (change > unchanged))

        def improve(state: tuple) -> tuple:
            i, iterate = state
            trial = eqx.tree_at(lambda e: e.members, before, iterative_weights(iterate) @ first)
            predicted = self.move(chain, trial, t, still).observed.mean
            return i + 1, iterative_step(iterate.mean, iterate.transform, predicted, data, variances)

        _, found = jax.lax.while_loop(going, improve, (0, iterative_start(self.size)))
        weights = iterative_weights(found)
        smoothed = eqx.tree_at(lambda e: e.members, before, weights @ first)
        analysis = jax.vmap(columns.pack)(self.move(chain, smoothed, t, still))
        if self.rotate and not self.inflation.by_member:
            turn = ensemble.rotation(keys[1], self.size)
            analysis, weights = turn @ analysis, turn @ weights
        forecast = jax.vmap(columns.pack)(moved)
        analysis = self.inflation.after(forecast, analysis, keys[2])
        analysis, weights = self._turn_late(analysis, weights, keys[4])
        value = ensemble.log_likelihood(w)
        total = before.log_likelihood + value
        riders = [r[0] for r in moved.riders]
        after = Ensemble(
            analysis[:, : columns.n], riders, before.memory, total, before.replaced, before.surprise + surprise(w)
        )
        return after, Cycle(forecast, analysis, weights, Seen(moved.observed.mean, variances, w, value))


def surprise(w: Whitened) -> Array:
    """|d|^2 over its expectation, the number of data and the trace of the predicted data's covariance."""
    trace = jnp.sum(w.anomalies**2) / (w.anomalies.shape[0] - 1)
    return jnp.where(w.count > 0, jnp.sum(w.innovation**2) / jnp.maximum(trace + w.count, 1e-30), 1.0)


def apply(weights: Array, members: Array, columns: Layout) -> Array:
    """Weights (N, N), or (n, N, N) with one more set for columns without coordinates, at members (N, K)."""
    if weights.ndim == 2:
        return weights @ members
    return jnp.einsum("kij,jk->ik", weights[places(columns, members.shape[1])], members)


def places(columns: Layout, size: int) -> Array:
    """For each column the number of its local weights; n stands for those of all data."""
    found = list(range(columns.n)) + [columns.n] * (size - columns.n)
    for column in (*columns.sites.values(), *columns.returned):
        if column.local and column.start >= columns.n:
            found[column.start : column.start + column.size] = range(columns.n)
    return jnp.asarray(found)


def _inflate(members: Array, factor: Array | float) -> Array:
    mean = jnp.mean(members, 0)
    return mean + factor * (members - mean)


def _mend(forecast: Array, predicted: Array, key: Key) -> tuple[Array, Array, Array]:
    """Members that are not finite become copies of others, drawn at random; their number."""
    bad = ~(jnp.all(jnp.isfinite(forecast), 1) & jnp.all(jnp.isfinite(predicted), 1))

    def draw(_: None) -> Array:
        chosen = jax.random.categorical(key, jnp.where(bad, -jnp.inf, 0.0), shape=bad.shape)
        return jnp.where(bad, chosen, jnp.arange(bad.shape[0]))

    # Only the rows' numbers come out of the branch: whole ensembles would be copied in and out of it.
    rows = jax.lax.cond(jnp.any(bad), draw, lambda _: jnp.arange(bad.shape[0]), None)
    forecast, predicted = (jnp.take(x, rows, 0, mode="clip") for x in (forecast, predicted))
    return forecast, predicted, jnp.sum(bad, dtype=forecast.dtype)


def needs_returned(s: ChainStructure) -> bool:
    """Whether a site outside the scan follows from what the scan returned or from its last carry."""
    return any(k[0] in ("stacked", "last") for n in s.around.shapes["values"] for k in s.around.sources("values", n))
