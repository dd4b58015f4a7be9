"""INFER: one file per method, one class per file."""

from pushforward.methods.aldi import ALDI
from pushforward.methods.amortized_flow import AmortizedFlow
from pushforward.methods.discrete_hmm import DiscreteHMM
from pushforward.methods.eki import EKI
from pushforward.methods.eks import EKS
from pushforward.methods.enkf import EnKF
from pushforward.methods.flow_vi import FlowVI
from pushforward.methods.four_dvar import FourDVar
from pushforward.methods.gaussian_vi import GaussianVI
from pushforward.methods.kalman import Kalman
from pushforward.methods.laplace import Laplace
from pushforward.methods.neural_likelihood import NeuralLikelihood
from pushforward.methods.nuts import NUTS
from pushforward.methods.particle_filter import ParticleFilter
from pushforward.methods.particle_gibbs import ParticleGibbs
from pushforward.methods.pathfinder import Pathfinder
from pushforward.methods.pcn import PreconditionedCrankNicolson
from pushforward.methods.pmmh import PMMH
from pushforward.methods.score_trajectory import ScoreTrajectory
from pushforward.methods.smc2 import SMC2
from pushforward.methods.tempered_smc import TemperedSMC
from pushforward.methods.three_dvar import ThreeDVar
from pushforward.methods.transport_filter import TransportFilter
from pushforward.methods.uki import UKI

NAMES = {
    "nuts": NUTS,
    "pcn": PreconditionedCrankNicolson,
    "tempered_smc": TemperedSMC,
    "laplace": Laplace,
    "gaussian_vi": GaussianVI,
    "pathfinder": Pathfinder,
    "flow_vi": FlowVI,
    "amortized_flow": AmortizedFlow,
    "neural_likelihood": NeuralLikelihood,
    "eki": EKI,
    "eks": EKS,
    "aldi": ALDI,
    "uki": UKI,
    "kalman": Kalman,
    "enkf": EnKF,
    "discrete_hmm": DiscreteHMM,
    "particle_filter": ParticleFilter,
    "pmmh": PMMH,
    "particle_gibbs": ParticleGibbs,
    "smc2": SMC2,
    "score_trajectory": ScoreTrajectory,
    "four_dvar": FourDVar,
    "three_dvar": ThreeDVar,
    "transport_filter": TransportFilter,
}
"""Names that stand for a method with its defaults."""
