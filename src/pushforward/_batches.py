"""`infer` for many data sets in one call, with a method that was trained for all of them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushforward import posterior
from pushforward._errors import DataError
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.methods import _simulations
from pushforward.methods.amortized_flow import AmortizedFlow, Trained
from pushforward.model.inverse import InverseProblem, read_problem

_AT_ONCE = 4
"""Data sets in one pass: few enough that their draws stay in the cache of a processor."""


def is_batch(method: AmortizedFlow, given: Mapping[str, Any]) -> bool:
    """Whether an argument with the name of a data site has one axis more than in training, in front."""
    if method.trained is None or method.trained.local:
        return False
    shapes = method.trained.shapes
    shown = {n: np.shape(given[n]) for n in shapes if given.get(n) is not None}
    return len(shown) == len(shapes) and all(len(s) and tuple(s[1:]) == tuple(shapes[n]) for n, s in shown.items())


def infer_batch(
    method: AmortizedFlow,
    model: Model,
    given: Mapping[str, Any],
    key: Key,
    label: Any,
    draws: int,
    coords: Any,
    dims: Any,
) -> Any:
    """The posteriors of many data sets as one tree whose variables have the dimension ``dataset``.

    Args:
        method: trained.
        model: its model.
        given: the model's arguments by name, data with a leading axis.
        key: typed JAX key.
        label: how the key is shown.
        draws: draws for each data set.
        coords: as in `infer`.
        dims: as in `infer`.
    """
    trained = method.trained
    assert trained is not None
    method.check_call(given)
    data = {n: np.asarray(given[n], float) for n in sorted(trained.shapes)}
    _check(trained, data)
    first = {n: (v[0] if n in data else v) for n, v in given.items()}
    problem = read_problem(model, (), first, method.observed)
    misfit = method.why_not(problem)
    if misfit:
        raise DataError(f"AmortizedFlow does not fit this model: {misfit}.")
    runner = Runner()
    values, distances = runner.call(
        _posteriors, problem, trained, {n: jnp.asarray(v) for n, v in data.items()}, key, draws
    )
    labels = posterior.Labels(problem.sites, coords, dims, list(given))
    far = int((np.asarray(distances) > 1.5).sum())
    cautions = [f"{far} of {len(distances)} data sets are unlike the simulations."] if far else []
    groups = {
        "posterior": posterior.group_of_batch(values, labels, skip=2),
        "observed_data": posterior.group_of_batch(data, labels, skip=0),
    }
    attributes = {
        "method": "AmortizedFlow", "key": label, "compile_seconds": runner.compile_seconds,
        "run_seconds": runner.run_seconds, "warnings": cautions, "datasets": len(distances),
    }  # fmt: skip
    return posterior.tree(groups, attributes)


def _check(trained: Trained, data: dict[str, np.ndarray]) -> None:
    lengths = {n: len(v) for n, v in data.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"the data sites have different numbers of data sets: {lengths}.")
    bad = [n for n, v in data.items() if np.isinf(v).any()]
    if bad:
        raise DataError(f"data '{bad[0]}' are infinite in some data sets. Correct them, or write NaN for missing.")
    absent = [n for n, v in data.items() if np.isnan(v).any()]
    if absent and not trained.conditional.shape.embedding.reads_missing:
        raise DataError(
            f"data '{absent[0]}' have NaN (missing) values, and the network was trained on complete data. Train it "
            "with pf.Vector(missing=0.3), pf.Series(missing=0.3) or pf.Sets(varying=True)."
        )


def _posteriors(
    problem: InverseProblem, trained: Trained, data: dict[str, Array], key: Key, draws: int
) -> tuple[dict[str, Array], Array]:
    """Latent sites (1, draw, dataset, ...) and the distance of each data set from the simulations."""
    conditional, shape = trained.conditional, trained.conditional.shape
    columns = jnp.asarray(_simulations.columns_of(problem, trained.sites))
    count = jax.tree.leaves(data)[0].shape[0]

    def one(item: tuple[dict[str, Array], Key]) -> tuple[dict[str, Array], Array]:
        values = shape.embedding.arrange(item[0], shape.layout)
        u = conditional.draw(values, item[1], draws)
        z = jnp.zeros((draws, problem.dimension), u.dtype).at[:, columns].set(u)
        sites = jax.vmap(problem.constrain)(z)
        return {n: sites[n] for n in trained.sites}, conditional.distance(values)

    keys = jax.random.split(key, count)
    sites, distances = jax.lax.map(one, (data, keys), batch_size=min(_AT_ONCE, count))
    return {n: jnp.moveaxis(v, 0, 1)[None] for n, v in sites.items()}, distances
