"""Guidance of `ScoreTrajectory`: what takes data into account. See `math.guidance` for what is computed."""

import math
from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array
from pushforward.learned.score_model import ScoreModel
from pushforward.math import guidance
from pushforward.math.diffusion import Denoiser
from pushforward.math.guidance import Linearised, Observe
from pushforward.methods._base import check_integer, check_positive

_DENSE = 2000
"""Numbers of a trajectory up to which matrices of its covariance are worked with."""


class Guidance(eqx.Module):
    """Base of guidances; subclasses are final."""

    dense: ClassVar[bool] = False
    """Whether it works with matrices of the size of a trajectory."""

    @abstractmethod
    def guided(self, model: ScoreModel, denoise: Denoiser, observe: Observe, rows: int) -> Denoiser:
        """The denoiser of the posterior.

        Args:
            model: what was learned, with its covariances.
            denoise: of the prior.
            observe: what the data say.
            rows: states of a trajectory.
        """

    def curvature(self, level: Array, seen: Linearised, norms: Array) -> Array:
        """A bound of s^2 times minus the Hessian of what is sampled; see `math.diffusion_samplers.stable_delta`.

        Args:
            level: s.
            seen: what data say at the centre of the states.
            norms: squares of the norms of the rows of A there.
        """
        return jnp.ones_like(level)

    def why_not(self, model: ScoreModel, rows: int) -> str | None:
        """Why it cannot serve trajectories of `rows` states, or None."""
        size = rows * math.prod(model.state)
        if self.dense and size > _DENSE:
            return (
                f"a trajectory has {size} numbers, and {type(self).__name__} works with matrices of that size (limit "
                f"{_DENSE}). Use guidance='gamma' or guidance=pf.MomentMatching(iterations=10)"
            )
        return None


class GammaGuidance(Guidance):
    """The guidance of score-based data assimilation: one gradient through the network at each step.

    ``log p(y | x_t) = -|y - A(D)|^2 / (2 (R + factor s^2))``. Too narrow by 15 - 25 % unless the sampler makes
    corrections (`pf.DDIM(corrections=4)`), which take four times as long. For states too large for the others.

    Args:
        factor: gamma of the paper.

    Source: Rozet and Louppe 2023, arXiv:2306.10574, eq. 13.

    Example:
        >>> import pushforward as pf
        >>> pf.GammaGuidance(factor=0.01).factor
        0.01
    """

    factor: float = 3e-2

    def __check_init__(self):
        check_positive("GammaGuidance", factor=self.factor)

    def guided(self, model: ScoreModel, denoise: Denoiser, observe: Observe, rows: int) -> Denoiser:
        """See `Guidance.guided`."""
        return guidance.gamma(denoise, observe, factor=self.factor)

    def curvature(self, level: Array, seen: Linearised, norms: Array) -> Array:
        """See `Guidance.curvature`."""
        widths = seen.variances + self.factor * level**2 * seen.gains
        return 1.0 + jnp.max(norms * level**2 / widths, initial=0.0)


class MomentMatching(Guidance):
    """Moment matching: the covariance of the clean states from the derivative of the network, made positive.

    Exact for Gaussian priors with linear data. Costs as many derivatives of the network as a trajectory has numbers and
    an eigendecomposition at each step; with `iterations` it solves by conjugate gradients instead, which is not safe
    for windows.

    Args:
        iterations: of conjugate gradients; 0 for the matrix itself.

    Source: Rozet et al. 2024, arXiv:2405.13712, with the projection.

    Example:
        >>> import pushforward as pf
        >>> pf.MomentMatching(iterations=10).iterations
        10
    """

    iterations: int = 0

    def __check_init__(self):
        check_integer("MomentMatching", 0, iterations=self.iterations)

    @property
    def dense(self) -> bool:  # type: ignore[reportIncompatibleVariableOverride]
        """See `Guidance.dense`."""
        return self.iterations == 0

    def guided(self, model: ScoreModel, denoise: Denoiser, observe: Observe, rows: int) -> Denoiser:
        """See `Guidance.guided`."""
        if self.iterations:
            known = None
            if model.covariance.size and rows * math.prod(model.state) <= _DENSE:
                known = model.covariance_of(rows)
            return guidance.mmps_iterative(denoise, observe, iterations=self.iterations, covariance=known)
        return guidance.mmps(denoise, observe)


