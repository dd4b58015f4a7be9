"""Regressions from R^d to k numbers, each with a predictive variance: Gaussian processes, random features, networks.

Inputs are standardised, and so are the outputs, which are uncorrelated (principal components), so that each has a
regression of its own. Hyperparameters are those of the largest evidence under a weak prior.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned.fitting import Training, fit
from pushforward.learned.training import Adam
from pushforward.math import gaussian_process, random_features
from pushforward.math.gaussian_process import Hyperparameters

ROWS = 300
"""Rows that choose hyperparameters; predictions use all rows."""
MOST_ROWS = 3000
"""Rows of a Gaussian process at most."""
ARD = 20
"""Inputs up to which each has a length of its own."""
_STEPS, _RATE = 100, 0.3
_LIMIT = 10.0
_MEMBERS, _WIDTH = 5, 64
_LEAST_RELEVANCE = 0.02
_CHECK = 0.2
"""Share of a network's rows that ends its training and says how far it is off."""


class Regressor(eqx.Module):
    """A fitted regression; ``regressor(x)`` with x (d,) gives mean and variance of the outputs, (k,) each."""

    @abstractmethod
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Mean (k,) and variance (k,) at a point (d,)."""


class GaussianProcess(Regressor):
    """One Gaussian process for each output; see `math/gaussian_process.py`.

    Attributes:
        kernel: name of the correlation.
        x: inputs of the training, (n, d).
        h: hyperparameters with a leading axis of the outputs.
        lower: Cholesky factors, (k, n, n).
        alpha: weights, (k, n).
    """

    kernel: str = eqx.field(static=True)
    x: Array
    h: Hyperparameters
    lower: Array
    alpha: Array

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """See `Regressor`."""

        def one(h: Hyperparameters, lower: Array, alpha: Array) -> tuple[Array, Array]:
            return gaussian_process.predict(self.kernel, h, self.x, lower, alpha, x)

        return jax.vmap(one)(self.h, self.lower, self.alpha)


class RandomFeatures(Regressor):
    """Bayesian linear regression on random features; see `math/random_features.py`.

    Attributes:
        w: frequencies, (p, d).
        b: phases, (p,).
        h: hyperparameters with a leading axis of the outputs.
        lower: Cholesky factors of A, (k, q, q).
        v: weights, (k, q).
        variance: noise^2 of the fit, (k,).
    """

    w: Array
    b: Array
    h: Hyperparameters
    lower: Array
    v: Array
    variance: Array

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """See `Regressor`."""

        def one(h: Hyperparameters, lower: Array, v: Array, variance: Array) -> tuple[Array, Array]:
            phi = random_features.features(h, self.w, self.b, x)
            return random_features.predict(phi, lower, v, variance, h.noise)

        return jax.vmap(one)(self.h, self.lower, self.v, self.variance)


class Networks(Regressor):
    """Several networks with an affine part; their spread and what they miss on rows set apart are the variance.

    Attributes:
        weights: of all members, flat.
        missed: mean squared error on the rows set apart, (k,).
        sizes: d and k.
    """

    weights: Array
    missed: Array
    sizes: tuple[int, int] = eqx.field(static=True)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """See `Regressor`."""
        found = _networks(self.sizes, self.weights, x)
        return jnp.mean(found, 0), jnp.var(found, 0, ddof=1) + self.missed


def relevance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much each input moves the outputs, (d,), with mean square 1: sizes of ridge regression coefficients.

    Many inputs share one length scale; multiplied by their relevance, those that hardly matter are hardly a distance.

    Args:
        x: standardised inputs, (n, d).
        y: outputs, (n, k).
    """
    d = x.shape[1]
    slopes = np.linalg.solve(x.T @ x + d * np.eye(d), x.T @ y)
    size = np.linalg.norm(slopes, axis=1)
    size = np.maximum(size, _LEAST_RELEVANCE * size.max())
    return size / np.sqrt(np.mean(size**2)) if size.max() > 0 else np.ones(d)


