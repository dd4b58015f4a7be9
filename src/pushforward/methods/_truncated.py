"""Truncated sequential estimation: simulate where the posterior of one data set was found, and learn again."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import DataError
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned.amortized import Conditional, Shape, fit_conditional, kept
from pushforward.learned.fitting import Fit
from pushforward.model.inverse import InverseProblem

if TYPE_CHECKING:
    from pushforward.methods.amortized_flow import AmortizedFlow

_MASS = 1e-4
"""Share of the estimate's draws that may fall outside the truncated prior."""
_DRAWS = 10_000
_PROPOSALS = 8192
_TRIES = 500


def fit_rounds(
    method: "AmortizedFlow",
    problem: InverseProblem,
    shape: Shape,
    columns: tuple[int, ...],
    first: tuple[Array, Array],
    key: Key,
    runner: Runner,
) -> tuple[Conditional, Fit, int]:
    """Fit in rounds (Deistler, Goncalves and Macke 2022).

    After each round the prior is cut to the smallest region with all but 1e-4 of the estimate's mass; new parameters
    are drawn there by rejection, and the estimate is trained anew on all simulations inside. On the region the
    truncated prior is proportional to the prior, so the loss keeps its minimum at the posterior.

    Returns:
        The last estimate, its fit, and the number of simulations of all rounds.
    """
    data = problem.observed_values()
    if not data:
        raise DataError(
            f"AmortizedFlow(rounds={method.rounds}) learns for one data set, and no data were given. Pass them to .fit "
            "or to infer, or use rounds=1 to learn for all data."
        )
    observed = shape.embedding.arrange(data, shape.layout)
    u, values = first
    total = len(u)
    found, fitted = fit_conditional(shape, u, values, method.training, jax.random.fold_in(key, 0), runner)
    for number in range(1, method.rounds):
        level_key, draw_key, data_key, fit_key = jax.random.split(jax.random.fold_in(key, number), 4)
        level = runner.call(_level, found, observed, level_key)
        new, accepted = runner.call(_inside, found, observed, level, problem.dimension, columns, total, draw_key)
        if int(accepted) < total:
            break
        fresh = runner.call(_simulated, problem, shape, columns, new, data_key)
        fresh_u, fresh_values = kept(*fresh, shape.embedding, "simulations from the truncated prior")
        inside = np.asarray(runner.call(_densities, found, u, observed)) > float(level)
        u = jnp.concatenate([u[inside], fresh_u])
        values = jnp.concatenate([values[inside], fresh_values])
        found, fitted = fit_conditional(shape, u, values, method.training, fit_key, runner)
    return found, fitted, total * method.rounds


def _level(found: Conditional, observed: Array, key: Key) -> Array:
    """Density below which the estimate has the mass that is cut off."""
    u = found.draw(observed, key, _DRAWS)
    return jnp.quantile(found.log_density(u, observed), _MASS)


def _densities(found: Conditional, u: Array, observed: Array) -> Array:
    return found.log_density(u, observed)


def _inside(
    found: Conditional, observed: Array, level: Array, dimension: int, columns: tuple[int, ...], size: int, key: Key
) -> tuple[Array, Array]:
    """Noise z (size, dimension) of the prior with u in the region, and how many were found."""
    index = jnp.asarray(columns)

    def going(carry: tuple) -> Array:
        tries, number, _ = carry
        return (number < size) & (tries < _TRIES)

    def more(carry: tuple) -> tuple:
        tries, number, z = carry
        proposed = jax.random.normal(jax.random.fold_in(key, tries), (_PROPOSALS, dimension))
        good = found.log_density(proposed[:, index], observed) > level
        place = jnp.where(good, number + jnp.cumsum(good) - 1, size)
        return tries + 1, number + jnp.sum(good), z.at[place].set(proposed, mode="drop")

    start = (jnp.zeros((), int), jnp.zeros((), int), jnp.zeros((size, dimension)))
    _, number, z = jax.lax.while_loop(going, more, start)
    return z, jnp.minimum(number, size)


def _simulated(
    problem: InverseProblem, shape: Shape, columns: tuple[int, ...], z: Array, key: Key
) -> tuple[Array, Array]:
    def one(item: tuple[Array, Key]) -> Array:
        found = problem.simulate_at(*item)
        named = {k: v for k, v in found.deterministics.items() if k in problem.structure.data}
        return shape.embedding.arrange(found.data | named, shape.layout)

    values = jax.lax.map(one, (z, jax.random.split(key, len(z))), batch_size=1024)
    return z[:, jnp.asarray(columns)], values
