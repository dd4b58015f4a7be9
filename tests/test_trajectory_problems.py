"""Problems for trajectory sampling: exact laws, densities by hand, solvers against closed forms, published levels.

Statistical tests state their false-alarm rate; all others are identities.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import stats
from scipy.integrate import quad

import pushforward as pf
from pushforward import problems
from pushforward.problems import jumps, kolmogorov
from pushforward.problems import lorenz63_trajectory as lorenz
from pushforward.problems import rotating_chain as chain

NORMAL = stats.norm.logpdf
GAUSSIAN: Callable = stats.multivariate_normal.logpdf


def density(model, y, sites, **options):
    """NumPyro's log density, compiled."""
    sites = {name: jnp.asarray(value) for name, value in sites.items()}
    return float(jax.jit(lambda sites, y: log_density(model, (y,), options, sites)[0])(sites, jnp.asarray(y)))


def simulated(model, **options):
    with handlers.seed(rng_seed=1):
        return handlers.trace(model).get_trace(**options)


@pytest.mark.parametrize("module", [chain, lorenz, kolmogorov])
def test_scenarios(module):
    for name, known in module.SCENARIOS.items():
        assert module.scenario(name) is known
        seen = np.flatnonzero(known.mask(13))
        assert seen.tolist() == list(range(0, 13, known.every))
    with pytest.raises(ValueError, match="no scenario is called 'low'; the names are"):
        module.scenario("low")
    assert module.__name__.rpartition(".")[2] in problems.__all__


# --------------------------------------------------------------------------------------------------- rotating chain


def kalman(y, rho, noise):
    """Filter and Rauch-Tung-Striebel smoother, Särkkä and Svensson (2023): log evidence, means, covariances."""
    A, Q = chain.rotation(rho), (1 - rho**2) * np.eye(2)
    m, P, log_evidence, filtered, predicted = np.zeros(2), np.eye(2), 0.0, [], []
    for i, value in enumerate(y):
        m, P = (m, P) if i == 0 else (A @ m, A @ P @ A.T + Q)
        predicted.append((m, P))
        if not np.isnan(value):
            s = P[0, 0] + noise**2
            log_evidence += NORMAL(value, m[0], np.sqrt(s))
            m, P = m + P[:, 0] / s * (value - m[0]), P - np.outer(P[:, 0], P[0]) / s
        filtered.append((m, P))
    smoothed = [filtered[-1]]
    for (m, P), (m_next, P_next) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        G, (m_s, P_s) = P @ A.T @ np.linalg.inv(P_next), smoothed[-1]
        smoothed.append((m + G @ (m_s - m_next), P + G @ (P_s - P_next) @ G.T))
    means, covariances = zip(*smoothed[::-1], strict=True)
    return log_evidence, np.stack(means), np.stack(covariances)


@pytest.mark.parametrize("rho", [chain.SMOOTH, chain.ROUGH])
@pytest.mark.parametrize("name", ["lo", "hi"])
def test_exact_law_of_the_chain_is_the_smoother(name, rho):
    _, y = chain.simulate(jax.random.key(3), name, rho=rho)
    noise = chain.scenario(name).noise
    answer = chain.exact(y, rho, noise)
    log_evidence, means, covariances = kalman(np.asarray(y, np.float64), rho, noise)
    assert answer.log_evidence == pytest.approx(log_evidence, abs=1e-9)
    assert answer.mean == pytest.approx(means, abs=1e-10)
    blocks = [answer.covariance[i : i + 2, i : i + 2] for i in range(0, 130, 2)]
    assert np.stack(blocks) == pytest.approx(covariances, abs=1e-10)
    assert answer.sd[7] == pytest.approx(np.sqrt(np.diag(covariances[7])), abs=1e-10)


def test_chain_model_has_the_exact_density(float64):
    x, y = chain.simulate(jax.random.key(1), "hi", rho=0.9)
    answer = chain.exact(y, 0.9, 0.25)
    posterior = GAUSSIAN(np.ravel(x), answer.mean.ravel(), answer.covariance)
    sites = {"x0": x[0], "x": x[1:]}  # p(x, y) = p(y) p(x given y) at any x
    assert density(chain.model, y, sites, rho=0.9, noise=0.25) == pytest.approx(answer.log_evidence + posterior)


