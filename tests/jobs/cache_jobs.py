"""Small jobs with a cache: images with classes, a convolutional teacher, and what a student becomes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from jacmatch.datasets import Data, Split
from jacmatch.jobs import Cache
from jacmatch.jobs.cache import folder_of, opened, queries_of
from jacmatch.jobs.settings import parts
from jacmatch.teachers.cached.writer import Queries, build, head_of, resolve_head
from jacmatch.training import fit

SETTINGS = {"steps": 5, "batch_size": 8, "per_class": 10, "validation": 0.0, "seeds": 1, "probe_law": "gaussian"}


def data(seed=0, pixel=0, label=0) -> Data:
    """Thirty images of three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (30, 1, 8, 8), generator=generator, dtype=torch.uint8)
    x[0, 0, 0, 0] += pixel
    y = torch.arange(30) % 3
    y[:3] = y[:3].roll(label)
    split = Split(x, y)
    return Data("images", split, split, 3, 3, (1, 8, 8), (0.5,), (0.3,))


def network(seed=0, width=6) -> nn.Module:
    """With BatchNorm, whose evaluation mode has other kernels where derivatives are taken."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(9 * width, 3),
    )
    with torch.no_grad():
        net[1].running_mean.uniform_(-0.3, 0.3)
        net[1].running_var.uniform_(0.2, 2.0)
    return net


def job(cache: Path, **changes) -> Cache:
    return Cache(action="build", cache=cache, **{**SETTINGS, **changes})


def source(cache_job: Cache, given: Data | None = None, teacher: nn.Module | None = None, seed: int = 0) -> Queries:
    return queries_of(cache_job, data() if given is None else given, network() if teacher is None else teacher, seed)


def built(cache_job: Cache, teacher: nn.Module | None = None, rank: int = 0, size: int = 1):
    """Builds the cache of a job; what the process did."""
    sources = [source(cache_job, teacher=teacher, seed=seed) for seed in cache_job.runs]
    pairs = [
        (
            each,
            resolve_head(
                folder_of(cache_job.root, each.seed), head_of(each, cache_job.store, cache_job.shard_megabytes, {})
            ),
        )
        for each in sources
    ]
    return build(pairs, cache_job.root, rank, size)


def trained(cache_job: Cache, method: str, cached: bool) -> list[Tensor]:
    """The weights of a student that the live teacher or the cache has taught."""
    teacher = opened(cache_job.root, source(cache_job)) if cached else network()
    student, given = network(5, 4), data()
    train, _ = parts(given, cache_job.validation, cache_job.samples_per_class(given), 0)
    objective = cache_job.objective(method, student, teacher, train, given, 0)
    fit(objective, train, cache_job.training(), seed=0)
    return list(student.state_dict().values())


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
