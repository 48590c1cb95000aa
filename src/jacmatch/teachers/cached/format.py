"""The format of a cache: its files, how an answer becomes rows, and how teacher and query are identified.

    cache.json                      the teacher, the query and sizes; written first
    view-00000/places.memmap        position of each sample in this view, int64
    view-00000/shard-00000/         consecutive samples in the order of training
        outputs.memmap, …           one file for each field, rows of equal size; a memory-mapped tensordict
        shard.json                  size and sums of each file

Names, types and sizes come from fixed lists: no content of a file is used as a path or run.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError, converted_errors, unknown_name
from jacmatch.files import read
from jacmatch.jacobian import probes
from jacmatch.runs import files
from jacmatch.runs.files import decoded, encoded
from jacmatch.runs.identity import source_of
from jacmatch.teachers.base import Answer, Question, Teacher
from jacmatch.teachers.ensemble import EnsembleTeacher, MemoizedTeacher
from jacmatch.teachers.functions import ModuleTeacher

Storage = Literal["float32", "float16", "bfloat16"]
_SEED = 1_000_099  # seed of the weights of the sums
_NEAR = 1e-4  # sums that differ by less than this share of the norm differ by rounding
_SUMS = 2

HEAD: Final = "cache.json"
FORMAT: Final = 1
_LARGEST: Final = 2**24  # bytes; the limit for the head
POSITIONS: Final = "places.memmap"
TYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
}
FIELDS: Final = ("ids", "outputs", "values", "products", "outputs_alone", "input_sums", "direction_sums")
disk = partial(files.disk, what="cache", flag="--cache")
write_whole = partial(files.write_whole, what="cache", flag="--cache")


@dataclass(frozen=True)
class Field:
    """A field that is stored for each sample."""

    name: str  # one of `FIELDS`
    dtype: str  # one of `TYPES`
    shape: tuple[int, ...]  # shape for one sample

    @property
    def size(self) -> int:
        """Bytes of one sample."""
        return TYPES[self.dtype].itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Head:
    """The content of `cache.json`."""

    fingerprint: dict[str, str]  # everything that determines the answers, by name, in readable form
    question: dict[str, str]  # the query, as `described` returns it
    fields: tuple[Field, ...]  # fields that are stored for each sample
    samples: int  # number of samples in the training split
    views: int  # number of views: 0 … views − 1
    constant: bool  # whether nothing is random, so that view 0 is used for all views
    batch: int  # number of samples in a query, in the order of training
    shard: int  # number of samples in a shard, a multiple of `batch`
    settings: dict[str, Any]  # settings of the job that wrote the cache
    made: dict[str, Any]  # versions, device and first outputs of the teacher

    @property
    def shards(self) -> int:
        """Number of shards in a view."""
        return -(-self.samples // self.shard)

    @property
    def size(self) -> int:
        """Bytes of all views, without metadata."""
        return self.views * self.samples * (8 + sum(field.size for field in self.fields))

    def rows(self, shard: int) -> range:
        """The positions of a shard in the order of a view."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.samples))

    def names(self) -> list[tuple[int, int]]:
        """View and number of every shard."""
        return [(view, shard) for view in range(self.views) for shard in range(self.shards)]

    def text(self) -> bytes:
        """The bytes of `cache.json`."""
        return encoded({"format": FORMAT, **asdict(self)}, HEAD)


def folder_of(cache: Path, seed: int) -> Path:
    """Return the folder of the run with this seed."""
    return cache / f"seed{seed}"


def shard_name(view: int, shard: int) -> str:
    """The folder of a shard in that of the cache."""
    return f"view-{view:05d}/shard-{shard:05d}"


def positions_name(view: int) -> str:
    """The file of a view's positions."""
    return f"view-{view:05d}/{POSITIONS}"


def read_head(folder: Path) -> Head:
    """Read the head of a cache."""
    file = folder / HEAD
    if not os.path.isfile(file):  # false also for impossible names
        got = f"a folder without {HEAD}" if os.path.isdir(folder) else "no folder of that name"
        raise InputError(f"{folder} must be a teacher's cache for one seed.", got=got, do="See jacmatch cache --help.")
    with disk(folder, "readable"):
        raw = decoded(read(folder, file, _LARGEST), str(file))
    if raw.pop("format", None) != FORMAT:
        rule = f"{file} must be of format {FORMAT}, the one that this version reads."
        raise InputError(rule, do="Build the cache again with this version.")
    do = "It is damaged: copy it again, or build the cache again."
    with converted_errors(f"{file} must describe a cache.", do, of=(KeyError, TypeError, ValueError, OverflowError)):
        return _checked(raw)


