"""Speed against peers on BOD and eight schools, side by side in one process; imports excluded.

First calls include tracing and compilation, with all caches cleared before each. Next calls have other
data of the same shape. Times are CPU seconds of the whole process (`time.process_time`), medians of
interleaved repeats. ELBO gaps come from Gauss-Hermite quadrature in the problem's own coordinates,
independent of every method's own estimate.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable

import arviz_stats.base
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray  # noqa: F401
from arviz_stats.base import array_stats
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer import NUTS as NumPyroNUTS
from numpyro.infer.autoguide import AutoMultivariateNormal
from scipy.stats import qmc  # noqa: F401

import pushforward as pf
from benchmarks import _report
from pushforward import _runner
from pushforward._runner import Runner
from pushforward.model import _reading
from pushforward.model.inverse import read_problem
from pushforward.problems import bod, eight_schools

FIRST, NEXT, BATCH = 5, 9, 10
NODES = 64


def clear() -> None:
    """Forget everything compiled, ours and JAX's."""
    _runner._compiled.clear()
    _reading._structures.clear()
    jax.clear_caches()
    gc.collect()


def cpu(fn: Callable, *args) -> tuple[float, object]:
    """CPU seconds and result of one call."""
    start = time.process_time()
    result = jax.block_until_ready(fn(*args))
    return time.process_time() - start, result


def measure(runs: dict[str, Callable], batch: dict[str, int] | None = None) -> dict[str, tuple[float, float, object]]:
    """Median CPU seconds of first and of next calls, interleaved, and the result of the last first call."""
    first, following, results = {n: [] for n in runs}, {n: [] for n in runs}, {}
    for _ in range(FIRST):
        for name, run in runs.items():
            clear()
            seconds, results[name] = cpu(run, 0)
            first[name].append(seconds)
    for run in runs.values():
        cpu(run, 0)
    for i in range(NEXT):
        for name, run in runs.items():
            calls = (batch or {}).get(name, 1)
            start = time.process_time()
            for j in range(calls):
                jax.block_until_ready(run(1 + i * calls + j))
            following[name].append((time.process_time() - start) / calls)
    return {n: (statistics.median(first[n]), statistics.median(following[n]), results[n]) for n in runs}


# ------------------------------------------------------------------------------------------- Gaussian VI on BOD


def data(i: int) -> np.ndarray:
    """The tutorial's data, moved a little in each call."""
    return bod.DATA * (1 + 1e-3 * i)


def elbo(log_density: Callable, mean: np.ndarray, root: np.ndarray) -> float:
    """ELBO of N(mean, root root^T) by Gauss-Hermite quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(NODES)
    nodes = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    weights = np.outer(w, w).ravel() / (2 * np.pi)
    values = jax.vmap(log_density)(jnp.asarray(mean + nodes @ root.T, float))
    return float(weights @ np.asarray(values, float)) + np.linalg.slogdet(root)[1] + 1 + np.log(2 * np.pi)


def ours_fit(i: int) -> object:
    """The fit, its evidence and 1000 draws, without the packaging as a DataTree."""
    problem = read_problem(bod.model, (), {"t": bod.TIMES, "y": data(i)})
    return pf.GaussianVI().run(problem, jax.random.key(0), 1000, Runner()).positions


def ours(i: int) -> object:
    """The whole of `pf.infer`: densities of all draws and the DataTree included."""
    tree = pf.infer(bod.model, method="gaussian_vi", progress=False, t=bod.TIMES, y=data(i))
    return tree["posterior"]["A"].to_numpy()


def numpyro_svi(i: int) -> object:
    guide = AutoMultivariateNormal(bod.model)
    svi = SVI(bod.model, guide, optax.adam(1e-2), Trace_ELBO(num_particles=32))
    found = svi.run(jax.random.key(0), 2000, progress_bar=False, t=bod.TIMES, y=data(i))
    return found.params


@jax.jit
def _blackjax(problem: object, key: jax.Array) -> object:
    method = blackjax.fullrank_vi(problem.log_density, optax.adam(1e-2), num_samples=64)
    state = method.init(jnp.zeros(2))

    def step(state: object, key: jax.Array) -> tuple:
        return method.step(key, state)[0], None

    return jax.lax.scan(step, state, jax.random.split(key, 2000))[0]


def blackjax_vi(i: int) -> object:
    problem = read_problem(bod.model, (), {"t": bod.TIMES, "y": data(i)})
    return _blackjax(problem, jax.random.key(0))


def gaussian_vi() -> list[dict[str, str]]:
    """Rows of the table of Gaussian variational inference on BOD."""
    runs = {
        "pushforward GaussianVI, fit and 1000 draws": ours_fit,
        "pushforward infer, whole result": ours,
        "NumPyro SVI, AutoMultivariateNormal": numpyro_svi,
        "BlackJAX fullrank_vi": blackjax_vi,
    }
    quick = {n: BATCH for n in runs if n.startswith("pushforward")}
    found = measure(runs, quick)
    gaps = _gaps(found)
    return [
        {"method": n, "first call, CPU s": f"{a:.2f}", "next call, CPU ms": f"{1e3 * b:.1f}", "ELBO gap, nats": gaps[n]}
        for n, (a, b, _) in found.items()
    ]


def _gaps(found: dict) -> dict[str, str]:
    """Distance of each fit to the optimum ELBO; NumPyro's is in its own logit coordinates."""
    problem = read_problem(bod.model, (), {"t": bod.TIMES, "y": data(0)})
    draws = np.asarray(pf.GaussianVI().run(problem, jax.random.key(0), 400_000, Runner()).positions[0], float)
    ours_gap = bod.FULL_VI_ELBO - elbo(problem.log_density, draws.mean(0), np.linalg.cholesky(np.cov(draws.T)))
    names = list(found)
    params = found[names[2]][2]
    # Unconstrained coordinates of both sites in NumPyro's order, A then B.
    root = np.asarray(params["auto_scale_tril"], float)
    theirs = elbo(lambda u: -problem.potential({"A": u[0], "B": u[1]}), np.asarray(params["auto_loc"], float), root)
    state = found[names[3]][2]
    root = np.asarray(_blackjax_root(state), float)
    third = bod.FULL_VI_ELBO - elbo(problem.log_density, np.asarray(state.mu, float), root)
    numpyro_text = f"ELBO {theirs:.4f} (logit coordinates)"
    return dict(zip(names, [f"{ours_gap:.4f}", f"{ours_gap:.4f}", numpyro_text, f"{third:.4f}"], strict=True))


