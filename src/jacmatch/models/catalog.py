"""Models by their command-line names, and their size."""

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, converted_errors, optional_package, unknown_name
from jacmatch.models.inputs import Normalized, Shape, Statistics, check_sizes
from jacmatch.models.mlp import MLP, mlp_from_layout, process_mean_from_layout, scaled_mlp_from_layout
from jacmatch.models.resnet import FOURFOLD, ResNet, WideResNet
from jacmatch.models.values import ValuesOnly, onnx
from jacmatch.models.vgg import CNN3, CNN5, VGG, VGG4, VGG9
from jacmatch.models.vit import VisionTransformer

Builder = Callable[[int, Shape, Statistics, Statistics], nn.Module]

# Sizes are those for ten outputs of RGB images.
CATALOG: dict[str, Builder] = {
    "mlp": MLP,
    "cnn3": partial(VGG, CNN3),
    "cnn5": partial(VGG, CNN5),
    "vgg4": partial(VGG, VGG4),
    "vgg9": partial(VGG, VGG9),
    "resnet8": partial(ResNet, 8),  # 78,042 parameters
    "resnet20": partial(ResNet, 20),  # 272,474
    "resnet32": partial(ResNet, 32),  # 466,906
    "resnet56": partial(ResNet, 56),  # 855,770
    "resnet110": partial(ResNet, 110),  # 1,730,714
    "resnet8x4": partial(ResNet, 8, widths=FOURFOLD),  # 1.2 million
    "resnet32x4": partial(ResNet, 32, widths=FOURFOLD),  # 7.4 million
    "wrn-16-2": partial(WideResNet, 16, 2),  # 0.7 million
    "wrn-40-1": partial(WideResNet, 40, 1),  # 0.6 million
    "wrn-40-2": partial(WideResNet, 40, 2),  # 2.2 million
    "vit-tiny": VisionTransformer,  # ViT-Ti: tokens of 192, 12 blocks, 3 heads; 5.4 million
}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_code(spec: str) -> bool:
    """Return whether `build` treats the string as a PACKAGE.MODULE:CALLABLE, which it imports and calls."""
    family, colon, rest = spec.partition(":")
    drive = len(family) == 1 and rest[:1] in ("\\", "/")  # the path of a run folder on Windows
    return bool(colon) and not drive and family not in FAMILIES and all(map(str.isidentifier, family.split(".")))


def build(spec: str, outputs: int, shape: Shape, mean: Statistics = None, std: Statistics = None) -> nn.Module:
    """Build a model on raw inputs, with random weights from torch's global generator.

    Raises an `InputError` if there is no such model, it cannot be built for these sizes, or a package is missing.

    Args:
        spec: A name in `CATALOG`; `vgg:64-M-128-M`, a layout as in `VGG`; `mlp:64-64` or `mlp:64-64-tanh`, widths of
            the hidden layers and the activation; `scaled-mlp:64-64-softplus`, which scales its outputs as well;
            `gaussian-process:POINTS`, the mean of a process, which `surrogate --model gp` saves;
            `timm:NAME`, `torchvision:NAME` or `hf:DIR_OR_NAME` (the `config.json` of a folder, or of a repository in
            the local cache of Hugging Face), wrapped in `Normalized`; `onnx:FILE`, which has values and no gradient; or
            `PACKAGE.MODULE:CALLABLE`, which is called with those of `outputs` (or `classes`), `shape`, `mean`, `std`
            that it accepts, and must normalize the raw input itself.
        outputs: Number of outputs, at least 1.
        shape: Shape of one sample.
        mean: Mean that is subtracted from the raw input: one number per channel, or one for all.
        std: Standard deviation by which the difference is divided, above 0. If neither is given, `timm:` and
            `torchvision:` models on RGB images use the values of their published weights, and others do not scale the
            input.

    Example:
        >>> count_parameters(build("vgg:16-M-32-M", outputs=10, shape=(1, 8, 8)))
        5178
    """
    check_sizes(spec, outputs, shape)
    family, colon, rest = spec.partition(":")
    if not colon:
        if spec not in CATALOG:
            raise unknown_name("A model", spec, [*CATALOG, *FORMS, "RUN_FOLDER (evaluate, compare, doctor, --teacher)"])
        return CATALOG[spec](outputs, shape, mean, std)
    if family in FAMILIES:
        return FAMILIES[family](rest, outputs, shape, mean, std)
    return _from_callable(spec, outputs, shape, mean, std)


