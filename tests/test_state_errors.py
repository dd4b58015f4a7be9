"""Bad input of state methods is answered at the door: what was given, what was expected, what to write instead."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan

import pushforward as pf
from pushforward._errors import DataError, MethodError, ModelError

Y = np.array([0.5, 1.0, 0.2, -0.4])
NORMAL, sample = dist.Normal, numpyro.sample


def infer(model, method=None, y=Y, **given):
    return pf.infer(model, method=method or pf.Kalman(), draws=2, progress=False, y=y, **given)


def start():
    return sample("x0", NORMAL(0.0, 1.0))


def look(x, y):
    sample("y", NORMAL(x, 0.5), obs=y)


def move(x, y):
    x = sample("x", NORMAL(0.8 * x, 1.0))
    look(x, y)
    return x, None


def plain(y):
    scan(move, start(), y)


def body(law, scale=None):
    """A model whose step draws x from `law(x)`."""

    def model(y):
        def step(x, y):
            x = sample("x", law(x))
            look(x, y)
            return x, None

        scan(step, start(), y)

    return model


def seen(law):
    """A model whose data have the law `law(x)`."""

    def model(y):
        def step(x, y):
            x = sample("x", NORMAL(x, 1.0))
            sample("y", law(x), obs=y)
            return x, None

        scan(step, start(), y)

    return model


def after(prediction):
    """A model observed after its scan through `prediction(x0, last, xs)`."""

    def model(y):
        def step(x, _):
            x = sample("x", NORMAL(x, 1.0))
            return x, x

        x0 = start()
        last, xs = scan(step, x0, None, length=len(Y))
        sample("y", NORMAL(prediction(x0, last, xs), 1.0), obs=y)

    return model


def with_parameter(y):
    a = sample("a", NORMAL(0.0, 1.0))
    scan(lambda x, y: move(a * x, y), start(), y)


# ------------------------------------------------------------------------------------------------ reading a scan


def no_scan(y):
    look(start(), y)


def nested(y):
    def step(x, y):
        x, _ = scan(lambda z, _: (sample("z", NORMAL(z, 1.0)), None), x, None, length=2)
        look(x, y)
        return x, None

    scan(step, start(), y)


def two_scans(y):
    plain(y)
    scan(lambda x, _: (sample("u", NORMAL(x, 1.0)), None), 0.0, None, length=4)


def choose(x):
    return cond(True, lambda x: sample("a", NORMAL(x, 1.0)), lambda x: sample("a", NORMAL(x, 2.0)), x)


def cond_before(y):
    scan(move, choose(start()), y)


def cond_inside(y):
    scan(lambda x, y: move(choose(x), y), start(), y)


def plate_around(y):
    with numpyro.plate("p", 2):
        plain(y)


def scale_around(y):
    with handlers.scale(scale=2.0):
        scan(move, 0.0, y)


def mask_around(y):
    x0 = start()
    with handlers.mask(mask=True):
        scan(move, x0, y)


def scaled_state(y):
    def step(x, y):
        with handlers.scale(scale=2.0):
            x = sample("x", NORMAL(x, 1.0))
        look(x, y)
        return x, None

    scan(step, start(), y)


def scaled_start(y):
    with handlers.scale(scale=2.0):
        x0 = start()
    scan(move, x0, y)


def masked_state(y):
    def step(x, y):
        with handlers.mask(mask=False):
            x = sample("x", NORMAL(x, 1.0))
        look(x, y)
        return x, None

    scan(step, start(), y)


def same_name_before(y):
    scan(move, sample("x", NORMAL(0.0, 1.0)), y)


def same_name_after(y):
    plain(y)
    sample("x", NORMAL(0.0, 1.0))


def same_name_twice(y):
    scan(lambda x, y: move(sample("x", NORMAL(x, 1.0)), y), start(), y)


def substituted(y):
    def model():
        def step(x, y):
            x = sample("x", NORMAL(0.8 * x, 1.0))
            sample("w", NORMAL(x, 1.0))
            look(x, y)
            return x, None

        scan(step, start(), y)

    handlers.substitute(model, data={"w": jnp.asarray(Y)})()


def discrete_site(y):
    scan(lambda x, y: move(x + sample("k", dist.Bernoulli(0.5)), y), start(), y)


def parameter_of_numpyro(y):
    sd = numpyro.param("sd", 1.0)
    scan(lambda x, y: move(sd * x, y), start(), y)


def factor_after(y):
    last, _ = scan(move, start(), y)
    numpyro.factor("f", -(last**2))


def factor_before(y):
    x0 = start()
    numpyro.factor("f", -(x0**2))
    scan(move, x0, y)


def other_shape(y):
    def step(x, y):
        move(x, y)
        return jnp.zeros(2), None

    scan(step, start(), y)


def other_tree(y):
    scan(lambda x, y: ((x, move(x, y)[0]), None), start(), y)


SCANS = {
    "no scan": (no_scan, ModelError, r"no numpyro scan.*scan\(step, x0, ys\), or choose another method"),
    "nested": (nested, ModelError, "scan or cond inside the body of a scan.*flatten the two loops"),
    "two scans": (two_scans, ModelError, "two scans, and state methods read one.*carry of a single scan"),
    "reverse": (lambda y: scan(move, start(), y, reverse=True), ModelError, r"reverse=True.*Flip the data \(ys"),
    "history": (lambda y: scan(move, start(), y, history=2), ModelError, "history=2.*earlier values into the carry"),
    "cond before": (cond_before, ModelError, "cond outside it. Use jax.numpy.where"),
    "cond inside": (cond_inside, ModelError, "cond inside the body of a scan"),
    "plate around": (plate_around, ModelError, "move those `plate` statements into the control flow body"),
    "scale around": (scale_around, ModelError, "handlers.scale stands around the scan.*inside the body"),
    "mask around": (mask_around, ModelError, "handlers.mask stands around the scan.*missing data may also be NaN"),
    "scale on a state": (scaled_state, ModelError, "latent site 'x' stands under handlers.scale.*observed sites only"),
    "scale on the start": (scaled_start, ModelError, "latent site 'x0' stands under handlers.scale"),
    "mask on a state": (masked_state, ModelError, "latent site 'x' stands under numpyro.handlers.mask"),
    "one name before and in it": (same_name_before, ModelError, "unique names but got `x` duplicated"),
    "one name in and after it": (same_name_after, ModelError, "unique names but got `x` duplicated"),
    "one name twice in it": (same_name_twice, ModelError, "unique names but got `x` duplicated"),
    "substituted": (substituted, ModelError, r"'w' of the scan has its value from handlers.substitute.*condition\("),
    "lengths that differ": (
        lambda y: scan(lambda x, row: move(x, row[0]), start(), (y, jnp.zeros(5))),
        ModelError,
        r"different numbers of steps: xs\[0\] has 4, xs\[1\] has 5.*one length",
    ),
    "a length that differs": (
        lambda y: scan(move, start(), y, length=7), ModelError, "xs has 4, length is 7.*leave length out"
    ),
    "no length": (
        lambda y: scan(lambda x, _: move(x, 0.3), start(), None), ModelError, "neither xs nor length.*length=steps"
    ),
    "a single number in xs": (
        lambda y: scan(lambda x, row: move(x, row[0]), start(), (y, 1.0)), ModelError, r"xs\[1\] .* is a single number"
    ),
    "carry of another shape": (other_shape, ModelError, "carry input and carry output must have equal types"),
    "carry of another tree": (other_tree, ModelError, "carry input and carry output must have the same pytree"),
    "discrete site": (discrete_site, MethodError, r"'k' \(Bernoulli.*\) is discrete; use pf.ParticleFilter"),
    "numpyro.param": (parameter_of_numpyro, ModelError, r"'sd' is a numpyro.param.*numpyro.sample\('sd'"),
    "factor after": (factor_after, ModelError, "'f' depends on the trajectory.*observed site in the body"),
    "factor before": (factor_before, ModelError, "'f' depends on the trajectory"),
    "the start joined": (
        after(lambda x0, last, xs: jnp.concatenate([x0[None], xs[1:]])), ModelError, "'y' after the scan is not local"
    ),
    "a cumulative sum": (
        after(lambda x0, last, xs: jnp.cumsum(xs)), ModelError, r"'y' .* not local in time.*Observe inside the body"
    ),
    "a shift": (after(lambda x0, last, xs: jnp.roll(xs, 1)), ModelError, "'y' after the scan is not local"),
    "the last carry": (after(lambda x0, last, xs: last), ModelError, "'y' .* on the last carry"),
    "a mean over time": (after(lambda x0, last, xs: xs.mean()), ModelError, "'y' after the scan is not local"),
}  # fmt: skip

VALUES = {
    "negative sd of a state": (body(lambda x: NORMAL(x, -1.0)), ModelError, "law of site 'x' .* its scale is -1"),
    "negative sd of the start": (
        lambda y: scan(move, sample("x0", NORMAL(0.0, -1.0)), y), ModelError, "site 'x0' .*scale is -1"
    ),
    "infinite sd of the start": (
        lambda y: scan(move, sample("x0", NORMAL(0.0, np.inf)), y), ModelError, "'x0' .*scale is inf, where a finite"
    ),
    "negative sd of data": (seen(lambda x: NORMAL(x, -0.5)), DataError, "noise of site 'y' .* its scale is -0.5"),
    "data without noise": (seen(lambda x: NORMAL(x, 0.0)), DataError, "noise of site 'y' .* its scale is 0"),
    "NaN covariance of the start": (
        lambda y: scan(move, sample("x0", dist.MultivariateNormal(0.0, jnp.array([[np.nan]])))[0], y),
        DataError,
        "site 'x.*' is not usable.*nan",
    ),
    "NaN dynamics": (body(lambda x: NORMAL(jnp.nan * x, 1.0)), DataError, "prior of site 'x' is not usable: its loc"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCANS | VALUES)
def test_models_that_cannot_be_read(name):
    model, kind, text = (SCANS | VALUES)[name]
    with pytest.raises(kind, match=f"(?s){text}"):
        infer(model)


DATA = {
    "all missing": (Y * np.nan, "'y' are all NaN.*nothing to infer from"),
    "infinite": (np.array([1.0, np.inf]), r"'y' are infinite at index \(1,\)"),
    "none": (None, "no site is observed.*Pass the data to the model by name"),
    "text": (np.array(list("abcd")), "xs of the scan is an array of <U1, where numbers are needed"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_used(name):
    y, text = DATA[name]

    def model(y):
        scan(move, start(), y, length=4 if y is None else None)

    with pytest.raises((DataError, ModelError), match=text):
        infer(model, y=y)


def test_covariates_that_are_nan():
    def model(y, u):
        scan(lambda x, row: move(x + row[1], row[0]), start(), (y, u))

    with pytest.raises(DataError, match=r"site 'x' is not usable: its loc is nan.*other arguments"):
        infer(model, u=np.array([0, np.nan, 0, 0]))


# --------------------------------------------------------------------------------------- methods that do not fit


def volatility(y):
    def step(h, y):
        h = sample("h", NORMAL(0.9 * h, 0.3))
        sample("y", NORMAL(0.0, jnp.exp(h / 2)), obs=y)
        return h, None

    scan(step, sample("h0", NORMAL(0.0, 1.0)), y)


def factor_inside(y):
    def step(x, y):
        x, _ = move(x, y)
        numpyro.factor("f", -(x**2))
        return x, None

    scan(step, start(), y)


def scaled_data(y):
    def step(x, y):
        x = sample("x", NORMAL(x, 1.0))
        with handlers.scale(scale=2.0):
            look(x, y)
        return x, None

    scan(step, start(), y)


def regime(y):
    def step(carry, y):
        x, k = carry
        x, _ = move(x + k, y)
        return (x, (x > 0).astype(int)), None

    scan(step, (start(), 0), y)


def inexact_site(y):
    law = dist.MixtureSameFamily(
        dist.Categorical(probs=jnp.array([0.3, 0.7])), NORMAL(jnp.array([-1.0, 1.0]), jnp.array([1.0, 2.0]))
    )
    scan(lambda x, y: move(x + sample("k", law), y), start(), y)


EXACT = {
    "nonlinear dynamics": (body(lambda x: NORMAL(jnp.sin(x), 1.0)), r"next state is not linear .*sites \['x'\]"),
    "nonlinear observation": (seen(lambda x: NORMAL(x**2, 0.5)), r"data's mean is not linear .*sites \['y'\]"),
    "a kink": (body(lambda x: NORMAL(jnp.abs(x), 1.0)), "not linear"),
    "rounding": (body(lambda x: NORMAL(jnp.round(x), 1.0)), "not linear in the state: it contains jax's 'round'"),
    "noise by the state": (body(lambda x: NORMAL(x, jnp.exp(x))), "next state is not linear in the state"),
    "heavy tails": (body(lambda x: dist.StudentT(3.0, x, 1.0)), "latent site 'x' is StudentT, not Normal"),
    "a Gamma start": (
        lambda y: scan(move, sample("x0", dist.Gamma(2.0, 1.0)), y), "latent site 'x0' is Gamma, not Normal"
    ),
    "Student data": (seen(lambda x: dist.StudentT(3.0, x, 0.5)), "'y' is StudentT, not Normal; use pf.Extended"),
}  # fmt: skip
ALL = {
    "volatility": (volatility, "noise of observed site 'y' .*depends on the state.*pf.NUTS"),
    "Cauchy data": (seen(lambda x: dist.Cauchy(x, 0.5)), "'y' is Cauchy, whose noise no Gaussian stands for"),
    "data that tell nothing": (seen(lambda x: NORMAL(0.3, 1.0)), "mean of observed site 'y' does not depend on the"),
    "a factor": (factor_inside, "numpyro.factor 'f' stands in the body of the scan"),
    "scaled data": (scaled_data, "'y' stands under handlers.scale, which no Gaussian noise has"),
    "a regime": (regime, "leaf 1 of the carry is an integer that depends on the state"),
    "no exact map": (inexact_site, "latent site 'k' .*no exact map from Gaussian noise"),
}


@pytest.mark.parametrize("name", EXACT | ALL)
def test_models_that_the_exact_filter_does_not_fit(name):
    model, text = (EXACT | ALL)[name]
    with pytest.raises(MethodError, match=f"Kalman does not fit this model: .*{text}"):
        infer(model)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("linearization", ["extended", "unscented"])
def test_models_that_no_linearisation_fits(linearization, name):
    model, text = ALL[name]
    with pytest.raises(MethodError, match=f"Kalman does not fit this model: .*{text}"):
        infer(model, pf.Kalman(linearization))


def test_extended_takes_counts_and_student_data():
    for law in (lambda x: dist.Poisson(jnp.exp(x)), lambda x: dist.StudentT(3.0, x, 0.5)):
        tree = infer(seen(law), pf.Kalman(pf.Extended()), y=np.array([1.0, 3.0, 0.0, 2.0]).astype(int))
        assert np.isfinite(pf.attributes(tree)["log_evidence"])


# --------------------------------------------------------------------------------------------- method and states

CALLS = {
    "free parameters": (lambda: infer(with_parameter), r"free parameters \['a'\].*states=pf.Kalman.*augment=True"),
    "no parameters": (lambda: infer(plain, pf.NUTS(), states=pf.Kalman()), r"no parameters beside.*method=pf.Kalman"),
    "two state methods": (
        lambda: infer(with_parameter, states=pf.Kalman()), "method=Kalman and states=Kalman are both state methods"
    ),
    "two names": (lambda: infer(with_parameter, "kalman", states="kalman"), "are both state methods"),
    "states as a class": (lambda: infer(with_parameter, pf.NUTS(), states=pf.Kalman), "takes an instance .*got Kalman"),
    "states misspelt": (lambda: infer(with_parameter, pf.NUTS(), states="kalmn"), "takes an instance .*got str|kalmn"),
    "states as a number": (lambda: infer(with_parameter, pf.NUTS(), states=3), "takes an instance .*got 3"),
    "states as a sampler": (lambda: infer(with_parameter, pf.NUTS(), states=pf.NUTS()), "instance of .*got NUTS"),
    "states as a linearisation": (lambda: infer(with_parameter, pf.NUTS(), states=pf.Extended()), "got Extended"),
    "method as a class": (lambda: infer(plain, pf.Kalman), r"takes an instance; write method=pf.Kalman\(\)"),
    "augment with states": (
        lambda: infer(with_parameter, pf.NUTS(), states=pf.Kalman(pf.Extended(), augment=True)),
        "would infer the parameters twice",
    ),
    "augment that is not linear": (lambda: infer(with_parameter, pf.Kalman(augment=True)), "next state is not linear"),
    "states that do not fit": (
        lambda: infer(lambda y: (sample("a", NORMAL(0.0, 1.0)), volatility(y)), pf.NUTS(), states=pf.Kalman()),
        "Kalman does not fit this model: the noise of observed site 'y'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_do_not_fit(name):
    call, text = CALLS[name]
    with pytest.raises(MethodError, match=text):
        call()


OPTIONS = {
    "linearization by a wrong name": (lambda: pf.Kalman("taylor"), r"\['exact', 'extended'.*got 'taylor'"),
    "linearization as a number": (lambda: pf.Kalman(3), "takes an instance such as pf.Extended.*got 3"),
    "linearization as a class": (lambda: pf.Kalman(pf.Extended), "takes an instance such as pf.Extended"),
    "negative inflation": (lambda: pf.Kalman(inflation=-1.0), r"inflation=...\) takes a positive number; got -1.0"),
    "NaN inflation": (lambda: pf.Kalman(inflation=float("nan")), "positive number; got nan"),
    "no time step": (lambda: pf.Kalman(time_step=0.0), r"time_step=...\) takes a positive number; got 0.0"),
    "store": (lambda: pf.Kalman(store="all"), r"one of \['draws', 'moments', 'last'\]; got 'all'"),
    "schedule": (lambda: pf.Kalman(schedule="fast"), r"one of \['auto', 'sequential', 'parallel'\]; got 'fast'"),
    "parallel tangents": (lambda: pf.Kalman("extended", schedule="parallel"), "known before filtering.*pf.Exact"),
    "parallel inflation": (lambda: pf.Kalman(inflation=1.1, schedule="parallel"), "known before filtering.*inflation"),
    "iterations": (lambda: pf.Iterated(0), r"iterations=...\) takes an integer of at least 1; got 0"),
    "alpha": (lambda: pf.Unscented(alpha=0.0), r"alpha=...\) takes a positive number; got 0.0"),
    "beta": (lambda: pf.Unscented(beta=-1.0), r"beta=...\) takes a number of at least 0; got -1.0"),
    "kappa": (lambda: pf.Unscented(kappa="a"), r"kappa=...\) takes a number of at least 0; got 'a'"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_do_not_fit(name):
    call, text = OPTIONS[name]
    with pytest.raises(MethodError, match=text):
        call()
