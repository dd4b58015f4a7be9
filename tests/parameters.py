"""What tests of parameter inference over particle filters share: a problem with an exact answer, and its checks."""

import warnings

import arviz as az
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

import pushforward as pf
from pushforward.problems import local_linear

LIMIT = 4.0
"""Monte Carlo errors by which a mean may miss: a false alarm in 6e-5 of all keys for each mean checked."""

TIMES = (0, 20, 39)


def infer(method, states, draws, key=0, model=local_linear.model_first_outside, **options):
    """A run on the one-parameter example; warnings about few draws are not the matter here."""
    y = np.array(local_linear.DATA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        data = {"y0": y[0], "y": y[1:]}
        return pf.infer(model, method=method, states=states, draws=draws, key=key, progress=False, **data, **options)


def scores(columns):
    """By name the error of a mean in Monte Carlo errors: each column is (values (chain, draw), exact mean)."""
    found = {}
    for name, (values, exact) in columns.items():
        error = values.std() / np.sqrt(float(az.ess(np.asarray(values, float))))
        found[name] = float((values.mean() - exact) / error)
    return found


def joint_scores(tree):
    """Scores of mean and variance of u, and of the trajectory given u, standardized by its exact law."""
    u = tree["posterior"]["u"].to_numpy().astype(float)
    off = u - local_linear.MEAN_U
    columns = {"u": (u, local_linear.MEAN_U), "square of u": (off**2, local_linear.SD_U**2)}
    grid = np.linspace(u.min(), u.max(), 40)
    laws = [local_linear.joint(v, np.array(local_linear.DATA)).smoothing() for v in grid]
    x0, later = tree["posterior"]["x0"].to_numpy(), tree["posterior"]["x"].to_numpy()
    for t in TIMES:
        mean = np.interp(u, grid, [law.mean[t, 0] for law in laws])
        sd = np.interp(u, grid, [law.covariance[t, 0, 0] ** 0.5 for law in laws])
        w = ((x0 if t == 0 else later[..., t - 1]) - mean) / sd
        columns |= {f"x{t}": (w, 0.0), f"square of x{t}": (w**2, 1.0), f"x{t} times u": (w * off, 0.0)}
    return scores(columns)


def check_joint(tree):
    """All scores within `LIMIT`; eleven means, so a false alarm in 7e-4 of all keys."""
    found = joint_scores(tree)
    assert max(map(abs, found.values())) < LIMIT, found


def model_impossible(y=None):
    """No parameter makes the datum possible."""
    low = numpyro.sample("low", dist.Uniform(1.0, 2.0))

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(0.5 * x, 1.0))
        numpyro.sample("y", dist.Uniform(low + 10 + 0 * x, low + 20), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)
