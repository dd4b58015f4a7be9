"""Every method keeps the promises of `pushforward.contract`, and the contract fails where a method is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pushforward as pf
from pushforward import contract
from pushforward._errors import MethodError, Outcome
from pushforward.methods import NAMES
from pushforward.methods._base import Draws, Method, count

# One line for each method: settings that make it cheap.
CHEAP = {
    "nuts": pf.NUTS(warmup=200),
    "pcn": pf.PreconditionedCrankNicolson(warmup=500, thinning=20),
    "tempered_smc": pf.TemperedSMC(particles=400, islands=4),
    "laplace": pf.Laplace(),
    "gaussian_vi": pf.GaussianVI(samples=64),
    "pathfinder": pf.Pathfinder(),
    "flow_vi": pf.FlowVI(pf.Flow("coupling", layers=2, width=8), samples=64),
    "eki": pf.EKI(1000),
    "eks": pf.EKS(200),
    "aldi": pf.ALDI(200),
    "uki": pf.UKI(),
    "kalman": pf.Kalman(),
    "four_dvar": pf.FourDVar(),
    "enkf": pf.EnKF(1000, pf.Perturbed()),
    "three_dvar": pf.ThreeDVar(free_run=10),
    "transport_filter": pf.TransportFilter(200),
}

# Methods that the contract's problem, a state that never moves, is not for, or that would train a network for each of
# its checks; their own tests hold them to exact answers, and `test_amortized.py` to the contract in the full run.
ELSEWHERE = {
    "particle_filter", "discrete_hmm", "pmmh", "particle_gibbs", "smc2", "amortized_flow", "neural_likelihood",
    "score_trajectory",
}  # fmt: skip


def test_every_method_is_checked():
    assert set(CHEAP) | ELSEWHERE == set(NAMES)
    assert all(type(method) is NAMES[name] for name, method in CHEAP.items())


@pytest.mark.parametrize("name", CHEAP)
def test_contract(name):
    contract.check(CHEAP[name])


# -------------------------------------------------------------------------------------------- it fails where it should


class Exact(Method):
    """Draws from the exact posterior of a linear model with a standard deviation of 0.5, with errors on request."""

    error: str = ""

    def run(self, problem, key, draws, runner):
        return runner.call(exact, self, problem, key, draws)


def exact(method, problem, key, draws):
    d = problem.dimension
    found = problem.forward(jnp.zeros(d))
    matrix = jax.jacobian(lambda z: problem.forward(z).mean["y"])(jnp.zeros(d))
    data = -found.data["y"] if method.error == "sign" else found.data["y"]
    weights = 1 / found.noise["y"] ** 2
    precision = jnp.eye(d) + matrix.T * weights @ matrix
    mean = jnp.linalg.solve(precision, matrix.T @ (weights * (data - found.mean["y"])))
    root = jnp.linalg.cholesky(jnp.linalg.inv(precision))
    if method.error == "variance":
        root = root * 2**0.5
    if method.error == "prior":
        mean, root = jnp.zeros(d), jnp.eye(d)
    key = jax.random.key(3) if method.error == "key" else key
    positions = (mean + jax.random.normal(key, (draws, d)) @ root.T)[None]
    success = jnp.asarray(int(Outcome.SUCCESS))
    return Draws(positions, {}, {}, success, count(0 if method.error == "count" else 1), count(1))


class Retracing(Exact):
    def run(self, problem, key, draws, runner):
        return exact(self, problem, key, draws)


def test_an_exact_method_passes():
    contract.check(Exact())


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        (Exact("prior"), "posterior: linear Gaussian posterior: the mean"),
        (Exact("variance"), "the variance of 1 of draws whitened .* misses by .* standard errors"),
        (Exact("sign"), "the mean of 1 of draws whitened"),
        (Exact("key"), "keys: another key gave the same draws"),
        (Exact("count"), "groups: a method says how many runs"),
        (Retracing(), r"compiled_once: other data of the same shape ran the model's Python \d+ times more"),
    ],
    ids=lambda value: getattr(value, "error", None),
)
def test_a_wrong_method_fails(method, broken):
    name = broken.partition(":")[0] if ": " in broken else "posterior"
    with pytest.raises(AssertionError, match=broken):
        contract.check(method, only=(name,))


def test_draws_that_are_no_posterior_are_exempt():
    class Minimiser(Exact):
        returns = "minimiser"

    contract.check(Minimiser("prior"), only=("posterior",))


def test_moments_fail_at_the_stated_rate():
    """For exact draws the scores are standard normal: the limit is where it is said to be."""
    found = []

    for key in range(40):
        tree = contract._infer(Exact(), key=key)
        mean, root = contract._exact(0.0, contract._inputs()["forward"], contract._inputs()["y"])
        white = (contract._theta(tree)[0] - mean) @ root
        found.append(white.mean(0) * 1000**0.5)
    scores = np.ravel(found)
    # 80 standard normal scores: their variance is 1 up to 5 sd of chi^2_80 / 80; false-alarm rate 1e-5.
    assert scores.var() == pytest.approx(1, abs=5 * (2 / 80) ** 0.5)
    assert np.abs(scores).max() < contract.LIMIT


def test_arguments_of_check():
    with pytest.raises(MethodError, match="takes an instance of a method"):
        contract.check(pf.NUTS)
    with pytest.raises(MethodError, match="only= names 'speed'; the checks are"):
        contract.check(pf.Laplace(), only=("speed",))
