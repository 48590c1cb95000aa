"""`jacmatch cache`: a teacher's answers on disk, for any number of students."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro

from jacmatch.datasets import Data
from jacmatch.errors import InputError
from jacmatch.jobs.cache.building import Crew, build, head_of, settled
from jacmatch.jobs.cache.checking import Found, check
from jacmatch.jobs.cache.opening import opened
from jacmatch.jobs.cache.source import Source, folder_of
from jacmatch.jobs.code import check_no_code
from jacmatch.jobs.data import load
from jacmatch.jobs.distillation_fields import TeachingFields
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.settings import positive
from jacmatch.teachers.cached.claims import Claims
from jacmatch.teachers.cached.layout import HEAD, Head, read_head
from jacmatch.teachers.cached.shards import Shards

_READ = 2048  # entries read to measure the speed
_BATCH = 128
_FREE = {*TeachingFields.no_settings, "action", "cache", "samples", "seed", "device"}  # of a check: no part of a cache


@dataclass(frozen=True)
class Cache(TeachingFields):
    """Keep a teacher's answers on disk: outputs and derivative products, for each sample and each view of it.

    `build` takes the flags of the `distill` that shall use the cache, and writes what that would ask; any number of
    processes may do it together, and the same command goes on where it was stopped. `check` asks the teacher again
    about a sample of the entries; with flags of `distill` it refuses a cache of another teacher, other data or another
    probe than they name. `info` says what is there.
    """

    main: ClassVar[str] = "cache data teacher student per_class seeds views store device smoke"
    examples: ClassVar[tuple[str, ...]] = (
        "build --cache answers --data npz:my.npz --teacher runs/teacher",
        "check --cache answers --samples 64",
    )

    together: ClassVar[bool] = False
    keeps: ClassVar[tuple[str, ...]] = (HEAD,)
    """What is worth keeping of a job that was stopped."""
    no_settings: ClassVar[tuple[str, ...]] = (*TeachingFields.no_settings, "action", "cache", "samples")

    action: Annotated[Literal["build", "check", "info"], tyro.conf.Positional] = "info"
    """build, check or info."""
    cache: Path | None = None
    """Folder of the cache."""
    store: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number type of what is stored. Outputs that directions are made of are never rounded."""
    shard_megabytes: float = 8.0
    """Size of a shard, at least one batch."""
    samples: int = 256
    """How many entries of each run `check` asks again."""

    def __post_init__(self) -> None:
        """The folder of the cache is the one that the job writes to."""
        super().__post_init__()
        if self.cache is None:
            rule = "`--cache` of `cache` must be given."
            raise InputError(rule, do=f"jacmatch cache {self.action} --cache DIR, and for build the flags of distill.")
        if self.devices != 1:
            rule = "`--devices` of `cache` must be left out: its processes need not know each other."
            raise InputError(rule, got=self.devices, do="Start torchrun, or several of the same command.")
        if self.out not in (None, self.cache):
            raise InputError("`--out` of `cache` must be left out: it writes to --cache.", got=str(self.out))
        object.__setattr__(self, "out", self.cache)

    @property
    def place(self) -> Path:
        """The folder of the cache."""
        assert self.cache is not None
        return self.cache

    def named(self, names: Iterable[str]) -> None:
        """Says which fields were given. If nobody does, they are those that differ from their defaults."""
        object.__setattr__(self, "_given", frozenset(names))

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were given and that decide what a cache holds."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _FREE}
        defaults = {field.name: field.default for field in fields(self)}
        names = getattr(self, "_given", None)
        if names is None:
            names = {name for name, value in chosen.items() if value != defaults[name]}
        return {name: value for name, value in chosen.items() if name in names}

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Does the job and returns what it found."""
        start = time.perf_counter()
        with progress or Progress() as shown:
            found = {"build": self._build, "check": self._check, "info": self._info}[self.action](shown)
        result = {"job": "cache", "action": self.action, "cache": str(self.place), **found}
        return {**result, "seconds": time.perf_counter() - start}

    def _build(self, progress: Progress) -> dict[str, Any]:
        positive("cache", samples=self.samples)
        if not self.shard_megabytes > 0:
            raise InputError("`--shard-megabytes` of `cache` must be above 0.", got=self.shard_megabytes)
        self.check_teaching()
        crew, data = Crew.here(), load(self.data, self.seed, self.smoke)
        with Claims(self.place).alone():  # one process trains the teacher, the others wait for it
            sources = self._sources(data, progress)
            heads = [head_of(source, self.store, self.shard_megabytes, self.settings()) for source in sources]
            heads = [
                settled(folder_of(self.place, source.seed), head) for source, head in zip(sources, heads, strict=True)
            ]
        whole = sum(len(head.names()) for head in heads)
        own = len(range(crew.rank, whole, crew.world))
        advance = progress.training(f"shards of {self.place}", own)
        start = time.perf_counter()
        counts = build(list(zip(sources, heads, strict=True)), self.place, crew, lambda done: advance(done, {}))
        seconds = time.perf_counter() - start
        return {"shards": {**counts.__dict__, "own": own, "all": whole}, "writing": seconds, **self._info(progress)}

    def _sources(self, data: Data, progress: Progress) -> list[Source]:
        teacher = self.taught_by(data, progress).network
        return [Source.of(self, data, teacher, seed) for seed in self.runs]

    def _check(self, progress: Progress) -> dict[str, Any]:
        positive("cache", samples=self.samples)
        job = self.as_built()
        sources = job._sources(load(job.data, job.seed, job.smoke), progress)
        found = Found()
        for source in sources:
            opened(self.place, source)
            check(source, self.place, self.samples, found, seed=self.seed)
        found.refuse(self.place)
        return {"entries": found.entries, "absolute": found.absolute, "relative": found.relative}

    def as_built(self) -> "Cache":
        """The job that wrote the cache, from its settings; what this one is given takes their place.

        Raises:
            InputError: There is no cache, its settings are none, or they would run code.
        """
        settings = read_head(self._parts()[0]).settings
        own = {field.name for field in fields(self)} - {"out", "cache", "action", "samples", "allow_code"}
        try:
            known: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in settings.items()
                if name in own
            }
            if known.get("teacher_weights") is not None:
                known["teacher_weights"] = Path(known["teacher_weights"])
            named = {name: value for name, value in known.items() if name not in self.given}
            known |= {**self.given, "device": self.device}
            job = Cache(**known, action="check", cache=self.cache, allow_code=self.allow_code)
            job.check_teaching()
        except (TypeError, ValueError) as error:
            rule = f"The settings in {self._parts()[0] / HEAD} must be those of a cache."
            raise InputError(rule, got=str(error), do="Build it again with this version.") from error
        if not self.allow_code:
            check_no_code("cache", named, f"the cache {self.place}")
        return job

    def _parts(self) -> list[Path]:
        """The folders of the runs, by seed."""
        found = [file.parent for file in self.place.glob(f"seed*/{HEAD}") if file.parent.name[4:].isdecimal()]
        if not found:
            got = f"a folder without seed0/{HEAD}" if self.place.is_dir() else "no folder of that name"
            do = "Make one: jacmatch cache build --cache DIR, with the flags of distill."
            raise InputError(f"{self.place} (`--cache`) must be a teacher's cache.", got=got, do=do)
        return sorted(found, key=lambda folder: int(folder.name[4:]))

    def _info(self, progress: Progress) -> dict[str, Any]:
        return {"parts": [_described(folder) for folder in self._parts()]}


def _described(folder: Path) -> dict[str, Any]:
    """What a part of a cache holds, for whom, how large, how fast."""
    shards = Shards(folder)
    head, missing = shards.head, shards.missing()
    entries = head.views * head.samples
    return {
        "seed": int(folder.name[4:]),
        "fingerprint": head.fingerprint,
        "question": head.question,
        "fields": {field.name: f"{field.dtype} {list(field.shape)}" for field in head.fields},
        "views": "one for all" if head.constant else head.views,
        "samples": head.samples,
        "entries": entries,
        "bytes": head.size,
        "bytes_per_entry": head.size / entries,
        "shards": len(head.names()),
        "missing": missing,
        "made": head.made,
        "reading": None if missing else _speed(shards, head),
    }


def _speed(shards: Shards, head: Head) -> dict[str, float]:
    """Entries read in a second from the first view: as they are stored, and at random; each after its checksums."""
    stored = shards.stored(0, min(_READ, head.samples))
    chosen = torch.randint(head.samples, (len(stored),), generator=torch.Generator().manual_seed(0))
    speeds = {}
    for name, ids in (("stored order", stored), ("random order", chosen)):
        for timed in (False, True):  # the first time reads and sums the shards
            start = time.perf_counter()
            for batch in torch.split(ids, _BATCH):
                shards.read(0, batch)
            if timed:
                speeds[name] = len(ids) / (time.perf_counter() - start)
    return speeds
