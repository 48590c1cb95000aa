"""`jacmatch reproduce NAME`: one table of the paper, or one claim of this project."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from jacmatch.errors import InputError, unknown_name
from jacmatch.recipes.fields import positive
from jacmatch.recipes.progress import Progress
from jacmatch.recipes.reproduce import EXPERIMENTS
from jacmatch.recipes.reproduce.experiment import Cell, Measures
from jacmatch.recipes.reproduce.request import Request
from jacmatch.report import Document
from jacmatch.runs import Run
from jacmatch.training import find_device
from jacmatch.version import __version__


@dataclass(frozen=True)
class Reproduce(Request):
    """Measure one table of the paper or one claim of this project, and write it beside the published numbers.

    A run that was stopped goes on with the next cell, and a finished one with cells that are asked for in addition
    (`--seeds`, `--per-class`, `--rows`).
    """

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Measures the cells that are missing; returns the tables that are written to the run folder."""
        if self.name not in EXPERIMENTS:
            raise unknown_name("The experiment of `reproduce`", self.name, EXPERIMENTS)
        positive("reproduce", workers=self.workers, seeds=1 if self.seeds is None else self.seeds)
        if self.workers > 1 and self.device != "cpu":
            raise InputError("`--workers` of `reproduce` must be 1 on a GPU.", got=self.workers)
        experiment = EXPERIMENTS[self.name]
        cells = self._chosen(experiment.cells(self))
        place = find_device(self.device)
        gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else None
        folder = self.folder("reproduce")
        run = Run.create(folder, "reproduce", self.settings(), __version__, cuda=gpu, again=True)
        start = time.perf_counter()
        with progress or Progress() as shown, _one_thread():
            facts = experiment.prepare(self, shown)
            self._measure_all(run, cells, facts, shown)
        document = self.document(run, cells, facts)
        run.write_json("results.json", document)
        tables = experiment.tables(document)
        for table in tables:
            run.write_bytes(f"{table.name}.md", table.markdown().encode())
            run.write_bytes(f"{table.name}.csv", table.csv().encode())
        figure = run.write_bytes("figure.svg", experiment.figure(document))
        result = {
            "job": "reproduce",
            "version": __version__,
            "seed": self.seed,
            "seconds": time.perf_counter() - start,
            "tables": [{"title": t.title, "head": t.head, "rows": t.rows, "notes": t.notes} for t in tables],
            "settings": self.settings(),
        }
        run.write_result(result)
        return {**result, "out": str(run.path), "figure": str(figure)}

    def _chosen(self, cells: list[Cell]) -> list[Cell]:
        rows = list(dict.fromkeys(cell.row for cell in cells))
        for row in self.rows:
            if row not in rows:
                raise unknown_name(f"A row (`--rows`) of `reproduce {self.name}`", row, rows)
        return [cell for cell in cells if not self.rows or cell.row in self.rows]

    def _measure_all(self, run: Run, cells: list[Cell], facts: dict[str, Any], progress: Progress) -> None:
        """Measures what is not stored yet, and stores each cell when it is done."""
        missing = [cell for cell in cells if not self._child(run, cell).finished]
        advance = progress.training(f"{self.name}: {len(cells)} cells", len(cells))
        done = len(cells) - len(missing)
        advance(done, {})
        for cell, measures, seconds in self._measured(missing, facts):
            self._child(run, cell).write_result(
                {
                    "job": "reproduce",
                    "version": __version__,
                    "seed": cell.seed,
                    "seconds": seconds,
                    "row": cell.row,
                    "column": cell.column,
                    "measures": measures,
                    "settings": self._identity(cell),
                }
            )
            done += 1
            advance(done, {})

    def _measured(self, cells: list[Cell], facts: dict[str, Any]) -> Iterator[tuple[Cell, Measures, float]]:
        """Each cell with its measures and seconds, in the order in which they are done."""
        if self.workers == 1:
            for cell in cells:
                yield (cell, *_measure(self, cell, facts))
            return
        pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
        try:
            waiting: dict[Future[tuple[Measures, float]], Cell] = {
                pool.submit(_measure, self, cell, facts): cell for cell in cells
            }
            for future in as_completed(waiting):
                yield (waiting[future], *future.result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _identity(self, cell: Cell) -> dict[str, Any]:
        """What decides a cell."""
        settings = {key: value for key, value in self.settings().items() if key != "out"}
        return {**settings, "row": cell.row, "column": cell.column, "cell_seed": cell.seed, "cell": dict(cell.settings)}

    def _child(self, run: Run, cell: Cell) -> Run:
        return run.child(cell.folder, self._identity(cell))

    def document(self, run: Run, cells: list[Cell], facts: dict[str, Any]) -> Document:
        """All stored results of these cells, with settings and machine; no path of this machine is in it."""
        settings = {**self.settings(), "data": self.data.partition(":")[0], "teacher": Path(self.teacher).name}
        weights = settings.pop("teacher_weights")
        results = [(cell, self._child(run, cell).result) for cell in cells]
        return {
            "experiment": self.name,
            "size": self.scale,
            "settings": {**settings, "teacher_weights": weights and Path(weights).name},
            "environment": {key: value for key, value in run.environment.items() if key != "resumed"},
            "facts": facts,
            "cells": [
                {
                    "row": cell.row,
                    "column": cell.column,
                    "seed": cell.seed,
                    "settings": dict(cell.settings),
                    "measures": result["measures"],
                    "seconds": round(result["seconds"], 2),
                }
                for cell, result in results
            ],
        }


def _measure(request: Request, cell: Cell, facts: dict[str, Any]) -> tuple[Measures, float]:
    """The measures of a cell and the seconds that they took, in any process."""
    with _one_thread():
        start = time.perf_counter()
        measures = EXPERIMENTS[request.name].measure(replace(request, workers=1), cell, facts)
        return measures, time.perf_counter() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread for the block: the same numbers on any number of cores, and no two processes on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
