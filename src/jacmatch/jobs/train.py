"""`jacmatch train`: one network from labels, as a teacher or a baseline."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from jacmatch.datasets import Data
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.networks import same_inputs
from jacmatch.jobs.settings import TrainingFields, dense_settings, load
from jacmatch.jobs.study import NO_AGREEMENT, Cell, Progress, Result, Task, measured, train_cell, unfinished
from jacmatch.objectives import Distillation


@dataclass(frozen=True)
class Train(TrainingFields):
    """Train one network with labels, for use as a teacher or a baseline, from random or pretrained weights."""

    main: ClassVar[str] = "data model weights tune per_class steps lr device out smoke"
    examples: ClassVar[tuple[str, ...]] = (
        "--data cifar10:DIR --model resnet20 --augment crop flip",
        "--data folder:photos@64 --model timm:resnet18 --weights r.pth",
    )

    data: str = "digits"
    """Data set: digits, fashion-mnist[:DIR], cifar10:DIR, cifar100:DIR, npz:FILE, folder:DIR, synthetic, or
    PACKAGE.MODULE:CALLABLE. Read from disk during training: stream:DIR (a folder), wds:DIR (tar shards)."""
    model: str = "cnn5"
    """Network: a name from `jacmatch list`, timm:NAME, torchvision:NAME, hf:DIR or PACKAGE.MODULE:CALLABLE."""
    weights: Path | None = None
    """Initial weights: safetensors, a torch checkpoint (.pth), or a folder of either. If they are for other classes,
    the last layer is replaced."""
    tune: Literal["all", "head"] = "all"
    """With --weights: layers to train. head: only the last layer (a linear probe)."""
    mean: tuple[float, ...] | None = None
    """With --weights: mean of the input normalization of these weights. Not needed for timm:, torchvision: and hf:
    models."""
    std: tuple[float, ...] | None = None
    """With --weights: standard deviation of the input normalization of these weights."""
    size: int | None = None
    """With --weights: side length in pixels to which images are resized inside the network. By default images are not
    resized, unless the model has a fixed input size."""
    per_class: int = 0
    """Number of training samples per class, 0 for all."""

    def run(self, progress: Progress | None = None) -> Result:
        """Train, and return the result that is written to the run folder."""
        data = load(self.data, self.seed, self.smoke, positions=True)
        with progress or Progress() as shown:
            return self.train(data, shown)

    def network(self, data: Data) -> tuple[nn.Module, networks.Description]:
        """Return the network to train: new, or with the given weights and a new last layer.

        Raises:
            InputError: Two flags cannot be combined, or the weights do not fit the model.
        """
        if self.weights is None and not self.model.startswith("hf:"):
            named = [name for name in ("mean", "std", "size") if getattr(self, name) is not None]
            if named or self.tune != "all":
                flags = ", ".join(f"`--{name}`" for name in named or ["tune"])
                raise InputError(f"{flags} of `train` must be used with --weights.")
            description = networks.Description.of(self.model, data)
            torch.manual_seed(self.seed)
            return description.build(), description
        given = networks.Weights(self.weights, self.mean, self.std, self.size, data.positions)
        trained, description = networks.with_weights(self.model, None, tuple(data.shape), given)
        torch.manual_seed(self.seed)
        student, head = networks.adapted(trained, description, data.outputs)
        if self.tune == "head":
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(name in head)
        return student, replace(description, outputs=data.outputs)

    def train(self, data: Data, progress: Progress) -> Result:
        """Train on loaded data, and return the result."""
        training = self.training()
        train, validation = self.parts(data, self.per_class, self.seed)
        student, description = self.network(data)
        run = self.begin("train")
        same_inputs(run, data, networks=(description,))
        objective = Distillation(
            student,
            labels=1.0,
            task="classification" if data.classes else "regression",
            seed=self.seed,
            **dense_settings(data),
        )

        def finish() -> tuple[nn.Module, Result]:
            measures = measured(student, data.test, self.device)
            return student, {"teacher": None, "student": measures, "agreement": NO_AGREEMENT}

        cell = Cell(self.seed, "", f"{self.model} from labels", training, description)
        reached = train_cell(cell, run, Task(objective, train, validation, finish), self.device, progress)
        if reached is not None or run.follows:
            return unfinished(run, training.steps if reached is None else reached)
        return {**run.result, "out": str(run.path)}
