"""Online assimilation: seconds per step and memory of a stream, from start to end.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.online --steps 100000

One thread: several that share a busy core wait for each other in every eigenvalue problem, ten times as long.

Lorenz-96 with 40 variables, all observed, ETKF with 40 members and inflation 1.02, in float32, on one core. Quantiles
are over the steps after the first, which reads and compiles. The bar is a median below 1 ms.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pushforward as pf
from benchmarks import _report
from pushforward.online import online
from pushforward.problems import local_linear, lorenz96

BAR = 1e-3
"""Median seconds of a step of the first case."""
SERIES = 1000
"""Data that were simulated; a longer stream goes through them again and again."""


def resident() -> float:
    """Resident memory of this process in MB; NaN where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * 4096 / 1e6


def cases() -> dict[str, tuple[Any, np.ndarray]]:
    """Name -> a stream and its data."""
    _, y = lorenz96.simulate(jax.random.key(0), SERIES)
    etkf = pf.EnKF(members=40, inflation=pf.Multiplicative(1.02))
    line = np.asarray(local_linear.DATA, np.float32)
    return {
        "Lorenz-96, ETKF, 40 members": (online(lorenz96.model, method=etkf), np.asarray(y)),
        "Lorenz-96, ETKF, 40 members, lag 24": (online(lorenz96.model, method=etkf, lag=24), np.asarray(y)),
        "local linear, Kalman, parameter in the state": (
            online(local_linear.model, method=pf.Kalman("extended", augment=True)),
            line,
        ),
    }


def run(stream: Any, data: np.ndarray, steps: int) -> dict[str, str]:
    """Step through the data; one row of the table."""
    begun = time.perf_counter()
    stream.step(data[0])
    first = time.perf_counter() - begun
    seconds = np.empty(steps)
    # The first steps fill caches and the ring of late data: memory counts from there.
    for i in range(100):
        stream.step(data[(i + 1) % len(data)])
    before = resident()
    for i in range(steps):
        row = data[(i + 101) % len(data)]
        begun = time.perf_counter()
        stream.step(row)
        seconds[i] = time.perf_counter() - begun
    after = resident()
    middle, late = np.quantile(seconds, (0.5, 0.99))
    return {
        "first step, s": f"{first:.2f}",
        "median, ms": f"{1e3 * middle:.3f}",
        "99 %, ms": f"{1e3 * late:.3f}",
        "memory before, MB": f"{before:.1f}",
        "after, MB": f"{after:.1f}",
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    for name, (stream, data) in cases().items():
        rows.append({"stream": name, "steps": str(given.steps)} | run(stream, data, given.steps))
        print(rows[-1], flush=True)
    text = _report.table(rows)
    print(text)
    good = float(rows[0]["median, ms"]) < 1e3 * BAR
    print(f"median below {1e3 * BAR:g} ms: {'yes' if good else 'NO'}")
    _report.write("online", text)


if __name__ == "__main__":
    main()
