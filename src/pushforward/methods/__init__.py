"""INFER: one file per method, one class per file."""

from pushforward.methods.enkf import EnKF
from pushforward.methods.gaussian_vi import GaussianVI
from pushforward.methods.kalman import Kalman
from pushforward.methods.laplace import Laplace
from pushforward.methods.nuts import NUTS
from pushforward.methods.pathfinder import Pathfinder
from pushforward.methods.pcn import PreconditionedCrankNicolson
from pushforward.methods.tempered_smc import TemperedSMC

NAMES = {
    "nuts": NUTS,
    "pcn": PreconditionedCrankNicolson,
    "tempered_smc": TemperedSMC,
    "laplace": Laplace,
    "gaussian_vi": GaussianVI,
    "pathfinder": Pathfinder,
    "kalman": Kalman,
    "enkf": EnKF,
}
"""Names that stand for a method with its defaults."""
