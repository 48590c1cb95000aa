"""Accuracy and calibration of a network, also under shifts of its inputs, and its agreement with a teacher.

A shift is a pure function of the sample's input, its index and the seed; it does not depend on the other samples of the
batch. Each shift defines the meaning of `severity`; one value leaves the input unchanged.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional

from jacmatch.datasets import Split
from jacmatch.errors import InputError, optional_package, unknown_name
from jacmatch.jacobian import jacobian, output_tensor, probes
from jacmatch.jacobian.features import Select, selecting
from jacmatch.jacobian.modules import call, in_mode
from jacmatch.losses import IGNORED
from jacmatch.models.values import ValuesOnly
from jacmatch.teachers import Question, Teacher, as_teacher
from jacmatch.teachers.base import query
from jacmatch.training.data import in_order

_DIRECTIONS = 64  # for a teacher without vᵀJ; fewer if the input has fewer elements
_NUMBERS = 2**24  # in the Jacobians of one batch: 64 MiB


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of that name, with its index if it is a GPU.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, or `auto`, which is the GPU if there is one.

    Raises:
        InputError: The name is unknown, or this machine has no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = str(name)
    if text == "auto":
        text = "cuda" if gpus else "cpu"
    if text == "cpu":
        return torch.device("cpu")
    kind, _, number = text.partition(":")
    if kind != "cuda" or not (text == "cuda" or number.isdecimal()):
        raise InputError("`device` must be 'cpu', 'cuda', 'cuda:N' or 'auto'.", got=repr(str(name)))
    if int(number or 0) >= gpus:
        got = f"{text!r}, and {gpus or 'no'} GPUs that torch {torch.__version__} can use"
        raise InputError("`device` must be one that this machine has.", got=got, do="Use 'auto' or 'cpu'.")
    return torch.device("cuda", int(number) if number else torch.cuda.current_device())


def evaluate(
    module: nn.Module,
    split: Split,
    *,
    batch_size: int = 500,
    device: str | torch.device,
    output: Select | None = None,
    class_dim: int = 1,
    ignore_index: int = IGNORED,
) -> dict[str, float]:
    """Return {"accuracy": fraction of samples whose largest output is their class}; {"rmse": …} in a regression.

    Labels per position, (N, H, W) or (N, T), give the accuracy over all labeled positions, and "miou": intersection ÷
    union over the whole split, averaged over the classes that occur in labels or predictions.

    rmse = √(Σₙₖ (ŷₙₖ − yₙₖ)² / NK). The network runs in evaluation mode; afterwards the mode of each module is
    restored.

    Args:
        module: The network. It is moved to `device` and stays there.
        split: The data; classes (integers) give the accuracy, and targets (floats) the RMSE.
        batch_size: Number of samples per forward pass.
        device: Device to run on; see `find_device`.
        output: Selects the outputs if the network returns more than one tensor, as in an objective.
        class_dim: Class dimension of outputs per position: 1 for (B, K, H, W), −1 for (B, T, K).
        ignore_index: Label of positions that are ignored.

    Raises:
        InputError: The split is empty, or the outputs do not fit the labels.

    Example:
        >>> split = Split(torch.eye(3), torch.tensor([0, 1, 0]))
        >>> evaluate(nn.Identity(), split, device="cpu")
        {'accuracy': 0.6666666666666666}
    """
    if not len(split):
        raise InputError("`split` of `evaluate` must have samples.", got="an empty split")
    device = find_device(device)
    parts = []  # summed on the device: one wait at the end
    with in_mode(module.to(device), training=False), torch.no_grad(), selecting(module, output):
        for x, y in in_order(split, batch_size, device):
            outputs = output_tensor(call(module, x))
            if y.is_floating_point():
                _check_outputs(outputs, tuple(y.shape), "the targets")
                parts.append((outputs - y).double().square().sum())
            elif y.dim() > 1:
                parts.append(_confusion(outputs.movedim(class_dim, 1), y, ignore_index))
            else:
                parts.append((outputs.argmax(1) == y).sum())
    if not split.y.is_floating_point() and split.y.dim() > 1:
        return _of_positions(torch.stack(parts).sum(0).double())
    total = torch.stack(parts).sum().item()
    if split.y.is_floating_point():
        return {"rmse": math.sqrt(total / split.y.numel())}
    return {"accuracy": total / len(split)}


def _confusion(outputs: Float[Tensor, "batch out *position"], y: Tensor, ignore_index: int) -> Tensor:
    """Return how many positions of each class (row) are predicted as each class (column)."""
    do = "pip install 'jacmatch[train]'"
    torchmetrics = optional_package("torchmetrics.functional.classification", "`evaluate` with per-position labels", do)
    positions = (len(outputs), *outputs.shape[2:])
    if y.shape != positions:
        rule = f"Per-position labels must have the shape {positions} of the outputs without classes."
        raise InputError(rule, got=f"shape {tuple(y.shape)}", do="Pass class_dim=-1 for outputs (B, T, K).")
    classes = outputs.shape[1]
    predicted, settings = outputs.argmax(1), {"num_classes": classes, "ignore_index": ignore_index}
    table: Tensor = torchmetrics.multiclass_confusion_matrix(predicted, y, **settings)
    return table


def _of_positions(table: Float[Tensor, "out out"]) -> dict[str, float]:
    right, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    if not float(table.sum()):
        raise InputError("`split` of `evaluate` must have labeled positions.", got="none")
    return {"accuracy": float(right.sum() / table.sum()), "miou": float((right / union.clamp_min(1))[union > 0].mean())}


def calibration(
    module: nn.Module, split: Split, *, bins: int = 15, batch_size: int = 500, device: str | torch.device
) -> float:
    """Return the expected calibration error (ECE), between 0 and 1.

    ECE = Σₘ |Σ_{n in bin m} (rightₙ − pₙ)| / N, where pₙ is the largest softmax probability of sample n, rightₙ is 1 if
    its class is the label and 0 otherwise, and bin m has the samples with (m−1)/M < pₙ ≤ m/M, m = 1…M. A sample with p
    = 1 is in the last bin. torchmetrics 1.9 puts these samples into a separate bin, so its result for a saturated
    network differs.

    Args:
        module: The network, which returns logits. It is moved to `device` and stays there.
        split: The data, with classes.
        bins: Number of bins M, at least 1.
        batch_size: Number of samples per forward pass.
        device: Device to run on; see `find_device`.

    Raises:
        InputError: The split is empty or has regression targets, `bins` is below 1, or an output is not finite.

    References:
        Guo, Pleiss, Sun & Weinberger 2017, arXiv:1706.04599, Eq. 3 and 5, with its M = 15.

    Example:
        >>> split = Split(torch.tensor([[0.0, 50.0], [0.0, 50.0]]), torch.tensor([0, 1]))
        >>> calibration(nn.Identity(), split, device="cpu")  # certain twice, right once
        0.5
    """
    if bins < 1:
        raise InputError("`bins` of `calibration` must be at least 1.", got=bins)
    if not len(split) or split.y.is_floating_point():
        got = "the targets of a regression" if len(split) else "an empty split"
        raise InputError("`split` of `calibration` must have samples with classes.", got=got)
    device = find_device(device)
    gaps = torch.zeros(bins, dtype=torch.float64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    with in_mode(module.to(device), training=False), torch.no_grad():
        for x, y in in_order(split, batch_size, device):
            sure, top = output_tensor(call(module, x)).double().softmax(1).max(1)
            finite &= sure.isfinite().all()
            right = (top == y).double()
            gaps.index_add_(0, (sure.nan_to_num() * bins).ceil().long().clamp(1, bins) - 1, right - sure)
    if not finite:
        rule = "The network given to `calibration` must have finite outputs."
        raise InputError(rule, got="nan or inf", do="Train it again with a lower learning rate (`lr`).")
    return gaps.abs().sum().item() / len(split)


def agreement(
    student: nn.Module, teacher: Teacher, split: Split, *, samples: int = 256, batch_size: int = 500
) -> dict[str, float | None]:
    """Return how well a student agrees with its teacher: `top1`, `jacobian_cosine`, `jacobian_relative_error`.

    - `top1`: fraction of all samples (or of their positions) with the same largest output; None in a regression.
    - `jacobian_cosine`: mean over `samples` of the cosine of the two rows of the teacher's top class; in a regression
      the mean over all rows. A row that is zero counts as cosine 0.
    - `jacobian_relative_error`: √(Σ‖J_S − J_T‖²_F / Σ‖J_T‖²_F), both sums over `samples`; None where J_T is zero.

    If the teacher cannot return vᵀJ, the student has values only (`models.ValuesOnly`), or the outputs are dense,
    (B, K, H, W), where the cosine is the mean over positions of that of the top class, both Jacobians are compared
    along min(64, input elements) random orthogonal directions. This is exact (up to finite differences) if there are as
    many directions as input elements, and otherwise an estimate.

    Args:
        student: A network; it runs in evaluation mode, on its own device.
        teacher: Any teacher.
        split: The data.
        samples: Number of samples whose Jacobians are compared; the selection depends only on the length of the split.
        batch_size: Number of samples per forward pass without derivatives.

    Raises:
        InputError: `samples` is below 1, the split is empty, or the two have different outputs.

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443 (the top class is the one whose Jacobian the paper matches).

    Example:
        >>> from jacmatch.teachers import ModuleTeacher
        >>> split = Split(torch.rand(8, 3), torch.zeros(8, dtype=torch.int64))
        >>> network = nn.Linear(3, 2)
        >>> agreement(network, ModuleTeacher(network), split)["jacobian_relative_error"]
        0.0
    """
    if samples < 1 or not len(split):
        got = f"samples={samples}, {len(split)} rows"
        raise InputError("`agreement` needs at least one sample.", got=got)
    device = next((p.device for p in student.parameters()), split.x.device)
    with in_mode(student, training=False):
        top1 = None if split.y.is_floating_point() else _top1(student, teacher, split, batch_size, device)
        first = probes.permutation(0, torch.zeros(1, dtype=torch.int64), 0, len(split))[0][:samples]
        cosines, difference, norm = jacobian_differences(student, teacher, split, first)
    error = math.sqrt(difference.sum() / norm.sum()) if norm.sum() > 0 else None
    return {"top1": top1, "jacobian_cosine": cosines.mean().item(), "jacobian_relative_error": error}


def _top1(student: nn.Module, teacher: Teacher, split: Split, batch_size: int, device: torch.device) -> float:
    same = []
    for x, _ in in_order(split, batch_size, device):
        with torch.no_grad():
            outputs = output_tensor(call(student, x))
        wanted = query(teacher, x, Question()).outputs
        _check_outputs(outputs, tuple(wanted.shape), "the teacher's")
        same.append((outputs.argmax(1) == wanted.argmax(1)).double().reshape(len(x), -1).mean(1).sum())
    return torch.stack(same).sum().item() / len(split)


def jacobian_differences(
    student: nn.Module, teacher: Teacher, split: Split, chosen: Int64[Tensor, "sample"], most: int = _DIRECTIONS
) -> tuple[Float64[Tensor, "sample"], Float64[Tensor, "sample"], Float64[Tensor, "sample"]]:
    """Return, for each sample, the cosine of `agreement`, ‖J_S − J_T‖²_F and ‖J_T‖²_F.

    They are summed in float64: one batch may hold most of the norm.
    """
    regression = split.y.is_floating_point()
    device = next((p.device for p in student.parameters()), split.x.device)
    sample = query(teacher, split.inputs(chosen[:1]).to(device), Question()).outputs[0]
    outputs, dense = sample.numel(), sample.dim() > 1
    along = dense or isinstance(student, ValuesOnly) or not teacher.answers_vjp
    size = max(1, _NUMBERS // (outputs * math.prod(split.x.shape[1:])))
    cosines, differences, norms = [], [], []
    for rows in torch.split(chosen, size):
        x = split.inputs(rows).to(device)
        wanted, top, directions = _jacobian_of(teacher, x, rows.to(device), outputs, most if along else 0)
        if dense or isinstance(student, ValuesOnly):
            got = _jacobian_of(as_teacher(student), x, rows, outputs, most)[0]
            _check_outputs(got, tuple(wanted.shape), "the teacher's, for some directions")
        else:
            with torch.no_grad():
                y, own = jacobian(student, x)
            _check_outputs(y, (len(rows), outputs), "the teacher's")
            got = own.flatten(2).double()
            if directions is not None:
                got = torch.einsum("nki,pni->nkp", got, directions)
        differences.append((got - wanted).square().sum((1, 2)))
        norms.append(wanted.square().sum((1, 2)))
        similar = functional.cosine_similarity(got, wanted, dim=2)
        of_top = similar.view(len(rows), -1, top[0].numel()).gather(1, top.reshape(len(rows), 1, -1))
        cosines.append(similar.mean(1) if regression else of_top.mean((1, 2)))
    whole, apart, norm = (torch.cat(parts).cpu() for parts in (cosines, differences, norms))
    return whole, apart, norm


def _jacobian_of(
    teacher: Teacher, x: Float[Tensor, "batch *input"], ids: Int64[Tensor, "batch"], outputs: int, most: int
) -> tuple[
    Float[Tensor, "batch row column"], Int64[Tensor, "batch *position"], Float[Tensor, "probe batch element"] | None
]:
    """J_T (B, K, D), or its products with `most` directions (B, K, P); its top class; the directions if any."""
    if not most:
        rows = torch.eye(outputs, dtype=x.dtype, device=x.device)[:, None].expand(-1, len(x), -1)
        answer = query(teacher, x, Question(cotangents=rows))
        directions = None
    else:
        count = min(most, x[0].numel())
        v = probes.directions("orthogonal", seed=0, ids=ids, draw=0, count=count, shape=tuple(x.shape[1:]))
        answer = query(teacher, x, Question(tangents=v.to(x.dtype)))
        directions = v.flatten(2).double()
    assert answer.products is not None
    products = answer.products.flatten(2).double()
    wanted = products.permute(1, 0, 2) if directions is None else products.permute(1, 2, 0)
    return wanted, answer.outputs.argmax(1), directions


def _check_outputs(outputs: Tensor, shape: tuple[int, ...], whose: str) -> None:
    if tuple(outputs.shape) != shape:
        rule = f"The network's outputs must have the shape of {whose}, {shape}."
        raise InputError(rule, got=tuple(outputs.shape), do="Build it with the right number of outputs.")


_SEED = 1_000_099
"""Offset of the seed, so that a training with the same seed draws other numbers."""

Scale: TypeAlias = float | int | Sequence[float | int]


def gaussian_noise(
    x: Float[Tensor, "batch *input"],
    severity: float | int,
    *,
    ids: Int64[Tensor, "batch"],
    seed: int = 0,
    scale: Scale = 1.0,
) -> Float[Tensor, "batch *input"]:
    """Return x + σ·scale·ξ, ξ ~ N(0, I), σ = `severity` ≥ 0, without clipping.

    `scale` is one number or one for each channel; the same noise, scaled, for every severity. With the standard
    deviation of the data it is noise on normalized inputs.

    Example:
        >>> x = torch.zeros(1, 2, 100, 100)
        >>> [round(float(s), 1) for s in gaussian_noise(x, 0.5, ids=torch.arange(1), scale=(1, 4)).std((0, 2, 3))]
        [0.5, 2.0]
    """
    _within("gaussian-noise", severity, severity >= 0, "at least 0")
    shape = tuple(x.shape[1:])
    noise = probes.directions("gaussian", seed=seed + _SEED, ids=ids, draw=0, count=1, shape=shape, dtype=x.dtype)[0]
    unit = torch.tensor([float(value) for value in (scale if isinstance(scale, Sequence) else [scale])]).to(x)
    if len(unit) not in {1, x.shape[1]}:
        rule = f"`scale` of the shift gaussian-noise must be one number or one for each of the {x.shape[1]} channels."
        raise InputError(rule, got=f"{len(unit)} numbers")
    return x + severity * unit.view(-1, *[1] * (x.dim() - 2)) * noise


def salt_and_pepper(
    x: Float[Tensor, "batch *input"], severity: float | int, *, ids: Int64[Tensor, "batch"], seed: int = 0, **_: Any
) -> Float[Tensor, "batch *input"]:
    """Return x with each pixel black (0) with probability p/2 and white (1) with p/2, p = `severity` in [0, 1].

    A pixel of an image is changed in all channels; of a vector each element is a pixel.

    Example:
        >>> changed = salt_and_pepper(torch.full((1, 1, 100, 100), 0.5), 0.2, ids=torch.arange(1)) != 0.5
        >>> round(float(changed.float().mean()), 1)
        0.2
    """
    _within("salt-and-pepper", severity, 0 <= severity <= 1, "in [0, 1]")
    sides = tuple(x.shape[2:]) if x.dim() == 4 else tuple(x.shape[1:])
    u = probes.uniform(seed + _SEED, ids, 0, math.prod(sides)).view(len(x), *([1] if x.dim() == 4 else []), *sides)
    # Which color is decided by the last bits, so that a larger severity keeps the changed pixels as they are.
    white = (u * 2**23) % 1 >= 0.5
    return torch.where(u < severity, white.to(x.dtype), x)


def blur(x: Float[Tensor, "batch *input"], severity: float | int, **_: Any) -> Float[Tensor, "batch *input"]:
    """Return the images convolved with a Gaussian of standard deviation `severity` pixels, truncated at three.

    x′(i, j) = Σ_{a,b = −r…r} w_a w_b x(i+a, j+b), w_a ∝ exp(−a²/2σ²), Σ w = 1, r = ⌈3σ⌉; beyond the border the image
    continues with its last pixel.
    """
    _within("blur", severity, severity >= 0, "at least 0")
    _images("blur", x)
    if severity == 0:
        return x
    radius = math.ceil(3 * severity)
    weights = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * float(severity) ** 2))
    weights = (weights / weights.sum()).to(x)
    padded = functional.pad(x.flatten(0, 1)[:, None], [radius] * 4, mode="replicate")
    blurred = functional.conv2d(functional.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return blurred.view_as(x)


def contrast(x: Float[Tensor, "batch *input"], severity: float | int, **_: Any) -> Float[Tensor, "batch *input"]:
    """Return m + c·(x − m), c = `severity` ≥ 0, where m is the mean of each channel of the image.

    References:
        The corruption `contrast` of Hendrycks & Dietterich 2019, arXiv:1903.12261, without its clipping.
    """
    _within("contrast", severity, severity >= 0, "at least 0")
    _images("contrast", x)
    mean = x.mean((2, 3), keepdim=True)
    return mean + severity * (x - mean)


SHIFTS: dict[str, Callable[..., Tensor]] = {
    "gaussian-noise": gaussian_noise,
    "salt-and-pepper": salt_and_pepper,
    "blur": blur,
    "contrast": contrast,
}
"""The shifts by name; each is called as f(x, severity, ids=, seed=, scale=)."""

RANDOM = ("gaussian-noise", "salt-and-pepper")
"""Shifts that depend on the seed."""


def shifted(
    split: Split, name: str, severity: float | int, *, seed: int = 0, scale: Scale = 1.0, batch_size: int = 500
) -> Split:
    """Return the split with each input shifted, as floats; row numbers are the ids.

    Args:
        split: The data.
        name: One of `SHIFTS`.
        severity: Severity, as the shift defines it.
        seed: Of the draw.
        scale: The unit of gaussian-noise.
        batch_size: Samples at once.

    Raises:
        InputError: The name is unknown, or the shift refuses the severity or the inputs.

    Example:
        >>> split = Split(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
        >>> shifted(split, "salt-and-pepper", 1.0).inputs().unique()
        tensor([0., 1.])
    """
    if name not in SHIFTS:
        raise unknown_name("A shift of `shifted`", name, SHIFTS)
    parts = [
        SHIFTS[name](split.inputs(rows), severity, ids=rows.to(split.x.device), seed=seed, scale=scale)
        for rows in torch.split(torch.arange(len(split)), batch_size)
    ]
    return Split(torch.cat(parts), split.y)


def evaluate_under_shifts(
    module: nn.Module,
    split: Split,
    shifts: Iterable[tuple[str, float | int]],
    *,
    draws: int = 3,
    seed: int = 0,
    scale: Scale = 1.0,
    device: str | torch.device,
) -> dict[tuple[str, float | int], list[float]]:
    """Return accuracies (RMSE in a regression) under each shift, one for each draw of a random shift.

    Args:
        module: The network, as for `evaluate`.
        split: The data.
        shifts: Name and severity of each shift.
        draws: Number of draws of a random shift, at least 1, with the seeds `seed`, `seed` + 1, …
        seed: Seed of the first draw.
        scale: The unit of gaussian-noise.
        device: Where to run; see `find_device`.

    Raises:
        InputError: `draws` is below 1, or `evaluate` or `shifted` refuses its arguments.

    Example:
        >>> split = Split(torch.rand(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> found = evaluate_under_shifts(nn.Linear(4, 2), split, [("gaussian-noise", 0.1)], draws=2, device="cpu")
        >>> len(found["gaussian-noise", 0.1])
        2
    """
    if draws < 1:
        raise InputError("`draws` of `evaluate_under_shifts` must be at least 1.", got=draws)
    results: dict[tuple[str, float | int], list[float]] = {}
    for name, severity in shifts:
        seeds = range(seed, seed + draws) if name in RANDOM else (seed,)
        moved = (shifted(split, name, severity, seed=number, scale=scale) for number in seeds)
        results[name, severity] = [next(iter(evaluate(module, each, device=device).values())) for each in moved]
    return results


def _within(name: str, severity: float | int, holds: bool, rule: str) -> None:
    if not (holds and math.isfinite(severity)):
        raise InputError(f"The severity of the shift {name} must be {rule}.", got=severity)


def _images(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        got = f"inputs of shape {tuple(x.shape[1:])}"
        raise InputError(f"The shift {name} needs images (channel, height, width).", got=got)
