"""`jacmatch reproduce NAME`: measure a table of the paper or of the documentation."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jacmatch.errors import InputError, unknown_name
from jacmatch.files import inside
from jacmatch.jobs.networks import Description, matches, of_teacher, same_inputs
from jacmatch.jobs.settings import positive
from jacmatch.jobs.study import Progress
from jacmatch.report import write_report
from jacmatch.runs import Run, threads
from jacmatch.runs.files import load
from jacmatch.training import find_device
from jacmatch.version import __version__
from jacmatch_research.processes import end_with_parent, one_thread, side_by_side
from jacmatch_research.reproduce import EXPERIMENTS, defaults, students, transfer
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.tables import Document

_MADE = ("jacmatch", "torch", "platform", "cuda", "commit")  # entries of a cell about the machine and versions


@dataclass(frozen=True)
class Reproduce(Request):
    """Measure a table of the paper or of the documentation, and write it next to the published numbers.

    Run the command again to resume a run, or to add cells to a finished one (`--seeds`, `--per-class`, `--rows`). The
    tables contain all cells of the run.
    """

    main: ClassVar[str] = "data size seeds rows teacher student workers device out smoke"
    examples: ClassVar[tuple[str, ...]] = ("grasp --smoke", "distillation --data cifar10:DIR --seeds 3 --workers 2")

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Measure the cells that are missing; return the tables that are written to the run folder."""
        experiment = self._checked()
        start = time.perf_counter()
        with progress or Progress() as shown, one_thread():
            for forget in (students.forget, transfer.forget, defaults.pair_of.cache_clear):
                forget()  # files of the same names may have changed
            cells = self._chosen(experiment.cells(self))
            whole = _unique([*experiment.cells(replace(self, rows=(), seeds=None, per_class=())), *cells])
            run = self.begin("reproduce", again=True)
            facts = self._prepared(experiment, run, whole, shown)
            self._measure_all(run, cells, facts, shown)
        document = self._document(run, whole, facts)
        tables, figure = experiment.tables(document), experiment.figure(document)
        run.write_json("results.json", document)
        for table in tables:
            run.write_bytes(f"{table.name}.md", table.markdown().encode())
            run.write_bytes(f"{table.name}.csv", table.csv().encode())
        drawn = run.write_bytes("figure.svg", figure)
        result = {
            "job": "reproduce",
            "version": __version__,
            "threads": threads(),
            "seed": self.seed,
            "about": experiment.about,
            **({"data": self.data} if "data" in experiment.takes else {}),
            "seconds": time.perf_counter() - start,
            "tables": [table.plain() for table in tables],
            "settings": self.settings(),
        }
        report = write_report(run.path, result)
        run.write_result(result, again=True)
        return {**result, "out": str(run.path), "figure": str(drawn), "report": str(report)}

    def _prepared(self, experiment: Experiment, run: Run, cells: list[Cell], progress: Progress) -> dict[str, Any]:
        """Return what all cells share, after checking that the existing ones have the same data, code and teacher."""
        data = students.data_of(self.data, self.seed, self.smoke) if "data" in experiment.takes else None
        same_inputs(run, data, networks=(Description.of(self.student, data),) if data and self.student else ())
        for cell in cells:  # what other code has measured is refused before anything is measured beside it
            if (run.path / cell.folder / "result.json").is_file():
                self._child(run, cell)
        facts = experiment.prepare(self._on_device(), progress)
        if experiment.teacher is not None and data is not None:
            matches(run, "teacher", of_teacher(experiment.teacher(self._on_device()), data))
        return facts

    def _checked(self) -> Experiment:
        """Return the requested experiment, after checking the request."""
        if self.name not in EXPERIMENTS:
            raise unknown_name("The experiment of `reproduce`", self.name, EXPERIMENTS)
        positive("reproduce", workers=self.workers, seeds=1 if self.seeds is None else self.seeds)
        experiment = EXPERIMENTS[self.name]
        for name in self.given(experiment.takes):
            others = ", ".join(other for other, each in EXPERIMENTS.items() if name in each.takes)
            rule = f"`--{name.replace('_', '-')}` of `reproduce` does not apply to `{self.name}`."
            raise InputError(rule, got=getattr(self, name), do=f"Omit it; it applies to: {others}.")
        device = find_device(self.device)
        if self.workers > 1 and device.type != "cpu":
            raise InputError("`--workers` of `reproduce` must be 1 on a GPU.", got=self.workers)
        return experiment

    def _on_device(self) -> "Reproduce":
        """Return the same request with the device that `auto` stands for here."""
        return replace(self, device=str(find_device(self.device)))

    def _chosen(self, cells: list[Cell]) -> list[Cell]:
        rows = list(dict.fromkeys(cell.row for cell in cells))
        for row in self.rows:
            if row not in rows:
                raise unknown_name(f"A row (`--rows`) of `reproduce {self.name}`", row, rows)
        return _unique([cell for cell in cells if not self.rows or cell.row in self.rows])

    def _measure_all(self, run: Run, cells: list[Cell], facts: dict[str, Any], progress: Progress) -> None:
        """Measure what is not stored yet, and store each cell when it is done."""
        missing = [cell for cell in cells if not self._child(run, cell).finished]
        advance = progress.training(f"{self.name}: {len(cells)} cells", len(cells))
        done = len(cells) - len(missing)
        advance(done, {})
        here = (run.environment.get("resumed") or [run.environment])[-1]
        made = {key: here.get(key) for key in _MADE}

        def store(cell: Cell, measured: tuple[Measures, float]) -> None:
            nonlocal done
            child = self._child(run, cell)
            result = {"job": "reproduce", "version": __version__, "seed": cell.seed, "seconds": measured[1]}
            result |= {"row": cell.row, "column": cell.column, "measures": measured[0], "made": made}
            child.write_result({**result, "settings": child.settings})
            done += 1
            advance(done, {})

        work = partial(_measure, self._on_device(), facts)
        if self.workers > 1:
            side_by_side(work, missing, self.workers, store)
        else:
            for cell in missing:
                store(cell, work(cell))

    def _child(self, run: Run, cell: Cell) -> Run:
        """Return the run of a cell, whose settings are all that affect it."""
        own = {"row": cell.row, "column": cell.column, "cell_seed": cell.seed, "cell": dict(cell.settings)}
        return run.child(cell.folder, {**self.settings(), **own})

    def _document(self, run: Run, order: list[Cell], facts: dict[str, Any]) -> Document:
        """Return the content of the run with settings and machine, without paths of this machine."""
        settings = {**self.settings(), "data": self.data.partition(":")[0], "teacher": Path(self.teacher).name}
        weights = settings.pop("teacher_weights")
        file = run.path / "results.json"
        before = load(file)["facts"] if file.is_file() else {}
        return {
            "experiment": self.name,
            "size": self.scale,
            "settings": {**settings, "teacher_weights": weights and Path(weights).name},
            "environment": {key: value for key, value in run.environment.items() if key != "resumed"},
            "facts": _joined(before, facts),
            "cells": _stored(run, order),
        }


