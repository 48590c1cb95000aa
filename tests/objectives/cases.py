"""Small networks, and one row for each probe, readout and point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jaxtyping
import torch
from torch import Tensor, nn

from jacmatch.jacobian import (
    AntitheticNoise,
    DataPairs,
    Estimator,
    EveryRow,
    FisherRows,
    LabelClass,
    LabelLogit,
    Logits,
    LogProbabilities,
    Loss,
    RandomInputs,
    RandomOutputs,
    Readout,
    SampledRows,
    SubspaceInputs,
    TopClass,
    TopLogit,
)
from jacmatch.objectives import AtData, AtMixedPairs, AtNoise

BATCH, OUTPUTS, SHAPE = 3, 4, (2, 3)
EXACT = torch.float64


def perceptron(width: int, seed: int, outputs: int = OUTPUTS) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def student() -> nn.Module:
    return perceptron(5, seed=1)


def teacher() -> nn.Module:
    return perceptron(7, seed=2)


def batch(count: int = BATCH, seed: int = 3) -> dict[str, Tensor]:
    """Inputs, labels, ids that are no row numbers, and partners with their labels."""
    generator = torch.Generator().manual_seed(seed)
    x, partners = (torch.randn(count, *SHAPE, generator=generator, dtype=EXACT) for _ in range(2))
    y, partner_labels = (torch.randint(OUTPUTS, (count,), generator=generator) for _ in range(2))
    ids = torch.randint(1000, (count,), generator=generator)
    return {"x": x, "y": y, "ids": ids, "partners": partners, "partner_labels": partner_labels}


PROBES: dict[str, Estimator] = {
    "every-row": EveryRow(),
    "top-class": TopClass(),
    "label-class": LabelClass(),
    "random-outputs": RandomOutputs(2, "rademacher"),
    "random-inputs": RandomInputs(2),
    "sampled-rows": SampledRows(1),
    "data-pairs": DataPairs(),
    "subspace-inputs": SubspaceInputs(3),
    "fisher-rows": FisherRows(2),
    "antithetic-noise": AntitheticNoise(2, sigma=0.1),
}


@dataclass(frozen=True)
class Reading:
    """A readout, and its definition for the outputs of one sample, its label and the teacher's top class."""

    readout: Readout
    definition: Callable[[Tensor, object, int], Tensor]
    rows: int = OUTPUTS
    needs_label: bool = False


READINGS = {
    "logits": Reading(Logits(), lambda y, label, top: y),
    "log-probabilities": Reading(LogProbabilities(2.0), lambda y, label, top: y / 2 - (y / 2).exp().sum().log()),
    "label-logit": Reading(LabelLogit(), lambda y, label, top: y[int(label)].view(1), 1, True),
    "top-logit": Reading(TopLogit(), lambda y, label, top: y[top].view(1), 1),
    "loss": Reading(Loss(), lambda y, label, top: (y.exp().sum().log() - y[int(label)]).view(1), 1, True),
}

POINTS = {"data": AtData(), "noise": AtNoise(0.3), "mixed-pairs": AtMixedPairs()}


def go_together(probe: str, reading: str, point: str) -> bool:
    """Mixed pairs have no label; the class of a label is no row of a readout with one row."""
    if point == "mixed-pairs" and (probe == "label-class" or READINGS[reading].needs_label):
        return False
    return not (probe == "label-class" and READINGS[reading].rows == 1)


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the type checks of the test suite, for what was called once with them: they take most of the time."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def direction_of(parameters: list[nn.Parameter], seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


def directional_difference(
    function: Callable[[], Tensor], parameters: list[nn.Parameter], direction: list[Tensor]
) -> float:
    """The derivative along one direction of the parameters by four-point differences, with an error of h⁴."""
    h, f, before = 1e-4, {}, [p.detach().clone() for p in parameters]
    with unchecked(), torch.no_grad():
        for m in (-2, -1, 1, 2):
            for p, d, start in zip(parameters, direction, before, strict=True):
                p.copy_(start + m * h * d)
            f[m] = float(function())
        for p, start in zip(parameters, before, strict=True):
            p.copy_(start)
    return (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)


def along(loss: Tensor, parameters: list[nn.Parameter], direction: list[Tensor]) -> float:
    """The same by autograd."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
