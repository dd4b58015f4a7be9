"""Every kind of bad input is answered at the door: what was given, what was expected, what to write instead."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pushforward as pf
from pushforward._errors import ArgumentError, DataError, InferenceError, MethodError, ModelError, Outcome
from pushforward.methods._base import Draws, Method, count

X, Y = np.linspace(-1.0, 1.0, 4), np.array([0.1, 0.2, 0.5, 0.9])
NAN, INF = float("nan"), float("inf")


def normal(name="m"):
    return numpyro.sample(name, dist.Normal(0.0, 1.0))


def model(x, y=None):
    numpyro.sample("y", dist.Normal(normal() * x, 0.5), obs=y)


def law_of_data(law):
    """A model of `m` with data of a law that is a function of m."""

    def made(y):
        numpyro.sample("y", law(normal()), obs=y)

    return made


def infer(fn=model, **given):
    options = {"method": "laplace", "draws": 4, "progress": False}
    arguments = {"x": X, "y": Y} if fn is model else {"y": Y}
    return pf.infer(fn, **(options | arguments | given))


def unknown_argument(draws, y):
    model(X, y)


def latent_only(y):
    normal()


def data_only(y):
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def fixed_noise(y, sd):
    numpyro.sample("y", dist.Normal(normal(), sd), obs=y)


OPTIONS = {
    "misspelt method": (lambda: infer(method="nutz"), MethodError, r"unknown method 'nutz'. Methods: auto, nuts, pcn"),
    "class of a method": (lambda: infer(method=pf.NUTS), MethodError, r"takes an instance; write method=pf.NUTS\(\)"),
    "no method": (lambda: infer(method=3), MethodError, r"takes a name \(auto, .*\) or an instance .*; got int"),
    "method that does not fit": (
        lambda: infer(law_of_data(lambda m: dist.StudentT(3.0, m)), method=pf.Laplace(curvature="gauss_newton")),
        MethodError,
        "Laplace does not fit this model: site 'y' is StudentT, not Normal",
    ),
    "states": (
        lambda: infer(states=3),
        MethodError,
        r"states= takes an instance of a state method, such as pf.Kalman\(\).*\[.*.discrete_hmm..*\]; got 3",
    ),
    "surrogate": (lambda: infer(surrogate=3), ArgumentError, "surrogate= takes pf.Surrogate"),
    "negative draws": (lambda: infer(draws=-1), ArgumentError, r"draws= takes a positive integer.*got -1"),
    "no draws": (lambda: infer(draws=0), ArgumentError, r"draws= takes a positive integer.*got 0"),
    "draws as a float": (lambda: infer(draws=10.0), ArgumentError, r"draws= takes a positive integer.*got 10.0"),
    "draws=True": (lambda: infer(draws=True), ArgumentError, r"draws= takes a positive integer.*got True"),
    "key as text": (lambda: infer(key="seed"), ArgumentError, r"key= takes an integer or one typed key.*got str"),
    "several keys": (
        lambda: infer(key=jax.random.split(jax.random.key(0))),
        ArgumentError,
        "key= takes .* one typed key",
    ),
    "progress": (lambda: infer(progress=1), ArgumentError, r"progress= takes True or False; got 1"),
    "throw": (lambda: infer(throw="no"), ArgumentError, r"throw= takes True or False; got 'no'"),
    "mesh": (lambda: infer(mesh=8), ArgumentError, r"mesh= takes a jax.sharding.Mesh or a list of devices.*got int"),
    "checkpoint": (lambda: infer(checkpoint=3), ArgumentError, "checkpoint= takes the path of a file; got int"),
    "folder": (
        lambda: infer(checkpoint="/tmp"),
        ArgumentError,
        "checkpoint= takes the path of a file; /tmp is a folder",
    ),
    "dims of no variable": (lambda: infer(dims={"z": ["t"]}), ArgumentError, "dims= names 'z'.*It has .*'m', 'y'"),
    "too many dims": (lambda: infer(dims={"y": ["a", "b"]}), ArgumentError, r"names 2 axes \['a', 'b'\].*shape \(4,\)"),
    "coords of no dim": (lambda: infer(coords={"t": [1]}), ArgumentError, "coords= names the dimension 't'"),
    "coords of wrong length": (
        lambda: infer(dims={"y": ["t"]}, coords={"t": [1, 2, 3]}),
        ArgumentError,
        r"coords\['t'\] has 3 values, but 'y' has length 4",
    ),
    "dims as a list": (lambda: infer(dims=["t"]), ArgumentError, "dims= takes a dictionary.*got list"),
}

MODELS = {
    "not a model": (lambda: pf.infer(3, y=Y), ArgumentError, "model must be a NumPyro model, a function.*got int 3"),
    "missing argument": (lambda: pf.infer(model, y=Y), ArgumentError, r"required argument: 'x'.*takes model\(x"),
    "unexpected argument": (lambda: infer(z=1), ArgumentError, r"unexpected keyword argument 'z'.*given: x, y, z"),
    "reserved name": (
        lambda: pf.describe(unknown_argument, 3, Y), ArgumentError, r"parameter 'draws'.*partial\(model, draws="
    ),
    "no latent site": (lambda: infer(data_only), DataError, "the model has no latent site"),
    "no data at all": (lambda: infer(latent_only), DataError, r"no site is observed: \['m'\] are all latent.*pf.prior"),
    "data left out": (lambda: infer(y=None), DataError, r"no site is observed: \['m', 'y'\] are all latent"),
    "unknown observed name": (lambda: infer(observed=("w",)), DataError, r"observed= names 'w', .* sites \['m', 'y'\]"),
    "observed but not given": (lambda: infer(y=None, observed="y"), DataError, "names 'y' as data, but no argument"),
    "observed is a number": (lambda: infer(observed=(3,)), ArgumentError, r"observed= takes names of sites.*got 3"),
    "discrete site": (
        lambda: infer(lambda y: numpyro.sample("y", dist.Normal(numpyro.sample("k", dist.Poisson(3.0)), 1.0), obs=y)),
        ModelError,
        r"latent site 'k' \(Poisson\) is discrete",
    ),
    "zero noise": (lambda: infer(law_of_data(lambda m: dist.Normal(m, 0))), DataError, "site 'y' .*scale is 0"),
    "zero noise in an array": (
        lambda: infer(fixed_noise, sd=np.array([1.0, 0.0, 1.0, 1.0])), DataError, "noise of site 'y' .*scale is 0"
    ),
    "NaN covariates": (lambda: infer(x=np.array([1, NAN, 2, 3])), DataError, "site 'y' .*loc is nan.*other arguments"),
    "infinite covariates": (lambda: infer(x=np.array([1, INF, 2, 3])), DataError, "site 'y' .*other arguments"),
}  # fmt: skip

DATA = {
    "wrong shape": (lambda: infer(y=Y[:3]), DataError, r"'y' have shape \(3,\), but the model predicts shape \(4,\)"),
    "infinite": (lambda: infer(y=np.array([0, INF, 1, 2])), DataError, r"'y' are infinite at index \(1,\)"),
    "all NaN": (lambda: infer(y=np.full(4, NAN)), DataError, "'y' are all NaN.*nothing to infer from"),
    "text": (lambda: infer(y="data"), DataError, "'y' are a str, where an array of real numbers is needed"),
    "a list": (lambda: infer(y=[0.0, 1.0, 2.0, 3.0]), DataError, "'y' are a list.*numpy.asarray"),
    "an array of text": (lambda: infer(y=np.array(list("abcd"))), DataError, "'y' are an array of <U1"),
    "complex numbers": (lambda: infer(y=Y + 1j), DataError, "'y' are an array of complex.*real numbers"),
    "negative counts": (
        lambda: infer(law_of_data(lambda m: dist.Poisson(jnp.exp(m))), y=np.array([1, -2, 0])),
        DataError,
        r"'y' have values outside the support of Poisson .*1 of 3",
    ),
    "fractional counts": (
        lambda: infer(law_of_data(lambda m: dist.Poisson(jnp.exp(m))), y=np.array([1.5, 2, 0])),
        DataError,
        "outside the support of Poisson",
    ),
    "outside an interval": (
        lambda: infer(law_of_data(lambda m: dist.Beta(jnp.exp(m), 1.0)), y=np.array([0.5, 1.5])),
        DataError,
        r"outside the support of Beta \(UnitInterval\): 1 of 2",
    ),
}

METHODS = {
    "chains": (lambda: pf.NUTS(chains=0), r"NUTS\(chains=...\) takes an integer of at least 1; got 0"),
    "warmup": (lambda: pf.NUTS(warmup=-1), r"NUTS\(warmup=...\) takes an integer of at least 0; got -1"),
    "coordinates": (
        lambda: pf.NUTS(coordinates="x"),
        r"NUTS\(coordinates=...\) takes one of \['numpyro', 'z'\]; got 'x'",
    ),
    "target": (lambda: pf.NUTS(target_acceptance=1.0), r"NUTS\(target_acceptance=...\) takes a number between 0 and 1"),
    "curvature": (
        lambda: pf.Laplace(curvature="bfgs"),
        r"Laplace\(curvature=...\) takes one of .*'hessian'.*got 'bfgs'",
    ),
    "tolerance": (lambda: pf.Laplace(tolerance=0.0), r"Laplace\(tolerance=...\) takes a positive number; got 0.0"),
    "samples": (lambda: pf.GaussianVI(samples=1.5), r"GaussianVI\(samples=...\) takes an integer.*got 1.5"),
    "covariance": (lambda: pf.GaussianVI(covariance="banded"), "covariance.*banded"),
    "thinning": (lambda: pf.PreconditionedCrankNicolson(thinning=0), r"thinning=...\) takes an integer.*got 0"),
    "particles": (lambda: pf.TemperedSMC(particles=1), r"particles=.*integer of at least 2; got 1"),
    "target_ess": (lambda: pf.TemperedSMC(target_ess=2), r"target_ess=...\) takes a number between 0 and 1; got 2"),
}


@pytest.mark.parametrize("name", OPTIONS | MODELS | DATA)
def test_bad_input(name):
    call, kind, text = (OPTIONS | MODELS | DATA)[name]
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize("name", METHODS)
def test_bad_option_of_a_method(name):
    call, text = METHODS[name]
    with pytest.raises(MethodError, match=text):
        call()


# ----------------------------------------------------------------------------------------------- what takes a result


@pytest.fixture(scope="module")
def tree():
    return infer()


def other_model(x, y=None):
    numpyro.sample("y", dist.Normal(normal("slope") * x, 0.5), obs=y)


def test_predict_with_another_model(tree):
    with pytest.raises(DataError, match=r"has none of the model's latent sites \['slope'"):
        pf.predict(tree, other_model, x=X)
    with pytest.raises(DataError, match="model samples 'slope', which the posterior does not have"):
        pf.add_log_likelihood(tree, other_model, x=X, y=Y)


def test_predict_with_arguments_that_size_a_latent_site():
    def sized(n, y=None):
        with numpyro.plate("p", n):
            numpyro.sample("y", dist.Normal(normal(), 1.0), obs=y)

    tree = infer(sized, n=4)
    with pytest.raises(DataError, match=r"has 'm' with shape \(4,\), but .* shape \(5,\). Keep the arguments"):
        pf.predict(tree, sized, 5)


def test_predict_into_an_unknown_group(tree):
    with pytest.raises(
        ArgumentError, match=r"group= takes one of \['posterior_predictive', 'predictions'\]; got 'new'"
    ):
        pf.predict(tree, model, x=X, group="new")


def test_something_else_than_a_result():
    with pytest.raises(ArgumentError, match=r"expected a result of infer .*; got dict"):
        pf.add_log_likelihood({}, model, x=X, y=Y)
    with pytest.raises(ArgumentError, match=r"attributes takes a result of infer .*; got dict"):
        pf.attributes({})


def test_log_likelihood_without_data(tree):
    with pytest.raises(DataError, match="no observed site with these arguments; pass its data"):
        pf.add_log_likelihood(tree, model, x=X)


def test_prior_without_draws():
    with pytest.raises(ArgumentError, match="draws= takes a positive integer; got 0"):
        pf.prior(model, x=X, observed="y", draws=0)


# ---------------------------------------------------------------------------------------------- runs without a result


class Broken(Method):
    """Draws that are not finite."""

    def run(self, problem, key, draws, runner):
        success = jnp.asarray(int(Outcome.SUCCESS))
        return Draws(jnp.full((1, draws, problem.dimension), jnp.nan), {}, {}, success, count(1), count(0))


def test_a_run_without_a_result_raises_with_what_there_is():
    with pytest.raises(InferenceError, match=r"Broken: The log density .* became infinite or NaN") as caught:
        infer(method=Broken())
    assert caught.value.outcome == Outcome.NONFINITE
    assert caught.value.partial["posterior"]["m"].shape == (1, 4)


def test_throw_false_returns_what_there_is():
    tree = infer(method=Broken(), throw=False)
    assert pf.attributes(tree)["outcome"] == "nonfinite"
    assert np.isnan(tree["posterior"]["m"]).all()


def test_a_factor_that_is_never_finite():
    def model(y):
        numpyro.factor("penalty", jnp.log(-1.0 - normal() ** 2))
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(DataError, match=r"numpyro.factor 'penalty' is nan with all latent sites at the prior's centre"):
        infer(model)
