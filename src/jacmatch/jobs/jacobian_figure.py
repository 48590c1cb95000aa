"""The figure of Jacobians of a run: images, the row of the teacher's top class, and the same row of the students."""

import io
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from jacmatch.datasets import Data
from jacmatch.jacobian import vjp
from jacmatch.runs import Run

IMAGES = 8


def write(
    run: Run, data: Data, teacher: nn.Module, students: Mapping[str, nn.Module], labels: Mapping[str, str]
) -> None:
    """Write `jacobian_figure.npz` for the first test image of each class; nothing where the data are no images."""
    if len(data.shape) != 3 or data.classes is None:
        return
    of_class = [(data.test.y == number).nonzero() for number in range(data.classes)]
    chosen = torch.tensor([int(rows[0]) for rows in of_class if len(rows)][:IMAGES])
    x = data.test.inputs(chosen).cpu()
    top = _outputs(teacher, x).argmax(1)
    wanted = _rows(teacher, x, top)
    got = torch.stack([_rows(student, x, top) for student in students.values()])
    cosines = torch.nn.functional.cosine_similarity(got.flatten(2), wanted.flatten(1)[None], dim=2)
    file = io.BytesIO()
    np.savez_compressed(
        file,
        images=x.numpy(),
        teacher=wanted.numpy(),
        students=got.numpy(),
        methods=np.array([labels[method] for method in students]),
        cosines=cosines.numpy(),
        labels=data.test.y[chosen].cpu().numpy(),
    )
    run.write_bytes("jacobian_figure.npz", file.getvalue())


def _outputs(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = network.cpu().eval()(x)
    return outputs


def _rows(network: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """The row of each image's class in the Jacobian of the logits."""
    cotangents = torch.nn.functional.one_hot(classes, _outputs(network, x).shape[1]).to(x.dtype)
    with torch.no_grad():
        return vjp(network, x, cotangents)[1]
