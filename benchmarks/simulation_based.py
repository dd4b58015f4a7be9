"""The public benchmark of simulation-based inference: `AmortizedFlow` against `sbi`, on the same simulations.

    OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 python -m benchmarks.simulation_based --simulations 10000

Four tasks of Lueckmann, Boelts, Greenberg, Goncalves and Macke (2021), arXiv 2101.04653, with ten observations each.
Both sides keep their defaults in every task: `pf.AmortizedFlow(simulations=n, sites="theta")` and `NPE(prior)`, and
learn from one set of arrays, simulated once. C2ST against exact draws, by one classifier. Times are seconds of the
process on one core with one thread; ours have the simulations and all compilation in them, those of `sbi` only its
`train()`. Last, the posteriors of 1000 data sets of BOD in one call, against a loop over `sbi`'s `posterior.sample`.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np

import pushforward as pf
from benchmarks import _report
from benchmarks.speed import clear
from pushforward.metrics import c2st
from pushforward.model.inverse import read_problem
from pushforward.problems import bod, gaussian_linear, gaussian_mixture, slcp, two_moons

TASKS: dict[str, ModuleType] = {
    "two_moons": two_moons,
    "gaussian_linear": gaussian_linear,
    "gaussian_mixture": gaussian_mixture,
    "slcp": slcp,
}
SIMULATIONS, DRAWS, OBSERVATIONS = 10_000, 2000, 10
METHODS = ("NPE", "SNPE", "NLE", "SNLE")
PUBLISHED: dict[str, dict[int, tuple[float, ...]]] = {
    "two_moons": {
        1000: (0.725, 0.643, 0.773, 0.657),
        10_000: (0.606, 0.554, 0.713, 0.571),
        100_000: (0.542, 0.530, 0.668, 0.582),
    },
    "gaussian_linear": {
        1000: (0.694, 0.652, 0.650, 0.628),
        10_000: (0.552, 0.544, 0.555, 0.548),
        100_000: (0.506, 0.507, 0.515, 0.519),
    },
    "gaussian_mixture": {
        1000: (0.716, 0.669, 0.740, 0.706),
        10_000: (0.615, 0.551, 0.723, 0.685),
        100_000: (0.548, 0.536, 0.690, 0.646),
    },
    "slcp": {
        1000: (0.975, 0.965, 0.946, 0.921),
        10_000: (0.901, 0.845, 0.771, 0.713),
        100_000: (0.831, 0.666, 0.699, 0.578),
    },
}
"""Mean C2ST over the benchmark's ten observations by number of simulations; the mixture as run again with its prior
corrected."""
SIMFORMER = {"two_moons": 0.505, "gaussian_linear": 0.503, "gaussian_mixture": 0.504, "slcp": 0.569}
"""Gloeckler, Deistler, Weilbach, Wood and Macke (2024), at 100,000 simulations."""
DATASETS, LOOPED = 1000, 100
"""Data sets of the batch, and those of them that the peer samples, whose time is scaled up."""
BAR = 20
"""Least ratio of the loop's time to that of the batch."""


class Clock:
    """CPU and wall seconds of a block."""

    def __init__(self):
        self.cpu = self.wall = 0.0


@contextlib.contextmanager
def clock() -> Iterator[Clock]:
    """Measure a block; blocks that follow add to nothing."""
    found = Clock()
    cpu, wall = time.process_time(), time.perf_counter()
    yield found
    found.cpu, found.wall = time.process_time() - cpu, time.perf_counter() - wall


def simulated(model: Callable, data: str, n: int, key: int, **given: Any) -> dict[str, np.ndarray]:
    """n draws of prior and data by site name, each with a leading axis."""
    problem = read_problem(model, (), given, (data,))
    sites, values, _ = jax.jit(lambda k: problem.simulate(k, n))(jax.random.key(key))
    return {name: np.asarray(v) for name, v in (sites | values).items()}


# ------------------------------------------------------------------------------------------------------------ peer


def prior_of(task: str) -> Any:
    """The prior as a law of torch."""
    import torch
    from sbi.utils import BoxUniform

    if task == "gaussian_linear":
        return torch.distributions.MultivariateNormal(torch.zeros(10), gaussian_linear.PRIOR_VARIANCE * torch.eye(10))
    low, high = {
        "two_moons": ([-1.0] * 2, [1.0] * 2),
        "gaussian_mixture": ([-gaussian_mixture.BOUND] * 2, [gaussian_mixture.BOUND] * 2),
        "slcp": ([-slcp.BOUND] * 5, [slcp.BOUND] * 5),
        "bod": ([0.4, 0.01], [1.2, 0.31]),
    }[task]
    return BoxUniform(torch.tensor(low), torch.tensor(high))


