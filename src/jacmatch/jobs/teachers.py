"""The teacher of a job: loaded or trained first, checked against the data, and fitted to images of another size."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.datasets import Data
from jacmatch.datasets.files import cache_folder
from jacmatch.errors import InputError
from jacmatch.jacobian import output_tensor
from jacmatch.jacobian.modules import call, in_mode
from jacmatch.jobs import networks
from jacmatch.jobs.networks import Description, code_of_model, inputs_of
from jacmatch.jobs.settings import mixed
from jacmatch.jobs.study import Progress
from jacmatch.jobs.train import Train
from jacmatch.models import Resized, catalog
from jacmatch.models.catalog import IMAGENET_MEAN, IMAGENET_STD
from jacmatch.models.values import onnx
from jacmatch.runs import CHECKPOINT, RESULT, Run
from jacmatch.runs.files import LOCK, disk, hold
from jacmatch.runs.folder import tidy
from jacmatch.runs.identity import Fingerprints, changed, digest_of
from jacmatch.teachers import Teacher, as_teacher
from jacmatch.training.checkpoints import load
from jacmatch.training.distributed import ProcessGroup
from jacmatch.version import __version__


@dataclass(frozen=True)
class Prepared:
    """A teacher ready for queries."""

    network: nn.Module  # the trained network
    source: str  # its origin: a run folder, a model or the stored teacher
    # cached teachers that replace it, by the seed of the run
    cached: Mapping[int, Teacher] = field(default_factory=dict)

    @property
    def answers(self) -> Teacher:
        """The network as a teacher, with values only if it has no derivatives."""
        return as_teacher(self.network)


def cached_folder(recipe: Train, data: Data) -> Path:
    """Return the folder of the teacher that this recipe trains, named by data, architecture, code and all settings.

    `JACMATCH_CACHE` names the parent folder; by default it is `jacmatch` in the user's cache.
    """
    inputs = {"data": data.fingerprint, "version": __version__, **code_of_model(recipe.model)}
    fingerprint = digest_of({**recipe.settings(), **inputs})[:16]
    return cache_folder() / "teachers" / f"{recipe.model.replace(':', '-').replace('/', '-')[:80]}-{fingerprint}"


def prepare(
    spec: str, data: Data, weights: networks.Weights | None, recipe: Train, progress: Progress, *, allow_code: bool
) -> Prepared:
    """Return the teacher: from a run folder, a weights file or the cache, or trained first."""
    trained = networks.brings_weights(spec) or weights is not None
    if trained or (catalog.is_code(spec) and catalog.function_of_batch(spec) is not None):
        return Prepared(networks.network(spec, data, weights, allow_code=allow_code), spec)
    folder, ranks = cached_folder(recipe, data), ProcessGroup.current()
    inputs = inputs_of(data, networks=(networks.Description.of(recipe.model, data),))
    ready = ranks.first and (folder / RESULT).is_file() and not (folder / LOCK).exists()
    if not ranks.broadcast(ready and not _damage(folder, recipe, inputs)):
        with _locked(folder, progress) if ranks.first else nullcontext():
            if ranks.first and (damage := _damage(folder, recipe, inputs)):
                aside = _put_aside(folder)
                text = f"The teacher in {folder} is trained again; the old files are in {aside.name}: {damage}"
                progress.message(text)
            if not ranks.broadcast((folder / RESULT).is_file()):
                replace(recipe, out=folder).train(data, progress)
            elif ranks.first:
                tidy(folder)
        ranks.barrier()
    return Prepared(networks.load_own(folder, recipe.model), str(folder.name))


def _damage(folder: Path, recipe: Train, inputs: Mapping[str, Fingerprints]) -> str:
    """Return what is wrong with a stored or half-trained teacher; empty if it can be used or resumed."""
    if all(entry.name == LOCK for entry in folder.iterdir()):
        return ""
    try:
        run = Run.open(folder, finished=(folder / RESULT).is_file())
        for part, here in inputs.items():
            if difference := changed(run.inputs.get(part, {}), here):
                return f"its {part} has changed: {difference}."
        if run.finished:
            networks.load_own(folder, recipe.model)
        elif run.settings.get("data") != recipe.data:
            return f"it was started with --data {run.settings.get('data')}."  # the same data under another name
        elif (folder / CHECKPOINT).is_file():
            load(folder / CHECKPOINT)
    except InputError as error:
        return str(error)
    return ""


def _put_aside(folder: Path) -> Path:
    """Move everything in a folder, except the lock of this process, to a folder beside it: nothing is deleted."""
    if folder.is_symlink():
        raise InputError(f"The cached teacher {folder} must be a folder.", got="a symbolic link", do="Remove the link.")
    with disk(folder):
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}-damaged-", dir=folder.parent))
        for entry in [entry for entry in folder.iterdir() if entry.name != LOCK]:
            entry.rename(aside / entry.name)
    return aside


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Lock a folder for this job within the block."""
    with disk(folder, what="folder of cached teachers", flag="JACMATCH_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
    text = f"Another process trains the teacher in {folder}: waiting for it."
    lock = hold(folder, wait=partial(progress.message, text))
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Pretrained:
    """A frozen teacher, and the data needed to build its architecture again with other outputs."""

    network: nn.Module  # the network on images as the target has them
    description: Description  # how it is built, at its own image size
    shape: tuple[int, ...]  # shape of the target's images
    source: Data | None = None  # the data it was trained on, where they are known

    def with_outputs(self, outputs: int) -> nn.Module:
        """Return a copy to train further, with a new last layer, also where the teacher has as many outputs."""
        inner = self.network
        if isinstance(inner, Resized) and tuple(self.description.shape) != tuple(self.shape):
            inner = inner.network
        empty, _ = networks.adapted(inner, self.description, outputs)
        return _fitted(empty, self.description.shape, self.shape)


def trained_first(model: str, source: Data, recipe: Train, progress: Progress) -> Pretrained:
    """Train a teacher on the source classes, or return the cached one."""
    network = prepare(model, source, None, recipe, progress, allow_code=True).network
    return Pretrained(network, Description.of(model, source), tuple(source.shape), source)


def pretrained(
    spec: str, outputs: int, shape: tuple[int, ...], weights: networks.Weights, *, allow_code: bool = False
) -> Pretrained | None:
    """Return the teacher of a run folder, an ONNX file or a weights file; None if there are no weights."""
    if networks.is_run(spec):
        if weights.path is not None:
            raise InputError("A run folder already contains its weights.", got=str(weights.path))
        description = networks.describe(Path(spec))
        network = networks.load_student(spec, allow_code=allow_code)
        return Pretrained(_fitted(network, description.shape, shape).eval(), description, shape)
    if spec.startswith("onnx:"):
        values = onnx(spec.removeprefix("onnx:"), None, tuple(shape), weights.mean, weights.std)
        outputs = values(torch.zeros(1, *shape)).shape[1]
        return Pretrained(values, Description(spec, outputs, tuple(shape), (), ()), shape)
    if weights.path is None and not spec.startswith("hf:"):
        return None
    own = shape if weights.size is None else (shape[0], weights.size, weights.size)
    if (known := catalog.preprocessing(spec)) is not None and known.fixed and weights.size is None:
        own = (shape[0], known.size, known.size)
    known_outputs = None if spec.startswith("hf:") else outputs  # such a folder contains the number
    network, description = networks.with_weights(spec, known_outputs, own, replace(weights, size=0))
    return Pretrained(_fitted(network, own, shape), description, shape)


def _fitted(network: nn.Module, own: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
    """The network on images of this shape."""
    if tuple(own) == tuple(shape):
        return network
    if len(own) != 3 or len(shape) != 3 or own[0] != shape[0] or own[1] != own[2]:
        rule = f"The teacher's input must be images to which {shape} can be resized."
        raise InputError(rule, got=f"samples of shape {own}", do="Give images with the same number of channels.")
    return Resized(network, shape, own[1])


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode and without gradients."""
    with in_mode(network, training=False), torch.no_grad():
        yield


POINTS = 0.05
"""Accuracy that another preprocessing or order of classes must add before it is reported."""
_SAMPLES = 300


def check_teacher(
    network: nn.Module,
    data: Data,
    progress: Progress,
    *,
    who: str = "The teacher",
    remedy: str = "Give these as --teacher-mean and --teacher-std",
    smoke: bool = False,
    other_classes: bool = False,
) -> dict[str, Any]:
    """Measure an imported network on training samples, also with other preprocessing, and report a better one.

    Nothing is changed: the message says which flags to set. The accuracy of a network of `other_classes` is that of the
    nearest class mean among its outputs, where a difference must also exceed two standard errors.
    """
    if data.classes is None or data.positions:
        return {}
    split = mixed(data.train, 20 if smoke else _SAMPLES)
    x, y = split.inputs(), split.y.cpu()
    device = next((parameter.device for parameter in network.parameters()), x.device)
    own: Any = next((m for m in network.modules() if isinstance(getattr(m, "std", None), Tensor)), None)
    own_mean, own_std = (0.0, 1.0) if own is None else (own.mean.float(), own.std.float())
    measured: dict[str, float] = {}
    top = torch.zeros(0)
    for name, (mean, std) in _candidates(data).items():
        shape = (1, -1, *[1] * (x.dim() - 2))
        z = (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape) if mean else x.clone()
        if mean:  # undoes what the network does itself
            z = z.to(device) * own_std + own_mean
        with evaluating(network):
            outputs = torch.cat([output_tensor(call(network, part.to(device))).cpu() for part in torch.split(z, 100)])
        top = outputs.argmax(1) if not mean else top
        nearest = _nearest_mean(outputs, y, data.classes) if other_classes else outputs.argmax(1)
        measured[name] = float((nearest == y).double().mean())
        if not mean and measured[name] >= 1 - POINTS:
            return {"accuracy": measured[name]}
    here = measured.pop("as it is")
    best = max(measured, key=lambda name: measured[name])
    error = (2 * here * (1 - here) / len(y)) ** 0.5 if other_classes else 0.0
    least = here + max(POINTS, 2 * error)
    order, ordered = ([], 0.0) if other_classes else _best_order(top, y, data.outputs)
    kind = "separates the classes of" if other_classes else "is right on"
    begins = f"{who} {kind} {here:.1%} of {len(y)} training samples as it is, and"
    if measured[best] > least and measured[best] >= ordered:
        progress.message(f"{begins} with {best}: {measured[best]:.1%}. {remedy}.")
        return {"accuracy": here, "better": best, "better_accuracy": measured[best]}
    if ordered > least:
        pairs = ", ".join(f"{given} is {meant}" for given, meant in enumerate(order) if given != meant)
        progress.message(f"{begins} with its classes in another order: {ordered:.1%} (class {pairs}). Reorder them.")
        return {"accuracy": here, "better": "another order of classes", "better_accuracy": ordered}
    return {"accuracy": here}


def _nearest_mean(outputs: Tensor, y: Tensor, classes: int) -> Tensor:
    """Return the class of the nearest mean of outputs for each sample, which is left out of the mean of its class."""
    member = nn.functional.one_hot(y, classes).double()
    values, sums, counts = outputs.double(), member.T @ outputs.double(), member.sum(0)
    distances = torch.cdist(values, sums / counts.clamp_min(1)[:, None])
    distances[:, counts == 0] = torch.inf
    others = (sums[y] - values) / (counts[y] - 1).clamp_min(1)[:, None]
    apart = torch.where(counts[y] > 1, (values - others).norm(dim=1), torch.inf)
    return distances.scatter(1, y[:, None], apart[:, None]).argmin(1)


def _candidates(data: Data) -> Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Mean and standard deviation by name: those that are common, on inputs in [0, 1] or [0, 255]."""
    named: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
        "as it is": ((), ()),
        "mean 0, std 1": ((0.0,), (1.0,)),
        "mean 0.5, std 0.5": ((0.5,), (0.5,)),
        "mean 0, std 1/255 (inputs up to 255)": ((0.0,), (1 / 255,)),
        "mean and std of these data": (tuple(data.mean), tuple(data.std)),
    }
    if len(data.shape) == 3 and data.shape[0] == 3:
        named["mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (ImageNet)"] = (IMAGENET_MEAN, IMAGENET_STD)
    return named


def _best_order(top: Tensor, y: Tensor, classes: int) -> tuple[list[int], float]:
    """The class of the data for each output, one to one, with the largest accuracy, and that accuracy."""
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn, slow to import

    counts = torch.zeros(classes, classes).index_put_((top, y), torch.ones(len(y)), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return columns.tolist(), float(counts[rows, columns].sum() / len(y))
