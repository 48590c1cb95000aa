"""Which products with a Jacobian to take, how to weigh them, how far they scatter and what they cost.

`estimation` says what an estimator is; `output_estimators` and `input_estimators` hold them by the side of their
directions.

The paper's form is `TopClass`, or `LabelClass` where labels may be used: their mean is one term of tr A. The others are
the corrected forms, with mean tr A where nothing else is said.

References:
    Srinivas & Fleuret 2018, arXiv:1803.00443, on approximating the full Jacobian (also in "Local Affine Approximators",
    NIPS 2017 LLD). Random output directions: Hoffman, Roberts & Yaida 2019, arXiv:1908.02729.
"""

from typing import Final

from jacmatch.jacobian.estimation import Cost, Estimator
from jacmatch.jacobian.input_estimators import AntitheticNoise, DataPairs, RandomInputs
from jacmatch.jacobian.output_estimators import EveryRow, FisherRows, LabelClass, RandomOutputs, SampledRows, TopClass

ESTIMATORS: Final[dict[str, type[Estimator]]] = {
    "every-row": EveryRow,
    "top-class": TopClass,
    "label-class": LabelClass,
    "random-outputs": RandomOutputs,
    "random-inputs": RandomInputs,
    "sampled-rows": SampledRows,
    "data-pairs": DataPairs,
    "fisher-rows": FisherRows,
    "antithetic-noise": AntitheticNoise,
}
"""The estimators by their names on the command line."""

__all__ = [
    "ESTIMATORS",
    "AntitheticNoise",
    "Cost",
    "DataPairs",
    "Estimator",
    "EveryRow",
    "FisherRows",
    "LabelClass",
    "RandomInputs",
    "RandomOutputs",
    "SampledRows",
    "TopClass",
]
