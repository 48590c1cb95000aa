"""The same by definition, one sample, one row and one step at a time."""

import math

import torch

from jacmatch.jacobian import probes


def rate(step, settings):
    """The learning rate, worked out in the other order of cases."""
    if settings.warmup and step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "step":
        passed = [m for m in settings.milestones if m * settings.steps <= step]
        return settings.lr / 10 ** len(passed)
    angle = math.pi * (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.lr * math.cos(angle / 2) ** 2


class Optimizer:
    """SGD with momentum, Adam and AdamW from their papers, for one vector of parameters in float64."""

    def __init__(self, size, settings):
        self.settings = settings
        self.first = torch.zeros(size, dtype=torch.float64)
        self.second = torch.zeros(size, dtype=torch.float64)
        self.count = 0

    def step(self, w, g, lr):
        kind, decay = self.settings.optimizer, self.settings.weight_decay
        self.count += 1
        if kind == "adamw":
            w = w * (1 - lr * decay)
        else:
            g = g + decay * w
        if kind == "sgd":
            self.first = self.settings.momentum * self.first + g
            return w - lr * self.first
        self.first = 0.9 * self.first + 0.1 * g
        self.second = 0.999 * self.second + 0.001 * g * g
        mean, square = self.first / (1 - 0.9**self.count), self.second / (1 - 0.999**self.count)
        return w - lr * mean / (square.sqrt() + 1e-8)


def train_linear(weight, bias, split, settings, seed):
    """Squared error of a linear map with its gradient by hand; the weights and their running average."""
    w = torch.cat((weight, bias[:, None]), 1).double()
    average = w.clone()
    optimizer = Optimizer(w.numel(), settings)
    size = min(settings.batch_size, len(split.x))
    in_epoch = len(split.x) // size
    number = 0
    for step in range(settings.steps):
        gradient = torch.zeros_like(w)
        for _ in range(settings.accumulate):
            epoch, position = divmod(number, in_epoch)
            order = probes.permutation(seed, torch.tensor([0]), epoch, len(split.x))[0].tolist()
            for row in order[position * size : (position + 1) * size]:
                x = torch.cat((split.x[row].double(), torch.ones(1, dtype=torch.float64)))
                gradient += 2 * torch.outer(w @ x - split.y[row].double(), x) / size / settings.accumulate
            number += 1
        norm = gradient.square().sum().sqrt()
        if settings.clip is not None and norm > settings.clip:
            gradient *= settings.clip / norm
        w = optimizer.step(w.flatten(), gradient.flatten(), rate(step, settings)).view_as(w)
        if settings.ema is not None:
            decay = min(settings.ema, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * w
    return w, average


def shifted(image, down, right):
    """The image (channel, height, width) moved by whole pixels, black where nothing was."""
    moved = torch.zeros_like(image)
    _, height, width = image.shape
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                moved[:, i, j] = image[:, i - down, j - right]
    return moved


def cosine(a, b):
    """Of two vectors, 0 if one is zero."""
    norms = a.square().sum().sqrt() * b.square().sum().sqrt()
    return 0.0 if norms == 0 else float((a * b).sum() / norms)


def calibration(outputs, labels, bins):
    """The expected calibration error, bin by bin and sample by sample; Guo et al. 2017, Eq. 3."""
    total = 0.0
    for m in range(1, bins + 1):
        sure, right = [], []
        for logits, label in zip(outputs.double(), labels, strict=True):
            probabilities = [1 / sum(math.exp(other - own) for other in logits.tolist()) for own in logits.tolist()]
            largest = max(probabilities)
            if (m - 1) / bins < largest <= m / bins:
                sure.append(largest)
                right.append(probabilities.index(largest) == int(label))
        if sure:
            total += len(sure) / len(outputs) * abs(sum(right) / len(right) - sum(sure) / len(sure))
    return total
