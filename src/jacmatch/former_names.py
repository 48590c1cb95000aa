"""Deprecated names: each warns, and returns the object that replaced it."""

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "jacmatch.recipes": "jacmatch.jobs",
    "jacmatch.jacobian.diagnosis": "jacmatch.diagnostics.doctor",
    "jacmatch.jacobian.estimation": "jacmatch.jacobian.estimators",
    "jacmatch.jacobian.input_estimators": "jacmatch.jacobian.estimators",
    "jacmatch.jacobian.output_estimators": "jacmatch.jacobian.estimators",
    "jacmatch.training.augmentation": "jacmatch.training.data",
    "jacmatch.training.gate": "jacmatch.diagnostics.preflight",
    "jacmatch.training.engine": "jacmatch.training.loop",
    "jacmatch.training.trial": "jacmatch.diagnostics.doctor",
}
"""Current names of modules by former name."""

NAMES = {
    "jacmatch": {"Share": "objectives.GradientShare", "RememberedTeacher": "teachers.MemoizedTeacher"},
    "jacmatch.jacobian": {
        **{name: f"diagnostics.{name}" for name in ("Diagnosis", "Finding", "doctor")},
        "pull": "jacobian.vjp_products",
        "push": "jacobian.jvp_products",
    },
    "jacmatch.objectives": {"Share": "objectives.GradientShare", "Balance": "objectives.LossWeights"},
    "jacmatch.teachers": {"RememberedTeacher": "teachers.MemoizedTeacher"},
    "jacmatch.training": {"Trial": "diagnostics.EngineBenchmark", "engine_trial": "diagnostics.benchmark_engines"},
    "jacmatch.training.gate": {
        "examine": "diagnostics.preflight.preflight_check",
        "Examined": "diagnostics.preflight.PreflightReport",
    },
    "jacmatch.training.trial": {
        "Trial": "diagnostics.EngineBenchmark",
        "engine_trial": "diagnostics.benchmark_engines",
    },
}
"""Current names in `jacmatch` by module and former name."""


def lookup(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module (PEP 562) that has former names."""
    return partial(_present, module)


def _warn(old: str, new: str) -> None:
    text = f"`{old}` is now `{new}`; the old name will be removed in the next release."
    warnings.warn(text, DeprecationWarning, stacklevel=3)


def _present(module: str, name: str) -> Any:
    target = NAMES.get(module, {}).get(name)
    if target is None and (module not in MODULES or name.startswith("__")):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    owner, _, new = f"jacmatch.{target}".rpartition(".") if target else (MODULES[module], "", name)
    if module not in MODULES:  # the import of such a module has warned
        _warn(f"{module}.{name}", f"{owner}.{new}")
    return getattr(importlib.import_module(owner), new)


def former(owner: str, old: str, new: str) -> Any:
    """Return a property with a former name."""

    def get(self: Any) -> Any:
        _warn(f"{owner}.{old}", f"{owner}.{new}")
        return getattr(self, new)

    return property(get, doc=f"Former name of `{new}`.")


class _Former(MetaPathFinder, Loader):
    """Import hook for former modules: each is empty and looks up its names in the current module."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(name, self, is_package=name == "jacmatch.recipes") if name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        _warn(name, MODULES[name])
        module.__dict__["__getattr__"] = lookup(name)


def install() -> None:
    """Install the import hook; repeated calls have no effect."""
    if not any(isinstance(finder, _Former) for finder in sys.meta_path):
        sys.meta_path.append(_Former())
