"""Proposals that look at the step's data before they move a particle: Gaussian guides, and look-ahead weights.

A step takes a carry and noise z ~ N(0, I) to the next carry and to predicted data. A guided proposal draws z from a
Gaussian q that knows the data y, and weighs by p(y given carry, z) N(z; 0, I) / q(z): no transition density is needed,
and the weights are exact whatever q is.
"""

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.math.small_matrices import SMALL, eliminate, solve_factor
from pushforward.methods._base import check_integer
from pushforward.methods._proposals import Begun, Bootstrap, Proposal, Proposed, example, log_likelihood, riders_of
from pushforward.model._program import Program
from pushforward.model.state_space import Chain, Moved, StateSpace

_LENGTHS = (1.0, 0.5, 0.25, 0.125, 0.03125, 0.0)
_LOWEST = 10.0


class Guided(Proposal):
    """Base of Gaussian guides; subclasses are final."""

    @abstractmethod
    def draw(self, chain: Chain, state: Array, riders: list[Array], t: Array, normals: Array) -> tuple[Array, Array]:
        """Noise z (q,) of one particle's step as an affine map of standard normals e (q,), and log |dz / de|."""

    def move(self, chain: Chain, state: Array, riders: list[Array], memory: Any, t: Array, normals: Array) -> Proposed:
        """See `Proposal.move`."""

        def one(x: Array, riding: list[Array], e: Array) -> tuple[Moved, dict[str, Array], Array]:
            z, log_volume = self.draw(chain, x, riding, t, e)
            predicted = chain.step(x, riding, t, e).sites
            return chain.step(x, riding, t, z), predicted, 0.5 * (e @ e - z @ z) + log_volume

        axes = 0 if chain.structure.discrete else None
        moved, predicted, log_ratio = jax.vmap(one, (0, axes, 0))(state, riders, normals)
        value = log_likelihood(moved) + log_ratio
        return Proposed(moved.state, riders_of(chain, moved), memory, moved.sites, predicted, value)


class Optimal(Guided):
    """The exact law of the next state given the carry and the step's data (Doucet, Godsill and Andrieu 2000).

    For models whose transition is Gaussian and whose data are linear in the step's noise, with Gaussian noise of their
    own, which is verified by data flow; the drift may be anything. The weight, p(y given carry), does not depend on
    what is drawn, so that no proposal has weights of smaller variance.
    """

    def draw(self, chain: Chain, state: Array, riders: list[Array], t: Array, normals: Array) -> tuple[Array, Array]:
        """See `Guided.draw`."""
        mean, factor = _given_data(chain, state, riders, t, jnp.zeros_like(normals))
        return _spread(mean, factor, normals)

    def why_not(self, space: StateSpace) -> str | None:
        """Refuses data that are not Gaussian, or not linear in the noise of the step."""
        s = space.structure
        way = "use pf.Linearized() or pf.Newton()"
        if s.factors:
            return f"numpyro.factor '{s.factors[0]}' stands in the body of the scan, which no Gaussian holds; {way}"
        for name in _seen(space):
            kind, what = s.families[name]
            if kind != "gaussian":
                words = what if kind == "other" else f"is {what}, not Normal"
                return f"pf.Optimal() needs Gaussian data, and observed site '{name}' {words}; {way}"
        for name in s.latent:
            if name in s.inexact:
                return f"latent site '{name}' ({s.joint.sites[name].distribution}) is no map of Gaussian noise; {way}"
        reason = s.remember(("optimal", space.joined), lambda: _why_not_affine(space))
        return reason and f"{reason}; {way}"


class Linearized(Guided):
    """The law of the step's noise given its data, for the tangent of the predicted data (Doucet et al. 2000, II-D).

    The tangent is taken at z = 0, then at the mean that it gave (Gauss-Newton). Weights are exact, so that a poor
    tangent costs variance alone. Where the data's noise, not their mean, depends on the state, as in stochastic
    volatility, use `pf.Newton`.

    Args:
        iterations: number of tangents.
    """

    iterations: int = 1

    def __check_init__(self):
        check_integer("Linearized", 1, iterations=self.iterations)

    def draw(self, chain: Chain, state: Array, riders: list[Array], t: Array, normals: Array) -> tuple[Array, Array]:
        """See `Guided.draw`."""

        def improve(_: int, point: Array) -> Array:
            return _given_data(chain, state, riders, t, point)[0]

        point = jax.lax.fori_loop(0, self.iterations - 1, improve, jnp.zeros_like(normals))
        mean, factor = _given_data(chain, state, riders, t, point)
        return _spread(mean, factor, normals)

    def why_not(self, space: StateSpace) -> str | None:
        """Refuses data whose mean and variance say nothing of the noise of the step."""
        s = space.structure
        for name in _seen(space):
            kind, what = s.families[name]
            if kind == "other":
                return f"pf.Linearized() needs the mean and variance of observed site '{name}', which {what}; {_NEWTON}"
            if _on_noise(space, name, "noise") and not _on_noise(space, name, "mean"):
                return (
                    f"the variance of observed site '{name}' ({what}) depends on the state and its mean does not, so "
                    f"that a tangent of the mean says nothing; {_NEWTON}"
                )
        return None


