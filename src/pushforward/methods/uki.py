"""`UKI`: unscented Kalman inversion."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.math import unscented_inversion
from pushforward.methods._base import Draws, Method, check_fraction, check_integer, count
from pushforward.methods._inversion_result import check_units, why_not_ensemble
from pushforward.methods._outputs import Units, predict
from pushforward.model.inverse import InverseProblem

_SETTLED = 1e-3


class UKI(Method):
    """Unscented Kalman inversion: a Gaussian in ``z`` that sigma points lead to the posterior, without randomness.

    Each step evaluates the model at 2 d + 1 points, forgets a share `step` of what is known and learns it anew from the
    data, the prior among them. For linear Gaussian models the limit is the posterior, for every `step`, and the error
    falls by the factor 1 - step. Else the Gaussian is one of statistical linearisation; draws are made from it, so
    bends and several modes are lost.

    Use it for up to some hundreds of latent numbers and smooth or mildly noisy simulators; with more, or where runs
    fail, use `pf.EKI`.

    Args:
        steps: number of steps.
        step: share, between 0 and 1.

    Reference:
        Huang, Schneider, Stuart (2022), doi:10.1016/j.jcp.2022.111262; Huang, Huang, Reich, Stuart (2022),
        doi:10.1088/1361-6420/ac99fa. The prior enters as data at every step, so the limit is right for every `step`.

    Example:
        >>> import pushforward as pf
        >>> pf.UKI(steps=30).step
        0.5
    """

    steps: int = 20
    step: float = 0.5

    shards = "points"

    def __check_init__(self):
        check_integer("UKI", 1, steps=self.steps)
        check_fraction("UKI", step=self.step)

    def why_not(self, problem: InverseProblem) -> str | None:
        """Likelihoods that are not Gaussian, priors without an exact map from N(0, I)."""
        reason = why_not_ensemble(problem) or problem.why_not_gaussian()
        return reason and reason.removesuffix(", or use a method that samples its data")

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        units = runner.call(Units.of, problem)
        check_units(units)
        d = problem.dimension
        first = _Gaussian(jnp.zeros(d), jnp.eye(d), jnp.asarray(jnp.inf))
        last = runner.loop(_advance, first, self.steps, self, problem, units, runner.mesh, every=1)
        noise = np.asarray(jax.random.normal(key, (draws, d)))
        z = np.asarray(last.mean) + noise @ np.asarray(last.root).T
        outcome = Outcome.SUCCESS if np.isfinite(z).all() else Outcome.NONFINITE
        summary: dict[str, Any] = {"steps": self.steps, "last_change": float(last.change)}
        return Draws(z[None], {}, summary, np.asarray(int(outcome)), count(self.steps * (2 * d + 1)), count(0))

    def failure(self, draws: Draws) -> str | None:
        """See `Method.failure`."""
        return (
            "the model's outputs are not finite at a sigma point, all of which are needed. Use pf.EKI(), which leaves "
            "out the members that fail, or narrow the prior to where the model works."
        )

    def warnings(self, draws: Draws) -> list[str]:
        """A mean that still moves."""
        change = draws.summary["last_change"]
        if not change > _SETTLED:
            return []
        return [
            f"the last step moved the mean by {change:.2g} sd, it has not settled: give more than {self.steps} steps."
        ]


class _Gaussian(eqx.Module):
    """N(mean, root root^T), and how far the mean moved in the last step, in sd."""

    mean: Array
    root: Array
    change: Array


def _advance(
    state: _Gaussian, start: Array, stop: Array, method: UKI, problem: InverseProblem, units: Units, mesh: Mesh | None
) -> _Gaussian:
    data = units.whitened

    def step(_: Array, s: _Gaussian) -> _Gaussian:
        points = unscented_inversion.points(s.mean, s.root, method.step)
        outputs = parallel.vmap(lambda z: predict(problem, units, z), mesh)(points)
        mean, root = unscented_inversion.update(s.mean, s.root, outputs, data, method.step)
        change = jnp.linalg.norm(jax.scipy.linalg.solve_triangular(root, mean - s.mean, lower=True))
        return _Gaussian(mean, root, change.astype(s.change.dtype))

    return jax.lax.fori_loop(start, stop, step, state)
