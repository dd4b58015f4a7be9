"""Convolutional networks of `pf.ScoreTrajectory`: over the time of a trajectory, and over the space of fields.

Both are one U-Net (Ronneberger, Fischer and Brox 2015): blocks of two convolutions at each scale, grids coarser by a
factor of two from scale to scale and back, and a sum with what the finer scale held. Channels come last.
"""

import itertools
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
    refuse,
)

PADDINGS = ("circular", "zero")


class TemporalUNet(ScoreNetwork):
    """U-Net over time, for windows and for whole trajectories of any length: states, flattened, are its channels.

    What it says of a state depends on the states around it, and on the ends of the trajectory where they are near: a
    state sees ``blocks (3 2^scales - 4)`` states to either side with kernels of 3. Time itself it does not know, so
    take enough scales where the law of a state changes long after the start. For windows of a
    few states a step of `WindowMLP` costs half as much.

    Args:
        channels: units at each scale of time; each scale is coarser by a factor of two. On Lorenz's system three scales
            are as good as two wider ones at low levels of noise, and better at those from 0.1 on.
        blocks: residual blocks at each scale, before and after the coarser ones.
        kernel: length of the convolutions, odd.
    """

    channels: tuple[int, ...] = eqx.field(static=True, default=(48, 64, 96), converter=lambda v: _sequence(v))
    blocks: int = eqx.field(static=True, default=2)
    kernel: int = eqx.field(static=True, default=3)

    any_length: ClassVar[bool] = True

    def __check_init__(self):
        _check("TemporalUNet", self.channels, self.blocks, self.kernel)

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """See `ScoreNetwork.why_not`."""
        return empty(shape)

    def build(self, key: Key, shape: tuple[int, ...], parameters: int) -> eqx.Module:
        """See `ScoreNetwork.build`."""
        refuse(self, shape)
        layout = _layout(self, 1, math.prod(shape[1:]), parameters)
        return _TemporalNetwork(draw(key, layout), tuple(shape[1:]))


class FieldUNet(ScoreNetwork):
    """U-Net over space, for windows of fields (rows, columns) or (rows, columns, components) on a regular grid.

    The states of a window are its channels. With circular padding it commutes with shifts by whole cells of its
    coarsest grid.

    Args:
        channels: units at each scale of space; each scale is coarser by a factor of two.
        blocks: residual blocks at each scale, before and after the coarser ones.
        kernel: side of the convolutions, odd.
        padding: "circular" for periodic fields, "zero" for fields with an edge, which the network then sees.

    Source: as the network of Kolmogorov's flow in Rozet and Louppe 2023, "Score-based data assimilation",
    arXiv:2306.10574, there with channels=(96, 192, 384) and blocks=3.
    """

    channels: tuple[int, ...] = eqx.field(static=True, default=(32, 64), converter=lambda v: _sequence(v))
    blocks: int = eqx.field(static=True, default=2)
    kernel: int = eqx.field(static=True, default=3)
    padding: str = eqx.field(static=True, default="circular")

    def __check_init__(self):
        _check("FieldUNet", self.channels, self.blocks, self.kernel)
        if self.padding not in PADDINGS:
            raise MethodError(f"FieldUNet(padding=...) takes one of {list(PADDINGS)}; got {self.padding!r}.")

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """See `ScoreNetwork.why_not`."""
        if len(shape) not in (3, 4):
            return (
                f"FieldUNet takes states of shape (rows, columns) or (rows, columns, components); got {shape[1:]}. "
                "Use pf.TemporalUNet() or pf.WindowMLP()."
            )
        factor = 2 ** (len(self.channels) - 1)
        if shape[1] % factor or shape[2] % factor:
            return (
                f"FieldUNet(channels={self.channels}) halves the grid {len(self.channels) - 1} times and takes rows "
                f"and columns divisible by {factor}; got {shape[1]} x {shape[2]}. Use fewer channels=."
            )
        return empty(shape)

    def build(self, key: Key, shape: tuple[int, ...], parameters: int) -> eqx.Module:
        """See `ScoreNetwork.build`."""
        refuse(self, shape)
        layout = _layout(self, 2, math.prod((shape[0], *shape[3:])), parameters)
        return _FieldNetwork(draw(key, layout), tuple(shape), self.padding)


class _TemporalNetwork(eqx.Module):
    unet: Any
    state: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Array, condition: Array, given: Array) -> Array:
        if x.shape[1:] != self.state:
            raise MethodError(f"The network was built for states of shape {self.state}; got {x.shape[1:]}.")
        length = x.shape[0]
        missing = -length % 2 ** len(self.unet.coarser)
        inside = jnp.pad(jnp.ones((length, 1), x.dtype), ((0, missing), (0, 0)))
        h = jnp.pad(x.reshape(length, -1), ((0, missing), (0, 0)))
        return self.unet(h, inside, condition, given, "zero")[:length].reshape(x.shape).astype(x.dtype)


class _FieldNetwork(eqx.Module):
    unet: Any
    shape: tuple[int, ...] = eqx.field(static=True)
    padding: str = eqx.field(static=True)

    def __call__(self, x: Array, condition: Array, given: Array) -> Array:
        if x.shape != self.shape:
            raise MethodError(f"The network was built for windows of shape {self.shape}; got {x.shape}.")
        length, rows, columns = x.shape[:3]
        h = jnp.moveaxis(x.reshape(length, rows, columns, -1), 0, 2).reshape(rows, columns, -1)
        inside = jnp.ones((rows, columns, 1), x.dtype)
        h = self.unet(h, inside, condition, given, self.padding).reshape(rows, columns, length, -1)
        return jnp.moveaxis(h, 2, 0).reshape(x.shape).astype(x.dtype)


