"""`jacmatch distill`: teacher → student, with and without slopes, at equal optimiser steps."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from jacmatch.datasets import Data, Split
from jacmatch.errors import InputError, UnsupportedError, unknown_name
from jacmatch.jacobian import ESTIMATORS, READOUTS, Estimator, LogProbabilities, Readout, doctor
from jacmatch.models import count_parameters
from jacmatch.objectives import AtData, AtMixedPairs, AtNoise, Distillation, Point, Share, WeightSchedule
from jacmatch.recipes import networks, sheet
from jacmatch.recipes.fields import TrainingFields, positive
from jacmatch.recipes.progress import Progress
from jacmatch.recipes.summary import METHODS, identity, summarized
from jacmatch.recipes.teachers import Prepared, prepare
from jacmatch.recipes.train import Train, load, parts, unfinished
from jacmatch.report import write_report
from jacmatch.runs import Run
from jacmatch.teachers import ModuleTeacher, Teacher
from jacmatch.training import CHECKPOINT, Fitted, agreement, evaluate, fit
from jacmatch.version import __version__

_LAWFUL = ("random-outputs", "random-inputs")  # probes whose directions can have one law or another
_SINGLE = ("every-row", "top-class", "label-class", "data-pairs")  # probes whose number is given by what they are


@dataclass(frozen=True)
class Distill(TrainingFields):
    """Distil a teacher into a student: labels only, + outputs, + outputs and Jacobians, at equal optimiser steps."""

    data: str = "digits"
    """Data set: digits, fashion-mnist[:DIR], cifar10:DIR, cifar100:DIR, npz:FILE, folder:DIR, synthetic, or
    PACKAGE.MODULE:CALLABLE."""
    teacher: str = "cnn5"
    """Teacher: a model name, or the folder of a run that trained one."""
    student: str = "cnn3"
    """Student: a model name."""
    teacher_weights: Path | None = None
    """Weights of the teacher, a safetensors file. Without, it is trained first and kept."""
    teacher_mean: tuple[float, ...] | None = None
    """Mean that the teacher's inputs had subtracted when it was trained, where the file does not say."""
    teacher_std: tuple[float, ...] | None = None
    """Standard deviation that they were divided by."""
    teacher_steps: int = 600
    """Optimiser steps of a teacher that is trained first."""
    per_class: int | None = None
    """Training samples for each class, 0 for all; 10 if left out, and all in a regression."""
    seeds: int = 3
    """How many seeds: subset, initial weights and batches differ between them, and are the same for each method."""
    methods: tuple[Literal["labels", "outputs", "jacobians"], ...] = ("labels", "outputs", "jacobians")
    """What is compared."""
    labels_weight: float = 1.0
    """Weight of the label term."""
    outputs_weight: float = 1.0
    """Weight of the output term."""
    jacobian_share: float = 0.3
    """Share of the Jacobian term in the gradient norm."""
    jacobian_weight: float | None = None
    """Weight of the Jacobian term itself, in place of the share."""
    jacobian_schedule: Literal["by-data", "constant"] = "by-data"
    """by-data: the share or weight falls with the number of training samples for each class. constant: it does not."""
    jacobian_fades_from: float = 1.0
    """Progress, 0 to 1, from which the Jacobian term fades out until the end of training; 1 never."""
    output_loss: Literal["squared", "kl"] = "squared"
    """Loss of the output term."""
    temperature: float = 1.0
    """Temperature of kl and of log-probabilities."""
    jacobian_loss: Literal["relative", "squared", "normalized"] = "relative"
    """Loss of the Jacobian term."""
    probe: str = "random-outputs"
    """Which derivative products are compared (see `jacmatch list`)."""
    probes: int = 1
    """How many of them for each sample."""
    probe_law: Literal["gaussian", "rademacher", "sphere", "basis", "orthogonal"] = "gaussian"
    """Law of random-outputs and random-inputs."""
    readout: str = "logits"
    """What is differentiated (see `jacmatch list`)."""
    point: Literal["data", "noise", "mixed-pairs"] = "data"
    """Where student and teacher are compared."""
    noise: float = 0.1
    """Standard deviation of point=noise and of the probe antithetic-noise, in units of the raw input."""
    every: int = 1
    """The Jacobian term is computed on each n-th step, with n times its weight."""
    batch_norm: Literal["batch", "frozen"] = "frozen"
    """Statistics of BatchNorm in the derivative: constants, so that samples stay apart, or part of it."""
    allow_code: bool = False
    """Build a teacher from a run folder even if that runs code outside the package."""

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Does the job, and returns the result that is written to the run folder."""
        self._check()
        self.training()  # its settings speak before anything is trained
        data = load(self.data, self.seed, self.smoke)
        if self.probe == "sampled-rows" and self.probes > data.outputs:
            raise InputError(f"`--probes` of sampled-rows must be at most {data.outputs}, all rows.", got=self.probes)
        description = networks.Description.of(self.student, data)
        subset, _ = parts(data, self.validation, self._per_class(data), self.seed)
        for method in self.methods:  # settings that cannot go together speak before anything is trained
            self.objective(method, description.build(), nn.Linear(1, 1), subset, data, self.seed)
        start = time.perf_counter()
        with progress or Progress() as shown:
            run = self.begin("distill")
            teacher = self._teacher(data, shown)
            self._examine(run, description, data)
            students: dict[tuple[int, str], nn.Module] = {}
            for seed in range(self.seed, self.seed + self._seeds):
                for method in self.methods:
                    done = self._one(run, method, seed, data, description, teacher, shown)
                    if isinstance(done, Fitted):
                        return unfinished(run, done.steps)
                    students[seed, method] = done
        result = {
            "job": "distill",
            "version": __version__,
            "seed": self.seed,
            **summarized(run, self.methods, students, "accuracy" if data.classes else "rmse"),
            "seconds": time.perf_counter() - start,
            "train_samples": len(subset),
            "test_samples": len(data.test),
            "jacobian_samples": self._samples(data),
            "teacher_source": teacher.source,
            "settings": self.settings(),
        }
        networks.save(run, students[self.seed, self.methods[-1]], description)
        sheet.write(run, data, teacher.network, {m: students[self.seed, m] for m in self.methods}, METHODS)
        run.write_result(result)
        return {**result, "out": str(run.path), "report": str(write_report(run.path))}

    @property
    def _seeds(self) -> int:
        return 1 if self.smoke else self.seeds

    def _check(self) -> None:
        positive("distill", seeds=self.seeds, probes=self.probes, every=self.every, teacher_steps=self.teacher_steps)
        for name, known, given in (("--probe", ESTIMATORS, self.probe), ("--readout", READOUTS, self.readout)):
            if given not in known:
                raise unknown_name(f"`{name}` of `distill`", given, known)
        if self.probes > 1 and self.probe in _SINGLE:
            raise InputError(f"`--probes` of `distill` must be 1 with --probe {self.probe}.", got=self.probes)
        if self.probe_law != "gaussian" and self.probe not in _LAWFUL:
            raise InputError(f"`--probe-law` of `distill` belongs to --probe {' or '.join(_LAWFUL)}.", got=self.probe)
        if self.teacher_weights is None and (self.teacher_mean or self.teacher_std):
            raise InputError("`--teacher-mean` and `--teacher-std` of `distill` belong to --teacher-weights.")
        if not self.methods:
            raise InputError("`--methods` of `distill` must name at least one.", do=f"Known: {', '.join(METHODS)}.")
        if len(set(self.methods)) < len(self.methods):
            raise InputError("`--methods` of `distill` must differ.", got=" ".join(self.methods))

    def _teacher(self, data: Data, progress: Progress) -> Prepared:
        recipe = Train(
            data=self.data,
            model=self.teacher,
            seed=self.seed,
            device=self.device,
            smoke=self.smoke,
            steps=self.teacher_steps,
            batch_size=128,
            augment=self.augment,
            precision=self.precision,
            validation=self.validation,
        )
        weights = None
        if self.teacher_weights is not None:
            weights = networks.Weights(self.teacher_weights, self.teacher_mean, self.teacher_std)
        return prepare(self.teacher, data, weights, recipe, progress, allow_code=self.allow_code)

    def _examine(self, run: Run, description: networks.Description, data: Data) -> None:
        """The doctor looks at the student before the first step."""
        if "jacobians" not in self.methods:
            return
        torch.manual_seed(self.seed)
        student = description.build()
        diagnosis = doctor(student.train(), data.train.inputs(torch.arange(min(8, len(data.train)))))
        run.write_json("doctor.json", {"engine": diagnosis.engine, "ok": diagnosis.ok, "says": str(diagnosis)})
        if diagnosis.engine == "none":
            raise UnsupportedError(f"No derivative engine is right for the student {self.student!r}: {diagnosis}")

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
            return networks.load_student(child.path, allow_code=True)
        train, validation = parts(data, self.validation, self._per_class(data), seed)
        torch.manual_seed(seed)
        student = description.build()
        training = self.training()
        fitted = fit(
            self.objective(method, student, teacher.network, train, data, seed),
            train,
            training,
            seed=seed,
            device=self.device,
            run=child,
            validation=validation,
            on_step=progress.training(f"{METHODS[method]}, seed {seed}", training.steps),
        )
        if not fitted.finished:
            return fitted
        networks.save(child, student, description)
        child.write_result(
            {
                "job": "distill",
                "version": __version__,
                "seed": seed,
                "method": method,
                "teacher": self._described(teacher.network, data),
                "student": self._described(student, data),
                "agreement": agreement(student, ModuleTeacher(teacher.network), data.test, samples=self._samples(data)),
                "seconds": fitted.seconds,
                "samples_per_second": fitted.samples_per_second,
                "peak_memory_bytes": fitted.peak_memory_bytes,
                "steps": fitted.steps,
                "settings": child.settings,
            }
        )
        (child.path / CHECKPOINT).unlink(missing_ok=True)
        return student

    def _per_class(self, data: Data) -> int:
        return (10 if data.classes else 0) if self.per_class is None else self.per_class

    def _samples(self, data: Data) -> int:
        return min(16 if self.smoke else 256, len(data.test))

    def _described(self, network: nn.Module, data: Data) -> dict[str, Any]:
        return {**evaluate(network, data.test, device=self.device), "parameters": count_parameters(network)}

    def objective(
        self, method: str, student: nn.Module, teacher: nn.Module | Teacher, train: Split, data: Data, seed: int
    ) -> Distillation:
        """The objective of one method."""
        jacobians = Share(self.jacobian_share) if self.jacobian_weight is None else self.jacobian_weight
        per_class = len(train) / data.classes if data.classes and self.jacobian_schedule == "by-data" else None
        return Distillation(
            student,
            None if method == "labels" else teacher,
            labels=self.labels_weight,
            outputs=self.outputs_weight,
            jacobians=jacobians if method == "jacobians" else 0.0,
            probe=self._probe(),
            readout=self._readout(),
            output_loss=self.output_loss,
            temperature=self.temperature,
            jacobian_loss=self.jacobian_loss,
            point=self._point(),
            every=self.every,
            schedule=WeightSchedule(per_class, fades_from=self.jacobian_fades_from),
            batch_norm=self.batch_norm,
            task="classification" if data.classes else "regression",
            seed=seed,
        )

    def _probe(self) -> Estimator:
        settings: dict[str, Any] = {}
        if self.probe not in _SINGLE:
            settings["count"] = self.probes
        if self.probe in _LAWFUL:
            settings["law"] = self.probe_law
        if self.probe == "antithetic-noise":
            settings["sigma"] = self.noise
        if self.probe == "fisher-rows":
            settings["temperature"] = self.temperature
        return ESTIMATORS[self.probe](**settings)

    def _readout(self) -> Readout:
        if self.readout == "log-probabilities":
            return LogProbabilities(self.temperature)
        if self.readout in ("attention-pixel", "attention-maps", "pooled-features"):
            raise InputError(
                f"`--readout {self.readout}` needs a layer of each network.", do="Use the Python class Distillation."
            )
        return READOUTS[self.readout]()

    def _point(self) -> Point:
        if self.point == "noise":
            return AtNoise(self.noise)
        return AtMixedPairs() if self.point == "mixed-pairs" else AtData()
