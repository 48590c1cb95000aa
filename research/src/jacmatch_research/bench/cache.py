"""`jacmatch bench cache`: a teacher that answers from disk; and caches of any size for the benchmarks.

Their inputs are random numbers that are generated on access, with one view per example in a computed order.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from jacmatch.jacobian import Estimator, RandomInputs, RandomOutputs, probes
from jacmatch.models import build
from jacmatch.objectives import Distillation
from jacmatch.teachers import CachedTeacher, ModuleTeacher, Question
from jacmatch.teachers.cached.format import (
    Head,
    described,
    fields_of,
    of_teacher,
    positions_name,
    rows_of,
    shard_name,
    write_whole,
)
from jacmatch.teachers.cached.writer import write_shard
from jacmatch_research.bench.claims import Benchmark, Case, Claim, Conditions, Measured, compare

PROBES: dict[str, Estimator | None] = {"vᵀJ": RandomOutputs(1), "Jv": RandomInputs(1), "outputs": None}
_QUERY = 4096  # at once
_TURNS = 4  # after this number of calls a reader starts again: all of its queries are in memory


@dataclass(frozen=True, eq=False)
class Answers:
    """A teacher, the shape of its inputs, the queries (a name in `PROBES`), and the cache, once it is written."""

    folder: Path
    network: nn.Module
    shape: tuple[int, ...]
    samples: int
    products: str = "vᵀJ"

    def ids(self, positions: Tensor) -> Tensor:
        """Return the samples at these positions in the order of training; disk reads are then as for a random order."""
        step = next(n for n in range(max(1, int(0.618 * self.samples)), 2 * self.samples) if self._coprime(n))
        return positions * step % self.samples

    def _coprime(self, number: int) -> bool:
        return math.gcd(number, self.samples) == 1

    def question(self, ids: Tensor) -> tuple[Tensor, Question]:
        """Return the inputs of samples, and a training query for them."""
        probe = PROBES[self.products]
        x = probes.uniform(7, ids, 0, math.prod(self.shape)).view(-1, *self.shape)
        jacobians = 0.0 if probe is None else 1.0
        objective = Distillation(nn.Linear(1, 1), self.network, labels=0.0, jacobians=jacobians, probe=probe)
        return objective.question(x, ids=ids, draw=0, products=probe is not None)

    def write(self, batch: int = _QUERY, megabytes: float = 8.0) -> None:
        """Write the cache with this number of samples in a query, into shards of this size in MB."""
        teacher = ModuleTeacher(self.network)
        x, question = self.question(self.ids(torch.arange(min(batch, self.samples))))
        fields = fields_of(teacher.answer(x, question), question)
        shard = batch * max(1, int(megabytes * 2**20) // (batch * sum(field.size for field in fields)))
        description = described(question)
        head = Head(of_teacher(teacher), description, fields, self.samples, 1, False, batch, shard, {}, {})
        (self.folder / positions_name(0)).parent.mkdir(parents=True)
        write_whole(self.folder, "cache.json", head.text())
        positions = torch.empty(self.samples, dtype=torch.int64)
        positions[self.ids(torch.arange(self.samples))] = torch.arange(self.samples)
        write_whole(self.folder, positions_name(0), positions.numpy().tobytes())
        for number in range(head.shards):
            rows = head.rows(number)
            parts = []
            for start in range(rows.start, rows.stop, batch):
                x, question = self.question(self.ids(torch.arange(start, min(start + batch, rows.stop))))
                parts.append(rows_of(teacher.answer(x, question), x, question, fields))
            entries = {field.name: torch.cat([part[field.name] for part in parts]) for field in fields}
            write_shard(self.folder, shard_name(0, number), entries)

    def query_of(self, batch: int, number: int, *, mixed: bool = False) -> tuple[Tensor, Question]:
        """Return inputs and query of a batch, in the order of training, or `mixed`: from random positions."""
        if mixed:
            return self.question(probes.bits(number, torch.arange(batch), 0, 1)[:, 0] % self.samples)
        return self.question(self.ids((torch.arange(batch) + number * batch) % self.samples))

    def reader(self, batch: int, batches: int, *, mixed: bool = False) -> Callable[[], None]:
        """Return a function that reads the next `batches` batches of `query_of`, prepared before, at each call."""
        teacher, turn = CachedTeacher(self.folder), 0
        queries = [self.query_of(batch, number, mixed=mixed) for number in range(_TURNS * batches)]

        def read() -> None:
            nonlocal turn
            for x, question in queries[turn * batches : (turn + 1) * batches]:
                teacher.answer(x, question)
            turn = (turn + 1) % _TURNS

        return read


ENTRY = Claim("answer from disk ÷ answer of the live teacher")
WRITING = Claim("querying a teacher and storing its outputs ÷ querying it")

TEACHERS = {"VGG-9, 32×32": ("vgg9", 64), "ResNet-20, 32×32": ("resnet20", 32)}


def _answers_of(conditions: Conditions, folder: str, teacher: str, products: str) -> tuple[Answers, int]:
    name, batch = TEACHERS[teacher]
    name, batch, samples = ("mlp", 4, 8) if conditions.quick else (name, batch, 4 * batch)
    return Answers(Path(folder) / "cache", build(name, 10, (3, 32, 32)), (3, 32, 32), samples, products), batch


def reading(conditions: Conditions, teacher: str, products: str) -> Measured:
    """Time of a batch of answers from disk ÷ time of the live teacher; the files are in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        answers, batch = _answers_of(conditions, folder, teacher, products)
        answers.write(batch)
        live, (x, question) = ModuleTeacher(answers.network), answers.query_of(batch, 0)
        times = compare(conditions, answers.reader(batch, 1), lambda: live.answer(x, question), 15)
    spent = 1e6 * times.spread.median * times.baseline_seconds / batch
    details = {"batch": batch, "baseline_seconds": times.baseline_seconds, "microseconds_per_sample": round(spent, 1)}
    return Measured(times.spread, details=details)


def writing(conditions: Conditions, teacher: str, products: str) -> Measured:
    """Time to write a new cache ÷ time to compute its answers; all data are on the disk at the end."""
    with tempfile.TemporaryDirectory() as folder:
        answers, batch = _answers_of(conditions, folder, teacher, products)
        live, turns = ModuleTeacher(answers.network), count()

        def write() -> None:
            replace(answers, folder=Path(folder) / f"cache-{next(turns)}").write(batch)

        def ask() -> None:
            for number in range(answers.samples // batch):
                live.answer(*answers.query_of(batch, number))

        times = compare(conditions, write, ask, 7)
    return Measured(times.spread, details={"samples": answers.samples, "baseline_seconds": times.baseline_seconds})


CACHE = Benchmark(
    "a teacher that answers from disk",
    (
        *(
            Case(
                ENTRY, f"{teacher}, {products}", partial(reading, teacher=teacher, products=products), devices=("cpu",)
            )
            for teacher in TEACHERS
            for products in ("vᵀJ", "Jv", "outputs")
        ),
        *(
            Case(WRITING, f"{teacher}, vᵀJ", partial(writing, teacher=teacher, products="vᵀJ"), devices=("cpu",))
            for teacher in TEACHERS
        ),
    ),
)
