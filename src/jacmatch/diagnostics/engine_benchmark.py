"""Measures which derivative engine is the fastest for an objective, on this machine and batch."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from jacmatch.diagnostics.isolation import Batch
from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import Engine, gradient_norms, preserved_buffers
from jacmatch.jacobian.callables import preserved_generators
from jacmatch.objectives import Distillation

_ENGINES: tuple[Engine, ...] = ("forward", "reverse")


@dataclass(frozen=True)
class EngineBenchmark:
    """The result of `benchmark_engines`.

    Attributes:
        engine: The fastest engine that can differentiate the student; `differences` if no other can.
        seconds: Median time of a step by each of these engines.
        refused: For each other engine, the reason why it cannot.
    """

    engine: Engine
    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def benchmark_engines(objective: Distillation, batch: Batch, *, rounds: int = 5) -> EngineBenchmark:
    """Measure the fastest engine for directions on the input side, by the time of a step: terms and gradient.

    The engines alternate, each after one step that is not timed. The engine `differences` is not measured: it takes
    about as long, but is not exact. The objective, its student and torch's random numbers are left unchanged.

    Args:
        objective: The objective, on the device of the batch; its probe must draw input directions.
        batch: A batch of the training.
        rounds: Timed steps by each engine.
    """
    seconds: dict[str, list[float]] = {engine: [] for engine in _ENGINES}
    refused: dict[str, str] = {}
    with _untouched(objective, batch.x.device):
        for number in range(rounds + 1):
            for engine in _ENGINES:
                if engine in refused:
                    continue
                try:
                    spent = _step(objective, batch, engine)
                except UnsupportedError as error:
                    refused[engine] = str(error)
                    continue
                if number:
                    seconds[engine].append(spent)
    medians: dict[str, float] = {
        engine: statistics.median(seconds[engine]) for engine in _ENGINES if engine not in refused
    }
    best: Engine = "differences"
    for engine in _ENGINES:
        if engine in medians and medians[engine] == min(medians.values()):
            best = engine
    return EngineBenchmark(best, medians, refused)


def _step(objective: Distillation, batch: Batch, engine: Engine) -> float:
    """Return the seconds of the terms and their gradient."""
    parameters: list[nn.Parameter] = [p for p in objective.parameters() if p.requires_grad]
    objective.differentiation.engine, objective.calls = engine, 1  # the same directions for each engine
    _wait(batch.x.device)
    start = time.perf_counter()
    terms = objective(batch.x, batch.y, **batch.keywords())
    gradient_norms({"loss": terms["loss"]}, parameters)
    _wait(batch.x.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _untouched(objective: Distillation, device: torch.device) -> Iterator[None]:
    """Make each call within the context a step with the Jacobian term and without measured shares; then restore."""
    before = (objective.differentiation.engine, objective.every, objective.training)
    objective.every = 1
    objective.train()
    try:
        with objective.unmeasured_calls(), preserved_generators(device), preserved_buffers(objective.student):
            yield
    finally:
        objective.differentiation.engine, objective.every, training = before
        objective.train(training)
