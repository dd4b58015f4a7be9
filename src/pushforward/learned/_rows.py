"""Pairs of noise and predictions that an emulator learns from: runs made here, or members of an ensemble."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import ArgumentError, DataError
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.model.inverse import InverseProblem

_CHUNK = 64
"""Runs of the model between two checkpoints."""


def from_prior(
    problem: InverseProblem, names: tuple[str, ...], n: int, key: Key, runner: Runner
) -> tuple[np.ndarray, np.ndarray]:
    """n draws z (n, d) of the prior and the predicted data (n, m)."""
    z = jax.random.normal(key, (n, problem.dimension))
    chunks = 1 if runner.checkpoint is None else -(-n // _CHUNK)
    size = -(-n // chunks)
    shapes = jax.eval_shape(lambda row: _flat(problem.forward(row).mean, names), z[0])
    first = jnp.full((n, *shapes.shape), jnp.nan, shapes.dtype)
    outputs = runner.loop(_simulate, first, chunks, problem, names, z, size, every=1)
    return np.asarray(z, float), np.asarray(outputs, float)


def _simulate(
    outputs: Array, start: Array, stop: Array, problem: InverseProblem, names: tuple[str, ...], z: Array, size: int
) -> Array:
    """Outputs with those of chunks `start` to `stop` filled in; the last chunk may repeat the last row."""

    def chunk(i: Array, found: Array) -> Array:
        rows = jnp.minimum(i * size + jnp.arange(size), len(z) - 1)
        return found.at[rows].set(jax.vmap(lambda one: _flat(problem.forward(one).mean, names))(z[rows]))

    return jax.lax.fori_loop(start, stop, chunk, outputs)


def _flat(values: dict[str, Array], names: tuple[str, ...]) -> Array:
    return jnp.concatenate([jnp.ravel(values[n]).astype(jnp.result_type(float)) for n in names])


def from_runs(problem: InverseProblem, names: tuple[str, ...], runs: Any) -> tuple[np.ndarray, np.ndarray]:
    """z (n, d) and predicted data (n, m) of all members at all steps of results of `pf.EKI`, or of their groups.

    Raises:
        ArgumentError: not a result, or one without the group "ensemble".
        DataError: the members of another model.
    """
    trees = list(runs) if isinstance(runs, list | tuple) else [runs]
    if not trees:
        raise ArgumentError("runs= is empty. Give a result of pf.infer(model, method=pf.EKI(...)), or leave it out.")
    parts = [_of_one(problem, names, tree) for tree in trees]
    z, outputs = (np.concatenate(p) for p in zip(*parts, strict=True))
    return z, outputs


def _of_one(problem: InverseProblem, names: tuple[str, ...], tree: Any) -> tuple[np.ndarray, np.ndarray]:
    if not hasattr(tree, "data_vars"):
        raise ArgumentError(
            "runs= takes a result of pf.infer(model, method=pf.EKI(...)), its group 'ensemble' or some steps of that, "
            f"or a list of these; got {type(tree).__name__}."
        )
    if "z" in tree.data_vars:
        group = tree
    elif "ensemble" in getattr(tree, "children", {}):
        group = tree["ensemble"]
    else:
        raise ArgumentError(
            f"runs= needs the group 'ensemble' of a result of pf.EKI; this one has {list(tree)}. Give the "
            "result of an EKI run, or leave runs= out, and draws of the prior are simulated."
        )
    called = {n: "z_mean" if n == "z" else n for n in names}  # a site of the name of the noise
    missing = [n for n in ("z", *called.values()) if n not in group.data_vars]
    if missing:
        raise DataError(
            f"the group 'ensemble' of runs= has no '{missing[0]}'; it has {list(group.data_vars)}. Give the run of the "
            "model that is fitted."
        )
    arrays = {n: group[n].transpose("step", "member", ...).to_numpy() for n in ("z", *called.values())}
    expected = {"z": (problem.dimension,)} | {called[n]: tuple(problem.sites[n].shape) for n in names}
    for name, array in arrays.items():
        if array.shape[2:] != expected[name]:
            raise DataError(
                f"the group 'ensemble' of runs= has '{name}' of shape {array.shape[2:]} for each member, and this "
                f"model has {expected[name]}. Give the run of the model that is fitted."
            )
    rows = arrays["z"].shape[0] * arrays["z"].shape[1]
    outputs = [arrays[called[n]].reshape(rows, -1) for n in names]
    return arrays["z"].reshape(rows, -1).astype(float), np.concatenate(outputs, -1).astype(float)
