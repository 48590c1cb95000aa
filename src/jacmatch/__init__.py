"""First-order knowledge transfer for PyTorch: a student network learns its teacher's values and derivatives.

A method answers four questions, and each has its package: *what* is differentiated and *which* derivatives are taken
(`jacmatch.jacobian`), *how* they are compared (`jacmatch.losses`), and *where* (`jacmatch.objectives`). This module
exports the names that most training loops need.

Example:
    One step of a custom training loop. The teacher is queried once and the student runs once. By default, the Jacobian
    term contributes 30 % of the gradient norm.

    >>> import torch
    >>> from jacmatch import Distillation, RandomOutputs
    >>> student, teacher = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
    >>> objective = Distillation(student, teacher, probe=RandomOutputs(1))
    >>> optimizer = torch.optim.Adam(objective.parameters())
    >>> x, y = torch.randn(16, 8), torch.randint(3, (16,))
    >>> terms = objective(x, y)
    >>> terms["loss"].backward()
    >>> optimizer.step()
    >>> terms.keys()
    ['loss', 'labels', 'outputs', 'jacobians']
"""

import importlib
import os
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jacmatch import former_names
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.version import __version__

if TYPE_CHECKING:
    import torch

    from jacmatch.diagnostics import doctor
    from jacmatch.jacobian import *
    from jacmatch.objectives import *
    from jacmatch.teachers import *

__all__ = [
    "AnalyticTeacher",
    "Answer",
    "AntitheticNoise",
    "AtData",
    "AtMixedPairs",
    "AtNoise",
    "AttentionPixel",
    "BlackBoxTeacher",
    "CachedTeacher",
    "DataPairs",
    "Distillation",
    "Edges",
    "EnsembleTeacher",
    "EveryRow",
    "FisherRows",
    "GradientShare",
    "Heads",
    "InputError",
    "Inputs",
    "LabelClass",
    "LabelLogit",
    "LogProbabilities",
    "Logits",
    "MemoizedTeacher",
    "ModuleTeacher",
    "Nodes",
    "NoiseAveraged",
    "PooledFeatures",
    "Question",
    "RandomInputs",
    "RandomOutputs",
    "Regression",
    "Robustness",
    "SampledRows",
    "Shared",
    "SubspaceInputs",
    "TopClass",
    "TopLogit",
    "Transfer",
    "UnsupportedError",
    "WeightSchedule",
    "__version__",
    "doctor",
    "jacobian",
    "jacobian_norm_penalty",
    "jvp",
    "load_student",
    "unverified",
    "vjp",
]

former_names.install()
_PACKAGES = ("jacobian", "objectives", "teachers", "diagnostics")  # packages that export the names above


def __getattr__(name: str) -> Any:
    """Import a public name or a subpackage at its first use (PEP 562): `import jacmatch` alone imports no torch."""
    if name in __all__:
        for package in _PACKAGES:
            module = importlib.import_module(f"{__name__}.{package}")
            if name in module.__all__:
                return globals().setdefault(name, getattr(module, name))
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    return former_names.lookup(__name__)(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package. Its attribute `jacobian` stays the function when the subpackage of that name is imported."""

    @property
    def jacobian(self) -> Any:
        """Return `jacmatch.jacobian.jacobian`."""
        return importlib.import_module(f"{__name__}.jacobian").jacobian

    @jacobian.setter
    def jacobian(self, subpackage: ModuleType) -> None:
        """Leave the attribute as it is."""


sys.modules[__name__].__class__ = _Package


def load_student(run_dir: str | os.PathLike[str], *, allow_code: bool = False) -> "torch.nn.Module":
    """The trained network of a run folder, in evaluation mode; see `jacmatch.jobs.load_student`.

    Args:
        run_dir: The `--out` of a job.
        allow_code: Whether to run code outside this package that builds the network.

    Raises:
        InputError: the folder holds no network, or one that needs `allow_code`.
        UnsupportedError: the extra `train`, which writes and reads run folders, is not installed.
    """
    missing = next((name for name in ("safetensors", "filelock", "yaml") if find_spec(name) is None), None)
    if missing is not None:
        raise UnsupportedError(
            f"`jacmatch.load_student` needs the extra train: the package {missing} is not installed. "
            "Run: pip install 'jacmatch[train]'."
        )
    from jacmatch.jobs import load_student as load

    return load(run_dir, allow_code=allow_code)