def _timm(name: str, outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """A model of timm with random weights; one that has a fixed input size is built for this one."""
    timm = optional_package("timm", f"`timm:{name}`", "pip install 'jacmatch[timm]'")
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
    models = optional_package("torchvision.models", f"`torchvision:{name}`", "pip install torchvision")
    known = models.list_models(module=models)
    if name not in known:
        raise _no_such_model("torchvision", name, known)
    if mean is None and std is None and shape[0] == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    create = partial(models.get_model, name, weights=None, num_classes=outputs)
    return _wrapped(f"torchvision:{name}", create, outputs, shape, mean, std)


def _hf(name: str, outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """An image classifier of transformers with random weights, by its `config.json`; no code of the folder is run."""
    folder = hf_folder(name)
    own = _json(folder / "config.json")
    if own.get("library_name") == "jacmatch" and not is_code(f"{own.get('spec')}"):  # of `export --to hf`
        return build(str(own["spec"]), outputs, shape, mean, std)
    transformers = optional_package("transformers", f"`hf:{name}`", "pip install 'jacmatch[hf]'")
    rule = f"`hf:{name}` must be an image classifier of transformers."
    with converted_errors(rule, "Name the folder of an image classifier with config.json."):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.num_labels = outputs
        if hasattr(config, "num_channels"):
            config.num_channels = shape[0]
        create = partial(transformers.AutoModelForImageClassification.from_config, config, trust_remote_code=False)
        network = create()
    if mean is None and std is None and (known := preprocessing(f"hf:{name}")) and len(known.mean) in (1, shape[0]):
        mean, std = known.mean, known.std
    return _wrapped(f"hf:{name}", partial(_Logits, network), outputs, shape, mean, std)


class _Logits(nn.Module):
    """The logits of a classifier of transformers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).logits  # type: ignore[no-any-return]


def load_hf(network: Any, folder: Path) -> bool:
    """Load the safetensors of a folder into a network of transformers by its own rules; return whether all were there.

    From transformers 5 on, layers of some classifiers have different names in memory and in files.
    """
    transformers = optional_package("transformers", "`hf:`", "pip install 'jacmatch[hf]'")
    kind = transformers.AutoModelForImageClassification
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        loaded, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        network.network.network.load_state_dict(loaded.state_dict())
    except Exception:  # transformers raises many types; the message of `load_weights` says what does not fit
        return False
    return not report["missing_keys"]


def hf_folder(name: str) -> Path:
    """The folder of `hf:NAME`: one that exists, or the snapshot in the local cache. Nothing is downloaded."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        hub = optional_package("huggingface_hub", f"`hf:{name}`", "pip install 'jacmatch[hf]'")
        rule = f"`hf:{name}` must be a folder, or a repository in the local cache of Hugging Face."
        with converted_errors(rule, f"Nothing is downloaded; to have it in the cache, run: hf download {name}."):
            folder = Path(hub.snapshot_download(name, local_files_only=True))
    return folder


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of raw images that published weights expect."""

    mean: tuple[float, ...]  # subtracted, per channel
    std: tuple[float, ...]  # divides the difference
    size: int  # height and width in pixels
    fixed: bool  # whether the network takes no other size


def preprocessing(spec: str) -> Preprocessing | None:
    """Return the preprocessing of the published weights of a model; None if it is unknown.

    It is in `pretrained_cfg` of timm, the transforms of torchvision, and `preprocessor_config.json` of Hugging Face.
    """
    family, _, name = spec.partition(":")
    if family == "timm":
        timm = optional_package("timm", f"`{spec}`", "pip install 'jacmatch[timm]'")
        cfg = timm.get_pretrained_cfg(name)
        if cfg is None:
            return None
        return Preprocessing(tuple(cfg.mean), tuple(cfg.std), cfg.input_size[-1], bool(cfg.fixed_input_size))
    if family == "torchvision":
        models = optional_package("torchvision.models", f"`{spec}`", "pip install torchvision")
        if name not in models.list_models(module=models):
            return None
        own = models.get_model_weights(name).DEFAULT.transforms()
        return Preprocessing(tuple(own.mean), tuple(own.std), own.crop_size[0], "vit" in name)
    if family != "hf":
        return None
    own, config = (_json(hf_folder(name) / file) for file in ("preprocessor_config.json", "config.json"))
    try:
        sizes = own.get("crop_size") or own.get("size") or config["image_size"]
        size = int(next(iter(sizes.values())) if isinstance(sizes, dict) else sizes)
        if own.get("do_normalize", "image_mean" in own):
            return Preprocessing(tuple(own["image_mean"]), tuple(own["image_std"]), size, "image_size" in config)
        return Preprocessing((0.0,), (1.0,), size, "image_size" in config) if own else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        content = json.loads(file.read_bytes()) if file.is_file() else {}
    except (ValueError, RecursionError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def _wrapped(
    spec: str, create: Callable[[], nn.Module], outputs: int, shape: Shape, mean: Statistics, std: Statistics
) -> nn.Module:
    """A network of another library that normalizes inside and is known to take one such sample."""
    with converted_errors(f"`{spec}` must take samples of shape {tuple(shape)}."), torch.no_grad():
        model = Normalized(create(), shape, mean, std)
        answer = model.eval()(torch.zeros(1, *shape))
    if not isinstance(answer, Tensor) or answer.shape != (1, outputs):
        raise InputError(
            f"`{spec}` must return {outputs} outputs per sample.", got=f"{getattr(answer, 'shape', answer)}"
        )
    return model.train()


def _no_such_model(library: str, name: str, known: Iterable[str]) -> InputError:
    """An error with the nearest names only: these libraries have hundreds."""
    near = ", ".join(difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)) or "none"
    return InputError(f"A model `{library}:NAME` must be known to {library}.", got=f"'{name}'", do=f"Nearest: {near}.")


def _from_callable(spec: str, outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """Return the network that the user's function builds; exceptions of that code keep their traceback."""
    function = _imported(spec)
    rule = f"`{spec}` must be a function or class that returns a new torch.nn.Module"
    if not callable(function) or isinstance(function, nn.Module):
        raise InputError(f"{rule} at each call.", got=f"an object of type {type(function).__name__}")
    offered = {"outputs": outputs, "classes": outputs, "shape": tuple(shape), "mean": mean, "std": std}
    try:
        accepted, others = _parameters(function)
    except ValueError as error:  # some callables written in C
        raise InputError(f"{rule}, and whose parameters can be read.", got=f"{error}") from error
    if others:
        got = f"required parameters {', '.join(sorted(others))}"
        do = "A function that takes a batch can be used only as a teacher."
        raise InputError(f"{rule}, called with `outputs` or `classes`, `shape`, `mean`, `std`.", got=got, do=do)
    model = function(**{name: offered[name] for name in accepted})
    if not isinstance(model, nn.Module):
        raise InputError(f"{rule}.", got=f"an object of type {type(model).__name__}")
    return model


def _imported(spec: str) -> Any:
    """Import the object that a PACKAGE.MODULE:CALLABLE names; its code runs because the user named it."""
    path, _, attribute = spec.partition(":")
    form = f"A model `PACKAGE.MODULE:CALLABLE` must be importable; other forms: {', '.join(FORMS[:-1])}."
    if not is_code(spec):
        raise InputError(form, got=f"'{spec}'")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is a defect there, not a wrong name.
        if not f"{path}.".startswith(f"{error.name}."):
            raise
        raise InputError(form, got=f"'{spec}': {error}", do="Check the spelling and the search path.") from error
    return getattr(module, attribute, None)


def _parameters(function: Any) -> tuple[set[str], set[str]]:
    """Return which of a builder's parameters a function accepts, and which others it requires."""
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(function).parameters.values())
    known = ("outputs", "classes", "shape", "mean", "std")
    accepted = {each.name for each in parameters if each.kind in keyword and each.name in known}
    required = {each.name for each in parameters if each.default is each.empty and each.kind not in variadic}
    return accepted, required - accepted


def function_of_batch(spec: str) -> nn.Module | None:
    """Return the trained function that a PACKAGE.MODULE:CALLABLE names; None if it builds networks.

    A module is returned unchanged. Any other function that requires one argument, a batch, is wrapped in `ValuesOnly`.
    """
    function = _imported(spec)
    if isinstance(function, nn.Module):
        return function.eval()
    if isinstance(function, type) or not callable(function):
        return None
    try:
        accepted, others = _parameters(function)
    except ValueError:  # some callables written in C
        accepted, others = set(), {"x"}
    return ValuesOnly(function, name=spec) if len(others) == 1 and not accepted else None


FAMILIES: dict[str, Callable[[str, int, Shape, Statistics, Statistics], nn.Module]] = {
    "mlp": mlp_from_layout,
    "scaled-mlp": scaled_mlp_from_layout,
    "gaussian-process": process_mean_from_layout,
    "vgg": VGG,
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hf,
    "onnx": onnx,
}
_ARGUMENTS = ("WIDTHS", "WIDTHS", "POINTS", "LAYOUT", "NAME", "NAME", "DIR_OR_NAME", "FILE")
FORMS = (*map(":".join, zip(FAMILIES, _ARGUMENTS, strict=True)), "PACKAGE.MODULE:CALLABLE")


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, with frozen ones, without buffers; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())