def _checked(raw: Mapping[str, Any]) -> Head:
    """The head, if all in it is of the right type and in range."""
    fields = tuple(
        Field(str(each["name"]), str(each["dtype"]), tuple(int(size) for size in each["shape"]))
        for each in raw["fields"]
    )
    names = [field.name for field in fields]
    known = all(field.name in FIELDS and field.dtype in TYPES and min((*field.shape, 1)) > 0 for field in fields)
    if not known or len(set(names)) < len(names) or not {"ids", "outputs", "input_sums"} <= set(names):
        raise ValueError(f"fields {names}")
    sizes = {name: int(raw[name]) for name in ("samples", "views", "batch", "shard")}
    if min(sizes.values()) < 1 or sizes["shard"] % sizes["batch"]:
        raise ValueError(f"sizes {sizes}")

    def texts(name: str) -> dict[str, str]:
        return {str(key): str(value) for key, value in dict(raw[name]).items()}

    others: dict[str, Any] = {**sizes, "settings": dict(raw["settings"]), "made": dict(raw["made"])}
    return Head(texts("fingerprint"), texts("question"), fields, constant=bool(raw["constant"]), **others)


def fields_of(
    answer: Answer, question: Question, storage: Storage = "float32", alone: Answer | None = None
) -> tuple[Field, ...]:
    """Return the fields that are stored for each sample of such an answer.

    If the cotangents are computed from the values, outputs and values keep their dtype, because directions computed
    from rounded values would differ from those of the products. They are small compared with the products.

    `alone` is the answer without products: a network uses other kernels when it computes derivatives, so its
    outputs may be rounded in another way.
    """
    if storage not in get_args(Storage):
        raise unknown_name("`storage` of a cache (`--store`)", storage, get_args(Storage))
    if answer.features or question.layers or question.readout.layers:
        raise UnsupportedError("A cache stores outputs and products, no features. Use a readout of the outputs.")
    exact = str(answer.outputs.dtype).removeprefix("torch.")
    rounded = exact if storage == "float32" else storage
    of_outputs = exact if question.cotangents is not None else rounded
    fields = [Field("ids", "int64", ()), Field("outputs", of_outputs, tuple(answer.outputs.shape[1:]))]
    if not _same(answer.values, answer.outputs):
        fields.append(Field("values", of_outputs, tuple(answer.values.shape[1:])))
    if answer.products is not None:
        fields.append(Field("products", rounded, (len(answer.products), *answer.products.shape[2:])))
    if alone is not None and not _same(alone.outputs, answer.outputs):
        fields.append(Field("outputs_alone", rounded, tuple(answer.outputs.shape[1:])))
    fields.append(Field("input_sums", "float32", (_SUMS,)))
    if answer.products is not None:
        fields.append(Field("direction_sums", "float32", (_SUMS,)))
    return tuple(fields)


def rows_of(
    answer: Answer, x: Tensor, question: Question, fields: Sequence[Field], alone: Answer | None = None
) -> dict[str, Tensor]:
    """Return the rows of an answer, one for each sample, on the CPU."""
    assert question.ids is not None
    given: dict[str, Tensor | None] = {"ids": question.ids, "outputs": answer.outputs, "input_sums": sums(x)}
    given |= {"values": answer.values, "outputs_alone": None if alone is None else alone.outputs}
    if answer.products is not None:
        directions = answer.cotangents if question.tangents is None else question.tangents
        assert directions is not None
        given["products"] = answer.products.transpose(0, 1)
        given["direction_sums"] = sums(directions.transpose(0, 1))
    rows = {}
    for field in fields:
        tensor = given.get(field.name)
        if tensor is None or tuple(tensor.shape[1:]) != field.shape:
            got = "nothing" if tensor is None else f"shape {tuple(tensor.shape[1:])}"
            raise InputError(f"Every answer must have `{field.name}` of the shape {field.shape}.", got=got)
        rows[field.name] = stored = tensor.detach().to("cpu", TYPES[field.dtype]).contiguous()
        if stored.is_floating_point() and not stored.isfinite().all():
            remedy = "Use --store bfloat16 or float32." if field.dtype == "float16" else "Check the teacher."
            raise InputError(f"`{field.name}` of an answer must be finite as {field.dtype}.", do=remedy)
    return rows


def sums(x: Tensor) -> Tensor:
    """Return two fixed random projections of each sample, which identify it; (B, 2)."""
    flat = x.detach().flatten(1).float()
    return flat @ _weights(flat.shape[1]).to(flat.device)


@lru_cache(maxsize=8)
def _weights(count: int) -> Tensor:
    ids = torch.arange(_SUMS)
    return probes.directions("gaussian", seed=_SEED, ids=ids, draw=0, count=1, shape=(count,))[0].T.contiguous()


def unlike(x: Tensor, stored: Tensor) -> Tensor:
    """Return which samples have projections that differ from the stored ones by more than rounding; (B,)."""
    tolerance = _NEAR * x.detach().flatten(1).float().norm(dim=1, keepdim=True)
    apart: Tensor = (sums(x) - stored.to(x.device)).abs() > tolerance
    return apart.any(1)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


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
    "jacmatch.models.mlp.ProcessMean": "jacmatch.models.process_mean.ProcessMean",
}
"""Former modules of classes, which caches and checkpoints name."""
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
