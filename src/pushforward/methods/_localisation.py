"""Localisations of ensemble inversion: which parameters may learn from which data."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import MethodError
from pushforward._types import Array
from pushforward.math import inversion_local
from pushforward.math.ensemble_local import HALF_SUPPORT
from pushforward.math.inversion_local import Blocks, Term
from pushforward.math.noise import LowRank
from pushforward.methods._base import check_positive
from pushforward.model.inverse import InverseProblem


class Localisation(eqx.Module):
    """Base of localisations; subclasses are final."""

    @abstractmethod
    def plan(self, problem: InverseProblem, m: int) -> Any:
        """What a step calls: (z, outputs, terms, count) -> z after the update.

        Args:
            problem: with d latent numbers.
            m: number of data.

        Raises:
            MethodError: coordinates do not fit the model.
        """


class ByCorrelation(Localisation):
    """Tapers the gain of a parameter and a datum by the significance of their correlation in the ensemble.

    The factor is ``max(0, 1 - (significance / t)^2)``, t the t statistic of the sample correlation: 0 for what chance
    explains, close to 1 for a correlation of many standard errors. It needs no coordinates, and costs a product of
    parameters x data x members.

    Args:
        significance: standard errors at which a correlation begins to count. 1 takes away what chance adds to a squared
            correlation on average, and suits parameters that learn a little from each of many data, as coefficients of
            a series do. 2 or 3 suit parameters of which each has few data of its own. 0 switches localisation off.

    Reference:
        Luo and Bhakta (2020), doi:10.1016/j.petrol.2019.106559 (thresholds of correlations).
    """

    significance: float = 2.0

    def __check_init__(self):
        value = self.significance
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise MethodError(f"ByCorrelation(significance=...) takes a number of at least 0; got {value!r}.")

    def plan(self, problem: InverseProblem, m: int) -> Any:
        """See `Localisation.plan`."""
        return _Correlated(self.significance)


class ByDistance(Localisation):
    """Tapers the gain of a parameter and a datum by their distance (Gaspari and Cohn 1999).

    Args:
        radius: in units of the coordinates; the taper is .63 there and 0 from 2 x 1.82 radius on.
        parameters: coordinates of latent sites by name, of shape (*shape of the site, k), or (n,) on a line. Their
            elements must be independent of each other in the prior. Sites left out learn from all data.
        data: coordinates of observed sites by name, alike. Data left out teach all parameters.
        period: lengths of the periodic axes, one number or one per axis (infinity: not periodic).

    Reference:
        Gaspari and Cohn (1999), doi:10.1002/qj.49712555417; Hamill, Whitaker and Snyder (2001),
        doi:10.1175/1520-0493(2001)129<2776:DDFOBE>2.0.CO;2.

    Example:
        >>> import numpy as np
        >>> import pushforward as pf
        >>> where = np.linspace(0.0, 1.0, 500)
        >>> local = pf.ByDistance(0.05, parameters={"k": where}, data={"head": where[::10]})
        >>> pf.EKI(50, localisation=local).localisation.radius
        0.05
    """

    radius: float
    parameters: dict[str, Array]
    data: dict[str, Array]
    period: Array | None

    def __init__(self, radius: float, *, parameters: Any, data: Any, period: Any = None):
        for name, given in (("parameters", parameters), ("data", data)):
            if not isinstance(given, Mapping) or not given:
                raise MethodError(
                    f"ByDistance({name}=...) takes coordinates by the names of sites, such as {{'k': points}}; "
                    f"got {type(given).__name__}."
                )
        self.radius = radius
        self.parameters = {name: jnp.asarray(x, float) for name, x in parameters.items()}
        self.data = {name: jnp.asarray(x, float) for name, x in data.items()}
        self.period = None if period is None else jnp.asarray(period, float)

    def __check_init__(self):
        check_positive("ByDistance", radius=self.radius)

    def plan(self, problem: InverseProblem, m: int) -> Any:
        """See `Localisation.plan`."""
        slots, values = problem.structure.slots, problem.observed_values()
        self._check_names("parameters", self.parameters, list(slots))
        self._check_names("data", self.data, list(values))
        _check_noise(problem, self.data)
        _check_independent(problem, list(self.parameters))
        places = [self._points("parameters", n, x, slots[n].shape) for n, x in self.parameters.items()]
        seen = [self._points("data", n, x, np.shape(values[n])) for n, x in self.data.items()]
        axes = {p.shape[1] for p in (*places, *seen)}
        if len(axes) > 1:
            raise MethodError(f"ByDistance: all coordinates must have the same number of axes; got {sorted(axes)}.")
        of_z = np.full((problem.dimension, axes.pop()), np.nan)
        for name, points in zip(self.parameters, places, strict=True):
            slot = slots[name]
            of_z[slot.offset : slot.offset + slot.size] = points
        known = dict(zip(self.data, seen, strict=True))
        of_data = np.concatenate(
            [known.get(n, np.full((np.size(v), of_z.shape[1]), np.nan)) for n, v in values.items()]
        )
        periods = self._periods(of_z.shape[1])
        reach = 2 * HALF_SUPPORT * self.radius
        blocks = inversion_local.distance_blocks(of_z, of_data, reach, periods=periods)
        return _Near(blocks, jnp.asarray(self.radius), None if periods is None else jnp.asarray(periods))

    def _periods(self, axes: int) -> np.ndarray | None:
        if self.period is None:
            return None
        period = np.asarray(self.period)
        if period.ndim and period.shape != (axes,):
            raise MethodError(f"ByDistance(period=...) takes one number or {axes}; got shape {period.shape}.")
        return np.broadcast_to(period, (axes,))

    def _check_names(self, option: str, given: dict[str, Array], known: list[str]) -> None:
        for name in given:
            if name not in known:
                kind = "latent" if option == "parameters" else "observed"
                raise MethodError(
                    f"ByDistance({option}=...) names '{name}', which is no {kind} site; there are {known}."
                )

    def _points(self, option: str, name: str, given: Array, shape: tuple[int, ...]) -> np.ndarray:
        points, size = np.asarray(given, float), int(np.prod(shape))
        if points.shape == shape and points.ndim == 1:
            points = points[:, None]
        if points.shape[:-1] not in (shape, (size,)) or not np.isfinite(points).all():
            raise MethodError(
                f"ByDistance({option}={{'{name}': ...}}) takes finite coordinates of shape {(*shape, 'k')}, k the "
                f"number of axes; got {points.shape}."
            )
        return points.reshape(size, -1)


class _Correlated(eqx.Module):
    significance: float = eqx.field(static=True)

    def __call__(self, z: Array, outputs: Array, terms: tuple[Term, ...], count: Array) -> Array:
        return inversion_local.by_correlation(z, outputs, terms, count, self.significance)


class _Near(eqx.Module):
    blocks: Blocks
    radius: Array
    periods: Array | None

    def __call__(self, z: Array, outputs: Array, terms: tuple[Term, ...], count: Array) -> Array:
        return inversion_local.by_distance(z, terms, self.blocks, self.radius, self.periods)


def _check_noise(problem: InverseProblem, names: Mapping[str, Any]) -> None:
    """Data with correlated noise have no place of their own in units of the noise."""
    shapes = eqx.filter_eval_shape(lambda: problem.forward(jnp.zeros(problem.dimension)))
    for name in names:
        noise = shapes.noise.get(name)
        if isinstance(noise, LowRank) or (noise is not None and noise.ndim > shapes.mean[name].ndim):
            raise MethodError(
                f"ByDistance: the noise of site '{name}' is correlated, so that its data have no place of their own. "
                "Use pf.ByCorrelation()."
            )


def _check_independent(problem: InverseProblem, names: list[str]) -> None:
    """Each element of a site must come from the noise of its own place: half of it must not move the other half."""
    slots, generator = problem.structure.slots, np.random.default_rng(0)
    z = jnp.asarray(generator.normal(size=problem.dimension), jnp.result_type(float))
    for name in names:
        slot = slots[name]
        first = generator.permutation(slot.size) % 2 == 0
        along = jax.vmap(lambda part, n=name: jax.jvp(lambda z: problem.constrain(z)[n], (z,), (part,))[1])
        parts = np.zeros((2, problem.dimension))
        parts[:, slot.offset : slot.offset + slot.size] = first, ~first
        moved = np.asarray(along(jnp.asarray(parts, z.dtype))).reshape(2, -1)
        if moved.shape[1] != slot.size or moved[0, ~first].any() or moved[1, first].any():
            raise MethodError(
                f"ByDistance: the elements of site '{name}' depend on each other in the prior, so its noise has no "
                "places. Give it independent elements, such as Normal(0, 1).expand([n]), and correlate them in the "
                "model, or use pf.ByCorrelation()."
            )
