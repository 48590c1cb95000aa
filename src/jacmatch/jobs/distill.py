"""`jacmatch distill`: teacher → student, with and without Jacobians, at equal optimizer steps.

The settings of objective, teacher, data and seeds are shared with `jacmatch cache`.
"""

import inspect
import io
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from jacmatch import objectives
from jacmatch.datasets import Data, Split
from jacmatch.diagnostics import benchmark_engines
from jacmatch.errors import InputError, unknown_name
from jacmatch.jacobian import (
    ESTIMATORS,
    READOUTS,
    BatchNormPolicy,
    Engine,
    Estimator,
    LogProbabilities,
    RandomInputs,
    Readout,
    vjp,
)
from jacmatch.jacobian.probes import Law
from jacmatch.jobs import networks, study
from jacmatch.jobs.networks import same_inputs
from jacmatch.jobs.settings import SMOKE_JACOBIANS, TrainingFields, dense_settings, load, positive
from jacmatch.jobs.study import Cell, Done, Progress, Result, Task
from jacmatch.jobs.teachers import Prepared, check_teacher, prepare
from jacmatch.jobs.train import Train
from jacmatch.losses import JacobianLoss, OutputLoss
from jacmatch.models import ValuesOnly, catalog
from jacmatch.objectives import Distillation, GradientShare, Point
from jacmatch.objectives.weights import Recipe, recipe
from jacmatch.runs import Run, spread
from jacmatch.runs.files import load as load_json
from jacmatch.teachers import Teacher
from jacmatch.training import Batches, agreement, find_device
from jacmatch.training.distributed import ProcessGroup
from jacmatch.training.loggers import first_of_classes
from jacmatch.training.state import channels_last

METHODS = {"labels": "labels only", "outputs": "labels + outputs", "jacobians": "labels + outputs + Jacobians"}
"""Names of the methods in tables."""

_OF_LABELS = ("label-class", "label-logit", "loss")  # probes and readouts that need the label of one sample
_OF_ROWS = ("every-row", "top-class", "label-class", "sampled-rows")  # probes that need outputs (B, K)
_DERIVATIVES = (  # settings that request a Jacobian term for any amount of data
    *("probe", "probes", "probe_chunk", "probe_law", "probe_dimensions", "readout", "jacobian_loss", "every"),
    *("fraction", "engine", "jacobian_schedule", "jacobian_fades_from"),
)


def _settings(probe: str) -> Set[str]:
    """Return the names of a probe's settings."""
    return inspect.signature(ESTIMATORS[probe]).parameters.keys()


