"""`TransportFilter`: an ensemble whose analysis is a learned map from forecasts and simulated data."""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.math import transport_maps
from pushforward.math.innovations import Innovations
from pushforward.math.normals import normals
from pushforward.methods import _ensemble_filter
from pushforward.methods._base import Draws, check_boolean, check_choice, check_integer
from pushforward.methods._ensemble_filter import Layout, _mend
from pushforward.methods._filter_stats import (
    _replicated,
    data_shapes,
    data_sites,
    innovation_stats,
    split_data,
    with_noise,
)
from pushforward.methods._kalman_filter import each
from pushforward.methods._loops import checkpointed_scan
from pushforward.methods._online import parameters_at
from pushforward.methods._state import STORES, Increment, StateDraws, StateMethod
from pushforward.methods._transport_parts import MAPS, AffineMap, TransportMap
from pushforward.model import trajectories
from pushforward.model.state_space import Chain, Moved, StateSpace


class Flock(eqx.Module):
    """What is carried from step to step.

    Attributes:
        members: (N, n).
        riders: what rides along.
        start: noise of the initial state (N, k), which later data update too.
        log_likelihood: sum of the log densities of the data so far.
        replaced: number of members that were not finite.
    """

    members: Array
    riders: list[Array]
    start: Array
    log_likelihood: Array
    replaced: Array


class Cycle(NamedTuple):
    """What a step leaves: columns (N, K) before and after the analysis, simulated data (N, m), and statistics."""

    forecast: Array
    analysis: Array
    simulated: Array
    found: Innovations


