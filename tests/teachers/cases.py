"""One row for each teacher, and one for each readout of outputs.

A new teacher is one file, one line in `TEACHERS`, and one row here: the contract tests then run on it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from jacmatch.jacobian import LabelLogit, Logits, LogProbabilities, Loss, Readout, TopLogit
from jacmatch.teachers import (
    AnalyticTeacher,
    BlackBoxTeacher,
    EnsembleTeacher,
    MemoizedTeacher,
    ModuleTeacher,
    Teacher,
)

from . import reference

BATCH, OUTPUTS, SHAPE = 3, 4, (2, 3)


def matrices(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, b and C of y = C tanh(A x + b)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((5, 6), (5,), (OUTPUTS, 5))
    a, b, c = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    return a / 2, b, c


def one(seed: int) -> Callable[[Tensor], Tensor]:
    """y = C tanh(A x + b) of one sample."""
    a, b, c = matrices(seed)
    return lambda x: c @ torch.tanh(a @ x.flatten().double() + b)


def of_batch(seed: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([one(seed)(sample) for sample in x])


def jacobian_of_batch(seed: int) -> Callable[[Tensor], Tensor]:
    a, b, c = matrices(seed)

    def jacobian(x: Tensor) -> Tensor:
        derivatives = 1 - torch.tanh(x.flatten(1).double() @ a.T + b) ** 2
        return torch.einsum("kh,nh,hi->nki", c, derivatives, a).view(len(x), OUTPUTS, *SHAPE)

    return jacobian


def network(seed: int) -> nn.Module:
    a, b, c = matrices(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, OUTPUTS, bias=False))
    net.double()
    with torch.no_grad():
        net[1].weight.copy_(a)
        net[1].bias.copy_(b)
        net[4].weight.copy_(c)
    return net.train()  # a teacher must not be


def on_arrays(seed: int):
    a, b, c = (matrix.numpy() for matrix in matrices(seed))

    def function(x):
        return np.tanh(x.reshape(len(x), 6) @ a.T + b) @ c.T

    return function


def module(seed: int) -> Teacher:
    return ModuleTeacher(network(seed))


def analytic(seed: int) -> Teacher:
    return AnalyticTeacher(of_batch(seed), jacobian_of_batch(seed))


def black_box(seed: int) -> Teacher:
    return BlackBoxTeacher(of_batch(seed))


def mean(*seeds: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([one(seed)(x) for seed in seeds]).mean(0)


@dataclass(frozen=True)
class Case:
    """A teacher, the function of one sample that it stands for, and how exact its Jv is (relative)."""

    name: str
    build: Callable[[], Teacher]
    function: Callable[[Tensor], Tensor]
    vjp: bool = True
    tolerance: float = 1e-8


CASES = [
    Case("module", lambda: module(1), one(1)),
    Case("analytic", lambda: analytic(1), one(1)),
    Case("black-box", lambda: black_box(1), one(1), vjp=False, tolerance=1e-7),
    Case("black-box, batched", lambda: BlackBoxTeacher(of_batch(1), batch_size=2), one(1), vjp=False, tolerance=1e-7),
    Case("black-box, numpy", lambda: BlackBoxTeacher(on_arrays(1), arrays="numpy"), one(1), False, 1e-7),
    Case("ensemble", lambda: EnsembleTeacher([module(1), analytic(2), module(3)]), mean(1, 2, 3)),
    Case("ensemble with a black box", lambda: EnsembleTeacher([module(1), black_box(2)]), mean(1, 2), False, 1e-7),
    Case("memoized", lambda: MemoizedTeacher(module(1)), one(1)),
    Case("memoized black box", lambda: MemoizedTeacher(black_box(1)), one(1), vjp=False, tolerance=1e-7),
    Case("ensemble of one", lambda: EnsembleTeacher([EnsembleTeacher([module(1)])]), one(1)),
]


@dataclass(frozen=True)
class Reading:
    """A readout, its definition for one sample, and the labels that it needs."""

    name: str
    readout: Readout
    definition: Callable[..., list[Tensor]]
    labels: Callable[[], Tensor]


def classes() -> Tensor:
    return torch.tensor([2, 0, 3])


def mixed() -> Tensor:
    return torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.2, 0.8], [0.3, 0, 0.7, 0]], dtype=torch.float64)


READINGS = [
    Reading("logits", Logits(), reference.logits, classes),
    Reading("log-probabilities", LogProbabilities(2.0), reference.log_probabilities, classes),
    Reading("label-logit", LabelLogit(), reference.label_logit, classes),
    Reading("label-logit, mixed", LabelLogit(), reference.label_logit, mixed),
    Reading("top-logit", TopLogit(), reference.top_logit, classes),
    Reading("loss", Loss(), reference.loss, classes),
    Reading("loss, mixed", Loss(), reference.loss, mixed),
]


def inputs() -> Tensor:
    return torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def directions(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
