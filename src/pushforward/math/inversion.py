"""Ensemble Kalman inversion in weights: transform, perturbed, unperturbed and Tikhonov updates, and the step.

An inverse problem `y = G(z) + noise` with prior z ~ N(0, I) is solved by moving an ensemble along
``prior * likelihood^t``, t the sum of the steps h. Everything is in units of the noise: outputs g (members, m) and
data y (m,) are whitened, so the noise is N(0, I) and a step h sees it with variance 1 / h. Schemes return weights W
(members, members), rows with sum one, and the new members are ``W @ members``, as in `ensemble.py`: cost
O(J^2 (d + m)), J the number of members, never d x d or m x m beyond J.

What each returns for linear G, P = G^T G the data's precision, C0 and Cpost the covariances of the prior and posterior:

=====================  =========================================================================================
`transform`            posterior of the ensemble's own moments at t = 1, exact for any J >= 2 and any steps
`perturbed`            posterior at t = 1 as J grows, error J^-1/2; more steps shrink the spread of small ensembles
`unperturbed`          an optimiser: C(t)^-1 = C0^-1 + 2 t P, misfit beyond the least O(1 / t); no posterior at t = 1
`tikhonov`             the MAP as t grows: C(t)^-1 = C(0)^-1 + t Cpost^-1, mean error O(1 / t)
`tikhonov_unperturbed` the MAP as t grows: C(t)^-1 = C(0)^-1 + 2 t Cpost^-1, mean error O(t^-1/2)
=====================  =========================================================================================

All keep every member in mean + span of the anomalies, for any G. NaN in the data says missing.
"""

import jax.numpy as jnp

from pushforward._types import Array, Bool, Float
from pushforward.math.ensemble import etkf, perturbed_by, whiten


def misfit(outputs: Float[Array, "members m"], data: Float[Array, "m"]) -> Float[Array, "members"]:
    """Phi_j = |y - G(z_j)|^2 / 2 over the data present, outputs and data whitened; minus the log likelihood of z_j."""
    return 0.5 * jnp.sum(jnp.where(jnp.isnan(data), 0.0, data - outputs) ** 2, -1)


def adaptive_step(
    misfits: Float[Array, "members"],
    m: Array | float,
    remaining: Array | float,
    *,
    present: Bool[Array, "members"] | None = None,
) -> Float[Array, ""]:
    """The step of the data misfit controller: as long as the tempered laws before and after are close.

    ``h = min(max(m / (2 mean Phi), sqrt(m / (2 var Phi))), remaining)``, var with J - 1. About four steps on easy
    problems; a step is long where the members agree on the misfit or fit the data.

    Args:
        misfits: Phi_j as `misfit` gives them.
        m: number of data present.
        remaining: 1 less the steps made.
        present: which members count; the misfits of the others are not used and may be NaN. All by default.

    Source: Iglesias and Yang 2021, "Adaptive regularisation for ensemble Kalman inversion", Inverse Problems 37,
    doi:10.1088/1361-6420/abd29b.
    """
    counted = jnp.ones(misfits.shape, bool) if present is None else present
    count = jnp.sum(counted, dtype=misfits.dtype)
    mean = jnp.sum(jnp.where(counted, misfits, 0.0)) / jnp.maximum(count, 1.0)
    # In units of the mean, so that the squares of huge misfits do not overflow.
    unit = jnp.where(mean > 0, mean, 1.0)
    relative = jnp.where(counted, misfits / unit - mean / unit, 0.0)
    spread = jnp.sqrt(jnp.sum(relative**2) / jnp.maximum(count - 1.0, 1.0))
    by_mean = jnp.where(mean > 0, 0.5 * m / unit, jnp.inf)
    by_spread = jnp.where(spread > 0, jnp.sqrt(0.5 * m) / (unit * jnp.where(spread > 0, spread, 1.0)), jnp.inf)
    return jnp.minimum(jnp.maximum(by_mean, by_spread), remaining)


def transform(
    outputs: Float[Array, "members m"], data: Float[Array, "m"], h: Array | float
) -> Float[Array, "members members"]:
    """Weights of one step with the symmetric square root: Kalman's update of the sample moments with noise I / h.

    ``W = 1 w^T + (I + S S^T)^-1/2``, S = sqrt(h / (J - 1)) times the anomalies of g, ``w = (I + S S^T)^-1 S sqrt(h)
    (y - mean g) / sqrt(J - 1)``. For linear G a sequence of steps with sum t has exactly the moments of
    ``prior * likelihood^t``, the prior being N(sample mean, sample covariance), denominator J - 1. The best default:
    no noise of its own, and the square root that moves the members least.

    Source: Bishop, Etherton and Majumdar 2001; Hunt, Kostelich and Szunyogh 2007, eqs. 20-24.
    """
    return etkf(whiten(outputs, data, jnp.asarray(1.0 / h)))


