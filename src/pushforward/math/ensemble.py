"""One analysis of an ensemble: square-root, deterministic, serial and perturbed-observation Kalman updates.

An ensemble is an array (members N, ...). `whiten` turns predicted data, data and noise into whitened
anomalies Y (N, m) and an innovation d (m,); every scheme turns those into **weights** W (N, N) whose rows sum to
one, and ``analysis = W @ ensemble`` for any array of the members: the state, other quantities, earlier times
(which makes a filter the ensemble Kalman smoother). With ``S = Y / sqrt(N - 1)`` and ``M = (I + S S^T)^-1``
the Kalman update of the sample moments (denominator N - 1) is

    mean weights  w = M S d / sqrt(N - 1),        covariance  A^T M A / (N - 1),

A the anomalies of what is updated. Cost is O(N^2 m + N^3), or O(N m^2 + m^3 + N^2 m) where m < N: never m x m with
diagonal noise and m > N. All schemes keep the analysis in the span of the members.

Which one: `etkf` for small ensembles (follow it by a rotation: `etkf_rotated` does both, faster), `denkf` with
little inflation and N of the order of the unstable directions, `serial_ensrf` to follow papers that use it,
`perturbed` for strongly non-Gaussian forecasts and as N grows.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax.linalg import cholesky, triangular_solve

from pushforward._types import Array, Float, Key
from pushforward.math.ensemble_roots import (
    from_complement,
    inverse_factor,
    inverse_root,
    rows_from_complement,
    to_complement,
)
from pushforward.math.normals import normals


class Whitened(NamedTuple):
    """Predicted data and data in units of the noise; missing entries are zero columns, which change nothing.

    Attributes:
        anomalies: Y = R^-1/2 (predicted - mean), one row per member; columns of missing data are 0.
        innovation: d = R^-1/2 (data - mean of predicted), 0 where missing.
        count: number of data present.
        log_det: log det R over the data present.
    """

    anomalies: Float[Array, "members m"]
    innovation: Float[Array, "m"]
    count: Float[Array, ""]
    log_det: Float[Array, ""]


def whiten(predicted: Float[Array, "members m"], data: Float[Array, "m"], noise: Array) -> Whitened:
    """Anomalies and innovation in units of the noise, R^-1/2 the inverse Cholesky factor where R is dense.

    Missing data drop out exactly: their columns are set to zero and their rows and columns of R to the identity's.

    Args:
        predicted: predicted data of each member, without noise, (N, m).
        data: data, (m,); NaN says missing, decided by value.
        noise: variances (m,) (or one for all), or a covariance (m, m); entries of missing data are not used.
    """
    present = ~jnp.isnan(data)
    predicted = jnp.where(present, predicted, 0.0)
    mean = jnp.mean(predicted, 0)
    anomalies, innovation = predicted - mean, jnp.where(present, data, 0.0) - mean
    count = jnp.sum(present, dtype=predicted.dtype)
    if jnp.ndim(noise) < 2:
        variances = jnp.where(present, noise, 1.0)
        scale = jax.lax.rsqrt(variances)
        return Whitened(anomalies * scale, innovation * scale, count, jnp.sum(jnp.log(variances)))
    both = present[:, None] & present[None, :]
    covariance = jnp.where(both, noise, jnp.eye(len(data), dtype=predicted.dtype))
    factor = cholesky(covariance, symmetrize_input=False)
    rows = jnp.concatenate([anomalies, innovation[None]])
    rows = triangular_solve(factor, rows, left_side=False, lower=True, transpose_a=True)
    return Whitened(rows[:-1], rows[-1], count, 2.0 * jnp.sum(jnp.log(jnp.diagonal(factor))))


class Analysed(NamedTuple):
    """Weights of an analysis, and `log_likelihood` of its data, which shares the analysis' factorisation."""

    weights: Float[Array, "members members"]
    log_likelihood: Float[Array, ""]


class _Solved(NamedTuple):
    """M, log det M^-1, the mean's weights, and X -> X S^T M / sqrt(N - 1), the weights of whitened shifts X (N, m)."""

    inverse: Array
    log_det: Array
    mean: Array
    shifted: Callable[[Array], Array]


def _scaled(w: Whitened) -> tuple[Array, float]:
    root = math.sqrt(w.anomalies.shape[0] - 1)
    return w.anomalies / root, root


def _solve(w: Whitened) -> _Solved:
    """(I + S S^T)^-1 from the smaller of the N x N and m x m matrices, or datum by datum where that is cheaper."""
    members, m = w.anomalies.shape
    s, root = _scaled(w)
    if m < members:
        factor = inverse_factor(jnp.eye(m, dtype=s.dtype) + s.T @ s)
        half = factor @ s.T
        gain = factor.T @ (half / root)
        inverse = jnp.eye(members, dtype=s.dtype) - half.T @ half
        return _Solved(inverse, _log_det(factor), w.innovation @ gain, lambda x: x @ gain)
    if _column_by_column(members, m):
        inverse, log_det = _rank_one_inverse(s)
    else:
        factor = inverse_factor(jnp.eye(members, dtype=s.dtype) + s @ s.T)
        inverse, log_det = factor.T @ factor, _log_det(factor)
    return _Solved(inverse, log_det, inverse @ (s @ (w.innovation / root)), lambda x: (x @ (s.T / root)) @ inverse)


