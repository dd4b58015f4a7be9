"""The Kalman equations against the joint Gaussian law of the whole series."""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushforward.math import kalman, kalman_parallel, kalman_steady, sigma_points
from pushforward.math.kalman import CONSTANT, Step


@pytest.fixture(autouse=True)
def strict():
    """No implicit promotion of ranks or types in equations."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


class Case(NamedTuple):
    """Sizes of a random system, the rank of its noise matrix B, the form of R and the share of missing data."""

    n: int
    q: int
    m: int
    T: int
    rank: int
    diagonal: bool
    missing: float
    m0: int = 0


CASES = {
    "plain": Case(3, 3, 2, 12, 3, True, 0.0),
    "missing": Case(3, 2, 4, 12, 2, False, 0.4, 2),
    "singular": Case(5, 6, 1, 15, 2, True, 0.2, 1),
    "few noises": Case(6, 1, 3, 10, 1, False, 0.0),
    "wide": Case(2, 7, 5, 8, 2, True, 0.3),
    "no carry": Case(0, 2, 2, 4, 0, True, 0.0),
    "no data": Case(3, 2, 0, 4, 2, True, 0.0),
    "large": Case(20, 8, 5, 10, 6, False, 0.1, 3),
    "many data": Case(4, 5, 23, 5, 4, False, 0.1, 7),
}


def covariance(rng, m, diagonal):
    """A random covariance of data noise."""
    root = rng.standard_normal((m, m + 2)) / np.sqrt(m + 2)
    return rng.uniform(0.2, 1.0, m) if diagonal else root @ root.T + 0.2 * np.eye(m)


def one_step(rng, before, after, q, m, rank, diagonal):
    """A random step whose map A is stable and whose B has the given rank."""
    A = rng.standard_normal((after, before))
    if before and after:
        A *= 0.9 / np.linalg.norm(A, 2)
    B = rng.standard_normal((after, rank)) @ rng.standard_normal((rank, q)) / np.sqrt(q)
    H = rng.standard_normal((m, before)) / np.sqrt(max(before, 1))
    D = 0.5 * rng.standard_normal((m, q)) / np.sqrt(q)
    return Step(A, B, rng.standard_normal(after), H, D, rng.standard_normal(m), covariance(rng, m, diagonal))


def system(case, seed=0):
    """Initial step, steps with leading time, data of both with gaps; the first row is all missing if any is."""
    rng = np.random.default_rng(seed)
    q0 = max(case.n - 1, 1)
    initial = one_step(rng, 0, case.n, q0, case.m0, min(q0, case.n), case.diagonal)
    steps = [one_step(rng, case.n, case.n, case.q, case.m, case.rank, case.diagonal) for _ in range(case.T)]
    ys, y0 = 1.5 * rng.standard_normal((case.T, case.m)), rng.standard_normal(case.m0)
    if case.missing:
        ys[rng.uniform(size=ys.shape) < case.missing] = np.nan
        ys[1] = np.nan
        y0[:1] = np.nan
    return initial, Step(*(np.stack(leaves) for leaves in zip(*steps, strict=True))), ys, y0


class Law(NamedTuple):
    """Log density of the data and exact conditional moments of all noises and carries, prior blocks included."""

    log_likelihood: float
    noises: list
    carries: list
    mean: np.ndarray
    cov: np.ndarray


def joint_law(initial, steps, ys, y0, until=None):
    """Conditions the joint Gaussian law of noises, carries and data on the data up to time `until`.

    Everything is an affine map of one white vector w = (z0, e_1.., v_0, v_1..).
    """
    T, q, q0, m, m0 = len(ys), steps.B.shape[2], initial.B.shape[1], ys.shape[1], len(y0)
    size = q0 + T * q + m0 + T * m
    white = np.eye(size)
    at = np.cumsum([0, q0] + [q] * T + [m0] + [m] * T)
    parts = [white[a:b] for a, b in itertools.pairwise(at)]
    noises, data_noises = parts[: T + 1], parts[T + 1 :]

    def root(R):
        return np.diag(np.sqrt(R)) if R.ndim == 1 else np.linalg.cholesky(R)

    maps, means = [initial.B @ noises[0]], [initial.b]
    data, offsets = [initial.D @ noises[0] + root(initial.R) @ data_noises[0]], [initial.d]
    for t in range(T):
        A, B, b, H, D, d, R = (leaf[t] for leaf in steps)
        data.append(H @ maps[-1] + D @ noises[t + 1] + root(R) @ data_noises[t + 1])
        offsets.append(H @ means[-1] + d)
        maps.append(A @ maps[-1] + B @ noises[t + 1])
        means.append(A @ means[-1] + b)
    last = T if until is None else until
    values = np.concatenate([y0, *ys[:last]])
    seen = ~np.isnan(values)
    G = np.concatenate(data[: last + 1])[seen]
    residual = values[seen] - np.concatenate(offsets[: last + 1])[seen]
    S = G @ G.T
    stacked = np.concatenate([*noises, *maps])
    mean = np.concatenate([np.zeros(q0 + T * q), *means]) + stacked @ G.T @ np.linalg.solve(S, residual)
    cov = stacked @ stacked.T - stacked @ G.T @ np.linalg.solve(S, G @ stacked.T)
    log_likelihood = -0.5 * (
        residual @ np.linalg.solve(S, residual) + np.linalg.slogdet(S)[1] + len(residual) * np.log(2 * np.pi)
    )
    edges = np.cumsum([0, q0] + [q] * T + [steps.A.shape[1]] * (T + 1))
    blocks = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return Law(log_likelihood, blocks[: T + 1], blocks[T + 1 :], mean, cov)


def on_device(tree, dtype):
    """Arguments as JAX arrays of one dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


