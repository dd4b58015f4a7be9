"""WRITE: draws -> `xarray.DataTree` in ArviZ 1.x schema. The only writer of groups."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pushforward._errors import ArgumentError, DataError
from pushforward._types import Array
from pushforward.model._reading import Site

_SAMPLE = ("chain", "draw")
LIKELIHOOD_LIMIT = 1_000_000
"""Entries of `log_likelihood` up to which `infer` computes it unasked."""


class Labels:
    """Names of axes: plates and `scan` as the model has them, the user's `dims=` and `coords=` over them.

    Args:
        sites: what was read of the model.
        coords: coordinate values by dimension.
        dims: names of the axes of a variable (without chain and draw).

    Raises:
        ArgumentError: names that the model does not have, or lengths that do not fit.
    """

    def __init__(self, sites: Mapping[str, Site], coords: Mapping | None, dims: Mapping | None, extra: Sequence = ()):
        self.coords = {k: np.asarray(v) for k, v in _mapping("coords", coords).items()}
        self.dims = {k: [v] if isinstance(v, str) else list(v) for k, v in _mapping("dims", dims).items()}
        self.sites = sites
        known = [n for n, s in sites.items() if s.role != "factor"]
        unknown = [n for n in self.dims if n not in known and n not in extra]
        if unknown:
            raise ArgumentError(f"dims= names {unknown[0]!r}, which is no variable of the model. It has {known}.")
        self._sizes: dict[str, int] = {}
        self._check(known)

    def _check(self, known: list[str]) -> None:
        used = set()
        for name in known:
            names = self.names(name, self.sites[name].shape)
            used |= set(names)
            for dim, size in zip(names, self.sites[name].shape, strict=True):
                if dim in self.coords and len(self.coords[dim]) != size:
                    raise ArgumentError(
                        f"coords[{dim!r}] has {len(self.coords[dim])} values, but '{name}' has length {size} there."
                    )
        stray = [d for d in self.coords if d not in used and not any(d in v for v in self.dims.values())]
        if stray:
            raise ArgumentError(f"coords= names the dimension {stray[0]!r}; the model has {sorted(used)}.")

    def names(self, variable: str, shape: Sequence[int]) -> list[str]:
        """One name per axis of a variable (chain and draw left out)."""
        given = self.dims.get(variable)
        if given is not None:
            if len(given) != len(shape):
                raise ArgumentError(
                    f"dims[{variable!r}] names {len(given)} axes {given}, but the variable has shape {tuple(shape)}."
                )
            return given
        site = self.sites.get(variable) or self.sites.get(variable.removesuffix("_sd"))
        read = site.dims if site else ()
        # A density has the axes of its site but for those of the event.
        whole = site is not None and tuple(shape) == tuple(site.shape[: len(shape)])
        read = read[: len(shape)] if whole else (None,) * len(shape)
        names = []
        for axis, (dim, size) in enumerate(zip(read, shape, strict=True)):
            free = dim is not None and dim not in self.sites and dim not in _SAMPLE and dim not in names
            fits = dim is not None and free and self._sizes.setdefault(dim, size) == size
            names.append(dim if fits else f"{variable}_dim_{axis}")
        return names


def _mapping(name: str, value: Any) -> dict:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name}= takes a dictionary such as {{'x': [...]}}; got {type(value).__name__}.")
    return dict(value)


def group(variables: Mapping[str, Any], labels: Labels, *, sampled: bool = True) -> Any:
    """One group: an `xarray.Dataset` of variables with dims (chain, draw, ...), or without where not sampled."""
    import xarray as xr

    skip = 2 if sampled else 0
    data, coords = {}, {}
    for name, value in variables.items():
        array = np.asarray(value)
        dims = labels.names(name, array.shape[skip:])
        data[name] = ((*_SAMPLE, *dims) if sampled else tuple(dims), array)
        for dim, size in zip(dims, array.shape[skip:], strict=True):
            given = labels.coords.get(dim)
            coords[dim] = given if given is not None and len(given) == size else np.arange(size)
        if sampled:
            coords |= {"chain": np.arange(array.shape[0]), "draw": np.arange(array.shape[1])}
    return xr.Dataset(data, coords)


def group_of_batch(variables: Mapping[str, Any], labels: Labels, *, skip: int) -> Any:
    """Like `group`, for variables with an axis of data sets after the `skip` axes of chains and draws."""
    import xarray as xr

    data = {}
    for name, value in variables.items():
        array = np.asarray(value)
        data[name] = ((*_SAMPLE[:skip], "dataset", *labels.names(name, array.shape[skip + 1 :])), array)
    sizes = {dim: size for dims, array in data.values() for dim, size in zip(dims, array.shape, strict=True)}
    coords = {}
    for dim, size in sizes.items():
        given = labels.coords.get(dim)
        coords[dim] = given if given is not None and len(given) == size else np.arange(size)
    return xr.Dataset(data, coords)


def series(variables: Mapping[str, Any], labels: Labels) -> Any:
    """A group of numbers about each step: an `xarray.Dataset` of variables with the dim ``time``."""
    import xarray as xr

    arrays = {name: np.asarray(value) for name, value in variables.items()}
    length = next(iter(arrays.values())).shape[0] if arrays else 0
    given = labels.coords.get("time")
    time = given if given is not None and len(given) == length else np.arange(length)
    return xr.Dataset({name: (("time",), value) for name, value in arrays.items()}, {"time": time})


def ensemble(ran: tuple[Any, Any], data: Mapping[str, Any], labels: Labels) -> Any:
    """Runs of the model that an ensemble method made: ``z`` (step, member, z_dim), and by observed site its predicted
    means (step, member, ...), NaN where a member failed.

    Args:
        ran: noise (step, member, d), and the means of all sites in one vector (step, member, m).
        data: the observed sites, in the order of that vector.
        labels: names of axes.
    """
    import xarray as xr

    z, outputs = (np.asarray(x) for x in ran)
    variables: dict[str, Any] = {"z": (("step", "member", "z_dim"), z)}
    start = 0
    for name, value in data.items():
        shape, size = np.shape(value), int(np.size(value))
        means = outputs[..., start : start + size].reshape(*outputs.shape[:2], *shape)
        variables[name if name != "z" else "z_mean"] = (("step", "member", *labels.names(name, shape)), means)
        start += size
    return xr.Dataset(variables)


def tree(groups: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    """The `xarray.DataTree` of groups that have variables, with attributes as netCDF can hold them."""
    import xarray as xr

    made = xr.DataTree.from_dict({name: data for name, data in groups.items() if len(data)})
    made.attrs = encode(attributes)
    return made


def encode(attributes: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Numbers and strings as they are, everything else as JSON text."""
    return {name: _encode(value) for name, value in attributes.items()}


