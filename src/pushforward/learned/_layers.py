"""Coupling and autoregressive layers whose weights are one array, so that they compile and train in few operations.

A layer moves coordinate i by y_i = s f(x_i) + m, where f is a spline or the identity and s, m and the numbers of f come
from a network of the coordinates that the layer sees before i, and of the condition. After it the coordinates change
places. FlowJAX's layers of the same names are more general; they take three times as long to compile.
"""

import functools
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._types import Array, Key
from pushforward.math.splines import positive, spline, spline_inverse

_BOUND = 5.0
"""Splines act on (-5, 5) and are the identity outside."""
_LEAST = 1e-2
"""Least scale."""


class Layers(eqx.Module):
    """A map of R^d to itself, e to x, with its inverse and log-determinants.

    Attributes:
        weights: of all networks, (layer, number).
        kind: "coupling", where the first d // 2 coordinates move the others, or "autoregressive".
        dimension: d.
        condition: length of the condition, 0 for none.
        width: units of the hidden layers.
        depth: hidden layers.
        bins: of the splines; 0 for affine layers.
        fast: for autoregressive layers, the direction that takes one pass: "sampling" or "density".
    """

    weights: Array
    kind: str
    dimension: int
    condition: int
    width: int
    depth: int
    bins: int
    fast: str

    @classmethod
    def build(
        cls,
        key: Key,
        layers: int,
        kind: str,
        dimension: int,
        condition: int,
        width: int,
        depth: int,
        bins: int,
        fast: str,
    ) -> "Layers":
        """Layers with random weights that are the identity but for the places of the coordinates."""
        empty = cls(jnp.zeros((0, 0)), kind, dimension, condition, width, depth, bins, fast)
        scales = []
        for i, (rows, columns) in enumerate(empty._sizes):
            # With last weights of zero the map is the identity, apart from the places of the coordinates.
            reach = 0.0 if i == depth else max(columns, 1) ** -0.5
            scales += [np.full(rows * columns + rows, reach)]
        scale = jnp.asarray(np.concatenate(scales), jnp.result_type(float))
        weights = scale * jax.random.uniform(key, (layers, scale.size), scale.dtype, -1.0, 1.0)
        return cls(weights, kind, dimension, condition, width, depth, bins, fast)

    def transform_and_log_det(self, e: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """x = T(e; c) and log|det T'(e)|."""
        return self._through(e, condition, backwards=False)

    def inverse_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """e = T^-1(x; c) and log|det (T^-1)'(x)|."""
        return self._through(x, condition, backwards=True)

    def path(self, e: Array, score: bool = False) -> tuple[Array, Array, Array]:
        """x = T(e), the slope of log q at x, and log|det T'(e)|; coupling layers only.

        The slope g of log q is carried from layer to layer: with y_a = x_a and y_b = f(x_b; x_a) of slope D,
        g_b <- (g_b - d/dx_b log|D|) / D and g_a <- g_a - d/dx_a (log|D| + g_b y_b). No inverse is evaluated
        (Vaitl, Nicoli, Nakajima and Kessel 2022). For derivatives by the weights g is a constant, and so is log|det|
        without `score`.
        """
        half = self._half

        def layer(carry: tuple, item: tuple) -> tuple[tuple, None]:
            (x, slope, log_det), (weights, order) = carry, item
            frozen, at = jax.lax.stop_gradient(weights), jax.lax.stop_gradient(x)
            (_, log_slopes), pull = jax.vjp(
                lambda a, b: self._halves(frozen, a, b, None, backwards=False), at[:half], at[half:]
            )
            one = jnp.ones_like(log_slopes)
            slope_b = (slope[half:] - pull((0 * one, one))[1]) * jnp.exp(-log_slopes)
            slope_a = slope[:half] - pull((slope_b, one))[0]

            def move(w: Array, x: Array) -> tuple[Array, Array]:
                b, moved = self._halves(w, x[:half], x[half:], None, backwards=False)
                return jnp.concatenate([x[:half], b]), jnp.sum(moved if score else jax.lax.stop_gradient(log_slopes))

            # A second pass instead of stored intermediate results: less to compile.
            x, change = jax.checkpoint(move)(weights, x)
            slope = _placed(jax.lax.stop_gradient(jnp.concatenate([slope_a, slope_b])), order)
            return (_placed(x, order), slope, log_det + change), None

        start = (e, -e, jnp.zeros((), e.dtype))
        return jax.lax.scan(layer, start, (self.weights, self._orders()))[0]

    # ------------------------------------------------------------------------------------------------- one layer

    @property
    def _half(self) -> int:
        return self.dimension // 2

    @property
    def _numbers(self) -> int:
        """Numbers that move one coordinate."""
        return 2 + max(3 * self.bins - 1, 0)

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of the matrices of a network."""
        seen = self._half if self.kind == "coupling" else self.dimension
        widths = [seen + self.condition, *[self.width] * self.depth]
        moved = self.dimension - self._half if self.kind == "coupling" else self.dimension
        return list(zip([*widths[1:], moved * self._numbers], widths, strict=True))

    @property
    def _masks(self) -> list[np.ndarray]:
        """Which weights an autoregressive network has (Germain, Gregor, Murray and Larochelle 2015)."""
        d, units = self.dimension, np.arange(self.width)
        first = np.concatenate([np.arange(d), np.full(self.condition, -1)])
        hidden = units % d - 1 if self.condition else units % max(d - 1, 1)
        ranks = [first, *[hidden] * self.depth, np.repeat(np.arange(d), self._numbers)]
        last = len(ranks) - 2
        return [(b[:, None] > a if i == last else b[:, None] >= a) for i, (a, b) in enumerate(pairwise(ranks))]

    def _orders(self, undo: bool = False) -> Array | None:
        """Places of the coordinates after each layer, (layer, d), always the same; None for a reversal."""
        if self.dimension <= 2:
            return None
        orders = _places(self.weights.shape[0], self.dimension)
        return jnp.asarray(np.argsort(orders, 1) if undo else orders)

    def _through(self, x: Array, condition: Array | None, *, backwards: bool) -> tuple[Array, Array]:
        # A map that is fast from x to e is the inverse of layers that are fast forwards.
        inverted = self.kind == "autoregressive" and self.fast == "density"
        undo = backwards != inverted

        def layer(carry: tuple, item: tuple) -> tuple[tuple, None]:
            (x, log_det), (weights, order) = carry, item
            x = _placed(x, order) if undo else x
            # For slopes a second pass instead of stored results: half the time to compile and to run.
            x, change = jax.checkpoint(lambda w, x, c: self._layer(w, x, c, undo))(weights, x, condition)
            return (x if undo else _placed(x, order), log_det + change), None

        start = (x, jnp.zeros((), x.dtype))
        return jax.lax.scan(layer, start, (self.weights, self._orders(undo)), reverse=undo)[0]

    def _layer(self, weights: Array, x: Array, condition: Array | None, backwards: bool) -> tuple[Array, Array]:
        if self.kind == "coupling":
            a, b = x[: self._half], x[self._half :]
            b, log_slopes = self._halves(weights, a, b, condition, backwards)
            return jnp.concatenate([a, b]), jnp.sum(log_slopes)
        if not backwards:
            y, log_slopes = _moved(x, self._network(weights, x, condition), self.bins, False)
            return y, jnp.sum(log_slopes)

        def pass_once(_: int, found: Array) -> Array:
            return _moved(x, self._network(weights, found, condition), self.bins, True)[0]

        # Each pass makes one more coordinate right.
        found = jax.lax.fori_loop(0, self.dimension, pass_once, x)
        _, log_slopes = _moved(found, self._network(weights, found, condition), self.bins, False)
        return found, -jnp.sum(log_slopes)

    def _halves(
        self, weights: Array, a: Array, b: Array, condition: Array | None, backwards: bool
    ) -> tuple[Array, Array]:
        return _moved(b, self._network(weights, a, condition), self.bins, backwards)

    def _network(self, weights: Array, seen: Array, condition: Array | None) -> Array:
        """Numbers that move each coordinate, (moved, numbers)."""
        values = seen if condition is None else jnp.concatenate([seen, condition])
        masks = self._masks if self.kind == "autoregressive" else [None] * (self.depth + 1)
        start = 0
        for i, ((rows, columns), mask) in enumerate(zip(self._sizes, masks, strict=True)):
            middle, stop = start + rows * columns, start + rows * columns + rows
            matrix = weights[start:middle].reshape(rows, columns)
            matrix = matrix if mask is None else jnp.where(mask, matrix, 0.0)
            values = matrix @ values + weights[middle:stop]
            values = jax.nn.silu(values) if i < self.depth else values
            start = stop
        return values.reshape(-1, self._numbers)


def _moved(x: Array, numbers: Array, bins: int, backwards: bool) -> tuple[Array, Array]:
    """y_i = s_i f_i(x_i) + m_i, or back, and the log slope of each coordinate."""
    shift, scale = numbers[:, 0], positive(numbers[:, 1], _LEAST)
    if backwards:
        x = (x - shift) / scale
    y, slope = (spline_inverse if backwards else spline)(x, numbers[:, 2:], _BOUND) if bins else (x, 1.0)
    log_slope = jnp.log(slope * scale)
    return (y, -log_slope) if backwards else (y * scale + shift, log_slope)


def _placed(x: Array, order: Array | None) -> Array:
    return x[::-1] if order is None else x[order]


@functools.cache
def _places(layers: int, d: int) -> np.ndarray:
    """Permutations (layer, d) after which each coordinate stands in both halves about equally often.

    Of many random ones the best is taken: a coordinate that no layer moves, or that moves no other, would be lost on a
    coupling flow.
    """
    generator = np.random.default_rng(d)
    best, score = np.tile(np.arange(d), (layers, 1)), -1
    for _ in range(200):
        orders = np.stack([generator.permutation(d) for _ in range(layers)])
        at, first = np.arange(d), np.zeros(d, int)
        for order in orders:
            first[at[: d // 2]] += 1
            at = at[order]
        worst = min(first.min() * (d - d // 2) / (d // 2), (layers - first).min())
        if worst > score:
            best, score = orders, worst
    return best