@partial(jax.jit, static_argnames="parallel")
def solve(initial, steps, ys, y0, parallel=False):
    """Filters and smooths: everything the tests compare."""
    first = kalman.update(jnp.zeros(0, ys.dtype), jnp.zeros((0, 0), ys.dtype), initial, y0)
    forward = kalman_parallel.filter_series_parallel if parallel else kalman.filter_series
    backward = kalman_parallel.smooth_series_parallel if parallel else kalman.smooth_series
    filtered = forward(first.mean, first.cov, steps, ys)
    r, N, moments = backward(filtered.records)
    _, _, start = kalman.smooth_step(first.record, r, N)
    return first.log_likelihood + filtered.log_likelihood, filtered, moments, start


def close(value, exact, tolerance):
    """Agreement relative to the largest entry (at least 1, the scale of the systems)."""
    exact = np.asarray(exact)
    scale = max(1.0, np.max(np.abs(exact), initial=0.0))
    np.testing.assert_allclose(np.asarray(value, np.float64), exact, rtol=0, atol=tolerance * scale)


def check_against_joint(case, dtype, tolerance, parallel=False, seed=0):
    """Log likelihood, filtering moments at every time, smoothing moments of carries, noises and both together."""
    raw = system(case, seed)
    log_likelihood, filtered, moments, start = solve(*on_device(raw, dtype), parallel=parallel)
    law = joint_law(*raw)
    close(log_likelihood, law.log_likelihood, tolerance)
    for t in range(case.T):
        before = joint_law(*raw, until=t + 1)
        c = before.carries[t + 1]
        close(filtered.means[t], before.mean[c], tolerance)
        close(filtered.covs[t], before.cov[c, c], tolerance)
        c, e, after = law.carries[t], law.noises[t + 1], law.carries[t + 1]
        close(moments.carry_mean[t], law.mean[c], tolerance)
        close(moments.carry_cov[t], law.cov[c, c], tolerance)
        close(moments.noise_mean[t], law.mean[e], tolerance)
        close(moments.noise_cov[t], law.cov[e, e], tolerance)
        close(moments.cross[t], law.cov[c, e], tolerance)
        close(moments.lag[t], law.cov[c, after], tolerance)
    close(start.noise_mean, law.mean[law.noises[0]], tolerance)
    close(start.noise_cov, law.cov[law.noises[0], law.noises[0]], tolerance)