def trained_peer(prior: Any, theta: np.ndarray, x: np.ndarray) -> tuple[Any, Clock]:
    """`sbi`'s posterior by its defaults, and what its training took."""
    import torch
    from sbi.inference import NPE
    from sbi.utils.tracking import TensorBoardTracker
    from torch.utils.tensorboard.writer import SummaryWriter

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        trainer = NPE(prior, tracker=TensorBoardTracker(writer), show_progress_bars=False)
        trainer.append_simulations(torch.tensor(theta), torch.tensor(x.reshape(len(x), -1)))
        with clock() as spent, contextlib.redirect_stdout(io.StringIO()):
            estimator = trainer.train()
        writer.close()
    return trainer.build_posterior(estimator), spent


def peer_draws(posterior: Any, x: np.ndarray, draws: int) -> np.ndarray:
    """Draws for each data set by a loop, (data set, draw, d)."""
    import torch

    rows = torch.tensor(x.reshape(len(x), -1), dtype=torch.float32)
    return np.stack([posterior.sample((draws,), x=row, show_progress_bars=False).numpy() for row in rows])


# ----------------------------------------------------------------------------------------------------------- tasks


def our_draws(fitted: Any, task: ModuleType, x: np.ndarray, draws: int) -> np.ndarray:
    """Draws for each data set in one call, (data set, draw, d)."""
    tree = pf.infer(task.model, method=fitted, draws=draws, key=1, progress=False, x=x)
    return np.asarray(tree["posterior"]["theta"].isel(chain=0).transpose("dataset", "draw", ...))


def score(draws: np.ndarray, exact: np.ndarray) -> list[float]:
    """C2ST of each data set."""
    return [c2st(mine, other).accuracy for mine, other in zip(draws, exact, strict=True)]


def run_task(name: str, given: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """A row of scores and a row of costs."""
    task, n = TASKS[name], given.simulations
    x = task.observations(given.observations)
    exact, again = (np.stack([task.reference(v, given.draws, k + i) for i, v in enumerate(x)]) for k in (100, 200))
    clear()  # tasks of the same shapes would share compiled code
    with clock() as simulating:
        arrays = simulated(task.model, task.DATA, n, key=0)
    arrays = {name: arrays[name] for name in (task.PARAMETER, task.DATA)}
    with clock() as fitting:
        method = pf.AmortizedFlow(simulations=n, sites=task.PARAMETER)
        fitted = method.fit(task.model, observed=(task.DATA,), simulations=arrays, progress=False)
    cpu, wall = simulating.cpu + fitting.cpu, simulating.wall + fitting.wall
    scores = {"task": name, "ours": _spread(score(our_draws(fitted, task, x, given.draws), exact))}
    costs = {"task": name, "ours, CPU s": f"{cpu:.1f}", "ours, wall s": f"{wall:.1f}"}
    print(scores, costs, flush=True)
    if given.peers:
        posterior, spent = trained_peer(prior_of(name), arrays[task.PARAMETER], arrays[task.DATA])
        scores["sbi"] = _spread(score(peer_draws(posterior, x, given.draws), exact))
        costs |= {"sbi, CPU s": f"{spent.cpu:.1f}", "sbi, wall s": f"{spent.wall:.1f}"}
        costs["sbi / ours, CPU"] = f"{spent.cpu / cpu:.1f}"
    scores["two exact samples"] = _spread(score(again, exact))
    scores |= dict(zip((f"published {m}" for m in METHODS), _published(name, n), strict=True))
    scores["published Simformer, 1e5"] = f"{SIMFORMER[name]:.3f}"
    print(scores, costs, flush=True)
    return scores, costs


def _published(name: str, n: int) -> list[str]:
    return [f"{v:.3f}" for v in PUBLISHED[name][n]] if n in PUBLISHED[name] else [""] * len(METHODS)


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}"


# --------------------------------------------------------------------------------------------------- many data sets


