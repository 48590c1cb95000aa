"""`jacmatch cache`: store a teacher's outputs and Jacobian products on disk, for any number of students.

The format, its reader and its writer are in `jacmatch.teachers.cached`; here are the queries of a job and the verb.
"""

import hashlib
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from torch import Tensor, nn

from jacmatch.datasets import Data, Split
from jacmatch.datasets.streamed import Streamed
from jacmatch.errors import InputError, few
from jacmatch.jobs.distill import TeachingFields
from jacmatch.jobs.settings import check_no_code, load, positive
from jacmatch.jobs.study import Progress
from jacmatch.teachers import CachedTeacher, ModuleTeacher, Question
from jacmatch.teachers.base import query
from jacmatch.teachers.cached.format import HEAD, TYPES, Head, digest, folder_of, of_teacher, read_head, words
from jacmatch.teachers.cached.reader import Shards
from jacmatch.teachers.cached.writer import Answers, Claims, Queries, build, head_of, resolve_head
from jacmatch.training import Batches, find_device
from jacmatch.training.distributed import rank_and_size

ROUNDING = 1e-4
"""Relative differences up to this come from another order of summation."""
_TRIED = 4
"""Entries of each run that are compared when a cache is opened: fingerprints may miss changed code."""
_READ = 2048  # entries read to measure the speed
_BATCH = 128
_FREE = {*TeachingFields.no_settings, "action", "cache", "samples", "seed", "device"}  # may differ in a check


