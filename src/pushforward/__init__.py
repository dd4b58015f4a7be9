"""pushforward: Bayesian inverse problems and data assimilation for plain NumPyro models."""

from pushforward._files import load, save
from pushforward._infer import infer
from pushforward.calibration import calibrate
from pushforward.compare import compare, plot_compare
from pushforward.describe import describe
from pushforward.forecasting import forecast
from pushforward.learn import learn
from pushforward.learned.embeddings import Image, Series, Sets, Vector
from pushforward.learned.estimators import EnergyMap, FlowMatching, PointEstimate
from pushforward.learned.fitting import Training
from pushforward.learned.flow_prior import FlowPrior
from pushforward.learned.flows import Flow
from pushforward.learned.learning import EM, MAP, Increments, Likelihood
from pushforward.learned.score_networks import WindowMLP
from pushforward.learned.score_training import ScoreTraining
from pushforward.learned.score_transformer import TrajectoryTransformer
from pushforward.learned.score_unets import FieldUNet, TemporalUNet
from pushforward.learned.surrogate import Surrogate
from pushforward.local_calibration import local_check
from pushforward.methods import (
    ALDI,
    EKI,
    EKS,
    NUTS,
    PMMH,
    SMC2,
    UKI,
    AmortizedFlow,
    DiscreteHMM,
    EnKF,
    FlowVI,
    FourDVar,
    GaussianVI,
    Kalman,
    Laplace,
    NeuralLikelihood,
    ParticleFilter,
    ParticleGibbs,
    Pathfinder,
    PreconditionedCrankNicolson,
    ScoreTrajectory,
    TemperedSMC,
    ThreeDVar,
    TransportFilter,
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
from pushforward.methods._gain_fit import GainTraining
from pushforward.methods._gains import BandedGain, CirculantGain, FullGain, LowRankGain, NetworkGain
from pushforward.methods._guide import Guide
from pushforward.methods._guided import Auxiliary, Linearized, Newton, Optimal
from pushforward.methods._learned_filter import FilterTraining
from pushforward.methods._linearization import Cubature, Exact, Extended, Iterated, Unscented
from pushforward.methods._localisation import ByCorrelation, ByDistance
from pushforward.methods._particle_parts import (
    AncestorTracing,
    BackwardMoves,
    BackwardSimulation,
    Jitter,
    LiuWest,
    Multinomial,
    NoJitter,
    Residual,
    StopGradient,
    Stratified,
    Systematic,
    Transport,
)
from pushforward.methods._proposals import Bootstrap
from pushforward.methods._rao_blackwell import RaoBlackwell
from pushforward.methods._score_correction import TransitionHMC
from pushforward.methods._score_guidance import (
    AutomaticGuidance,
    AveragedGuidance,
    GammaGuidance,
    MomentMatching,
    NoGuidance,
    SurrogateGuidance,
)
from pushforward.methods._score_samplers import DDIM, Ancestral, Heun, Multistep
from pushforward.methods._score_source import SourceSpace
from pushforward.methods._score_twisted import Twisted
from pushforward.methods._transport_parts import AffineMap, EnergyTransport, TriangularMap
from pushforward.methods.four_dvar import Window
from pushforward.model.simulator import simulator
from pushforward.online import online
from pushforward.plot_calibration import plot_calibration
from pushforward.plot_diagnostics import plot_diagnostics
from pushforward.plots import plot_filter
from pushforward.posterior import attributes
from pushforward.predictive import add_log_likelihood, predict, prior

__all__ = [
    "ALDI",
    "DDIM",
    "EKI",
    "EKS",
    "EM",
    "ETKF",
    "LETKF",
    "MAP",
    "NUTS",
    "PMMH",
    "RTPP",
    "RTPS",
    "SMC2",
    "UKI",
    "Adaptive",
    "Additive",
    "AffineMap",
    "AmortizedFlow",
    "AncestorTracing",
    "Ancestral",
    "AutomaticGuidance",
    "Auxiliary",
    "AveragedGuidance",
    "BackwardMoves",
    "BackwardSimulation",
    "BandedGain",
    "Bootstrap",
    "ByCorrelation",
    "ByDistance",
    "CirculantGain",
    "Cubature",
    "DEnKF",
    "Diagonal",
    "DiscreteHMM",
    "EnKF",
    "EnKS",
    "EnergyMap",
    "EnergyTransport",
    "Exact",
    "Extended",
    "FieldUNet",
    "FilterTraining",
    "FiniteSize",
    "Flow",
    "FlowMatching",
    "FlowPrior",
    "FlowVI",
    "FourDVar",
    "Full",
    "FullGain",
    "GainTraining",
    "GammaGuidance",
    "GaussianVI",
    "Guide",
    "Heun",
    "Image",
    "Increments",
    "Iterated",
    "IterativeEnKS",
    "Jitter",
    "Kalman",
    "Laplace",
    "Likelihood",
    "Linearized",
    "LiuWest",
    "LowRank",
    "LowRankGain",
    "MomentMatching",
    "Multinomial",
    "Multiplicative",
    "Multistep",
    "NetworkGain",
    "NeuralLikelihood",
    "Newton",
    "NoGuidance",
    "NoInflation",
    "NoJitter",
    "Optimal",
    "ParticleFilter",
    "ParticleGibbs",
    "Pathfinder",
    "Perturbed",
    "PointEstimate",
    "PreconditionedCrankNicolson",
    "RaoBlackwell",
    "Residual",
    "ScoreTraining",
    "ScoreTrajectory",
    "SerialEnSRF",
    "Series",
    "Sets",
    "SourceSpace",
    "StopGradient",
    "Stratified",
    "Surrogate",
    "SurrogateGuidance",
    "Systematic",
    "TemperedSMC",
    "TemporalUNet",
    "ThreeDVar",
    "Training",
    "TrajectoryTransformer",
    "TransitionHMC",
    "Transport",
    "TransportFilter",
    "TriangularMap",
    "Twisted",
    "Unscented",
    "Vector",
    "Window",
    "WindowMLP",
    "add_log_likelihood",
    "attributes",
    "calibrate",
    "compare",
    "describe",
    "forecast",
    "infer",
    "learn",
    "load",
    "local_check",
    "online",
    "plot_calibration",
    "plot_compare",
    "plot_diagnostics",
    "plot_filter",
    "predict",
    "prior",
    "save",
    "simulator",
]
