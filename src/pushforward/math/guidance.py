"""Guidance: the denoiser of a posterior from the denoiser of a prior and of what data say about the clean state.

The score of the posterior at level s is that of the prior plus the gradient of log p(y | x), and the denoiser
moves by s^2 times that gradient. Each function returns a denoiser ``D(x, s)`` (see `diffusion.py`), one state x of any
shape. They differ in V, the covariance of x0 given x that they assume:

===============  =====================================================================================================
`gamma`          V = gamma s^2 I, as if in the space of the data. Cheap: one gradient. 15 to 25 % too narrow without
                 Langevin moves
`mmps`           V = s^2 dD/dx, made positive: exact for Gaussian priors and linear A. n derivatives of D and
                 an eigendecomposition, n the size of x
`mmps_iterative` the same by conjugate gradients on the m data: no n x n matrix; V made symmetric, not positive
`surrogate`      V of a Gaussian with the clean data's covariance: exact for Gaussian priors; no derivative of D
`averaged`       V the mean of (x0 - D)(x0 - D)^T over the prior, level by level: exact for Gaussian priors, and as
                 narrow elsewhere as D knows the states to be; one gradient
===============  =====================================================================================================

What data say is a function of the clean state, `Observe`, asked at the denoised one: data ``y = A(x0) + noise``,
noise N(0, R), from `gaussian`, to which `with_terms` adds log densities of any form. R is diagonal: whiten correlated
noise first.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pushforward._types import Array, Float
from pushforward.math.diffusion import Denoiser, Scalar, State

Operator = Callable[[State], Float[Array, "m"]]
Data = Float[Array, "m"]


class Linearised(NamedTuple):
    """What data say near a clean state: ``innovation = A v + noise``, v the way from there, noise N(0, R).

    Attributes:
        innovation: ``y - A(D)``, zero where data are missing.
        variances: the diagonal of R.
        push: v -> A v, zero where data are missing.
        pull: w -> A^T w.
        gains: the square of the norm of each row of A, for rows whose scale means nothing; else 1.
    """

    innovation: Data
    variances: Data
    push: Callable[[State], Data]
    pull: Callable[[Data], State]
    gains: Data


Observe = Callable[[State], Linearised]

# ------------------------------------------------------------------------------------------------- what the data say


def gaussian(forward: Operator, data: Data, variances: Data | Operator) -> Observe:
    """Data ``y = A(x0) + noise``, noise N(0, R).

    With ``R = R(D)``, the variance of a law of an exponential family with mean A (Poisson, binomial, gamma), the
    gradient of its log density is that of N(A, R) with R held, and its expected curvature too.

    Args:
        forward: A, any differentiable function of the state to shape (m,); it is linearised about D.
        data: y, NaN where missing.
        variances: the diagonal of R, above zero, or a function of the state that gives it.
    """

    def observe(clean: State) -> Linearised:
        predicted, push = jax.linearize(forward, clean)
        transpose = jax.linear_transpose(push, clean)
        present = ~jnp.isnan(data)
        held = variances(clean) if callable(variances) else variances
        return Linearised(
            jnp.where(present, data - predicted, 0.0),
            jnp.where(present, held, 1.0),
            lambda v: jnp.where(present, push(v), 0.0),
            lambda w: transpose(jnp.where(present, w, 0.0))[0],
            jnp.ones_like(predicted),
        )

    return observe


def with_terms(observe: Observe, terms: Operator) -> Observe:
    """The same with k log densities of the clean state added, each as one datum more.

    A term psi with gradient g is taken as Gaussian along g: the row g of A with variance ``1 / h`` and innovation
    ``1 / h``, ``h = -g' (d^2 psi) g / |g|^4`` or nearly zero where psi bends upwards. Exact for any term that is the
    log density of a normal datum with a linear mean.

    Args:
        observe: what the other data say.
        terms: psi, a function of the state to shape (k,).
    """

    def extended(clean: State) -> Linearised:
        known = observe(clean)
        slopes = jax.jacrev(terms)(clean)
        k = slopes.shape[0]

        def along(direction: State) -> Data:
            return jax.jvp(lambda x: jax.jvp(terms, (x,), (direction,))[1], (clean,), (direction,))[1]

        squares = jnp.sum(slopes.reshape(k, -1) ** 2, 1)
        bends = -jnp.diagonal(jax.vmap(along)(slopes)) / jnp.where(squares > 0, squares, 1.0) ** 2
        variances = 1.0 / jnp.maximum(bends, _FLAT)
        n = known.innovation.shape[0]
        return Linearised(
            jnp.concatenate([known.innovation, variances]),
            jnp.concatenate([known.variances, variances]),
            lambda v: jnp.concatenate([known.push(v), jnp.tensordot(slopes, v, v.ndim)]),
            lambda w: known.pull(w[:n]) + jnp.tensordot(w[n:], slopes, 1),
            jnp.concatenate([known.gains, squares]),
        )

    return extended


_FLAT = 1e-6
"""Least curvature of a term along its gradient."""


# ------------------------------------------------------------------------------------------------------------- gamma


def gamma(denoise: Denoiser, observe: Observe, *, factor: Scalar = 3e-2) -> Denoiser:
    """The guidance of score-based data assimilation.

    ``log p(y | x) = -|y - A(D(x))|^2 / (2 (R + factor s^2))``, its gradient taken through the denoiser.

    Args:
        denoise: D(x, s) of the prior.
        observe: what the data say.
        factor: the paper's gamma; 3e-2 in its equations, 1e-2 in its figures.

    Source: Rozet and Louppe 2023, "Score-based data assimilation", arXiv:2306.10574, algorithm 3.
    """

    def guided(x: State, level: Scalar) -> State:
        denoised, pull_state = jax.vjp(lambda x: denoise(x, level), x)
        seen = observe(denoised)
        residual = seen.innovation / (seen.variances + factor * level**2 * seen.gains)
        (gradient,) = pull_state(seen.pull(residual))
        return denoised + level**2 * gradient

    return guided


def gamma_curvature(level: Scalar, variances: Data, *, factor: Scalar = 3e-2, gain: Scalar = 1.0) -> Array:
    """A bound of s^2 times minus the Hessian of the log density that `gamma` assumes; see `stable_delta`.

    ``1 + gain^2 s^2 / (R + factor s^2)`` with the least R, for log-concave priors. An exact law has at most 1; here it
    may reach 1 + 1 / factor at low levels, s^2 about R, where the prior is wide.

    Args:
        level: s.
        variances: the diagonal of R.
        factor: as in `gamma`.
        gain: a bound of the norm of the derivative of A(D(x)): that of A is one, since D contracts, but a loose one at
            high levels, where the derivative of D falls as variance / s^2.
    """
    return 1.0 + gain**2 * level**2 / (jnp.min(variances) + factor * level**2)


# --------------------------------------------------------------------------------------------------- moment matching


def positive_part(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The symmetric positive semi-definite matrix nearest to a square one: symmetrised, negative eigenvalues to zero.

    Source: Higham 1988, "Computing a nearest symmetric positive semidefinite matrix", theorem 2.1.
    """
    values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
    return (vectors * jnp.maximum(values, 0.0)[None]) @ vectors.T


