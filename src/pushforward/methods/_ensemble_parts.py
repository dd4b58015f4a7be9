"""The interchangeable parts of an ensemble filter: analysis, inflation and smoother."""

from abc import abstractmethod
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.math import ensemble, ensemble_inflation, ensemble_iterative, ensemble_local
from pushforward.math.ensemble import Analysed, Whitened, whiten
from pushforward.methods._base import check_choice, check_integer, check_positive


class Analysis(eqx.Module):
    """Base of analysis schemes; subclasses are final.

    Each gives weights W of shape (N, N) with rows of sum one; ``analysis = W @ ensemble``.
    """

    @abstractmethod
    def weights(self, w: Whitened, key: Key) -> Array:
        """Weights from whitened predicted data.

        Args:
            w: whitened anomalies and innovation.
            key: for schemes with random numbers.
        """

    def analysed(self, w: Whitened, key: Key) -> Analysed:
        """Weights with the data's log likelihood; schemes that get both from one factorisation have their own."""
        return Analysed(self.weights(w, key), ensemble.log_likelihood(w))

    def rotated(self, w: Whitened, key: Key) -> Analysed:
        """The same after a random rotation that keeps mean and covariance."""
        first, second = jax.random.split(key)
        found = self.analysed(w, first)
        return found._replace(weights=ensemble.rotation(second, w.anomalies.shape[0]) @ found.weights)


class Perturbed(Analysis):
    """Perturbed observations (Burgers, van Leeuwen and Evensen 1998): each member sees data with noise of its own.

    Args:
        perturbations: "centred": of sample mean zero, so that mean and expected covariance are Kalman's; "rescaled":
            the same times sqrt(N / (N - 1)), as DAPPER has them.
    """

    perturbations: str = "centred"

    def __check_init__(self):
        check_choice("Perturbed", ("centred", "rescaled"), perturbations=self.perturbations)

    def weights(self, w: Whitened, key: Key) -> Array:
        """See `Analysis.weights`."""
        return self.analysed(w, key).weights

    def analysed(self, w: Whitened, key: Key) -> Analysed:
        """See `Analysis.analysed`."""
        noise = ensemble.centred_noise if self.perturbations == "centred" else ensemble.rescaled_noise
        return ensemble.perturbed_by_analysed(w, noise(w, key))


class ETKF(Analysis):
    """Ensemble transform Kalman filter, symmetric square root (Bishop et al. 2001; Hunt et al. 2007)."""

    def weights(self, w: Whitened, key: Key) -> Array:
        """See `Analysis.weights`."""
        return ensemble.etkf(w)

    def rotated(self, w: Whitened, key: Key) -> Analysed:
        """See `Analysis.rotated`."""
        return ensemble.etkf_rotated_analysed(w, key)


class DEnKF(Analysis):
    """Deterministic EnKF (Sakov and Oke 2008): half the gain for the anomalies, which works as inflation."""

    def weights(self, w: Whitened, key: Key) -> Array:
        """See `Analysis.weights`."""
        return ensemble.denkf(w)

    def analysed(self, w: Whitened, key: Key) -> Analysed:
        """See `Analysis.analysed`."""
        return ensemble.denkf_analysed(w)


class SerialEnSRF(Analysis):
    """Serial ensemble square-root filter (Whitaker and Hamill 2002): one datum after another."""

    def weights(self, w: Whitened, key: Key) -> Array:
        """See `Analysis.weights`."""
        return ensemble.serial_ensrf(w)


class FiniteSize(Analysis):
    """Finite-size ensemble filter, EnKF-N (Bocquet, Raanes and Hannart 2015): needs no inflation.

    Args:
        certainty: above 1 the ensemble's covariance is trusted more.
    """

    certainty: float = 1.0

    def __check_init__(self):
        check_positive("FiniteSize", certainty=self.certainty)

    def weights(self, w: Whitened, key: Key) -> Array:
        """See `Analysis.weights`."""
        return ensemble_iterative.finite_size(w, certainty=self.certainty)


