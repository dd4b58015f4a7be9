"""Localised ensemble inversion: the gains against plain formulas, and what it is for: many parameters, few members."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.linalg

import pushforward as pf
from pushforward._errors import MethodError
from pushforward.math import inversion, inversion_local
from pushforward.math.ensemble_local import HALF_SUPPORT, gaspari_cohn

WRONG: Any = 3
J, D, M, H = 20, 70, 33, 0.3
GENERATOR = np.random.default_rng(3)
MEMBERS, OUTPUTS = GENERATOR.normal(size=(J, D)), 1 + GENERATOR.normal(size=(J, M))
NOISE = GENERATOR.normal(size=(J, M))
DATA = np.where(np.arange(M) == 3, np.nan, GENERATOR.normal(size=M))
PLACES, SENSORS = GENERATOR.uniform(size=(D, 2)), GENERATOR.uniform(size=(M, 2))
PLACES[5] = SENSORS[7] = np.nan

UPDATES = {
    "transform": (inversion.transform, inversion_local.transform_terms, ()),
    "perturbed": (inversion.perturbed, inversion_local.perturbed_terms, (NOISE,)),
    "unperturbed": (inversion.unperturbed, inversion_local.unperturbed_terms, ()),
}


def tapers(radius, period=None):
    """(D, M): 1 where a place is not known."""
    shift = np.abs(PLACES[:, None] - SENSORS[None])
    shift = shift if period is None else np.minimum(shift, period - shift)
    found = np.asarray(gaspari_cohn(np.nan_to_num(np.sqrt((shift**2).sum(-1))) / (HALF_SUPPORT * radius)))
    return np.where(np.isnan(shift).any(-1), 1.0, found)


def gains(update):
    """Kalman's gain for the mean and, for the square root, that of Whitaker and Hamill's equation 10, both (D, M)."""
    anomalies, outputs = MEMBERS - MEMBERS.mean(0), np.where(np.isnan(DATA), 0.0, OUTPUTS)
    seen = outputs - outputs.mean(0)
    scale = J if update == "unperturbed" else J - 1
    cross, own = anomalies.T @ seen / scale, seen.T @ seen / scale
    inside, noise = own + np.eye(M) / H, np.eye(M) / H
    # The noise is a multiple of I, so all roots commute.
    root = np.real(scipy.linalg.sqrtm(inside))
    return cross @ np.linalg.inv(inside), cross @ np.linalg.inv(root) @ np.linalg.inv(root + np.sqrt(noise))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("period", [None, 1.0], ids=["plane", "torus"])
def test_gains_are_tapered_pair_by_pair(float64, update, period):
    """All updates, blocks of 16 parameters, a missing datum, a parameter and a datum without a place."""
    _, terms, noise = UPDATES[update]
    periods = None if period is None else np.full(2, period)
    blocks = inversion_local.distance_blocks(PLACES, SENSORS, 2 * HALF_SUPPORT * 0.1, periods=periods, size=16)
    assert blocks.data.shape[1] < M
    periods = None if periods is None else jnp.asarray(periods)
    found = inversion_local.by_distance(jnp.asarray(MEMBERS), terms(OUTPUTS, DATA, H, *noise), blocks, 0.1, periods)

    taper, (mean, spread) = tapers(0.1, period), gains(update)
    known, outputs = np.nan_to_num(DATA), np.where(np.isnan(DATA), 0.0, OUTPUTS)
    if update == "transform":
        shift = (known - outputs.mean(0)) @ (taper * mean).T - (outputs - outputs.mean(0)) @ (taper * spread).T
    else:
        extra = np.where(np.isnan(DATA), 0.0, NOISE - NOISE.mean(0)) / np.sqrt(H) if noise else 0.0
        shift = (known - outputs + extra) @ (taper * mean).T
    np.testing.assert_allclose(found - MEMBERS, shift, atol=1e-12)


@pytest.mark.parametrize("update", UPDATES)
def test_without_tapers_it_is_the_update_itself(float64, update):
    weights, terms, noise = UPDATES[update]
    given = terms(OUTPUTS, DATA, H, *noise)
    want = weights(OUTPUTS, DATA, H, *noise) @ MEMBERS
    blocks = inversion_local.distance_blocks(PLACES, SENSORS, 2 * HALF_SUPPORT * 1e7, size=16)
    np.testing.assert_allclose(inversion_local.by_distance(jnp.asarray(MEMBERS), given, blocks, 1e7), want, atol=1e-10)
    found = inversion_local.by_correlation(jnp.asarray(MEMBERS), jnp.asarray(OUTPUTS), given, J, 0.0, size=16)
    np.testing.assert_allclose(found, want, atol=1e-12)


def test_significance(float64):
    """By hand: J = 27, r = .6 has t^2 = 25 x .36 / .64 = 14.0625, so 1 - 9 / 14.0625 = .36; chance leaves little."""
    assert inversion_local.significance_taper(jnp.asarray(0.6), 27, 3.0) == pytest.approx(0.36, rel=1e-12)
    assert inversion_local.significance_taper(jnp.asarray([0.0, 1.0]), 27, 3.0).tolist() == [0.0, 1.0]
    a, b = GENERATOR.normal(size=(2, 30, 2000))
    r = ((a - a.mean(0)) * (b - b.mean(0))).mean(0) / (a.std(0) * b.std(0))
    # P(|t_28| > 3) = .0056: 11 of 2000, at most 30 with a false alarm in a million runs.
    assert 1 <= np.count_nonzero(inversion_local.significance_taper(jnp.asarray(r), 30, 3.0)) <= 30


# ------------------------------------------------------------------------------------------- through `infer`

N, EVERY, SD = 400, 4, 0.3
LINE = np.arange(N) / N
GAP = np.minimum(np.abs(LINE[:, None] - LINE[None]), 1 - np.abs(LINE[:, None] - LINE[None]))
FORWARD = np.exp(-0.5 * (GAP[::EVERY] / 0.01) ** 2)
FORWARD /= np.linalg.norm(FORWARD, axis=1, keepdims=True)
TRUTH = np.random.default_rng(0).normal(size=N)
HEAD = FORWARD @ TRUTH + SD * np.random.default_rng(1).normal(size=N // EVERY)
NEAR = {"parameters": {"k": LINE}, "data": {"head": LINE[::EVERY]}, "period": 1.0}


def aquifer(head=None):
    """400 independent numbers on a ring, of which 100 sensors see local averages."""
    k = numpyro.sample("k", dist.Normal(0, 1).expand([N]).to_event(1))
    numpyro.sample("head", dist.Normal(jnp.asarray(FORWARD) @ k, SD).to_event(1), obs=head)


def miss(method):
    """Root mean square error of the posterior mean in posterior sd, and the mean ratio of sd, over the line."""
    covariance = np.linalg.inv(np.eye(N) + FORWARD.T @ FORWARD / SD**2)
    mean, sd = covariance @ FORWARD.T @ HEAD / SD**2, np.sqrt(np.diag(covariance))
    k = pf.infer(aquifer, method=method, head=HEAD, progress=False)["posterior"]["k"].to_numpy()[0]
    return np.sqrt(np.mean(((k.mean(0) - mean) / sd) ** 2)), np.mean(k.std(0, ddof=1) / sd)


@pytest.mark.parametrize("update", ["transform", "perturbed"])
def test_sixty_members_learn_four_hundred_parameters(update):
    """Measured: .22 sd, .97 by distance; .37, .94 by correlation (prior: .42, 1.08); 1.1 - 1.2, .4 - .5 without."""
    error, spread = miss(pf.EKI(60, update=update, localisation=pf.ByDistance(0.01, **NEAR)))
    assert error < 0.27
    assert 0.9 < spread < 1.05
    error, spread = miss(pf.EKI(60, update=update, localisation=pf.ByCorrelation()))
    assert error < 0.42
    assert 0.85 < spread < 1.05
    error, spread = miss(pf.EKI(60, update=update))
    assert error > 0.8
    assert spread < 0.6


def test_members_leave_the_span_of_the_first(float64):
    key, first = jax.random.key(4), jax.random.fold_in(jax.random.key(4), 0)
    start = np.asarray(jax.random.normal(first, (15, N)))
    span = np.linalg.svd(start - start.mean(0), full_matrices=False)[2][:-1]
    for localisation, least, most in ((None, 0.0, 1e-10), (pf.ByDistance(0.02, **NEAR), 0.1, np.inf)):
        method = pf.EKI(15, localisation=localisation)
        k = pf.infer(aquifer, method=method, head=HEAD, key=key, progress=False)["posterior"]["k"].to_numpy()[0]
        moved = k - start.mean(0)
        outside = np.linalg.norm(moved - moved @ span.T @ span) / np.linalg.norm(moved)
        assert least <= outside <= most


def test_failed_members_take_no_part(float64):
    """A model that fails for a tenth of the prior: the mean is that of a run without failures, up to sampling."""

    def fails(head=None):
        k = numpyro.sample("k", dist.Normal(0, 1).expand([N]).to_event(1))
        mean = jnp.where(k[0] > 1.28, jnp.nan, jnp.asarray(FORWARD) @ k)
        numpyro.sample("head", dist.Normal(mean, SD).to_event(1), obs=head)

    method = pf.EKI(100, localisation=pf.ByDistance(0.01, **NEAR))
    both = [pf.infer(model, method=method, head=HEAD, progress=False) for model in (fails, aquifer)]
    assert pf.attributes(both[0])["failed_evaluations"] > 5
    a, b = (tree["posterior"]["k"].to_numpy()[0].mean(0) for tree in both)
    assert np.sqrt(np.mean((a - b) ** 2)) < 0.25


def test_asked_and_told_it_is_the_same(float64):
    method = pf.EKI(20, schedule=2, localisation=pf.ByDistance(0.02, **NEAR))
    state = method.start(aquifer, key=5, head=HEAD)
    while not state.finished:
        outputs = np.asarray(state.members["k"]) @ FORWARD.T
        state = method.tell(state, outputs, aquifer, head=HEAD)
    tree = pf.infer(aquifer, method=method, head=HEAD, key=5, progress=False)
    np.testing.assert_allclose(state.members["k"], tree["posterior"]["k"].to_numpy()[0], atol=1e-10)


def matrix(head=None):
    k = numpyro.sample("k", dist.MultivariateNormal(jnp.zeros(4), jnp.eye(4) + 0.5))
    numpyro.sample("head", dist.MultivariateNormal(k, jnp.eye(4) + 0.1), obs=head)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pf.ByDistance(0.0, **NEAR), r"ByDistance\(radius=...\) takes a positive number; got 0.0"),
        (lambda: pf.ByDistance(1.0, parameters=LINE, data=LINE), "takes coordinates by the names"),
        (lambda: pf.ByCorrelation(-1.0), r"ByCorrelation\(significance=...\) takes a number of at least 0"),
        (lambda: pf.EKI(localisation=WRONG), r"EKI\(localisation=...\) takes pf.ByDistance"),
        (lambda: pf.EKI(update="tikhonov", time=9.0, localisation=pf.ByCorrelation()), "takes the prior as data"),
    ],
    ids=["radius", "names", "significance", "type", "tikhonov"],
)  # fmt: skip
def test_wrong_options(make, message):
    with pytest.raises(MethodError, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "data", "changes", "message"),
    [
        (aquifer, HEAD, {"parameters": {"kk": LINE}}, r"names 'kk', which is no latent site; there are \['k'\]"),
        (aquifer, HEAD, {"data": {"k": LINE}}, r"names 'k', which is no observed site; there are \['head'\]"),
        (aquifer, HEAD, {"parameters": {"k": LINE[:9]}}, r"of shape \(400, 'k'\), k the number of axes; got \(9,"),
        (aquifer, HEAD, {"data": {"head": np.full(100, np.nan)}}, "takes finite coordinates"),
        (aquifer, HEAD, {"data": {"head": np.ones((100, 2))}}, r"same number of axes; got \[1, 2\]"),
        (aquifer, HEAD, {"period": np.ones(2)}, r"takes one number or 1; got shape \(2,\)"),
        (matrix, np.ones(4), {"parameters": {"k": LINE[:4]}, "data": {"head": LINE[:4]}}, "'head' is correlated"),
    ],
    ids=["latent", "observed", "length", "nan", "axes", "period", "noise"],
)  # fmt: skip
def test_coordinates_that_do_not_fit(model, data, changes, message):
    with pytest.raises(MethodError, match=message):
        pf.infer(model, method=pf.EKI(20, localisation=pf.ByDistance(0.1, **NEAR | changes)), head=data, progress=False)


def test_a_correlated_prior_has_no_places():
    def walk(head=None):
        k = numpyro.sample("k", dist.GaussianRandomWalk(1.0, 4))
        numpyro.sample("head", dist.Normal(k, 1.0).to_event(1), obs=head)

    places = {"parameters": {"k": np.arange(4.0)}, "data": {"head": np.arange(4.0)}}
    with pytest.raises(MethodError, match="elements of site 'k' depend on each other in the prior"):
        pf.infer(walk, method=pf.EKI(20, localisation=pf.ByDistance(1.0, **places)), head=np.ones(4), progress=False)