@pytest.mark.slow
def test_a_kalman_smoother_of_the_library_agrees(float64):
    """Draws: means of 130 coordinates of 4000 independent draws at 5 sd; false-alarm rate 1e-4."""
    _, y = chain.simulate(jax.random.key(2), "lo")
    tree = pf.infer(chain.model, method="kalman", y=y, draws=4000, progress=False)
    answer = chain.exact(y)
    assert tree.attrs["log_evidence"] == pytest.approx(answer.log_evidence, abs=1e-6)
    x = np.asarray(tree.posterior["x"])[0]
    error = (x.mean(0) - answer.mean[1:]) / answer.sd[1:]
    assert np.abs(error).max() < 5 / np.sqrt(4000)


def test_draws_of_the_chain_have_its_covariance():
    """Whitened, each of 8385 entries of the sample covariance has sd 1 / sqrt(n) or less than 1.5 of it: 1e-5."""
    x = np.asarray(chain.trajectories(jax.random.key(4), 4096, rho=0.9), np.float64).reshape(4096, -1)
    white = np.linalg.solve(np.linalg.cholesky(chain.covariance(rho=0.9)), x.T)
    errors = white @ white.T / 4096 - np.eye(130)
    assert np.abs(errors).max() < 5.7 * np.sqrt(2 / 4096)
    assert np.abs(errors - np.diag(np.diag(errors))).max() < 6 / np.sqrt(4096)
    same = simulated(chain.model, steps=5)
    assert (same["x"]["value"].shape, same["y"]["value"].shape) == ((5, 2), (5,))


def test_data_of_the_chain():
    """65 normal numbers: their sum of squares at 5 sd; false-alarm rate below 1e-5."""
    x, y = chain.simulate(jax.random.key(5), "hi")
    assert (x.shape, y.shape) == ((65, 2), (65,))
    assert abs(float(jnp.sum((y - x[:, 0]) ** 2)) / 0.25**2 - 65) < 5 * np.sqrt(2 * 65)
    assert np.flatnonzero(~np.isnan(chain.simulate(jax.random.key(5), "lo")[1])).tolist() == list(range(0, 65, 8))


# ---------------------------------------------------------------------------------------------------------- Lorenz


def test_lorenz_model_by_hand(float64):
    rng = np.random.default_rng(0)
    x, y = [0, 0, 20] + 5 * rng.normal(size=(9, 3)), rng.normal(size=9)
    start = GAUSSIAN(x[0], lorenz.STATIONARY_MEAN, lorenz.STATIONARY_COVARIANCE)
    moves = NORMAL(x[1:], np.asarray(lorenz.move(x[:-1])), 0.025**0.5).sum()
    assert float(lorenz.log_transition(x)) == pytest.approx(moves, rel=1e-10)
    sites = {"x0": x[0], "x": x[1:]}
    for name, component, noise in (("lo", 0, 0.05), ("third", 2, lorenz.scenario("third").noise)):
        look = NORMAL(y, ((x - [0, 0, 25]) / [8, 9, 8.6])[:, component], noise)
        assert float(lorenz.log_likelihood(x, y, name)) == pytest.approx(look.sum(), rel=1e-10)
        actual = density(lorenz.model, y, sites, noise=noise, component=component)
        assert actual == pytest.approx(start + moves + look.sum(), rel=1e-10)
        gaps = np.where(np.arange(9) % 2, np.nan, y)
        assert float(lorenz.log_likelihood(x, gaps, name)) == pytest.approx(look[::2].sum(), rel=1e-10)
    assert np.asarray(lorenz.raw(lorenz.normalised(x))) == pytest.approx(x, rel=1e-12)
    assert simulated(lorenz.model, steps=3)["x"]["value"].shape == (3, 3)


def test_lorenz_trajectories_are_stationary_and_their_noise_is_right():
    """2048 draws: five moments, first and last state, and the mean of log p, at 5 sd; false-alarm rate 1e-5."""
    x = np.asarray(lorenz.trajectories(jax.random.key(1), 2048, 65, 400), np.float64)
    root = np.sqrt(2048)
    for state in (x[:, 0], x[:, -1]):
        sd = np.sqrt(np.diag(lorenz.STATIONARY_COVARIANCE))
        assert np.abs((state.mean(0) - lorenz.STATIONARY_MEAN) / sd).max() < 5 / root
        squares = state[:, :2] ** 2
        assert squares.mean(0) == pytest.approx(np.diag(lorenz.STATIONARY_COVARIANCE)[:2], abs=5 * 110 / root)
    level = -64 * 3 * (0.5 * np.log(2 * np.pi * 0.025) + 0.5)
    assert level == pytest.approx(81.7, abs=0.05)
    # each has variance 192 / 2
    assert float(lorenz.log_transition(x).mean()) == pytest.approx(level, abs=5 * np.sqrt(96) / root)


