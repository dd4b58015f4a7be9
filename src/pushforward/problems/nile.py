"""Annual flow of the Nile at Aswan, 1871-1970, and the local level model.

    x_t = x_{t-1} + N(0, level_variance),    y_t = x_t + N(0, noise_variance),    x_0 ~ N(1000, 1000^2),

in 10^8 m^3 per year. Textbooks start with a diffuse law instead: their x_1 has an improper flat density. The wide
normal x_0 here, one year before the first datum, makes the model a proper program. Widened further, its log evidence
plus log(sqrt(2 pi) sd of x_0) tends to the diffuse log likelihood.

Sources: Cobb (1978), The problem of the Nile, Biometrika 65, 243-251 (data); Durbin and Koopman (2012), Time Series
Analysis by State Space Methods, 2nd edition, OUP, chapter 2 (model, variances of maximum likelihood, table 2.1).
"""

import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._gaussian import Joint, Noise
from pushforward.problems._problem import constant

NOISE_VARIANCE = 15099.0
LEVEL_VARIANCE = 1469.1
START_MEAN = 1000.0
START_SD = 1000.0
NOISE_SCALE = 200.0
LEVEL_SCALE = 100.0


def local_level(y=None, steps=None, noise_variance=NOISE_VARIANCE, level_variance=LEVEL_VARIANCE):
    """The local level model with known variances; y, shape (n,), NaN = missing, None to simulate `steps` years."""
    _local_level(y, steps, noise_variance**0.5, level_variance**0.5)


def local_level_unknown(y=None, steps=None):
    """The same with unknown standard deviations: noise_sd ~ HalfNormal(200), level_sd ~ HalfNormal(100)."""
    noise_sd = numpyro.sample("noise_sd", dist.HalfNormal(NOISE_SCALE))
    level_sd = numpyro.sample("level_sd", dist.HalfNormal(LEVEL_SCALE))
    _local_level(y, steps, noise_sd, level_sd)


def _local_level(y, steps, noise_sd, level_sd):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(x, level_sd))
        numpyro.sample("y", dist.Normal(x, noise_sd), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(START_MEAN, START_SD)), y, length=steps)


def joint(
    y=None, noise_variance=NOISE_VARIANCE, level_variance=LEVEL_VARIANCE, start_mean=START_MEAN, start_sd=START_SD
) -> Joint:
    """The exact law of `local_level` with the data y (by default `DATA`; NaN = missing).

    Example:
        >>> round(joint().log_evidence(), 6)
        -640.381263
    """
    y = DATA if y is None else np.asarray(y, np.float64)
    noise = Noise()
    x = x0 = noise.normal([start_mean], [[start_sd]])
    xs, ys = [], []
    for _ in y:
        x = x + noise.normal([0.0], [[level_variance**0.5]])
        xs.append(x)
        ys.append(x + noise.normal([0.0], [[noise_variance**0.5]]))
    return Joint({"x0": x0, "x": xs}, {"y": ys}, {"y": y}, xs)


YEARS = tuple(range(1871, 1971))
# fmt: off
DATA = constant([
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
    1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
    831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759,
    781, 865, 845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890,
    744, 749, 838, 1050, 918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
])
# fmt: on
"""10^8 m^3 per year, shape (100,)."""

DIFFUSE_LOG_LIKELIHOOD = -632.5456
"""At these variances: the limit just described, which R's KFAS prints too."""
DIFFUSE_CONCENTRATED_LOG_LIKELIHOOD = -492.07
"""Durbin and Koopman (2012), table 2.1, at the maximum; constants dropped, the noise variance maximised out."""

# Exact, with the start above; the tests compute them again.
LOG_EVIDENCE = -640.381263
"""log p(DATA) under `local_level`."""
UNKNOWN_LOG_EVIDENCE = -644.095955
UNKNOWN_MEAN = {"noise_sd": 122.10342, "level_sd": 43.86198}
UNKNOWN_SD = {"noise_sd": 12.64293, "level_sd": 15.93548}
"""Posterior moments and log evidence of `local_level_unknown`, by two-dimensional quadrature."""
