"""Derivatives of networks: products, probes, estimators, readouts and the doctor.

Four questions, four modules: *what* is differentiated (`readouts`), *which* products are taken (`estimators`, with
directions from `probes`), *how* they are computed (`products`, three engines), and whether that is right for a given
module (`doctor`).
"""

from jacmatch.jacobian.diagnosis import Diagnosis, Finding
from jacmatch.jacobian.doctor import doctor
from jacmatch.jacobian.engines import gradient_norms
from jacmatch.jacobian.estimators import (
    ESTIMATORS,
    AntitheticNoise,
    Cost,
    DataPairs,
    Estimator,
    EveryRow,
    FisherRows,
    LabelClass,
    RandomInputs,
    RandomOutputs,
    SampledRows,
    TopClass,
)
from jacmatch.jacobian.features import from_embeddings, output_tensor, run
from jacmatch.jacobian.function import Products
from jacmatch.jacobian.modules import BatchNormPolicy, Module, preserved_buffers, twice_differentiable
from jacmatch.jacobian.products import Engine, jacobian, jvp, pull, push, vjp
from jacmatch.jacobian.readouts import (
    READOUTS,
    AttentionMaps,
    AttentionPixel,
    Context,
    LabelLogit,
    Logits,
    LogProbabilities,
    Loss,
    PooledFeatures,
    Readout,
    TopLogit,
)
from jacmatch.jacobian.verification import unverified

__all__ = [
    "ESTIMATORS",
    "READOUTS",
    "AntitheticNoise",
    "AttentionMaps",
    "AttentionPixel",
    "BatchNormPolicy",
    "Context",
    "Cost",
    "DataPairs",
    "Diagnosis",
    "Engine",
    "Estimator",
    "EveryRow",
    "Finding",
    "FisherRows",
    "LabelClass",
    "LabelLogit",
    "LogProbabilities",
    "Logits",
    "Loss",
    "Module",
    "PooledFeatures",
    "Products",
    "RandomInputs",
    "RandomOutputs",
    "Readout",
    "SampledRows",
    "TopClass",
    "TopLogit",
    "doctor",
    "from_embeddings",
    "gradient_norms",
    "jacobian",
    "jvp",
    "output_tensor",
    "preserved_buffers",
    "pull",
    "push",
    "run",
    "twice_differentiable",
    "unverified",
    "vjp",
]
