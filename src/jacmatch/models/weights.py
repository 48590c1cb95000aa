"""Weights on disk: safetensors files, which hold tensors and nothing that could run."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.files import replace
from jacmatch.models.inputs import Normalized, Statistics, statistics
from jacmatch.models.packages import optional_package

_ROOM = 2**27  # bytes of a file of weights beyond four times those of the module


def save_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes parameters and buffers to a safetensors file, all of it or nothing.

    Raises:
        InputError: If the name does not end in `.safetensors`, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError("`path` of `save_weights` must end in `.safetensors`.", got=f"`{target}`")
    safetensors = optional_package("safetensors.torch", "`save_weights`", "pip install 'jacmatch[train]'")
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}
    try:
        replace(target, safetensors.save(tensors, metadata={"format": "pt"}))
    except OSError as error:
        raise InputError(
            "`path` of `save_weights` must be a file in a folder that exists and can be written.",
            got=f"`{target}` ({error.strerror})",
        ) from error


def load_weights(
    module: nn.Module, path: str | os.PathLike[str], *, mean: Statistics = None, std: Statistics = None
) -> None:
    """Copies a safetensors file into the module: every parameter and buffer, or none of them.

    Weights from elsewhere carry no `mean` and `std`. Under another preprocessing than they were trained with they lose
    tens of points in accuracy without any error, so it has to be said then.

    Args:
        module: A model of the architecture the weights were trained in.
        path: A `.safetensors` file, as `save_weights` writes it or from elsewhere with the same names.
        mean: For a file without: the mean that was subtracted from raw inputs when these weights were trained.
        std: Likewise, what the difference was divided by.

    Raises:
        InputError: If the file is missing, a pickle, far larger than the module, damaged or holds other weights, or if
            `mean` and `std` are needed and not given, or given and not needed.
    """
    source = Path(path)
    own = module.state_dict()
    weights = _read(source, _ROOM + 4 * sum(value.numel() * value.element_size() for value in own.values()))
    if {"mean", "std"} <= own.keys() and not {"mean", "std"} & weights.keys():
        weights = _with_statistics(module, source, weights, mean, std)
    elif mean is not None or std is not None:
        raise InputError("`mean` and `std` of `load_weights` are for files without them.", do="Leave them out.")
    differences = _differences(own, weights)
    if differences:
        raise InputError(
            f"`{source}` must hold the weights of this {type(module).__name__}.",
            got=differences,
            do="Build the model they were trained in, with the same number of outputs and the same input shape.",
        )
    bad = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise InputError(f"`{source}` must hold finite weights.", got=f"NaN or infinity in {_few(bad)}")
    module.load_state_dict(weights)


def _read(source: Path, largest: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file of at most so many bytes; its header cannot claim more than the file has."""
    if source.suffix != ".safetensors":
        raise InputError(
            "Weights must be a `.safetensors` file: a pickle can run any code when it is opened.",
            got=f"`{source}`",
            do='Convert a state dict once: python -c "import torch; from safetensors.torch import save_file; '
            f"save_file(torch.load('{source}', weights_only=True), '{source.with_suffix('.safetensors')}')\"",
        )
    safetensors = optional_package("safetensors.torch", "`load_weights`", "pip install 'jacmatch[train]'")
    try:
        size = source.stat().st_size
        if size > largest or not (source.is_file() or source.is_dir()):
            got = f"{size:,} bytes" if source.is_file() else "a device or a pipe"
            raise InputError(f"`{source}` must be a file of at most {largest:,} bytes.", got=got)
        weights: dict[str, Tensor] = safetensors.load(source.read_bytes())
    except InputError:
        raise
    except OSError as error:
        raise InputError("Weights must be a readable file.", got=f"`{source}` ({error.strerror})") from error
    except Exception as error:  # safetensors' own type is not documented
        raise InputError(f"`{source}` must be a whole safetensors file.", got=f"{error}") from error
    return weights


def _with_statistics(
    module: nn.Module, source: Path, weights: Mapping[str, Tensor], mean: Statistics, std: Statistics
) -> dict[str, Tensor]:
    """Weights from elsewhere, with the buffers and the prefix they have in our module."""
    if mean is None or std is None:
        raise InputError(
            f"`{source}` must say how its weights expect the input normalised: it has neither `mean` nor `std`.",
            do="Give both to `load_weights`: `mean=(0.0,), std=(1.0,)` if they were trained on inputs in [0, 1].",
        )
    prefix = "network." if isinstance(module, Normalized) else ""
    mean_buffer, std_buffer = statistics("load_weights", tuple(module.state_dict()["mean"].shape[1:]), mean, std)
    return {"mean": mean_buffer, "std": std_buffer, **{prefix + name: value for name, value in weights.items()}}


def _differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """What keeps the weights from fitting, in words; empty if nothing."""
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    shapes = [
        f"{name} {tuple(weights[name].shape)}, must be {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    found = (("missing", missing), ("not in the model", unknown), ("of another shape", shapes))
    return "; ".join(f"{what}: {_few(names)}" for what, names in found if names)


def _few(names: list[str], shown: int = 3) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
