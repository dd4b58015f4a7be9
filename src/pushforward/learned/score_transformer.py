"""`TrajectoryTransformer`: attention between all states of a trajectory, for `pf.ScoreTrajectory`."""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Float, Key
from pushforward.learned.score_networks import (
    EMBEDDED,
    Affine,
    Levels,
    ScoreNetwork,
    Weight,
    affine,
    check_sizes,
    draw,
    empty,
    normalised,
    refuse,
)

_NEIGHBOURS = 2
"""A token holds a state and so many on either side, which one layer of attention would be slow to find."""
_LONGEST = 10_000.0


class TrajectoryTransformer(ScoreNetwork):
    """Transformer whose tokens are the states of a trajectory, for trajectories of any length.

    Positions enter as rotations of queries and keys (Su et al. 2021), so that what counts is how far apart two states
    are. Level and parameters scale, shift and gate every layer (Peebles and Xie 2023). Time and memory grow with the
    square of the length: use `TemporalUNet` unless states that are far apart bear on each other.

    Args:
        width: units of a token, divisible by 2 heads.
        depth: layers of attention, each followed by a dense one.
        heads: of the attention.
    """

    width: int = eqx.field(static=True, default=128)
    depth: int = eqx.field(static=True, default=4)
    heads: int = eqx.field(static=True, default=4)

    any_length: ClassVar[bool] = True

    def __check_init__(self):
        check_sizes("TrajectoryTransformer", width=(self.width, 1), depth=(self.depth, 1), heads=(self.heads, 1))
        if self.width % (2 * self.heads):
            raise MethodError(
                f"TrajectoryTransformer(width=...) takes a multiple of 2 heads, here {2 * self.heads}; "
                f"got {self.width}."
            )

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """See `ScoreNetwork.why_not`."""
        return empty(shape)

    def build(self, key: Key, shape: tuple[int, ...], parameters: int) -> eqx.Module:
        """See `ScoreNetwork.build`."""
        refuse(self, shape)
        size, width, stack = math.prod(shape[1:]), self.width, (self.depth,)
        layout = _TransformerNetwork(
            levels=Levels.layout(parameters),
            enter=affine((2 * _NEIGHBOURS + 1) * (size + 1), width),
            film=affine(EMBEDDED, self.depth * 6 * width, 0.1),
            attend=affine(width, 3 * width, 1.0, stack),
            joined=affine(width, width, 1.0, stack),
            first=affine(width, 4 * width, 1.0, stack),
            second=affine(4 * width, width, 1.0, stack),
            leave=Affine(Weight((width, size)), Weight((size,))),
            state=tuple(shape[1:]),
            heads=self.heads,
        )
        return draw(key, layout)


class _TransformerNetwork(eqx.Module):
    levels: Any
    enter: Any
    film: Any
    attend: Any
    joined: Any
    first: Any
    second: Any
    leave: Any
    state: tuple[int, ...] = eqx.field(static=True)
    heads: int = eqx.field(static=True)

    def __call__(self, x: Array, condition: Array, given: Array) -> Array:
        if x.shape[1:] != self.state:
            raise MethodError(f"The network was built for states of shape {self.state}; got {x.shape[1:]}.")
        length, (depth, width) = x.shape[0], self.joined.bias.shape
        film = self.film(self.levels(condition, given)).reshape(depth, 6, width)
        marked = jnp.concatenate([x.astype(film.dtype).reshape(length, -1), jnp.ones((length, 1), film.dtype)], -1)
        marked = jnp.pad(marked, ((_NEIGHBOURS, _NEIGHBOURS), (0, 0)))
        tokens = jnp.concatenate([marked[k : k + length] for k in range(2 * _NEIGHBOURS + 1)], -1)
        angles = _angles(length, width // self.heads, film.dtype)

        def layer(h: Array, item: Any) -> tuple[Array, None]:
            f, attend, joined, first, second = item
            z = normalised(h) * (1.0 + f[0]) + f[1]
            h = h + (0.5 + f[2]) * joined(self._attention(attend(z), angles))
            z = normalised(h) * (1.0 + f[3]) + f[4]
            return h + (0.5 + f[5]) * second(jax.nn.silu(first(z))), None

        h, _ = jax.lax.scan(layer, self.enter(tokens), (film, self.attend, self.joined, self.first, self.second))
        return self.leave(normalised(h)).reshape(x.shape).astype(x.dtype)

    def _attention(self, projected: Float[Array, "length units"], angles: Array) -> Array:
        length = projected.shape[0]
        query, key, value = jnp.moveaxis(projected.reshape(length, 3, self.heads, -1), 1, 0)
        query, key = _turned(query, angles), _turned(key, angles)
        logits = jnp.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits, -1), value).reshape(length, -1)


def _angles(length: int, size: int, dtype: Any) -> Float[Array, "length 1 half"]:
    """How far each pair of numbers is turned at each position."""
    rates = _LONGEST ** (-jnp.arange(size // 2, dtype=dtype) / (size // 2))
    return (jnp.arange(length, dtype=dtype)[:, None] * rates)[:, None]


def _turned(h: Float[Array, "length heads size"], angles: Array) -> Array:
    """Pairs (a, b) turned by their angles."""
    a, b = jnp.split(h, 2, -1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cosine - b * sine, a * sine + b * cosine], -1)