def batches(datasets: int = DATASETS, looped: int = LOOPED, draws: int = 1000, peers: bool = True) -> str:
    """The posteriors of many data sets of BOD at once, and the ratio to a loop over the peer's."""
    t = np.asarray(bod.TIMES, np.float32)
    arrays = simulated(bod.model, "y", SIMULATIONS, key=0, t=t)
    y = simulated(bod.model, "y", datasets, key=1, t=t)["y"]
    # The flow that is closest to this posterior (docs/benchmarks.md, "Flows on BOD"), not the class default.
    method = pf.AmortizedFlow(pf.Flow("autoregressive", layers=5, width=50), training=pf.Training(patience=15))
    fitted = method.fit(
        bod.model, t=t, observed=("y",), simulations={k: arrays[k] for k in ("A", "B", "y")}, progress=False
    )
    times = {}
    for call, key in (("first", 0), ("second", 1)):
        with clock() as times[call]:
            tree = pf.infer(bod.model, method=fitted, draws=draws, key=key, progress=False, t=t, y=y)
            tree["posterior"]["A"].to_numpy()
    ours = times["second"].cpu
    rows = [
        _batch_row("ours, first call", datasets, times["first"], 1, ours),
        _batch_row("ours, second call", datasets, times["second"], 1, ours),
    ]
    if peers:
        theta = np.stack([arrays["A"], arrays["B"]], -1)
        posterior, _ = trained_peer(prior_of("bod"), theta, arrays["y"])
        with clock() as loop:
            peer_draws(posterior, y[:looped], draws)
        with clock() as batched:
            _batched_peer(posterior, y[:looped], draws)
        scale = datasets / looped
        rows.append(_batch_row("sbi, loop of posterior.sample", looped, loop, scale, ours))
        rows.append(_batch_row("sbi, posterior.sample_batched", looped, batched, scale, ours))
        good = scale * loop.cpu / ours >= BAR
        print(f"loop at least {BAR} times as long as the batch: {'yes' if good else 'NO'}")
    return _report.table(rows)


def _batched_peer(posterior: Any, y: np.ndarray, draws: int) -> None:
    import torch

    posterior.sample_batched((draws,), x=torch.tensor(y), show_progress_bars=False)


def _batch_row(name: str, datasets: int, spent: Clock, scale: float, ours: float) -> dict[str, str]:
    return {
        "": name,
        "data sets timed": f"{datasets:,}",
        "CPU s, scaled to all": f"{scale * spent.cpu:.2f}",
        "wall s, scaled to all": f"{scale * spent.wall:.2f}",
        "over our second call, CPU": f"{scale * spent.cpu / ours:.1f}",
    }


# ------------------------------------------------------------------------------------------------------------- main


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=SIMULATIONS)
    parser.add_argument("--observations", type=int, default=OBSERVATIONS, help="per task, at most 10")
    parser.add_argument("--draws", type=int, default=DRAWS, help="per observation and side")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=None, help="where sbi is installed")
    parser.add_argument("--batch", action=argparse.BooleanOptionalAction, default=True, help="1000 data sets at once")
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=None, help="into docs/benchmarks.md")
    given = parser.parse_args()
    if given.peers is None:
        given.peers = importlib.util.find_spec("sbi") is not None
    if given.write is None:
        whole = given.tasks == list(TASKS) and given.observations == OBSERVATIONS and given.draws == DRAWS
        given.write = whole and given.batch and given.peers and given.simulations == SIMULATIONS
    return given


def main() -> None:
    """Measure, print and write the tables."""
    given = options()
    warnings.simplefilter("ignore")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flowjax")]
    versions += [f"{p} {importlib.metadata.version(p)}" for p in ("sbi", "torch") if given.peers]
    parts = [
        f"{given.simulations:,} simulations, {given.observations} observations, {given.draws:,} draws each; "
        f"one core, one thread; {', '.join(versions)}."
    ]
    if given.tasks:
        rows = [run_task(name, given) for name in given.tasks]
        parts += ["C2ST, mean and standard deviation over observations:", _report.table([r[0] for r in rows])]
        parts += ["Training:", _report.table([r[1] for r in rows])]
    if given.batch:
        parts += [f"BOD, {DATASETS:,} data sets with 1,000 draws each:", batches(peers=given.peers)]
    text = "\n\n".join(parts)
    print(text)
    if given.write:
        _report.write("simulation-based", text)


if __name__ == "__main__":
    main()
