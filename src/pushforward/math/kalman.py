r"""Kalman filter, disturbance smoother and simulation smoother of one linear-Gaussian step with shared noise.

A step takes the carry c of a scan to the next one and emits data that depend on the *previous* carry and on the same
noise e ~ N(0, I_q), so that carry and data may be correlated; v ~ N(0, R) is independent:

    c_t = A c_{t-1} + B e_t + b,        y_t = H c_{t-1} + D e_t + d + v_t.

Centred, non-centred and observe-then-move bodies all have this form. Only S = H P H' + D D' + R is factored, so
singular P and B B' (deterministic parts of the carry) are allowed. An entry of y that is NaN is missing: it drops out
exactly, decided on the value, and gradients stay finite.

The backward pass is the disturbance smoother of de Jong (1989, JASA 84) and of Durbin and Koopman (2012, "Time Series
Analysis by State Space Methods", ch. 4), the draws are those of Durbin and Koopman (2002, Biometrika 89).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from pushforward.math.small_matrices import eliminate, solve_factor, symmetric

LOG_2PI = 1.8378770664093453


class Step(NamedTuple):
    """One linear-Gaussian step; a leading axis of time is added by the functions on series.

    The covariance `R` of the data noise is a matrix, or the vector of its variances: `R.ndim` decides.
    """

    A: Float[Array, "next n"]
    B: Float[Array, "next q"]
    b: Float[Array, " next"]
    H: Float[Array, "m n"]
    D: Float[Array, "m q"]
    d: Float[Array, " m"]
    R: Float[Array, "m m"] | Float[Array, " m"]


class Varying(NamedTuple):
    """Says which leaves of a series of steps have a leading axis of time; the others hold for all times."""

    A: bool = True
    B: bool = True
    b: bool = True
    H: bool = True
    D: bool = True
    d: bool = True
    R: bool = True


CONSTANT = Varying(*(False,) * 7)


class Record(NamedTuple):
    """What the backward passes need of one step; rows of missing data are zero.

    `mean` and `cov` are those of the carry *before* the step, `L` = A - K H, `J` = B - K D, `factor` the lower
    Cholesky factor of S, `innovation` y - H mean - d and `score` S^-1 innovation.
    """

    mean: Float[Array, " n"]
    cov: Float[Array, "n n"]
    H: Float[Array, "m n"]
    D: Float[Array, "m q"]
    L: Float[Array, "next n"]
    J: Float[Array, "next q"]
    gain: Float[Array, "next m"]
    factor: Float[Array, "m m"]
    innovation: Float[Array, " m"]
    score: Float[Array, " m"]


class Updated(NamedTuple):
    """Moments of the carry after a step, given its data (`mean`, `cov`) and before seeing them (`predicted_...`)."""

    mean: Float[Array, " next"]
    cov: Float[Array, "next next"]
    log_likelihood: Float[Array, ""]
    predicted_mean: Float[Array, " next"]
    predicted_cov: Float[Array, "next next"]
    record: Record


class Filtered(NamedTuple):
    """A filtered series: log p(y_1..y_T), moments of c_1..c_T given the data so far, and stacked records."""

    log_likelihood: Float[Array, ""]
    means: Float[Array, "time n"]
    covs: Float[Array, "time n n"]
    records: Record


class Smoothed(NamedTuple):
    """Moments, given all data, of the carry c before a step and its noise e; Cov(c, e); Cov(c, c') with the next."""

    carry_mean: Float[Array, " n"]
    carry_cov: Float[Array, "n n"]
    noise_mean: Float[Array, " q"]
    noise_cov: Float[Array, "q q"]
    cross: Float[Array, "n q"]
    lag: Float[Array, "n next"]


def dense(R: Float[Array, "m m"] | Float[Array, " m"]) -> Float[Array, "m m"]:
    """The covariance matrix, from a matrix or variances."""
    return jnp.diag(R) if R.ndim == 1 else R


def masked(mean: Array, step: Step, y: Array) -> tuple[Array, Array, Array, Array, Array]:
    """H, D, R and the innovation without the missing data, and the 0/1 vector of present ones."""
    missing = jnp.isnan(y)
    present = 1.0 - missing.astype(step.H.dtype)
    H, D = present[:, None] * step.H, present[:, None] * step.D
    innovation = jnp.where(missing, 0.0, y - step.d - step.H @ mean)
    if step.R.ndim == 1:
        return H, D, jnp.where(missing, 1.0, step.R), innovation, present
    return H, D, present[:, None] * step.R * present[None] + jnp.diag(1.0 - present), innovation, present


def _log_density(diagonal: Array, white: Array, present: Array) -> Array:
    return -jnp.sum(jnp.log(diagonal)) - 0.5 * jnp.sum(white**2) - 0.5 * LOG_2PI * jnp.sum(present)


def update(mean: Float[Array, " n"], cov: Float[Array, "n n"], step: Step, y: Float[Array, " m"]) -> Updated:
    """Moments of the carry after one step and its data, and the log density of the data.

    S = H P H' + D D' + R, K = (A P H' + B D') S^-1 and P' = A P A' + B B' - K S K'. In float32 that difference
    loses about ten times the accuracy of Joseph's form L P L' + J J' + K R K', L = A - K H, J = B - K D, which costs
    twice the time and is used there.

    Args:
        mean: mean of the carry before the step, shape (n,); n = 0 gives the initial law.
        cov: its covariance, shape (n, n), may be singular.
        step: the step, of any shapes that fit; carries may change their length.
        y: data, shape (m,), NaN where missing.
    """
    m = y.shape[0]
    H, D, R, innovation, present = masked(mean, step, y)
    maps, noises = jnp.concatenate([H, step.A]), jnp.concatenate([D, step.B])
    joint = (maps @ cov) @ maps.T + noises @ noises.T
    columns = eliminate(joint.at[:m, :m].add(dense(R)), m)
    factor, below = columns[:m], columns[m:]
    white = solve_factor(factor, innovation[:, None], transposed=False)
    gain = solve_factor(factor, below.T, transposed=True).T
    score = solve_factor(factor, white, transposed=True)[:, 0]
    L, J = step.A - gain @ H, step.B - gain @ D
    if joint.dtype == jnp.float64:
        after = joint[m:, m:] - below @ below.T
    else:
        after = (L @ cov) @ L.T + J @ J.T + (gain * R[None] if R.ndim == 1 else gain @ R) @ gain.T
    predicted = step.A @ mean + step.b
    return Updated(
        predicted + below @ white[:, 0],
        symmetric(after),
        _log_density(jnp.diagonal(factor), white, present),
        predicted,
        symmetric(joint[m:, m:]),
        Record(mean, cov, H, D, L, J, gain, factor, innovation, score),
    )


def update_root(
    mean: Float[Array, " n"], root: Float[Array, "n r"], step: Step, y: Float[Array, " m"]
) -> tuple[Float[Array, " next"], Float[Array, "next next"], Float[Array, ""]]:
    """The same step for a covariance that is kept as a root: P = root root' never loses its sign to rounding.

    One QR factorisation triangularises [[H U, D, R^1/2], [A U, B, 0]] into [[S^1/2, 0], [K S^1/2, U']] (Kailath,
    Sayed and Hassibi 2000, "Linear Estimation", ch. 12). Use it where the condition of P exceeds 1 / eps. Its
    derivatives need a carry covariance of full rank, those of `update` do not.

    Args:
        mean: mean of the carry before the step, shape (n,).
        root: any matrix U with U U' its covariance, shape (n, r).
        step: the step; a matrix `R` must be positive definite, variances may be zero.
        y: data, shape (m,), NaN where missing.

    Returns:
        Mean and lower triangular root of the covariance of the carry after the step, and log p(y).
    """
    m, size = y.shape[0], step.A.shape[0]
    H, D, R, innovation, present = masked(mean, step, y)
    rows = jnp.concatenate([H @ root, D, noise_root(R)], axis=1)
    below = jnp.concatenate([step.A @ root, step.B, jnp.zeros((size, m), rows.dtype)], axis=1)
    triangle = jnp.linalg.qr(jnp.concatenate([rows, below]).T, mode="r").T
    triangle = jnp.pad(triangle, ((0, 0), (0, m + size - triangle.shape[1])))
    triangle = triangle * jnp.where(jnp.diagonal(triangle) < 0, -1.0, 1.0)[None]
    factor = triangle[:m, :m]
    white = solve_factor(factor, innovation[:, None], transposed=False)[:, 0]
    mean = step.A @ mean + step.b + triangle[m:, :m] @ white
    return mean, triangle[m:, m:], _log_density(jnp.diagonal(factor), white, present)


def noise_root(R: Float[Array, "... m m"] | Float[Array, " m"]) -> Float[Array, "... m m"]:
    """A root of R, given as variances, which may be 0, or as a PD matrix."""
    if R.ndim > 1:
        return jnp.linalg.cholesky(R)
    return jnp.diag(jnp.where(R > 0, jnp.sqrt(jnp.where(R > 0, R, 1.0)), 0.0))


def scanned(steps: Step, varying: Varying) -> Step:
    """The part of a series that `lax.scan` slices; None stands for what holds at all times."""
    return Step._make(leaf if varies else None for leaf, varies in zip(steps, varying, strict=True))


def merged(steps: Step, slices: Step) -> Step:
    """The step at one time, from the series and what `lax.scan` sliced of it."""
    return Step(*(whole if part is None else part for whole, part in zip(steps, slices, strict=True)))


def filter_series(
    mean: Float[Array, " n"],
    cov: Float[Array, "n n"],
    steps: Step,
    ys: Float[Array, "time m"],
    *,
    varying: Varying = Varying(),
) -> Filtered:
    """Filters a series by `update`, from the mean and covariance of c_0.

    Args:
        mean: mean of c_0, shape (n,).
        cov: its covariance, shape (n, n).
        steps: the steps; leaves that vary have a leading axis of time.
        ys: data, shape (time, m), NaN where missing.
        varying: which leaves of `steps` vary with time. Constant ones are not stacked.
    """

    def move(carry, slices):
        after = update(carry[0], carry[1], merged(steps, slices[0]), slices[1])
        return (after.mean, after.cov), (after.log_likelihood, after.mean, after.cov, after.record)

    _, (terms, means, covs, records) = lax.scan(move, (mean, cov), (scanned(steps, varying), ys))
    return Filtered(jnp.sum(terms), means, covs, records)


def smooth_step(
    record: Record, r: Float[Array, " next"], N: Float[Array, "next next"]
) -> tuple[Float[Array, " n"], Float[Array, "n n"], Smoothed]:
    """One step of the disturbance smoother: the scores (r, N) of the carry before a step, and smoothed moments.

    With G = [H, D], M = [L, J], V = diag(P, I) and Q = G' S^-1 G + M' N M: (c, e) given all data has mean
    (mean, 0) + V (G' S^-1 innovation + M' r) and covariance V - V Q V; the blocks of c give the next r and N.
    Sites of a body are functions of (c, e), so this joint law is what reports them.

    Args:
        record: of the step, from `update`.
        r: score of the carry after the step, shape (next,); zero after the last step.
        N: its variance, shape (next, next); zero after the last step.
    """
    n, q = record.L.shape[1], record.J.shape[1]
    maps = jnp.concatenate([record.H, record.D], axis=1)
    errors = jnp.concatenate([record.L, record.J], axis=1)
    white = solve_factor(record.factor, maps, transposed=False)
    score = maps.T @ record.score + errors.T @ r
    information = symmetric(white.T @ white + errors.T @ N @ errors)
    before, across = information[:n, :n], information[:n, n:]
    A, B = record.L + record.gain @ record.H, record.J + record.gain @ record.D
    mean, cov = record.mean + record.cov @ score[:n], symmetric(record.cov - record.cov @ before @ record.cov)
    cross, noise_cov = -record.cov @ across, jnp.eye(q, dtype=before.dtype) - information[n:, n:]
    return score[:n], before, Smoothed(mean, cov, score[n:], noise_cov, cross, cov @ A.T + cross @ B.T)


def smooth_mean_step(
    record: Record, r: Float[Array, " next"]
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " q"]]:
    """`smooth_step` for means only: r before the step, smoothed means of carry and noise."""
    before = record.H.T @ record.score + record.L.T @ r
    return before, record.mean + record.cov @ before, record.D.T @ record.score + record.J.T @ r


