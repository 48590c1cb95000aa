"""How close a student comes to a pretrained teacher, and why that carries over to new images or does not."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.datasets.distances import Bound, Distances
from jacmatch.jacobian import PooledFeatures, vjp
from jacmatch.jobs.pretrained import evaluating
from jacmatch.losses import hinton_kl
from jacmatch.objectives.transfer import Pair, Transfer
from jacmatch.teachers import ModuleTeacher, Question

_BATCH = 50


def mixed(split: Split, count: int | None = None) -> Split:
    """At most `count` samples, or all, in one fixed random order: files of a folder are sorted by class."""
    return split.subset(torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count])


def head_agreement(
    network: nn.Module, teacher: nn.Module, classes: int, pairs: tuple[Pair, ...], split: Split, **maps: Any
) -> dict[str, float | None]:
    """Agreement of the second head with the teacher, and mean cosines of attention maps and of their Jacobians.

    Args:
        network: The student with both heads.
        teacher: The teacher.
        classes: Outputs of the first head.
        pairs: Layers that are compared; without, there are no cosines.
        split: The images.
        **maps: `size` and `p` of the maps.
    """
    shown = 1.0 if pairs else 0.0
    heads: dict[str, Any] = {"classes": classes, "labels": 0.0, "outputs": 1.0}
    objective = Transfer(network, teacher, pairs=pairs, attention=shown, jacobians=shown, **heads, **maps).eval()
    sums: dict[str, float] = dict.fromkeys(("top1", "attention", "jacobians"), 0.0)
    for rows in torch.split(torch.arange(len(split)), _BATCH):
        x = split.inputs(rows).to(next(network.parameters()).device)
        with evaluating(network):
            terms = objective(x)
            same = network(x)[:, classes:].argmax(1) == _needed(terms.teacher_outputs).argmax(1)
        sums["top1"] += float(same.sum())
        for name in ("attention", "jacobians"):
            if name in terms.unweighted:
                sums[name] += len(rows) * (1 - float(terms.unweighted[name]) / 2)  # ‖a − b‖² = 2(1 − cos)
    mean = {name: total / len(split) for name, total in sums.items()}
    return {
        "top1": mean["top1"],
        "jacobian_cosine": mean["jacobians"] if pairs else None,
        "jacobian_relative_error": None,
        "attention_cosine": mean["attention"] if pairs else None,
    }


def distances(teacher: nn.Module, layer: str | None, near: Tensor, far: Tensor) -> dict[str, dict[str, float]]:
    """Distances of a set of images from another, in the room of pixels and in that of the teacher's pooled features.

    Args:
        teacher: The teacher.
        layer: Whose features are averaged over all pixels; None leaves that room out.
        near: The images that the others are measured from.
        far: The others.
    """
    rooms = {"pixels": (far, near)}
    if layer is not None:
        rooms["features"] = (features(teacher, layer, far), features(teacher, layer, near))
    return {room: asdict(Distances.between(*both)) for room, both in rooms.items()}


def features(teacher: nn.Module, layer: str, x: Tensor) -> Tensor:
    """The teacher's features of a layer, averaged over all pixels."""
    asked, question = ModuleTeacher(teacher), Question(PooledFeatures(layer))
    return torch.cat([asked.answer(part, question).values for part in torch.split(x, _BATCH)])


def bound(
    network: nn.Module, teacher: nn.Module, classes: int, loss: str, temperature: float, near: Tensor, far: Tensor
) -> dict[str, float]:
    """What the match of a student with its teacher on the training images says about other images, in pixel space.

    ρ is ‖T(x) − S(x)‖ for the squared loss, and the divergence itself for kl. K is an estimate, and so a lower bound of
    the true constant: the largest of all observed ratios |ρ(x) − ρ(x′)| / ‖x − x′‖ and of all ‖∇ρ(x)‖ on these images.

    Args:
        network: The student with both heads.
        teacher: The teacher.
        classes: Outputs of the first head.
        loss: `squared` or `kl`.
        temperature: Of kl.
        near: The images that the student was trained on.
        far: Images that it has not seen.
    """

    def rho(x: Tensor) -> Tensor:
        student: Tensor = network(x)[:, classes:]
        told: Tensor = teacher(x)
        if loss == "kl":
            return hinton_kl(student, told, temperature)[:, None]
        return (student - told).square().sum(1, keepdim=True).clamp_min(1e-12).sqrt()

    values, slopes = [], []
    with evaluating(network), evaluating(teacher):
        for x in torch.split(torch.cat([far, near]), _BATCH):
            each, gradient = vjp(rho, x, torch.ones(len(x), 1))
            values.append(each[:, 0])
            slopes.append(gradient.flatten(1).norm(dim=1))
    losses, slope = torch.cat(values), float(torch.cat(slopes).max())
    found = Bound.of(far, near, losses[: len(far)], losses[len(far) :])
    found = Bound.of(far, near, losses[: len(far)], losses[len(far) :], max(slope, found.slope))
    return named(found)


def named(found: Bound) -> dict[str, float]:
    """The terms of a bound as plain numbers."""
    return {
        "rho_unseen": found.mean,
        "rho_largest": found.largest,
        "rho_weighted": found.weighted,
        "rho_average": found.average,
        "slope": found.slope,
        "by_hausdorff": found.by_hausdorff,
        "by_nearest": found.by_nearest,
        "by_transport": found.by_transport,
    }


def nearest_mean_accuracy(teacher: nn.Module, train: Split, test: Split, classes: int) -> float:
    """Accuracy of the nearest class mean in the space of the teacher's outputs: what they say about the target at all.

    Args:
        teacher: The teacher.
        train: Gives the means.
        test: Is classified.
        classes: Of the target.
    """
    known, asked = (_outputs(teacher, split) for split in (train, test))
    means = torch.stack([known[train.y.cpu() == number].mean(0) for number in range(classes)])
    return float((torch.cdist(asked, means).argmin(1) == test.y.cpu()).double().mean())


def _outputs(teacher: nn.Module, split: Split) -> Tensor:
    place = next(teacher.parameters(), torch.empty(0)).device
    with evaluating(teacher):
        parts = (split.inputs(rows).to(place) for rows in torch.split(torch.arange(len(split)), 2 * _BATCH))
        return torch.cat([teacher(x).cpu() for x in parts])


def _needed(outputs: Tensor | None) -> Tensor:
    assert outputs is not None
    return outputs
