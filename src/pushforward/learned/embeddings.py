"""Networks that turn data of any shape into a vector: what a conditional estimator is given of the data.

An embedding is an option; `build` makes its network. All take the standardised data and a mask of what is present, both
of shape (n, k) for an embedding that reads along an axis, of shape (k,) for `Vector`.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import DataError, MethodError
from pushforward._types import Array, Key

type Shapes = dict[str, tuple[int, ...]]
"""Shapes of the data sites by name."""

_RAW = 64
"""Data of at most so many numbers are given to the estimator as they are."""
_SHORTEST = 8


class Embedding(eqx.Module):
    """Base of embeddings. Subclasses are final; their fields are options."""

    @abstractmethod
    def layout(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the array into which data of these shapes are put.

        Raises:
            DataError: the embedding cannot read such data.
        """

    @abstractmethod
    def build(self, key: Key, layout: tuple[int, ...]) -> Any:
        """A network with random weights, called as ``network(values, present)``."""

    @abstractmethod
    def size(self, layout: tuple[int, ...]) -> int:
        """Length of the vector that the network returns."""

    @abstractmethod
    def hide(self, key: Key, present: Array) -> Array:
        """A mask with what training leaves out, so that the network learns to do without."""

    pooled: ClassVar[tuple[int, ...]] = ()
    """Axes along which data are standardised together."""

    @property
    @abstractmethod
    def reads_missing(self) -> bool:
        """Whether it was trained to do without some of the data."""

    def arrange(self, data: dict[str, Array], layout: tuple[int, ...]) -> Array:
        """Data sites in one array, in the order of their names."""
        parts = [jnp.asarray(data[name], float).reshape(*layout[:-1], -1) for name in sorted(data)]
        return jnp.concatenate(parts, -1)


class Vector(Embedding):
    """All numbers of the data in one vector, through a network where they are many.

    Args:
        outputs: length of the result; 0 gives the numbers themselves where they are at most 64, and 32 outputs of a
            network where they are more.
        width: units of the hidden layers.
        depth: hidden layers.
        missing: the largest share of the numbers that are left out at random in training. Above 0, NaN in the data
            is allowed and means missing.
    """

    outputs: int = 0
    width: int = 128
    depth: int = 2
    missing: float = 0.0

    def __check_init__(self):
        _check_sizes("Vector", outputs=(self.outputs, 0), width=(self.width, 1), depth=(self.depth, 0))
        _check_share("Vector", self.missing)

    @property
    def reads_missing(self) -> bool:
        """See `Embedding.reads_missing`."""
        return self.missing > 0

    def layout(self, shapes: Shapes) -> tuple[int, ...]:
        """See `Embedding.layout`."""
        return (sum(math.prod(shape) for shape in shapes.values()),)

    def _outputs(self, k: int) -> int:
        return self.outputs or (0 if k <= _RAW else 32)

    def size(self, layout: tuple[int, ...]) -> int:
        """See `Embedding.size`."""
        return self._outputs(layout[0]) or layout[0] * (2 if self.reads_missing else 1)

    def build(self, key: Key, layout: tuple[int, ...]) -> Any:
        """See `Embedding.build`."""
        inputs, outputs = layout[0] * (2 if self.reads_missing else 1), self._outputs(layout[0])
        network = _mlp(key, inputs, outputs, self.width, self.depth) if outputs else None
        return _VectorNetwork(network, self.reads_missing)

    def hide(self, key: Key, present: Array) -> Array:
        """See `Embedding.hide`."""
        if not self.reads_missing:
            return present
        share, each = jax.random.split(key)
        return present & (jax.random.uniform(each, present.shape) >= self.missing * jax.random.uniform(share))