def fit_gaussian_process(x: Array, y: Array, kernel: str, key: Key, runner: Runner) -> GaussianProcess:
    """Gaussian processes for outputs y (n, k) at inputs x (n, d); hyperparameters by `ROWS` random rows."""
    few = jax.random.permutation(key, len(x))[:ROWS]
    h = runner.call(_best_process, kernel, x[few], y[few])
    lower, alpha = runner.call(_conditioned, kernel, h, x, y)
    return GaussianProcess(kernel, x, h, lower, alpha)


def fit_random_features(x: Array, y: Array, kernel: str, features: int, key: Key, runner: Runner) -> RandomFeatures:
    """Regressions on random features for outputs y (n, k) at inputs x (n, d)."""
    first, second = jax.random.split(key)
    w, b = random_features.frequencies(kernel, first, features, x.shape[1])
    few = jax.random.permutation(second, len(x))[:ROWS]
    h = runner.call(_best_features, w, b, x[few], y[few])
    lower, v, variance = runner.call(_solved, w, b, h, x, y)
    return RandomFeatures(w, b, h, lower, v, variance)


def fit_networks(x: Array, y: Array, training: Training, key: Key, runner: Runner) -> Networks:
    """Networks for outputs y (n, k) at inputs x (n, d), trained together on 4 rows of 5 and judged by the others."""
    sizes = x.shape[1], y.shape[1]
    order_key, start_key, fit_key = jax.random.split(key, 3)
    order = jax.random.permutation(order_key, len(x))
    judged = max(2, round(_CHECK * len(x)))
    apart, used = order[:judged], order[judged:]
    start = _first_weights(sizes, start_key)
    fitted = fit(_squares, start, (x[used], y[used]), (x[apart], y[apart]), training, fit_key, runner, (sizes,))
    found = runner.call(_means, sizes, fitted.best, x[apart])
    return Networks(fitted.best, jnp.mean((y[apart] - found) ** 2, 0), sizes)


# ---------------------------------------------------------------------------------------------- hyperparameters


def _unpacked(p: Array) -> Hyperparameters:
    """Hyperparameters of logarithms (3 + lengths,), kept within e^-10 and e^10."""
    values = jnp.exp(_LIMIT * jnp.tanh(p / _LIMIT))
    lengths = values[3:] if p.size > 4 else values[3]
    return Hyperparameters(values[0], lengths, values[1], values[2])


def _prior(p: Array, d: int) -> Array:
    """Log density of the weak prior: lengths as long as the cloud of inputs is wide, a noise of some thousandths."""
    middle = jnp.concatenate([jnp.array([0.0, -1.0, -6.0]), jnp.full(p.size - 3, jnp.log(2.0 * d**0.5))])
    spread = jnp.concatenate([jnp.array([2.0, 2.0, 3.0]), jnp.full(p.size - 3, 1.5)])
    return -0.5 * jnp.sum(((p - middle) / spread) ** 2)


def _starts(d: int) -> Array:
    """Short, middle and long lengths, (3, 3 + lengths)."""
    lengths = d if d <= ARD else 1
    rows = [[0.0, -1.0, -4.0] + lengths * [c] for c in (-0.5, 0.7, 1.9)]
    return jnp.asarray(rows) + jnp.concatenate([jnp.zeros(3), jnp.full(lengths, 0.5 * jnp.log(d))])


def _highest(objective: Callable[[Array], Array], starts: Array) -> Array:
    """The best end of several searches for a maximum, by Adam at a rate that falls along half a cosine."""
    rates = 0.5 * _RATE * (1 + jnp.cos(jnp.pi * jnp.arange(_STEPS) / _STEPS))

    def step(state: Adam, item: tuple[Array, Array]) -> tuple[Adam, None]:
        return state.moved(-jax.grad(objective)(state.weights), *item), None

    def one(p: Array) -> tuple[Array, Array]:
        end = jax.lax.scan(step, Adam.start(p), (jnp.arange(_STEPS), rates))[0].weights
        return end, objective(end)

    ends, values = jax.vmap(one)(starts)
    return ends[jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))]


