"""Learned dynamics: Lorenz-63 parameters by four ways over ten data sets, and a learned closure of Lorenz-96.

Lorenz-63: 120 observations of all variables, 0.05 apart, noise of standard deviation 1, model noise 0.2 per step;
sigma, rho and beta start 20 % off. The table counts how often the truth lies within one and two standard errors.

Lorenz-96 (16 variables, F = 16): the truth has the extra damping 0.5 x_i + 0.02 x_i^2 (about the size of Wilks's 2005
closure), which the model lacks. A network from x_i to one number, shared by all i, is learned from noisy observations
(standard deviation 1, every 0.05, all variables). Forecasts start from true states that no training has seen.
"""

import sys
import time
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

import pushforward as pf
from benchmarks import _report
from pushforward.problems import lorenz63, lorenz96

TRUTH = {"sigma": 10.0, "rho": 28.0, "beta": 8.0 / 3.0}
CYCLES, SUBSTEPS, SUBSTEP = 120, 5, 0.01
OBSERVED, MODEL_NOISE = 1.0, 0.2


def _slope(x: Any, sigma: Any, rho: Any, beta: Any) -> Any:
    return jnp.stack([sigma * (x[1] - x[0]), x[0] * (rho - x[2]) - x[1], x[0] * x[1] - beta * x[2]])


def _runge_kutta(slope: Any, x: Any, length: float) -> Any:
    k1 = slope(x)
    k2 = slope(x + 0.5 * length * k1)
    k3 = slope(x + 0.5 * length * k2)
    return x + length / 6 * (k1 + 2 * (k2 + k3) + slope(x + length * k3))


def model63(y: Any) -> None:
    """Lorenz-63 with three unknown parameters."""
    sigma = numpyro.sample("sigma", dist.LogNormal(np.log(8.0), 0.3))
    rho = numpyro.sample("rho", dist.LogNormal(np.log(24.0), 0.3))
    beta = numpyro.sample("beta", dist.LogNormal(np.log(2.1), 0.3))

    def cycle(x: Any, y: Any) -> Any:
        def one(_: int, x: Any) -> Any:
            return _runge_kutta(lambda v: _slope(v, sigma, rho, beta), x, SUBSTEP)

        mean = jax.lax.fori_loop(0, SUBSTEPS, one, x)
        x = numpyro.sample("x", dist.Normal(mean, MODEL_NOISE).to_event(1))
        numpyro.sample("y", dist.Normal(x, OBSERVED).to_event(1), obs=y)
        return x, None

    scan(cycle, numpyro.sample("x0", lorenz63.start()), y)


def parameters(sets: int, nuts: bool = True) -> list[dict[str, str]]:
    """Rows by way and parameter: bias, spread, mean standard error and coverage over the data sets."""
    states = pf.EnKF(members=40)
    ways = {
        "AD-EnKF, 40 members": lambda y: _learned(y, states, pf.Likelihood(steps=150)),
        "EM, extended Kalman smoother": lambda y: _learned(y, pf.Kalman("extended"), pf.EM(steps=60)),
        "Monte Carlo EM, EnKS of 40 members": lambda y: _learned(y, states, pf.EM(steps=40)),
        "NUTS + EnKF": lambda y: _sampled(y, states),
    }
    if not nuts:
        del ways["NUTS + EnKF"]
    data = [
        lorenz63.simulate(jax.random.key(100 + i), CYCLES, substeps=SUBSTEPS, noise=OBSERVED, model_noise=MODEL_NOISE)[
            1
        ]
        for i in range(sets)
    ]
    rows = []
    for name, way in ways.items():
        start = time.process_time()
        found = [way(np.asarray(y)) for y in data]
        seconds = (time.process_time() - start) / sets
        for site, true in TRUTH.items():
            means, errors = (np.array([f[i][site] for f in found], float) for i in (0, 1))
            z = np.abs(means - true) / errors
            rows.append(
                {
                    "way": name,
                    "parameter": site,
                    "truth": f"{true:.3f}",
                    "mean estimate": f"{means.mean():.3f}",
                    "sd over data sets": f"{means.std(ddof=1):.3f}",
                    "mean standard error": f"{errors.mean():.3f}",
                    "within 1 s.e.": f"{np.mean(z < 1):.1f}",
                    "within 2 s.e.": f"{np.mean(z < 2):.1f}",
                    "largest z": f"{z.max():.1f}",
                    "CPU s per data set": f"{seconds:.1f}",
                }
            )
        print(_report.table(rows[-3:]), flush=True)
    return rows


def _learned(y: Any, states: Any, method: Any) -> tuple[dict, dict]:
    found = pf.learn(model63, states=states, method=method, y=y, progress=False)
    return found.estimates, found.standard_errors or dict.fromkeys(TRUTH, np.nan)


def _sampled(y: Any, states: Any) -> tuple[dict, dict]:
    # In "z" the chain starts within two standard deviations of the prior; a start far away stays in other modes.
    method = pf.NUTS(chains=1, warmup=150, coordinates="z")
    tree = pf.infer(model63, method=method, states=states, y=y, draws=150, progress=False)
    draws = {n: tree["posterior"][n].to_numpy() for n in TRUTH}
    return {n: v.mean() for n, v in draws.items()}, {n: v.std() for n, v in draws.items()}


