"""Weights on disk: written as safetensors, and read from files of other libraries and training scripts."""

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, few, optional_package
from jacmatch.files import replace
from jacmatch.models import weight_files
from jacmatch.models.inputs import Statistics, statistics

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_COUNTERS = frozenset({"num_batches_tracked", "n_averaged", "total_ops", "total_params"})
_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow)([._]|$)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")

Pattern = str
"""Name of a layer with # for each number: `layer#.#.conv#`."""


@dataclass(frozen=True)
class Fit:
    """Correspondence between the tensors of a set and those of a module."""

    names: dict[str, str]  # name in the set by name in the module
    key: str  # of the set, with the prefix of the names that correspond
    # layers of the set by layers of the module, where they were matched by structure
    renamed: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # names of the set that are not used

    @property
    def average(self) -> bool:
        """Whether these are the running averages of weights."""
        return _AVERAGE.search(self.key) is not None


class Names:
    """The names of a module or of a set, without prefixes of wrappers (DDP, FSDP, torch.compile).

    Attributes:
        raw: The original name by the name without prefix.
        tensors: The tensors by the name without prefix.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        bare = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in tensors}
        self.raw = bare if len(bare) == len(tensors) and "" not in bare else {name: name for name in tensors}
        self.tensors = {name: tensors[raw] for name, raw in self.raw.items()}

    def without(self, prefix: str) -> "Names":
        """Return the names below a prefix, without the prefix."""
        part = Names({})
        part.raw = {name.removeprefix(prefix): raw for name, raw in self.raw.items() if name.startswith(prefix)}
        part.tensors = {name: self.tensors[prefix + name] for name in part.raw}
        return part

    def common_prefix(self) -> str:
        """The prefix that all names have, up to a dot."""
        folders = [name.split(".")[:-1] for name in self.raw if not counts_calls(name)]
        levels = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
        return "".join(f"{parts[0]}." for parts in levels)


def counts_calls(name: str) -> bool:
    """Return whether a tensor of this name only counts calls and does not affect outputs."""
    return name.rpartition(".")[2] in _COUNTERS


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return, for each tensor in the state dict of a module, the first name of the same tensor."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: first.setdefault(id(value), name) for name, value in state.items() if isinstance(value, Tensor)}


def prefixes(own: Names, given: Names) -> list[str]:
    """Return the prefixes of the module's names in the set: "", `model.`, `ema_model.` …, the shortest first."""
    anchors = [name for name in own.raw if not counts_calls(name)][:2]  # one of two may be tied, and missing
    ends = {each.removesuffix(name) for name in anchors for each in given.raw if f".{each}".endswith(f".{name}")}
    return sorted(ends, key=lambda prefix: (prefix.count("."), prefix))


def by_name(own: Names, tied: Mapping[str, str], given: Names, key: str) -> list[Fit]:
    """Return all prefixes with which the module's names exist in the set, with the same shapes.

    If the set has further tensors below that prefix, it has another architecture, unless these are the same names below
    a longer prefix, or averages as named by mmcv.
    """
    complete = {}
    for prefix in prefixes(own, given):
        part = given.without(prefix)
        names = {raw: part.raw[name] for name, raw in own.raw.items() if name in part.raw}
        names = _with_twins(names, own, tied)
        shapes = all(
            part.tensors[each].shape == own.tensors[each].shape
            for each in own.raw.keys() & part.raw.keys()
            if not counts_calls(each)
        )
        if shapes and all(raw in names or counts_calls(name) for name, raw in own.raw.items()):
            complete[prefix] = names
    averages = {f"ema_{name.replace('.', '_')}" for name in own.raw}
    result = []
    for prefix, names in complete.items():
        elsewhere = {raw for other, taken in complete.items() if other != prefix for raw in taken.values()}
        rest = {name: raw for name, raw in given.raw.items() if raw not in names.values() and not counts_calls(name)}
        strange = [
            name
            for name, raw in rest.items()
            if name.startswith(prefix) and raw not in elsewhere and name.removeprefix(prefix) not in averages
        ]
        if not strange:
            result.append(Fit(names, _joined(key, prefix), unused=tuple(rest.values())))
    return result