@pytest.mark.parametrize("name", CASES)
def test_filter_and_smoother_equal_the_joint_gaussian(name):
    with jax.enable_x64(True):
        check_against_joint(CASES[name], jnp.float64, 1e-8)


@pytest.mark.parametrize("name", ["missing", "singular", "wide", "large"])
def test_parallel_filter_and_smoother_equal_the_joint_gaussian(name):
    with jax.enable_x64(True):
        check_against_joint(CASES[name], jnp.float64, 1e-8, parallel=True)


@pytest.mark.parametrize("name", ["missing", "singular", "large"])
def test_float32_is_within_a_thousandth(name):
    check_against_joint(CASES[name], jnp.float32, 1e-3)


def test_float32_is_within_a_thousandth_on_long_series_with_accurate_data():
    case = Case(20, 10, 4, 100, 10, True, 0.1)
    initial, steps, ys, y0 = system(case, 3)
    raw = initial, steps._replace(R=steps.R * 1e-3), ys, y0
    low = solve(*on_device(raw, jnp.float32))
    with jax.enable_x64(True):
        high = solve(*on_device(raw, jnp.float64))
    low, high = ((out[0], out[1].means, out[1].covs, out[2]) for out in (low, high))
    jax.tree.map(lambda a, b: close(a, b, 1e-3), low, high)


def test_time_varying_lengths_of_the_carry():
    """Two steps 3 -> 2 -> 4 by hand, against the same numbers padded with zeros."""
    rng = np.random.default_rng(5)
    first, second = one_step(rng, 3, 2, 2, 1, 2, True), one_step(rng, 2, 4, 3, 2, 3, True)

    def padded(step):
        A, B, H = np.zeros((4, 4)), np.zeros((4, step.B.shape[1])), np.zeros((len(step.d), 4))
        A[: step.A.shape[0], : step.A.shape[1]] = step.A
        B[: step.B.shape[0]] = step.B
        H[:, : step.H.shape[1]] = step.H
        return step._replace(A=A, B=B, H=H, b=np.pad(step.b, (0, 4 - len(step.b))))

    @partial(jax.jit, static_argnums=1)
    def run(steps, n):
        mean, cov, total = jnp.zeros(n), jnp.diag(jnp.where(jnp.arange(4)[:n] < 3, 1.0, 0.0)), 0.0
        for step, y in zip(steps, (jnp.ones(1), jnp.ones(2)), strict=True):
            after = kalman.update(mean, cov, step, y)
            mean, cov, total = after.mean, after.cov, total + after.log_likelihood
        return mean, cov, total

    with jax.enable_x64(True):
        short = run(on_device((first, second), jnp.float64), 3)
        long = run(on_device((padded(first), padded(second)), jnp.float64), 4)
        jax.tree.map(lambda a, b: close(a, b, 1e-12), short, long)


@pytest.mark.parametrize("name", ["missing", "singular", "few noises", "no carry"])
def test_square_root_form_equals_the_covariance_form(name):
    initial, steps, ys, _ = system(CASES[name])
    with jax.enable_x64(True):
        initial, steps, ys = on_device((initial, steps, ys), jnp.float64)

        @jax.jit
        def run(initial, steps, ys):
            def move(carry, slices):
                mean, root = carry
                after, after_root = (f(mean, x, *slices) for f, x in both(root))
                return after_root[:2], (after[:3], after_root)

            def both(root):
                return (kalman.update, root @ root.T), (kalman.update_root, root)

            square = jnp.linalg.qr(initial.B.T, mode="r").T
            square = jnp.pad(square, ((0, 0), (0, square.shape[0] - square.shape[1])))
            return jax.lax.scan(move, (initial.b, square), (steps, ys))[1]

        after, (mean, root, log_likelihood) = run(initial, steps, ys)
        close(root, jnp.tril(root), 1e-15)
        jax.tree.map(lambda a, b: close(a, b, 1e-9), (mean, root @ jnp.swapaxes(root, 1, 2), log_likelihood), after)


