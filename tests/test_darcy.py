"""The Darcy problem: both solvers, the prior's expansion, the data, and inversion with the solver as a black box."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

import pushforward as pf
from pushforward.problems import darcy

solve = jax.jit(darcy.pressure)


def field(size, seed=0, modes=60):
    """A draw of the prior at the published amplitude times 10, float64."""
    xi = np.random.default_rng(seed).normal(size=modes)
    return darcy.AMPLITUDE * np.tensordot(xi, darcy.karhunen_loeve(size, modes), 1)


def centres(size):
    """x_1 and x_2 of all cells, each of shape (size, size)."""
    x = (np.arange(size) + 0.5) / size
    return x[None, :] + 0 * x[:, None], x[:, None] + 0 * x[None, :]


# -------------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize("size", [5, 8, 32])
def test_jax_and_scipy_solve_the_same_equations(float64, size):
    u = field(size, seed=size)
    by_jax = np.asarray(solve(jnp.asarray(u)))
    assert darcy.matrix(u) @ by_jax.ravel() == pytest.approx(darcy.source(size).ravel() / size**2, rel=1e-10)
    expected = darcy.heads_by_scipy(u)
    assert darcy._interpolation(size) @ by_jax @ darcy._interpolation(size).T == pytest.approx(expected, rel=1e-10)
    in_float32 = np.asarray(jax.jit(darcy.heads)(jnp.asarray(u, jnp.float32)))
    assert in_float32.dtype == np.float32
    assert in_float32 == pytest.approx(expected, rel=2e-5)


def test_heads_of_a_permeability_of_one_by_a_double_sine_series():
    # p = sum of f_ab sin(a pi x_1) sin(b pi x_2) / (pi^2 (a^2 + b^2)), with the coefficients of f in closed form
    a = np.arange(1, 400)
    across = 2 * (1 - np.cos(a * np.pi)) / (a * np.pi)
    up = 2000 * sum(np.cos(a * np.pi * jump) - np.cos(a * np.pi) for jump in (0, 2 / 3, 5 / 6)) / (a * np.pi)
    amplitudes = up[:, None] * across[None, :] / (np.pi**2 * (a[:, None] ** 2 + a[None, :] ** 2))
    sines = np.sin(np.pi * a[:, None] * darcy.WELLS)
    exact = sines.T @ amplitudes @ sines
    errors = [np.abs(darcy.heads_by_scipy(np.zeros((n, n))) - exact).max() for n in (16, 32, 64)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)
    assert errors[1] < 0.25


def test_a_manufactured_solution_is_met_with_second_order(float64):
    # u = sin(2 x_1 + x_2), p = sin(pi x_1) sin(2 pi x_2), f = -exp(u) (Laplace p + grad u . grad p)
    def error(size):
        x, y = centres(size)
        s, c = np.sin(np.pi * x), np.cos(np.pi * x)
        s2, c2 = np.sin(2 * np.pi * y), np.cos(2 * np.pi * y)
        u, slope = np.sin(2 * x + y), np.cos(2 * x + y)
        f = np.exp(u) * (5 * np.pi**2 * s * s2 - slope * (2 * np.pi * c * s2 + 2 * np.pi * s * c2))
        found = solve(jnp.asarray(u), jnp.asarray(f))
        return np.sqrt(np.mean((np.asarray(found) - s * s2) ** 2))

    errors = [error(size) for size in (16, 32, 64)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.05)


def test_water_in_is_water_out(float64):
    u = field(24, seed=3)
    conductances = darcy._conductances(jnp.asarray(u))
    p = solve(jnp.asarray(u))
    vertical, horizontal = (np.asarray(c) for c in conductances)
    p = np.asarray(p)
    edges = (vertical[0] * p[0]).sum() + (vertical[-1] * p[-1]).sum()
    edges += (horizontal[:, 0] * p[:, 0]).sum() + (horizontal[:, -1] * p[:, -1]).sum()
    total = 1000 * (2 / 3) + 2000 / 6 + 3000 / 6
    assert edges == pytest.approx(total, rel=1e-10)
    assert darcy.source(24).mean() == pytest.approx(total, rel=1e-12)
    assert darcy.source(10).mean() == pytest.approx(total, rel=1e-12)  # cells in which f jumps


def test_symmetries_and_scaling(float64):
    u = field(16, seed=4)
    p = np.asarray(solve(jnp.asarray(u)))
    assert np.all(p > 0)
    mirrored = np.asarray(solve(jnp.asarray(u[:, ::-1])))  # f does not depend on x_1
    assert mirrored[:, ::-1] == pytest.approx(p, rel=1e-11)
    assert np.asarray(solve(jnp.asarray(u + np.log(2)))) == pytest.approx(p / 2, rel=1e-11)
    ones = np.ones((16, 16))
    straight, turned = (np.asarray(solve(jnp.asarray(v), jnp.asarray(ones))) for v in (u, u.T))
    assert np.transpose(turned) == pytest.approx(straight, rel=1e-11)


def test_derivatives_forward_and_reverse(float64):
    rng = np.random.default_rng(5)
    u, direction, weight = jnp.asarray(field(12, seed=5)), rng.normal(size=(12, 12)), rng.normal(size=(7, 7))

    def value(u):
        return jnp.sum(weight * darcy.heads(u))

    h = 1e-5
    both = jax.jit(lambda u, v: (jnp.sum(jax.grad(value)(u) * v), jax.jvp(value, (u,), (v,))[1]))
    of_u = jax.jit(value)
    expected = (of_u(u + h * direction) - of_u(u - h * direction)) / (2 * h)
    assert [float(d) for d in both(u, jnp.asarray(direction))] == pytest.approx([float(expected)] * 2, rel=1e-7)


def test_under_vmap_and_at_extreme_permeabilities():
    # 8 standard deviations in the first modes: permeabilities over ten decades, in float32
    xi = 8.0 * jnp.asarray(np.random.default_rng(6).choice([-1.0, 1.0], size=(6, 8)), jnp.float32)
    fields = darcy.log_permeability(xi, 16)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda u: jnp.sum(darcy.heads(u)))))(fields)
    assert np.isfinite(slope).all()
    assert np.asarray(value) == pytest.approx([darcy.heads_by_scipy(u).sum() for u in fields], rel=1e-2)


# ---------------------------------------------------------------------------------------------------------- prior


def test_modes_are_ordered_and_none_is_left_out():
    index = darcy.indices(300)
    squares = (index**2).sum(1)
    assert np.all(np.diff(squares) >= 0)
    assert len(np.unique(index, axis=0)) == 300
    assert squares[0] == 1
    largest = squares[-1]
    inside = sum(1 for i in range(40) for j in range(40) if 0 < i * i + j * j < largest)
    assert inside == np.sum(squares < largest)


def test_modes_are_orthonormal_with_the_variances_of_the_prior():
    # cosines at centres of cells are orthogonal exactly as long as their frequencies are below the number of cells
    series = darcy.karhunen_loeve(32, 256).reshape(256, -1)
    gram = series @ series.T / 32**2
    variances = (np.pi**2 * (darcy.indices(256) ** 2).sum(1) + 9.0) ** -2
    assert gram == pytest.approx(np.diag(variances), abs=1e-15)
    whole = sum((np.pi**2 * (i * i + j * j) + 9.0) ** -2 for i in range(200) for j in range(200) if i + j)
    assert variances.sum() == pytest.approx(0.997 * whole, rel=1e-3)
    assert darcy.AMPLITUDE * whole**0.5 == pytest.approx(0.97, abs=0.005)


def test_modes_solve_the_equation_of_the_covariance():
    # (-Laplace + tau^2) phi = scale^-1 phi by second differences on a fine grid, to second order
    size, mode = 256, 20
    phi = darcy.karhunen_loeve(size, mode + 1)[mode]
    around = np.pad(phi, 1, mode="edge")  # no flow: the cosines
    laplace = around[2:, 1:-1] + around[:-2, 1:-1] + around[1:-1, 2:] + around[1:-1, :-2] - 4 * phi
    eigenvalue = np.sum((-laplace * size**2 + 9 * phi) * phi) / np.sum(phi**2)
    assert eigenvalue == pytest.approx(1 / np.sqrt(np.mean(phi**2)), rel=1e-3)


def test_x2_runs_along_rows():
    series = darcy.karhunen_loeve(8, 2)
    assert np.ptp(series[0], axis=1) == pytest.approx(0, abs=1e-12)  # (0, 1) depends on x_2 only
    assert np.ptp(series[1], axis=0) == pytest.approx(0, abs=1e-12)
    assert np.all(np.diff(darcy.source(12)[:, 0]) > -1e-9)


def test_the_model_draws_that_prior_and_those_heads():
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        darcy.model(size=8, modes=20)
    u = trace["log_permeability"]["value"]
    by_hand = darcy.AMPLITUDE * np.tensordot(np.asarray(trace["xi"]["value"]), darcy.karhunen_loeve(8, 20), 1)
    assert np.asarray(u) == pytest.approx(by_hand, rel=1e-4, abs=1e-5)
    assert np.asarray(trace["head"]["fn"].base_dist.loc) == pytest.approx(darcy.heads_by_scipy(u), rel=1e-4)
    assert trace["head"]["value"].shape == (7, 7)


# ----------------------------------------------------------------------------------------------------------- data


def test_data_are_those_of_the_stored_seed():
    xi, y = darcy.simulate()
    assert y == pytest.approx(darcy.DATA, abs=0.5001e-4)
    assert xi[: darcy.MODES] == pytest.approx(darcy.problem().truth["xi"], abs=1e-12)


def test_the_truth_explains_the_data_on_the_grid_of_the_model():
    # 64 x 64 cells and 1023 modes made the data: what 32 x 32 cells and 256 modes miss stays below the noise.
    u = darcy.AMPLITUDE * np.tensordot(darcy.problem().truth["xi"], darcy.karhunen_loeve(), 1)
    xi, _ = darcy.simulate()
    fine = darcy.AMPLITUDE * np.tensordot(xi, darcy.karhunen_loeve(darcy.TRUTH_SIZE, darcy.TRUTH_MODES), 1)
    gap = darcy.heads_by_scipy(u) - darcy.heads_by_scipy(fine)
    assert np.sqrt(np.mean(gap**2)) < 0.5 * darcy.NOISE
    # chi square with 49 degrees of freedom: outside with probability 1e-3
    assert 24 < np.sum((darcy.DATA - darcy.heads_by_scipy(fine)) ** 2) / darcy.NOISE**2 < 86


def test_too_few_cells_are_refused():
    with pytest.raises(ValueError, match=r"size=3.*at least 4"):
        darcy.heads_by_scipy(np.zeros((3, 3)))


# ------------------------------------------------------------------------------------------------------ black box


def small(**options):
    return {"head": darcy.DATA, "size": 8, "modes": 20, **options}


@pytest.mark.slow
def test_the_solver_in_a_pool_of_processes_gives_the_same_inversion():
    options = {"method": pf.EKI(30), "key": 2, "progress": False}
    expected = pf.infer(darcy.model, **options, **small())["posterior"]["xi"].to_numpy()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        solver = pf.simulator(darcy.heads_by_scipy, shape=(7, 7), executor=pool)
        found = pf.infer(darcy.model, **options, **small(solver=solver))["posterior"]["xi"].to_numpy()
    assert found == pytest.approx(expected, abs=5e-3)
    assert not any(solver.failures.values())


def test_scipy_gives_the_same_inversion_and_it_fits_the_data():
    options = {"method": pf.EKI(30), "key": 2, "progress": False}
    tree = pf.infer(darcy.model, **options, **small())
    solver = pf.simulator(darcy.heads_by_scipy, shape=(7, 7))
    found = pf.infer(partial(darcy.model, solver=solver), **options, **small())["posterior"]["xi"]
    # heads in float32 differ by 2e-5 of themselves from those in float64, some 1e-3 of the noise
    assert found.to_numpy() == pytest.approx(tree["posterior"]["xi"].to_numpy(), abs=5e-3)
    assert solver.calls >= pf.attributes(tree)["evaluations"]
    assert not any(solver.failures.values())
    u = tree["posterior"]["log_permeability"].to_numpy()[0]
    misfit = np.median([np.mean((darcy.heads_by_scipy(f) - darcy.DATA) ** 2) for f in u])
    prior = np.median([np.mean((darcy.heads_by_scipy(field(8, s, 20)) - darcy.DATA) ** 2) for s in range(20)])
    assert misfit < 0.05 * prior
