"""Inflation and localisation radius learned from observations alone, beside a grid search, in docs/benchmarks.md.

Lorenz-96 in the setting of Sakov and Oke (2008), `problems/lorenz96.py`: LETKF with multiplicative inflation and random
rotations. `EnKF.fit` sees one series of data and no truth. The grid search knows the truth: it takes the pair of the
lowest rmse on the very series that both are judged on, other ones than that of the training.

The bar: at 10 and 20 members the learned pair's rmse is within 2 % of the grid's best, as means over training series.
"""

import functools
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import pushforward as pf
from benchmarks import _report
from pushforward.methods import _ensemble_filter
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import lorenz96

MEMBERS = (10, 20)
TRAINED, JUDGED = 3, 4
FIRST_TRAINED, FIRST_JUDGED = 30, 400
"""Seeds: none of these series was looked at while the rule of `EnKF.fit` was made (0 to 22 and 100 to 303 were)."""
LONG, CYCLES = 3000, 1000
"""Cycles of a series of the training, and of one that is judged on."""
FACTORS = (1.01, 1.015, 1.02, 1.03, 1.04)
RADII = (5.5, 7.5, 10.0, 14.0, 20.0)


@functools.cache
def series(seed: int, cycles: int = CYCLES) -> tuple[Any, Any]:
    """Truth and data of one series, (cycles, 40)."""
    return jax.jit(lambda key: lorenz96.simulate(key, cycles))(jax.random.key(seed))


def method(members: int) -> pf.EnKF:
    """Before training."""
    return pf.EnKF(members, pf.LETKF(4.0), inflation=pf.Multiplicative(1.05), rotate=True)


@eqx.filter_jit
def rmse(given: Any, factor: Any, radius: Any, truth: Any, y: Any, key: Any) -> Any:
    """Mean over cycles after the burn-in of the analysis' root mean square error."""
    options: Any = lambda m: (m.inflation.factor, m.analysis.radius)  # noqa: E731
    parts = eqx.tree_at(options, given, (factor, radius)).filter
    space = read_state_space(read_problem(lorenz96.model, (), {"y": np.zeros(y.shape)}))
    chain = eqx.tree_at(lambda s: s.arrays, space, (y,)).chain()
    start, _, _ = parts.start(chain, key)
    columns = _ensemble_filter.layout(chain, False)

    def move(before, item):
        t, x = item
        after, _ = parts.cycle(chain, columns, before, t, jax.random.fold_in(key, t))
        return after, jnp.sqrt(jnp.mean((jnp.mean(after.members, 0) - x) ** 2))

    errors = jax.lax.scan(move, start, (jnp.arange(CYCLES), truth))[1]
    return jnp.mean(errors[lorenz96.BURN_IN :])


def scores(members: int, factor: float, radius: float) -> np.ndarray:
    """On each series that is judged on."""
    given = method(members)
    found = [
        rmse(given, jnp.asarray(factor), jnp.asarray(radius), *series(FIRST_JUDGED + s), jax.random.key(s))
        for s in range(JUDGED)
    ]
    return np.asarray(found, float)


def row(members: int) -> list[dict[str, str]]:
    """Learned pairs and the grid's best of one size of the ensemble."""
    found, pairs, seconds = [], [], []
    for seed in range(FIRST_TRAINED, FIRST_TRAINED + TRAINED):
        start = time.process_time()
        learned = method(members).fit(lorenz96.model, y=np.asarray(series(seed, LONG)[1]), key=seed, progress=False)
        seconds.append(time.process_time() - start)
        pair = learned.inflation.factor, learned.analysis.radius
        pairs.append(f"{pair[0]:.3f}, {pair[1]:.1f}")
        found.append(scores(members, *pair))
        print(members, seed, pairs[-1], np.round(found[-1], 4), f"{seconds[-1]:.1f} CPU s", flush=True)
    start = time.process_time()
    grid = {(f, r): scores(members, f, r) for f in FACTORS for r in RADII}
    used = time.process_time() - start
    best = min(grid, key=lambda pair: grid[pair].mean())
    for pair, values in grid.items():
        print(members, pair, np.round(values, 4), flush=True)
    per_seed = np.asarray(found).mean(1)
    ratio = per_seed / grid[best].mean()
    return [
        {
            "members": str(members),
            "learned inflation, radius": "; ".join(pairs),
            "rmse learned": f"{per_seed.mean():.4f} ± {per_seed.std(ddof=1):.4f}",
            "best of the grid": f"{best[0]}, {best[1]}",
            "rmse of the grid's best": f"{grid[best].mean():.4f}",
            "ratio": f"{ratio.mean():.3f} (worst {ratio.max():.3f})",
            "CPU s of a fit, of the grid": f"{np.median(seconds):.0f}, {used / JUDGED:.0f}",
        }
    ]


def main() -> None:
    """Learn, judge, print and write."""
    with jax.enable_x64(True):
        rows = [r for members in MEMBERS for r in row(members)]
    text = _report.table(rows)
    print(text)
    _report.write("learned_filters", text)


if __name__ == "__main__":
    main()