def rows_of(seen: Linearised, clean: State) -> Float[Array, "m n"]:
    """The matrix A, from whichever of its products are fewer."""
    n, m = clean.size, seen.innovation.size
    if m < n:
        return jax.vmap(seen.pull)(jnp.eye(m, dtype=clean.dtype)).reshape(m, n)
    return jax.vmap(seen.push)(jnp.eye(n, dtype=clean.dtype).reshape(n, *clean.shape)).T


def conditioned(denoised: State, covariance: Float[Array, "n n"], seen: Linearised) -> State:
    """Kalman's update of N(D, V) by what was seen near D: ``D + V A^T (R + A V A^T)^-1 (y - A(D))``."""
    transposed = rows_of(seen, denoised).T
    gain = covariance @ transposed
    # A missing datum has a row of zeros and no innovation; its variance only keeps the system regular.
    factor = jax.scipy.linalg.cho_factor(transposed.T @ gain + jnp.diag(seen.variances), lower=True)
    solved = jax.scipy.linalg.cho_solve(factor, seen.innovation)
    return denoised + (gain @ solved).reshape(denoised.shape)


def mmps(denoise: Denoiser, observe: Observe) -> Denoiser:
    """Moment matching posterior sampling with V made positive: the safe default up to some hundreds of state entries.

    ``D + V A^T (R + A V A^T)^-1 (y - A(D))``, V the positive part of ``s^2 dD/dx``, which is the covariance of x0 given
    x when D is the mean of some law. A trained D is that of no law, and one composed of windows has a
    derivative that is neither symmetric nor positive; taken as it is, sampling explodes.

    Args:
        denoise: D(x, s) of the prior.
        observe: what the data say.

    Source: Rozet et al. 2024, "Learning diffusion priors from observations by expectation maximization",
    arXiv:2405.13712, section 4.2, with the projection.
    """

    def guided(x: State, level: Scalar) -> State:
        flat = x.ravel()
        denoised, push = jax.linearize(lambda flat: denoise(flat.reshape(x.shape), level).ravel(), flat)
        derivative = jax.vmap(push)(jnp.eye(flat.size, dtype=flat.dtype))
        covariance = level**2 * positive_part(derivative)
        denoised = denoised.reshape(x.shape)
        return conditioned(denoised, covariance, observe(denoised))

    return guided


