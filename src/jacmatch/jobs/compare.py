"""`jacmatch compare`: how far two models agree in values and Jacobians, an audit of a compressed or exported model."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.data import data_for
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.settings import SMOKE_JACOBIANS, JobFields
from jacmatch.jobs.study import head, measured
from jacmatch.teachers import ModuleTeacher
from jacmatch.training import agreement


@dataclass(frozen=True)
class Compare(JobFields):
    """Measure how far two models agree in value and in Jacobian: an audit of a compressed or exported model."""

    main: ClassVar[str] = "data first_weights second_weights samples seed device out smoke allow_code json"
    examples: ClassVar[tuple[str, ...]] = (
        "runs/teacher runs/student",
        "runs/teacher runs/student --data npz:my.npz --samples 64",
    )

    first: Annotated[str, tyro.conf.Positional] = ""
    """The reference: a run folder, or a model name with --first-weights."""
    second: Annotated[str, tyro.conf.Positional] = ""
    """The other: a run folder, or a model name with --second-weights."""
    data: str | None = None
    """Data set, of which the test part is used; if left out, that of the runs, or digits for two model names."""
    first_weights: Path | None = None
    """Weights of the first: safetensors, a checkpoint of torch, or a folder of either."""
    second_weights: Path | None = None
    """Weights of the second, likewise."""
    samples: int = 256
    """Test samples whose Jacobians are compared; outputs are compared on all."""

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Measure, and return the result."""
        if self.samples < 1:
            raise InputError("`--samples` of `compare` must be at least 1.", got=self.samples)
        given: dict[str, Any] = {"seed": self.seed, "smoke": self.smoke, "allow_code": self.allow_code}
        data = data_for("compare", (self.first, self.second), self.data, **given)
        pair = []
        for spec, path in ((self.first, self.first_weights), (self.second, self.second_weights)):
            weights = None if path is None else networks.Weights(path)
            pair.append(networks.network(spec, data, weights, allow_code=self.allow_code))
        reference, other = pair
        run = self.begin("compare")
        start = time.perf_counter()
        samples = min(SMOKE_JACOBIANS if self.smoke else self.samples, len(data.test))
        with progress or Progress() as shown:
            shown.stage(f"Comparing outputs and {samples} Jacobians")
            with torch.no_grad():
                x = data.test.inputs(torch.arange(samples))
                largest = (reference.cpu()(x) - other.cpu()(x)).abs().max()
            values = [measured(each, data.test, self.device) for each in (reference, other)]
            agrees = agreement(other, ModuleTeacher(reference), data.test, samples=samples)
        result = {
            **head(run, self.seed),
            "teacher": values[0],
            "student": values[1],
            "agreement": {**agrees, "largest_output_difference": float(largest)},
            "samples": samples,
            "data": data.name,
            "test_samples": len(data.test),
            "seconds": time.perf_counter() - start,
            "settings": self.settings(),
        }
        run.write_result(result)
        return {**result, "out": str(run.path)}
