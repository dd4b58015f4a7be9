"""Exact answers by quadrature and optimisation in float64 numpy, independent of the library and of JAX.

`u` are standard normal coordinates, A = 0.4 + 0.8 Phi(u1) and B = 0.01 + 0.30 Phi(u2).
"""

from dataclasses import dataclass

import numpy as np
from scipy import integrate, interpolate, optimize
from scipy.special import log_ndtr, logsumexp, ndtr

TIMES = np.arange(1.0, 6.0)
VARIANCE = 1e-3
LOWER, WIDTH = np.array([0.4, 0.01]), np.array([0.8, 0.30])


# ------------------------------------------------------------------------------------------ BOD: the densities


def bod_parameters(u):
    """(A, B) at u; both of shape (..., 2)."""
    return LOWER + WIDTH * ndtr(u)


def bod_log_likelihood(A, B, y):
    """log p(y given A, B) for arrays A and B that broadcast together."""
    A, B = np.broadcast_arrays(A, B)
    residual = y - A[..., None] * -np.expm1(-B[..., None] * TIMES)
    return -0.5 * np.sum(residual**2, -1) / VARIANCE - 0.5 * len(TIMES) * np.log(2 * np.pi * VARIANCE)


def bod_derivatives(u, y):
    """log p(y given u) with gradient (..., 2) and Hessian (..., 2, 2), differentiated by hand; u of shape (..., 2)."""
    A, B = np.moveaxis(bod_parameters(u), -1, 0)[..., None]
    density = np.exp(-0.5 * u**2) / np.sqrt(2 * np.pi)
    dA, dB = np.moveaxis(WIDTH * density, -1, 0)[..., None]
    ddA, ddB = np.moveaxis(-WIDTH * u * density, -1, 0)[..., None]
    decay, rise = np.exp(-B * TIMES), -np.expm1(-B * TIMES)
    g1, g2 = dA * rise, A * dB * TIMES * decay
    g11, g12, g22 = ddA * rise, dA * dB * TIMES * decay, A * (ddB - dB**2 * TIMES) * TIMES * decay
    residual = y - A * rise
    gradient = np.stack([np.sum(residual * g, -1) for g in (g1, g2)], -1) / VARIANCE
    h11 = np.sum(residual * g11 - g1 * g1, -1)
    h12 = np.sum(residual * g12 - g1 * g2, -1)
    h22 = np.sum(residual * g22 - g2 * g2, -1)
    hessian = np.stack([np.stack([h11, h12], -1), np.stack([h12, h22], -1)], -2) / VARIANCE
    value = -0.5 * np.sum(residual**2, -1) / VARIANCE - 0.5 * len(TIMES) * np.log(2 * np.pi * VARIANCE)
    return value, gradient, hessian


# ------------------------------------------------------------------------------------- BOD: the exact posterior


