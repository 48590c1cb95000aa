"""Whether a teacher fits the data: mean, standard deviation, range of the inputs, and the order of the classes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.datasets import Data
from jacmatch.jacobian import output_tensor
from jacmatch.jacobian.modules import call, in_mode
from jacmatch.jobs.data import mixed
from jacmatch.jobs.progress import Progress
from jacmatch.models.catalog import IMAGENET_MEAN, IMAGENET_STD

POINTS = 0.05
"""Accuracy that another preprocessing or order of classes must add before it is reported."""
_SAMPLES = 300


def check_teacher(network: nn.Module, data: Data, progress: Progress) -> dict[str, Any]:
    """Measure the teacher on training samples as it is and under other preprocessing, and report what is better.

    Nothing is changed: the message says which flags to set.
    """
    if data.classes is None:
        return {}
    split = mixed(data.train, _SAMPLES)
    x, y = split.inputs(), split.y.cpu()
    device = next((parameter.device for parameter in network.parameters()), x.device)
    own: Any = next((m for m in network.modules() if isinstance(getattr(m, "std", None), Tensor)), None)
    own_mean, own_std = (0.0, 1.0) if own is None else (own.mean.float(), own.std.float())
    measured: dict[str, float] = {}
    top = torch.zeros(0)
    for name, (mean, std) in _candidates(data).items():
        shape = (1, -1, *[1] * (x.dim() - 2))
        z = (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape) if mean else x.clone()
        if mean:  # undoes what the network does itself
            z = z.to(device) * own_std + own_mean
        with in_mode(network, training=False), torch.no_grad():
            classes = [output_tensor(call(network, part.to(device))).argmax(1).cpu() for part in torch.split(z, 100)]
        top = torch.cat(classes) if not mean else top
        measured[name] = float((torch.cat(classes) == y).double().mean())
        if not mean and measured[name] >= 1 - POINTS:
            return {"accuracy": measured[name]}
    here = measured.pop("as it is")
    best = max(measured, key=lambda name: measured[name])
    order, ordered = _best_order(top, y, data.outputs)
    if measured[best] > here + POINTS and measured[best] >= ordered:
        do = f"with {best}: {measured[best]:.1%}. Give these as --teacher-mean and --teacher-std"
        progress.message(f"The teacher is right on {here:.1%} of {len(y)} training samples as it is, and {do}.")
        return {"accuracy": here, "better": best, "better_accuracy": measured[best]}
    if ordered > here + POINTS:
        pairs = ", ".join(f"{given} is {meant}" for given, meant in enumerate(order) if given != meant)
        text = f"with its classes in another order: {ordered:.1%} (class {pairs})"
        progress.message(
            f"The teacher is right on {here:.1%} of {len(y)} training samples as it is, and {text}. Reorder them."
        )
        return {"accuracy": here, "better": "another order of classes", "better_accuracy": ordered}
    return {"accuracy": here}


def _candidates(data: Data) -> Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Mean and standard deviation by name: those that are common, on inputs in [0, 1] or [0, 255]."""
    named: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
        "as it is": ((), ()),
        "mean 0, std 1": ((0.0,), (1.0,)),
        "mean 0.5, std 0.5": ((0.5,), (0.5,)),
        "mean 0, std 1/255 (inputs up to 255)": ((0.0,), (1 / 255,)),
        "mean and std of these data": (tuple(data.mean), tuple(data.std)),
    }
    if len(data.shape) == 3 and data.shape[0] == 3:
        named["mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (ImageNet)"] = (IMAGENET_MEAN, IMAGENET_STD)
    return named


def _best_order(top: Tensor, y: Tensor, classes: int) -> tuple[list[int], float]:
    """The class of the data for each output, one to one, with the largest accuracy, and that accuracy."""
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn, slow to import

    counts = torch.zeros(classes, classes).index_put_((top, y), torch.ones(len(y)), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return columns.tolist(), float(counts[rows, columns].sum() / len(y))
