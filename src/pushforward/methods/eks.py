"""`EKS`: the ensemble Kalman sampler."""

from pushforward._runner import Runner
from pushforward._types import Key
from pushforward.math.ensemble_sampling import eks_step
from pushforward.methods import _ensemble_sampler
from pushforward.methods._base import Draws, Method
from pushforward.methods._inversion import FAILURES
from pushforward.methods._inversion_result import failure_warnings
from pushforward.model.inverse import InverseProblem


class EKS(Method):
    """The ensemble Kalman sampler: Langevin dynamics of members that share their covariance as preconditioner.

    ``dz = C^zg R^-1 (y - G(z)) dt - C z dt + sqrt(2 C) dW`` in ``z``, C the members' covariance. For linear models and
    many members the ensemble tends to the posterior at the rates ``e^-t`` (mean) and ``e^-2t`` (precision), whatever
    the conditioning. With J members the covariance is too small by the factor (J - d - 1) / J, and each time step h
    makes it too large by about 1 + h / 2; for models that are not linear there is a bias of no stated size. `pf.ALDI`
    has no bias by J and costs the same: prefer it.

    Args:
        members: size J of the ensemble, above 2 d + 1; each is one draw of the result.
        time: pseudo-time of the run.
        step: scale of the adaptive time step, which keeps the explicit part stable.
        steps: at most.

    Reference:
        Garbuno-Inigo, Hoffmann, Li, Stuart (2020), doi:10.1137/19M1251655.

    Example:
        >>> import pushforward as pf
        >>> pf.EKS(members=500).time
        8.0
    """

    members: int = 200
    time: float = 8.0
    step: float = 0.2
    steps: int = 2000

    shards = "members"

    def __check_init__(self):
        _ensemble_sampler.check_options(self)

    def why_not(self, problem: InverseProblem) -> str | None:
        """Likelihoods that are not Gaussian; fewer than 2 d + 2 members."""
        return _ensemble_sampler.why_not_sampled(self, 2 * problem.dimension + 2, problem)

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        return _ensemble_sampler.run(self, eks_step, problem, key, draws, runner)

    def failure(self, draws: Draws) -> str | None:
        """See `Method.failure`."""
        return FAILURES.get(int(draws.summary["stopped"]))

    def warnings(self, draws: Draws) -> list[str]:
        """Many failures."""
        return failure_warnings(draws, self.members)