class Sets(Embedding):
    """Exchangeable data, such as those of a plate: a network for each element, averaged (Zaheer et al. 2017).

    The result does not depend on the order of the elements. All data sites share their first axis.

    Args:
        outputs: length of the result.
        width: units of the hidden layers.
        depth: hidden layers, before the average and after it.
        varying: whether sets of any size up to that of training are allowed; pad them with NaN.
    """

    outputs: int = 16
    width: int = 64
    depth: int = 2
    varying: bool = False

    def __check_init__(self):
        _check_sizes("Sets", outputs=(self.outputs, 1), width=(self.width, 1), depth=(self.depth, 1))
        if not isinstance(self.varying, bool):
            raise MethodError(f"Sets(varying=...) takes True or False; got {self.varying!r}.")

    pooled: ClassVar[tuple[int, ...]] = (0,)

    @property
    def reads_missing(self) -> bool:
        """See `Embedding.reads_missing`."""
        return self.varying

    def layout(self, shapes: Shapes) -> tuple[int, ...]:
        """See `Embedding.layout`."""
        return _along_first_axis("Sets", shapes)

    def size(self, layout: tuple[int, ...]) -> int:
        """See `Embedding.size`."""
        return self.outputs

    def build(self, key: Key, layout: tuple[int, ...]) -> Any:
        """See `Embedding.build`."""
        first, second = jax.random.split(key)
        each = _mlp(first, layout[1], self.width, self.width, self.depth)
        whole = _mlp(second, self.width + 1, self.outputs, self.width, self.depth)
        return _SetNetwork(each, whole)

    def hide(self, key: Key, present: Array) -> Array:
        """See `Embedding.hide`."""
        if not self.varying:
            return present
        size = jax.random.randint(key, (), 1, present.shape[0] + 1)
        return present & (jnp.arange(present.shape[0]) < size)[:, None]


class Series(Embedding):
    """Time series: convolutions of stride 2 along the first axis, then a dense network.

    Args:
        outputs: length of the result.
        width: channels of the convolutions and units of the dense network.
        kernel: length of the convolutions.
        missing: the largest share of the times that are left out at random in training; above 0, NaN is allowed.
    """

    outputs: int = 16
    width: int = 32
    kernel: int = 5
    missing: float = 0.0

    def __check_init__(self):
        _check_sizes("Series", outputs=(self.outputs, 1), width=(self.width, 1), kernel=(self.kernel, 2))
        _check_share("Series", self.missing)

    pooled: ClassVar[tuple[int, ...]] = (0,)

    @property
    def reads_missing(self) -> bool:
        """See `Embedding.reads_missing`."""
        return self.missing > 0

    def layout(self, shapes: Shapes) -> tuple[int, ...]:
        """See `Embedding.layout`."""
        return _along_first_axis("Series", shapes)

    def size(self, layout: tuple[int, ...]) -> int:
        """See `Embedding.size`."""
        return self.outputs

    def build(self, key: Key, layout: tuple[int, ...]) -> Any:
        """See `Embedding.build`."""
        channels = layout[1] * (2 if self.reads_missing else 1)
        return _ConvolutionNetwork(self, key, (layout[0],), channels)

    def hide(self, key: Key, present: Array) -> Array:
        """See `Embedding.hide`."""
        if not self.reads_missing:
            return present
        share, each = jax.random.split(key)
        gone = jax.random.uniform(each, present.shape[:1]) < self.missing * jax.random.uniform(share)
        return present & ~gone[:, None]


