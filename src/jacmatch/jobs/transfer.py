"""`jacmatch transfer`: a pretrained teacher → a student of another architecture, on a small target set."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from jacmatch.datasets import Data, Split, of_classes
from jacmatch.errors import InputError
from jacmatch.jacobian import BatchNormPolicy
from jacmatch.jobs import networks, pretrained
from jacmatch.jobs.data import load
from jacmatch.jobs.inputs import same_inputs
from jacmatch.jobs.layer_pairs import chosen_pairs, named_pairs
from jacmatch.jobs.networks import Description
from jacmatch.jobs.pretrained import Pretrained
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.settings import SMOKE_JACOBIANS, TrainingFields, positive
from jacmatch.jobs.study import (
    Cell,
    Result,
    Task,
    head,
    main_fields,
    measured,
    of_method,
    over_seeds,
    row,
    run_cells,
    save_main,
)
from jacmatch.jobs.teacher_distance import bound, distances, head_agreement, mixed, nearest_mean_accuracy
from jacmatch.jobs.train import Train
from jacmatch.losses import JacobianLoss, OutputLoss
from jacmatch.models import FirstOutputs, count_parameters
from jacmatch.objectives import Distillation, GradientShare
from jacmatch.objectives.transfer import Pair
from jacmatch.objectives.transfer import Transfer as Objective
from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, entry
from jacmatch.runs import Run, spread
from jacmatch.teachers import MemoizedTeacher, ModuleTeacher, Teacher
from jacmatch.training import Training
from jacmatch.training.state import channels_last

Method = Literal["labels", "oracle", "lwf", "lwf+jacobians", "lwf+attention", "lwf+attention+jacobians"]
METHODS: dict[str, str] = {
    "labels": "labels only",
    "oracle": "teacher fine-tuned (oracle)",
    "lwf": "LwF: labels + outputs",
    "lwf+jacobians": "LwF + Jacobians",
    "lwf+attention": "LwF + attention",
    "lwf+attention+jacobians": "LwF + attention + Jacobians",
}
"""What each method is called in tables; the six rows of the paper."""
FAR = 300
"""Unseen images that distances and the bound are about."""


@dataclass(frozen=True)
class Ready:
    """Data, teacher and layers of a job, which all students share.

    Attributes:
        data: The target; its test images are in a fixed random order, so that the first of them are of mixed classes.
        teacher: The pretrained teacher.
        answers: The network as a teacher; a memoized one is made for each set of training images.
        description: How a student is built for the target.
        pairs: Layers that are compared.
    """

    data: Data
    teacher: Pretrained
    answers: Teacher
    description: Description
    pairs: tuple[Pair, ...]

    @property
    def classes(self) -> int:
        """Number of classes of the target."""
        return self.data.outputs

    def student(self) -> nn.Module:
        """Return a new student with the target's outputs and, after them, the teacher's."""
        outputs = self.classes + self.teacher.description.outputs
        return replace(self.description, outputs=outputs).build()


_JUDGED = 2000  # test images that the teacher's own outputs are judged by
_SETS = {"unseen": "unseen images of the target", "source": "images of the source"}
_SPACES = {"pixels": "pixels", "features": "the teacher's pooled features"}
_TERMS = {
    "rho_unseen": "mean ρ, unseen",
    "rho_average": "mean ρ, training",
    "rho_largest": "max ρ, training",
    "slope": "K",
    "by_hausdorff": "max ρ + K·H",
    "by_nearest": "mean ρ + K·nearest",
    "by_transport": "mean ρ + K·W₁",
}


@dataclass(frozen=True)
class Transfer(TrainingFields):
    """Transfer from a pretrained teacher to a student of another architecture, with few labelled images.

    Six rows at equal steps: labels; the teacher fine-tuned; labels and the teacher's outputs (learning without
    forgetting); the same with attention maps, with their Jacobians, with both.
    """

    main: ClassVar[str] = "data teacher teacher_weights student per_class methods seeds device out smoke"
    examples: ClassVar[tuple[str, ...]] = (
        "--data digits --methods labels lwf lwf+jacobians",
        "--data folder:photos@64 --teacher runs/teacher",
    )

    data: str = "digits"
    """Target: digits, cifar10:DIR, folder:DIR[@SIZE], npz:FILE, … (see `jacmatch distill --help`)."""
    teacher: str = "cnn5"
    """Pretrained teacher: the folder of a run, or timm:NAME, torchvision:NAME or another model with --teacher-weights.
    Without weights it is trained first, on the first --source-classes of the data; the target is the other classes."""
    student: str = "cnn3"
    """Student: a model name."""
    teacher_weights: Path | None = None
    """Weights of the teacher: safetensors, a checkpoint of torch (.pth), or a folder of either."""
    teacher_outputs: int = 1000
    """Its number of outputs, with --teacher-weights."""
    teacher_size: int | None = None
    """Pixels a side that images are resized to for it, with --teacher-weights; as they are if left out."""
    teacher_mean: tuple[float, ...] | None = None
    """Mean that its inputs had subtracted when it was trained; timm: and torchvision: models know theirs."""
    teacher_std: tuple[float, ...] | None = None
    """Standard deviation that they were divided by."""
    steps: int = 200
    """Optimizer steps."""
    teacher_steps: int = 400
    """Optimizer steps of a teacher that is trained first."""
    source_classes: int = 0
    """Classes of the data that a teacher is trained on first; 0 for half of them."""
    per_class: int = 10
    """Training images of the target for each class, 0 for all."""
    seeds: int = 3
    """How many seeds: subset, initial weights and batches differ between them, and are the same for each method."""
    methods: tuple[Method, ...] = (
        "labels",
        "oracle",
        "lwf",
        "lwf+jacobians",
        "lwf+attention",
        "lwf+attention+jacobians",
    )
    """What is compared; oracle is the teacher itself, fine-tuned."""
    pairs: tuple[str, ...] = ()
    """Layers whose attention maps are compared, STUDENT_LAYER:TEACHER_LAYER; chosen by resolution if left out."""
    depths: int = 2
    """Number of pairs of layers, the deepest ones."""
    pool: int | None = None
    """Pixels a side that all maps are pooled to; the smaller map of each pair decides if left out."""
    p: float = 2.0
    """Exponent of the attention maps."""
    labels_weight: float = 1.0
    """Weight of the label term."""
    outputs_share: float = 0.3
    """Share of the output term in the gradient norm."""
    outputs_weight: float | None = None
    """Weight of the output term itself, in place of the share."""
    attention_share: float = 0.1
    """Share of the attention term."""
    attention_weight: float | None = None
    """Weight of the attention term, in place of the share."""
    jacobian_share: float = 0.1
    """Share of the Jacobian term."""
    jacobian_weight: float | None = None
    """Weight of the Jacobian term, in place of the share."""
    output_loss: OutputLoss = "squared"
    """Loss of the output term: squared differences of the outputs, or Hinton's divergence."""
    temperature: float = 2.0
    """Temperature of kl."""
    jacobian_loss: JacobianLoss = "normalized"
    """Loss of the Jacobian term."""
    every: int = 1
    """The Jacobian term is computed on each n-th step, with n times its weight."""
    oracle_lr: float = 1e-3
    """Learning rate of the fine-tuned teacher."""
    oracle_steps: int | None = None
    """Steps of the fine-tuned teacher; as many as the students' if left out."""
    batch_norm: BatchNormPolicy = "frozen"
    """Statistics of BatchNorm in the derivative: constants, so that images stay apart, or part of it."""

    def run(self, progress: Progress | None = None) -> Result:
        """Train and measure, and return the result that is written to the run folder."""
        self.check()
        start = time.perf_counter()
        with progress or Progress() as shown:
            ready = self.ready(shown)
            for method in self.methods:  # settings that do not go together are refused before anything is trained
                self.objective(method, ready.student(), ready)
            subset, _ = self.parts(ready.data, self.per_class, self.seed)
            run = self.begin("transfer")
            same_inputs(run, ready.data, ready.teacher.network, (ready.description,))
            cells = [
                Cell(
                    seed=seed,
                    method=method,
                    label=METHODS[method],
                    training=self.training_of(method, seed),
                    network=None if method == "oracle" else ready.description,
                )
                for seed in range(self.seed, self.seed + (1 if self.smoke else self.seeds))
                for method in self.methods
            ]
            return run_cells(
                run,
                cells,
                partial(self._prepare, ready),
                partial(self._conclude, run, ready, subset, start),
                device=self.device,
                progress=shown,
            )

    def _prepare(self, ready: Ready, cell: Cell) -> Task:
        train, validation = self.parts(ready.data, self.per_class, cell.seed)
        network, objective = self.network_and_objective(cell.method, cell.seed, ready)

        def finish() -> tuple[nn.Module, dict[str, Any]]:
            student: Any = objective.student
            fields = {
                "teacher": None,
                "student": {
                    **measured(student, ready.data.test, self.device),
                    "parameters": count_parameters(network),
                },
                **self.judged(cell.method, network, ready, train),
            }
            if isinstance(student, FirstOutputs):
                device = next(student.parameters()).device
                student = student.cut(ready.description.build(), train.inputs(torch.arange(2)).to(device))
            return student, fields

        return Task(objective, train, validation, finish)

    def _conclude(
        self, run: Run, ready: Ready, subset: Split, start: float, done: Sequence[tuple[Cell, Result]]
    ) -> Result:
        """The result; the last method but the oracle represents the run."""
        rows = {method: _row(method, of_method(done, method)) for method in self.methods}
        main = next((method for method in reversed(self.methods) if method != "oracle"), self.methods[0])
        teacher, test = ready.teacher, ready.data.test
        some = test.subset(torch.arange(min(_JUDGED, len(test))))
        if main != "oracle":
            save_main(run, next(cell for cell, _ in done if cell.method == main))
        result = {
            **head(run, self.seed),
            "teacher": {
                "accuracy": nearest_mean_accuracy(teacher.network, subset, some, ready.classes),
                "accuracy_of": "nearest class mean of its outputs",
                "parameters": count_parameters(teacher.network),
            },
            **main_fields(of_method(done, main), rows[main]),
            "rows": list(rows.values()),
            "pairs": [list(pair) for pair in ready.pairs],
            "distances": self._distances(ready, subset),
            "train_samples": len(subset),
            "test_samples": len(test),
            "seconds": time.perf_counter() - start,
            "settings": self.settings(),
        }
        result["tables"] = [table.plain() for table in tables(result)]
        return result

    def _distances(self, ready: Ready, subset: Split) -> dict[str, Any]:
        """How far unseen images of the target, and those of the source where it is known, are from the training set."""
        teacher = ready.teacher
        near, far = self.images(ready, subset)
        layer = ready.pairs[-1][1] if ready.pairs else None
        measured = {"unseen": distances(teacher.network, layer, near, far)}
        if teacher.source is not None:
            source = mixed(teacher.source.train, len(far)).inputs()
            measured["source"] = distances(teacher.network, layer, near, source)
        return measured

    def check(self) -> None:
        """Check the settings that need no data.

        Raises:
            InputError: A setting is out of range, or settings do not go together.
        """
        positive("transfer", seeds=self.seeds, every=self.every, depths=self.depths, teacher_steps=self.teacher_steps)
        positive("transfer", teacher_outputs=self.teacher_outputs, oracle_steps=self.oracle_steps or 1)
        self.training()
        self.training(lr=self.oracle_lr)
        if not self.methods:
            raise InputError("`--methods` of `transfer` must name at least one.", do=f"Known: {', '.join(METHODS)}.")
        if len(set(self.methods)) < len(self.methods):
            raise InputError("`--methods` of `transfer` must differ.", got=" ".join(self.methods))
        if self.pool is not None:
            positive("transfer", pool=self.pool)
        named = [name for name in ("teacher_size", "teacher_mean", "teacher_std") if getattr(self, name) is not None]
        if named and self.teacher_weights is None:
            flags = ", ".join(f"`--{name.replace('_', '-')}`" for name in named)
            raise InputError(f"{flags} of `transfer` must come with --teacher-weights.")

    def ready(self, progress: Progress) -> Ready:
        """Return target, teacher and pairs. A teacher without weights is trained first and cached."""
        data = load(self.data, self.seed, self.smoke)
        if data.classes is None:
            raise InputError("`--data` of `transfer` must have classes.", got="a regression")
        if len(data.shape) != 3:
            raise InputError("`--data` of `transfer` must be images.", got=f"samples of shape {data.shape}")
        teacher, data = self._teacher(data, progress)
        if self.channels_last:
            channels_last(teacher.network)
        data = replace(data, test=mixed(data.test))
        description = Description.of(self.student, data)
        ready = Ready(data, teacher, ModuleTeacher(teacher.network), description, ())
        if not any("attention" in method or "jacobians" in method for method in self.methods):
            return ready
        return replace(ready, pairs=self.layers(ready))

    def layers(self, ready: Ready) -> tuple[Pair, ...]:
        """Return the layers that are compared: as named, or chosen by resolution."""
        student, teacher = ready.student(), ready.teacher.network
        if self.pairs:
            return named_pairs(self.pairs, student, teacher)
        return chosen_pairs(student, teacher, ready.data.shape, self.depths)

    def _teacher(self, data: Data, progress: Progress) -> tuple[Pretrained, Data]:
        if networks.is_run(self.teacher):
            if self.teacher_weights is not None:
                raise InputError("A run folder brings its own weights.", got=str(self.teacher_weights))
            return pretrained.from_run(self.teacher, data.shape, allow_code=self.allow_code), data
        if self.teacher_weights is not None:
            weights = networks.Weights(self.teacher_weights, self.teacher_mean, self.teacher_std)
            size = self.teacher_size
            return pretrained.from_weights(self.teacher, self.teacher_outputs, data.shape, size, weights), data
        count, classes = self.source_classes or data.outputs // 2, data.outputs
        if not 2 <= count <= classes - 2:
            rule = "`--source-classes` of `transfer` must leave two classes on either side."
            raise InputError(rule, got=f"{count} of {classes}", do="Give a teacher that is trained already.")
        recipe = Train(
            data=self.data, model=self.teacher, seed=self.seed, device=self.device, smoke=self.smoke,
            steps=self.teacher_steps, validation=self.validation, workers=self.workers, prefetch=self.prefetch,
            resident_mib=self.resident_mib, doctor=self.doctor and not self.smoke,
        )  # fmt: skip
        source = of_classes(data, range(count))
        return pretrained.trained_first(self.teacher, source, recipe, progress), of_classes(data, range(count, classes))

    def objective(self, method: str, student: nn.Module, ready: Ready) -> Distillation | Objective:
        """Return the objective of one method; `student` is the fine-tuned teacher for the oracle."""
        if method == "oracle":
            return Distillation(student, labels=1.0)

        def weight(name: str, share: float, given: float | None) -> float:
            return 0.0 if name not in method else GradientShare(share) if given is None else given

        return Objective(
            student,
            None if method == "labels" else ready.answers,
            classes=ready.classes,
            pairs=ready.pairs,
            labels=self.labels_weight,
            outputs=weight("lwf", self.outputs_share, self.outputs_weight),
            attention=weight("attention", self.attention_share, self.attention_weight),
            jacobians=weight("jacobians", self.jacobian_share, self.jacobian_weight),
            size=self.pool,
            p=self.p,
            output_loss=self.output_loss,
            temperature=self.temperature,
            jacobian_loss=self.jacobian_loss,
            every=self.every,
            batch_norm=self.batch_norm,
        )

    def training_of(self, method: str, seed: int) -> Training:
        """Return the settings of the training loop; the first seed alone runs the pre-flight check."""
        changes = {"lr": self.oracle_lr, "steps": self.oracle_steps or self.steps} if method == "oracle" else {}
        return self.training(**changes, doctor=self.checked(seed, method == self.methods[-1]))

    def network_and_objective(self, method: str, seed: int, ready: Ready) -> tuple[nn.Module, Any]:
        """Return a new network with all its outputs, and the objective that trains it."""
        torch.manual_seed(seed)
        if not isinstance(ready.answers, MemoizedTeacher):
            ready = replace(ready, answers=MemoizedTeacher(ready.answers))
        network = ready.teacher.with_outputs(ready.classes) if method == "oracle" else ready.student()
        return network, self.objective(method, network, ready)

    def judged(
        self, method: str, network: nn.Module, ready: Ready, train: Split, *, some: int = 128, far: int = FAR
    ) -> dict[str, Any]:
        """Return the agreement with the teacher on `some` unseen images, and the terms of the bound for `far` of them.

        The oracle has no agreement. There is no bound where the second head is not trained.
        """
        keys = ("top1", "jacobian_cosine", "jacobian_relative_error", "attention_cosine")
        result: dict[str, Any] = {"agreement": dict.fromkeys(keys), "bound": None}
        if method == "oracle":
            return result
        teacher, test = ready.teacher.network, ready.data.test
        device = next(network.parameters()).device
        shown = test.subset(torch.arange(min(SMOKE_JACOBIANS if self.smoke else some, len(test))))
        maps = {"size": self.pool, "p": self.p}
        result["agreement"] = head_agreement(network, teacher, ready.classes, ready.pairs, shown, **maps)
        if method != "labels":
            near, unseen = (each.to(device) for each in self.images(ready, train, far))
            loss = (self.output_loss, self.temperature)
            result["bound"] = bound(network, teacher.to(device), ready.classes, *loss, near, unseen)
        return result

    def images(self, ready: Ready, train: Split, count: int = FAR) -> tuple[torch.Tensor, torch.Tensor]:
        """Return training images and unseen images of the target, at most `count` of each, of mixed classes."""
        count = 10 if self.smoke else count
        return mixed(train, count).inputs(), ready.data.test.inputs(torch.arange(min(count, len(ready.data.test))))


