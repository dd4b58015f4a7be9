"""Sequential Monte Carlo on the reverse chain of a diffusion: weighted draws that are exact for the chain.

The reverse chain of a denoiser D, ``x' = m(x) + u n`` with ``m = D + (s'^2 / s^2)(x - D)`` and
``u = s' sqrt(1 - s'^2 / s^2)`` (`diffusion_samplers.ancestral_step`), ends in a law p of clean states. Particles follow
it with the denoiser replaced by that of an approximate posterior, and weights make up for what guidance got wrong:

    w' = p(x' | x) psi'(x') / (q(x' | x) psi(x)),    psi(x) = N(y; A(D), R + A V A^T) about p(y | x),

psi = p(y | x0) at the end. Means under the weights converge to those of the posterior of the chain, and the mean
weight is an unbiased estimate of the evidence, whatever V is; V decides how many particles it takes.

Source: Wu, Trippe, Naesseth, Blei and Cunningham 2023, "Practical and asymptotically exact conditional sampling in
diffusion models", arXiv:2306.17775, algorithm 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float, Int, Key
from pushforward.math import resampling
from pushforward.math.diffusion import Denoiser, Scalar, State
from pushforward.math.guidance import Linearised, Observe

Spread = Callable[[Scalar, Linearised, State], Array]
"""A V A^T at a level, (m, m), or its diagonal (m,), of what was seen near a clean state."""


class Twist(NamedTuple):
    """What is known of a noisy state: D, the D of the posterior, and log psi."""

    denoised: State
    guided: State
    log_potential: Array


class Population(NamedTuple):
    """Particles, ``N`` of them, with what the run has been.

    Attributes:
        states: (N, *state).
        log_weights: normalised, (N,).
        log_evidence: estimate of log p(y).
        roots: ancestor of each at the first level, (N,).
        size: effective sample size at the end, before the last resampling if there is one.
        smallest: the least effective sample size on the way.
        resamplings: how often particles were resampled.
    """

    states: Float[Array, "N ..."]
    log_weights: Float[Array, "N"]
    log_evidence: Array
    roots: Int[Array, "N"]
    size: Array
    smallest: Array
    resamplings: Array


def twist(denoise: Denoiser, observe: Observe, spread: Spread, log_likelihood: Callable[[State], Array]) -> Callable:
    """A function (x, s) -> `Twist`.

    ``log psi = log p(y | D) + log N(r; 0, R + A V A^T) - log N(r; 0, R)``, r the innovation at D: the Gaussian widened
    by V where data are Gaussian, and where they are not, their own density, widened in the same proportion.

    Args:
        denoise: D(x, s) of the prior.
        observe: what the data say.
        spread: A V A^T.
        log_likelihood: log p(y | x0).
    """

    def at(x: State, level: Scalar) -> Twist:
        denoised, pull_state = jax.vjp(lambda x: denoise(x, level), x)
        seen = observe(denoised)
        wide = spread(level, seen, denoised)
        if wide.ndim == 1:
            total = seen.variances + wide
            solved, log_det = seen.innovation / total, jnp.sum(jnp.log(total))
        else:
            root = jnp.linalg.cholesky(wide + jnp.diag(seen.variances))
            solved = jax.scipy.linalg.cho_solve((root, True), seen.innovation)
            log_det = 2.0 * jnp.sum(jnp.log(jnp.diagonal(root)))
        (gradient,) = pull_state(seen.pull(solved))
        gained = seen.innovation @ (seen.innovation / seen.variances - solved)
        shrunk = log_det - jnp.sum(jnp.log(seen.variances))
        log_potential = log_likelihood(denoised) + 0.5 * (gained - shrunk)
        return Twist(denoised, denoised + level**2 * gradient, log_potential)

    return at


def twisted(
    twists: Callable[[Array, Scalar], Twist],
    log_likelihood: Callable[[Array], Array],
    starts: Float[Array, "N ..."],
    grid: Float[Array, "steps+1"],
    key: Key[Array, ""],
    *,
    threshold: float = 0.5,
) -> Population:
    """Run all particles from noise to clean states.

    Args:
        twists: `twist` of all particles at a level, (N, *state) and s to a `Twist` with leading axis N.
        log_likelihood: log p(y | x0) of all particles.
        starts: draws of N(0, grid[0]^2 I).
        grid: levels, decreasing, the last one 0.
        key: for the noise and the resampling.
        threshold: share of N below which the effective sample size makes the particles be resampled.
    """
    n = starts.shape[0]
    axes = tuple(range(1, starts.ndim))

    def move(carry: tuple[Population, Twist], row: tuple[Array, Array, Key]) -> tuple[tuple[Population, Twist], None]:
        (population, known), (level, following, key) = carry, row
        population, known = _resampled(population, known, jax.random.fold_in(key, 1), threshold)
        keep = (following / level) ** 2
        width = following * jnp.sqrt(1.0 - keep)
        plain = known.denoised + keep * (population.states - known.denoised)
        aside = (1.0 - keep) * (known.guided - known.denoised)
        noise = jax.random.normal(key, starts.shape, starts.dtype)
        states = plain + aside + width * noise
        # log p(x' | x) - log q(x' | x)
        ratio = -jnp.sum(0.5 * (aside / width) ** 2 + aside / width * noise, axes)
        after = twists(states, following)
        gained = ratio + after.log_potential - known.log_potential
        return (_weighed(population, states, gained), after), None

    known = twists(starts, grid[0])
    uniform = jnp.full(n, -jnp.log(n), starts.dtype)
    zero = jnp.zeros((), starts.dtype)
    population = Population(starts, uniform, zero, jnp.arange(n), zero + n, zero + n, zero)
    population = _weighed(population, starts, known.log_potential)
    rows = (grid[:-2], grid[1:-1], jax.random.split(key, grid.shape[0] - 2))
    (population, known), _ = jax.lax.scan(move, (population, known), rows)
    return _weighed(population, known.denoised, log_likelihood(known.denoised) - known.log_potential)


def _weighed(population: Population, states: Array, gained: Array) -> Population:
    """The population at new states with its weights changed by factors."""
    log_weights = population.log_weights + jnp.where(jnp.isnan(gained), -jnp.inf, gained)
    total = jax.scipy.special.logsumexp(log_weights)
    log_weights = jnp.where(jnp.isfinite(total), log_weights - total, -jnp.log(states.shape[0]))
    size = jnp.exp(-jax.scipy.special.logsumexp(2.0 * log_weights))
    return population._replace(
        states=states,
        log_weights=log_weights,
        log_evidence=population.log_evidence + total,
        size=size,
        smallest=jnp.minimum(population.smallest, size),
    )


def _resampled(population: Population, known: Twist, key: Key, threshold: float) -> tuple[Population, Twist]:
    """Equal weights where the effective sample size is low."""
    n = population.states.shape[0]
    low = population.size < threshold * n
    chosen = jnp.where(low, resampling.systematic(key, population.log_weights, n), jnp.arange(n))
    states, roots, known = jax.tree.map(lambda v: v[chosen], (population.states, population.roots, known))
    log_weights = jnp.where(low, -jnp.log(n), population.log_weights)
    resamplings = population.resamplings + low
    return population._replace(states=states, log_weights=log_weights, roots=roots, resamplings=resamplings), known
