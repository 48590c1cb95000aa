"""Pairs of layers of two networks that differ in architecture."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, unknown_name
from jacmatch.jacobian.modules import in_mode
from jacmatch.objectives.transfer import Pair


def layers_by_resolution(network: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Return the last layer of each resolution of the feature maps, from large to small, without single pixels."""
    last: dict[tuple[int, ...], str] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
                last[tuple(output.shape[2:])] = name

        return hook

    like = next(network.parameters())
    with ExitStack() as hooks, in_mode(network, training=False), torch.no_grad():
        for name, module in list(network.named_modules())[1:]:
            hooks.enter_context(module.register_forward_hook(watch(name)))
        network(torch.zeros(2, *shape, device=like.device, dtype=like.dtype))
    return [last[size] for size in sorted(last, key=lambda size: -size[0] * size[1])]


def chosen_pairs(student: nn.Module, teacher: nn.Module, shape: tuple[int, ...], count: int) -> tuple[Pair, ...]:
    """Return at most `count` pairs, the deepest: the last layers of each resolution, by relative depth.

    With m and n resolutions there are min(m, n) pairs, spread evenly from the first to the last of either network.
    """
    sides = [layers_by_resolution(network, shape) for network in (student, teacher)]
    for who, layers in zip(("student", "teacher"), sides, strict=True):
        if not layers:
            do = "Choose a convolutional network, or methods without attention maps and Jacobians."
            raise InputError(f"The {who} must have feature maps with more than one pixel.", got="none", do=do)
    most = min(map(len, sides))
    indices = [[round(k * (len(side) - 1) / max(most - 1, 1)) for k in range(most)] for side in sides]
    if most == 1:
        indices = [[len(side) - 1] for side in sides]
    pairs = [(sides[0][own], sides[1][other]) for own, other in zip(*indices, strict=True)]
    return tuple(pairs[-count:])


def named_pairs(pairs: Sequence[str], student: nn.Module, teacher: nn.Module) -> tuple[Pair, ...]:
    """Return the pairs given as STUDENT_LAYER:TEACHER_LAYER; names of wrappers may be omitted."""
    named = []
    for pair in pairs:
        own, colon, other = pair.partition(":")
        if not (own and colon and other):
            rule = "Each of `--pairs` must be STUDENT_LAYER:TEACHER_LAYER."
            raise InputError(rule, got=repr(pair), do="Write for example features.conv4:features.6.")
        named.append((_path("student", student, own), _path("teacher", teacher, other)))
    return tuple(named)


def _path(who: str, network: nn.Module, layer: str) -> str:
    known = [name for name, _ in network.named_modules() if name]
    for prefix in ("", "network.", "network.network."):
        if prefix + layer in known:
            return prefix + layer
    shown = [name.removeprefix("network.").removeprefix("network.") for name in known]
    raise unknown_name(f"A layer of the {who} in `--pairs`", layer, [name for name in shown if name != "network"])
