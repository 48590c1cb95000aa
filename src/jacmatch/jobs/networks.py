"""Networks of a job, built by name, saved in run folders and loaded from them; and the fingerprints of its inputs."""

import hashlib
import importlib.metadata
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jacmatch.datasets import Data
from jacmatch.errors import InputError, converted_errors
from jacmatch.files import inside, read
from jacmatch.jacobian import output_tensor
from jacmatch.jacobian.modules import call
from jacmatch.models import Resized, catalog, load_weights, save_weights
from jacmatch.models.weights import output_counts
from jacmatch.runs import Run
from jacmatch.runs.files import load
from jacmatch.runs.identity import Fingerprint, Fingerprints, code_of
from jacmatch.training.distributed import ProcessGroup
from jacmatch.training.identity import SAMPLES, named, outputs_of, undisturbed

WEIGHTS, DESCRIPTION = "student.safetensors", "network.json"
_FILES = (".pt", ".pth", ".safetensors", ".bin", ".onnx", ".ckpt", ".npz", ".tar")


@dataclass(frozen=True)
class Description:
    """The data needed to build a network again; with a `size`, images are resized to that side length in pixels."""

    spec: str
    outputs: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    positions: tuple[int, ...] = ()  # (H, W) of outputs (B, K, H, W)

    @classmethod
    def of(cls, spec: str, data: Data) -> "Description":
        """The network `spec` for this data set."""
        shape, mean, std = tuple(data.shape), tuple(data.mean), tuple(data.std)
        return cls(spec, data.outputs, shape, mean, std, positions=data.positions)

    def build(self) -> nn.Module:
        """Build the network with new weights, and run it on one sample."""
        if ":" not in self.spec and Path(self.spec).suffix in _FILES:
            raise _of_a_file(self.spec)
        if self.spec.startswith("onnx:"):
            do = "Name a model that can be trained, or give the file as a teacher."
            raise InputError("An ONNX network has no gradients, so it cannot be trained.", got=self.spec, do=do)
        shape = self.shape if self.size is None else (self.shape[0], self.size, self.size)
        with converted_errors(f"The network {self.spec!r} must run on inputs {self.shape}."):  # the user's code
            network = catalog.build(self.spec, self.outputs, shape, self.mean or None, self.std or None)
            network = network if self.size is None else Resized(network, self.shape, self.size)
            with torch.no_grad():
                outputs = output_tensor(call(network.eval(), torch.zeros(2, *self.shape)))
        if outputs.shape != (2, self.outputs, *self.positions):
            each = "position of the labels" if self.positions else "sample of these data"
            wanted = ", ".join(map(str, ("B", self.outputs, *self.positions)))
            do = "Give a PACKAGE.MODULE:CALLABLE whose network does." if self.positions else ""
            rule = f"The network {self.spec!r} must return {self.outputs} outputs for each {each}, ({wanted})."
            raise InputError(rule, got=f"shape {tuple(outputs.shape)} for 2 samples", do=do)
        return network.train()


def save(run: Run, network: nn.Module, description: Description) -> None:
    """Save a network in a run folder: its weights, its description, and the SHA-256 of the weights file."""
    save_weights(network, run.path / WEIGHTS)
    run.write_json(DESCRIPTION, {**description.__dict__, "sha256": _digest(run.path / WEIGHTS)})


def _digest(file: Path) -> str:
    return hashlib.sha256(read(file.parent, file)).hexdigest()


def check_saved(folder: Path) -> None:
    """Refuse weights that differ from the saved ones, even by one bit."""
    checksum = load(folder / DESCRIPTION).get("sha256")
    if not (folder / WEIGHTS).is_file():
        rule = f"{folder} must contain the weights of its network."
        raise InputError(rule, got=f"no {WEIGHTS}", do="Run the job again.")
    if checksum is not None and checksum != _digest(folder / WEIGHTS):
        rule = f"{folder / WEIGHTS} must have the checksum that it was written with."
        raise InputError(rule, got="another", do="It is damaged: copy it again, or run the job again.")


