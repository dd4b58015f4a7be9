"""`Pathfinder`: Gaussians along quasi-Newton paths, the best of each mixed and importance resampled."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods._base import Draws, Method, check_integer, count
from pushforward.methods._importance import evidence_summary, khat_warning
from pushforward.model.inverse import InverseProblem

_REPLICATES = 16
_ARMIJO = 1e-4
_SMALLEST_STEP = 1e-8
_TOLERANCE = 1e-5
_STARTS = 20


class Pathfinder(Method):
    """Multi-path Pathfinder: the cheapest look at a posterior, in a few hundred gradients.

    Each path starts at a prior draw of ``z`` and climbs log p(z, y) by L-BFGS. At every point of the path the
    inverse-Hessian estimate ``H = diag(alpha) + beta gamma beta^T`` gives a Gaussian
    ``N(x + H grad log p, H)``; the one of largest ELBO is kept, often from before the mode is reached. The kept
    Gaussians form the proposal ``q = sum_i w_i q_i`` with ``w_i`` proportional to ``exp(ELBO_i)``, which
    maximises the mixture's ELBO where they do not overlap. Proposals are resampled by Pareto-smoothed
    importance weights p / q into equally weighted draws.

    Use it for a first look, starting points, and well-informed posteriors; also for several modes, if a
    path finds each. Pareto k-hat above 0.7 says that draws are not to be trusted: use NUTS then.

    Args:
        paths: independent paths.
        memory: pairs of steps and gradients that H is built from; in fewer dimensions than that H can become exact.
        max_steps: evaluations of the gradient on each path at most.
        elbo_samples: draws that estimate the ELBO at each point of a path.
        proposals: draws of q that are weighted; at least as many as draws are asked for.

    Reference:
        Zhang, Carpenter, Gelman, Vehtari (2022), Pathfinder: parallel quasi-Newton variational inference, JMLR 23,
        algorithms 1 to 4. Here the line search backtracks, and multi-path weights are p over the mixture
        (Veach and Guibas 1995, balance heuristic) in place of p over each path's own Gaussian, which counts
        a mode twice where two paths find it.

    Example:
        >>> import pushforward as pf
        >>> pf.Pathfinder(paths=4).memory
        30
    """

    paths: int = 8
    memory: int = 30
    max_steps: int = 200
    elbo_samples: int = 50
    proposals: int = 4000

    shards = "paths"
    gradients = True

    def __check_init__(self):
        check_integer("Pathfinder", 1, paths=self.paths, memory=self.memory, max_steps=self.max_steps)
        check_integer("Pathfinder", 2, elbo_samples=self.elbo_samples)
        check_integer("Pathfinder", 100, proposals=self.proposals)

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        noise, generator = _noise(self, key, draws, problem.dimension)
        found, z, lp, log_weights = jax.device_get(runner.call(_fit, self, problem, noise, runner.mesh))
        with np.errstate(invalid="ignore"):  # where the likelihood is zero under q, its ELBO is -inf
            summary = evidence_summary(log_weights)
        summary |= {"steps": found.evaluations.max(), "paths_usable": np.isfinite(found.elbo).sum()}
        climbs = self.paths * int(found.evaluations.max())  # under vmap all paths take as many as the longest
        runs = climbs * (1 + self.elbo_samples) + log_weights.size
        outcome = np.asarray(int(_outcome(self, found, log_weights)))
        chosen = _resample(log_weights.ravel(), draws, generator)
        return Draws(
            z[chosen][None], {"lp": lp[chosen][None]}, summary, outcome, count(runs), count(climbs), log_weights
        )

    def warnings(self, draws: Draws) -> list[str]:
        """Pareto k-hat above 0.7."""
        return khat_warning(float(draws.summary["khat"]), "Use NUTS, TemperedSMC or FlowVI.")


class _Gaussian(eqx.Module):
    """N(mean, D (I + Q (L L^T - I) Q^T) D) with D = diag(scale) and orthonormal columns Q."""

    mean: Array
    scale: Array
    basis: Array
    root: Array

    def sample(self, noise: Array) -> Array:
        """The draw that belongs to `noise` ~ N(0, I)."""
        within = self.basis.T @ noise
        return self.mean + self.scale * (noise + self.basis @ (self.root @ within - within))

    def log_density(self, z: Array) -> Array:
        """log q(z)."""
        noise = (z - self.mean) / self.scale
        within = self.basis.T @ noise
        noise = noise + self.basis @ (solve_triangular(self.root, within, lower=True) - within)
        logdet = jnp.sum(jnp.log(self.scale)) + jnp.sum(jnp.log(jnp.diag(self.root)))
        return -0.5 * jnp.sum(noise**2) - logdet - 0.5 * z.size * jnp.log(2 * jnp.pi)


class _Path(eqx.Module):
    """State of one path between two evaluations: the point reached, the trial, and the best Gaussian."""

    x: Array
    value: Array
    gradient: Array
    alpha: Array
    steps: Array
    changes: Array
    direction: Array
    length: Array
    best: _Gaussian
    elbo: Array
    evaluations: Array
    done: Array


def _gaussian(x: Array, gradient: Array, alpha: Array, steps: Array, changes: Array) -> tuple[_Gaussian, Array]:
    """The Gaussian at x and the quasi-Newton direction -H gradient, of -log p.

    Zhang et al. (2022), algorithm 4; `steps` S and `changes` of the gradient Z have shape (memory, d), with
    rows of zeros where a pair is missing or was refused.
    """
    products = steps @ changes.T
    eta = jnp.diag(products)
    triangle = jnp.triu(products) + jnp.diag(jnp.where(eta == 0, 1.0, 0.0))
    inverse = solve_triangular(triangle, jnp.eye(eta.size, dtype=x.dtype))
    corner = inverse.T @ (jnp.diag(eta) + (changes * alpha) @ changes.T) @ inverse
    gamma = jnp.block([[jnp.zeros_like(corner), -inverse], [-inverse.T, corner]])
    scale = jnp.sqrt(alpha)
    beta = jnp.concatenate([alpha * changes, steps]).T
    basis, upper = jnp.linalg.qr(beta / scale[:, None])
    root = jnp.linalg.cholesky(jnp.eye(upper.shape[0], dtype=x.dtype) + upper @ gamma @ upper.T)
    direction = -(alpha * gradient + beta @ (gamma @ (beta.T @ gradient)))
    return _Gaussian(x + direction, scale, basis, root), direction


class _Noise(eqx.Module):
    """All random numbers of a run, made on the host so that nothing of it is compiled.

    `elbo` is the same for all points of a path, so that they are compared on common noise.
    """

    starts: Array
    elbo: Array
    offsets: Array
    proposals: Array


def _noise(method: Pathfinder, key: Key, draws: int, d: int) -> tuple[_Noise, np.random.Generator]:
    """Noise, and the generator that made it."""
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    size = -(-max(method.proposals, draws) // _REPLICATES)
    made = (
        generator.standard_normal((method.paths, _STARTS, d)),
        generator.standard_normal((method.paths, method.elbo_samples, d)),
        generator.random((_REPLICATES, 1)),
        generator.standard_normal((_REPLICATES * size, d)),
    )
    return _Noise(*(jnp.asarray(x, jnp.result_type(float)) for x in made)), generator


def _fit(
    method: Pathfinder, problem: InverseProblem, noise: _Noise, mesh: Mesh | None
) -> tuple["_Path", Array, Array, Array]:
    """Paths; proposals and their log densities; their log weights, shape (replicate, proposal)."""
    climb = parallel.vmap(lambda starts, elbo: _climb(method, problem, starts, elbo), mesh)
    found = climb(noise.starts, noise.elbo)
    return found, *_propose(found, noise, problem)


def _outcome(method: Pathfinder, found: "_Path", log_weights: Array) -> Outcome:
    """Success if one path has come to an end, and its Gaussian meets the posterior."""
    usable = np.isfinite(found.elbo)
    if not np.isfinite(found.value).any():
        return Outcome.NONFINITE_START
    if not usable.any() or not np.isfinite(log_weights).any():
        return Outcome.NONFINITE
    ended = usable & found.done
    return Outcome.SUCCESS if ended.any() else Outcome.MAXIMUM_STEPS


def _climb(method: Pathfinder, problem: InverseProblem, starts: Array, noise: Array) -> _Path:
    """One path: L-BFGS with backtracking, one evaluation of value and gradient per turn of the loop."""
    d, dtype = problem.dimension, starts.dtype
    evaluate = jax.value_and_grad(lambda z: -problem.log_density(z))

    def turn(p: _Path) -> _Path:
        started = jnp.isfinite(p.value)
        # Until a start with a finite value and gradient is found, the trial is another prior draw.
        trial = jnp.where(started, p.x + p.length * p.direction, starts[p.evaluations % _STARTS])
        value, gradient = evaluate(trial)
        moved, accepted = _accept(p, trial, value, gradient, started)
        return _keep_best(moved, accepted, noise, problem)

    zero, inf, rank = jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype), min(d, 2 * method.memory)
    empty, pairs = jnp.zeros(d, dtype), jnp.zeros((method.memory, d), dtype)
    nothing = _Gaussian(empty, empty + 1, jnp.zeros((d, rank), dtype), jnp.eye(rank, dtype=dtype))
    first = _Path(
        empty, inf, empty, empty + 1, pairs, pairs, empty, zero + 1, nothing, -inf, jnp.zeros((), int), zero > 0
    )
    return jax.lax.while_loop(lambda p: ~p.done & (p.evaluations < method.max_steps), turn, first)


def _accept(p: _Path, trial: Array, value: Array, gradient: Array, started: Array) -> tuple[_Path, Array]:
    """Armijo's test; if passed, the pair (s, z) enters the memory, else the step is shortened."""
    from blackjax.optimizers.lbfgs import lbfgs_recover_alpha

    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient))
    slope = p.direction @ p.gradient
    noise = 10 * jnp.finfo(value.dtype).eps * jnp.abs(p.value)
    lower = value <= p.value + _ARMIJO * p.length * slope + noise
    accepted = finite & (lower | ~started)
    s, change = trial - p.x, gradient - p.gradient
    alpha, mask = lbfgs_recover_alpha(p.alpha, s, change)
    fresh = accepted & started & mask[0] & jnp.all(jnp.isfinite(alpha) & (alpha > 0))

    def push(rows: Array, row: Array) -> Array:
        return jnp.where(fresh, jnp.concatenate([rows[1:], row[None]]), rows)

    gained = p.value - value
    length = jnp.where(accepted, 1.0, p.length / 2).astype(p.length.dtype)
    stuck = started & (length < _SMALLEST_STEP)
    level = started & accepted & (jnp.abs(gained) < _TOLERANCE) & (-0.5 * slope < _TOLERANCE)
    moved = _Path(
        x=jnp.where(accepted, trial, p.x),
        value=jnp.where(accepted, value, p.value),
        gradient=jnp.where(accepted, gradient, p.gradient),
        alpha=jnp.where(fresh, alpha, p.alpha),
        steps=push(p.steps, s),
        changes=push(p.changes, change),
        direction=p.direction,
        length=length,
        best=p.best,
        elbo=p.elbo,
        evaluations=p.evaluations + 1,
        done=stuck | level,
    )
    return moved, accepted


