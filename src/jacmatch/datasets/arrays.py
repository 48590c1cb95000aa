"""Checks that every data set passes, whatever loads it: arrays in, `Data` out; and arrays in a file (`npz:`)."""

import io
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped, UInt8
from torch import Tensor

from jacmatch.datasets.data import Data, Split, statistics
from jacmatch.datasets.files import check_memory, existing_file, reading
from jacmatch.datasets.streamed import Streamed
from jacmatch.errors import InputError, unknown_name

REQUIRED = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL = ("j_train", "j_test", "ignore_index")
IGNORED = -100  # label of positions without a label, as in torch.nn.CrossEntropyLoss

_Array = Shaped[np.ndarray, "..."]
_Inputs = UInt8[Tensor, "sample *input"] | Float32[Tensor, "sample *input"]
_Targets = Int64[Tensor, "sample *position"] | Float32[Tensor, "sample row"]


def from_arrays(name: str, arrays: Mapping[str, object]) -> Data:
    """Return a checked data set from numpy arrays or torch tensors.

    Float rows with one 1 and zeros are converted to classes, with a warning.

    Args:
        name: The name in messages and in `Data.name`.
        arrays: `x_train` and `x_test`: images (N, C, H, W) or vectors (N, D), bytes (read as x/255) or floats;
            `y_train` and `y_test`: class indices (N,) or, of each position, (N, H, W), from 0, or the float targets
            (N, K) of a regression; optional `ignore_index`: a number, the label of positions without a label (−100 is
            one in any case); optional `j_train` and `j_test`: true Jacobians (N, K, *input) with respect to the float
            inputs, NaN where unknown.

    Raises:
        InputError: A key is missing or unknown; a type, shape, range or length is wrong; a class index below the
            largest does not occur, or has no training rows; or numbers are not finite.

    Example:
        >>> x, y = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([0, 1])
        >>> from_arrays("mine", {"x_train": x, "y_train": y, "x_test": x, "y_test": y}).mean
        (1.0, 2.0)
    """
    check_keys(name, arrays)
    train, test = _as_classes(name, _split(name, "train", arrays), _split(name, "test", arrays))
    data = from_splits(name, train, test)
    if data.positions and ("j_train" in arrays or "j_test" in arrays):
        raise InputError(f"{name} must have no `j_train` and `j_test` with per-position labels.", do="Leave them out.")
    parts = {"train": train, "test": test}
    for part, split in parts.items():
        if (key := f"j_{part}") in arrays:
            parts[part] = _with_jacobians(split, arrays[key], f"`{key}` of {name}", data.outputs)
    return replace(data, train=parts["train"], test=parts["test"])


def from_splits(name: str, train: Split, test: Split) -> Data:
    """Return the data set of two splits, each of which has been checked."""
    for key, a, b in (("x", train.x, test.x), ("y", train.y, test.y)):
        if (a.dtype, a.shape[1:]) != (b.dtype, b.shape[1:]):
            got = f"{_described(a)} and {_described(b)}"
            rule = f"`{key}_train` and `{key}_test` of {name} must have the same type and shape per row."
            raise InputError(rule, got=got)
    classes = None if train.y.is_floating_point() else _count_classes(name, train.y, test.y)
    outputs = train.y.shape[1] if classes is None else classes
    mean, std = statistics(train)
    return Data(name, train, test, classes, outputs, tuple(train.x.shape[1:]), mean, std)


def check_keys(
    name: str,
    keys: Mapping[str, object] | list[str],
    needed: tuple[str, ...] = REQUIRED,
    optional: tuple[str, ...] = OPTIONAL,
) -> None:
    """Refuse arrays with a missing or an unknown key."""
    for key in keys:
        if key not in REQUIRED + optional:
            raise unknown_name(f"Each array of {name}", str(key), REQUIRED + optional)
    missing = [key for key in needed if key not in keys]
    if missing:
        got = f"{', '.join(keys) or 'none'} (missing: {', '.join(missing)})"
        raise InputError(f"{name} must have the arrays {', '.join(needed)}.", got=got)


def _split(name: str, part: str, arrays: Mapping[str, object]) -> Split:
    x = _inputs(arrays[f"x_{part}"], f"`x_{part}` of {name}")
    y = _targets(arrays[f"y_{part}"], f"`y_{part}` of {name}", _ignored(name, arrays))
    if len(x) != len(y):
        rule = f"`x_{part}` and `y_{part}` of {name} must have equal lengths."
        raise InputError(rule, got=f"{len(x)} inputs and {len(y)} labels or targets")
    return Split(x, y)


