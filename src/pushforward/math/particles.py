"""Equations on weighted particles: weights, moments, kernels that move copies apart, backward draws.

Weights come as log weights (N,) up to a constant, -inf for none; W are the weights with sum one. Particles are rows,
(N, n). A NaN weight stays NaN: masking failed particles is the caller's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pushforward._types import Array, Bool, Float, Int, Key
from pushforward.math.resampling import draws_from, scaled_weights


class Normalized(NamedTuple):
    """Weights with sum one.

    Attributes:
        weights: W, (N,).
        log_weights: log W, (N,).
        log_sum: log of the sum of the weights given; -inf if all log weights are -inf, and then W is uniform.
        effective: effective sample size 1 / sum W^2, from 1 to N.
    """

    weights: Float[Array, "members"]
    log_weights: Float[Array, "members"]
    log_sum: Float[Array, ""]
    effective: Float[Array, ""]


def normalized(log_weights: Float[Array, "members"]) -> Normalized:
    """Normalizes weights with one maximum and one exponential.

    If all log weights are -inf the weights returned are uniform and their derivatives zero: whoever calls sees it by
    `log_sum`. Derivatives are finite for any weights that are not NaN.

    Args:
        log_weights: (N,). With last step's log W plus this step's log likelihoods, `log_sum` is the filter's
            increment of the log likelihood.
    """
    weights, shift = scaled_weights(log_weights)
    total = jnp.sum(weights)
    none = jnp.max(log_weights) == -jnp.inf
    log_total = shift + jnp.log(total)
    return Normalized(
        weights / total,
        jnp.where(none, 0.0, log_weights) - log_total,
        jnp.where(none, -jnp.inf, log_total),
        total**2 / jnp.sum(weights**2),
    )


def effective_sample_size(log_weights: Float[Array, "members"]) -> Float[Array, ""]:
    """Effective sample size 1 / sum W^2 (Kong, Liu and Wong 1994), from 1 to N."""
    return normalized(log_weights).effective


def _weighted_anomalies(log_weights: Array, particles: Array) -> tuple[Array, Array]:
    """Weighted mean, and A (N, n) with A^T A the covariance of `weighted_mean_and_covariance`."""
    size = len(particles)
    weights = normalized(log_weights).weights
    # 1 - max W < 1e-10 is DAPPER's guard; float32 cannot resolve it.
    collapsed = 1.0 - jnp.max(weights) < max(1e-10, 8.0 * float(jnp.finfo(weights.dtype).eps))
    used = jnp.where(collapsed, 1.0 / size, weights)
    # sum W (1 - W) is 1 - sum W^2, and zero only if there is one particle.
    correction = jnp.sum(used * (1.0 - used))
    correction = jnp.where(correction > 0, correction, 1.0)
    # The square root has no derivative at zero, where its value is zero for any particle.
    positive = used > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, used, 1.0) / correction), 0.0)
    # Relative to one particle, so that a component without spread has anomalies of exactly zero.
    shifted = particles - particles[:1]
    return particles[0] + weights @ shifted, root[:, None] * (shifted - (used @ shifted)[None])


def weighted_mean_and_covariance(
    log_weights: Float[Array, "members"], particles: Float[Array, "members n"]
) -> tuple[Float[Array, "n"], Float[Array, "n n"]]:
    """Weighted mean, and the covariance sum W (x - mean)(x - mean)^T / (1 - sum W^2).

    The denominator makes the covariance unbiased for independent draws whose weights do not depend on them. Where one
    particle has all the weight, 1 - max W < 1e-10 (1e-6 in float32), the covariance is the unweighted one of all
    particles about their own mean, with denominator N - 1; the mean stays the weighted one. One particle has
    covariance zero.

    Args:
        log_weights: (N,), up to a constant.
        particles: (N, n).
    """
    mean, anomalies = _weighted_anomalies(log_weights, particles)
    return mean, anomalies.T @ anomalies


def covariance_root(
    log_weights: Float[Array, "members"], particles: Float[Array, "members n"]
) -> Float[Array, "rank n"]:
    """A matrix R with R^T R the covariance of `weighted_mean_and_covariance`; R^T e has that covariance, e ~ N(0, I).

    With n < N the Cholesky factor (n, n) of the correlations plus 10 n eps on the diagonal, times standard
    deviations: it does not fail for singular covariances, does not depend on units, and a component without spread
    keeps exactly none. With n >= N the weighted anomalies (N, n).

    Args:
        log_weights: (N,), up to a constant.
        particles: (N, n).
    """
    _, anomalies = _weighted_anomalies(log_weights, particles)
    size, n = particles.shape
    if n >= size:
        return anomalies
    variances = jnp.sum(anomalies**2, 0)
    spread = variances > 0
    deviations = jnp.where(spread, jnp.sqrt(jnp.where(spread, variances, 1.0)), 0.0)
    scaled = anomalies / jnp.where(spread, deviations, 1.0)[None]
    ridge = jnp.where(spread, 10.0 * n * jnp.finfo(variances.dtype).eps, 1.0)
    correlations = jnp.matmul(scaled.T, scaled, precision="highest") + jnp.diag(ridge)
    return lax.linalg.cholesky(correlations, symmetrize_input=False).T * deviations[None]


def bandwidth(count: int, n: int) -> float:
    """Scott's rule N^(-1 / (n + 4)): the width of a Gaussian kernel in units of the covariance's root.

    The width of least mean integrated square error for a Gaussian law is (4 / (n + 2))^(1 / (n + 4)) times this
    (Musso, Oudjane and Le Gland 2001, "Improving regularised particle filters", section 12.2): pass it to `jitter` as
    the scale for theirs.

    Args:
        count: number of particles N.
        n: dimension.
    """
    return count ** (-1.0 / (n + 4))


def jitter(
    key: Key,
    particles: Float[Array, "members n"],
    log_weights: Float[Array, "members"],
    ancestors: Int[Array, "count"],
    scale: float,
    moved: Bool[Array, "count"] | bool = True,
) -> Float[Array, "count n"]:
    """Resampled particles plus scale * N^(-1 / (n + 4)) * root e: the regularised particle filter.

    The covariance is that of the weighted particles **before** resampling (`covariance_root`: unbiased, unweighted if
    one particle has all the weight). With ``moved=copied(ancestors)`` this is the convention of DAPPER 1.8, whose
    option `reg` is `scale`: particles that were resampled once stay where they are (2.4 at N = 100 on Lorenz-63).
    Musso, Oudjane and Le Gland (2001) move all. The variance grows by the factor 1 + (scale * bandwidth)^2, a bias
    that vanishes as N grows; `liu_west` has none.

    Args:
        key: a JAX key.
        particles: before resampling, (N, n).
        log_weights: before resampling, (N,), up to a constant.
        ancestors: indices from a resampling scheme, (count,).
        scale: >= 0, no unit.
        moved: which of the resampled particles receive noise, (count,), or True for all.
    """
    size, n = particles.shape
    root = covariance_root(log_weights, particles)
    noise = jax.random.normal(key, (len(ancestors), len(root)), particles.dtype) @ root
    shift = scale * bandwidth(size, n) * noise
    return particles[ancestors] + jnp.where(jnp.reshape(moved, (-1, 1)), shift, 0.0)


def liu_west(
    key: Key,
    particles: Float[Array, "members n"],
    log_weights: Float[Array, "members"],
    discount: float,
) -> Float[Array, "members n"]:
    """A kernel that moves every particle and keeps the weighted mean and covariance in expectation.

    x -> a x + (1 - a) mean + sqrt(1 - a^2) root e with a = (3 d - 1) / (2 d) (Liu and West 2001, "Combined parameter
    and state estimation in simulation-based filtering"). The weights stay. Where one particle has
    all the weight the noise is that of the unweighted particles (`covariance_root`).

    Args:
        key: a JAX key.
        particles: (N, n), static parameters as a rule.
        log_weights: (N,), up to a constant.
        discount: d in (1/3, 1]; 0.95 to 0.99 in the paper. 1 moves nothing.
    """
    shrinkage = (3.0 * discount - 1.0) / (2.0 * discount)
    mean = normalized(log_weights).weights @ particles
    root = covariance_root(log_weights, particles)
    noise = jax.random.normal(key, (len(particles), len(root)), particles.dtype) @ root
    return shrinkage * particles + (1.0 - shrinkage) * mean[None] + (1.0 - shrinkage**2) ** 0.5 * noise


def copied(ancestors: Int[Array, "count"]) -> Bool[Array, "count"]:
    """Which entries of ancestors in ascending order occur more than once, (count,)."""
    same = ancestors[1:] == ancestors[:-1]
    no = jnp.zeros(1, bool)
    return jnp.concatenate([no, same]) | jnp.concatenate([same, no])


def distinct(ancestors: Int[Array, "count"]) -> Int[Array, ""]:
    """Number of distinct entries of ancestors in ascending order, as all schemes and their compositions give them."""
    return 1 + jnp.sum(ancestors[1:] != ancestors[:-1], dtype=jnp.int32)


def backward_weights(
    log_weights: Float[Array, "members"], log_transition: Float[Array, "members"]
) -> Float[Array, "members"]:
    """Log weights, sum one, of the particles at t given the state at t + 1: filter weight times transition density.

    Backward simulation draws from them (Godsill, Doucet and West 2004, "Monte Carlo smoothing for nonlinear time
    series"): `draws_from` of their exponentials. O(N) for each trajectory; `backward_moves` is O(1).

    Args:
        log_weights: filter's at t, (N,).
        log_transition: log p(x_{t+1} | x_t^i), (N,).
    """
    return normalized(log_weights + log_transition).log_weights


def backward_moves(
    key: Key,
    current: Int[Array, "trajectories"],
    log_weights: Float[Array, "members"],
    log_transition: Callable[[Int[Array, "trajectories"]], Float[Array, "trajectories"]],
    moves: int,
) -> tuple[Int[Array, "trajectories"], Float[Array, ""]]:
    """Moves each trajectory's ancestor by Metropolis steps that keep the law of `backward_weights`.

    A step proposes from the filter's weights W and accepts with min(1, p(x' | proposed) / p(x' | current)): the
    independent Metropolis kernel of Dau and Chopin (2023, "On backward smoothing algorithms"), which
    started at the filter's own ancestors needs a step or two for a stable smoother, at O(1) transition densities for
    each trajectory instead of N.

    Args:
        key: a JAX key.
        current: ancestors at t, (M,).
        log_weights: filter's at t, (N,), up to a constant.
        log_transition: indices (M,) -> log p(x_{t+1} of trajectory m | x_t^{index m}), (M,); -inf is allowed.
        moves: number of steps, >= 1.

    Returns:
        The new ancestors (M,), int32, and the share of proposals accepted.
    """
    key_draw, key_accept = jax.random.split(key)
    shape = (moves, len(current))
    dtype = log_weights.dtype
    weights, _ = scaled_weights(log_weights)
    proposals = draws_from(jax.random.uniform(key_draw, shape, dtype), weights)
    thresholds = jnp.log(jax.random.uniform(key_accept, shape, dtype))

    def step(carry: tuple[Array, Array], drawn: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        index, log_density = carry
        proposal, threshold = drawn
        candidate = log_transition(proposal)
        # As a sum: where both densities are zero a difference would be NaN.
        accept = threshold + log_density < candidate
        return (jnp.where(accept, proposal, index), jnp.where(accept, candidate, log_density)), accept

    start = jnp.asarray(current, jnp.int32)
    (index, _), accepted = lax.scan(step, (start, log_transition(start)), (proposals, thresholds))
    return index, jnp.mean(accepted, dtype=dtype)