def describe(folder: Path, *, allow_code: bool = True) -> Description:
    """Return the description of the network in a run folder; refuse code outside the package unless it is allowed."""
    Run.open(folder, finished=False)
    file = folder / DESCRIPTION
    if not file.is_file():
        raise InputError(f"{folder} must contain a trained network.", got=f"a run without {DESCRIPTION}")
    with converted_errors(f"{file} must describe a network.", "It is damaged: copy it again."):
        raw: dict[str, Any] = load(file)
        size, positions = raw.get("size"), tuple(map(int, raw.get("positions") or ()))
        shape, mean, std = tuple(map(int, raw["shape"])), tuple(map(float, raw["mean"])), tuple(map(float, raw["std"]))
        size = None if size is None else int(size)
        description = Description(str(raw["spec"]), int(raw["outputs"]), shape, mean, std, size, positions)
    if catalog.is_code(description.spec) and not allow_code:
        rule = f"The network in {folder} is built by code outside the package."
        raise InputError(rule, got=description.spec, do="If you trust it, pass allow_code=True (--allow-code).")
    return description


def load_student(run_dir: str | os.PathLike[str], *, allow_code: bool = False) -> nn.Module:
    """Load the trained network of a run folder, in evaluation mode, from its safetensors file.

    Args:
        run_dir: The run folder, `--out` of a job.
        allow_code: Whether a network of a PACKAGE.MODULE:CALLABLE may be built again, which runs that code. Use it only
            for folders that you trust.

    Raises:
        InputError: The folder has no network, a damaged one, or one that needs `allow_code`.
    """
    folder = Path(run_dir)
    description = describe(folder, allow_code=allow_code)
    file = inside(folder, folder / WEIGHTS)
    check_saved(folder)
    _check_size(description, file)
    network = description.build()
    load_weights(network, file)
    return network.eval()


def load_own(folder: Path, spec: str) -> nn.Module:
    """Load the network in the job's own folder; only the network that its settings name may be built."""
    saved = describe(folder).spec
    if saved != spec:
        rule = f"The network in {folder} must be {spec!r}, which this job builds."
        raise InputError(rule, got=repr(saved), do="It was changed: remove the folder.")
    return load_student(folder, allow_code=True)


