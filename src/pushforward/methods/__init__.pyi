"""The methods, and in which file each is: read by type checkers and, on first use, by lazy_loader."""

import collections.abc

from ._base import Method
from .aldi import ALDI
from .amortized_flow import AmortizedFlow
from .discrete_hmm import DiscreteHMM
from .eki import EKI
from .eks import EKS
from .enkf import EnKF
from .flow_vi import FlowVI
from .four_dvar import FourDVar
from .gaussian_vi import GaussianVI
from .kalman import Kalman
from .laplace import Laplace
from .neural_likelihood import NeuralLikelihood
from .nuts import NUTS
from .particle_filter import ParticleFilter
from .particle_gibbs import ParticleGibbs
from .pathfinder import Pathfinder
from .pcn import PreconditionedCrankNicolson
from .pmmh import PMMH
from .score_trajectory import ScoreTrajectory
from .smc2 import SMC2
from .tempered_smc import TemperedSMC
from .three_dvar import ThreeDVar
from .transport_filter import TransportFilter
from .uki import UKI

NAMES: collections.abc.Mapping[str, type[Method]]

__all__ = [
    "ALDI",
    "EKI",
    "EKS",
    "NAMES",
    "NUTS",
    "PMMH",
    "SMC2",
    "UKI",
    "AmortizedFlow",
    "DiscreteHMM",
    "EnKF",
    "FlowVI",
    "FourDVar",
    "GaussianVI",
    "Kalman",
    "Laplace",
    "NeuralLikelihood",
    "ParticleFilter",
    "ParticleGibbs",
    "Pathfinder",
    "PreconditionedCrankNicolson",
    "ScoreTrajectory",
    "TemperedSMC",
    "ThreeDVar",
    "TransportFilter",
]
