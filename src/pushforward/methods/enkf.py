"""`EnKF`: ensemble Kalman filters and smoothers."""

from pathlib import Path
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key, Model
from pushforward.math.innovations import Innovations, ensemble_chi_square
from pushforward.methods import _ensemble_filter
from pushforward.methods._base import Draws, check_boolean, check_choice, check_integer
from pushforward.methods._ensemble_filter import Cycle, Ensemble, Filter, Layout
from pushforward.methods._ensemble_parts import (
    ANALYSES,
    ETKF,
    LETKF,
    Adaptive,
    Analysis,
    EnKS,
    Inflation,
    IterativeEnKS,
    NoInflation,
    Smoother,
)
from pushforward.methods._filter_stats import data_shapes, innovation_stats, split_data, with_noise
from pushforward.methods._kalman_filter import each
from pushforward.methods._learned_filter import FilterTraining, fit_model
from pushforward.methods._loops import checkpointed_scan
from pushforward.methods._online import ensemble_advance, ensemble_begin
from pushforward.methods._state import STORES, Increment, StateDraws, StateMethod
from pushforward.model import trajectories
from pushforward.model.linear import why_no_gaussian_noise
from pushforward.model.state_space import Chain, StateSpace

_SURPRISE = 4.0


class EnKF(StateMethod):
    """Ensemble Kalman filter (Evensen 1994): the state's law as a set of members that the model moves.

    Costs O(N^2 (n + m)) per step, never n^2, and needs no derivatives. The result converges to the Kalman filter's
    as N grows where the model is linear and Gaussian, with an error in the mean of order N^-1/2 and a bias of
    order 1 / N; otherwise it is an approximation without error bound. With few members use `LETKF`, inflation, or
    `FiniteSize`.

    Args:
        members: number of members N, at least 2.
        analysis: `pf.ETKF()`, `pf.DEnKF()`, `pf.Perturbed()`, `pf.SerialEnSRF()`, `pf.LETKF(radius)`,
            `pf.FiniteSize()`, or a name: "etkf", "denkf", "perturbed", "serial", "letkf", "finite_size".
        inflation: `pf.Multiplicative(1.02)`, `pf.Additive(sd)`, `pf.RTPS()`, `pf.RTPP()`, `pf.Adaptive()`.
        rotate: whether each analysis ends with a random rotation that keeps mean and covariance.
        smoother: `pf.EnKS(lag)` or `pf.IterativeEnKS()`.
        store: "draws", "moments" or "last"; see `pf.Kalman`.
        augment: whether free parameters join the state, the usual practice in data assimilation.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def walk(y):
        ...     def step(x, y):
        ...         x = numpyro.sample("x", dist.Normal(x, 1))
        ...         numpyro.sample("y", dist.Normal(x, 2), obs=y)
        ...         return x, None
        ...     scan(step, numpyro.sample("x0", dist.Normal(0, 5)), y)
        >>> tree = pf.infer(walk, method=pf.EnKF(members=50), y=np.array([1.0, 2.0, np.nan, 3.0]))
        >>> tree["posterior"]["x"].shape
        (1, 50, 4)
    """

    densities: ClassVar[bool] = False

    members: int = 100
    analysis: Analysis = ETKF()
    inflation: Inflation = NoInflation()
    rotate: bool = False
    smoother: Smoother = EnKS()
    store: str = "draws"
    augment: bool = False

    def __init__(
        self,
        members: int = 100,
        analysis: Analysis | str = ETKF(),
        *,
        inflation: Inflation = NoInflation(),
        rotate: bool = False,
        smoother: Smoother = EnKS(),
        store: str = "draws",
        augment: bool = False,
    ):
        if isinstance(analysis, str):
            check_choice("EnKF", tuple(ANALYSES), analysis=analysis)
            analysis = ANALYSES[analysis]()
        self.members, self.analysis, self.inflation = members, analysis, inflation
        self.rotate, self.smoother, self.store, self.augment = rotate, smoother, store, augment

    def __check_init__(self):
        check_integer("EnKF", 2, members=self.members)
        check_choice("EnKF", STORES, store=self.store)
        check_boolean("EnKF", augment=self.augment, rotate=self.rotate)
        kinds = {
            "analysis": (Analysis, "pf.ETKF()"),
            "inflation": (Inflation, "pf.Multiplicative(1.02)"),
            "smoother": (Smoother, "pf.EnKS(lag=10)"),
        }
        for name, (kind, example) in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise MethodError(f"EnKF({name}=...) takes an instance such as {example}; got {getattr(self, name)!r}.")
        if isinstance(self.smoother, IterativeEnKS) and not isinstance(self.analysis, ETKF):
            raise MethodError(
                "EnKF(smoother=pf.IterativeEnKS()) has an analysis of its own, a symmetric square root. Leave "
                f"analysis= at pf.ETKF(); got {self.analysis!r}."
            )

        if isinstance(self.smoother, IterativeEnKS) and isinstance(self.inflation, Adaptive):
            raise MethodError(
                "EnKF(smoother=pf.IterativeEnKS(), inflation=pf.Adaptive()) do not go together: the iterative smoother "
                "has no forecast to inflate. Use pf.Multiplicative(1.02)."
            )

    @property
    def filter(self) -> Filter:
        """The parts that a cycle uses."""
        return Filter(self.members, self.analysis, self.inflation, self.rotate, self.smoother)

    def why_not(self, problem: Any) -> str | None:
        """The noise of the data must have a Gaussian form; iterative smoothing needs a model without noise."""
        reason = why_no_gaussian_noise(problem, matching=True)
        if reason:
            return reason
        if isinstance(self.smoother, IterativeEnKS) and problem.noise_dimension:
            return (
                f"IterativeEnKS is for models without noise, and sites {list(problem.structure.latent)} are sampled in "
                "each step; use smoother=pf.EnKS()"
            )
        if isinstance(self.analysis, LETKF):
            return self._why_not_local(problem)
        return None

    def _why_not_local(self, space: StateSpace) -> str | None:
        values = {n: jnp.zeros(space.structure.joint.sites[n].shape) for n in space.parameters}

        def noise() -> tuple[Array, Array]:
            chain = space.chain(values)
            state, riders, _ = chain.start(jnp.zeros(chain.initial_dimension))
            return state, chain.step(state, riders, jnp.asarray(0), jnp.zeros(chain.noise_dimension)).observed.noise

        state, found = jax.eval_shape(noise)
        if found.ndim > 1:
            return "LETKF needs independent noise of the data, and theirs has a covariance matrix"
        self.analysis.taper(state.shape[0], found.shape[0])  # type: ignore[reportAttributeAccessIssue]
        return None

    def fit(
        self,
        model: Model,
        *args: Any,
        learn: tuple[str, ...] = ("inflation", "radius"),
        training: FilterTraining | None = None,
        observed: tuple[str, ...] | None = None,
        key: int | Key = 0,
        checkpoint: str | Path | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> "EnKF":
        """Learn inflation and localisation radius from the data in the model's arguments, without knowing the truth.

        A simplex search over the filter's own log likelihood, the sum of log N(data; forecast mean, forecast sample
        covariance + noise): some 20 runs of the filter, and no derivatives.

        Args:
            model: a NumPyro model with one scan.
            *args: its positional arguments.
            learn: what is learned, "inflation" (of Multiplicative, Additive, RTPS, RTPP), "radius" (of LETKF) or both.
            training: `pf.FilterTraining(...)`.
            observed: names of data sites that are deterministic.
            key: an integer or a typed JAX key.
            checkpoint: file to which the training writes its runs, and from which it resumes.
            progress: whether to show a progress bar.
            **kwargs: the model's named arguments, the data among them.

        Returns:
            The same method with the learned numbers as its options.

        Raises:
            MethodError: nothing of that kind to learn, a model that the method does not fit, or a filter that diverges
                before training. One that diverges later is reported by a warning, with the best other values kept.
            DataError: no data.
        """
        given = FilterTraining() if training is None else training
        return fit_model(self, learn, given, (model, args, kwargs), observed, key, checkpoint, progress)

    def members_of(self, draws: int) -> int:
        """See `StateMethod.members_of`."""
        return self.members

    def log_likelihood(self, chain: Chain, key: Key) -> Array:
        """Sum of log N(data; mean of the predicted data, their sample covariance + noise), from the members.

        Biased by O(1 / N). The noise is drawn from `key`, so that the same key gives a differentiable function of the
        parameters. Memory of its gradient is O(sqrt T).
        """
        first, second = jax.random.split(key)
        start, _, _ = self.filter.start(chain, first)
        columns = _ensemble_filter.layout(chain, False)

        def move(before: Ensemble, t: Array) -> tuple[Ensemble, None]:
            after, _ = self.filter.cycle(chain, columns, before, t, jax.random.fold_in(second, t))
            return after, None

        return checkpointed_scan(move, start, chain.structure.length).log_likelihood

    def trajectories(self, chain: Chain, key: Key, draws: int, store: str = "draws") -> StateDraws:
        """See `StateMethod.trajectories`."""
        first, second, third = jax.random.split(key, 3)
        start, noise, weights = self.filter.start(chain, first)
        columns = _ensemble_filter.layout(chain, store == "draws" and _ensemble_filter.needs_returned(chain.structure))
        fourth = jax.random.fold_in(third, 1)
        rows = jnp.linspace(0, self.members - 1, min(draws, self.members)).round().astype(int)
        if draws == 1:
            rows = jax.random.randint(third, (1,), 0, self.members)

        def move(carry: tuple[Ensemble, Array], t: Array) -> tuple[tuple[Ensemble, Array], Any]:
            after, cycle = self.filter.cycle(chain, columns, carry[0], t, jax.random.fold_in(second, t))
            seen = cycle.seen
            assert seen is not None
            found = Innovations(seen.log_likelihood, ensemble_chi_square(seen.whitened), seen.whitened.count)
            data = {}
            if store == "draws" and draws > 1:
                values = with_noise(seen.predicted[rows], seen.noise, jax.random.fold_in(fourth, t))
                data = split_data(values, data_shapes(chain))
            return (after, cycle.analysis), (_kept(columns, cycle, store), data, innovation_stats(found))

        size = columns.n + sum(_column_sizes(columns))
        blank = jnp.zeros((self.members, size), start.members.dtype)
        times = jnp.arange(chain.structure.length)
        (end, analysis), (kept, data, stats) = jax.lax.scan(move, (start, blank), times)
        if not chain.structure.discrete:
            end = eqx.tree_at(lambda e: e.riders, end, each(end.riders, self.members))
        last = (end.members[rows], [r[rows] for r in end.riders])
        summary = {"replaced_members": end.replaced, "mean_surprise": end.surprise / chain.structure.length}
        evidence = end.log_likelihood + chain.static_log_likelihood()
        if store == "draws":
            posterior = self._smoothed(chain, columns, kept, (noise, weights), end, third)
            groups = [columns.values(jnp.swapaxes(part[:, rows], 0, 1)) for part in (kept.analysis, kept.forecast)]
            groups[1] |= jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), data)
        else:
            posterior = columns.values(analysis) | _joined(chain, end.members)
            swapped = [jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), part) for part in kept]
            groups = swapped if store == "moments" else [{}, {}]
        posterior = jax.tree.map(lambda v: v[rows], posterior)
        return StateDraws(posterior, groups[0], groups[1], {}, {}, last, evidence, summary, stats)

    def _smoothed(
        self, chain: Chain, columns: Layout, kept: Cycle, begun: tuple[Array, Array], end: Ensemble, key: Key
    ) -> dict[str, Array]:
        """Site values of the smoothed members, leading axis member."""
        lag = 1 if isinstance(self.smoother, IterativeEnKS) else self.smoother.lag  # type: ignore[reportAttributeAccessIssue]
        later = later_weights(kept.weights, lag)
        smooth = jax.vmap(lambda w, x: _ensemble_filter.apply(w, x, columns))(later[1:], kept.analysis)
        values = columns.values(jnp.swapaxes(smooth, 0, 1))
        outside = self._outside(chain, columns, later[0], begun)
        if _ensemble_filter.needs_returned(chain.structure):
            tree = jax.tree.structure(chain.structure.body.shapes["returned"])
            back = columns.back(jnp.swapaxes(smooth, 0, 1), tree)
            late = jax.random.normal(key, (self.members, chain.late_dimension))
            ending = (end.members, end.riders)
            around = trajectories.around(chain, begun[0], back, ending, late)["values"]
            outside = {n: outside.get(n, v) for n, v in around.items()}
        return outside | _joined(chain, end.members) | values

    def _outside(self, chain: Chain, columns: Layout, later: Array, begun: tuple[Array, Array]) -> dict[str, Array]:
        """Sites outside the scan that do not follow from it, updated as the ensemble at the start."""
        noise, weights = begun
        found = jax.vmap(lambda z: chain.around(z)["values"])(noise)
        s = chain.structure

        def update(name: str, value: Array) -> Array:
            flat = value.reshape(self.members, -1)
            if not any(k == ("outer", n) for k in s.around.sources("values", name) for n in s.initial):
                return value
            flat = weights @ flat
            if later.ndim == 3 and flat.shape[1] == columns.n:
                flat = jnp.einsum("kij,jk->ik", later[: columns.n], flat)
            else:
                flat = (later[-1] if later.ndim == 3 else later) @ flat
            return flat.reshape(value.shape)

        follows = {n for n in found if {k[0] for k in s.around.sources("values", n)} & {"last", "stacked"}}
        return {n: update(n, v) for n, v in found.items() if n not in follows and n not in s.late}

    def begin(self, chain: Chain, key: Key) -> tuple[Ensemble, Array]:
        """See `StateMethod.begin`."""
        return ensemble_begin(chain, self.filter, key)

    def advance(self, chain: Chain, belief: Ensemble, key: Key) -> tuple[Ensemble, Increment]:
        """See `StateMethod.advance`; of a smoother, the filter alone."""
        return ensemble_advance(chain, self.filter, belief, key)

    def warnings(self, draws: Draws) -> list[str]:
        """Replaced members, and innovations far larger than the ensemble expects."""
        notes = []
        replaced = float(draws.summary.get("replaced_members", 0.0))
        if replaced:
            notes.append(
                f"{replaced:.0f} times a member was not finite and was replaced by a copy of another. Look at the step "
                "of the model for states that it cannot take."
            )
        surprise = float(draws.summary.get("mean_surprise", 1.0))
        if surprise > _SURPRISE:
            notes.append(
                f"the squared innovations are {surprise:.3g} times what the ensemble expects: it has lost the truth. "
                "Give more members or inflation, localise with pf.LETKF, or look at the noise of model and data."
            )
        return notes


