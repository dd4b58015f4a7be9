r"""The Kalman filter and smoother of `kalman.py` in O(log T) time, as associative scans.

The filter composes the laws p(c_t | c_{t-1}, y_t) = N(A c + b, C), with likelihoods p(y_t | c_{t-1}) proportional to
exp(eta' c - c' J c / 2) (Särkkä and García-Fernández 2021, "Temporal parallelization of Bayesian smoothers", IEEE
TAC 66, lemmas 7-8, with carry and data noise correlated); the smoother composes affine maps of the scores (r, N).

This pays on accelerators, not on a few CPU cores: it does about ten times the work and is slow to compile. It
factors D D' + R, so a step whose data have no noise of their own given its carry cannot use it; `kalman.py` can.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pushforward.math.kalman import (
    Filtered,
    Record,
    Smoothed,
    Step,
    Varying,
    dense,
    masked,
    merged,
    scanned,
    smooth_step,
    update,
)
from pushforward.math.small_matrices import eliminate, solve_factor, symmetric


class Element(NamedTuple):
    """The law of a carry and the likelihood of some data, both given an earlier carry."""

    A: Float[Array, "n n"]
    b: Float[Array, " n"]
    C: Float[Array, "n n"]
    eta: Float[Array, " n"]
    J: Float[Array, "n n"]


def element(step: Step, y: Float[Array, " m"]) -> Element:
    """The element of one step.

    With N = D D' + R and K = B D' N^-1 its law is N((A - K H) c + b + K (y - d), B B' - K N K').

    Args:
        step: the step; D D' + R must be positive definite.
        y: data, shape (m,), NaN where missing.
    """
    m, n = y.shape[0], step.A.shape[1]
    H, D, R, residual, _ = masked(jnp.zeros(n, step.A.dtype), step, y)
    noises = jnp.concatenate([D, step.B])
    joint = (noises @ noises.T).at[:m, :m].add(dense(R))
    columns = eliminate(joint, m)
    factor, below = columns[:m], columns[m:]
    white = solve_factor(factor, jnp.concatenate([H, residual[:, None]], axis=1), transposed=False)
    maps, residual = white[:, :n], white[:, n]
    return Element(
        step.A - below @ maps,
        step.b + below @ residual,
        symmetric(joint[m:, m:] - below @ below.T),
        maps.T @ residual,
        maps.T @ maps,
    )


def combine(first: Element, then: Element) -> Element:
    """The element of two stretches of time, the carry between them integrated out."""
    n = first.b.shape[0]
    system = jnp.eye(n, dtype=first.C.dtype) + first.C @ then.J
    right = jnp.concatenate([first.A, first.C, (first.b + first.C @ then.eta)[:, None]], axis=1)
    solved = jnp.linalg.solve(system, right)
    A, C, b = solved[:, :n], solved[:, n : 2 * n], solved[:, 2 * n]
    # (I + J C)^-1 J = J (I + C J)^-1 and (I + J C)^-1 x = x - J (I + C J)^-1 C x spare the transposed solve.
    shift = then.eta - then.J @ first.b
    return Element(
        then.A @ A,
        then.A @ b + then.b,
        symmetric(then.A @ C @ then.A.T + then.C),
        first.A.T @ (shift - then.J @ (C @ shift)) + first.eta,
        symmetric(first.A.T @ then.J @ A + first.J),
    )


def filter_series_parallel(
    mean: Float[Array, " n"],
    cov: Float[Array, "n n"],
    steps: Step,
    ys: Float[Array, "time m"],
    *,
    varying: Varying = Varying(),
) -> Filtered:
    """`kalman.filter_series` by an associative scan; the same result, records included.

    Args:
        mean: mean of c_0, shape (n,).
        cov: its covariance, shape (n, n).
        steps: the steps; leaves that vary have a leading axis of time; D D' + R must be positive definite.
        ys: data, shape (time, m), NaN where missing.
        varying: which leaves of `steps` vary with time.
    """
    part = scanned(steps, varying)
    zeros = jnp.zeros_like(cov)
    start = Element(zeros, mean, cov, jnp.zeros_like(mean), zeros)
    elements = jax.vmap(lambda part, y: element(merged(steps, part), y))(part, ys)
    elements = jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), start, elements)
    laws = lax.associative_scan(jax.vmap(combine), elements)
    # One more update from each filtered law gives likelihoods and records, and removes the scan's last rounding.
    after = jax.vmap(lambda mean, cov, part, y: update(mean, cov, merged(steps, part), y))(
        laws.b[:-1], laws.C[:-1], part, ys
    )
    return Filtered(jnp.sum(after.log_likelihood), after.mean, after.cov, after.record)


def smooth_series_parallel(records: Record) -> tuple[Float[Array, " n"], Float[Array, "n n"], Smoothed]:
    """`kalman.smooth_series` by an associative scan of r -> L' r + H' u, N -> L' N L + H' S^-1 H.

    Args:
        records: stacked records of a filtered series, from either filter.
    """

    def own(record):
        white = solve_factor(record.factor, record.H, transposed=False)
        return record.L.T, record.H.T @ record.score, white.T @ white

    def compose(later, earlier):
        (F, r, N), (first, own_r, own_N) = later, earlier
        return first @ F, first @ r + own_r, symmetric(first @ N @ first.T + own_N)

    _, r, N = lax.associative_scan(jax.vmap(compose), jax.vmap(own)(records), reverse=True)
    after_r = jnp.concatenate([r[1:], jnp.zeros_like(r[:1])])
    after_N = jnp.concatenate([N[1:], jnp.zeros_like(N[:1])])
    _, _, moments = jax.vmap(smooth_step)(records, after_r, after_N)
    return r[0], N[0], moments
