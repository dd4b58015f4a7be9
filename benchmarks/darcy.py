"""Ensemble Kalman inversion on the Darcy problem: error of the posterior mean against runs of the model.

    python -m benchmarks.darcy              # EKI, EKS, ALDI and pCN against the stored reference
    python -m benchmarks.darcy --reference  # makes the reference anew, problems/_darcy_numbers.py

Errors are of the mean of log-permeability: root mean square over the cells, in standard deviations of the posterior,
and relative to the reference in the L2 norm. The bar: EKI needs a tenth of the runs that pCN needs for the same error.
pCN has every advantage: the median of its chains, runs of one chain counted, and at each number of runs the share of
early draws dropped that suits it best, which only a reference can tell.

The reference is NUTS, whose gradients EKI does without; chains of pCN are too slow to be one at 32 x 32 cells.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import pushforward as pf
from benchmarks import _report
from pushforward.problems import darcy

BAR = 10.0
"""Runs of pCN over runs of EKI at equal error."""
MEMBERS = (50, 100, 200, 400, 800)
KEYS = 5
CHAINS, RUNS, THINNING, WARMUP = 4, 100_000, 50, 1000
"""Of pCN; RUNS are those of one chain."""
DROPPED = (0.0, 0.1, 0.25, 0.5, 0.75)
"""Shares of early draws that pCN may leave out."""
NUMBERS = Path(darcy.__file__).with_name("_darcy_numbers.py")


def infer(method: Any, key: int = 0, draws: int = 1000) -> Any:
    """A result on the stored data."""
    return pf.infer(darcy.model, method=method, key=key, draws=draws, progress=False, throw=False, head=darcy.DATA)


def field(xi: np.ndarray) -> np.ndarray:
    """Log-permeability of cells, shape (..., cells), float64."""
    series = darcy.karhunen_loeve().reshape(darcy.MODES, -1)
    return darcy.AMPLITUDE * np.tensordot(np.asarray(xi, np.float64), series, 1)


def errors(mean_xi: np.ndarray) -> tuple[float, float]:
    """Of a posterior mean: root mean square over cells in posterior sd, and relative L2 norm."""
    reference = field(darcy.MEAN)
    gap = field(mean_xi) - reference
    in_sd = gap / darcy.LOG_PERMEABILITY_SD.ravel()
    return float(np.sqrt(np.mean(in_sd**2))), float(np.sqrt(np.sum(gap**2) / np.sum(reference**2)))


def ensemble(method: Any, keys: int = KEYS) -> dict[str, Any]:
    """Medians over keys: runs of the model, errors, and posterior sd over that of the reference, mean of cells."""
    found = []
    for key in range(keys):
        tree = infer(method, key, draws=method.members)
        xi = tree["posterior"]["xi"].to_numpy().reshape(-1, darcy.MODES)
        spread = field(xi).std(0, ddof=1) / darcy.LOG_PERMEABILITY_SD.ravel()
        attributes = pf.attributes(tree)
        found.append([attributes["evaluations"], *errors(xi.mean(0)), spread.mean()])
    return dict(zip(("runs", "error", "relative", "sd"), np.median(found, axis=0), strict=True))


def random_walk() -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """pCN: numbers of runs, best median error in sd and relative error after them, and its mean beta."""
    method = pf.PreconditionedCrankNicolson(chains=CHAINS, warmup=WARMUP, thinning=THINNING)
    tree = infer(method, draws=(RUNS - WARMUP) // THINNING)
    xi = tree["posterior"]["xi"].to_numpy()
    runs = np.unique(np.geomspace(2 * WARMUP, RUNS, 25).astype(int))
    best = []
    for n in (runs - WARMUP) // THINNING:
        tried = [np.median([errors(c[int(d * n) : n].mean(0)) for c in xi], axis=0) for d in DROPPED]
        best.append(min(tried, key=lambda pair: pair[0]))
    error, relative = np.transpose(best)
    return runs, error, relative, pf.attributes(tree)["beta"]


def needed(error: float, runs: np.ndarray, best: np.ndarray) -> tuple[float, bool]:
    """Runs after which pCN is that good, and whether it ever is; else all its runs."""
    reached = np.flatnonzero(best <= error)
    return (float(runs[reached[0]]), True) if reached.size else (float(runs[-1]), False)


def table(runs: np.ndarray, best: np.ndarray, relative: np.ndarray) -> tuple[str, list[float]]:
    """Rows of all ensembles and of pCN; ratios of runs at equal error for the transform update."""
    cases = {f"EKI, {u}, {j}": pf.EKI(j, update=u) for u in ("transform", "perturbed") for j in MEMBERS}
    cases |= {"ALDI, 400": pf.ALDI(400), "EKS, 800": pf.EKS(800)}
    rows, ratios = [], []
    for label, method in cases.items():
        found = ensemble(method, KEYS if "EKI" in label else 1)
        least, met = needed(found["error"], runs, best)
        ratio = least / found["runs"]
        if "transform" in label:
            ratios.append(ratio)
        rows.append(
            {
                "method, members": label,
                "runs of the model": f"{found['runs']:,.0f}",
                "mean error, sd": f"{found['error']:.3f}",
                "relative": f"{found['relative']:.3f}",
                "sd over reference": f"{found['sd']:.2f}",
                "runs of pCN at that error": ("" if met else "above ") + f"{least:,.0f}",
                "ratio": ("" if met else "above ") + f"{ratio:.3g}",
            }
        )
        print(rows[-1], flush=True)
    for n in (5000, 10_000, 20_000, 50_000, RUNS):
        i = np.searchsorted(runs, n)
        rows.append(
            {
                "method, members": "pCN, one chain",
                "runs of the model": f"{runs[i]:,}",
                "mean error, sd": f"{best[i]:.3f}",
                "relative": f"{relative[i]:.3f}",
            }
        )
    return _report.table(rows), ratios


def reference() -> None:
    """Make the stored numbers: NUTS in z, 4 chains of 600 + 2500 steps."""
    tree = infer(pf.NUTS(coordinates="z", warmup=600), key=1, draws=2500)
    attributes = pf.attributes(tree)
    note = f"R-hat at most {attributes['rhat_max']:.4f}, effective draws at least {attributes['ess_min']:.0f}"
    print(note, attributes["warnings"])
    write_numbers(tree["posterior"]["xi"].to_numpy(), note)


def write_numbers(xi: np.ndarray, note: str) -> None:
    """Write the module of numbers, from draws of shape (chains, draws, modes)."""
    flat = xi.reshape(-1, darcy.MODES).astype(np.float64)
    cells = field(flat).std(0, ddof=1)
    text = (
        '"""Posterior of the Darcy problem: NUTS in z, 4 x 2500 draws, `python -m benchmarks.darcy --reference`.\n\n'
        f'{note}.\n"""\n\n'
        "from pushforward.problems._problem import constant\n\n# fmt: off\n"
    )
    parts = (("MEAN", flat.mean(0), 4), ("SD", flat.std(0, ddof=1), 4), ("LOG_PERMEABILITY_SD", cells, 3))
    for name, values, digits in parts:
        numbers = [f"{v:.{digits}f}" for v in values]
        lines = [", ".join(numbers[i : i + 13]) for i in range(0, len(numbers), 13)]
        shape = f".reshape({darcy.SIZE}, {darcy.SIZE})" if name.startswith("LOG") else ""
        text += f"{name} = constant([\n" + "".join(f"    {line},\n" for line in lines) + f"]){shape}\n"
    NUMBERS.write_text(text + "# fmt: on\n")


def main() -> None:
    """Run everything, print and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", action="store_true", help="make the stored reference anew, and nothing else")
    warnings.simplefilter("ignore")
    if parser.parse_args().reference:
        reference()
        return
    runs, best, relative, beta = random_walk()
    rows, ratios = table(runs, best, relative)
    verdict = "met" if min(ratios) >= BAR else "MISSED"
    text = (
        f"{rows}\n\nMedians over {KEYS} keys (EKI; EKS and ALDI one key) and {CHAINS} chains (pCN, beta {beta:.4f}). "
        f"{darcy.MODES} parameters, {darcy.SIZE} x {darcy.SIZE} cells, {darcy.DATA.size} data.\n\n"
        f"Bar, transform update, {BAR:g} times fewer runs than pCN at equal error: {verdict}; the least ratio is "
        f"{min(ratios):.3g}."
    )
    print(text)
    _report.write("darcy", text)


if __name__ == "__main__":
    main()
