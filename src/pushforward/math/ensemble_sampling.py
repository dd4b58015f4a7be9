"""Interacting Langevin diffusions of an ensemble, without derivatives: EKS and ALDI.

Members z_j follow ``dz_j = C (grad log posterior) dt + sqrt(2 C) dW`` with C their own covariance (by 1 / J) and the
gradient of the log likelihood times C replaced by ``C^zg (y - G(z_j))``, exact for linear G. Outputs and data are in
units of the noise, the prior is N(0, I). Preconditioned by C the speed does not depend on the problem: for linear G
and many members

    C(t)^-1 = P + (C(0)^-1 - P) e^-2t,       mean error e^-t once C is there,

P the posterior's precision. With J members the stationary law is known too. `eks_step`: J C_J ~ Wishart(J - d - 2,
Cpost), which needs J > 2 d + 1, and a member has covariance (J - d - 1) / J Cpost. `aldi_step`: every member is exactly
N(mpost, Cpost), for any J > d + 1. Both up to the bias of the time step, O(h): a factor of about 1 + h / 2 in C.

Cost O(J^2 (d + m) + J^3): where d >= J nothing of size d x d.
"""

import jax.numpy as jnp

from pushforward._types import Array, Float
from pushforward.math.ensemble_roots import inverse_factor
from pushforward.math.inversion import unperturbed_flow


def stable_step(outputs: Float[Array, "members m"], data: Float[Array, "m"], scale: Array | float) -> Float[Array, ""]:
    """Step of the samplers that keeps their explicit part stable: ``h = scale / (|D|_F + 1)``.

    ``D_jk = <g_k - mean g, g_j - y> / J``, so that h times the drift's matrix has norm below `scale`. At first short
    if the prior is far wider than the posterior, later about `scale` over the root of the number of informed
    directions, whatever their scales. The paper adds a tiny constant; with 1 the step without data is `scale`.

    Args:
        outputs: G of each member, whitened.
        data: whitened alike, NaN where missing.
        scale: below 1 / 2, from where the noise of a step is more than its drift takes away.

    Source: Garbuno-Inigo, Hoffmann, Li and Stuart 2020, section 4, doi:10.1137/19M1251655.
    """
    return scale / (jnp.linalg.norm(unperturbed_flow(outputs, data)) + 1.0)


def eks_step(
    members: Float[Array, "members d"],
    outputs: Float[Array, "members m"],
    data: Float[Array, "m"],
    h: Array | float,
    noise: Float[Array, "members numbers"],
    prior_slope: Float[Array, "members d"] | None = None,
) -> Float[Array, "members d"]:
    """One step of the ensemble Kalman sampler, the prior N(0, I) implicit.

    ``(I + h C) z*_j = z_j + h C^zg (y - g_j) + h C s_j``, then
    ``z_j <- z*_j + sqrt(2 h / J) sum_k noise_jk (z_k - mean z)``; covariances by 1 / J.

    Args:
        members: z.
        outputs: G of each member, whitened.
        data: whitened alike, NaN where missing.
        h: step, see `stable_step`.
        noise: standard normal numbers, (J, J), one for each pair of members, or (J, d), the same in law for d < J.
        prior_slope: s, gradient of what the log prior has beside log N(0, I), one row per member.

    Source: Garbuno-Inigo, Hoffmann, Li and Stuart 2020, "Interacting Langevin diffusions: gradient structure and
    ensemble Kalman sampler", doi:10.1137/19M1251655.
    """
    return _step(members, outputs, data, h, noise, prior_slope, 0.0)


def aldi_step(
    members: Float[Array, "members d"],
    outputs: Float[Array, "members m"],
    data: Float[Array, "m"],
    h: Array | float,
    noise: Float[Array, "members numbers"],
    prior_slope: Float[Array, "members d"] | None = None,
) -> Float[Array, "members d"]:
    """`eks_step` with the drift ``(d + 1) / J (z_j - mean z)``, the divergence of C, added.

    It makes the posterior invariant for every J > d + 1 where the gradient is exact, and stays affine invariant: with a
    prior transformed alike, members A z + b see steps A z + b, path by path with noise (J, J), else in law.

    Source: Garbuno-Inigo, Nüsken and Reich 2020, "Affine invariant interacting Langevin dynamics for Bayesian
    inference", doi:10.1137/19M1304891; Nüsken and Reich 2019, arXiv:1908.10890.
    """
    growth = (members.shape[1] + 1) / members.shape[0]
    return _step(members, outputs, data, h, noise, prior_slope, growth)


def _step(
    members: Array, outputs: Array, data: Array, h: Array | float, noise: Array, slope: Array | None, growth: float
) -> Array:
    count = members.shape[0]
    anomalies = members - jnp.mean(members, 0)
    drift = unperturbed_flow(outputs, data)
    if slope is not None:
        drift = drift + slope @ anomalies.T / count
    explicit = members + h * (drift @ anomalies + growth * anomalies)
    # A^T A = R^T R: d numbers for each member have the same law as J.
    root = anomalies if noise.shape[1] == count else jnp.linalg.qr(anomalies, mode="r")
    return _prior_solved(explicit, anomalies, h) + jnp.sqrt(2.0 * h / count) * (noise @ root)


def _prior_solved(rows: Array, anomalies: Array, h: Array | float) -> Array:
    """Rows times (I + h C)^-1, C = A^T A / J: by Woodbury's identity from J x J where d >= J."""
    count, d = anomalies.shape
    s = jnp.sqrt(h / count) * anomalies
    if d < count:
        factor = inverse_factor(jnp.eye(d, dtype=s.dtype) + s.T @ s)
        return (rows @ factor.T) @ factor
    half = inverse_factor(jnp.eye(count, dtype=s.dtype) + s @ s.T) @ s
    return rows - (rows @ half.T) @ half
