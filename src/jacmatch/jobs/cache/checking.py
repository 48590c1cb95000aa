"""Whether what a cache says is what the teacher says: a random sample of its entries is asked again."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.jobs.cache.source import Source, entries_at, folder_of, places_of
from jacmatch.teachers.cached.layout import TYPES
from jacmatch.teachers.cached.shards import Shards

ROUNDING = 1e-4
"""Differences up to this share of an entry's largest number come from the order of sums in another batch."""
_LISTED = 5


@dataclass
class Found:
    """What a check has found.

    Attributes:
        entries: How many entries were asked again.
        absolute: The largest difference in each field.
        relative: The same, divided by the largest number of the field in that entry.
        wrong: The entries that differ beyond rounding, with the fields and relative differences of each.
    """

    entries: int = 0
    absolute: dict[str, float] = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def refuse(self, cache: Path) -> None:
        """Nothing, if all entries are right.

        Raises:
            InputError: Some are not; it names them.
        """
        if self.wrong:
            more = f" and {len(self.wrong) - _LISTED} more" if len(self.wrong) > _LISTED else ""
            rule = f"The entries of {cache} must be what the teacher answers."
            named = [f"{entry} ({', '.join(fields)})" for entry, fields in list(self.wrong.items())[:_LISTED]]
            got = f"{len(self.wrong)} of {self.entries} beyond rounding: {', '.join(named)}{more}"
            raise InputError(rule, got=got, do="Remove the folder and build it again.")


def check(source: Source, cache: Path, samples: int, found: Found, *, seed: int = 0, strong: bool = True) -> None:
    """Asks the teacher again about a random sample of the entries of a run, and adds what it finds.

    An entry that differs by more than rounding is asked once more in the batch in which it was built: a kink of the
    network may lie between two ways to add the same numbers.

    Args:
        source: What was asked.
        cache: The folder of all runs.
        samples: How many entries.
        found: Where the findings go.
        seed: Of the sample.
        strong: Whether shards are compared with their SHA-256; else with CRC-32, once.

    Raises:
        InputError: A shard is missing or has other checksums.
    """
    shards = Shards(folder_of(cache, source.seed))
    total = shards.head.views * shards.head.samples
    chosen = torch.tensor(sorted(random.Random(seed).sample(range(total), min(samples, total))))
    places = {view: places_of(source, view) for view in set((chosen // shards.head.samples).tolist())}
    for view in sorted(places):
        ids = chosen[chosen // shards.head.samples == view] % shards.head.samples
        if strong:
            for shard in sorted(set((places[view][ids] // shards.head.shard).tolist())):
                shards.verify(view, shard, strong=True)
        for rows in torch.split(ids, shards.head.batch):
            _compare(source, shards, view, rows, places[view], found)


def _compare(source: Source, shards: Shards, view: int, ids: Tensor, places: Tensor, found: Found) -> None:
    """Compares entries that are asked in one batch."""
    stored, asked = shards.read(view, ids), _asked(source, shards, view, ids)
    found.entries += len(ids)
    for name in stored:
        if name == "ids":
            continue
        gaps, sizes = _gaps(stored[name], asked[name])
        room = _room(shards, name)
        for row in (gaps > room * sizes).nonzero().flatten().tolist():
            if name.endswith("_sums"):
                continue
            again = _in_its_batch(source, shards, view, int(places[ids[row]]))
            gaps[row], sizes[row] = (part[0] for part in _gaps(stored[name][row : row + 1], again[name]))
        shares = gaps / sizes.clamp_min(torch.finfo(torch.float64).tiny)
        found.absolute[name] = max(found.absolute.get(name, 0.0), float(gaps.max()))
        found.relative[name] = max(found.relative.get(name, 0.0), float(shares.max()))
        for row in (gaps > room * sizes).nonzero().flatten().tolist():
            entry = f"seed {source.seed} view {view} id {int(ids[row])}"
            found.wrong.setdefault(entry, []).append(f"{name} {float(shares[row]):.1e}")


def _room(shards: Shards, name: str) -> float:
    """The relative difference that rounding explains: one more step of a short number type."""
    kind = next(field.dtype for field in shards.head.fields if field.name == name)
    return ROUNDING + (2 * torch.finfo(TYPES[kind]).eps if kind in ("float16", "bfloat16") else 0.0)


def _gaps(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The largest difference and the largest number of each entry."""
    first, second = one.flatten(1).double(), other.flatten(1).double()
    return (first - second).abs().amax(1), torch.maximum(first.abs(), second.abs()).amax(1)


def _asked(source: Source, shards: Shards, view: int, ids: Tensor) -> dict[str, Tensor]:
    """The entries of samples as the teacher gives them now."""
    return source.entries(ids.to(source.train.x.device), view, shards.head.fields)


def _in_its_batch(source: Source, shards: Shards, view: int, place: int) -> dict[str, Tensor]:
    """The entry at a place, asked in the batch in which it was built."""
    start = place - place % shards.head.batch
    places = range(start, min(start + shards.head.batch, shards.head.samples))
    entries = entries_at(source, view, places, shards.head.fields)
    return {name: tensor[place - start : place - start + 1] for name, tensor in entries.items()}
