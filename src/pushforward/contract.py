"""The promises that every method keeps, runnable on anyone's own method.

Each check takes a method and raises `AssertionError` with what was promised and what was found. They share one small
linear Gaussian problem, so that a method is compiled three times in all.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward._errors import MethodError, PushforwardError
from pushforward._infer import infer
from pushforward.diagnostics import worst_convergence
from pushforward.methods._base import Method
from pushforward.methods._state import StateMethod
from pushforward.posterior import attributes

LIMIT = 5.0
"""Standard errors by which a moment may miss: for five independent moments a false-alarm rate of 3e-6."""

_NOISE = 0.5
_DENSITIES = ("sample_stats", "log_prior", "log_likelihood")
_ATTRIBUTES = (
    "method", "options", "returns", "versions", "key", "compile_seconds", "run_seconds", "evaluations",
    "gradient_evaluations", "outcome", "warnings",
)  # fmt: skip


class _Counter:
    """Counts runs of a model's Python body; without attributes of its own it does not change a fingerprint."""

    __slots__ = ("value",)

    def __init__(self):
        self.value = 0


_BODIES = _Counter()


def _problem(shift: float) -> Callable:
    """theta ~ N(shift, I), y ~ N(A theta, 0.25 I); `shift` is a closure, sizes are integers used in plates."""
    counter = _BODIES

    def linear(forward: Any, data: int, y: Any = None) -> None:
        counter.value += 1
        with numpyro.plate("parameter", 2):
            theta = numpyro.sample("theta", dist.Normal(shift, 1.0))
        numpyro.deterministic("total", theta.sum())
        with numpyro.plate("datum", data):
            numpyro.sample("y", dist.Normal(forward @ theta, _NOISE), obs=y)

    return linear


def _chain(shift: float) -> Callable:
    """The same law as a state-space model: theta is a state that does not move, and each step has one datum."""
    counter = _BODIES

    def linear(forward: Any, data: int, y: Any = None) -> None:
        counter.value += 1
        with numpyro.plate("parameter", 2):
            theta = numpyro.sample("theta", dist.Normal(shift, 1.0))
        numpyro.deterministic("total", theta.sum())

        def step(theta: Any, row: Any) -> tuple[Any, None]:
            numpyro.sample("y", dist.Normal(row[0] @ theta, _NOISE), obs=row[1])
            return theta, None

        scan(step, theta, (forward, y), length=data)

    return linear


def _inputs(data: int = 3) -> dict[str, Any]:
    """Fresh arrays, so that one traced in float64 is not met again in float32."""
    forward = np.array([[1.0, 0.5], [0.3, -1.0], [0.8, 0.9], [-0.4, 0.6]])[:data]
    return {"forward": forward, "data": data, "y": np.array([0.7, 1.4, -0.6, 0.9])[:data]}