def _row(method: str, results: Sequence[Result]) -> Result:
    """The row of a method; numbers that it does not have are None."""
    bounds = [result["bound"] for result in results if result["bound"] is not None]
    return row(
        METHODS[method],
        results,
        agreement={
            key: over_seeds([result["agreement"][key] for result in results]) for key in results[0]["agreement"]
        },
        bound={key: spread([each[key] for each in bounds]) for key in bounds[0]} if bounds else None,
    )


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a result of `jacmatch transfer`."""
    rows = result["rows"]
    measures = (("top1", 100, 1), ("attention_cosine", 1, 2), ("jacobian_cosine", 1, 2))
    accuracy = [
        (row["label"], entry(row["accuracy"]), *(entry(row["agreement"][key], *form) for key, *form in measures))
        for row in rows
    ]
    teacher, settings = result["teacher"], result["settings"]
    notes = (
        f"{settings['data']}, {result['train_samples']} training images, {rows[0]['seeds']} seed(s). Agreement: share "
        "of unseen images on which the second head has the teacher's largest output; cosines: of attention maps, and "
        "of the gradients of their largest pixels.",
        f"The nearest class mean of the teacher's outputs has {100 * teacher['accuracy']:.1f} % accuracy.",
        f"Layers: {', '.join(' : '.join(pair) for pair in result['pairs']) or 'none'}.",
    )
    head = ("on the test part", "accuracy %", "agreement %", "cosine of maps", "cosine of gradients")
    bounds = {row["label"]: row["bound"] for row in rows if row["bound"] is not None}
    return [
        Table("accuracy", "Transfer", head, tuple(accuracy), notes),
        distance_table(result["distances"]),
        bound_table(bounds, settings["output_loss"]),
    ]


def distance_table(measured: Mapping[str, Any], title: str = "How far from the training images") -> Table:
    """Return Hausdorff distance, mean nearest distance and W₁, in pixels and in features."""
    rows = [
        (
            f"{_SETS[name]}, {_SPACES[space]}",
            *(f"{each[key]:.3g}" for key in ("hausdorff", "mean_nearest", "wasserstein")),
        )
        for name, spaces in measured.items()
        for space, each in spaces.items()
    ]
    head = ("from the training images", "Hausdorff", "mean nearest", "W₁")
    return Table("distances", title, head, tuple(rows), ("Euclidean, at most 300 images a set.",))


def bound_table(bounds: Mapping[str, Any], loss: str, title: str = "Why: the bound and its terms, in pixels") -> Table:
    """Return the terms of the bound by method, means over the seeds."""
    rows = [
        (label, *(NOTHING if bound is None else f"{bound[key]['mean']:.2f}" for key in _TERMS))
        for label, bound in bounds.items()
    ]
    what = "‖T(x) − S(x)‖ of the outputs" if loss == "squared" else "the divergence of the outputs"
    note = (
        f"ρ: {what}. K is estimated, the largest gradient of ρ and ratio |ρ(x) − ρ(x′)| / ‖x − x′‖ seen on these "
        "images: a lower bound of the true constant. A right side far above the left says that the guarantee is empty, "
        "and which term makes it so."
    )
    return Table("bound", title, ("method", *_TERMS.values()), tuple(rows), (note,))