@dataclass(frozen=True)
class DistillationFields(TrainingFields):
    """Settings of jobs whose students learn values and Jacobians."""

    group: ClassVar[str] = "objective"

    labels_weight: float = 1.0
    """Weight of the label term."""
    outputs_weight: float = 1.0
    """Weight of the output term."""
    jacobian_share: float | None = None
    """Share of the Jacobian term in the gradient norm. By default 0.3 in regression; in classification 0.3 up to 200
    training samples per class or if any option of the Jacobian term is given, otherwise 0."""
    jacobian_weight: float | None = None
    """Fixed weight of the Jacobian term, instead of a share."""
    jacobian_schedule: Literal["by-data", "constant"] = "by-data"
    """by-data: the share or weight decreases with the number of training samples per class. constant: it does not."""
    jacobian_fades_from: float = 1.0
    """Fraction of the steps after which the weight of the Jacobian term decreases to 0. With 1 it does not decrease."""
    output_loss: Literal["auto", OutputLoss] = "auto"
    """Loss of the output term. auto: kl in classification, squared in regression."""
    temperature: float | None = None
    """Temperature of the output loss kl, of the readout log-probabilities and of the probe fisher-rows. By default 4
    for --output-loss auto, and 1 for the others."""
    jacobian_loss: JacobianLoss = "bounded"
    """Loss of the Jacobian term."""
    probe: str = "random-outputs"
    """Jacobian products that are compared (see `jacmatch list`)."""
    probes: int = 1
    """Number of products per sample; for noise-averaged, the number of noisy inputs whose rows are averaged."""
    probe_chunk: int | None = None
    """Number of Jacobian rows whose autograd graphs are in memory at the same time. 1 needs the least memory and the
    most time. By default all rows."""
    probe_law: Law = "gaussian"
    """Distribution of the directions of random-outputs, random-inputs and subspace-inputs."""
    probe_dimensions: int = 48
    """With --probe subspace-inputs: number of low-frequency cosines that span the directions."""
    readout: str = "logits"
    """Function of the network that is differentiated (see `jacmatch list`)."""
    point: Literal["auto", "data", "noise", "mixed-pairs"] = "auto"
    """Inputs at which student and teacher are compared. auto: mixed-pairs in classification with at most 30 training
    samples per class, unless an option needs the label of a single sample; otherwise data."""
    noise: float = 0.1
    """Standard deviation of --point noise and of the probes antithetic-noise and noise-averaged, in units of the raw
    input."""
    every: int = 1
    """Compute the Jacobian term only in every n-th step, with n times its weight."""
    fraction: float = 1.0
    """Fraction of each batch for which Jacobians are compared."""
    engine: Engine = "auto"
    """Engine of Jacobian–vector products (input directions). auto: the fastest one on the first batch."""
    batch_norm: BatchNormPolicy = "frozen"
    """How derivatives treat the statistics of BatchNorm. frozen: as constants, so that samples are independent. batch:
    as functions of the batch."""

    def check_objective(self) -> None:
        """Refuse settings that are wrong for any data."""
        positive("distill", probes=self.probes, every=self.every, probe_dimensions=self.probe_dimensions)
        weights = {"labels": self.labels_weight, "outputs": self.outputs_weight, "jacobian": self.jacobian_weight}
        for name, weight in weights.items():
            if weight is not None and not 0 <= weight < math.inf:
                raise InputError(f"`--{name}-weight` of `distill` must be at least 0 and finite.", got=weight)
        for name, known, given in (("--probe", ESTIMATORS, self.probe), ("--readout", READOUTS, self.readout)):
            if given not in known:
                raise unknown_name(f"`{name}` of `distill`", given, known)
        if self.probes > 1 and "count" not in _settings(self.probe):
            raise InputError(f"`--probes` of `distill` must be 1 with --probe {self.probe}.", got=self.probes)
        if self.probe_law != "gaussian" and "law" not in _settings(self.probe):
            lawful = " or ".join(name for name in ESTIMATORS if "law" in _settings(name))
            raise InputError(f"`--probe-law` of `distill` needs --probe {lawful}.", got=self.probe)

    def objective(
        self, method: str, student: nn.Module, teacher: nn.Module | Teacher, train: Split, data: Data, seed: int
    ) -> Distillation:
        """Return the objective of one method: `labels`, `outputs` or `jacobians`."""
        if self.probe == "sampled-rows" and self.probes > data.outputs:
            raise InputError(f"`--probes` of sampled-rows must be at most {data.outputs}, all rows.", got=self.probes)
        if data.positions and (self.probe in _OF_ROWS or self.readout not in ("logits", "log-probabilities")):
            rule = "`--probe` and `--readout` of `distill` must fit per-position outputs, which have no row per class."
            do = "Use random-outputs, random-inputs or fisher-rows, and logits or log-probabilities."
            raise InputError(rule, got=f"{self.probe} and {self.readout}", do=do)
        chosen = self.recipe(*_of_a_class(data, len(train)))
        return Distillation(
            student,
            None if method == "labels" else teacher,
            labels=self.labels_weight,
            outputs=self.outputs_weight,
            jacobians=chosen.jacobians if method == "jacobians" else 0.0,
            probe=self._probe(teacher),
            readout=self._readout(),
            output_loss=chosen.output_loss,
            temperature=chosen.temperature,
            jacobian_loss=self.jacobian_loss,
            point=chosen.point,
            every=self.every,
            chunk_size=self.probe_chunk,
            fraction=self.fraction,
            engine=self.engine,
            schedule=chosen.schedule,
            batch_norm=self.batch_norm,
            task="classification" if data.classes else "regression",
            seed=seed,
            **dense_settings(data),
        )

    def _probe(self, teacher: nn.Module | Teacher) -> Estimator:
        """Return the probe; for a teacher with values only, input directions instead of the default."""
        if isinstance(teacher, ValuesOnly) and self.probe == DistillationFields.probe:
            return RandomInputs(self.probes, law=self.probe_law)
        given: dict[str, Any] = {"count": self.probes, "law": self.probe_law, "k": self.probe_dimensions}
        given |= {"sigma": self.noise, "temperature": 1.0 if self.temperature is None else self.temperature}
        return ESTIMATORS[self.probe](**{name: given[name] for name in _settings(self.probe) & given.keys()})

    def _readout(self) -> Readout:
        if self.readout == "log-probabilities":
            return LogProbabilities(1.0 if self.temperature is None else self.temperature)
        if self.readout in ("attention-pixel", "attention-maps", "pooled-features", "pca-features", "outputs-from"):
            rule = f"`--readout {self.readout}` needs a layer or a head of each network."
            raise InputError(rule, do="Use the Python class Distillation.")
        return READOUTS[self.readout]()

    def recipe(self, per_class: float | int | None, dense: bool = False) -> Recipe:
        """Return the settings that depend on the training samples per class (None in a regression)."""
        point: Point | None = None if self.point == "auto" else objectives.AtData()
        if self.point in ("noise", "mixed-pairs"):
            point = objectives.AtNoise(self.noise) if self.point == "noise" else objectives.AtMixedPairs()
        weight = self.jacobian_weight
        if weight is None and self.jacobian_share is not None:
            weight = GradientShare(self.jacobian_share)
        by_data = per_class if self.jacobian_schedule == "by-data" else None
        return recipe(
            "regression" if per_class is None else "classification",
            per_class,
            single_label=dense or self.probe in _OF_LABELS or self.readout in _OF_LABELS,
            derivatives=any(getattr(self, name) != getattr(DistillationFields, name) for name in _DERIVATIVES),
            output_loss=None if self.output_loss == "auto" else self.output_loss,
            temperature=self.temperature,
            point=point,
            jacobians=weight,
            schedule=objectives.WeightSchedule(by_data, fades_from=self.jacobian_fades_from),
        )

    def resolved(self, per_class: float | int | None, dense: bool = False) -> dict[str, Any]:
        """Return the settings that depend on the training samples per class (None in a regression), for a result."""
        chosen = self.recipe(per_class, dense)
        share = (
            chosen.jacobians
            if isinstance(chosen.jacobians, GradientShare) or not chosen.jacobians
            else self.jacobian_share
        )
        return {
            "point": next(name for name, kind in objectives.POINTS.items() if isinstance(chosen.point, kind)),
            "output_loss": chosen.output_loss,
            "temperature": chosen.temperature,
            "jacobian_share": None if share is None else float(share),
        }


