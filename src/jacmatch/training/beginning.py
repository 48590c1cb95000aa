"""A training run at its beginning: the objective on its device, and an optimiser for it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.training.augmentation import Batches
from jacmatch.training.distributed import Ranks, distribute
from jacmatch.training.layout import channels_last
from jacmatch.training.metrics import Metrics
from jacmatch.training.precision import precision
from jacmatch.training.schedules import Training
from jacmatch.training.sharding import check_shardable, sharded
from jacmatch.training.state import State


def begin(
    objective: nn.Module,
    settings: Training,
    place: torch.device,
    identity: dict[str, Any],
    shown: Tensor,
    ranks: Ranks,
) -> State:
    """The objective on its device, distributed where there are several processes, and a fresh optimiser for it."""
    from lightning_fabric import Fabric  # takes a second, so not before something is trained

    student = getattr(objective, "student", None)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if not isinstance(student, nn.Module) or not trained:
        rule = "`objective` of `fit` must have a `student` with parameters that require gradients."
        raise InputError(rule, got=type(objective).__name__, do="Do not freeze the student.")
    if settings.channels_last:
        channels_last(objective)
    plugin = precision(settings, place)
    devices: list[int] | int = 1 if place.index is None else [place.index]
    fabric = Fabric(accelerator=place.type, devices=devices, plugins=[plugin])
    unit: nn.Module | None = None
    if settings.shard:
        check_shardable(settings)
        unit = sharded(objective, ranks, place)
        model: nn.Module = unit
        optimizer = _optimizer([each for each in unit.parameters() if each.requires_grad], settings)
    else:
        model, optimizer = fabric.setup(objective.to(place).train(), _optimizer(trained, settings))
        unit = distribute(objective, ranks, place) if ranks.size > 1 else None
    average = None if settings.ema is None else copy.deepcopy(student).requires_grad_(False)
    return State(
        settings=settings,
        place=place,
        fabric=fabric,
        precision=plugin,
        objective=objective,
        model=model,
        student=student,
        average=average,
        optimizer=optimizer,
        identity=identity,
        shown=shown.to(place),
        metrics=Metrics(place, ranks),
        ranks=ranks,
        shared=unit,
    )


def dealt(
    objective: nn.Module, train: Split, settings: Training, seed: int, place: torch.device, ranks: Ranks
) -> Batches:
    """The batches of the objective, or of each the part that this process has."""
    return Batches(
        train,
        settings.batch_size,
        seed=seed,
        augment=settings.augment,
        partners=bool(getattr(objective, "needs_partners", False)),
        views=settings.views,
        device=place,
        workers=settings.workers,
        prefetch=settings.prefetch,
        resident_bytes=settings.resident_mib * 2**20,
        rank=ranks.rank,
        ranks=ranks.size,
    )


def _optimizer(parameters: list[nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        decay, momentum = settings.weight_decay, settings.momentum
        return torch.optim.SGD(parameters, settings.lr, momentum=momentum, weight_decay=decay)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    # Where a step may be made undone, all that it changes must be on the GPU: fused, the number of steps is.
    fused = True if settings.on_not_finite == "skip" and parameters[0].is_cuda else None
    return kind(parameters, settings.lr, weight_decay=settings.weight_decay, fused=fused)
