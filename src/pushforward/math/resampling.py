"""Resampling: from weights W (N,) of particles to ancestors (count,), indices with E[copies of i] = count * W_i.

Four schemes, in the order of the variance they add (Douc, Cappé and Moulines 2005, "Comparison of resampling schemes
for particle filtering"; no order holds between `systematic` and the others for every set of weights, but it is the
best in practice and the cheapest):

* `systematic`: one uniform for all; the copies of i are floor or ceil of count * W_i. The default.
* `residual`: at least floor(count * W_i) copies, the remainder by `stratified`.
* `stratified`: one uniform in each of `count` equal strata. For proofs that need independent draws.
* `multinomial`: independent draws. For theory and as the reference.

Each comes in three forms: `name(key, log_weights, count)`; `name_at(uniforms, log_weights, count)`, a deterministic
function of its uniforms, for correlated pseudo-marginal methods; and `name_from(uniforms, weights, count)`, which
takes weights >= 0 that need not sum to one, so that an exponential the caller has is not taken twice.

All return int32 indices in ascending order, never above N - 1 and never of a particle whose weight is zero: particle
i's first slot is computed, the slots are marked by a scatter and the marks spread by a running maximum, so that neither
property hangs on the rounding of a cumulative sum. Log weights that are all -inf count as equal. Expected
copies are exact up to the rounding of that sum, about count * eps copies (0.01 in float32 at count 1e5).

Indices carry no derivatives. `stop_gradient_weights` restores an unbiased derivative of expectations;
`transport` replaces the draw by a smooth map, with a bias.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp

from pushforward._types import Array, Float, Int, Key

Ancestors = Int[Array, "count"]
_BLOCK, _SMALL, _SQUARE = 10, 4096, 4096
"""Width of blocks; length up to which JAX's running sums serve; pairs up to which all are compared."""


def systematic(key: Key, log_weights: Float[Array, "members"], count: int) -> Ancestors:
    """Slot j is the particle whose cumulative weight holds (j + u) / count, one u for all (Kitagawa 1996, appendix).

    Args:
        key: a JAX key.
        log_weights: log weights up to a constant, (N,).
        count: number of ancestors.
    """
    return systematic_at(jax.random.uniform(key, (), log_weights.dtype), log_weights, count)


def systematic_at(uniform: Float[Array, ""], log_weights: Float[Array, "members"], count: int) -> Ancestors:
    """`systematic` at a uniform in [0, 1), a scalar."""
    return systematic_from(uniform, _weights(log_weights), count)


def systematic_from(uniform: Float[Array, ""], weights: Float[Array, "members"], count: int) -> Ancestors:
    """`systematic` at a uniform in [0, 1) from weights >= 0 of any positive sum."""
    first = jnp.ceil(_before(weights, count) - uniform)
    return _spread(first.astype(jnp.int32), weights, count)


def stratified(key: Key, log_weights: Float[Array, "members"], count: int) -> Ancestors:
    """Slot j is the particle whose cumulative weight holds (j + u_j) / count (Kitagawa 1996, appendix).

    Args:
        key: a JAX key.
        log_weights: log weights up to a constant, (N,).
        count: number of ancestors.
    """
    return stratified_at(jax.random.uniform(key, (count,), log_weights.dtype), log_weights, count)


def stratified_at(uniforms: Float[Array, "count"], log_weights: Float[Array, "members"], count: int) -> Ancestors:
    """`stratified` at uniforms in [0, 1), (count,)."""
    return stratified_from(uniforms, _weights(log_weights), count)


def stratified_from(uniforms: Float[Array, "count"], weights: Float[Array, "members"], count: int) -> Ancestors:
    """`stratified` at uniforms in [0, 1), (count,), from weights >= 0 of any positive sum."""
    return _spread(_first_slots(_before(weights, count), uniforms), weights, count)


def residual(key: Key, log_weights: Float[Array, "members"], count: int) -> Ancestors:
    """floor(count * W_i) copies of each, and the remaining slots by `stratified` on the fractions left over.

    The sure copies are those of Liu and Chen (1998), who draw the remainder multinomially; strata give less variance
    (Douc, Cappé and Moulines 2005) at less cost. A systematic remainder would give `systematic` itself: sure copies
    shift all beginnings by whole slots.

    Args:
        key: a JAX key.
        log_weights: log weights up to a constant, (N,).
        count: number of ancestors.
    """
    return residual_at(jax.random.uniform(key, (count,), log_weights.dtype), log_weights, count)


def residual_at(uniforms: Float[Array, "count"], log_weights: Float[Array, "members"], count: int) -> Ancestors:
    """`residual` at uniforms in [0, 1), (count,), of which as many are used as there are remaining slots."""
    return residual_from(uniforms, _weights(log_weights), count)