def conjugate_gradients(
    apply: Callable[[Data], Data], right: Data, iterations: int, precondition: Callable[[Data], Data] = lambda r: r
) -> Data:
    """``(I + W)^-1 right`` for a symmetric W given by its products, at most `iterations` of them.

    Stops where W shows a negative direction, p' W p < 0, and where the residual vanishes: never further from 0 than
    the last iterate of a positive system.

    Args:
        apply: w -> W w.
        right: the right-hand side.
        iterations: at most.
        precondition: w -> M^-1 w, M symmetric, positive and near I + W.

    Source: Hestenes and Stiefel 1952; Golub and Van Loan 2013, algorithm 11.5.1.
    """

    def step(carry: tuple[Data, Data, Data, Data], _: None) -> tuple[tuple[Data, Data, Data, Data], None]:
        solution, residual, direction, length = carry
        image = apply(direction)
        bent = direction @ image
        go = (bent >= 0) & (length > jnp.finfo(right.dtype).eps ** 2 * scale)
        size = jnp.where(go, length / jnp.where(go, direction @ direction + bent, 1.0), 0.0)
        left = residual - size * (direction + image)
        smooth = precondition(left)
        following = left @ smooth
        turn = jnp.where(go, following / jnp.where(go, length, 1.0), 1.0)
        solution = solution + size * direction
        direction = jnp.where(go, smooth + turn * direction, direction)
        return (solution, left, direction, jnp.where(go, following, length)), None

    first = precondition(right)
    scale = right @ first
    return jax.lax.scan(step, (jnp.zeros_like(right), right, first, scale), None, length=iterations)[0][0]


def mmps_iterative(
    denoise: Denoiser, observe: Observe, *, iterations: int = 10, covariance: Float[Array, "n n"] | None = None
) -> Denoiser:
    """Moment matching posterior sampling by conjugate gradients, without the matrix of the derivative.

    `mmps` with ``V = s^2 (J + J^T) / 2``, J = dD/dx, in products: an iteration costs a derivative of D forward, one
    backward, and the same of A. The iterations stop at a negative direction of A V A^T, but V itself is not made
    positive: for scores composed of windows take `mmps` or `surrogate`, which come out much closer.

    Args:
        denoise: D(x, s) of the prior.
        observe: what the data say.
        iterations: 5 are enough for 9 data and 10 for 65; 1 leaves errors of 0.2 posterior sd in the mean. With a
            covariance about half as many.
        covariance: C of the clean states, as in `surrogate`, whose system is then the preconditioner.

    Source: Rozet et al. 2024, arXiv:2405.13712, section 4.2; the symmetric V, the stop and the preconditioner are ours.
    """
    prior = None if covariance is None else _Shrunk.of(covariance)

    def guided(x: State, level: Scalar) -> State:
        denoised, push_state = jax.linearize(lambda x: denoise(x, level), x)
        pull_state = jax.linear_transpose(push_state, x)
        seen = observe(denoised)
        sharpness = 1.0 / jnp.sqrt(seen.variances)

        def spread(weights: Data) -> State:
            pulled = seen.pull(sharpness * weights)
            return 0.5 * level**2 * (push_state(pulled) + pull_state(pulled)[0])

        def apply(weights: Data) -> Data:
            return sharpness * seen.push(spread(weights))

        precondition: Callable[[Data], Data] = lambda r: r  # noqa: E731
        if prior is not None:
            rows = sharpness[:, None] * rows_of(seen, denoised)
            factor = jax.scipy.linalg.cho_factor(rows @ prior.at(level) @ rows.T + jnp.eye(len(rows), dtype=rows.dtype))
            precondition = lambda r: jax.scipy.linalg.cho_solve(factor, r)  # noqa: E731
        solved = conjugate_gradients(apply, sharpness * seen.innovation, iterations, precondition)
        return denoised + spread(solved)

    return guided


