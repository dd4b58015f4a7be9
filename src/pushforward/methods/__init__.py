"""INFER: one file per method, one class per file. A class is loaded on first use; the list is `__init__.pyi`."""

from collections.abc import Iterator, Mapping
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_CLASSES = {
    "nuts": "NUTS",
    "pcn": "PreconditionedCrankNicolson",
    "tempered_smc": "TemperedSMC",
    "laplace": "Laplace",
    "gaussian_vi": "GaussianVI",
    "pathfinder": "Pathfinder",
    "flow_vi": "FlowVI",
    "amortized_flow": "AmortizedFlow",
    "neural_likelihood": "NeuralLikelihood",
    "eki": "EKI",
    "eks": "EKS",
    "aldi": "ALDI",
    "uki": "UKI",
    "kalman": "Kalman",
    "enkf": "EnKF",
    "discrete_hmm": "DiscreteHMM",
    "particle_filter": "ParticleFilter",
    "pmmh": "PMMH",
    "particle_gibbs": "ParticleGibbs",
    "smc2": "SMC2",
    "score_trajectory": "ScoreTrajectory",
    "four_dvar": "FourDVar",
    "three_dvar": "ThreeDVar",
    "transport_filter": "TransportFilter",
}


class _Names(Mapping[str, Any]):
    """The classes by name; looking one up loads it."""

    def __getitem__(self, name: str) -> Any:
        return __getattr__(_CLASSES[name])

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


NAMES = _Names()
"""Names that stand for a method with its defaults."""
