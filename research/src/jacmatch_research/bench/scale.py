"""`jacmatch bench scale`: caches and streamed data as they grow, and two processes instead of one."""

import contextlib
import io
import os
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from jacmatch.cli.launch import python
from jacmatch.training.distributed import STORE
from jacmatch_research.bench.cache import Answers
from jacmatch_research.bench.claims import (
    Benchmark,
    Case,
    Claim,
    Conditions,
    Measured,
    NotMeasured,
    Spread,
    compare,
    compare_memory,
)
from jacmatch_research.bench.loop import add_member

COST = Claim("cost per sample of a cache of 10⁶ entries ÷ one of 10³", must=1.2, aim=1.05)
RESIDENT = Claim("resident memory with a cache of 10⁶ entries ÷ one of 10³", must=1.2, aim=1.05)
PROCESSES = Claim("samples/s of two processes ÷ twice those of one", must=0.8, aim=0.95, better="higher")
STREAM = Claim("resident memory of training on 10⁵ streamed images ÷ on 10³", must=1.2, aim=1.05)

PAIR = "VGG-9 → VGG-4, 28×28"
_BATCH, _SHAPE, _OUTPUTS = 128, (4, 4), 10

_READ = """
from pathlib import Path
from jacmatch_research.bench.scale import answers
from jacmatch.teachers import CachedTeacher
given = answers(Path({folder!r}), {samples})
teacher = CachedTeacher(given.folder)
for number in range({batches}):
    teacher.answer(*given.query_of(512, number))
"""
_STREAMED = """
import torch
from jacmatch.datasets import load
from jacmatch.models import build
from jacmatch.objectives import Distillation
from jacmatch.training import Training, fit
split = load("wds:{folder}@8").train
settings = Training(steps={steps}, batch_size=64, resident_mib=0, validate_every=10**9)
fit(Distillation(build("cnn3", 10, (3, 8, 8))), split, settings, seed=0)
"""
_STEPS = """
import os, time, torch
torch.set_num_threads(1)
from jacmatch.datasets import Split
from jacmatch.training import Training, fit
from jacmatch.training.distributed import joined
from jacmatch_research.bench.claims import Conditions
from jacmatch_research.bench.step import Pair
pair = Pair.of(Conditions(quick={quick}), {pair!r})
objective = pair.objective("row", "frozen", cached={cached})
data = Split(pair.x.repeat({world}, 1, 1, 1), pair.y.repeat({world}))
settings = Training(steps={steps} + 2, batch_size=len(data), doctor=False, validate_every=10**9)
stamps = []
with joined("cpu"):
    fit(objective, data, settings, seed=0, on_step=lambda *_: stamps.append((time.perf_counter(), time.process_time())))
print(*((last - first) / {steps} for last, first in zip(stamps[-1], stamps[1])), flush=True)
os._exit(0)  # threads of gloo can abort a process in which the interpreter shuts down
"""


def answers(folder: Path, samples: int) -> Answers:
    """A small teacher, `samples` inputs, and queries for Jv; an entry has 128 bytes."""
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
    """Time to read batches of a large cache ÷ time of a small one; the files are in the page cache."""
    batches = 2 if conditions.quick else 40
    with _two_sizes(conditions) as (folder, many, few):
        large, small = (answers(folder, samples).reader(_BATCH, batches, mixed=mixed) for samples in (many, few))
        times = compare(conditions, large, small, 21)
    microseconds = 1e6 * times.baseline_seconds / (batches * _BATCH)
    return Measured(times.spread, details={"batch": _BATCH, "microseconds_per_sample": round(microseconds, 2)})


def resident(conditions: Conditions) -> Measured:
    """Peak resident memory of a process that reads a million entries of a large cache ÷ that of a small cache."""
    batches = 2 if conditions.quick else 2000
    with _two_sizes(conditions) as (folder, many, few):
        large, small = (_READ.format(folder=str(folder), samples=size, batches=batches) for size in (many, few))
        return Measured(compare_memory(conditions, large, small), details={"entries_read": 512 * batches})


def streamed(conditions: Conditions) -> Measured:
    """Peak resident memory of 200 steps on many streamed images in a tar file ÷ that on few images."""
    many, few, steps = (300, 100, 1) if conditions.quick else (10**5, 10**3, 200)
    with tempfile.TemporaryDirectory() as folder:
        for count in (many, few):
            _write_tar(Path(folder) / str(count), count)
        large, small = (_STREAMED.format(folder=f"{folder}/{count}", steps=steps) for count in (many, few))
        return Measured(compare_memory(conditions, large, small), details={"images": many, "steps": steps})


def _write_tar(folder: Path, count: int) -> None:
    """Write `count` small PNG files, a hundred of them distinct, and two for the test, in the layout of WebDataset."""
    try:
        from PIL import Image
    except ImportError as error:
        raise NotMeasured("Pillow is not installed") from error
    random, files = np.random.RandomState(0), []
    for _ in range(100):
        file = io.BytesIO()
        Image.fromarray(random.randint(0, 256, (8, 8, 3)).astype(np.uint8)).save(file, "png")
        files.append(file.getvalue())
    folder.mkdir()
    for part, number in (("train", count), ("test", 2)):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for index in range(number):
                for suffix, content in (("png", files[index % 100]), ("cls", str(index % 10).encode())):
                    add_member(tar, f"{index:06}.{suffix}", content)


def processes(conditions: Conditions, pair: str, cached: bool) -> Measured:
    """Samples per second of two processes that train one student (gloo) ÷ twice those of one process."""
    steps, rounds = (1, 1) if conditions.quick else (10, 7)
    given = {"quick": conditions.quick, "pair": pair, "cached": cached, "steps": steps}
    seconds = [[_seconds(_STEPS.format(world=world, **given), world) for world in (1, 2)] for _ in range(rounds)]
    medians = {
        f"{clock}_of_{name}": float(f"{statistics.median(each[number][clock_number] for each in seconds):.4g}")
        for clock_number, clock in enumerate(("seconds", "processor_seconds"))
        for number, name in enumerate(("one", "two"))
    }
    return Measured(Spread.of([one[0] / two[0] for one, two in seconds]), details=medians)


def _seconds(program: str, world: int) -> tuple[float, float]:
    """Return the seconds of a step with this number of processes, those of the slowest, and its processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            **os.environ,
            STORE: f"{folder}/store",
            "WORLD_SIZE": str(world),
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        started = [
            subprocess.Popen(
                python(program, "-W", "ignore"),
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        printed = [process.communicate()[0] for process in started]
    failed = [process.returncode for process in started if process.returncode]
    if failed:
        raise RuntimeError(f"A process of the benchmark ended with the code {failed[0]}.")
    wall, processor = zip(*(map(float, text.split()[-2:]) for text in printed), strict=True)
    return max(wall), max(processor)


SCALE = Benchmark(
    "caches and streamed data as they grow, and two processes instead of one",
    (
        Case(COST, "samples in the order of training", partial(cost, mixed=False), devices=("cpu",)),
        Case(COST, "samples in random order", partial(cost, mixed=True), devices=("cpu",)),
        Case(RESIDENT, "samples in the order of training", resident, devices=("cpu",)),
        Case(STREAM, "a tar file of images of 8×8", streamed, devices=("cpu",)),
        *(
            Case(PROCESSES, f"{PAIR}, {name}", partial(processes, pair=PAIR, cached=cached), devices=("cpu",))
            for name, cached in (("row, live teacher", False), ("row, cached teacher", True))
        ),
    ),
)
