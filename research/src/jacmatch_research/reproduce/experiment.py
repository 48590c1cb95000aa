"""The definition of an experiment: cells that are measured one by one, and tables of the stored results.

A cell is one trained network, or one number where nothing is trained. Each is stored when it is finished, so that a
stopped run continues with the next one. Tables and figures are pure functions of the stored document.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from torch import nn

from jacmatch.jobs.settings import JobFields
from jacmatch.jobs.study import Progress
from jacmatch.report import Table
from jacmatch_research.tables import Document


@dataclass(frozen=True)
class Request(JobFields):
    """The settings of `jacmatch reproduce`.

    Those in `no_settings` select the cells that are measured and how many run in parallel; they do not change a cell.
    """

    no_settings: ClassVar[tuple[str, ...]] = (*JobFields.no_settings, "seeds", "per_class", "rows", "workers")
    everywhere: ClassVar[frozenset[str]] = frozenset(
        {"name", "size", "smoke", "seed", "seeds", "rows", "workers", "device", "out", "allow_code"}
    )
    """Fields that every experiment uses. Each experiment names the other fields that it uses in `takes`."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """The experiment: a name from `jacmatch list`."""
    data: str = "digits"
    """Data set of an experiment that trains networks (see `jacmatch distill --help`)."""
    size: Literal["cpu", "paper"] = "cpu"
    """cpu: narrow networks and short schedules, at most 30 minutes on two cores. paper: the published sizes, for a
    GPU."""
    seeds: int | None = None
    """Number of seeds; by default that of the experiment. Seeds can be added to a finished run."""
    per_class: tuple[int, ...] = ()
    """Numbers of images per class (the columns of the table) that are measured, 0 for all images."""
    rows: tuple[str, ...] = ()
    """Rows of the table that are measured; by default all."""
    teacher: str = ""
    """Teacher: a model name, or the folder of a run that trained one. By default that of the experiment."""
    teacher_weights: Path | None = None
    """Weights of the teacher: safetensors, a torch checkpoint (.pth), or a folder of either."""
    student: str = ""
    """Student: a model name. By default that of the experiment."""
    workers: int = 1
    """Number of processes that measure cells in parallel, each with one thread."""

    @property
    def scale(self) -> Literal["smoke", "cpu", "paper"]:
        """The size that is run."""
        return "smoke" if self.smoke else self.size

    def seed_numbers(self, own: int) -> range:
        """The seeds that are measured: as many as were requested, else `own`, or 1 in a smoke run."""
        return range(self.seed, self.seed + (self.seeds or (1 if self.smoke else own)))

    def given(self, taken: frozenset[str]) -> list[str]:
        """The fields that differ from their defaults, and are neither in `taken` nor used by every experiment."""
        others = [field for field in fields(self) if field.name not in self.everywhere | taken]
        return [field.name for field in others if getattr(self, field.name) != field.default]


@dataclass(frozen=True)
class Cell:
    """One measurement: its row (the method), its column, the seed, and all settings that affect it, as plain values."""

    row: str
    column: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The folder of the cell below its run."""
        return f"cells/{_slug(self.row)}/{_slug(self.column)}/seed{self.seed}"


Measures = dict[str, float | None]
"""Measures of a cell by name; None where a number does not exist."""


@dataclass(frozen=True)
class Experiment:
    """An experiment as functions.

    Attributes:
        about: A line for lists and for the help.
        cells: All cells of a request.
        measure: Measures one cell, on one thread. `facts` are what `prepare` returned.
        tables: The tables of a document, the main one first.
        figure: The figure of a document, an SVG file.
        prepare: Return what all cells share, as plain values without paths; may train a teacher, which is cached.
        teacher: The teacher that `prepare` has loaded or trained, where students learn from one.
        takes: The fields of a request that it reads besides those of `Request.everywhere`; others are refused.
    """

    about: str
    cells: Callable[[Request], list[Cell]]
    measure: Callable[[Request, Cell, Mapping[str, Any]], Measures]
    tables: Callable[[Document], list[Table]]
    figure: Callable[[Document], bytes]
    prepare: Callable[[Request, Progress], dict[str, Any]] = lambda request, progress: {}
    teacher: Callable[[Request], nn.Module] | None = None
    takes: frozenset[str] = frozenset()


def _slug(name: str) -> str:
    """Return a valid name of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.replace("+", "and")).strip("-.") or "all"