def queries_of(job: TeachingFields, data: Data, teacher: nn.Module, seed: int) -> Queries:
    """Return the queries of the run with this seed; the student of its objective is a placeholder."""
    methods = [method for method in job.methods if method != "labels"]
    if not methods:
        raise InputError("`--cache` needs a method that queries the teacher.", got="--methods labels")
    products = "jacobians" in methods
    alone = products and ("outputs" in methods or job.every > 1)  # whether outputs without products are queried too
    train, _ = job.parts(data, job.samples_per_class(data), seed)
    source, training = ModuleTeacher(teacher), job.training()
    objective = job.objective("jacobians" if products else "outputs", nn.Linear(1, 1), source, train, data, seed)
    partners, device = objective.needs_partners, find_device(job.device)
    size, augment = training.batch_size, training.augment
    batches = Batches(train, size, seed=seed, augment=augment, partners=partners, device=device)

    def question(rows: Tensor, view: int) -> tuple[Tensor, Question]:
        batch = batches.of(rows, view)
        others = {"partners": batch.partners, "partner_labels": batch.partner_labels}
        return objective.question(batch.x, batch.y, ids=batch.ids, draw=view, products=products, **others)

    def answers(rows: Tensor, view: int) -> Answers:
        x, whole = question(rows, view)
        answer = query(source, x, whole)
        if not alone:
            return Answers(x, whole, answer)
        less = replace(whole, cotangents=None, tangents=None, step=None, rule=None)
        return Answers(x, whole, answer, query(source, x, less))

    constant = not augment and not question(batches.order(0)[:1], 0)[1].random
    epochs = -(-training.steps * training.accumulate // (len(train) // batches.size))
    views = 1 if constant else min(training.views or epochs, epochs)
    settings = objective.differentiation
    fingerprint = {
        **of_teacher(source),
        "data": _of_split(train),
        "samples": str(len(train)),
        "augmentation": ", ".join(augment) or "none",
        "batch size": str(batches.size),
        "seed": str(seed),
        "point": words(settings.point, "point"),
        "readout": words(settings.teacher_readout, "readout"),
        "probe": f"{words(settings.probe, 'probe')} on the {settings.side} side" if products else "none",
    }
    return Queries(seed, len(train), batches.size, views, constant, fingerprint, batches.order, answers)


def _of_split(split: Split) -> str:
    """Return a digest of all samples in their order; for streamed images, `Streamed.digest`."""
    if isinstance(split.x, Streamed):
        return hashlib.sha256(f"{split.x.digest()} {digest(('y', split.y))}".encode()).hexdigest()
    return digest(("x", split.x), ("y", split.y))


@dataclass
class Comparison:
    """Differences between stored entries and the current answers of a teacher."""

    entries: int = 0  # number of entries compared
    absolute: dict[str, float] = field(default_factory=dict)  # the largest difference in each field
    # the same, divided by the largest number of the field in that entry
    relative: dict[str, float] = field(default_factory=dict)
    # the entries that differ by more than rounding, with fields and relative differences
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def refuse(self, cache: Path) -> None:
        """Raise an `InputError` that lists the wrong entries, if there are any."""
        if self.wrong:
            rule = f"The entries of {cache} must equal the teacher's current answers."
            named = [f"{entry} ({', '.join(fields)})" for entry, fields in self.wrong.items()]
            got = f"{len(self.wrong)} of {self.entries} differ by more than rounding: {few(named, 5)}"
            raise InputError(rule, got=got, do="Remove the folder and build it again.")


def check(
    source: Queries, cache: Path, samples: int, comparison: Comparison, *, seed: int = 0, strong: bool = True
) -> None:
    """Query the teacher for random entries of a run, and add the differences to a comparison.

    An entry that differs by more than rounding is queried again in the batch in which it was built: a ReLU may switch
    between two orders of summation.
    """
    shards = Shards(folder_of(cache, source.seed))
    total = shards.head.views * shards.head.samples
    chosen = torch.tensor(sorted(random.Random(seed).sample(range(total), min(samples, total))))
    positions = {view: source.positions_of(view) for view in set((chosen // shards.head.samples).tolist())}
    for view in sorted(positions):
        ids = chosen[chosen // shards.head.samples == view] % shards.head.samples
        if strong:
            for shard in sorted(set((positions[view][ids] // shards.head.shard).tolist())):
                shards.verify(view, shard, strong=True)
        for rows in torch.split(ids, shards.head.batch):
            _compare(source, shards, view, rows, positions[view], comparison)


def _compare(
    source: Queries, shards: Shards, view: int, ids: Tensor, positions: Tensor, comparison: Comparison
) -> None:
    """Compare the stored entries of one batch."""
    stored = shards.read(view, ids)
    current = source.entries(ids.to(source.order(view).device), view, shards.head.fields)
    comparison.entries += len(ids)
    for name in stored:
        if name == "ids":
            continue
        gaps, sizes = _gaps(stored[name], current[name])
        tolerance = _tolerance(shards, name)
        for row in (gaps > tolerance * sizes).nonzero().flatten().tolist():
            if name.endswith("_sums"):
                continue
            again = _in_its_batch(source, shards, view, int(positions[ids[row]]))
            gaps[row], sizes[row] = (part[0] for part in _gaps(stored[name][row : row + 1], again[name]))
        shares = gaps / sizes.clamp_min(torch.finfo(torch.float64).tiny)
        comparison.absolute[name] = max(comparison.absolute.get(name, 0.0), float(gaps.max()))
        comparison.relative[name] = max(comparison.relative.get(name, 0.0), float(shares.max()))
        for row in (gaps > tolerance * sizes).nonzero().flatten().tolist():
            entry = f"seed {source.seed} view {view} id {int(ids[row])}"
            comparison.wrong.setdefault(entry, []).append(f"{name} {float(shares[row]):.1e}")


def _tolerance(shards: Shards, name: str) -> float:
    """The relative difference that rounding explains: one more step of a short number type."""
    kind = next(field.dtype for field in shards.head.fields if field.name == name)
    return ROUNDING + (2 * torch.finfo(TYPES[kind]).eps if kind in ("float16", "bfloat16") else 0.0)


def _gaps(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest difference and the largest magnitude of each entry."""
    first, second = one.flatten(1).double(), other.flatten(1).double()
    return (first - second).abs().amax(1), torch.maximum(first.abs(), second.abs()).amax(1)


def _in_its_batch(source: Queries, shards: Shards, view: int, position: int) -> dict[str, Tensor]:
    """Return the entry at a position, queried in the batch in which it was built."""
    start = position - position % shards.head.batch
    positions = range(start, min(start + shards.head.batch, shards.head.samples))
    entries = source.entries_at(view, positions, shards.head.fields)
    return {name: tensor[position - start : position - start + 1] for name, tensor in entries.items()}


def opened(cache: Path, source: Queries) -> CachedTeacher:
    """Return the teacher of a run from its cache."""
    return CachedTeacher(folder_of(cache, source.seed), expected=source.fingerprint, views=source.views)


def cached_teachers(job: TeachingFields, cache: Path, data: Data, teacher: nn.Module) -> dict[int, CachedTeacher]:
    """Return the cached teacher of each run of a job, by seed; a few entries are compared with the live teacher."""
    teachers, comparison = {}, Comparison()
    for seed in job.runs:
        source = queries_of(job, data, teacher, seed)
        teachers[seed] = opened(cache, source)
        check(source, cache, _TRIED, comparison, strong=False)
    comparison.refuse(cache)
    return teachers


@dataclass(frozen=True)
class Cache(TeachingFields):
    """Store a teacher's outputs and Jacobian products on disk, for each sample and each of its views.

    `build` takes the options of the `distill` command that will use the cache. Several processes can build one cache
    together; run the command again to resume a build. `check` compares some entries with the teacher. With options of
    `distill`, it refuses a cache that was built for another teacher, data set or probe. `info` describes the cache.
    """

    main: ClassVar[str] = "cache data teacher student per_class seeds views store device smoke"
    examples: ClassVar[tuple[str, ...]] = (
        "build --cache answers --data npz:my.npz --teacher runs/teacher",
        "check --cache answers --samples 64",
    )

    together: ClassVar[bool] = False
    keeps: ClassVar[tuple[str, ...]] = (HEAD,)
    """Files of an interrupted job for which its folder is not removed."""
    no_settings: ClassVar[tuple[str, ...]] = (*TeachingFields.no_settings, "action", "cache", "samples")

    action: Annotated[Literal["build", "check", "info"], tyro.conf.Positional] = "info"
    """build, check or info."""
    cache: Path | None = None
    """Folder of the cache."""
    store: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type in the cache. Outputs from which a probe computes its directions are always stored in full
    precision."""
    shard_megabytes: float = 8.0
    """Size of a shard in MB; a shard has at least one batch."""
    samples: int = 256
    """Number of entries of each run that `check` compares."""

    def __post_init__(self) -> None:
        """Use the folder of the cache as `out`."""
        super().__post_init__()
        if self.cache is None:
            rule = "`--cache` of `cache` must be given."
            do = f"Write jacmatch cache {self.action} --cache DIR. `cache build` also takes the options of distill."
            raise InputError(rule, do=do)
        if self.devices != 1:
            rule = "`--devices` of `cache` must be left out: its processes work independently."
            do = "Start it with torchrun, or start the same command several times."
            raise InputError(rule, got=self.devices, do=do)
        if self.out not in (None, self.cache):
            raise InputError("`--out` of `cache` must be left out: it writes to --cache.", got=str(self.out))
        object.__setattr__(self, "out", self.cache)

    @property
    def root(self) -> Path:
        """The folder of the cache."""
        assert self.cache is not None
        return self.cache

    def named(self, names: Iterable[str]) -> None:
        """Set the fields that the user gave; without this call, they are those that differ from their defaults."""
        object.__setattr__(self, "_given", frozenset(names))

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were given and that determine the content of a cache."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _FREE}
        defaults = {field.name: field.default for field in fields(self)}
        names = getattr(self, "_given", None)
        if names is None:
            names = {name for name, value in chosen.items() if value != defaults[name]}
        return {name: value for name, value in chosen.items() if name in names}

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Do the job, and return its result."""
        start = time.perf_counter()
        with progress or Progress() as shown:
            result = {"build": self._build, "check": self._check, "info": self._info}[self.action](shown)
        result = {"job": "cache", "action": self.action, "cache": str(self.root), **result}
        return {**result, "seconds": time.perf_counter() - start}

    def _build(self, progress: Progress) -> dict[str, Any]:
        positive("cache", samples=self.samples)
        if not self.shard_megabytes > 0:
            raise InputError("`--shard-megabytes` of `cache` must be above 0.", got=self.shard_megabytes)
        self.check_teaching()
        (rank, size), data = rank_and_size(), load(self.data, self.seed, self.smoke, tests=False)
        with Claims(self.root).alone():  # one process trains the teacher, the others wait for it
            sources = self._sources(data, progress)
            heads = []
            for source in sources:
                head = head_of(source, self.store, self.shard_megabytes, self.settings())
                heads.append(resolve_head(folder_of(self.root, source.seed), head))
        whole = sum(len(head.names()) for head in heads)
        own = len(range(rank, whole, size))
        advance = progress.training(f"shards of {self.root}", own)
        start = time.perf_counter()
        counts = build(list(zip(sources, heads, strict=True)), self.root, rank, size, lambda done: advance(done, {}))
        seconds = time.perf_counter() - start
        return {"shards": {**counts.__dict__, "own": own, "all": whole}, "writing": seconds, **self._info(progress)}

    def _sources(self, data: Data, progress: Progress) -> list[Queries]:
        teacher = self.taught_by(data, progress).network
        return [queries_of(self, data, teacher, seed) for seed in self.runs]

    def _check(self, progress: Progress) -> dict[str, Any]:
        positive("cache", samples=self.samples)
        job = self.as_built()
        sources = job._sources(load(job.data, job.seed, job.smoke), progress)
        comparison = Comparison()
        for source in sources:
            opened(self.root, source)
            check(source, self.root, self.samples, comparison, seed=self.seed)
        comparison.refuse(self.root)
        return {"entries": comparison.entries, "absolute": comparison.absolute, "relative": comparison.relative}

    def as_built(self) -> "Cache":
        """Return the job that built the cache, from its stored settings; fields that are given override them.

        Raises:
            InputError: There is no cache, its settings are damaged, or they name code outside the package.
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
            check_no_code("cache", named, f"the cache {self.root}")
        return job

    def _parts(self) -> list[Path]:
        """The folders of the runs, by seed."""
        folders = [file.parent for file in self.root.glob(f"seed*/{HEAD}") if file.parent.name[4:].isdecimal()]
        if not folders:
            got = f"a folder without seed0/{HEAD}" if self.root.is_dir() else "no folder of that name"
            do = "Make one: jacmatch cache build --cache DIR, with the flags of distill."
            raise InputError(f"{self.root} (`--cache`) must be a teacher's cache.", got=got, do=do)
        return sorted(folders, key=lambda folder: int(folder.name[4:]))

    def _info(self, progress: Progress) -> dict[str, Any]:
        return {"parts": [_described(folder) for folder in self._parts()]}


def _described(folder: Path) -> dict[str, Any]:
    """Return content, size and reading speed of a part of a cache."""
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
    """Return the entries read per second from the first view, in stored and in random order, after checksums."""
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
