"""The fingerprint of a cache: everything that determines a teacher's answers, by name and in readable form."""

import hashlib

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.runs.identity import source_of
from jacmatch.teachers.base import Question, Teacher
from jacmatch.teachers.ensemble import EnsembleTeacher
from jacmatch.teachers.memoized import MemoizedTeacher
from jacmatch.teachers.module import ModuleTeacher

_SHOWN = 8  # numbers of a tensor in a fingerprint


def digest(*tensors: tuple[str, Tensor | None]) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        shape = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        total.update(f"{name}: {shape}\n".encode())
        if tensor is not None:
            # A row first: a tensor without dimensions has no bytes to look at.
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def of_teacher(teacher: Teacher) -> dict[str, str]:
    """Return the parts of a fingerprint that depend on the teacher: weights, architecture, preprocessing, type."""
    if isinstance(teacher, MemoizedTeacher):
        return of_teacher(teacher.teacher)
    if isinstance(teacher, EnsembleTeacher):
        parts = {"teacher": f"EnsembleTeacher of {len(teacher.teachers)}"}
        for number, member in enumerate(teacher.teachers):
            parts |= {f"member {number} {name}": value for name, value in of_teacher(member).items()}
        return parts
    if not isinstance(teacher, ModuleTeacher):
        raise UnsupportedError(
            f"A cache identifies its teacher by the weights, and a {type(teacher).__name__} has none. "
            "Use a network, in a ModuleTeacher."
        )
    module, state = teacher.module, teacher.module.state_dict()
    scaling = [name for name in state if name.rpartition(".")[2] in ("mean", "std")]
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()})
    return {
        "teacher": f"{type(module).__module__}.{type(module).__qualname__}",
        "teacher weights": digest(*state.items()),
        "teacher architecture": architecture_of(module),
        "teacher preprocessing": "; ".join(f"{name} {_numbers(state[name])}" for name in scaling) or "none of its own",
        "teacher type": ", ".join(kinds) or "no floating-point weights",
    }


def architecture_of(module: nn.Module) -> str:
    """Return the SHA-256 of the classes of all submodules, of the settings in their `repr`, and of the user's code."""
    lines = [f"{name}: {_name_of(type(each))}({each.extra_repr()})" for name, each in module.named_modules()]
    own = {type(each) for each in module.modules()}
    lines += sorted(filter(None, map(source_of, own)))
    replaced = {name: each.forward for name, each in module.named_modules() if "forward" in vars(each)}
    lines += [
        f"{name}.forward: {getattr(call, '__qualname__', '')} {source_of(call)}" for name, call in replaced.items()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


_FORMER_MODULES = {
    "jacmatch.models.inputs.FirstOutputs": "jacmatch.models.resized.FirstOutputs",
    "jacmatch.models.inputs.Resized": "jacmatch.models.resized.Resized",
    "jacmatch.models.mlp.ScaledMLP": "jacmatch.models.scaled.ScaledMLP",
}
"""Classes that have moved. Caches and checkpoints name them by the module that they were in."""
_FORMER_PACKAGES = {"jacmatch_research.": "jacmatch.recipes.", "jacmatch.jobs.": "jacmatch.recipes."}


def _name_of(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    for package, former in _FORMER_PACKAGES.items():
        if name.startswith(package):
            return former + name.removeprefix(package)
    return _FORMER_MODULES.get(name, name)


def _numbers(tensor: Tensor) -> str:
    numbers = tensor.detach().cpu().double().flatten().tolist()
    shown = ", ".join(f"{number:.4g}" for number in numbers[:_SHOWN])
    return f"[{shown}{', …' if len(numbers) > _SHOWN else ''}]"


def described(question: Question) -> dict[str, str]:
    """Return a readable description of a query: readout, products, and the rule of their directions."""
    sides = {(True, False): "vᵀJ", (False, True): "Jv", (False, False): "none"}
    products = sides[question.cotangents is not None, question.tangents is not None]
    return {
        "readout": words(question.readout, "readout"),
        "products": products,
        "rule": "none" if question.rule is None or question.tangents is not None else words(question.rule, "probe"),
        "step": "none" if question.step is None else repr(question.step),
    }


def words(given: object, what: str) -> str:
    """Return the `repr` of a setting, which must contain everything that determines it."""
    text = repr(given)
    if " at 0x" in text:
        rule = f"`{what}` of a cache must have a `repr` with all its settings."
        raise InputError(rule, got=text.partition(" at 0x")[0] + " at an address>", do="Make it a dataclass.")
    return text
