"""`jacmatch distill`: teacher → student, with and without slopes, at equal optimiser steps."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jacmatch.datasets import Data, Split
from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import doctor
from jacmatch.jobs import networks, sheet
from jacmatch.jobs.cache.opening import cached_teachers
from jacmatch.jobs.inputs import same_inputs, same_teacher
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.summary import METHODS, identity, summarized
from jacmatch.jobs.teachers import Prepared
from jacmatch.jobs.teaching import TeachingFields
from jacmatch.jobs.train import load, parts, unfinished
from jacmatch.models import count_parameters
from jacmatch.objectives import Distillation
from jacmatch.report import write_report
from jacmatch.runs import Run, threads
from jacmatch.runs.files import load as load_json
from jacmatch.teachers import ModuleTeacher
from jacmatch.training import Batches, Fitted, agreement, engine_trial, evaluate, find_device, fit
from jacmatch.training.distributed import Ranks
from jacmatch.version import __version__

ENGINE = "engine.json"
"""What the trial of engines found, in a run folder: the choice is made once for a run and kept when it goes on."""


@dataclass(frozen=True)
class Distill(TeachingFields):
    """Distil a teacher into a student: labels only, + outputs, + outputs and Jacobians, at equal optimiser steps."""

    cache: Path | None = None
    """The teacher answers from this folder, which `jacmatch cache build` has written with the same flags."""

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Does the job, and returns the result that is written to the run folder."""
        self.check_teaching()
        self.training()  # its settings speak before anything is trained
        data = load(self.data, self.seed, self.smoke)
        description = networks.Description.of(self.student, data)
        subset, _ = parts(data, self.validation, self.samples_per_class(data), self.seed)
        for method in self.methods:  # settings that cannot go together speak before anything is trained
            self.objective(method, description.build(), nn.Linear(1, 1), subset, data, self.seed)
        start = time.perf_counter()
        with progress or Progress() as shown:
            run = self.begin("distill")
            same_inputs(run, data, networks=(description,))
            teacher = self.taught_by(data, shown)
            same_teacher(run, data, teacher.network)
            self._examine(run, description, data)
            if self.cache is not None:
                teacher = replace(teacher, cached=cached_teachers(self, self.cache, data, teacher.network))
            students: dict[tuple[int, str], nn.Module] = {}
            for seed in self.runs:
                for method in self.methods:
                    done = self._one(run, method, seed, data, description, teacher, shown)
                    if isinstance(done, Fitted):
                        return unfinished(run, done.steps)
                    students[seed, method] = done
        if run.follows:
            return unfinished(run, self.training().steps)
        result = {
            "job": "distill",
            "version": __version__,
            "threads": threads(),
            "seed": self.seed,
            **summarized(run, self.methods, students, "accuracy" if data.classes else "rmse"),
            "seconds": time.perf_counter() - start,
            "train_samples": len(subset),
            "test_samples": len(data.test),
            "jacobian_samples": self._samples(data),
            "resolved": self.resolved(len(subset) / data.classes if data.classes else None),
            "teacher_source": teacher.source,
            "settings": self.settings(),
        }
        networks.save(run, students[self.seed, self.methods[-1]], description)
        sheet.write(run, data, teacher.network, {m: students[self.seed, m] for m in self.methods}, METHODS)
        report = write_report(run.path, result)
        run.write_result(result)
        return {**result, "out": str(run.path), "report": str(report)}

    def _examine(self, run: Run, description: networks.Description, data: Data) -> None:
        """The doctor looks at the student before the first step."""
        if "jacobians" not in self.methods or not self.doctor or run.follows:
            return
        torch.manual_seed(self.seed)
        student = description.build()
        diagnosis = doctor(student.train(), data.train.inputs(torch.arange(min(8, len(data.train)))))
        run.write_json("doctor.json", {"engine": diagnosis.engine, "ok": diagnosis.ok, "says": str(diagnosis)})
        if diagnosis.engine == "none":
            raise UnsupportedError(f"No derivative engine is right for the student {self.student!r}: {diagnosis}")

    def _choose_engine(self, run: Run, objective: Distillation, train: Split) -> None:
        """Takes the engine of the run: of engine.json, or by a trial on the first batch that is written there."""
        slopes = objective.slopes
        asked = objective.balance.weights["jacobians"]
        if not asked or slopes.engine != "auto" or slopes.probe.side == "output" or hasattr(slopes.probe, "step"):
            return
        if not run.follows and not (run.path / ENGINE).exists():
            place = find_device(self.device)
            partners = objective.needs_partners
            size = self.training().batch_size
            batches = Batches(train, size, seed=self.seed, augment=self.augment, partners=partners, device=place)
            trial = engine_trial(objective.to(place), batches(0))
            run.write_json(ENGINE, {"engine": trial.engine, "seconds": trial.seconds, "refused": trial.refused})
        slopes.engine = Ranks.here().told(None if run.follows else load_json(run.path / ENGINE)["engine"])

    def _one(
        self,
        run: Run,
        method: str,
        seed: int,
        data: Data,
        description: networks.Description,
        teacher: Prepared,
        progress: Progress,
    ) -> nn.Module | Fitted:
        """One student: trained, or taken from its folder if that is finished. A `Fitted` says that it is not yet."""
        child = run.child(f"seed{seed}/{method}", identity(run, seed, method))
        if child.finished:
            return networks.load_own(child.path, description.spec)
        train, validation = parts(data, self.validation, self.samples_per_class(data), seed)
        torch.manual_seed(seed)
        student = description.build()
        training = self.training(doctor=self.doctor and seed == self.seed)  # the others have the same objective
        objective = self.objective(method, student, teacher.asked(seed), train, data, seed)
        self._choose_engine(run, objective, train)
        fitted = fit(
            objective,
            train,
            training,
            seed=seed,
            device=self.device,
            run=child,
            validation=validation,
            on_step=progress.training(f"{METHODS[method]}, seed {seed}", training.steps),
        )
        if not fitted.finished or child.follows:
            return student if fitted.finished else fitted
        networks.save(child, student, description)
        child.write_result(
            {
                "job": "distill",
                "version": __version__,
                "threads": threads(),
                "seed": seed,
                "method": method,
                "teacher": self._described(teacher.network, data),
                "student": self._described(student, data),
                "agreement": agreement(student, ModuleTeacher(teacher.network), data.test, samples=self._samples(data)),
                "seconds": fitted.seconds,
                "samples_per_second": fitted.samples_per_second,
                "peak_memory_bytes": fitted.peak_memory_bytes,
                **{"steps": fitted.steps, "compiled": fitted.compiled},
                "settings": child.settings,
            }
        )
        return student

    def _samples(self, data: Data) -> int:
        return min(16 if self.smoke else 256, len(data.test))

    def _described(self, network: nn.Module, data: Data) -> dict[str, Any]:
        return {**evaluate(network, data.test, device=self.device), "parameters": count_parameters(network)}