class TransportFilter(StateMethod):
    """Transport filter: each analysis moves the forecast by a map that is learned from pairs (state, simulated data).

    The analysis sees the observation only through data simulated at each member, so that any law of the data will do:
    counts, censored data, noise that depends on the state, data that are a nonlinear function of it. With the affine
    map it is the stochastic ensemble Kalman filter with its gain from the sample; nonlinear maps follow posteriors that
    are skewed or have two modes. Use it for states of a few entries with more members than data in a step; for large
    states use `EnKF`, where the data say everything a `ParticleFilter`.

    It filters: `posterior` and `filtering` hold the members after each step's analysis, no smoothing draws; what
    stands in front of the scan is updated by regression on the members. `log_likelihood` is that of a particle filter
    at the forecast members, consistent as far as the forecast is right.

    Args:
        members: number N, more than the data of a step plus one.
        map: `pf.AffineMap()`, `pf.TriangularMap(...)` (greatest likelihood), `pf.EnergyTransport(...)` (energy
            distance), or "affine", "triangular", "energy".
        store: "draws", "moments" or "last"; see `pf.Kalman`.
        augment: whether free parameters join the state.

    Reference: Spantini, Baptista and Marzouk (2022), SIAM Rev. 64, doi:10.1137/20M1312204.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def counts(y):
        ...     def step(x, y):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        ...         numpyro.sample("y", dist.Poisson(x**2), obs=y)
        ...         return x, None
        ...     scan(step, numpyro.sample("x0", dist.Normal(1, 1)), y)
        >>> tree = pf.infer(counts, method=pf.TransportFilter(100, "triangular"), y=np.array([3, 1, 0, 4]))
        >>> tree["filtering"]["x"].shape
        (1, 100, 4)
    """

    returns: ClassVar[str] = "filtering"
    densities: ClassVar[bool] = False

    members: int = 200
    map: TransportMap = AffineMap()
    store: str = "draws"
    augment: bool = False

    def __init__(
        self, members: int = 200, map: TransportMap | str = AffineMap(), *, store: str = "draws", augment: bool = False
    ):
        if isinstance(map, str):
            check_choice("TransportFilter", tuple(MAPS), map=map)
            map = MAPS[map]()
        self.members, self.map, self.store, self.augment = members, map, store, augment

    def __check_init__(self):
        check_integer("TransportFilter", 3, members=self.members)
        check_choice("TransportFilter", STORES, store=self.store)
        check_boolean("TransportFilter", augment=self.augment)
        if not isinstance(self.map, TransportMap):
            raise MethodError(
                f"TransportFilter(map=...) takes pf.TriangularMap() or one of {list(MAPS)}; got {self.map!r}."
            )

    @property
    def differentiable(self) -> bool:  # type: ignore[reportIncompatibleVariableOverride]
        """Whether the map is; those that are trained at each step are not."""
        return self.map.differentiable

    def why_not(self, problem: StateSpace) -> str | None:
        """States must be continuous with an exact map from noise, and data such that a step's can be simulated."""
        s = problem.structure
        if s.factors:
            return f"numpyro.factor '{s.factors[0]}' stands in the body of the scan; write it as an observed site"
        if s.joint.discrete or s.discrete:
            return "its state is discrete, and maps are of continuous states; use pf.ParticleFilter()"
        if s.inexact:
            return (
                f"latent site '{s.inexact[0]}' ({s.joint.sites[s.inexact[0]].distribution}) has no exact map from "
                "Gaussian noise; use pf.NUTS() on the joint density"
            )
        for name, (kind, what) in s.families.items():
            if kind != "gaussian" and (name in s.first or name in s.fused):
                return f"observed site '{name}' is not Gaussian and stands outside the scan; write it in the body"
            if kind == "other" and str(what).startswith("stands under"):
                return f"observed site '{name}' {what}; its data cannot be simulated"
        sizes = [_count(shape) for shape in data_shapes(problem.chain(_zeros(problem))).values()]
        sizes = [sum(sizes), *(_count(s.joint.sites[n].shape) for n in s.first)]
        if max(sizes) + 1 >= self.members:
            return (
                f"it has {max(sizes)} data in a step, and maps from the sample need more members than that plus one, "
                f"not {self.members}; use pf.EnKF()"
            )
        return None

    def members_of(self, draws: int) -> int:
        """See `StateMethod.members_of`."""
        return self.members

    # ---------------------------------------------------------------------------------------------------- one step

    def begin(self, chain: Chain, key: Key) -> tuple[Flock, Array]:
        """See `StateMethod.begin`."""
        first, second, third = jax.random.split(key, 3)
        noise = normals(first, (self.members, chain.initial_dimension))
        members, riders, observed = jax.vmap(chain.start)(noise)
        if not chain.structure.discrete:
            riders = [r[0] for r in riders]
        zero = jnp.zeros((), members.dtype)
        if not chain.structure.first:
            return Flock(members, riders, noise, zero, zero), zero
        simulated = jax.vmap(with_noise)(observed.mean, observed.noise, jax.random.split(second, self.members))
        density = _mean_density(observed.log_prob, members)
        moved, noise, _ = self._analysis(members, noise, members.shape[1], simulated, observed.data[0], third)
        return Flock(moved, riders, noise, density, zero), density

    def _analysis(
        self, columns: Array, start: Array, n: int, simulated: Array, data: Array, key: Key
    ) -> tuple[Array, Array, Array]:
        """Columns, of which the first n are the state, and the start after the data; and the whitened innovation."""
        unit = transport_maps.units(columns[:, :n])
        x = unit.into(columns[:, :n])
        y, seen = transport_maps.standardise(simulated, data)
        moved = self.map.moved(x, y, seen, key)
        beside = jnp.concatenate([columns[:, n:], start], 1)
        followed = transport_maps.follow(beside, x, y, moved, seen) if beside.shape[1] else beside
        extra = columns.shape[1] - n
        found = jnp.concatenate([unit.back(moved), followed[:, :extra]], 1)
        # Without data nothing moves, whatever a trained map does.
        some = jnp.any(~jnp.isnan(data))
        found, start = jnp.where(some, found, columns), jnp.where(some, followed[:, extra:], start)
        return found, start, transport_maps.squared_innovation(y, seen)

    def _step(self, chain: Chain, columns: Layout, before: Flock, t: Array, key: Key) -> tuple[Flock, Cycle]:
        """Forecast, simulated data and analysis of step `t`."""
        keys = jax.random.split(key, 4)
        noise = normals(keys[0], (self.members, chain.noise_dimension))
        axes = 0 if chain.structure.discrete else None
        moved = jax.vmap(chain.step, (0, axes, None, 0))(before.members, before.riders, t, noise)
        simulated = _simulated(chain, before, moved, t, noise, keys[1])
        forecast = jax.vmap(columns.pack)(moved)
        density = _mean_density(moved.observed.log_prob, forecast)
        size = forecast.shape[1]
        joint, simulated, replaced = _mend(jnp.concatenate([forecast, before.start], 1), simulated, keys[2])
        forecast, data = joint[:, :size], moved.observed.data[0]
        analysis, start, square = self._analysis(forecast, joint[:, size:], columns.n, simulated, data, keys[3])
        riders = moved.riders if chain.structure.discrete else [r[0] for r in moved.riders]
        after = Flock(
            analysis[:, : columns.n], riders, start, before.log_likelihood + density, before.replaced + replaced
        )
        found = Innovations(density, square, jnp.sum(~jnp.isnan(data), dtype=square.dtype))
        return after, Cycle(forecast, analysis, simulated, found)

    def log_likelihood(self, chain: Chain, key: Key) -> Array:
        """Sum of log mean_i p(data; forecast member i)."""
        first, second = jax.random.split(key)
        start, _ = self.begin(chain, first)
        start = eqx.tree_at(lambda s: s.start, start, start.start[:, :0])
        columns = _ensemble_filter.layout(chain, False)

        def move(before: Flock, t: Array) -> tuple[Flock, None]:
            return self._step(chain, columns, before, t, jax.random.fold_in(second, t))[0], None

        return checkpointed_scan(move, start, chain.structure.length).log_likelihood

    def trajectories(self, chain: Chain, key: Key, draws: int, store: str = "draws") -> StateDraws:
        """See `StateMethod.trajectories`; members of the filter at each step."""
        first, second, third = jax.random.split(key, 3)
        start, _ = self.begin(chain, first)
        columns = _ensemble_filter.layout(chain, _ensemble_filter.needs_returned(chain.structure))
        rows = jnp.linspace(0, self.members - 1, min(draws, self.members)).round().astype(int)
        if draws == 1:
            rows = jax.random.randint(third, (1,), 0, self.members)

        def move(before: Flock, t: Array) -> tuple[Flock, tuple]:
            after, cycle = self._step(chain, columns, before, t, jax.random.fold_in(second, t))
            shown = [_shown(columns, part, store, rows) for part in (cycle.analysis, cycle.forecast)]
            data = split_data(cycle.simulated[rows], data_shapes(chain)) if store == "draws" and draws > 1 else {}
            return after, (cycle.analysis[rows], shown, data, innovation_stats(cycle.found))

        end, (kept, groups, data, stats) = jax.lax.scan(move, start, jnp.arange(chain.structure.length))
        kept, groups, data = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (kept, groups, data))
        if store == "draws":
            groups[1] |= data
        if not chain.structure.discrete:
            end = eqx.tree_at(lambda e: e.riders, end, each(end.riders, self.members))
        last = (end.members[rows], [r[rows] for r in end.riders])
        posterior = self._outside(chain, columns, end.start[rows], kept, last, third)
        posterior |= jax.vmap(lambda x: parameters_at(chain, x))(last[0]) if chain.joined else {}
        posterior |= columns.values(kept if store == "draws" else kept[:, -1])
        evidence = end.log_likelihood + chain.static_log_likelihood()
        return StateDraws(
            posterior, groups[0], groups[1], {}, {}, last, evidence, {"replaced_members": end.replaced}, stats
        )

    def _outside(
        self, chain: Chain, columns: Layout, start: Array, kept: Array, last: tuple, key: Key
    ) -> dict[str, Array]:
        """Sites outside the scan, from the start as all data have updated it and what the members returned."""
        if not _ensemble_filter.needs_returned(chain.structure):
            return jax.vmap(lambda z: chain.around(z)["values"])(start)
        back = columns.back(kept, jax.tree.structure(chain.structure.body.shapes["returned"]))
        late = jax.random.normal(key, (start.shape[0], chain.late_dimension))
        return trajectories.around(chain, start, back, last, late)["values"]

    def advance(self, chain: Chain, belief: Flock, key: Key) -> tuple[Flock, Increment]:
        """See `StateMethod.advance`."""
        columns = _ensemble_filter.layout(chain, False)
        none = jnp.zeros_like(belief.replaced)
        before = eqx.tree_at(lambda b: (b.log_likelihood, b.replaced), belief, (none, none))
        after, cycle = self._step(chain, columns, before, jnp.asarray(0), key)
        values = columns.values(cycle.analysis) | jax.vmap(lambda x: parameters_at(chain, x))(after.members)
        mean, sd = (jax.tree.map(lambda v, f=f: f(v), values) for f in (_mean, _sd))
        count = cycle.found.count
        surprise = jnp.where(count > 0, cycle.found.chi_square / jnp.maximum(count, 1), 1.0)
        summary = {"surprise": surprise, "replaced_members": after.replaced}
        return after, Increment(mean, sd, after.log_likelihood, summary)

    def warnings(self, draws: Draws) -> list[str]:
        """Replaced members."""
        replaced = float(draws.summary.get("replaced_members", 0.0))
        if not replaced:
            return []
        return [
            f"{replaced:.0f} times a member was not finite and was replaced by a copy of another. Look at the step of "
            "the model for states that it cannot take."
        ]