_NEWTON = "use pf.Newton()"


class Newton(Guided):
    """Laplace's approximation of the law of the step's noise given its data (Doucet, Godsill and Andrieu 2000, II-D).

    Newton's method climbs log p(y given carry, z) - z'z / 2 from z = 0, with curvature of the first term counted where
    it is concave alone, so that q is never wider than the prior, and steps shortened where they do not climb. For data
    of any law with a gradient. Costs some q + 6 runs of the step for each iteration and particle.

    Args:
        iterations: number of expansions.
    """

    iterations: int = 3

    def __check_init__(self):
        check_integer("Newton", 1, iterations=self.iterations)

    def draw(self, chain: Chain, state: Array, riders: list[Array], t: Array, normals: Array) -> tuple[Array, Array]:
        """See `Guided.draw`."""
        q = normals.shape[0]

        def density(z: Array) -> Array:
            moved = chain.step(state, riders, t, z)
            return sum((jnp.sum(v) for v in moved.observed.log_prob.values()), moved.factor).astype(z.dtype)

        def target(z: Array) -> Array:
            value = density(z) - 0.5 * z @ z
            return jnp.where(jnp.isnan(value), -jnp.inf, value)

        # Forward mode goes through loops that reverse mode does not, and costs little more for a few inputs.
        gradient = jax.jacfwd(density) if q <= SMALL else jax.grad(density)

        def improve(_: int, point: tuple) -> tuple[Array, Array, Array]:
            slope, push = jax.linearize(gradient, point[0])
            hessian = jax.vmap(push)(jnp.eye(q, dtype=point[0].dtype))
            good = jnp.all(jnp.isfinite(slope)) & jnp.all(jnp.isfinite(hessian))
            root, log_volume = _narrowed(jnp.where(good, hessian, 0.0))
            direction = root @ (root.T @ jnp.where(good, slope - point[0], 0.0))
            trials = point[0] + jnp.asarray(_LENGTHS, point[0].dtype)[:, None] * direction
            return trials[jnp.argmax(jax.vmap(target)(trials))], root, log_volume

        start = (jnp.zeros_like(normals), jnp.eye(q, dtype=normals.dtype), jnp.zeros((), normals.dtype))
        mean, root, log_volume = jax.lax.fori_loop(0, self.iterations, improve, start)
        return mean + root @ normals, log_volume


class Auxiliary(Proposal):
    """Auxiliary particle filter (Pitt and Shephard 1999): resampling already knows how well each particle will fit.

    First-stage weights are the weights that the proposal gives at the center of its law: p(y given the prediction at
    z = 0) for `pf.Bootstrap`, p(y given carry) for `pf.Optimal`, whose particles then have equal weights, and Laplace's
    approximation of that for `pf.Linearized` and `pf.Newton`. The likelihood estimate stays unbiased.

    Args:
        proposal: how particles move.
    """

    proposal: Proposal = Bootstrap()

    def __check_init__(self):
        if not isinstance(self.proposal, Proposal) or isinstance(self.proposal, Auxiliary):
            raise MethodError(f"Auxiliary(...) takes another proposal, such as pf.Optimal(); got {self.proposal!r}.")

    @property
    def has_density(self) -> bool:
        """See `Proposal.has_density`."""
        return self.proposal.has_density

    def why_not(self, space: StateSpace) -> str | None:
        """See `Proposal.why_not`."""
        return self.proposal.why_not(space)

    def noise_dimension(self, chain: Chain) -> int:
        """See `Proposal.noise_dimension`."""
        return self.proposal.noise_dimension(chain)

    def begin(self, chain: Chain, noise: Array) -> Begun:
        """See `Proposal.begin`."""
        return self.proposal.begin(chain, noise)

    def look(self, chain: Chain, state: Array, riders: list[Array], memory: Any, t: Array) -> Array | None:
        """The proposal's weights at its center.

        They are held within a factor e^10 of the largest: with any positive function the likelihood estimate is
        unbiased, and a guess that is far too low would give the few copies of its particle enormous weights.
        """
        center = jnp.zeros((state.shape[0], self.proposal.noise_dimension(chain)), state.dtype)
        guess = self.proposal.move(chain, state, riders, memory, t, center).log_weight
        guess = jnp.where(jnp.isnan(guess), -jnp.inf, guess)
        top = jnp.max(guess)
        return jnp.where(jnp.isfinite(top), jnp.maximum(guess, top - _LOWEST), 0.0)

    def move(self, chain: Chain, state: Array, riders: list[Array], memory: Any, t: Array, normals: Array) -> Proposed:
        """See `Proposal.move`."""
        return self.proposal.move(chain, state, riders, memory, t, normals)

    def states(self, state: Array, memory: Any) -> Array:
        """See `Proposal.states`."""
        return self.proposal.states(state, memory)

    def smoothed(self, chain: Chain, noise: Array, history: Any, end: Any, last: Array, key: Key) -> Any:
        """See `Proposal.smoothed`."""
        return self.proposal.smoothed(chain, noise, history, end, last, key)