def _blackjax_root(state: object) -> np.ndarray:
    """Cholesky factor of a fullrank_vi state: log diagonal first, then the strict lower triangle."""
    flat = np.asarray(state.chol_params)
    root = np.diag(np.exp(flat[:2]))
    root[1, 0] = flat[2]
    return root


# ---------------------------------------------------------------------------------------------- NUTS per ESS


def schools(i: int) -> dict[str, np.ndarray]:
    """Eight schools with data moved a little in each call."""
    return {"sigma": np.asarray(eight_schools.SIGMA), "y": eight_schools.DATA + 1e-2 * i}


def least_ess(draws: dict[str, np.ndarray]) -> float:
    """Least bulk effective sample size over all elements."""
    found = []
    for array in draws.values():
        flat = np.asarray(array, float).reshape(*array.shape[:2], -1)
        found += [array_stats.ess(flat[..., k], chain_axis=0, draw_axis=1, method="bulk") for k in range(flat.shape[2])]
    return float(np.min(found))


def nuts_ours(i: int) -> dict[str, np.ndarray]:
    method = pf.NUTS(target_acceptance=0.9)
    tree = pf.infer(eight_schools.non_centred, method=method, progress=False, key=i, **schools(i))
    return {n: tree["posterior"][n].to_numpy() for n in ("mu", "tau")}


def nuts_numpyro(i: int) -> dict[str, np.ndarray]:
    mcmc = MCMC(
        NumPyroNUTS(eight_schools.non_centred, target_accept_prob=0.9),
        num_warmup=1000, num_samples=1000, num_chains=4, chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(i), **schools(i))
    found = mcmc.get_samples(group_by_chain=True)
    return {n: np.asarray(found[n]) for n in ("mu", "tau")}


def nuts() -> list[dict[str, str]]:
    """Rows of the table of NUTS, same model, settings and number of draws."""
    runs = {
        "pushforward NUTS, whole result": nuts_ours,
        "NumPyro MCMC(NUTS), new object": nuts_numpyro,
    }
    found = measure(runs)
    rows = []
    for name, (first, following, _) in found.items():
        ess = statistics.median(least_ess(runs[name](i)) for i in range(5))
        rows.append(
            {
                "method": name,
                "first call, CPU s": f"{first:.2f}",
                "next call, CPU s": f"{following:.2f}",
                "least ESS (median of 5 keys)": f"{ess:.0f}",
                "CPU ms per effective draw, next call": f"{1e3 * following / ess:.3f}",
            }
        )
    return rows


def main() -> None:
    """Measure, print and write the tables."""
    warnings.simplefilter("ignore")
    assert arviz_stats.base is not None
    jax.block_until_ready(jax.jit(jnp.sin)(1.0))
    parts = ["### Gaussian variational inference, BOD\n", _report.table(gaussian_vi())]
    parts += ["", "### NUTS, eight schools non-centred, 4 chains, 1000 + 1000 draws\n", _report.table(nuts())]
    text = "\n".join(parts)
    print(text)
    _report.write("speed", text)


if __name__ == "__main__":
    main()
