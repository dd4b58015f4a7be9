"""Monthly passengers of international airlines, 1949-1960, and the basic structural model for their logarithm.

    level_t  = level_{t-1} + slope_{t-1} + N(0, level_sd^2),
    slope_t  = slope_{t-1} + N(0, slope_sd^2),
    season_t = -(season_{t-1} + ... + season_{t-11}) + N(0, season_sd^2),
    y_t      = level_t + season_t + N(0, noise_sd^2),

with 13 numbers in the carry: level, slope and the 11 last seasonal effects, newest first. The start is proper:
level_0 ~ N(5, 1), slope_0 ~ N(0, 0.1^2), seasons N(0, 0.3^2). The standard deviations are HalfNormal with scales 0.1
(level), 0.01 (slope), 0.05 (season) and 0.1 (noise). The step has three latent sites, of which the carry keeps
level, slope and season; ten of its numbers are copies.

Sources: Box and Jenkins (1976), Time Series Analysis: Forecasting and Control, series G (data); Harvey (1989),
Forecasting, Structural Time Series Models and the Kalman Filter, CUP, section 2.3 (model); priors chosen here.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._gaussian import Affine, Joint, Noise, join
from pushforward.problems._problem import constant

SCALES: Mapping[str, float] = {"level_sd": 0.1, "slope_sd": 0.01, "season_sd": 0.05, "noise_sd": 0.1}
"""Scales of the HalfNormal priors."""
START_SD: Mapping[str, float] = {"level0": 1.0, "slope0": 0.1, "season0": 0.3}
START_LEVEL = 5.0
SEASONS = 11


def model(y=None, steps=None):
    """Log passengers; y, shape (n,): NaN = missing, so that NaN at its end forecasts; None simulates `steps` months."""
    sd = {name: numpyro.sample(name, dist.HalfNormal(scale)) for name, scale in SCALES.items()}

    def step(carry, y):
        level, slope, seasons = carry
        moved = numpyro.sample("level", dist.Normal(level + slope, sd["level_sd"]))
        slope = numpyro.sample("slope", dist.Normal(slope, sd["slope_sd"]))
        season = numpyro.sample("season", dist.Normal(-jnp.sum(seasons), sd["season_sd"]))
        numpyro.sample("y", dist.Normal(moved + season, sd["noise_sd"]), obs=y)
        return (moved, slope, jnp.concatenate([season[None], seasons[:-1]])), None

    level = numpyro.sample("level0", dist.Normal(START_LEVEL, START_SD["level0"]))
    slope = numpyro.sample("slope0", dist.Normal(0.0, START_SD["slope0"]))
    seasons = numpyro.sample("season0", dist.Normal(0.0, START_SD["season0"]).expand([SEASONS]).to_event(1))
    scan(step, (level, slope, seasons), y, length=steps)


def joint(sd: Mapping[str, float], y=None) -> Joint:
    """The exact law at known standard deviations; `state` is (level, slope, season) of each month.

    Args:
        sd: level_sd, slope_sd, season_sd and noise_sd.
        y: log passengers, shape (n,), NaN = missing; by default `LOG_DATA`.
    """
    y = LOG_DATA if y is None else np.asarray(y, np.float64)
    noise = Noise()

    def normal(name: str) -> Affine:
        return noise.normal([0.0], [[sd[name]]])

    level = level0 = noise.normal([START_LEVEL], [[START_SD["level0"]]])
    slope = slope0 = noise.normal([0.0], [[START_SD["slope0"]]])
    seasons = season0 = noise.normal(np.zeros(SEASONS), START_SD["season0"] * np.eye(SEASONS))
    states, ys = [], []
    for _ in y:
        level = level + slope + normal("level_sd")
        slope = slope + normal("slope_sd")
        season = -np.ones((1, SEASONS)) @ seasons + normal("season_sd")
        seasons = join(season, seasons[:-1])
        states.append(join(level, slope, season))
        ys.append(level + season + normal("noise_sd"))
    latent = {"level0": level0, "slope0": slope0, "season0": season0}
    latent |= {name: [x[i : i + 1] for x in states] for i, name in enumerate(("level", "slope", "season"))}
    return Joint(latent, {"y": ys}, {"y": y}, states)


MONTHS = tuple(f"{year}-{month:02d}" for year in range(1949, 1961) for month in range(1, 13))
# fmt: off
DATA = constant([
    112, 118, 132, 129, 121, 135, 148, 148, 136, 119, 104, 118,
    115, 126, 141, 135, 125, 149, 170, 170, 158, 133, 114, 140,
    145, 150, 178, 163, 172, 178, 199, 199, 184, 162, 146, 166,
    171, 180, 193, 181, 183, 218, 230, 242, 209, 191, 172, 194,
    196, 196, 236, 235, 229, 243, 264, 272, 237, 211, 180, 201,
    204, 188, 235, 227, 234, 264, 302, 293, 259, 229, 203, 229,
    242, 233, 267, 269, 270, 315, 364, 347, 312, 274, 237, 278,
    284, 277, 317, 313, 318, 374, 413, 405, 355, 306, 271, 306,
    315, 301, 356, 348, 355, 422, 465, 467, 404, 347, 305, 336,
    340, 318, 362, 348, 363, 435, 491, 505, 404, 359, 310, 337,
    360, 342, 406, 396, 420, 472, 548, 559, 463, 407, 362, 405,
    417, 391, 419, 461, 472, 535, 622, 606, 508, 461, 390, 432,
])
# fmt: on
"""Thousands of passengers, shape (144,)."""
LOG_DATA = constant(np.log(DATA))
"""What `model` takes."""
