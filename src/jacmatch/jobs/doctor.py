"""`jacmatch doctor`: which derivative engines are correct for a model, and what is wrong with the others."""

import time
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
import tyro
from torch import nn

from jacmatch.diagnostics import Diagnosis, doctor, report
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.data import data_for
from jacmatch.jobs.settings import JobFields
from jacmatch.jobs.study import Progress, write_measurement
from jacmatch.models import ValuesOnly


@dataclass(frozen=True)
class Doctor(JobFields):
    """Check which derivative engines are correct for a model, and report what is wrong with the others."""

    main: ClassVar[str] = "data samples seed device out smoke allow_code json"
    examples: ClassVar[tuple[str, ...]] = ("vit-tiny --data cifar10:DIR", "runs/teacher --samples 16")

    model: Annotated[str, tyro.conf.Positional] = ""
    """A run folder, hf:DIR, onnx:FILE, or a model name (with random weights)."""
    data: str | None = None
    """Data set that fits the model. By default that of the run, or digits for a model name."""
    samples: int = 8
    """Number of samples in the batch that is checked."""

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Check the model in training and in evaluation mode, and return the result."""
        if self.samples < 2:
            raise InputError("`--samples` of `doctor` must be at least 2.", got=self.samples)
        given: dict[str, Any] = {"seed": self.seed, "smoke": self.smoke, "allow_code": self.allow_code}
        data = data_for("doctor", (self.model,), self.data, **given)
        torch.manual_seed(self.seed)
        if networks.brings_weights(self.model):
            network = networks.network(self.model, data, allow_code=self.allow_code)
        else:
            network = networks.Description.of(self.model, data).build()
        run = self.begin("doctor")
        start = time.perf_counter()
        x = data.train.inputs(torch.arange(min(2 if self.smoke else self.samples, len(data.train))))
        modes = {}
        with progress or Progress() as shown:
            for mode in ("training",) if self.smoke else ("training", "evaluation"):
                shown.stage(f"Checking the engines in {mode} mode")
                network.train(mode == "training").requires_grad_(True)
                modes[mode] = report(_diagnosis(network, x, self.seed))
        return write_measurement(self, run, data, start, modes=modes)


def _diagnosis(network: nn.Module, x: torch.Tensor, seed: int) -> Diagnosis:
    """Return the diagnosis; for a network with values only, only the differences are checked."""
    if not isinstance(network, ValuesOnly):
        return doctor(network, x, seed=seed)
    diagnosis = doctor(network, x, seed=seed, engines=("differences",))
    without = tuple(finding for finding in diagnosis.findings if "detached" not in finding.code)
    return replace(diagnosis, findings=without)
