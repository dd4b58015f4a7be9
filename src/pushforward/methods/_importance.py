"""What log importance weights say about an approximation."""

import jax
import jax.numpy as jnp

from pushforward._types import Array


def evidence_summary(log_weights: Array) -> dict[str, Array]:
    """ELBO and importance-weighted evidence from replicates of log p(x, y) - log q(x).

    Args:
        log_weights: shape (replicate, draw); replicates are independent.
    """
    replicates = log_weights.shape[0]
    elbo = jnp.mean(log_weights, axis=1)
    evidence = jax.nn.logsumexp(log_weights) - jnp.log(log_weights.size)
    relative = jnp.mean(jnp.exp(log_weights - evidence), axis=1)
    root = jnp.sqrt(replicates)
    return {
        "elbo": jnp.mean(elbo),
        "elbo_se": jnp.std(elbo, ddof=1) / root,
        "log_evidence": evidence,
        "log_evidence_se": jnp.std(relative, ddof=1) / root,
    }


def khat_warning(khat: float, remedy: str) -> list[str]:
    """A warning where Pareto k-hat is too large for the approximation to be trusted."""
    if khat <= 0.7:
        return []
    return [
        f"Pareto k-hat is {khat:.2f}, above 0.7: the approximation misses part of the posterior, and its "
        f"log_evidence is not to be trusted. {remedy}"
    ]