def _as_classes(name: str, train: Split, test: Split) -> tuple[Split, Split]:
    """Convert one-hot float targets of both parts to class indices; warn where targets look like classes otherwise."""
    y = train.y
    if not y.is_floating_point():
        return train, test
    what = f"`y_train` of {name}"
    if _one_hot(y) and len(torch.unique(y.argmax(1))) > 1:
        if test.y.shape[1:] != y.shape[1:] or not _one_hot(test.y):
            do = "Give class indices in both: y.argmax(axis=1)."
            raise InputError(f"`y_test` of {name} must have one-hot rows, as `y_train` has.", got="others", do=do)
        warnings.warn(
            f"{what} has one-hot rows of floats: they are read as classes, y.argmax(axis=1). For a regression on "
            "such numbers scale them, for example by 2.",
            stacklevel=4,
        )
        return Split(train.x, y.argmax(1)), Split(test.x, test.y.argmax(1))
    if y.shape[1] > 1 and bool((y >= 0).all()) and bool(((y.sum(1) - 1).abs() < 1e-3).all()):
        do = "give y.argmax(axis=1) if they are probabilities of classes"
        warnings.warn(f"{what} has rows that sum to 1: they are read as regression targets; {do}.", stacklevel=4)
    elif y.shape[1] == 1 and bool((y == y.round()).all()) and len(torch.unique(y)) <= len(y) / 2:
        do = "give y[:, 0].astype(np.int64) if they are classes"
        warnings.warn(f"{what} has integers: they are read as regression targets; {do}.", stacklevel=4)
    return train, test


def _one_hot(y: Float32[Tensor, "sample row"]) -> bool:
    """Whether each row has a single 1 and zeros, of at least two entries."""
    return y.shape[1] > 1 and bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())


