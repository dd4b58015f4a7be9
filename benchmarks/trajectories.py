"""Lorenz-63 by the paper's protocol: trajectories from a learned prior against backward simulation.

    python -m benchmarks.trajectories               # trains, draws, writes docs/benchmarks.md; an hour of two cores
    python -m benchmarks.trajectories --steps 500 --sets 1 --draws 64     # a look, in minutes; prints only
    python -m benchmarks.trajectories --file l63.pf # reads the trained method from that file, or writes it there
    python -m benchmarks.trajectories --scenarios lo,hi                   # some of them; prints only

One network is trained on 15,360 stationary trajectories of 65 states. For each data set of each scenario it draws
trajectories by guidance alone, by weighted particles (`pf.Twisted`), each also with moves on the exact joint density,
and with the same moves from draws of the prior, which look at no data. Reported are medians over data sets: mean and
median of log p(x), mean of log p(y given x), W1 to backward simulation over that of another run of it, and the largest
difference of the share of draws with a positive first coordinate. Moved draws are compared with backward simulation
from the Gaussian first state of the model, whose posterior they are of; the others with that from the stationary law of
the archive.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pushforward as pf
from benchmarks import _report
from pushforward.problems import lorenz63_trajectory as lorenz

NETWORK = pf.TemporalUNet()
TRAINING = pf.ScoreTraining(steps=16_000, batch_size=32, held_out=0.02)
SAMPLER = pf.Heun(steps=64, corrections=1)
MOVES = pf.TransitionHMC(moves=100, leapfrog=20)
PARTICLE_GUIDANCE = pf.Twisted(particles=256)
PARTICLES = 16384
DRAWS = 256


def train(steps: int) -> tuple[pf.ScoreTrajectory, float]:
    """The trained method and the seconds that it took."""
    long = np.asarray(lorenz.trajectories(jax.random.key(0), 1024, 15 * 65))
    archive = np.random.default_rng(0).permutation(long.reshape(-1, 65, 3))
    training = dataclasses.replace(TRAINING, steps=steps)
    method = pf.ScoreTrajectory(NETWORK, sampler=SAMPLER, training=training)
    begun = time.perf_counter()
    fitted = method.fit(lorenz.model, observed=("y0", "y"), trajectories=archive, progress=False)
    return fitted, time.perf_counter() - begun


def states(tree: Any) -> np.ndarray:
    """Trajectories, shape (draw, 65, 3)."""
    found = tree["posterior"]
    return np.concatenate([found["x0"].to_numpy()[0][:, None], found["x"].to_numpy()[0]], axis=1)


def figures(x: Any, y: Any, name: str, aim: Any, floor: float) -> dict[str, float]:
    """Figures of draws x given data y, against draws `aim`; floor is W1 between two exact sets."""
    density = np.asarray(lorenz.log_transition(x))
    return {
        "log p(x)": float(np.mean(density)),
        "median": float(np.median(density)),
        "log p(y | x)": float(np.mean(lorenz.log_likelihood(x, y, name))),
        "W1": lorenz.wasserstein(x, aim),
        "W1 / floor": lorenz.wasserstein(x, aim) / floor,
        "lobes": float(np.abs(lorenz.lobes(x) - lorenz.lobes(aim)).max()),
    }


def one(
    fitted: pf.ScoreTrajectory, name: str, number: int, draws: int, methods: tuple[str, ...] = ()
) -> dict[str, dict[str, float]]:
    """Figures by method for one data set; of the methods named, or of all."""
    known = lorenz.scenario(name)
    _, y = (np.asarray(v) for v in lorenz.simulate(jax.random.key(100 + number), name))
    gaussian = lorenz.start().sample(jax.random.key(3), (PARTICLES,))
    again = lorenz.start().sample(jax.random.key(4), (PARTICLES,))

    def exact(key: int, start: Any = None) -> np.ndarray:
        options = {"particles": PARTICLES, "draws": draws, "start": start}
        return np.asarray(lorenz.backward_simulation(jax.random.key(key), y, name, **options))

    aims = {"model": (exact(3, gaussian), exact(4, again)), "archive": (exact(1), exact(2))}
    begun = time.perf_counter()
    exact(2)
    seconds = time.perf_counter() - begun
    floors = {law: lorenz.wasserstein(*pair) for law, pair in aims.items()}
    found = {"backward simulation, again": figures(aims["archive"][1], y, name, aims["archive"][0], floors["archive"])}
    found["backward simulation, again"]["seconds"] = seconds
    chosen = {
        "network": ("archive", fitted),
        "network, moved": ("model", dataclasses.replace(fitted, correction=MOVES)),
        "particles": ("archive", dataclasses.replace(fitted, guidance=PARTICLE_GUIDANCE)),
        "particles, moved": ("model", dataclasses.replace(fitted, guidance=PARTICLE_GUIDANCE, correction=MOVES)),
        "prior, moved": ("model", dataclasses.replace(fitted, guidance="none", correction=MOVES)),
    }
    for label, (law, method) in chosen.items():
        if methods and label not in methods:
            continue
        options = {"draws": draws, "progress": False, "noise": known.noise, "component": known.component}
        tree = pf.infer(lorenz.model, method=method, y=y, **options)
        found[label] = figures(states(tree), y, name, aims[law][0], floors[law])
        found[label]["seconds"] = pf.attributes(tree)["run_seconds"]
    return found


def summary(name: str, sets: list[dict[str, dict[str, float]]]) -> list[dict[str, str]]:
    """A row for each method: medians over the data sets."""
    rows = []
    for label in sets[0]:
        middle = {n: float(np.median([s[label][n] for s in sets])) for n in sets[0][label]}
        digits = {"lobes": 2, "W1 / floor": 2}
        rows.append({"data": name, "draws of": label} | {n: f"{v:.{digits.get(n, 1)}f}" for n, v in middle.items()})
    return rows


def main() -> None:
    """Train, draw, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=TRAINING.steps)
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--scenarios", default=",".join(lorenz.SCENARIOS))
    parser.add_argument("--file", type=Path, default=None)
    options = parser.parse_args()
    if options.file is not None and options.file.exists():
        fitted, seconds = pf.load(options.file), float("nan")
    else:
        fitted, seconds = train(options.steps)
        if options.file is not None:
            pf.save(options.file, fitted)
    assert fitted.trained is not None
    loss = float(np.nanmin(np.asarray(fitted.trained.losses)[1]))
    said = f"{options.steps} steps of training in {seconds / 60:.1f} minutes, held-out loss {loss:.4f}; "
    said += f"{options.sets} data sets, {options.draws} draws."
    print(said, flush=True)
    rows = []
    for name in options.scenarios.split(","):
        sets = []
        for number in range(options.sets):
            sets.append(one(fitted, name, number, options.draws))
            print(name, number, {k: {n: round(v, 2) for n, v in f.items()} for k, f in sets[-1].items()}, flush=True)
        rows += summary(name, sets)
    text = said + "\n\n" + _report.table(rows)
    print(text)
    if all(getattr(options, name) == parser.get_default(name) for name in ("steps", "sets", "draws", "scenarios")):
        _report.write("trajectories", text)


if __name__ == "__main__":
    main()