# ------------------------------------------------------------------------------------------------------- the U-Net


class _Stage(eqx.Module):
    """Residual blocks at one scale, their weights stacked along the first axis."""

    film: Any
    first: Any
    second: Any

    def __call__(self, h: Array, inside: Array, known: Array, padding: str) -> Array:
        blocks, width = self.first.bias.shape
        film = self.film(known).reshape(blocks, 2, width)

        def block(h: Array, item: Any) -> tuple[Array, None]:
            (scale, shift), first, second = item
            z = jax.nn.silu(_convolved(inside * (h * (1.0 + scale) + shift), first, padding))
            return h + _convolved(inside * z, second, padding), None

        return jax.lax.scan(block, h, (film, self.first, self.second))[0]


class _UNet(eqx.Module):
    """The network on a grid of one or two axes; `finer[i]` and `back[i]` belong to scale i, as do `down[i]`, `up[i]`.

    Cells outside the trajectory, where `inside` is zero, are zero at every convolution, so that the result does not
    depend on how many there are.
    """

    levels: Any
    enter: Any
    down: tuple[Any, ...]
    coarser: tuple[Any, ...]
    finer: tuple[Any, ...]
    up: tuple[Any, ...]
    leave: Any

    def __call__(self, x: Array, inside: Array, condition: Array, given: Array, padding: str) -> Array:
        known = self.levels(condition, given)
        x, inside = x.astype(known.dtype), inside.astype(known.dtype)
        h = _convolved(jnp.concatenate([x, inside], -1), self.enter, padding)
        kept, masks = [], []
        for stage, pool in itertools.zip_longest(self.down, self.coarser):
            h = stage(h, inside, known, padding)
            if pool is not None:
                kept.append(h)
                masks.append(inside)
                h, inside = pool(_gathered(inside * h)), jnp.max(_gathered(inside), -1, keepdims=True)
        for stage, spread in zip(reversed(self.up), reversed(self.finer), strict=True):
            h, inside = _spread(spread(h)), masks.pop()
            h = stage(h + kept.pop(), inside, known, padding)
        return self.leave(h)


def _layout(options: TemporalUNet | FieldUNet, axes: int, size: int, parameters: int) -> _UNet:
    channels, cells = options.channels, 2**axes

    def convolution(inputs: int, outputs: int, gain: float, stack: tuple[int, ...] = ()) -> Affine:
        kernel = (options.kernel,) * axes
        deviation = gain * (math.prod(kernel) * inputs) ** -0.5
        return Affine(Weight((*stack, *kernel, inputs, outputs), deviation), Weight((*stack, outputs)))

    def stage(width: int) -> _Stage:
        stack = (options.blocks,)
        return _Stage(
            affine(EMBEDDED, options.blocks * 2 * width, 0.1),
            convolution(width, width, 1.0, stack),
            convolution(width, width, 0.5, stack),
        )

    pairs = list(itertools.pairwise(channels))
    return _UNet(
        levels=Levels.layout(parameters),
        enter=convolution(size + 1, channels[0], 1.0),
        down=tuple(stage(width) for width in channels),
        coarser=tuple(affine(cells * fine, coarse) for fine, coarse in pairs),
        finer=tuple(affine(coarse, cells * fine) for fine, coarse in pairs),
        up=tuple(stage(width) for width in channels[:-1]),
        leave=affine(channels[0], size, 0.0),
    )


def _convolved(h: Float[Array, "*grid channels"], layer: Affine, padding: str) -> Array:
    """Convolution by an odd kernel, on the same grid."""
    axes, half = h.ndim - 1, layer.weight.shape[0] // 2
    mode = "wrap" if padding == "circular" else "constant"
    h = jnp.pad(h, (*[(half, half)] * axes, (0, 0)), mode=mode)
    # Neighbours side by side, axis by axis, and one product, for a whole batch too. In loops on CPUs convolutions fall
    # back on slow code, and this is eight times faster.
    for axis in range(axes):
        size = h.shape[axis] - 2 * half
        h = jnp.concatenate([jax.lax.slice_in_dim(h, k, k + size, axis=axis) for k in range(2 * half + 1)], -1)
    return h @ layer.weight.reshape(-1, layer.weight.shape[-1]) + layer.bias


def _gathered(h: Array) -> Array:
    """Pairs or squares of neighbouring cells as one cell, their channels side by side."""
    if h.ndim == 2:
        return h.reshape(h.shape[0] // 2, -1)
    rows, columns, channels = h.shape
    h = h.reshape(rows // 2, 2, columns // 2, 2, channels)
    return jnp.swapaxes(h, 1, 2).reshape(rows // 2, columns // 2, -1)


def _spread(h: Array) -> Array:
    """The reverse of `_gathered`."""
    if h.ndim == 2:
        return h.reshape(2 * h.shape[0], -1)
    rows, columns, _ = h.shape
    return jnp.swapaxes(h.reshape(rows, columns, 2, 2, -1), 1, 2).reshape(2 * rows, 2 * columns, -1)


def _sequence(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _check(owner: str, channels: Any, blocks: Any, kernel: Any) -> None:
    good = isinstance(channels, tuple) and channels
    if not good or not all(isinstance(c, int) and not isinstance(c, bool) and c >= 1 for c in channels):
        raise MethodError(
            f"{owner}(channels=...) takes a positive integer for each scale, such as (64, 128); got {channels!r}."
        )
    check_sizes(owner, blocks=(blocks, 1), kernel=(kernel, 1))
    if kernel % 2 == 0:
        raise MethodError(f"{owner}(kernel=...) takes an odd number; got {kernel}.")
