"""What `pushforward` offers, and in which module it is: read by type checkers and, on first use, by lazy_loader."""

from . import metrics as metrics
from . import parallel as parallel
from . import problems as problems
from ._files import load, save
from ._infer import infer
from .calibration import calibrate
from .compare import compare, plot_compare
from .describe import describe
from .forecasting import forecast
from .learn import learn
from .learned.embeddings import Image, Series, Sets, Vector
from .learned.estimators import EnergyMap, FlowMatching, PointEstimate
from .learned.fitting import Training
from .learned.flow_prior import FlowPrior
from .learned.flows import Flow
from .learned.learning import EM, MAP, Increments, Likelihood
from .learned.score_networks import WindowMLP
from .learned.score_training import ScoreTraining
from .learned.score_transformer import TrajectoryTransformer
from .learned.score_unets import FieldUNet, TemporalUNet
from .learned.surrogate import Surrogate
from .local_calibration import local_check
from .methods import (
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
from .methods._covariance import Diagonal, Full, LowRank
from .methods._ensemble_parts import (
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
from .methods._gain_fit import GainTraining
from .methods._gains import BandedGain, CirculantGain, FullGain, LowRankGain, NetworkGain
from .methods._guide import Guide
from .methods._guided import Auxiliary, Linearized, Newton, Optimal
from .methods._learned_filter import FilterTraining
from .methods._linearization import Cubature, Exact, Extended, Iterated, Unscented
from .methods._localisation import ByCorrelation, ByDistance
from .methods._particle_parts import (
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
from .methods._proposals import Bootstrap
from .methods._rao_blackwell import RaoBlackwell
from .methods._score_correction import TransitionHMC
from .methods._score_guidance import (
    AutomaticGuidance,
    AveragedGuidance,
    GammaGuidance,
    MomentMatching,
    NoGuidance,
    SurrogateGuidance,
)
from .methods._score_samplers import DDIM, Ancestral, Heun, Multistep
from .methods._score_source import SourceSpace
from .methods._score_twisted import Twisted
from .methods._transport_parts import AffineMap, EnergyTransport, TriangularMap
from .methods.four_dvar import Window
from .model.simulator import simulator
from .online import online
from .plot_calibration import plot_calibration
from .plot_diagnostics import plot_diagnostics
from .plots import plot_filter
from .posterior import attributes
from .predictive import add_log_likelihood, predict, prior

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
