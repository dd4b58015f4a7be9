"""Maps that carry forecasts to analyses, learned from pairs of a state and simulated data.

Pairs (x_i, y_i) are draws of a joint law; a map T turns each, with the data y*, into a draw of x given y*. No density
of the data is needed, only the pairs (Spantini, Baptista and Marzouk 2022, SIAM Rev. 64, doi:10.1137/20M1312204).

Two ways to learn T. By **maximum likelihood**: a map S(y, .), triangular in x, is fitted so that S(y_i, x_i) is
standard normal, and T(x_i, y_i, y*) solves S(y*, T) = S(y_i, x_i); where S is affine that is the ensemble Kalman
update. By **energy distance**: T is any parametric function, and the joint law of (T(x, y, y'), y'), y' independent of
(x, y), is brought near that of (x, y).

States are (N, n), data (N, m), both in units of their sample: see `standardise`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jax.scipy.stats import norm

from pushforward._types import Array, Float

_TINY = 1e-12


class Units(NamedTuple):
    """Sample means and standard deviations, each (k,)."""

    mean: Float[Array, "k"]
    sd: Float[Array, "k"]

    def into(self, values: Array) -> Array:
        """Values in these units."""
        return (values - self.mean) / self.sd

    def back(self, values: Array) -> Array:
        """The inverse of `into`."""
        return self.mean + self.sd * values


def units(values: Float[Array, "members k"]) -> Units:
    """Units of a sample; entries without spread keep theirs."""
    sd = jnp.std(values, 0)
    return Units(jnp.mean(values, 0), jnp.where(sd > 0, sd, 1.0))


def standardise(
    simulated: Float[Array, "members m"], data: Float[Array, "m"]
) -> tuple[Float[Array, "members m"], Float[Array, "m"]]:
    """Simulated data and data in units of the first; both are zero where data are missing, which no map follows."""
    present = ~jnp.isnan(data)
    simulated, data = jnp.where(present, simulated, 0.0), jnp.where(present, data, 0.0)
    unit = units(simulated)
    return jnp.where(present, unit.into(simulated), 0.0), jnp.where(present, unit.into(data), 0.0)


def regression(x: Float[Array, "members n"], y: Float[Array, "members m"]) -> Float[Array, "n m"]:
    """C_xy C_yy^-1 of the sample covariances; columns of y that do not vary get zero.

    Needs more members than m + 1; y in units of its sample.
    """
    y, x = y - jnp.mean(y, 0), x - jnp.mean(x, 0)
    gram = y.T @ y
    gram = gram + jnp.diag(jnp.where(jnp.diagonal(gram) > 0, 0.0, 1.0))
    return cho_solve((jnp.linalg.cholesky(gram), True), y.T @ x).T


def affine(
    x: Float[Array, "members n"], y: Float[Array, "members m"], data: Float[Array, "m"]
) -> Float[Array, "members n"]:
    """The affine map of greatest likelihood: ``x_i + C_xy C_yy^-1 (data - y_i)``.

    S is affine with Gaussian residuals, whose maximum likelihood estimate is the least-squares regression of x on y.
    It is the stochastic ensemble Kalman filter with the gain of the joint sample covariance of states and simulated
    data (Spantini, Baptista and Marzouk 2022, section 4).
    """
    return x + (data - y) @ regression(x, y).T


def squared_innovation(y: Float[Array, "members m"], data: Float[Array, "m"]) -> Float[Array, ""]:
    """(data - mean)^T C_yy^-1 (data - mean) with the sample covariance; about m where data are as expected."""
    innovation, y = data - jnp.mean(y, 0), y - jnp.mean(y, 0)
    gram = y.T @ y / (y.shape[0] - 1)
    gram = gram + jnp.diag(jnp.where(jnp.diagonal(gram) > 0, 0.0, 1.0))
    return innovation @ cho_solve((jnp.linalg.cholesky(gram), True), innovation)


def follow(
    extra: Float[Array, "members k"],
    x: Float[Array, "members n"],
    y: Float[Array, "members m"],
    moved: Float[Array, "members n"],
    data: Float[Array, "m"],
) -> Float[Array, "members k"]:
    """Quantities beside the state after its analysis, by linear regression on state and data.

    Under the affine map they get the ensemble Kalman update of their own. Exact where they are linear in both.
    """
    joint, shift = jnp.concatenate([x, y], 1), jnp.concatenate([moved - x, data - y], 1)
    joint, centred = joint - jnp.mean(joint, 0), extra - jnp.mean(extra, 0)
    scale = jnp.std(joint, 0)
    scale = jnp.where(scale > 0, scale, 1.0)
    cut = float(10 * joint.shape[0] * jnp.finfo(joint.dtype).eps)
    slopes = jnp.linalg.lstsq(joint / scale, centred, rcond=cut)[0]
    return extra + (shift / scale) @ slopes


# ------------------------------------------------------------------------------------------ triangular, by likelihood


class Basis(NamedTuple):
    """Bumps over the line for each of c coordinates: centres (c, a) and widths (c,)."""

    centres: Float[Array, "c a"]
    widths: Float[Array, "c"]


def basis(sample: Float[Array, "members c"], number: int) -> Basis:
    """Bumps at evenly spaced quantiles of a sample, as wide as they are apart on average."""
    shares = (jnp.arange(number) + 0.5) / number
    centres = jnp.quantile(sample, shares, axis=0).T
    widths = (centres[:, -1] - centres[:, 0]) / max(number - 1, 1)
    return Basis(centres, jnp.maximum(widths, 0.1))


def bumps(values: Float[Array, "*rows c"], b: Basis) -> Float[Array, "*rows c a"]:
    """Normalised Gaussian bumps: not negative, of sum one for each coordinate."""
    return jax.nn.softmax(-0.5 * ((values[..., None] - b.centres) / b.widths[:, None]) ** 2, -1)


def rises(t: Float[Array, "*rows"], centres: Float[Array, "b"], width: Array) -> tuple[Array, Array]:
    """Increasing functions of t, (..., 1 + b): t itself and smooth steps at the centres; and their derivatives."""
    u = (t[..., None] - centres) / width
    values = jnp.concatenate([t[..., None], width * norm.cdf(u)], -1)
    return values, jnp.concatenate([jnp.ones_like(t)[..., None], norm.pdf(u)], -1)


class Component(NamedTuple):
    """One row of a triangular map: ``S(u, t) = f(u) + sum_b w(u)_b rise_b(t)``, u the coordinates before it.

    Attributes:
        free: coefficients of f over 1 and the bumps of u, (1 + c a,).
        weights: of w over the same, not negative, (1 + c a, 1 + b).
        centres: of the rises, (b,).
        width: of the rises.
    """

    free: Float[Array, "p"]
    weights: Float[Array, "p q"]
    centres: Float[Array, "b"]
    width: Float[Array, ""]


def _before(values: Float[Array, "*rows c"], b: Basis, used: Float[Array, "c"]) -> Float[Array, "*rows p"]:
    """1 and the bumps of the coordinates that a component may use."""
    found = used[:, None] * bumps(values, b)
    found = found.reshape(*found.shape[:-2], -1)
    return jnp.concatenate([jnp.ones_like(found[..., :1]), found], -1)


def fit_component(
    u: Float[Array, "members c"],
    t: Float[Array, "members"],
    used: Float[Array, "c"],
    b: Basis,
    rising: int,
    penalty: float,
    iterations: int = 30,
) -> Component:
    """The component of greatest penalised likelihood, a convex problem.

    Minimises the mean of ``S^2 / 2 - log dS/dt`` plus penalty / sqrt N times the weights of bumps and steps. f is
    eliminated by least squares; the weights, which are not negative, by Newton's method with a logarithmic barrier.

    Args:
        u: coordinates before the component: data, then states.
        t: its own coordinate.
        used: 1 for the coordinates that it may use, else 0.
        b: their bumps.
        rising: number of its steps.
        penalty: larger is nearer to affine.
        iterations: of Newton's method.
    """
    size = t.shape[0]
    own = basis(t[:, None], rising)
    rise, slope = rises(t, own.centres[0], own.widths[0])
    before = _before(u, b, used)
    G, D = (jnp.einsum("ip,iq->ipq", before, v).reshape(size, -1) for v in (rise, slope))
    ridge = penalty * jnp.sqrt(size) * jnp.eye(before.shape[1], dtype=t.dtype).at[0, 0].set(1e-6)
    factor = (jnp.linalg.cholesky(before.T @ before + ridge), True)
    onto = before.T @ G
    Q = (G.T @ G - onto.T @ cho_solve(factor, onto)) / size
    shape = (before.shape[1], rise.shape[1])
    price = (penalty / jnp.sqrt(size)) * jnp.ones(shape, t.dtype).at[0, 0].set(0.0).ravel()
    start = jnp.full(shape, 1e-3, t.dtype).at[0, 0].set(1.0).ravel()
    theta = _newton(Q, D, price, start, iterations)
    return Component(-cho_solve(factor, onto @ theta), theta.reshape(shape), own.centres[0], own.widths[0])


_BARRIER = 1e-5
_LENGTHS = tuple(0.5**i for i in range(8))


def _newton(Q: Array, D: Array, price: Array, start: Array, iterations: int) -> Array:
    """Minimise ``v Q v / 2 - mean log D v + price v - barrier sum log v`` over v > 0."""

    def objective(v: Array) -> Array:
        return 0.5 * v @ Q @ v - jnp.mean(jnp.log(D @ v)) + price @ v - _BARRIER * jnp.sum(jnp.log(v))

    def step(_: Array, v: Array) -> Array:
        inverse = D / (D @ v)[:, None]
        slope = Q @ v - jnp.mean(inverse, 0) + price - _BARRIER / v
        # In units of v the barrier is the identity, whatever is near zero.
        curvature = (Q + inverse.T @ inverse / D.shape[0]) * v * v[:, None]
        curvature = curvature + _BARRIER * jnp.eye(v.size, dtype=v.dtype)
        move = -v * cho_solve((jnp.linalg.cholesky(curvature), True), v * slope)
        longest = jnp.minimum(1.0, 0.95 / jnp.maximum(jnp.max(-move / v), _TINY))
        trials = v + longest * jnp.asarray(_LENGTHS, v.dtype)[:, None] * move
        found = jax.vmap(objective)(trials)
        found = jnp.where(jnp.isfinite(found), found, jnp.inf)
        best = jnp.argmin(found)
        return jnp.where(found[best] < objective(v), trials[best], v)

    return jax.lax.fori_loop(0, iterations, step, start)


def component(c: Component, u: Float[Array, "members c"], t: Float[Array, "members"], used: Array, b: Basis) -> Array:
    """S(u, t) for each member."""
    before = _before(u, b, used)
    return before @ c.free + jnp.sum((before @ c.weights) * rises(t, c.centres, c.width)[0], -1)


def invert_component(
    c: Component, u: Float[Array, "members c"], value: Float[Array, "members"], used: Array, b: Basis, bounds: tuple
) -> Float[Array, "members"]:
    """t with S(u, t) = value for each member, by bisection between two bounds, which it does not leave."""
    before = _before(u, b, used)
    left, weights = value - before @ c.free, before @ c.weights

    def halve(_: Array, between: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = between
        middle = 0.5 * (low + high)
        above = jnp.sum(weights * rises(middle, c.centres, c.width)[0], -1) > left
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    wide = (jnp.full_like(value, bounds[0]), jnp.full_like(value, bounds[1]))
    low, high = jax.lax.fori_loop(0, 50 if value.dtype == jnp.float64 else 30, halve, wide)
    return 0.5 * (low + high)


def triangular(
    x: Float[Array, "members n"],
    y: Float[Array, "members m"],
    data: Float[Array, "m"],
    number: int,
    rising: int,
    penalty: float,
) -> Float[Array, "members n"]:
    """The nonlinear map of greatest likelihood, triangular in the order of the state's entries.

    Component k depends on all data and on the entries before k, each through `number` bumps whose interactions with
    `rising` steps of x_k let location, width and shape of x_k change with them. No member goes farther than one
    standard deviation beyond the forecast and its affine analysis, where the sample says nothing of the map.
    """
    size, n = x.shape
    m = y.shape[1]
    joint = jnp.concatenate([y, x], 1)
    b = basis(joint, number)
    used = jnp.concatenate([jnp.ones((n, m)), jnp.tril(jnp.ones((n, n)), -1)], 1).astype(x.dtype)
    seen = jnp.broadcast_to(data, (size, m))
    around = jnp.concatenate([x, affine(x, y, data)])
    low, high = jnp.min(around, 0) - 1.0, jnp.max(around, 0) + 1.0

    def move(before: Array, k: Array) -> tuple[Array, None]:
        c = fit_component(joint, x[:, k], used[k], b, rising, penalty)
        value = component(c, joint, x[:, k], used[k], b)
        now = invert_component(c, jnp.concatenate([seen, before], 1), value, used[k], b, (low[k], high[k]))
        return before.at[:, k].set(now), None

    return jax.lax.scan(move, jnp.zeros_like(x), jnp.arange(n))[0]


# --------------------------------------------------------------------------------------------------- by energy distance


def energy_distance(a: Float[Array, "k d"], b: Float[Array, "l d"]) -> Float[Array, ""]:
    """2 E|A - B| - E|A - A'| - E|B - B'| of two samples, pairs of a point with itself included.

    Zero for equal samples; its root is a metric between laws with finite means (Szekely and Rizzo 2013).
    """
    return 2 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b)


def _mean_distance(a: Array, b: Array) -> Array:
    square = jnp.sum((a[:, None] - b[None]) ** 2, -1)
    apart = square > 0
    return jnp.mean(jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0))


class Shift(NamedTuple):
    """``T(x, y, y') = x + A (y' - y) + V (tanh(U (x, y, y') + c) - tanh(U (x, y, y) + c))``, which is x at y' = y."""

    linear: Float[Array, "n m"]
    inner: Float[Array, "h k"]
    offset: Float[Array, "h"]
    outer: Float[Array, "n h"]


def shifted(s: Shift, x: Float[Array, "members n"], y: Array, new: Array) -> Float[Array, "members n"]:
    """T for each member."""

    def hidden(third: Array) -> Array:
        return jnp.tanh(jnp.concatenate([x, y, third], 1) @ s.inner.T + s.offset)

    return x + (new - y) @ s.linear.T + (hidden(new) - hidden(y)) @ s.outer.T
