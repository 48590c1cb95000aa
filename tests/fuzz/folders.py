"""Folders that jobs write: runs, checkpoints, caches. A fuzzer chooses a file of one and gives it other contents."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tests.teachers import cache_folders
from tests.training import cases

from jacmatch.cli import VERBS, flags, settings
from jacmatch.jobs import networks
from jacmatch.report import write_report
from jacmatch.runs import Run
from jacmatch.teachers import CachedTeacher
from jacmatch.training import Training, fit
from jacmatch.training.checkpoints import CHECKPOINT, save

KNOWN = flags.flags(VERBS["distill"].load())
_MADE: dict[str, Path] = {}


def made(name: str, make: Callable[[Path], object], near: Path) -> Path:
    """A folder that is made once; it lies beside the one that is emptied."""
    if name not in _MADE:
        _MADE[name] = near.parent / f"{near.name}-{name}"
        make(_MADE[name])
    return _MADE[name]


def trained(folder: Path) -> None:
    """A finished run of every kind of file."""
    data = folder.parent / f"{folder.name}.npz"
    x, y = np.random.default_rng(0).random((12, 1, 2, 2), dtype=np.float32), np.arange(12) % 2
    np.savez(data, x_train=x, y_train=y, x_test=1 - x, y_test=y)
    few = {"validation": 2, "per_class": 0, "steps": 3, "teacher_steps": 2, "seeds": 1, "methods": ("jacobians",)}
    VERBS["distill"].load()(data=f"npz:{data}", teacher="mlp:2", student="mlp:2", out=folder, **few).run()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".html", ".md", ".csv"))


def with_one_replaced(data: bytes, whole: Path, folder: Path) -> Path:
    """A copy of a folder, in which the first byte chooses the file that has the rest as its contents."""
    shutil.copytree(whole, folder / "copy")
    files = files_of(folder / "copy")
    files[(data[0] if data else 0) % len(files)].write_bytes(data[1:])
    return folder / "copy"


def each_file(whole: Path) -> list[bytes]:
    return [bytes([number]) + file.read_bytes() for number, file in enumerate(files_of(whole))]


def read_run(data: bytes, folder: Path) -> None:
    copy = with_one_replaced(data, made("run", trained, folder), folder)
    run = Run.open(copy)
    _ = run.result, run.environment, run.metrics()
    with_jacobians = copy / "seed0" / "jacobians"
    _ = Run.open(with_jacobians).result, Run.open(with_jacobians).metrics()
    settings.read(str(copy), "distill", KNOWN)
    networks.load_student(copy)
    write_report(copy)


def run_seeds(folder: Path) -> list[bytes]:
    return each_file(made("run", trained, folder))


_END = b"\njacmatch sha256 "


def read_checkpoint(data: bytes, folder: Path) -> None:
    run, body = cases.begin(folder / "run"), data[1:]
    if data[:1] == b"1":
        body += _END + hashlib.sha256(body).hexdigest().encode()
    (run.path / CHECKPOINT).write_bytes(body)
    fit(cases.Plain(), cases.points(), Training(steps=3, batch_size=8, ema=0.9), seed=0, run=run)


def checkpoint_seeds(folder: Path) -> list[bytes]:
    run = cases.begin(folder / "made")
    fit(cases.Plain(), cases.points(), Training(steps=3, batch_size=8, ema=0.9, max_steps=2), seed=0, run=run)
    whole = (run.path / CHECKPOINT).read_bytes()
    save(folder / "other.pt", {"step": 1})
    other = (folder / "other.pt").read_bytes()
    end = len(_END) + 64
    return [b"0" + whole, b"1" + whole[:-end], b"1" + other[:-end]]


def read_cache(data: bytes, folder: Path) -> None:
    """What is stored has the sums that its bytes have, unless the sums themselves are replaced."""
    copy = with_one_replaced(data, made("cache", cache_folders.make, folder), folder)
    for sums in copy.rglob("shard.json"):
        if files_of(copy)[(data[0] if data else 0) % len(files_of(copy))] != sums:
            shard_sums = json.loads(sums.read_bytes())
            for name, entry in shard_sums["fields"].items():
                content = (sums.parent / f"{name}.memmap").read_bytes()
                entry |= {"crc32": zlib.crc32(content), "sha256": hashlib.sha256(content).hexdigest()}
            sums.write_text(json.dumps(shard_sums))
    ids = torch.arange(3)
    teacher = CachedTeacher(copy)
    for view in range(2):
        question = cache_folders.Made(copy, None, "cotangents", []).question(view, ids)
        answer = teacher.answer(cache_folders.inputs(view)[ids], question)
        assert answer.products.shape == (2, 3, *cache_folders.SHAPE)


def cache_seeds(folder: Path) -> list[bytes]:
    return each_file(made("cache", cache_folders.make, folder))
