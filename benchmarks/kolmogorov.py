"""Kolmogorov flow, 32 x 32: a score network of five states, trained on a CPU, and draws given three kinds of data.

    python -m benchmarks.kolmogorov                 # trains, draws, prints the table
    python -m benchmarks.kolmogorov --file flow.pf  # reads the trained method from that file, or writes it there
    python -m benchmarks.kolmogorov --figures DIR   # fields of vorticity, true, observed and drawn, as PNG

By hand only: 6 minutes of one core for the training and as many for the draws, most of them compilation. The figure is
the paper's: deviation of the data from what is observed of the draws, over that of the noise, `residual_ratio`. It is 1
for trajectories given the data, and less where they follow the noise. A second one asks whether draws are trajectories
of the flow: root mean square of x_i - M(x_{i-1}) over the model noise, 1 for the flow itself. With 32 steps the first
guidance explodes on "extrapolation", where data are precise; the paper takes 256.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pushforward as pf
from benchmarks import _report
from pushforward.problems import kolmogorov

TRAJECTORIES, LENGTH, WINDOW, DRAWS = 96, 48, 5, 2
NETWORK = pf.FieldUNet(channels=(16, 32, 64), blocks=1)
TRAINING = pf.ScoreTraining(steps=3500, batch_size=8, levels=(-1.6, 1.6), patience=50)
SAMPLERS = {
    "gamma .01, Heun-32, C = 1": (pf.GammaGuidance(factor=1e-2), pf.Heun(steps=32, corrections=1)),
    "gamma .01, DDIM-64, C = 1": (pf.GammaGuidance(factor=1e-2), pf.DDIM(steps=64, corrections=1)),
    "moment matching, 5, Heun-16": (pf.MomentMatching(iterations=5), pf.Heun(steps=16)),
}


def train(network: Any = NETWORK, training: pf.ScoreTraining = TRAINING) -> pf.ScoreTrajectory:
    """The method, trained on trajectories of the flow; they are of `kolmogorov.trajectories`, not of `model`."""
    made = kolmogorov.trajectories(jax.random.key(0), TRAJECTORIES, LENGTH)
    method = pf.ScoreTrajectory(network, window=WINDOW, training=training, guidance="gamma")
    return method.fit(kolmogorov.model, observed=("y0", "y"), trajectories=np.asarray(made), key=1, progress=False)


def draw(method: pf.ScoreTrajectory, name: str, label: str, draws: int = DRAWS) -> dict[str, Any]:
    """Truth, data and draws of a scenario, and figures of the draws."""
    guidance, sampler = SAMPLERS[label]
    chosen = pf.ScoreTrajectory(
        method.network, window=WINDOW, training=method.training, guidance=guidance, sampler=sampler,
        trained=method.trained,
    )  # fmt: skip
    truth, y = kolmogorov.simulate(jax.random.key(10), name)
    start = time.process_time()
    tree = pf.infer(kolmogorov.model, method=chosen, draws=draws, progress=False, throw=False, y=y, name=name)
    first = time.process_time() - start
    posterior = tree["posterior"]
    x = np.concatenate([posterior["x0"].to_numpy()[0][:, None], posterior["x"].to_numpy()[0]], 1)
    run = pf.attributes(tree)["run_seconds"]
    error = np.sqrt(np.mean((x - np.asarray(truth)) ** 2))
    return {
        "truth": np.asarray(truth), "y": np.asarray(y), "x": x, "run": run / draws, "first": first,
        "ratio": float(kolmogorov.residual_ratio(x, y, name)),
        "steps": roughness(x) / kolmogorov.MODEL_NOISE,
        "error": float(error),
    }  # fmt: skip


def roughness(x: np.ndarray) -> float:
    """Root mean square of x_i - M(x_{i-1}) of trajectories (draws, states, n, n, 2)."""
    gap = x[:, 1:] - np.asarray(jax.jit(kolmogorov.step)(x[:, :-1]))
    return float(np.sqrt(np.mean(gap**2)))


def picture(found: dict[str, Any], name: str, path: Path) -> None:
    """Vorticity of the truth and of two draws, and the data, in every second state."""
    from matplotlib.figure import Figure

    rows = {"true": kolmogorov.vorticity(found["truth"]), "observed": found["y"]}
    rows |= {f"draw {i + 1}": kolmogorov.vorticity(x) for i, x in enumerate(found["x"][:2])}
    figure = Figure(figsize=(10, 2.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 5)
    for line, (label, fields) in zip(axes, rows.items(), strict=True):
        for axis, state in zip(line, range(0, 10, 2), strict=True):
            field = np.asarray(fields[state])
            if field.ndim == 3:
                field = np.asarray(kolmogorov.vorticity(field))
                # Data of a part of the square: differences across its edge mean nothing.
                field = field[1:-1, 1:-1] if name == "extrapolation" else field
            top = np.nanmax(np.abs(field)) if np.isfinite(field).any() else 1.0
            axis.imshow(field.T, cmap="RdBu", origin="lower", vmin=-top, vmax=top)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label)
    figure.suptitle(f"{name}: vorticity in states 0, 2, 4, 6, 8")
    figure.savefig(path / f"kolmogorov_{name}.png", dpi=90)


def table(method: pf.ScoreTrajectory, figures: Path | None) -> str:
    """Rows of all scenarios and samplers."""
    rows = []
    for name in kolmogorov.SCENARIOS:
        for label in SAMPLERS:
            found = draw(method, name, label)
            rows.append(
                {
                    "data": name,
                    "guidance, sampler": label,
                    "residual sd over the noise": f"{found['ratio']:.2f}",
                    "published, 64 x 64": f"{kolmogorov.NUMBERS['published'][name]:.2f}",
                    "step error over the noise": f"{found['steps']:.1f}",
                    "error of a draw": f"{found['error']:.2f}",
                    "s per draw": f"{found['run']:.1f}",
                }
            )
            print(rows[-1], flush=True)
            if figures and label == next(iter(SAMPLERS)):
                picture(found, name, figures)
    return _report.table(rows)


def main() -> None:
    """Train, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.process_time()
    if options.file and options.file.exists():
        method = pf.load(options.file)
    else:
        method = train()
        if options.file:
            pf.save(options.file, method)
    assert method.trained is not None
    losses = np.asarray(method.trained.losses)[1]
    print(f"trained: {time.process_time() - start:.0f} CPU s, held-out loss {losses.min():.4f}", flush=True)
    print(table(method, options.figures))


if __name__ == "__main__":
    main()