@dataclass(frozen=True)
class BodPosterior:
    """The posterior of u on a uniform grid, where the trapezoid rule converges faster than any power of its step.

    Attributes:
        y: data, shape (5,).
        grid: points of u1 and of u2, shape (n,).
        log_density: log p(u given y), shape (n, n), first axis u1.
        log_evidence: log p(y).
    """

    y: np.ndarray
    grid: np.ndarray
    log_density: np.ndarray
    log_evidence: float

    @property
    def step(self):
        return self.grid[1] - self.grid[0]

    @property
    def probability(self):
        """Weights of the grid points, shape (n, n), with sum 1."""
        return np.exp(self.log_density) * self.step**2

    def expectation(self, f):
        """E f(u1, u2 given y) for a function that broadcasts."""
        return float(np.sum(self.probability * f(self.grid[:, None], self.grid[None, :])))

    def marginal(self, axis):
        """Density of u1 (axis 0) or of u2 (axis 1) on the grid."""
        return self.probability.sum(1 - axis) / self.step

    def _moments(self, values):
        """Mean and covariance of one function of u1 and one of u2, both given on the grid."""
        weights = self.probability
        marginals = weights.sum(1), weights.sum(0)
        mean = np.array([w @ v for w, v in zip(marginals, values, strict=True)])
        centred = [v - m for v, m in zip(values, mean, strict=True)]
        cross = centred[0] @ weights @ centred[1]
        variance = [w @ c**2 for w, c in zip(marginals, centred, strict=True)]
        return mean, np.array([[variance[0], cross], [cross, variance[1]]])

    def moments_u(self):
        """Mean (2,) and covariance (2, 2) of u."""
        return self._moments((self.grid, self.grid))

    def moments(self):
        """Mean (2,) and covariance (2, 2) of (A, B)."""
        return self._moments(tuple(LOWER[:, None] + WIDTH[:, None] * ndtr(self.grid)))

    def standardised_moment(self, axis, power):
        """Third (skewness) or fourth (kurtosis) standardised moment of u1 or u2."""
        weights = self.marginal(axis) * self.step
        centred = self.grid - weights @ self.grid
        return float(weights @ centred**power / (weights @ centred**2) ** (power / 2))

    def cdf_u(self, axis):
        """Marginal distribution function of u1 or u2, as a callable."""
        antiderivative = interpolate.CubicSpline(self.grid, self.marginal(axis)).antiderivative()
        return lambda u: np.clip(antiderivative(np.clip(u, self.grid[0], self.grid[-1])), 0, 1)

    def quantiles_u(self, axis, levels):
        """Marginal quantiles of u1 or u2."""
        cdf = self.cdf_u(axis)
        bracket = self.grid[0], self.grid[-1]
        return np.array([optimize.brentq(lambda u, p=p: cdf(u) - p, *bracket, xtol=1e-12) for p in levels])

    def quantiles(self, axis, levels):
        """Marginal quantiles of A (axis 0) or of B (axis 1)."""
        return LOWER[axis] + WIDTH[axis] * ndtr(self.quantiles_u(axis, levels))

    def draws(self, count, seed=0):
        """Independent exact draws of u, shape (count, 2), by rejection from the prior."""
        rng = np.random.default_rng(seed)
        best = bod_log_likelihood(*bod_maximum_likelihood(self.y), self.y)
        kept = np.zeros((0, 2))
        while len(kept) < count:
            u = rng.normal(size=(100_000, 2))
            value = bod_log_likelihood(*bod_parameters(u).T, self.y)
            kept = np.concatenate([kept, u[np.log(rng.uniform(size=len(u))) < value - best - 1e-6]])
        return kept[:count]

    def distances(self, mean, covariance):
        """Total variation, Hellinger and KL(posterior, q) of q = N(mean, covariance) in u.

        Squared Hellinger is half the integral of the squared difference of root densities.
        """
        precision = np.linalg.inv(covariance)
        d1, d2 = self.grid[:, None] - mean[0], self.grid[None, :] - mean[1]
        square = precision[0, 0] * d1**2 + 2 * precision[0, 1] * d1 * d2 + precision[1, 1] * d2**2
        log_q = -0.5 * square - np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(covariance)[1]
        p, q = np.exp(self.log_density), np.exp(log_q)
        area = self.step**2
        variation = 0.5 * np.sum(np.abs(p - q)) * area
        hellinger = np.sqrt(0.5 * np.sum((np.sqrt(p) - np.sqrt(q)) ** 2) * area)
        return variation, hellinger, np.sum(p * (self.log_density - log_q)) * area


def bod_posterior(y, *, bound=10.0, points=1001):
    """The exact BOD posterior for data y, shape (5,), on [-bound, bound]^2."""
    y = np.asarray(y, float)
    grid = np.linspace(-bound, bound, points)
    A, B = (LOWER + WIDTH * ndtr(grid)[:, None]).T
    rise = -np.expm1(-B[:, None] * TIMES)
    misfit = y @ y - 2 * A[:, None] * (rise @ y) + A[:, None] ** 2 * np.sum(rise**2, -1)
    log_joint = -0.5 * misfit / VARIANCE - 0.5 * len(TIMES) * np.log(2 * np.pi * VARIANCE)
    log_joint = log_joint - 0.5 * (grid[:, None] ** 2 + grid**2) - np.log(2 * np.pi)
    log_evidence = float(logsumexp(log_joint) + 2 * np.log(grid[1] - grid[0]))
    return BodPosterior(y, grid, log_joint - log_evidence, log_evidence)


