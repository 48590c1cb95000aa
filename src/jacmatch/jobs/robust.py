"""`jacmatch robust`: training with a penalty on the network's own Jacobian or with noise, against noisy inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from jacmatch.datasets import Data, Split
from jacmatch.errors import InputError
from jacmatch.jacobian import ESTIMATORS, BatchNormPolicy, Estimator, Loss
from jacmatch.jobs import networks, study
from jacmatch.jobs.networks import same_inputs
from jacmatch.jobs.settings import TrainingFields, flag, load, positive
from jacmatch.jobs.study import NO_AGREEMENT, Cell, Done, Progress, Result, Task
from jacmatch.objectives import Robustness
from jacmatch.objectives.robustness import FORMS, Form
from jacmatch.report import Table
from jacmatch.report.tables import entry
from jacmatch.runs import Run, spread
from jacmatch.training import evaluate_under_shifts

UNSEEN: tuple[tuple[str, float], ...] = (("salt-and-pepper", 0.05), ("blur", 1.0), ("contrast", 0.5))
"""Shifts of images that this job never trains on, with their severity."""
_ONE_PASS = {"label-class", "top-class"}


@dataclass(frozen=True)
class Variant:
    """One way to train the network."""

    penalty: float  # weight of the penalty
    noise: float  # standard deviation of the training noise
    steps: int  # optimizer steps

    @property
    def method(self) -> str:
        """Name of the folder."""
        return f"noise-{self.noise:g}" if self.noise else f"penalty-{self.penalty:g}"

    @property
    def label(self) -> str:
        """Name in tables."""
        return f"noise {self.noise:g} in training" if self.noise else f"penalty λ = {self.penalty:g}"


@dataclass(frozen=True)
class Robust(TrainingFields):
    """Train with a penalty on the network's own Jacobian, or with noise; measure the accuracy under input noise."""

    main: ClassVar[str] = "data model penalty_weight noise_augment noise_levels seeds steps device out smoke"
    examples: ClassVar[tuple[str, ...]] = (
        "--model cnn3 --penalty-weight 0 0.01 0.1 --noise-augment 0.2",
        "--data npz:my.npz --model mlp:64 --unit raw",
    )

    data: str = "digits"
    """Data set: digits, fashion-mnist[:DIR], cifar10:DIR, cifar100:DIR, npz:FILE, folder:DIR, synthetic, or
    PACKAGE.MODULE:CALLABLE. Read from disk during training: stream:DIR (a folder), wds:DIR (tar shards)."""
    model: str = "cnn3"
    """Network: a name from `jacmatch list`, timm:NAME, torchvision:NAME or PACKAGE.MODULE:CALLABLE."""
    per_class: int = 0
    """Number of training samples per class, 0 for all."""
    steps: int = 300
    seeds: int = 3
    """Number of seeds. Subset, initial weights and batches differ between seeds; they are the same for all variants of
    a seed."""
    penalty_weight: tuple[float, ...] = (0.0, 0.01, 0.1)
    """Weights λ of the penalty; one network is trained for each. The last one is saved as the network of the run."""
    penalty: Form = "hoffman"
    """Form of the penalty. hoffman: ½‖J‖² (arXiv:1908.02729); squared-norm: ‖J‖²; the other two are derived from the
    cross-entropy at noisy inputs."""
    probe: Literal["random-outputs", "random-inputs", "every-row", "label-class", "top-class"] = "random-outputs"
    """Jacobian products from which the norm is estimated."""
    probes: int = 1
    """Number of products per sample."""
    noise_augment: tuple[float, ...] = (0.2,)
    """Standard deviations of Gaussian noise on the training inputs; one network without penalty is trained for each."""
    equal_cost: bool = True
    """Train the networks without penalty for more steps, so that all networks need the same number of forward and
    backward passes. With one product per sample, that is twice the steps."""
    unit: Literal["normalized", "raw"] = "normalized"
    """Unit of penalty and noise. normalized: standard deviations of the training data. raw: input units."""
    noise_levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    """Standard deviations of the noise under which the accuracy is measured."""
    draws: int = 3
    """Number of draws of the test noise."""
    batch_norm: BatchNormPolicy = "frozen"
    """How derivatives treat the statistics of BatchNorm. frozen: as constants, so that samples are independent. batch:
    as functions of the batch."""

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Train and measure, and return the result that is written to the run folder."""
        self._check()
        self.training()  # refuses wrong settings before anything is trained
        data = load(self.data, self.seed, self.smoke)
        description = networks.Description.of(self.model, data)
        subset, _ = self.parts(data, self.per_class, self.seed)
        variants = self.variants(data)
        student = description.build()
        for variant in variants:  # incompatible settings are refused before anything is trained
            self.objective(variant, student, data, self.seed)
        run = self.begin("robust")
        same_inputs(run, data, networks=(description,))
        cells = [
            Cell(
                seed=seed,
                method=variant.method,
                label=variant.label,
                training=self.training(
                    steps=variant.steps, doctor=self.checked(seed, variant is variants[len(self.penalty_weight) - 1])
                ),
                network=description,
                settings={"steps": variant.steps},
            )
            for seed in range(self.seed, self.seed + (1 if self.smoke else self.seeds))
            for variant in variants
        ]
        with progress or Progress() as shown:
            prepare = partial(self._prepare, data, description, {variant.method: variant for variant in variants})
            conclude = partial(self._conclude, run, data, len(subset), variants)
            return study.run_cells(run, cells, prepare, conclude, device=self.device, progress=shown, tables=tables)

    def _prepare(
        self, data: Data, description: networks.Description, variants: Mapping[str, Variant], cell: Cell
    ) -> Task:
        train, validation = self.parts(data, self.per_class, cell.seed)
        torch.manual_seed(cell.seed)
        student = description.build()
        objective = self.objective(variants[cell.method], student, data, cell.seed)

        def finish() -> tuple[nn.Module, dict[str, Any]]:
            return student, {
                "teacher": None,
                "student": study.measured(student, data.test, self.device),
                "agreement": NO_AGREEMENT,
                "under": self.measured(student, data.test, data),
            }

        return Task(objective, train, validation, finish)

    def _conclude(self, run: Run, data: Data, samples: int, variants: Sequence[Variant], done: Done) -> Result:
        rows = {variant.method: _row(variant, study.of_method(done, variant.method)) for variant in variants}
        main = variants[max(len(self.penalty_weight), 1) - 1].method
        study.save_main(run, next(cell for cell, _ in done if cell.method == main))
        return {
            "teacher": None,
            **study.main_fields(study.of_method(done, main), rows[main]),
            "variants": list(rows.values()),
            "train_samples": samples,
            "test_samples": len(data.test),
            "batch_size": self.training().batch_size,
        }

    def _check(self) -> None:
        positive("robust", seeds=self.seeds, probes=self.probes, draws=self.draws, steps=self.steps)
        if not (self.penalty_weight or self.noise_augment):
            raise InputError("`--penalty-weight` or `--noise-augment` of `robust` must name at least one.")
        if self.probes > 1 and self.probe in {"every-row", *_ONE_PASS}:
            raise InputError(f"`--probes` of `robust` must be 1 with --probe {self.probe}.", got=self.probes)
        for name in ("penalty_weight", "noise_augment", "noise_levels"):
            given, what = getattr(self, name), f"`{flag(name)}` of `robust`"
            if len(set(given)) < len(given):
                raise InputError(f"The values of {what} must all be different.", got=" ".join(map(str, given)))
            least = 0 if name == "penalty_weight" else 1e-12
            if not all(least <= value < float("inf") for value in given):
                rule = f"{what} must be {'at least 0' if not least else 'positive'} and finite."
                raise InputError(rule, got=" ".join(map(str, given)))

    def variants(self, data: Data) -> list[Variant]:
        """Return the networks that are trained: those with a penalty, and those with noise."""
        readout, _ = FORMS[self.penalty]
        rows = 1 if isinstance(readout, Loss) else data.outputs
        passes = 1 + sum(astuple(self._probe().passes(rows)))
        free = self.steps * passes if self.equal_cost and any(self.penalty_weight) else self.steps
        penalized = [Variant(weight, 0.0, self.steps if weight else free) for weight in self.penalty_weight]
        return penalized + [Variant(0.0, noise, free) for noise in self.noise_augment]

    def objective(self, variant: Variant, student: nn.Module, data: Data, seed: int) -> Robustness:
        """Return the objective of a variant."""
        return Robustness(
            student,
            penalty=variant.penalty,
            form=self.penalty,
            probe=self._probe(),
            noise=variant.noise,
            scale=self.scale(data),
            batch_norm=self.batch_norm,
            task="classification" if data.classes else "regression",
            seed=seed,
        )

    def scale(self, data: Data) -> tuple[float, ...] | float:
        """Return the unit of penalty and noise."""
        return tuple(data.std) if self.unit == "normalized" else 1.0

    def _probe(self) -> Estimator:
        if self.probe in {"every-row", *_ONE_PASS}:
            return ESTIMATORS[self.probe]()
        law = "sphere" if self.probe == "random-outputs" else "gaussian"
        return ESTIMATORS[self.probe](count=self.probes, law=law)  # type: ignore[call-arg]

    def measured(self, student: nn.Module, split: Split, data: Data) -> dict[str, dict[str, Any]]:
        """Return accuracy (RMSE in a regression) under each noise and each shift of images, with its spread."""
        shifts = [("gaussian-noise", level) for level in self.noise_levels]
        shifts += UNSEEN if len(data.shape) == 3 else ()
        values = evaluate_under_shifts(
            student, split, shifts, draws=1 if self.smoke else self.draws, scale=self.scale(data), device=self.device
        )
        return {f"{name} {severity:g}": spread(spreads) for (name, severity), spreads in values.items()}


def _row(variant: Variant, results: Sequence[Result]) -> Result:
    """Return the row of a variant; a random shift counts with the mean over the draws of each seed."""
    under = {name: spread([result["under"][name]["mean"] for result in results]) for name in results[0]["under"]}
    return study.row(variant.label, results, under=under)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the table of a result of `jacmatch robust`: a row for each variant, a column for each shift."""
    variants, settings = result["variants"], result["settings"]
    measure = study.quality(result["student"])
    form = (100, 1) if measure == "accuracy" else (1, 4)
    rows = [
        (row["label"], str(row["steps"]), *(entry(each, *form) for each in (row[measure], *row["under"].values())))
        for row in variants
    ]
    named = [name.replace("gaussian-noise", "noise").replace("-", " ") for name in variants[0]["under"]]
    head = (f"{'accuracy %' if measure == 'accuracy' else 'rmse'} on the test split", "steps", "clean", *named)
    unit = "standard deviations of the data" if settings["unit"] == "normalized" else "units of the raw input"
    notes = (
        f"{settings['data']}, {variants[0]['seeds']} seed(s), {result['seconds']:.0f} s.",
        f"Noise in {unit}; no setting was chosen on test data.",
    )
    return [Table("robust", "Under noise and shifts", head, tuple(rows), notes)]