def _column_by_column(members: int, m: int) -> bool:
    """Measured on a CPU: half the time of the factorisation at N = m = 40, equal at N = 20 and at m = 2 N."""
    return 20 <= members <= 80 and m <= 2 * members


def _log_det(inverse_factor: Array) -> Array:
    return -2.0 * jnp.sum(jnp.log(jnp.diagonal(inverse_factor)))


def _rank_one_inverse(s: Float[Array, "members m"]) -> tuple[Float[Array, "members members"], Float[Array, ""]]:
    """(I + S S^T)^-1 by the formula of Sherman and Morrison, column by column, and log det(I + S S^T)."""

    def step(inverse, column):
        u = inverse @ column
        # Rounding must not turn a quadratic form that is all but zero negative.
        # Divided by the root on both sides, which XLA fuses into one loop: u (u / c) takes twice the time.
        scale = jax.lax.rsqrt(1.0 + jnp.maximum(column @ u, 0.0))
        u = u * scale
        return inverse - u[:, None] * u, scale

    inverse, scales = jax.lax.scan(step, jnp.eye(s.shape[0], dtype=s.dtype), s.T)
    return inverse, -2.0 * jnp.sum(jnp.log(scales))


def _evidence(w: Whitened, mean: Array, log_det: Array) -> Array:
    """`log_likelihood` from the mean's weights M S d / sqrt(N - 1) and log det(I + S S^T)."""
    s, root = _scaled(w)
    v = root * mean
    square = jnp.sum((w.innovation - v @ s) ** 2) + v @ v
    return -0.5 * (square + log_det + w.log_det + w.count * math.log(2.0 * math.pi))


def etkf(w: Whitened) -> Float[Array, "members members"]:
    """Weights of the ensemble transform Kalman filter with the symmetric square root.

    ``W = 1 w^T + (I + S S^T)^-1/2``: mean and covariance are exactly the Kalman update of the sample moments, and
    of all such transforms this one moves the members least (Bishop, Etherton and Majumdar 2001; Hunt, Kostelich
    and Szunyogh 2007, eqs. 20-24; Sakov and Oke 2008b on why the root must be symmetric).
    """
    members, m = w.anomalies.shape
    s, root = _scaled(w)
    unit = jnp.eye(members, dtype=s.dtype)
    if m >= members:
        inverse_half = inverse_root(unit + s @ s.T)
        mean = inverse_half @ (inverse_half @ (s @ (w.innovation / root)))
        return inverse_half + mean
    # With B = I + S^T S: (I + S S^T)^-1/2 = I - S (B + B^1/2)^-1 S^T.
    b = jnp.eye(m, dtype=s.dtype) + s.T @ s
    inverse_half = inverse_root(b)
    mean = s @ (inverse_half @ (inverse_half @ (w.innovation / root)))
    half = inverse_factor(b + b @ inverse_half) @ s.T
    return unit - half.T @ half + mean


def etkf_rotated(w: Whitened, key: Key) -> Float[Array, "members members"]:
    """Weights with the law of a Haar `rotation` after `etkf`, at the cost of one Cholesky factorisation.

    A Haar rotation makes all square roots equal in law, so the cheapest one serves.
    """
    return etkf_rotated_analysed(w, key).weights


def etkf_rotated_analysed(w: Whitened, key: Key) -> Analysed:
    """`etkf_rotated` with the data's log likelihood."""
    members, m = w.anomalies.shape
    s, root = _scaled(w)
    if _column_by_column(members, m):
        transform, mean, log_det = _serial(w)
        return Analysed(rotation(key, members) @ transform + mean, _evidence(w, mean, log_det))
    inner = to_complement(s)
    factor = inverse_factor(jnp.eye(members - 1, dtype=s.dtype) + inner @ inner.T)
    mean = rows_from_complement(factor.T @ (factor @ (inner @ (w.innovation / root))))
    weights = from_complement(_haar(key, members - 1, s.dtype) @ factor) + mean
    return Analysed(weights, _evidence(w, mean, _log_det(factor)))


def denkf(w: Whitened) -> Float[Array, "members members"]:
    """Weights of the deterministic EnKF: the mean with the Kalman gain K, the anomalies with K / 2.

    The analysis covariance is ``(I - K H) P + K H P H^T K^T / 4``, a little more than Kalman's, which works as
    inflation (Sakov and Oke 2008a, eqs. 11-15). ``W = 1 w^T + (I + M) / 2``.
    """
    return denkf_analysed(w).weights


def denkf_analysed(w: Whitened) -> Analysed:
    """`denkf` with the data's log likelihood."""
    solved = _solve(w)
    weights = 0.5 * (jnp.eye(len(solved.mean), dtype=solved.mean.dtype) + solved.inverse) + solved.mean
    return Analysed(weights, _evidence(w, solved.mean, solved.log_det))