# ------------------------------------------------------------------------------------------------ learned closure

SIZE, FORCING, STEP, STEPS = 16, 16.0, 0.05, 400


def missing(x: Any) -> Any:
    """The damping that the model lacks."""
    return -0.5 * x - 0.02 * x**2


def resolved(x: Any, term: Any) -> Any:
    """One step of 0.05: Lorenz-96 with an additional term of the tendency."""
    return _runge_kutta(lambda v: lorenz96.derivative(v, FORCING) + term(v), x, STEP)


def network(key: Any) -> Any:
    """From x_i / 5 to one number; it starts near zero."""
    made = eqx.nn.MLP(1, 1, 16, 1, activation=jnp.tanh, key=key)
    return eqx.tree_at(lambda m: m.layers[-1].weight, made, 0.01 * made.layers[-1].weight)


def term_of(net: Any) -> Any:
    """A network as a term of the tendency, the same at every place of the ring."""
    return lambda x: jax.vmap(lambda v: net(v[None] / 5.0)[0])(x)


def closure(y: Any) -> None:
    """Lorenz-96 with a learned term and learned model noise."""
    net = numpyro.param("net", network)
    sd = numpyro.param("sd", 0.5, constraint=dist.constraints.positive)

    def cycle(x: Any, y: Any) -> Any:
        x = numpyro.sample("x", dist.Normal(resolved(x, term_of(net)), sd).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        return x, None

    scan(cycle, numpyro.sample("x0", dist.Normal(3.0 * jnp.ones(SIZE), 4.0).to_event(1)), y)


def closure_known_noise(y: Any) -> None:
    """The same with its model noise fixed, as `pf.Increments` needs."""
    net = numpyro.param("net", network)

    def cycle(x: Any, y: Any) -> Any:
        x = numpyro.sample("x", dist.Normal(resolved(x, term_of(net)), 0.3).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        return x, None

    scan(cycle, numpyro.sample("x0", dist.Normal(3.0 * jnp.ones(SIZE), 4.0).to_event(1)), y)


def truth96(key: Any, steps: int) -> Any:
    """A true trajectory after its spin-up, (steps, SIZE)."""
    start = 2.0 + jax.random.normal(key, (SIZE,))
    return jax.lax.scan(lambda x, _: (resolved(x, missing), x), start, None, length=steps + 400)[1][400:]


def lead_errors(term: Any, starts: Any, leads: tuple[int, ...]) -> list[float]:
    """Root mean square error of forecasts over all starts, after each number of steps."""

    def run(x: Any, t: Any) -> Any:
        return jax.lax.scan(lambda v, _: (resolved(v, t),) * 2, x, None, length=max(leads))[1]

    found = jax.vmap(lambda x: run(x, term))(starts) - jax.vmap(lambda x: run(x, missing))(starts)
    rms = jnp.sqrt(jnp.mean(found**2, (0, 2)))
    return [float(rms[lead - 1]) for lead in leads]


def closures() -> list[dict[str, str]]:
    """Rows by way of learning: forecast errors at one step, at a fifth of a time unit, and at one time unit."""
    path = truth96(jax.random.key(1), STEPS)
    y = np.asarray(path + jax.random.normal(jax.random.key(2), path.shape))
    starts = truth96(jax.random.key(3), 4000)[::20]
    leads = (1, 4, 20)
    print(f"spread of the truth {float(jnp.std(starts)):.2f}", flush=True)
    raw = lead_errors(lambda x: 0.0 * x, starts, leads)
    states = pf.EnKF(members=30)
    ways = {
        "AD-EnKF (Adam, 150 steps)": (closure, pf.Likelihood(steps=150, learning_rate=0.03)),
        "Monte Carlo EM (10 rounds)": (closure, pf.EM(steps=10, draws=30)),
        "increments (5 rounds)": (closure_known_noise, pf.Increments(steps=5)),
    }
    rows = []
    for name, (model, method) in ways.items():
        start = time.process_time()
        found = pf.learn(model, states=states, method=method, y=y, progress=False, throw=False)
        errors = lead_errors(term_of(found.estimates["net"]), starts, leads)
        row = {"way": name, "CPU s": f"{time.process_time() - start:.0f}", "outcome": found.outcome.name.lower()}
        for lead, before, after in zip(leads, raw, errors, strict=True):
            row[f"lead {lead * STEP:g}: model, learned, ratio"] = f"{before:.3f}, {after:.3f}, {before / after:.1f}"
        row["log likelihood, first and last"] = f"{found.log_likelihood[0]:.0f}, {found.log_likelihood[-1]:.0f}"
        row["model noise"] = f"{float(found.estimates.get('sd', np.nan)):.3f}"
        rows.append(row)
        print(_report.table(rows[-1:]), flush=True)
    return rows


def main() -> None:
    """Run what is named on the command line ("parameters", "closure"; both by default) and print tables."""
    warnings.simplefilter("ignore")
    asked = sys.argv[1:] or ["parameters", "closure"]
    if "parameters" in asked:
        _report.write("learned parameters", _report.table(parameters(10)))
    if "closure" in asked:
        _report.write("learned closure", _report.table(closures()))


if __name__ == "__main__":
    main()
