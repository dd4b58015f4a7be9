"""The cycle of `ThreeDVar`: a forecast of the mean, and an analysis by a background covariance or a gain.

What a cycle needs beside the model is in a `Setting`. Three kinds: `Background` (a matrix), `Operator` (v -> B v) and
`Learned` (a gain, with the covariance that it implies propagated in Joseph's form, or without).
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array
from pushforward.math import three_dvar
from pushforward.math.kalman import LOG_2PI
from pushforward.math.small_matrices import symmetric
from pushforward.math.three_dvar import BackgroundGain, background_gain
from pushforward.methods._gains import Gain, Units
from pushforward.methods._kalman_filter import begin
from pushforward.model.linear import step_at
from pushforward.model.observing import observed_at
from pushforward.model.state_space import Chain

_TOLERANCE = {8: 1e-10, 4: 1e-5}


class Estimate(eqx.Module):
    """Where a filter stands: mean (n,), covariance (n, n) or an array without entries, and what rides along."""

    mean: Array
    cov: Array
    riders: list[Array]


class Forecast(NamedTuple):
    """One step of the model: its mean and covariance, data with 0 where missing, and h as a function of the state."""

    mean: Array
    cov: Array
    data: Array
    present: Array
    noise: Array
    h: Callable[[Array], Array]


class Analysed(NamedTuple):
    """What an analysis gives; `square` is d' S^-1 d, NaN where it is not known, as is the increment of log p(y)."""

    mean: Array
    cov: Array
    increment: Array
    square: Array


class Cycle(NamedTuple):
    """One cycle: forecast, analysis, and the estimate that goes on."""

    forecast: Forecast
    analysed: Analysed
    after: Estimate


class Setting(eqx.Module):
    """Base of the three ways to analyse."""

    @property
    @abstractmethod
    def has_density(self) -> bool:
        """Whether increments of log p(y) and covariances are worked out; otherwise they are NaN and without entries."""

    @abstractmethod
    def start(self, chain: Chain) -> tuple[Estimate, Array]:
        """The estimate before the first step, and the log likelihood of data that came with it."""

    @abstractmethod
    def covariance(self, chain: Chain, before: Estimate, t: Array) -> Array:
        """Covariance of the forecast of step `t`."""

    @abstractmethod
    def analyse(self, f: Forecast) -> Analysed:
        """The analysis of a forecast."""

    def cycle(self, chain: Chain, before: Estimate, t: Array) -> Cycle:
        """Forecast and analysis of step `t`."""
        moved = chain.step(before.mean, before.riders, t, jnp.zeros(chain.noise_dimension))
        data = moved.observed.data
        missing = jnp.isnan(data)

        def h(state: Array) -> Array:
            return observed_at(chain, before.mean, before.riders, t, state)[0].mean

        cov = self.covariance(chain, before, t)
        present = 1.0 - missing.astype(moved.state.dtype)
        f = Forecast(moved.state, cov, jnp.where(missing, 0.0, data), present, moved.observed.noise, h)
        done = self.analyse(f)
        return Cycle(f, done, Estimate(done.mean, done.cov if cov.size else before.cov, moved.riders))


def start_mean(chain: Chain) -> tuple[Estimate, Array]:
    """The first state at its prior mean, or given what is observed with it."""
    if chain.structure.first:
        first, _, riders = begin(chain, chain.initial_dimension)
        return Estimate(first.mean, jnp.zeros((0, 0)), riders), first.log_likelihood
    state, riders, _ = chain.start(jnp.zeros(chain.initial_dimension))
    return Estimate(state, jnp.zeros((0, 0)), riders), jnp.zeros(())


