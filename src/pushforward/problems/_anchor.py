"""Published scores of filters, in DAPPER's conventions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Anchor:
    """Scores of one filter with its tuning.

    `rmse` is the mean over cycles after the burn-in of sqrt(mean_i (mean_i - truth_i)^2), after the analysis; `spread`
    (DAPPER's rmv) is the same with the ensemble's standard deviation (ddof 1), after inflation and rotation.

    Attributes:
        method: which filter.
        options: its tuning. `inflation` multiplies the anomalies of every analysis, `rotate` is a random rotation
            of the ensemble that keeps its mean, `scale` (3DVar) multiplies the truth's covariance to give B.
        rmse: of long runs.
        spread: of long runs, None where not published.
        rmse_1000: mean over 20 seeds of the rmse of runs of 1000 cycles, None where not measured.
        sd_1000: standard deviation over those seeds.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rmse: float = float("nan")
    spread: float | None = None
    rmse_1000: float | None = None
    sd_1000: float | None = None
