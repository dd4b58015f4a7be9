"""`InverseProblem`: a NumPyro model read as prior map, forward map and noise.

The model is a program that turns independent N(0, 1) noise ``z`` into parameters ``theta = T(z)`` and
predictions ``G(T(z))``. Everything a method needs is a function of ``z``.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pushforward._errors import DataError
from pushforward._types import Array, Float, Key, Model, Noise, SiteValues
from pushforward.math.noise import DataNoise
from pushforward.math.noise import flat as flat_noise
from pushforward.model import _flow, _refusals, _trace
from pushforward.model._arguments import check_model
from pushforward.model._laws import innermost, outside_domain
from pushforward.model._observed import gaussian_reason, mean_and_noise
from pushforward.model._reading import Site, Structure, read


class InverseProblem(eqx.Module):
    """A NumPyro model with its data, as functions of noise ``z ~ N(0, I)``.

    Under `jit` the data are traced; the rest is one static object, so that data of equal shapes do
    not recompile.

    Attributes:
        arrays: the model's array arguments.
        structure: what was read: sites, roles, layout of ``z``.
    """

    arrays: tuple[Array, ...]
    structure: Structure = eqx.field(static=True)

    @property
    def dimension(self) -> int:
        """Length d of the noise vector."""
        return self.structure.dimension

    @property
    def sites(self) -> dict[str, Site]:
        """Sites by name, in the order of the model."""
        return self.structure.sites

    @property
    def exact_prior(self) -> bool:
        """Whether the prior is exactly N(0, I) in ``z`` for every site."""
        return all(site.exact for site in self.sites.values())

    @property
    def why_not_continuous(self) -> str | None:
        """Why the latent sites have no joint density in real coordinates, or None where they have one."""
        for name in self.structure.discrete:
            site = self.sites[name]
            in_scan = any(self.sites[n].dims[:1] == ("time",) for n in self.structure.discrete)
            return _refusals.discrete(name, site.distribution, in_scan=in_scan)
        return None

    def with_key(self, key: Key) -> "InverseProblem":
        """The same problem with another key behind a stochastic likelihood; itself where it has none."""
        return InverseProblem((*self.arrays[:-1], key), self.structure) if self.structure.keyed else self

    @property
    def _call(self) -> _trace.Call:
        return self.structure.call(self.arrays)

    def _evaluate(self, assign: _trace.Assign, **options: bool) -> _trace.Evaluation:
        return _trace.evaluate(self._call, assign, fixed=self.structure.fixed, **options)

    def evaluate(self, z: Noise) -> _trace.Evaluation:
        """Sites, deterministics and densities at ``z``."""
        return self._evaluate(_trace.from_noise(self.structure.slots, z))

    def evaluate_unconstrained(self, position: SiteValues) -> _trace.Evaluation:
        """The same at a point of NumPyro's unconstrained coordinates."""
        return self._evaluate(_trace.from_unconstrained(self.structure.slots, position))

    def evaluate_sites(self, values: SiteValues) -> _trace.Evaluation:
        """The same at given values of the latent sites."""
        return self._evaluate(_trace.from_values(self.structure.slots, values))

    def constrain(self, z: Noise | SiteValues) -> dict[str, Array]:
        """The prior map T: values of the latent sites at ``z``; data need not be given."""
        trace = self._with_laws(z)
        return {name: trace[name]["value"] for name in self.structure.slots}

    def noise_of(self, values: SiteValues) -> dict[str, Array]:
        """The noise of latent sites at given values, the inverse of the prior map; sites without a value are at 0."""
        return _trace.noise_of(self._call, self.structure.slots, self.structure.data, values)

    def log_prior(self, z: Noise) -> Array:
        """log N(z; 0, I)."""
        return -0.5 * jnp.sum(z**2) - 0.5 * z.size * jnp.log(2 * jnp.pi)

    def log_likelihood(self, z: Noise) -> Array:
        """log p(data | T(z)), with what inexact prior maps and `numpyro.factor` owe added."""
        return self.evaluate(z).total_log_likelihood

    def log_density(self, z: Noise) -> Array:
        """log prior plus log likelihood in ``z``: the unnormalised log posterior."""
        return self.log_prior(z) + self.log_likelihood(z)

    def potential(self, position: SiteValues) -> Array:
        """NumPyro's own potential energy, independent of our prior map."""
        return _trace.potential(self._call, position)

    def unconstrained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of NumPyro's unconstrained coordinates, by site."""
        slots = self.structure.slots.values()
        return {s.name: s.unconstrained_shape if s.steps is None else (s.steps, *s.unconstrained_shape) for s in slots}

    def simulate(self, key: Key, n: int) -> tuple[dict[str, Array], dict[str, Array], Array]:
        """Draw ``n`` times from prior and likelihood.

        Args:
            key: JAX key.
            n: number of simulations.

        Returns:
            Latent sites, data (sites and deterministics that were named as data), and the noise of
            shape (n, d), each with a leading axis of length ``n``.
        """
        noise_key, data_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (n, self.dimension))

        def one(z: Array, key: Array) -> tuple[dict, dict]:
            found = self.simulate_at(z, key)
            named = {k: v for k, v in found.deterministics.items() if k in self.structure.data}
            return found.sites, found.data | named

        sites, data = jax.vmap(one)(noise, jax.random.split(data_key, n))
        return sites, data, noise

    def simulate_at(self, z: Noise, key: Key) -> _trace.Evaluation:
        """Run the model at ``z`` with its data drawn anew."""
        return self._simulating(_trace.from_noise(self.structure.slots, z), key)

    def predict_at(self, values: SiteValues, key: Key) -> _trace.Evaluation:
        """Run the model at given latent sites; data, and sites without a value, are drawn."""
        return self._simulating(_trace.from_values(self.structure.slots, values), key)

    def _simulating(self, assign: _trace.Assign, key: Key) -> _trace.Evaluation:
        assign = _trace.simulating(assign, self.structure.data, key)
        found = self._evaluate(assign, fill_missing=False)
        late = {k: v for k, v in found.sites.items() if k in self.structure.data}
        rest = {k: v for k, v in found.sites.items() if k not in late}
        return eqx.tree_at(lambda e: (e.sites, e.data), found, (rest, found.data | late))

    def observed_values(self) -> dict[str, Array]:
        """Data as the model sees them, missing values included, by site."""
        direct = self.structure.passed_through
        if direct is not None:
            return {name: self.arrays[index] for name, index in direct.items()}
        return _observed(self)

    def forward(self, z: Noise | SiteValues) -> "GaussianPrediction":
        """Prediction and noise of the observed sites at ``z``, where the likelihood is Gaussian."""
        trace = self._with_laws(z)
        laws = {n: (s["fn"], s["value"]) for n, s in trace.items() if n in self.structure.data and "fn" in s}
        parts = {n: mean_and_noise(law, jnp.shape(v)) for n, (law, v) in laws.items()}
        return GaussianPrediction(
            {n: mean for n, (mean, _) in parts.items()},
            {n: noise for n, (_, noise) in parts.items()},
            {n: v for n, (_, v) in laws.items()},
        )

    def why_not_gaussian(self) -> str | None:
        """Why `forward` does not describe the likelihood, or None where it does."""
        known = self.structure.remembered
        if "why_not_gaussian" not in known:
            known["why_not_gaussian"] = self._why_not_gaussian()
        return known["why_not_gaussian"]

    def _why_not_gaussian(self) -> str | None:
        for name, reason in eqx.filter_eval_shape(self._observed_laws).items():
            if reason is not None:
                return f"site '{name}' {reason}"
        moving = _moving_noise(self)
        if moving:
            return (
                f"the noise of site '{moving[0]}' depends on the latent sites {moving[1]}; "
                "fix them, or use a method that samples its data"
            )
        return None

    def _observed_laws(self) -> dict[str, str | None]:
        trace = self._with_laws(jnp.zeros(self.dimension))
        data = self.structure.data
        found = {n: gaussian_reason(s) for n, s in trace.items() if n in data or s.get("is_observed")}
        return {n: r for n, r in found.items() if not n.startswith(_trace._CORRECTION)}

    def _with_laws(self, z: Noise | SiteValues) -> dict[str, dict]:
        """Trace at ``z`` with data as given, missing values included, and 0 where none are given."""
        assign = _trace.with_data(_trace.from_noise(self.structure.slots, z), self.structure.data)
        return _trace.run(self._call, assign, fill_missing=False)