class _WithoutValues(TorchFunctionMode):
    """Within the block tensors are not filled: on a device without memory torch does that in slow Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        filled = func in (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)
        return args[0] if filled else func(*args, **(kwargs or {}))


def _check_size(description: Description, file: Path) -> None:
    """Refuse a description of a network that is far larger than its weights, before it takes any memory."""
    family = description.spec.partition(":")[0]
    if not file.is_file() or not (
        family in ("mlp", "scaled-mlp", "gaussian-process", "vgg") or family in catalog.CATALOG
    ):
        return  # another library may not build on a device without memory
    rule = f"{file.parent / DESCRIPTION} must describe a network."
    with converted_errors(rule), torch.device("meta"), _WithoutValues():  # torch cannot take some numbers
        empty = catalog.build(description.spec, description.outputs, description.shape)
    needed = sum(value.numel() * value.element_size() for value in empty.state_dict().values())
    if needed > 8 * file.stat().st_size:
        rule = f"{file} must contain the {needed:,} bytes of weights of {description.spec!r}."
        raise InputError(rule, got=f"{file.stat().st_size:,} bytes", do="It is damaged: copy it again.")


@dataclass(frozen=True)
class Weights:
    """A weights file, with the preprocessing of its network if the file does not contain it."""

    path: Path | None  # None for a name that includes its weights (`brings_weights`)
    mean: tuple[float, ...] | None = None  # None: that of the published weights
    std: tuple[float, ...] | None = None
    size: int | None = None  # pixels to which images are resized; 0: not at all, None: only to a model's fixed size
    positions: tuple[int, ...] = ()  # as in `Description`

    def describe(self, spec: str, outputs: int, shape: tuple[int, ...]) -> Description:
        """Describe the network of these weights for samples of this shape; `mean` and `std` are empty if unknown."""
        known = catalog.preprocessing(spec)
        mean, std, size = self.mean, self.std, self.size
        if known is not None and mean is None and std is None and len(known.mean) in (1, shape[0]):
            mean, std = known.mean, known.std
        if known is not None and known.fixed and size is None:
            size = known.size
        size = size if size and tuple(shape[1:]) != (size, size) else None
        if size is not None and len(shape) != 3:
            raise InputError("`--size` must be used with images.", got=f"samples of shape {tuple(shape)}")
        return Description(spec, outputs, tuple(shape), tuple(mean or ()), tuple(std or ()), size, self.positions)


def with_weights(
    spec: str, outputs: int | None, shape: tuple[int, ...], weights: Weights
) -> tuple[nn.Module, Description]:
    """Return a model with the weights of a file, in evaluation mode, and its description."""
    if weights.path is None and spec.startswith("hf:"):
        weights = replace(weights, path=catalog.hf_folder(spec.removeprefix("hf:")))
    if weights.path is None:
        raise InputError(f"The network {spec!r} must have trained weights.", do="Give a run folder, or a weights file.")
    description = weights.describe(spec, outputs or 2, shape)
    options: dict[str, Any] = {"allow_pickle": True}
    if outputs is None:
        pair = [replace(description, outputs=count).build() for count in (2, 3)]
        counts = output_counts(weights.path, *pair, **options) or [2]
    else:
        counts = [outputs]
    for count in counts:
        network = replace(description, outputs=count).build()
        inner: Any = network.network if description.size is not None else network
        try:
            load_weights(inner, weights.path, mean=description.mean or None, std=description.std or None, **options)
        except InputError:
            if spec.startswith("hf:") and catalog.load_hf(inner, weights.path):
                if description.mean:
                    break
                rule = f"`{spec}` must say how its images are normalized: it has no preprocessor_config.json."
                do = "Give --mean and --std (--teacher-mean and --teacher-std): 0 and 1 if it takes [0, 1]."
                raise InputError(rule, do=do) from None
            if count == counts[-1]:
                raise
        else:
            break
    if hasattr(inner, "mean"):
        mean, std = (tuple(getattr(inner, name).flatten().tolist()) for name in ("mean", "std"))
        description = replace(description, mean=mean, std=std)
    return network.eval(), replace(description, outputs=count)


def adapted(trained: nn.Module, description: Description, outputs: int) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of a network with a new last layer, and the names of its tensors."""
    empty = replace(description, outputs=outputs).build()
    with torch.random.fork_rng(devices=[]):  # the second network must not advance the generator
        wider = replace(description, outputs=outputs + 1).build().state_dict()
    whole = trained.state_dict()
    shapes = {name: value.shape for name, value in empty.state_dict().items()}
    head = {name for name, shape in shapes.items() if shape != wider[name].shape}
    same = {name: whole[name] for name, shape in shapes.items() if name not in head and whole[name].shape == shape}
    new = set(whole) - set(same)
    if not 1 <= len(new) <= 2 or not all(whole[name].shape[0] == description.outputs for name in new):
        rule = "A network must end in a linear layer to be fine-tuned for other classes."
        raise InputError(rule, got=f"{len(new)} tensors that depend on them")
    empty.load_state_dict(same, strict=False)
    return empty, tuple(sorted(new))


def brings_weights(spec: str) -> bool:
    """Return whether a name includes trained weights: a run folder, `hf:` or `onnx:`."""
    return is_run(spec) or spec.partition(":")[0] in ("hf", "onnx")


def network(spec: str, data: Data, weights: Weights | None = None, *, allow_code: bool = False) -> nn.Module:
    """Load the trained network that a flag names: a run folder, `hf:`, `onnx:`, or a model with a weights file."""
    if weights is not None and (is_run(spec) or (spec.startswith("onnx:") and weights.path is not None)):
        what = "A run folder" if is_run(spec) else "An ONNX file"
        raise InputError(f"{what} already contains its weights.", got=str(weights.path), do="Leave them out.")
    if is_run(spec):
        description = describe(Path(spec))
        here, wanted = (_sizes(each) for each in (description, Description.of(spec, data)))
        if here != wanted:
            raise InputError(f"The network in {spec} must fit the data: {wanted}.", got=here)
        return load_student(spec, allow_code=allow_code)
    if spec.startswith("onnx:"):
        given = weights or Weights(None)
        return catalog.build(spec, data.outputs, tuple(data.shape), given.mean, given.std).eval()
    if catalog.is_code(spec) and weights is None and (function := catalog.function_of_batch(spec)) is not None:
        return function
    if weights is None and not spec.startswith("hf:"):
        Description.of(spec, data).build()  # an unknown name has a message of its own
    weights = replace(weights or Weights(None), positions=data.positions)
    return with_weights(spec, data.outputs, tuple(data.shape), weights)[0]