def by_structure(own: Names, tied: Mapping[str, str], given: Names, key: str) -> list[Fit]:
    """Return the only way to match the layers of a set to those of the module; None if it is not unique.

    A layer is a module that owns tensors. Its signature consists of their names and shapes (`weight`, `bias`,
    `running_mean` …). There must be as many layers of each signature on both sides. Layers of one signature are matched
    if their names have one pattern on each side (`block#.layer#.conv#`), in the order of the numbers. If there are
    several patterns, equal ones are matched, and at most one may remain. The numbers must correspond level by level and
    in order. `query, key, value` are therefore never matched with `q, k, v`, although shapes and number agree.
    """
    prefix = given.common_prefix()
    part = given.without(prefix)
    first = {name for name, raw in own.raw.items() if tied[raw] == raw}
    for names in ([*own.raw], [name for name in own.raw if name in first]):
        layers = _corresponding(_layers(names, own), _layers(part.raw, part))
        if layers is not None:
            break
    else:
        return []
    pairs = {}
    for name in names:
        layer, _, role = name.rpartition(".")
        if not counts_calls(name):
            pairs[own.raw[name]] = part.raw[_joined(layers[layer], role)]
    order = dict.fromkeys(name.rpartition(".")[0] for name in names if not counts_calls(name))
    renamed = {ours: layers[ours] for ours in order if ours != layers[ours]}
    return [Fit(_with_twins(pairs, own, tied), _joined(key, prefix), renamed)]


def _joined(*parts: str) -> str:
    return ".".join(filter(None, (part.strip(".") for part in parts)))


def _with_twins(names: dict[str, str], own: Names, tied: Mapping[str, str]) -> dict[str, str]:
    """Return the names, also for tied tensors that the set contains under another of their names."""
    twins = {tied[raw]: name for raw, name in names.items()}
    return {
        raw: names.get(raw, twins.get(tied[raw], "")) for raw in own.raw.values() if raw in names or tied[raw] in twins
    }


Signature = frozenset[tuple[str, tuple[int, ...]]]


