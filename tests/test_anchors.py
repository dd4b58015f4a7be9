"""Published scores of ensemble filters on the Lorenz systems: `benchmarks.anchors` says what is run and the bar."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import anchors

from pushforward.problems import lorenz96

FAST = ("96 denkf", "63 etkf")


@pytest.mark.parametrize(
    "label", [label if label in FAST else pytest.param(label, marks=pytest.mark.slow) for label in anchors.ROWS]
)
def test_published_scores(label):
    """Where scores of 1000 cycles are published, a true filter fails with probability 0.007 (see `anchors`).

    Keys are fixed, so that a pass is a pass.
    """
    row = anchors.ROWS[label]
    found = anchors.scores(row.problem, row.method, *row.size)
    target, allowed = row.bound
    assert anchors.within(label, found) != "NO", f"{found.rmse}, published {target} within {allowed:.4f}"
    assert found.judged(label).mean() > 0.8 * target
    spread = row.anchor.spread
    assert spread is None or abs(found.spread.mean() / spread - 1) < 0.05


@pytest.mark.slow
def test_extended_filter_is_the_one_written_out():
    """Its score at one key is that of a plain scan with the step's tangent."""
    row = anchors.ROWS["96 extended"]
    found = anchors.scores(row.problem, row.method, 2, 1000)

    def cycle(carry, y):
        mean, cov = carry
        slope = jax.jacfwd(lorenz96.step)(mean)
        mean, cov = lorenz96.step(mean), 10**0.05 * slope @ cov @ slope.T
        gain = jnp.linalg.solve(cov + jnp.eye(40), cov).T
        mean, cov = mean + gain @ (y - mean), cov - gain @ cov
        return (mean, 0.5 * (cov + cov.T)), mean

    def score(key):
        truth, y = lorenz96.simulate(key, 1000)
        _, mean = jax.lax.scan(cycle, (lorenz96.start().mean, 0.001 * jnp.eye(40)), y)
        return jnp.mean(jnp.sqrt(jnp.mean((mean - truth) ** 2, 1))[lorenz96.BURN_IN :])

    with jax.enable_x64(True):
        plain = jax.jit(jax.vmap(score))(jax.random.split(jax.random.key(anchors.KEY), 2))
    assert found.rmse == pytest.approx(np.asarray(plain), rel=1e-3)
