"""Darcy: the permeability field of a steady groundwater flow from pressure heads at 49 wells.

    -div(exp(u) grad p) = f on the unit square,  p = 0 on its boundary,  y_k = p(well k) + e_k,  e_k ~ N(0, 1),
    u = amplitude * sum_l (pi^2 |l|^2 + tau^2)^-1 xi_l phi_l,  xi_l ~ N(0, 1),  tau = 3,
    phi_l(x) = c_l cos(pi l_1 x_1) cos(pi l_2 x_2),  l = (l_1, l_2) >= 0 and not 0,

c_l = 2, or sqrt(2) where an index is 0, so that the phi_l are orthonormal: u has mean 0 and covariance
amplitude^2 (-Laplace + tau^2)^-2 on functions of mean 0. p is the pressure head, exp(u) the permeability and
f(x) = 1000, 2000 or 3000 for x_2 below 2/3, up to 5/6 and above. Wells at (i/8, j/8), i, j = 1, ..., 7.

The published amplitude is 1: u then has standard deviation 0.1 and heads answer almost linearly. Here it is 10, so
that u has standard deviation 1 and permeabilities span two decades.

Solver: finite volumes on size x size cells, the flow between neighbours by the harmonic mean of their permeabilities;
block Cholesky elimination, grid row by grid row, in JAX, and the same equations as a sparse matrix in SciPy. Arrays of
cells have x_2 along rows, x_1 along columns. Head and error are of second order in 1 / size.

The data were made with 1023 modes on 64 x 64 cells, the model has 256 modes on 32 x 32 cells. Dropped modes hold
0.3 % of the variance.

Sources: Huang, Huang, Reich, Stuart (2022), Efficient derivative-free Bayesian inference for large-scale inverse
problems, Inverse Problems 38, doi:10.1088/1361-6420/ac99fa (equation, source, prior, wells; amplitude, truth and data
are our own); block elimination: Golub and Van Loan (2013), Matrix Computations, section 4.5.1. Numbers: NUTS
over gradients of the solver, `python -m benchmarks.darcy --reference`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import sparse
from scipy.sparse.linalg import spsolve

from pushforward.problems._darcy_numbers import LOG_PERMEABILITY_SD, MEAN, SD
from pushforward.problems._problem import Problem, constant

SIZE = 32
MODES = 256
AMPLITUDE = 10.0
TAU = 3.0
NOISE = 1.0
"""Standard deviation of the data, whose heads are 10 to 130."""
WELLS = constant(np.arange(1, 8) / 8)
"""Both coordinates of the wells."""
TRUTH_SIZE, TRUTH_MODES, TRUTH_SEED = 64, 1023, 1


def heads(log_permeability):
    """Pressure heads at the wells, shape (7, 7), x_2 along rows, for log-permeabilities of cells, shape (n, n)."""
    wells = jnp.asarray(_interpolation(len(log_permeability)), log_permeability.dtype)
    return wells @ pressure(log_permeability) @ wells.T


def model(head=None, size=SIZE, modes=MODES, amplitude=AMPLITUDE, solver=heads):
    """Heads at the wells, shape (7, 7).

    Args:
        head: the data, None to simulate.
        size: cells along each axis, at least 4.
        modes: length of xi.
        amplitude: factor of the prior; 1 is the published one.
        solver: from log-permeabilities of cells to heads: `heads`, or `pf.simulator(darcy.heads_by_scipy, (7, 7))`.
    """
    xi = numpyro.sample("xi", dist.Normal(0.0, 1.0).expand([modes]).to_event(1))
    field = numpyro.deterministic("log_permeability", log_permeability(xi, size, amplitude))
    numpyro.sample("head", dist.Normal(solver(field), NOISE).to_event(2), obs=head)


def log_permeability(xi, size=SIZE, amplitude=AMPLITUDE):
    """u at the centres of cells, shape (..., size, size), from its coefficients, shape (..., modes)."""
    # a copy, since JAX 0.12 remembers the dtype of a numpy constant from the first precision that it was traced in
    series = jnp.asarray(np.array(karhunen_loeve(size, xi.shape[-1])), xi.dtype)
    return amplitude * jnp.tensordot(xi, series, 1)


def indices(modes):
    """The first `modes` indices (l_1, l_2), shape (modes, 2), by falling variance, then by l_1."""
    side = int(np.ceil(np.sqrt(4 * modes / np.pi))) + 2
    first, second = np.divmod(np.arange(1, side**2), side)
    return np.stack([first, second], -1)[np.lexsort([first, first**2 + second**2])[:modes]]


@functools.cache
def karhunen_loeve(size=SIZE, modes=MODES):
    """Series of u at amplitude 1: (pi^2 |l|^2 + tau^2)^-1 phi_l at the centres of cells, shape (modes, size, size)."""
    index = indices(modes)
    centres = (np.arange(size) + 0.5) / size
    cosines = np.where(index > 0, 2**0.5, 1.0)[..., None] * np.cos(np.pi * index[..., None] * centres)
    scale = 1 / (np.pi**2 * np.sum(index**2, -1) + TAU**2)
    return constant(scale[:, None, None] * cosines[:, 1, :, None] * cosines[:, 0, None, :])


@functools.cache
def source(size=SIZE):
    """Mean of f over each cell, shape (size, size); exact also for cells in which it jumps."""
    edges = np.arange(size + 1) / size
    below = 1000 * (edges + np.maximum(edges - 2 / 3, 0) + np.maximum(edges - 5 / 6, 0))
    return constant(np.repeat(size * np.diff(below)[:, None], size, axis=1))


@functools.cache
def _interpolation(size):
    """Linear interpolation from centres of cells to wells along an axis, shape (7, size)."""
    if size < 4:
        raise ValueError(f"size={size}: wells next to the boundary need at least 4 cells along each axis")
    position = WELLS * size - 0.5
    return constant(np.maximum(1 - np.abs(position[:, None] - np.arange(size)), 0))


# ------------------------------------------------------------------------------------------------------------ JAX


def pressure(log_permeability, source_of_cells=None):
    """Pressure heads of cells, shape (n, n), the solution of the flow balance of every cell.

    Derivatives come from one more substitution with the same factors, in forward and in reverse mode.

    Args:
        log_permeability: u of cells, shape (n, n), x_2 along rows.
        source_of_cells: mean of f over each cell, shape (n, n); `source(n)` by default.
    """
    size, kind = len(log_permeability), log_permeability.dtype
    inflow = jnp.asarray(np.array(source(size)) if source_of_cells is None else source_of_cells, kind) / size**2
    conductances = _conductances(log_permeability)
    factors = _factor(*jax.tree.map(jax.lax.stop_gradient, conductances))
    return jax.lax.custom_linear_solve(
        lambda p: outflow(p, *conductances), inflow, lambda _, b: _substitute(factors, b), symmetric=True
    )


def outflow(head, vertical, horizontal):
    """Water that leaves each cell, shape (n, n), at heads (n, n) and conductances (n + 1, n), (n, n + 1) of faces."""
    around = jnp.pad(head, 1)
    rises = vertical * jnp.diff(around[:, 1:-1], axis=0)
    flows = horizontal * jnp.diff(around[1:-1], axis=1)
    return -jnp.diff(rises, axis=0) - jnp.diff(flows, axis=1)


def _conductances(log_permeability):
    """Of the faces across which x_2 rises, shape (n + 1, n), and x_1, (n, n + 1); half a cell at the boundary."""
    permeability = jnp.exp(log_permeability)

    def along_rows(k):
        return jnp.concatenate([2 * k[:1], 2 / (1 / k[:-1] + 1 / k[1:]), 2 * k[-1:]])

    return along_rows(permeability), along_rows(permeability.T).T


def _factor(vertical, horizontal):
    """Lower blocks of the Cholesky factor, row by row of the grid: L_i and W_i = L_i^-1 D_i, shapes (n, n, n).

    The matrix has blocks S_i = tridiagonal on and -D_i, diagonal, below and above the diagonal.
    """
    diagonal = vertical[:-1] + vertical[1:] + horizontal[:, :-1] + horizontal[:, 1:]

    def row(w, faces):
        diagonal, beside, above = faces
        block = jnp.diag(diagonal) - jnp.diag(beside, 1) - jnp.diag(beside, -1) - w.T @ w
        root = jnp.linalg.cholesky(block, symmetrize_input=False)
        w = jax.lax.linalg.triangular_solve(root, jnp.diag(above), left_side=True, lower=True)
        return w, (root, w)

    faces = (diagonal, horizontal[:, 1:-1], vertical[1:])
    return jax.lax.scan(row, jnp.zeros_like(diagonal), faces)[1]


def _substitute(factors, b):
    """The solution for the right-hand side b, shape (n, n)."""
    roots, ws = factors

    def forward(carried, row):
        root, w, b = row
        y = jax.lax.linalg.triangular_solve(root, (b + carried)[:, None], left_side=True, lower=True)[:, 0]
        return w.T @ y, y

    def backward(p, row):
        root, w, y = row
        right = (y + w @ p)[:, None]
        p = jax.lax.linalg.triangular_solve(root, right, left_side=True, lower=True, transpose_a=True)[:, 0]
        return p, p

    _, y = jax.lax.scan(forward, jnp.zeros_like(b[0]), (roots, ws, b))
    return jax.lax.scan(backward, jnp.zeros_like(b[0]), (roots, ws, y), reverse=True)[1]


# ---------------------------------------------------------------------------------------------------------- SciPy


def heads_by_scipy(log_permeability):
    """`heads` without JAX, float64: numpy in, numpy out, as a code from elsewhere would be.

    Args:
        log_permeability: u of cells, shape (n, n), x_2 along rows.
    """
    field = np.asarray(log_permeability, np.float64)
    size = len(field)
    head = spsolve(matrix(field), source(size).ravel() / size**2).reshape(size, size)
    return _interpolation(size) @ head @ _interpolation(size).T


def matrix(log_permeability):
    """The equations as a sparse matrix, shape (n^2, n^2), cells in the order of the flattened grid."""
    k, number = np.exp(log_permeability), np.arange(log_permeability.size).reshape(log_permeability.shape)
    diagonal, rows, columns, values = np.zeros(k.shape), [], [], []
    for k_, number_, total in ((k, number, diagonal), (k.T, number.T, diagonal.T)):
        face = 2 * k_[:-1] * k_[1:] / (k_[:-1] + k_[1:])
        total[0] += 2 * k_[0]
        total[-1] += 2 * k_[-1]
        total[:-1] += face
        total[1:] += face
        rows += [number_[:-1].ravel(), number_[1:].ravel()]
        columns += [number_[1:].ravel(), number_[:-1].ravel()]
        values += [-face.ravel()] * 2
    entries = [np.concatenate([part.ravel(), *parts]) for part, parts in ((diagonal, values), (number, rows))]
    return sparse.csc_array((entries[0], (entries[1], np.concatenate([number.ravel(), *columns]))))


# ----------------------------------------------------------------------------------------------------------- data


def simulate(seed=TRUTH_SEED, size=TRUTH_SIZE, modes=TRUTH_MODES, amplitude=AMPLITUDE):
    """Coefficients of a truth, shape (modes,), and data, shape (7, 7), of `numpy.random.default_rng(seed)`, float64."""
    rng = np.random.default_rng(seed)
    xi = rng.normal(size=modes)
    field = amplitude * np.tensordot(xi, karhunen_loeve(size, modes), 1)
    return xi, heads_by_scipy(field) + NOISE * rng.normal(size=(7, 7))


# fmt: off
DATA = constant([
    [10.6963, 19.7242, 30.1849, 38.7744, 43.8473, 46.6189, 32.2604],
    [15.5279, 29.5867, 48.8950, 62.6869, 72.2719, 68.9998, 42.9112],
    [18.5541, 40.0144, 61.8668, 80.5632, 84.0379, 78.9972, 41.3088],
    [26.2431, 51.7817, 75.9294, 92.2813, 97.0008, 84.9718, 43.1510],
    [32.1085, 58.5727, 86.0800, 108.3056, 110.6067, 96.0904, 46.6534],
    [37.3239, 66.0913, 98.4369, 126.2795, 130.4784, 112.9055, 57.5608],
    [29.5046, 57.1610, 92.3507, 123.6958, 130.1914, 107.6013, 58.4789],
])
# fmt: on
"""Heads at the wells, x_2 along rows: `simulate()`, rounded."""


def problem() -> Problem:
    """The stored data with the moments of a long run of NUTS; `log_permeability_sd` is that of cells, (32, 32)."""
    return Problem(
        name="darcy",
        model=model,
        inputs={},
        data={"head": DATA},
        source="Huang, Huang, Reich, Stuart (2022), doi:10.1088/1361-6420/ac99fa, amplitude 10; data our own",
        numbers={"mean": {"xi": MEAN}, "sd": {"xi": SD}, "log_permeability_sd": LOG_PERMEABILITY_SD},
        truth={"xi": constant(simulate()[0][:MODES])},
    )