def _layers(names: Iterable[str], of: Names) -> dict[str, Signature]:
    """Signatures by layer."""
    roles: dict[str, set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
    for name in names:
        if not counts_calls(name):
            layer, _, role = name.rpartition(".")
            roles[layer].add((role, tuple(of.tensors[name].shape)))
    return {layer: frozenset(parts) for layer, parts in roles.items()}


def _corresponding(ours: Mapping[str, Signature], theirs: Mapping[str, Signature]) -> dict[str, str] | None:
    """Map our layers to theirs; None if the match is not unique."""
    classes: list[tuple[list[str], list[str]]] = []
    for signature in {*ours.values(), *theirs.values()}:
        here, there = (_by_pattern(layers, signature) for layers in (ours, theirs))
        classes += [(here.pop(pattern), there.pop(pattern)) for pattern in here.keys() & there.keys()]
        if len(here) > 1 or len(here) != len(there):
            return None
        classes += list(zip(here.values(), there.values(), strict=True))
    if any(len(mine) != len(other) for mine, other in classes):
        return None
    pairs = [pair for mine, other in classes for pair in zip(mine, other, strict=True)]
    orders: dict[tuple[Pattern, Pattern], list[tuple[str, str]]] = defaultdict(list)
    for mine, other in pairs:
        orders[_pattern(mine), _pattern(other)].append((mine, other))
    return dict(pairs) if all(_one_order(group) for group in orders.values()) else None


def _one_order(pairs: list[tuple[str, str]]) -> bool:
    """Whether numbers correspond level by level, and in the same order: block 2 to block 2 with all that is in it."""
    numbers = [(_numbers(mine), _numbers(other)) for mine, other in sorted(pairs, key=lambda pair: _numbers(pair[0]))]
    if any(len(mine) != len(other) for mine, other in numbers):
        return False
    for level in range(1, len(numbers[0][0]) + 1):
        heads = [(tuple(mine[:level]), tuple(other[:level])) for mine, other in numbers]
        if not len(set(heads)) == len({mine for mine, _ in heads}) == len({other for _, other in heads}):
            return False
    return [other for _, other in numbers] == sorted(other for _, other in numbers)


def _by_pattern(layers: Mapping[str, Signature], signature: Signature) -> dict[Pattern, list[str]]:
    """The layers of a signature by pattern, each in the order of the numbers."""
    classes: dict[Pattern, list[str]] = defaultdict(list)
    for layer, own in layers.items():
        if own == signature:
            classes[_pattern(layer)].append(layer)
    return {pattern: sorted(names, key=_numbers) for pattern, names in classes.items()}


def _pattern(layer: str) -> Pattern:
    return _NUMBER.sub("#", layer)


def _numbers(layer: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(layer)]


_SPACE = 2**27  # bytes that a file of weights may have beyond four times those of the module
_LARGEST = 2**36  # bytes of a file that is converted without a module to compare with


def save_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write parameters and buffers to a safetensors file, atomically.

    Raises:
        InputError: The name does not end in `.safetensors`, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError("`path` of `save_weights` must end in `.safetensors`.", got=f"`{target}`")
    safetensors = optional_package("safetensors.torch", "`save_weights`", "pip install 'jacmatch[train]'")
    _write(target, module.state_dict(), safetensors)


def _write(target: Path, state: Mapping[str, Tensor], safetensors: Any) -> None:
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    try:
        replace(target, safetensors.save(tensors, metadata={"format": "pt"}))
    except OSError as error:
        rule = "`path` of `save_weights` must be a file in a folder that exists and can be written."
        raise InputError(rule, got=f"`{target}` ({error.strerror})") from error


def convert_weights(source: str | os.PathLike[str], target: str | os.PathLike[str], *, key: str | None = None) -> None:
    """Write the weights of any file that `load_weights` reads as a safetensors file, without running code.

    Args:
        source: A torch checkpoint, an index of several files, a Hugging Face folder, …
        target: The file to write; its name must end in `.safetensors`.
        key: The set of tensors to use if the file has several: `model`, `ema`, …

    Raises:
        InputError: The source cannot be read, it has several sets of weights and `key` names none of them, or the
            target cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"epoch": 240, "model": nn.Linear(3, 2).state_dict()}, folder / "last.pth")
        >>> convert_weights(folder / "last.pth", folder / "last.safetensors")
        >>> load_weights(nn.Linear(3, 2), folder / "last.safetensors")
    """
    path, goal = Path(source), Path(target)
    if goal.suffix != ".safetensors":
        raise InputError("`target` of `convert_weights` must end in `.safetensors`.", got=f"`{goal}`")
    safetensors = optional_package("safetensors.torch", "`convert_weights`", "pip install 'jacmatch[train]'")
    sets = weight_files.read(path, _LARGEST, allow_pickle=True)
    if not sets:
        raise InputError(f"`{path}` must contain named tensors.", got="none")
    if key is not None:
        chosen = key
    else:
        most = max(len(tensors) for tensors in sets.values())
        large = [Fit({}, each) for each, tensors in sets.items() if 2 * len(tensors) >= most]
        chosen = _one_of(path, large, "convert_weights").key
    if chosen not in sets:
        rule = f"`key` of `convert_weights` must name a set of weights in `{path}`."
        raise InputError(rule, got=repr(key), do=_known(sets))
    _check_plain(path, sets[chosen])
    _write(goal, sets[chosen], safetensors)


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    mean: Statistics = None,
    std: Statistics = None,
    allow_pickle: bool = False,
    key: str | None = None,
) -> None:
    """Copy weights from a file into a module: every parameter and buffer, or none of them.

    Files of other libraries can be read. Prefixes of wrappers and training scripts (`module.`, `_orig_mod.`, `model.`,
    `ema_model.` …) are ignored, tied weights may be stored once, and counters of BatchNorm may be missing. If names
    differ, layers are matched by structure if the match is unique (`by_structure`), with a warning. Weights of other
    libraries do not contain `mean` and `std`, so both must be given: with preprocessing that differs from training, a
    network loses tens of points of accuracy without an error.

    Args:
        module: A model with the architecture of the weights.
        path: A `.safetensors` file, an index of several (`model.safetensors.index.json`), a folder that contains one of
            these, an `.npz` file, or a torch checkpoint (with `allow_pickle`).
        mean: Mean of the input normalization of these weights, if the file does not contain it.
        std: Standard deviation of the input normalization of these weights, if the file does not contain it.
        allow_pickle: Whether torch checkpoints (`.pt`, `.pth`, `.bin`, `.ckpt`, `.pth.tar`) may be read, with
            `torch.load(weights_only=True)`: tensors are read, and no code in the file is run.
        key: The set of weights to use if several in the file fit: `model`, `ema`, `state_dict.student`, …

    Raises:
        InputError: The file is missing, damaged, far larger than the module, cannot be read without running code, or
            holds other weights; the match of tensors is not unique; or `mean` and `std` are missing, or given although
            the file has them.

    Warns:
        UserWarning: Layers were matched by structure, one of several sets was chosen, or tensors were not used.
    """
    source = Path(path)
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    largest = _SPACE + 4 * sum(value.numel() * value.element_size() for value in own.values())
    sets = weight_files.read(source, largest, allow_pickle=allow_pickle)
    scaled = {"mean", "std"} <= Names(own).raw.keys()
    fit, scaling = _fit(module, own, sets, source, key, scaled=scaled), {}
    if scaled and not any(Names({name: own[name]}).raw.keys() & {"mean", "std"} for name in fit.names):
        scaling = _scaling(module, own, source, mean, std)
    elif mean is not None or std is not None:
        rule = "`mean` and `std` of `load_weights` must not be given for a file that contains them."
        raise InputError(rule, do="Leave them out.")
    tensors = _tensors(fit, sets)
    weights = {name: _converted(source, name, tensors[given], own[name]) for name, given in fit.names.items()}
    _check_tied(module, source, weights)
    module.load_state_dict({**module.state_dict(), **scaling, **weights})
    _warn(source, fit, [tensors[name].dtype for name in fit.names.values()])


