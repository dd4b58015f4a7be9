"""Parts of `ScoreTrajectory`: what takes data into account (guidance), and what makes draws (samplers)."""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.math import diffusion_samplers, guidance
from pushforward.math.diffusion import Denoiser, power_grid
from pushforward.math.guidance import Linearised, Observe
from pushforward.methods._base import check_choice, check_integer, check_positive

_DENSE = 2000
"""Numbers of a trajectory up to which matrices of its covariance are worked with."""


class Guidance(eqx.Module):
    """Base of guidances; subclasses are final. See `math.guidance` for what they compute."""

    dense: ClassVar[bool] = False
    """Whether it works with matrices of the size of a trajectory."""

    @abstractmethod
    def guided(self, denoise: Denoiser, observe: Observe, covariance: Array) -> Denoiser:
        """The denoiser of the posterior.

        Args:
            denoise: of the prior.
            observe: what the data say.
            covariance: of flat clean trajectories, empty where it is not known.
        """

    def curvature(self, level: Array, seen: Linearised, norms: Array) -> Array:
        """A bound of s^2 times minus the Hessian of what is sampled; see `math.diffusion_samplers.stable_delta`.

        Args:
            level: s.
            seen: what data say at the centre of the states.
            norms: squares of the norms of the rows of A there.
        """
        return jnp.ones_like(level)

    def why_not(self, size: int, known: bool) -> str | None:
        """Why it cannot serve trajectories of `size` numbers, whose covariance is `known` or not."""
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

    def guided(self, denoise: Denoiser, observe: Observe, covariance: Array) -> Denoiser:
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

    def guided(self, denoise: Denoiser, observe: Observe, covariance: Array) -> Denoiser:
        """See `Guidance.guided`."""
        if self.iterations:
            return guidance.mmps_iterative(denoise, observe, iterations=self.iterations)
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

    def guided(self, denoise: Denoiser, observe: Observe, covariance: Array) -> Denoiser:
        """See `Guidance.guided`."""
        return guidance.surrogate(denoise, observe, covariance)

    def why_not(self, size: int, known: bool) -> str | None:
        """See `Guidance.why_not`."""
        if not known:
            return (
                "the states are too large for the covariance of their trajectories. Use guidance='gamma' or "
                "guidance=pf.MomentMatching(iterations=10)"
            )
        return super().why_not(size, known)


class NoGuidance(Guidance):
    """No data: draws of the learned prior, to look at what was learned.

    Example:
        >>> import pushforward as pf
        >>> pf.NoGuidance()
        NoGuidance()
    """

    def guided(self, denoise: Denoiser, observe: Observe, covariance: Array) -> Denoiser:
        """See `Guidance.guided`."""
        return denoise


GUIDANCES = {
    "gamma": GammaGuidance,
    "mmps": MomentMatching,
    "surrogate": SurrogateGuidance,
    "none": NoGuidance,
}


