"""Score-based sampling of trajectories against exact laws of a linear Gaussian chain, without training or Monte Carlo.

With an affine denoiser a sampler is an affine map of its start, so its law follows from a basis pushed through it. The
chain: x_i in R^2, x_{i+1} = rho Rot(2 pi / 30) x_i + N(0, (1 - rho^2) I), stationary covariance I, 65 states, the first
coordinate observed ("lo": every 8th state, sd 0.05; "hi": every state, sd 0.25). Deterministic identities have no false
alarms; statistical ones state theirs.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushforward.math import diffusion, diffusion_samplers, guidance, window_scores

LENGTH, SIZE = 65, 130
RHO = {"smooth": 0.995, "rough": 0.9}
LEVELS = np.geomspace(1e-2, 80.0, 10)


@pytest.fixture(autouse=True)
def strict(float64):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def close(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ exact laws, numpy


@functools.cache
def chain(kind):
    """Covariance of the chain, flat."""
    angle = 2 * np.pi / 30
    move = RHO[kind] * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    powers = [np.linalg.matrix_power(move, i) for i in range(LENGTH)]
    blocks = [[powers[i - j] if i >= j else powers[j - i].T for j in range(LENGTH)] for i in range(LENGTH)]
    return np.block(blocks)


@functools.cache
def observed(kind, where, seed=0):
    """Operator, variances, data, and mean and covariance of the posterior, which is what a smoother gives."""
    covariance, (every, sd) = chain(kind), {"lo": (8, 0.05), "hi": (1, 0.25)}[where]
    operator = np.eye(SIZE)[:: 2 * every]
    r = np.random.default_rng(seed)
    data = operator @ np.linalg.cholesky(covariance) @ r.standard_normal(SIZE) + sd * r.standard_normal(len(operator))
    variances = np.full(len(operator), sd**2)
    gain = np.linalg.solve(operator @ covariance @ operator.T + np.diag(variances), operator @ covariance).T
    return operator, variances, data, gain @ data, covariance - gain @ operator @ covariance


def denoiser(mean, covariance):
    """Of N(mean, covariance), one flat state."""
    values, vectors = map(jnp.asarray, np.linalg.eigh((covariance + covariance.T) / 2))
    mean = jnp.asarray(mean)
    return lambda x, s: mean + vectors @ (values / (values + s**2) * ((x - mean) @ vectors))


def prior(kind):
    return denoiser(np.zeros(SIZE), chain(kind))


def composed(kind, k):
    """The denoiser of the chain composed of exact windows."""
    width = 2 * min(2 * k + 1, LENGTH)
    local = denoiser(np.zeros(width), chain(kind)[:width, :width])

    def denoise(x, s):
        states = x.reshape(LENGTH, 2)
        return window_scores.composed(lambda w: local(w.ravel(), s).reshape(w.shape), states, k).ravel()

    return denoise


def affine(function, size=SIZE):
    """Offset and matrix of an affine function of a state."""
    values = np.asarray(jax.jit(jax.vmap(function))(jnp.concatenate([jnp.zeros((1, size)), jnp.eye(size)])))
    return values[0], (values[1:] - values[:1]).T


def law(sampler, denoise, grid, size=SIZE):
    """Mean and covariance of a sampler that starts at N(0, grid[0]^2 I)."""
    mean, matrix = affine(lambda x: sampler(denoise, x, grid), size)
    return mean, float(grid[0]) ** 2 * matrix @ matrix.T


def law_of_moves(advance, denoise, grid, moves, delta):
    """Mean and covariance of a sampler whose steps are each followed by Langevin moves of a fixed size."""
    still = jnp.zeros(SIZE)
    basis = jnp.concatenate([still[None], jnp.eye(SIZE)])

    def matrices(function):
        def columns(level, following):
            values = jax.vmap(lambda x: function(x, level, following))(basis)
            return values[0], (values[1:] - values[:1]).T

        return jax.jit(columns)

    step = matrices(lambda x, a, b: advance(denoise, x, a, b))
    last = matrices(lambda x, a, b: diffusion_samplers.ddim_step(denoise, x, a, b))
    move = matrices(lambda x, a, b: diffusion_samplers.langevin_step(denoise, x, b, still, delta=delta))
    m, C = np.zeros(SIZE), float(grid[0]) ** 2 * np.eye(SIZE)
    for level, following in itertools.pairwise(grid):
        ended = following == grid[-1]
        offset, matrix = map(np.asarray, (last if ended else step)(level, following))
        m, C = matrix @ m + offset, matrix @ C @ matrix.T
        if not ended:
            offset, matrix = map(np.asarray, move(level, following))
            for _ in range(moves):
                m = matrix @ m + offset
                C = matrix @ C @ matrix.T + 2 * delta * float(following) ** 2 * np.eye(SIZE)
    return m, C


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T


def distances(actual, exact):
    """RMS of mean errors in sds; sd ratios; KL(actual, exact) per dimension; relative Wasserstein distance."""
    (m, C), (mean, covariance) = actual, exact
    sd, size = np.sqrt(np.diag(covariance)), len(m)
    error = m - mean
    determinants = np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(C)[1]
    traces = np.trace(np.linalg.solve(covariance, C)) + error @ np.linalg.solve(covariance, error)
    half = root(covariance)
    w2 = error @ error + np.trace(C) + np.trace(covariance) - 2 * np.trace(root(half @ C @ half))
    return (
        np.sqrt(np.mean((error / sd) ** 2)),
        np.sqrt(np.diag(C)) / sd,
        (traces - size + determinants) / (2 * size),
        np.sqrt(max(w2, 0.0) / np.trace(covariance)),
    )


# ------------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("time", [0.0, 0.3, 0.7, 1.0])
def test_conversions(time):
    mu, sigma = diffusion.cosine(time)
    clean, noise = np.random.default_rng(0).standard_normal((2, 4, 3))
    x = mu * clean + sigma * noise
    told = {"score": -noise / sigma, "noise": noise, "velocity": mu * noise - sigma * clean}
    for name, value in told.items():
        # x holds clean with a relative error eps / mu: 1e-10 leaves room for mu = 1e-3.
        close(getattr(diffusion, f"denoised_from_{name}")(x, value, mu, sigma), clean)
        close(getattr(diffusion, f"{name}_from_denoised")(x, clean, mu, sigma) * sigma, value * sigma)


def test_the_score_of_a_gaussian_is_that_of_its_denoiser():
    mean, variance, mu, sigma, x = 0.7, 2.0, 0.6, 0.8, jnp.array([1.3])
    exact = -(x - mu * mean) / (mu**2 * variance + sigma**2)
    denoised = denoiser(np.array([mean]), np.array([[variance]]))(x / mu, sigma / mu)
    close(diffusion.score_from_denoised(x, denoised, mu, sigma), exact)


def test_cosine_schedule_check_values():
    mu, sigma = diffusion.cosine(jnp.array([0.0, 0.5, 1.0]))
    close(mu, [1.0, (1.0 + np.sqrt(1e-3)) / 2, 1e-3])
    close(sigma**2, 1.0 - mu**2 + 1e-6, 1e-14)
    close(sigma[0], 1e-3)
    mu, sigma = diffusion.cosine(0.5, least=0.04, floor=0.01)
    close([mu, sigma**2], [0.6, 0.65])
    times = jnp.linspace(0.02, 1.0, 9)
    for options in ({}, {"least": 0.04, "floor": 0.01}):
        mu, sigma = diffusion.cosine(times, **options)
        close(diffusion.cosine_time(sigma / mu, **options), times, 1e-9)
    close(diffusion.cosine_time(1e-9), 0.0)


def test_a_denoiser_of_times_becomes_one_of_levels():
    mean, variance = 0.7, 2.0

    def scheduled(x, time):
        mu, sigma = diffusion.cosine(time)
        return mean + mu * variance / (mu**2 * variance + sigma**2) * (x - mu * mean)

    exact = denoiser(np.array([mean]), np.array([[variance]]))
    for level in LEVELS:
        x = jnp.array([mean + 1.3 * level])
        close(diffusion.in_levels(scheduled)(x, level), exact(x, level), 1e-8)


def test_preconditioning_keeps_variances_at_one():
    data_sd = 0.7
    for level in LEVELS:
        scales = diffusion.preconditioning(level, data_sd)
        close(scales.inner**2 * (data_sd**2 + level**2), 1.0)
        # The target of F is (x0 - skip x) / out; the skip is the regression of x0 on x, for which `out` is least.
        close((1.0 - scales.skip) ** 2 * data_sd**2 + scales.skip**2 * level**2, scales.out**2)
        close(scales.skip, data_sd**2 / (data_sd**2 + level**2))
        close(diffusion.loss_weight(level, data_sd) * scales.out**2, 1.0)
        close(scales.condition, np.log(level) / 4)
    assert float(diffusion.preconditioning(0.0, data_sd).skip) == pytest.approx(1.0)


def test_preconditioned_network():
    x, seen = jnp.array([1.0, -2.0]), []
    denoise = diffusion.preconditioned(lambda x, condition: seen.append((x, condition)) or jnp.full(2, 5.0), 0.5)
    scales = diffusion.preconditioning(2.0, 0.5)
    close(denoise(x, 2.0), scales.skip * x + scales.out * 5.0)
    close(seen[0][0], scales.inner * x)
    close(seen[0][1], np.log(2.0) / 4)
    # A network that says 0 is exact for N(0, d^2).
    close(diffusion.preconditioned(lambda x, _: 0.0 * x, 0.5)(x, 2.0), 0.25 / 4.25 * x)


def test_weights_and_levels_of_training():
    x, clean, guess, level = jnp.array([1.0]), jnp.array([0.3]), jnp.array([0.5]), 1.7
    noise, guessed = (diffusion.noise_from_denoised(x, value, 1.0, level) for value in (clean, guess))
    close(diffusion.noise_loss_weight(level) * (guess - clean) ** 2, (guessed - noise) ** 2)
    close(diffusion.training_levels(jnp.array([0.0, 2.0])), np.exp([-1.2, 1.2]))
    close(diffusion.training_levels(jnp.array([0.0, 2.0]), location=1.0, scale=0.5), np.exp([1.0, 2.0]))


def test_grids():
    grid = diffusion.power_grid(5, lowest=0.1, highest=3.0)
    close(np.diff(grid[:-1] ** (1 / 7), 2), 0.0)
    close(grid[jnp.array([0, -2, -1])], [3.0, 0.1, 0.0])
    close(diffusion.power_grid(3, lowest=1.0, highest=3.0, power=1.0), [3.0, 2.0, 1.0, 0.0])
    grid = diffusion.cosine_grid(4)
    mu, sigma = diffusion.cosine(0.75)
    close(grid[jnp.array([0, 1, -1])], [1e3, sigma / mu, 1e-3], 1e-9)


# ---------------------------------------------------------------------------------------------------------- samplers

# Sampler, grid; mean error, least and greatest mean sd ratio, KL per dimension, W2: the figures to be met.
LAWS = {
    "ddim 256": (diffusion_samplers.ddim, ("cosine", 256), 0.0015, (0.981, 0.984), 0.0023, 0.020),
    "heun 64": (diffusion_samplers.heun, ("power", 64, 80.0), 0.0101, (1.003, 1.005), 5e-5, 0.011),
    "multistep 64": (diffusion_samplers.multistep, ("power", 64, 300.0), 0.0031, (1.006, 1.009), 1.1e-4, 0.0081),
    "multistep 128": (diffusion_samplers.multistep, ("power", 128, 300.0), 0.0031, (1.001, 1.002), 5e-5, 0.0032),
}


def grid_of(kind, steps, highest=80.0):
    return diffusion.cosine_grid(steps) if kind == "cosine" else diffusion.power_grid(steps, highest=highest)


@pytest.mark.parametrize("name", LAWS)
def test_laws_of_samplers_on_the_chain(name):
    sampler, grid, dm, (low, high), kl, w2 = LAWS[name]
    *_, mean, covariance = observed("smooth", "lo")
    found = distances(law(sampler, denoiser(mean, covariance), grid_of(*grid)), (mean, covariance))
    assert found[0] <= dm
    assert low <= found[1].mean() <= high
    assert abs(found[1] - 1.0).max() <= (0.06 if "ddim" in name else 0.02)
    assert found[2] <= kl
    assert found[3] <= w2


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("multistep", 2)])
def test_orders_of_convergence(name, order):
    # The flow of the ODE from level s to s' multiplies x - mean by sqrt((c + s'^2) / (c + s^2)).
    variances = np.array([1.0, 0.04, 4.0])
    denoise = denoiser(np.zeros(3), np.diag(variances))

    def error(steps):
        grid = jnp.linspace(10.0 ** (1 / 7), 0.02 ** (1 / 7), steps + 1) ** 7
        _, matrix = affine(lambda x: getattr(diffusion_samplers, name)(denoise, x, grid), 3)
        return abs(np.diag(matrix) / np.sqrt((variances + 0.02**2) / (variances + 10.0**2)) - 1.0)

    ratios = np.log2(error(64) / error(128))
    assert abs(ratios - order).max() < 0.2, ratios


def test_multistep_is_exact_where_the_denoiser_is_linear_in_the_logarithm():
    # D = a + b log s for s seen by the method; x' - x s' / s = integral of D s' / s^2 over levels.
    grid = jnp.array([4.0, 2.0, 1.0, 0.8, 0.5])
    weights = diffusion_samplers.multistep_weights(grid)
    steps = np.log(np.array([2.0, 2.0, 1.25]))
    close(weights, [0.0, 0.5 * steps[1] / steps[0], 0.5 * steps[2] / steps[1], 0.0])
    close(diffusion_samplers.multistep_weights(jnp.array([2.0, 1.0, 0.0])), [0.0, 0.0])


def coefficients(step, size):
    """Factors of the state and of the noise in a step that is linear in both and acts on coordinates one by one."""
    one, zero = jnp.ones(size), jnp.zeros(size)
    return np.asarray(step(one, zero)), np.asarray(step(zero, one))


def test_ancestral_steps():
    variances = np.array([1.0, 0.04, 4.0])
    denoise = denoiser(np.zeros(3), np.diag(variances))
    level, following = 2.0, 1.5
    shrink = variances / (variances + level**2)
    for churn in (0.0, 0.4, 1.0):
        of_state, of_noise = coefficients(
            lambda x, n, churn=churn: diffusion_samplers.ancestral_step(denoise, x, level, following, n, churn=churn), 3
        )
        fresh = churn**2 * following**2 * (1 - following**2 / level**2)
        close(of_noise**2, fresh)
        close(of_state, shrink + np.sqrt(following**2 - fresh) / level * (1 - shrink))
    # With churn 1 the mean given x is exact: the regression of x' on x, (c + s'^2) / (c + s^2).
    close(of_state, (variances + following**2) / (variances + level**2))
    close(diffusion_samplers.ancestral_step(denoise, jnp.ones(3), level, 0.0, jnp.ones(3)), shrink)


def ancestral_variances(steps, variances):
    """Of the sampler from level 10 to 0.02, by its own steps."""
    denoise, grid = denoiser(np.zeros(len(variances)), np.diag(variances)), np.geomspace(10.0, 0.02, steps + 1)
    step = jax.jit(functools.partial(diffusion_samplers.ancestral_step, denoise))
    now = np.full(len(variances), grid[0] ** 2)
    for level, following in itertools.pairwise(grid):
        of_state, of_noise = coefficients(lambda x, n, a=level, b=following: step(x, a, b, n), len(variances))
        now = of_state**2 * now + of_noise**2
    return now


def test_ancestral_sampling_converges_at_first_order():
    variances = np.array([1.0, 0.04])
    errors = [abs(np.sqrt(ancestral_variances(n, variances) / (variances + 0.02**2)) - 1.0) for n in (128, 256)]
    assert abs(np.log2(errors[0] / errors[1]) - 1.0).max() < 0.1
    assert errors[1].max() < 0.05


def test_draws_of_the_stochastic_samplers():
    """1024 draws: two means and two variances, at 5 sd; false-alarm rate below 1e-5."""
    variances, members = np.array([1.0, 0.04]), 1024
    denoise, grid = denoiser(np.zeros(2), np.diag(variances)), jnp.geomspace(10.0, 0.02, 33)
    keys = jax.random.split(jax.random.key(0), members)
    start = 10.0 * jax.random.normal(jax.random.key(1), (members, 2))
    sample = jax.jit(
        jax.vmap(lambda x, key, churn: diffusion_samplers.ancestral(denoise, x, grid, key, churn=churn), (0, 0, None))
    )
    draws = sample(start, keys, 1.0)
    expected = ancestral_variances(32, variances)
    for column, variance in zip(np.asarray(draws).T, expected, strict=True):
        assert abs(column.mean()) < 5 * np.sqrt(variance / members)
        assert abs(np.sum(column**2) / variance - members) < 5 * np.sqrt(2 * members)
    close(sample(start, keys, 0.0), jax.vmap(lambda x: diffusion_samplers.ddim(denoise, x, grid))(start))


def test_langevin_moves_settle_where_said():
    variances, level, delta = np.array([1.0, 0.04, 0.0]), 0.5, 0.3
    denoise = denoiser(np.zeros(3), np.diag(variances))
    of_state, of_noise = coefficients(
        lambda x, n: diffusion_samplers.langevin_step(denoise, x, level, n, delta=delta), 3
    )
    settled = (variances + level**2) / (1 - delta * level**2 / (2 * (variances + level**2)))
    close(of_state**2 * settled + of_noise**2, settled)
    # The state decides the size where none is given.
    x = jnp.array([3.0, 1.0, -2.0])
    noise = (x - denoise(x, level)) / level
    chosen = diffusion_samplers.stable_delta(noise, tau=0.2)
    close(chosen, 0.2 / np.mean(noise**2))
    move = diffusion_samplers.langevin_step(denoise, x, level, jnp.zeros(3), tau=0.2)
    close(move, diffusion_samplers.langevin_step(denoise, x, level, jnp.zeros(3), delta=chosen))
    close(diffusion_samplers.stable_delta(0.01 * noise), 0.1)
    close(diffusion_samplers.stable_delta(0.01 * noise, curvature=4.0), 0.025)


def test_the_bound_keeps_a_narrow_direction_stable():
    # One narrow direction among 130 at a low level: tau / mean(eps^2) alone is 13 in the units where 2 is the limit.
    variances, level = np.where(np.arange(SIZE) == 0, 0.0, 1.0), 1e-2
    denoise = denoiser(np.zeros(SIZE), np.diag(variances))
    noises = jax.random.normal(jax.random.key(0), (100, SIZE))
    start = jnp.asarray(np.sqrt(variances + level**2)) * noises[0]

    @jax.jit
    def largest(bound):
        def move(x, noise):
            delta = 0.1 / jnp.maximum(jnp.mean(((x - denoise(x, level)) / level) ** 2), bound)
            x = diffusion_samplers.langevin_step(denoise, x, level, noise, delta=delta)
            return x, jnp.abs(x[0]) / level

        return jnp.max(jax.lax.scan(move, start, noises)[1])

    assert largest(1.0) < 6.0  # a settled sd of 1.03, 100 moves: false-alarm rate below 1e-6
    assert largest(0.0) > 8.0
    assert diffusion_samplers.stable_delta((start - denoise(start, level)) / level) == 0.1


def test_corrections_keep_the_law_of_an_exact_denoiser():
    """1024 draws: mean and variance of two coordinates at 5 sd; false-alarm rate below 1e-5.

    At the last level with moves, s = 0.02, variances are those of `langevin_step`; the bias of `ddim` is forgotten.
    """
    variances, members = np.array([0.0, 1e-4]), 1024
    denoise = denoiser(np.zeros(2), np.diag(variances))
    grid = jnp.concatenate([jnp.geomspace(1.0, 0.02, 9), jnp.array([0.01])])

    keys = jax.random.split(jax.random.key(2), members)
    start = jax.random.normal(jax.random.key(3), (members, 2))
    sample = functools.partial(diffusion_samplers.corrected, corrections=20, curvatures=jnp.full(9, 4.0))
    run = jax.jit(lambda tau: jax.vmap(lambda x, key: sample(denoise, x, grid, key, tau=tau))(start, keys))
    # Moves of size 0 leave the predictor.
    close(run(0.0), jax.vmap(lambda x: diffusion_samplers.ddim(denoise, x, grid))(start))
    # curvature 4 exceeds mean(eps^2) but for one state in 1e3, so delta is tau / 4.
    draws, total, delta = np.asarray(run(0.8)), variances + 0.02**2, 0.2
    settled = total / (1 - delta * 0.02**2 / (2 * total))
    ratio = (variances + 0.01 * 0.02) / total  # ddim from 0.02 to 0.01
    for column, variance in zip(draws.T, ratio**2 * settled, strict=True):
        assert abs(column.mean()) < 5 * np.sqrt(variance / members)
        assert abs(np.sum(column**2) / variance - members) < 5 * np.sqrt(2 * members)


# ---------------------------------------------------------------------------------------------------------- guidance


def guided_by(name, denoise, forward, data, variances, covariance=None, **options):
    options |= {"surrogate": {"covariance": covariance}, "mmps_iterative": {"iterations": 40}}.get(name, {})
    seen = guidance.gaussian(forward, jnp.asarray(data), jnp.asarray(variances))
    return getattr(guidance, name)(denoise, seen, **options)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "where"), [("mmps", "lo"), ("mmps_iterative", "hi"), ("surrogate", "lo"), slow("mmps", "hi")]
)
def test_the_likelihood_score_of_the_chain_is_exact(name, where):
    operator, variances, data, mean, covariance = observed("smooth", where)
    forward = functools.partial(jnp.matmul, jnp.asarray(operator))
    guided = jax.jit(guided_by(name, prior("smooth"), forward, data, variances, jnp.asarray(chain("smooth"))))
    r = np.random.default_rng(1)
    for level in LEVELS:
        x = mean + np.linalg.cholesky(covariance + level**2 * np.eye(SIZE)) @ r.standard_normal(SIZE)
        gain = np.linalg.solve(chain("smooth") + level**2 * np.eye(SIZE), chain("smooth"))
        V = level**2 * gain
        system = operator @ V @ operator.T + np.diag(variances)
        score = gain @ operator.T @ np.linalg.solve(system, data - operator @ gain.T @ x)
        actual = (guided(jnp.asarray(x), level) - gain.T @ x) / level**2
        close(actual, score, 1e-8 * max(1.0, abs(score).max()))


@pytest.mark.slow
def test_exact_guidance_gives_the_law_of_the_posterior():
    operator, variances, data, mean, covariance = observed("rough", "hi")
    forward = functools.partial(jnp.matmul, jnp.asarray(operator))
    guided = guided_by("mmps", prior("rough"), forward, data, variances)
    found = distances(law(diffusion_samplers.heun, guided, diffusion.power_grid(64, highest=300.0)), (mean, covariance))
    assert found[0] <= 0.01
    assert abs(found[1] - 1.0).max() <= 0.02
    assert found[2] <= 2e-4


# dm, mean of sd ratios, KL per dimension. The last two rows depend on the data drawn.
GAMMA = {"lo": (0.138, 0.785, 0.19), "hi": (0.35, 0.74, 0.39)}


@pytest.mark.parametrize("where", GAMMA)
def test_gamma_is_as_wrong_as_published(where):
    operator, variances, data, mean, covariance = observed("smooth", where)
    forward = functools.partial(jnp.matmul, jnp.asarray(operator))
    guided = guided_by("gamma", prior("smooth"), forward, data, variances)
    found = distances(law(diffusion_samplers.ddim, guided, diffusion.cosine_grid(256)), (mean, covariance))
    dm, sd, kl = GAMMA[where]
    assert found[0] == pytest.approx(dm, rel=0.5)
    assert found[1].mean() == pytest.approx(sd, abs=0.01)
    assert found[2] == pytest.approx(kl, rel=0.3)


@pytest.mark.slow
def test_corrections_mend_gamma():
    # Four moves of the fixed size 0.25 at each level, by the affine maps of the library's own steps.
    operator, variances, data, mean, covariance = observed("smooth", "lo")
    forward = functools.partial(jnp.matmul, jnp.asarray(operator))
    guided = guided_by("gamma", prior("smooth"), forward, data, variances)
    found = distances(
        law_of_moves(diffusion_samplers.ddim_step, guided, diffusion.cosine_grid(256), 4, 0.25), (mean, covariance)
    )
    # Without corrections 0.138, 0.785 and 0.191.
    assert found[0] < 0.09
    assert 0.92 < found[1].mean() < 1.0
    assert found[2] < 0.006


def test_gamma_is_the_gradient_and_its_curvature_is_bounded():
    operator, variances, data, *_ = observed("smooth", "lo")
    forward = functools.partial(jnp.matmul, jnp.asarray(operator))
    factor, x = 0.05, np.random.default_rng(1).standard_normal(SIZE)
    guided = guided_by("gamma", prior("smooth"), forward, data, variances, factor=factor)
    tightest = np.inf
    for level in (0.02, 0.3, 5.0):
        gain = np.linalg.solve(chain("smooth") + level**2 * np.eye(SIZE), chain("smooth"))
        weighted = (data - operator @ gain @ x) / (variances + factor * level**2)
        close(guided(jnp.asarray(x), level), gain @ x + level**2 * gain @ operator.T @ weighted, 1e-9)
        _, matrix = affine(lambda x, level=level: guided(x, level))
        curvature = np.linalg.eigvalsh(np.eye(SIZE) - (matrix + matrix.T) / 2).max()
        norm = np.linalg.norm(operator @ gain, 2)
        bounds = [guidance.gamma_curvature(level, jnp.asarray(variances), factor=factor, gain=g) for g in (norm, 1.0)]
        assert curvature <= bounds[0] * (1 + 1e-9)
        assert bounds[0] <= bounds[1]
        tightest = min(tightest, bounds[0] / curvature)
    assert tightest < 1.5


def mixture(x, s):
    """Weights, means and variance of x0 given x for x0 ~ (N(-1, 0.09) + N(2, 0.09)) / 2."""
    centres, variance = jnp.array([[-1.0], [2.0]]), 0.09
    weights = jax.nn.softmax(-0.5 * (x[None] - centres) ** 2 / (variance + s**2), 0)
    means = (centres * s**2 + variance * x[None]) / (variance + s**2)
    mean = jnp.sum(weights * means, 0)
    return mean, variance * s**2 / (variance + s**2) + jnp.sum(weights * (means - mean[None]) ** 2, 0)


@pytest.mark.parametrize("name", ["mmps", "mmps_iterative"])
def test_moment_matching_knows_the_variance_of_a_mixture(name):
    # Two modes: V is far above s^2 between them. A(x0) = x0^2 / 2 + x0 is linearised about D.
    guided = jax.jit(
        guided_by(name, lambda x, s: mixture(x, s)[0], lambda x: x**2 / 2 + x, np.array([1.0]), np.array([0.2]))
    )
    for level in (0.1, 0.7, 3.0):
        x = jnp.array([0.6])
        mean, variance = mixture(x, level)
        slope = mean + 1.0
        expected = mean + variance * slope / (0.2 + slope**2 * variance) * (1.0 - mean**2 / 2 - mean)
        close(guided(x, level), expected, 1e-9)
    assert float(mixture(x, 0.7)[1][0]) > 0.7**2


def test_a_derivative_of_no_law_is_made_positive():
    r = np.random.default_rng(0)
    matrix, operator, x, level = r.standard_normal((4, 4)), r.standard_normal((2, 4)), r.standard_normal(4), 3.0
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    assert values.min() < -0.5
    V = level**2 * vectors * np.maximum(values, 0.0) @ vectors.T
    data, variances = np.array([1.0, -2.0]), np.array([0.1, 0.3])
    gain = V @ operator.T @ np.linalg.inv(operator @ V @ operator.T + np.diag(variances))
    guided = guided_by(
        "mmps",
        lambda x, _: (jnp.asarray(matrix) @ x.ravel()).reshape(2, 2),
        lambda x: jnp.asarray(operator) @ x.ravel(),
        data,
        variances,
    )
    expected = matrix @ x + gain @ (data - operator @ matrix @ x)
    close(guided(jnp.asarray(x).reshape(2, 2), level).ravel(), expected, 1e-9)


def test_conjugate_gradients_stop_at_a_negative_direction():
    r = np.random.default_rng(0)
    half = r.standard_normal((5, 5))
    right = jnp.asarray(r.standard_normal(5))
    for W in (half @ half.T, np.zeros((5, 5))):
        solved = guidance.conjugate_gradients(functools.partial(jnp.matmul, jnp.asarray(W)), right, 30)
        close(solved, np.linalg.solve(np.eye(5) + W, right), 1e-8)
    # I + W is singular along the first axis: taken as it is the answer is infinite.
    close(guidance.conjugate_gradients(lambda p: -p, right, 5), 0.0)
    bent = jnp.asarray(np.diag([-1.0, 1.0, 2.0, 3.0, 4.0]))
    assert np.linalg.norm(guidance.conjugate_gradients(lambda p: bent @ p, right, 5)) < np.linalg.norm(right)


@pytest.mark.parametrize("name", ["gamma", "mmps", "mmps_iterative", slow("surrogate")])
def test_missing_data_are_left_out(name):
    operator, variances, data, mean, _ = observed("rough", "lo")
    kept = np.arange(len(data)) % 3 != 1
    forward = functools.partial(jnp.matmul, jnp.asarray(operator))
    fewer = functools.partial(jnp.matmul, jnp.asarray(operator[kept]))
    x = jnp.asarray(mean + 0.1)
    guide = functools.partial(guided_by, name, prior("rough"), covariance=jnp.asarray(chain("rough")))
    missing = jax.jit(lambda data: guide(forward, data, variances)(x, 0.3))
    without = jax.jit(guide(fewer, data[kept], variances[kept]))(x, 0.3)
    close(missing(np.where(kept, data, np.nan)), without, 1e-9)
    close(missing(np.full(len(data), np.nan)), prior("rough")(x, 0.3), 1e-12)


@pytest.mark.parametrize(("name", "dm", "kl"), [("mmps", 0.35, 0.015), slow("surrogate", 0.05, 0.005)])
def test_guidance_of_composed_windows_is_stable(name, dm, kl):
    operator, variances, data, mean, covariance = observed("smooth", "lo")
    forward = functools.partial(jnp.matmul, jnp.asarray(operator))
    guided = guided_by(name, composed("smooth", 16), forward, data, variances, jnp.asarray(chain("smooth")))
    found = distances(law(diffusion_samplers.heun, guided, diffusion.power_grid(64)), (mean, covariance))
    assert found[0] < dm
    assert found[2] < kl


@pytest.mark.parametrize("where", [slow("lo"), "hi"])
def test_a_score_learned_by_least_squares(where):
    """D = W(s) x fitted to 20,000 trajectories at all levels: C (C + s^2)^-1 of their second moments C.

    The guidance knows no more than the fit. Measured: .0016 per number in both.
    """
    operator, variances, data, mean, covariance = observed("smooth", where)
    forward = functools.partial(jnp.matmul, jnp.asarray(operator))
    x = np.random.default_rng(5).standard_normal((20_000, SIZE)) @ np.linalg.cholesky(chain("smooth")).T
    learned = x.T @ x / len(x)
    guided = guided_by("surrogate", denoiser(np.zeros(SIZE), learned), forward, data, variances, jnp.asarray(learned))
    found = distances(law(diffusion_samplers.heun, guided, diffusion.power_grid(64)), (mean, covariance))
    assert found[2] <= 0.01


@pytest.mark.parametrize(("k", "bound"), [slow(2, 0.5), slow(4, 0.5), (8, 0.05), slow(16, 0.05)])
def test_two_moves_mend_moment_matching_on_composed_windows(k, bound):
    """Measured .447, .119, .047, .004; without moves .939, .347, .193, .147."""
    operator, variances, data, mean, covariance = observed("smooth", "hi")
    forward = functools.partial(jnp.matmul, jnp.asarray(operator))
    guided = guided_by("mmps", composed("smooth", k), forward, data, variances)
    found = distances(
        law_of_moves(diffusion_samplers.heun_step, guided, diffusion.power_grid(64), 2, 0.5), (mean, covariance)
    )
    assert found[0] < bound
    assert found[2] < 0.2


# ----------------------------------------------------------------------------------------------------------- windows


def test_windows_give_their_centres_and_ends():
    states = jnp.arange(7.0)[:, None]
    close(window_scores.windows(states, 1)[:, :, 0], [[i, i + 1, i + 2] for i in range(5)])
    assert window_scores.windows(states, 3).shape == (1, 7, 1)
    assert window_scores.windows(jnp.zeros((9, 2, 3)), 2).shape == (5, 5, 2, 3)
    # What each window says: its number, and the place in it.
    parts = jnp.asarray(10.0 * np.arange(5)[:, None] + np.arange(3)[None])
    close(window_scores.compose(parts, 1), [0, 1, 11, 21, 31, 41, 42])
    parts = jnp.asarray(10.0 * np.arange(3)[:, None] + np.arange(5)[None])
    close(window_scores.compose(parts, 2), [0, 1, 2, 12, 22, 23, 24])


@pytest.mark.parametrize("k", [32, 64, 100])
def test_windows_of_the_whole_trajectory_are_exact(k):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(SIZE))
    for level in LEVELS:
        close(composed("smooth", k)(x, level), prior("smooth")(x, level))


def test_composition_is_exact_as_the_noise_vanishes():
    # A Markov chain's score depends on neighbours; at level s the error of k = 1 is O(s^2) of the score.
    local, exact = composed("rough", 1), prior("rough")
    x = np.linalg.cholesky(chain("rough")) @ np.random.default_rng(0).standard_normal(SIZE)

    def error(level):
        scores = [(np.asarray(f(jnp.asarray(x), level)) - x) / level**2 for f in (local, exact)]
        return np.linalg.norm(scores[0] - scores[1]) / np.linalg.norm(scores[1])

    errors = [error(level) for level in (0.02, 0.01, 0.005)]
    assert errors[-1] < 1e-3
    assert abs(np.log2(np.array(errors[:-1]) / errors[1:]) - 2.0).max() < 0.1
    assert error(3.0) > 0.05


@pytest.mark.parametrize(("kind", "k", "kl"), [("smooth", 2, 1.9), ("smooth", 8, 0.14), slow("rough", 4, 0.018)])
def test_error_of_composition(kind, k, kl):
    found = distances(
        law(diffusion_samplers.heun, composed(kind, k), diffusion.power_grid(64)), (np.zeros(SIZE), chain(kind))
    )
    assert found[2] == pytest.approx(kl, rel=0.05)
    assert found[1].mean() < 0.97


@pytest.mark.parametrize("name", ["mmps", "mmps_iterative", "surrogate"])
def test_a_log_density_of_the_state_counts_as_a_datum(name):
    """The mean of the whole trajectory, given as a normal datum and as a log density of any scale."""
    operator, variances, data, *_ = observed("rough", "lo")
    rows = np.vstack([operator, np.full((1, SIZE), 1 / SIZE)])
    both = np.append(variances, 0.01), np.append(data, 0.3)
    covariance = jnp.asarray(chain("rough"))
    datum = guided_by(name, prior("rough"), functools.partial(jnp.matmul, rows), both[1], both[0], covariance)
    seen = guidance.gaussian(functools.partial(jnp.matmul, jnp.asarray(operator)), jnp.asarray(data), variances)
    seen = guidance.with_terms(seen, lambda x: -0.5 * (jnp.mean(x) - 0.3)[None] ** 2 / 0.01)
    options = {"surrogate": {"covariance": covariance}, "mmps_iterative": {"iterations": 40}}.get(name, {})
    term = getattr(guidance, name)(prior("rough"), seen, **options)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(SIZE))
    close(jax.jit(term)(x, 0.7), jax.jit(datum)(x, 0.7), 1e-9)


def test_a_term_without_curvature_pulls_and_does_not_explode():
    seen = guidance.gaussian(lambda x: x[:0], jnp.zeros(0), jnp.zeros(0))
    pulled = guidance.surrogate(prior("rough"), guidance.with_terms(seen, lambda x: 2.0 * x[:1]), chain("rough"))
    still = guidance.surrogate(prior("rough"), guidance.with_terms(seen, lambda x: 0.0 * x[:1]), chain("rough"))
    x = jnp.zeros(SIZE)
    V = np.linalg.inv(np.linalg.inv(chain("rough")) + np.eye(SIZE) / 0.5**2)
    close(pulled(x, 0.5), 2.0 * V[0], 1e-4)
    close(still(x, 0.5), prior("rough")(x, 0.5))


def errors(kind, highest=300.0, levels=28):
    """Covariances of the clean states of the chain given noisy ones."""
    C = chain(kind)
    grid = np.geomspace(2e-3, highest, levels)
    return guidance.Errors(jnp.asarray([C @ np.linalg.inv(C / s**2 + np.eye(SIZE)) for s in grid]), 2e-3, highest), grid


def test_measured_errors_of_a_gaussian_guide_exactly():
    """Exact at the levels of the table; between two, to 3 % of what the data move."""
    operator, variances, data, mean, _ = observed("rough", "lo")
    seen = guidance.gaussian(functools.partial(jnp.matmul, jnp.asarray(operator)), jnp.asarray(data), variances)
    table, grid = errors("rough")
    guided = jax.jit(guidance.averaged(prior("rough"), seen, table))
    exact = jax.jit(guidance.surrogate(prior("rough"), seen, jnp.asarray(chain("rough"))))
    x = jnp.asarray(mean + 0.3 * np.random.default_rng(1).standard_normal(SIZE))
    for s in grid[::9]:
        close(guided(x, s), exact(x, s), 1e-8)
    for s in np.sqrt(grid[1:] * grid[:-1])[::9]:
        moved = exact(x, s) - prior("rough")(x, s)
        assert np.linalg.norm(guided(x, s) - exact(x, s)) < 0.03 * np.linalg.norm(moved) + 1e-9
    close(table.at(jnp.asarray(1e-3)), chain("rough") @ np.linalg.inv(chain("rough") / 1e-6 + np.eye(SIZE)), 1e-7)


@pytest.mark.slow
def test_law_under_measured_errors():
    operator, variances, data, mean, covariance = observed("rough", "hi")
    seen = guidance.gaussian(functools.partial(jnp.matmul, jnp.asarray(operator)), jnp.asarray(data), variances)
    guided = guidance.averaged(prior("rough"), seen, errors("rough")[0])
    found = distances(law(diffusion_samplers.heun, guided, diffusion.power_grid(64, highest=300.0)), (mean, covariance))
    assert found[0] <= 0.02
    assert abs(found[1] - 1.0).max() <= 0.03
    assert found[2] <= 1e-3


def test_a_poisson_datum_is_its_own_log_density():
    """The guided denoiser of `gamma` at a level near zero moves by the gradient of the log density itself."""
    r = np.random.default_rng(3)
    x, counts = jnp.asarray(r.standard_normal(6)), jnp.asarray([0.0, 2.0, np.nan, 1.0, 5.0, 0.0])
    seen = guidance.gaussian(jnp.exp, counts, jnp.exp)
    level = 1e-5
    moved = guidance.gamma(lambda x, s: x, seen)(x, level)
    slope = jnp.where(jnp.isnan(counts), 0.0, counts - jnp.exp(x))
    close((moved - x) / level**2, slope, 1e-5)


# --------------------------------------------------------------------------------------------------------- precision


def test_float32_stays_and_is_close():
    operator, variances, data, *_ = observed("rough", "lo")

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype):
        arrays = [jnp.asarray(value, dtype) for value in (operator, data, variances, *np.linalg.eigh(chain("rough")))]
        values, vectors = arrays[3:]
        seen = guidance.gaussian(lambda x: arrays[0] @ x, *arrays[1:3])
        guided = guidance.gamma(lambda x, s: vectors @ (values / (values + s**2) * (x @ vectors)), seen)
        grid = diffusion.power_grid(16, highest=20.0).astype(dtype)
        return diffusion_samplers.multistep(guided, jnp.asarray(20.0 * np.sin(np.arange(SIZE)), dtype), grid)

    single = run(np.float32)
    assert single.dtype == jnp.float32
    close(single, run(np.float64), 2e-3)
