"""Ensemble filters for Lorenz-96 as a user of JAX would write them: one `lax.scan` per method, nothing else.

The yardstick of `benchmarks.state_space`: equations of the papers, batched linear algebra, random numbers drawn in the
loop, mean and standard deviation of each analysis returned. No tricks, and no dependence on the library.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

SIZE, FORCING, INTERVAL = 40, 8.0, 0.05


def derivative(x: jax.Array) -> jax.Array:
    return (jnp.roll(x, -1, -1) - jnp.roll(x, 2, -1)) * jnp.roll(x, 1, -1) - x + FORCING


def forecast(x: jax.Array) -> jax.Array:
    """One Runge-Kutta step of order 4 for all members."""
    k1 = derivative(x)
    k2 = derivative(x + 0.5 * INTERVAL * k1)
    k3 = derivative(x + 0.5 * INTERVAL * k2)
    k4 = derivative(x + INTERVAL * k3)
    return x + INTERVAL / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def denkf(E: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    mean, A = _split(E)
    less = len(E) - 1
    P = A.T @ A / less
    gain = jax.scipy.linalg.solve(P + jnp.eye(SIZE), P, assume_a="pos").T
    return mean + gain @ (y - mean) + A - 0.5 * A @ gain.T


def perturbed(E: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    _, A = _split(E)
    members = len(E)
    P = A.T @ A / (members - 1)
    gain = jax.scipy.linalg.solve(P + jnp.eye(SIZE), P, assume_a="pos").T
    noise = jax.random.normal(key, E.shape)
    noise = (noise - jnp.mean(noise, 0)) * jnp.sqrt(members / (members - 1))
    return E + (y + noise - E) @ gain.T


def etkf(E: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    mean, A = _split(E)
    less = len(E) - 1
    values, vectors = jnp.linalg.eigh(A @ A.T + less * jnp.eye(len(E)))
    weights = vectors @ ((vectors.T @ (A @ (y - mean))) / values)
    transform = (vectors * jnp.sqrt(less / values)) @ vectors.T
    return mean + weights @ A + _rotation(key, len(E)) @ (transform @ A)


def local(radius: float) -> Callable:
    """The LETKF with symmetric roots, one eigenvalue problem per variable."""

    def letkf(E: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        apart = jnp.abs(jnp.arange(SIZE)[:, None] - jnp.arange(SIZE))
        taper = _gaspari_cohn(jnp.minimum(apart, SIZE - apart) / (1.82 * radius))
        mean, A = _split(E)
        less = len(E) - 1

        def at(a: jax.Array, centre: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
            tapered = A * factor
            values, vectors = jnp.linalg.eigh(tapered @ A.T + less * jnp.eye(len(E)))
            weights = vectors @ ((vectors.T @ (tapered @ (y - mean))) / values)
            transform = (vectors * jnp.sqrt(less / values)) @ vectors.T
            return centre + weights @ a, transform @ a

        centre, anomalies = jax.vmap(at, in_axes=(1, 0, 0), out_axes=(0, 1))(A, mean, taper)
        return centre + _rotation(key, len(E)) @ anomalies

    return letkf


def _gaspari_cohn(r: jax.Array) -> jax.Array:
    near = 1 - 5 / 3 * r**2 + 5 / 8 * r**3 + 1 / 2 * r**4 - 1 / 4 * r**5
    s = jnp.clip(r, 1.0, 2.0)
    far = 4 - 5 * s + 5 / 3 * s**2 + 5 / 8 * s**3 - 1 / 2 * s**4 + 1 / 12 * s**5 - 2 / (3 * s)
    return jnp.where(r < 1, near, jnp.where(r < 2, far, 0.0))


def _split(E: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = jnp.mean(E, 0)
    return mean, E - mean


def _rotation(key: jax.Array, members: int) -> jax.Array:
    """A random rotation that keeps the mean: Haar on the complement of the vector of ones."""
    basis, _ = jnp.linalg.qr(jnp.concatenate([jnp.ones((members, 1)), jnp.eye(members)[:, 1:]], 1))
    q, r = jnp.linalg.qr(jax.random.normal(key, (members - 1, members - 1)))
    inner = q * jnp.sign(jnp.diagonal(r))
    return basis @ jax.scipy.linalg.block_diag(jnp.ones((1, 1)), inner) @ basis.T


def run(analysis: Callable, members: int, inflation: float) -> Callable:
    """A jitted filter: data (T, 40) and a key -> means and standard deviations of the analyses, (T, 40) each."""

    @jax.jit
    def filtered(data: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, later = jax.random.split(key)
        start = jnp.eye(1, SIZE) + 0.001**0.5 * jax.random.normal(first, (members, SIZE))

        def cycle(E: jax.Array, item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            y, key = item
            E = analysis(forecast(E), y, key)
            mean, A = _split(E)
            E = mean + inflation * A
            return E, (mean, jnp.std(E, 0, ddof=1))

        return jax.lax.scan(cycle, start, (data, jax.random.split(later, len(data))))[1]

    return filtered


METHODS = {
    "denkf": run(denkf, 40, 1.01),
    "perturbed": run(perturbed, 40, 1.06),
    "etkf": run(etkf, 24, 1.02),
    "letkf": run(local(4.0), 7, 1.04),
}