def _keep_best(p: _Path, accepted: Array, noise: Array, problem: InverseProblem) -> _Path:
    """Build the Gaussian at the new point, estimate its ELBO, and take the next direction from it."""
    q, direction = _gaussian(p.x, p.gradient, p.alpha, p.steps, p.changes)
    z = jax.vmap(q.sample)(noise)
    elbo = jnp.mean(jax.vmap(problem.log_density)(z) - jax.vmap(q.log_density)(z))
    better = accepted & jnp.isfinite(elbo) & (elbo > p.elbo)
    downhill = jnp.all(jnp.isfinite(direction)) & (direction @ p.gradient < 0)
    direction = jnp.where(downhill, direction, -p.gradient)
    # In z the prior has scale 1, so that no step need be longer than a few times sqrt(d).
    reach = 2 * jnp.sqrt(p.x.size) / jnp.maximum(jnp.linalg.norm(direction), jnp.finfo(direction.dtype).tiny)
    return eqx.tree_at(
        lambda t: (t.best, t.elbo, t.direction, t.length),
        p,
        (
            jax.tree.map(lambda a, b: jnp.where(better, a, b), q, p.best),
            jnp.where(better, elbo, p.elbo).astype(p.elbo.dtype),
            jnp.where(accepted, direction, p.direction),
            jnp.where(accepted, jnp.minimum(1.0, reach), p.length).astype(p.length.dtype),
        ),
    )


