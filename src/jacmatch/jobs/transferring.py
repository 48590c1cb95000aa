"""Transfer from a pretrained teacher as settings: target, teacher, layers that are compared, students by method."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from jacmatch.datasets import Data, Split, of_classes
from jacmatch.errors import InputError
from jacmatch.jobs import networks, pretrained
from jacmatch.jobs.closeness import bound, closeness, mixed
from jacmatch.jobs.depths import chosen_pairs, named_pairs
from jacmatch.jobs.fields import TrainingFields, positive
from jacmatch.jobs.networks import Description
from jacmatch.jobs.pretrained import Pretrained
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.train import Train, load
from jacmatch.objectives import Distillation, Share
from jacmatch.objectives.transfer import Pair
from jacmatch.objectives.transfer import Transfer as Objective
from jacmatch.teachers import ModuleTeacher, RememberedTeacher, Teacher
from jacmatch.training import Fitted, fit
from jacmatch.training.layout import channels_last

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
    """What all students of a job share.

    Attributes:
        data: The target; its test images are in a fixed random order, so that the first of them are of mixed classes.
        teacher: The pretrained teacher.
        asked: The same as a teacher; one that remembers is made for each set of training images.
        description: How a student is built for the target.
        pairs: Layers that are compared.
    """

    data: Data
    teacher: Pretrained
    asked: Teacher
    description: Description
    pairs: tuple[Pair, ...]

    @property
    def classes(self) -> int:
        """Of the target."""
        return self.data.outputs

    def student(self) -> nn.Module:
        """A new student with the target's outputs and, after them, the teacher's."""
        told = self.teacher.description.outputs
        return replace(self.description, outputs=self.classes + told).build()


@dataclass(frozen=True)
class TransferFields(TrainingFields):
    """Settings of a transfer, and how its networks are made, trained and judged."""

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
    """Optimiser steps."""
    teacher_steps: int = 400
    """Optimiser steps of a teacher that is trained first."""
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
    """How many pairs are chosen, from the deepest up."""
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
    output_loss: Literal["squared", "kl"] = "squared"
    """Loss of the output term: squared differences of the outputs, or Hinton's divergence."""
    temperature: float = 2.0
    """Temperature of kl."""
    jacobian_loss: Literal["relative", "squared", "normalized"] = "normalized"
    """Loss of the Jacobian term."""
    every: int = 1
    """The Jacobian term is computed on each n-th step, with n times its weight."""
    oracle_lr: float = 1e-3
    """Learning rate of the fine-tuned teacher."""
    oracle_steps: int | None = None
    """Steps of the fine-tuned teacher; as many as the students' if left out."""
    batch_norm: Literal["batch", "frozen"] = "frozen"
    """Statistics of BatchNorm in the derivative: constants, so that images stay apart, or part of it."""

    def check(self) -> None:
        """Refuses settings that are wrong by themselves."""
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
        """Target, teacher and pairs; a teacher without weights is trained first and kept."""
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
        """The layers that are compared: as named, or chosen by resolution."""
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
            resident_mib=self.resident_mib, doctor=self.doctor,
        )  # fmt: skip
        source = of_classes(data, range(count))
        return pretrained.trained_first(self.teacher, source, recipe, progress), of_classes(data, range(count, classes))

    def objective(self, method: Method, student: nn.Module, ready: Ready) -> Distillation | Objective:
        """The objective of one method; `student` is the fine-tuned teacher for the oracle."""
        if method == "oracle":
            return Distillation(student, labels=1.0)

        def weight(name: str, share: float, given: float | None) -> float:
            return 0.0 if name not in method else Share(share) if given is None else given

        return Objective(
            student,
            None if method == "labels" else ready.asked,
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

    def trained(
        self, method: Method, seed: int, ready: Ready, train: Split, **fitting: Any
    ) -> tuple[nn.Module, nn.Module, Fitted]:
        """The network of a method with all its outputs, its part for the target, and how it was trained.

        Args:
            method: Which.
            seed: Of initial weights and batches.
            ready: What all share.
            train: The training images.
            **fitting: Further arguments of `fit`.
        """
        torch.manual_seed(seed)
        if not isinstance(ready.asked, RememberedTeacher):
            ready = replace(ready, asked=RememberedTeacher(ready.asked))
        oracle = method == "oracle"
        network = ready.teacher.with_outputs(ready.classes) if oracle else ready.student()
        objective = self.objective(method, network, ready)
        changes = {"lr": self.oracle_lr, "steps": self.oracle_steps or self.steps} if oracle else {}
        changes["doctor"] = self.doctor and seed == self.seed
        fitted = fit(objective, train, self.training(**changes), seed=seed, device=self.device, **fitting)
        student: Any = objective.student
        return network, student, fitted

    def judged(
        self, method: str, network: nn.Module, ready: Ready, train: Split, *, some: int = 128, far: int = FAR
    ) -> dict[str, Any]:
        """Agreement with the teacher on `some` unseen images, and the terms of the bound for `far` of them.

        There is no agreement of the oracle, and no bound where the second head is not trained.
        """
        keys = ("top1", "jacobian_cosine", "jacobian_relative_error", "attention_cosine")
        found: dict[str, Any] = {"agreement": dict.fromkeys(keys), "bound": None}
        if method == "oracle":
            return found
        teacher, test = ready.teacher.network, ready.data.test
        place = next(network.parameters()).device
        shown = test.subset(torch.arange(min(16 if self.smoke else some, len(test))))
        maps = {"size": self.pool, "p": self.p}
        found["agreement"] = closeness(network, teacher, ready.classes, ready.pairs, shown, **maps)
        if method != "labels":
            near, unseen = (each.to(place) for each in self.images(ready, train, far))
            loss = (self.output_loss, self.temperature)
            found["bound"] = bound(network, teacher.to(place), ready.classes, *loss, near, unseen)
        return found

    def images(self, ready: Ready, train: Split, count: int = FAR) -> tuple[torch.Tensor, torch.Tensor]:
        """Training images and unseen images of the target, at most `count` of each, of mixed classes."""
        count = 50 if self.smoke else count
        return mixed(train, count).inputs(), ready.data.test.inputs(torch.arange(min(count, len(ready.data.test))))