def _sizes(network: Description) -> str:
    each = f" for each of {network.positions} positions" if network.positions else ""
    return f"inputs {network.shape}, {network.outputs} outputs{each}"


def _of_a_file(spec: str) -> InputError:
    """Return an error for a file that is given instead of a network."""
    if not Path(spec).exists():
        return InputError(f"`{spec}` must be an existing file.", got="no such file", do="Check the path.")
    do = (
        f"Write onnx:{spec}."
        if spec.endswith(".onnx")
        else f"Write MODEL --weights {spec}, for a teacher --teacher-weights."
    )
    return InputError("A network must be named by its model, not by its file of weights.", got=f"'{spec}'", do=do)


def is_run(spec: str) -> bool:
    """Return whether a flag names a folder rather than a model."""
    return os.path.isdir(spec) or (os.sep in spec and ":" not in spec and Path(spec).suffix not in _FILES)


_PACKAGES = ("timm", "torchvision")  # families of networks that other packages build


def same_inputs(
    run: Run, data: Data | None = None, teacher: nn.Module | None = None, networks: tuple[Description, ...] = ()
) -> None:
    """Store the fingerprints of the inputs of a job in its run, or compare them if the run is resumed."""
    for part, here in inputs_of(data, teacher, networks).items():
        matches(run, part, here)


def inputs_of(
    data: Data | None = None, teacher: nn.Module | None = None, networks: tuple[Description, ...] = ()
) -> dict[str, Fingerprints]:
    """Return the fingerprints of the inputs of a job, by part."""
    fingerprints: dict[str, Fingerprints] = {}
    if data is not None:
        fingerprints["data"] = dict(data.digests)
    for description in networks:
        if here := of_network(description):
            fingerprints[f"network {description.spec}"] = here
    if teacher is not None and data is not None:
        fingerprints["teacher"] = of_teacher(teacher, data)
    return fingerprints


def matches(run: Run, part: str, here: Mapping[str, Fingerprint]) -> None:
    """Call `Run.check_inputs` in all processes of a job, which must have the same inputs."""
    exact = {name: value for name, value in here.items() if isinstance(value, str)}
    ProcessGroup.current().same(part, str(exact))
    run.check_inputs(part, here)


def of_teacher(teacher: nn.Module, data: Data) -> Fingerprints:
    """Return the fingerprints of a trained network: weights, architecture, code, and its outputs for some samples."""
    x = data.train.inputs(torch.arange(min(SAMPLES, len(data.train))))
    device = next((parameter.device for parameter in teacher.parameters()), x.device)
    return {"weights and code": named(teacher), "outputs": outputs_of(teacher, x.to(device))}


def code_of_model(spec: str) -> Fingerprints:
    """Return the fingerprints of the code that builds a network.

    It is empty for a network of this package, the version of another package, and for a PACKAGE.MODULE:CALLABLE the
    source of its module and of the user's modules that it imports.
    """
    family, colon, _ = spec.partition(":")
    if family in _PACKAGES:
        return {family: importlib.metadata.version(family)}
    return code_of(family) if colon and family not in catalog.FAMILIES else {}


def of_network(description: Description) -> Fingerprints:
    """Return the fingerprints of a new network; for user code also of its outputs, because it may read files."""
    fingerprints = code_of_model(description.spec)
    if not fingerprints or description.spec.partition(":")[0] in _PACKAGES:
        return fingerprints
    shape = (2, *description.shape)
    x = torch.linspace(0, 1, math.prod(shape)).reshape(shape)
    outputs = []
    for _ in range(2):
        with undisturbed():
            torch.manual_seed(0)
            outputs.append(outputs_of(description.build(), x))
    return {
        **fingerprints,
        "outputs of a new network": outputs[0] if outputs[0] == outputs[1] else "another at each call",
    }
