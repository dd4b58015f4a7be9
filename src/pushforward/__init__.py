"""pushforward: Bayesian inverse problems and data assimilation for plain NumPyro models."""

from pushforward._files import load, save
from pushforward._infer import infer
from pushforward.compare import compare, plot_compare
from pushforward.describe import describe
from pushforward.forecasting import forecast
from pushforward.methods import (
    NUTS,
    EnKF,
    GaussianVI,
    Kalman,
    Laplace,
    Pathfinder,
    PreconditionedCrankNicolson,
    TemperedSMC,
)
from pushforward.methods._covariance import Diagonal, Full, LowRank
from pushforward.methods._ensemble_parts import (
    ETKF,
    LETKF,
    RTPP,
    RTPS,
    Adaptive,
    Additive,
    DEnKF,
    EnKS,
    FiniteSize,
    IterativeEnKS,
    Multiplicative,
    NoInflation,
    Perturbed,
    SerialEnSRF,
)
from pushforward.methods._linearization import Cubature, Exact, Extended, Iterated, Unscented
from pushforward.plots import plot_filter
from pushforward.posterior import attributes
from pushforward.predictive import add_log_likelihood, predict, prior

__all__ = [
    "ETKF",
    "LETKF",
    "NUTS",
    "RTPP",
    "RTPS",
    "Adaptive",
    "Additive",
    "Cubature",
    "DEnKF",
    "Diagonal",
    "EnKF",
    "EnKS",
    "Exact",
    "Extended",
    "FiniteSize",
    "Full",
    "GaussianVI",
    "Iterated",
    "IterativeEnKS",
    "Kalman",
    "Laplace",
    "LowRank",
    "Multiplicative",
    "NoInflation",
    "Pathfinder",
    "Perturbed",
    "PreconditionedCrankNicolson",
    "SerialEnSRF",
    "TemperedSMC",
    "Unscented",
    "add_log_likelihood",
    "attributes",
    "compare",
    "describe",
    "forecast",
    "infer",
    "load",
    "plot_compare",
    "plot_filter",
    "predict",
    "prior",
    "save",
]
