"""Samplers of a diffusion: from noise at the highest level of a grid to a clean state, by a denoiser alone.

A sampler takes ``denoise(x, s)`` (see `diffusion.py`), one state x at ``grid[0]``, that is a draw of
N(0, grid[0]^2 I), and the levels, decreasing, shape (steps + 1,); it returns the state at ``grid[-1]``, which may be 0.
Callers `vmap` over states and `jit`; the loop is one `lax.scan`, so the denoiser is traced at most three times.

The first three rows follow the probability-flow ODE ``dx / ds = (x - D(x, s)) / s`` and draw nothing after the start:

===========  ==============  ==========================================================================================
`ddim`       steps           first order: the sd error halves with the step. The paper's, with `cosine_grid(256)`
`heun`       2 steps - 1     second order; robust: the default
`multistep`  steps           second order (DPM-Solver++ 2M): most accurate for its price where D is smooth
`ancestral`  steps           stochastic, first order; forgets errors of earlier levels, needs many steps
`corrected`  (1 + C) steps   `ddim` (or `heun`, one step more) with C Langevin moves at each level: mends approximate
                             guidance, not the prior
===========  ==============  ==========================================================================================

The second column counts evaluations of the denoiser.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float, Key
from pushforward.math.diffusion import Denoiser, Scalar, State

Grid = Float[Array, "steps+1"]


def ddim_step(denoise: Denoiser, x: State, level: Scalar, following: Scalar) -> State:
    """One exact step of the ODE with D held constant: ``x' = D + (s' / s) (x - D)``.

    In levels this is Euler's step and the exponential integrator at once; at s' = 0 it gives D.

    Source: Song, Meng and Ermon 2021, "Denoising diffusion implicit models", arXiv:2010.02502, eq. 12 with no noise.
    """
    denoised = denoise(x, level)
    return denoised + (following / level) * (x - denoised)


def ddim(denoise: Denoiser, x: State, grid: Grid) -> State:
    """The state at the end of the grid by `ddim_step`s."""

    def step(x: State, levels: tuple[Array, Array]) -> tuple[State, None]:
        return ddim_step(denoise, x, *levels), None

    return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]


def heun_step(denoise: Denoiser, x: State, level: Scalar, following: Scalar) -> State:
    """One step of Heun's method: the mean of the slopes at both ends, s' > 0.

    ``x' = x + (s' - s) (d + d') / 2``, d = (x - D(x, s)) / s, d' the same at s' after Euler's step.
    """
    slope = (x - denoise(x, level)) / level
    predicted = x + (following - level) * slope
    return x + 0.5 * (following - level) * (slope + (predicted - denoise(predicted, following)) / following)


def heun(denoise: Denoiser, x: State, grid: Grid) -> State:
    """The state at the end of the grid by `heun_step`s; the last step is Euler's, so that the grid may end at 0.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """

    def step(x: State, levels: tuple[Array, Array]) -> tuple[State, None]:
        return heun_step(denoise, x, *levels), None

    x, _ = jax.lax.scan(step, x, (grid[:-2], grid[1:-1]))
    return ddim_step(denoise, x, grid[-2], grid[-1])


def multistep_weights(grid: Grid) -> Float[Array, "steps"]:
    """How far `multistep` extrapolates: ``h_i / (2 h_{i-1})``, h steps of -log s; 0 in the first and the last step."""
    steps = -jnp.diff(jnp.log(grid[:-1]))
    edge = jnp.zeros(1, grid.dtype)
    return jnp.concatenate([edge, 0.5 * steps[1:] / steps[:-1], edge])[: grid.shape[0] - 1]


def multistep(denoise: Denoiser, x: State, grid: Grid) -> State:
    """The state at the end of the grid by the second-order multistep method DPM-Solver++ 2M.

    ``x' = (s' / s) x + (1 - s' / s) (D + w (D - D_previous))``, w as `multistep_weights` says: the exact solution
    for D linear in -log s, extrapolated from the step before. First and last step are `ddim_step`s.

    Args:
        denoise: D(x, s).
        x: state at grid[0].
        grid: levels, at least three, all above 0 but the last.

    Source: Lu et al. 2022, "DPM-Solver++", arXiv:2211.01095, algorithm 2.
    """

    def step(carry: tuple[State, State], row: tuple[Array, Array, Array]) -> tuple[tuple[State, State], None]:
        (x, previous), (level, following, weight) = carry, row
        denoised = denoise(x, level)
        ratio = following / level
        return (ratio * x + (1.0 - ratio) * (denoised + weight * (denoised - previous)), denoised), None

    rows = (grid[:-1], grid[1:], multistep_weights(grid))
    return jax.lax.scan(step, (x, jnp.zeros_like(x)), rows)[0][0]


def ancestral_step(
    denoise: Denoiser, x: State, level: Scalar, following: Scalar, noise: State, *, churn: Scalar = 1.0
) -> State:
    """One step of the reverse Markov chain: the law of x' given x and x0 = D.

    ``x' = D + sqrt(s'^2 - u^2) / s (x - D) + u n``, ``u = churn s' sqrt(1 - s'^2 / s^2)``, n the noise.

    Args:
        denoise: D(x, s).
        x: state at `level`.
        level: s > 0.
        following: s' < s, may be 0.
        noise: standard normal, of the shape of x.
        churn: from 0, which is `ddim_step`, to 1, the chain of Ho et al.

    Source: Ho, Jain and Abbeel 2020, arXiv:2006.11239; Song, Meng and Ermon 2021, arXiv:2010.02502, eqs. 12 and 16.
    """
    denoised = denoise(x, level)
    fresh = churn * following * jnp.sqrt(1.0 - (following / level) ** 2)
    return denoised + jnp.sqrt(following**2 - fresh**2) / level * (x - denoised) + fresh * noise


def ancestral(denoise: Denoiser, x: State, grid: Grid, key: Key[Array, ""], *, churn: Scalar = 1.0) -> State:
    """The state at the end of the grid by `ancestral_step`s, with fresh noise in each."""

    def step(x: State, row: tuple[Array, Array, Array]) -> tuple[State, None]:
        level, following, key = row
        noise = jax.random.normal(key, x.shape, x.dtype)
        return ancestral_step(denoise, x, level, following, noise, churn=churn), None

    return jax.lax.scan(step, x, (grid[:-1], grid[1:], jax.random.split(key, grid.shape[0] - 1)))[0]


def stable_delta(noise: State, *, tau: Scalar = 0.1, curvature: Scalar = 1.0) -> Array:
    """The size of a Langevin move, in units of s^2: ``tau / max(mean(eps^2), curvature)``.

    The paper's ``tau / mean(eps^2)`` alone takes the average width of the law for the width of its narrowest
    direction: at low levels mean(eps^2) -> 0 and the move explodes where one coordinate out of many is well observed.
    Minus the Hessian of the log density at level s is at most ``I / s^2``, whatever the data's law is, so with
    curvature = 1 the move is stable for tau < 2.

    Args:
        noise: eps = (x - D) / s, the predicted noise of one state.
        tau: at most 0.1 for a bias in the variance of at most 5 %.
        curvature: a bound of s^2 times minus the Hessian; above 1 for guidance that is not exact
            (`guidance.gamma_curvature`).

    Source: Rozet and Louppe 2023, arXiv:2306.10574, algorithm 4, with the bound.
    """
    return tau / jnp.maximum(jnp.mean(noise**2), curvature)


def langevin_step(
    denoise: Denoiser,
    x: State,
    level: Scalar,
    noise: State,
    *,
    delta: Scalar | None = None,
    tau: Scalar = 0.1,
    curvature: Scalar = 1.0,
) -> State:
    """One move of unadjusted Langevin dynamics at a fixed level s > 0.

    ``x' = x + delta (D - x) + sqrt(2 delta) s n``: the score is (D - x) / s^2. Where the law at this level has variance
    v in a direction, the moves settle at variance ``v / (1 - delta s^2 / (2 v))``.

    Args:
        denoise: D(x, s).
        x: state at `level`.
        level: s.
        noise: n, standard normal, of the shape of x.
        delta: the size in units of s^2; None means `stable_delta` of this state.
        tau: see `stable_delta`.
        curvature: see `stable_delta`.
    """
    away = x - denoise(x, level)
    if delta is None:
        delta = stable_delta(away / level, tau=tau, curvature=curvature)
    return x - delta * away + jnp.sqrt(2.0 * delta) * level * noise


def corrected(
    denoise: Denoiser,
    x: State,
    grid: Grid,
    key: Key[Array, ""],
    *,
    corrections: int = 1,
    tau: Scalar = 0.1,
    curvatures: Float[Array, "steps"] | None = None,
    advance: Callable[[Denoiser, State, Scalar, Scalar], State] = ddim_step,
) -> State:
    """The state at the end of the grid by steps, each followed by Langevin moves at its new level.

    With `ddim_step` the paper's sampler, for `cosine_grid(256)`. The last step, where the level may be 0, is a
    `ddim_step`, and no moves follow it.

    Args:
        denoise: D(x, s).
        x: state at grid[0].
        grid: levels.
        key: for the noise of the moves.
        corrections: C, the moves at each level.
        tau: see `stable_delta`.
        curvatures: of each level of ``grid[1:]``, for `stable_delta`; 1 by default.
        advance: a step, `ddim_step` or `heun_step`.

    Source: Rozet and Louppe 2023, arXiv:2306.10574, algorithm 4.
    """
    bounds = jnp.ones_like(grid[1:]) if curvatures is None else curvatures

    def move(x: State, row: tuple[Array, Array, Array]) -> tuple[State, None]:
        level, curvature, key = row
        noise = jax.random.normal(key, x.shape, x.dtype)
        return langevin_step(denoise, x, level, noise, tau=tau, curvature=curvature), None

    def step(x: State, row: tuple[Array, Array, Array, Array]) -> tuple[State, None]:
        level, following, curvature, key = row
        x = advance(denoise, x, level, following)
        keys = jax.random.split(key, corrections)
        repeated = (jnp.broadcast_to(following, (corrections,)), jnp.broadcast_to(curvature, (corrections,)), keys)
        return jax.lax.scan(move, x, repeated)[0], None

    keys = jax.random.split(key, grid.shape[0] - 1)
    x, _ = jax.lax.scan(step, x, (grid[:-2], grid[1:-1], bounds[:-1], keys[:-1]))
    return ddim_step(denoise, x, grid[-2], grid[-1])
