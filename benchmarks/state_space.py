"""Speed of the state-space methods against peers, side by side in one process, in float64 on one core.

Log likelihoods of linear-Gaussian programs against dynamax; cycles of Lorenz-96 against plain `lax.scan`s
(`benchmarks._plain`) and DAPPER; many parameter values at once; memory. `make bench` runs it in an environment of its
own that has the peers. Times are CPU seconds of the process, medians of interleaved repeats.
"""

import contextlib
import importlib.metadata
import io
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pushforward as pf
from benchmarks import _linear, _plain, _report
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import StateSpace, read_state_space
from pushforward.problems import lorenz96

REPEATS, CYCLES, RHO = 9, 1000, 0.95
SIZES = ((4, 2, 10_000), (40, 10, 1_000))


def read(model: Callable, **data: Any) -> StateSpace:
    """The model as `pf.infer` reads it."""
    return read_state_space(read_problem(model, (), data))


def interleaved(runs: dict[str, Callable[[int], Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """CPU seconds of first calls, and medians of later ones."""
    first, later = {}, {name: [] for name in runs}
    for name, run in runs.items():
        start = time.process_time()
        jax.block_until_ready(run(0))
        first[name] = time.process_time() - start
    for i in range(REPEATS):
        for name, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run(i))
            later[name].append(time.process_time() - start)
    return first, {name: statistics.median(v) for name, v in later.items()}


# ------------------------------------------------------------------------------------------------ Kalman filters


def likelihood(rho: jax.Array, space: StateSpace, steady: bool = False) -> jax.Array:
    return pf.Kalman().log_likelihood(space.chain({"rho": rho}), steady=steady)


def linear_space(model: Callable, n: int, m: int, length: int) -> tuple[StateSpace, dict[str, jax.Array]]:
    data = _linear.system(n, m, length)
    used = data if model is _linear.varying else {k: data[k] for k in ("A", "H", "y")}
    return read(model, **used), {k: jnp.asarray(v) for k, v in data.items()}


def kalman() -> list[dict[str, str]]:
    """Log likelihoods and gradients, ours over dynamax's."""
    rows = []
    for model in (_linear.constant, _linear.varying):
        for n, m, length in SIZES:
            space, data = linear_space(model, n, m, length)
            theirs = partial(_linear.dynamax_log_likelihood, time_varying=model is _linear.varying)
            kinds = {"ours": (likelihood, space), "dynamax": (theirs, data)}
            if model is _linear.constant:
                kinds["steady"] = (partial(likelihood, steady=True), space)
            warm(kinds)
            for what, transform in (("log likelihood", lambda f: f), ("gradient", jax.value_and_grad)):
                rows.append({"model": f"{model.__name__}, n = {n}, T = {length:,}", "what": what})
                rows[-1] |= _kalman_row({k: (jax.jit(transform(f)), d) for k, (f, d) in kinds.items()})
    return rows


def warm(kinds: dict[str, tuple[Callable, Any]]) -> None:
    """Reading a program's data flow, and imports, once for a model, are no part of compiling; values must agree."""
    values = [float(jax.jit(f)(RHO, d)) for f, d in kinds.values()]
    np.testing.assert_allclose(values, values[0], rtol=1e-8)
    jax.clear_caches()


def _kalman_row(runs: dict[str, tuple[Callable, Any]]) -> dict[str, str]:
    first, later = interleaved({k: (lambda i, f=f, d=d: f(RHO - 1e-3 * i, d)) for k, (f, d) in runs.items()})
    names = [k for k in runs if k != "dynamax"]
    return {
        "dynamax, ms": f"{1e3 * later['dynamax']:.1f}",
        "ours (steady), ms": " ".join(_bracket(k, f"{1e3 * later[k]:.1f}") for k in names),
        "ours / dynamax": " ".join(_bracket(k, f"{later[k] / later['dynamax']:.2f}") for k in names),
        "first calls, s": f"{first['dynamax']:.1f}; " + " ".join(_bracket(k, f"{first[k]:.1f}") for k in names),
    }


def _bracket(kind: str, text: str) -> str:
    return f"({text})" if kind == "steady" else text


# --------------------------------------------------------------------------------------------------- Lorenz-96

OURS = {
    "denkf": pf.EnKF(40, pf.DEnKF(), inflation=pf.Multiplicative(1.01)),
    "perturbed": pf.EnKF(40, pf.Perturbed("rescaled"), inflation=pf.Multiplicative(1.06)),
    "etkf": pf.EnKF(24, pf.ETKF(), inflation=pf.Multiplicative(1.02), rotate=True),
    "letkf": pf.EnKF(7, "letkf", inflation=pf.Multiplicative(1.04), rotate=True),
}
NAMES = {
    "denkf": "DEnKF, N = 40, inflation 1.01",
    "perturbed": "perturbed, N = 40, inflation 1.06",
    "etkf": "ETKF, N = 24, inflation 1.02, rotated",
    "letkf": "LETKF, N = 7, inflation 1.04, rotated, radius 4",
}


def dapper_cycles() -> dict[str, float]:
    """DAPPER's cycles per CPU second, its diagnostics reduced to errors; empty where it is not installed."""
    try:
        import dapper as dpr
        import dapper.da_methods as da
        from dapper.mods.Lorenz96.sakov2008 import HMM
    except ImportError:
        return {}
    dpr.rc.comps.error_only = True
    HMM.tseq.Ko = CYCLES
    methods = {
        "denkf": da.EnKF("DEnKF", N=40, infl=1.01),
        "perturbed": da.EnKF("PertObs", N=40, infl=1.06),
        "etkf": da.EnKF("Sqrt", N=24, infl=1.02, rot=True),
        "letkf": da.LETKF(N=7, rot=True, infl=1.04, loc_rad=4),
    }
    found: dict[str, list[float]] = {name: [] for name in methods}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        truth, data = HMM.simulate()
        for _ in range(3):
            for name, method in methods.items():
                start = time.process_time()
                method.assimilate(HMM, truth, data, liveplots=False)
                found[name].append(len(data) / (time.process_time() - start))
    return {name: statistics.median(v) for name, v in found.items()}


def ensembles() -> list[dict[str, str]]:
    """Cycles per CPU second and scores; both sides return means and deviations of all cycles."""
    truth, y = lorenz96.simulate(jax.random.key(3000), CYCLES)
    space, theirs = read(lorenz96.model, y=np.asarray(y)), dapper_cycles()
    plain = {
        "denkf": _plain.run(_plain.denkf, 40, 1.01),
        "perturbed": _plain.run(_plain.perturbed, 40, 1.06),
        "etkf": _plain.run(_plain.etkf, 24, 1.02),
        "letkf": _plain.run(_plain.local(4.0), 7, 1.04),
    }
    rows = []
    for name, method in OURS.items():

        def run(space: StateSpace, key: jax.Array, method: pf.EnKF = method, store: str = "moments") -> Any:
            return method.trajectories(space.chain(), key, method.members, store)

        moments, draws = jax.jit(run), jax.jit(partial(run, store="draws"))
        runs = {
            "moments": lambda i, f=moments: f(space, jax.random.key(i)),
            "draws": lambda i, f=draws: f(space, jax.random.key(i)),
            "plain": lambda i, f=plain[name]: f(y, jax.random.key(i)),
        }
        _, later = interleaved(runs)
        speed = {k: CYCLES / v for k, v in later.items()}
        means = {"moments": runs["moments"](0).filtering["x"][0], "plain": runs["plain"](0)[0]}
        scores = {k: f"{_rmse(v, truth):.3f}" for k, v in means.items()}
        dapper = theirs.get(name)
        rows.append(
            {
                "filter": NAMES[name],
                "ours, moments": f"{speed['moments']:,.0f}",
                "plain scan": f"{speed['plain']:,.0f}",
                "DAPPER": f"{dapper:,.0f}" if dapper else "not installed",
                "ours / plain": f"{speed['moments'] / speed['plain']:.2f}",
                "ours / DAPPER": f"{speed['moments'] / dapper:.0f}" if dapper else "",
                "ours, smoothing draws": f"{speed['draws']:,.0f}",
                "rmse ours, plain": f"{scores['moments']}, {scores['plain']}",
            }
        )
    return rows


def _rmse(means: jax.Array, truth: jax.Array) -> float:
    return float(jnp.mean(jnp.sqrt(jnp.mean((means - truth) ** 2, 1))[lorenz96.BURN_IN :]))


# ----------------------------------------------------------------------------------------- batches and memory


def batch() -> str:
    """64 parameter values in one call."""
    space, _ = linear_space(_linear.constant, 4, 2, 1000)
    values = jnp.linspace(0.5, 0.95, 64)
    one, many = jax.jit(likelihood), jax.jit(jax.vmap(likelihood, (0, None)))
    _, later = interleaved({"loop": lambda i: [one(v, space) for v in values], "vmap": lambda i: many(values, space)})
    gain = later["loop"] / later["vmap"]
    return f"64 parameter values under vmap, n = 4, T = 1,000: {gain:.1f} times the speed of 64 calls."


def temporary(fn: Callable, space: StateSpace) -> int:
    """Bytes that a compiled call needs beside arguments and results."""
    found = jax.jit(fn).lower(jnp.asarray(RHO), space).compile().memory_analysis()
    return found.temp_size_in_bytes


def memory() -> list[dict[str, str]]:
    """Temporary memory at two lengths."""

    def forced(length: int) -> StateSpace:
        return read(lorenz96.model_forcing, y=np.zeros((length, lorenz96.SIZE)))

    def linear(length: int) -> StateSpace:
        return linear_space(_linear.varying, 4, 2, length)[0]

    cases = {
        "EnKF, N = 40, Lorenz-96": (pf.EnKF(40), "F", forced),
        "Kalman, extended, n = 4": (pf.Kalman("extended"), "rho", linear),
    }
    rows = []
    for name, (method, parameter, make) in cases.items():

        def moments(v: jax.Array, space: StateSpace, method: Any = method, parameter: str = parameter) -> Any:
            return method.trajectories(space.chain({parameter: v}), jax.random.key(0), 10, "moments")

        def slope(v: jax.Array, space: StateSpace, method: Any = method, parameter: str = parameter) -> jax.Array:
            return jax.grad(lambda u: method.log_likelihood(space.chain({parameter: u}), jax.random.key(0)))(v)

        for what, fn, lengths in (("moments", moments, (1_000, 10_000)), ("gradient", slope, (1_000, 16_000))):
            found = []
            for length in lengths:
                space = make(length)
                results = jax.eval_shape(fn, jnp.asarray(RHO), space)
                size = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(results) if hasattr(v.dtype, "itemsize"))
                # The results' axes are put in order at the end, in a copy of them.
                found.append(temporary(fn, space) - (size if what == "moments" else 0))
            sizes = " / ".join(f"{max(v, 0) / 1024:,.0f}" for v in found)
            rows.append({"call": f"{name}, {what}", "T": " / ".join(f"{v:,}" for v in lengths), "KiB": sizes})
    return rows


def main() -> None:
    """Measure, print and write the tables."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "numpyro", "dynamax", "dapper"))
    parts = [f"float64, one core, one thread; {versions}.", "", "### Kalman filters read from a NumPyro program\n"]
    parts += [_report.table(kalman()), "", batch(), "", "### Lorenz-96, cycles per CPU second\n"]
    parts += [_report.table(ensembles()), "", "### Temporary memory\n", _report.table(memory())]
    text = "\n".join(parts)
    print(text)
    _report.write("state-space speed", text)


if __name__ == "__main__":
    main()