class Sampler(eqx.Module):
    """Base of samplers; subclasses are final.

    Attributes:
        steps: from noise to trajectory.
        lowest: level of the last step but one, in units of the states' standard deviation.
        highest: level at the start.
    """

    steps: eqx.AbstractVar[int]
    lowest: eqx.AbstractVar[float]
    highest: eqx.AbstractVar[float]
    corrections: ClassVar[int] = 0

    @abstractmethod
    def draw(self, denoise: Denoiser, start: Array, grid: Array, key: Key, curvatures: Array) -> Array:
        """A clean trajectory from one at the highest level."""

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for one draw."""
        return self.steps

    def grid(self) -> Array:
        """Levels of the steps."""
        return power_grid(self.steps, lowest=self.lowest, highest=self.highest)

    def check(self) -> None:
        """Refuse options outside their range."""
        name = type(self).__name__
        check_integer(name, 3, steps=self.steps)
        check_positive(name, lowest=self.lowest, highest=self.highest)
        if not self.lowest < self.highest:
            raise MethodError(f"{name} takes lowest below highest; got {self.lowest!r} and {self.highest!r}.")


class Heun(Sampler):
    """Heun's method on the probability-flow ODE, second order: robust, the default.

    Args:
        steps: 64 are enough for most; an evaluation of the network at both ends of each.
        lowest: below the noise of a step of the dynamics in units of the states' standard deviation.
        highest: well above 1.
        corrections: moves of Langevin dynamics after each step, which mend the errors of `gamma` guidance.
        tau: their size, at most 0.1.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1.

    Example:
        >>> import pushforward as pf
        >>> pf.Heun(steps=32).evaluations
        63
    """

    steps: int = 64
    lowest: float = 2e-3
    highest: float = 80.0
    corrections: int = 0  # type: ignore[reportIncompatibleVariableOverride]
    tau: float = 0.1

    def __check_init__(self):
        self.check()
        _check_corrections("Heun", self.corrections, self.tau)

    @property
    def evaluations(self) -> int:
        """See `Sampler.evaluations`."""
        return 2 * self.steps - 1 + self.corrections * (self.steps - 1)

    def draw(self, denoise: Denoiser, start: Array, grid: Array, key: Key, curvatures: Array) -> Array:
        """See `Sampler.draw`."""
        if not self.corrections:
            return diffusion_samplers.heun(denoise, start, grid)
        return diffusion_samplers.corrected(
            denoise,
            start,
            grid,
            key,
            corrections=self.corrections,
            tau=self.tau,
            curvatures=curvatures,
            advance=diffusion_samplers.heun_step,
        )


class Multistep(Sampler):
    """DPM-Solver++ 2M: second order with one evaluation a step, the most accurate for its price.

    Args:
        steps: evaluations of the network.
        lowest: as in `pf.Heun`.
        highest: as in `pf.Heun`.

    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.

    Example:
        >>> import pushforward as pf
        >>> pf.Multistep(steps=128).evaluations
        128
    """

    steps: int = 64
    lowest: float = 2e-3
    highest: float = 300.0

    def __check_init__(self):
        self.check()

    def draw(self, denoise: Denoiser, start: Array, grid: Array, key: Key, curvatures: Array) -> Array:
        """See `Sampler.draw`."""
        return diffusion_samplers.multistep(denoise, start, grid)


class DDIM(Sampler):
    """The sampler of score-based data assimilation: first order, with corrections by Langevin dynamics.

    Args:
        steps: 256 in the paper.
        lowest: as in `pf.Heun`.
        highest: as in `pf.Heun`.
        corrections: moves of Langevin dynamics after each step.
        tau: their size, at most 0.1.

    Source: Song, Meng and Ermon 2021, arXiv:2010.02502; Rozet and Louppe 2023, arXiv:2306.10574, algorithm 4.

    Example:
        >>> import pushforward as pf
        >>> pf.DDIM(corrections=2).evaluations
        766
    """

    steps: int = 256
    lowest: float = 1e-3
    highest: float = 1e3
    corrections: int = 0  # type: ignore[reportIncompatibleVariableOverride]
    tau: float = 0.1

    def __check_init__(self):
        self.check()
        _check_corrections("DDIM", self.corrections, self.tau)

    @property
    def evaluations(self) -> int:
        """See `Sampler.evaluations`."""
        return self.steps + self.corrections * (self.steps - 1)

    def draw(self, denoise: Denoiser, start: Array, grid: Array, key: Key, curvatures: Array) -> Array:
        """See `Sampler.draw`."""
        if not self.corrections:
            return diffusion_samplers.ddim(denoise, start, grid)
        return diffusion_samplers.corrected(
            denoise, start, grid, key, corrections=self.corrections, tau=self.tau, curvatures=curvatures
        )


class Ancestral(Sampler):
    """The reverse Markov chain: fresh noise in each step, first order; needs many steps.

    Args:
        steps: evaluations of the network.
        lowest: as in `pf.Heun`.
        highest: as in `pf.Heun`.

    Source: Ho, Jain and Abbeel 2020, arXiv:2006.11239.

    Example:
        >>> import pushforward as pf
        >>> pf.Ancestral(steps=500).evaluations
        500
    """

    steps: int = 256
    lowest: float = 2e-3
    highest: float = 80.0

    def __check_init__(self):
        self.check()

    def draw(self, denoise: Denoiser, start: Array, grid: Array, key: Key, curvatures: Array) -> Array:
        """See `Sampler.draw`."""
        return diffusion_samplers.ancestral(denoise, start, grid, key)


SAMPLERS = {"heun": Heun, "multistep": Multistep, "ddim": DDIM, "ancestral": Ancestral}


def _check_corrections(owner: str, corrections: int, tau: float) -> None:
    check_integer(owner, 0, corrections=corrections)
    check_positive(owner, tau=tau)
    if tau >= 2:
        raise MethodError(f"{owner}(tau=...) takes a size below 2, above which the moves explode; got {tau!r}.")


def option(owner: str, field: str, kinds: dict, base: type, example: str):
    """A converter from a name to an instance with its defaults."""

    def convert(value):
        if isinstance(value, str):
            check_choice(owner, tuple(kinds), **{field: value})
            return kinds[value]()
        if not isinstance(value, base):
            raise MethodError(f"{owner}({field}=...) takes one of {list(kinds)} or {example}; got {value!r}.")
        return value

    return convert


def curvatures(chosen: Guidance, observe: Observe, grid: Array, like: Array) -> Array:
    """Bounds of the curvature at each level of ``grid[1:]``, from what data say at the centre of the states."""
    seen = observe(like)
    m = seen.innovation.shape[0]
    rows = jax.vmap(seen.pull)(jnp.eye(m, dtype=like.dtype)).reshape(m, -1)
    norms = jnp.sum(rows**2, 1)
    return jax.vmap(lambda s: chosen.curvature(s, seen, norms))(grid[1:])
