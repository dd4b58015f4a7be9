"""Linear-Gaussian series for `benchmarks.state_space`: a NumPyro program, and the same law in dynamax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

START_SD, NOISE_SD, STEP_SD = 1.0, 0.5, 0.3


def system(n: int, m: int, length: int) -> dict[str, np.ndarray]:
    """A rotation-like A of spectral radius 0.95, dense H, a covariate and data of the size of the model's."""
    rng = np.random.default_rng(0)
    A, _ = np.linalg.qr(rng.normal(size=(n, n)))
    H = rng.normal(size=(m, n)) / np.sqrt(n)
    turn = rng.normal(size=(n, n)) / np.sqrt(n)
    covariate = 0.05 * np.sin(np.arange(length) / 7.0)
    x, ys = rng.normal(size=n), []
    for _ in range(length):
        x = 0.95 * A @ x + STEP_SD * rng.normal(size=n)
        ys.append(H @ x + NOISE_SD * rng.normal(size=m))
    return {"A": A, "H": H, "turn": turn, "covariate": covariate, "y": np.asarray(ys)}


def constant(A: Any, H: Any, y: Any, **_: Any) -> None:
    """The same step at all times; `rho` scales its matrix."""
    n = A.shape[0]
    rho = numpyro.sample("rho", dist.Uniform(0.0, 1.0))

    def step(x: Any, y: Any) -> tuple:
        x = numpyro.sample("x", dist.Normal(rho * A @ x, STEP_SD).to_event(1))
        numpyro.sample("y", dist.Normal(H @ x, NOISE_SD).to_event(1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(n), START_SD).to_event(1)), y)


def varying(A: Any, H: Any, turn: Any, covariate: Any, y: Any) -> None:
    """A covariate moves the matrix of each step."""
    n = A.shape[0]
    rho = numpyro.sample("rho", dist.Uniform(0.0, 1.0))

    def step(x: Any, now: Any) -> tuple:
        c, y = now
        x = numpyro.sample("x", dist.Normal(rho * (A + c * turn) @ x, STEP_SD).to_event(1))
        numpyro.sample("y", dist.Normal(H @ x, NOISE_SD).to_event(1), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(n), START_SD).to_event(1)), (covariate, y))


def dynamax_log_likelihood(rho: jax.Array, data: dict[str, jax.Array], *, time_varying: bool) -> jax.Array:
    """The same log likelihood; dynamax starts at the first datum, so its initial law is that of the first state."""
    from dynamax.linear_gaussian_ssm.inference import lgssm_filter, make_lgssm_params

    A, H, y = data["A"], data["H"], data["y"]
    n, m = A.shape[0], H.shape[0]
    steps = rho * (A + data["covariate"][:, None, None] * data["turn"]) if time_varying else rho * A
    first = steps[0] if time_varying else steps
    params = make_lgssm_params(
        jnp.zeros(n),
        START_SD**2 * first @ first.T + STEP_SD**2 * jnp.eye(n),
        steps,
        STEP_SD**2 * jnp.eye(n),
        H,
        NOISE_SD**2 * jnp.eye(m),
    )
    return lgssm_filter(params, y).marginal_loglik
