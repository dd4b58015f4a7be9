"""Normalising flows: invertible maps x = T(e) with a known log-determinant. The only file that mentions FlowJAX.

A flow here is the map alone, from standard normal noise e to x, both of shape (d,), which may depend on a condition c
of shape (k,). Autoregressive layers are fast in one direction: ``fast`` says in which.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.learned._layers import Layers

type Bijection = Any
"""`Layers`, or a bijection of FlowJAX, of shape (d,)."""

_LOG_2PI = 1.8378770664093453

ARCHITECTURES = (
    "coupling",
    "coupling_spline",
    "autoregressive",
    "autoregressive_spline",
    "block_autoregressive",
)
"""Names of architectures; "block_autoregressive" has no inverse in closed form."""


class Flow(eqx.Module):
    """Which maps a flow may be: the name of an architecture and its size.

    Affine "coupling" (RealNVP: Dinh, Sohl-Dickstein and Bengio 2017) and "autoregressive" layers (Kingma et al. 2016)
    are cheap and miss heavy or light tails; the "_spline" ones (Durkan et al. 2019) bend each coordinate freely on
    (-5, 5). "block_autoregressive" (De Cao, Titov and Aziz 2019) is one flexible network without an inverse in closed
    form. Others, such as FlowJAX's triangular splines, are passed to `FlowVI` as the bijection that FlowJAX builds. In
    one dimension a coupling layer moves the one coordinate by itself.

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

    def build(self, key: Key, dimension: int, condition: int | None = None, fast: str = "sampling") -> Bijection:
        """A map of R^d to itself with random weights.

        Args:
            key: JAX key.
            dimension: d.
            condition: length k of the condition, None for a map without one.
            fast: the direction in which autoregressive layers take one pass: "sampling" (e to x, for reverse KL) or
                "density" (x to e, for fits to samples).
        """
        kind, _, spline = self.architecture.partition("_")
        if kind in ("coupling", "autoregressive"):
            bins = self.knots + 1 if spline else 0
            return Layers.build(key, self.layers, kind, dimension, condition or 0, self.width, self.depth, bins, fast)
        from flowjax import flows
        from flowjax.distributions import Normal

        shared: dict[str, Any] = {
            "base_dist": Normal(jnp.zeros(dimension)),
            "flow_layers": self.layers,
            "invert": fast == "density",
            "cond_dim": condition,
        }
        block = max(1, self.width // 4)
        return flows.block_neural_autoregressive_flow(key, **shared, nn_depth=self.depth, nn_block_dim=block).bijection


class Given(eqx.Module):
    """A bijection of FlowJAX that the user made, in place of a `Flow`.

    Attributes:
        bijection: without a condition, of shape (d,); `transform` takes noise to x.
    """

    bijection: Any

    def build(self, key: Key, dimension: int, condition: int | None = None, fast: str = "sampling") -> Bijection:
        """The bijection itself, its weights at the start included."""
        del key, fast
        if self.bijection.shape != (dimension,):
            raise MethodError(
                f"flow= was given a bijection of shape {self.bijection.shape}, and the model has {dimension} latent "
                f"numbers. Give one of shape ({dimension},)."
            )
        if condition is not None or self.bijection.cond_shape is not None:
            raise MethodError("flow= takes a bijection without a condition; its cond_shape must be None.")
        return self.bijection


def flow_option(value: Any) -> Flow | Given:
    """A `Flow`, the name of an architecture with its defaults, or a bijection of FlowJAX."""
    if isinstance(value, Flow | Given):
        return value
    if isinstance(value, str) and value in ARCHITECTURES:
        return Flow(value)
    if isinstance(value, eqx.Module) and type(value).__module__.startswith("flowjax."):
        if hasattr(value, "transform_and_log_det"):
            return Given(value)
        raise MethodError(
            f"flow= takes the bijection of a FlowJAX distribution, flow.bijection; got {type(value).__name__}."
        )
    raise MethodError(
        f"flow= takes one of {list(ARCHITECTURES)}, an instance such as pf.Flow('coupling_spline', layers=6), or a "
        f"bijection of FlowJAX; got {value!r}."
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


def path(bijection: Bijection, e: Array, score: bool = False) -> tuple[Array, Array, Array]:
    """x = T(e), the slope of log q at x and log|det T'(e)|; for derivatives by the weights the slope is a constant.

    So is log|det| without `score`.

    The slope is what the path derivative of the ELBO needs ("sticking the landing": Roeder, Wu and Duvenaud 2017). It
    solves T'(e)^t slope = d/de (log N(e) - log|det T'(e)|), so that no inverse of T is evaluated.
    """
    if isinstance(bijection, Layers) and bijection.kind == "coupling":
        return bijection.path(e, score)
    arrays, rest = eqx.partition(bijection, eqx.is_inexact_array)
    frozen = eqx.combine(jax.lax.stop_gradient(arrays), rest)
    at = jax.lax.stop_gradient(e)
    slope = jax.grad(lambda v: -0.5 * jnp.sum(v**2) - transform(frozen, v)[1])(at)
    jacobian = jax.jacfwd(lambda v: transform(frozen, v)[0])(at)
    x, log_det = transform(bijection, e)
    return x, jnp.linalg.solve(jacobian.T, slope), log_det if score else jax.lax.stop_gradient(log_det)


def weights_of(bijection: Bijection) -> Array:
    """The weights that are trained, as one vector (p,)."""
    return ravel_pytree(trainable(bijection)[0])[0]


def with_weights(flow: Flow | Given, dimension: int, weights: Array) -> Bijection:
    """T with given weights (p,)."""
    # Built anew in every trace, since FlowJAX's layers close over arrays. What is not trained, such as permutations, is
    # that of a fixed key; what the weights replace is never computed.
    changing, rest = trainable(flow.build(jax.random.key(0), dimension))
    return eqx.combine(ravel_pytree(changing)[1](weights), rest)


class Transport(eqx.Module):
    """A trained map z = mean + root T(e), with what is needed to write it to a file and to build it again.

    Attributes:
        flow: the architecture.
        weights: of T, (p,).
        mean: (d,).
        root: any root (d, d) of a covariance, or standard deviations (d,).
    """

    flow: Flow | Given
    weights: Array
    mean: Array
    root: Array

    @property
    def dimension(self) -> int:
        """Length d of z."""
        return self.mean.shape[0]

    def bend(self, e: Array) -> tuple[Array, Array]:
        """z and log|det dz/de| at noise e (d,), the latter less log|det root|, which does not depend on e."""
        x, log_det = transform(with_weights(self.flow, self.dimension, self.weights), e)
        return affine(self.mean, self.root, x), log_det


def affine(mean: Array, root: Array, x: Array) -> Array:
    """mean + root x, for a matrix or a vector of standard deviations."""
    return mean + (root @ x if root.ndim == 2 else root * x)
