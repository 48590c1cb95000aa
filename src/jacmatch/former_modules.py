"""Modules under their former names, for one release: an import of one warns and gives what is in its place now."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "jacmatch.recipes": "jacmatch.jobs",
    "jacmatch.jacobian.diagnosis": "jacmatch.diagnostics.doctor",
    "jacmatch.jacobian.estimation": "jacmatch.jacobian.estimators",
    "jacmatch.jacobian.input_estimators": "jacmatch.jacobian.estimators",
    "jacmatch.jacobian.output_estimators": "jacmatch.jacobian.estimators",
    "jacmatch.training.augmentation": "jacmatch.training.data",
    "jacmatch.training.gate": "jacmatch.diagnostics.preflight",
    "jacmatch.training.engine": "jacmatch.training.loop",
    "jacmatch.training.trial": "jacmatch.diagnostics.engine_benchmark",
}
"""Present names of modules by their former ones."""

RENAMED = {
    "examine": "preflight_check",
    "Examined": "PreflightReport",
    "engine_trial": "benchmark_engines",
    "Trial": "EngineBenchmark",
}
"""Present names by former ones, within these modules."""


class _Former(MetaPathFinder, Loader):
    """Finds the modules of the table, each as an empty one that looks its names up in another."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(name, self, is_package=name == "jacmatch.recipes") if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        former, present = module.__name__, MOVED[module.__name__]
        message = f"`{former}` is `{present}` now; the old name will be removed in the next release."
        warnings.warn(message, DeprecationWarning, stacklevel=2)

        def lookup(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"module {former!r} has no attribute {name!r}")
            return getattr(importlib.import_module(present), RENAMED.get(name, name))

        module.__dict__["__getattr__"] = lookup


def install() -> None:
    """Let imports find the modules of the table; once is enough."""
    if not any(isinstance(finder, _Former) for finder in sys.meta_path):
        sys.meta_path.append(_Former())
