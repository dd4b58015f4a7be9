"""Gauss-Newton, conjugate gradients and draws around a mode, against dense linear algebra; float64 throughout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushforward.math import variational

D, M = 7, 5


@pytest.fixture(autouse=True)
def exact(float64):
    """Everything in float64."""


@pytest.fixture
def linear():
    """w = A z - b with its Hessian, minimiser and covariance."""
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(M, D)), rng.normal(size=M)
    H = np.eye(D) + A.T @ A

    def run(z):
        w = A @ z - b
        return w, 0.5 * jnp.sum(w**2)

    return run, A, H, np.linalg.solve(H, A.T @ b)


def bent(z):
    """A nonlinear model: every datum bends."""
    w = jnp.sin(z[:M]) * 2 + 0.5 * z[1 : M + 1] ** 2 - jnp.arange(M) / 3
    return w, 0.5 * jnp.sum(w**2)


def test_conjugate_gradients_end_after_as_many_steps_as_data(linear):
    _, _, H, _ = linear
    right = np.random.default_rng(1).normal(size=D)
    x, steps = variational.conjugate_gradients(lambda v: jnp.asarray(H) @ v, jnp.asarray(right), 50, 1e-12)
    np.testing.assert_allclose(x, np.linalg.solve(H, right), rtol=1e-10)
    # H is the identity plus rank M: M + 1 different eigenvalues.
    assert int(steps) <= M + 1


def test_one_step_solves_a_linear_problem(linear):
    run, _, _, best = linear
    found = variational.gauss_newton(run, jnp.ones(D) * 3, iterations=1, solver_tolerance=1e-12)
    np.testing.assert_allclose(found.z, best, atol=1e-10)
    assert not bool(found.converged), "one iteration cannot know that it was enough"
    again = variational.gauss_newton(run, jnp.ones(D) * 3)
    assert bool(again.converged)
    assert int(again.iterations) <= 3


def test_a_centre_is_the_prior_mean(linear):
    run, _, H, best = linear
    centre = jnp.arange(1.0, D + 1)
    found = variational.gauss_newton(run, jnp.zeros(D), centre)
    np.testing.assert_allclose(found.z, best + np.linalg.solve(H, centre), atol=1e-9)


def test_the_mode_of_a_bent_problem():
    found = variational.gauss_newton(bent, jnp.full(D, 0.5), iterations=100)
    slope = jax.grad(lambda z: 0.5 * z @ z + bent(z)[1])(found.z)
    assert bool(found.converged)
    # The step before the last was at most 1e-4 sqrt(d), and the last divides it again.
    assert float(jnp.linalg.norm(slope)) < 1e-4
    assert float(found.objective) == pytest.approx(float(0.5 * found.z @ found.z + bent(found.z)[1]), rel=1e-12)


def test_the_objective_never_rises():
    def steep(z):
        w = 30 * jnp.arctan(3 * z)
        return w, 0.5 * jnp.sum(w**2)

    start = jnp.array([1.0, -1.2])
    run = jax.jit(lambda k: variational.gauss_newton(steep, start, iterations=k, tolerance=1e-12).objective)
    values = [float(run(k)) for k in range(1, 12)]
    first = float(0.5 * start @ start + steep(start)[1])
    assert np.all(np.diff([first, *values]) <= 0)
    assert values[-1] < 1e-6 * first, "the minimum is 0 at 0"
    plain = start
    tangent = variational.linearize(steep, plain)
    step = jnp.linalg.solve(jax.vmap(tangent.hessian)(jnp.eye(2)), plain + tangent.slope)
    assert float(0.5 * (plain - step) @ (plain - step) + steep(plain - step)[1]) > first, "a full step would rise"


def test_a_start_without_a_finite_objective_stays_there():
    def undefined(z):
        return jnp.log(z), jnp.sum(jnp.log(z))

    found = variational.gauss_newton(undefined, -jnp.ones(2))
    assert not bool(found.converged)
    assert not np.isfinite(found.objective)
    np.testing.assert_array_equal(found.z, -np.ones(2))
    assert int(found.iterations) == 1


def test_the_adjoint_is_the_transpose_of_finite_differences():
    z, h = jnp.linspace(-1, 1, D), 1e-6
    tangent = variational.linearize(bent, z)
    columns = [(bent(z + h * e)[0] - bent(z - h * e)[0]) / (2 * h) for e in jnp.eye(D)]
    matrix = np.stack(columns, 1)
    np.testing.assert_allclose(jax.vmap(tangent.push)(jnp.eye(D)).T, matrix, atol=1e-8)
    np.testing.assert_allclose(jax.vmap(tangent.pull)(jnp.eye(M)), matrix, atol=1e-8)
    np.testing.assert_allclose(tangent.slope, matrix.T @ tangent.w, atol=1e-7)


def test_root_and_determinant(linear):
    run, _, H, best = linear
    tangent = variational.linearize(run, jnp.asarray(best))
    root, log_det = variational.covariance_root(tangent, D)
    np.testing.assert_allclose(root @ root.T, np.linalg.inv(H), atol=1e-12)
    assert float(log_det) == pytest.approx(np.linalg.slogdet(H)[1], rel=1e-12)


def test_determinant_by_quadrature():
    rng = np.random.default_rng(2)
    A = jnp.asarray(rng.normal(size=(60, 80)) * np.logspace(0, -2, 60)[:, None])
    tangent = variational.linearize(lambda z: (A @ z, 0.5 * jnp.sum((A @ z) ** 2)), jnp.zeros(80))
    found, error = variational.log_determinant(tangent, 80, jax.random.key(0), probes=32, steps=40)
    exact = np.linalg.slogdet(np.eye(80) + A.T @ A)[1]
    # False-alarm rate of 4 standard errors with 31 degrees of freedom: 4e-4.
    assert abs(float(found) - exact) < 4 * float(error)
    assert float(error) < 0.1 * exact
    # Where the quadrature ends early (H = 2 I has one eigenvalue) it is exact.
    even = variational.linearize(lambda z: (z, 0.5 * jnp.sum(z**2)), jnp.zeros(9))
    assert float(variational.log_determinant(even, 9, jax.random.key(1))[0]) == pytest.approx(9 * np.log(2))


def test_draws_of_a_linear_problem_are_exact(linear):
    """Both kinds are one and the same affine map of the perturbations, whose covariance is the posterior's."""
    run, _, H, best = linear
    tangent = variational.linearize(run, jnp.asarray(best))
    options = {"solver_steps": 50, "solver_tolerance": 1e-13}

    def laplace(e, v):
        return variational.laplace_draw(tangent, jnp.asarray(best), variational.Perturbed(e, v), **options)

    def randomised(e, v):
        noise = variational.Perturbed(e, v)
        return variational.randomised_draw(run, jnp.zeros(D), noise, **options).z

    zeros = (jnp.zeros(D), jnp.zeros(M))
    for draw in (laplace, randomised):
        np.testing.assert_allclose(draw(*zeros), best, atol=1e-9)
        by_prior = jax.vmap(lambda e, draw=draw: draw(e, zeros[1]) - best)(jnp.eye(D))
        by_data = jax.vmap(lambda v, draw=draw: draw(zeros[0], v) - best)(jnp.eye(M))
        np.testing.assert_allclose(by_prior.T @ by_prior + by_data.T @ by_data, np.linalg.inv(H), atol=1e-9)


