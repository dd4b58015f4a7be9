"""An emulator of a forward map: principal components of the outputs, one regression for each.

Outputs G(z) (m,) of the training are centred, divided by the sd of their noise, and projected on their first k
principal directions, whose scores are regressions of z with predictive variances s(z)^2; what the other directions
hold is a variance of each output, the same everywhere. The emulator's error is part of the noise (Cleary,
Garbuno-Inigo, Lan, Schneider and Stuart 2021):

    data given z ~ N(mean(z), R + D (V diag(s(z)^2) V^T + diag(residual)) D),    D = diag(sd of the noise).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import DataError
from pushforward._types import Array
from pushforward.learned.regressors import Regressor
from pushforward.math import low_rank
from pushforward.math.low_rank import Reduced
from pushforward.math.noise import DataNoise, LowRank, whiten


class Components(eqx.Module):
    """Outputs as a few uncorrelated numbers of variance 1.

    Attributes:
        centre: mean of the outputs, (m,), in their own units.
        scale: sd of their noise, (m,).
        directions: V, (m, k), in units of the noise; each is as long as the sd of its scores.
        residual: variances that the directions leave out, (m,), in squared units of the noise.
    """

    centre: Array
    scale: Array
    directions: Array
    residual: Array

    @classmethod
    def of(cls, outputs: np.ndarray, scale: np.ndarray, wanted: int | float) -> "Components":
        """Principal components of outputs (n, m).

        Args:
            outputs: in their own units.
            scale: sd of the noise, (m,).
            wanted: number of components, or the share of the variance that they hold.

        Raises:
            DataError: the outputs are the same in all rows.
        """
        centre = outputs.mean(0)
        anomalies = (outputs - centre) / scale
        _, values, rows = np.linalg.svd(anomalies, full_matrices=False)
        size = np.abs(outputs / scale).max()
        if not values[0] > 1e-6 * max(size, 1e-6) * len(outputs) ** 0.5:
            raise DataError(
                "the outputs are the same in all rows: the predictions do not depend on the latent sites. Check that "
                "the model uses them, and that the simulator does not round them away."
            )
        share = np.cumsum(values**2) / np.sum(values**2)
        k = int(np.searchsorted(share, wanted)) + 1 if isinstance(wanted, float) else wanted
        k = min(k, int(np.sum(values > 1e-6 * values[0])))
        directions = rows[:k].T * values[:k] / len(outputs) ** 0.5
        residual = np.mean((anomalies - anomalies @ rows[:k].T @ rows[:k]) ** 2, 0)
        dtype = jnp.result_type(float)
        return cls(*(jnp.asarray(v, dtype) for v in (centre, scale, directions, residual)))

    def scores(self, outputs: np.ndarray) -> np.ndarray:
        """Coefficients of the directions, (n, k), of outputs (n, m)."""
        directions = np.asarray(self.directions, float)
        anomalies = (outputs - np.asarray(self.centre, float)) / np.asarray(self.scale, float)
        return anomalies @ directions / np.sum(directions**2, 0)


class Emulator(eqx.Module):
    """A fitted emulator.

    Attributes:
        components: of the outputs.
        regressor: from standardised z to standardised scores.
        location: mean of z in the training, (d,).
        spread: its sd.
    """

    components: Components
    regressor: Regressor
    location: Array
    spread: Array

    def coefficients(self, z: Array) -> tuple[Array, Array]:
        """Mean and variance of the scores at z, (k,) each."""
        return self.regressor((z - self.location) / self.spread)

    def predict(self, z: Array) -> tuple[Array, Array]:
        """Mean and sd of the outputs at z, (m,) each, in their own units."""
        mean, variance = self.coefficients(z)
        c = self.components
        return c.centre + c.scale * (c.directions @ mean), c.scale * self.deviation(variance)

    def deviation(self, variance: Array) -> Array:
        """Sd of the emulator's error of each output (m,), in units of the noise, from the variances of the scores."""
        return jnp.sqrt(self.components.directions**2 @ variance + self.components.residual)

    def likelihood(self, noise: dict[str, DataNoise], data: dict[str, Array]) -> "EmulatedLikelihood":
        """log p(data given z), with the emulator's error in the noise.

        Args:
            noise: by site, in one of the forms of `math.noise`.
            data: by site, NaN where missing; sites in the order of the outputs.
        """
        return EmulatedLikelihood(self, _reduced(self.components, noise, data))


class EmulatedLikelihood(eqx.Module):
    """log p(data given z) by an emulator; called with z.

    Attributes:
        emulator: the emulator.
        reduced: the data in its directions.
    """

    emulator: Emulator
    reduced: Reduced

    def __call__(self, z: Array) -> Array:
        """The log likelihood at z (d,)."""
        return low_rank.log_density(self.reduced, *self.emulator.coefficients(z))


def _reduced(c: Components, noise: dict[str, DataNoise], data: dict[str, Array]) -> Reduced:
    """Data and directions, whitened by what does not change with z: the noise and the residual variance."""
    rows, log_det, start = [], jnp.zeros((), c.centre.dtype), 0
    for name, given in data.items():
        value, part = jnp.asarray(given, c.centre.dtype), slice(start, start + jnp.size(given))
        start, shape, present = part.stop, value.shape, ~jnp.isnan(value)
        wide = _widened(noise[name], (c.scale**2 * c.residual)[part].reshape(shape))
        columns = (c.scale[:, None] * c.directions)[part].reshape(*shape, -1)
        both = jnp.concatenate([(value - c.centre[part].reshape(shape))[..., None], columns], -1)
        whitened = jax.vmap(lambda v, wide=wide, seen=present: whiten(v, wide, seen), -1, -1)(both)
        rows.append(jnp.where(present[..., None], whitened, 0.0).reshape(-1, both.shape[-1]))
        log_det += _log_root(wide, present) + 0.5 * jnp.log(2 * jnp.pi) * jnp.sum(present)
    flat = jnp.concatenate(rows)
    return low_rank.reduce(flat[:, 0], flat[:, 1:], log_det)


def _widened(noise: DataNoise, variance: Array) -> DataNoise:
    """The noise with independent variances added."""
    if isinstance(noise, LowRank):
        return LowRank(noise.factor, noise.diagonal + variance)
    if noise.ndim == variance.ndim:
        return jnp.sqrt(noise**2 + variance)
    return noise + variance[..., None] * jnp.eye(variance.shape[-1], dtype=noise.dtype)


def _log_root(noise: DataNoise, present: Array) -> Array:
    """Log determinant of the root of the noise of the data present."""
    if isinstance(noise, LowRank):
        sd = jnp.sqrt(jnp.where(present, noise.diagonal, 1.0))
        sizes = jnp.linalg.svd(jnp.where(present[..., None], noise.factor / sd[..., None], 0.0), compute_uv=False)
        return jnp.sum(jnp.log(sd)) + 0.5 * jnp.sum(jnp.log1p(sizes**2))
    if noise.ndim == present.ndim:
        return jnp.sum(jnp.where(present, jnp.log(noise), 0.0))
    both = present[..., :, None] & present[..., None, :]
    root = jnp.linalg.cholesky(jnp.where(both, noise, jnp.eye(present.shape[-1], dtype=noise.dtype)))
    return jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)))