def test_predicted_moments_are_those_without_data():
    _, steps, ys, _ = system(CASES["plain"])
    with jax.enable_x64(True):
        step, y = on_device((jax.tree.map(lambda leaf: leaf[0], steps), ys[0]), jnp.float64)
        given = kalman.update(step.b, jnp.eye(3), step, y)
        without = kalman.update(step.b, jnp.eye(3), step, y * jnp.nan)
        close(given.predicted_mean, without.mean, 1e-12)
        close(given.predicted_cov, without.cov, 1e-12)
        close(given.predicted_cov, step.A @ step.A.T + step.B @ step.B.T, 1e-12)
        assert float(without.log_likelihood) == 0.0


def test_square_root_form_keeps_digits_that_the_covariance_form_loses():
    """A carry known exactly is seen with variance 1e-10, below float32's 6e-8: the posterior variance."""
    none, zero = jnp.zeros((2, 1)), jnp.zeros(2)
    step = Step(jnp.eye(2), none, zero, jnp.array([[1.0, 0.0], [1.0, 1.0]]), none, zero, jnp.full(2, 1e-10))
    _, root, _ = kalman.update_root(zero, jnp.eye(2), step, jnp.ones(2))
    exact = 1e-10 * np.array([[1.0, -1.0], [-1.0, 2.0]])
    np.testing.assert_allclose(root @ root.T, exact, rtol=1e-3)


def log_likelihood(initial, steps, ys, y0):
    """Log likelihood by the sequential filter."""
    return solve(initial, steps, ys, y0)[0]


@pytest.mark.parametrize(("name", "root"), [("missing", False), ("many data", False), ("many data", True)])
def test_gradient_equals_finite_differences(name, root):
    raw = system(CASES[name])
    with jax.enable_x64(True):
        initial, steps, ys, y0 = on_device(raw, jnp.float64)
        rng = np.random.default_rng(1)
        # Symmetric directions, since R is a covariance.
        direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), (initial, steps, ys))

        def symmetrised(step):
            return step._replace(R=step.R + jnp.swapaxes(step.R, -1, -2)) if step.R.ndim > 2 else step

        direction = direction[0]._replace(R=0 * direction[0].R), symmetrised(direction[1]), direction[2]

        @jax.jit
        def along(s, initial, steps, ys, direction, y0):
            initial, steps, moved = jax.tree.map(lambda a, b: a + s * b, (initial, steps, ys), direction)
            if not root:
                return log_likelihood(initial, steps, moved, y0)
            mean, U, total = initial.b, jnp.eye(initial.b.shape[0]), 0.0
            for t in range(len(ys)):
                mean, U, term = kalman.update_root(mean, U, jax.tree.map(lambda leaf, t=t: leaf[t], steps), moved[t])
                total = total + term
            return total

        arguments = initial, steps, ys, direction, y0
        exact = jax.grad(along)(0.0, *arguments)
        h = 1e-5
        numeric = (along(h, *arguments) - along(-h, *arguments)) / (2 * h)
        np.testing.assert_allclose(exact, numeric, rtol=1e-6)


def test_mean_only_smoother_equals_the_full_one():
    raw = system(CASES["missing"])
    with jax.enable_x64(True):
        _, filtered, moments, _ = solve(*on_device(raw, jnp.float64))
        r = jnp.zeros(3)
        for t in reversed(range(CASES["missing"].T)):
            record = jax.tree.map(lambda leaf, t=t: leaf[t], filtered.records)
            r, carry, noise = kalman.smooth_mean_step(record, r)
            close(carry, moments.carry_mean[t], 1e-11)
            close(noise, moments.noise_mean[t], 1e-11)


