"""`Kalman`: the Kalman filter and smoother, and their nonlinear relatives."""

from typing import Any

import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.math import kalman, kalman_parallel, kalman_steady
from pushforward.math.innovations import kalman_innovations
from pushforward.methods import _linearization
from pushforward.methods._base import check_boolean, check_choice, check_positive
from pushforward.methods._filter_stats import along as predicted_along
from pushforward.methods._filter_stats import innovation_stats
from pushforward.methods._kalman_blocks import block_draws, block_log_likelihood
from pushforward.methods._kalman_filter import (
    AllDraws,
    Followed,
    begin,
    draw,
    each,
    follow,
    joint_moments,
    linear_series,
    log_evidence,
    over_time,
)
from pushforward.methods._linearization import Exact, Linearization, root
from pushforward.methods._online import GaussianBelief, gaussian_advance, gaussian_begin, site_moments
from pushforward.methods._state import STORES, Increment, StateDraws, StateMethod
from pushforward.model import trajectories
from pushforward.model.blocks import Blocks, blocks
from pushforward.model.linear import Facts, facts
from pushforward.model.state_space import Chain, StateSpace

_SCHEDULES = ("auto", "sequential", "parallel")


class Kalman(StateMethod):
    """Kalman filter, smoother and joint smoothing draws (Kalman 1960; Rauch, Tung and Striebel 1965).

    With the default `Exact` the model must be linear with Gaussian noise, which is verified, and the result is the
    exact posterior of the trajectory. The other linearisations approximate nonlinear steps and give no error bound.

    Args:
        linearization: `pf.Exact()`, `pf.Extended()`, `pf.Iterated()`, `pf.Unscented()`, `pf.Cubature()` or their names.
        inflation: factor of the state's covariance per unit of time; 1 leaves it alone.
        time_step: length of a step in units of time.
        schedule: "sequential", "parallel" in time (an associative scan, for linear models on accelerators), or "auto".
        store: "draws" of trajectories; "moments": means and standard deviations in time, in memory that does not grow
            with matrices; "last": draws of the last state.
        augment: whether free parameters join the state. Otherwise a model with parameters needs
            ``infer(model, method=pf.NUTS(), states=pf.Kalman())``.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def walk(y):
        ...     def step(x, y):
        ...         x = numpyro.sample("x", dist.Normal(x, 1))
        ...         numpyro.sample("y", dist.Normal(x, 2), obs=y)
        ...         return x, None
        ...     scan(step, numpyro.sample("x0", dist.Normal(0, 5)), y)
        >>> tree = pf.infer(walk, method=pf.Kalman(), y=np.array([1.0, 2.0, np.nan, 3.0]))
        >>> tree["posterior"]["x"].shape
        (1, 1000, 4)
    """

    linearization: Linearization = Exact()
    inflation: float = 1.0
    time_step: float = 1.0
    schedule: str = "auto"
    store: str = "draws"
    augment: bool = False

    def __init__(
        self,
        linearization: Linearization | str = Exact(),
        *,
        inflation: float = 1.0,
        time_step: float = 1.0,
        schedule: str = "auto",
        store: str = "draws",
        augment: bool = False,
    ):
        if isinstance(linearization, str):
            check_choice("Kalman", tuple(_linearization.NAMES), linearization=linearization)
            linearization = _linearization.NAMES[linearization]()
        self.linearization = linearization
        self.inflation, self.time_step = inflation, time_step
        self.schedule, self.store, self.augment = schedule, store, augment

    def __check_init__(self):
        if not isinstance(self.linearization, Linearization):
            raise MethodError(
                "Kalman(linearization=...) takes an instance such as pf.Extended(), or one of "
                f"{list(_linearization.NAMES)}; got {self.linearization!r}."
            )
        check_positive("Kalman", inflation=self.inflation, time_step=self.time_step)
        check_choice("Kalman", _SCHEDULES, schedule=self.schedule)
        check_choice("Kalman", STORES, store=self.store)
        check_boolean("Kalman", augment=self.augment)
        if self.schedule == "parallel" and not (isinstance(self.linearization, Exact) and self.inflation == 1.0):
            raise MethodError(
                "Kalman(schedule='parallel') needs steps that are known before filtering: use it with pf.Exact() and "
                "without inflation, or schedule='sequential'."
            )

    @property
    def exact(self) -> bool:
        """Whether the result is the exact posterior."""
        return isinstance(self.linearization, Exact) and self.inflation == 1.0

    def why_not(self, problem: Any) -> str | None:
        """Exact needs a linear-Gaussian model, the others Gaussian noise."""
        return self.linearization.why_not(problem)

    @property
    def _growth(self) -> float:
        return self.inflation**self.time_step

    def _parallel(self, length: int) -> bool:
        if self.schedule == "auto":
            return self.exact and jax.default_backend() != "cpu" and length >= 128
        return self.schedule == "parallel"

    def log_likelihood(self, chain: Chain, key: Key | None = None, *, steady: bool = False) -> Array:
        """log p(data of the trajectory given parameters), exactly where the filter is exact.

        Args:
            chain: the model at its parameters.
            key: not used.
            steady: whether a time-invariant model may switch to the steady-state gain once its covariance has
                converged. Under `vmap` both ways would be computed.
        """
        parts = self._blocks(chain)
        if parts is not None:
            return block_log_likelihood(chain, parts, _facts(chain))
        parallel = self._parallel(chain.structure.length)
        # Steps that vary are linearised one by one: all of them at once would fill memory and take longer.
        series = self._series(chain) if parallel or (self.exact and _facts(chain).constant) else None
        if series is None:
            return log_evidence(chain, self.linearization, self._growth)
        start, known = (series.first.mean, series.first.cov), series.varying
        if parallel:
            rest = kalman_parallel.filter_series_parallel(*start, series.steps, series.data, varying=known)
        else:
            rest = kalman_steady.filter_constant(*start, series.steps, series.data, steady=steady)
        return series.first.log_likelihood + rest.log_likelihood

    def _blocks(self, chain: Chain) -> Blocks | None:
        """Independent blocks, where the model is linear and has plates in its step."""
        return blocks(_space(chain)) if self.exact and not chain.joined else None

    def _series(self, chain: Chain) -> Any:
        if not self.exact:
            return None
        known = _facts(chain)
        return linear_series(chain, known.constant, known.offsets_constant)

    def _followed(self, chain: Chain) -> Followed:
        """The filtered chain with its records, by whichever way fits."""
        series = self._series(chain)
        if series is None:
            return follow(chain, self.linearization, self._growth)
        run = kalman.filter_series
        if self._parallel(chain.structure.length):
            run = kalman_parallel.filter_series_parallel
        found = run(series.first.mean, series.first.cov, series.steps, series.data, varying=series.varying)
        length = chain.structure.length
        noise = (
            series.steps.R if series.varying.R else jnp.broadcast_to(series.steps.R, (length, *series.steps.R.shape))
        )
        return Followed(
            series.first, series.first_noise, series.riders, found, noise, _last_riders(chain, series.riders)
        )

    def trajectories(self, chain: Chain, key: Key, draws: int, store: str = "draws") -> StateDraws:
        """See `StateMethod.trajectories`."""
        if store != "draws":
            return _without_trajectories(self, chain, key, draws, store)
        parts = self._blocks(chain)
        if parts is not None:
            drawn, riders, evidence, innovations = block_draws(chain, parts, _facts(chain), key, draws)
            rest = (riders, _last_riders(chain, riders), evidence, innovations)
            return _package(chain, rest, drawn, key, draws)
        found = self._followed(chain)
        last_mean = found.filtered.means[-1]
        roots = (kalman.noise_root(found.first_noise), jax.vmap(kalman.noise_root)(found.noise))
        drawn = draw(found.first, found.filtered.records, last_mean, roots, key, draws, self._growth)
        evidence = found.first.log_likelihood + found.filtered.log_likelihood
        innovations = jax.vmap(kalman_innovations)(found.filtered.records, _data(chain, found.riders))
        rest = (found.riders, found.last_riders, evidence, innovations)
        return _package(chain, rest, _own_noise(drawn, chain.noise_dimension), key, draws)

    def begin(self, chain: Chain, key: Key) -> tuple[GaussianBelief, Array]:
        """See `StateMethod.begin`; independent blocks are filtered together, as one state."""
        return gaussian_begin(chain)

    def advance(self, chain: Chain, belief: GaussianBelief, key: Key) -> tuple[GaussianBelief, Increment]:
        """See `StateMethod.advance`."""
        return gaussian_advance(chain, belief, self.linearization, self._growth)