# --------------------------------------------------------------------------------------------------------- surrogate


def surrogate(denoise: Denoiser, observe: Observe, covariance: Float[Array, "n n"]) -> Denoiser:
    """Guidance with V of a Gaussian law of the clean states: ``V = C (C + s^2 I)^-1 s^2``, no derivative of D.

    As stable as Kalman's filter whatever D is, and cheaper than `mmps` by n derivatives of D and an
    eigendecomposition at each level; wrong in so far as the covariance of x0 given x depends on x.

    Args:
        denoise: D(x, s) of the prior.
        observe: what the data say.
        covariance: C of the clean states, flat, such as that of the training set; symmetric.
    """
    prior = _Shrunk.of(covariance)

    def guided(x: State, level: Scalar) -> State:
        denoised = denoise(x, level)
        return conditioned(denoised, prior.at(level), observe(denoised))

    return guided


class Errors(NamedTuple):
    """Covariance of the clean state given the noisy one, averaged over the prior, by level.

    The levels are equally spaced in their logarithm.

    Attributes:
        covariances: mean of ``(x0 - D)(x0 - D)^T`` over x0 and x, flat, (levels, n, n), from the lowest level up, at
            least two.
        lowest: level of the first.
        highest: level of the last.
    """

    covariances: Float[Array, "levels n n"]
    lowest: Scalar
    highest: Scalar

    def at(self, level: Scalar) -> Float[Array, "n n"]:
        """Linear in log s once ``s^2 / (1 + s^2)`` is divided out, which is what it is for states of variance one."""
        last, dtype = self.covariances.shape[0] - 1, self.covariances.dtype
        place = jnp.log(level / self.lowest) / jnp.log(self.highest / self.lowest) * last
        place = jnp.clip(place, 0.0, float(last)).astype(dtype)
        below = jnp.clip(jnp.floor(place), 0.0, float(max(last - 1, 0)))
        part, index = place - below, below.astype(int)
        squares = jnp.geomspace(self.lowest, self.highest, last + 1, dtype=dtype) ** 2
        shares = squares / (1.0 + squares)
        first, second = self.covariances[index] / shares[index], self.covariances[index + 1] / shares[index + 1]
        share = jnp.asarray(level**2 / (1.0 + level**2), dtype)
        return share * ((1.0 - part) * first + part * second)


def averaged(denoise: Denoiser, observe: Observe, errors: Errors) -> Denoiser:
    """Guidance with V the mean squared error of D itself, and one gradient through it.

    ``D + s^2 J^T A^T (R + A V A^T)^-1 (y - A(D))``, J = dD/dx. Where the prior lives near a set of few dimensions, as
    dynamics do, V is far narrower than that of `surrogate`; it is positive whatever D is, which that of `mmps` is
    not; and it is measured, so that errors of a trained D count as uncertainty.

    Args:
        denoise: D(x, s) of the prior.
        observe: what the data say.
        errors: V by level.

    Source: the gradient with a fixed V, Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems"
    (V = s^2 / (1 + s^2) I there); V as measured is ours.
    """

    def guided(x: State, level: Scalar) -> State:
        denoised, pull_state = jax.vjp(lambda x: denoise(x, level), x)
        seen = observe(denoised)
        rows = rows_of(seen, denoised)
        system = rows @ errors.at(level) @ rows.T + jnp.diag(seen.variances)
        solved = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(system, lower=True), seen.innovation)
        (gradient,) = pull_state(seen.pull(solved))
        return denoised + level**2 * gradient

    return guided


class _Shrunk(NamedTuple):
    """Eigenvalues and vectors of the covariance C of clean states."""

    values: Float[Array, "n"]
    vectors: Float[Array, "n n"]

    @classmethod
    def of(cls, covariance: Float[Array, "n n"]) -> "_Shrunk":
        values, vectors = jnp.linalg.eigh(covariance)
        return cls(jnp.maximum(values, 0.0), vectors)

    def at(self, level: Scalar) -> Float[Array, "n n"]:
        """The covariance of x0 given ``x = x0 + s eps``: ``C (C + s^2 I)^-1 s^2``."""
        shrunk = self.values / (self.values + level**2) * level**2
        return (self.vectors * shrunk[None]) @ self.vectors.T
