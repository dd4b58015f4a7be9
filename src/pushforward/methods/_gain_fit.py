"""Training of a gain from observations alone, by the variational filtering objective: off-line and on-line."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import MethodError
from pushforward._runner import Runner
from pushforward._types import Array
from pushforward.learned import quasi_newton
from pushforward.learned.training import Adam
from pushforward.math import learned_gain
from pushforward.math.three_dvar import background_gain
from pushforward.methods._base import check_choice, check_integer, check_positive
from pushforward.methods._gain_filter import Estimate, Learned, objective, slopes
from pushforward.methods._gains import FixedGain, Gain, Units
from pushforward.model.observing import observes_alike
from pushforward.model.state_space import StateSpace

_PLAIN = 0.4
"""Share of an innovation that the gain of the first run takes over."""
_SETTLED = 50.0
"""Steps over which the on-line rate falls to 1 / sqrt(2) of itself."""


class GainTraining(eqx.Module):
    """How a gain is trained.

    Args:
        mode: "offline", quasi-Newton steps on the whole series; "online", one pass through it with an update at each
            step, whose result is the mean of the weights over the second half.
        steps: off-line, evaluations of the objective with its gradient, at most.
        tolerance: off-line, gain of the objective per datum that is not worth a step.
        learning_rate: on-line, of Adam at the start; it falls as 1 / sqrt(1 + t / 50).

    Example:
        >>> import pushforward as pf
        >>> pf.GainTraining("online").mode
        'online'
    """

    mode: str = "offline"
    steps: int = 60
    tolerance: float = 1e-5
    learning_rate: float = 0.02

    def __check_init__(self):
        check_choice("GainTraining", ("offline", "online"), mode=self.mode)
        check_integer("GainTraining", 1, steps=self.steps)
        check_positive("GainTraining", tolerance=self.tolerance, learning_rate=self.learning_rate)


class TrainedGain(eqx.Module):
    """What was learned.

    Attributes:
        weights: numbers of the gain.
        units: what they are relative to.
        losses: off-line, the objective per datum at each evaluation, NaN where the filter diverged; on-line, at each
            time step.
        diverged: number of trials in which the filter diverged (on-line, 0 or 1), and the time step where the last of
            them did, -1 for none.
        arguments: arguments of the model that are not data, by name.
    """

    weights: Array
    units: Units
    losses: Array
    diverged: Array
    arguments: dict[str, Any]


def fit(gain: Gain, options: GainTraining, space: StateSpace, runner: Runner, arguments: dict[str, Any]) -> TrainedGain:
    """Learn the numbers of a gain from the data of a model.

    Raises:
        MethodError: the filter diverges before training; the text names the time step.
    """
    alike = observes_alike(space)
    units, guess, failed = runner.call(measure, space, alike)
    if int(failed) >= 0:
        raise MethodError(_diverged_before(int(failed)))
    weights = gain.start(units, guess)
    static = (gain, units, space, alike)
    if options.mode == "online":
        found = runner.loop(_pass, _begin(weights, *static), space.steps, options.learning_rate, *static)
        if int(found.failed_at) == 0:
            raise MethodError(_diverged_before(0))
        diverged = jnp.stack([(found.failed_at >= 0).astype(int), found.failed_at])
        return TrainedGain(found.best, units, found.losses, diverged, arguments)
    search = quasi_newton.minimise(_loss, weights, options.steps, options.tolerance, runner, static)
    if not np.isfinite(np.asarray(search.value)):
        raise MethodError(_diverged_before(int(search.failed_at)))
    return TrainedGain(search.point, units, search.values, jnp.stack([search.failed, search.failed_at]), arguments)


def numbers(found: TrainedGain, options: GainTraining) -> dict[str, Any]:
    """What a training says of itself.

    ``loss``, the objective per datum, off-line the lowest, on-line the mean over the second half; ``training_runs``,
    over the whole series; ``training_diverged`` and ``training_diverged_at``, see `TrainedGain.diverged`.
    """
    losses, (failed, step) = np.asarray(found.losses, float), np.asarray(found.diverged)
    if options.mode == "online":
        loss, runs = np.nanmean(losses[len(losses) // 2 if not failed else 0 :]), 1
    else:
        loss, runs = np.nanmin(losses), np.sum(np.isfinite(losses)) + failed
    return {"loss": loss, "training_runs": runs, "training_diverged": failed, "training_diverged_at": step}


def caution(options: GainTraining, failed: int, step: int) -> str | None:
    """What to say of a training that a diverging filter ended or disturbed."""
    if options.mode == "online" and failed:
        return (
            f"the filter diverged at time step {step} of the on-line training, and the last good gain is kept. Give "
            f"GainTraining(learning_rate=...) below {options.learning_rate}."
        )
    if options.mode == "offline" and failed > options.steps // 2:
        return (
            f"in {failed} of {options.steps} trials of the training the filter diverged, last at time step {step}; the "
            "last good gain is kept. Look at the data and the step of the model there, or use float64."
        )
    return None


def report(found: TrainedGain, options: GainTraining) -> None:
    """Warn of a training that a diverging filter ended or disturbed."""
    text = caution(options, *(int(v) for v in np.asarray(found.diverged)))
    if text:
        warnings.warn(text, UserWarning, stacklevel=3)


def _diverged_before(step: int) -> str:
    return (
        f"the filter with the gain before training diverged at time step {step}: its estimate is not finite, or its "
        "covariance not positive definite. Look at the step of the model there; more frequent data, noise in the step, "
        "or float64 (JAX_ENABLE_X64=1) may help."
    )


def measure(space: StateSpace, alike: bool) -> tuple[Units, Array, Array]:
    """Units of the gains, a gain to start from, and the number of the step where the plain gain failed, or -1.

    One run with the plain gain gives the mean of its forecast covariances; the start is the Kalman gain of that.
    """
    chain = space.chain()
    H, noise = slopes(chain)
    one = jnp.asarray(1.0, H.dtype)
    units = Units(learned_gain.spreading(H), 0 * one, one, one)
    plain = Learned(FixedGain(_PLAIN * units.spreading), jnp.zeros(0), units, True, H if alike else None)
    first, _ = plain.start(chain)
    shapes = jnp.zeros(first.cov.shape, first.cov.dtype)

    def move(carry: tuple[Estimate, Array], t: Array) -> tuple[tuple[Estimate, Array], tuple[Array, Array]]:
        cycle = plain.cycle(chain, carry[0], t)
        f = cycle.forecast
        innovation = units.spreading @ (f.present * (f.data - f.h(f.mean)))
        return (cycle.after, carry[1] + f.cov / space.steps), (f.mean, innovation)

    (_, cov), (forecasts, innovations) = jax.lax.scan(move, (first, shapes), jnp.arange(space.steps))
    bad = ~jnp.all(jnp.isfinite(forecasts), 1)
    step = jnp.where(jnp.any(bad), jnp.argmax(bad), -1)
    spread = [jnp.where(jnp.std(v) > 0, jnp.std(v), one) for v in (forecasts, innovations)]
    guess = background_gain(cov, H, noise, jnp.ones(H.shape[0], H.dtype)).gain
    guess = jnp.where(jnp.all(jnp.isfinite(guess)), guess, _PLAIN * units.spreading)
    return Units(units.spreading, jnp.mean(forecasts), *spread), guess, step


def setting(gain: Gain, weights: Array, units: Units, space: StateSpace, alike: bool) -> Learned:
    """The filter with these numbers."""
    return Learned(gain, weights, units, True, slopes(space.chain())[0] if alike else None)


def _loss(weights: Array, gain: Gain, units: Units, space: StateSpace, alike: bool) -> tuple[Array, Array]:
    return objective(space.chain(), setting(gain, weights, units, space, alike))


class _Pass(eqx.Module):
    """Where the on-line training stands: the optimiser, the filter, running mean, last good weights, losses."""

    adam: Adam
    estimate: Estimate
    best: Array
    averaged: Array
    failed_at: Array
    losses: Array


def _begin(weights: Array, gain: Gain, units: Units, space: StateSpace, alike: bool) -> _Pass:
    first, _ = setting(gain, weights, units, space, alike).start(space.chain())
    losses = jnp.full(space.steps, jnp.nan, weights.dtype)
    return _Pass(Adam.start(weights), first, weights, jnp.zeros((), weights.dtype), jnp.full((), -1), losses)


def _pass(
    state: _Pass, start: Array, stop: Array, rate: float, gain: Gain, units: Units, space: StateSpace, alike: bool
) -> _Pass:
    """Steps `start` to `stop`: the gradient of each step's increment at its forecast, and a step of Adam."""
    chain = space.chain()

    def loss(weights: Array, before: Estimate, t: Array) -> tuple[Array, tuple[Estimate, Array]]:
        cycle = setting(gain, weights, units, space, alike).cycle(chain, before, t)
        return -cycle.analysed.increment, (cycle.after, jnp.sum(cycle.forecast.present))

    def move(t: Array, s: _Pass) -> _Pass:
        (value, (after, size)), slope = jax.value_and_grad(loss, has_aux=True)(s.adam.weights, s.estimate, t)
        good = jnp.isfinite(value) & jnp.all(jnp.isfinite(slope)) & (s.failed_at < 0)
        adam = s.adam.moved(slope, t, rate / jnp.sqrt(1 + t / _SETTLED))
        # The mean restarts as long as less than half of the pass is behind it.
        counted = jnp.where(t >= space.steps // 2, s.averaged + 1, 1.0)
        # Of weights that this step has tried, so that those which make the next one fail are never kept.
        best = s.best + (s.adam.weights - s.best) / counted
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), (adam, after, best, counted), _parts(s))
        failed = jnp.where((s.failed_at < 0) & ~good, t, s.failed_at)
        loss_ = jnp.where(good, value / jnp.maximum(size, 1.0), jnp.nan)
        return _Pass(kept[0], kept[1], kept[2], kept[3], failed, s.losses.at[t].set(loss_))

    return jax.lax.fori_loop(start, stop, move, state)


def _parts(s: _Pass) -> tuple[Adam, Estimate, Array, Array]:
    """What a step of the pass changes, unless it fails."""
    return s.adam, s.estimate, s.best, s.averaged
