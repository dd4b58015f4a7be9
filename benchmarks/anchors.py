"""Published scores of filters on the Lorenz systems, beside ours, in docs/benchmarks.md.

Every row of the tables of `lorenz96.NUMBERS` and `lorenz63.NUMBERS` that names an ensemble, extended Kalman or
particle filter, in DAPPER's conventions (`pushforward.problems.Anchor`). The bar:

* where scores of 1000 cycles are published with their standard deviation s over 20 seeds, our mean over 4 seeds lies
  within 3 sqrt(s^2 / 4 + s^2 / 20) of them. A true filter fails with probability 0.007 (t with 19 degrees of freedom);
* elsewhere our mean over 10 seeds of 3000 cycles lies within 5 per cent of the score of long runs;
* rows of `PUBLISHED_WORSE` may be lower than that: there the published run does something else, which is said;
* rows of `MAY_LOSE` are judged by the runs that keep the truth, of which there must be eight in ten.

Each seed has a truth, data and an ensemble of its own.
"""

import time
from types import ModuleType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import pushforward as pf
from benchmarks import _report
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import Anchor, lorenz63, lorenz96

KEY = 20
SEEDS, CYCLES = 4, 1000
LONG_SEEDS, LONG_CYCLES = 10, 3000
LONG_TOLERANCE = 0.05

PUBLISHED_WORSE = {
    "96 ienks": (
        "DAPPER lists 0.17 and 0.192 was measured once; six runs of DAPPER 1.8.1 of 2000 cycles gave 0.164 to 0.202, "
        "mean 0.177 ± 0.006, with spells of 0.2 to 0.3 that ours has not shown in 30 000 cycles."
    ),
    "96 extended": (
        "DAPPER's ExtKF linearises at the state after the step, and as exp(dt J); a plain scan with that tangent gives "
        "0.236 ± 0.001 (10 x 3000 cycles), with the tangent of the step itself 0.220 ± 0.002 (8 x 1000), as ours."
    ),
}
"""Rows where an exact filter does better than the published one, with the reason."""

LOST = 1.0
"""An rmse above this, on Lorenz-63, says that a run has lost the truth for long: states apart differ by about 8."""
MAY_LOSE = {
    "63 particle_4000": (
        "in one of twenty runs of 3000 cycles (two keys) the particles lost the truth and stayed away for hundreds of "
        "cycles; the row is judged by the others, 0.256 ± 0.003 over both keys. The published score does not say how "
        "many runs it is the mean of."
    )
}
"""Rows whose tuning is fragile, with what was seen."""


def _ensemble(anchor: Anchor, analysis: Any = pf.ETKF(), **options: Any) -> pf.EnKF:
    """An ensemble filter with the tuning of an anchor."""
    tuning = anchor.options
    factor = tuning.get("inflation")
    inflation = pf.NoInflation() if factor is None else pf.Multiplicative(factor)
    return pf.EnKF(
        tuning["members"],
        analysis,
        inflation=inflation,
        rotate=tuning.get("rotate", False),
        store="moments",
        **options,
    )


def _particles(anchor: Anchor) -> pf.ParticleFilter:
    """A particle filter with the tuning of an anchor."""
    tuning = anchor.options
    return pf.ParticleFilter(
        tuning["particles"],
        resampling=pf.Systematic(threshold=tuning["resample_below"]),
        regularization=pf.Jitter(tuning["jitter"]),
        store="moments",
    )


class Row(NamedTuple):
    """A filter on a problem, with what is published."""

    problem: ModuleType
    name: str
    method: Any

    @property
    def anchor(self) -> Anchor:
        """The published scores."""
        return self.problem.NUMBERS[self.name]

    @property
    def short(self) -> bool:
        """Whether scores of 1000 cycles are published."""
        return self.anchor.rmse_1000 is not None

    @property
    def size(self) -> tuple[int, int]:
        """Seeds and cycles of our run."""
        return (SEEDS, CYCLES) if self.short else (LONG_SEEDS, LONG_CYCLES)

    @property
    def bound(self) -> tuple[float, float]:
        """The score to reach and how far from it ours may lie."""
        anchor = self.anchor
        if anchor.rmse_1000 is None or anchor.sd_1000 is None:
            return anchor.rmse, LONG_TOLERANCE * anchor.rmse
        return anchor.rmse_1000, 3 * anchor.sd_1000 * (1 / SEEDS + 1 / 20) ** 0.5


