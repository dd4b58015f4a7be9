"""A conditional estimator with its embedding, fitted to simulations of a model: the posterior for all data at once.

Pairs (u, y) come from prior and likelihood, or from outside. u are coordinates of the noise ``z``, so the prior is
N(0, I) and nothing leaks out of its support; y are standardised by their mean and sd over the simulations.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from pushforward._errors import DataError
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned import fitting
from pushforward.learned.embeddings import Embedding
from pushforward.learned.estimators import Estimator
from pushforward.learned.fitting import Training
from pushforward.learned.flows import trainable
from pushforward.model.inverse import InverseProblem

_BATCH = 4096
_FAILED = 0.1
"""Share of simulations that may fail."""
_FAR = 0.999
"""Quantile of the simulations' distances beyond which data are called unlike them."""
_RIDGE = 1e-4


class Shape(eqx.Module):
    """What the networks are built from; static.

    Attributes:
        estimator: what is learned of u given the context.
        embedding: what makes the context of the data.
        dimension: length of u.
        layout: shape of the arranged data.
    """

    estimator: Estimator
    embedding: Embedding
    dimension: int
    layout: tuple[int, ...]

    def initial(self, key: Key) -> tuple[Any, Any]:
        """Embedding network and estimator's networks with random weights."""
        first, second = jax.random.split(key)
        size = self.embedding.size(self.layout)
        return self.embedding.build(first, self.layout), self.estimator.build(second, self.dimension, size)

    def networks(self, weights: Array) -> tuple[Any, Any]:
        """The networks with given weights, one flat vector."""
        # Built anew in every trace, since FlowJAX's layers close over arrays.
        changing, rest = trainable(self.initial(jax.random.key(0)))
        return eqx.combine(ravel_pytree(changing)[1](weights), rest)

    def weights(self, key: Key) -> Array:
        """Random weights as one flat vector."""
        # A generator that compiles in half the time of the default one; initial weights need no better.
        bits = jax.random.key_data(key)
        quick = jax.random.wrap_key_data(jnp.concatenate([bits, bits])[:4], impl="unsafe_rbg")
        return ravel_pytree(trainable(self.initial(quick))[0])[0]


class Conditional(eqx.Module):
    """A fitted estimator.

    Attributes:
        shape: what it is built from.
        weights: of its networks.
        location: mean of the data over the simulations.
        spread: standard deviation.
        far: mean, root of the precision and quantile of the distances of the simulations, for `distance`.
    """

    shape: Shape
    weights: Array
    location: Array
    spread: Array
    far: tuple[Array, Array, Array]

    def standardised(self, values: Array) -> tuple[Array, Array]:
        """Standardised data, 0 where missing, and what is present; values of shape `layout`."""
        return _standardised(values, self.location, self.spread)

    def context(self, networks: tuple[Any, Any], values: Array) -> Array:
        """What the estimator is given of the data."""
        return networks[0](*self.standardised(values))

    def draw(self, values: Array, key: Key, draws: int) -> Array:
        """Draws of u given data, (draws, d)."""
        networks = self.shape.networks(self.weights)
        c = self.context(networks, values)
        noise = jax.random.normal(key, (draws, self.shape.dimension))
        return jax.vmap(lambda e: self.shape.estimator.push(networks[1], e, c))(noise)

    def weighed(self, values: Array, key: Key, draws: int) -> tuple[Array, Array]:
        """Draws of u given data, (draws, d), and log q at them; NaN where the estimator has no density."""
        networks, estimator = self.shape.networks(self.weights), self.shape.estimator
        c = self.context(networks, values)
        noise = jax.random.normal(key, (draws, self.shape.dimension))
        if estimator.has_density:
            return jax.vmap(lambda e: estimator.weighed(networks[1], e, c))(noise)
        return jax.vmap(lambda e: estimator.push(networks[1], e, c))(noise), jnp.full(draws, jnp.nan)

    def log_density(self, u: Array, values: Array) -> Array:
        """log q(u given data), for u of shape (n, d)."""
        networks = self.shape.networks(self.weights)
        c = self.context(networks, values)
        return jax.vmap(lambda v: self.shape.estimator.log_density(networks[1], v, c))(u)

    def distance(self, values: Array) -> Array:
        """Mahalanobis distance of the data from the simulations, in units of their 99.9 % quantile."""
        mean, root, quantile = self.far
        features, present = _features(self.shape, self.weights, *self.standardised(values))
        return jnp.linalg.norm(root @ jnp.where(present, features - mean, 0.0)) / quantile


def _standardised(values: Array, location: Array, spread: Array) -> tuple[Array, Array]:
    present = jnp.isfinite(values)
    return jnp.where(present, (jnp.where(present, values, 0.0) - location) / spread, 0.0), present


def _features(shape: Shape, weights: Array, values: Array, present: Array) -> tuple[Array, Array]:
    """The data themselves where they are few, else their embedding."""
    if values.size <= 64:
        return values.reshape(-1), present.reshape(-1)
    found = shape.networks(weights)[0](values, present)
    return found, jnp.ones(found.shape, bool)


class Stream(eqx.Module):
    """Simulations drawn anew at each call; see `Training`."""

    problem: InverseProblem
    embedding: Embedding
    layout: tuple[int, ...]
    columns: tuple[int, ...]
    size: int
    location: Array
    spread: Array

    def __call__(self, key: Key) -> tuple[Array, Array]:
        return simulate(self.problem, self.embedding, self.layout, self.columns, self.size, key)