def smooth_series(records: Record) -> tuple[Float[Array, " n"], Float[Array, "n n"], Smoothed]:
    """Smooths a filtered series; index t holds the moments of c_t and e_{t+1}. Those of c_T are the filtered ones.

    Returns:
        r and N of c_0, which `smooth_step` takes with the record of the initial step, and the stacked moments.
    """
    zero = jnp.zeros(records.L.shape[1], records.L.dtype)

    def move(carry, record):
        r, N, moments = smooth_step(record, *carry)
        return (r, N), moments

    (r, N), moments = lax.scan(move, (zero, jnp.diag(zero)), records, reverse=True)
    return r, N, moments


def sample_noise(
    initial: Record, records: Record, roots: tuple[Array, Array], key: PRNGKeyArray, draws: int
) -> tuple[Float[Array, "draws q0"], Float[Array, "draws time q"]]:
    """Joint draws of z_0 and e_1..e_T given the data, from stored records that all draws share.

    Unconditional noise (e+, v+) gives the errors x_t = L x_{t-1} + J e+ - K v+ and the innovations
    H x_{t-1} + D e+ + v+ of a filter run on the data that it would have produced; the smoothed mean of the
    difference of the two noises is linear in the difference of innovations (Durbin and Koopman 2002, section 2.3).

    Args:
        initial: record of the initial step.
        records: stacked records of the series.
        roots: roots of R of the initial step, (m0, m0), and of the series, (time, m, m) or (m, m).
        key: a JAX key.
        draws: number of draws.
    """
    dtype = records.L.dtype
    (length, _, q), m = records.J.shape, records.H.shape[1]
    q0, m0 = initial.J.shape[1], initial.H.shape[0]
    keys = jax.random.split(key, 4)
    shapes = (q0,), (m0,), (length, q), (length, m)
    z, v0, e, v = (jax.random.normal(k, (*s, draws), dtype) for k, s in zip(keys, shapes, strict=True))
    v0, v = roots[0] @ v0, roots[1] @ v

    def forward(errors, slices):
        record, e, v = slices
        innovation = record.H @ errors + record.D @ e + v
        return record.L @ errors + record.J @ e - record.gain @ v, innovation

    def backward(r, slices):
        record, e, innovation = slices
        difference = record.innovation[:, None] - innovation
        white = solve_factor(record.factor, difference, transposed=False)
        score = solve_factor(record.factor, white, transposed=True)
        return record.H.T @ score + record.L.T @ r, e + record.D.T @ score + record.J.T @ r

    errors = initial.J @ z - initial.gain @ v0
    errors, innovations = lax.scan(forward, errors, (records, e, v))
    r, e = lax.scan(backward, jnp.zeros_like(errors), (records, e, innovations), reverse=True)
    _, z = backward(r, (initial, z, initial.D @ z + v0))
    return z.T, jnp.moveaxis(e, -1, 0)


def simulation_smoother(
    initial: Step,
    steps: Step,
    ys: Float[Array, "time m"],
    y0: Float[Array, " m0"],
    key: PRNGKeyArray,
    draws: int,
    *,
    varying: Varying = Varying(),
) -> tuple[Float[Array, "draws q0"], Float[Array, "draws time q"]]:
    """Exact joint draws of the noises z_0, e_1..e_T given all data, by one filter pass that all draws share.

    Args:
        initial: step with n = 0 that makes the first carry, c_0 = B z_0 + b, and data y_0 = D z_0 + d + v.
        steps: the steps; a matrix `R` must be positive definite, variances may be zero.
        ys: data, shape (time, m), NaN where missing.
        y0: data of the initial step, shape (m0,), often (0,).
        key: a JAX key.
        draws: number of draws.
        varying: which leaves of `steps` vary with time.
    """
    first = update(jnp.zeros(0, ys.dtype), jnp.zeros((0, 0), ys.dtype), initial, y0)
    records = filter_series(first.mean, first.cov, steps, ys, varying=varying).records
    root = jax.vmap(noise_root)(steps.R) if varying.R else noise_root(steps.R)
    return sample_noise(first.record, records, (noise_root(initial.R), root), key, draws)