def perturbed_by(w: Whitened, noise: Float[Array, "members m"]) -> Float[Array, "members members"]:
    """Weights of the EnKF in which member i sees the data plus ``R^1/2 noise[i]``.

    ``W = 1 w^T + M + E S^T M / sqrt(N - 1)``, E the noise. `perturbed` draws the noise; draw it beforehand to take the
    random numbers out of a loop.
    """
    return perturbed_by_analysed(w, noise).weights


def perturbed_by_analysed(w: Whitened, noise: Float[Array, "members m"]) -> Analysed:
    """`perturbed_by` with the data's log likelihood."""
    solved = _solve(w)
    weights = solved.inverse + solved.mean + solved.shifted(noise)
    return Analysed(weights, _evidence(w, solved.mean, solved.log_det))


def perturbed(w: Whitened, key: Key) -> Float[Array, "members members"]:
    """Weights of the EnKF with perturbed observations, their sample mean zero (Burgers, van Leeuwen and Evensen 1998).

    The mean is Kalman's exactly; the expectation of the sample covariance given the forecast is too.
    """
    return perturbed_by(w, centred_noise(w, key))


def perturbed_rescaled(w: Whitened, key: Key) -> Float[Array, "members members"]:
    """The same with perturbations times sqrt(N / (N - 1)), so that each has variance R, as DAPPER has them.

    The expected sample covariance is above Kalman's by ``K R K^T / (N - 1)``.
    """
    return perturbed_by(w, rescaled_noise(w, key))


def centred_noise(w: Whitened, key: Key) -> Float[Array, "members m"]:
    """Standard normal noise for each member and datum, less its mean over the members.

    Drawn in float32, half the time of float64: its rounding is nothing beside what the noise itself does.
    """
    # Without the barrier XLA draws the noise anew for each of its two uses.
    noise = jax.lax.optimization_barrier(normals(key, w.anomalies.shape, jnp.float32))
    noise = noise.astype(w.anomalies.dtype)
    return noise - jnp.mean(noise, 0)


def rescaled_noise(w: Whitened, key: Key) -> Float[Array, "members m"]:
    """`centred_noise` times sqrt(N / (N - 1)), so that each entry has variance 1."""
    members = w.anomalies.shape[0]
    return math.sqrt(members / (members - 1)) * centred_noise(w, key)


def serial_ensrf(w: Whitened) -> Float[Array, "members members"]:
    """Weights of the serial ensemble square-root filter: one (whitened) datum after another.

    With y the current predicted anomalies of one datum over sqrt(N - 1) and ``c = y^T y + 1``: the mean's weights
    move by ``T^T y (d - predicted) / (c sqrt(N - 1))``, the anomalies by ``-y y^T / (c + sqrt(c))`` (Whitaker and
    Hamill 2002, eqs. 8-13; Potter's scheme). Kalman's mean and covariance in any order of the data; the members
    themselves depend on the order.
    """
    transform, mean, _ = _serial(w)
    return transform + mean


def _serial(w: Whitened) -> tuple[Array, Array, Array]:
    """Transform and mean's weights of the serial scheme, and log det(I + S S^T)."""
    members = w.anomalies.shape[0]
    s, root = _scaled(w)

    def step(carry, datum):
        transform, mean = carry
        column, innovation = datum
        y = transform @ column
        c = 1.0 + y @ y
        row = y @ transform
        mean = mean + row * ((innovation - root * (mean @ column)) / (c * root))
        transform = transform - y[:, None] * (row / (c + jnp.sqrt(c)))
        return (transform, mean), c

    start = (jnp.eye(members, dtype=s.dtype), jnp.zeros(members, s.dtype))
    (transform, mean), terms = jax.lax.scan(step, start, (s.T, w.innovation))
    return transform, mean, jnp.sum(jnp.log(terms))


def log_likelihood(w: Whitened) -> Float[Array, ""]:
    """log N(data; mean of predicted, sample covariance of predicted + R), over the data present.

    ``-(|d - S^T v|^2 + |v|^2 + log det(I + S S^T) + log det R + count log 2 pi) / 2`` with ``v = M S d``, by the
    determinant lemma and Woodbury's identity, in a form without cancellation.
    """
    solved = _solve(w)
    return _evidence(w, solved.mean, solved.log_det)


def rotation(key: Key, members: int) -> Float[Array, "members members"]:
    """A random orthogonal matrix with Omega 1 = 1, Haar on the complement of 1; mean and covariance stay.

    Rotating each analysis keeps the members near Gaussian (Sakov and Oke 2008b; Evensen 2009).
    """
    return from_complement(_haar(key, members - 1, jnp.result_type(float)))


def _haar(key: Key, n: int, dtype) -> Array:
    """Haar orthogonal matrix: Q of a Gaussian matrix, R with a positive diagonal (Mezzadri 2007)."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (n, n), dtype))
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(dtype)
