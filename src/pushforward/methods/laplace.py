"""`Laplace`: the Gaussian at the posterior mode."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.math import points
from pushforward.math.noise import whiten
from pushforward.methods import _scouting
from pushforward.methods._base import Draws, Method, check_choice, check_integer, check_positive, count
from pushforward.methods._scouting import Scouts
from pushforward.model.inverse import InverseProblem

_CURVATURES = ("hessian", "gauss_newton")
_POLISH = 8
_SCOUTS = 256
_DENSE = 500


class Laplace(Method):
    """Mode of the posterior in ``z`` and the Gaussian with the curvature there.

    With ``Phi = -log p(z, y)``, mode z* and curvature H the posterior is N(z*, H^-1) and
    ``log Z = -Phi(z*) + d/2 log 2 pi - 1/2 log det H`` (Tierney and Kadane 1986). The mode is found by
    BFGS (L-BFGS above 500 dimensions), from where a short climb of 256 prior points was highest, and polished by
    Newton steps.

    Exact for linear-Gaussian models and cheap; it sees nothing but the neighbourhood of one mode. The
    mode depends on coordinates: this one is the mode in ``z``.

    Args:
        curvature: "hessian", or "gauss_newton": ``I + J^T Gamma^-1 J`` with J the Jacobian of the
            predictions, always positive definite, for Gaussian likelihoods.
        tolerance: relative and absolute tolerance of the optimiser.
        max_steps: optimiser steps at most.

    Example:
        >>> import pushforward as pf
        >>> pf.Laplace().curvature
        'hessian'
    """

    curvature: str = "hessian"
    tolerance: float = 1e-5
    max_steps: int = 2000

    gradients = True

    def __check_init__(self):
        check_choice("Laplace", _CURVATURES, curvature=self.curvature)
        check_positive("Laplace", tolerance=self.tolerance)
        check_integer("Laplace", 1, max_steps=self.max_steps)

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        scouts = jnp.asarray(points.prior_points(_SCOUTS, problem.dimension), jnp.result_type(float))
        return runner.call(_run, self, problem, scouts, key, draws)

    def why_not(self, problem: InverseProblem) -> str | None:
        """Gauss-Newton needs a Gaussian likelihood."""
        return problem.why_not_gaussian() if self.curvature == "gauss_newton" else None


def _run(method: Laplace, problem: InverseProblem, scouts: Array, key: Key, draws: int) -> Draws:
    d = problem.dimension

    def objective(z: Array, _: None) -> Array:
        value = -problem.log_density(z)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    start = _start(problem, scouts)
    import optimistix as optx  # a third of a second that those who do not need it should not wait

    kind = optx.BFGS if d <= _DENSE else optx.LBFGS
    solver = kind(rtol=method.tolerance, atol=method.tolerance)
    found = optx.minimise(objective, solver, start, max_steps=method.max_steps, throw=False)
    curvature = _gauss_newton if method.curvature == "gauss_newton" else _hessian
    z, root, value, newton = _polish(problem, found.value, curvature)
    # N(z, H^-1) with H = root root^T is sampled by solving with the transposed root.
    noise = jax.random.normal(key, (draws, d))
    positions = z + jax.vmap(lambda e: solve_triangular(root, e, lower=True, trans=1))(noise)
    evidence = value + 0.5 * d * jnp.log(2 * jnp.pi) - jnp.sum(jnp.log(jnp.diagonal(root)))
    steps = found.stats["num_steps"]
    summary = {"log_evidence": evidence, "log_density_at_mode": value, "steps": steps, "newton_decrement": newton}
    runs = count(steps + _POLISH + _SCOUTS * _scouting.STEPS)
    outcome = _outcome(found, value, root, newton)
    return Draws(positions[None], {}, summary, outcome, runs, runs)


def _start(problem: InverseProblem, points: Array) -> Array:
    """The best point of a short climb from many prior points."""
    batch = jax.vmap(jax.value_and_grad(problem.log_density))
    last = jax.lax.fori_loop(0, _scouting.STEPS, lambda _, s: s.climb(*batch(s.z)), Scouts.at(points))
    return last.best


def _hessian(problem: InverseProblem, z: Array) -> Array:
    return -jax.hessian(problem.log_density)(z)


def _gauss_newton(problem: InverseProblem, z: Array) -> Array:
    """I + J^T Gamma^-1 J, with J by forward mode (reverse where there are fewer data than parameters)."""

    def whitened(z: Array) -> Array:
        prediction = problem.forward(z)
        parts = [whiten(m, prediction.noise[n], ~jnp.isnan(prediction.data[n])) for n, m in prediction.mean.items()]
        return jnp.concatenate([jnp.ravel(p) for p in parts])

    jacobian = jax.jacfwd(whitened)(z)
    return jnp.eye(z.size) + jacobian.T @ jacobian


def _polish(problem: InverseProblem, z: Array, curvature: Callable) -> tuple[Array, Array, Array, Array]:
    """Newton steps with the curvature that is returned, so that mode and curvature belong together."""

    def step(_: int, state: tuple) -> tuple:
        z = state[0]
        value, gradient = jax.value_and_grad(problem.log_density)(z)
        root = jnp.linalg.cholesky(curvature(problem, z))
        move = cho_solve((root, True), gradient)
        decrement = jnp.sqrt(jnp.maximum(gradient @ move, 0.0))
        good = jnp.all(jnp.isfinite(move)) & (decrement < 1.0)
        return jnp.where(good, z + move, z), z, root, value, decrement

    start = (z, z, jnp.eye(z.size), jnp.zeros(()), jnp.zeros(()))
    _, z, root, value, decrement = jax.lax.fori_loop(0, _POLISH, step, start)
    return z, root, value, decrement


def _outcome(found: Any, value: Array, root: Array, decrement: Array) -> Array:
    pivots = jnp.diagonal(root)
    smallest = 2 * jnp.sqrt(jnp.finfo(root.dtype).eps) * jnp.max(pivots)
    # Not (pivots < smallest): a comparison with NaN is false.
    finite, definite = jnp.isfinite(value), jnp.all(pivots > smallest)
    near = decrement < 0.01 * jnp.sqrt(root.shape[0])
    late = jnp.where(near, int(Outcome.SUCCESS), int(Outcome.MAXIMUM_STEPS))
    bad = jnp.where(finite, int(Outcome.NOT_POSITIVE_DEFINITE), int(Outcome.NONFINITE_START))
    return jnp.where(finite & definite, late, bad)