def _facts(chain: Chain) -> Facts:
    return facts(_space(chain))


def _space(chain: Chain) -> StateSpace:
    return StateSpace(chain.arrays, chain.structure, chain.joined)


def _last_riders(chain: Chain, riders: list[Array]) -> list[Array]:
    """What rides along after the last step."""
    last = chain.structure.length - 1
    state = jnp.zeros(jax.eval_shape(lambda: chain.start(jnp.zeros(chain.initial_dimension))[0]).shape)
    return chain.step(state, [r[last] for r in riders], jnp.asarray(last), jnp.zeros(chain.noise_dimension)).riders


def _data(chain: Chain, riders: list[Array]) -> Array:
    """Data of all steps, shape (time, m), NaN where missing."""
    state = jnp.zeros(jax.eval_shape(lambda: chain.start(jnp.zeros(chain.initial_dimension))[0]).shape)
    still, times = jnp.zeros(chain.noise_dimension), jnp.arange(chain.structure.length)
    return over_time(chain, lambda r, t: chain.step(state, r, t, still).observed.data, riders, times)


def _own_noise(drawn: AllDraws, q: int) -> AllDraws:
    """Without the noise that sigma points add."""
    smoothing = drawn.smoothing._replace(noise=drawn.smoothing.noise[..., :q])
    parts = [(states, noise[..., :q]) for states, noise in (drawn.filtering, drawn.one_step)]
    return AllDraws(smoothing, *parts)