def _column_sizes(columns: Layout) -> list[int]:
    own = {(c.start, c.size) for c in (*columns.sites.values(), *columns.returned) if c.start >= columns.n}
    return [size for _, size in own]


def _joined(chain: Chain, members: Array) -> dict[str, Array]:
    """Parameters that are part of the state, as the last analysis left them."""
    if not chain.joined:
        return {}
    found = jax.vmap(lambda x: chain.at(x[: chain.joined_size]).outer)(members)
    return {n: found[n] for n in chain.joined}


def _kept(columns: Layout, cycle: Cycle, store: str) -> Any:
    """What a cycle leaves behind: everything, moments of the analysis and the forecast, or nothing."""
    if store == "draws":
        return Cycle(cycle.forecast, cycle.analysis, cycle.weights, None)
    if store == "last":
        return ()

    def moments(members: Array) -> dict[str, Array]:
        values = columns.values(members)
        return jax.tree.map(lambda v: jnp.stack([jnp.mean(v, 0), jnp.std(v, 0, ddof=1)]), values)

    return moments(cycle.analysis), moments(cycle.forecast)


def later_weights(weights: Array, lag: int | None) -> Array:
    """For each time 0..T the product of the weights of the next `lag` steps, the latest first.

    Args:
        weights: of the steps 1..T, shape (T, ..., N, N).
        lag: number of later steps; None: all.
    """
    length, size = weights.shape[0], weights.shape[-1]
    unit = jnp.broadcast_to(jnp.eye(size, dtype=weights.dtype), weights.shape[1:])
    if lag is None or lag >= length:

        def back(after: Array, w: Array) -> tuple[Array, Array]:
            now = after @ w
            return now, now

        _, found = jax.lax.scan(back, unit, weights, reverse=True)
        return jnp.concatenate([found, unit[None]])
    # Products over 1, 2, 4, ... steps: log2(lag) of them make all windows.
    window = jnp.concatenate([weights, jnp.broadcast_to(unit, (lag, *unit.shape))])
    found, covered, steps = jnp.broadcast_to(unit, (length + 1, *unit.shape)), 0, 1
    while covered < lag:
        if lag & steps:
            part = window[covered : covered + length + 1]
            found = part @ found if covered else part
            covered += steps
        if covered < lag:
            window = window[steps:] @ window[:-steps]
            steps *= 2
    return found