def _mean(values: Array) -> Array:
    return jnp.mean(values, 0)


def _sd(values: Array) -> Array:
    return jnp.std(values, 0, ddof=1)


def _count(shape: tuple[int, ...]) -> int:
    return int(jnp.prod(jnp.asarray(shape, int))) if shape else 1


def _zeros(space: StateSpace) -> dict[str, Array]:
    return {n: jnp.zeros(space.structure.joint.sites[n].shape) for n in space.parameters}


def _simulated(chain: Chain, before: Flock, moved: Moved, t: Array, noise: Array, key: Key) -> Array:
    """Data drawn from their law at each member, (N, m)."""
    keys = jax.random.split(key, noise.shape[0])
    if all(chain.structure.families[n][0] == "gaussian" for n in data_sites(chain)):
        return jax.vmap(with_noise)(moved.observed.mean, moved.observed.noise, keys)

    def one(state: Array, riders: list[Array], z: Array, own: Key) -> Array:
        found = _replicated(chain, state, riders, t, z, own)
        return jnp.concatenate([jnp.ravel(found[n]).astype(state.dtype) for n in data_sites(chain)])

    axes = 0 if chain.structure.discrete else None
    return jax.vmap(one, (0, axes, 0, 0))(before.members, before.riders, noise, keys)


def _mean_density(log_prob: dict[str, Array], members: Array) -> Array:
    """log mean_i p(data; member i), members that are not finite left out."""
    total = sum((jnp.sum(v.reshape(v.shape[0], -1), 1) for v in log_prob.values()), jnp.zeros(members.shape[0]))
    good = jnp.all(jnp.isfinite(members), 1) & ~jnp.isnan(total)
    total = jnp.where(good, total, -jnp.inf).astype(members.dtype)
    return jax.nn.logsumexp(total) - jnp.log(jnp.sum(good, dtype=members.dtype))


def _shown(columns: Layout, members: Array, store: str, rows: Array) -> dict[str, Array]:
    """What a step keeps of one law: members, their mean and standard deviation, or nothing."""
    if store == "last":
        return {}
    values = columns.values(members)
    if store == "draws":
        return {n: v[rows] for n, v in values.items()}
    return {n: jnp.stack([_mean(v), _sd(v)]) for n, v in values.items()}
