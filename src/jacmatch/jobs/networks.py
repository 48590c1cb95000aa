"""Networks of a job: built by name, kept in run folders, loaded from there."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jacmatch.datasets import Data
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.files import inside, read
from jacmatch.jacobian import output_tensor
from jacmatch.jacobian.modules import call
from jacmatch.models import catalog, load_weights, save_weights
from jacmatch.runs import Run
from jacmatch.runs.files import load

WEIGHTS, DESCRIPTION = "student.safetensors", "network.json"


@dataclass(frozen=True)
class Description:
    """What must be known to build a network again."""

    spec: str
    outputs: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, spec: str, data: Data) -> "Description":
        """The network `spec` for this data set."""
        return cls(spec, data.outputs, tuple(data.shape), tuple(data.mean), tuple(data.std))

    def build(self) -> nn.Module:
        """The network with new weights, tried on one sample.

        Raises:
            InputError: there is no such model, its code fails, or it does not return the outputs the data need.
        """
        try:
            network = catalog.build(self.spec, self.outputs, self.shape, list(self.mean), list(self.std))
            with torch.no_grad():
                outputs = output_tensor(call(network.eval(), torch.zeros(2, *self.shape)))
        except (InputError, UnsupportedError):
            raise
        except Exception as error:  # the user's own code may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"The network {self.spec!r} must run on inputs {self.shape}.", got=reason) from error
        if outputs.shape != (2, self.outputs):
            raise InputError(
                f"The network {self.spec!r} must return {self.outputs} outputs for each sample of these data.",
                got=f"shape {tuple(outputs.shape)} for 2 samples",
            )
        return network.train()


def save(run: Run, network: nn.Module, description: Description) -> None:
    """Keeps a network in a run folder: its weights, then how it is built and the SHA-256 of the file of weights."""
    save_weights(network, run.path / WEIGHTS)
    run.write_json(DESCRIPTION, {**description.__dict__, "sha256": _digest(run.path / WEIGHTS)})


def _digest(file: Path) -> str:
    return hashlib.sha256(read(file.parent, file)).hexdigest()


def check_saved(folder: Path) -> None:
    """Refuses weights that are not those that were written: one flipped bit would be another network.

    Raises:
        InputError: They are missing, or have another checksum than the description says.
    """
    checksum = load(folder / DESCRIPTION).get("sha256")
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} must hold the weights of its network.", got=f"no {WEIGHTS}", do="Run the job anew.")
    if checksum is not None and checksum != _digest(folder / WEIGHTS):
        rule = f"{folder / WEIGHTS} must have the checksum that it was written with."
        raise InputError(rule, got="another", do="It is damaged: copy it again, or run the job anew.")


def describe(folder: Path) -> Description:
    """The network that a run folder holds.

    Raises:
        InputError: the folder holds none, or its description is damaged.
    """
    Run.open(folder, finished=False)
    file = folder / DESCRIPTION
    if not file.is_file():
        raise InputError(f"{folder} must hold a trained network.", got=f"a run without {DESCRIPTION}")
    try:
        raw: dict[str, Any] = load(file)
        return Description(
            str(raw["spec"]),
            int(raw["outputs"]),
            tuple(int(size) for size in raw["shape"]),
            tuple(float(value) for value in raw["mean"]),
            tuple(float(value) for value in raw["std"]),
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{file} must describe a network.", got=f"a damaged file ({error})") from error


def load_student(run_dir: str | os.PathLike[str], *, allow_code: bool = False) -> nn.Module:
    """The trained network of a run folder, in evaluation mode, from its safetensors file.

    Args:
        run_dir: The `--out` of a job.
        allow_code: Whether a network built by the user's own PACKAGE.MODULE:CALLABLE is built again, which runs that
            code. A folder that somebody else made could name any.

    Raises:
        InputError: the folder holds no network, a damaged one, or one that needs `allow_code`.
    """
    folder = Path(run_dir)
    description = described(folder, allow_code=allow_code)
    file = inside(folder, folder / WEIGHTS)
    check_saved(folder)
    _check_size(description, file)
    network = description.build()
    load_weights(network, file)
    return network.eval()


def load_own(folder: Path, spec: str) -> nn.Module:
    """Load the network in the folder of the job itself, where only the network of its settings may be built.

    Args:
        folder: Of the network.
        spec: The network of the job's settings. If it is code outside the package, the user named it.

    Raises:
        InputError: Another network is there, or it is damaged.
    """
    saved = describe(folder).spec
    if saved != spec:
        rule = f"The network in {folder} must be {spec!r}, which this job makes."
        raise InputError(rule, got=repr(saved), do="Somebody has changed it: remove the folder.")
    return load_student(folder, allow_code=True)


def described(folder: Path, *, allow_code: bool) -> Description:
    """As `describe`, but refuses a network of code outside the package unless that is allowed."""
    description = describe(folder)
    if catalog.is_code(description.spec) and not allow_code:
        raise InputError(
            f"The network in {folder} is built by code outside the package.",
            got=description.spec,
            do="If you trust it, pass allow_code=True (--allow-code).",
        )
    return description


def _check_size(description: Description, file: Path) -> None:
    """Refuses a description of a network that is far larger than its weights, before it takes any memory."""
    family = description.spec.partition(":")[0]
    if not file.is_file() or not (family in ("mlp", "vgg") or family in catalog.CATALOG):
        return  # another library may not build on a device without memory
    try:
        with torch.device("meta"):
            empty = catalog.build(description.spec, description.outputs, description.shape)
    except InputError:
        raise
    except Exception as error:  # of numbers that torch cannot take
        raise InputError(f"{file.parent / DESCRIPTION} must describe a network.", got=type(error).__name__) from error
    needed = sum(value.numel() * value.element_size() for value in empty.state_dict().values())
    if needed > 8 * file.stat().st_size:
        rule = f"{file} must hold the {needed:,} bytes of weights of {description.spec!r}."
        raise InputError(rule, got=f"{file.stat().st_size:,} bytes", do="It is damaged: copy it again.")


@dataclass(frozen=True)
class Weights:
    """A weights file, and the statistics its network was trained with where the file does not hold them."""

    path: Path
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def network(spec: str, data: Data, weights: Weights | None = None, *, allow_code: bool = False) -> nn.Module:
    """The trained network that a flag names: a run folder, or a model with weights from a file.

    Raises:
        InputError: there is no such model or folder, weights are missing, or the network does not fit the data.
    """
    if is_run(spec):
        if weights is not None:
            raise InputError("A run folder brings its own weights.", got=str(weights.path), do="Leave them out.")
        description = describe(Path(spec))
        if description.outputs != data.outputs or description.shape != tuple(data.shape):
            raise InputError(
                f"The network in {spec} must fit the data: inputs {tuple(data.shape)}, {data.outputs} outputs.",
                got=f"inputs {description.shape}, {description.outputs} outputs",
            )
        return load_student(spec, allow_code=allow_code)
    built = Description.of(spec, data).build()
    if weights is None:
        raise InputError(f"The network {spec!r} must have weights here.", do="Give a run folder, or a weights file.")
    load_weights(built, weights.path, mean=weights.mean, std=weights.std, allow_pickle=True)
    return built.eval()


def is_run(spec: str) -> bool:
    """Whether a flag names a folder rather than a model."""
    return os.path.isdir(spec) or (os.sep in spec and ":" not in spec)
