"""What an experiment is: cells that are measured one by one, and tables made of what was stored.

A cell is one trained network, or one number where nothing is trained. Each is stored when it is done, so that a run
that was stopped goes on with the next one. Tables and figures are pure functions of the stored document.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from jacmatch.jobs.progress import Progress
from jacmatch.report import Table
from jacmatch_research.reproduce.request import Request
from jacmatch_research.tables import Document


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        row: The method, as the table names it.
        column: What the columns of the table run over, images per class for instance.
        seed: Of everything random.
        settings: All else that decides what is measured, as plain values.
    """

    row: str
    column: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Where the cell is stored below its run."""
        return f"cells/{_slug(self.row)}/{_slug(self.column)}/seed{self.seed}"


STUDENTS = frozenset({"data", "per_class", "teacher", "teacher_weights", "student"})
"""What an experiment takes whose students learn from a teacher, by images per class."""

Measures = dict[str, float | None]
"""What a cell measures, by name; None where a number does not exist."""


@dataclass(frozen=True)
class Experiment:
    """An experiment as functions.

    Attributes:
        about: A line for lists and for the help.
        cells: All cells that a request asks for.
        measure: Measures one cell, on one thread. `facts` are what `prepare` returned.
        tables: The tables of a document, the main one first.
        figure: The figure of a document, an SVG file.
        prepare: What all cells share, as plain values without paths: trains a teacher that is kept, for instance.
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
    takes: frozenset[str] = frozenset({"data"})


def _slug(name: str) -> str:
    """A name that a folder can have."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.replace("+", "and")).strip("-.") or "all"