def bod_log_evidence(y, *, upper=np.inf, nodes=200):
    """log p(y and u2 < upper), shape (...), for data of shape (..., 5), by another road than `bod_posterior`.

    A analytically, B by Gauss-Legendre: given B the likelihood is Gaussian in A, so its integral over the uniform
    prior is a difference of Phi.
    """
    x, w = np.polynomial.legendre.leggauss(nodes)
    share = ndtr(upper)
    rise = -np.expm1(-(LOWER[1] + WIDTH[1] * share * (x[:, None] + 1) / 2) * TIMES)
    square = np.sum(rise**2, -1)
    y = np.asarray(y, float)
    best = y @ rise.T / square
    misfit = np.sum(y**2, -1)[..., None] - best**2 * square
    sd = np.sqrt(VARIANCE / square)
    low, high = (LOWER[0] - best) / sd, (LOWER[0] + WIDTH[0] - best) / sd
    # Phi(high) - Phi(low) in the tail where it does not cancel
    flip = low > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    log_mass = log_ndtr(high) + np.log1p(-np.exp(log_ndtr(low) - log_ndtr(high)))
    inner = -0.5 * misfit / VARIANCE + log_mass + np.log(sd * np.sqrt(2 * np.pi) / WIDTH[0])
    constant = -0.5 * len(TIMES) * np.log(2 * np.pi * VARIANCE)
    return logsumexp(inner, axis=-1, b=share * w / 2) + constant


# --------------------------------------------------------------------------- BOD: points and Gaussian families


def bod_map_u(y):
    """Maximum a posteriori point in u, shape (2,): Newton steps from the best of a coarse grid."""
    posterior = bod_posterior(y, points=201)
    start = np.unravel_index(np.argmax(posterior.log_density), posterior.log_density.shape)
    u = posterior.grid[list(start)]
    result = optimize.minimize(
        lambda u: -bod_derivatives(u, y)[0] + 0.5 * u @ u, u, jac=lambda u: u - bod_derivatives(u, y)[1]
    )
    u = result.x
    for _ in range(5):
        _, gradient, hessian = bod_derivatives(u, y)
        u = u - np.linalg.solve(np.eye(2) - hessian, u - gradient)
    return u


def bod_laplace_u(y):
    """Laplace's approximation in u: mean (2,), covariance (2, 2), log evidence."""
    u = bod_map_u(y)
    value, _, hessian = bod_derivatives(u, y)
    precision = np.eye(2) - hessian
    log_evidence = value - 0.5 * u @ u - 0.5 * np.linalg.slogdet(precision)[1]
    return u, np.linalg.inv(precision), float(log_evidence)


def bod_maximum_likelihood(y):
    """(A, B) of greatest likelihood inside the prior's box, shape (2,)."""
    bounds = LOWER, LOWER + WIDTH
    starts = LOWER + WIDTH * np.array([[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]])

    def residual(x):
        return (x[0] * -np.expm1(-x[1] * TIMES) - y) / VARIANCE**0.5

    fits = [
        optimize.least_squares(residual, start, bounds=bounds, xtol=1e-15, ftol=1e-15, gtol=1e-15) for start in starts
    ]
    return min(fits, key=lambda fit: fit.cost).x


def _optimise_elbo(y, unpack, starts, nodes):
    """Maximise E_q log p(y given u) - KL(q, N(0, I)) over q = N(m, L L^T), by Gauss-Hermite and BFGS.

    `unpack` turns the parameters into (m, L) and turns (dm, dL) back into the gradient by the parameters.
    """
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    xi = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    weights = np.outer(w, w).ravel() / (2 * np.pi)

    def negative_elbo(parameters):
        mean, root, pull_back = unpack(parameters)
        value, gradient, _ = bod_derivatives(mean + xi @ root.T, y)
        diagonal = np.diag(root)
        kl = 0.5 * (np.sum(root**2) + mean @ mean - 2) - np.sum(np.log(diagonal))
        d_mean = weights @ gradient - mean
        d_root = (weights[:, None] * gradient).T @ xi - root + np.diag(1 / diagonal)
        return kl - weights @ value, -pull_back(d_mean, d_root)

    fits = [
        optimize.minimize(negative_elbo, start, jac=True, method="BFGS", options={"gtol": 1e-9}) for start in starts
    ]
    best = min(fits, key=lambda fit: fit.fun)
    mean, root, _ = unpack(best.x)
    return mean, root @ root.T, -best.fun


