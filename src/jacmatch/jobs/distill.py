"""`jacmatch distill`: teacher → student, with and without Jacobians, at equal optimizer steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from jacmatch.datasets import Data, Split
from jacmatch.diagnostics import benchmark_engines
from jacmatch.jobs import jacobian_figure, networks
from jacmatch.jobs.cache import cached_teachers
from jacmatch.jobs.data import load
from jacmatch.jobs.distillation_fields import METHODS, TeachingFields
from jacmatch.jobs.inputs import same_inputs, same_teacher
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.settings import SMOKE_JACOBIANS
from jacmatch.jobs.study import Cell, Result, Task, head, main_fields, measured, of_method, row, run_cells, save_main
from jacmatch.jobs.teachers import Prepared
from jacmatch.objectives import Distillation
from jacmatch.runs import Run, spread
from jacmatch.runs.files import load as load_json
from jacmatch.teachers import ModuleTeacher
from jacmatch.training import Batches, agreement, find_device
from jacmatch.training.distributed import ProcessGroup

ENGINE = "engine.json"
"""File of the engine benchmark in a run folder: a run measures once, and uses the same engine when it resumes."""


@dataclass(frozen=True)
class Distill(TeachingFields):
    """Distil a teacher into a student: labels only, + outputs, + outputs and Jacobians, at equal optimizer steps."""

    main: ClassVar[str] = "data teacher student per_class methods seeds steps device out smoke"
    examples: ClassVar[tuple[str, ...]] = ("", "--data npz:my.npz --teacher runs/teacher --student mlp:16")

    cache: Path | None = None
    """The teacher answers from this folder, which `jacmatch cache build` has written with the same flags."""

    def run(self, progress: Progress | None = None) -> Result:
        """Train and measure, and return the result that is written to the run folder."""
        self.check_teaching()
        self.training()  # refuses wrong settings before anything is trained
        data = load(self.data, self.seed, self.smoke)
        description = networks.Description.of(self.student, data)
        subset, _ = self.parts(data, self.samples_per_class(data), self.seed)
        for method in self.methods:  # settings that do not go together are refused before anything is trained
            self.objective(method, description.build(), nn.Linear(1, 1), subset, data, self.seed)
        start = time.perf_counter()
        with progress or Progress() as shown:
            run = self.begin("distill")
            same_inputs(run, data, networks=(description,))
            teacher = self.taught_by(data, shown)
            same_teacher(run, data, teacher.network)
            if self.cache is not None:
                teacher = replace(teacher, cached=cached_teachers(self, self.cache, data, teacher.network))
            cells = [
                Cell(
                    seed=seed,
                    method=method,
                    label=METHODS[method],
                    training=self.training(doctor=self.checked(seed, method == self.methods[-1])),
                    network=description,
                )
                for seed in self.runs
                for method in self.methods
            ]
            return run_cells(
                run,
                cells,
                partial(self._prepare, run, data, description, teacher),
                partial(self._conclude, run, data, len(subset), teacher, start),
                device=self.device,
                progress=shown,
            )

    def _prepare(self, run: Run, data: Data, description: networks.Description, teacher: Prepared, cell: Cell) -> Task:
        train, validation = self.parts(data, self.samples_per_class(data), cell.seed)
        torch.manual_seed(cell.seed)
        student = description.build()
        objective = self.objective(cell.method, student, teacher.for_seed(cell.seed), train, data, cell.seed)
        self._choose_engine(run, objective, train)

        def finish() -> tuple[nn.Module, dict[str, Any]]:
            reference = ModuleTeacher(teacher.network)
            return student, {
                "teacher": measured(teacher.network, data.test, self.device),
                "student": measured(student, data.test, self.device),
                "agreement": agreement(student, reference, data.test, samples=self._samples(data)),
            }

        return Task(objective, train, validation, finish)

    def _conclude(
        self,
        run: Run,
        data: Data,
        train_samples: int,
        teacher: Prepared,
        start: float,
        done: Sequence[tuple[Cell, Result]],
    ) -> Result:
        """The result; the last method represents the run."""
        rows = [_row(of_method(done, method)) for method in self.methods]
        main = of_method(done, self.methods[-1])
        first = {cell.method: cell for cell, _ in done if cell.seed == self.seed}
        save_main(run, first[self.methods[-1]])
        students = {method: cell.load(run) for method, cell in first.items()}
        jacobian_figure.write(run, data, teacher.network, students, METHODS)
        return {
            **head(run, self.seed),
            "teacher": main[0]["teacher"],
            **main_fields(main, rows[-1]),
            "rows": rows,
            "seconds": time.perf_counter() - start,
            "train_samples": train_samples,
            "test_samples": len(data.test),
            "jacobian_samples": self._samples(data),
            "resolved": self.resolved(train_samples / data.classes if data.classes else None),
            "teacher_source": teacher.source,
            "settings": self.settings(),
        }

    def _choose_engine(self, run: Run, objective: Distillation, train: Split) -> None:
        """Set the engine of the run: from `engine.json`, which a benchmark on the first batch writes."""
        settings = objective.differentiation
        weight = objective.loss_weights.weights["jacobians"]
        if not weight or settings.engine != "auto" or settings.side == "output" or settings.step is not None:
            return
        if not run.follows and not (run.path / ENGINE).exists():
            device = find_device(self.device)
            partners = objective.needs_partners
            size = self.training().batch_size
            batches = Batches(train, size, seed=self.seed, augment=self.augment, partners=partners, device=device)
            measured = benchmark_engines(objective.to(device), batches(0))
            run.write_json(ENGINE, vars(measured))
        chosen = None if run.follows else load_json(run.path / ENGINE)["engine"]
        settings.engine = ProcessGroup.current().broadcast(chosen)

    def _samples(self, data: Data) -> int:
        return min(SMOKE_JACOBIANS if self.smoke else 256, len(data.test))


def _row(results: Sequence[Result]) -> Result:
    """The row of a method, with the agreement that was measured."""
    known = [key for key, value in results[0]["agreement"].items() if value is not None]
    agreement = {key: spread([result["agreement"][key] for result in results]) for key in known}
    return row(METHODS[results[0]["method"]], results, agreement=agreement)
