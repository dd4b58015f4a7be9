"""A model with a function of ``z`` for its likelihood: every method runs on it, and the simulator never does."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.interpreters.partial_eval import dce_jaxpr

from pushforward._errors import MethodError
from pushforward._types import Array, Model
from pushforward.model import _flow
from pushforward.model._arguments import Arguments, _is_labelled, _plain
from pushforward.model._fingerprint import fingerprint, stable_text
from pushforward.model._reading import Structure, _fill
from pushforward.model.inverse import InverseProblem
from pushforward.model.simulator import _found, simulators

FACTOR = "emulated_log_likelihood"


def emulated(problem: InverseProblem, likelihood: Callable[[Array], Array]) -> InverseProblem:
    """The posterior in ``z`` under another log likelihood.

    It is a NumPyro model of one latent site, ``z ~ N(0, I)``, with one factor: the likelihood, and what the user's
    model adds beside its observed sites (`numpyro.factor`, prior maps that are not exact). Its density in ``z``
    compares with that of `problem` at the same ``z``.

    Args:
        problem: the user's model.
        likelihood: a pytree of arrays that is a function of ``z`` (d,).

    Raises:
        MethodError: a `numpyro.factor` needs the simulator.
    """
    leaves, tree = jax.tree.flatten(likelihood)
    count, dimension = len(problem.arrays), problem.dimension
    arrays = (*problem.arrays, *(jnp.asarray(leaf) for leaf in leaves))

    def make() -> Structure:
        owed = _owed(problem)

        def model(arrays: tuple) -> None:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([dimension]).to_event(1))
            value = jax.tree.unflatten(tree, arrays[count:])(z)
            numpyro.factor(FACTOR, value if owed is None else value + owed(z, arrays[:count]))

        arguments = Arguments(arrays, lambda given: ((given,), {}), None)
        structure = Structure(model, arguments)
        with numpyro.validation_enabled(False):
            _fill(structure, arrays, ())
        return structure

    shapes = tuple((a.shape, str(a.dtype)) for a in arrays)
    name = ("emulated", tree, shapes)
    if name not in problem.structure.remembered:
        problem.structure.remembered[name] = make()
    return InverseProblem(arrays, problem.structure.remembered[name])


def _owed(problem: InverseProblem) -> Callable[[Array, tuple], Array] | None:
    """What the model adds to the log density beside its observed sites, without anything that it does not need."""

    def correction(z: Array, arrays: tuple) -> Array:
        return InverseProblem(arrays, problem.structure).evaluate(z).correction

    program, inputs = _pruned(correction, problem)
    if not inputs:
        return None
    called = _found(program.jaxpr)
    if called:
        raise MethodError(
            f"surrogate= emulates the observed sites, and a numpyro.factor of the model needs {called[0]!r} as well. "
            "Write that term as an observed site, or leave surrogate= out."
        )
    return lambda z, arrays: jex.jaxpr_as_fun(program)(z, *arrays)[0]


def _pruned(fn: Callable, problem: InverseProblem) -> tuple[Any, bool]:
    """fn(z, arrays) as a program of its inputs without dead code, and whether it depends on z."""
    z = jnp.zeros(problem.dimension)
    with numpyro.validation_enabled(False):
        closed = jax.make_jaxpr(fn)(z, problem.arrays)
    wanted = [True] * len(closed.jaxpr.outvars)
    kept, _ = dce_jaxpr(closed.jaxpr, wanted, instantiate=True)
    _, used = dce_jaxpr(closed.jaxpr, wanted)
    return jex.ClosedJaxpr(kept, closed.consts), bool(used[0])


def computable(problem: InverseProblem) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Deterministic sites that need no simulator, and those that do."""
    names = [s.name for s in problem.sites.values() if s.role == "deterministic"]
    kept, left = [], []
    for name in names:

        def value(z: Array, arrays: tuple, name: str = name) -> Array:
            return InverseProblem(arrays, problem.structure).evaluate(z).deterministics[name]

        needs = bool(simulators(problem)) and bool(_found(_pruned(value, problem)[0].jaxpr))
        (left if needs else kept).append(name)
    return tuple(kept), tuple(left)


def fixed_arguments(problem: InverseProblem, model: Model, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments that a map from ``z`` to predictions holds for: arrays on which predictions depend, and all that is
    static, as text. Data and noise are none of them.

    Args:
        problem: `model` read with `args` and `kwargs`.
        model: the user's model.
        args: its positional arguments.
        kwargs: its named arguments.
    """
    named = {str(i): a for i, a in enumerate(problem.arrays)}

    def means(**arrays: Array) -> dict[str, Array]:
        return InverseProblem(tuple(arrays.values()), problem.structure).forward(jnp.zeros(problem.dimension)).mean

    with numpyro.validation_enabled(False):
        matters = {i for sources in _flow.data_flow(means, named).values() for i in sources}
    found, index = {}, 0
    static: Any = problem.structure.arguments.static
    paths = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=_is_labelled)[0]
    for (path, leaf), traced in zip(paths, static[1], strict=True):
        name = _name(model, path)
        if not traced:
            found[name] = stable_text(fingerprint(_plain(leaf)))
            continue
        if str(index) in matters:
            found[name] = np.asarray(problem.arrays[index])
        index += 1
    return found


def _name(model: Model, path: tuple) -> str:
    """An argument's name, and where in it the leaf is."""
    kind, which, *rest = path
    if kind.idx == 1:
        return which.key + jax.tree_util.keystr(tuple(rest))
    try:
        names = list(inspect.signature(model).parameters)
    except (TypeError, ValueError):
        names = []
    name = names[which.idx] if which.idx < len(names) else f"argument {which.idx + 1}"
    return name + jax.tree_util.keystr(tuple(rest))
