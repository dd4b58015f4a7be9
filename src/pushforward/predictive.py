"""`prior`, `predict` and `add_log_likelihood`: groups that need the model once more."""

from typing import Any

import jax

from pushforward import _evaluate, posterior
from pushforward._errors import ArgumentError, DataError
from pushforward._infer import _argument_names, _constants, _typed_key
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.model.inverse import InverseProblem, check_data, read_problem

_GROUPS = ("posterior_predictive", "predictions")


def prior(
    model: Model,
    *args: Any,
    draws: int = 1000,
    observed: tuple[str, ...] | None = None,
    key: int | Key = 0,
    coords: dict[str, Any] | None = None,
    dims: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Draw from the prior and from the data that it predicts.

    Args:
        model: a NumPyro model.
        *args: its positional arguments.
        draws: number of draws.
        observed: names of the data sites, where no argument observes them.
        key: an integer or a typed JAX key.
        coords: coordinate values by dimension.
        dims: names of the axes of variables.
        **kwargs: the model's named arguments.

    Returns:
        An `xarray.DataTree` with the groups ``prior`` and ``prior_predictive`` (and ``observed_data`` where
        data are given); without data sites all sites are in ``prior``.

    Example:
        >>> import numpyro, numpyro.distributions as dist, pushforward as pf
        >>> def model(y=None):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 10))
        ...     numpyro.sample("y", dist.Normal(mean, 1), obs=y)
        >>> tree = pf.prior(model, observed="y", draws=200)
        >>> sorted(tree.children)
        ['prior', 'prior_predictive']
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ArgumentError(f"draws= takes a positive integer; got {draws!r}.")
    key, label = _typed_key(key)
    problem = read_problem(model, args, kwargs, observed)
    labels = posterior.Labels(problem.sites, coords, dims, _argument_names(model, args, kwargs))
    runner = Runner()
    sites, data = runner.call(_simulate, problem, key, draws)
    groups = {
        "prior": posterior.group({k: v[None] for k, v in sites.items()}, labels),
        "prior_predictive": posterior.group({k: v[None] for k, v in data.items()}, labels),
        "observed_data": posterior.group(_given(problem), labels, sampled=False),
        "constant_data": posterior.group(_constants(problem, model, args, kwargs), labels, sampled=False),
    }
    return posterior.tree(groups, {"method": "prior", "key": label, "evaluations": draws})


def _simulate(problem: InverseProblem, key: Key, draws: int) -> tuple[dict[str, Array], dict[str, Array]]:
    noise_key, data_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (draws, problem.dimension))

    def one(item: tuple) -> tuple[dict, dict]:
        found = problem.simulate_at(*item)
        values = found.sites | found.deterministics
        named = problem.structure.data
        late = {k: v for k, v in found.deterministics.items() if k in named}
        return {k: v for k, v in values.items() if k not in named}, found.data | late

    return _evaluate.many(one, (noise, jax.random.split(data_key, draws)), None)


def _given(problem: InverseProblem) -> dict[str, Array]:
    return problem.observed_values() if problem.structure.data else {}


def predict(
    tree: Any, model: Model, *args: Any, group: str = "posterior_predictive", key: int | Key = 0, **kwargs: Any
) -> Any:
    """Draw data from the posterior predictive distribution, also for new arguments of the model.

    Args:
        tree: a result of `infer`.
        model: the model.
        *args: its positional arguments, the old ones or new ones. Data may be left out.
        group: "posterior_predictive", or "predictions" for new arguments.
        key: an integer or a typed JAX key.
        **kwargs: the model's named arguments.

    Returns:
        A copy of the tree with the group; sites that the posterior does not have are drawn.

    Raises:
        DataError: the posterior lacks a latent site of the model, or has it in another shape.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> def line(x, y=None):
        ...     slope = numpyro.sample("slope", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)
        >>> tree = pf.infer(line, method="laplace", x=np.arange(3.0), y=np.arange(3.0))
        >>> new = pf.predict(tree, line, x=np.arange(5.0), group="predictions")
        >>> new["predictions"]["y"].shape
        (1, 1000, 5)
    """
    if group not in _GROUPS:
        raise ArgumentError(f"group= takes one of {list(_GROUPS)}; got {group!r}.")
    key, _ = _typed_key(key)
    problem = read_problem(model, args, kwargs)
    known = set(tree["posterior"].data_vars) if "posterior" in getattr(tree, "children", {}) else set()
    latent = [n for n in problem.structure.slots if n in known]
    values = posterior.latent_draws(tree, latent)
    if not latent:
        raise DataError(f"the posterior has none of the model's latent sites {list(problem.structure.slots)}.")
    _check_shapes(problem, values)
    open_sites = tuple(n for n in problem.structure.slots if n not in known)
    problem = read_problem(model, args, kwargs, open_sites) if open_sites else problem
    drawn = Runner().call(_evaluate.predictions_at, problem, values, key, None)
    chains, draws = tree["posterior"].sizes["chain"], tree["posterior"].sizes["draw"]
    shaped = {n: v.reshape(chains, draws, *v.shape[1:]) for n, v in drawn.items()}
    labels = posterior.Labels(problem.sites, None, None, _argument_names(model, args, kwargs))
    return _with(tree, group, posterior.group(shaped, labels))


def add_log_likelihood(tree: Any, model: Model, *args: Any, **kwargs: Any) -> Any:
    """Add the elementwise log likelihood that ArviZ's `loo` needs, whatever its size.

    Args:
        tree: a result of `infer`.
        model: the model that it was inferred with.
        *args: the model's positional arguments, with its data.
        **kwargs: the model's named arguments, with its data.

    Returns:
        A copy of the tree with the group ``log_likelihood``.
    """
    problem = read_problem(model, args, kwargs)
    if not problem.structure.data:
        raise DataError("the model has no observed site with these arguments; pass its data, as in infer.")
    check_data(problem)
    values = posterior.latent_draws(tree, list(problem.structure.slots))
    _check_shapes(problem, values)
    found = Runner().call(_evaluate.likelihood_at, problem, values, None)
    chains, draws = tree["posterior"].sizes["chain"], tree["posterior"].sizes["draw"]
    shaped = {n: v.reshape(chains, draws, *v.shape[1:]) for n, v in found.items()}
    labels = posterior.Labels(problem.sites, None, None, _argument_names(model, args, kwargs))
    return _with(tree, "log_likelihood", posterior.group(shaped, labels))


def _with(tree: Any, name: str, data: Any) -> Any:
    import xarray as xr

    copied = tree.copy()
    copied[name] = xr.DataTree(data)
    return copied


def _check_shapes(problem: InverseProblem, values: dict[str, Array]) -> None:
    for name, value in values.items():
        expected = problem.sites[name].shape
        if tuple(value.shape[1:]) != tuple(expected):
            raise DataError(
                f"the posterior has '{name}' with shape {tuple(value.shape[1:])}, but with these arguments the model "
                f"samples it with shape {tuple(expected)}. Keep the arguments that size latent sites."
            )
