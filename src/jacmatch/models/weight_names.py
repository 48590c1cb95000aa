"""Which tensor of a file is which of a module: by name, or by structure where the names are those of another library.

Nothing is guessed: a tensor is taken for another one only where nothing else is possible. With several possibilities
nothing is loaded.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_COUNTERS = frozenset({"num_batches_tracked", "n_averaged", "total_ops", "total_params"})
_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow)([._]|$)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")

Pattern = str
"""Name of a layer with # for each number: `layer#.#.conv#`."""


@dataclass(frozen=True)
class Fit:
    """How the tensors of a set correspond to those of a module.

    Attributes:
        names: Name in the set by name in the module.
        key: Of the set, with the prefix of the names that correspond.
        renamed: Layers of the set by layers of the module, where they were matched by structure.
        unused: Names of the set that are not used.
    """

    names: dict[str, str]
    key: str
    renamed: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def average(self) -> bool:
        """Whether these are the running averages of weights."""
        return _AVERAGE.search(self.key) is not None


class Names:
    """The names of a module or of a set, without what wrappers (DDP, FSDP, torch.compile) add.

    Attributes:
        raw: The name as it is, by the name without.
        tensors: The tensors by the name without.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        bare = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in tensors}
        self.raw = bare if len(bare) == len(tensors) and "" not in bare else {name: name for name in tensors}
        self.tensors = {name: tensors[raw] for name, raw in self.raw.items()}

    def without(self, prefix: str) -> "Names":
        """Those below a prefix, without it."""
        part = Names({})
        part.raw = {name.removeprefix(prefix): raw for name, raw in self.raw.items() if name.startswith(prefix)}
        part.tensors = {name: self.tensors[prefix + name] for name in part.raw}
        return part

    def common_prefix(self) -> str:
        """The prefix that all names have, up to a dot."""
        folders = [name.split(".")[:-1] for name in self.raw if not counts_calls(name)]
        prefix = ""
        for parts in zip(*folders, strict=False):
            if len(set(parts)) > 1:
                break
            prefix += f"{parts[0]}."
        return prefix


def counts_calls(name: str) -> bool:
    """Whether a tensor of this name only counts calls: no output depends on it."""
    return name.rpartition(".")[2] in _COUNTERS


def tied_names(module: nn.Module) -> dict[str, str]:
    """For each tensor in the state dict of a module the first name of that very tensor."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: first.setdefault(id(value), name) for name, value in state.items() if isinstance(value, Tensor)}


def prefixes(own: Names, given: Names) -> list[str]:
    """What stands before names of the module in the set: "", `model.`, `ema_model.` …, the shortest first."""
    anchors = [name for name in own.raw if not counts_calls(name)][:2]  # one of two may be tied, and missing
    ends = {each.removesuffix(name) for name in anchors for each in given.raw if f".{each}".endswith(f".{name}")}
    return sorted(ends, key=lambda prefix: (prefix.count("."), prefix))


def by_name(own: Names, tied: Mapping[str, str], given: Names, key: str) -> list[Fit]:
    """Every way in which the names of the module, below one prefix, name tensors of the same shapes in the set.

    A set that has further tensors below that prefix is one of another architecture, unless they are the same names
    once more below a longer prefix, or averages as mmcv names them.

    Args:
        own: The names of the module, without a common prefix.
        tied: See `tied_names`.
        given: Those of the set.
        key: Of the set.
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
    """The one way in which the layers of a set can be those of the module under other names; none if it is not one.

    A layer is what owns tensors, and its signature their names and shapes (`weight`, `bias`, `running_mean` …). There
    must be as many layers of each signature on both sides. Those of one signature correspond if their names have one
    pattern on each side (`block#.layer#.conv#`), in the order of its numbers; where there are several, patterns that
    both sides have go together, and at most one may remain. The numbers must correspond level by level and in order.
    So `query, key, value` are never taken for `q, k, v`, although shapes and number agree.

    Args:
        own: As in `by_name`.
        tied: See `tied_names`.
        given: The names of the set.
        key: Of the set.
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
    """The same, where a tensor that the module has under several names is in the set under one of them."""
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
    """Layer of theirs by layer of ours; None if there is not exactly one way."""
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
