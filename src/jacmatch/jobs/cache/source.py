"""What one run of `distill` will ask its teacher, in the order and the batches of its training."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from jacmatch.datasets import Data, Split
from jacmatch.datasets.streamed import Streamed
from jacmatch.errors import InputError
from jacmatch.jobs.distillation_fields import TeachingFields
from jacmatch.objectives import Distillation
from jacmatch.teachers import Answer, ModuleTeacher, Question, Teacher
from jacmatch.teachers.cached.entries import rows_of as entries_of
from jacmatch.teachers.cached.fingerprint import digest, of_teacher, words
from jacmatch.teachers.cached.layout import Field
from jacmatch.training import Batches, Training, find_device


@dataclass(frozen=True, eq=False)
class Answers:
    """What a teacher was asked about a batch, and what it said: to the question, and to one without products."""

    x: Tensor
    question: Question
    answer: Answer
    alone: Answer | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """The questions of one run, and the teacher that answers them.

    Attributes:
        seed: Of the run.
        objective: Makes the questions; its student is nobody.
        batches: The samples as the training shows them.
        training: The settings of the training.
        slopes: Whether products are asked for.
        alone: Whether outputs without products are asked for too.
    """

    seed: int
    objective: Distillation
    batches: Batches
    training: Training
    slopes: bool
    alone: bool

    @classmethod
    def of(cls, job: TeachingFields, data: Data, teacher: nn.Module, seed: int) -> "Source":
        """The questions of the run with this seed.

        Raises:
            InputError: The job asks no teacher, or settings do not go together.
        """
        methods = [method for method in job.methods if method != "labels"]
        if not methods:
            raise InputError("`--cache` needs a method that asks the teacher.", got="--methods labels")
        slopes = "jacobians" in methods
        train, _ = job.parts(data, job.samples_per_class(data), seed)
        method = "jacobians" if slopes else "outputs"
        objective = job.objective(method, nn.Linear(1, 1), ModuleTeacher(teacher), train, data, seed)
        training = job.training()
        batches = Batches(
            train,
            training.batch_size,
            seed=seed,
            augment=training.augment,
            partners=objective.needs_partners,
            device=find_device(job.device),
        )
        return cls(seed, objective, batches, training, slopes, slopes and ("outputs" in methods or job.every > 1))

    @property
    def teacher(self) -> Teacher:
        """Who is asked."""
        assert self.objective.teacher is not None
        return self.objective.teacher

    @property
    def train(self) -> Split:
        """The training split."""
        return self.batches.split

    def question(self, rows: Tensor, view: int) -> tuple[Tensor, Question]:
        """Where the teacher is asked about these rows, and what."""
        batch = self.batches.of(rows, view)
        return self.objective.question(
            batch.x,
            batch.y,
            ids=batch.ids,
            draw=view,
            partners=batch.partners,
            partner_labels=batch.partner_labels,
            products=self.slopes,
        )

    def answers(self, rows: Tensor, view: int) -> "Answers":
        """The same with what the teacher says to it."""
        x, question = self.question(rows, view)
        answer = self.teacher.answer(x, question)
        if not self.alone:
            return Answers(x, question, answer)
        less = replace(question, cotangents=None, tangents=None, step=None, rule=None)
        return Answers(x, question, answer, self.teacher.answer(x, less))

    def entries(self, rows: Tensor, view: int, fields: Sequence[Field]) -> dict[str, Tensor]:
        """The same as rows of a shard."""
        said = self.answers(rows, view)
        return entries_of(said.answer, said.x, said.question, fields, said.alone)

    @cached_property
    def constant(self) -> bool:
        """Whether the same is asked in every view: nothing is random."""
        _, question = self.question(self.batches.order(0)[:1], 0)
        return not question.random and not self.training.augment

    @property
    def views(self) -> int:
        """How many views the training goes through."""
        if self.constant:
            return 1
        number = self.training.steps * self.training.accumulate
        epochs = -(-number // (len(self.train) // self.batches.size))
        return min(self.training.views or epochs, epochs)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """All that decides the answers, by name, in words."""
        slopes = self.objective.differentiation
        return {
            **of_teacher(self.teacher),
            "data": _of_split(self.train),
            "samples": str(len(self.train)),
            "augmentation": ", ".join(self.training.augment) or "none",
            "batch size": str(self.batches.size),
            "seed": str(self.seed),
            "point": words(slopes.point, "point"),
            "readout": words(slopes.teacher_readout, "readout"),
            "probe": f"{words(slopes.probe, 'probe')} on the {slopes.side} side" if self.slopes else "none",
        }


def _of_split(split: Split) -> str:
    """A digest of all samples in their order; of streamed images of what `Streamed.digest` has.

    An image that changes without showing there is refused when it is used: its sums are stored.
    """
    if isinstance(split.x, Streamed):
        return hashlib.sha256(f"{split.x.digest()} {digest(('y', split.y))}".encode()).hexdigest()
    return digest(("x", split.x), ("y", split.y))


def folder_of(cache: Path, seed: int) -> Path:
    """The part of a cache that belongs to the run with this seed."""
    return cache / f"seed{seed}"


def first_rows(source: Source) -> Tensor:
    """The rows of the first batch."""
    return source.batches.order(0)[: source.batches.size]


def entries_at(source: Source, view: int, places: range, fields: Sequence[Field]) -> dict[str, Tensor]:
    """The entries at these places in the order of a view, asked in the batches of the training.

    The rows that fill no batch are asked together with those before them: on a CPU the last digits of an answer depend
    on the size of the batch.
    """
    order, size = source.batches.order(view), source.batches.size
    parts = []
    for start in range(places.start, places.stop, size):
        first = min(start, len(order) - size)
        entries = source.entries(order[first : first + size], view, fields)
        parts.append({name: tensor[start - first :] for name, tensor in entries.items()})
    return {field.name: torch.cat([part[field.name] for part in parts]) for field in fields}


def places_of(source: Source, view: int) -> Tensor:
    """The place of each row in the order of a view."""
    order = source.batches.order(view).cpu()
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places