class GaussianPrediction(eqx.Module):
    """``data ~ N(mean, noise)`` by site: means, noise (one of the forms of `math.noise`), and data."""

    mean: dict[str, Float[Array, "..."]]
    noise: dict[str, DataNoise]
    data: dict[str, Float[Array, "..."]]


@eqx.filter_jit
def _observed(problem: InverseProblem) -> dict[str, Array]:
    z = jnp.zeros(problem.dimension)
    trace = _trace.run(problem._call, _trace.from_noise(problem.structure.slots, z), fill_missing=False)
    names, extra = problem.structure.data, problem.structure.without_density
    return {n: s["value"] for n, s in trace.items() if n in extra or (n in names and s.get("is_observed"))}


def _moving_noise(problem: InverseProblem) -> tuple[str, list[str]] | None:
    """The first data site whose noise depends on latent sites, with their names, by data flow."""
    slots = problem.structure.slots
    zeros = {n: jnp.zeros(s.shape) for n, s in slots.items()}

    def noise(**pieces: Array) -> dict[str, Array]:
        return {name: flat_noise(value) for name, value in problem.forward(pieces).noise.items()}

    found = _flow.data_flow(noise, zeros)
    for name, sources in found.items():
        if sources:
            return name, sorted(sources)
    return None


def read_problem(
    model: Model, args: tuple = (), kwargs: dict[str, Any] | None = None, observed: tuple[str, ...] | None = None
) -> InverseProblem:
    """Read a NumPyro model called with `args` and `kwargs`.

    Args:
        model: a NumPyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        observed: names of data sites, for models that are called without their data.

    Raises:
        ArgumentError: the call does not bind.
        ModelError: a site cannot be read; the text names it and the way out.
    """
    kwargs = kwargs or {}
    check_model(model, args, kwargs)
    structure, arrays = read(model, args, kwargs, observed)
    return InverseProblem(arrays, structure)


