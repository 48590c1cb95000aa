"""Small data, networks and objectives that the tests of the loop share."""

import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.objectives import AtMixedPairs, Distillation, Terms
from jacmatch.runs import Run


def images(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(x, torch.arange(count) % 3)


def points(count=24, seed=0):
    """A regression."""
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return Split(x, torch.stack((x.sum(1).sin(), x[:, 0] * x[:, 1]), 1))


def network(seed=0):
    """Everything that a step changes besides weights: BatchNorm's statistics and the random numbers of dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, 3),
    )


def distillation(seed=1):
    """All terms, a share that is measured again on the way, mixed pairs, and derivatives in each second step only."""
    return Distillation(
        network(seed), network(100).eval(), point=AtMixedPairs(), every=2, measure_every=6, labels=0.5, seed=3
    )


class Plain(nn.Module):
    """Squared error of a linear map; keeps what it was called with."""

    needs_partners = False

    def __init__(self, inputs=4, outputs=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.student = nn.Linear(inputs, outputs)
        self.calls = []

    def forward(self, x, y, *, ids, draw=None, partners=None, partner_labels=None, progress=0.0):
        outputs = self.student(x)
        loss = (outputs - y).square().sum(1).mean()
        self.calls.append({"x": x, "y": y, "ids": ids, "partners": partners, "labels": partner_labels, "at": progress})
        return Terms({"loss": loss, "fit": loss}, outputs)


def begin(folder):
    """The run in a folder, new or taken up again."""
    return Run.create(folder, "train", {}, "0.1.0")
