"""`SourceSpace`: conditioning in the noise of the sampler, exact for the learned prior."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned.score_model import ScoreModel
from pushforward.methods._base import Method
from pushforward.methods._score_samplers import Sampler
from pushforward.methods.nuts import NUTS
from pushforward.methods.pcn import PreconditionedCrankNicolson
from pushforward.model.inverse import InverseProblem
from pushforward.model.series import Series
from pushforward.model.standard_normal import with_likelihood


class SourceSpace(eqx.Module):
    """The sampler's noise e ~ N(0, I) is the unknown, ``x = T(e)`` by the probability-flow ODE of the prior.

    The posterior of e has the density ``N(e; 0, I) p(y | T(e))``, and any method for inverse problems samples it: its
    draws are exact for the learned prior, whatever the data are, with no approximation of guidance. An evaluation is
    a whole run of the sampler, and a gradient one backward: for small networks, or few steps of the sampler.

    Args:
        method: samples e: `pf.NUTS()` or `pf.PreconditionedCrankNicolson()`.

    Example:
        >>> import pushforward as pf
        >>> pf.SourceSpace(pf.NUTS(warmup=200)).method.warmup
        200
    """

    method: Method = eqx.field(default_factory=lambda: NUTS(chains=1, coordinates="z"))

    def __check_init__(self):
        if not isinstance(self.method, NUTS | PreconditionedCrankNicolson):
            raise MethodError(
                f"SourceSpace(method=...) takes pf.NUTS() or pf.PreconditionedCrankNicolson(); got {self.method!r}."
            )

    def why_not(self, model: ScoreModel, rows: int) -> str | None:
        """See `Guidance.why_not`."""
        return None

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
        if sampler.corrections or type(sampler).__name__ == "Ancestral":
            raise MethodError("SourceSpace needs a sampler without noise of its own: pf.Heun(), pf.Multistep().")
        size = series.rows * series.layout.size
        arrays = (series.arrays, model, parameters, given, sampler.grid())
        flow = _Flow(series.structure, series.layout, sampler)
        problem = with_likelihood(flow.log_likelihood, size, arrays, (flow, sampler))
        per_chain = -(-draws // self.method.chains)  # type: ignore[reportAttributeAccessIssue]
        found = self.method.run(problem, key, per_chain, runner)
        noise = _noise_of(problem, found.positions)[:draws]
        numbers = {"source_" + n: np.asarray(jnp.mean(v.astype(float))) for n, v in found.stats.items()}
        return runner.call(_pushed, flow, arrays, noise), numbers


class _Flow(eqx.Module):
    """The map from noise to trajectories; its arrays are given apart, to be traced."""

    structure: Any = eqx.field(static=True)
    layout: Any = eqx.field(static=True)
    sampler: Sampler = eqx.field(static=True)

    def push(self, arrays: tuple, noise: Array) -> Array:
        """The trajectory of noise e (d,)."""
        own, model, _, given, grid = arrays
        series = Series(own, self.structure, self.layout)
        start = grid[0] * noise.reshape(series.rows, *model.state)
        still = jnp.ones(len(grid) - 1)
        return model.raw(self.sampler.draw(model.denoiser(given), start, grid, jax.random.key(0), still))

    def log_likelihood(self, arrays: tuple, noise: Array) -> Array:
        """log p(y | T(e))."""
        own, _, parameters, _, _ = arrays
        series = Series(own, self.structure, self.layout)
        return series.reading(parameters).log_likelihood(self.push(arrays, noise))


def _noise_of(problem: InverseProblem, positions: Any) -> Array:
    noise = positions["z"] if isinstance(positions, dict) else positions
    return noise.reshape(-1, problem.dimension)


def _pushed(flow: _Flow, arrays: tuple, noise: Array) -> Array:
    return jax.lax.map(lambda e: flow.push(arrays, e), noise, batch_size=32)
