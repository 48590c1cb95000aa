"""`jacmatch bench loop`: the overhead of the training loop and of data on disk, relative to a bare step."""

import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jacmatch.datasets import Split, Streamed, load
from jacmatch.datasets.shards import Shards, make_index
from jacmatch.jacobian import RandomOutputs
from jacmatch.models import build
from jacmatch.objectives import Distillation
from jacmatch.runs import Run
from jacmatch.training import Training, fit
from jacmatch.training.data import Batch, Batches
from jacmatch.version import __version__
from jacmatch_research.bench import rivals
from jacmatch_research.bench.claims import Benchmark, Case, Claim, Conditions, Measured, NotMeasured, Spread, timed

OVERHEAD = Claim("step of the training loop ÷ the same objective in a bare loop, batches made before")
LOGGING = Claim("step of a loop that logs to a run folder ÷ of one without")
STREAMED = Claim("step on images decoded from disk ÷ on images in memory")

PAIRS = {
    "cnn5 → cnn3, 8×8, batch 128": ("cnn5", "cnn3", (1, 8, 8), 128, 40),
    "VGG-9 → VGG-4, 28×28, batch 64": ("vgg9", "vgg4", (1, 28, 28), 64, 4),
}
SIDE, STORED, IMAGES = 32, 128, 256
STUDENTS = {"ResNet-20, batch 32": ("resnet20", 32, 4), "cnn3, batch 32": ("cnn3", 32, 24)}
_ROUNDS = 9
Seconds = Callable[[], float]


def overhead(conditions: Conditions, pair: str, jacobians: float) -> Measured:
    """A step of `fit` ÷ a step of the same objective in a bare loop, without and with one row of the Jacobian."""
    objective, split, batch, steps = _job(conditions, pair, jacobians)
    prepared = Batches(split, batch, seed=0, device=conditions.device)
    batches = [prepared(number) for number in range(4)]
    step = rivals.stepper(objective.student, lambda one: _loss(objective, one))
    return _compared(
        conditions,
        lambda: _loop_seconds(conditions, objective, split, batch, steps),
        lambda: timed(conditions, lambda: [step(batches[number % 4]) for number in range(steps)]) / steps,
    )


def logging(conditions: Conditions, pair: str) -> Measured:
    """Time of a step of a loop that writes `metrics.jsonl` ÷ time without it."""
    objective, split, batch, steps = _job(conditions, pair, 0.0)
    steps = steps if conditions.quick else max(steps, 20)  # a row is logged each 20 steps

    def with_folder() -> float:
        with tempfile.TemporaryDirectory() as folder:
            run = Run.create(Path(folder) / "run", "train", {}, __version__)
            return _loop_seconds(conditions, objective, split, batch, steps, run)

    return _compared(conditions, with_folder, lambda: _loop_seconds(conditions, objective, split, batch, steps))


