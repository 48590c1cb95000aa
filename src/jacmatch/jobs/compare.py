"""The verbs that measure: `evaluate` one network, `compare` two, and `doctor`, which checks derivative engines."""

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from jacmatch.datasets import Data
from jacmatch.diagnostics import Diagnosis, doctor, report
from jacmatch.errors import InputError
from jacmatch.jacobian import output_tensor
from jacmatch.jobs import networks
from jacmatch.jobs.settings import SMOKE_JACOBIANS, JobFields, data_for
from jacmatch.jobs.study import Progress, measured, write_measurement
from jacmatch.jobs.teachers import check_teacher
from jacmatch.models import ValuesOnly
from jacmatch.report.figures import picture_row
from jacmatch.runs import Run
from jacmatch.teachers import as_teacher
from jacmatch.training import agreement
from jacmatch.training.data import in_order
from jacmatch.training.evaluation import jacobian_differences


@dataclass(frozen=True)
class Evaluate(JobFields):
    """Measure a trained network on the test split of a data set."""

    main: ClassVar[str] = "data weights mean std seed device out smoke allow_code json"
    examples: ClassVar[tuple[str, ...]] = ("runs/teacher", "resnet20 --weights resnet20.pth --data cifar10:DIR")

    model: Annotated[str, tyro.conf.Positional] = ""
    """A run folder, or a model name with --weights."""
    data: str | None = None
    """Data set. By default that of the run, or digits for a model name."""
    weights: Path | None = None
    """Weights of the network: safetensors, a torch checkpoint (.pth), or a folder of either."""
    mean: tuple[float, ...] | None = None
    """Mean of the network's input normalization, if the weights file does not contain it."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the network's input normalization, if the weights file does not contain it."""

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
            checked = self._checked(network, data, shown)
        return write_measurement(self, run, data, start, student=student, test_samples=len(data.test), **checked)

    def _checked(self, network: nn.Module, data: Data, progress: Progress) -> dict[str, Any]:
        """Report another preprocessing with which imported weights would be more accurate."""
        if networks.is_run(self.model):
            return {}
        remedy = "Give these as --mean and --std"
        who = f"The network {self.model}"
        return {"network_check": check_teacher(network, data, progress, who=who, remedy=remedy, smoke=self.smoke)}


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Compare(JobFields):
    """Measure how well two models agree in outputs and Jacobians, for example after compression or export."""

    main: ClassVar[str] = "data first_weights second_weights samples at_least at_most out smoke allow_code json"
    examples: ClassVar[tuple[str, ...]] = (
        "runs/teacher runs/student",
        "runs/student onnx:student.onnx --at-least cosine=0.95",
    )

    first: Annotated[str, tyro.conf.Positional] = ""
    """Reference model: a run folder, hf:DIR, onnx:FILE, or a model name with --first-weights."""
    second: Annotated[str, tyro.conf.Positional] = ""
    """Model to compare with it: a run folder, hf:DIR, onnx:FILE, or a model name with --second-weights."""
    data: str | None = None
    """Data set; its test split is used. By default that of the runs, or digits for two model names."""
    first_weights: Path | None = None
    """Weights of the first model: safetensors, a torch checkpoint (.pth), or a folder of either."""
    second_weights: Path | None = None
    """Weights of the second model, in the same formats."""
    samples: int = 256
    """Number of test samples whose Jacobians are compared. Outputs are compared on all test samples."""
    at_least: tuple[str, ...] = ()
    """Lower bounds such as cosine=0.95 or top1=0.99. If one is not met, the exit code is 2."""
    at_most: tuple[str, ...] = ()
    """Upper bounds such as value_error=0.05 or jacobian_error=0.2. If one is not met, the exit code is 2."""

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Measure, and return the result.

        Raises:
            InputError: A setting is wrong, or a requirement is not met; the result is written before.
        """
        if self.samples < 1:
            raise InputError("`--samples` of `compare` must be at least 1.", got=self.samples)
        limits = {flag: [_limit(flag, text) for text in getattr(self, flag)] for flag in ("at_least", "at_most")}
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
            values = [measured(each, data.test, self.device) for each in (reference, other)]
            agrees = agreement(other, as_teacher(reference), data.test, samples=samples)
            for spec, each in ((self.first, reference), (self.second, other)):
                if not networks.is_run(spec):
                    remedy = "Save them in a run first: jacmatch train --weights, with --mean and --std"
                    check_teacher(each, data, shown, who=f"The network {spec}", remedy=remedy, smoke=self.smoke)
            details = audit(run, reference, other, data, samples)
        agrees |= details.pop("values")
        unmet = [text for flag, each in limits.items() for text in _unmet(flag, each, agrees)]
        networks_measured = {"teacher": values[0], "student": values[1], "agreement": agrees}
        sizes = {"samples": samples, "test_samples": len(data.test), "unmet": unmet}
        result = write_measurement(self, run, data, start, **networks_measured, **details, **sizes)
        if unmet:
            rule = f"{self.second} must agree with {self.first} as `--at-least` and `--at-most` of `compare` require."
            raise InputError(rule, got="; ".join(unmet), do=f"The whole result is in {run.path}.")
        return result


_NAMES = {
    "top1": "top1",
    "cosine": "jacobian_cosine",
    "jacobian_error": "jacobian_relative_error",
    "value_error": "value_relative_error",
}
_WORST = 10


def _limit(flag: str, text: str) -> tuple[str, float]:
    """The name and the number of a requirement."""
    name, _, number = text.partition("=")
    rule = f"`--{flag.replace('_', '-')}` of `compare` must be NAME=NUMBER, NAME one of {', '.join(_NAMES)}."
    try:
        limit = float(number)
    except ValueError as error:
        raise InputError(rule, got=repr(text), do="Write for example cosine=0.95.") from error
    if name not in _NAMES or limit != limit:
        raise InputError(rule, got=repr(text), do="Write for example cosine=0.95.")
    return name, limit


def _unmet(flag: str, limits: list[tuple[str, float]], measured: Mapping[str, float | None]) -> list[str]:
    """Return the requirements that are not met; a quantity that was not measured meets none."""
    unmet = []
    for name, limit in limits:
        value = measured[_NAMES[name]]
        if value is None or (value < limit if flag == "at_least" else value > limit):
            side = "at least" if flag == "at_least" else "at most"
            measure = "not measured" if value is None else format(value, ".4g")
            unmet.append(f"{name} {measure}, {side} {limit:g} required")
    return unmet


def audit(run: Run, reference: nn.Module, other: nn.Module, data: Data, samples: int) -> dict[str, Any]:
    """Compare two networks sample by sample, and write `worst.npz` and, for images, `worst.png` into the run."""
    rows = torch.linspace(0, len(data.test) - 1, samples).round().long()
    with torch.no_grad():
        parts = [
            [output_tensor(each.cpu()(x)) for each in (reference, other)] for x, _ in in_order(data.test, 500, _CPU)
        ]
    wanted, got = (torch.cat(each).double() for each in zip(*parts, strict=True))
    apart = (got - wanted).flatten(1).norm(dim=1)
    cosines, difference, norm = jacobian_differences(other, as_teacher(reference), data.test, rows)
    errors = (difference / norm.clamp_min(1e-30)).sqrt()
    order = sorted(range(len(rows)), key=lambda index: (float(cosines[index]), -float(apart[rows[index]])))[:_WORST]
    worst = [
        {
            "sample": int(rows[index]),
            "jacobian_cosine": float(cosines[index]),
            "jacobian_relative_error": float(errors[index]),
            "output_difference": float(apart[rows[index]]),
            **_tops(wanted[rows[index]], got[rows[index]]),
        }
        for index in order
    ]
    chosen = rows[torch.tensor(order)]
    x = data.test.inputs(chosen).cpu()
    file = io.BytesIO()
    np.savez_compressed(file, samples=chosen, x=x, reference=wanted[chosen].float(), other=got[chosen].float())
    run.write_bytes("worst.npz", file.getvalue())
    if len(data.shape) == 3 and data.shape[0] in (1, 3):
        run.write_bytes("worst.png", picture_row(x.numpy(), [_caption(each) for each in worst]))
    values = {"largest_output_difference": float((got - wanted).abs().max())}
    values["value_relative_error"] = float(apart.norm() / wanted.norm().clamp_min(1e-30))
    return {"values": values, "worst": worst}


def _tops(wanted: Tensor, got: Tensor) -> dict[str, Any]:
    """The top output of both networks, or the share of positions at which it is the same."""
    tops = [each.argmax(0) for each in (wanted, got)]
    if wanted.dim() > 1:
        return {"equal_positions": float((tops[0] == tops[1]).double().mean())}
    return {"outputs": [int(top) for top in tops]}


def _caption(sample: Mapping[str, Any]) -> str:
    tops = sample.get("outputs")
    top = f"{tops[0]} → {tops[1]}" if tops else f"{sample['equal_positions']:.0%} equal"
    return f"test {sample['sample']}\ncos {sample['jacobian_cosine']:.2f}\n{top}"


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
