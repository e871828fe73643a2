"""The tuner: measures the configs of an operator on the shapes it will meet, and keeps what won as records.

`tune` does it now, `autotune` is a context in which plans read records (and, where asked to, tune first). An operator
takes part by answering a few questions (`operator.Operator`); `attention` does so for `fl.Attention`.
"""

from flashloom.tune.context import autotune
from flashloom.tune.operator import Operator
from flashloom.tune.path import tune_cache_path
from flashloom.tune.report import Outcome, Report
from flashloom.tune.tuner import tune

__all__ = ["Operator", "Outcome", "Report", "autotune", "tune", "tune_cache_path"]