def _propose(found: _Path, noise: _Noise, problem: InverseProblem) -> tuple[Array, Array, Array]:
    """Draws of the mixture, their log densities, and log weights of shape (replicate, proposal)."""
    usable, replicates = jnp.isfinite(found.elbo), noise.offsets.shape[0]
    size = noise.proposals.shape[0] // replicates
    log_shares = jnp.where(usable, jax.nn.log_softmax(jnp.where(usable, found.elbo, -1e30)), -jnp.inf)
    # Systematic: each replicate takes its share of draws from each path, up to rounding.
    grid = ((jnp.arange(size) + noise.offsets) / size).ravel()
    path = jnp.sum(grid[:, None] > jnp.cumsum(jnp.exp(log_shares))[:-1], axis=1)
    every = jax.vmap(lambda q: jax.vmap(q.sample)(noise.proposals))(found.best)
    z = every[path, jnp.arange(path.size)]
    densities = jax.vmap(lambda q: jax.vmap(q.log_density)(z))(found.best)
    log_q = logsumexp(jnp.where(usable[:, None], densities + log_shares[:, None], -jnp.inf), axis=0)
    lp = jax.vmap(problem.log_density)(z)
    log_weights = jnp.where(jnp.isfinite(lp - log_q), lp - log_q, -jnp.inf)
    return z, lp, log_weights.reshape(replicates, size)


