"""Jobs: one verb each, as a frozen dataclass whose fields are the flags of the command line."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jacmatch.jobs.cache import Cache
    from jacmatch.jobs.compare import Compare, Doctor, Evaluate
    from jacmatch.jobs.distill import Distill
    from jacmatch.jobs.export import Export
    from jacmatch.jobs.list import List
    from jacmatch.jobs.networks import load_student
    from jacmatch.jobs.report import Report
    from jacmatch.jobs.robust import Robust
    from jacmatch.jobs.surrogate.command import Surrogate
    from jacmatch.jobs.train import Train
    from jacmatch.jobs.transfer import Transfer

__all__ = [
    "Cache",
    "Compare",
    "Distill",
    "Doctor",
    "Evaluate",
    "Export",
    "List",
    "Report",
    "Robust",
    "Surrogate",
    "Train",
    "Transfer",
    "load_student",
]

_ELSEWHERE = {"Doctor": "compare", "Evaluate": "compare", "Surrogate": "surrogate.command", "load_student": "networks"}
"""Modules whose names differ from what they export."""


def __getattr__(name: str) -> Any:
    """Import a job at its first use (PEP 562): a verb imports its own job only."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, name.lower())}"), name)