def test_lorenz_data_are_normalised():
    x, y = lorenz.simulate(jax.random.key(2), "third", steps=400)
    known = lorenz.scenario("third")
    error = (y - (x[:, 2] - 25) / 8.6)[known.mask(401)] / known.noise
    assert np.isnan(y[~known.mask(401)]).all()
    assert abs(float(jnp.sum(error**2)) - len(error)) < 5 * np.sqrt(2 * len(error))  # false-alarm rate below 1e-5


def test_backward_simulation_is_exact_for_two_states():
    """x_1 and y_1 are linear Gaussian given x_0: posterior moments are sums over the particles of x_0.

    Particles lie 0.05 apart, the noise of a step is 0.16: draws go back to others than their parents. Errors of 15
    moments in standard errors of 16 keys; beyond 6.5 for t with 15 degrees of freedom: false-alarm rate 2e-4.
    """
    particles, noise, tiny = 2048, 0.05, lorenz.STATE_NOISE
    start = jnp.array([6.0, 7.0, 22.0]) + 0.25 * jax.random.normal(jax.random.key(0), (particles, 3))
    y = jnp.array([0.82, 0.75])
    x, after = np.asarray(start, np.float64), np.asarray(lorenz.move(start), np.float64)
    spread = np.sqrt(noise**2 + (tiny / 8) ** 2)
    surprise = y[1] - after[:, 0] / 8
    log_weights = NORMAL(y[0], x[:, 0] / 8, noise) + NORMAL(surprise, 0, spread)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    later = after + np.outer(tiny**2 / 8 / spread**2 * surprise, [1, 0, 0])
    rest = tiny**2 - np.array([tiny**4 / 64 / spread**2, 0, 0])
    centre, centre_later = weights @ x, weights @ later

    def moments(a, b):
        a, b = a - centre, b - centre_later
        return np.concatenate([a, b, a**2, b**2, a * b], axis=-1)

    exact = weights @ moments(x, later) + np.concatenate([np.zeros(9), rest, np.zeros(3)])
    assert 1 / np.sum(weights**2) > 500
    found = []
    for key in jax.random.split(jax.random.key(1), 16):
        paths = np.asarray(lorenz.backward_simulation(key, y, "lo", particles, 480, 120, start=start), np.float64)
        found.append(moments(paths[:, 0], paths[:, 1]).mean(0))
    errors = (np.mean(found, 0) - exact) / (np.std(found, 0, ddof=1) / 4)
    assert np.abs(errors).max() < 6.5, errors.round(1)


def test_particles_are_chosen_by_their_weights():
    """Chi-square of 255 cells at 1e-5."""
    log_weights = jnp.asarray(np.random.default_rng(0).normal(size=256))
    rows = jnp.broadcast_to(log_weights, (40_000, 256))
    counts = np.bincount(np.asarray(jax.jit(lorenz._choose)(jax.random.key(0), rows)), minlength=256)
    expected = 40_000 * np.asarray(jax.nn.softmax(log_weights))
    assert np.sum((counts - expected) ** 2 / expected) < stats.chi2.isf(1e-5, 255)


def test_third_coordinate_leaves_two_lobes():
    """256 fair coins at 5 sd; false-alarm rate below 1e-6."""
    start = lorenz.start().sample(jax.random.key(3), (1024,))
    start = start * jnp.sign(start[:, :1]) ** jnp.array([1, 1, 0])  # one lobe alone, to see the coins
    _, y = lorenz.simulate(jax.random.key(4), "third", steps=400)
    paths = lorenz.backward_simulation(jax.random.key(5), y[:9], "third", 1024, 256, 128, start=start)
    shares = lorenz.lobes(paths)
    assert shares.shape == (9, 2)
    assert shares.sum(1) == pytest.approx(1)
    assert np.abs(shares - 0.5).max() < 5 * 0.5 / 16
    assert lorenz.lobes(jnp.array([[[1.0, 0, 0]], [[2.0, 0, 0]], [[-1.0, 0, 0]], [[3.0, 0, 0]]])).tolist() == [
        [0.25, 0.75]
    ]