def streaming(conditions: Conditions, student: str, source: str, workers: int) -> Measured:
    """Time of steps on JPEG files, in a folder or a tar file, decoded by threads ÷ time on images in memory."""
    name, size, steps = STUDENTS[student]
    if conditions.quick:
        name, size, steps = "cnn3", 4, 2
    network = build(name, 2, (3, SIDE, SIDE)).to(conditions.device)
    objective = Distillation(network)
    step = rivals.stepper(network, lambda one: _loss(objective, one))
    waits: list[float] = []
    with _pictures(source, 4 * size if conditions.quick else IMAGES) as on_disk:
        inside = Split(on_disk.stored(), on_disk.y)

        def seconds(split: Split, waited: list[float] | None) -> float:
            reading = Batches(
                split, size, seed=0, device=conditions.device, workers=workers, prefetch=2, resident_bytes=0
            )
            with closing(reading) as batches:
                step(batches(0))  # threads have begun
                spent: list[float] = []
                waiting = replace(conditions, clock=time.perf_counter)  # for threads, which take processor time as well
                whole = timed(waiting, partial(_timed_steps, step, batches, steps, spent))
            if waited is not None:
                waited.append(sum(spent) / whole)
            return whole / steps

        measured = _compared(conditions, lambda: seconds(on_disk, waits), lambda: seconds(inside, None))
    details = {**measured.details, "share_waited_for_data": round(sorted(waits)[len(waits) // 2], 3)}
    return Measured(measured.spread, details={key: details[key] for key in details if key != "added_microseconds"})


def _timed_steps(step: Callable[..., None], batches: Batches, steps: int, spent: list[float]) -> None:
    """Run steps, and append the seconds that the loop waited for each batch to `spent`."""
    for number in range(1, steps + 1):
        start = time.perf_counter()
        batch = batches(number)
        spent.append(time.perf_counter() - start)
        step(batch)


def _job(conditions: Conditions, pair: str, jacobians: float) -> tuple[Distillation, Split, int, int]:
    """Objective, data, batch and timed steps of a pair."""
    teacher, student, shape, batch, steps = PAIRS[pair]
    if conditions.quick:
        teacher, student, batch, steps = "cnn5", "cnn3", 4, 2
    networks = [build(name, 10, shape).to(conditions.device) for name in (student, teacher)]
    # Measuring the gradient shares is a separate cost: a few backward passes in every `measure_every` steps.
    objective = Distillation(*networks, jacobians=jacobians, probe=RandomOutputs(1), measure_every=10**9)
    split = Split(torch.rand(8 * batch, *shape), torch.arange(8 * batch) % 10)
    return objective.train(), split.to(conditions.device), batch, steps


def _loss(objective: Distillation, batch: Batch) -> Tensor:
    loss: Tensor = objective(batch.x, batch.y, ids=batch.ids, draw=batch.view)["loss"]
    return loss


def _loop_seconds(
    conditions: Conditions, objective: Distillation, split: Split, batch: int, steps: int, run: Run | None = None
) -> float:
    """Return the seconds of a step of the loop, without checkpoints (with a run folder, at step 10 and at the end)."""
    stamps: list[float] = []
    first = 1 if run is None else 10
    last = first + steps

    def on_step(step: int, _: dict[str, float]) -> None:
        if step in (first, last):
            conditions.wait()
            stamps.append(conditions.now())

    settings = Training(steps=last + 1, batch_size=batch, validate_every=10**9, checkpoint_every=10**9)
    fit(objective, split, settings, seed=0, device=conditions.device, run=run, on_step=on_step)
    return (stamps[1] - stamps[0]) / steps


def _compared(conditions: Conditions, contestant: Seconds, baseline: Seconds) -> Measured:
    """Return the ratio of the seconds of two methods, which alternate, and the difference."""
    contestant(), baseline()
    pairs = []
    for number in range(conditions.rounds(_ROUNDS)):
        order = (contestant, baseline) if number % 2 else (baseline, contestant)
        seconds = {run: run() for run in order}
        pairs.append((seconds[contestant], seconds[baseline]))
    added = sorted(own - other for own, other in pairs)[len(pairs) // 2]
    middle = sorted(other for _, other in pairs)[len(pairs) // 2]
    details = {"baseline_seconds": float(f"{middle:.4g}"), "added_microseconds": round(added * 1e6)}
    return Measured(Spread.of([own / other for own, other in pairs]), details=details)


@contextmanager
def _pictures(source: str, count: int) -> Iterator[Split]:
    """A split of JPEG files of 128 × 128 pixels, to be resized to 32 × 32, in a folder or in a tar."""
    try:
        from PIL import Image
    except ImportError as error:
        raise NotMeasured("Pillow is not installed") from error
    random = np.random.RandomState(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, number in (("train", count), ("test", 2)):
            for index in range(number):
                coarse = Image.fromarray(random.randint(0, 256, (16, 16, 3)).astype(np.uint8))
                path = folder / part / "ab"[index % 2] / f"{index:05}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                coarse.resize((STORED, STORED), Image.Resampling.BICUBIC).save(path, quality=90)
        split = load(f"stream:{folder}@{SIDE}").train
        yield _in_a_tar(split, folder) if source == "tar" else split


def _in_a_tar(split: Split, folder: Path) -> Split:
    """The same images as members of one tar file."""
    assert isinstance(split.x, Streamed)
    path = folder / "all.tar"
    with tarfile.open(path, "w") as tar:
        for row in split.x.rows.tolist():
            key = split.x.source.name(row).removesuffix(".jpg")
            add_member(tar, f"{key}.jpg", split.x.source.read(row))
            add_member(tar, f"{key}.cls", str(int(split.y[row])).encode())
    source = Shards(folder, [path], [make_index(path)], np.zeros(1, dtype=np.int64))
    return Split(replace(split.x, source=source, rows=np.arange(len(split))), split.y)


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Write a file with this content into a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _cases() -> Iterator[Case]:
    for pair in PAIRS:
        for label, jacobians in (("plain", 0.0), ("one row", 1.0)):
            yield Case(OVERHEAD, f"{pair}, {label}", partial(overhead, pair=pair, jacobians=jacobians))
    smallest = next(iter(PAIRS))
    yield Case(LOGGING, f"{smallest}, plain", partial(logging, pair=smallest))
    for student in STUDENTS:
        for source, workers in (("folder", 0), ("folder", 1), ("folder", 2), ("tar", 2)):
            threads = "no thread" if not workers else f"{workers} thread{'s' if workers > 1 else ''}"
            measure = partial(streaming, student=student, source=source, workers=workers)
            yield Case(STREAMED, f"{student}, {source}, {threads}", measure)


LOOP = Benchmark("what the training loop adds to its steps, and what data on disk cost", tuple(_cases()))
