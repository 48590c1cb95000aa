"""The two records that every loader gives: one part of a data set, and the whole."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """One part (training or test) of a data set, held in memory.

    Attributes:
        x: Raw inputs: bytes (images, 0–255, four times smaller in memory) or floats. Models normalise for themselves.
        y: Class numbers from 0, or the target values of a regression.
        jacobians: ∂y_k/∂x_i of the true function at each input, with respect to what `inputs` gives; None if unknown.

    Example:
        >>> split = Split(torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8), torch.tensor([0, 1]))
        >>> split.inputs(torch.tensor([1])).tolist()
        [[0.20000000298023224, 0.4000000059604645]]
    """

    x: UInt8[Tensor, "sample *input"] | Float32[Tensor, "sample *input"]
    y: Int64[Tensor, "sample"] | Float32[Tensor, "sample row"]
    jacobians: Float32[Tensor, "sample row *input"] | None = None

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.x)

    def inputs(self, rows: Int64[Tensor, "batch"] | None = None) -> Float32[Tensor, "batch *input"]:
        """The inputs of some rows (None: of all) as new floats: bytes become x/255 in [0, 1], floats stay."""
        chosen = self.x.clone() if rows is None else self.x[rows.to(self.x.device)]
        return chosen.to(torch.float32).div_(255) if chosen.dtype == torch.uint8 else chosen

    def subset(self, rows: Int64[Tensor, "batch"]) -> "Split":
        """The split that has only these rows, in this order."""
        rows = rows.to(self.x.device)
        return Split(self.x[rows], self.y[rows], None if self.jacobians is None else self.jacobians[rows])

    def to(self, device: torch.device | str) -> "Split":
        """The same split with its tensors on another device."""
        slopes = None if self.jacobians is None else self.jacobians.to(device)
        return Split(self.x.to(device), self.y.to(device), slopes)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set with its training and test parts. `datasets.load` and `datasets.from_arrays` make checked ones.

    Attributes:
        name: What was loaded, as on the command line.
        train: The training part.
        test: The test part.
        classes: How many classes; None means regression.
        outputs: How many numbers a model must give per sample: the classes, or the target values.
        shape: Shape of one input.
        mean: Mean of the training inputs as `Split.inputs` gives them, per channel (images) or per feature.
        std: Their standard deviation; 1 where it is zero, so that dividing by it is safe.
    """

    name: str
    train: Split
    test: Split
    classes: int | None
    outputs: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the type, shape and bytes of all arrays: another order of the rows is another data set."""
        digest = hashlib.sha256()
        for part, split in (("train", self.train), ("test", self.test)):
            for key, tensor in (("x", split.x), ("y", split.y), ("jacobians", split.jacobians)):
                if tensor is None:
                    digest.update(f"{part}.{key}: none\n".encode())
                    continue
                array = tensor.detach().cpu().contiguous().numpy()
                array = array.astype(array.dtype.newbyteorder("<"), copy=False)
                digest.update(f"{part}.{key}: {array.dtype.str} {array.shape}\n".encode())
                digest.update(array.data)
        return digest.hexdigest()


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the inputs, per channel of images and per feature otherwise.

    μ_c = Σ_n x_nc / N and s_c = √(Σ_n (x_nc − μ_c)² / N) with n over samples and pixels, in float64; s_c = 0 becomes 1.

    Example:
        >>> statistics(Split(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([0, 1])))
        ((2.0, 5.0), (1.0, 1.0))
    """
    pairs = _of_bytes(split.x) if split.x.dtype == torch.uint8 and split.x.ndim > 2 else _of_numbers(split)
    return tuple(mean for mean, _ in pairs), tuple(std if std > 0 else 1.0 for _, std in pairs)


def _of_bytes(x: UInt8[Tensor, "sample *input"]) -> list[tuple[float, float]]:
    """Exact from the 256 counts of each channel, and more than ten times faster than summing floats."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    pairs = []
    for channel in x.unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        mean = (share * levels).sum()
        pairs.append((mean.item(), math.sqrt((share * (levels - mean).square()).sum().item())))
    return pairs


def _of_numbers(split: Split) -> list[tuple[float, float]]:
    """In two passes over blocks of rows, so that float64 copies stay small.

    The sum of equal float32 numbers is exact in float64, so the deviation of a constant column is exactly zero.
    """
    blocks = [torch.arange(start, min(start + 4096, len(split))) for start in range(0, len(split), 4096)]
    width = split.x.shape[1]
    count = split.x.numel() // width
    mean = torch.zeros(width, dtype=torch.float64)
    for rows in blocks:
        mean += _columns(split.inputs(rows)).sum(1)
    mean /= count
    variance = torch.zeros(width, dtype=torch.float64)
    for rows in blocks:
        variance += (_columns(split.inputs(rows)) - mean[:, None]).square().sum(1)
    return list(zip(mean.tolist(), (variance / count).sqrt().tolist(), strict=True))


def _columns(x: Float32[Tensor, "batch *input"]) -> Tensor:
    """One row for each channel or feature, in float64."""
    return x.transpose(0, 1).flatten(1).double()
