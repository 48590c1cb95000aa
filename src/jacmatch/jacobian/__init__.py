"""Derivatives of networks: products, probes, estimators and readouts.

Four questions, four modules: *what* is differentiated (`readouts`), *which* products are taken (`estimators`, with
directions from `probes`), *how* they are computed (`products`, three engines), and whether an engine is right for a
given module (`verification`; `jacmatch.diagnostics` has the checks of whole networks and objectives).
"""

from jacmatch.former_names import lookup
from jacmatch.jacobian.arguments import Arguments, Edges, Inputs, Nodes, Shared
from jacmatch.jacobian.callables import preserved_buffers
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
    NoiseAveraged,
    RandomInputs,
    RandomOutputs,
    SampledRows,
    SubspaceInputs,
    TopClass,
)
from jacmatch.jacobian.features import from_embeddings, output_tensor, run
from jacmatch.jacobian.function import Products
from jacmatch.jacobian.modules import BatchNormPolicy, Module, twice_differentiable
from jacmatch.jacobian.products import Engine, jacobian, jvp, jvp_products, vjp, vjp_products
from jacmatch.jacobian.readouts import (
    READOUTS,
    AttentionMaps,
    AttentionPixel,
    Context,
    LabelLogit,
    Logits,
    LogProbabilities,
    Loss,
    OutputsFrom,
    PCAFeatures,
    PooledFeatures,
    Readout,
    TopLogit,
)
from jacmatch.jacobian.rules.attention import attention_jvp
from jacmatch.jacobian.substitutions import MaskedNeighbours, TokenSubstitutions
from jacmatch.jacobian.verification import unverified

__all__ = [
    "ESTIMATORS",
    "READOUTS",
    "AntitheticNoise",
    "Arguments",
    "AttentionMaps",
    "AttentionPixel",
    "BatchNormPolicy",
    "Context",
    "Cost",
    "DataPairs",
    "Edges",
    "Engine",
    "Estimator",
    "EveryRow",
    "FisherRows",
    "Inputs",
    "LabelClass",
    "LabelLogit",
    "LogProbabilities",
    "Logits",
    "Loss",
    "MaskedNeighbours",
    "Module",
    "Nodes",
    "NoiseAveraged",
    "OutputsFrom",
    "PCAFeatures",
    "PooledFeatures",
    "Products",
    "RandomInputs",
    "RandomOutputs",
    "Readout",
    "SampledRows",
    "Shared",
    "SubspaceInputs",
    "TokenSubstitutions",
    "TopClass",
    "TopLogit",
    "attention_jvp",
    "from_embeddings",
    "gradient_norms",
    "jacobian",
    "jvp",
    "jvp_products",
    "output_tensor",
    "preserved_buffers",
    "run",
    "twice_differentiable",
    "unverified",
    "vjp",
    "vjp_products",
]

__getattr__ = lookup(__name__)
