"""`jacmatch evaluate`: a trained network on the test part of a data set."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jacmatch.jobs import networks
from jacmatch.jobs.data import data_for
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.settings import JobFields
from jacmatch.jobs.study import head, measured


@dataclass(frozen=True)
class Evaluate(JobFields):
    """Measure a trained network on the test part of a data set."""

    main: ClassVar[str] = "data weights mean std seed device out smoke allow_code json"
    examples: ClassVar[tuple[str, ...]] = ("runs/teacher", "resnet20 --weights resnet20.pth --data cifar10:DIR")

    model: Annotated[str, tyro.conf.Positional] = ""
    """Network: a run folder, or a model name with --weights."""
    data: str | None = None
    """Data set; if left out, that of the run, or digits for a model name."""
    weights: Path | None = None
    """Weights of the network: safetensors, a checkpoint of torch (.pth), or a folder of either."""
    mean: tuple[float, ...] | None = None
    """Mean that its inputs had subtracted in training, where the file does not say."""
    std: tuple[float, ...] | None = None
    """Standard deviation that they were divided by."""

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Measure, and return the result."""
        given: dict[str, Any] = {"seed": self.seed, "smoke": self.smoke, "allow_code": self.allow_code}
        data = data_for("evaluate", (self.model,), self.data, **given)
        weights = None if self.weights is None else networks.Weights(self.weights, self.mean, self.std)
        network = networks.network(self.model, data, weights, allow_code=self.allow_code)
        run = self.begin("evaluate")
        start = time.perf_counter()
        with progress or Progress() as shown:
            shown.stage(f"Testing on {len(data.test)} samples")
            student = measured(network, data.test, self.device)
        result = {
            **head(run, self.seed),
            "student": student,
            "data": data.name,
            "test_samples": len(data.test),
            "seconds": time.perf_counter() - start,
            "settings": self.settings(),
        }
        run.write_result(result)
        return {**result, "out": str(run.path)}