def _package(chain: Chain, rest: tuple, drawn: AllDraws, key: Key, draws: int) -> StateDraws:
    """Sites at the draws; `rest` is what rides along before each step and after the last, log p(data), innovations."""
    riders, last_riders, evidence, innovations = rest
    late = jax.random.normal(jax.random.fold_in(key, 2), (draws, chain.late_dimension))
    smooth = drawn.smoothing
    last = (smooth.last, each(last_riders, draws))
    sites = trajectories.posterior(chain, riders, smooth.initial, smooth.states, smooth.noise, last, late)
    filtering = trajectories.along(chain, riders, *drawn.filtering, jnp.arange(chain.structure.length))["values"]
    one_step, data = predicted_along(chain, riders, *drawn.one_step, jax.random.fold_in(key, 3))
    # A single draw serves a method for the parameters, which asks for no predictions.
    one_step = one_step | data if draws > 1 else one_step
    filtering, one_step = (jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), part) for part in (filtering, one_step))
    return StateDraws(
        posterior=sites.values,
        filtering=filtering,
        one_step=one_step,
        log_prior=sites.log_prior,
        log_likelihood=sites.log_likelihood,
        last=last,
        log_evidence=evidence + chain.static_log_likelihood(),
        summary={},
        stats=innovation_stats(innovations),
    )


def _without_trajectories(method: Kalman, chain: Chain, key: Key, draws: int, store: str) -> StateDraws:
    """Filter in memory that does not grow with T x n x n: moments of sites in time, draws of the last step."""
    first, _, riders = begin(chain, chain.initial_dimension)
    q = chain.noise_dimension
    still, growth = jnp.zeros(q), method._growth

    def sites_at(joint: Array, riding: list[Array], t: Array) -> dict[str, Array]:
        return chain.step(joint[:-q] if q else joint, riding, t, joint[-q:] if q else still).sites

    def moments(law: tuple[Array, Array], riding: list[Array], t: Array) -> dict[str, Array]:
        found = site_moments(lambda joint: sites_at(joint, riding, t), *law)
        return jax.tree.map(lambda *v: jnp.stack(v), *found)

    def move(carry: tuple, t: Array) -> tuple[tuple, tuple]:
        mean, cov, riding, total, _ = carry
        cov = growth * cov
        moved = chain.step(mean, riding, t, still)
        step = method.linearization.step(chain, mean, cov, riding, t, moved.observed.data)
        after = kalman.update(mean, cov, step, moved.observed.data)
        laws = [
            (m[: mean.shape[0] + q], c[: mean.shape[0] + q, : mean.shape[0] + q])
            for m, c in joint_moments(after.record)
        ]
        kept = tuple(moments(law, riding, t) for law in laws) if store == "moments" else ({}, {})
        stats = innovation_stats(kalman_innovations(after.record, moved.observed.data))
        return (after.mean, after.cov, moved.riders, total + after.log_likelihood, (laws[0], riding)), (*kept, stats)

    n = first.mean.shape[0]
    start = (
        first.mean,
        first.cov,
        riders,
        first.log_likelihood,
        ((jnp.zeros(n + q), jnp.zeros((n + q, n + q))), riders),
    )
    length = chain.structure.length
    (_, _, last_riders, total, (law, riding)), (*kept, stats) = jax.lax.scan(move, start, jnp.arange(length))
    spread = jax.random.normal(key, (draws, n + q)) @ root(law[1]).T
    joint = law[0] + spread
    final = jax.vmap(lambda u: chain.step(u[:n], riding, jnp.asarray(length - 1), u[n:]))(joint)
    values = final.sites
    if chain.joined:
        values = values | jax.vmap(lambda x: chain.at(x[: chain.joined_size]).outer)(final.state)
        values = {k: v for k, v in values.items() if k in final.sites or k in chain.joined}
    swapped = [jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), part) for part in kept]
    evidence = total + chain.static_log_likelihood()
    last = (final.state, each(last_riders, draws))
    return StateDraws(values, swapped[0], swapped[1], {}, {}, last, evidence, {}, stats)
