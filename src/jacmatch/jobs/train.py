"""`jacmatch train`: one network from labels, a teacher or a baseline."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from jacmatch import datasets
from jacmatch.datasets import Data
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.fields import TrainingFields
from jacmatch.jobs.inputs import same_inputs
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.study import NO_AGREEMENT, Result, head, measured, unfinished
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
        """Trains, and returns the result that is written to the run folder."""
        data = load(self.data, self.seed, self.smoke)
        with progress or Progress() as shown:
            return self.train(data, shown)

    def train(self, data: Data, progress: Progress) -> Result:
        """The same on loaded data."""
        training = self.training()
        description = networks.Description.of(self.model, data)
        train, validation = parts(data, self.validation, self.per_class, self.seed)
        torch.manual_seed(self.seed)
        student = description.build()
        run = self.begin("train")
        same_inputs(run, data, networks=(description,))
        task: Literal["classification", "regression"] = "classification" if data.classes else "regression"
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


def load(spec: str, seed: int, smoke: bool) -> Data:
    """The data set; in a smoke run with 200 test samples at most."""
    if not 0 <= seed < 2**63:
        raise InputError("`--seed` must be at least 0 and below 2⁶³.", got=seed)
    data = datasets.load(spec, seed)
    if smoke and len(data.test) > 200:
        data = replace(data, test=data.test.subset(torch.arange(200)))
    return data


def parts(data: Data, validation: float, per_class: int, seed: int) -> tuple[datasets.Split, datasets.Split | None]:
    """The training part, cut to so many samples a class, and the validation part held out before.

    Raises:
        InputError: the numbers are negative, or there are not so many samples.
    """
    if per_class < 0:
        raise InputError("`--per-class` must be at least 0, where 0 takes all.", got=per_class)
    if not (0 <= validation < 1 or (validation > 0 and float(validation).is_integer())):
        raise InputError("`--validation` must be a share below 1 or a whole number.", got=validation)
    split, held = data.train, None
    if validation:
        amount = validation if validation < 1 else int(validation)
        kept, out = datasets.split_validation(split.y, amount, seed)
        split, held = split.subset(kept), split.subset(out)
    if per_class:
        split = split.subset(datasets.per_class(split.y, per_class, seed))
    return split, held