def bod_full_vi_u(y, *, nodes=40):
    """Optimum of Gaussian variational inference in u with any covariance: mean, covariance, ELBO."""

    def unpack(p):
        root = np.array([[np.exp(p[2]), 0.0], [p[3], np.exp(p[4])]])
        return p[:2], root, lambda dm, dL: np.array([*dm, dL[0, 0] * root[0, 0], dL[1, 0], dL[1, 1] * root[1, 1]])

    mean, covariance, _ = bod_laplace_u(y)
    root = np.linalg.cholesky(covariance)
    starts = [
        np.array([*m, np.log(s * root[0, 0]), s * root[1, 0], np.log(s * root[1, 1])])
        for m in (mean, bod_posterior(y, points=401).moments_u()[0])
        for s in (1.0, 0.5)
    ]
    return _optimise_elbo(y, unpack, starts, nodes)


def bod_diagonal_vi_u(y, *, nodes=40):
    """Optimum of Gaussian variational inference in u with a diagonal covariance: mean, covariance, ELBO."""

    def unpack(p):
        root = np.diag(np.exp(p[2:]))
        return p[:2], root, lambda dm, dL: np.concatenate([dm, np.diag(dL) * np.diag(root)])

    means = bod_laplace_u(y)[0], bod_posterior(y, points=401).moments_u()[0]
    starts = [np.array([*m, np.log(s), np.log(s)]) for m in means for s in (0.1, 0.3)]
    return _optimise_elbo(y, unpack, starts, nodes)


# ------------------------------------------------------------------------------------------------ other problems


def linear_gaussian_posterior(prior_mean, prior_covariance, forward, noise, y):
    """Mean, covariance and log evidence by one scalar update for each datum.

    The evidence is the product of the one-step predictive densities.
    """
    mean, covariance, log_evidence = prior_mean, prior_covariance, 0.0
    for row, sd, datum in zip(forward, noise, y, strict=True):
        innovation, variance = datum - row @ mean, row @ covariance @ row + sd**2
        cross = covariance @ row
        mean = mean + cross * innovation / variance
        covariance = covariance - np.outer(cross, cross) / variance
        log_evidence += -0.5 * (np.log(2 * np.pi * variance) + innovation**2 / variance)
    return mean, covariance, float(log_evidence)


def eight_schools_posterior(y, sigma, *, location=5.0, scale=5.0):
    """Mean and standard deviation of mu, tau and theta, and log evidence, of the hierarchical model.

    mu ~ N(0, location^2), tau ~ HalfCauchy(scale), theta_j ~ N(mu, tau^2), y_j ~ N(theta_j, sigma_j^2). Given tau all
    else is Gaussian; tau = scale tan(pi v / 2) with v uniform on (0, 1) leaves one integral.
    """

    def integrand(v):
        tau = scale * np.tan(0.5 * np.pi * v)
        variance = sigma**2 + tau**2
        precision = 1 / location**2 + np.sum(1 / variance)
        mu = np.sum(y / variance) / precision
        exponent = np.sum(np.log(2 * np.pi * variance) + y**2 / variance)
        log_p = -0.5 * (exponent + np.log(location**2 * precision) - mu**2 * precision)
        shrink = tau**2 / variance
        theta = shrink * y + (1 - shrink) * mu
        theta_variance = shrink * sigma**2 + (1 - shrink) ** 2 / precision
        terms = [1, mu, mu**2 + 1 / precision, tau, tau**2, *theta, *(theta**2 + theta_variance)]
        return np.exp(log_p + 0.5 * np.sum(np.log(2 * np.pi * sigma**2))) * np.array(terms)

    total, _ = integrate.quad_vec(integrand, 0, 1, epsabs=0, epsrel=1e-11, norm="max")
    evidence, moments = total[0], total[1:] / total[0]
    theta, theta_square = np.split(moments[4:], 2)
    mean = {"mu": moments[0], "tau": moments[2], "theta": theta}
    square = {"mu": moments[1], "tau": moments[3], "theta": theta_square}
    sd = {name: np.sqrt(square[name] - mean[name] ** 2) for name in mean}
    return mean, sd, float(np.log(evidence) - 0.5 * np.sum(np.log(2 * np.pi * sigma**2)))
