"""Adapters for Hugging Face Transformers, Lightning, timm and accelerate; each imports its framework when used.

An objective is an nn.Module that returns a loss, so most training loops need no adapter. The adapters handle what a
framework cannot know: which module is wrapped for several processes, what a checkpoint contains, how the loss is scaled
under gradient accumulation, and which terms are logged.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jacmatch.errors import UnsupportedError

if TYPE_CHECKING:
    from jacmatch.integrations.huggingface import EmbeddingInputs, JacmatchTrainer, compute_loss
    from jacmatch.integrations.lightning import DistillationModule
    from jacmatch.integrations.timm import JacobianDistillationTask
    from jacmatch.integrations.unit import TrainingUnit

__all__ = [
    "DistillationModule",
    "EmbeddingInputs",
    "JacmatchTrainer",
    "JacobianDistillationTask",
    "TrainingUnit",
    "compute_loss",
]

_MODULES = {
    "DistillationModule": "lightning",
    "EmbeddingInputs": "huggingface",
    "JacmatchTrainer": "huggingface",
    "JacobianDistillationTask": "timm",
    "TrainingUnit": "unit",
    "compute_loss": "huggingface",
}


def __getattr__(name: str) -> Any:
    """Import a name with its framework at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def require(package: str, extra: str) -> None:
    """Import the package of a framework."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"This part of `jacmatch.integrations` needs the package {error.name}, which is not installed. "
            f"Run: pip install 'jacmatch[{extra}]'."
        ) from error