def simulate(
    problem: InverseProblem,
    embedding: Embedding,
    layout: tuple[int, ...],
    columns: tuple[int, ...],
    size: int,
    key: Key,
) -> tuple[Array, Array]:
    """u of shape (size, d) and arranged data (size, *layout) from prior and likelihood.

    Args:
        problem: the model.
        embedding: arranges the data.
        layout: shape of arranged data.
        columns: which entries of z are u.
        size: number of simulations.
        key: typed JAX key.
    """
    batch = min(size, _BATCH)
    rows = -(-size // batch)

    def some(k: Key) -> tuple[Array, Array]:
        _, data, noise = problem.simulate(k, batch)
        return noise[:, jnp.asarray(columns)], jax.vmap(lambda d: embedding.arrange(d, layout))(data)

    u, values = jax.lax.map(some, jax.random.split(key, rows))
    return u.reshape(rows * batch, -1)[:size], values.reshape(rows * batch, *layout)[:size]


def kept(u: Array, values: Array, embedding: Embedding, what: str) -> tuple[Array, Array]:
    """The simulations that did not fail.

    Raises:
        DataError: more than a tenth failed.
    """
    numbers, data = np.asarray(u), np.asarray(values).reshape(len(values), -1)
    bad = ~np.isfinite(numbers).all(1) | np.isinf(data).any(1)
    absent = np.isnan(data)
    bad |= absent.all(1) if embedding.reads_missing else absent.any(1)
    share = bad.mean()
    if share > _FAILED:
        raise DataError(
            f"{share:.0%} of {len(bad)} {what} are not finite (NaN or infinite), above {_FAILED:.0%}: what is learned "
            "from the rest is not the posterior. Narrow the prior to where the model works, or mend the model. Data "
            "that may be missing need an embedding that is trained for it, such as pf.Vector(missing=0.3)."
        )
    return (u, values) if not share else (u[~bad], values[~bad])


def loss(shape: Shape, location: Array, spread: Array, weights: Array, batch: tuple[Array, Array], key: Key) -> Array:
    """Loss of each simulation of a batch; 0 for one that failed."""
    networks = shape.networks(weights)

    def one(u: Array, values: Array, k: Key) -> Array:
        hide_key, loss_key = jax.random.split(k)
        standard, present = _standardised(values, location, spread)
        good = jnp.all(jnp.isfinite(u)) & (present.any() if shape.embedding.reads_missing else present.all())
        shown = shape.embedding.hide(hide_key, present)
        c = networks[0](jnp.where(shown, standard, 0.0), shown)
        return jnp.where(good, shape.estimator.loss(networks[1], jnp.where(good, u, 0.0), c, loss_key), 0.0)

    return jax.vmap(one)(*batch, jax.random.split(key, len(batch[0])))


def fit_conditional(
    shape: Shape,
    u: Array,
    values: Array,
    training: Training,
    key: Key,
    runner: Runner,
    stream: Stream | None = None,
) -> tuple[Conditional, fitting.Fit]:
    """Fit an estimator to simulations.

    Args:
        shape: what is fitted.
        u: (n, d).
        values: arranged data, (n, *layout).
        training: how.
        key: typed JAX key.
        runner: compiles, shows and checkpoints.
        stream: where new simulations come from, if they do; u and values then serve to standardise and to judge.
    """
    location, spread = runner.call(_scales, shape, values)
    weights = runner.call(_weights, shape, jax.random.fold_in(key, 0))
    n = len(u)
    held = min(max(1, round(training.held_out * n)), n - 1)
    train: Any = (u[held:], values[held:]) if stream is None else stream
    judge = (u[:held], values[:held]) if stream is None else (u, values)
    found = fitting.fit(
        loss, weights, train, judge, training, jax.random.fold_in(key, 1), runner, (shape, location, spread)
    )
    far = runner.call(_distances, shape, found.best, location, spread, values)
    return Conditional(shape, found.best, location, spread, far), found


def _weights(shape: Shape, key: Key) -> Array:
    return shape.weights(key)


def _scales(shape: Shape, values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of the data, over the simulations and the axes that are alike; 1 for constants."""
    axes = (0, *(axis + 1 for axis in shape.embedding.pooled))
    location = jnp.nanmean(values, axes, keepdims=True)
    spread = jnp.nanstd(values, axes, keepdims=True)
    usable = jnp.isfinite(spread) & (spread > 0)
    target = tuple(1 if axis in shape.embedding.pooled else size for axis, size in enumerate(shape.layout))
    return (
        jnp.where(jnp.isfinite(location), location, 0.0).reshape(target),
        jnp.where(usable, spread, 1.0).reshape(target),
    )


def _distances(shape: Shape, weights: Array, location: Array, spread: Array, values: Array) -> tuple:
    """Mean, whitening root and quantile for `Conditional.distance`."""
    features, _ = jax.lax.map(
        lambda v: _features(shape, weights, *_standardised(v, location, spread)), values[:_BATCH], batch_size=256
    )
    mean = jnp.mean(features, 0)
    centred = features - mean
    covariance = centred.T @ centred / len(centred)
    ridge = _RIDGE * (jnp.trace(covariance) / len(covariance) + 1e-12)
    scales, basis = jnp.linalg.eigh(covariance + ridge * jnp.eye(len(covariance)))
    root = (basis / jnp.sqrt(scales)).T
    return mean, root, jnp.quantile(jnp.linalg.norm(centred @ root.T, axis=1), _FAR)
