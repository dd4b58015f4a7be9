"""Normalising flows: invertible maps x = T(e) with a known log-determinant. The only file that mentions FlowJAX.

FlowJAX builds the layers; a flow here is the map alone, from standard normal noise e to x, both of shape (d,), which may
depend on a condition c of shape (k,). Autoregressive layers are fast in one direction: ``fast`` says in which.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key

type Bijection = Any
"""A FlowJAX bijection of shape (d,)."""

_LOG_2PI = 1.8378770664093453
_SPLINE_INTERVAL = 5.0
"""Splines act on (-5, 5) and are the identity outside."""

ARCHITECTURES = (
    "coupling",
    "coupling_spline",
    "autoregressive",
    "autoregressive_spline",
    "triangular_spline",
    "block_autoregressive",
)
"""Names of architectures; "block_autoregressive" has no inverse in closed form."""


class Flow(eqx.Module):
    """Which maps a flow may be: the name of an architecture and its size.

    Affine "coupling" (RealNVP: Dinh, Sohl-Dickstein and Bengio 2017) and "autoregressive" layers (Kingma et al. 2016)
    are cheap and miss heavy or light tails; the "_spline" ones (Durkan et al. 2019) bend each coordinate freely on
    (-5, 5). "triangular_spline" alternates triangular matrices and splines; "block_autoregressive" (De Cao, Titov and
    Aziz 2019) is one flexible network without an inverse in closed form. In one dimension, where coupling layers have
    nothing to couple, the autoregressive ones are built.

    Args:
        architecture: one of `pushforward.learned.flows.ARCHITECTURES`.
        layers: number of layers.
        width: units of the hidden layers of the networks; the size of a block is width / 4.
        depth: hidden layers of the networks.
        knots: inner knots of splines.

    Example:
        >>> import pushforward as pf
        >>> pf.Flow("autoregressive_spline", layers=2).knots
        8
    """

    architecture: str = "coupling_spline"
    layers: int = 4
    width: int = 32
    depth: int = 1
    knots: int = 8

    def __check_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise MethodError(f"Flow(architecture) takes one of {list(ARCHITECTURES)}; got {self.architecture!r}.")
        for name in ("layers", "width", "depth", "knots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MethodError(f"Flow({name}=...) takes an integer of at least 1; got {value!r}.")

    @property
    def invertible(self) -> bool:
        """Whether the inverse is in closed form."""
        return self.architecture != "block_autoregressive"

    def build(self, key: Key, dimension: int, condition: int | None = None, fast: str = "sampling") -> Bijection:
        """A map of R^d to itself with random weights.

        Args:
            key: JAX key.
            dimension: d.
            condition: length k of the condition, None for a map without one.
            fast: the direction in which autoregressive layers take one pass: "sampling" (e to x, for reverse KL) or
                "density" (x to e, for fits to samples).
        """
        from flowjax import bijections, flows
        from flowjax.distributions import Normal

        name = self.architecture
        if dimension == 1:
            name = name.replace("coupling", "autoregressive")
        shared: dict[str, Any] = {
            "base_dist": Normal(jnp.zeros(dimension)),
            "flow_layers": self.layers,
            "invert": fast == "density",
            "cond_dim": condition,
        }
        network: dict[str, Any] = {"nn_width": self.width, "nn_depth": self.depth, "nn_activation": jax.nn.silu}
        if name.endswith("_spline") and name != "triangular_spline":
            network["transformer"] = bijections.RationalQuadraticSpline(knots=self.knots, interval=_SPLINE_INTERVAL)
        builders: dict[str, Callable[[], Any]] = {
            "coupling": lambda: flows.coupling_flow(key, **shared, **network),
            "autoregressive": lambda: flows.masked_autoregressive_flow(key, **shared, **network),
            "triangular_spline": lambda: flows.triangular_spline_flow(key, **shared, knots=self.knots),
            "block_autoregressive": lambda: flows.block_neural_autoregressive_flow(
                key, **shared, nn_depth=self.depth, nn_block_dim=max(1, self.width // 4)
            ),
        }
        key_name = name if name == "triangular_spline" else name.removesuffix("_spline")
        return builders[key_name]().bijection


def flow_option(value: Any) -> Flow:
    """An instance, or the name of an architecture with its defaults."""
    if isinstance(value, Flow):
        return value
    if isinstance(value, str) and value in ARCHITECTURES:
        return Flow(value)
    raise MethodError(
        f"flow= takes one of {list(ARCHITECTURES)} or an instance such as pf.Flow('coupling_spline', layers=6); "
        f"got {value!r}."
    )


def trainable(bijection: Bijection) -> tuple[Any, Any]:
    """The weights that are trained, and the rest."""
    import paramax

    return eqx.partition(bijection, eqx.is_inexact_array, is_leaf=lambda v: isinstance(v, paramax.NonTrainable))


def transform(bijection: Bijection, e: Array, condition: Array | None = None) -> tuple[Array, Array]:
    """x = T(e; c) and log|det T'(e)|, for e of shape (d,) and c of shape (k,)."""
    import paramax

    return paramax.unwrap(bijection).transform_and_log_det(e, condition)


def inverse(bijection: Bijection, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
    """e = T^-1(x; c) and log|det (T^-1)'(x)|, for x of shape (d,) and c of shape (k,)."""
    import paramax

    return paramax.unwrap(bijection).inverse_and_log_det(x, condition)


def log_density(bijection: Bijection, x: Array, condition: Array | None = None) -> Array:
    """log q(x given c) of the push of N(0, I) by T: log N(T^-1(x)) + log|det (T^-1)'(x)|."""
    e, log_det = inverse(bijection, x, condition)
    return -0.5 * jnp.sum(e**2) - 0.5 * e.size * _LOG_2PI + log_det


class Transport(eqx.Module):
    """A trained map z = mean + root T(e), with what is needed to write it to a file and to build it again.

    Attributes:
        flow: the architecture.
        weights: arrays of T, in the order of its tree.
        mean: (d,).
        root: any root (d, d) of the covariance, or standard deviations (d,).
    """

    flow: Flow
    weights: list[Array]
    mean: Array
    root: Array

    @property
    def dimension(self) -> int:
        """Length d of z."""
        return self.mean.shape[0]

    @property
    def bijection(self) -> Bijection:
        """T."""
        # Built anew in every trace, since FlowJAX's layers close over arrays; what the weights replace is not computed.
        arrays, rest = eqx.partition(self.flow.build(jax.random.key(0), self.dimension), eqx.is_array)
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), self.weights), rest)

    def push(self, e: Array) -> tuple[Array, Array]:
        """z and log|det dz/de| at noise e (d,)."""
        x, log_det = transform(self.bijection, e)
        return affine(self.mean, self.root, x), log_det + log_scale(self.root)


def affine(mean: Array, root: Array, x: Array) -> Array:
    """mean + root x, for a matrix or a vector of standard deviations."""
    return mean + (root @ x if root.ndim == 2 else root * x)


def log_scale(root: Array) -> Array:
    """log|det root|."""
    return jnp.linalg.slogdet(root)[1] if root.ndim == 2 else jnp.sum(jnp.log(jnp.abs(root)))
