"""Samplers of `ScoreTrajectory`: what makes draws of a denoiser. See `math.diffusion_samplers`."""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.math import diffusion_samplers
from pushforward.math.diffusion import Denoiser, power_grid
from pushforward.methods._base import check_choice, check_integer, check_positive


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


def option(owner: str, field: str, kinds: dict, base: type | tuple[type, ...], example: str):
    """A converter from a name to an instance with its defaults."""

    def convert(value):
        if isinstance(value, str):
            check_choice(owner, tuple(kinds), **{field: value})
            return kinds[value]()
        if not isinstance(value, base):
            raise MethodError(f"{owner}({field}=...) takes one of {list(kinds)} or {example}; got {value!r}.")
        return value

    return convert