class LETKF(Analysis):
    """Local ensemble transform Kalman filter (Hunt, Kostelich and Szunyogh 2007) with Gaspari-Cohn tapers.

    Each entry of the state has an analysis of its own from data nearby, so that few members do. Sites with as many
    entries as the state share its coordinates; all others use all data.

    Args:
        radius: localisation radius in units of the coordinates; data beyond 2 x 1.82 radius do not count.
        coordinates: of the state's entries, shape (n,) or (n, k); None: a periodic line 0..n-1.
        data_coordinates: of a step's data, shape (m,) or (m, k); None: the state's, where m = n.
        period: lengths of the periodic axes, one number or one per axis (infinity: not periodic); None with given
            coordinates: not periodic.
        root: "symmetric", or "triangular": faster, to be followed by a rotation.
    """

    radius: float = 4.0
    coordinates: Array | None = None
    data_coordinates: Array | None = None
    period: Array | None = None
    root: str = "symmetric"

    def __init__(
        self,
        radius: float = 4.0,
        *,
        coordinates: Any = None,
        data_coordinates: Any = None,
        period: Any = None,
        root: str = "symmetric",
    ):
        self.radius, self.root = radius, root
        self.coordinates, self.data_coordinates, self.period = (
            None if x is None else jnp.asarray(x, float) for x in (coordinates, data_coordinates, period)
        )

    def __check_init__(self):
        check_positive("LETKF", radius=self.radius)
        check_choice("LETKF", ("symmetric", "triangular"), root=self.root)

    def weights(self, w: Whitened, key: Key) -> Array:
        """The weights of all data, for what has no coordinates."""
        return ensemble.etkf(w)

    def taper(self, n: int, m: int) -> Array:
        """Factors of the data's precision, shape (n, m).

        Raises:
            MethodError: coordinates of wrong length.
        """
        for name, given, size in (("coordinates", self.coordinates, n), ("data_coordinates", self.data_coordinates, m)):
            if given is not None and given.shape[0] != size:
                raise MethodError(
                    f"LETKF({name}=...) has {given.shape[0]} rows, and the model has {size} "
                    f"{'entries of the state' if name == 'coordinates' else 'data in a step'}."
                )
        if self.data_coordinates is None and m != n:
            raise MethodError(
                f"LETKF needs data_coordinates=, where the {m} data of a step lie among the {n} entries of the state: "
                "an array of shape (m,) or (m, k)."
            )
        state = jnp.arange(n, dtype=float) if self.coordinates is None else self.coordinates
        data = state if self.data_coordinates is None else self.data_coordinates
        state, data = (x.reshape(x.shape[0], -1) for x in (state, data))
        period = self.period
        if period is None and self.coordinates is None:
            period = jnp.asarray([float(n)])
        periods = None if period is None else jnp.broadcast_to(period, (state.shape[1],))
        return ensemble_local.localisation_taper(ensemble_local.distances(state, data, periods=periods), self.radius)

    def local_weights(self, predicted: Array, data: Array, variances: Array, taper: Array) -> Array:
        """Weights of each entry of the state, shape (n, N, N)."""
        scheme = ensemble_local.letkf_weights
        if self.root == "triangular":
            scheme = ensemble_local.letkf_weights_triangular
        return scheme(predicted, data, variances, taper)


class Inflation(eqx.Module):
    """Base of inflation schemes: what happens to the forecast before, and to the analysis after the update.

    `memory` is what a scheme carries from step to step. With `by_member` members of forecast and analysis are mixed
    one by one, so that a random rotation has to come after it.
    """

    by_member: ClassVar[bool] = False

    def start(self) -> Any:
        """The first memory."""
        return ()

    def before(self, memory: Any, w: Whitened) -> tuple[Array | float, Any]:
        """Factor of the forecast's anomalies, from the whitened forecast, and the new memory."""
        return 1.0, memory

    def after(self, forecast: Array, analysis: Array, key: Key) -> Array:
        """The analysis (N, n), relaxed or inflated."""
        return analysis


class NoInflation(Inflation):
    """Leaves the ensemble alone."""


class Multiplicative(Inflation):
    """Multiplies the analysis anomalies (Anderson and Anderson 1999).

    Args:
        factor: of the anomalies at each step, 1.02 for two per cent.
    """

    factor: float = 1.02

    def __check_init__(self):
        check_positive("Multiplicative", factor=self.factor)

    def after(self, forecast: Array, analysis: Array, key: Key) -> Array:
        """See `Inflation.after`."""
        return ensemble_inflation.multiplicative(analysis, self.factor)


