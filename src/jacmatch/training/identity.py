"""Fingerprints of what a training depends on besides its settings: data, student, teacher and objective.

`runs.identity` defines fingerprints and compares them. This module also handles random states besides torch's: a probe
of user code must not change them, and a checkpoint stores them.
"""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from jacmatch import teachers
from jacmatch.datasets import Split
from jacmatch.jacobian import run as outputs_and_features
from jacmatch.jacobian.callables import preserved_buffers, preserved_generators
from jacmatch.jacobian.modules import in_mode
from jacmatch.objectives import Objective
from jacmatch.objectives.base import networks_of
from jacmatch.runs.identity import COARSE, SINGLE, Fingerprint, probe, source_of
from jacmatch.teachers import CachedTeacher, MemoizedTeacher, ModuleTeacher, Question, Teacher
from jacmatch.teachers.cached.format import architecture_of, digest, of_teacher

_PYTHON, _NUMPY = 625, 624  # integers below 2³², exact in float64
_VERSION = 3


def host_state() -> Float64[Tensor, "numbers"]:
    """Return the states of `random` and of the legacy `numpy.random`, as numbers for a checkpoint.

    Example:
        >>> state = host_state()
        >>> first = random.random(), float(np.random.rand())
        >>> set_host_state(state)
        >>> (random.random(), float(np.random.rand())) == first
        True
    """
    _, whole, pending = random.getstate()
    _, key, position, has, cached = np.random.get_state()
    last = [math.nan if pending is None else pending, position, has, cached]
    return torch.tensor([*whole, *map(int, key), *last], dtype=torch.float64)


def set_host_state(state: Float64[Tensor, "numbers"]) -> None:
    """Restore the state that `host_state` returned."""
    numbers = state.tolist()
    whole, key, rest = numbers[:_PYTHON], numbers[_PYTHON : _PYTHON + _NUMPY], numbers[_PYTHON + _NUMPY :]
    if len(rest) != 4 or not all(each.is_integer() and 0 <= each < 2**32 for each in (*whole, *key, *rest[1:3])):
        raise ValueError("numbers that are not a random state")
    pending, position, has, cached = rest
    random.setstate((_VERSION, tuple(map(int, whole)), None if math.isnan(pending) else pending))
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), int(position), int(has), cached))


SAMPLES = 4
"""Number of samples, the first of the training split, at which teacher and student are probed."""
_LETTERS = 16  # of a digest in a description
_MEMORY = {"training", "student", "teacher", "compiled", "calls", "measured_at", "teacher_norm"}
"""Attributes of an objective that are not settings."""
_DERIVATIVES = (*("probe", "readout", "teacher_readout", "point"), *("batch_norm", "engine", "seed", "chunk_size"))
"""Settings of `Differentiation` that objectives of version 0.1 had themselves, or as `Slopes`."""
_CPU = torch.device("cpu")
_DEPTH = 4  # levels of nested settings


def identity(objective: nn.Module, train: Split, seed: int) -> dict[str, Any]:
    """Return fingerprints of seed, data, teacher and settings of the objective; see also `student_identity`."""
    _, teacher = networks_of(objective)
    parts: dict[str, Any] = {
        "seed": seed,
        "samples": len(train),
        "teacher": "none" if teacher is None else named(teacher),
        **{f"data {name}": value for name, value in train.digests.items()},
        **_of_objective(objective),
    }
    if teacher is not None:
        parts["teacher outputs"] = outputs_of(teacher, train.inputs(torch.arange(min(SAMPLES, len(train)))))
    return parts


def student_identity(student: nn.Module, x: Tensor, *, probed: bool = True) -> dict[str, Fingerprint]:
    """Return fingerprints of a student: its architecture, the code of its classes, and its current outputs at x."""
    return {"student": architecture_of(student), "student outputs": outputs_of(student, x) if probed else "not probed"}


def named(teacher: Teacher | nn.Module) -> str:
    """Return the teacher in a line: its type, and a digest of everything that can be read from it without a query.

    For a network, the digest contains weights, architecture, preprocessing and the code of its classes; for a function,
    its source. A cached teacher has the same line as the live one.
    """
    kind, parts = _parts_of(teacher)
    return f"{kind} {hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_LETTERS]}"


def _parts_of(teacher: Any) -> tuple[str, Any]:
    """The name of a teacher, and its visible state."""
    kind = type(teacher).__name__
    if isinstance(teacher, MemoizedTeacher):
        return _parts_of(teacher.teacher)
    if isinstance(teacher, CachedTeacher | ModuleTeacher):
        whole = teacher.head.fingerprint if isinstance(teacher, CachedTeacher) else of_teacher(teacher)
        parts = {name: value for name, value in whole.items() if name.startswith(("teacher", "member"))}
        return parts["teacher"], parts
    if isinstance(teacher, teachers.EnsembleTeacher):
        members = [_parts_of(member) for member in teacher.teachers]
        return f"{kind} of {len(members)}", members
    if isinstance(teacher, nn.Module):
        return kind, [digest(*teacher.state_dict().items()), architecture_of(teacher)]
    functions: tuple[Any, ...] = ()
    if isinstance(teacher, teachers.BlackBoxTeacher | teachers.AnalyticTeacher):
        functions = (teacher.function, getattr(teacher, "jacobian", None))
    return kind, [source_of(type(teacher)), *map(_described, functions)]


