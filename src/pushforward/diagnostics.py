"""Diagnostics of chains and of proposals, by arviz-stats."""

from typing import Any

import numpy as np


def pareto_khat(log_weights: np.ndarray) -> float:
    """Pareto shape of the tail of importance weights (Vehtari, Simpson, Gelman, Yao, Gabry 2024).

    Args:
        log_weights: log p - log q of draws of q, any shape.

    Returns:
        k-hat; below 0.7 the weights can be trusted. Infinite where a weight is not finite, negative
        infinity where all are equal (q is exactly the posterior).
    """
    from arviz_stats.base import array_stats

    flat = np.asarray(log_weights, float).ravel()
    if not np.isfinite(flat).all():
        return float("inf")
    if np.ptp(flat) < 1e-3:
        return float("-inf")
    # psislw takes minus the log ratio, as for leave-one-out weights.
    return float(array_stats.psislw(-flat)[1])


def worst_convergence(posterior: Any) -> dict[str, Any]:
    """Largest split R-hat and least effective sample size over all elements of a posterior.

    Rank-normalised as in Vehtari, Gelman, Simpson, Carpenter, Burkner (2021); the effective sample size
    is the smaller of bulk and tail. Constant elements are left out.

    Args:
        posterior: dataset with dims (chain, draw, ...).

    Returns:
        ``rhat_max``, ``rhat_variable``, ``ess_min``, ``ess_variable``.
    """
    from arviz_stats.base import array_stats

    worst = {"rhat_max": 1.0, "rhat_variable": "", "ess_min": float("inf"), "ess_variable": ""}
    for name, variable in posterior.data_vars.items():
        array = variable.transpose("chain", "draw", ...).to_numpy()
        array = array.reshape(*array.shape[:2], -1)
        moving = np.ptp(array, axis=(0, 1)) > 0
        if array.shape[1] < 4 or not moving.any() or not np.isfinite(array).all():
            continue
        array = array[..., moving].astype(float)
        # Chains that stand still at different places have an R-hat of infinity.
        with np.errstate(divide="ignore", invalid="ignore"):
            rhat = np.atleast_1d(array_stats.rhat(array, chain_axis=0, draw_axis=1))
            bulk = np.atleast_1d(array_stats.ess(array, chain_axis=0, draw_axis=1, method="bulk"))
            tail = np.atleast_1d(array_stats.ess(array, chain_axis=0, draw_axis=1, method="tail", prob=(0.05, 0.95)))
        ess = np.fmin(bulk, tail)
        if not np.isnan(rhat).all() and np.nanmax(rhat) > worst["rhat_max"]:
            worst |= {"rhat_max": float(np.nanmax(rhat)), "rhat_variable": name}
        if np.isfinite(ess).any() and np.nanmin(ess) < worst["ess_min"]:
            worst |= {"ess_min": float(np.nanmin(ess)), "ess_variable": name}
    return worst
