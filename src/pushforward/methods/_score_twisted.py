"""`Twisted`: weighted draws of the sampler's own chain, exact for the learned prior as their number grows."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned.score_model import ScoreModel
from pushforward.math.diffusion import Scalar, power_grid
from pushforward.math.guidance import Linearised, rows_of
from pushforward.math.resampling import systematic
from pushforward.math.twisted import Population, Twist, twist, twisted
from pushforward.methods._base import check_fraction, check_integer
from pushforward.methods._score_guidance import AutomaticGuidance, AveragedGuidance, GammaGuidance, Guidance
from pushforward.methods._score_samplers import Sampler
from pushforward.methods._score_sampling import at_once, observations
from pushforward.model.series import Series


class Twisted(eqx.Module):
    """Twisted diffusion sampling: particles with weights that make up for the errors of guidance.

    All draws run through the levels together; where guidance favours some of them wrongly, their weights fall, and they
    are resampled. Draws converge to the posterior of the learned prior as `particles` grows, masses of modes
    included, and the run estimates the evidence without bias. Attributes of the result: ``effective_sample_size`` of
    the last weights, ``smallest_sample_size`` on the way, ``roots``, how many of the first particles have descendants,
    ``log_evidence`` of the learned prior.

    Steps are those of the reverse Markov chain between the levels `lowest` and `highest` of the sampler, of which
    nothing else is used.

    Args:
        guidance: what moves the particles: "auto", "averaged", "gamma", or an instance of theirs.
        particles: at least as many as draws are asked for are used.
        steps: of the chain, first order: many.
        threshold: share of the particles below which the effective sample size makes them be resampled.

    Source: Wu et al. 2023, arXiv:2306.17775; with the measured errors of the network as V.

    Example:
        >>> import pushforward as pf
        >>> pf.Twisted(particles=1024).steps
        256
    """

    guidance: Guidance = eqx.field(default_factory=AutomaticGuidance, converter=lambda v: _guidance(v))
    particles: int = 256
    steps: int = 256
    threshold: float = 0.5

    def __check_init__(self):
        check_integer("Twisted", 2, particles=self.particles)
        check_integer("Twisted", 3, steps=self.steps)
        check_fraction("Twisted", threshold=self.threshold)

    def why_not(self, model: ScoreModel, rows: int) -> str | None:
        """See `Guidance.why_not`."""
        return self.guidance.why_not(model, rows)

    def draw(
        self,
        series: Series,
        model: ScoreModel,
        sampler: Sampler,
        parameters: dict[str, Array],
        given: Array,
        key: Key,
        draws: int,
        runner: Runner,
    ) -> tuple[Array, dict[str, Any]]:
        """Trajectories (draw, rows, *state), and numbers about the run."""
        grid = power_grid(self.steps, lowest=sampler.lowest, highest=sampler.highest)
        count = max(self.particles, draws)
        chosen = self.guidance
        if isinstance(chosen, AutomaticGuidance):
            chosen = chosen.chosen(model, series.rows)
        found, population = runner.call(
            _run, series, model, chosen, grid, parameters, given, key, draws, count, self.threshold
        )
        roots = np.unique(np.asarray(population.roots)[np.asarray(population.log_weights) > -np.inf]).size
        return found, {
            "log_evidence": population.log_evidence,
            "effective_sample_size": population.size,
            "smallest_sample_size": population.smallest,
            "resamplings": population.resamplings,
            "roots": np.asarray(float(roots)),
            "particles": np.asarray(float(count)),
        }


def _guidance(value: Any) -> Guidance:
    names = {"auto": AutomaticGuidance, "averaged": AveragedGuidance, "gamma": GammaGuidance}
    if isinstance(value, str) and value in names:
        return names[value]()
    if not isinstance(value, tuple(names.values())):
        raise MethodError(
            f"Twisted(guidance=...) takes one of {list(names)} or an instance of them, whose density of the data is "
            f"known; got {value!r}."
        )
    return value  # type: ignore[reportReturnType]


def _run(
    series: Series,
    model: ScoreModel,
    chosen: Guidance,
    grid: Array,
    parameters: dict[str, Array],
    given: Array,
    key: Key,
    draws: int,
    count: int,
    threshold: float,
) -> tuple[Array, Population]:
    reading, dtype = series.reading(parameters), model.weights.dtype
    shape = (series.rows, *model.state)
    known = model.errors_of(series.rows) if isinstance(chosen, AveragedGuidance) else None

    def spread(level: Scalar, seen: Linearised, clean: Array) -> Array:
        if isinstance(chosen, GammaGuidance):
            return chosen.factor * level**2 * seen.gains
        assert known is not None
        rows = rows_of(seen, clean)
        return rows @ known.at(level) @ rows.T

    def likelihood(clean: Array) -> Array:
        return reading.log_likelihood(model.raw(clean))

    one = twist(model.denoiser(given), observations(reading, model), spread, likelihood)
    batch = at_once(count, jnp.zeros(shape).size, known is not None)

    def all_of(states: Array, level: Scalar) -> Twist:
        return jax.lax.map(lambda x: one(x, level), states, batch_size=batch)

    first, second, third = jax.random.split(key, 3)
    grid = grid.astype(dtype)
    starts = grid[0] * jax.random.normal(first, (count, *shape), dtype)
    run = twisted(all_of, jax.vmap(likelihood), starts, grid, second, threshold=threshold)
    return model.raw(run.states[systematic(third, run.log_weights, draws)]), run
