"""The teacher of a job: loaded from weights, or trained first and stored by fingerprint."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn

from jacmatch.datasets import Data
from jacmatch.datasets.files import cache_folder
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.inputs import code_of_model, inputs_of
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.train import Train
from jacmatch.models import catalog
from jacmatch.runs import CHECKPOINT, RESULT, Run
from jacmatch.runs.files import disk
from jacmatch.runs.folder import tidy
from jacmatch.runs.identity import Fingerprints, changed, digest_of
from jacmatch.runs.lock import LOCK, hold
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

    def for_seed(self, seed: int) -> nn.Module | Teacher:
        """Return the teacher of the students with this seed: the cached one, or the network."""
        return self.cached.get(seed, self.network)

    @property
    def answers(self) -> Teacher:
        """The network as a teacher; of values alone, if that is all it has."""
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
    """Return the teacher: from a run folder or a weights file, or trained by the recipe unless it is stored already."""
    trained = networks.brings_weights(spec) or weights is not None
    if trained or (catalog.is_code(spec) and catalog.function_of_batch(spec) is not None):
        return Prepared(networks.network(spec, data, weights, allow_code=allow_code), spec)
    folder, ranks = cached_folder(recipe, data), ProcessGroup.current()
    inputs = inputs_of(data, networks=(networks.Description.of(recipe.model, data),))
    ready = ranks.first and (folder / RESULT).is_file() and not (folder / LOCK).exists()
    if not ranks.broadcast(ready and not _damage(folder, recipe.model, inputs)):
        with _locked(folder, progress) if ranks.first else nullcontext():
            if ranks.first and (damage := _damage(folder, recipe.model, inputs)):
                aside = _put_aside(folder)
                progress.message(
                    f"The teacher in {folder} is trained again; what was there is in {aside.name}: {damage}"
                )
            if not ranks.broadcast((folder / RESULT).is_file()):
                replace(recipe, out=folder).train(data, progress)
            elif ranks.first:
                tidy(folder)
        ranks.barrier()
    return Prepared(networks.load_own(folder, recipe.model), str(folder.name))


def _damage(folder: Path, model: str, inputs: Mapping[str, Fingerprints]) -> str:
    """Return what is wrong with a stored or half-trained teacher; empty if it can be used or resumed."""
    if all(entry.name == LOCK for entry in folder.iterdir()):
        return ""
    try:
        run = Run.open(folder, finished=(folder / RESULT).is_file())
        for part, here in inputs.items():
            if difference := changed(run.inputs.get(part, {}), here):
                return f"its {part} has changed: {difference}."
        if run.finished:
            networks.load_own(folder, model)
        elif (folder / CHECKPOINT).is_file():
            load(folder / CHECKPOINT)
    except InputError as error:
        return str(error)
    return ""


def _put_aside(folder: Path) -> Path:
    """Move everything in a folder, except the lock of this process, to a folder beside it: nothing is deleted."""
    if folder.is_symlink():
        raise InputError(f"The kept teacher {folder} must be a folder.", got="a symbolic link", do="Remove the link.")
    with disk(folder):
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}-damaged-", dir=folder.parent))
        for entry in [entry for entry in folder.iterdir() if entry.name != LOCK]:
            entry.rename(aside / entry.name)
    return aside


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Lock a folder for this job within the block."""
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = hold(
        folder, wait=partial(progress.message, f"Another process trains the teacher in {folder}: waiting for it.")
    )
    try:
        yield
    finally:
        lock.release()
