"""Networks of `pf.ScoreTrajectory`: their base, the one of windows, and the check of a network of the user's own.

A network F is called as ``network(x, condition, given)``: noisy states x (length, *state), scaled to variance one;
condition = log(s) / 4, s the level of noise; given (p,), static parameters, standardised. It returns an array of the
shape of x. The denoiser is ``D = c_skip x / c_in + c_out F``, so that a network that returns zero is where training
starts; see `math/diffusion.py`.

The level and the parameters enter every block as a scale and a shift of its units (FiLM: Perez et al. 2018).
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import MethodError
from pushforward._types import Array, Float, Key

EMBEDDED = 64
"""Units by which a network knows the level and the parameters."""
_FREQUENCIES = 8


class ScoreNetwork(eqx.Module):
    """Base of networks. Subclasses are final; their fields are options, `build` makes the network."""

    any_length: ClassVar[bool] = False
    """Whether the network that was built takes other lengths than the one it was built for."""

    @abstractmethod
    def build(self, key: Key, shape: tuple[int, ...], parameters: int) -> eqx.Module:
        """A network with random weights that returns zero.

        Args:
            key: JAX key.
            shape: (length, *state), of the window or the trajectory that it sees.
            parameters: number p of static parameters, 0 for none.

        Raises:
            MethodError: the network does not fit such states; see `why_not`.
        """

    @abstractmethod
    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why the network does not fit states of this shape, (length, *state); None where it does."""


class WindowMLP(ScoreNetwork):
    """Dense network of a window: its states in one vector, residual blocks of two layers.

    ``h <- h + B silu(A ((1 + a) h + b) + a0) + b0``, a and b functions of level and parameters. For windows of a few
    small states; for states of more than some hundred numbers in a window use `TemporalUNet` or `FieldUNet`.

    Args:
        width: units of a layer.
        depth: residual blocks.

    Source: as the network of Lorenz's system in Rozet and Louppe 2023, "Score-based data assimilation",
    arXiv:2306.10574, with the level in each block.
    """

    width: int = eqx.field(static=True, default=256)
    depth: int = eqx.field(static=True, default=5)

    def __check_init__(self):
        check_sizes("WindowMLP", width=(self.width, 1), depth=(self.depth, 1))

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """See `ScoreNetwork.why_not`."""
        return empty(shape)

    def build(self, key: Key, shape: tuple[int, ...], parameters: int) -> eqx.Module:
        """See `ScoreNetwork.build`."""
        refuse(self, shape)
        size, width, depth = math.prod(shape), self.width, self.depth
        layout = _WindowNetwork(
            levels=Levels.layout(parameters),
            enter=affine(size, width),
            film=affine(EMBEDDED, depth * 2 * width, 0.1),
            first=affine(width, width, 1.0, (depth,)),
            second=affine(width, width, depth**-0.5, (depth,)),
            leave=affine(width, size, 0.0),
            shape=tuple(shape),
        )
        return draw(key, layout)


class _WindowNetwork(eqx.Module):
    levels: Any
    enter: Any
    film: Any
    first: Any
    second: Any
    leave: Any
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Array, condition: Array, given: Array) -> Array:
        if x.shape != self.shape:
            raise MethodError(f"The network was built for windows of shape {self.shape}; got {x.shape}.")
        depth, width = self.first.bias.shape
        film = self.film(self.levels(condition, given)).reshape(depth, 2, width)

        def block(h: Array, item: Any) -> tuple[Array, None]:
            (scale, shift), first, second = item
            return h + second(jax.nn.silu(first(h * (1.0 + scale) + shift))), None

        h = self.enter(x.astype(film.dtype).reshape(-1))
        h, _ = jax.lax.scan(block, h, (film, self.first, self.second))
        return self.leave(h).reshape(x.shape).astype(x.dtype)


