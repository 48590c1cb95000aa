"""The request of `jacmatch reproduce`: its settings."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from jacmatch.jobs.settings import JobFields


@dataclass(frozen=True)
class Request(JobFields):
    """The settings of `jacmatch reproduce`.

    Those in `no_settings` choose which cells are measured and how many at once, not what a cell measures.
    """

    no_settings: ClassVar[tuple[str, ...]] = (*JobFields.no_settings, "seeds", "per_class", "rows", "workers")
    everywhere: ClassVar[frozenset[str]] = frozenset(
        {"name", "size", "smoke", "seed", "seeds", "rows", "workers", "device", "out", "allow_code"}
    )
    """Fields that mean something in every experiment. Of the others, each experiment says which it `takes`."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """The experiment: a name from `jacmatch list`."""
    data: str = "digits"
    """Data set of an experiment that trains networks (see `jacmatch distill --help`)."""
    size: Literal["cpu", "paper"] = "cpu"
    """cpu: narrow networks and short schedules, at most 30 minutes on two cores. paper: the published sizes, for a
    GPU."""
    seeds: int | None = None
    """How many seeds; the experiment's own number if left out. More of them can be added to a run later."""
    per_class: tuple[int, ...] = ()
    """Only these columns of a table over images per class, 0 for all images."""
    rows: tuple[str, ...] = ()
    """Only these rows of the table."""
    teacher: str = ""
    """Teacher: a model name, or the folder of a run that trained one; the experiment's own if left out."""
    teacher_weights: Path | None = None
    """Weights of the teacher: safetensors, a checkpoint of torch (.pth), or a folder of either."""
    student: str = ""
    """Student: a model name; the experiment's own if left out."""
    workers: int = 1
    """Processes that measure cells side by side, each with one thread."""

    @property
    def scale(self) -> Literal["smoke", "cpu", "paper"]:
        """The size that is run."""
        return "smoke" if self.smoke else self.size

    def seed_numbers(self, own: int) -> range:
        """The seeds that are measured: as many as were requested, else `own`, or 1 in a smoke run."""
        return range(self.seed, self.seed + (self.seeds or (1 if self.smoke else own)))

    def given(self, taken: frozenset[str]) -> list[str]:
        """The fields that are not at their default and are neither in `taken` nor for every experiment."""
        others = [field for field in fields(self) if field.name not in self.everywhere | taken]
        return [field.name for field in others if getattr(self, field.name) != field.default]