def residual_from(uniforms: Float[Array, "count"], weights: Float[Array, "members"], count: int) -> Ancestors:
    """`residual` at uniforms in [0, 1), (count,), from weights >= 0 of any positive sum."""
    weights = lax.stop_gradient(weights)
    expected = weights * (count / _positive(jnp.sum(weights)))
    whole = jnp.floor(expected)
    copies = running(jnp.add, whole.astype(jnp.int32))
    before = _before(expected - whole, jnp.maximum(count - copies[-1], 0).astype(weights.dtype))
    # Rounding may make `before` fall; without the running maximum that would cost a particle a sure copy.
    extra = running(jnp.maximum, _first_slots(before, uniforms))
    return _spread(_shifted(copies) + extra, weights, count)


def multinomial(key: Key, log_weights: Float[Array, "members"], count: int) -> Ancestors:
    """Independent draws, in ascending order: the uniforms are sorted by construction.

    Partial sums of count + 1 exponentials, divided by their total, are the order statistics of `count` uniforms
    (Devroye 1986, section V.3), so that nothing is sorted.

    Args:
        key: a JAX key.
        log_weights: log weights up to a constant, (N,).
        count: number of ancestors.
    """
    return multinomial_at(jax.random.uniform(key, (count + 1,), log_weights.dtype), log_weights, count)


def multinomial_at(uniforms: Float[Array, "spacings"], log_weights: Float[Array, "members"], count: int) -> Ancestors:
    """`multinomial` at uniforms in [0, 1), (count + 1,), which give the exponentials of the spacings."""
    return multinomial_from(uniforms, _weights(log_weights), count)


def multinomial_from(uniforms: Float[Array, "spacings"], weights: Float[Array, "members"], count: int) -> Ancestors:
    """`multinomial` at uniforms in [0, 1), (count + 1,), from weights >= 0 of any positive sum."""
    sums = running(jnp.add, -jnp.log1p(-uniforms))
    return draws_from(sums[:count] / _positive(sums[count]), weights)


def draws_from(uniforms: Float[Array, "*shape"], weights: Float[Array, "members"]) -> Int[Array, "*shape"]:
    """Independent draws by inversion of the cumulative weights, one for each uniform, in the uniforms' order.

    Costs a binary search each. Never draws a particle of weight zero.

    Args:
        uniforms: in [0, 1), any shape.
        weights: >= 0, of any positive sum, (N,).
    """
    weights = lax.stop_gradient(weights)
    # Flat over particles of weight zero and never falling, whatever the rounding, so that the search cannot land there.
    cumulative = running(jnp.maximum, jnp.where(weights > 0, running(jnp.add, weights), 0.0))
    found = jnp.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    last = jnp.searchsorted(cumulative, cumulative[-1], side="left")
    return jnp.minimum(found, last).astype(jnp.int32)


def scaled_weights(log_weights: Float[Array, "members"]) -> tuple[Float[Array, "members"], Float[Array, ""]]:
    """Weights exp(log_weights - shift) and the shift, the largest log weight; all one if all log weights are -inf."""
    shift = lax.stop_gradient(jnp.max(log_weights))
    none = shift == -jnp.inf
    shift = jnp.where(none, 0.0, shift)
    return jnp.exp(jnp.where(none, 0.0, log_weights) - shift), shift


_LIBRARY: dict[Callable, Callable] = {jnp.add: jnp.cumsum, jnp.maximum: lax.cummax}


