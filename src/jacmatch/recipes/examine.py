"""`jacmatch doctor`: which derivative engines are right for a model, and why not the others."""

import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro

from jacmatch.errors import InputError
from jacmatch.jacobian import doctor
from jacmatch.recipes import networks
from jacmatch.recipes.fields import JobFields
from jacmatch.recipes.train import load
from jacmatch.version import __version__


@dataclass(frozen=True)
class Doctor(JobFields):
    """Find out which derivative engines are right for a model, and why not the others."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """A run folder, or a model name (random weights will do)."""
    data: str = "digits"
    """Data set that fits the model."""
    samples: int = 8
    """Samples in the batch that is tried."""

    def run(self) -> dict[str, Any]:
        """Tries the model in training and in evaluation mode, and returns the result."""
        if self.samples < 2:
            raise InputError("`--samples` of `doctor` must be at least 2.", got=self.samples)
        data = load(self.data, self.seed, self.smoke)
        torch.manual_seed(self.seed)
        if networks.is_run(self.model):
            network = networks.network(self.model, data, allow_code=self.allow_code)
        else:
            network = networks.Description.of(self.model, data).build()
        run = self.begin("doctor")
        start = time.perf_counter()
        x = data.train.inputs(torch.arange(min(self.samples, len(data.train))))
        modes = {}
        for mode in ("training", "evaluation"):
            network.train(mode == "training").requires_grad_(True)
            diagnosis = doctor(network, x, seed=self.seed)
            modes[mode] = {
                "engine": diagnosis.engine,
                "ok": diagnosis.ok,
                "engines": diagnosis.engines,
                "findings": [finding.__dict__ for finding in diagnosis.findings],
                "says": str(diagnosis),
            }
        result = {
            "job": "doctor",
            "version": __version__,
            "seed": self.seed,
            "modes": modes,
            "seconds": time.perf_counter() - start,
            "settings": self.settings(),
        }
        run.write_result(result)
        return {**result, "out": str(run.path)}
