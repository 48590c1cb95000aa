"""FSDP2: each process keeps a part of the weights, of their gradients and of what the optimiser remembers.

The objective that was given stays whole: a copy of it is cut up and trained, and its weights are put together where the
whole network is looked at: for validation, checkpoints and the end.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.objectives.base import Share
from jacmatch.training.distributed import Ranks, Shared, without_synchronised_statistics
from jacmatch.training.schedules import Training

_SLOPES = ("jacobians", "penalty")


def sharded(objective: nn.Module, ranks: Ranks, place: torch.device) -> Shared:
    """A copy of the objective, cut up: one unit for each child of the student, and one for the rest.

    Raises:
        InputError: There is one process only.
        UnsupportedError: Its slopes are taken by the reverse engine, or a weight is a share of the gradient norm.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes as long as half of torch

    if ranks.size == 1:
        rule = "`shard` of `Training` must have several processes to share the weights between."
        raise InputError(rule, got="one", do="Start more (--devices N, or torchrun).")
    without_synchronised_statistics(objective)
    slopes, weights = getattr(objective, "slopes", None), getattr(getattr(objective, "balance", None), "weights", {})
    asked = any(weights.get(name) for name in _SLOPES)
    if asked and _reverse(objective):
        raise UnsupportedError(
            "`shard` of `Training` cannot go with slopes by the reverse engine: FSDP2 frees the weights of a layer "
            "after its backward pass, and the second derivative needs them again. Use --probe random-inputs, whose "
            "engine is then forward (or --engine differences), or leave `shard` out."
        )
    if any(isinstance(weight, Share) and weight for weight in weights.values()):
        raise UnsupportedError(
            "`shard` of `Training` cannot go with a weight that is a `Share`: to measure it, the gradient of each term "
            "is needed whole. Give the weight itself (--jacobian-weight)."
        )
    teacher = getattr(objective, "teacher", None)
    trained: Any = copy.deepcopy(objective, {id(teacher): teacher})
    trained = trained.to(place).train()
    if slopes is not None and slopes.engine == "auto":
        trained.slopes.engine = "forward"
    mesh = init_device_mesh(place.type, (ranks.size,))
    for child in trained.student.children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            fully_shard(child, mesh=mesh)
    unit = Shared(trained, ranks, measured=False)
    fully_shard(unit, mesh=mesh)
    return unit


def check_shardable(settings: Training) -> None:
    """Refuses settings that FSDP2 does not go with.

    Raises:
        UnsupportedError: One of them is set.
    """
    for name, wrong in {
        "ema": settings.ema,
        "compile": settings.compile,
        "precision": settings.precision == "fp16",
        "on_not_finite": settings.on_not_finite == "skip",
    }.items():
        if wrong:
            raise UnsupportedError(f"`shard` of `Training` cannot go with `{name}`={getattr(settings, name)!r}.")


def _reverse(objective: nn.Module) -> bool:
    """Whether the slopes of the student are taken by reverse mode, or might be."""
    slopes = getattr(objective, "slopes", None)
    probe = getattr(slopes, "probe", getattr(objective, "probe", None))
    if hasattr(probe, "step"):
        return False
    return slopes is None or slopes.engine == "reverse" or getattr(probe, "side", "output") == "output"


def gather(unit: Shared, objective: nn.Module) -> None:
    """Puts the weights and the state of what is cut up into the whole objective. Every process has to call this."""
    objective.load_state_dict(whole(unit.objective.state_dict()))


def scatter(unit: Shared, objective: nn.Module) -> None:
    """Cuts up the weights and the state of the whole objective."""
    own = unit.objective.state_dict()
    unit.objective.load_state_dict({name: _like(value, own[name]) for name, value in objective.state_dict().items()})


def whole(state: Any) -> Any:
    """The same state with all its tensors put together. Every process has to call this."""
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {name: whole(value) for name, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def cut(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser that `whole` made, cut up as the parameters of this one are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {name: _like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}


def _like(value: Any, own: Any) -> Any:
    """The value, cut up if it is a tensor of the shape of one that is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
