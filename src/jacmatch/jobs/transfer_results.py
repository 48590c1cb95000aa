"""What `jacmatch transfer` compares and reports: pairs of layers, distances, rows of methods, notes and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.datasets.distances import Bound, Distances
from jacmatch.errors import InputError, unknown_name
from jacmatch.jacobian import Estimator, PooledFeatures, vjp
from jacmatch.jobs import study
from jacmatch.jobs.adaptation import layer_calls, layer_path
from jacmatch.jobs.study import Done, Result, over_seeds
from jacmatch.jobs.teachers import evaluating
from jacmatch.losses import OutputLoss, hinton_kl
from jacmatch.models import count_parameters
from jacmatch.objectives import AtData, Distillation
from jacmatch.objectives.terms import Batch
from jacmatch.objectives.transfer import Pair, Transfer
from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, entry
from jacmatch.runs import Run, read_metrics, spread
from jacmatch.teachers import ModuleTeacher, Question
from jacmatch.training.data import in_order

# fmt: off
Method = Literal[
    "labels", "oracle", "lwf", "lwf+jacobians", "lwf+attention", "lwf+attention+jacobians",
    "mixup", "adapt", "adapt+jacobians", "adapt+attention", "adapt+attention+jacobians",
    "features", "features+jacobians",
]
# fmt: on
METHODS: dict[str, str] = {
    "labels": "labels only",
    "oracle": "teacher fine-tuned (oracle)",
    "lwf": "LwF: labels + outputs",
    "lwf+jacobians": "LwF + Jacobians",
    "lwf+attention": "LwF + attention",
    "lwf+attention+jacobians": "LwF + attention + Jacobians",
    "mixup": "labels, mixed pairs",
    "adapt": "probe on the teacher, then its outputs",
    "adapt+jacobians": "probe, outputs + Jacobians",
    "adapt+attention": "probe, outputs + attention",
    "adapt+attention+jacobians": "probe, outputs + attention + Jacobians",
    "features": "labels + PCA features",
    "features+jacobians": "labels + PCA features + Jacobians",
}
"""Names of the methods in tables; the first six are the rows of the paper."""
PAPER = tuple(METHODS)[:6]


@dataclass(frozen=True)
class Recipe:
    """Defaults of a recipe: the methods, the point, and the loss of the outputs."""

    methods: tuple[str, ...]
    point: Literal["data", "mixed-pairs"]
    output_loss: OutputLoss
    temperature: float


RECIPES = {
    "adapt": Recipe(("mixup", "adapt", "adapt+jacobians"), "mixed-pairs", "kl", 1.0),
    "lwf": Recipe(("mixup", "lwf", "lwf+attention", "lwf+attention+jacobians"), "mixed-pairs", "kl", 4.0),
    "features": Recipe(("mixup", "features", "features+jacobians"), "mixed-pairs", "squared", 1.0),
    "paper": Recipe(PAPER, "data", "squared", 2.0),
}
"""The recipes of `--recipe`; the first is the default."""


def layers_by_resolution(network: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Return the last layer of each resolution of the feature maps, from large to small, without single pixels."""
    _, calls = layer_calls(network, torch.zeros(2, *shape).to(next(network.parameters())))
    last = {
        tuple(call.output.shape[2:]): call.name
        for call in calls
        if isinstance(call.output, Tensor) and call.output.dim() == 4 and min(call.output.shape[2:]) > 1
    }
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
    if (path := layer_path(network, layer)) is not None:
        return path
    known = [name for name, _ in network.named_modules() if name]
    shown = [name.removeprefix("network.").removeprefix("network.") for name in known]
    raise unknown_name(f"A layer of the {who} in `--pairs`", layer, [name for name in shown if name != "network"])


_PARTS = ((0.5, 0.7), (0.8, 1.0))  # parts of the steps whose mean losses are compared
FALL, LEARNED = 0.2, 0.3
"""A loss that falls by more than the first share at the end, or by less than the second in total, has not converged."""
_SETS = {"unseen": "unseen images of the target", "source": "images of the source"}
_SPACES = {"pixels": "pixels", "features": "the teacher's pooled features"}
_TERMS = {
    "rho_unseen": "mean ρ, unseen",
    "rho_average": "mean ρ, training",
    "rho_largest": "max ρ, training",
    "slope": "K",
    "by_hausdorff": "max ρ + K·H",
    "by_nearest": "mean ρ + K·nearest",
    "by_transport": "mean ρ + K·W₁",
}


def row(label: str, results: Sequence[Result]) -> Result:
    """Return the row of a method; numbers that it does not have are None."""
    bounds = [result["bound"] for result in results if result["bound"] is not None]
    agreement = {key: over_seeds([each["agreement"][key] for each in results]) for key in results[0]["agreement"]}
    accuracy = over_seeds([each["student"].get("validation_accuracy") for each in results])
    bound = {key: spread([each[key] for each in bounds]) for key in bounds[0]} if bounds else None
    return study.row(label, results, validation_accuracy=accuracy, agreement=agreement, bound=bound)


def loss_falls(
    rows: Sequence[Mapping[str, Any]], steps: int, terms: Sequence[str] = ("labels", "outputs")
) -> tuple[float, float] | None:
    """Return the relative fall of a loss in the last 20 % of the steps, since 50 to 70 % and since the first row.

    The loss is the sum of `terms`, whose weights must not change. None if not known.
    """
    sums = [(row["step"], sum(row.get(term, 0.0) for term in terms)) for row in rows if "loss" in row]
    before, after = ([loss for step, loss in sums if a < step / steps <= b] for a, b in _PARTS)
    if not after or len(sums) == len(after):
        return None
    middle, end = (sum(losses) / len(losses) for losses in (before or after, after))
    return (1 - end / middle, 1 - end / sums[0][1]) if min(middle, sums[0][1]) > 0 else (0.0, 1.0)


