"""Models by their command-line names, their weights on disk, and their size."""

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, unknown_name
from jacmatch.models import resnet
from jacmatch.models.mlp import Normalized, Shape, Statistics, check_sizes, mlp, mlp_from_layout, statistics
from jacmatch.models.vgg import VGG, cnn3, cnn5, vgg4, vgg9
from jacmatch.models.vit import vit_tiny

Builder = Callable[[int, Shape, Statistics, Statistics], nn.Module]

CATALOG: dict[str, Builder] = {
    "mlp": mlp,
    "cnn3": cnn3,
    "cnn5": cnn5,
    "vgg4": vgg4,
    "vgg9": vgg9,
    "resnet8": resnet.resnet8,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet56": resnet.resnet56,
    "resnet110": resnet.resnet110,
    "resnet8x4": resnet.resnet8x4,
    "resnet32x4": resnet.resnet32x4,
    "wrn-16-2": resnet.wrn_16_2,
    "wrn-40-1": resnet.wrn_40_1,
    "wrn-40-2": resnet.wrn_40_2,
    "vit-tiny": vit_tiny,
}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(spec: str, outputs: int, shape: Shape, mean: Statistics = None, std: Statistics = None) -> nn.Module:
    """A new, untrained model on raw inputs; its weights are drawn from torch's global generator.

    An `InputError` says so if there is no such model, it cannot be built for these sizes, or a package is missing.

    Args:
        spec: A name in `CATALOG`; `vgg:64-M-128-M`, a layout as in `VGG`; `mlp:64-64` or `mlp:64-64-tanh`, widths of
            the hidden layers and the activation; `timm:NAME` or `torchvision:NAME`, wrapped in `Normalized`; or
            `PACKAGE.MODULE:CALLABLE`, which is called with those of `outputs` (or `classes`), `shape`, `mean`, `std`
            that it has as parameters, and must normalise the raw input itself.
        outputs: Number of outputs, at least 1.
        shape: Shape of one sample.
        mean: Subtracted from the raw input, per channel or one for all.
        std: Divides the difference, above 0. With neither, `timm:` and `torchvision:` models on RGB images take the
            constants their published weights were trained with, the others leave the input as it is.

    Example:
        >>> count_parameters(build("vgg:16-M-32-M", outputs=10, shape=(1, 8, 8)))
        5178
    """
    check_sizes(spec, outputs, shape)
    family, colon, rest = spec.partition(":")
    if not colon:
        if spec not in CATALOG:
            raise unknown_name("A model", spec, [*CATALOG, *FORMS])
        return CATALOG[spec](outputs, shape, mean, std)
    if family in FAMILIES:
        return FAMILIES[family](rest, outputs, shape, mean, std)
    return _from_callable(spec, outputs, shape, mean, std)


