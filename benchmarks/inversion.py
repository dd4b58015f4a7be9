"""One step of ES-MDA with 100 members against iterative_ensemble_smoother, each run in a process of its own.

    python -m benchmarks.inversion            # all rows, both libraries; writes the table in docs/benchmarks.md
    python -m benchmarks.inversion --small    # a row that shows that it runs

Both sides get the same numbers in float64, as arrays of their own kind: parameters, outputs, data, variances. Times are
CPU seconds of the process with two threads: of the first call, with all compilation, and of the second. Memory is the
peak resident size during the first call less that before it, imports and inputs done. Localised, both taper the gain by
Gaspari and Cohn's function of the distance of a parameter (on a square grid) and a datum, 3 % of all pairs; the peer
takes 1000 rows at a time, and its callback makes the taper from a k-d tree, for those pairs only. Results are checked
against each other: the same perturbations give the same members.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

MEMBERS, ALPHA, REACH = 100, 4.0, 0.1
CASES = {
    "1e4 x 1e3": (10_000, 1000, False),
    "1e5 x 1e3": (100_000, 1000, False),
    "1e5 x 1e4": (100_000, 10_000, False),
    "1e6 x 1e4": (1_000_000, 10_000, False),
    "1e5 x 1e3, localised": (100_000, 1000, True),
    "1e5 x 1e4, localised": (100_000, 10_000, True),
}
SMALL = {"2e3 x 2e2": (2000, 200, False), "2e3 x 2e2, localised": (2000, 200, True)}
LIBRARIES = ("pushforward", "iterative_ensemble_smoother")


def inputs(d: int, m: int) -> dict[str, np.ndarray]:
    """Parameters (d, J), outputs (m, J), data and perturbations, variances, places of parameters and of data."""
    generator = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(d)))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)[:d] / side
    seen = generator.choice(d, m, replace=False)
    members = generator.normal(size=(d, MEMBERS))
    outputs = members[seen] + 0.1 * generator.normal(size=(m, MEMBERS))
    return {
        "members": members,
        "outputs": outputs,
        "data": generator.normal(size=m),
        "noise": generator.normal(size=(m, MEMBERS)),
        "variances": 0.5 + generator.uniform(size=m),
        "places": grid,
        "sensors": grid[seen],
    }


def peer(given: dict[str, np.ndarray], localised: bool) -> Callable[[], np.ndarray]:
    """The step of iterative_ensemble_smoother, (d, J)."""
    from iterative_ensemble_smoother import ESMDA, LocalizedESMDA
    from scipy.spatial import cKDTree

    kind = LocalizedESMDA if localised else ESMDA
    sd = np.sqrt(given["variances"])[:, None]
    noise = sd * (given["noise"] - given["noise"].mean(1, keepdims=True))
    places, sensors = given["places"], given["sensors"]

    tree = cKDTree(sensors)

    def tapered(rows: slice) -> Callable[[np.ndarray], np.ndarray]:
        near = cKDTree(places[rows]).sparse_distance_matrix(tree, REACH, output_type="coo_matrix")

        def taper(gain: np.ndarray) -> np.ndarray:
            kept = np.zeros_like(gain)
            kept[near.row, near.col] = gain[near.row, near.col] * gaspari_cohn(near.data / (0.5 * REACH))
            return kept

        return taper

    def step() -> np.ndarray:
        smoother = kind(given["variances"], given["data"], alpha=np.full(4, ALPHA), seed=0)
        members = given["members"]
        smoother.prepare_assimilation(Y=given["outputs"], truncation=1.0, observation_perturbations=noise)
        if not localised:
            return smoother.assimilate_batch(X=members)
        after = members.copy()
        for start in range(0, len(members), 1000):
            rows = slice(start, start + 1000)
            after[rows] = smoother.assimilate_batch(X=members[rows], localization_callback=tapered(rows))
        return after

    return step


def gaspari_cohn(r: np.ndarray) -> np.ndarray:
    """The taper, with NumPy, for 0 <= r <= 2."""
    near = 1.0 + r**2 * (-5 / 3 + r * (0.625 + r * (0.5 - 0.25 * r)))
    x = np.maximum(r, 1.0)
    return np.where(r < 1.0, near, (2.0 - x) ** 4 * (x**2 + 2.0 * x - 0.5) / (12.0 * x))


def ours(given: dict[str, np.ndarray], localised: bool) -> Callable[[], np.ndarray]:
    """The step of `pf.EKI(update="perturbed")` on arrays, (d, J)."""
    import jax
    import jax.numpy as jnp

    from pushforward.math import inversion, inversion_local
    from pushforward.math.ensemble_local import HALF_SUPPORT

    jax.config.update("jax_enable_x64", True)
    members, outputs, noise = (jnp.asarray(given[n].T.copy()) for n in ("members", "outputs", "noise"))
    data, sd = jnp.asarray(given["data"]), jnp.asarray(np.sqrt(given["variances"]))
    radius = REACH / (2 * HALF_SUPPORT)

    @jax.jit
    def moved(members: jax.Array, outputs: jax.Array, data: jax.Array, noise: jax.Array) -> jax.Array:
        return inversion.perturbed(outputs / sd, data / sd, 1 / ALPHA, noise) @ members

    @jax.jit
    def shifted(
        members: jax.Array, outputs: jax.Array, data: jax.Array, noise: jax.Array, blocks: inversion_local.Blocks
    ) -> jax.Array:
        terms = inversion_local.perturbed_terms(outputs / sd, data / sd, 1 / ALPHA, noise)
        return inversion_local.by_distance(members, terms, blocks, radius)

    def step() -> np.ndarray:
        if not localised:
            return np.asarray(moved(members, outputs, data, noise)).T
        blocks = inversion_local.distance_blocks(given["places"], given["sensors"], REACH)
        return np.asarray(shifted(members, outputs, data, noise, blocks)).T

    for name in ("members", "outputs", "noise"):
        del given[name]
    return step


def peak() -> float:
    """Peak resident megabytes since the last `reset`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reset() -> None:
    """Set the peak to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(library: str, case: str) -> None:
    """Run one step twice in this process; print the figures, and some of the result, as JSON."""
    d, m, localised = (CASES | SMALL)[case]
    step = (ours if library == "pushforward" else peer)(inputs(d, m), localised)
    reset()
    before, start = peak(), time.process_time()
    result = step()
    first, memory = time.process_time() - start, peak() - before
    some = result[:: d // 50, :5].ravel().tolist()
    del result
    start = time.process_time()
    step()
    print(json.dumps({"first": first, "next": time.process_time() - start, "memory": memory, "some": some}))


def compared(cases: dict) -> Iterator[dict[str, str]]:
    """One row per case, each library in a process of its own with two threads."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    for case in cases:
        found = {}
        for library in LIBRARIES:
            command = [sys.executable, "-m", "benchmarks.inversion", "--one", library, case]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=True)
            found[library] = json.loads(done.stdout.splitlines()[-1])
        us, them = (found[name] for name in LIBRARIES)
        gap = float(np.abs(np.subtract(us["some"], them["some"])).max())
        row = {"parameters x data": case}
        for name, side in (("pushforward", us), ("iterative_ensemble_smoother 1.3.0", them)):
            row[f"{name}: first / next CPU s"] = f"{side['first']:.2f} / {side['next']:.2f}"
            row[f"{name}: MB"] = f"{side['memory']:.0f}"
        row["first, ratio"] = f"{us['first'] / them['first']:.2f}"
        row["next, ratio"] = f"{us['next'] / them['next']:.2f}"
        row["memory, ratio"] = f"{us['memory'] / them['memory']:.2f}"
        row["largest difference"] = f"{gap:.0e}"
        print(row, flush=True)
        yield row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "CASE"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.one:
        measure(*options.one)
        return
    from benchmarks import _report

    rows = list(compared(SMALL if options.small else CASES))
    print(_report.table(rows))
    if not options.small:
        _report.write("inversion", _report.table(rows))


if __name__ == "__main__":
    main()