@pytest.mark.parametrize("name", ["missing", "singular"])
def test_draws_have_the_joint_moments(name):
    """Whitened against the exact law: every mean and covariance entry within 5 standard errors.

    About 400 and 5,000 correlated entries: the chance of a false alarm is below 5e-3 (Bonferroni), the key is fixed.
    """
    case, draws = CASES[name], 20_000
    raw = system(case)
    law = joint_law(*raw)
    with jax.enable_x64(True):
        sampler = jax.jit(partial(kalman.simulation_smoother, draws=draws))
        z0, e = sampler(*on_device(raw, jnp.float64), key=jax.random.key(2))
    assert z0.shape == (draws, raw[0].B.shape[1])
    assert e.shape == (draws, case.T, case.q)
    sample = np.concatenate([z0, np.reshape(e, (draws, -1))], axis=1)
    noises = slice(0, sample.shape[1])
    cov = law.cov[noises, noises]
    sd = np.sqrt(np.diag(cov))
    z = (sample.mean(0) - law.mean[noises]) / sd * np.sqrt(draws)
    assert np.max(np.abs(z)) < 5
    error = np.sqrt((np.outer(sd**2, sd**2) + cov**2) / draws)
    z = (np.cov(sample.T) - cov) / error
    assert np.max(np.abs(z)) < 5


def test_draws_follow_data_without_noise():
    """Data that are exact in the step's noise fix that combination of noises in every draw."""
    rng = np.random.default_rng(0)
    initial, steps, ys, y0 = system(Case(3, 3, 2, 6, 3, True, 0.0))
    steps = steps._replace(R=np.zeros((6, 2)))
    with jax.enable_x64(True):
        initial, steps, ys, y0 = on_device((initial, steps, ys, y0), jnp.float64)
        z0, e = kalman.simulation_smoother(initial, steps, ys, y0, jax.random.key(int(rng.integers(9))), 5)
        carry = z0 @ initial.B.T + initial.b[None]
        for t in range(6):
            data = carry @ steps.H[t].T + e[:, t] @ steps.D[t].T + steps.d[t, None]
            close(data, jnp.broadcast_to(ys[t], data.shape), 1e-9)
            carry = carry @ steps.A[t].T + e[:, t] @ steps.B[t].T + steps.b[t, None]


def constant_system(n, m, q, T, seed=0):
    """A stable step without time, its data, the mean of c_0 and a root of its covariance."""
    rng = np.random.default_rng(seed)
    step = one_step(rng, n, n, q, m, min(n, q), True)
    step = step._replace(b=rng.standard_normal((T, n)), d=rng.standard_normal((T, m)))
    return rng.standard_normal(n), rng.standard_normal((n, n)), step, 1.5 * rng.standard_normal((T, m))


@jax.jit
def ordinary(mean, root, step, ys):
    """The sequential filter of a constant step with offsets that vary."""
    return kalman.filter_series(mean, root @ root.T, step, ys, varying=CONSTANT._replace(b=True, d=True))


@partial(jax.jit, static_argnames="steady")
def constant(mean, root, step, ys, steady=True):
    """The filter under test."""
    return kalman_steady.filter_constant(mean, root @ root.T, step, ys, steady=steady)


def gradients(run, arguments):
    """Slopes of the log likelihood in every argument."""
    return jax.jit(jax.grad(lambda *a: run(*a).log_likelihood, argnums=(0, 1, 2, 3)))(*arguments)


@pytest.mark.parametrize(
    ("n", "m", "T", "steady"), [(4, 2, 501, True), (4, 2, 501, False), (10, 8, 256, True), (2, 1, 40, True)]
)
def test_constant_step_equals_the_ordinary_filter(n, m, T, steady):
    with jax.enable_x64(True):
        arguments = on_device(constant_system(n, m, n, T), jnp.float64)
        out, exact = constant(*arguments, steady=steady), ordinary(*arguments)
        close(out.log_likelihood, exact.log_likelihood, 1e-12)
        close(out.means, exact.means, 1e-10)
        close(out.cov, exact.covs[-1], 1e-12)
        assert (int(out.full_steps) < T) == (steady and T > 100)
        slopes = gradients(partial(constant, steady=steady), arguments)
        jax.tree.map(lambda a, b: close(a, b, 1e-9), slopes, gradients(ordinary, arguments))