def test_wasserstein_distances():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40, 1, 1))
    assert lorenz.wasserstein(a, b) == pytest.approx(stats.wasserstein_distance(a.ravel(), b.ravel()))
    x = 100 * rng.normal(size=(30, 4, 3))
    assert lorenz.wasserstein(x, x[::-1] + 0.1) == pytest.approx(0.1 * np.sqrt(12))
    with pytest.raises(ValueError, match="both must have one shape"):
        lorenz.wasserstein(x, x[:-1])


def test_backward_simulation_refuses():
    y, key = jnp.zeros(3), jax.random.key(0)
    with pytest.raises(ValueError, match="write particles=1024, draws=128"):
        lorenz.backward_simulation(key, y, particles=1000, draws=100)
    with pytest.raises(ValueError, match="particles=256 need shape"):
        lorenz.backward_simulation(key, y, particles=256, draws=64, start=jnp.zeros((128, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lo", "hi"])
def test_lorenz_levels_are_the_published_ones(name):
    """Means over 8 data sets; tolerance 5 sd of such a mean, from the deviations over data sets."""
    numbers, rows = lorenz.NUMBERS[name], []
    starts = [lorenz.initial(jax.random.key(i), 16384) for i in (1, 2)]
    for key in jax.random.split(jax.random.key(7), 8):
        _, y = lorenz.simulate(key, name)
        a, b = (lorenz.backward_simulation(jax.random.key(i), y, name, start=x) for i, x in enumerate(starts))
        levels = float(lorenz.log_transition(a).mean()), float(lorenz.log_likelihood(a, y, name).mean())
        rows.append((*levels, lorenz.wasserstein(a, b)))
    mean, error = np.mean(rows, 0), np.std(rows, 0, ddof=1) / np.sqrt(8)
    assert abs(mean[0] - numbers.log_transition) < 5 * error[0]
    assert abs(mean[1] - numbers.log_likelihood) < 5 * error[1]
    assert abs(mean[2] - numbers.wasserstein) < 5 * error[2]


# ------------------------------------------------------------------------------------------------- Kolmogorov flow

STILL = kolmogorov.Flow(viscosity=0.0, drag=0.0, force=0.0, closure=0.0)


def energy(x):
    return 0.5 * float(np.mean(np.sum(np.asarray(x) ** 2, -1)))


def spectral(x):
    """Fourier modes and wave numbers, by numpy's full transform."""
    k = np.fft.fftfreq(x.shape[0], 1 / x.shape[0])
    return np.fft.fft2(np.asarray(x), axes=(0, 1)), k[:, None], k[None]


def test_a_taylor_green_vortex_decays_as_it_should(float64):
    angle = 2 * np.pi * np.arange(16) / 16
    first, second = np.meshgrid(angle, angle, indexing="ij")
    vortex = np.stack([np.cos(2 * first) * np.sin(2 * second), -np.sin(2 * first) * np.cos(2 * second)], -1)
    flow = STILL._replace(viscosity=0.05, drag=0.3, closure=2.0)
    rate = 0.05 * 8 + 0.3 + 2.0 * (8 / (16 / 3) ** 2) ** 4
    actual = kolmogorov.step(jnp.asarray(vortex), flow, interval=0.7)
    assert np.asarray(actual) == pytest.approx(vortex * np.exp(-rate * 0.7), abs=1e-12)


def test_solver_has_order_four_and_keeps_what_the_flow_keeps(float64):
    x = kolmogorov.random_field(jax.random.key(0), 24)
    assert energy(x) == pytest.approx(0.5)
    run = jax.jit(kolmogorov.step, static_argnums=1)

    def after(parts):
        return np.asarray(jax.lax.fori_loop(0, parts, lambda _, x: run(x, kolmogorov.Flow(), 0.2 / parts), x))

    exact = after(32)
    errors = [np.abs(after(parts) - exact).max() for parts in (2, 4)]
    assert errors[0] < 1e-4
    assert 3.4 < np.log2(errors[0] / errors[1]) < 4.6
    still = run(x, STILL._replace(substeps=40), 0.2)
    assert energy(still) == pytest.approx(0.5, abs=1e-9)
    u, k_1, k_2 = spectral(exact)
    assert np.abs(k_1 * u[..., 0] + k_2 * u[..., 1]).max() / np.abs(u).max() < 1e-12
    # a uniform wind carries everything along
    wind = np.array([0.7, -0.3])
    u, k_1, k_2 = spectral(still)
    carried = np.fft.ifft2(u * np.exp(-0.2j * (k_1 * wind[0] + k_2 * wind[1]))[..., None], axes=(0, 1)).real + wind
    assert np.asarray(run(x + wind, STILL._replace(substeps=40), 0.2)) == pytest.approx(carried, abs=1e-6)


def test_energy_budget(float64):
    x = kolmogorov.step(kolmogorov.random_field(jax.random.key(1), 24))
    flow, h = kolmogorov.Flow(closure=0.0, viscosity=0.02), 1e-3
    run = jax.jit(lambda interval: kolmogorov.step(x, flow, interval))
    rise = (energy(run(h)) - energy(run(-h))) / (2 * h)
    u, k_1, k_2 = spectral(x)
    wave = np.sin(4 * 2 * np.pi * np.arange(24) / 24)
    put_in = np.mean(wave * np.asarray(x)[..., 0])
    loss = np.sum((0.02 * (k_1**2 + k_2**2) + 0.1)[..., None] * np.abs(u) ** 2) / 24**4
    assert rise == pytest.approx(put_in - loss, abs=1e-6)
    assert abs(put_in - loss) > 0.01


def test_operators():
    angle = 2 * np.pi * np.arange(64) / 64
    first, second = np.meshgrid(angle, angle, indexing="ij")
    x = jnp.asarray(np.stack([np.sin(2 * second), np.cos(first)], -1))
    spacing = 2 * np.pi / 64
    # central differences multiply a derivative of wave number k by sin(k h) / (k h)
    curl = -np.sin(first) * np.sin(spacing) - np.cos(2 * second) * np.sin(2 * spacing)
    assert np.asarray(kolmogorov.vorticity(x)) == pytest.approx(curl, abs=1e-5)
    small = kolmogorov.coarsen(x, 8)
    assert np.asarray(small[2, 3]) == pytest.approx(np.asarray(x[16:24, 24:32].mean((0, 1))), abs=1e-6)
    assert np.asarray(kolmogorov.saturate(jnp.array([-1.0, 0.0, 3.0]))).tolist() == [-0.5, 0.0, 0.75]
    shapes = {"coarse": (8, 8, 2), "extrapolation": (8, 8, 2), "saturating": (12, 12)}
    assert {name: known.operator(x).shape for name, known in kolmogorov.SCENARIOS.items()} == shapes
    inner = kolmogorov.scenario("extrapolation").operator(x)
    assert np.asarray(inner[0, 1]) == pytest.approx(np.asarray(x[16:20, 20:24].mean((0, 1))), abs=1e-6)
    with pytest.raises(ValueError, match="64 x 64 cells cannot be averaged by 5"):
        kolmogorov.coarsen(x, 5)
    with pytest.raises(ValueError, match="write shape"):
        kolmogorov.step(x[:, :, 0])


def test_kolmogorov_model_by_hand(float64):
    x = np.random.default_rng(0).normal(size=(3, 16, 16, 2))
    known = kolmogorov.scenario("saturating")
    seen = np.asarray(known.operator(jnp.asarray(x)))
    y = seen + 0.1
    expected = NORMAL(x[0], 0, 1).sum() + NORMAL(y, seen, 0.05).sum()
    expected += NORMAL(x[1:], np.asarray(jax.jit(kolmogorov.step)(x[:-1])), 0.01).sum()
    sites = {"x0": x[0], "x": x[1:]}
    assert density(kolmogorov.model, y, sites, size=16, name="saturating") == pytest.approx(expected, rel=1e-10)


def test_kolmogorov_trajectories():
    """Model noise (4 * 2048 numbers) and noise of data (256 numbers) at 5 sd; false-alarm rate below 1e-5."""
    truth, y = kolmogorov.simulate(jax.random.key(1), "coarse", steps=4, size=32)
    error = np.asarray((truth[1:] - jax.jit(kolmogorov.step)(truth[:-1])) / 0.01, np.float64)
    assert abs(np.mean(error**2) - 1) < 5 * np.sqrt(2 / error.size)
    assert np.isnan(y).all((1, 2, 3)).tolist() == [False, True, True, True, False]
    assert float(kolmogorov.residual_ratio(truth, y)) == pytest.approx(1, abs=5 / np.sqrt(2 * 256))


@pytest.mark.slow
def test_kolmogorov_flow_is_stationary_and_grids_agree():
    """Means over 48 trajectories of energies, whose deviation over trajectories is 0.1: 5 sd of a difference is 0.1."""
    x = kolmogorov.trajectories(jax.random.key(0), 48, 24)
    assert x.shape == (48, 24, 32, 32, 2)
    early, late = energy(x[:, :4]), energy(x[:, -4:])
    assert late == pytest.approx(early, abs=0.15)
    assert energy(x) == pytest.approx(kolmogorov.ENERGY[32], abs=0.1)
    finer = kolmogorov.trajectories(jax.random.key(1), 8, 4, 32, resolution=64, noise=0.0)
    assert finer.shape == (8, 4, 32, 32, 2)
    assert energy(finer) == pytest.approx(energy(x), abs=0.4)
    assert simulated(kolmogorov.model, steps=2, size=16)["y"]["value"].shape == (2, 8, 8, 2)


# ----------------------------------------------------------------------------------------------------------- jumps


def test_jumps_data_and_evidence():
    assert jumps.DATA.shape == jumps.TRUTH.shape == (64,)
    assert jumps.DATA[:2] == pytest.approx(jumps.simulate(0, 2)[1])
    assert jumps.grid(jumps.DATA).log_evidence == pytest.approx(jumps.LOG_EVIDENCE, abs=5.1e-6)
    assert jumps.grid_student(jumps.DATA).log_evidence == pytest.approx(jumps.STUDENT_LOG_EVIDENCE, abs=5.1e-6)
    with pytest.raises(ValueError, match="at least 501"):
        jumps.grid(jumps.DATA, nodes=400)


def test_grid_of_jumps_by_enumeration():
    """Given which increments are large the model is Gaussian: 2^6 Gaussians are the exact law of six steps."""
    y = np.array([0.1, np.nan, 2.5, 2.2, np.nan, -0.3])
    seen, lower = ~np.isnan(y), np.tril(0.9 ** np.subtract.outer(np.arange(6), np.arange(6)).clip(0))
    logs, means, seconds = [], [], []
    for large in itertools.product([0, 1], repeat=6):
        variances = np.where(large, 9.0, 0.04)
        C = np.outer(0.9 ** np.arange(1, 7), 0.9 ** np.arange(1, 7)) + lower @ np.diag(variances) @ lower.T
        S = C[np.ix_(seen, seen)] + 0.09 * np.eye(seen.sum())
        gain = np.linalg.solve(S, C[seen]).T
        log_prior = np.sum(np.log(np.where(large, 0.05, 0.95)))
        logs.append(log_prior + GAUSSIAN(y[seen], np.zeros(seen.sum()), S))
        means.append(gain @ y[seen])
        seconds.append(np.diag(C - gain @ C[seen]) + means[-1] ** 2)
    weights = np.exp(np.array(logs) - max(logs))
    answer = jumps.grid(y)
    assert answer.log_evidence == pytest.approx(max(logs) + np.log(weights.sum()), abs=1e-8)
    weights /= weights.sum()
    mean, sd = answer.moments("smoothing")
    assert mean == pytest.approx(weights @ means, abs=1e-7)
    assert sd == pytest.approx(np.sqrt(weights @ seconds - (weights @ means) ** 2), abs=1e-7)


def test_jumps_models_by_hand(float64):
    x, y = jumps.simulate(3, 12)
    moved, x0 = x - 0.9 * np.concatenate([[0.4], x[:-1]]), 0.4
    rest = NORMAL(x0) + NORMAL(y, x, 0.3).sum()
    mixed = np.log(0.95 * stats.norm.pdf(moved, 0, 0.2) + 0.05 * stats.norm.pdf(moved, 0, 3)).sum()
    assert density(jumps.model, y, {"x0": x0, "x": x}) == pytest.approx(rest + mixed, rel=1e-10)
    heavy = stats.t.logpdf(moved, 1.5, 0, 0.3).sum()
    assert density(jumps.model_student, y, {"x0": x0, "x": x}) == pytest.approx(rest + heavy, rel=1e-10)
    # one datum: an integral over the increment, the rest being Gaussian
    spread = np.sqrt(0.81 + 0.09)
    exact = quad(lambda e: stats.t.pdf(e, 1.5, 0, 0.3) * stats.norm.pdf(0.7, e, spread), -60, 60, points=(0, 0.7))[0]
    assert jumps.grid_student([0.7]).log_evidence == pytest.approx(np.log(exact), abs=1e-7)
    assert simulated(jumps.model_student, steps=5)["x"]["value"].shape == (5,)