def _exact(shift: float, forward: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and Cholesky factor of the precision of the posterior."""
    precision = np.eye(2) + forward.T @ forward / _NOISE**2
    mean = shift + np.linalg.solve(precision, forward.T @ (y - forward @ np.full(2, shift))) / _NOISE**2
    return mean, np.linalg.cholesky(precision)


def _infer(method: Method, *, shift: float = 0.0, key: int = 0, draws: int = 1000, **inputs: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = _chain(shift) if isinstance(method, StateMethod) else _problem(shift)
        return infer(model, method=method, key=key, draws=draws, progress=False, **(inputs or _inputs()))


def _theta(tree: Any) -> np.ndarray:
    return tree["posterior"]["theta"].transpose("chain", "draw", ...).to_numpy()


def _effective_size(values: np.ndarray) -> float:
    """Effective sample size of a series (chain, draw), at most its length; one chain counts as two halves."""
    import xarray as xr

    halves = values[:, : values.shape[1] // 2 * 2].reshape(-1, values.shape[1] // 2) if len(values) == 1 else values
    return min(worst_convergence(xr.Dataset({"series": (("chain", "draw"), halves)}))["ess_min"], values.size)


def _check_moments(tree: Any, shift: float, inputs: Mapping[str, Any], what: str) -> None:
    """First and second moments of exactly whitened draws, in standard errors by effective sample size."""
    mean, root = _exact(shift, inputs["forward"], inputs["y"])
    white = (_theta(tree).astype(float) - mean) @ root
    a, b = white[..., 0], white[..., 1]
    moments = {
        "mean of 1": (a, 1.0), "mean of 2": (b, 1.0), "variance of 1": (a**2 - 1, 2.0),
        "variance of 2": (b**2 - 1, 2.0), "covariance": (a * b, 1.0),
    }  # fmt: skip
    for name, (values, variance) in moments.items():
        size = _effective_size(values)
        score = values.mean() / (variance / size) ** 0.5
        assert np.isfinite(score), f"{what}: draws are not finite or do not move."
        assert abs(score) < LIMIT, (
            f"{what}: the {name} of draws whitened by the exact posterior misses by {score:.1f} standard errors "
            f"(effective sample size {size:.0f})."
        )


def check_posterior(method: Method) -> None:
    """Draws of a linear Gaussian problem have the exact posterior's moments (false-alarm rate 3e-6)."""
    if method.returns == "posterior":
        _check_moments(_infer(method), 0.0, _inputs(), "linear Gaussian posterior")


def check_groups(method: Method) -> None:
    """Groups, names, dims and attributes are those of every result, and the densities are right."""
    tree, inputs = _infer(method), _inputs()
    datum = "time" if isinstance(method, StateMethod) else "datum"
    expected = {
        "posterior": {"theta": ("chain", "draw", "parameter"), "total": ("chain", "draw")},
        "sample_stats": {"lp": ("chain", "draw")},
        "log_prior": {"theta": ("chain", "draw", "parameter")},
        "log_likelihood": {"y": ("chain", "draw", datum)},
        "observed_data": {"y": (datum,)},
        "constant_data": {"forward": ("forward_dim_0", "forward_dim_1")},
    }
    if not getattr(method, "densities", True):
        expected = {name: part for name, part in expected.items() if name not in _DENSITIES}
    for group, variables in expected.items():
        assert group in tree.children, f"the result has no group '{group}'; it has {list(tree.children)}."
        for name, dims in variables.items():
            assert name in tree[group].data_vars, f"group '{group}' has no '{name}'."
            found = tuple(map(str, tree[group][name].dims))
            assert found == dims, f"'{name}' in '{group}' has dims {found}, expected {dims}."
    theta = _theta(tree)
    residual = (inputs["y"] - theta @ inputs["forward"].T) / _NOISE
    likelihood = -0.5 * residual**2 - np.log(_NOISE) - 0.5 * np.log(2 * np.pi)
    if "log_likelihood" in expected:
        np.testing.assert_allclose(tree["log_likelihood"]["y"], likelihood, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(tree["log_prior"]["theta"], -0.5 * theta**2 - 0.5 * np.log(2 * np.pi), atol=1e-3)
    np.testing.assert_allclose(tree["posterior"]["total"], theta.sum(-1), atol=1e-4)
    said = attributes(tree)
    missing = [name for name in _ATTRIBUTES if name not in said]
    assert not missing, f"the result's attributes lack {missing}."
    assert said["method"] == type(method).__name__
    assert said["evaluations"] >= 1, "a method says how many runs of the model it cost."


def check_keys(method: Method) -> None:
    """The same key gives the same draws; another key gives others."""
    first, again, other = (_theta(_infer(method, key=key)) for key in (0, 0, 1))
    assert np.array_equal(first, again), "the same key gave other draws."
    if method.returns == "posterior":
        assert not np.isin(other, first).all(), "another key gave the same draws."


def check_precision(method: Method) -> None:
    """float32 gives float32, and float64 gives float64 with the exact posterior."""
    assert _theta(_infer(method)).dtype == jnp.zeros(()).dtype, "draws are not of JAX's default precision."
    with jax.enable_x64(True):
        tree = _infer(method)
        assert _theta(tree).dtype == np.float64, f"in float64 the draws are {_theta(tree).dtype}."
        if method.returns == "posterior":
            _check_moments(tree, 0.0, _inputs(), "linear Gaussian posterior in float64")


def check_compiled_once(method: Method) -> None:
    """Other data of the same shape run no Python of the model; a changed closure or size does, and is right."""
    _infer(method)
    before = _BODIES.value
    inputs = _inputs()
    tree = _infer(method, **(inputs | {"y": inputs["y"] + 1}))
    traced = _BODIES.value - before
    assert traced == 0, f"other data of the same shape ran the model's Python {traced} times more."
    assert attributes(tree)["compile_seconds"] == 0, "other data of the same shape were compiled again."
    changed = _inputs(4)
    tree = _infer(method, shift=3.0, **changed)
    # A state method's model may have been read before, for another method; the moments below still tell.
    seen = _BODIES.value > before or isinstance(method, StateMethod)
    assert seen, "a changed closure was not seen."
    if method.returns == "posterior":
        _check_moments(tree, 3.0, changed, "after a change of a closure and of the size of a plate")


def check_refusals(method: Method) -> None:
    """Bad input is refused by an error of this library, before the method runs."""
    inputs = _inputs()
    bad = {
        "no draws": {"draws": 0},
        "draws=2.5": {"draws": 2.5},
        "key='seed'": {"key": "seed"},
        "data all NaN": inputs | {"y": np.full(3, np.nan)},
        "infinite data": inputs | {"y": np.array([1.0, np.inf, 0.0])},
        "data of the wrong shape": inputs | {"y": np.ones(2)},
        "no data": inputs | {"y": None},
    }
    for name, given in bad.items():
        try:
            _infer(method, **({**inputs, **given} if "y" not in given else given))
        except PushforwardError:
            continue
        raise AssertionError(f"{name} was not refused.")


def check_files(method: Method) -> None:
    """A result written to netCDF and read again is equal, attributes included."""
    import xarray as xr

    tree = _infer(method)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.nc"
        tree.to_netcdf(path)
        with xr.open_datatree(path) as opened:
            back = opened.load()
    assert list(back.children) == list(tree.children), "netCDF lost a group."
    for group in tree.children:
        assert back[group].dataset.equals(tree[group].dataset), f"group '{group}' came back from netCDF changed."
    assert attributes(back) == attributes(tree), "attributes came back from netCDF changed."


CHECKS: dict[str, Callable[[Method], None]] = {
    "posterior": check_posterior,
    "groups": check_groups,
    "keys": check_keys,
    "precision": check_precision,
    "compiled_once": check_compiled_once,
    "refusals": check_refusals,
    "files": check_files,
}
"""All checks by name."""


def check(method: Method, *, only: tuple[str, ...] = tuple(CHECKS)) -> None:
    """Check that a method keeps the promises of all methods.

    The draws of a linear Gaussian problem are held against the exact posterior with a false-alarm rate of 3e-6 per
    comparison, three of them, all with fixed keys; methods whose `returns` is not "posterior" are exempt from that.

    Args:
        method: an instance, with settings that make it cheap.
        only: names of checks; see `CHECKS`.

    Raises:
        AssertionError: a promise is broken; the text lists all that are.
        MethodError: `method` is no method, or `only` names no check.

    Example:
        >>> import pushforward as pf
        >>> from pushforward import contract
        >>> contract.check(pf.Laplace(), only=("posterior", "keys"))
    """
    if not isinstance(method, Method):
        raise MethodError(f"contract.check takes an instance of a method such as pf.NUTS(); got {method!r:.80}.")
    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise MethodError(f"only= names {unknown[0]!r}; the checks are {list(CHECKS)}.")
    broken = []
    for name in only:
        try:
            CHECKS[name](method)
        except AssertionError as error:
            broken.append(f"{name}: {error}")
    if broken:
        raise AssertionError(f"{type(method).__name__} breaks {len(broken)} promises.\n" + "\n".join(broken))
