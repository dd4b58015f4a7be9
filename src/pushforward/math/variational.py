"""Variational data assimilation: the posterior mode in noise z by Gauss-Newton, its curvature, and draws around it.

    J(z) = |z - c|^2 / 2 + phi(z),    phi = -log p(y | z),    H = I + J^T J,

with the prior N(c, I) and J the Jacobian of w(z), predictions in units of their noise. For Gaussian data of fixed noise
phi = |w|^2 / 2 + const, w = R^-1/2 (h(z) - y), and the problem is one of nonlinear least squares. For others, whose
noise R follows from the prediction (Poisson), w counts only through its Jacobian at fixed R: H is then Fisher's.
The prior's square root is inside of z, which is the usual preconditioning by B^1/2: all eigenvalues of H are at least 1
and all but as many as there are data equal 1.

A model enters as `run(z) -> (w, phi)`. Nothing needs a matrix but `covariance_root`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from pushforward._types import Array, Float, Key

type Run = Callable[[Array], tuple[Array, Array]]
_SHORTEST = 2.0**-20
_SUFFICIENT = 1e-4


class Tangent(NamedTuple):
    """A model linearised at a point: w (m,), phi, the slope of phi (d,), ``v -> J v`` and ``u -> J^T u``."""

    w: Array
    phi: Array
    slope: Array
    push: Callable[[Array], Array]
    pull: Callable[[Array], Array]

    def hessian(self, v: Array) -> Array:
        """H v = v + J^T J v."""
        return v + self.pull(self.push(v))


class Minimum(NamedTuple):
    """What the minimisation found.

    Attributes:
        z: the minimiser, shape (d,).
        objective: J there.
        decrement: length of the last Gauss-Newton step, sqrt(g^T H^-1 g): in standard deviations of the posterior.
        iterations: outer iterations.
        solver_steps: steps of conjugate gradients, of all iterations.
        converged: whether the last step was as short as asked.
    """

    z: Array
    objective: Array
    decrement: Array
    iterations: Array
    solver_steps: Array
    converged: Array


def linearize(run: Run, z: Float[Array, " d"]) -> Tangent:
    """The model's tangent and its adjoint, by one linearisation."""
    (w, phi), push = jax.linearize(run, z)
    pull = jax.linear_transpose(push, z)
    none, nothing = jnp.zeros_like(w), jnp.zeros_like(phi)
    (slope,) = pull((none, jnp.ones_like(phi)))
    return Tangent(w, phi, slope, lambda v: push(v)[0], lambda u: pull((u, nothing))[0])


def conjugate_gradients(
    product: Callable[[Array], Array], right: Float[Array, " d"], steps: int, tolerance: float
) -> tuple[Float[Array, " d"], Array]:
    """x with H x = b for symmetric positive definite H, from 0, and the steps taken (Hestenes and Stiefel 1952).

    Stops when ``|b - H x| <= tolerance |b|``; every step lowers ``x^T H x / 2 - b^T x``, so x is a descent direction
    wherever it stops.
    """
    target = tolerance**2 * (right @ right)

    def going(state: tuple) -> Array:
        return (state[3] > target) & (state[4] < steps)

    def step(state: tuple) -> tuple:
        x, residual, along, square, count = state
        turned = product(along)
        length = square / jnp.maximum(along @ turned, jnp.finfo(square.dtype).tiny)
        residual = residual - length * turned
        after = residual @ residual
        return x + length * along, residual, residual + (after / square) * along, after, count + 1

    start = (jnp.zeros_like(right), right, right, right @ right, jnp.asarray(0))
    x, _, _, _, count = jax.lax.while_loop(going, step, start)
    return x, count


def gauss_newton(
    run: Run,
    start: Float[Array, " d"],
    centre: Float[Array, " d"] | float = 0.0,
    *,
    iterations: int = 20,
    tolerance: float = 1e-4,
    solver_steps: int = 200,
    solver_tolerance: float = 1e-6,
) -> Minimum:
    """Minimise J by Gauss-Newton steps whose systems are solved by conjugate gradients (incremental 4DVar).

    A step that does not lower J enough is halved (Armijo 1966), so J never rises. Linear models take one step. The
    end is a step shorter than `tolerance` sqrt(d), or one whose gain is lost in rounding.

    Args:
        run: the model.
        start: where to start.
        centre: the prior's mean c.
        iterations: outer iterations at most; each linearises once.
        tolerance: of the step, relative to the typical length sqrt(d) of a draw of the posterior.
        solver_steps: steps of conjugate gradients at most, in each iteration.
        solver_tolerance: of their residual, relative to the gradient.

    Source: Courtier, Thepaut and Hollingsworth 1994, "A strategy for operational implementation of 4D-Var, using an
    incremental approach", QJRMS 120, doi:10.1002/qj.49712051912.
    """
    tiny = jnp.finfo(start.dtype).eps

    def value(z: Array) -> Array:
        found = 0.5 * jnp.sum((z - centre) ** 2) + run(z)[1]
        return jnp.where(jnp.isnan(found), jnp.inf, found)

    def going(state: tuple) -> Array:
        return ~state[-1] & (state[0].iterations < iterations)

    def step(state: tuple) -> tuple:
        now = state[0]
        tangent = linearize(run, now.z)
        here = 0.5 * jnp.sum((now.z - centre) ** 2) + tangent.phi
        finite = jnp.isfinite(here)
        gradient = jnp.where(finite, now.z - centre + tangent.slope, 0.0)
        move, used = conjugate_gradients(tangent.hessian, -gradient, solver_steps, solver_tolerance)
        gain = jnp.maximum(-(gradient @ move), 0.0)
        small = finite & (gain <= jnp.maximum(tolerance**2 * start.size, 10 * tiny * jnp.abs(here)))
        share, after = _backtrack(value, now.z, here, move, gain)
        better = after <= here
        z = jnp.where(better, now.z + share * move, now.z)
        objective = jnp.where(better, after, here)
        found = Minimum(z, objective, jnp.sqrt(gain), now.iterations + 1, now.solver_steps + used, small)
        return found, small | ~better

    unknown, none = jnp.full((), jnp.inf, start.dtype), jnp.asarray(0)
    first = Minimum(start, unknown, unknown, none, none, jnp.asarray(False))
    return jax.lax.while_loop(going, step, (first, jnp.asarray(False)))[0]