def _of_a_class(data: Data, samples: int) -> tuple[float | None, bool]:
    """Return the training samples per class, and whether labels are per position: each sample then has all classes."""
    if data.classes is None:
        return None, False
    return (float(samples), True) if data.positions else (samples / data.classes, False)


@dataclass(frozen=True)
class TeachingFields(DistillationFields):
    """Settings of `distill` and `cache`: teacher, student, data and seeds."""

    group: ClassVar[str] = "task"

    data: str = "digits"
    """Data set: digits, fashion-mnist[:DIR], cifar10:DIR, cifar100:DIR, npz:FILE, folder:DIR, synthetic, or
    PACKAGE.MODULE:CALLABLE. Read from disk during training: stream:DIR (a folder), wds:DIR (tar shards)."""
    teacher: str = "cnn5"
    """Teacher: a model name, a run folder, hf:DIR, onnx:FILE, or a PACKAGE.MODULE:CALLABLE that returns the outputs of
    a batch. An ONNX file and a callable have outputs only, no derivatives."""
    student: str = "cnn3"
    """Student: a model name."""
    teacher_weights: Path | None = None
    """Weights of the teacher: safetensors, a torch checkpoint (.pth), or a folder of either. By default the teacher is
    trained first and cached."""
    teacher_mean: tuple[float, ...] | None = None
    """Mean of the teacher's input normalization, if the weights file does not contain it."""
    teacher_std: tuple[float, ...] | None = None
    """Standard deviation of the teacher's input normalization, if the weights file does not contain it."""
    teacher_steps: int = 600
    """Number of optimizer steps of a teacher that is trained first."""
    per_class: int | None = None
    """Number of training samples per class, 0 for all. By default 10 in classification and all in regression."""
    seeds: int = 3
    """Number of seeds. Subset, initial weights and batches differ between seeds; they are the same for all methods of a
    seed."""
    methods: tuple[Literal["labels", "outputs", "jacobians"], ...] = ("labels", "outputs", "jacobians")
    """Methods to compare."""

    def check_teaching(self) -> None:
        """Refuse settings that are wrong for any data."""
        positive("distill", seeds=self.seeds, teacher_steps=self.teacher_steps)
        self.check_objective()
        if not self.foreign_teacher and (self.teacher_mean or self.teacher_std):
            raise InputError("`--teacher-mean` and `--teacher-std` of `distill` need --teacher-weights.")
        if not self.methods:
            raise InputError("`--methods` of `distill` must name at least one.", do=f"Known: {', '.join(METHODS)}.")
        if len(set(self.methods)) < len(self.methods):
            raise InputError("`--methods` of `distill` must name each method once.", got=" ".join(self.methods))

    @property
    def foreign_teacher(self) -> bool:
        """Whether the teacher was not trained by a job of this package."""
        code = catalog.is_code(self.teacher) and catalog.function_of_batch(self.teacher) is not None
        return self.teacher_weights is not None or self.teacher.startswith(("onnx:", "hf:")) or code

    @property
    def runs(self) -> range:
        """The seed of each run."""
        return range(self.seed, self.seed + (1 if self.smoke else self.seeds))

    def taught_by(self, data: Data, progress: Progress) -> Prepared:
        """Return the teacher: loaded, or trained first."""
        more: dict[str, Any] = {"batch_size": 128, "augment": self.augment, "precision": self.precision}
        recipe = Train(**self.teacher_settings(), **more)
        weights = None
        if self.teacher_weights is not None or self.teacher_mean or self.teacher_std:
            weights = networks.Weights(self.teacher_weights, self.teacher_mean, self.teacher_std)
        prepared = prepare(self.teacher, data, weights, recipe, progress, allow_code=self.allow_code)
        if self.channels_last:
            channels_last(prepared.network)
        return prepared

    def samples_per_class(self, data: Data) -> int:
        """How many training samples of each class are used, 0 for all."""
        return (10 if data.classes and not data.positions else 0) if self.per_class is None else self.per_class


