"""One step of a stream: a Gaussian or an ensemble that starts, and that takes in the data of one more step.

A chain of one step stands for each step of the stream, so that `chain.step` is asked for step 0 always. What counts
time rides along in the belief.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from pushforward._types import Array, Key
from pushforward.methods import _ensemble_filter
from pushforward.methods._ensemble_filter import Ensemble, Filter
from pushforward.methods._kalman_filter import _advance, begin, joint_moments
from pushforward.methods._linearization import Linearization
from pushforward.methods._state import Increment
from pushforward.model.state_space import Chain

_STEP = 0


class GaussianBelief(eqx.Module):
    """The state as N(mean, cov), with what rides along.

    Attributes:
        mean: shape (n,).
        cov: shape (n, n).
        riders: counters and other known leaves of the carry.
    """

    mean: Array
    cov: Array
    riders: list[Array]


def gaussian_begin(chain: Chain) -> tuple[GaussianBelief, Array]:
    """The law of the initial state given what is observed with it, and the log likelihood of that."""
    first, _, riders = begin(chain, chain.initial_dimension)
    return GaussianBelief(first.mean, first.cov, riders), first.log_likelihood


def gaussian_advance(
    chain: Chain, belief: GaussianBelief, linearization: Linearization, growth: float
) -> tuple[GaussianBelief, Increment]:
    """One Kalman step; sites have the moments of their tangent at the mean of (state before the step, its noise)."""
    step, n, q = jnp.asarray(_STEP), belief.mean.shape[0], chain.noise_dimension
    carry = (belief.mean, belief.cov, belief.riders)
    after, riders, _ = _advance(chain, linearization, growth, carry, step)
    (mean, cov), _ = joint_moments(after.record)

    def sites_at(joint: Array) -> dict[str, Array]:
        moved = chain.step(joint[:n], belief.riders, step, joint[n:])
        return moved.sites | parameters_at(chain, moved.state)

    # Sigma points have noise columns of their own after those of the model.
    means, spreads = site_moments(sites_at, mean[: n + q], cov[: n + q, : n + q])
    record = after.record
    seen = jnp.sum(~jnp.isnan(chain.step(belief.mean, belief.riders, step, jnp.zeros(q)).observed.data))
    surprise = jnp.where(seen > 0, jnp.dot(record.innovation, record.score) / jnp.maximum(seen, 1), 1.0)
    return GaussianBelief(after.mean, after.cov, riders), Increment(
        means, spreads, after.log_likelihood, {"surprise": surprise}
    )


def site_moments(
    sites_at: Callable[[Array], dict[str, Array]], mean: Array, cov: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Site values at a mean, and their standard deviations by the tangent there; exact where sites are linear.

    Args:
        sites_at: sites as a function of a vector (k,).
        mean: its mean, shape (k,).
        cov: its covariance, shape (k, k).
    """
    flat, back = ravel_pytree(sites_at(mean))
    slopes = jax.jacfwd(lambda u: ravel_pytree(sites_at(u))[0])(mean)
    spread = jnp.sqrt(jnp.maximum(jnp.sum((slopes @ cov) * slopes, 1), 0.0))
    return back(flat), back(spread)


def parameters_at(chain: Chain, state: Array) -> dict[str, Array]:
    """Values of the parameters that are part of a state (n,)."""
    if not chain.joined:
        return {}
    outer = chain.at(state[: chain.joined_size]).outer
    return {name: outer[name] for name in chain.joined}


def ensemble_begin(chain: Chain, parts: Filter, key: Key) -> tuple[Ensemble, Array]:
    """The ensemble at the start given what is observed there, and the log likelihood of that."""
    start, _, _ = parts.start(chain, key)
    return _without_sums(start), start.log_likelihood


def ensemble_advance(chain: Chain, parts: Filter, belief: Ensemble, key: Key) -> tuple[Ensemble, Increment]:
    """One cycle; means and standard deviations are those of the members after the analysis."""
    columns = _ensemble_filter.layout(chain, False)
    after, cycle = parts.cycle(chain, columns, belief, jnp.asarray(_STEP), key)
    members = columns.values(cycle.analysis)
    members |= jax.vmap(lambda x: parameters_at(chain, x))(cycle.analysis[:, : columns.n])
    means = jax.tree.map(lambda v: jnp.mean(v, 0), members)
    spreads = jax.tree.map(lambda v: jnp.std(v, 0, ddof=1), members)
    summary = {"surprise": after.surprise, "replaced_members": after.replaced}
    return _without_sums(after), Increment(means, spreads, after.log_likelihood, summary)


def _without_sums(ensemble: Ensemble) -> Ensemble:
    """Sums over cycles start anew at each step: in float32 those of a long stream would drown its last step."""
    sums = (ensemble.log_likelihood, ensemble.replaced, ensemble.surprise)
    return eqx.tree_at(
        lambda e: (e.log_likelihood, e.replaced, e.surprise), ensemble, tuple(jnp.zeros_like(v) for v in sums)
    )
