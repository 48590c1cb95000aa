"""The teacher of a job: loaded where there are weights, else trained first and kept by fingerprint."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn

from jacmatch.datasets import Data
from jacmatch.datasets.files import cache_folder
from jacmatch.recipes import networks
from jacmatch.recipes.progress import Progress
from jacmatch.recipes.train import Train
from jacmatch.runs import RESULT
from jacmatch.runs.files import disk
from jacmatch.runs.folder import tidy
from jacmatch.runs.lock import LOCK, hold
from jacmatch.teachers import Teacher
from jacmatch.training.distributed import Ranks
from jacmatch.version import __version__


@dataclass(frozen=True)
class Prepared:
    """A teacher ready to be asked.

    Attributes:
        network: The trained network.
        source: Where it came from.
        cached: What answers in its place, by the seed of the run.
    """

    network: nn.Module
    source: str
    cached: Mapping[int, Teacher] = field(default_factory=dict)

    def asked(self, seed: int) -> nn.Module | Teacher:
        """Who is asked in the run with this seed."""
        return self.cached.get(seed, self.network)


def kept_folder(recipe: Train, data: Data) -> Path:
    """Where the teacher that this recipe trains is kept: named by data, architecture and all settings.

    `JACMATCH_CACHE` names the folder; else it is `jacmatch` in the user's cache.
    """
    identity = json.dumps({**recipe.settings(), "data": data.fingerprint, "version": __version__}, sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_folder() / "teachers" / f"{recipe.model.replace(':', '-').replace('/', '-')[:80]}-{fingerprint}"


def prepare(
    spec: str, data: Data, weights: networks.Weights | None, recipe: Train, progress: Progress, *, allow_code: bool
) -> Prepared:
    """The teacher: from a run folder or a weights file, or trained by the recipe if it has not been before."""
    if networks.is_run(spec) or weights is not None:
        return Prepared(networks.network(spec, data, weights, allow_code=allow_code), spec)
    folder, ranks = kept_folder(recipe, data), Ranks.here()
    if not ranks.told((folder / RESULT).is_file() and not (folder / LOCK).exists()):
        with _held(folder, progress) if ranks.first else nullcontext():
            if not ranks.told((folder / RESULT).is_file()):
                replace(recipe, out=folder).train(data, progress)
            elif ranks.first:
                tidy(folder)
        ranks.wait()
    return Prepared(networks.load_own(folder, recipe.model), str(folder.name))


@contextmanager
def _held(folder: Path, progress: Progress) -> Iterator[None]:
    """The folder belongs to this job within the block."""
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = hold(folder, wait=partial(progress.say, f"Another process trains the teacher in {folder}: waiting for it."))
    try:
        yield
    finally:
        lock.release()