def larger_student(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Return a sentence where the student has more parameters than its teacher."""
    sizes = count_parameters(student), count_parameters(teacher)
    note = f"The student has more parameters than its teacher, {sizes[0]:,} against {sizes[1]:,}."
    return [note] if sizes[0] > sizes[1] else []


def useless_probe(rows: Mapping[str, Result], probes: Sequence[float]) -> list[str]:
    """Return a sentence where the probed teacher is no better than a student that learns from labels alone."""
    alone = [rows[method]["accuracy"]["mean"] for method in ("labels", "mixup") if method in rows]
    if not (alone and probes) or (mean := sum(probes) / len(probes)) > (best := max(alone)):
        return []
    return [
        f"The probed teacher has {mean:.1%} accuracy, no more than a student trained on labels alone ({best:.1%}): its "
        "features do not separate these classes. Use another teacher, or fine-tune it: --adapt-steps."
    ]


def not_converged(run: Run, done: Done) -> list[str]:
    """Return a sentence for each method whose loss was still falling in the end, or has hardly fallen at all."""
    notes = []
    for method in dict.fromkeys(cell.method for cell, _ in done):
        cells = [(cell, result) for cell, result in done if cell.method == method]
        by_share = method.partition("+")[0] in ("lwf", "features") and run.settings.get("outputs_weight") is None
        terms = ("labels",) if by_share else ("labels", "outputs")  # the weight of a share changes
        falls = [loss_falls(read_metrics(cell.folder(run).path), result["steps"], terms) for cell, result in cells]
        if not (known := [fall for fall in falls if fall is not None]):
            continue
        late, whole = (sum(each) / len(known) for each in zip(*known, strict=True))
        if late > FALL or whole < LEARNED:
            how = f"{late:.0%} in the end" if late > FALL else f"only {whole:.0%} in all"
            notes.append(f"{cells[0][0].label} has not converged: its loss fell by {how}. Give more --steps.")
    return notes


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a result of `jacmatch transfer`."""
    rows = result["rows"]
    measures = (("top1", 100, 1), ("attention_cosine", 1, 2), ("jacobian_cosine", 1, 2))
    accuracy = [
        (row["label"], entry(row["accuracy"]), *(entry(row["agreement"][key], *form) for key, *form in measures))
        for row in rows
    ]
    teacher, settings = result["teacher"], result["settings"]
    unlabelled = result.get("unlabelled_samples", 0)
    fewer = " (all there are)" * (settings.get("unlabelled_count", 0) > unlabelled)
    probe = teacher.get("probe_accuracy")
    notes = (
        f"{settings['data']}, {result['train_samples']} labeled and {unlabelled} unlabeled training images{fewer}, "
        f"{result.get('validation_samples', '')} labeled images held out for selection, {rows[0]['seeds']} seed(s). "
        "Agreement: share of unseen images on which student and teacher have the same largest output; cosines: of "
        "attention maps, and of the derivatives that are compared.",
        f"The nearest class mean of the teacher's outputs has {100 * teacher['accuracy']:.1f} % accuracy"
        f"{f', the probed teacher {entry(probe)} %' if probe else ''}.",
        f"Layers: {', '.join(' : '.join(pair) for pair in result['pairs']) or 'none'}.",
        *result.get("notes", ()),
    )
    head = ("test split", "accuracy %", "agreement %", "cosine of maps", "cosine of gradients")
    bounds = {row["label"]: row["bound"] for row in rows if row["bound"] is not None}
    return [
        Table("accuracy", "Transfer", head, tuple(accuracy), notes),
        distance_table(result["distances"]),
        bound_table(bounds, result.get("resolved", settings)["output_loss"]),
    ]


def distance_table(measured: Mapping[str, Any], title: str = "Distance from the training images") -> Table:
    """Return Hausdorff distance, mean nearest distance and W₁, in pixels and in features."""
    keys = ("hausdorff", "mean_nearest", "wasserstein")
    rows = [
        (f"{_SETS[name]}, {_SPACES[space]}", *(f"{each[key]:.3g}" for key in keys))
        for name, spaces in measured.items()
        for space, each in spaces.items()
    ]
    head = ("from the training images", "Hausdorff", "mean nearest", "W₁")
    return Table("distances", title, head, tuple(rows), ("Euclidean, at most 300 images a set.",))


def bound_table(bounds: Mapping[str, Any], loss: str, title: str = "The bound and its terms, in pixels") -> Table:
    """Return the terms of the bound by method, means over the seeds."""
    rows = [
        (label, *(NOTHING if bound is None else f"{bound[key]['mean']:.2f}" for key in _TERMS))
        for label, bound in bounds.items()
    ]
    what = "‖T(x) − S(x)‖ of the outputs" if loss == "squared" else "the divergence of the outputs"
    note = (
        f"ρ: {what}. K is estimated by the largest gradient of ρ and the largest ratio |ρ(x) − ρ(x′)| / ‖x − x′‖ on "
        "these images, which is a lower bound of the true constant. If the right-hand side of a bound is far above "
        "the mean ρ on unseen images, the bound guarantees nothing; its terms show the reason."
    )
    return Table("bound", title, ("method", *_TERMS.values()), tuple(rows), (note,))


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
    terms = Bound.of(far, near, unseen, seen)
    return named(replace(terms, lipschitz=max(steepest, terms.lipschitz)))


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
        return torch.cat([teacher(x).cpu() for x, _ in in_order(split, 2 * _BATCH, device)])


def _needed(outputs: Tensor | None) -> Tensor:
    assert outputs is not None
    return outputs
