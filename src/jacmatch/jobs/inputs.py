"""Fingerprints of what determines the result of a job besides its settings: data, networks and teacher."""

import importlib.metadata
import math
from collections.abc import Mapping

import torch
from torch import nn

from jacmatch.datasets import Data
from jacmatch.jobs.networks import Description
from jacmatch.models import catalog
from jacmatch.runs import Run
from jacmatch.runs.identity import Fingerprint, Fingerprints, code_of
from jacmatch.training.distributed import ProcessGroup
from jacmatch.training.identity import SAMPLES, named, outputs_of, undisturbed

_PACKAGES = ("timm", "torchvision")  # families of networks that other packages build


def same_inputs(
    run: Run, data: Data | None = None, teacher: nn.Module | None = None, networks: tuple[Description, ...] = ()
) -> None:
    """Store the fingerprints of the inputs of a job in its run, or compare them if the run is resumed."""
    for part, here in inputs_of(data, teacher, networks).items():
        matches(run, part, here)


def inputs_of(
    data: Data | None = None, teacher: nn.Module | None = None, networks: tuple[Description, ...] = ()
) -> dict[str, Fingerprints]:
    """Return the fingerprints of the inputs of a job, by part."""
    fingerprints: dict[str, Fingerprints] = {}
    if data is not None:
        fingerprints["data"] = dict(data.digests)
    for description in networks:
        if here := of_network(description):
            fingerprints[f"network {description.spec}"] = here
    if teacher is not None and data is not None:
        fingerprints["teacher"] = of_teacher(teacher, data)
    return fingerprints


def matches(run: Run, part: str, here: Mapping[str, Fingerprint]) -> None:
    """Call `Run.check_inputs` in all processes of a job, which must have the same inputs."""
    exact = {name: value for name, value in here.items() if isinstance(value, str)}
    ProcessGroup.current().same(part, str(exact))
    run.check_inputs(part, here)


def same_teacher(run: Run, data: Data, teacher: nn.Module) -> None:
    """Call `same_inputs` for the teacher alone, in a job that loads its data first."""
    matches(run, "teacher", of_teacher(teacher, data))


def of_teacher(teacher: nn.Module, data: Data) -> Fingerprints:
    """Return the fingerprints of a trained network: weights, architecture, code, and its outputs for some samples."""
    x = data.train.inputs(torch.arange(min(SAMPLES, len(data.train))))
    device = next((parameter.device for parameter in teacher.parameters()), x.device)
    return {"weights and code": named(teacher), "outputs": outputs_of(teacher, x.to(device))}


def code_of_model(spec: str) -> Fingerprints:
    """Return the fingerprints of the code that builds a network.

    It is empty for a network of this package, the version of another package, and for a PACKAGE.MODULE:CALLABLE the
    source of its module and of the user's modules that it imports.
    """
    family, colon, _ = spec.partition(":")
    if family in _PACKAGES:
        return {family: importlib.metadata.version(family)}
    return code_of(family) if colon and family not in catalog.FAMILIES else {}


def of_network(description: Description) -> Fingerprints:
    """Return the fingerprints of a new network; for the user's code also its outputs: it may read files."""
    fingerprints = code_of_model(description.spec)
    if not fingerprints or description.spec.partition(":")[0] in _PACKAGES:
        return fingerprints
    shape = (2, *description.shape)
    x = torch.linspace(0, 1, math.prod(shape)).reshape(shape)
    outputs = []
    for _ in range(2):
        with undisturbed():
            torch.manual_seed(0)
            outputs.append(outputs_of(description.build(), x))
    return {
        **fingerprints,
        "outputs of a new network": outputs[0] if outputs[0] == outputs[1] else "another at each call",
    }
