"""Writing a cache: by any number of processes, and on from wherever the last one stopped."""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jacmatch.errors import InputError
from jacmatch.files import UNFINISHED, inside
from jacmatch.jobs.cache.source import Source, entries_at, first_rows, folder_of, places_of
from jacmatch.jobs.cache.writing import write_shard
from jacmatch.runs.identity import COARSE, SINGLE, changed, probe
from jacmatch.teachers.cached.claims import Claims
from jacmatch.teachers.cached.entries import Storage, fields_of
from jacmatch.teachers.cached.fingerprint import described, differences
from jacmatch.teachers.cached.layout import HEAD, Head, disk, places_name, read_head, shard_name, write_whole
from jacmatch.teachers.cached.shards import Shards
from jacmatch.teachers.cached.teacher import agree
from jacmatch.version import __version__

_MEGABYTE = 1 << 20
_ON_GPU = 1e-4  # sums on a GPU have no fixed order


@dataclass
class Counts:
    """What a process did with its shards: wrote them, found them, found them damaged, or left them to another."""

    written: int = 0
    found: int = 0
    mended: int = 0
    left: int = 0


@dataclass(frozen=True)
class Crew:
    """Which of several processes this is; `torchrun` says it in the environment."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> "Crew":
        """This process.

        Raises:
            InputError: RANK and WORLD_SIZE are no numbers that go together.
        """
        given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not all(text.isdecimal() for text in given) or int(given[0]) >= int(given[1]):
            rule = "The environment's RANK must be a whole number below WORLD_SIZE."
            raise InputError(rule, got=f"{given[0]!r} and {given[1]!r}", do="torchrun sets both; else unset them.")
        return cls(int(given[0]), int(given[1]))


def head_of(source: Source, storage: Storage, megabytes: float, settings: dict[str, Any]) -> Head:
    """What the head of this cache says; the teacher is asked about the first batch for it, twice.

    Raises:
        InputError: The teacher does not say the same twice.
    """
    first, again = (source.answers(first_rows(source), 0) for _ in range(2))
    device = first.x.device
    if not agree(first.answer, again.answer, _ON_GPU if device.type == "cuda" else 0.0):
        rule = "The teacher of a cache must give the same answer twice."
        do = "Something in it is random, or it changes when it is asked: its answers cannot be kept."
        raise InputError(rule, got="two different answers about one batch", do=do)
    fields = fields_of(first.answer, first.question, storage, first.alone)
    size = source.batches.size
    each = sum(field.size for field in fields)
    batches = max(1, int(megabytes * _MEGABYTE) // (size * each))
    made = {"jacmatch": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    loose = SINGLE if device.type == "cpu" else COARSE
    made["outputs"] = probe(first.answer.outputs.double().flatten().tolist(), loose)  # of the first samples
    return Head(
        fingerprint=source.fingerprint,
        question=described(first.question),
        fields=fields,
        samples=len(source.train),
        views=source.views,
        constant=source.constant,
        batch=size,
        shard=size * min(batches, -(-len(source.train) // size)),
        settings=settings,
        made={**made, "device": str(device)},
    )


def settled(folder: Path, head: Head) -> Head:
    """The head of the cache in a folder, which is this one or has more views; a shorter one is made longer.

    Call it from one process at a time.

    Raises:
        InputError: Another cache lies there.
    """
    _remove_orphans(folder / HEAD)
    if (folder / HEAD).is_file():
        there = read_head(folder)
        found = differences(_compared(there), _compared(head))
        if not found and "outputs" in there.made:  # what leaves no trace in a fingerprint, a hook for instance
            found = changed({"teacher outputs": there.made["outputs"]}, {"teacher outputs": head.made["outputs"]})
        if found:
            rule = f"The folder {folder} (`--cache`) must be new, or hold this very cache."
            raise InputError(rule, got=f"one that differs in {found}", do="Choose another --cache.")
        if there.views >= head.views:
            return there
        head = replace(there, views=head.views, settings=head.settings)
    with disk(folder, "written to"):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder, HEAD, head.text())
    return head


def _compared(head: Head) -> dict[str, str]:
    """What may not differ between the cache that is there and the one that is asked for."""
    stored = {f"stored {field.name}": f"{field.dtype} {list(field.shape)}" for field in head.fields}
    asked = {f"asked {name}": value for name, value in head.question.items()}
    return {**head.fingerprint, **asked, **stored, "samples in a shard": str(head.shard)}


def build(
    sources: list[tuple[Source, Head]], cache: Path, crew: Crew, on_shard: Callable[[int], None] | None = None
) -> Counts:
    """Writes the shards of this process that are missing or damaged.

    A shard belongs to one process of the crew. Two that are not told of each other do not write the same shard at the
    same time: the second one leaves it.

    Args:
        sources: What is asked in each run, and the head of its cache.
        cache: The folder of all.
        crew: Which process this is.
        on_shard: Called with the number of shards that are done.
    """
    counts, number = Counts(), 0
    for source, head in sources:
        folder = folder_of(cache, source.seed)
        claims = Claims(folder)
        for place, (view, shard) in enumerate(head.names()):
            number += 1
            if (number - 1) % crew.world == crew.rank:
                with claims.alone():
                    _write_places(source, folder, head, view)
                with claims.on(place) as mine:
                    _one(source, folder, head, view, shard, counts if mine else None)
                    counts.left += not mine
                if on_shard is not None:
                    on_shard(sum(asdict(counts).values()))
    return counts


def _one(source: Source, folder: Path, head: Head, view: int, shard: int, counts: Counts | None) -> None:
    """One shard: found whole, or written."""
    if counts is None:
        return
    name = shard_name(view, shard)
    inside(folder, folder / name)
    _remove_orphans(folder / name)
    if (folder / name).exists():
        with contextlib.suppress(InputError):
            Shards(folder).verify(view, shard)
            counts.found += 1
            return
        with disk(folder, "written to"):
            shutil.rmtree(folder / name)
        counts.mended += 1
    else:
        counts.written += 1
    write_shard(folder, name, entries_at(source, view, head.rows(shard), head.fields))


def _remove_orphans(path: Path) -> None:
    """Removes what a killed process left of a file or a shard; call it where no other process writes that."""
    with disk(path.parent, "written to"):
        for orphan in path.parent.glob(f".{path.name}.*{UNFINISHED}"):
            if orphan.is_dir() and not orphan.is_symlink():
                shutil.rmtree(orphan)
            else:
                orphan.unlink()


def _write_places(source: Source, folder: Path, head: Head, view: int) -> None:
    """Writes where each sample stands in a view, once; one process at a time."""
    file = inside(folder, folder / places_name(view))
    _remove_orphans(file)
    with disk(folder, "written to"):
        if file.is_file() and file.stat().st_size == 8 * head.samples:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder, places_name(view), places_of(source, view).numpy().tobytes())
