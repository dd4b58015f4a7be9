"""`calibrate`: whether the posteriors of a method are right, on data simulated from the model."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pushforward import posterior
from pushforward._errors import ArgumentError
from pushforward._infer import _typed_key
from pushforward._repetitions import (
    Posterior,
    Record,
    Simulated,
    Study,
    columns,
    parameter_names,
    posteriors,
    prepare,
    simulate,
)
from pushforward._runner import Runner
from pushforward._types import Key, Model
from pushforward.math import ranks

LIKELIHOOD, TARP = "log_likelihood", "tarp"
SMALLEST_STUDY = 20
_CREDIBILITY = np.linspace(0, 1, 101)
_FEW_DRAWS = 20


def calibrate(
    method: Any,
    model: Model,
    *args: Any,
    n: int = 200,
    draws: int = 500,
    states: Any = None,
    observed: tuple[str, ...] | str | None = None,
    parameters: Sequence[str] | str | None = None,
    level: float = 0.05,
    key: int | Key = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """Simulation-based calibration of a method on a model.

    Parameters and data are drawn n times from the model, `theta ~ p(theta), y ~ p(y | theta)`, by NumPyro's own
    samplers. For each data set the method is run, and the rank of the true parameters among its draws taken. Where the
    method gives exact posteriors the ranks are uniform; ranks heaped at both ends mean draws that are too narrow, in
    the middle too wide, at one end biased. Three kinds of ranks are tested:

    * of each scalar parameter (Talts et al. 2018), from which the coverage of central intervals follows;
    * of the log likelihood of the truth among those of the draws, where the method gives it. It sees what ranks of
      parameters do not, such as draws that ignore the data (Modrák et al. 2023);
    * of the distance of the truth from a random prior point (TARP, Lemos et al. 2023), in units of the prior's
      quartiles. It looks at all parameters together.

    Each has an exact p-value (Säilynoja, Bürkner and Vehtari 2022); Holm's adjustment for their number makes the
    probability that an exact method is called uncalibrated at most `level`. Draws of chains are thinned to their
    effective number first, and ties broken at random.

    A method that passes is right on average over the prior. For the data at hand see `pf.local_check`.

    Args:
        method: an instance such as ``pf.GaussianVI()`` or a name, as in `infer`; trained, if it learns.
        model: a NumPyro model. Data that are given are used for their shapes and missing values only.
        *args: the model's positional arguments.
        n: number of data sets, at least 20. The cost is n runs of the method and one compilation.
        draws: draws per chain.
        states: a state method, as in `infer`.
        observed: names of the data sites, where no argument observes them.
        parameters: sites to look at; None takes all latent sites. Each scalar is one more test, so with
            trajectories choose few. Deterministic sites can be named.
        level: probability to reject an exact method.
        key: an integer or a typed JAX key.
        progress: whether to show a progress bar.
        **kwargs: the model's named arguments.

    Returns:
        An `xarray.DataTree` with groups

        * ``calibration``: ranks as numbers in (0, 1), ``(rank + V) / (L + 1)`` with V uniform, by parameter, dims
          (dataset, ...), with ``log_likelihood`` and ``tarp``;
        * ``p_value``, ``p_value_adjusted``: of each of them, as it is and adjusted for their number;
        * ``coverage``: share of data sets whose truth is in the central interval of each credibility, by parameter;
          for ``tarp`` the expected coverage of TARP's regions;
        * ``prior``, ``prior_predictive``: true parameters and data, dims (dataset, ...);
        * ``sample_stats``: `independent_draws`, how many were ranked among, dims (dataset,);

        and attributes `calibrated`, `p_value` (the least adjusted one), `worst` (whose it is), `level`, `tests`,
        `datasets`, `failed`, `failures`, `warnings` (of the runs, counted by kind), `method`, `options`.

    Raises:
        ArgumentError: a wrong option, or a parameter that the model does not have.
        DataError: nothing says which sites are data.
        ModelError: the model does not simulate what its density says.
        InferenceError: more than a tenth of the data sets had no usable posterior.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv 1804.06788; Modrák, Moon, Kim, Bürkner, Huurre,
        Faltejsková, Gelman and Vehtari (2023), Bayesian Anal., doi:10.1214/23-BA1404; Lemos, Coogan, Hezaveh and
        Perreault-Levasseur (2023), arXiv 2302.03026; Säilynoja, Bürkner and Vehtari (2022), Stat. Comput. 32, 32.

    Example:
        >>> import numpyro, numpyro.distributions as dist, pushforward as pf
        >>> def model(y=None):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 2))
        ...     numpyro.sample("y", dist.Normal(mean, 1).expand([3]), obs=y)
        >>> tree = pf.calibrate("gaussian_vi", model, observed="y", n=50, progress=False)
        >>> sorted(tree["p_value"])
        ['log_likelihood', 'mean', 'tarp']
    """
    _check_options(n, level, progress)
    key, label = _typed_key(key)
    study = prepare(calibrate, method, model, args, kwargs, states, draws, observed)
    names = parameter_names(study, parameters)
    taken = [name for name in names if name in (LIKELIHOOD, TARP)]
    if taken:
        raise ArgumentError(
            f"the model has a site '{taken[0]}', a name that calibrate keeps for itself. Rename it, or choose others "
            "with parameters=."
        )
    keys = jax.random.split(key, 3)
    simulated = simulate(study, keys[0], 2 * n, Runner())
    record = Record("calibrate", n, progress=progress)
    ranked = _Ranked(simulated, names, n, np.random.default_rng(np.asarray(jax.random.key_data(keys[1])).tolist()))
    for run in record.usable(posteriors(study, simulated, names, keys[2], range(n))):
        ranked.add(run)
    tree = _tree(study, ranked, record, {"level": level, "key": label, "n": n})
    record.warn()
    return tree


def _check_options(n: Any, level: Any, progress: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < SMALLEST_STUDY:
        raise ArgumentError(
            f"n= takes the number of data sets, an integer of at least {SMALLEST_STUDY}; got {n!r}. With 50 a standard "
            "deviation that is 0.6 of the right one is found, with 200 one that is 0.8 of it."
        )
    if isinstance(level, bool) or not isinstance(level, int | float) or not 1e-9 <= level < 1:
        raise ArgumentError(f"level= takes a probability such as 0.05; got {level!r}.")
    if not isinstance(progress, bool):
        raise ArgumentError(f"progress= takes True or False; got {progress!r}.")


class _Ranked:
    """Ranks so far: one row of scalars for each data set."""

    def __init__(self, simulated: Simulated, names: tuple[str, ...], n: int, rng: np.random.Generator):
        self.simulated, self.names, self.rng = simulated, names, rng
        self.shapes = {name: simulated.truth[name].shape[1:] for name in names}
        self.truth = columns({name: simulated.truth[name][:n] for name in names}, 1)
        # Reference points and scale of TARP know nothing of the truths: they come from other draws of the prior.
        others = columns({name: simulated.truth[name][n:] for name in names}, 1)
        good = np.isfinite(others).all(1)
        self.references, self.scale = others[good], ranks.spread(others[good]) if good.any() else np.ones(1)
        self.datasets: list[int] = []
        self.independent: list[int] = []
        self.rows: list[np.ndarray] = []
        self.likelihoods: list[float | None] = []
        self.tarp: list[float] = []

    def add(self, run: Posterior) -> None:
        """Rank the truth of one data set among its draws."""
        rows, truth = columns(run.draws, 2), self.truth[run.index]
        if run.log_likelihood is not None:
            drawn, true = run.log_likelihood
            rows, truth = np.concatenate([rows, drawn[..., None]], -1), np.append(truth, true)
        kept = ranks.thinned(rows, _effective(rows))
        pit = ranks.randomised_pit(truth, kept, self.rng.uniform(size=len(truth)))
        size = self.truth.shape[1]
        reference = self.references[self.rng.integers(len(self.references))]
        tarp = ranks.distance_pit(truth[:size], kept[:, :size], reference, self.scale, self.rng.uniform())
        self.datasets.append(run.index)
        self.independent.append(len(kept))
        self.rows.append(pit[:size])
        self.likelihoods.append(float(pit[size]) if run.log_likelihood is not None else None)
        self.tarp.append(tarp)

    def table(self) -> dict[str, np.ndarray]:
        """Ranks by name, shape (dataset, ...)."""
        rows, found, start = np.asarray(self.rows), {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape, dtype=int))
            found[name] = rows[:, start : start + size].reshape(len(rows), *shape)
            start += size
        if all(v is not None for v in self.likelihoods):
            found[LIKELIHOOD] = np.asarray(self.likelihoods, float)
        return found | {TARP: np.asarray(self.tarp)}


def _effective(rows: np.ndarray) -> float:
    """How many independent draws chains of shape (chain, draw, scalars) are worth: the least over scalars.

    Where draws repeat, as those of resampled particles do, no more than there are distinct ones.
    """
    from arviz_stats.base import array_stats

    chains, length = rows.shape[:2]
    finite = np.isfinite(rows).all(axis=(0, 1))
    moving = rows[..., finite]
    moving = moving[..., np.ptp(moving, axis=(0, 1)) > 0]
    if length < 4 or not moving.shape[-1]:
        return float(chains * length)
    with np.errstate(divide="ignore", invalid="ignore"):
        ess = np.atleast_1d(array_stats.ess(moving, chain_axis=0, draw_axis=1, method="bulk"))
    # No number where chains stand still at different places: one draw each.
    least = float(np.min(np.where(np.isfinite(ess), ess, chains)))
    real = moving[..., np.any(moving != np.round(moving), axis=(0, 1))]
    distinct = len(np.unique(real.reshape(chains * length, -1), axis=0)) if real.shape[-1] else least
    return min(least, float(distinct))


def _tree(study: Study, ranked: _Ranked, record: Record, options: dict[str, Any]) -> Any:
    """Test the ranks and write the result."""
    pit, sites = ranked.table(), study.problem.sites
    labels = posterior.Labels(sites, None, None)
    raw = {name: ranks.uniformity_p_value(values) for name, values in pit.items()}
    flat = np.concatenate([np.ravel(p) for p in raw.values()])
    adjusted = _split(ranks.holm(flat), raw)
    worst = min(adjusted, key=lambda name: float(np.min(adjusted[name])))
    coverage = {name: ranks.central_coverage(values, _CREDIBILITY) for name, values in pit.items()}
    coverage[TARP] = ranks.distribution(pit[TARP], _CREDIBILITY)
    simulated, chosen = ranked.simulated, np.asarray(ranked.datasets)
    along = {"dataset": chosen}
    groups = {
        "calibration": _group(pit, labels, along),
        "p_value": _group(raw, labels, {}),
        "p_value_adjusted": _group(adjusted, labels, {}),
        "coverage": _group(coverage, labels, {"credibility": _CREDIBILITY}),
        "prior": _group({n: v[chosen] for n, v in simulated.truth.items()}, labels, along),
        "prior_predictive": _group({n: v[chosen] for n, v in simulated.data.items()}, labels, along),
        "sample_stats": _group({"independent_draws": np.asarray(ranked.independent)}, labels, along),
    }
    least = float(np.min(adjusted[worst]))
    attributes = {
        "calibrated": bool(least > options["level"]),
        "p_value": least,
        "worst": _element(worst, adjusted[worst]),
        "level": float(options["level"]),
        "tests": len(flat),
        "datasets": len(chosen),
        "key": options["key"],
        "draws": study.draws,
        "observed": list(study.observed),
    }
    attributes |= record.failed_attributes() | record.run_attributes()
    attributes |= {"warnings": record.warnings + _few(ranked.independent)}
    attributes |= {} if LIKELIHOOD in pit else {"notes": ["the method gives no log_likelihood, so it is not tested."]}
    return posterior.tree(groups, attributes)


def _split(flat: np.ndarray, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ends = np.cumsum([np.size(v) for v in like.values()])[:-1]
    return {n: part.reshape(np.shape(like[n])) for n, part in zip(like, np.split(flat, ends), strict=True)}


def _element(name: str, values: np.ndarray) -> str:
    where = np.unravel_index(int(np.argmin(values)), np.shape(values))
    return f"{name}[{','.join(str(int(i)) for i in where)}]" if where else name


def _few(independent: list[int]) -> list[str]:
    middle = float(np.median(independent))
    if middle >= _FEW_DRAWS:
        return []
    return [
        f"half of the data sets have {middle:.0f} independent draws or fewer: ranks are coarse, the tests "
        "weak. Give more draws."
    ]


def _group(values: dict[str, np.ndarray], labels: posterior.Labels, leading: dict[str, np.ndarray]) -> Any:
    """A dataset of variables with the same leading axes."""
    import xarray as xr

    skip, data, coords = len(leading), {}, dict(leading)
    for name, value in values.items():
        array = np.asarray(value)
        dims = labels.names(name, array.shape[skip:])
        data[name] = ((*leading, *dims), array)
        coords |= {d: np.arange(s) for d, s in zip(dims, array.shape[skip:], strict=True)}
    return xr.Dataset(data, coords)
