"""Monotone rational-quadratic splines (Durkan, Bekasov, Murray and Papamakarios 2019; Gregory and Delbourgo 1982).

On (-b, b) a spline of K bins is a ratio of quadratics in each bin, with a continuous slope; outside it is the identity.
It has 3 K - 1 free numbers: K widths, K heights and the slopes at the K - 1 inner knots.
"""

import jax.numpy as jnp

from pushforward._types import Array

_LEAST = 1e-3
"""Least share of a bin of the interval, and least slope."""


def positive(x: Array, least: float = _LEAST) -> Array:
    """A smooth increasing function to (least, inf) that is 1 at 0: (x + sqrt(x^2 + 4)) / 2, raised.

    It takes a third of the operations of softplus, and falls like 1 / |x| only.
    """
    return least + (1 - least) * 0.5 * (x + jnp.sqrt(x**2 + 4))


def spline(x: Array, numbers: Array, bound: float) -> tuple[Array, Array]:
    """Value and slope at x.

    Args:
        x: points, (n,).
        numbers: free numbers of the spline of each point, (n, 3 K - 1); all zero for the identity.
        bound: b.

    Returns:
        y and dy/dx, both (n,).
    """
    inside = jnp.abs(x) < bound
    at = jnp.where(inside, x, 0.0)
    width, height, right, top, slope, next_slope = _bins(at, numbers, bound, 0)
    mean = height / width
    t = 1 - (right - at) / width
    found, denominator = _slope(t, mean, slope, next_slope)
    y = top - height + height * (mean * t**2 + slope * t * (1 - t)) / denominator
    return jnp.where(inside, y, x), jnp.where(inside, found, 1.0)


def spline_inverse(y: Array, numbers: Array, bound: float) -> tuple[Array, Array]:
    """The x with spline(x) = y, and dy/dx there; arguments as in `spline`."""
    inside = jnp.abs(y) < bound
    at = jnp.where(inside, y, 0.0)
    width, height, right, top, slope, next_slope = _bins(at, numbers, bound, 1)
    mean = height / width
    rise = at - (top - height)
    bend = rise * (slope + next_slope - 2 * mean)
    # The root of a quadratic in the form that does not cancel (eq. 29).
    linear, square = height * slope - bend, height * (mean - slope) + bend
    t = 2 * mean * rise / (linear + jnp.sqrt(jnp.maximum(linear**2 + 4 * square * mean * rise, 0.0)))
    found, _ = _slope(t, mean, slope, next_slope)
    return jnp.where(inside, right + (t - 1) * width, y), jnp.where(inside, found, 1.0)


def _bins(at: Array, numbers: Array, bound: float, axis: int) -> tuple[Array, ...]:
    """Width, height, right end, top, slope at the left and at the right of the bin of each point, all (n,).

    The bin is found by comparisons and its numbers are sums over all bins: a search and its gathers compile and
    differentiate several times slower. Axis 0 looks for x among the knots, axis 1 for y.
    """
    bins = (numbers.shape[1] + 1) // 3
    shares = positive(numbers[:, : 2 * bins].reshape(-1, 2, bins))
    sizes = 2 * bound * shares / jnp.sum(shares, -1, keepdims=True)
    ends = jnp.cumsum(sizes, -1) - bound
    slopes = jnp.pad(positive(numbers[:, 2 * bins :]), ((0, 0), (1, 1)), constant_values=1.0)[:, None]
    table = jnp.concatenate([sizes, ends, slopes[..., :-1], slopes[..., 1:]], 1)
    above = (at[:, None] >= ends[:, axis, :-1]).astype(at.dtype)
    chosen = jnp.pad(above, ((0, 0), (1, 0)), constant_values=1.0) - jnp.pad(above, ((0, 0), (0, 1)))
    found = jnp.sum(table * chosen[:, None], -1)
    return tuple(found[:, i] for i in range(6))


def _slope(t: Array, mean: Array, slope: Array, next_slope: Array) -> tuple[Array, Array]:
    """Slope where a share t of the bin lies to the left (eq. 5), and the denominator of the value (eq. 4)."""
    product = t * (1 - t)
    denominator = mean + (slope + next_slope - 2 * mean) * product
    numerator = next_slope * t**2 + 2 * mean * product + slope * (1 - t) ** 2
    return (mean / denominator) ** 2 * numerator, denominator