def _array(value: object, what: str) -> _Array:
    """Return the numbers as a numpy array of a type that numpy and torch share."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise InputError(f"{what} must be a numpy array or a torch tensor.", got=type(value).__name__)
    if value.size == 0:
        raise InputError(f"{what} must not be empty.", got=f"shape {value.shape}")
    return value


def _inputs(value: object, what: str) -> _Inputs:
    array = _array(value, what)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        do = "Convert images 0–255 with .astype(np.uint8), other numbers with .astype(np.float32)."
        raise InputError(f"{what} must have the type uint8 or a float type.", got=array.dtype, do=do)
    # Refuse all but images (N, C, H, W) and vectors (N, D), and name the layout of other libraries.
    rule, shape = f"{what} must be images (N, C, H, W) or vectors (N, D).", array.shape
    if array.ndim == 3:
        raise InputError(rule, got=f"shape {shape}", do="Give gray images a channel: x[:, None].")
    if array.ndim not in (2, 4):
        raise InputError(rule, got=f"shape {shape}", do="Reshape the array.")
    if array.ndim == 4 and shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4) and min(shape[1:3]) > 4:
        got = f"shape {shape}, which looks like (N, H, W, C)"
        raise InputError(rule, got=got, do="Put the channels first: x.transpose(0, 3, 1, 2).")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.require(array, requirements=("C", "W")))
    x = _floats(array, what)
    if x.ndim == 4 and 1 < (largest := float(x.max())) <= 255 and float(x.min()) >= 0:
        rule = f"{what}: float images must have pixels in [0, 1]."
        do = "Convert with .astype(np.uint8), or divide by 255."
        if bool((x == x.round()).all()):
            raise InputError(rule, got="integers up to 255", do=do)
        if largest > 127:
            warnings.warn(f"{rule} Got up to {largest:.4g}. {do}", stacklevel=5)
    return x


def _floats(array: _Array, what: str, *, gaps: bool = False) -> Float32[Tensor, "..."]:
    """Return finite float32 numbers; with `gaps` some may be NaN."""
    if array.dtype.kind != "f":
        raise InputError(f"{what} must have a float type.", got=array.dtype, do="Convert with .astype(np.float32).")
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused below
        tensor = torch.from_numpy(np.require(array, np.float32, ("C", "W")))
    allowed = torch.isfinite(tensor) | torch.from_numpy(np.isnan(array)) if gaps else torch.isfinite(tensor)
    finite = allowed.reshape(len(array) if array.ndim else 1, -1).all(1)
    if not finite.all():
        bad = torch.nonzero(~finite)
        kind = "infinity" if gaps else "NaN or infinity"
        got = f"{kind} in {len(bad)} of {len(finite)} rows, first in row {int(bad[0])}"
        raise InputError(f"{what} must be finite in float32.", got=got, do="Remove or repair these rows.")
    return tensor


def _ignored(name: str, arrays: Mapping[str, object]) -> int:
    """The label of positions without a label."""
    array = _array(arrays.get("ignore_index", np.array(IGNORED)), f"`ignore_index` of {name}")
    if array.size != 1 or array.dtype.kind not in "iu":
        got = f"{array.dtype} of shape {array.shape}"
        raise InputError(f"`ignore_index` of {name} must be one integer.", got=got)
    return int(array.reshape(()))


def _targets(value: object, what: str, ignored: int = IGNORED) -> _Targets:
    array = _array(value, what)
    rule = f"{what} must be integer class indices (N,), or (N, H, W) per position, or float regression targets (N, K)."
    got = f"{array.dtype} of shape {array.shape}"
    if array.ndim == 2 and array.dtype.kind == "f":
        return _floats(array, what)
    if array.ndim in (1, 3) and array.dtype.kind in "iu":
        labels = torch.from_numpy(array.astype(np.int64))
        if array.ndim == 3:
            labels[labels == ignored] = IGNORED
        if bool((labels[labels != IGNORED] if array.ndim == 3 else labels).lt(0).any()):
            rule = f"{what}: class indices must count from 0."
            raise InputError(rule, got=f"{array.min()} … {array.max()}", do="Renumber the classes.")
        return labels
    do = ""
    if array.dtype.kind == "b":
        do = "Convert with .astype(np.int64)."
    elif array.ndim == 1 and array.dtype.kind == "f":
        do = "Convert class indices with .astype(np.int64); for one target per sample add an axis: y[:, None]."
    elif array.dtype.kind in "USO":
        do = "Renumber with np.unique(y, return_inverse=True)[1]."
    elif array.ndim == 2:
        do = "Use y[:, 0]." if array.shape[1] == 1 else "Convert one-hot rows with y.argmax(axis=1)."
    raise InputError(rule, got=got, do=do)


def _described(tensor: Tensor | Streamed) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape[1:])}"


def _count_classes(name: str, train: Int64[Tensor, "sample *position"], test: Int64[Tensor, "other *position"]) -> int:
    positions = train.dim()
    if positions > 1:
        train, test = train[train != IGNORED], test[test != IGNORED]
        if not len(train) or not len(test):
            raise InputError(f"`y_train` and `y_test` of {name} must have labeled positions.", got="none")
    present = torch.unique(train)
    classes, largest = len(present), int(present[-1])
    if largest != classes - 1:
        rule = f"`y_train` of {name}: class indices must be 0 … K−1 and each must occur."
        got = f"{classes} distinct numbers from {int(present[0])} to {largest}"
        do = "Renumber with np.unique(y, return_inverse=True)[1]."
        if positions > 1:
            do += " Store the number of positions without a label as `ignore_index`."
        raise InputError(rule, got=got, do=do)
    if classes < 2:
        raise InputError(f"`y_train` of {name} must have at least two classes.", got=classes)
    if int(test.max()) >= classes:
        rule = f"`y_test` of {name}: class indices must be in the range of the training set, 0 … {classes - 1}."
        raise InputError(rule, got=int(test.max()), do="Remove such rows, or add training rows of that class.")
    return classes


def _with_jacobians(split: Split, value: object, what: str, outputs: int) -> Split:
    jacobians = _floats(_array(value, what), what, gaps=True)
    if bool(jacobians.isnan().all()):
        raise InputError(f"{what} must have a known entry.", got="NaN alone", do="Leave the array out.")
    expected = (len(split), outputs, *split.x.shape[1:])
    if tuple(jacobians.shape) != expected:
        raise InputError(f"{what} must have the shape (N, K, *input) = {expected}.", got=tuple(jacobians.shape))
    return Split(split.x, split.y, jacobians)


def load_npz(argument: str, seed: int) -> Data:
    """Return your own arrays: `npz:FILE`, a numpy archive with the arrays that `from_arrays` names."""
    return from_arrays(f"npz:{argument}", npz_arrays(argument))


def npz_arrays(
    argument: str, needed: tuple[str, ...] = REQUIRED, optional: tuple[str, ...] = OPTIONAL
) -> dict[str, object]:
    """Return the arrays of a file; only their names are checked."""
    path = existing_file(argument, "npz")
    with reading(path, "a numpy .npz archive of plain arrays", "Write it with np.savez, numbers only."):
        check_npz_sizes(path, str(path))
        with np.load(path, allow_pickle=False) as archive:
            check_keys(f"npz:{argument}", list(archive.files), needed, optional)
            return {key: archive[key] for key in archive.files}


def check_npz_sizes(archive: Path | io.BytesIO, name: str) -> None:
    """Refuse an archive, called `name` in messages, whose arrays do not fit into memory."""
    with zipfile.ZipFile(archive) as members:
        size = sum(member.file_size for member in members.infolist())
    check_memory(size, f"The arrays of {name}", "Choose fewer rows, or store images as uint8.")
