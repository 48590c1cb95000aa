"""Caches of any size for the benchmarks: random inputs that nobody stores, one view, an order that needs no table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from jacmatch.jacobian import Estimator, RandomInputs, RandomOutputs, probes
from jacmatch.objectives import Distillation
from jacmatch.teachers import CachedTeacher, ModuleTeacher, Question
from jacmatch.teachers.cached.fingerprint import described, of_teacher
from jacmatch.teachers.cached.format import Head, fields_of, positions_name, rows_of, shard_name, write_whole
from jacmatch.teachers.cached.writer import write_shard

PROBES: dict[str, Estimator | None] = {"vᵀJ": RandomOutputs(1), "Jv": RandomInputs(1), "outputs": None}
_QUERY = 4096  # at once


@dataclass(frozen=True, eq=False)
class Answers:
    """A teacher, inputs and questions for them; and the cache of its answers, where that has been written.

    Attributes:
        folder: Of the cache.
        network: The teacher.
        shape: Of an input.
        samples: How many there are.
        products: A name in `PROBES`.
    """

    folder: Path
    network: nn.Module
    shape: tuple[int, ...]
    samples: int
    products: str = "vᵀJ"

    def ids(self, positions: Tensor) -> Tensor:
        """The samples at these places of the order of training, which is as good as random for the disk."""
        step = next(n for n in range(max(1, int(0.618 * self.samples)), 2 * self.samples) if self._coprime(n))
        return positions * step % self.samples

    def _coprime(self, number: int) -> bool:
        return math.gcd(number, self.samples) == 1

    def question(self, ids: Tensor) -> tuple[Tensor, Question]:
        """Inputs of samples, and what a training asks about them."""
        probe = PROBES[self.products]
        x = probes.uniform(7, ids, 0, math.prod(self.shape)).view(-1, *self.shape)
        jacobians = 0.0 if probe is None else 1.0
        objective = Distillation(nn.Linear(1, 1), self.network, labels=0.0, jacobians=jacobians, probe=probe)
        return objective.question(x, ids=ids, draw=0, products=probe is not None)

    def write(self, batch: int = _QUERY, megabytes: float = 8.0) -> None:
        """Writes the cache.

        Args:
            batch: Samples of a query.
            megabytes: Size of a shard.
        """
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
        """Inputs and question of a batch.

        Args:
            batch: Samples in it.
            number: Which batch in the order of training; after the last sample comes the first.
            mixed: Samples from anywhere instead.
        """
        if mixed:
            return self.question(probes.bits(number, torch.arange(batch), 0, 1)[:, 0] % self.samples)
        return self.question(self.ids((torch.arange(batch) + number * batch) % self.samples))

    def reader(self, batch: int, batches: int, *, mixed: bool = False) -> Callable[[], None]:
        """A function that reads `batches` batches, each call the next ones; the questions are there before.

        Args:
            batch: Samples in a batch.
            batches: How many batches a call reads.
            mixed: Samples from anywhere in the cache instead of neighbors.
        """
        teacher, turn = CachedTeacher(self.folder), 0
        queries = [self.query_of(batch, number, mixed=mixed) for number in range(_TURNS * batches)]

        def read() -> None:
            nonlocal turn
            for x, question in queries[turn * batches : (turn + 1) * batches]:
                teacher.answer(x, question)
            turn = (turn + 1) % _TURNS

        return read


_TURNS = 4
"""After so many calls a reader begins again: all of its questions are kept."""