def _resample(log_weights: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of equally weighted draws: smoothed weights, systematic, in random order."""
    weights = _smoothed(log_weights) if np.isfinite(log_weights).any() else np.ones(log_weights.size)
    grid = (np.arange(draws) + generator.random()) / draws
    cumulative = np.cumsum(weights / weights.sum())
    # Rounding may leave the last sum below 1; side="right" never takes a weight of zero.
    chosen = np.searchsorted(cumulative / cumulative[-1], grid, side="right")
    return generator.permutation(chosen)


def _smoothed(log_weights: np.ndarray) -> np.ndarray:
    """Weights whose largest 3 sqrt(n) are replaced by quantiles of the Pareto law fitted to them.

    Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling, JMLR 25, algorithm 1.
    """
    weights = np.exp(np.asarray(log_weights, float) - np.max(log_weights))
    size = int(min(0.2 * weights.size, 3 * np.sqrt(weights.size)))
    order = np.argsort(weights)
    tail, cutoff = order[-size:], weights[order[-size - 1]]
    excess = weights[tail] - cutoff
    if size < 5 or not excess[size // 4] > 0:
        return weights
    shape, scale = _fit_pareto(excess)
    level = -np.log1p(-(np.arange(size) + 0.5) / size)
    quantiles = scale * (level if abs(shape) < 1e-8 else np.expm1(shape * level) / shape)
    weights[tail] = np.minimum(cutoff + quantiles, 1.0)
    return weights


def _fit_pareto(excess: np.ndarray) -> tuple[float, float]:
    """Shape and scale of the generalised Pareto law of ascending positive values.

    Zhang and Stephens (2009), A new and efficient estimation method for the generalized Pareto distribution,
    Technometrics 51, doi:10.1198/tech.2009.08017; the shape is shrunk towards 0.5 as in Vehtari et al. (2024).
    """
    n, prior = excess.size, 3.0
    nodes = 30 + int(np.sqrt(n))
    theta = 1 / excess[-1] + (1 - np.sqrt(nodes / (np.arange(1, nodes + 1) - 0.5))) / (
        prior * excess[int(n / 4 + 0.5) - 1]
    )
    shapes = np.log1p(-theta[:, None] * excess).mean(1)
    profile = n * (np.log(-theta / shapes) - shapes - 1)
    mean = np.sum(theta * np.exp(profile - profile.max())) / np.sum(np.exp(profile - profile.max()))
    shape = np.log1p(-mean * excess).mean()
    return (n * shape + 5) / (n + 10), -shape / mean
