"""`ALDI`: affine invariant Langevin dynamics of an ensemble."""

from pushforward._runner import Runner
from pushforward._types import Key
from pushforward.math.ensemble_sampling import aldi_step
from pushforward.methods import _ensemble_sampler
from pushforward.methods._base import Draws, Method
from pushforward.methods._inversion import FAILURES
from pushforward.methods._inversion_result import failure_warnings
from pushforward.model.inverse import InverseProblem


class ALDI(Method):
    """Affine invariant interacting Langevin dynamics: `pf.EKS` with the drift that makes small ensembles right.

    The drift ``(d + 1) / J (z - mean z)`` makes the posterior invariant for each member and any J > d + 1 where the
    model is linear, up to the time step h, which makes the covariance too large by about 1 + h / 2. For other models
    the ensemble's covariances stand for the gradient, with a bias of no stated size.

    Args:
        members: size J of the ensemble, above d + 1; each is one draw of the result.
        time: pseudo-time of the run; errors of the start fall as e^-time.
        step: scale of the adaptive time step, which keeps the explicit part stable.
        steps: at most.

    Reference:
        Garbuno-Inigo, Nüsken, Reich (2020), doi:10.1137/19M1304891.

    Example:
        >>> import pushforward as pf
        >>> pf.ALDI(members=100).step
        0.2
    """

    members: int = 200
    time: float = 8.0
    step: float = 0.2
    steps: int = 2000

    shards = "members"

    def __check_init__(self):
        _ensemble_sampler.check_options(self)

    def why_not(self, problem: InverseProblem) -> str | None:
        """Likelihoods that are not Gaussian; fewer than d + 2 members."""
        return _ensemble_sampler.why_not_sampled(self, problem.dimension + 2, problem)

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        return _ensemble_sampler.run(self, aldi_step, problem, key, draws, runner)

    def failure(self, draws: Draws) -> str | None:
        """See `Method.failure`."""
        return FAILURES.get(int(draws.summary["stopped"]))

    def warnings(self, draws: Draws) -> list[str]:
        """Many failures."""
        return failure_warnings(draws, self.members)
