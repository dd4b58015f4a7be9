"""What `pf.ScoreTrajectory` costs: draws by length of the trajectory, and a step of training against a bare one.

    taskset -c 1 python -m benchmarks.score_cost    # both tables, 10 minutes of one core

Draws are of Lorenz's system of 1963, `DRAWS` at once, by Heun's method in `STEPS` steps, one coordinate observed in
every 8th state; weights are random, since the cost does not depend on them. Times are of the CPU, the least of three
calls of the compiled program. Memory is what the compiler sets aside besides arguments and results. The last column is
the slope between the two longest, log time and log megabytes by log states: 1 is linear.

The bare step of training is the network as an Equinox module with its own tree of weights, the same loss, gradient,
AdamW with clipping and the same schedule, from Optax, in one `lax.scan`; no running mean of weights, no guard against
steps that are not finite, no judgement on held-out windows. Ours has them all. CPU times, interleaved, the least of
three.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pushforward as pf
from benchmarks import _report
from pushforward.learned import score_training
from pushforward.learned.score_model import ScoreModel, ScoreShape, covariance
from pushforward.math.diffusion import preconditioning
from pushforward.methods._score_sampling import sample
from pushforward.model.inverse import read_problem
from pushforward.model.series import read_series
from pushforward.problems import kolmogorov
from pushforward.problems import lorenz63_trajectory as lorenz

LENGTHS = (65, 125, 250, 500, 1000)
DRAWS, STEPS, REPEATS = 8, 16, 3
BAR = 1.2
DRAWN = {
    "U-Net of the whole, gamma": (pf.TemporalUNet(), 0, pf.GammaGuidance()),
    "MLP, windows of 5, gamma": (pf.WindowMLP(), 5, pf.GammaGuidance()),
    "MLP, windows of 5, surrogate": (pf.WindowMLP(), 5, pf.SurrogateGuidance()),
}
TRAINED = {
    "MLP, windows of 5, batch 128": (pf.WindowMLP(), lorenz, 5, 128, 400),
    "U-Net of 65 states, batch 64": (pf.TemporalUNet(), lorenz, 65, 64, 60),
    "U-Net of 5 fields 32 x 32, batch 8": (pf.FieldUNet(channels=(16, 32)), kolmogorov, 5, 8, 20),
}


def least(run: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of some calls, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        jax.block_until_ready(run())
        times.append(time.process_time() - start)
    return min(times)


# ---------------------------------------------------------------------------------------------------------- draws


def prior(network: Any, length: int, windowed: bool, data: jax.Array) -> ScoreModel:
    """A prior with random weights, and scales and covariance of standardised data."""
    shape = ScoreShape(network, (length, 3), 0, windowed)
    weights, none = shape.weights(jax.random.key(1)), jnp.zeros(0)
    return ScoreModel(shape, weights, jnp.zeros(3), jnp.ones(3), none, none, covariance(data, windowed), none)


def drawing(label: str, length: int) -> tuple[float, float]:
    """Seconds and megabytes of a draw."""
    network, window, guidance = DRAWN[label]
    data = lorenz.normalised(lorenz.trajectories(jax.random.key(0), 64, 256))
    known = prior(network, window or length, bool(window), data)
    y = np.where(np.arange(length) % 8 == 0, 0.5, np.nan)
    series = read_series(read_problem(lorenz.model, (), {"y": y}))
    refused = guidance.why_not(known, length)
    if refused:
        return np.nan, np.nan

    def draws(model: ScoreModel, key: jax.Array) -> jax.Array:
        return sample(series, model, guidance, pf.Heun(steps=STEPS), {}, jnp.zeros(0), key, DRAWS)

    compiled = eqx.filter_jit(draws).lower(known, jax.random.key(0)).compile()
    memory = compiled.compiled.memory_analysis().temp_size_in_bytes
    return least(lambda: compiled(known, jax.random.key(0))) / DRAWS, memory / 2**20


def by_length() -> list[dict[str, str]]:
    """Rows by kind of network and guidance."""
    rows = []
    for label in DRAWN:
        found = np.array([drawing(label, n) for n in LENGTHS])
        done = np.flatnonzero(np.isfinite(found[:, 0]))
        last = done[-2:]
        slopes = np.diff(np.log(found[last]), axis=0)[0] / np.diff(np.log(np.array(LENGTHS)[last]))
        for k, (unit, scale) in enumerate((("ms a draw", 1e3), ("MB", 1.0))):
            cells = {str(n): f"{scale * v:.3g}" for n, v in zip(LENGTHS, found[:, k], strict=True) if np.isfinite(v)}
            cells = dict.fromkeys(map(str, LENGTHS), "") | cells
            rows.append({"network, guidance": f"{label}, {unit}"} | cells | {"slope": f"{slopes[k]:.2f}"})
            print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------- training


def bare(shape: ScoreShape, batch: int, steps: int, options: score_training.ScoreTraining) -> Callable:
    """Steps as a user of Equinox and Optax would write them: (weights, moments, data, key) to weights and losses."""
    total = options.steps
    rate = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, max(1, total // 50), total, 0.0)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4))
    _, static = eqx.partition(shape.initial(jax.random.key(0)), eqx.is_inexact_array)
    width = shape.shape[0]

    def loss(weights: Any, data: jax.Array, key: jax.Array) -> jax.Array:
        network = eqx.combine(weights, static)
        key_row, key_start, key_level, key_noise = jax.random.split(key, 4)
        rows = jax.random.randint(key_row, (batch,), 0, data.shape[0])
        starts = jax.random.randint(key_start, (batch,), 0, data.shape[1] - width + 1)
        clean = data[rows[:, None], starts[:, None] + jnp.arange(width)]
        levels = jnp.exp(options.levels[0] + options.levels[1] * jax.random.normal(key_level, (batch,)))
        noise = jax.random.normal(key_noise, clean.shape)

        def one(x0: jax.Array, level: jax.Array, noise: jax.Array) -> jax.Array:
            scales = preconditioning(level)
            x = x0 + level * noise
            predicted = network(scales.inner * x, scales.condition, jnp.zeros(0))
            return jnp.mean((predicted - (x0 - scales.skip * x) / scales.out) ** 2)

        return jnp.mean(jax.vmap(one)(clean, levels, noise))

    @jax.jit
    def run(data: jax.Array, key: jax.Array) -> Any:
        weights = eqx.filter(shape.initial(jax.random.key(1)), eqx.is_inexact_array)

        def step(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
            weights, moments = carry
            value, slope = jax.value_and_grad(loss)(weights, data, key)
            change, moments = optimiser.update(slope, moments, weights)
            return (optax.apply_updates(weights, change), moments), value

        return jax.lax.scan(step, (weights, optimiser.init(weights)), jax.random.split(key, steps))

    return run


def training(label: str) -> tuple[float, float]:
    """Seconds of a step, ours and bare."""
    network, problem, width, batch, steps = TRAINED[label]
    data = problem.trajectories(jax.random.key(0), 32, max(width, 16))
    data = (data - jnp.mean(data)) / jnp.std(data)
    shape = ScoreShape(network, (width, *data.shape[2:]), 0, True)
    options = score_training.ScoreTraining(steps=score_training.BLOCKS * steps, batch_size=batch)
    pair = (data, jnp.zeros((len(data), 0)))

    @jax.jit
    def ours(pair: tuple, key: jax.Array) -> Any:
        state = score_training._start(shape, options, key)
        return score_training._advance(state, jnp.asarray(0), jnp.asarray(1), pair, pair, key, shape, options)

    theirs = bare(shape, batch, steps, options)
    key = jax.random.key(2)
    runs = (lambda: ours(pair, key), lambda: theirs(data, key))
    for run in runs:
        jax.block_until_ready(run())
    times = np.full((2, REPEATS), np.nan)
    for k in range(REPEATS):
        for i, run in enumerate(runs):
            start = time.process_time()
            jax.block_until_ready(run())
            times[i, k] = time.process_time() - start
    return tuple(times.min(1) / steps)


def by_network() -> list[dict[str, str]]:
    """Rows of the steps of training."""
    rows = []
    for label in TRAINED:
        us, them = training(label)
        rows.append(
            {
                "network": label,
                "ours, ms": f"{1e3 * us:.2f}",
                "bare, ms": f"{1e3 * them:.2f}",
                "ratio": f"{us / them:.2f}",
                f"bar {BAR}": "met" if us / them <= BAR else "MISSED",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print and write both tables."""
    warnings.simplefilter("ignore")
    parts = [f"### Draws by number of states, {DRAWS} at once, Heun-{STEPS}\n", _report.table(by_length())]
    parts += ["", "### A step of training\n", _report.table(by_network())]
    text = "\n".join(parts)
    print(text)
    _report.write("score cost", text)


if __name__ == "__main__":
    main()
