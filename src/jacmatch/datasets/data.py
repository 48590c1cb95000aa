"""The two records that every loader gives: one part of a data set, and the whole."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from jacmatch.datasets.streamed import Streamed

_COUNTED = 2048  # images of a streamed split that its statistics are of


@dataclass(frozen=True, eq=False)
class Split:
    """One part (training or test) of a data set.

    Attributes:
        x: Raw inputs: bytes (images, 0–255, four times smaller in memory) or floats; or images that stay on disk and
            are decoded when they are asked for. Models normalise for themselves.
        y: Class numbers from 0, or the target values of a regression.
        jacobians: ∂y_k/∂x_i of the true function at each input, with respect to what `inputs` gives; NaN where an entry
            is not known, None if none is.

    Example:
        >>> split = Split(torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8), torch.tensor([0, 1]))
        >>> split.inputs(torch.tensor([1])).tolist()
        [[0.20000000298023224, 0.4000000059604645]]
    """

    x: UInt8[Tensor, "sample *input"] | Float32[Tensor, "sample *input"] | Streamed
    y: Int64[Tensor, "sample"] | Float32[Tensor, "sample row"]
    jacobians: Float32[Tensor, "sample row *input"] | None = None

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.x)

    def inputs(self, rows: Int64[Tensor, "batch"] | None = None) -> Float32[Tensor, "batch *input"]:
        """The inputs of some rows (None: of all) as new floats: bytes become x/255 in [0, 1], floats stay."""
        return as_floats(self.stored(rows))

    def stored(
        self, rows: Int64[Tensor, "batch"] | None = None
    ) -> UInt8[Tensor, "batch *input"] | Float32[Tensor, "batch *input"]:
        """The inputs of some rows (None: of all) as they are stored, copied."""
        if isinstance(self.x, Streamed):
            return self.x[torch.arange(len(self)) if rows is None else rows]
        return self.x.clone() if rows is None else self.x[rows.to(self.x.device)]

    def subset(self, rows: Int64[Tensor, "batch"]) -> "Split":
        """The split that has only these rows, in this order."""
        rows = rows.to(self.x.device)
        x = self.x.subset(rows) if isinstance(self.x, Streamed) else self.x[rows]
        return Split(x, self.y[rows], None if self.jacobians is None else self.jacobians[rows])

    def to(self, device: torch.device | str) -> "Split":
        """The same split with its tensors on another device; one that is streamed stays as it is."""
        if isinstance(self.x, Streamed):
            return self
        slopes = None if self.jacobians is None else self.jacobians.to(device)
        return Split(self.x.to(device), self.y.to(device), slopes)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of type, shape and bytes of the inputs (`x`), targets (`y`) and, where known, Jacobians (`j`).

        Of streamed images it has what `Streamed.digest` has.
        """
        arrays = {"x": self.x, "y": self.y, "j": self.jacobians}
        return {name: _digest(each) for name, each in arrays.items() if each is not None}


def _digest(given: Tensor | Streamed) -> str:
    """SHA-256 of type, shape and bytes, the same on machines of either byte order."""
    if isinstance(given, Streamed):
        return given.digest()
    array = given.detach().cpu().contiguous().numpy()
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(array.data)
    return digest.hexdigest()


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

    @property
    def digests(self) -> dict[str, str]:
        """`Split.digests` of both parts, by the names that the arrays have in an npz file: `x_train`, `y_test`, …."""
        return {
            f"{name}_{part}": digest
            for part, split in (("train", self.train), ("test", self.test))
            for name, digest in split.digests.items()
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all arrays: another order of the rows is another data set."""
        return hashlib.sha256(repr(sorted(self.digests.items())).encode()).hexdigest()


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the inputs, per channel of images and per feature otherwise.

    μ_c = Σ_n x_nc / N and s_c = √(Σ_n (x_nc − μ_c)² / N) with n over samples and pixels, in float64; s_c = 0 becomes 1.
    Of a streamed split the sum is over 2,048 evenly spaced samples, over all if there are no more.

    Example:
        >>> statistics(Split(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([0, 1])))
        ((2.0, 5.0), (1.0, 1.0))
    """
    if isinstance(split.x, Streamed):
        pairs = _of_bytes(split.x[rows] for rows in torch.split(split.x.spread(_COUNTED), 64))
    elif split.x.dtype == torch.uint8 and split.x.ndim > 2:
        pairs = _of_bytes([split.x])
    else:
        pairs = _of_numbers(split.x)
    return tuple(mean for mean, _ in pairs), tuple(std if std > 0 else 1.0 for _, std in pairs)


def as_floats(
    x: UInt8[Tensor, "batch *input"] | Float32[Tensor, "batch *input"],
) -> Float32[Tensor, "batch *input"]:
    """Stored inputs as a network is given them: bytes become x/255, floats stay."""
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x


def _of_bytes(blocks: Iterable[UInt8[Tensor, "batch *input"]]) -> list[tuple[float, float]]:
    """Exact from the 256 counts of each channel, and more than ten times faster than summing floats."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = sum(
        torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in x.unbind(1)]) for x in blocks
    )
    assert isinstance(counts, Tensor)
    pairs = []
    for count in counts:
        share = count.double() / int(count.sum())
        mean = (share * levels).sum()
        pairs.append((mean.item(), math.sqrt((share * (levels - mean).square()).sum().item())))
    return pairs


def _of_numbers(x: UInt8[Tensor, "sample *input"] | Float32[Tensor, "sample *input"]) -> list[tuple[float, float]]:
    """In two passes over blocks of rows, so that float64 copies stay small.

    The sum of equal float32 numbers is exact in float64, so the deviation of a constant column is exactly zero.
    """
    width = x.shape[1]
    count = x.numel() // width
    mean = torch.zeros(width, dtype=torch.float64)
    for block in torch.split(x, 4096):
        mean += _columns(as_floats(block)).sum(1)
    mean /= count
    variance = torch.zeros(width, dtype=torch.float64)
    for block in torch.split(x, 4096):
        variance += (_columns(as_floats(block)) - mean[:, None]).square().sum(1)
    return list(zip(mean.tolist(), (variance / count).sqrt().tolist(), strict=True))


def _columns(x: Float32[Tensor, "batch *input"]) -> Tensor:
    """One row for each channel or feature, in float64."""
    return x.transpose(0, 1).flatten(1).double()
