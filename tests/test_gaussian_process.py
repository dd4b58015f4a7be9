"""Gaussian processes, random features and low-rank Gaussians against dense textbook formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats

from pushforward.math import gaussian_process, low_rank, random_features
from pushforward.math.gaussian_process import KERNELS, Hyperparameters

N, D = 12, 3
RNG = np.random.default_rng(5)
X, Y, AT = RNG.normal(size=(N, D)), RNG.normal(size=N), RNG.normal(size=D)


def hyperparameters():
    return Hyperparameters(*map(jnp.asarray, (0.8, np.array([0.7, 1.5, 3.0]), 0.4, 0.3)))


def kernel(name, h, a, b):
    """k between rows, from distances one by one."""
    r = np.sqrt(np.sum(((a[:, None] - b[None]) / np.asarray(h.lengths)) ** 2, -1))
    g = (
        np.exp(-0.5 * r**2)
        if name == "squared_exponential"
        else (1 + 5**0.5 * r + 5 / 3 * r**2) * np.exp(-(5**0.5) * r)
    )
    return float(h.amplitude) ** 2 * g + float(h.slope) ** 2 * (1 + a @ b.T)


def dense(k, cross, own, noise):
    """Log evidence, predictive mean and variance from the joint Gaussian of old and new outputs."""
    full = k + noise**2 * np.eye(N)
    weights = np.linalg.solve(full, cross)
    return stats.multivariate_normal(np.zeros(N), full).logpdf(Y), weights @ Y, own - cross @ weights + noise**2


@pytest.mark.parametrize("name", KERNELS)
def test_the_process_is_that_of_the_dense_formulas(float64, name):
    h = hyperparameters()
    at = AT[None]
    args = kernel(name, h, X, X), kernel(name, h, X, at)[:, 0], kernel(name, h, at, at)[0, 0]
    evidence, mean, variance = dense(*args, float(h.noise))
    lower = gaussian_process.root(name, h, jnp.asarray(X))
    alpha = gaussian_process.weights(lower, jnp.asarray(Y))
    found = gaussian_process.predict(name, h, jnp.asarray(X), lower, alpha, jnp.asarray(AT))
    # The jitter is 12 rounding errors of the diagonal.
    np.testing.assert_allclose(found, (mean, variance), rtol=1e-10)
    value = gaussian_process.log_marginal_likelihood(name, h, jnp.asarray(X), jnp.asarray(Y))
    np.testing.assert_allclose(value, evidence, rtol=1e-10)


@pytest.mark.parametrize("name", KERNELS)
def test_derivatives_of_the_evidence(float64, name):
    def evidence(*values):
        return gaussian_process.log_marginal_likelihood(name, Hyperparameters(*values), jnp.asarray(X), jnp.asarray(Y))

    h = hyperparameters()
    check_grads(evidence, (h.amplitude, h.lengths, h.slope, h.noise), order=1, modes=["rev"], rtol=1e-6)


def test_a_linear_function_is_exact_and_known_points_are_kept(float64):
    h = Hyperparameters(*map(jnp.asarray, (1e-3, 1.0, 10.0, 1e-7)))
    y = 2.0 + X @ np.array([1.0, -0.5, 3.0])
    lower = gaussian_process.root("squared_exponential", h, jnp.asarray(X))
    alpha = gaussian_process.weights(lower, jnp.asarray(y))
    far = 20.0 * AT
    mean, variance = gaussian_process.predict("squared_exponential", h, jnp.asarray(X), lower, alpha, jnp.asarray(far))
    np.testing.assert_allclose(mean, 2.0 + far @ np.array([1.0, -0.5, 3.0]), rtol=1e-4)
    at, sd = gaussian_process.predict("squared_exponential", h, jnp.asarray(X), lower, alpha, jnp.asarray(X[4]))
    np.testing.assert_allclose(at, y[4], rtol=1e-7)
    assert sd < 1e-9 < variance


@pytest.mark.parametrize("name", KERNELS)
def test_features_tend_to_the_kernel(name):
    h, p = hyperparameters(), 40_000
    w, b = random_features.frequencies(name, jax.random.key(0), p, D)
    phi = np.asarray(random_features.features(h, w, b, jnp.asarray(X, jnp.float32)), float)
    # Each entry is a mean of p terms of sd at most amplitude^2: five standard errors for 78 entries, 5e-5 false alarms.
    np.testing.assert_allclose(phi @ phi.T, kernel(name, h, X, X), atol=5 * 0.64 / p**0.5)


def test_regression_on_features_is_the_process_of_their_kernel(float64):
    """Weights and functions are two views of one Gaussian (Rasmussen and Williams, section 2.1.2)."""
    h = hyperparameters()
    w, b = random_features.frequencies("matern52", jax.random.key(1), 30, D)
    phi, at = (np.asarray(random_features.features(h, w, b, jnp.asarray(v))) for v in (X, AT))
    evidence, mean, variance = dense(phi @ phi.T, phi @ at, at @ at, float(h.noise))
    lower, v, squared = random_features.solve(jnp.asarray(phi), jnp.asarray(Y), h.noise)
    found = random_features.predict(jnp.asarray(at), lower, v, squared, h.noise)
    np.testing.assert_allclose(found, (mean, variance), rtol=1e-10)
    np.testing.assert_allclose(random_features.log_evidence(jnp.asarray(phi), jnp.asarray(Y), h.noise), evidence)


@pytest.mark.parametrize("missing", [[], [0, 3]])
def test_low_rank_is_dense(float64, missing):
    """N(V c, I + V S V^T), also where missing rows leave fewer than k."""
    m, k = 4, 3
    v, y, c, s = RNG.normal(size=(m, k)), RNG.normal(size=m), RNG.normal(size=k), np.array([0.5, 2.0, 0.0])
    keep = np.setdiff1d(np.arange(m), missing)
    exact = stats.multivariate_normal(v[keep] @ c, np.eye(len(keep)) + v[keep] * s @ v[keep].T).logpdf(y[keep])
    v[missing], y[missing] = 0.0, 0.0
    reduced = low_rank.reduce(jnp.asarray(y), jnp.asarray(v), 0.5 * len(keep) * np.log(2 * np.pi))
    np.testing.assert_allclose(low_rank.log_density(reduced, jnp.asarray(c), jnp.asarray(s)), exact, rtol=1e-12)