def _rows() -> dict[str, Row]:
    of_96, of_63 = lorenz96.NUMBERS, lorenz63.NUMBERS
    growth = of_96["extended"].options["inflation_per_unit_time"]
    smoother = pf.IterativeEnKS()
    methods_96 = {
        "perturbed": _ensemble(of_96["perturbed"], pf.Perturbed("rescaled")),
        "denkf": _ensemble(of_96["denkf"], pf.DEnKF()),
        "etkf_24": _ensemble(of_96["etkf_24"]),
        "etkf_20": _ensemble(of_96["etkf_20"]),
        "letkf": _ensemble(of_96["letkf"], pf.LETKF(of_96["letkf"].options["radius"])),
        "finite_size": _ensemble(of_96["finite_size"], pf.FiniteSize()),
        "ienks": _ensemble(of_96["ienks"], smoother=smoother),
        "extended": pf.Kalman(pf.Extended(), inflation=growth, time_step=lorenz96.INTERVAL, store="moments"),
    }
    methods_63 = {
        "etkf": _ensemble(of_63["etkf"]),
        "perturbed": _ensemble(of_63["perturbed"], pf.Perturbed("rescaled")),
        "ienks": _ensemble(of_63["ienks"], smoother=smoother),
        "particle_100": _particles(of_63["particle_100"]),
        "particle_4000": _particles(of_63["particle_4000"]),
    }
    parts = ((lorenz96, "96", methods_96), (lorenz63, "63", methods_63))
    return {f"{n} {name}": Row(module, name, m) for module, n, methods in parts for name, m in methods.items()}


ROWS = _rows()


class Scores(NamedTuple):
    """rmse.a and rmv.a of each seed, shape (seeds,)."""

    rmse: np.ndarray
    spread: np.ndarray

    def judged(self, label: str) -> np.ndarray:
        """The scores that a row is judged by."""
        return self.rmse[self.rmse < LOST] if label in MAY_LOSE else self.rmse


def scores(problem: ModuleType, method: Any, seeds: int, cycles: int, key: int = KEY) -> Scores:
    """Scores of the analysis, all seeds in one program, in float64.

    Args:
        problem: `lorenz96` or `lorenz63`.
        method: a state method with `store="moments"`.
        seeds: number of runs, each with a truth, data and an ensemble of its own.
        cycles: length of a run, with the burn-in.
        key: of all random numbers.
    """

    def root_mean_square(values):
        return jnp.mean(jnp.sqrt(jnp.mean(values**2, 1))[problem.BURN_IN :])

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(key), seeds)
        truth, y = jax.jit(jax.vmap(lambda k: problem.simulate(k, cycles)))(keys)
        space = read_state_space(read_problem(problem.model, (), {"y": np.asarray(y[0])}))

        @jax.jit
        @jax.vmap
        def run(truth, y, key):
            chain = eqx.tree_at(lambda s: s.arrays, space, (y,)).chain()
            mean, sd = method.trajectories(chain, jax.random.fold_in(key, 1), 2, "moments").filtering["x"]
            return root_mean_square(mean - truth), root_mean_square(sd)

        return Scores(*(np.asarray(v) for v in run(truth, y, keys)))


def within(label: str, found: Scores) -> str:
    """ "yes" where scores meet the bar, "better" where they may be lower and are, else "NO"."""
    target, allowed = ROWS[label].bound
    judged = found.judged(label)
    if len(judged) < 0.8 * len(found.rmse):
        return "NO"
    difference = judged.mean() - target
    if abs(difference) <= allowed:
        return "yes" if len(judged) == len(found.rmse) else f"yes: {len(judged)} of {len(found.rmse)} runs"
    return "better" if label in PUBLISHED_WORSE and difference < 0 else "NO"


def table() -> str:
    """Every row: published and our scores, and whether they agree."""
    rows = []
    for label, row in ROWS.items():
        start = time.perf_counter()
        seeds, cycles = row.size
        found = scores(row.problem, row.method, seeds, cycles)
        target, allowed = row.bound
        judged = found.judged(label)
        error = judged.std(ddof=1) / len(judged) ** 0.5
        tuning = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in row.anchor.options.items())
        rows.append(
            {
                "problem": "Lorenz-" + label.split()[0],
                "method": f"{row.anchor.method} ({tuning})",
                "published rmse / rmv": f"{target:.3f} / {row.anchor.spread or '-'}",
                "our rmse / rmv": f"{judged.mean():.4f} ± {error:.4f} / {found.spread.mean():.3f}",
                "bound": f"{allowed:.4f}",
                "within": within(label, found),
                "runs": f"{seeds} x {cycles}",
                "s": f"{time.perf_counter() - start:.0f}",
            }
        )
        print(rows[-1], flush=True)
    return _report.table(rows)


def main() -> None:
    """Run every row, print and write it."""
    start = time.perf_counter()
    text = table()
    text += (
        "\n\nrmse.a and rmv.a: means over cycles after the burn-in, after inflation and rotation; ± is one standard "
        "error over our seeds. The bound is 3 standard errors of the difference where scores of 1000 cycles are "
        "published (false alarm 0.007 a row), else 5 % of the score of long runs. Seconds include compilation."
    )
    text += "".join(f"\n\nLorenz-{label}: {reason}" for label, reason in (PUBLISHED_WORSE | MAY_LOSE).items())
    text += f"\n\nIn all {time.perf_counter() - start:.0f} s on {jax.devices()[0].platform}."
    _report.write("anchors", text)


if __name__ == "__main__":
    main()
