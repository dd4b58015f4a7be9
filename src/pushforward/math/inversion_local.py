"""Localised updates of ensemble inversion: a gain for each pair of a parameter and a datum, times a taper.

Few members give every parameter a spurious correlation of size J^-1/2 with every datum, and many data add these up.
A localised update multiplies the gain of datum i on parameter l by ``taper[i, l]`` in [0, 1]: 0 where the pair has
nothing to do with each other. Members then leave the span of the ensemble, which is the other point of it.

An update is a sum of terms, each ``dz_l = right @ (taper[:, l] * (left.T @ a_l))`` with left and right (rows, m) and
a_l (J,) the anomalies of parameter l: with a taper of ones the sums are the updates of `inversion.py`. The cost is
O(J) for each pair: linear in the parameters and in the data. Blocks of parameters are taken one after another, so that
no array of parameters x data exists; `distance_blocks` finds the data that a block can see, the others cost nothing.

Source: Houtekamer and Mitchell 2001, doi:10.1175/1520-0493(2001)129<0123:ASEKFF>2.0.CO;2 (tapers of the gain);
Whitaker and Hamill 2002, doi:10.1175/1520-0493(2002)130<1913:EDAWPO>2.0.CO;2 (one gain for the mean, one for the
anomalies); Emerick 2016, doi:10.1016/j.petrol.2016.01.029 (ES-MDA with gains tapered).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._types import Array, Float, Int
from pushforward.math.ensemble import Whitened, whiten
from pushforward.math.ensemble_local import distances, localisation_taper


class Term(NamedTuple):
    """One gain: ``left.T @ a_l`` are the shifts of parameter l by unit data, `right` the data of each member.

    Attributes:
        left: (J, m).
        right: (J, m), or (1, m) where it is the same for all members.
    """

    left: Float[Array, "members m"]
    right: Float[Array, "rows m"]


def transform_terms(outputs: Float[Array, "members m"], data: Float[Array, "m"], h: Array | float) -> tuple[Term, ...]:
    """The terms of `inversion.transform`: Kalman's gain for the mean, the square root's for the anomalies.

    With ``S = Y / sqrt(J - 1)``, Y the anomalies of the outputs in units of the noise of the step,
    ``(I + S S^T)^-1/2 - I = -S S^T N``, ``N = (I + S S^T + (I + S S^T)^1/2)^-1``.
    """
    w, s, root = _step(outputs, data, h)
    values, vectors = jnp.linalg.eigh(s @ s.T)
    sd = jnp.sqrt(1.0 + jnp.maximum(values, 0.0))
    mean = (vectors / sd**2) @ (vectors.T @ s) / root
    spread = (vectors / (sd + sd**2)) @ (vectors.T @ s) / root
    return Term(mean, w.innovation[None]), Term(spread, -w.anomalies)


def perturbed_terms(
    outputs: Float[Array, "members m"], data: Float[Array, "m"], h: Array | float, noise: Float[Array, "members m"]
) -> tuple[Term, ...]:
    """The term of `inversion.perturbed`, whose arguments it takes."""
    w, s, root = _step(outputs, data, h)
    noise = jnp.where(jnp.isnan(data), 0.0, noise - jnp.mean(noise, 0))
    return (Term(_inverse(s) @ s / root, w.innovation - w.anomalies + noise),)


def unperturbed_terms(
    outputs: Float[Array, "members m"], data: Float[Array, "m"], h: Array | float
) -> tuple[Term, ...]:
    """The term of `inversion.unperturbed`, whose arguments it takes."""
    members = outputs.shape[0]
    w, s, root = _step(outputs, data, (members - 1) / members * h)
    return (Term(_inverse(s) @ s / root, w.innovation - w.anomalies),)


def _step(outputs: Array, data: Array, h: Array | float) -> tuple[Whitened, Array, float]:
    root = math.sqrt(outputs.shape[0] - 1)
    w = whiten(outputs, data, jnp.asarray(1.0 / h))
    return w, w.anomalies / root, root


def _inverse(s: Array) -> Array:
    factor = jnp.linalg.cholesky(jnp.eye(s.shape[0], dtype=s.dtype) + s @ s.T)
    return jax.scipy.linalg.cho_solve((factor, True), jnp.eye(s.shape[0], dtype=s.dtype))


class Blocks(NamedTuple):
    """Parameters in blocks, with the data that each block sees.

    Attributes:
        parameters: indices, (blocks, size), d where there is none.
        data: indices, (blocks, most), m where there is none.
        parameter_points: coordinates, (d, k).
        data_points: coordinates, (m, k); NaN for data that all parameters see.
        everywhere: which parameters see all data in full, (d,); None where there are none.
    """

    parameters: Int[Array, "blocks size"]
    data: Int[Array, "blocks most"]
    parameter_points: Float[Array, "d k"]
    data_points: Float[Array, "m k"]
    everywhere: Array | None


def distance_blocks(
    parameter_points: np.ndarray,
    data_points: np.ndarray,
    reach: float,
    *,
    periods: np.ndarray | None = None,
    size: int = 256,
) -> Blocks:
    """Blocks of parameters that lie together, each with the data within reach of its box; on the host.

    Args:
        parameter_points: (d, k); NaN for parameters that see all data.
        data_points: (m, k); NaN for data that all parameters see.
        reach: greatest distance at which a datum counts.
        periods: (k,), infinity: not periodic.
        size: parameters of a block at most.
    """
    placed = np.flatnonzero(~np.isnan(parameter_points).any(-1))
    leaves = _leaves(parameter_points, placed, size) if placed.size else []
    seen = [_within(parameter_points[leaf], data_points, reach, periods) for leaf in leaves]
    d, m = len(parameter_points), len(data_points)
    return Blocks(
        jnp.asarray(_padded(leaves, d)),
        jnp.asarray(_padded(seen, m)),
        jnp.asarray(parameter_points),
        jnp.asarray(data_points),
        None if len(placed) == d else jnp.asarray(np.isnan(parameter_points).any(-1)),
    )


def _leaves(points: np.ndarray, indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Halves along the longest side, until no part has more than `size` points."""
    parts, pending = [], [indices]
    while pending:
        part = pending.pop()
        if len(part) <= size:
            parts.append(np.sort(part))
            continue
        axis = int(np.argmax(np.ptp(points[part], axis=0)))
        order = part[np.argpartition(points[part, axis], len(part) // 2)]
        pending += [order[: len(part) // 2], order[len(part) // 2 :]]
    return parts


def _within(points: np.ndarray, data: np.ndarray, reach: float, periods: np.ndarray | None) -> np.ndarray:
    """Data that some point of the box around the points may see."""
    low, high = points.min(0), points.max(0)
    shift = np.abs(data - 0.5 * (low + high))
    if periods is not None:
        finite = np.isfinite(periods)
        length = np.where(finite, periods, 1.0)
        turned = np.mod(shift, length)
        shift = np.where(finite, np.minimum(turned, length - turned), shift)
    outside = np.maximum(shift - 0.5 * (high - low), 0.0)
    # NaN, a datum without a place, is seen by all.
    return np.flatnonzero(~((outside**2).sum(-1) > reach**2))


def _padded(rows: list[np.ndarray], missing: int) -> np.ndarray:
    width = max((len(row) for row in rows), default=0)
    full = np.full((len(rows), max(width, 1)), missing)
    for i, row in enumerate(rows):
        full[i, : len(row)] = row
    return full


def by_distance(
    members: Float[Array, "members d"],
    terms: tuple[Term, ...],
    blocks: Blocks,
    radius: Array | float,
    periods: Float[Array, "k"] | None = None,
) -> Float[Array, "members d"]:
    """All members after an update with the taper of Gaspari and Cohn in the distance of parameter and datum.

    Args:
        members: (J, d).
        terms: of the update.
        blocks: from `distance_blocks`, with reach 2 `HALF_SUPPORT` radius.
        radius: as in `localisation_taper`.
        periods: (k,), infinity: not periodic.
    """

    def shift(a: Array, rows: Array, columns: Array) -> Array:
        parts = [Term(*(jnp.take(x, rows, 1, mode="fill", fill_value=0.0) for x in t)) for t in terms]
        to = jnp.take(blocks.parameter_points, columns, 0, mode="fill", fill_value=0.0)
        of = jnp.take(blocks.data_points, rows, 0, mode="fill", fill_value=0.0)
        far = distances(jnp.where(jnp.isnan(of), 0.0, of), to, periods=periods)
        taper = jnp.where(jnp.isnan(of).any(-1)[:, None], 1.0, localisation_taper(far, radius))
        return _shift(a, parts, taper.astype(a.dtype))

    moved = _block_by_block(members, blocks.parameters, shift, blocks.data)
    if blocks.everywhere is None:
        return moved
    weights = sum(t.right @ t.left.T for t in terms)
    return jnp.where(blocks.everywhere, members + weights @ (members - jnp.mean(members, 0)), moved)


def by_correlation(
    members: Float[Array, "members d"],
    outputs: Float[Array, "members m"],
    terms: tuple[Term, ...],
    count: Array | float,
    significance: float,
    *,
    size: int = 256,
) -> Float[Array, "members d"]:
    """All members after an update with `significance_taper` of the correlations of parameters and outputs.

    Args:
        members: (J, d).
        outputs: (J, m).
        terms: of the update.
        count: members that the correlations come from (those that did not fail).
        significance: standard errors at which a correlation begins to count.
        size: parameters taken at a time.
    """
    known = _unit(outputs - jnp.mean(outputs, 0))
    d = members.shape[1]
    columns = jnp.arange(-(-d // size) * size).reshape(-1, size)

    def shift(a: Array, *_: Array) -> Array:
        return _shift(a, list(terms), significance_taper(known.T @ _unit(a), count, significance))

    return _block_by_block(members, jnp.minimum(columns, d), shift, columns)


def _block_by_block(
    members: Array, parameters: Array, shift: Callable[[Array, Array, Array], Array], rows: Array
) -> Array:
    """Members with the shifts of each block of parameters added, in place where XLA can.

    Args:
        members: (J, d).
        parameters: indices of each block, (blocks, size), d where there is none.
        shift: (anomalies of the block, its row of `rows`, its indices) -> shifts.
        rows: what else a block is told, one row each.
    """

    def step(members: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        columns, told = given
        a = jnp.take(members, columns, 1, mode="fill", fill_value=0.0)
        return members.at[:, columns].add(shift(a - jnp.mean(a, 0), told, columns), mode="drop"), None

    return jax.lax.scan(step, members, (parameters, rows))[0]


def significance_taper(
    correlations: Float[Array, "*shape"], count: Array | float, significance: float
) -> Float[Array, "*shape"]:
    """``max(0, 1 - (c / t)^2)``, ``t^2 = (J - 2) r^2 / (1 - r^2)`` the squared t statistic of a correlation r.

    With c = 1 the factor is ``(r^2 - its mean by chance) / r^2`` up to O(1 / J), the shrinkage of James and Stein; with
    c = 3 some three of a thousand spurious correlations are left, shrunk (the threshold of Luo and Bhakta 2020,
    doi:10.1016/j.petrol.2019.106559). The form is the non-negative garrote (Breiman 1995,
    doi:10.1080/00401706.1995.10484371).
    """
    square = jnp.minimum(correlations**2, 1.0)
    known = jnp.maximum(count - 2.0, 0.0) * square
    return jnp.maximum(0.0, 1.0 - significance**2 * (1.0 - square) / jnp.maximum(known, jnp.finfo(square.dtype).tiny))


def _unit(anomalies: Array) -> Array:
    length = jnp.linalg.norm(anomalies, axis=0)
    return anomalies / jnp.where(length > 0, length, 1.0)


def _shift(a: Array, terms: list[Term], taper: Array) -> Array:
    """(J, block) from anomalies (J, block) and taper (data, block)."""
    return sum((t.right @ (taper * (t.left.T @ a)) for t in terms), jnp.zeros_like(a))
