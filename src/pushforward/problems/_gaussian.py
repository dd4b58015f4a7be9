"""Exact answers for linear Gaussian models: variables written out in independent N(0, 1) noise, and conditioning.

A variable is `mean + root @ noise` with one noise vector for the whole model, so that a model's equations can be
written in numpy as they are; the joint law of everything is then one dense Gaussian. Nothing here is recursive in
time: there is no Kalman filter in this file, which is why filters may be tested against it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular


class Noise:
    """The N(0, 1) vector of a model; it grows with every new variable."""

    def __init__(self):
        self.size = 0

    def normal(self, mean, root) -> "Affine":
        """A new variable N(mean, root root^T), independent of all others; mean (d,), root (d, k)."""
        mean, root = np.asarray(mean, np.float64), np.asarray(root, np.float64)
        old, self.size = self.size, self.size + root.shape[1]
        return Affine(mean, np.concatenate([np.zeros((len(mean), old)), root], axis=1))


@dataclass(frozen=True, eq=False)
class Affine:
    """A vector that is affine in the noise: `mean`, shape (d,), plus `root`, shape (d, k), times the noise."""

    mean: np.ndarray
    root: np.ndarray
    __array_ufunc__ = None  # so that `matrix @ variable` asks the variable

    def __add__(self, other) -> "Affine":
        if not isinstance(other, Affine):
            return Affine(self.mean + other, self.root)
        size = max(self.root.shape[1], other.root.shape[1])
        return Affine(self.mean + other.mean, _padded(self.root, size) + _padded(other.root, size))

    def __rmatmul__(self, matrix) -> "Affine":
        return Affine(matrix @ self.mean, matrix @ self.root)

    def __rmul__(self, scale) -> "Affine":
        """Elementwise product with a number or a vector."""
        scale = np.broadcast_to(scale, self.mean.shape)
        return Affine(scale * self.mean, scale[:, None] * self.root)

    __radd__ = __add__

    def __getitem__(self, index: slice) -> "Affine":
        return Affine(self.mean[index], self.root[index])


def join(*parts: Affine) -> Affine:
    """Variables one below the other."""
    size = max(part.root.shape[1] for part in parts)
    roots = [_padded(part.root, size) for part in parts]
    return Affine(np.concatenate([part.mean for part in parts]), np.concatenate(roots))


def _padded(root, size):
    return np.pad(root, ((0, 0), (0, size - root.shape[1])))


class Moments(NamedTuple):
    """Means, shape (steps, n), and covariances, shape (steps, n, n), step by step."""

    mean: np.ndarray
    covariance: np.ndarray


Block = Affine | Sequence[Affine]
"""A site outside the scan, or one inside it: one variable per step."""


@dataclass(frozen=True, eq=False)
class Joint:
    """The joint Gaussian law of a state-space model, with data to condition on.

    Attributes:
        latent: every latent site by its name in the model; a sequence over steps for sites of the scan.
        data: every observed site likewise. One outside the scan counts as seen before the first step.
        values: the data, NaN = missing, in the shapes of the sites.
        state: the site "x", latent or deterministic, one variable per step, flattened to n numbers.
    """

    latent: Mapping[str, Block]
    data: Mapping[str, Block]
    values: Mapping[str, np.ndarray]
    state: Sequence[Affine]

    def log_evidence(self) -> float:
        """log p(data that are present)."""
        factor, residual, _, _ = self._whitened()
        return _log_normal(factor, residual)

    def filtering(self) -> Moments:
        """Moments of x_t given the data of steps up to and including t."""
        return self._moments(lambda step, t: step <= t)

    def one_step(self) -> Moments:
        """Moments of x_t given the data of steps before t."""
        return self._moments(lambda step, t: step < t)

    def smoothing(self) -> Moments:
        """Moments of x_t given all data."""
        return self._moments(lambda step, t: step < np.inf)

    def posterior(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance, given all data, of a latent site, flattened (over steps too)."""
        block = self.latent[name]
        site = block if isinstance(block, Affine) else join(*block)
        factor, residual, root_y, _ = self._whitened()
        gain = _solve(factor, root_y @ _padded(site.root, root_y.shape[1]).T)
        return site.mean + gain.T @ residual, site.root @ site.root.T - gain.T @ gain

    def log_density(self, sites: Mapping[str, np.ndarray]) -> float:
        """log p(latent sites, data that are present) at given values of every latent site."""
        blocks = [block if isinstance(block, Affine) else join(*block) for block in self.latent.values()]
        points = [np.ravel(sites[name]) for name in self.latent]
        variables, y, _ = self._present()
        everything = join(*blocks, variables)
        factor = np.linalg.cholesky(everything.root @ everything.root.T)
        return _log_normal(factor, _solve(factor, np.concatenate([*points, y]) - everything.mean))

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Simulated data, flattened to (steps, m) for sites of the scan."""
        blocks = [b for block in (*self.latent.values(), *self.data.values()) for b in _parts(block)]
        noise = rng.normal(size=max(block.root.shape[1] for block in blocks))

        def value(block):
            return block.mean + block.root @ noise[: block.root.shape[1]]

        return {
            name: value(block) if isinstance(block, Affine) else np.stack([value(b) for b in block])
            for name, block in self.data.items()
        }

    def _present(self) -> tuple[Affine, np.ndarray, np.ndarray]:
        """Data that are not missing, in the order of time: variables, values and steps (-1: before the scan)."""
        variables, values, steps = [], [], []
        for name, block in self.data.items():
            parts = _parts(block)
            variables += parts
            values.append(np.ravel(self.values[name]))
            start = -1 if isinstance(block, Affine) else 0
            steps += [start + t for t, part in enumerate(parts) for _ in part.mean]
        y, step = np.concatenate(values), np.array(steps)
        order = np.argsort(step, kind="stable")
        order = order[~np.isnan(y[order])]
        everything = join(*variables)
        return Affine(everything.mean[order], everything.root[order]), y[order], step[order]

    def _whitened(self):
        """Cholesky factor of the data's covariance, whitened residual, root and steps of the data."""
        variables, y, step = self._present()
        factor = np.linalg.cholesky(variables.root @ variables.root.T)
        return factor, _solve(factor, y - variables.mean), variables.root, step

    def _moments(self, seen) -> Moments:
        """Leading rows of one Cholesky factor condition on the first data alone."""
        factor, residual, root_y, step = self._whitened()
        means, covariances = [], []
        for t, x in enumerate(self.state):
            size = max(root_y.shape[1], x.root.shape[1])
            known = int(np.sum(seen(step, t)))
            cross = _padded(root_y, size)[:known] @ _padded(x.root, size).T
            gain = _solve(factor[:known, :known], cross)
            means.append(x.mean + gain.T @ residual[:known])
            covariances.append(x.root @ x.root.T - gain.T @ gain)
        return Moments(np.stack(means), np.stack(covariances))


def _parts(block: Block) -> list[Affine]:
    return [block] if isinstance(block, Affine) else list(block)


def _solve(factor, right):
    return solve_triangular(factor, right, lower=True) if len(factor) else np.zeros_like(right)


def _log_normal(factor, whitened) -> float:
    return float(-0.5 * (len(whitened) * np.log(2 * np.pi) + whitened @ whitened) - np.sum(np.log(np.diag(factor))))
