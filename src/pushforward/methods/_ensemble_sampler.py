"""What `EKS` and `ALDI` share: a run of interacting Langevin steps with members that may fail."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.math.ensemble_sampling import stable_step
from pushforward.methods._base import Draws, check_fraction, check_integer, check_positive
from pushforward.methods._inversion import FEW, SAME_OUTPUTS, Inversion, ended
from pushforward.methods._inversion_result import check_units, packaged
from pushforward.methods._outputs import Units, predict, succeeded
from pushforward.model.inverse import InverseProblem

type Move = Callable[..., Array]
"""(z, outputs, data, h, noise, slope) -> z."""


def check_options(method: Any) -> None:
    """Refuse wrong options of `EKS` and `ALDI`."""
    name = type(method).__name__
    check_integer(name, 2, members=method.members)
    check_integer(name, 1, steps=method.steps)
    check_positive(name, time=method.time)
    check_fraction(name, step=method.step)


def run(method: Any, move: Move, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
    """Move an ensemble of the prior for `method.time`, in at most `method.steps` steps."""
    units = runner.call(Units.of, problem)
    check_units(units)
    z = jax.random.normal(jax.random.fold_in(key, 0), (method.members, problem.dimension))
    first = Inversion.start(z, method.steps)
    last = runner.loop(_advance, first, method.steps, method, move, problem, units, key, runner.mesh, every=1)
    return packaged(last, method.time, draws, method.members)


def _advance(
    state: Inversion,
    start: Array,
    stop: Array,
    method: Any,
    move: Move,
    problem: InverseProblem,
    units: Units,
    key: Key,
    mesh: Mesh | None,
) -> Inversion:
    del start

    def going(s: Inversion) -> Array:
        return (s.steps < stop) & ~ended(s, method.time) & (s.stopped == 0)

    def step(s: Inversion) -> Inversion:
        return _step(s, method, move, problem, units, jax.random.fold_in(key, 1 + s.steps), mesh)

    return jax.lax.while_loop(going, step, state)


def _step(
    s: Inversion, method: Any, move: Move, problem: InverseProblem, units: Units, key: Key, mesh: Mesh | None
) -> Inversion:
    choice_key, noise_key = jax.random.split(key)
    data, count = units.whitened, s.z.shape[0]
    outputs = parallel.vmap(lambda z: predict(problem, units, z), mesh)(s.z)
    present = succeeded(outputs, data)
    n = jnp.sum(present)
    # A failed member takes the place of a successful one, from which the noise parts it again.
    chosen = jax.random.categorical(choice_key, jnp.where(present, 0.0, -jnp.inf), shape=(count,))
    source = jnp.where(present, jnp.arange(count), chosen)
    z, g = s.z[source], outputs[source]
    slope = None if problem.exact_prior else jax.vmap(jax.grad(lambda z: problem.evaluate(z).correction))(z)
    h = jnp.minimum(stable_step(g, data, method.step), method.time - s.time).astype(z.dtype)
    after = move(z, g, data, h, jax.random.normal(noise_key, z.shape, z.dtype), slope)
    stopped = jnp.where(n < 2, FEW, jnp.where(jnp.all(g == g[0]), SAME_OUTPUTS, 0))
    misfit = jnp.mean(0.5 * jnp.sum(jnp.where(jnp.isnan(data), 0.0, data - g) ** 2, -1))
    return Inversion(
        jnp.where(stopped == 0, after, s.z),
        s.time + h,
        s.steps + 1,
        s.failed + (count - n),
        stopped,
        s.sizes.at[s.steps].set(h),
        s.misfits.at[s.steps].set(misfit),
    )


def why_not_sampled(method: Any, least: int, problem: InverseProblem) -> str | None:
    """Likelihoods that are not Gaussian, and ensembles too small for the dimension."""
    reason = problem.why_not_gaussian()
    if reason:
        reason = reason.removesuffix(", or use a method that samples its data")
        return f'{reason}; or let simulated data carry the noise, pf.EKI(noise="simulated")'
    d = problem.dimension
    if method.members < least:
        name = type(method).__name__
        return (
            f"it has {d} latent numbers, for which {name} needs {least} members or more; "
            f"it has {method.members}. Write pf.{name}(members={2 * least}), or use pf.EKI()"
        )
    return None
