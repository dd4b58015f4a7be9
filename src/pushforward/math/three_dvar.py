"""3DVar: analysis with a background covariance that does not move, and with a gain that is not the optimal one.

With a forecast N(m, C), data y = H x + v, v ~ N(0, R), the analysis is m + K (y - H m). A missing datum is a zero row
of H and a zero column of K, with variance 1 in its place.

References: Lorenc (1986), Q. J. R. Meteorol. Soc. 112, doi:10.1002/qj.49711247414; the objective, Campbell, Shi,
Rainforth and Doucet (2021), "Online variational filtering and parameter learning", arXiv:2110.13549; learned gains,
Bach, Baptista, Sanz-Alonso and Stuart (2024), "Inverse problems and data assimilation: a machine learning approach",
arXiv:2410.10523.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

from pushforward.math.kalman import LOG_2PI, dense
from pushforward.math.small_matrices import symmetric


class BackgroundGain(NamedTuple):
    """The gain K (n, m) of a background covariance, and log det (H B H' + R)."""

    gain: Float[Array, "n m"]
    log_determinant: Float[Array, ""]


def present_noise(R: Array, present: Float[Array, " m"]) -> Float[Array, "m m"]:
    """The covariance of the data's noise with variance 1, and no correlation, for what is missing."""
    return present[:, None] * dense(R) * present + jnp.diag(1.0 - present)


def background_gain(
    B: Float[Array, "n n"], H: Float[Array, "m n"], R: Array, present: Float[Array, " m"]
) -> BackgroundGain:
    """K = B H' (H B H' + R)^-1, by the smaller of two matrices.

    With fewer states than data it is (I + B H' R^-1 H)^-1 B H' R^-1, which needs no inverse of B.

    Args:
        B: background covariance, may be singular.
        H: slopes of the data's mean.
        R: covariance of the data's noise, or its variances.
        present: 1 for data, 0 for missing ones.
    """
    m, n = H.shape
    H, R = present[:, None] * H, present_noise(R, present)
    cross = B @ H.T
    if m <= n:
        factor = jnp.linalg.cholesky(H @ cross + R)
        gain = cho_solve((factor, True), cross.T).T
        return BackgroundGain(gain * present, 2 * jnp.sum(jnp.log(jnp.diagonal(factor))))
    factor = jnp.linalg.cholesky(R)
    scaled = cho_solve((factor, True), H).T
    inner = jnp.eye(n, dtype=B.dtype) + B @ (scaled @ H)
    gain = jnp.linalg.solve(inner, B @ scaled)
    log_root = jnp.sum(jnp.log(jnp.diagonal(factor)))
    return BackgroundGain(gain * present, 2 * log_root + jnp.linalg.slogdet(inner)[1])


def innovation_log_density(
    innovation: Float[Array, " m"],
    found: BackgroundGain,
    H: Float[Array, "m n"],
    R: Array,
    present: Float[Array, " m"],
) -> Float[Array, ""]:
    """log N(d; 0, H B H' + R) of the data that are present, with S^-1 d = R^-1 (d - H K d)."""
    rest = innovation - present * (H @ (found.gain @ innovation))
    square = innovation @ jnp.linalg.solve(present_noise(R, present), rest)
    return -0.5 * (square + found.log_determinant + LOG_2PI * jnp.sum(present))


def joseph(
    C: Float[Array, "n n"], K: Float[Array, "n m"], H: Float[Array, "m n"], R: Float[Array, "m m"]
) -> Float[Array, "n n"]:
    """Covariance of the analysis by any gain: (I - K H) C (I - K H)' + K R K'."""
    left = jnp.eye(C.shape[0], dtype=C.dtype) - K @ H
    return symmetric(left @ C @ left.T + K @ R @ K.T)


def variational_increment(
    forecast: tuple[Float[Array, " n"], Float[Array, "n n"]],
    analysis: tuple[Float[Array, " n"], Float[Array, "n n"]],
    residual: Float[Array, " m"],
    H: Float[Array, "m n"],
    R: Array,
    present: Float[Array, " m"],
) -> Float[Array, ""]:
    """KL(q, forecast) - E_q log N(y; H x, R) of Gaussians, in closed form.

    With Kalman gains its sum over steps is -log p(y_1..y_T); any other gain is worse in expectation.

    Args:
        forecast: mean and covariance, positive definite.
        analysis: those of q.
        residual: y - h(mean of q), 0 where missing.
        H: slopes of the data's mean.
        R: covariance of the noise, or its variances.
        present: 1 for data, 0 for missing ones.
    """
    (m, C), (a, P) = forecast, analysis
    roots = jnp.linalg.cholesky(C), jnp.linalg.cholesky(P)
    white = solve_triangular(roots[0], jnp.concatenate([roots[1], (a - m)[:, None]], 1), lower=True)
    log_ratio = jnp.sum(jnp.log(jnp.diagonal(roots[0]))) - jnp.sum(jnp.log(jnp.diagonal(roots[1])))
    divergence = 0.5 * (jnp.sum(white**2) - m.shape[0]) + log_ratio
    noise = jnp.linalg.cholesky(present_noise(R, present))
    spread = jnp.concatenate([(present[:, None] * H) @ roots[1], residual[:, None]], 1)
    misfit = jnp.sum(solve_triangular(noise, spread, lower=True) ** 2)
    log_root = jnp.sum(jnp.log(jnp.diagonal(noise)))
    return divergence + 0.5 * (misfit + LOG_2PI * jnp.sum(present)) + log_root


def analysis_by_operator(
    background: Callable[[Array], Array],
    push: Callable[[Array], Array],
    pull: Callable[[Array], Array],
    R: Array,
    innovation: Float[Array, " m"],
    present: Float[Array, " m"],
    tolerance: float,
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """B H' S^-1 d without a matrix of the state's size, S = H B H' + R, by conjugate gradients on the whitened data.

    Solves (I + R^-1/2 H B H' R^-1/2) u = R^-1/2 d; at most as many iterations as eigenvalues of H B H' above R matter.

    Args:
        background: v -> B v.
        push: x -> H x.
        pull: w -> H' w.
        R: covariance of the noise, or its variances.
        innovation: d, 0 where missing.
        present: 1 for data, 0 for missing ones.
        tolerance: of the relative residual.

    Returns:
        The increment, and d' S^-1 d.
    """
    if R.ndim == 1:
        root = jnp.sqrt(jnp.where(present > 0, R, 1.0))

        def down(v: Array) -> Array:
            return present * v / root

        across = down
    else:
        factor = jnp.linalg.cholesky(present_noise(R, present))

        def down(v: Array) -> Array:
            return solve_triangular(factor, present * v, lower=True)

        def across(v: Array) -> Array:
            return present * solve_triangular(factor, v, lower=True, trans=1)

    white = down(innovation)
    solved, _ = cg(lambda u: u + down(push(background(pull(across(u))))), white, tol=tolerance)
    return background(pull(across(solved))), white @ solved