def _unique(cells: list[Cell]) -> list[Cell]:
    """The cells without duplicates."""
    return list({(cell.row, cell.column, cell.seed): cell for cell in cells}.values())


def _stored(run: Run, order: list[Cell]) -> list[dict[str, Any]]:
    """Return the finished cells of a run in the format of a document, first those in `order`."""
    order_of = {(cell.row, cell.column, cell.seed): number for number, cell in enumerate(order)}

    def rank(entry: Mapping[str, Any]) -> tuple[int, str, str, int]:
        name = entry["row"], entry["column"], entry["seed"]
        return order_of.get(name, len(order_of)), *name

    entries = []
    for file in run.path.glob("cells/*/*/*/result.json"):
        cell = Run.open(inside(run.path, file.parent))
        if cell.identity != run.inputs_digest:
            rule = f"The cells of {run.path} must have the data, code and teacher that the run was started with."
            raise InputError(rule, got=f"others in {file.parent}", do="Remove that cell, or choose another --out.")
        result = cell.result
        entry = {key: result[key] for key in ("row", "column", "seed")}
        entry |= {"settings": result["settings"]["cell"], "measures": result["measures"]}
        entry["seconds"] = round(result["seconds"], 2)
        entries.append({**entry, "made": result["made"]} if "made" in result else entry)
    return sorted(entries, key=rank)


def _joined(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the present facts, and those of an earlier command for cells that were not requested again."""
    both = [key for key in before if isinstance(before[key], Mapping) and isinstance(now.get(key), Mapping)]
    return {**before, **now, **{key: _joined(before[key], now[key]) for key in both}}


def _measure(request: Request, facts: Mapping[str, Any], cell: Cell) -> tuple[Measures, float]:
    """The measures of a cell and the seconds that they took, in any process."""
    end_with_parent()
    with one_thread():
        start = time.perf_counter()
        measures = EXPERIMENTS[request.name].measure(request, cell, facts)
        return measures, time.perf_counter() - start
