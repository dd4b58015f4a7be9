"""Speed of the bootstrap filter against peers, side by side in one process: stochastic volatility, float64, one core.

Model and data of `pushforward.problems.stochastic_volatility`; all resample systematically below half the effective
sample size. Times are CPU milliseconds of the process after compilation, medians of interleaved repeats.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import pushforward as pf
from benchmarks import _report
from benchmarks.state_space import interleaved
from pushforward.model.inverse import read_problem
from pushforward.model.state_space import read_state_space
from pushforward.problems import stochastic_volatility as sv

MU, RHO, SIGMA = sv.MU, sv.RHO, sv.SIGMA
SD0 = SIGMA / (1 - RHO**2) ** 0.5
PARTICLES = 10_000


def ours(y: np.ndarray, particles: int = PARTICLES) -> Callable[[int], Any]:
    """Log evidence through the reader."""
    space = read_state_space(read_problem(sv.model, (), {"y": y}))
    method = pf.ParticleFilter(particles)
    run = jax.jit(lambda s, key: method.log_likelihood(s.chain(), key))
    return lambda i: run(space, jax.random.key(i))


def plain(y: np.ndarray, particles: int = PARTICLES) -> Callable[[int], Any]:
    """The same filter as a plain `lax.scan`, written as one would without a library."""
    n = particles

    def systematic(key: jax.Array, weights: jax.Array) -> jax.Array:
        grid = (jnp.arange(n) + jax.random.uniform(key)) / n
        return jnp.clip(jnp.searchsorted(jnp.cumsum(weights), grid), 0, n - 1)

    def step(carry: tuple, item: tuple) -> tuple[tuple, None]:
        x, log_weights, total = carry
        y, key = item
        first, second = jax.random.split(key)
        weights = jnp.exp(log_weights)

        def resample() -> tuple[jax.Array, jax.Array]:
            return x[systematic(first, weights)], jnp.full(n, -jnp.log(n))

        x, log_weights = jax.lax.cond(1 / jnp.sum(weights**2) < n / 2, resample, lambda: (x, log_weights))
        x = MU + RHO * (x - MU) + SIGMA * jax.random.normal(second, (n,))
        log_weights = log_weights + dist.Normal(0.0, jnp.exp(x / 2)).log_prob(y)
        increment = jax.scipy.special.logsumexp(log_weights)
        return (x, log_weights - increment, total + increment), None

    @jax.jit
    def run(y: jax.Array, key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        x = MU + SD0 * jax.random.normal(first, (n,))
        keys = jax.random.split(second, y.shape[0])
        return jax.lax.scan(step, (x, jnp.full(n, -jnp.log(n)), 0.0), (y, keys))[0][2]

    data = jnp.asarray(y)
    return lambda i: run(data, jax.random.key(i))


def cuthbert(y: np.ndarray, particles: int = PARTICLES) -> Callable[[int], Any]:
    """cuthbert's particle filter."""
    from cuthbert import filter as run_filter
    from cuthbert.smc import particle_filter
    from cuthbertlib.resampling import systematic
    from cuthbertlib.resampling.adaptive import ess_decorator

    def log_potential(before: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return dist.Normal(0.0, jnp.exp(x / 2)).log_prob(y)

    built = particle_filter.build_filter(
        lambda key: MU + SD0 * jax.random.normal(key),
        lambda key, x, y: MU + RHO * (x - MU) + SIGMA * jax.random.normal(key),
        log_potential,
        particles,
        ess_decorator(systematic.resampling, 0.5),
    )
    data = jnp.asarray(y)

    @jax.jit
    def run(y: jax.Array, key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        return run_filter(built, y, built.init_prepare(key=first), key=second).log_normalizing_constant[-1]

    return lambda i: run(data, jax.random.key(i))


def particles_library(y: np.ndarray, particles: int = PARTICLES) -> Callable[[int], Any]:
    """The library `particles`, in NumPy."""
    import particles as library
    from particles import state_space_models as models

    # Its stochastic volatility observes x_0, which is stationary: the same law of the data.
    found = models.Bootstrap(ssm=models.StochVol(mu=MU, rho=RHO, sigma=SIGMA), data=y)

    def run(i: int) -> float:
        np.random.seed(i)  # noqa: NPY002 (the library draws from numpy's global state)
        filtered = library.SMC(fk=found, N=particles, resampling="systematic", ESSrmin=0.5)
        filtered.run()
        return filtered.logLt

    return run


def many(y: np.ndarray, values: int = 16, particles: int = 1000) -> dict[str, str]:
    """Several parameter values at once against a loop over them."""
    space = read_state_space(read_problem(sv.model_parameters_centred, (), {"y": y}))
    method = pf.ParticleFilter(particles)
    z = {"mu": jnp.linspace(-1.5, -0.5, values), "logit_rho": jnp.full(values, 2.9), "spread": jnp.full(values, 0.9)}

    def one(space: Any, value: Any, key: jax.Array) -> jax.Array:
        return method.log_likelihood(space.chain(value), key)

    keys = jax.random.split(jax.random.key(0), values)
    together = jax.jit(jax.vmap(one, (None, 0, 0)))
    alone = jax.jit(one)

    parts = [(jax.tree.map(lambda v, j=j: v[j], z), keys[j]) for j in range(values)]
    _, cpu = interleaved(
        {
            "vmap": lambda i: together(space, z, keys),
            "loop": lambda i: [alone(space, value, key) for value, key in parts],
        }
    )
    return {
        "particles": f"{particles:,}",
        "loop, CPU ms": f"{1e3 * cpu['loop']:.1f}",
        "vmap, CPU ms": f"{1e3 * cpu['vmap']:.1f}",
        "loop / vmap": f"{cpu['loop'] / cpu['vmap']:.2f}",
    }


def main() -> None:
    """Print the tables and write them."""
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    _, y = sv.simulate()
    makers = {"ours": ours, "plain scan": plain}
    makers |= {"cuthbert": cuthbert} if importlib.util.find_spec("cuthbert") else {}
    makers |= {"particles": particles_library} if importlib.util.find_spec("particles") else {}
    runs = {name: make(y) for name, make in makers.items()}
    values = {name: [float(run(i)) for i in range(5)] for name, run in runs.items()}
    first, later = interleaved(runs)
    rows = [
        {
            "filter": name,
            "CPU ms": f"{1e3 * later[name]:.0f}",
            "ours / it": f"{later['ours'] / later[name]:.2f}",
            "first call after tracing, s": f"{first[name]:.1f}",
            "log evidence, 5 runs": f"{np.mean(v):.2f} ± {np.std(v, ddof=1):.2f}",
        }
        for name, v in values.items()
    ]
    text = _report.table(rows)
    sweep = [many(y, particles=n) for n in (20, 100, 1000)]
    text += f"\n\nExact log evidence {sv.LOG_EVIDENCE}. 16 parameter values, T = 1000:\n\n{_report.table(sweep)}"
    print(text)
    _report.write("particles", text)


if __name__ == "__main__":
    main()
