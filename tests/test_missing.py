"""Missing data: the density is the one with the missing elements removed, in both coordinate systems; gradients finite.

Comparisons are exact up to rounding, in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward._errors import DataError
from pushforward.model.inverse import check_data, read_problem

NAN = float("nan")
SERIES = np.array([0.5, NAN, NAN, -0.4, 0.1])
TABLE = np.array([[0.5, NAN, 0.3], [NAN, NAN, NAN], [0.1, 0.2, -0.7]])
COVARIANCE = np.array([[1.0, 0.6, 0.2], [0.6, 1.5, -0.3], [0.2, -0.3, 0.8]])


def normal(name="m", location=0.0, scale=1.0):
    return numpyro.sample(name, dist.Normal(location, scale))


def at(values, location, scale=1.0):
    """Independent normal data that are present, as a factor: another road than masking."""
    present = ~np.isnan(values)
    location, scale = (jnp.broadcast_to(x, values.shape)[present] for x in (location, scale))
    numpyro.factor("data", dist.Normal(location, scale).log_prob(values[present]).sum())


def elements(y):
    numpyro.sample("y", dist.Normal(normal() * jnp.arange(5.0), jnp.exp(normal("s"))), obs=y)


def elements_removed(y):
    at(y, normal() * jnp.arange(5.0), jnp.exp(normal("s")))


def events_of_normals(y):
    numpyro.sample("y", dist.Normal(normal("m", 0.0, 2.0), 1.0).expand([3]).to_event(1).expand([3]), obs=y)


def events_of_normals_removed(y):
    at(y, normal("m", 0.0, 2.0))


def plates(y):
    with numpyro.plate("rows", 3, dim=-2):
        m = normal()
        with numpyro.plate("columns", 3):
            numpyro.sample("y", dist.Normal(m, 0.5), obs=y)


def plates_removed(y):
    with numpyro.plate("rows", 3, dim=-2):
        m = normal()
    at(y, m, 0.5)


def multivariate(y):
    m = numpyro.sample("m", dist.Normal(0, 1).expand([3]).to_event(1))
    numpyro.sample("y", dist.MultivariateNormal(m, COVARIANCE * jnp.exp(m[0])), obs=y)


def multivariate_removed(y):
    m = numpyro.sample("m", dist.Normal(0, 1).expand([3]).to_event(1))
    for row in range(3):
        (kept,) = np.nonzero(~np.isnan(y[row]))
        if kept.size:
            covariance = COVARIANCE[np.ix_(kept, kept)] * jnp.exp(m[0])
            numpyro.factor(f"row{row}", dist.MultivariateNormal(m[kept], covariance).log_prob(y[row][kept]))


def low_rank(y):
    m = numpyro.sample("m", dist.Normal(0, 1).expand([3]).to_event(1))
    numpyro.sample("y", dist.LowRankMultivariateNormal(m, jnp.array([[1.0], [2], [0]]), jnp.ones(3)), obs=y)


def low_rank_removed(y):
    m = numpyro.sample("m", dist.Normal(0, 1).expand([3]).to_event(1))
    whole = np.outer([1, 2, 0], [1, 2, 0]) + np.eye(3)
    for row in range(3):
        (kept,) = np.nonzero(~np.isnan(y[row]))
        if kept.size:
            law = dist.MultivariateNormal(m[kept], whole[np.ix_(kept, kept)])
            numpyro.factor(f"row{row}", law.log_prob(y[row][kept]))


SHARES = np.array([[0.2, 0.3, 0.5], [NAN, NAN, NAN], [0.6, 0.3, 0.1]])


def whole_events(y):
    numpyro.sample("y", dist.Dirichlet(jnp.exp(normal()) * jnp.ones(3)), obs=y)


def whole_events_removed(y):
    law = dist.Dirichlet(jnp.exp(normal()) * jnp.ones(3))
    numpyro.factor("data", law.log_prob(y[[0, 2]]).sum())


COUNTS = np.array([3.0, NAN, 0.0, 7.0, NAN])


def counts(y):
    numpyro.sample("y", dist.Poisson(jnp.exp(normal())), obs=y)


def counts_removed(y):
    numpyro.factor("data", dist.Poisson(jnp.exp(normal())).log_prob(y[~np.isnan(y)]).sum())


def masked(y):
    m = normal()
    with handlers.mask(mask=jnp.array([True, True, False, False, True])):
        numpyro.sample("y", dist.Normal(m, 0.5), obs=y)


def masked_removed(y):
    at(np.array([y[0], NAN, NAN, NAN, y[4]]), normal(), 0.5)


def in_scan(y):
    rho = numpyro.sample("rho", dist.Uniform(0, 1))

    def step(x, y):
        x = normal("x", rho * x, 0.5)
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y)
        return x, None

    scan(step, 1.0, y)


def in_scan_removed(y):
    rho = numpyro.sample("rho", dist.Uniform(0, 1))

    def step(x, _):
        x = normal("x", rho * x, 0.5)
        return x, x

    _, xs = scan(step, 1.0, None, length=len(y))
    at(y, xs, 0.3)


def vectors_in_scan(y):
    def step(x, y):
        with numpyro.plate("p", 3):
            x = normal("x", x, 0.5)
        numpyro.sample("y", dist.MultivariateNormal(x, COVARIANCE), obs=y)
        return x, None

    scan(step, jnp.zeros(3), y)


def vectors_in_scan_removed(y):
    def step(x, _):
        with numpyro.plate("p", 3):
            x = normal("x", x, 0.5)
        return x, x

    _, xs = scan(step, jnp.zeros(3), None, length=3)
    for row in (0, 2):
        (kept,) = np.nonzero(~np.isnan(y[row]))
        law = dist.MultivariateNormal(xs[row][kept], COVARIANCE[np.ix_(kept, kept)])
        numpyro.factor(f"row{row}", law.log_prob(y[row][kept]))


PAIRS = {
    "elements": (elements, elements_removed, SERIES),
    "events of normals": (events_of_normals, events_of_normals_removed, TABLE),
    "plates": (plates, plates_removed, TABLE),
    "multivariate": (multivariate, multivariate_removed, TABLE),
    "low rank": (low_rank, low_rank_removed, TABLE),
    "whole events": (whole_events, whole_events_removed, SHARES),
    "counts": (counts, counts_removed, COUNTS),
    "mask and NaN": (masked, masked_removed, SERIES),
    "scan": (in_scan, in_scan_removed, SERIES),
    "scan of vectors": (vectors_in_scan, vectors_in_scan_removed, TABLE),
}


@pytest.mark.parametrize("name", PAIRS)
def test_density_is_that_of_the_data_that_are_present(name, float64):
    model, removed, y = PAIRS[name]
    with_nan = read_problem(model, (jnp.asarray(y.copy()),))
    without = read_problem(lambda: removed(y))
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=with_nan.dimension))
    position = {n: jnp.asarray(rng.normal(size=s)) for n, s in with_nan.unconstrained_shapes().items()}

    @jax.jit
    def both(z, position):
        return [
            (jax.value_and_grad(problem.log_density)(z), jax.value_and_grad(problem.potential)(position))
            for problem in (with_nan, without)
        ]

    found, exact = both(z, position)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found, exact)
    likelihood = np.asarray(with_nan.evaluate(z).log_likelihood["y"])
    absent = np.isnan(y) if likelihood.shape == y.shape else np.isnan(y).all(-1)
    if not name.startswith("mask"):
        np.testing.assert_array_equal(likelihood == 0, absent)


def test_infer_with_missing_data_equals_infer_without_them():
    def model(x, y):
        numpyro.sample("y", dist.Normal(normal() * x, 0.5), obs=y)

    x, y = np.arange(5.0), SERIES.copy()
    kept = ~np.isnan(y)
    tree = pf.infer(model, method="laplace", draws=1000, progress=False, x=x, y=y)
    precision = 1 + 4 * x[kept] @ x[kept]
    mean, sd = 4 * x[kept] @ y[kept] / precision, precision**-0.5
    draws = tree["posterior"]["m"].to_numpy()
    # |z| < 4.5 for the mean and the standard deviation of 1000 independent draws: false-alarm rate 1.4e-5.
    assert draws.mean() == pytest.approx(mean, abs=4.5 * sd / 1000**0.5)
    assert draws.std() == pytest.approx(sd, rel=4.5 / 2000**0.5)
    assert "2 of 5 values of 'y' are NaN" in pf.attributes(tree)["notes"][0]
    np.testing.assert_array_equal(tree["observed_data"]["y"].isnull(), ~kept)
    assert (tree["log_likelihood"]["y"].to_numpy()[..., ~kept] == 0).all()


def uses_mean(y):
    value = numpyro.sample("y", dist.Normal(normal(), 1.0), obs=y)
    numpyro.sample("w", dist.Normal(value.sum(), 1.0), obs=0.0)


def uses_sign(y):
    value = numpyro.sample("y", dist.Normal(normal(), 1.0), obs=y)
    numpyro.sample("w", dist.Normal(jnp.where(value > 0, 1.0, 0.0).sum(), 1.0), obs=0.0)


def autoregression(y):
    numpyro.sample("y", dist.Normal(normal() * y[:-1], 1.0), obs=y[1:])


def previous_datum_in_scan(y):
    def step(last, y):
        y = numpyro.sample("y", dist.Normal(normal("x", last), 1.0), obs=y)
        return y, None

    scan(step, 0.0, y)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (uses_mean, r"\['y'\] have missing values, and site 'w'.*obs_mask"),
        (uses_sign, r"'y' have missing values, and site 'w' depends on 'y'.*obs_mask"),
        (autoregression, r"\['y'\] have missing values, and site 'y'.*obs_mask"),
        (previous_datum_in_scan, r"\['y'\] have missing values, and site 'x'.*obs_mask"),
    ],
)
def test_a_missing_value_that_is_used_elsewhere_is_refused(model, text):
    with pytest.raises(DataError, match=text):
        check_data(read_problem(model, (SERIES.copy(),)))
    assert check_data(read_problem(model, (np.ones(5),))) == []


def test_an_event_missing_in_part_is_refused():
    y = SHARES.copy()
    y[0, 1] = NAN
    with pytest.raises(DataError, match=r"'y' \(Dirichlet\) are missing in part within an event.*whole event as NaN"):
        check_data(read_problem(whole_events, (y,)))


def test_a_missing_scan_step_does_not_make_others_depend_on_it():
    assert check_data(read_problem(in_scan, (SERIES.copy(),))) == ["2 of 5 values of 'y' are NaN and count as missing."]


def imputed(y):
    value = numpyro.sample("y", dist.Normal(normal(), 1.0).expand([5]), obs=y, obs_mask=~jnp.isnan(y))
    numpyro.sample("w", dist.Normal(value.sum(), 1.0), obs=3.0)


def imputed_by_hand(y):
    present = ~np.isnan(y)
    m = normal()
    at(y, m)
    rest = numpyro.sample("y_unobserved", dist.Normal(m, 1.0).expand([5]))
    numpyro.factor("w", dist.Normal(jnp.where(present, jnp.nan_to_num(y), rest).sum(), 1.0).log_prob(3.0))


def test_obs_mask_imputes_in_both_coordinates(float64):
    problem, exact = read_problem(imputed, (jnp.asarray(SERIES.copy()),)), read_problem(lambda: imputed_by_hand(SERIES))
    check_data(problem)
    rng = np.random.default_rng(1)
    z = jnp.asarray(rng.normal(size=6))
    position = {n: jnp.asarray(rng.normal(size=s)) for n, s in exact.unconstrained_shapes().items()}
    assert problem.unconstrained_shapes() == exact.unconstrained_shapes()
    np.testing.assert_allclose(problem.log_density(z), exact.log_density(z), rtol=1e-10)
    np.testing.assert_allclose(problem.potential(position), exact.potential(position), rtol=1e-10)
    assert np.isfinite(jax.grad(problem.log_density)(z)).all()


def test_obs_mask_gives_the_exact_posterior():
    """m, two missing y and w are jointly normal: E and sd of m in closed form."""
    tree = pf.infer(imputed, method="laplace", draws=1000, progress=False, y=SERIES.copy())
    assert set(tree["posterior"].data_vars) >= {"m", "y_unobserved", "y"}
    # w given m is N(sum of present + 2 m, 1 + 2), present data N(m, 1).
    present = SERIES[~np.isnan(SERIES)]
    precision = 1 + 3 + 4 / 3
    mean = (present.sum() + 2 * (3 - present.sum()) / 3) / precision
    draws = tree["posterior"]["m"].to_numpy()
    # 1000 independent draws, |z| < 4.5: false-alarm rate 7e-6.
    assert draws.mean() == pytest.approx(mean, abs=4.5 / (1000 * precision) ** 0.5)