def check_network(network: Any, shape: tuple[int, ...], parameters: int) -> None:
    """Check the call of a network of the user's own by shapes alone; nothing is computed.

    Args:
        network: an Equinox module, called as ``network(x, condition, given)``.
        shape: of x, (length, *state).
        parameters: length of `given`.

    Raises:
        MethodError: the call fails, or does not return an array of the shape of x.
    """
    expected = "network(x, condition, given) returns an array of the shape of x"
    name = type(network).__name__
    if not isinstance(network, eqx.Module) or not callable(network):
        raise MethodError(
            f"network= takes pf.WindowMLP(), pf.TemporalUNet(), pf.FieldUNet(), pf.TrajectoryTransformer() or an "
            f"Equinox module with a __call__, where {expected}; got {network!r}."
        )
    dtype = jnp.result_type(float)
    inputs = [jax.ShapeDtypeStruct(s, dtype) for s in (tuple(shape), (), (parameters,))]
    said = f"x of shape {tuple(shape)}, a scalar condition and given of shape ({parameters},)"
    try:
        found = eqx.filter_eval_shape(network, *inputs)
    except Exception as error:
        raise MethodError(
            f"network= was given {name}, whose call with {said} failed: {type(error).__name__}: {error} "
            f"Expected: {expected}."
        ) from error
    if not hasattr(found, "shape"):
        raise MethodError(f"network= was given {name}, which returned {found!r} for {said}. Expected: {expected}.")
    if found.shape != tuple(shape) or not jnp.issubdtype(found.dtype, jnp.floating):
        raise MethodError(
            f"network= was given {name}, which returned {found.dtype} of shape {found.shape} for {said}. "
            f"Expected: {expected}, of floating point."
        )


# ------------------------------------------------------------------------------------------- parts of all networks


@dataclass(frozen=True)
class Weight:
    """A leaf of a layout: the shape of an array and the standard deviation of its numbers at the start."""

    shape: tuple[int, ...]
    deviation: float = 0.0


class Affine(eqx.Module):
    """x -> x W + b along the last axis; a stack of them where W has more than two axes."""

    weight: Any
    bias: Any

    def __call__(self, x: Array) -> Array:
        """The map."""
        return x @ self.weight + self.bias


class Levels(eqx.Module):
    """What the blocks know: (`EMBEDDED`,) numbers of the level of noise and the static parameters."""

    first: Any
    second: Any

    @staticmethod
    def layout(parameters: int) -> "Levels":
        """Its layout for p parameters."""
        return Levels(affine(2 * _FREQUENCIES + 1 + parameters, EMBEDDED), affine(EMBEDDED, EMBEDDED))

    def __call__(self, condition: Array, given: Array) -> Float[Array, "embedded"]:
        """The numbers, of condition = log(s) / 4 and parameters (p,)."""
        dtype = self.first.weight.dtype
        at = jnp.asarray(condition, dtype)
        # Periods in log(s) from 32 to 4: levels that differ by a factor of two are told apart.
        angles = at * jnp.arange(1, _FREQUENCIES + 1, dtype=dtype) * (math.pi / 4)
        inputs = jnp.concatenate([at[None], jnp.sin(angles), jnp.cos(angles), jnp.asarray(given, dtype)])
        return jax.nn.silu(self.second(jax.nn.silu(self.first(inputs))))


def affine(inputs: int, outputs: int, gain: float = 1.0, stack: tuple[int, ...] = ()) -> Affine:
    """Layout of an `Affine` whose outputs start with variance gain^2 for inputs of variance one."""
    return Affine(Weight((*stack, inputs, outputs), gain * inputs**-0.5), Weight((*stack, outputs)))


def normalised(h: Array) -> Array:
    """Mean 0 and variance 1 over the last axis (Ba, Kiros and Hinton 2016)."""
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5)


def draw(key: Key, layout: Any) -> Any:
    """A network of a layout: its `Weight`s become arrays, by one draw of normal numbers, which compiles fast."""
    leaves, tree = jax.tree.flatten(layout)
    sizes = [math.prod(leaf.shape) if leaf.deviation > 0 else 0 for leaf in leaves]
    parts = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    arrays = [
        leaf.deviation * part.reshape(leaf.shape) if leaf.deviation > 0 else jnp.zeros(leaf.shape)
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


def refuse(network: ScoreNetwork, shape: tuple[int, ...]) -> None:
    """Raise what `ScoreNetwork.why_not` says."""
    reason = network.why_not(shape)
    if reason is not None:
        raise MethodError(reason)


def empty(shape: tuple[int, ...]) -> str | None:
    """What is wrong with a shape that no network fits."""
    if len(shape) < 1 or min(shape) < 1:
        return f"A network takes (length, *state), each of at least 1; got the shape {shape}."
    return None


def check_sizes(owner: str, **options: tuple[Any, int]) -> None:
    """Raise unless each option, given with its least value, is an integer of at least that."""
    for name, (value, least) in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MethodError(f"{owner}({name}=...) takes an integer of at least {least}; got {value!r}.")