class Additive(Inflation):
    """Adds independent noise of mean zero to the members after the analysis (Mitchell and Houtekamer 2000).

    Args:
        sd: its standard deviation, in units of the state.
    """

    sd: float = 0.1

    def __check_init__(self):
        check_positive("Additive", sd=self.sd)

    def after(self, forecast: Array, analysis: Array, key: Key) -> Array:
        """See `Inflation.after`."""
        return ensemble_inflation.additive(analysis, key, self.sd)


class RTPS(Inflation):
    """Relaxation to prior spread (Whitaker and Hamill 2012).

    Args:
        relaxation: 0 keeps the analysis spread, 1 restores the forecast's.
    """

    relaxation: float = 0.5

    def __check_init__(self):
        check_positive("RTPS", relaxation=self.relaxation)

    def after(self, forecast: Array, analysis: Array, key: Key) -> Array:
        """See `Inflation.after`."""
        return ensemble_inflation.rtps(forecast, analysis, self.relaxation)


class RTPP(Inflation):
    """Relaxation to prior perturbations (Zhang, Snyder and Sun 2004).

    Args:
        relaxation: 0 keeps the analysis anomalies, 1 restores the forecast's.
    """

    by_member: ClassVar[bool] = True
    relaxation: float = 0.5

    def __check_init__(self):
        check_positive("RTPP", relaxation=self.relaxation)

    def after(self, forecast: Array, analysis: Array, key: Key) -> Array:
        """See `Inflation.after`."""
        return ensemble_inflation.rtpp(forecast, analysis, self.relaxation)


class Adaptive(Inflation):
    """Inflates the forecast by a factor that is estimated from innovations (Li et al. 2009; Miyoshi 2011).

    Args:
        sd: standard deviation of the first guess 1 of the covariance's factor.
        growth: factor of its variance from step to step.
    """

    sd: float = 0.2
    growth: float = 1.03

    def __check_init__(self):
        check_positive("Adaptive", sd=self.sd, growth=self.growth)

    def start(self) -> Any:
        """See `Inflation.start`."""
        return jnp.ones(()), jnp.asarray(self.sd**2, jnp.result_type(float))

    def before(self, memory: Any, w: Whitened) -> tuple[Array | float, Any]:
        """See `Inflation.before`."""
        rho, variance = ensemble_inflation.adaptive_update(memory[0], self.growth * memory[1], w)
        rho = jnp.maximum(rho, 1.0)
        return jnp.sqrt(rho), (rho, variance)


class Smoother(eqx.Module):
    """Base of smoothers."""


class EnKS(Smoother):
    """Ensemble Kalman smoother (Evensen and van Leeuwen 2000) with a fixed lag.

    Each analysis also updates the ensembles of the steps before it. Sampling errors of a finite ensemble shrink
    ensembles long past, so that the lag should be about the memory of the system.

    Args:
        lag: number of later steps whose data update a step; None: all.
    """

    lag: int | None = 10

    def __check_init__(self):
        if self.lag is not None:
            check_integer("EnKS", 0, lag=self.lag)


class IterativeEnKS(Smoother):
    """Iterative ensemble Kalman smoother of lag 1 (Bocquet and Sakov 2012, 2014), for models without noise.

    Gauss-Newton in the space of the members: the ensemble one step back is moved until the data of the step are
    fitted through the nonlinear model. It takes the place of the analysis.

    Args:
        iterations: at most.
        tolerance: of the root mean square change of the weights.
    """

    iterations: int = 10
    tolerance: float = 1e-5

    def __check_init__(self):
        check_integer("IterativeEnKS", 1, iterations=self.iterations)
        check_positive("IterativeEnKS", tolerance=self.tolerance)


ANALYSES: dict[str, type[Analysis]] = {
    "perturbed": Perturbed,
    "etkf": ETKF,
    "denkf": DEnKF,
    "serial": SerialEnSRF,
    "letkf": LETKF,
    "finite_size": FiniteSize,
}

__all__ = ["ANALYSES", "Analysis", "Inflation", "Smoother", "whiten"]
