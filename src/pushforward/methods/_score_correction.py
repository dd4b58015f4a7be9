"""`TransitionHMC`: draws of trajectories moved to the exact posterior, where the transition density is known."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods._base import check_fraction, check_integer
from pushforward.model.series import Series

_GAIN = 1.0


class TransitionHMC(eqx.Module):
    """Moves of Hamiltonian Monte Carlo on the model's joint density ``p(x_0) prod p(x_t | x_t-1) p(y | x)``.

    All draws move at once, each its own chain, with one step size adapted in the first half of the moves; each
    coordinate is scaled by its spread in the draws. Density and gradient are taken for all steps in parallel. Each move
    leaves the posterior invariant, so what network and guidance got wrong locally is mended; masses of modes that are
    far apart stay as they were found.

    Args:
        moves: of each draw; 0 leaps nowhere.
        leapfrog: steps of a move.
        target: acceptance rate that the step size is adapted to.

    Source: Duane et al. 1987; Neal 2011, "MCMC using Hamiltonian dynamics".

    Example:
        >>> import pushforward as pf
        >>> pf.TransitionHMC(moves=20).leapfrog
        16
    """

    moves: int = 60
    leapfrog: int = 16
    target: float = 0.8

    def __check_init__(self):
        check_integer("TransitionHMC", 2, moves=self.moves)
        check_integer("TransitionHMC", 1, leapfrog=self.leapfrog)
        check_fraction("TransitionHMC", target=self.target)

    def gradients(self, draws: int) -> int:
        """Number of gradients that the moves take."""
        return draws * self.moves * (self.leapfrog + 1)

    def corrected(self, series: Series, draws: Array, key: Key, runner: Runner) -> tuple[Array, dict[str, Any]]:
        """The draws after the moves, and numbers about them.

        Args:
            series: the model with its data.
            draws: trajectories (draw, rows, *state).
            key: typed JAX key.
            runner: compiles, shows and checkpoints.
        """
        state = runner.call(_start, series, draws)
        state = runner.loop(_advance, state, self.moves, series, key, self)
        late = self.moves - self.moves // 2
        numbers = {
            "acceptance_rate": jnp.mean(state.accepted) / late,
            "step_size": jnp.exp(state.log_step),
            "log_density_before": jnp.median(state.before),
            "log_density_after": jnp.median(state.density),
        }
        return state.position, numbers


class _Moving(eqx.Module):
    """Draws on their way.

    Attributes:
        position: (draw, rows, *state).
        density: log joint density of each, before: at the start.
        slope: its gradient.
        scale: of each coordinate.
        log_step: of the leapfrog.
        accepted: acceptance probabilities of the later moves, summed, by draw.
    """

    position: Array
    density: Array
    before: Array
    slope: Array
    scale: Array
    log_step: Array
    accepted: Array


def _density(series: Series) -> Any:
    reading = series.reading({})

    def log_density(x: Array) -> Array:
        return reading.log_prior(x) + reading.log_likelihood(x)

    return jax.vmap(jax.value_and_grad(log_density))


def _start(series: Series, draws: Array) -> _Moving:
    density, slope = _density(series)(draws)
    scale = jnp.std(draws, 0) if draws.shape[0] > 1 else jnp.ones_like(draws[0])
    scale = jnp.where(scale > 0, scale, 1.0)
    size = draws[0].size
    log_step = jnp.log(0.1) - 0.25 * jnp.log(jnp.asarray(size, draws.dtype))
    return _Moving(draws, density, density, slope, scale, log_step, jnp.zeros(len(draws), draws.dtype))


def _advance(state: _Moving, start: Array, stop: Array, series: Series, key: Key, options: TransitionHMC) -> _Moving:
    density = _density(series)
    warm = options.moves // 2

    def move(i: Array, s: _Moving) -> _Moving:
        momentum_key, jitter_key, accept_key = jax.random.split(jax.random.fold_in(key, i), 3)
        shape = s.position.shape
        momentum = jax.random.normal(momentum_key, shape, s.position.dtype)
        # Step sizes differ by draw, so that no period of a mode is hit by all.
        spread = jax.random.uniform(jitter_key, (shape[0],), minval=0.7, maxval=1.3)
        step = (jnp.exp(s.log_step) * spread).reshape(-1, *[1] * (len(shape) - 1)) * s.scale

        def leap(_: Array, carry: tuple) -> tuple:
            x, p, value, slope = carry
            p = p + 0.5 * step * slope
            x = x + step * p
            value, slope = density(x)
            return x, p + 0.5 * step * slope, value, slope

        x, p, value, slope = jax.lax.fori_loop(0, options.leapfrog, leap, (s.position, momentum, s.density, s.slope))
        axes = tuple(range(1, len(shape)))
        gained = value - s.density - 0.5 * (jnp.sum(p**2, axes) - jnp.sum(momentum**2, axes))
        chance = jnp.exp(jnp.minimum(jnp.where(jnp.isfinite(gained), gained, -jnp.inf), 0.0))
        take = jax.random.uniform(accept_key, chance.shape) < chance
        wide = take.reshape(-1, *[1] * (len(shape) - 1))
        rate = _GAIN / (1.0 + i) ** 0.6
        return _Moving(
            jnp.where(wide, x, s.position),
            jnp.where(take, value, s.density),
            s.before,
            jnp.where(wide, slope, s.slope),
            s.scale,
            s.log_step + jnp.where(i < warm, rate * (jnp.mean(chance) - options.target), 0.0),
            s.accepted + jnp.where(i < warm, 0.0, chance),
        )

    return jax.lax.fori_loop(start, stop, move, state)
