"""Benchmark problems: each is a short file with a NumPyro model, data, their source and known numbers.

>>> from pushforward.problems import bod
>>> bod.DATA.shape
(5,)
>>> from pushforward.problems import problem
>>> problem("eight_schools").data["y"].shape
(8,)

`darcy` is an inverse problem of 256 parameters with a partial differential equation, solved in JAX and, as a black box,
in SciPy.

>>> from pushforward.problems import darcy
>>> darcy.DATA.shape
(7, 7)

State-space models are modules of their own, with more than one model each and their exact answers or published
scores: `nile`, `air_passengers`, `local_linear`, `linear_state_space`, `lorenz63`, `lorenz96`; for particle filters and
discrete states `stochastic_volatility`, `nonlinear_growth`, `influenza`, `regime_switching`.

>>> from pushforward.problems import nile
>>> nile.DATA.shape
(100,)

Whole trajectories, for score-based sampling, each with simulated trajectories to train on and exact answers, reference
draws or published figures: `rotating_chain`, `lorenz63_trajectory`, `kolmogorov`, `jumps`.

>>> from pushforward.problems import rotating_chain
>>> rotating_chain.scenario("lo").noise
0.05

Four tasks of simulation-based inference, each with ten data sets and exact, independent draws of the posterior of
`theta` at any data: `two_moons`, `gaussian_linear`, `gaussian_mixture`, `slcp`. `two_moons` has no likelihood, so it is
a module only and no `problem`.

>>> from pushforward.problems import slcp
>>> slcp.reference(slcp.observations()[3], n=1000, key=0).shape
(1000, 5)
"""

from pushforward.problems import (
    air_passengers,
    bod,
    darcy,
    eight_schools,
    gaussian_linear,
    gaussian_mixture,
    influenza,
    jumps,
    kolmogorov,
    linear_gaussian,
    linear_state_space,
    local_linear,
    lorenz63,
    lorenz63_trajectory,
    lorenz96,
    lynx_hare,
    nile,
    nonlinear_growth,
    regime_switching,
    rotating_chain,
    slcp,
    stochastic_volatility,
    two_moons,
)
from pushforward.problems._anchor import Anchor
from pushforward.problems._problem import Problem

__all__ = [
    "NAMES",
    "Anchor",
    "Problem",
    "air_passengers",
    "bod",
    "darcy",
    "eight_schools",
    "gaussian_linear",
    "gaussian_mixture",
    "influenza",
    "jumps",
    "kolmogorov",
    "linear_gaussian",
    "linear_state_space",
    "local_linear",
    "lorenz63",
    "lorenz63_trajectory",
    "lorenz96",
    "lynx_hare",
    "nile",
    "nonlinear_growth",
    "problem",
    "regime_switching",
    "rotating_chain",
    "slcp",
    "stochastic_volatility",
    "two_moons",
]

_BUILDERS = {
    "linear_gaussian_2": lambda: linear_gaussian.linear_gaussian(2),
    "linear_gaussian_20": lambda: linear_gaussian.linear_gaussian(20),
    "linear_gaussian_200": lambda: linear_gaussian.linear_gaussian(200),
    "bod": lambda: bod.PROBLEM,
    "eight_schools": lambda: eight_schools.PROBLEM,
    "lynx_hare": lambda: lynx_hare.PROBLEM,
    "darcy": darcy.problem,
    "gaussian_linear": gaussian_linear.problem,
    "gaussian_mixture": gaussian_mixture.problem,
    "slcp": slcp.problem,
}

NAMES = tuple(_BUILDERS)


def problem(name: str) -> Problem:
    """The benchmark problem called `name`.

    Args:
        name: one of `pushforward.problems.NAMES`.

    Raises:
        ValueError: no problem has that name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"no problem is called {name!r}; the names are {', '.join(NAMES)}")
    return _BUILDERS[name]()
