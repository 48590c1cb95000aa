"""`jacmatch bench scale`: the cache as it grows."""

import contextlib
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from jacmatch_research.bench.answers import Answers
from jacmatch_research.bench.claims import Benchmark, Case, Claim, Measured
from jacmatch_research.bench.method import Conditions, compare, compare_memory

COST = Claim("cost per sample of a cache of 10⁶ entries ÷ one of 10³", must=1.2, aim=1.05)
RESIDENT = Claim("resident memory with a cache of 10⁶ entries ÷ one of 10³", must=1.2, aim=1.05)

_BATCH, _SHAPE, _OUTPUTS = 128, (4, 4), 10

_READ = """
from pathlib import Path
from jacmatch_research.bench.scale import answers
from jacmatch.teachers import CachedTeacher
given = answers(Path({folder!r}), {samples})
teacher = CachedTeacher(given.folder)
for number in range({batches}):
    teacher.answer(*given.asked(512, number))
"""


def answers(folder: Path, samples: int) -> Answers:
    """A small teacher and so many inputs, requested Jv: an entry is 128 bytes."""
    torch.manual_seed(0)
    return Answers(folder / str(samples), nn.Sequential(nn.Flatten(), nn.Linear(16, _OUTPUTS)), _SHAPE, samples, "Jv")


@contextlib.contextmanager
def _two_sizes(conditions: Conditions) -> Iterator[tuple[Path, int, int]]:
    """A folder with a cache of many entries and one of few."""
    many, few = (3000, 1000) if conditions.quick else (10**6, 10**3)
    with tempfile.TemporaryDirectory() as folder:
        for samples in (many, few):
            answers(Path(folder), samples).write()
        yield Path(folder), many, few


def cost(conditions: Conditions, mixed: bool) -> Measured:
    """Time to read batches of a large cache ÷ of a small one; the files are in the memory of the system."""
    batches = 2 if conditions.quick else 40
    with _two_sizes(conditions) as (folder, many, few):
        large, small = (answers(folder, samples).reader(_BATCH, batches, mixed=mixed) for samples in (many, few))
        times = compare(conditions, large, small, 21)
    microseconds = 1e6 * times.baseline_seconds / (batches * _BATCH)
    return Measured(times.spread, details={"batch": _BATCH, "microseconds_per_sample": round(microseconds, 2)})


def resident(conditions: Conditions) -> Measured:
    """Peak resident memory of a process that reads a million entries, of a large cache ÷ of a small one."""
    batches = 2 if conditions.quick else 2000
    with _two_sizes(conditions) as (folder, many, few):
        large, small = (_READ.format(folder=str(folder), samples=size, batches=batches) for size in (many, few))
        return Measured(compare_memory(conditions, large, small), details={"entries_read": 512 * batches})


SCALE = Benchmark(
    "the cache as it grows",
    (
        Case(COST, "samples in the order of training", partial(cost, mixed=False), devices=("cpu",)),
        Case(COST, "samples in random order", partial(cost, mixed=True), devices=("cpu",)),
        Case(RESIDENT, "samples in the order of training", resident, devices=("cpu",)),
    ),
)