def check_data(problem: InverseProblem) -> list[str]:
    """Refuse unusable data at the door; return warnings.

    Raises:
        DataError: infinite values, nothing but NaN, an event missing in part, values outside the
            support, or a missing value that another site depends on.
    """
    notes, missing = [], []
    for name, value in problem.observed_values().items():
        array, site = np.asarray(value), problem.sites[name]
        if array.dtype.kind != "f":
            _check_support(site, array, np.ones(array.shape, bool))
            continue
        if np.isinf(array).any():
            where = tuple(int(i) for i in np.argwhere(np.isinf(array))[0])
            raise DataError(f"data '{name}' are infinite at index {where}. Correct them, or write NaN for missing.")
        absent = np.isnan(array)
        if array.size and absent.all():
            raise DataError(f"data '{name}' are all NaN, which means missing: there is nothing to infer from.")
        if absent.any():
            missing.append(name)
            _check_events(site, absent)
            notes.append(f"{int(absent.sum())} of {array.size} values of '{name}' are NaN and count as missing.")
        _check_support(site, array, ~absent)
    if missing:
        _check_dependents(problem, tuple(missing))
    return notes


def shape_warnings(problem: InverseProblem) -> list[str]:
    """Data that NumPyro broadcasts against more predictions than there are data."""
    return [
        f"data '{site.name}' of shape {site.shape} are compared with predictions of shape {site.broadcast}, so each "
        "datum counts several times. If that is not meant, reshape the data or the prediction."
        for site in problem.sites.values()
        if site.role == "data" and site.broadcast not in ((), site.shape)
    ]


def _check_events(site: Site, absent: np.ndarray) -> None:
    if site.missing == "elements":
        return
    axes = tuple(range(absent.ndim - site.event_dim, absent.ndim))
    if (absent.any(axes) & ~absent.all(axes)).any():
        raise DataError(
            f"data '{site.name}' ({site.distribution}) are missing in part within an event, which this distribution "
            "cannot leave out. Mark the whole event as NaN, or use a factorised distribution or MultivariateNormal."
        )


def _check_support(site: Site, array: np.ndarray, present: np.ndarray) -> None:
    if site.support is None or array.size == 0:
        return
    filled = array if present.all() else np.where(present, array, array[present].flat[0])
    try:
        inside = np.asarray(site.support(filled))
    except (TypeError, ValueError, NotImplementedError):
        return
    if not inside.all():
        raise DataError(
            f"data '{site.name}' have values outside the support of {site.distribution} "
            f"({type(site.support).__name__.strip('_')}): {int((~inside).sum())} of {inside.size}. Correct them, "
            "write NaN for missing, or choose another distribution."
        )


def _check_dependents(problem: InverseProblem, names: tuple[str, ...]) -> None:
    z = jnp.zeros(problem.dimension)
    with numpyro.validation_enabled(False):
        found = _flow.dependence(problem._call, problem.structure.slots, z, names)
    for other, sources in found.items():
        for name in sources & set(names) - {other}:
            raise DataError(
                f"data '{name}' have missing values, and site '{other}' depends on '{name}'. Impute them: "
                f"numpyro.sample('{name}', ..., obs={name}, obs_mask=~jnp.isnan({name}))."
            )


def diagnose(problem: InverseProblem) -> None:
    """Say why no run can start: look at all sites at the prior's centre.

    Raises:
        DataError: a parameter of a site's distribution is outside its domain, or its log density is not finite.
    """
    z = jnp.zeros(problem.dimension)
    with numpyro.validation_enabled(False):
        trace = _trace.run(problem._call, _trace.from_noise(problem.structure.slots, z))
    for name, site in trace.items():
        if site["type"] != "sample":
            continue
        if isinstance(site["fn"], dist.Unit):
            _check_factor(name, site)
            continue
        part = "noise" if site["is_observed"] else "prior"
        for parameter, value in outside_domain(site["fn"]):
            raise DataError(
                f"the {part} of site '{name}' is not usable: its {parameter} is {value:.6g} with all latent sites at "
                f"the prior's centre, outside the domain of {type(innermost(site['fn'])).__name__}. Look for NaN, "
                "infinity and zeros in the model's other arguments."
            )
        with numpyro.validation_enabled(False):
            density = jnp.sum(site["fn"].log_prob(site["value"]))
        if site["is_observed"] and not bool(jnp.isfinite(density)):
            raise DataError(
                f"the log density of site '{name}' is {float(density)} with all latent sites at the prior's centre. "
                "Look for NaN or infinity in the model's other arguments, and for predictions outside the support."
            )


def _check_factor(name: str, site: dict) -> None:
    value = float(jnp.sum(site["fn"].log_prob(site["value"])))
    if not np.isfinite(value) and not name.startswith(_trace._CORRECTION):
        raise DataError(
            f"numpyro.factor '{name}' is {value} with all latent sites at the prior's centre. It takes a log "
            "density, finite wherever the prior has mass."
        )
