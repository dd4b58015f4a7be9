"""Noise levels of a diffusion: conversions of what a network predicts, schedules, preconditioning, grids of samplers.

States are noised as ``x(t) = mu x0 + sigma eps``, eps ~ N(0, I). A network may predict the clean state (the denoiser
D = E[x0 | x(t)]), the noise, the score or the velocity; each gives the others by an affine map. Dividing by mu leaves
only the *level* ``s = sigma / mu``: x(t) / mu = x0 + s eps. So the samplers and the guidance know levels alone and take
a denoiser of that form, ``denoise(x, s)``, one state x of any shape and a scalar s; `in_levels` makes one of a denoiser
that was trained on a schedule.

Symbols: mu, sigma as above; c_skip, c_out, c_in, c_noise as in Karras et al. 2022.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pushforward._types import Array, Float

State = Float[Array, "..."]
Scalar = Array | float
Denoiser = Callable[[State, Scalar], State]
"""The mean of a clean state given ``x = x0 + s eps`` and s."""

# ------------------------------------------------------------------------------------------------------- conversions


def denoised_from_score(x: State, score: State, mu: Scalar, sigma: Scalar) -> State:
    """D of the score of x(t): ``D = (x + sigma^2 score) / mu`` (Tweedie's formula; Efron 2011)."""
    return (x + sigma**2 * score) / mu


def denoised_from_noise(x: State, noise: State, mu: Scalar, sigma: Scalar) -> State:
    """D of the predicted noise: ``D = (x - sigma eps) / mu``."""
    return (x - sigma * noise) / mu


def denoised_from_velocity(x: State, velocity: State, mu: Scalar, sigma: Scalar) -> State:
    """D of the velocity ``v = mu eps - sigma x0``: ``D = (mu x - sigma v) / (mu^2 + sigma^2)``.

    Source: Salimans and Ho 2022, "Progressive distillation", arXiv:2202.00512, appendix D, there for
    mu^2 + sigma^2 = 1.
    """
    return (mu * x - sigma * velocity) / (mu**2 + sigma**2)


def score_from_denoised(x: State, denoised: State, mu: Scalar, sigma: Scalar) -> State:
    """The score of x(t): ``(mu D - x) / sigma^2``, which is -eps / sigma."""
    return (mu * denoised - x) / sigma**2


def noise_from_denoised(x: State, denoised: State, mu: Scalar, sigma: Scalar) -> State:
    """The predicted noise: ``eps = (x - mu D) / sigma``."""
    return (x - mu * denoised) / sigma


def velocity_from_denoised(x: State, denoised: State, mu: Scalar, sigma: Scalar) -> State:
    """The predicted velocity: ``v = mu eps - sigma D``."""
    return mu * noise_from_denoised(x, denoised, mu, sigma) - sigma * denoised


# --------------------------------------------------------------------------------------------------- cosine schedule


class Scales(NamedTuple):
    """What a schedule says of a time: x(t) = mu x0 + sigma eps."""

    mu: Array
    sigma: Array


def cosine(time: Scalar, *, least: float = 1e-3, floor: float = 1e-6) -> Scales:
    """The variance-preserving schedule of score-based data assimilation.

    ``mu = cos(w t)^2``, w = arccos(sqrt(least)), ``sigma^2 = 1 - mu^2 + floor``, for t in [0, 1]: mu falls from 1 to
    `least`, and a trace of noise, sd sqrt(floor), is left at t = 0.

    Source: Rozet and Louppe 2023, "Score-based data assimilation", arXiv:2306.10574.
    """
    mu = jnp.cos(math.acos(math.sqrt(least)) * jnp.asarray(time)) ** 2
    # 1 - mu^2 as a product: no cancellation near t = 0 beyond that of mu itself.
    return Scales(mu, jnp.sqrt((1.0 - mu) * (1.0 + mu) + floor))


def cosine_time(level: Scalar, *, least: float = 1e-3, floor: float = 1e-6) -> Array:
    """The time at which `cosine` has ``sigma / mu = level``: ``mu^2 = (1 + floor) / (1 + level^2)``."""
    mu = jnp.sqrt((1.0 + floor) / (1.0 + jnp.asarray(level) ** 2))
    return jnp.arccos(jnp.sqrt(jnp.minimum(mu, 1.0))) / math.acos(math.sqrt(least))


def in_levels(denoise: Denoiser, *, least: float = 1e-3, floor: float = 1e-6) -> Denoiser:
    """The denoiser D(x, s) of levels from one, ``denoise(x(t), t)``, of the schedule `cosine`.

    ``D(x, s) = denoise(mu x, t)``, mu and t those of the level. A level below the schedule's least is taken as the
    least.
    """

    def leveled(x: State, level: Scalar) -> State:
        time = cosine_time(level, least=least, floor=floor)
        return denoise(cosine(time, least=least, floor=floor).mu * x, time)

    return leveled


# --------------------------------------------------------------------------------------------------- preconditioning


class Preconditioning(NamedTuple):
    """Scales around a network F: ``D(x, s) = skip x + out F(inner x, condition)``."""

    skip: Array
    out: Array
    inner: Array
    condition: Array


def preconditioning(level: Scalar, data_sd: Scalar = 1.0) -> Preconditioning:
    """The scales that give the network inputs and targets of variance one and amplify its errors least.

    ``c_skip = d^2 / (s^2 + d^2)``, ``c_out = s d / sqrt(s^2 + d^2)``, ``c_in = 1 / sqrt(s^2 + d^2)``,
    ``c_noise = log(s) / 4``, s the level and d the sd of the clean data, in each coordinate.

    Source: Karras et al. 2022, "Elucidating the design space of diffusion-based generative models",
    arXiv:2206.00364, table 1.
    """
    level = jnp.asarray(level)
    total = jnp.sqrt(level**2 + data_sd**2)
    return Preconditioning((data_sd / total) ** 2, level * data_sd / total, 1.0 / total, 0.25 * jnp.log(level))


def preconditioned(network: Denoiser, data_sd: Scalar = 1.0) -> Denoiser:
    """The denoiser ``D(x, s) = c_skip x + c_out F(c_in x, c_noise)`` of a network F; see `preconditioning`."""

    def denoise(x: State, level: Scalar) -> State:
        scales = preconditioning(level, data_sd)
        return scales.skip * x + scales.out * network(scales.inner * x, scales.condition)

    return denoise


def loss_weight(level: Scalar, data_sd: Scalar = 1.0) -> Scalar:
    """The weight of |D - x0|^2 that makes the loss of the network F itself unweighted: ``1 / c_out^2``.

    Source: Karras et al. 2022, table 1: ``(s^2 + d^2) / (s d)^2``.
    """
    return 1.0 / level**2 + 1.0 / data_sd**2


def noise_loss_weight(level: Scalar) -> Scalar:
    """The weight of |D - x0|^2 that makes it |eps(x) - eps|^2, the loss of a network that predicts noise: 1 / s^2."""
    return 1.0 / level**2


def training_levels(normals: State, *, location: float = -1.2, scale: float = 1.2) -> State:
    """Levels to train on, log-normal: ``s = exp(location + scale n)``, n standard normal.

    The defaults are Karras et al.'s for images of sd 0.5. Raise `scale` where sampling starts far above the data's sd.
    """
    return jnp.exp(location + scale * normals)


# ------------------------------------------------------------------------------------------------------------- grids


def power_grid(
    steps: int, *, lowest: float = 2e-3, highest: float = 80.0, power: float = 7.0
) -> Float[Array, "steps+1"]:
    """Levels from `highest` to `lowest`, equally spaced in their `power`-th root, and 0 at the end.

    ``s_i = (a + i / (steps - 1) (b - a))^power``, a and b the roots of highest and lowest. The start of a sampler is
    N(0, highest^2 I), which leaves out the clean data's mean and covariance: an error O(1 / highest) in the
    mean, relative to |mean|.

    Args:
        steps: at least 2.
        lowest: below the least sd to be resolved.
        highest: well above the greatest sd and the size of the mean.
        power: 7 is the usual; 1 is equal spacing.

    Source: Karras et al. 2022, eq. 5.
    """
    high, low = highest ** (1.0 / power), lowest ** (1.0 / power)
    return jnp.append(jnp.linspace(high, low, steps) ** power, 0.0)


def cosine_grid(steps: int, *, least: float = 1e-3, floor: float = 1e-6) -> Float[Array, "steps+1"]:
    """Levels of `cosine` at equally spaced times from 1 to 0: from 1 / least to sqrt(floor); there is no 0 at the end.

    Source: Rozet and Louppe 2023, algorithm 4.
    """
    scales = cosine(jnp.linspace(1.0, 0.0, steps + 1), least=least, floor=floor)
    return scales.sigma / scales.mu