def _backtrack(value: Callable, z: Array, here: Array, move: Array, gain: Array) -> tuple[Array, Array]:
    """The share of a step that lowers J enough, and J there."""

    def short(state: tuple) -> Array:
        share, after = state
        return ~(after <= here - _SUFFICIENT * share * gain) & (share > _SHORTEST)

    def halve(state: tuple) -> tuple:
        share = 0.5 * state[0]
        return share, value(z + share * move)

    return jax.lax.while_loop(short, halve, (jnp.full((), 2.0, move.dtype), jnp.full((), jnp.inf, move.dtype)))


def covariance_root(tangent: Tangent, d: int) -> tuple[Float[Array, "d d"], Array]:
    """L with ``L L^T = H^-1``, and log det H: H is made dense."""
    matrix = jax.vmap(tangent.push)(jnp.eye(d, dtype=tangent.slope.dtype))
    factor = jnp.linalg.cholesky(jnp.eye(d) + matrix @ matrix.T)
    root = solve_triangular(factor, jnp.eye(d), lower=True, trans=1)
    return root, 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))


def log_determinant(tangent: Tangent, d: int, key: Key, *, probes: int = 16, steps: int = 48) -> tuple[Array, Array]:
    """log det H and its standard error, by Lanczos quadrature with random signs (Ubaru, Chen and Saad 2017)."""
    signs = jax.random.rademacher(key, (probes, d), dtype=tangent.slope.dtype)

    def one(probe: Array) -> Array:
        def move(state: tuple, _: None) -> tuple[tuple, tuple]:
            before, now, beta = state
            turned = tangent.hessian(now) - beta * before
            alpha = turned @ now
            turned = turned - alpha * now
            size = jnp.linalg.norm(turned)
            alive = size > 1e-6 * jnp.abs(alpha)
            after = jnp.where(alive, turned / jnp.where(alive, size, 1.0), 0.0)
            beta = jnp.where(alive, size, 0.0)
            # A step after the end has no direction: 1 keeps its logarithm finite, and its weight is 0.
            return (now, after, beta), (jnp.where(jnp.any(now != 0), alpha, 1.0), beta)

        start = (jnp.zeros_like(probe), probe / d**0.5, jnp.zeros((), probe.dtype))
        _, (alphas, betas) = jax.lax.scan(move, start, None, length=min(steps, d))
        rows = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
        values, vectors = jnp.linalg.eigh(rows)
        return d * jnp.sum(vectors[0] ** 2 * jnp.log(jnp.maximum(values, 1.0)))

    found = jax.vmap(one)(signs)
    return jnp.mean(found), jnp.std(found, ddof=1) / probes**0.5


class Perturbed(NamedTuple):
    """Perturbations of one draw: of the prior's mean (d,) and of the data in units of their noise (m,)."""

    prior: Array
    data: Array


def perturbation(key: Key, d: int, m: int) -> Perturbed:
    """Standard normal perturbations."""
    first, second = jax.random.split(key)
    return Perturbed(jax.random.normal(first, (d,)), jax.random.normal(second, (m,)))


def laplace_draw(
    tangent: Tangent, mode: Float[Array, " d"], noise: Perturbed, *, solver_steps: int, solver_tolerance: float = 1e-6
) -> Float[Array, " d"]:
    """A draw of N(mode, H^-1) without a matrix: ``z = mode + H^-1 (e + J^T v)``, as Cov(e + J^T v) = H."""
    right = noise.prior + tangent.pull(noise.data)
    return mode + conjugate_gradients(tangent.hessian, right, solver_steps, solver_tolerance)[0]


def randomised_draw(run: Run, start: Float[Array, " d"], noise: Perturbed, **options: int | float) -> Minimum:
    """A draw by minimising again: ``|z - e|^2 / 2 + |w(z) - v|^2 / 2`` with perturbed prior mean e and data v.

    Exactly a posterior draw for linear w and Gaussian data of fixed noise. For others it is biased, by what Bardsley
    et al. correct with a projection and weights, but it follows bends of the posterior that a Gaussian cannot.

    Args:
        run: the model.
        start: where to start, such as `laplace_draw` of the same perturbations.
        noise: e and v.
        **options: of `gauss_newton`.

    Source: Kitanidis 1995, Oliver, He and Reynolds 1996 (randomised maximum likelihood); Bardsley, Solonen, Haario and
    Laine 2014, "Randomize-then-optimize", SIAM J. Sci. Comput. 36, doi:10.1137/140964023.
    """

    def perturbed(z: Array) -> tuple[Array, Array]:
        w = run(z)[0] - noise.data
        return w, 0.5 * jnp.sum(w**2)

    return gauss_newton(perturbed, start, noise.prior, **options)  # pyright: ignore[reportArgumentType]