def _timm(name: str, outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """A model of timm with random weights; one that has a fixed input size is built for this one."""
    timm = _optional("timm", f"`timm:{name}`", "pip install 'jacmatch[timm]'")
    if not timm.is_model(name):
        raise _no_such_model("timm", name, timm.list_models())
    options: dict[str, Any] = {"pretrained": False, "num_classes": outputs, "in_chans": shape[0]}
    constants = timm.get_pretrained_cfg(name)
    if constants is not None and constants.fixed_input_size:
        options["img_size"] = tuple(shape[1:])
    if mean is None and std is None and shape[0] == 3:
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if constants is None else (constants.mean, constants.std)
    return _wrapped(f"timm:{name}", partial(timm.create_model, name, **options), outputs, shape, mean, std)


def _torchvision(name: str, outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """A classifier of torchvision with random weights."""
    models = _optional("torchvision.models", f"`torchvision:{name}`", "pip install torchvision")
    known = models.list_models(module=models)
    if name not in known:
        raise _no_such_model("torchvision", name, known)
    if mean is None and std is None and shape[0] == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    create = partial(models.get_model, name, weights=None, num_classes=outputs)
    return _wrapped(f"torchvision:{name}", create, outputs, shape, mean, std)


def _wrapped(
    spec: str, create: Callable[[], nn.Module], outputs: int, shape: Shape, mean: Statistics, std: Statistics
) -> nn.Module:
    """A network of another library that normalises inside and is known to take one such sample."""
    try:
        model = Normalized(create(), shape, mean, std)
        with torch.no_grad():
            answer = model.eval()(torch.zeros(1, *shape))
    except InputError:
        raise
    except Exception as error:  # any library, any type of exception
        raise InputError(f"`{spec}` must take samples of shape {tuple(shape)}.", got=f"{error}") from error
    if not isinstance(answer, Tensor) or answer.shape != (1, outputs):
        raise InputError(f"`{spec}` must return {outputs} outputs a sample.", got=f"{getattr(answer, 'shape', answer)}")
    return model.train()


def _no_such_model(library: str, name: str, known: Iterable[str]) -> InputError:
    """An error with the nearest names only: these libraries have hundreds."""
    near = ", ".join(difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)) or "none"
    return InputError(f"A model `{library}:NAME` must be known to {library}.", got=f"'{name}'", do=f"Nearest: {near}.")


def _from_callable(spec: str, outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """What the user's own function builds; exceptions of that code keep their traceback."""
    path, _, attribute = spec.partition(":")
    form = f"A model `PACKAGE.MODULE:CALLABLE` must be importable; other forms: {', '.join(FORMS[:-1])}."
    if not all(part.isidentifier() for part in path.split(".")):
        raise InputError(form, got=f"'{spec}'")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is a defect there, not a wrong name.
        if not f"{path}.".startswith(f"{error.name}."):
            raise
        raise InputError(form, got=f"'{spec}': {error}", do="Check the spelling and the search path.") from error
    function = getattr(module, attribute, None)
    rule = f"`{spec}` must be a function or class that returns a new torch.nn.Module"
    if not callable(function) or isinstance(function, nn.Module):
        raise InputError(f"{rule}, for each run another.", got=f"an object of type {type(function).__name__}")
    offered = {"outputs": outputs, "classes": outputs, "shape": tuple(shape), "mean": mean, "std": std}
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:  # some callables written in C
        raise InputError(f"{rule} and shows its parameters.", got=f"{error}") from error
    accepted = {each.name for each in parameters if each.kind in keyword and each.name in offered}
    required = {each.name for each in parameters if each.default is each.empty and each.kind not in variadic}
    if required - accepted:
        got = f"required parameters {', '.join(sorted(required - accepted))}"
        raise InputError(f"{rule}, called with `outputs` or `classes`, `shape`, `mean`, `std`.", got=got)
    model = function(**{name: offered[name] for name in accepted})
    if not isinstance(model, nn.Module):
        raise InputError(f"{rule}.", got=f"an object of type {type(model).__name__}")
    return model


FAMILIES: dict[str, Callable[[str, int, Shape, Statistics, Statistics], nn.Module]] = {
    "mlp": mlp_from_layout,
    "vgg": VGG,
    "timm": _timm,
    "torchvision": _torchvision,
}
FORMS = ("mlp:WIDTHS", "vgg:LAYOUT", "timm:NAME", "torchvision:NAME", "PACKAGE.MODULE:CALLABLE")


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, frozen ones included, shared ones once, buffers not."""
    return sum(parameter.numel() for parameter in module.parameters())


def save_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes parameters and buffers to a safetensors file, all of it or nothing.

    Raises:
        InputError: If the name does not end in `.safetensors`, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError("`path` of `save_weights` must end in `.safetensors`.", got=f"`{target}`")
    safetensors = _optional("safetensors.torch", "`save_weights`", "pip install 'jacmatch[train]'")
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("wb") as file:
            file.write(safetensors.save(tensors, metadata={"format": "pt"}))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:
        raise InputError(
            "`path` of `save_weights` must be a file in a folder that exists and can be written.",
            got=f"`{target}` ({error.strerror})",
        ) from error
    finally:
        # Also after Ctrl-C; the folder itself may be what is missing.
        if unfinished.exists():
            unfinished.unlink()


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
        InputError: If the file is missing, a pickle, damaged or holds other weights, or if `mean` and `std` are needed
            and not given, or given and not needed.
    """
    source = Path(path)
    weights = _read(source)
    own = module.state_dict()
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


def _read(source: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    if source.suffix != ".safetensors":
        raise InputError(
            "Weights must be a `.safetensors` file: a pickle can run any code when it is opened.",
            got=f"`{source}`",
            do='Convert a state dict once: python -c "import torch; from safetensors.torch import save_file; '
            f"save_file(torch.load('{source}', weights_only=True), '{source.with_suffix('.safetensors')}')\"",
        )
    safetensors = _optional("safetensors.torch", "`load_weights`", "pip install 'jacmatch[train]'")
    try:
        weights: dict[str, Tensor] = safetensors.load(source.read_bytes())
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


def _optional(module: str, caller: str, install: str) -> Any:
    """An optional package's module, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        package = module.partition(".")[0]
        raise InputError(f"{caller} needs the package {package}.", got=f"{error}", do=f"Run: {install}.") from error