def perturbed(
    outputs: Float[Array, "members m"], data: Float[Array, "m"], h: Array | float, noise: Float[Array, "members m"]
) -> Float[Array, "members members"]:
    """Weights of one step of ensemble Kalman inversion in which member j sees the data plus ``noise[j] / sqrt(h)``.

    ``z_j <- z_j + C^zg (C^gg + I / h)^-1 (y + noise_j / sqrt(h) - G(z_j))``, covariances with J - 1: the ensemble
    smoother with multiple data assimilation, h = 1 / alpha.

    Args:
        outputs: G of each member, whitened.
        data: whitened alike.
        h: step > 0.
        noise: standard normal numbers; their mean over the members is taken away, which leaves the mean of the
            update without noise and the expected sample covariance exactly Kalman's.

    Source: Iglesias, Law and Stuart 2013, doi:10.1088/0266-5611/29/4/045001; Emerick and Reynolds 2013,
    doi:10.1016/j.cageo.2012.03.011.
    """
    return perturbed_by(whiten(outputs, data, jnp.asarray(1.0 / h)), noise - jnp.mean(noise, 0))


def unperturbed(
    outputs: Float[Array, "members m"], data: Float[Array, "m"], h: Array | float
) -> Float[Array, "members members"]:
    """Weights of one step of ensemble Kalman inversion as an optimiser, every member seeing the same data.

    ``z_j <- z_j + C^zg (C^gg + I / h)^-1 (y - G(z_j))``, with covariances normalised by 1 / J as in the lectures
    and in Iglesias, Law and Stuart 2013. For linear G one step gives ``C^-1 + 2 h P + h^2 P C P``, so
    ``C(t)^-1 = C0^-1 + 2 t P`` as h -> 0: the members collapse and fit the data. Stop by the discrepancy, or take
    `tikhonov`; for a posterior take `transform`.

    Source: Iglesias, Law and Stuart 2013, doi:10.1088/0266-5611/29/4/045001; Schillings and Stuart 2017,
    doi:10.1137/16M105959X (the limit of small steps, and the collapse).
    """
    members, m = outputs.shape
    # A gain with covariances by 1 / J is one by 1 / (J - 1) with noise larger by J / (J - 1).
    w = whiten(outputs, data, jnp.asarray(members / (members - 1) / h))
    # One row of no noise serves all members.
    return perturbed_by(w, jnp.zeros((1, m), outputs.dtype))


def unperturbed_flow(outputs: Float[Array, "members m"], data: Float[Array, "m"]) -> Float[Array, "members members"]:
    """Weights V, rows with sum zero, of the flow that `unperturbed` follows: ``d members / dt = V @ members``.

    ``dz_j / dt = C^zg (y - G(z_j))`` with covariances by 1 / J, that is ``V_jk = <y - g_j, g_k - mean g> / J``. For
    linear G it descends each member's misfit, preconditioned by C, and ``C(t)^-1 = C0^-1 + 2 t P``. V is minus
    the matrix D of the ensemble Kalman sampler.

    Source: Schillings and Stuart 2017, doi:10.1137/16M105959X.
    """
    w = whiten(outputs, data, jnp.asarray(1.0))
    return (w.innovation - w.anomalies) @ w.anomalies.T / outputs.shape[0]


def with_prior(
    members: Float[Array, "members d"], outputs: Float[Array, "members m"], data: Float[Array, "m"]
) -> tuple[Float[Array, "members n"], Float[Array, "n"]]:
    """Outputs and data with the prior N(0, I) as d further data 0 of outputs z, n = m + d."""
    zeros = jnp.zeros(members.shape[1], data.dtype)
    return jnp.concatenate([outputs, members], 1), jnp.concatenate([data, zeros])


def tikhonov(
    members: Float[Array, "members d"], outputs: Float[Array, "members m"], data: Float[Array, "m"], h: Array | float
) -> Float[Array, "members d"]:
    """New members after one step of Tikhonov ensemble Kalman inversion: `transform` with the prior as extra data.

    For linear G and t the sum of the steps, ``C(t)^-1 = C(0)^-1 + t Cpost^-1`` and
    ``mean - MAP = C(t) C(0)^-1 (mean(0) - MAP)`` = O(1 / t) from any start, in the span of the members. An
    optimiser of ``Phi(z) + |z|^2 / 2``: the spread that is left says nothing of the posterior.

    Source: Chada, Stuart and Tong 2020, "Tikhonov regularization within ensemble Kalman inversion",
    doi:10.1137/19M1242331, with the square root in place of perturbations.
    """
    return transform(*with_prior(members, outputs, data), h) @ members


def tikhonov_unperturbed(
    members: Float[Array, "members d"], outputs: Float[Array, "members m"], data: Float[Array, "m"], h: Array | float
) -> Float[Array, "members d"]:
    """New members after one step of `unperturbed` with the prior as extra data, the flow the paper analyses.

    For linear G and small steps ``C(t)^-1 = C(0)^-1 + 2 t Cpost^-1``, and each member's error falls as t^-1/2, its
    objective as 1 / t: slower than `tikhonov`, because the spread has collapsed before the mean arrives.

    Source: Chada, Stuart and Tong 2020, doi:10.1137/19M1242331.
    """
    return unperturbed(*with_prior(members, outputs, data), h) @ members
