"""The distance of a student from a pretrained teacher, and bounds of it on unseen images."""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.datasets.distances import Bound, Distances
from jacmatch.jacobian import Estimator, PooledFeatures, vjp
from jacmatch.jobs.teachers import evaluating
from jacmatch.losses import hinton_kl
from jacmatch.objectives import AtData, Distillation
from jacmatch.objectives.points import Batch
from jacmatch.objectives.transfer import Pair, Transfer
from jacmatch.teachers import ModuleTeacher, Question

_BATCH = 50


def head_agreement(
    network: nn.Module,
    teacher: nn.Module,
    classes: int,
    pairs: tuple[Pair, ...],
    split: Split,
    *,
    shared: bool = False,
    **maps: Any,
) -> dict[str, float | None]:
    """Return the agreement of the second head, and mean cosines of attention maps and of their Jacobians."""
    weight = 1.0 if pairs else 0.0
    heads: dict[str, Any] = {"shared": shared, "classes": classes, "labels": 0.0, "outputs": 1.0}
    objective = Transfer(network, teacher, pairs=pairs, attention=weight, jacobians=weight, **heads, **maps).eval()
    sums: dict[str, float] = dict.fromkeys(("top1", "attention", "jacobians"), 0.0)
    for rows in torch.split(torch.arange(len(split)), _BATCH):
        x = split.inputs(rows).to(next(network.parameters()).device)
        with evaluating(network):
            terms = objective(x)
            same = network(x)[:, 0 if shared else classes :].argmax(1) == _needed(terms.teacher_outputs).argmax(1)
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


def matched_rows(objective: Distillation, split: Split, probe: Estimator | None = None) -> dict[str, float]:
    """Return the agreement of the outputs, and cosine and relative error of the products of the probe, or another."""
    own = objective.differentiation
    how, network = replace(own, point=AtData(), probe=own.probe if probe is None else probe), objective.network
    device = next(network.parameters()).device
    same, cosines, sums = 0.0, 0.0, [0.0, 0.0]
    for rows in torch.split(torch.arange(len(split)), _BATCH):
        x, others = (split.inputs(each).to(device) for each in (rows, (rows + 1) % len(split)))
        batch = Batch(x, None, others, None, None, rows.to(device), 0)
        assert objective.teacher is not None
        answer = how.ask(objective.teacher, batch, products=True)
        with evaluating(network):
            outputs, products = how.of_student(network, batch, answer, traced=False)
        compared = outputs if objective.classes is None else outputs[:, objective.classes :]
        same += float((compared.argmax(1) == answer.outputs.argmax(1)).sum())
        student, teacher = (_needed(each).transpose(0, 1).flatten(1) for each in (products, answer.products))
        cosines += float(nn.functional.cosine_similarity(student, teacher).sum())
        sums = [sums[0] + float((student - teacher).square().sum()), sums[1] + float(teacher.square().sum())]
    return {
        "top1": same / len(split),
        "jacobian_cosine": cosines / len(split),
        "jacobian_relative_error": (sums[0] / max(sums[1], 1e-30)) ** 0.5,
    }


def distances(teacher: nn.Module, layer: str | None, near: Tensor, far: Tensor) -> dict[str, dict[str, float]]:
    """Return the distances between two sets of images, in pixels and in the teacher's pooled features."""
    spaces = {"pixels": (far, near)}
    if layer is not None:
        spaces["features"] = (features(teacher, layer, far), features(teacher, layer, near))
    return {space: asdict(Distances.between(*both)) for space, both in spaces.items()}


def features(teacher: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Return the teacher's features of a layer, averaged over all pixels."""
    source, question = ModuleTeacher(teacher), Question(PooledFeatures(layer))
    return torch.cat([source.answer(part, question).values for part in torch.split(x, _BATCH)])


def bound(
    network: nn.Module, teacher: nn.Module, classes: int, loss: str, temperature: float, near: Tensor, far: Tensor
) -> dict[str, float]:
    """Return the terms of a bound of the student's distance from its teacher on unseen images, in pixel space.

    ρ is ‖T(x) − S(x)‖ for the squared loss, and the divergence itself for kl. K is an estimate, and so a lower bound of
    the true constant: the largest of all observed ratios |ρ(x) − ρ(x′)| / ‖x − x′‖ and of all ‖∇ρ(x)‖ on these images.
    """

    def rho(x: Tensor) -> Tensor:
        student: Tensor = network(x)[:, classes:]
        reference: Tensor = teacher(x)
        if loss == "kl":
            return hinton_kl(student, reference, temperature)[:, None]
        return (student - reference).square().sum(1, keepdim=True).clamp_min(1e-12).sqrt()

    values, norms = [], []
    with evaluating(network), evaluating(teacher):
        for x in torch.split(torch.cat([far, near]), _BATCH):
            each, gradient = vjp(rho, x, torch.ones(len(x), 1))
            values.append(each[:, 0])
            norms.append(gradient.flatten(1).norm(dim=1))
    losses, steepest = torch.cat(values), float(torch.cat(norms).max())
    unseen, seen = losses[: len(far)], losses[len(far) :]
    constant = max(steepest, Bound.of(far, near, unseen, seen).lipschitz)
    return named(Bound.of(far, near, unseen, seen, constant))


def named(terms: Bound) -> dict[str, float]:
    """Return the terms of a bound as plain numbers."""
    return {
        "rho_unseen": terms.mean,
        "rho_largest": terms.largest,
        "rho_weighted": terms.weighted,
        "rho_average": terms.average,
        "slope": terms.lipschitz,
        "by_hausdorff": terms.by_hausdorff,
        "by_nearest": terms.by_nearest,
        "by_transport": terms.by_transport,
    }


def nearest_mean_accuracy(teacher: nn.Module, train: Split, test: Split, classes: int) -> float:
    """Return the accuracy of the nearest class mean among the teacher's outputs."""
    known, unknown = (_outputs(teacher, split) for split in (train, test))
    means = torch.stack([known[train.y.cpu() == number].mean(0) for number in range(classes)])
    return float((torch.cdist(unknown, means).argmin(1) == test.y.cpu()).double().mean())


def _outputs(teacher: nn.Module, split: Split) -> Tensor:
    device = next(teacher.parameters(), torch.empty(0)).device
    with evaluating(teacher):
        parts = (split.inputs(rows).to(device) for rows in torch.split(torch.arange(len(split)), 2 * _BATCH))
        return torch.cat([teacher(x).cpu() for x in parts])


def _needed(outputs: Tensor | None) -> Tensor:
    assert outputs is not None
    return outputs