class Background(Setting):
    """A background covariance B (n, n); `slopes` and `known`, H and its gain, where they hold at all steps."""

    B: Array
    iterations: int = eqx.field(static=True)
    slopes: Array | None = None
    known: BackgroundGain | None = None

    @property
    def has_density(self) -> bool:
        """See `Setting.has_density`."""
        return True

    def start(self, chain: Chain) -> tuple[Estimate, Array]:
        """See `Setting.start`; the covariance of the estimate is B, for it to be carried along."""
        estimate, value = start_mean(chain)
        return Estimate(estimate.mean, self.B, estimate.riders), value

    def covariance(self, chain: Chain, before: Estimate, t: Array) -> Array:
        """See `Setting.covariance`."""
        return self.B

    def analyse(self, f: Forecast) -> Analysed:
        """See `Setting.analyse`; Gauss-Newton on |x - m|^2_B + |y - h(x)|^2_R where h is not linear."""
        if self.slopes is not None:
            H = self.slopes
            found = self._gain(H, f)
            innovation = f.present * (f.data - f.h(f.mean))
            mean = f.mean + found.gain @ innovation
            gain = found.gain
        else:
            H = jax.jacfwd(f.h)(f.mean)
            found = self._gain(H, f)
            innovation = f.present * (f.data - f.h(f.mean))
            mean, gain, H_last = self._iterate(f, (f.mean + found.gain @ innovation, found.gain, H))
            return self._packed(f, (mean, gain, H_last), (innovation, found, H))
        return self._packed(f, (mean, gain, H), (innovation, found, H))

    def _gain(self, H: Array, f: Forecast) -> BackgroundGain:
        if self.known is None:
            return background_gain(self.B, H, f.noise, f.present)
        known = self.known
        return jax.lax.cond(
            jnp.all(f.present > 0), lambda: known, lambda: background_gain(self.B, H, f.noise, f.present)
        )

    def _iterate(self, f: Forecast, first: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        def improve(_: int, now: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x = now[0]
            H = jax.jacfwd(f.h)(x)
            gain = background_gain(self.B, H, f.noise, f.present).gain
            return f.mean + gain @ (f.present * (f.data - f.h(x) + H @ (x - f.mean))), gain, H

        return jax.lax.fori_loop(0, self.iterations - 1, improve, first)

    def _packed(self, f: Forecast, last: tuple[Array, Array, Array], first: tuple) -> Analysed:
        mean, gain, H = last
        innovation, found, H_first = first
        increment = three_dvar.innovation_log_density(innovation, found, H_first, f.noise, f.present)
        square = -2 * increment - found.log_determinant - LOG_2PI * jnp.sum(f.present)
        return Analysed(mean, symmetric(self.B - gain @ (H @ self.B)), increment, square)


class Operator(Setting):
    """A background covariance as a function v -> B v."""

    apply: Callable[[Array], Array] = eqx.field(static=True)
    iterations: int = eqx.field(static=True)

    @property
    def has_density(self) -> bool:
        """See `Setting.has_density`."""
        return False

    def start(self, chain: Chain) -> tuple[Estimate, Array]:
        """See `Setting.start`."""
        return start_mean(chain)

    def covariance(self, chain: Chain, before: Estimate, t: Array) -> Array:
        """See `Setting.covariance`."""
        return jnp.zeros((0, 0))

    def analyse(self, f: Forecast) -> Analysed:
        """See `Setting.analyse`."""
        tolerance = _TOLERANCE[f.mean.dtype.itemsize]

        def improve(x: Array, _: None) -> tuple[Array, Array]:
            value, push = jax.linearize(f.h, x)
            pull = jax.linear_transpose(push, x)
            innovation = f.present * (f.data - value + push(x - f.mean))
            move, square = three_dvar.analysis_by_operator(
                self.apply, push, lambda w: pull(w)[0], f.noise, innovation, f.present, tolerance
            )
            return f.mean + move, square

        mean, squares = jax.lax.scan(improve, f.mean, None, self.iterations)
        return Analysed(mean, f.cov, jnp.asarray(jnp.nan), squares[0])


class Learned(Setting):
    """A gain, learned or given; `spread` says whether the covariance that it implies is propagated."""

    gain: Gain
    weights: Array
    units: Units
    spread: bool = eqx.field(static=True)
    slopes: Array | None = None

    @property
    def has_density(self) -> bool:
        """See `Setting.has_density`."""
        return self.spread

    def start(self, chain: Chain) -> tuple[Estimate, Array]:
        """See `Setting.start`."""
        if not self.spread:
            return start_mean(chain)
        first, _, riders = begin(chain, chain.initial_dimension)
        return Estimate(first.mean, first.cov, riders), first.log_likelihood

    def covariance(self, chain: Chain, before: Estimate, t: Array) -> Array:
        """See `Setting.covariance`: A C A' + Q by the tangent of the step at the mean."""
        if not self.spread:
            return before.cov
        step = step_at(chain, before.mean, before.riders, t, jnp.zeros(chain.noise_dimension))
        return symmetric(step.A @ before.cov @ step.A.T + step.B @ step.B.T)

    def analyse(self, f: Forecast) -> Analysed:
        """See `Setting.analyse`; the increment is minus that of the variational objective."""
        innovation = f.present * (f.data - f.h(f.mean))
        gain = self.gain.matrix(self.weights, self.units, f.mean, innovation) * f.present
        mean = f.mean + gain @ innovation
        if not self.spread:
            return Analysed(mean, f.cov, jnp.asarray(jnp.nan), jnp.asarray(jnp.nan))
        H = f.present[:, None] * (jax.jacfwd(f.h)(f.mean) if self.slopes is None else self.slopes)
        noise = three_dvar.present_noise(f.noise, f.present)
        cov = three_dvar.joseph(f.cov, gain, H, noise)
        residual = f.present * (f.data - f.h(mean))
        loss = three_dvar.variational_increment((f.mean, f.cov), (mean, cov), residual, H, f.noise, f.present)
        square = innovation @ jnp.linalg.solve(H @ f.cov @ H.T + noise, innovation)
        return Analysed(mean, cov, -loss, square)


def slopes(chain: Chain) -> tuple[Array, Array]:
    """H (m, n) and the noise of the data at the first step and the first state."""
    first, _ = start_mean(chain)
    state, t = first.mean, jnp.asarray(0)

    def h(x: Array) -> tuple[Array, Array]:
        seen = observed_at(chain, state, first.riders, t, x)[0]
        return seen.mean, seen.noise

    return jax.jacfwd(h, has_aux=True)(chain.step(state, first.riders, t, jnp.zeros(chain.noise_dimension)).state)


def with_slopes(chain: Chain, B: Array, iterations: int, alike: bool) -> Background:
    """A background whose gain is worked out once where H and the noise are always the same."""
    if not alike:
        return Background(B, iterations)
    H, noise = slopes(chain)
    return Background(B, iterations, H, background_gain(B, H, noise, jnp.ones(H.shape[0], B.dtype)))


def objective(chain: Chain, setting: Setting) -> tuple[Array, Array]:
    """Minus the sum of increments over all steps, per datum, and the number of the first step that is not finite.

    Steps are computed again in the gradient, which keeps the estimates alone.
    """
    first, value = setting.start(chain)

    @jax.checkpoint
    def move(before: Estimate, t: Array) -> tuple[Estimate, tuple[Array, Array]]:
        cycle = setting.cycle(chain, before, t)
        return cycle.after, (cycle.analysed.increment, jnp.sum(cycle.forecast.present))

    times = jnp.arange(chain.structure.length)
    _, (increments, counts) = jax.lax.scan(move, first, times)
    bad = ~jnp.isfinite(increments)
    step = jnp.where(jnp.any(bad), jnp.argmax(bad), -1)
    return -(value + jnp.sum(increments)) / jnp.maximum(jnp.sum(counts), 1.0), step
