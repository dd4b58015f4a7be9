"""Parameters of state-space models: NUTS over a state method against NUTS on the joint density and exact numbers.

Two results agree where their means differ by less than 4 standard errors, each from ArviZ's effective sample size. The
bias of an approximate likelihood (extended Kalman on Lorenz-63) is tabled, not judged.
"""

import time
import warnings
from typing import Any

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

import pushforward as pf
from benchmarks import _report
from pushforward.problems import local_linear, lorenz63, nile


def trend(y: Any = None, steps: int | None = None) -> None:
    """Local linear trend (Harvey 1989, section 2.3): level and slope walk, all three standard deviations unknown."""
    sd = numpyro.sample("sd", dist.HalfNormal(np.array([100.0, 10.0, 200.0])).to_event(1))
    start = numpyro.sample("start", dist.Normal(np.array([1000.0, 0.0]), np.array([500.0, 20.0])).to_event(1))

    def step(carry: Any, y: Any) -> Any:
        level = numpyro.sample("level", dist.Normal(carry[0] + carry[1], sd[0]))
        slope = numpyro.sample("slope", dist.Normal(carry[1], sd[1]))
        numpyro.sample("y", dist.Normal(level, sd[2]), obs=y)
        return (level, slope), None

    scan(step, (start[0], start[1]), y, length=steps)


REFERENCE = {"Lorenz-63, rho": "numpyro"}
"""Coordinates of the reference where z does not mix: a chaotic trajectory follows its noise in z too sensitively."""


def cases() -> dict[str, tuple[Any, dict[str, Any], list[str], dict[str, Any]]]:
    """Name -> model, its data, its parameters, and the state methods to run under NUTS."""
    _, y = lorenz63.simulate(jax.random.key(5), 60, substeps=5, model_noise=0.2)
    approximate = {"Extended": pf.Kalman(pf.Extended()), "Unscented": pf.Kalman(pf.Unscented())}
    exact = {"Kalman": pf.Kalman()}
    return {
        "local_linear": (local_linear.model, {"y": local_linear.DATA}, ["u"], exact),
        "Nile, local linear trend": (trend, {"y": nile.DATA}, ["sd"], exact),
        "Lorenz-63, rho": (lorenz63.model_rho, {"y": np.asarray(y)}, ["rho"], approximate),
    }


def moments(tree: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and standard error of the mean of a parameter's entries."""
    draws = tree["posterior"][name]
    size = np.atleast_1d(az.ess(tree["posterior"].to_dataset()[[name]])[name].to_numpy())
    mean, sd = (np.atleast_1d(f(("chain", "draw")).to_numpy()) for f in (draws.mean, draws.std))
    return mean, sd, sd / np.sqrt(size)


def compared(case: str, draws: int = 1000) -> list[dict[str, str]]:
    """Rows of one model: each state method against NUTS on the joint density."""
    model, data, names, methods = cases()[case]
    options = {"draws": draws, "progress": False, **data}
    reference = pf.NUTS(coordinates=REFERENCE.get(case, "z"), target_acceptance=0.99)
    runs = {"joint density": pf.infer(model, method=reference, **options)}
    for label, states in methods.items():
        runs[label] = pf.infer(model, method=pf.NUTS(target_acceptance=0.95), states=states, **options)
    rows = []
    for name in names:
        mean, sd, error = moments(runs["joint density"], name)
        for label, tree in runs.items():
            own, spread, own_error = moments(tree, name)
            z = (own - mean) / np.sqrt(error**2 + own_error**2)
            rows += [
                {
                    "model": case,
                    "likelihood": label,
                    "parameter": name if len(mean) == 1 else f"{name}[{i}]",
                    "mean": f"{own[i]:.4g}",
                    "sd": f"{spread[i]:.3g}",
                    "standard error": f"{own_error[i]:.2g}",
                    "difference, in standard errors": f"{z[i]:.2f}" if label != "joint density" else "",
                    "difference, in sd": f"{(own[i] - mean[i]) / sd[i]:.3f}" if label != "joint density" else "",
                }
                for i in range(len(mean))
            ]
    return rows


def main() -> None:
    """Run all models, print and write the table."""
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    rows = []
    for case in cases():
        rows += compared(case)
        print(_report.table(rows), f"\n{time.perf_counter() - start:.0f} s so far\n", flush=True)
    exact = f"Exact for local_linear, by quadrature: mean {local_linear.MEAN_U:.4f}, sd {local_linear.SD_U:.4f}."
    _report.write("state parameters", f"{_report.table(rows)}\n\n{exact}")


if __name__ == "__main__":
    main()
