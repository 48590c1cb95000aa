"""A small cache in a folder, and what it was made of."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from jacmatch.teachers import Answer, ModuleTeacher, Question
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

SAMPLES, SHAPE, OUTPUTS, VIEWS, BATCH = 10, (2, 3), 4, 2, 2


def directions(side: str, view: int) -> Tensor:
    """Two directions for each sample of a view, (2, B, …)."""
    shape = (OUTPUTS,) if side == "cotangents" else SHAPE
    generator = torch.Generator().manual_seed(7 + view)
    return torch.randn(2, SAMPLES, *shape, generator=generator)


def inputs(view: int) -> Tensor:
    return torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(view))


@dataclass
class Made:
    """A cache, the teacher whose answers it has, and the order of each view."""

    folder: Path
    teacher: ModuleTeacher
    side: str
    orders: list[Tensor]

    def question(self, view: int, ids: Tensor, **changes: object) -> Question:
        """The query about these samples."""
        given = {} if self.side == "outputs" else {self.side: directions(self.side, view)[:, ids]}
        return Question(**{"ids": ids, "draw": view, "random": True, **given, **changes})

    def live(self, view: int, ids: Tensor) -> Answer:
        return self.teacher.answer(inputs(view)[ids], self.question(view, ids))


def make(folder: Path, side: str = "cotangents", storage: str = "float32", **changes: object) -> Made:
    """Writes a cache with two views of ten samples in shards of four, in an order of its own for each view."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, OUTPUTS))
    orders = [torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(20 + view)) for view in range(VIEWS)]
    made = Made(folder, ModuleTeacher(net), side, orders)
    question = made.question(0, torch.arange(SAMPLES))
    fields = fields_of(made.live(0, torch.arange(SAMPLES)), question, storage)
    description, fingerprint = described(question), {**of_teacher(made.teacher), "seed": "0", "probe": "two"}
    head = Head(fingerprint, description, fields, SAMPLES, VIEWS, False, BATCH, 2 * BATCH, {"lr": 1}, {"torch": "2"})
    head = replace(head, **changes)
    folder.mkdir(parents=True)
    write_whole(folder, "cache.json", head.text())
    for view, order in enumerate(orders):
        positions = torch.empty_like(order)
        positions[order] = torch.arange(SAMPLES)
        (folder / positions_name(view)).parent.mkdir()
        write_whole(folder, positions_name(view), positions.numpy().tobytes())
        for shard in range(head.shards):
            ids = order[list(head.rows(shard))]
            x, query = inputs(view)[ids], made.question(view, ids)
            write_shard(folder, shard_name(view, shard), rows_of(made.teacher.answer(x, query), x, query, fields))
    return made