class Image(Embedding):
    """Images or fields on a grid: convolutions of stride 2 along the first two axes, then a dense network.

    All data sites have the shape (rows, columns) or (rows, columns, channels).

    Args:
        outputs: length of the result.
        width: channels of the convolutions and units of the dense network.
        kernel: side of the convolutions.
    """

    outputs: int = 32
    width: int = 32
    kernel: int = 3

    def __check_init__(self):
        _check_sizes("Image", outputs=(self.outputs, 1), width=(self.width, 1), kernel=(self.kernel, 2))

    pooled: ClassVar[tuple[int, ...]] = (0, 1)

    @property
    def reads_missing(self) -> bool:
        """See `Embedding.reads_missing`."""
        return False

    def layout(self, shapes: Shapes) -> tuple[int, ...]:
        """See `Embedding.layout`."""
        grids = {shape[:2] for shape in shapes.values()}
        if len(grids) != 1 or len(next(iter(grids))) != 2:
            raise DataError(
                f"Image reads data of shape (rows, columns) or (rows, columns, channels); got {shapes}. "
                "Use pf.Vector(), or reshape the data in the model."
            )
        return (*next(iter(grids)), sum(math.prod(shape[2:]) for shape in shapes.values()))

    def size(self, layout: tuple[int, ...]) -> int:
        """See `Embedding.size`."""
        return self.outputs

    def build(self, key: Key, layout: tuple[int, ...]) -> Any:
        """See `Embedding.build`."""
        return _ConvolutionNetwork(self, key, layout[:2], layout[2])

    def hide(self, key: Key, present: Array) -> Array:
        """See `Embedding.hide`."""
        return present


class _VectorNetwork(eqx.Module):
    network: Any
    marks: bool = eqx.field(static=True)

    def __call__(self, values: Array, present: Array) -> Array:
        inputs = jnp.concatenate([values, present.astype(values.dtype)]) if self.marks else values
        return inputs if self.network is None else self.network(inputs)


class _SetNetwork(eqx.Module):
    each: Any
    whole: Any

    def __call__(self, values: Array, present: Array) -> Array:
        there = present.any(1).astype(values.dtype)
        number = jnp.maximum(jnp.sum(there), 1.0)
        mean = jnp.sum(there[:, None] * jax.vmap(self.each)(values), 0) / number
        # The size of the set says how sure the result is; a mean alone does not know it.
        return self.whole(jnp.concatenate([mean, jnp.log(number / len(there))[None]]))


class _ConvolutionNetwork(eqx.Module):
    layers: list[Any]
    dense: Any
    marks: bool = eqx.field(static=True)

    def __init__(self, options: Series | Image, key: Key, lengths: tuple[int, ...], channels: int):
        self.layers, self.marks = [], options.reads_missing
        kind = eqx.nn.Conv1d if len(lengths) == 1 else eqx.nn.Conv2d
        while not self.layers or max(lengths) > _SHORTEST:
            key, layer_key = jax.random.split(key)
            self.layers.append(
                kind(channels, options.width, options.kernel, stride=2, padding=options.kernel // 2, key=layer_key)
            )
            channels = options.width
            lengths = tuple((n + 2 * (options.kernel // 2) - options.kernel) // 2 + 1 for n in lengths)
        self.dense = _mlp(key, channels * math.prod(lengths), options.outputs, 2 * options.width, 1)

    def __call__(self, values: Array, present: Array) -> Array:
        inputs = jnp.concatenate([values, present.astype(values.dtype)], -1) if self.marks else values
        hidden = jnp.moveaxis(inputs, -1, 0)
        for layer in self.layers:
            hidden = jax.nn.silu(layer(hidden))
        return self.dense(hidden.reshape(-1))


def _mlp(key: Key, inputs: int, outputs: int, width: int, depth: int) -> Any:
    return eqx.nn.MLP(inputs, outputs, width, depth, activation=jax.nn.silu, key=key)


def _along_first_axis(owner: str, shapes: Shapes) -> tuple[int, ...]:
    lengths = {shape[0] if shape else None for shape in shapes.values()}
    if len(lengths) != 1 or None in lengths:
        raise DataError(
            f"{owner} reads data sites that share their first axis; got the shapes {shapes}. "
            "Use pf.Vector(), or stack the data in the model."
        )
    return next(iter(shapes.values()))[0], sum(math.prod(shape[1:]) for shape in shapes.values())


def _check_sizes(owner: str, **options: tuple[Any, int]) -> None:
    for name, (value, least) in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MethodError(f"{owner}({name}=...) takes an integer of at least {least}; got {value!r}.")


def _check_share(owner: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise MethodError(f"{owner}(missing=...) takes a share from 0 to below 1; got {value!r}.")
