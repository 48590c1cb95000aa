"""A pretrained teacher of other classes, for images of another size."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from jacmatch.datasets import Data
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.networks import Description
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.teachers import prepare
from jacmatch.jobs.train import Train
from jacmatch.models import Resized, catalog


@dataclass(frozen=True)
class Pretrained:
    """A frozen teacher, and what is needed to build its architecture again with other outputs."""

    network: nn.Module  # the network on images as the target has them
    description: Description  # how it is built, at its own image size
    shape: tuple[int, ...]  # of the target's images
    source: Data | None = None  # the data it was trained on, where they are known

    def with_outputs(self, outputs: int) -> nn.Module:
        """Return a copy to train further, with a new last layer, also where the teacher has as many outputs."""
        inner = _inner(self.network, self.description, self.shape)
        empty, _ = networks.adapted(inner, self.description, outputs)
        return _fitted(empty, self.description.shape, self.shape)


def trained_first(model: str, source: Data, recipe: Train, progress: Progress) -> Pretrained:
    """A teacher that is trained on the source classes, and kept for the next time."""
    network = prepare(model, source, None, recipe, progress, allow_code=True).network
    return Pretrained(network, Description.of(model, source), tuple(source.shape), source)


def from_run(folder: str, shape: tuple[int, ...], *, allow_code: bool = False) -> Pretrained:
    """The network of a run folder; it sees the target's images resized to those that it was trained on."""
    description = networks.describe(Path(folder))
    network = networks.load_student(folder, allow_code=allow_code)
    return Pretrained(_fitted(network, description.shape, shape).eval(), description, shape)


def from_weights(
    spec: str, outputs: int, shape: tuple[int, ...], size: int | None, weights: networks.Weights
) -> Pretrained:
    """A model with weights of a file."""
    own = shape if size is None else (shape[0], size, size)
    if (known := catalog.preprocessing(spec)) is not None and known.fixed and size is None:
        own = (shape[0], known.size, known.size)
    network, description = networks.with_weights(spec, outputs, own, replace(weights, size=0))
    return Pretrained(_fitted(network, own, shape), description, shape)


def _fitted(network: nn.Module, own: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
    """The network on images of this shape."""
    if tuple(own) == tuple(shape):
        return network
    if len(own) != 3 or len(shape) != 3 or own[0] != shape[0] or own[1] != own[2]:
        rule = f"The teacher must take images that can be resized from {shape}."
        raise InputError(rule, got=f"samples of shape {own}", do="Give images with as many channels.")
    return Resized(network, shape, own[1])


def _inner(network: nn.Module, description: Description, shape: tuple[int, ...]) -> nn.Module:
    """The network without what resizes its images."""
    return network.network if isinstance(network, Resized) and tuple(description.shape) != tuple(shape) else network


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the block."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)