@pytest.mark.parametrize("time", [7, 271, 390])  # 271 ends a chunk: nothing converges anew within it
def test_steady_switch_waits_for_the_last_missing_datum(time):
    mean, root, step, ys = constant_system(4, 2, 4, 400)
    ys[time, 1] = np.nan
    with jax.enable_x64(True):
        arguments = on_device((mean, root, step, ys), jnp.float64)
        out, exact = constant(*arguments), ordinary(*arguments)
        close(out.log_likelihood, exact.log_likelihood, 1e-12)
        close(out.means, exact.means, 1e-10)
        assert time < int(out.full_steps) <= 400
        assert (int(out.full_steps) < 400) == (time < 300)
        jax.tree.map(lambda a, b: close(a, b, 1e-9), gradients(constant, arguments), gradients(ordinary, arguments))


def test_switch_stays_off_while_the_covariance_moves():
    """A random walk seen with little information converges slowly: no switch within the series."""
    mean, root, step, ys = constant_system(2, 1, 2, 200)
    step = step._replace(A=np.eye(2), B=1e-4 * np.eye(2), D=0 * step.D)
    with jax.enable_x64(True):
        arguments = on_device((mean, root, step, ys), jnp.float64)
        out = constant(*arguments)
        assert int(out.full_steps) == 200
        close(out.log_likelihood, ordinary(*arguments).log_likelihood, 1e-12)


def test_steady_filter_in_float32_is_within_a_thousandth():
    raw = constant_system(10, 4, 10, 1000)
    low = constant(*on_device(raw, jnp.float32))
    assert int(low.full_steps) < 1000
    with jax.enable_x64(True):
        high = ordinary(*on_device(raw, jnp.float64))
    close(low.log_likelihood, high.log_likelihood, 1e-3)
    close(low.means, high.means, 1e-3)


