"""`forecast`: the trajectory of a posterior continued beyond its data.

The model is run with arguments for a longer series. Its `scan` is answered in place: it starts at the carry that the
posterior has after its T steps, and each later step draws its sites, data included, from the laws of the body.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushforward import _evaluate, posterior
from pushforward._errors import ArgumentError, DataError, ModelError, PushforwardError
from pushforward._infer import _argument_names, _constants, _typed_key
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.model import _scan_trace, _trace
from pushforward.model._reading import Site
from pushforward.model.inverse import InverseProblem, read_problem
from pushforward.model.state_space import StateSpace, join, read_state_space
from pushforward.predictive import _with

_ROLES = ("parameter", "deterministic", "data")


def forecast(
    tree: Any, model: Model, *args: Any, key: int | Key = 0, coords: Mapping[str, Any] | None = None, **kwargs: Any
) -> Any:
    """Draw states and data of the steps that follow the data of a posterior.

    Each draw of the posterior is continued once: its parameters, and its carry after the last step T, are kept;
    step T and later ones are drawn from the model. Results of state methods hold that carry in their group
    ``last_carry``. For all others it follows from the sites, by running the first T steps at their values.

    Args:
        tree: a result of `infer`, by any method.
        model: the model of that result, with one NumPyro `scan`.
        *args: its positional arguments for T + h steps: inputs of the scan that are h longer, or a larger number of
            steps. Data may be left out or padded by NaN; their values at the new steps are not used.
        key: an integer or a typed JAX key.
        coords: coordinate values by dimension for the new steps, or for all; by default those of the result are
            continued.
        **kwargs: the model's named arguments.

    Returns:
        A copy of the tree with ArviZ's group ``predictions``: latent and deterministic sites of the scan and the data
        of the trajectory, at the h new steps, with dims (chain, draw, time, ...). Array arguments that are not data
        are in ``predictions_constant_data``. `numpyro.factor` in a step does not weigh the draws.

    Raises:
        ArgumentError: not a result of `infer`, or coordinates that do not fit or cannot be continued.
        ModelError: the model has no scan, or one that cannot be read.
        DataError: no steps after those of the posterior, or a posterior that lacks sites of the model or has other
            shapes.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def walk(y=None, steps=None):
        ...     def step(x, y):
        ...         x = numpyro.sample("x", dist.Normal(x, 1))
        ...         numpyro.sample("y", dist.Normal(x, 2), obs=y)
        ...         return x, None
        ...     scan(step, numpyro.sample("x0", dist.Normal(0, 5)), y, length=steps)
        >>> tree = pf.infer(walk, method=pf.Kalman(), y=np.array([1.0, 2.0, np.nan, 3.0]))
        >>> later = pf.forecast(tree, walk, steps=10)
        >>> later["predictions"]["y"].shape, later["predictions"]["time"].values
        ((1, 1000, 6), array([4, 5, 6, 7, 8, 9]))
    """
    key, _ = _typed_key(key)
    if "posterior" not in getattr(tree, "children", {}):
        raise ArgumentError(
            f"forecast takes a result of infer, with a group 'posterior'; got {type(tree).__name__}. Write "
            "pf.forecast(tree, model, ...)."
        )
    space = read_state_space(_completed(tree, model, args, kwargs))
    start = _steps_before(tree, space)
    values, carried = _outset(tree, space, start)
    drawn = Runner().call(_continued, space, start, values, carried, key)
    chains, draws = tree["posterior"].sizes["chain"], tree["posterior"].sizes["draw"]
    shaped = {n: v.reshape(chains, draws, *v.shape[1:]) for n, v in drawn.items()}
    labels = _labels(tree, space.problem.sites, shaped, start, coords)
    made = _with(tree, "predictions", posterior.group(shaped, labels))
    constants = _constants(space.problem, model, args, kwargs)
    dims, sites = _known_dims(tree, constants, ("constant_data",)), space.problem.sites
    names = posterior.Labels(sites, None, dims, _argument_names(model, args, kwargs))
    group = posterior.group(constants, names, sampled=False)
    return _with(made, "predictions_constant_data", group) if constants else made


def _completed(tree: Any, model: Model, args: tuple, kwargs: dict) -> InverseProblem:
    """The model with its data: those that this call leaves out are those of the tree, followed by NaN."""
    known, data = tree["posterior"].data_vars, tree["observed_data"].data_vars if "observed_data" in tree else {}
    problem, named = _read(model, args, kwargs, tuple(map(str, data)))
    if not any(_in_scan(site) for site in problem.sites.values()):
        raise ModelError(
            "the model has no numpyro scan with sites, so there is no trajectory to continue. For data at new "
            "arguments write pf.predict(tree, model, ..., group='predictions')."
        )
    lacking = [n for n in problem.structure.slots if n not in known and n in data] + list(named)
    if not lacking:
        return problem
    padded = {}
    for name in lacking:
        value, shape = np.asarray(data[name].to_numpy(), float), problem.sites[name].shape
        if value.ndim != len(shape) or value.shape[1:] != shape[1:]:
            raise _other_shape(name, value.shape, shape)
        value = value[: shape[0]] if shape else value  # with fewer steps than the data, `_steps_before` refuses
        missing = shape[0] - len(value) if shape else 0
        padded[name] = np.concatenate([value, np.full((missing, *shape[1:]), np.nan)]) if missing else value
    return read_problem(_trace.conditioned(model), (padded, args, kwargs))


def _read(model: Model, args: tuple, kwargs: dict, data: tuple[str, ...]) -> tuple[InverseProblem, tuple[str, ...]]:
    """The model as it is called, and the data that it had to be told of (a discrete site cannot be latent)."""
    try:
        return read_problem(model, args, kwargs), ()
    except ModelError as error:
        try:
            return read_problem(model, args, kwargs, data), data
        except PushforwardError:
            raise error from None


def _in_scan(site: Site) -> bool:
    return site.dims[:1] == ("time",) and site.role in _ROLES


def _other_shape(name: str, has: Sequence[int], needs: Sequence[int]) -> DataError:
    return DataError(
        f"the result has '{name}' with shape {tuple(has)}, but with these arguments the model has it with shape "
        f"{tuple(needs)}. Only the number of steps may grow; keep the arguments that size anything else."
    )


def _steps_before(tree: Any, space: StateSpace) -> int:
    """How many steps T the result has; the model must have more."""
    s, found = space.structure, {}
    data = {n for n, site in s.joint.sites.items() if site.role == "data" and (_in_scan(site) or n in s.fused)}
    for group, names in (("observed_data", data), ("posterior", {n for n, v in s.joint.sites.items() if _in_scan(v)})):
        for name in names & set(tree[group].data_vars if group in tree else ()):
            shape, needed = _value(tree[group], name).shape, s.joint.sites[name].shape
            if len(shape) == len(needed):  # store="last" keeps no time axis
                found[name] = shape[0]
                if shape[1:] != needed[1:]:
                    raise _other_shape(name, shape, needed)
    if not found:
        raise DataError(
            "the result has neither data nor sites of the model's scan, so its number of steps is not known. Pass the "
            "model that the posterior was inferred with."
        )
    if len(set(found.values())) > 1:
        raise DataError(
            f"sites of the result have different numbers of steps: {found}. Pass the tree as infer made it."
        )
    start = next(iter(found.values()))
    if space.steps <= start:
        raise DataError(
            f"with these arguments the model has {space.steps} steps, and the posterior has {start} already. Pass "
            f"arguments for more than {start} steps in total: a larger number of steps, data padded by NaN, or longer "
            "inputs."
        )
    return start


def _value(dataset: Any, name: str) -> Any:
    """A variable at its first draw, where it has draws."""
    return dataset[name].isel({d: 0 for d in ("chain", "draw") if d in dataset[name].dims})


def _outset(tree: Any, space: StateSpace, start: int) -> tuple[dict[str, Array], tuple | None]:
    """Values of latent sites and, where the tree has it, the last carry, leading axis draw."""
    s = space.structure
    if "last_carry" in tree.children:
        carried = _last_carry(tree, space)
        names = () if carried[0].shape[-1] != space.state_dimension else s.parameters
    else:
        carried, names = None, (*s.parameters, *s.initial, *s.latent)
    names = [n for n in s.joint.slots if n in names]  # in the order of the model
    values = posterior.latent_draws(tree, names)
    for name, value in values.items():
        shape = s.joint.sites[name].shape
        needed = (start, *shape[1:]) if name in s.latent else shape
        if value.shape[1:] != tuple(needed):
            raise _other_shape(name, value.shape[1:], needed)
    values = {n: jnp.asarray(v) for n, v in values.items()}
    return values, carried


def _last_carry(tree: Any, space: StateSpace) -> tuple[Array, list[Array]]:
    s, group = space.structure, tree["last_carry"]
    names = ["state", *(f"rider_{i}" for i in range(len(s.carry) - len(s.state)))]
    shapes = [(space.state_dimension,), *(c.shape for i, c in enumerate(s.carry) if i not in s.state)]
    has = {n: tuple(group[n].shape[2:]) for n in group.data_vars}
    needs = dict(zip(names, map(tuple, shapes), strict=True))
    joined = needs | {"state": (space.augmented().state_dimension,)}
    if has not in (needs, joined):
        raise DataError(
            f"the last carry of the result has the shapes {has}, but with these arguments the model's carry has "
            f"{needs}. Pass the model that the posterior was inferred with, and keep the arguments that size its state."
        )
    sizes = [tuple(tree[g].sizes[d] for d in ("chain", "draw")) for g in ("posterior", "last_carry")]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the posterior has {sizes[0]} chains and draws, and the last carry {sizes[1]}. Thin all groups alike, as "
            "tree.isel(draw=...) does."
        )
    count = math.prod(sizes[1])  # a state of length 0 leaves -1 undetermined
    state, *riders = (jnp.asarray(group[n].to_numpy().reshape(count, *has[n])) for n in names)
    return state, riders


def _continued(space: StateSpace, start: int, values: dict, carried: tuple | None, key: Key) -> dict[str, Array]:
    """The new steps of each draw."""
    length = jax.tree.leaves((values, carried))[0].shape[0]
    keys = jax.random.split(key, length)
    return _evaluate.many(lambda item: _continue(space, start, *item), (values, carried, keys), None)


def _continue(space: StateSpace, start: int, values: dict, carried: tuple | None, key: Key) -> dict[str, Array]:
    """Sites at the steps from `start` on, of one draw.

    Args:
        space: the model with all its steps.
        start: number of steps that the draw has.
        values: parameters, and without `carried` all latent sites, those of the scan for the first `start` steps.
        carried: state (n,) after these steps and what rides along.
        key: typed JAX key.
    """
    s, found = space.structure, {}
    if carried is not None and carried[0].shape[0] != space.state_dimension:  # parameters are part of the state
        chain = space.augmented().chain()
        k = chain.joined_size
        outer = chain.at(carried[0][:k]).outer
        values, carried = values | {n: outer[n] for n in s.parameters}, (carried[0][k:], carried[1])
    body_key, outer_key = jax.random.split(key)
    fresh = _trace.simulating(lambda site: None, s.joint.data, body_key)
    again = _trace.simulating(_trace.from_values(s.joint.slots, values), frozenset(), body_key)
    around = {n: v for n, v in values.items() if n not in s.latent}
    assign = _trace.simulating(_trace.from_values(s.joint.slots, around), s.joint.data, outer_key)

    def instead(scan: _scan_trace.Scan) -> tuple[Any, Any]:
        def run(carry: list[Array], steps: slice, how: _trace.Assign, keep: bool) -> tuple[list[Array], Any]:
            def step(carry: list[Array], item: tuple) -> tuple[list[Array], Any]:
                t, x = item
                moved, returned, sites = scan.body(jax.tree.unflatten(s.carry_tree, carry), x, t, how)
                return _typed(s.carry, jax.tree.leaves(moved)), (returned, _named(s.joint.sites, sites)) if keep else ()

            times = jnp.arange(space.steps)[steps]
            return jax.lax.scan(step, carry, (times, jax.tree.map(lambda x: x[steps], scan.xs)))

        if carried is None:
            carry, _ = run(_typed(s.carry, jax.tree.leaves(scan.init)), slice(start), again, False)
        else:
            carry = _typed(s.carry, join(s, *carried))
        last, (returned, sites) = run(carry, slice(start, None), fresh, True)
        found.update(sites)
        # Sites after the scan are local in time: what stands at the old steps does not reach the new ones.
        stacked = jax.tree.map(lambda v: jnp.concatenate([jnp.repeat(v[:1], start, 0), v]), returned)
        return jax.tree.unflatten(s.carry_tree, last), stacked

    outside = _scan_trace.run_around(s.joint.call(space.arrays), assign, instead)
    return found | {n: outside[n]["value"][start:] for n in s.fused}


def _typed(carry: list[jax.ShapeDtypeStruct], leaves: list) -> list[Array]:
    """Leaves of a carry in the types that were read; simulated counts may be integers where data with NaN are not."""
    return [jnp.asarray(v, c.dtype) for v, c in zip(leaves, carry, strict=True)]


def _named(known: Mapping[str, Site], sites: Mapping[str, dict]) -> dict[str, Array]:
    return {n: s["value"] for n, s in sites.items() if n in known and known[n].role in _ROLES}


def _labels(
    tree: Any, sites: Mapping[str, Site], drawn: Mapping[str, Array], start: int, given: Mapping[str, Any] | None
) -> posterior.Labels:
    """Names of axes as in the tree, with coordinates of time continued."""
    sites = {n: replace(sites[n], shape=v.shape[2:]) for n, v in drawn.items()}
    dims = _known_dims(tree, {n: np.empty(s.shape) for n, s in sites.items()}, ("posterior", "observed_data"))
    labels = posterior.Labels(sites, None, dims)
    coords: dict[str, Any] = {}
    if given is not None and not isinstance(given, Mapping):
        raise ArgumentError(f"coords= takes a dictionary such as {{'time': [...]}}; got {type(given).__name__}.")
    own = {k: np.asarray(v) for k, v in (given or {}).items()}
    for name, site in sites.items():
        for axis, (dim, size) in enumerate(zip(labels.names(name, site.shape), site.shape, strict=True)):
            if dim in coords:
                continue
            if dim in own:
                values = own.pop(dim)
                fits = axis == 0 and len(values) == start + size
                coords[dim] = values[start:] if fits else values
            elif axis == 0:
                coords[dim] = _continued_index(_index(tree, dim), dim, start, size)
            elif len(values := _index(tree, dim)) == size:
                coords[dim] = values.to_numpy()
    return posterior.Labels(sites, coords | own, dims)


def _known_dims(tree: Any, variables: Mapping[str, Any], groups: Sequence[str]) -> dict[str, list[str]]:
    """Names of the axes of variables as the tree has them."""
    found = {}
    for name, value in variables.items():
        for group in groups:
            if group in tree.children and name in tree[group].data_vars:
                dims = [d for d in tree[group][name].dims if d not in ("chain", "draw")]
                found |= {name: dims} if len(dims) == np.ndim(value) else {}
    return found


def _index(tree: Any, dim: str) -> Any:
    """The coordinate of a dimension in the tree, as a pandas index; empty where it has none."""
    groups = ("posterior", "observed_data", "filtering")
    found = [tree[g].to_dataset().indexes.get(dim) for g in groups if g in tree.children]
    return next((index for index in found if index is not None), np.empty(0))


def _continued_index(index: Any, dim: str, start: int, count: int) -> np.ndarray:
    """`count` values that continue an index with `start` of them."""
    later = np.arange(1, count + 1)
    if len(index) != start:
        return start - 1 + later
    values = index.to_numpy()
    # Months have no length in days, but are equally far apart when counted as months.
    for kind in {"M": (values.dtype, "datetime64[M]")}.get(values.dtype.kind, (values.dtype,)):
        counted = values.astype(kind)
        if values.dtype.kind not in "iufM" or (counted.astype(values.dtype) != values).any():
            continue
        spacing = np.diff(counted)
        step = spacing[-1] if start > 1 else 1
        if (np.abs(spacing - step) <= 1e-5 * np.abs(step)).all():
            return (counted[-1] + later * step).astype(values.dtype)
    raise ArgumentError(
        f"the coordinates of '{dim}', ending in {values[-2:].tolist()}, are no numbers or dates at equal distances, so "
        f"they cannot be continued. Pass those of the {count} new steps: forecast(..., coords={{'{dim}': [...]}})."
    )