def _encode(value: Any) -> int | float | str:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        value = np.asarray(value).item() if np.ndim(value) == 0 else np.asarray(value).tolist()
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return json.dumps(value)


def attributes(tree: Any) -> dict[str, Any]:
    """The attributes of a result, decoded.

    netCDF holds numbers and text; dictionaries, lists, None and Booleans are kept as JSON text.

    Args:
        tree: a result of `infer`.

    Returns:
        Attribute values by name.

    Example:
        >>> import pushforward as pf, xarray as xr
        >>> tree = xr.DataTree()
        >>> tree.attrs["options"] = '{"chains": 4}'
        >>> pf.attributes(tree)
        {'options': {'chains': 4}}
    """
    if not hasattr(tree, "attrs"):
        raise ArgumentError(f"attributes takes a result of infer (an xarray.DataTree); got {type(tree).__name__}.")
    return {name: _decode(value) for name, value in tree.attrs.items()}


def _decode(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, str) or not (value[:1] in ("{", "[") or value in ("null", "true", "false")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def latent_draws(tree: Any, names: Sequence[str]) -> dict[str, Array]:
    """Draws of latent sites out of a result, flattened to (chain * draw, ...).

    Raises:
        ArgumentError: not a result with a posterior.
        DataError: a latent site of the model is not in it.
    """
    if not hasattr(tree, "children") or "posterior" not in tree.children:
        raise ArgumentError(f"expected a result of infer with a group 'posterior'; got {type(tree).__name__}.")
    posterior = tree["posterior"]
    missing = [n for n in names if n not in posterior.data_vars]
    if missing:
        raise DataError(
            f"the model samples '{missing[0]}', which the posterior does not have. It has {list(posterior.data_vars)}. "
            "Pass the model that the posterior was inferred with."
        )
    found = {n: posterior[n].transpose(*_SAMPLE, ...).to_numpy() for n in names}
    return {n: v.reshape(-1, *v.shape[2:]) for n, v in found.items()}
