"""What log importance weights say about an approximation."""

import numpy as np

from pushforward._types import Array


def evidence_summary(log_weights: Array) -> dict[str, float]:
    """ELBO and importance-weighted evidence from replicates of log p(x, y) - log q(x).

    Args:
        log_weights: shape (replicate, draw); replicates are independent.
    """
    weights = np.asarray(log_weights, float)
    root = np.sqrt(weights.shape[0])
    with np.errstate(all="ignore"):
        elbo = weights.mean(1)
        elbo_se = elbo.std(ddof=1) / root
        evidence = weights.max() + np.log(np.mean(np.exp(weights - weights.max())))
        relative = np.exp(weights - evidence).mean(1)
    return {
        "elbo": elbo.mean(),
        "elbo_se": elbo_se,
        "log_evidence": evidence,
        "log_evidence_se": relative.std(ddof=1) / root,
    }


def khat_warning(khat: float, remedy: str) -> list[str]:
    """A warning where Pareto k-hat is too large for the approximation to be trusted."""
    if khat <= 0.7:
        return []
    return [
        f"Pareto k-hat is {khat:.2f}, above 0.7: the approximation misses part of the posterior, and its "
        f"log_evidence is not to be trusted. {remedy}"
    ]