def running(combine: Callable[[Array, Array], Array], x: Float[Array, "size"]) -> Float[Array, "size"]:
    """Running sum or maximum of a vector: out_i = combine(out_{i-1}, x_i).

    Short vectors are JAX's own, which compile in a third of the time; long ones go in blocks whose last entries are
    combined recursively: for 10,000 entries on a CPU several times faster than
    `lax.cummax` and faster than `jnp.cumsum`; wider blocks gain nothing and take longer to compile. Running sums
    round like sums by blocks, with an error of O(log size) eps, and need not be monotone in the last digit.

    Args:
        combine: an associative function of two arrays with combine(0, 0) = 0, such as `jnp.add` and `jnp.maximum`.
        x: (size,).
    """
    size = len(x)
    if size <= _SMALL and combine in _LIBRARY:
        return _LIBRARY[combine](x)
    width = min(_BLOCK, size)
    rows = -(-size // width)
    blocks = jnp.pad(x, (0, rows * width - size)).reshape(rows, width)
    columns = [blocks[:, 0]]
    for k in range(1, width):
        columns.append(combine(columns[-1], blocks[:, k]))
    out = jnp.stack(columns, 1)
    if rows > 1:
        ends = running(combine, columns[-1])
        out = jnp.concatenate([out[:1], combine(ends[:-1, None], out[1:])])
    return out.reshape(-1)[:size]


def _weights(log_weights: Array) -> Array:
    return scaled_weights(lax.stop_gradient(log_weights))[0]


def _positive(total: Array) -> Array:
    return jnp.where(total > 0, total, 1.0)


def _shifted(x: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


def _before(weights: Array, count: Array | int) -> Array:
    """Expected copies of all particles before each, count * (W_0 + ... + W_{i-1})."""
    cumulative = running(jnp.add, lax.stop_gradient(weights))
    return _shifted(cumulative) * (count / _positive(cumulative[-1]))


def _first_slots(before: Float[Array, "members"], uniforms: Float[Array, "count"]) -> Int[Array, "members"]:
    """Each particle's first slot, one slot to a stratum: the first j with j + u_j >= before."""
    stratum = jnp.floor(before)
    slot = stratum.astype(jnp.int32)
    # A particle that begins inside a stratum owns that stratum's slot if the uniform lies beyond the beginning.
    late = uniforms[jnp.clip(slot, 0, len(uniforms) - 1)] < before - stratum
    return slot + late.astype(jnp.int32)


def _spread(first: Int[Array, "members"], weights: Array, count: int) -> Ancestors:
    """Ancestors from each particle's first slot: slot j's is the last particle of positive weight with first <= j."""
    slots = jnp.where(weights > 0, jnp.maximum(first, 0), count)
    particles = jnp.arange(len(weights), dtype=jnp.int32)
    if len(weights) * count <= _SQUARE:
        reached = slots[:, None] <= jnp.arange(count, dtype=jnp.int32)[None, :]
        return jnp.max(jnp.where(reached, particles[:, None], 0), 0)
    marks = jnp.zeros(count, jnp.int32).at[slots].max(particles, mode="drop")
    return running(jnp.maximum, marks)


def stop_gradient_weights(log_weights: Float[Array, "members"], ancestors: Ancestors) -> Float[Array, "count"]:
    """Log weights after resampling, log W_a - stop_gradient(log W_a): zeros that carry a derivative.

    With any unbiased scheme, sum_j exp(out_j) f(x_{a_j}) / count has a gradient whose expectation is the gradient of
    sum_i W_i f(x_i): **unbiased** (the score-function estimator; Ścibior and Wood 2021, "Differentiable particle
    filtering without modifying the forward pass"). So is the gradient of a filter's likelihood estimate;
    that of its logarithm is consistent only. Values are untouched; variance grows with the number of steps.

    Args:
        log_weights: log weights before resampling, up to a constant, (N,).
        ancestors: resampled indices of positive weight, (count,).
    """
    chosen = (log_weights - logsumexp(log_weights))[ancestors]
    return chosen - lax.stop_gradient(chosen)


def transport(
    particles: Float[Array, "members n"],
    log_weights: Float[Array, "members"],
    epsilon: float,
    iterations: int,
) -> Float[Array, "members n"]:
    """Particles of equal weight by entropic optimal transport from the weighted ones: a smooth resampling.

    Solves min_P sum P_ij |x_i - x_j|^2 / (2 s^2) + epsilon KL(P | W 1/N) with row sums W and column sums 1 / N by
    Sinkhorn's iteration on log potentials, s^2 = n * (largest variance of a component), and returns N P^T X
    (Corenflos, Thornton, Deligiannidis and Doucet 2021, "Differentiable particle filtering via entropy-regularized
    optimal transport", section 3). Column sums are exact after any number of iterations, so that new particles
    are averages of old ones; what the unfinished iteration leaves of the mean is added to all.

    The derivative is that of the returned value, through all iterations. As the gradient of an expectation under the
    weights it is **biased**: each particle shrinks towards the mean with epsilon (all equal the mean for a large one),
    and vanishes as epsilon -> 0 and N -> infinity. Cost O(iterations N^2 + N^2 n); memory O(N^2), in
    reverse mode too.

    Args:
        particles: (N, n).
        log_weights: log weights up to a constant, (N,); -inf is allowed.
        epsilon: strength of the entropy in units of the scaled cost, > 0; 0.1 to 1 in the paper.
        iterations: Sinkhorn iterations; about 10 / epsilon.
    """
    log_weights = log_weights - logsumexp(log_weights)
    mean = jnp.exp(log_weights) @ particles
    centered = particles - mean[None]
    scale = _positive(particles.shape[1] * jnp.max(jnp.var(particles, 0)))
    square = jnp.sum(centered**2, 1)
    product = jnp.matmul(centered, centered.T, precision="highest")
    affinity = (product - 0.5 * (square[:, None] + square[None, :])) / (scale * epsilon)

    def columns(f: Array) -> Array:
        return -logsumexp((log_weights + f)[:, None] + affinity, 0)

    # Without the checkpoint reverse mode would keep an N x N array of every iteration.
    @jax.checkpoint
    def step(f: Array, affinity: Array) -> Array:
        return -logsumexp(columns(f)[None, :] + affinity, 1) + jnp.log(jnp.asarray(len(f), f.dtype))

    f, _ = lax.scan(lambda f, _: (step(f, affinity), None), jnp.zeros_like(log_weights), length=iterations)
    plan = jnp.exp((log_weights + f)[:, None] + affinity + columns(f)[None, :])
    moved = jnp.matmul(plan.T, centered, precision="highest")
    return moved + (mean - jnp.mean(moved, 0))[None]
