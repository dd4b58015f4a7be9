"""Published numbers: every method on every problem, written into docs/benchmarks.md (`make test-full`)."""

import time
import warnings
from typing import Any

import jax
import numpy as np

import pushforward as pf
from benchmarks import _report, anchors
from pushforward.problems import bod, problem

METHODS = {
    "NUTS": pf.NUTS(),
    "NUTS, z": pf.NUTS(coordinates="z", target_acceptance=0.99),
    "pCN": pf.PreconditionedCrankNicolson(),
    "TemperedSMC": pf.TemperedSMC(),
    "Laplace": pf.Laplace(),
    "GaussianVI full": pf.GaussianVI(),
    "GaussianVI diagonal": pf.GaussianVI(covariance="diagonal"),
    "GaussianVI low rank": pf.GaussianVI(covariance="low_rank"),
    "Pathfinder": pf.Pathfinder(),
}


REFERENCE = {"lynx_hare": (0.8, 2000)}
"""Target acceptance and draws per chain of the reference where 0.99 and 5000 would take a quarter of an hour."""


def run_all(name: str) -> tuple[dict[str, Any], Any]:
    """Every method and the reference (NUTS in z) on one problem."""
    chosen = problem(name)
    inputs = {**chosen.inputs, **chosen.data}
    target, draws = REFERENCE.get(name, (0.99, 5000))
    reference = pf.infer(
        chosen.model,
        method=pf.NUTS(coordinates="z", target_acceptance=target),
        draws=draws,
        key=99,
        progress=False,
        **inputs,
    )
    trees = {}
    for label, method in METHODS.items():
        if isinstance(getattr(method, "covariance", None), pf.LowRank) and chosen.name == "bod":
            method = pf.GaussianVI(covariance=pf.LowRank(1))
        if name == "lynx_hare" and label == "NUTS, z":
            method = pf.NUTS(coordinates="z")
        if name == "lynx_hare" and label == "TemperedSMC":
            method = pf.TemperedSMC(particles=1000)
        trees[label] = pf.infer(chosen.model, method=method, draws=1000, progress=False, throw=False, **inputs)
    return trees, reference


def accuracy(name: str) -> str:
    """One row per method: errors against the reference, evidence, k-hat, warnings and seconds."""
    trees, reference = run_all(name)
    scores = pf.compare(trees, reference)
    rows = []
    for label, row in scores.iterrows():
        attributes = pf.attributes(trees[label])
        rows.append(
            {
                "method": label,
                "mean error, sd": f"{row['mean_error']:.3f} ({row['mean_error_variable']})",
                "log sd ratio": f"{row['sd_error']:.3f} ({row['sd_error_variable']})",
                "energy distance": f"{row['energy_distance']:.3f}",
                "C2ST": f"{row['c2st']:.3f}",
                "log evidence": _number(attributes.get("log_evidence"), attributes.get("log_evidence_se")),
                "ELBO": _number(attributes.get("elbo"), attributes.get("elbo_se")),
                "k-hat": _number(attributes.get("khat")),
                "model runs": f"{attributes['evaluations']:.0f}",
                "compile / run, s": f"{attributes['compile_seconds']:.1f} / {attributes['run_seconds']:.2f}",
                "warnings": str(len(attributes["warnings"])),
            }
        )
    first = scores.iloc[0]
    floors = (
        f"Floors (two halves of the reference): mean {first['mean_error_floor']:.3f}, log sd ratio "
        f"{first['sd_error_floor']:.3f}, energy distance {first['energy_distance_floor']:.3f}, C2ST "
        f"{first['c2st_floor']:.3f}."
    )
    exact = problem(name).numbers.get("log_evidence")
    known = f" Exact log evidence {exact:.4f}." if exact is not None else ""
    return f"### {name}\n\n{_report.table(rows)}\n\n{floors}{known}"


def _number(value: float | None, error: float | None = None) -> str:
    if value is None or not np.isfinite(value):
        return ""
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def evidence() -> str:
    """TemperedSMC on BOD over ten keys."""
    found = [
        pf.infer(bod.model, method="tempered_smc", key=k, progress=False, t=bod.TIMES, y=bod.DATA).attrs["log_evidence"]
        for k in range(10)
    ]
    worst = max(abs(v - bod.LOG_EVIDENCE) for v in found)
    return (
        f"TemperedSMC on BOD, log evidence over 10 keys: mean {np.mean(found):.4f}, sd {np.std(found, ddof=1):.4f}, "
        f"largest error {worst:.4f} (exact {bod.LOG_EVIDENCE:.4f})."
    )


def main() -> None:
    """Run everything, print and write it."""
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    names = ("bod", "eight_schools", "lynx_hare", "linear_gaussian_20")
    parts = []
    for name in names:
        parts.append(accuracy(name))
        print(parts[-1], f"\n\n{time.perf_counter() - start:.0f} s so far\n", flush=True)
    text = "\n\n".join([*parts, evidence()])
    text += "\n\nReference: NUTS in z, 4 x 5000 draws at target acceptance 0.99 (lynx_hare 4 x 2000 at 0.8)."
    text += f"\n\nIn all {time.perf_counter() - start:.0f} s on {jax.devices()[0].platform}."
    _report.write("full", text)
    anchors.main()


if __name__ == "__main__":
    main()