ENGINE = "engine.json"
"""File of the engine benchmark in a run folder: a run measures once, and uses the same engine when it resumes."""


@dataclass(frozen=True)
class Distill(TeachingFields):
    """Compare students that learn from labels, from labels and a teacher's outputs, and also from its Jacobians."""

    main: ClassVar[str] = "data teacher student per_class methods seeds steps device out smoke"
    examples: ClassVar[tuple[str, ...]] = ("", "--data npz:my.npz --teacher runs/teacher --student mlp:16")

    cache: Path | None = None
    """Read the teacher's outputs and Jacobian products from this folder, which `jacmatch cache build` wrote with the
    same options."""

    def run(self, progress: Progress | None = None) -> Result:
        """Train and measure, and return the result that is written to the run folder."""
        self.check_teaching()
        self.training()  # refuses wrong settings before anything is trained
        data = load(self.data, self.seed, self.smoke, positions=True)
        description = networks.Description.of(self.student, data)
        subset, _ = self.parts(data, self.samples_per_class(data), self.seed)
        student = description.build()
        for method in self.methods:  # incompatible settings are refused before anything is trained
            self.objective(method, student, nn.Linear(1, 1), subset, data, self.seed)
        with progress or Progress() as shown:
            run = self.begin("distill")
            same_inputs(run, data, networks=(description,))
            teacher = self.taught_by(data, shown)
            networks.matches(run, "teacher", networks.of_teacher(teacher.network, data))
            checked = check_teacher(teacher.network, data, shown, smoke=self.smoke) if self.foreign_teacher else {}
            if self.cache is not None:
                from jacmatch.jobs.cache import cached_teachers  # which extends the settings above

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
            prepare = partial(self._prepare, run, data, description, teacher)
            conclude = partial(self._conclude, run, data, len(subset), teacher, checked)
            return study.run_cells(run, cells, prepare, conclude, device=self.device, progress=shown)

    def _prepare(self, run: Run, data: Data, description: networks.Description, teacher: Prepared, cell: Cell) -> Task:
        train, validation = self.parts(data, self.samples_per_class(data), cell.seed)
        torch.manual_seed(cell.seed)
        student = description.build()
        queried = teacher.cached.get(cell.seed, teacher.network)
        objective = self.objective(cell.method, student, queried, train, data, cell.seed)
        self._choose_engine(run, objective, train)

        def finish() -> tuple[nn.Module, dict[str, Any]]:
            return student, {
                "teacher": study.measured(teacher.network, data.test, self.device),
                "student": study.measured(student, data.test, self.device),
                "agreement": agreement(student, teacher.answers, data.test, samples=self._samples(data)),
            }

        return Task(objective, train, validation, finish)

    def _conclude(self, run: Run, data: Data, samples: int, teacher: Prepared, checked: Result, done: Done) -> Result:
        """Return the result; the last method represents the run."""
        rows = [_row(study.of_method(done, method)) for method in self.methods]
        main = study.of_method(done, self.methods[-1])
        first = {cell.method: cell for cell, _ in done if cell.seed == self.seed}
        students = {method: cell.load(run) for method, cell in first.items()}
        study.save_main(run, first[self.methods[-1]], students[self.methods[-1]])
        write_jacobian_figure(run, data, teacher.network, students, METHODS)
        return {
            "teacher": main[0]["teacher"],
            **study.main_fields(main, rows[-1]),
            "rows": rows,
            "train_samples": samples,
            "test_samples": len(data.test),
            "jacobian_samples": self._samples(data),
            "resolved": self.resolved(*_of_a_class(data, samples)),
            "teacher_source": teacher.source,
            "teacher_check": checked,
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
            run.write_json(ENGINE, vars(benchmark_engines(objective.to(device), batches(0))))
        chosen = None if run.follows else load_json(run.path / ENGINE)["engine"]
        settings.engine = ProcessGroup.current().broadcast(chosen)

    def _samples(self, data: Data) -> int:
        return min(SMOKE_JACOBIANS if self.smoke else 256, len(data.test))


def _row(results: Sequence[Result]) -> Result:
    """The row of a method, with the agreement that was measured."""
    known = [key for key, value in results[0]["agreement"].items() if value is not None]
    agreement = {key: spread([result["agreement"][key] for result in results]) for key in known}
    return study.row(METHODS[results[0]["method"]], results, agreement=agreement)


def write_jacobian_figure(
    run: Run, data: Data, teacher: nn.Module, students: Mapping[str, nn.Module], labels: Mapping[str, str]
) -> None:
    """Write `jacobian_figure.npz` for the first test image of each class, if the data are images."""
    if len(data.shape) != 3 or data.classes is None or data.positions or isinstance(teacher, ValuesOnly):
        return
    chosen = first_of_classes(data.test)
    x = data.test.inputs(chosen).cpu()
    top = _outputs(teacher, x).argmax(1)
    wanted = _jacobian_rows(teacher, x, top)
    got = torch.stack([_jacobian_rows(student, x, top) for student in students.values()])
    cosines = torch.nn.functional.cosine_similarity(got.flatten(2), wanted.flatten(1)[None], dim=2)
    file = io.BytesIO()
    np.savez_compressed(
        file,
        images=x.numpy(),
        teacher=wanted.numpy(),
        students=got.numpy(),
        methods=np.array([labels[method] for method in students]),
        cosines=cosines.numpy(),
        labels=data.test.y[chosen].cpu().numpy(),
    )
    run.write_bytes("jacobian_figure.npz", file.getvalue())


def _outputs(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = network.cpu().eval()(x)
    return outputs


def _jacobian_rows(network: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """The row of each image's class in the Jacobian of the logits."""
    cotangents = torch.nn.functional.one_hot(classes, _outputs(network, x).shape[1]).to(x.dtype)
    with torch.no_grad():
        return vjp(network, x, cotangents)[1]
