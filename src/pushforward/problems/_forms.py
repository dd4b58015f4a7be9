"""A random stable linear Gaussian system, and what a form of it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pushforward.problems._gaussian import Affine, Joint, Noise
from pushforward.problems._problem import constant


@dataclass(frozen=True, eq=False)
class System:
    """x_0 ~ N(m0, P0), x_t = A x_{t-1} + b + B e_t, y_t = C x_t + r v_t.

    Attributes:
        A, b, B: dynamics, shapes (n, n), (n,), (n, q).
        C, r: observation, shape (m, n), and its standard deviations, shape (m,).
        m0, P0: law of x_0, shapes (n,), (n, n).
        x, y: a trajectory x_1..x_T, shape (steps, n), and its data, shape (steps, m).
        seed: of `numpy.random.default_rng`.
    """

    A: np.ndarray
    b: np.ndarray
    B: np.ndarray
    C: np.ndarray
    r: np.ndarray
    m0: np.ndarray
    P0: np.ndarray
    x: np.ndarray
    y: np.ndarray
    seed: int

    @property
    def n(self) -> int:
        """Dimension of the state."""
        return self.A.shape[0]

    @property
    def q(self) -> int:
        """Dimension of the noise of a step."""
        return self.B.shape[1]

    @property
    def m(self) -> int:
        """Number of data of a step."""
        return self.C.shape[0]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.y)

    @property
    def Q(self) -> np.ndarray:
        """B B^T, shape (n, n)."""
        return self.B @ self.B.T


def system(n: int = 3, m: int = 2, q: int = 3, steps: int = 12, seed: int = 0) -> System:
    """A random stable system with simulated data, float64.

    The spectral radius of A is 0.9, the noise of a step and of the data are of one size, and nothing is symmetric
    or diagonal, so that a transposition cannot go unnoticed.

    Args:
        n, m, q: dimensions of state, data and noise; q < n gives a singular Q.
        steps: number of steps, at least 1.
        seed: of `numpy.random.default_rng`.

    Raises:
        ValueError: a number is smaller than 1, or q is larger than n.

    Example:
        >>> system(n=2, m=1, q=2, steps=5).y.shape
        (5, 1)
    """
    if min(n, m, q, steps) < 1 or q > n:
        raise ValueError(f"n={n}, m={m}, q={q}, steps={steps}: each is at least 1, and q is at most n")
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, n))
    A = 0.9 * a / np.max(np.abs(np.linalg.eigvals(a)))
    B = 0.5 * np.eye(n, q) + 0.1 * rng.normal(size=(n, q))
    root0 = np.eye(n) + 0.3 * rng.normal(size=(n, n))
    b, m0 = 0.3 * rng.normal(size=n), rng.normal(size=n)
    C, r = rng.normal(size=(m, n)), rng.uniform(0.3, 0.6, size=m)
    x, xs, ys = m0 + root0 @ rng.normal(size=n), [], []
    for _ in range(steps):
        x = A @ x + b + B @ rng.normal(size=q)
        xs.append(x)
        ys.append(C @ x + r * rng.normal(size=m))
    return System(*map(constant, (A, b, B, C, r, m0, root0 @ root0.T, np.stack(xs), np.stack(ys))), seed=seed)


class Form(NamedTuple):
    """A NumPyro model, its keyword arguments and its exact law."""

    model: Callable[..., Any]
    inputs: Mapping[str, Any]
    joint: Joint


class Path(NamedTuple):
    """Variables of a system: start, noise, states and data, one per step."""

    x0: Affine
    e: list[Affine]
    x: list[Affine]
    y: list[Affine]


def path(s: System, *, extra: int = 0) -> Path:
    """The equations of a system written out for its steps and `extra` ones."""
    noise = Noise()
    x = x0 = noise.normal(s.m0, root(s.P0))
    es, xs, ys = [], [], []
    for _ in range(s.steps + extra):
        e = noise.normal(np.zeros(s.q), np.eye(s.q))
        x = s.A @ x + s.b + s.B @ e
        es.append(e)
        xs.append(x)
        ys.append(s.C @ x + noise.normal(np.zeros(s.m), np.diag(s.r)))
    return Path(x0, es, xs, ys)


def root(covariance: np.ndarray) -> np.ndarray:
    """Lower Cholesky factor."""
    return np.linalg.cholesky(covariance)


def transition_root(s: System) -> np.ndarray:
    """Cholesky factor of Q, for forms in which x_t has a density.

    Raises:
        ValueError: Q is singular.
    """
    if s.q < s.n:
        raise ValueError(f"Q is singular (q={s.q}, n={s.n}): a form with a density of x_t needs q = n")
    return root(s.Q)


def at_least_two(s: System, **sizes: int) -> None:
    """Refuses systems too small to be split.

    Raises:
        ValueError: one of the sizes is 1.
    """
    for name, size in sizes.items():
        if size < 2:
            raise ValueError(f"{name} is {size}: this form splits it and needs at least 2")
