"""Two small transformers on digits, and what is compared: parameters after some steps of a plain loop."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

from jacmatch import AtData, Distillation, RandomOutputs

from . import torchvision_operators  # noqa: F401  before any framework is imported

DIGITS = load_digits()
X = torch.tensor(DIGITS.images[:60] / 16, dtype=torch.float32)[:, None]
Y = torch.tensor(DIGITS.target[:60])


class Images(nn.Module):
    """A network of two convolutions; small enough for a test, with biases that a Jacobian term does not reach."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2), nn.GELU(), nn.Conv2d(width, 10, 3), nn.Flatten(), nn.Linear(10, 10)
        )

    checkpointed = False

    def forward(self, pixel_values):
        if self.checkpointed:
            return checkpoint(self.layers, pixel_values, use_reentrant=False)
        return self.layers(pixel_values)


def networks():
    """A student and its teacher."""
    torch.manual_seed(1)
    return Images(4), Images(8)


def objective(student, teacher, **settings):
    """Labels, outputs and Jacobians at the data, with random directions."""
    settings = {"probe": RandomOutputs(1), "jacobians": 0.5, **settings}
    return Distillation(student, teacher, point=AtData(), **settings)


def plain_loop(objective, batches, *, rate=0.1, optimizer=torch.optim.SGD, cast=None):
    """Train in a loop of one's own; a step is a list of batches (x, y), whose mean over all samples it takes."""
    objective.train()
    optimizer = optimizer([p for p in objective.parameters() if p.requires_grad], lr=rate)
    means = []
    for step in batches:
        optimizer.zero_grad()
        samples, sums = sum(len(x) for x, _ in step), {}
        for x, y in step:
            with torch.autocast("cpu", cast, enabled=cast is not None):
                terms = objective(x, y)
            (terms.loss * len(x) / samples).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * len(x) / samples
        means.append(sums)
        optimizer.step()
    return means


def steps(samples, size, accumulate=1, x=X, y=Y):
    """The batches of an epoch in order, `accumulate` in each step."""
    batches = [(x[i : min(i + size, samples)], y[i : min(i + size, samples)]) for i in range(0, samples, size)]
    return [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]


def difference(one, other):
    """The largest difference of two networks' parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
