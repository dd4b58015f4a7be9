"""Standard normal noise for ensembles and particles, where drawing it is most of the work.

In float64 `jax.random.normal` inverts the error function, which on a CPU is a call to a scalar logarithm and three
polynomials for each number: over half the time of a bootstrap filter. The polynomials here are Taylor series on
intervals short enough for rounding error, which XLA turns into vector instructions.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pushforward._types import Array, Key

_BITS, _ONE = 52, 0x3FF0000000000000
"""Explicit bits of a float64's fraction, and the bits of 1.0."""


def normals(key: Key, shape: tuple[int, ...], dtype: DTypeLike = float) -> Array:
    """Independent N(0, 1) numbers.

    In float64 by the transform of Box and Muller (1958, doi:10.1214/aoms/1177706645): with U and V uniform,
    sqrt(-2 log(1 - U)) times cos(2 pi V) and times sin(2 pi V) are independent and normal. Uniform numbers of 52 bits
    end the tails at 8.5. In float32 by `jax.random.normal`.

    Args:
        key: typed JAX key.
        shape: of the result.
        dtype: floating; `float` is JAX's default.

    Returns:
        An array of the shape.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.float64:
        return jax.random.normal(key, shape, dtype)
    size = math.prod(shape)
    if size == 0:
        return jnp.zeros(shape)
    # Without the barriers XLA draws the bits, and evaluates the logarithm, anew for each of their uses.
    first, second = lax.optimization_barrier(tuple(jax.random.bits(key, (2, (size + 1) // 2), jnp.uint64)))
    pair = lax.optimization_barrier(gaussian_pair(first, second))
    return jnp.reshape(jnp.concatenate(pair)[:size], shape)


def gaussian_pair(first: Array, second: Array) -> tuple[Array, Array]:
    """Two independent N(0, 1) numbers from twice 64 random bits (uint64 arrays of one shape)."""
    radius = jnp.sqrt(-2.0 * log_of_normal_float(1.0 - _fraction(first)))
    # A uniform angle is one of a quarter circle about the first axis, turned by a sign and an exchange of the axes.
    c, s = cos_sin((_fraction(second) - 0.5) * (math.pi / 2))
    c = jnp.where((second & 1) == 1, -c, c) * radius
    s, exchanged = s * radius, (second & 2) == 2
    return jnp.where(exchanged, s, c), jnp.where(exchanged, c, s)


def log_of_normal_float(x: Array) -> Array:
    """log x for positive float64 numbers that are not subnormal, to rounding error.

    x = 2^e m with m between sqrt(1/2) and sqrt(2), and log m = 2 artanh s with s = (m - 1) / (m + 1), |s| < 0.172.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint64)
    m = lax.bitcast_convert_type((bits & ((1 << _BITS) - 1)) | _ONE, jnp.float64)
    e = (bits >> _BITS).astype(jnp.int32) - 1023
    large = m > math.sqrt(2)
    m, e = jnp.where(large, 0.5 * m, m), jnp.where(large, e + 1, e)
    s = (m - 1.0) / (m + 1.0)
    series = _polynomial(s * s, [1 / (2 * k + 1) for k in range(11)])
    return e.astype(jnp.float64) * math.log(2) + 2.0 * s * series


def cos_sin(angle: Array) -> tuple[Array, Array]:
    """Cosine and sine of angles between -pi/4 and pi/4, float64, to rounding error."""
    square = angle * angle
    c = _polynomial(square, [(-1) ** k / math.factorial(2 * k) for k in range(9)])
    s = _polynomial(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)])
    return c, angle * s


def _fraction(bits: Array) -> Array:
    """A uniform number in [0, 1) from the upper 52 bits."""
    return lax.bitcast_convert_type((bits >> (64 - _BITS)) | _ONE, jnp.float64) - 1.0


def _polynomial(x: Array, coefficients: list[float]) -> Array:
    """Horner's scheme, constant coefficient first."""
    value = jnp.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value
