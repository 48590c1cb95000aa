"""A long run, and many runs, in one process: nothing grows."""

import gc
import os
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jacmatch.cli import main
from jacmatch.datasets import Split
from jacmatch.datasets.folders import load
from jacmatch.errors import InputError
from jacmatch.models import MLP
from jacmatch.objectives import AtMixedPairs, Distillation
from jacmatch.runs import Run
from jacmatch.training import Training, fit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_as_users_run")]
STEPS, RUNS, BLOCK, WARM = 20_000, 1_000, 1_000, 2


def images(count=256):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(x, torch.arange(count) % 10)


def objective():
    torch.manual_seed(0)
    student, teacher = (MLP(10, (1, 8, 8), hidden=(width,)) for width in (16, 32))
    return Distillation(student, teacher.eval(), point=AtMixedPairs(), seed=1)


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_twenty_thousand_steps(tmp_path):
    blocks, sizes, start = [], [], [time.process_time()]

    def on_step(step, metrics):
        if step % BLOCK == 0:
            gc.collect()
            sizes.append(resident())
            blocks.append((time.process_time() - start[0]) / BLOCK)
            start[0] = time.process_time()

    settings = Training(
        steps=STEPS, batch_size=32, augment=("crop", "flip"), ema=0.99, checkpoint_every=500, validate_every=500
    )
    run = Run.create(tmp_path / "run", "train", {}, "0")
    fit(objective(), images(), settings, seed=0, run=run, validation=images(64), on_step=on_step)
    growth = sizes[-1] / sizes[WARM - 1] - 1
    early, late = statistics.median(blocks[WARM : WARM + 4]), statistics.median(blocks[-4:])
    print(
        f"memory {sizes[WARM - 1] / 2**20:.1f} MiB, {growth:+.2%}; step {early * 1e3:.3f} ms, {late / early - 1:+.1%}"
    )
    assert abs(growth) < 0.02
    assert late / early < 1.10
    assert len(run.metrics()) == STEPS // 20 + 1  # and step 10, the first checkpoint


def resources():
    """Threads, open files, and temporary files of this process."""
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir(tempfile.gettempdir()))


def test_a_thousand_runs(tmp_path, monkeypatch):
    """In turn: finished, stopped by Ctrl-C, ended by an error, refused; half of them with images that threads read."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for split in ("train", "test"):
        for number in range(12):
            folder = tmp_path / "pictures" / split / str(number % 3)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(folder / f"{number}.png")
    splits = [images(40), load(str(tmp_path / "pictures"), 0).train]
    errors = (None, KeyboardInterrupt, ZeroDivisionError, partial(InputError, "refused"))
    settings = Training(steps=2, batch_size=8, resident_mib=0, checkpoint_every=1)

    def one(number):
        error = errors[number % 4]

        def on_step(step, metrics):
            if error is not None and step == 1:
                raise error()

        run = Run.create(tmp_path / "runs" / str(number), "evaluate", {}, "0")
        try:
            fit(objective(), splits[number % 8 // 4], settings, seed=number, run=run, on_step=on_step)
            run.write_result({"job": "evaluate", "version": "0", "seed": 0, "seconds": 0.0, "settings": {}})
        except (KeyboardInterrupt, ZeroDivisionError, InputError):
            assert error is not None

    for number in range(8):
        one(number)
    before, size = resources(), resident()
    for number in range(8, RUNS):
        one(number)
    print(f"threads, open files, temporary files: {before}, then {resources()}; memory {resident() / size - 1:+.1%}")
    assert resources() == before
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith(".")]
    assert len(list(tmp_path.glob("runs/*/result.json"))) == RUNS // 4


def test_a_hundred_thousand_small_files(tmp_path, monkeypatch):
    """Each picture is its own number in base 256, so that one that is lost, doubled or of another class shows."""
    count, per_folder = 100_000, 10_000
    for label in range(10):
        folder = tmp_path / "data" / "train" / f"{label}"
        folder.mkdir(parents=True)
        for number in range(label * per_folder, (label + 1) * per_folder):
            digits = [number >> 16, number >> 8 & 255, number & 255, label]
            Image.fromarray(np.array(digits, np.uint8).reshape(2, 2)).save(folder / f"{number:06d}.png")
    handles = len(os.listdir("/proc/self/fd"))
    monkeypatch.chdir(tmp_path)
    from jacmatch import datasets

    for kind in ("folder", "stream"):
        start = time.perf_counter()
        data = datasets.load(f"{kind}:data", 0)
        seen = torch.zeros(count, dtype=torch.int64)
        for split in (data.train, data.test):
            for rows in torch.split(torch.arange(len(split)), 4096):
                pixels = split.stored(rows).flatten(1).long()
                numbers = pixels[:, 0] * 65536 + pixels[:, 1] * 256 + pixels[:, 2]
                seen.index_add_(0, numbers, torch.ones_like(numbers))
                assert torch.equal(split.y[rows], numbers // per_folder)
                assert torch.equal(pixels[:, 3], numbers // per_folder)
        assert torch.equal(seen, torch.ones(count, dtype=torch.int64))
        print(f"{kind}: {time.perf_counter() - start:.1f} s")
    words = "train --data stream:data --model mlp:8 --steps 200 --validation 0 --validate-every 1000 --resident-mib 0"
    assert main([*words.split(), "--out", "run", "--max-steps", "100"]) == 0
    assert main([*words.split(), "--out", "run"]) == 0
    assert len(os.listdir("/proc/self/fd")) == handles