RULES = {
    "unscented": sigma_points.unscented,
    "small alpha": partial(sigma_points.unscented, alpha=1e-2),
    "kappa": partial(sigma_points.unscented, kappa=1.5, beta=0.0),
    "cubature": sigma_points.cubature,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rank", [3, 2])
def test_sigma_points_reproduce_a_linear_step(rule, rank):
    rng = np.random.default_rng(0)
    step = one_step(rng, 3, 4, 2, 2, 2, True)
    root = rng.standard_normal((3, rank)) @ rng.standard_normal((rank, 3))
    with jax.enable_x64(True):
        step, mean, root = on_device((step, rng.standard_normal(3), root), jnp.float64)
        points = RULES[rule](5)
        out = sigma_points.linearise(
            lambda c, e: (step.A @ c + step.B @ e + step.b, step.H @ c + step.D @ e + step.d), mean, root, points
        )
        close(out.A @ root, step.A @ root, 1e-9)
        close(out.H @ root, step.H @ root, 1e-9)
        close(out.A @ mean + out.b, step.A @ mean + step.b, 1e-9)
        close(out.H @ mean + out.d, step.H @ mean + step.d, 1e-9)
        noises, exact = jnp.concatenate([out.B, out.D]), jnp.concatenate([step.B, step.D])
        close(noises[:, :2], exact, 1e-9)
        close(noises[:, 2:], 0 * noises[:, 2:], 1e-7)
        if rank == 3:
            close(out.A, step.A, 1e-8)
            close(out.H, step.H, 1e-8)


def quadratic(c, e, forms):
    """Two quadratic carries and one quadratic datum of (c, e)."""
    x = jnp.concatenate([c, e])
    out = jnp.einsum("kij,i,j->k", forms, x, x) + x[:3]
    return out[:2], out[2:]


@pytest.mark.parametrize("rule", RULES)
def test_sigma_points_have_the_exact_mean_of_quadratics_and_the_moments_of_their_rule(rule):
    rng = np.random.default_rng(1)
    forms, root, mean = rng.standard_normal((3, 3, 3)), rng.standard_normal((2, 2)), rng.standard_normal(2)
    with jax.enable_x64(True):
        forms, root, mean = on_device((forms, root, mean), jnp.float64)
        points = RULES[rule](3)
        step = sigma_points.linearise(lambda c, e: quadratic(c, e, forms), mean, root, points)
        centre = jnp.concatenate([mean, jnp.zeros(1)])
        spread = jnp.zeros((3, 3)).at[:2, :2].set(root @ root.T).at[2, 2].set(1.0)
        exact = jnp.einsum("kij,ij->k", forms, spread + jnp.outer(centre, centre)) + centre
        predicted = jnp.concatenate([step.A @ mean + step.b, step.H @ mean + step.d])
        close(predicted, exact, 1e-9)
        # Exact slopes of a quadratic are its gradient at the mean.
        slopes = jnp.einsum("kij,j->ki", forms + jnp.swapaxes(forms, 1, 2), centre) + jnp.eye(3)
        close(jnp.concatenate([step.A, step.H]), slopes[:, :2], 1e-8)
        # The step's covariance is that of the rule.
        x = jnp.asarray(points.nodes)
        values = jax.vmap(lambda x: jnp.concatenate(quadratic(mean + root @ x[:2], x[2:], forms)) - predicted)(x)
        cov = values.T @ (points.cov_weights[:, None] * values)
        maps, noises = jnp.concatenate([step.A, step.H]) @ root, jnp.concatenate([step.B, step.D])
        close(maps @ maps.T + noises @ noises.T, cov, 1e-8)


def test_unscented_variance_of_a_square_is_exact():
    with jax.enable_x64(True):

        def square(c, e):
            return jnp.sum(c**2)[None], e

        one = sigma_points.linearise(square, jnp.zeros(1), jnp.eye(1), sigma_points.unscented(1))
        close(one.B @ one.B.T, [[2.0]], 1e-12)


def test_sigma_points_see_a_singular_root_whose_null_space_is_no_axis():
    """With U of rank 1 in a rotated basis the covariance of the rule is kept, by extra noise."""
    with jax.enable_x64(True):
        root = jnp.outer(jnp.array([1.0, 2.0]), jnp.array([0.6, 0.8]))
        points = sigma_points.unscented(2)

        def cube(c, e):
            return c**3, c[:1]

        step = sigma_points.linearise(cube, jnp.ones(2), root, points)
        values = jax.vmap(lambda x: jnp.concatenate(cube(1.0 + root @ x, x)))(jnp.asarray(points.nodes))
        values = values - (jnp.asarray(points.mean_weights) @ values)[None]
        maps, noises = jnp.concatenate([step.A, step.H]) @ root, jnp.concatenate([step.B, step.D])
        close(maps @ maps.T + noises @ noises.T, values.T @ (points.cov_weights[:, None] * values), 1e-10)


def test_gradient_through_sigma_points_is_finite_without_residual():
    def spread(scale):
        step = sigma_points.linearise(
            lambda c, e: (scale * c + e, c[:1]), jnp.zeros(2), jnp.eye(2), sigma_points.unscented(4)
        )
        return jnp.sum(step.B @ step.B.T) + jnp.sum(step.A**2)

    np.testing.assert_allclose(jax.grad(spread)(0.7), 2.8, rtol=1e-5)


def test_a_rule_that_gives_negative_variances_is_refused():
    with pytest.raises(ValueError, match="negative variance"):
        sigma_points.unscented(4, kappa=-3.5, beta=0.0)


def test_constant_leaves_are_broadcast():
    raw = system(CASES["plain"])
    with jax.enable_x64(True):
        _, steps, ys, _ = on_device(raw, jnp.float64)
        first = jax.tree.map(lambda leaf: leaf[0], steps)
        mixed = first._replace(A=steps.A, d=steps.d)
        repeated = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(ys), *leaf.shape)), first)
        repeated = repeated._replace(A=steps.A, d=steps.d)
        start = jnp.zeros(3), jnp.eye(3)
        varying = CONSTANT._replace(A=True, d=True)
        for run in (kalman.filter_series, kalman_parallel.filter_series_parallel):
            run = jax.jit(run, static_argnames="varying")
            jax.tree.map(
                lambda a, b: close(a, b, 1e-12),
                run(*start, mixed, ys, varying=varying),
                run(*start, repeated, ys),
            )