def test_perturbations_are_standard_normal():
    keys = jax.random.split(jax.random.key(3), 4000)
    noise = jax.vmap(lambda k: variational.perturbation(k, 2, 3))(keys)
    joint = np.concatenate([noise.prior, noise.data], 1)
    # 25 covariances with standard error at most sqrt(2 / 4000); five of them: false-alarm rate 1e-5.
    np.testing.assert_allclose(np.cov(joint.T), np.eye(5), atol=5 * (2 / 4000) ** 0.5)


def test_randomised_draws_follow_a_bend():
    """z ~ N(0, 1), exp(z) seen with noise: the mean of randomised draws is nearer to the exact one than the mode is."""
    datum, sd = 0.6, 0.5

    def run(z):
        w = (jnp.exp(z) - datum) / sd
        return w, 0.5 * jnp.sum(w**2)

    grid = np.linspace(-6, 3, 4001)
    weight = np.exp(-0.5 * grid**2 - 0.5 * ((np.exp(grid) - datum) / sd) ** 2)
    exact = np.sum(grid * weight) / np.sum(weight)
    mode = variational.gauss_newton(run, jnp.zeros(1), iterations=50)

    @jax.jit
    @jax.vmap
    def draw(key):
        return variational.randomised_draw(run, mode.z, variational.perturbation(key, 1, 1), iterations=50)

    found = draw(jax.random.split(jax.random.key(4), 4000))
    assert np.mean(found.converged) > 0.99
    bias, of_mode = abs(float(found.z.mean()) - exact), abs(float(mode.z[0]) - exact)
    # Five standard errors of the mean are 0.06: false-alarm rate 1e-6. Randomised draws lose a third of the bias here.
    assert of_mode - bias > 0.06