class SurrogateGuidance(Guidance):
    """The covariance of the clean states is that of a Gaussian with the covariance of the training trajectories.

    Exact for Gaussian priors with linear data, needs no derivative of the network, and is as stable as Kalman's
    filter. The covariance does not follow the state, which matters where the dynamics are strongly nonlinear.

    Example:
        >>> import pushforward as pf
        >>> pf.SurrogateGuidance()
        SurrogateGuidance()
    """

    dense: ClassVar[bool] = True

    def guided(self, model: ScoreModel, denoise: Denoiser, observe: Observe, rows: int) -> Denoiser:
        """See `Guidance.guided`."""
        return guidance.surrogate(denoise, observe, model.covariance_of(rows))

    def why_not(self, model: ScoreModel, rows: int) -> str | None:
        """See `Guidance.why_not`."""
        whole = model.covariance.ndim == 4 and model.covariance.shape[0] != rows
        if model.covariance.size == 0 or whole:
            return (
                f"the covariance of trajectories of {rows} states is not known (states too large, or training on whole "
                "trajectories of another length). Use guidance='gamma' or guidance=pf.MomentMatching(iterations=10)"
            )
        return super().why_not(model, rows)


class AveragedGuidance(Guidance):
    """The covariance of the clean states is the mean squared error of the network itself, measured after training.

    ``D + s^2 J^T A^T (R + A V A^T)^-1 (y - A(D))``, V(s) the mean of ``(x0 - D)(x0 - D)^T`` over the prior: exact for
    Gaussian priors with linear data, narrow where the dynamics leave little room, and positive for any network. One
    gradient through the network at each step. The default where a trajectory, or a window, has up to 512 numbers.

    Source: the form, Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems"; V is ours.

    Example:
        >>> import pushforward as pf
        >>> pf.AveragedGuidance()
        AveragedGuidance()
    """

    dense: ClassVar[bool] = True

    def guided(self, model: ScoreModel, denoise: Denoiser, observe: Observe, rows: int) -> Denoiser:
        """See `Guidance.guided`."""
        known = model.errors_of(rows)
        assert known is not None
        return guidance.averaged(denoise, observe, known)

    def why_not(self, model: ScoreModel, rows: int) -> str | None:
        """See `Guidance.why_not`."""
        if model.errors.size == 0 or (rows != model.errors.shape[1] and not model.shape.windowed):
            return (
                f"the errors of the network for trajectories of {rows} states are not known (states too large, or "
                "training on whole trajectories of another length). Use guidance='gamma', or train with a window"
            )
        return super().why_not(model, rows)


class AutomaticGuidance(Guidance):
    """`AveragedGuidance` where the errors of the network are known, else `GammaGuidance`.

    Example:
        >>> import pushforward as pf
        >>> pf.ScoreTrajectory().guidance
        AutomaticGuidance()
    """

    def chosen(self, model: ScoreModel, rows: int) -> Guidance:
        """The guidance for trajectories of `rows` states."""
        return AveragedGuidance() if AveragedGuidance().why_not(model, rows) is None else GammaGuidance()

    def guided(self, model: ScoreModel, denoise: Denoiser, observe: Observe, rows: int) -> Denoiser:
        """See `Guidance.guided`."""
        return self.chosen(model, rows).guided(model, denoise, observe, rows)


class NoGuidance(Guidance):
    """No data: draws of the learned prior, to look at what was learned.

    Example:
        >>> import pushforward as pf
        >>> pf.NoGuidance()
        NoGuidance()
    """

    def guided(self, model: ScoreModel, denoise: Denoiser, observe: Observe, rows: int) -> Denoiser:
        """See `Guidance.guided`."""
        return denoise


GUIDANCES = {
    "auto": AutomaticGuidance,
    "averaged": AveragedGuidance,
    "gamma": GammaGuidance,
    "mmps": MomentMatching,
    "surrogate": SurrogateGuidance,
    "none": NoGuidance,
}


def curvatures(chosen: Guidance, observe: Observe, grid: Array, like: Array) -> Array:
    """Bounds of the curvature at each level of ``grid[1:]``, from what data say at the centre of the states."""
    seen = observe(like)
    m = seen.innovation.shape[0]
    rows = jax.vmap(seen.pull)(jnp.eye(m, dtype=like.dtype)).reshape(m, -1)
    norms = jnp.sum(rows**2, 1)
    return jax.vmap(lambda s: chosen.curvature(s, seen, norms))(grid[1:])
