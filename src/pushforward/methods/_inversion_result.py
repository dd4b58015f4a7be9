"""What the ensemble methods share at the door and at the end: refusals, and the members as draws."""

import numpy as np

from pushforward._errors import MethodError, Outcome
from pushforward.math.noise import fault
from pushforward.methods._base import Draws, count
from pushforward.methods._inversion import Inversion, ended, summary_of
from pushforward.methods._outputs import Units
from pushforward.model.inverse import InverseProblem

_MANY_FAILED = 0.2
"""Share of failures that is worth a warning."""


def why_not_ensemble(problem: InverseProblem) -> str | None:
    """Why members of the prior N(0, I) cannot be moved, or None where they can."""
    inexact = [s.name for s in problem.sites.values() if not s.exact]
    if inexact:
        return (
            f"the prior of site '{inexact[0]}' has no exact map from standard normal noise, which the ensemble's prior "
            "is. Write it as a transformed distribution, or use pf.ALDI(), NUTS or TemperedSMC"
        )
    return None


def check_units(units: Units) -> None:
    """Refuse a noise that is not positive (definite).

    Raises:
        MethodError: it names the site.
    """
    for name, noise in units.noise.items():
        wrong = fault(noise, np.ndim(units.data[name]))
        if wrong:
            raise MethodError(
                f"the noise of site '{name}' cannot be used: its {wrong}. Outputs are compared in units of it; "
                "look at the arguments that it is made of, or add a small variance."
            )


def packaged(last: Inversion, time: float, draws: int, runs: int) -> Draws:
    """Evenly spaced members, at most as many as there are."""
    members = last.z.shape[0]
    kept = min(draws, members)
    chosen = ((np.arange(kept) + 0.5) * members / kept).astype(int)
    summary = summary_of(last)
    outcome = Outcome.SUCCESS if ended(last, time) else Outcome.MAXIMUM_STEPS
    z = np.asarray(last.z)[chosen]
    if summary["stopped"] or not np.isfinite(z).all():
        outcome = Outcome.NONFINITE
    evaluations = count(runs * summary["steps"])
    return Draws(z[None], {}, summary, np.asarray(int(outcome)), evaluations, count(0), ran=_in_order(last))


def _in_order(last: Inversion) -> tuple[np.ndarray, np.ndarray] | None:
    """The runs that were kept, first step first."""
    if last.ran is None:
        return None
    steps, kept = int(last.steps), len(last.ran[0])
    rows = np.arange(max(0, steps - kept), steps) % kept
    members, outputs = (np.asarray(x)[rows] for x in last.ran)
    return members, outputs


def failure_warnings(draws: Draws, members: int) -> list[str]:
    """More than a fifth of all runs failed."""
    failed, runs = draws.summary["failed_evaluations"], draws.summary["steps"] * members
    if failed <= _MANY_FAILED * runs:
        return []
    return [
        f"{failed} of {runs} runs of the model failed. What is learned comes from the others: where the model fails "
        "for a part of the prior, the posterior is missing there."
    ]