def _best_process(kernel: str, x: Array, y: Array) -> Hyperparameters:
    d = x.shape[1]

    def one(column: Array) -> Hyperparameters:
        def objective(p: Array) -> Array:
            return gaussian_process.log_marginal_likelihood(kernel, _unpacked(p), x, column) + _prior(p, d)

        return _unpacked(_highest(objective, _starts(d)))

    return jax.lax.map(one, y.T)


def _conditioned(kernel: str, h: Hyperparameters, x: Array, y: Array) -> tuple[Array, Array]:
    def one(item: tuple[Hyperparameters, Array]) -> tuple[Array, Array]:
        lower = gaussian_process.root(kernel, item[0], x)
        return lower, gaussian_process.weights(lower, item[1])

    return jax.lax.map(one, (h, y.T))


def _best_features(w: Array, b: Array, x: Array, y: Array) -> Hyperparameters:
    d = x.shape[1]

    def one(column: Array) -> Hyperparameters:
        def objective(p: Array) -> Array:
            h = _unpacked(p)
            phi = random_features.features(h, w, b, x)
            return random_features.log_evidence(phi, column, h.noise) + _prior(p, d)

        return _unpacked(_highest(objective, _starts(d)))

    return jax.lax.map(one, y.T)


def _solved(w: Array, b: Array, h: Hyperparameters, x: Array, y: Array) -> tuple[Array, Array, Array]:
    def one(item: tuple[Hyperparameters, Array]) -> tuple[Array, Array, Array]:
        return random_features.solve(random_features.features(item[0], w, b, x), item[1], item[0].noise)

    return jax.lax.map(one, (h, y.T))


# ----------------------------------------------------------------------------------------------------- networks


def _shapes(sizes: tuple[int, int]) -> list[tuple[int, ...]]:
    d, k = sizes
    layers = [(d, _WIDTH), (_WIDTH,), (_WIDTH, _WIDTH), (_WIDTH,), (_WIDTH, k), (k,), (d, k)]
    return [(_MEMBERS, *shape) for shape in layers]


def _first_weights(sizes: tuple[int, int], key: Key) -> Array:
    """Rows of variance 1 / inputs; nothing at the ends, so that training starts at zero."""
    keys = jax.random.split(key, 2)
    shapes = _shapes(sizes)
    found = [jnp.zeros(s) for s in shapes]
    for i, k in zip((0, 2), keys, strict=True):
        found[i] = jax.random.normal(k, shapes[i]) / shapes[i][1] ** 0.5
    # Phases apart, without which all members would bend at the origin alone.
    found[1] = jax.random.uniform(jax.random.fold_in(key, 7), shapes[1], minval=-1.0, maxval=1.0)
    return jnp.concatenate([v.reshape(-1) for v in found])


def _networks(sizes: tuple[int, int], flat: Array, x: Array) -> Array:
    """Outputs of all members at one point, (members, k)."""
    parts, start = [], 0
    for shape in _shapes(sizes):
        size = math.prod(shape)
        parts.append(flat[start : start + size].reshape(shape))
        start += size

    def one(a: Array, b: Array, c: Array, d: Array, e: Array, f: Array, affine: Array) -> Array:
        hidden = jnp.tanh(jnp.tanh(x @ a + b) @ c + d)
        return hidden @ e + f + x @ affine

    return jax.vmap(one)(*parts)


def _squares(sizes: tuple[int, int], weights: Array, batch: tuple[Array, Array], key: Key) -> Array:
    """Squared error of each row, summed over outputs, its mean over the members."""
    x, y = batch
    found = jax.vmap(lambda row: _networks(sizes, weights, row))(x)
    return jnp.mean(jnp.sum((found - y[:, None]) ** 2, -1), -1)


def _means(sizes: tuple[int, int], weights: Array, x: Array) -> Array:
    return jax.vmap(lambda row: jnp.mean(_networks(sizes, weights, row), 0))(x)
