"""Prior maps of multivariate families: triangular maps of one normal per degree of freedom."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax
from jax.nn import log_sigmoid
from jax.scipy.linalg import solve_triangular

from pushforward.math.beta_quantile import logit_beta, logit_beta_score
from pushforward.math.quantiles import student_t, student_t_score
from pushforward.math.special import inside
from pushforward.model._maps import PriorMap, bijection, prior_map, register


def solve_lower(tril: Array, vector: Array) -> Array:
    """Solves L x = vector for the last axis, broadcasting the rest."""
    batch = jnp.broadcast_shapes(tril.shape[:-2], vector.shape[:-1])
    tril = jnp.broadcast_to(tril, batch + tril.shape[-2:])
    vector = jnp.broadcast_to(vector, batch + vector.shape[-1:])
    return solve_triangular(tril, vector[..., None], lower=True)[..., 0]


def affine(loc: Array, scale_tril: Array, event: tuple[int, ...]) -> PriorMap:
    """Builds the map loc + L z."""
    return PriorMap(
        "affine",
        event,
        lambda z: loc + (scale_tril @ z[..., None])[..., 0],
        lambda x: solve_lower(scale_tril, x - loc),
    )


@register(dist.MultivariateNormal, dist.LowRankMultivariateNormal)
def _multivariate_normal(d: dist.MultivariateNormal | dist.LowRankMultivariateNormal) -> PriorMap:
    return affine(d.loc, d.scale_tril, tuple(d.event_shape))


@register(dist.GaussianRandomWalk)
def _gaussian_random_walk(d: dist.GaussianRandomWalk) -> PriorMap:
    scale = jnp.expand_dims(d.scale, -1)

    def pull(x: Array) -> Array:
        return jnp.diff(x, axis=-1, prepend=jnp.zeros_like(x[..., :1])) / scale

    return PriorMap("affine", tuple(d.event_shape), lambda z: scale * jnp.cumsum(z, axis=-1), pull)


@register(dist.CAR)
def _conditional_autoregression(d: dist.CAR) -> PriorMap:
    """x = loc + L^-T z with the precision matrix L L^T."""
    tril = jnp.linalg.cholesky(jnp.asarray(d.precision_matrix))

    def push(z: Array) -> Array:
        batch = jnp.broadcast_shapes(tril.shape[:-2], z.shape[:-1])
        whole = jnp.broadcast_to(tril, batch + tril.shape[-2:])
        return d.loc + solve_triangular(whole, z[..., None], lower=True, trans=1)[..., 0]

    return PriorMap("affine", tuple(d.event_shape), push, lambda x: ((x - d.loc)[..., None, :] @ tril)[..., 0, :])


@register(dist.MultivariateStudentT)
def _multivariate_student_t(d: dist.MultivariateStudentT) -> PriorMap:
    """Triangular: y_i given y_1..y_{i-1} is a Student t with nu + i - 1 degrees of freedom.

    Its squared scale is (nu + y_1^2 + ... + y_{i-1}^2) / (nu + i - 1) (Ding 2016, "On the conditional distribution of
    the multivariate t distribution", eq. 3).
    """
    size = d.event_shape[0]
    df = jnp.expand_dims(jnp.asarray(d.df, jnp.result_type(float)), -1) + jnp.arange(size)
    first = df[..., :1]

    def push(z: Array) -> Array:
        t = student_t(z, df)
        growth = jnp.cumprod(1.0 + t**2 / df, axis=-1)
        before = jnp.concatenate([jnp.ones_like(growth[..., :1]), growth[..., :-1]], -1)
        y = t * jnp.sqrt(first * before / df)
        return d.loc + (d.scale_tril @ y[..., None])[..., 0]

    def pull(x: Array) -> Array:
        y = solve_lower(d.scale_tril, x - d.loc)
        sums = jnp.cumsum(y**2, axis=-1) - y**2
        return student_t_score(y * jnp.sqrt(df / (first + sums)), df)

    return PriorMap("triangular quantile", (size,), push, pull)


@register(dist.GaussianCopula)
def _gaussian_copula(d: dist.GaussianCopula) -> PriorMap:
    tril = d.base_dist.scale_tril
    marginal = prior_map(d.marginal_dist)
    if marginal.weight is not None:
        return bijection(d)
    return PriorMap(
        "affine, then quantiles",
        tuple(d.event_shape),
        lambda z: marginal.push((tril @ z[..., None])[..., 0]),
        lambda x: solve_lower(tril, marginal.pull(x)),
    )


@register(dist.EulerMaruyama)
def _euler_maruyama(d: dist.EulerMaruyama) -> PriorMap:
    """Gaussian increments: x_{k+1} = x_k + f dt + g sqrt(dt) z_{k+1}."""
    first = prior_map(d.init_dist)
    if first.weight is not None or first.noise_event != tuple(d.init_dist.event_shape):
        return bijection(d)
    event_dim = d.event_dim
    times = jnp.asarray(d.t)

    def follow(start: Array, noise: Array, t: Array) -> Array:
        def step(x, inputs):
            z, now, dt = inputs
            drift, diffusion = d.sde_fn(x, now)
            x = x + dt * drift + jnp.sqrt(dt) * diffusion * z
            return x, x

        return jnp.concatenate([start[None], lax.scan(step, start, (noise, t[:-1], jnp.diff(t)))[1]])

    def increments(path: Array, t: Array) -> Array:
        def step(x, following, now, dt):
            drift, diffusion = d.sde_fn(x, now)
            return (following - x - dt * drift) / (jnp.sqrt(dt) * diffusion)

        return jax.vmap(step)(path[:-1], path[1:], t[:-1], jnp.diff(t))

    def over_batch(fn, *arrays: Array) -> Array:
        batch = arrays[-1].shape[:-event_dim]
        flat = [jnp.broadcast_to(times, batch + times.shape[-1:]), *arrays]
        flat = [x.reshape((-1, *x.shape[len(batch) :])) for x in flat]
        out = jax.vmap(fn)(*flat)
        return out.reshape(batch + out.shape[1:])

    def push(z: Array) -> Array:
        start = first.push(jnp.take(z, 0, axis=-event_dim))
        rest = lax.slice_in_dim(z, 1, None, axis=z.ndim - event_dim)
        return over_batch(lambda t, x, noise: follow(x, noise, t), start, rest)

    def pull(x: Array) -> Array:
        start = jnp.expand_dims(first.pull(jnp.take(x, 0, axis=-event_dim)), -event_dim)
        return jnp.concatenate([start, over_batch(lambda t, path: increments(path, t), x)], axis=-event_dim)

    return PriorMap("affine, sequential", tuple(d.event_shape), push, pull)


@register(dist.Dirichlet)
def _dirichlet(d: dist.Dirichlet) -> PriorMap:
    """Stick breaking: x_k / (x_k + ... + x_K) are independent Beta(a_k, a_{k+1} + ... + a_K)."""
    own = d.concentration[..., :-1]
    rest = jnp.flip(jnp.cumsum(jnp.flip(d.concentration[..., 1:], -1), -1), -1)

    def push(z: Array) -> Array:
        logit = logit_beta(z, own, rest)
        left = jnp.cumsum(log_sigmoid(-logit), -1)
        before = jnp.concatenate([jnp.zeros_like(left[..., :1]), left[..., :-1]], -1)
        value = jnp.exp(jnp.concatenate([before + log_sigmoid(logit), left[..., -1:]], -1))
        return inside(value, jnp.zeros_like(value), jnp.ones_like(value))

    def pull(x: Array) -> Array:
        after = jnp.flip(jnp.cumsum(jnp.flip(x[..., 1:], -1), -1), -1)
        return logit_beta_score(jnp.log(x[..., :-1]) - jnp.log(after), own, rest)

    return PriorMap("stick-breaking", (d.event_shape[0] - 1,), push, pull)