def _given_data(chain: Chain, state: Array, riders: list[Array], t: Array, point: Array) -> tuple[Array, Array]:
    """Mean and factor L, precision L L', of z given y = D z + d + v, v ~ N(0, R), by the tangent at a point.

    Precision I + D' R^-1 D; data that are missing, or without finite moments, drop out.
    """

    def run(z: Array) -> tuple[Array, Any]:
        observed = chain.step(state, riders, t, z).observed
        return observed.mean, observed

    predicted, push, observed = jax.linearize(run, point, has_aux=True)
    slopes = jax.vmap(push, out_axes=1)(jnp.eye(point.shape[0], dtype=point.dtype))
    residual = observed.data - predicted + slopes @ point
    variance = observed.noise if observed.noise.ndim == 1 else jnp.diagonal(observed.noise)
    use = jnp.isfinite(residual) & jnp.isfinite(variance) & (variance > 0) & jnp.all(jnp.isfinite(slopes), 1)
    rows = jnp.where(use[:, None], jnp.concatenate([slopes, residual[:, None]], 1), 0.0)
    if observed.noise.ndim == 1:
        rows = rows / jnp.sqrt(jnp.where(use, variance, 1.0))[:, None]
    else:
        both = use[:, None] & use[None]
        noise = jnp.where(both, observed.noise, jnp.eye(use.shape[0], dtype=rows.dtype))
        rows = solve_factor(eliminate(noise, use.shape[0]), rows, transposed=False)
    maps, right = rows[:, :-1], rows[:, -1:]
    q = point.shape[0]
    factor = eliminate(jnp.eye(q, dtype=rows.dtype) + maps.T @ maps, q)
    white = solve_factor(factor, maps.T @ right, transposed=False)
    mean = solve_factor(factor, white, transposed=True)[:, 0]
    good = jnp.all(jnp.isfinite(mean)) & jnp.all(jnp.isfinite(factor))
    return jnp.where(good, mean, 0.0), jnp.where(good, factor, jnp.eye(q, dtype=factor.dtype))


def _spread(mean: Array, factor: Array, normals: Array) -> tuple[Array, Array]:
    """A draw of N(mean, (L L')^-1) from standard normals, and the log volume of the map."""
    moved = solve_factor(factor, normals[:, None], transposed=True)[:, 0]
    return mean + moved, -jnp.sum(jnp.log(jnp.diagonal(factor)))


def _narrowed(hessian: Array) -> tuple[Array, Array]:
    """A root of (I + A)^-1, A the positive part of minus a Hessian (q, q), and the root's log determinant."""
    if hessian.shape[0] == 1:
        root = 1 / jnp.sqrt(1 + jnp.maximum(-hessian, 0.0))
        return root, jnp.log(root[0, 0])
    values, vectors = jnp.linalg.eigh(-0.5 * (hessian + hessian.T))
    scales = 1 + jnp.maximum(values, 0.0)
    return vectors / jnp.sqrt(scales), -0.5 * jnp.sum(jnp.log(scales))


def _seen(space: StateSpace) -> list[str]:
    """Observed sites of a step."""
    s = space.structure
    return [n for n in s.families if n not in s.first]


def _on_noise(space: StateSpace, name: str, part: str) -> bool:
    """Whether the mean or the variance of an observed site depends on the noise of its step."""
    s = space.structure
    if name in s.fused:
        return any(k[0] == "stacked" for k in s.around.sources("observed", name, part))
    return any(k[0] == "noise" for k in s.body.sources("observed", name, part))


def _why_not_affine(space: StateSpace) -> str | None:
    """Why predicted data are not affine in the step's noise, or their variance depends on it; or None."""
    s, inputs = space.structure, example(space)

    def step(chain: Chain, state: Array, riders: list[Array], step: Array, noise: Array) -> Any:
        return chain.step(state, riders, step, noise).observed

    def tangent(noise: Array, **given: Any) -> dict[str, Array]:
        slopes = jax.jacfwd(lambda z: step(noise=z, **given).mean)(noise)
        return {"slopes": slopes, "variance": step(noise=noise, **given).noise}

    program = Program(tangent, **inputs)
    names = _seen(space)
    if ("noise",) in program.sources("variance"):
        name = next((n for n in names if _on_noise(space, n, "noise")), names[0])
        return f"the variance of observed site '{name}' depends on the noise of its step"
    curved = ("noise",) in program.sources("slopes")
    lost = Program(lambda **given: {"mean": step(**given).mean}, **inputs).steps_of("noise")
    if not curved and not lost:
        return None
    name = next((n for n in names if _on_noise(space, n, "mean")), names[0])
    why = "" if curved else f": it contains jax's '{lost}'"
    return f"the mean of observed site '{name}' is not linear in the noise of its step (sites {list(s.latent)}){why}"