def output_counts(
    path: str | os.PathLike[str], module: nn.Module, wider: nn.Module, *, allow_pickle: bool = False
) -> list[int]:
    """Return the possible numbers of outputs of the weights in a file, the most likely first; empty if unknown.

    Only the last layer differs between a module and one with more outputs. The number of outputs in the file is that of
    a tensor of the same name, or of one whose shape differs only in the first dimension.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "w.safetensors"
        >>> save_weights(nn.Linear(3, 1000), file)
        >>> output_counts(file, nn.Linear(3, 2), nn.Linear(3, 4))
        [1000]
    """
    own, other = (each.state_dict() for each in (module, wider))
    largest = _SPACE + 4 * sum(value.numel() * value.element_size() for value in own.values()) + 2**30
    heads = {name: value for name, value in own.items() if value.dim() > 1 and value.shape != other[name].shape}
    counts: dict[int, int] = {}
    for tensors in weight_files.read(Path(path), largest, allow_pickle=allow_pickle).values():
        for given, value in tensors.items():
            for name, head in heads.items():
                if value.dim() == head.dim() and value.shape[1:] == head.shape[1:]:
                    named = given.endswith(".".join(name.split(".")[-2:]))
                    counts[len(value)] = min(counts.get(len(value), 1), 0 if named else 1)
    return sorted(counts, key=lambda count: counts[count])


def _tensors(fit: Fit, sets: weight_files.Sets) -> dict[str, Tensor]:
    """The set that a fit is of; its key begins with that of the set."""
    keys = [key for key, tensors in sets.items() if f"{fit.key}.".startswith(f"{key}." if key else "")]
    fitting = [key for key in keys if set(fit.names.values()) <= sets[key].keys()]
    return sets[max(fitting, key=len)]


def _fit(
    module: nn.Module,
    own: Mapping[str, Tensor],
    sets: weight_files.Sets,
    source: Path,
    key: str | None,
    *,
    scaled: bool,
) -> Fit:
    """Return how the file fits the module, with or without `mean` and `std`, first by names, then by structure."""
    tied = tied_names(module)
    names = [Names(own)]
    if scaled:
        names.append(Names({raw: own[raw] for name, raw in names[0].raw.items() if name not in ("mean", "std")}))
    for match in (by_name, by_structure):
        for view in names:
            view = view.without(view.common_prefix())
            fits = [fit for each, tensors in sets.items() for fit in match(view, tied, Names(tensors), each)]
            if key is not None:
                fits = [fit for fit in fits if fit.key == key]
            if fits:
                return _one_of(source, fits, "load_weights")
    if key is not None and key not in sets:
        known = _known(sets) if sets else ""
        raise InputError(f"`key` of `load_weights` must name a set of weights in `{source}`.", got=repr(key), do=known)
    chosen = {key: sets[key]} if key is not None else sets
    raise _differences(module, names, chosen, source)


