"""Equations of finite hidden Markov models against the sum over all paths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pushforward.math import hidden_markov

STEPS, VALUES = 5, 3


def case(order, seed=0):
    """A chain of an order with impossible moves: initial log density (M,), log potentials (T, D, R, K)."""
    rng = np.random.default_rng(seed)
    kept = VALUES ** (order - 1)
    initial = np.log(rng.uniform(0.1, 1.0, VALUES * kept))
    potentials = np.log(rng.uniform(0.05, 2.0, (STEPS, VALUES, kept, VALUES)))
    potentials[:, 0, 0, 1] = -np.inf
    potentials[2, :, :, 2] = -np.inf
    return initial, potentials


def paths(initial, potentials):
    """All sequences of states (P, T + 1) that the order allows, with their log densities."""
    _, oldest, kept, values = potentials.shape
    states, density = [], []
    for start, *new in itertools.product(range(oldest * kept), *[range(values)] * len(potentials)):
        path, total = [start], initial[start]
        for potential, b in zip(potentials, new, strict=True):
            d, r = divmod(path[-1], kept)
            total += potential[d, r, b]
            path.append(r * values + b)
        states.append(path)
        density.append(total)
    return np.array(states), np.array(density)


@jax.jit
def value_and_gradient(potentials, initial):
    def forward(potentials):
        found = hidden_markov.forward(initial, potentials)
        return found.log_likelihood, found

    return jax.value_and_grad(forward, has_aux=True)(potentials)


@pytest.mark.parametrize("order", [1, 2])
def test_filter_smoother_and_draws_are_the_sum_over_all_paths(order, float64):
    initial, potentials = case(order)
    states, density = paths(initial, potentials)
    weights = np.exp(density - density.max())
    evidence = np.log(weights.sum()) + density.max()
    weights /= weights.sum()

    @jax.jit
    def run(initial, potentials, key):
        found = hidden_markov.forward(initial, potentials)
        smooth = hidden_markov.smooth(found.log_filter, potentials)
        return found, smooth, hidden_markov.draw_paths(key, found.log_filter, potentials, 4000)

    found, smooth, drawn = run(initial, potentials, jax.random.key(0))
    np.testing.assert_allclose(found.log_likelihood, evidence, atol=1e-12)
    _, oldest, kept, values = potentials.shape
    count = oldest * kept
    for t in range(STEPS + 1):
        marginal = np.bincount(states[:, t], weights, count)
        np.testing.assert_allclose(np.exp(smooth.log_smooth[t]), marginal, atol=1e-12)
        _, until = paths(initial, potentials[:t])
        ends = paths(initial, potentials[:t])[0][:, -1]
        law = np.bincount(ends, np.exp(until), count)
        np.testing.assert_allclose(np.exp(found.log_filter[t]), law / law.sum(), atol=1e-12)
    for t in range(STEPS):
        pair = np.bincount(states[:, t] * values + states[:, t + 1] % values, weights, count * values)
        np.testing.assert_allclose(np.exp(smooth.log_pair[t]).ravel(), pair, atol=1e-12)
    # Chi-squared of whole paths, rare ones pooled. False-alarm rate 1e-5 per order.
    number = {tuple(path): i for i, path in enumerate(states.tolist())}
    counts = np.bincount([number[tuple(path)] for path in np.asarray(drawn).tolist()], minlength=len(states))
    assert not counts[weights == 0].any()
    common = weights * len(drawn) > 5
    seen, expected = (np.append(v[common], v[~common].sum()) for v in (counts, weights * len(drawn)))
    assert common.sum() > 50
    assert stats.chisquare(seen, expected).pvalue > 1e-5


def test_gradient_at_impossible_moves(float64):
    initial, potentials = map(jnp.asarray, case(1))
    (_, found), gradient = value_and_gradient(potentials, initial)
    # d log p(y) / d potential is the probability of the pair given all data (Baum-Welch).
    pairs = jnp.exp(hidden_markov.smooth(found.log_filter, potentials).log_pair)
    np.testing.assert_allclose(gradient, pairs, atol=1e-12)


def test_data_that_no_path_explains(float64):
    initial, potentials = case(1)
    potentials[3] = -np.inf
    (value, found), gradient = value_and_gradient(potentials, initial)
    assert value == -np.inf
    np.testing.assert_array_equal(np.isinf(found.increments), [False, False, False, True, False])
    assert np.isfinite(gradient).all()
    potentials[3, 1, 0, 1] = np.nan
    assert np.isnan(value_and_gradient(potentials, initial)[0][0])


def test_pick_takes_what_has_weight():
    """Numbers at the ends of [0, 1), in float32, where products round to the total."""
    weights = jnp.log(jnp.array([0.0, 0.3, 0.0, 0.7, 0.0], "float32"))
    almost_one = np.float32(1 - 2**-24)
    uniforms = jnp.array([0.0, 0.29, 0.31, almost_one], "float32")
    pick = jax.jit(hidden_markov.pick)
    np.testing.assert_array_equal([pick(u, weights) for u in uniforms], [1, 1, 3, 3])
    many = jax.random.normal(jax.random.key(0), (1000,)).at[500:].set(-jnp.inf)
    assert pick(jnp.asarray(almost_one), many) == 499


def test_float32_of_a_long_series(float64):
    rng = np.random.default_rng(1)
    potentials = jnp.asarray(np.log(rng.uniform(0.05, 2.0, (2000, 3, 1, 3))))
    exact = hidden_markov.forward(jnp.zeros(3), potentials).log_likelihood
    rough = hidden_markov.forward(jnp.zeros(3, "float32"), jnp.asarray(potentials, "float32")).log_likelihood
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, rtol=2e-6)
