"""What a job that teaches needs besides its objective: the data, both networks, the seeds; and the teacher itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jacmatch.datasets import Data
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.distillation_fields import DistillationFields
from jacmatch.jobs.fields import positive
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.summary import METHODS
from jacmatch.jobs.teachers import Prepared, prepare
from jacmatch.jobs.train import Train
from jacmatch.training.layout import channels_last


@dataclass(frozen=True)
class TeachingFields(DistillationFields):
    """Settings of `distill`, and of a cache for it: whose answers, about which data, in which runs."""

    data: str = "digits"
    """Data set: digits, fashion-mnist[:DIR], cifar10:DIR, cifar100:DIR, npz:FILE, folder:DIR, synthetic, or
    PACKAGE.MODULE:CALLABLE; left on disk: stream:DIR (a folder), wds:DIR (tar shards)."""
    teacher: str = "cnn5"
    """Teacher: a model name, or the folder of a run that trained one."""
    student: str = "cnn3"
    """Student: a model name."""
    teacher_weights: Path | None = None
    """Weights of the teacher: safetensors, a checkpoint of torch (.pth), or a folder of either. Without, it is trained
    first and kept."""
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

    def check_teaching(self) -> None:
        """Refuses what is wrong whatever the data.

        Raises:
            InputError: Settings do not go together.
        """
        positive("distill", seeds=self.seeds, teacher_steps=self.teacher_steps)
        self.check_objective()
        if self.teacher_weights is None and (self.teacher_mean or self.teacher_std):
            raise InputError("`--teacher-mean` and `--teacher-std` of `distill` belong to --teacher-weights.")
        if not self.methods:
            raise InputError("`--methods` of `distill` must name at least one.", do=f"Known: {', '.join(METHODS)}.")
        if len(set(self.methods)) < len(self.methods):
            raise InputError("`--methods` of `distill` must differ.", got=" ".join(self.methods))

    @property
    def runs(self) -> range:
        """The seed of each run."""
        return range(self.seed, self.seed + (1 if self.smoke else self.seeds))

    def taught_by(self, data: Data, progress: Progress) -> Prepared:
        """The teacher: loaded, or trained first.

        Args:
            data: What it is for.
            progress: Where its training shows.
        """
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
            workers=self.workers,
            prefetch=self.prefetch,
            resident_mib=self.resident_mib,
            doctor=self.doctor,
        )
        weights = None
        if self.teacher_weights is not None:
            weights = networks.Weights(self.teacher_weights, self.teacher_mean, self.teacher_std)
        prepared = prepare(self.teacher, data, weights, recipe, progress, allow_code=self.allow_code)
        if self.channels_last:
            channels_last(prepared.network)
        return prepared

    def samples_per_class(self, data: Data) -> int:
        """How many training samples of each class are used, 0 for all."""
        return (10 if data.classes else 0) if self.per_class is None else self.per_class