def _known(sets: Mapping[str, object]) -> str:
    return f"Known: {few([repr(key) for key in sets], 8)}."


def _one_of(source: Path, fits: list[Fit], caller: str) -> Fit:
    """The only fit, or the only one that is no running average."""
    plain = [fit for fit in fits if not fit.average] if len(fits) > 1 else fits
    if len(plain) != 1:
        rule = f"`{source}` must contain one set of weights, or `key` of `{caller}` must name one."
        names = [repr(fit.key) for fit in fits]
        raise InputError(rule, got=few(names, 8), do=f"Give for example key={names[0]}.")
    others = [repr(fit.key) for fit in fits if fit is not plain[0]]
    if others:
        text = f"`{source}` has several sets of weights: {plain[0].key!r} is taken, not {few(others)}."
        warnings.warn(f"{text} `key` of `{caller}` chooses another.", stacklevel=4)
    return plain[0]


def _scaling(
    module: nn.Module, own: Mapping[str, Tensor], source: Path, mean: Statistics, std: Statistics
) -> dict[str, Tensor]:
    """The buffers `mean` and `std` for weights that have none."""
    if mean is None or std is None:
        raise InputError(
            f"`{source}` must contain `mean` and `std`, by which the input of its weights is normalized.",
            do="Give both: --mean 0 --std 1 (in Python `mean=(0.0,), std=(1.0,)`) if they were trained on inputs in "
            "[0, 1]; for a teacher --teacher-mean and --teacher-std; for `compare` save a run by train --weights.",
        )
    raw = Names(own).raw
    buffers = statistics("load_weights", tuple(own[raw["mean"]].shape[1:]), mean, std)
    return {raw["mean"]: buffers[0], raw["std"]: buffers[1]}


