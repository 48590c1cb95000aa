"""`jacmatch train`: one network from labels, a teacher or a baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from jacmatch.datasets import Data
from jacmatch.jobs import networks
from jacmatch.jobs.data import load
from jacmatch.jobs.inputs import same_inputs
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.settings import TrainingFields
from jacmatch.jobs.study import NO_AGREEMENT, Result, head, measured, unfinished
from jacmatch.losses import Task
from jacmatch.objectives import Distillation
from jacmatch.training import fit


@dataclass(frozen=True)
class Train(TrainingFields):
    """Train one network from labels: a teacher, or a baseline."""

    main: ClassVar[str] = "data model per_class steps batch_size lr augment device out smoke"
    examples: ClassVar[tuple[str, ...]] = (
        "--data cifar10:DIR --model resnet20 --augment crop flip",
        "--data npz:my.npz --model mlp:64,64 --out runs/teacher",
    )

    data: str = "digits"
    """Data set: digits, fashion-mnist[:DIR], cifar10:DIR, cifar100:DIR, npz:FILE, folder:DIR, synthetic, or
    PACKAGE.MODULE:CALLABLE; left on disk: stream:DIR (a folder), wds:DIR (tar shards)."""
    model: str = "cnn5"
    """Network: a name from `jacmatch list`, timm:NAME, torchvision:NAME or PACKAGE.MODULE:CALLABLE."""
    per_class: int = 0
    """Training samples for each class; 0 for all."""

    def run(self, progress: Progress | None = None) -> Result:
        """Train, and return the result that is written to the run folder."""
        data = load(self.data, self.seed, self.smoke)
        with progress or Progress() as shown:
            return self.train(data, shown)

    def train(self, data: Data, progress: Progress) -> Result:
        """Train on loaded data, and return the result."""
        training = self.training()
        description = networks.Description.of(self.model, data)
        train, validation = self.parts(data, self.per_class, self.seed)
        torch.manual_seed(self.seed)
        student = description.build()
        run = self.begin("train")
        same_inputs(run, data, networks=(description,))
        task: Task = "classification" if data.classes else "regression"
        fitted = fit(
            Distillation(student, labels=1.0, task=task, seed=self.seed),
            train,
            training,
            seed=self.seed,
            device=self.device,
            run=run,
            validation=validation,
            on_step=progress.training(f"{self.model} from labels", training.steps),
        )
        if not fitted.finished or run.follows:
            return unfinished(run, fitted.steps)
        networks.save(run, student, description)
        result = {
            **head(run, self.seed),
            "teacher": None,
            "student": measured(student, data.test, self.device),
            "agreement": NO_AGREEMENT,
            "seconds": fitted.seconds,
            "samples_per_second": fitted.samples_per_second,
            "peak_memory_bytes": fitted.peak_memory_bytes,
            "steps": fitted.steps,
            "compiled": fitted.compiled,
            "settings": self.settings(),
        }
        run.write_result(result)
        return {**result, "out": str(run.path)}