def outputs_of(given: Teacher | nn.Module, x: Tensor) -> Fingerprint:
    """Return outputs at x as a probe, of a teacher or of a network in evaluation mode; nothing is changed.

    If a second call returns different outputs, or a call fails, there is no probe; the training itself reports it.
    """
    if isinstance(given, MemoizedTeacher):
        return outputs_of(given.teacher, x)
    if isinstance(given, CachedTeacher):
        return "cached"
    module = given if isinstance(given, nn.Module) else None
    with undisturbed(module, x.device):
        try:
            first, second = (_outputs(given, x).double().flatten().cpu() for _ in range(2))
        except Exception:  # the user's code may raise anything; the training itself reports it
            return "not probed"
    same = first.shape == second.shape and torch.allclose(first, second, 1e-2, 1e-5, equal_nan=True)
    return probe(first.tolist(), _tolerance(given, x)) if same else "another at each call"


def _tolerance(given: Any, x: Tensor) -> float:
    """Tolerance between two equal answers."""
    module = given if isinstance(given, nn.Module) else getattr(given, "module", None)
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    short = any(each.is_floating_point() and each.element_size() < 4 for each in parameters)
    return COARSE if short or x.device.type == "cuda" else SINGLE


def _outputs(given: Any, x: Tensor) -> Tensor:
    if isinstance(given, nn.Module):
        return outputs_and_features(given, x.clone())[0]
    outputs: Tensor = given.answer(x.clone(), Question(ids=torch.arange(len(x), device=x.device))).outputs
    return outputs


@contextmanager
def undisturbed(module: nn.Module | None = None, device: torch.device = _CPU) -> Iterator[None]:
    """Run the block with the module in evaluation mode; then restore modes, buffers and random states."""
    with ExitStack() as stack:
        stack.enter_context(preserved_generators(device))
        if module is not None:
            stack.enter_context(preserved_buffers(module))
            stack.enter_context(in_mode(module, training=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _of_objective(objective: nn.Module) -> dict[str, str]:
    """Return the public attributes of an objective and its modules that no checkpoint restores, and its code."""
    networks = [network for network in networks_of(objective) if isinstance(network, nn.Module)]
    inner = {id(each) for network in networks for each in network.modules()}
    parts = {}
    for path, module in objective.named_modules(prefix="objective"):
        if id(module) in inner:
            continue
        parts[path] = f"{type(module).__qualname__} {_digest_of_text(source_of(type(module)))}".strip()
        loose = module._non_persistent_buffers_set
        settings = {name: value for name, value in module._buffers.items() if name in loose}
        settings |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
        if isinstance(module, Objective):
            how = settings.pop("differentiation")
            names = [each.name for each in dataclasses.fields(how) if each.name not in ("scale", "caller")]
            settings |= {name: vars(how)[name] for name in names}
        for name, value in settings.items():
            if name not in _MEMORY | _extra_state(module):
                parts[f"{path}.{name}"] = _described(value)
    return parts


_SINCE = {"objective.classes": "None", "objective.positions": "'sum'", "objective.ignore_index": "-100"}
"""Settings that objectives of version 0.1 did not have, and the values with the same effect."""


def as_before(parts: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as version 0.1 wrote it, under the names that a checkpoint of that version has."""
    weights = parts["objective.loss_weights"].replace("LossWeights(", "Balance(").replace("GradientShare(", "Share(")
    old = {**parts, "objective.balance": weights}
    if "objective.slopes" in saved:
        settings = [f"{name}={parts[f'objective.{name}']}" for name in _DERIVATIVES]
        old["objective.slopes"] = f"Slopes({', '.join(settings)})"
    new = {f"objective.{name}" for name in (*_DERIVATIVES, "fraction", "class_dim", "loss_weights")}
    new |= {name for name, default in _SINCE.items() if parts.get(name) == default}
    return {name: value for name, value in old.items() if name not in new or name in saved}


def _extra_state(module: nn.Module) -> set[str]:
    """Return the names in the extra state of a module."""
    if type(module).get_extra_state is nn.Module.get_extra_state:
        return set()
    state = module.get_extra_state()
    return set(state) if isinstance(state, Mapping) else set()


def _described(value: Any, depth: int = _DEPTH) -> str:
    """Return a description of a setting, the same in every process."""
    if value is None or isinstance(value, bool | int | float | complex | str):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor {digest(('', value))[:_LETTERS]}"
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_described(each, depth - 1) for each in value]
        return f"({', '.join(sorted(parts) if isinstance(value, set | frozenset) else parts)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_described(each, depth - 1)}' for key, each in value.items())}}}"
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {digest(*value.state_dict().items())[:_LETTERS]}"
    if isinstance(value, type) or (isinstance(value, Callable) and not dataclasses.is_dataclass(value)):  # type: ignore[arg-type]
        return f"{getattr(value, '__qualname__', type(value).__qualname__)} {_digest_of_text(source_of(value))}".strip()
    inner = vars(value) if hasattr(value, "__dict__") else {}
    if isinstance(inner.get("weights"), Mapping):  # factors and shares beside them are measured
        inner = {"weights": inner["weights"]}
    changing = dataclasses.is_dataclass(value) and not value.__dataclass_params__.frozen  # type: ignore[union-attr]
    named = [
        f"{name}={_described(each, depth - 1)}"
        for name, each in inner.items()
        if not name.startswith("_") and not (changing and isinstance(each, Tensor | None) and name == "scale")
    ]
    return f"{type(value).__qualname__}({', '.join(named)})"


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_LETTERS] if text else ""