def _check_plain(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is not an ordinary tensor in memory."""
    odd = [
        name
        for name, value in tensors.items()
        if type(value) not in (Tensor, nn.Parameter)
        or (value.layout, value.device.type, value.is_quantized) != (torch.strided, "cpu", False)
    ]
    if odd:
        rule = f"`{source}` must contain ordinary tensors."
        raise InputError(rule, got=f"sparse, quantized or empty ones: {few(odd)}", do="Convert it to floats first.")


def _converted(source: Path, name: str, given: Tensor, own: Tensor) -> Tensor:
    """The tensor in the type of the module's, which must be able to hold it."""
    _check_plain(source, {name: given})
    try:
        floats = own.is_floating_point() or own.is_complex()
        if floats and not (given.is_floating_point() or (own.is_complex() and given.is_complex())):
            rule = f"`{source}` must contain weights of a float type."
            got = f"{str(given.dtype).removeprefix('torch.')} in {name}"
            raise InputError(rule, got=got, do="Quantized weights must be converted to floats first.")
        wide = given.float() if given.is_floating_point() and given.element_size() == 1 else given
        if (wide.is_floating_point() or wide.is_complex()) and not wide.isfinite().all():
            raise InputError(f"`{source}` must contain finite weights.", got=f"NaN or infinity in {name}")
        value = wide.to(own.dtype)
    except (NotImplementedError, RuntimeError) as error:  # types of 4 bits, which torch only stores
        got = f"{str(given.dtype).removeprefix('torch.')} in {name}"
        raise InputError(f"`{source}` must contain weights whose dtype can be converted.", got=got) from error
    exact = value.isfinite().all() if floats else torch.equal(value.to(wide.dtype), wide)
    if not exact:
        rule = f"`{source}` must contain values that {str(own.dtype).removeprefix('torch.')} can hold."
        raise InputError(rule, got=f"larger ones in {name}" if floats else f"others in {name}")
    return value


def _check_tied(module: nn.Module, source: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse two values for one tensor of the module."""
    for name, first in tied_names(module).items():
        if name != first and name in weights and not torch.equal(weights[name], weights[first]):
            rule = f"`{source}` must contain equal tensors {first} and {name}, which this module ties."
            raise InputError(rule, got="different ones", do="Build the model without tied weights.")


def _warn(source: Path, fit: Fit, types: list[torch.dtype]) -> None:
    """Warn about what was inferred, and what the file does not have."""
    small = sorted(
        {str(each).removeprefix("torch.") for each in types if each.is_floating_point and each.itemsize == 1}
    )
    if small:
        warnings.warn(f"`{source}` has weights in {', '.join(small)}: rounded to 2 or 3 bits.", stacklevel=3)
    if fit.renamed:
        pairs = [f"{theirs} → {ours}" for ours, theirs in fit.renamed.items()]
        warnings.warn(
            f"`{source}` names its layers differently; they were matched by structure: {few(pairs)}. Measure the "
            "accuracy (`jacmatch evaluate`) before you rely on it.",
            stacklevel=3,
        )
    if fit.unused:
        warnings.warn(f"`{source}` has unused tensors: {few(list(fit.unused))}.", stacklevel=3)


def _differences(module: nn.Module, names: list[Names], sets: weight_files.Sets, source: Path) -> InputError:
    """Return an error that says why the nearest set of weights does not fit."""
    rule = f"`{source}` must contain the weights of this {type(module).__name__}."
    if not sets:
        return InputError(rule, got="no named tensors")
    options = []
    for tensors in sets.values():
        given = Names(tensors)
        for view in names:
            own = view.without(view.common_prefix())
            for prefix in dict.fromkeys(["", given.common_prefix(), *prefixes(own, given)]):
                part = given.without(prefix)
                options.append(
                    (len(own.raw.keys() & part.raw.keys()) - len(own.raw.keys() ^ part.raw.keys()), own, part)
                )
    _, own, part = max(options, key=lambda option: option[0])
    missing = [name for name in own.raw if name not in part.raw and not counts_calls(name)]
    unknown = [name for name in part.raw if name not in own.raw and not counts_calls(name)]
    other = [name for name in own.raw if name in part.raw and part.tensors[name].shape != own.tensors[name].shape]
    shapes = [f"{name} {tuple(part.tensors[name].shape)}, must be {tuple(own.tensors[name].shape)}" for name in other]
    lists = (("missing", missing), ("not in the model", unknown), ("of another shape", shapes))
    got = "; ".join(f"{what}: {few(each)}" for what, each in lists if each) or "tensors that fit in several ways"
    return InputError(rule, got=got, do=_remedy(source, own, part, missing + unknown, other))


def _remedy(source: Path, own: Names, part: Names, names: list[str], other: list[str]) -> str:
    """Return the remedy for weights that do not fit."""
    if weight_files.SHARD.search(source.name):
        return "The name says that it is one file of several: name their index, or the folder."
    heads = {(part.tensors[name].shape[:1], own.tensors[name].shape[:1]) for name in other}
    rest = all(part.tensors[name].shape[1:] == own.tensors[name].shape[1:] for name in other)
    if not names and len(heads) == 1 and rest and len(other) <= 2 and all(heads):
        theirs, ours = (int(shape[0]) for shape in next(iter(heads)) if shape)
        return (
            f"These weights have {theirs} outputs and the model {ours}. To fine-tune them for other classes: jacmatch "
            f"train --weights {source}; as a teacher of other classes: jacmatch transfer --teacher-weights {source} "
            f"--teacher-outputs {theirs}."
        )
    if names and not other and _alike(own, part):
        return (
            "As many tensors have the same shapes, but their names leave open which is which: name the model of the "
            "library that wrote them (torchvision:NAME, timm:NAME, hf:DIR), or rename them."
        )
    return "Build the model they were trained in, with the same number of outputs and the same input shape."


def _alike(own: Names, part: Names) -> bool:
    """Whether both have as many tensors of each shape."""
    ours, theirs = (
        sorted(tuple(value.shape) for name, value in each.tensors.items() if not counts_calls(name))
        for each in (own, part)
    )
    return ours == theirs
