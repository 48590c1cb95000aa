"""Links, pipes and folders under the names that a job uses: it refuses or works, and nothing outside changes.

Outside lies a folder of files that are nobody's to touch; its names, contents and modes are compared before and after.
What it says is found nowhere in the folder of the run either.
"""

import os
import shutil
import stat

import numpy as np
import pytest
import torch
from tests.teachers import cache_folders
from torch import nn

from jacmatch.cli import main
from jacmatch.datasets import shards
from jacmatch.errors import InputError
from jacmatch.files import append, inside, open_regular, read, replace
from jacmatch.jobs import export
from jacmatch.jobs.surrogate import points as points_module
from jacmatch.models import load_weights, save_weights
from jacmatch.report import write_report
from jacmatch.runs import Run
from jacmatch.runs.files import hold, load, try_lock
from jacmatch.teachers import CachedTeacher
from jacmatch.teachers.cached.format import write_whole as write_of_cache
from jacmatch.teachers.cached.writer import Claims, build, resolve_head, write_shard
from jacmatch.training import checkpoints
from jacmatch_research.reproduce import command

pytestmark = [
    pytest.mark.usefixtures("all_as_users_run"),
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes"),
]
SECRET = b'{"step": 0, "secret": "my only copy"}\n'


@pytest.fixture
def outside(tmp_path):
    """Files of the user; on leaving they are as they were, and nothing is beside them."""
    folder = tmp_path / "outside"
    (folder / "below").mkdir(parents=True)
    (folder / "file").write_bytes(SECRET)
    (folder / "below" / "file").write_bytes(SECRET)
    (folder / "below" / ".file.1.jacmatch-part").write_bytes(SECRET)
    checkpoints.save(folder / "checkpoint", {"secret": "my only copy"})

    def state():
        paths = (folder, *folder.rglob("*"))
        return {path: (stat.S_IMODE(path.stat().st_mode), path.is_file() and path.read_bytes()) for path in paths}

    before = state()
    yield folder
    assert state() == before


def plant(kind, name, outside):
    """Puts something hostile under a name."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if name.is_dir() and not name.is_symlink():
        for path in sorted(name.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        name.rmdir()
    name.unlink(missing_ok=True)
    {
        "link": lambda: name.symlink_to(outside / "file"),
        "relative link": lambda: name.symlink_to(os.path.relpath(outside / "file", name.parent)),
        "link to a checkpoint": lambda: name.symlink_to(outside / "checkpoint"),
        "link to nothing": lambda: name.symlink_to(outside / "new"),
        "link to a folder": lambda: name.symlink_to(outside / "below"),
        "link to itself": lambda: name.symlink_to(name.name),
        "hard link": lambda: os.link(outside / "file", name),
        "pipe": lambda: os.mkfifo(name),
        "folder": name.mkdir,
        "device": lambda: name.symlink_to("/dev/zero"),
    }[kind]()


FEW = ("link", "hard link", "pipe")
KINDS = (
    *FEW,
    *("relative link", "link to a checkpoint", "link to nothing", "link to a folder", "link to itself"),
    *("folder", "device"),
)
MANY = [pytest.param(kind, marks=() if kind in FEW else pytest.mark.ci) for kind in KINDS]
"""Three kinds in every run of the tests, the others in CI."""


def attempt(*steps):
    """Does what it can of a job; each step may be refused, in one line."""
    messages = []
    for step in steps:
        try:
            step()
        except InputError as error:
            messages.append(str(error))
    assert all("\n" not in each and len(each) < 1000 for each in messages)


def without_secret(folder, kind):
    """What lies outside was not read into the folder. What a hard link stands for lies in it already."""
    if kind == "hard link":
        return
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert b"my only copy" not in path.read_bytes(), path


NAMES = (
    *("settings.json", "environment.json", "metrics.jsonl", "result.json", "checkpoint.pt", ".lock"),
    *("network.json", "student.safetensors", "doctor.json", "report.html", ".report.html.1.jacmatch-part"),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MANY)
def test_a_run_folder(name, kind, outside, tmp_path):
    folder = tmp_path / "run"
    first = Run.create(folder, "evaluate", {"lr": 0.1}, "1")
    first.log({"step": 1})
    first.lock.release()
    plant(kind, folder / name, outside)
    runs = []
    attempt(lambda: runs.append(Run.create(folder, "evaluate", {"lr": 0.1}, "1")))
    run = runs[0] if runs else first  # also what a job would do that had passed the door
    result = {"job": "evaluate", "version": "1", "seed": 0, "seconds": 1.0, "settings": {"lr": 0.1}}
    attempt(
        lambda: hold(folder).release(),
        lambda: run.metrics(),
        lambda: checkpoints.load(folder / "checkpoint.pt") and pytest.fail("another's checkpoint"),
        lambda: load_weights(nn.Linear(1, 1), folder / "student.safetensors"),
        lambda: run.log({"step": 2}),
        lambda: run.rewind(1),
        lambda: checkpoints.save(folder / "checkpoint.pt", {"step": 1}),
        lambda: save_weights(nn.Linear(1, 1), folder / "student.safetensors"),
        lambda: run.write_json("doctor.json", {}),
        lambda: run.write_json("network.json", {}),
        lambda: run.write_bytes("report.html", b"page"),
        lambda: run.environment,
        lambda: Run.open(folder, finished=False),
        lambda: run.write_result(result),
        lambda: write_report(folder),
    )
    without_secret(folder, kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "link" in kind])
def test_the_message_says_what_it_is_and_what_to_do(kind, outside, tmp_path):
    folder = tmp_path / "run"
    Run.create(folder, "evaluate", {}, "1").lock.release()
    plant(kind, folder / ".lock", outside)
    rule = r"\.lock must (lie in|be a regular file)\b.* (link|folder)\b.* (Copy|Remove|Replace) "
    with pytest.raises(InputError, match=rule):
        Run.create(folder, "evaluate", {}, "1")


def test_rows_of_a_copy_made_of_hard_links_belong_to_the_copy(tmp_path):
    run = Run.create(tmp_path / "run", "evaluate", {}, "1")
    run.log({"step": 1})
    run.lock.release()
    (tmp_path / "copy").mkdir()
    for name in ("settings.json", "environment.json", "metrics.jsonl"):
        os.link(tmp_path / "run" / name, tmp_path / "copy" / name)
    copy = Run.create(tmp_path / "copy", "evaluate", {}, "1")
    copy.log({"step": 2})
    assert (run.metrics(), copy.metrics()) == ([{"step": 1}], [{"step": 1}, {"step": 2}])


@pytest.mark.parametrize("name", ["seed0", "seed0/labels", "seed0/labels/settings.json", "seed0/labels/metrics.jsonl"])
@pytest.mark.parametrize("kind", MANY)
def test_a_run_inside_a_run(name, kind, outside, tmp_path):
    run = Run.create(tmp_path / "run", "distill", {}, "1")
    run.child("seed0/labels").log({"step": 1})
    plant(kind, run.path / name, outside)
    child = []
    attempt(lambda: child.append(run.child("seed0/labels")))
    for each in child:
        attempt(lambda each=each: each.log({"step": 2}), lambda each=each: each.write_json("doctor.json", {}))
    without_secret(run.path, kind)


@pytest.mark.parametrize(
    "name",
    [
        *("cache.json", "view-00001", "view-00001/places.memmap", "view-00001/shard-00000", ".claim", ".claim-00000"),
        *("view-00001/shard-00000/shard.json", "view-00001/shard-00000/outputs.memmap"),
        *(".cache.json.1.jacmatch-part", "view-00001/.shard-00000.1.jacmatch-part"),
    ],
)
@pytest.mark.ci
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache(name, kind, outside, tmp_path):
    folder = tmp_path / "cache"
    made = cache_folders.make(folder)
    plant(kind, folder / name, outside)
    head = made_head(folder, tmp_path)
    shard = {"ids": torch.arange(2), "outputs": torch.zeros(2, 4)}

    def claim():
        with Claims(folder).on(0):
            pass

    def answer():
        CachedTeacher(folder).answer(cache_folders.inputs(1)[:2], made.question(1, torch.arange(2)))

    attempt(
        answer,
        lambda: resolve_head(folder, head),
        claim,
        lambda: write_of_cache(folder, "view-00001/places.memmap", b"places"),
        lambda: write_shard(folder, "view-00001/shard-00000", shard),
        lambda: build([], folder, None),
    )
    without_secret(folder, kind)


def made_head(folder, tmp_path):
    """The head of the same cache, of a folder that nobody has touched."""
    from jacmatch.teachers.cached.format import read_head

    cache_folders.make(tmp_path / "whole")
    return read_head(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_points_of_a_surrogate_cells_of_an_experiment_and_files_of_a_job(kind, outside, tmp_path):
    run = Run.create(tmp_path / "run", "reproduce", {}, "1")
    for name in ("points-test.npz", "student.onnx", "inputs.json", "engine.json", "cells/a", "results.json"):
        plant(kind, run.path / name, outside)
    points = points_module.Samples(torch.rand(3, 2).double(), torch.rand(3, 1).double(), None)
    attempt(
        lambda: points_module.cached(run, "points-test", lambda: points),
        lambda: load(run.path / "inputs.json"),
        lambda: load(run.path / "engine.json"),
        lambda: command._stored(run, []),
        lambda: run.write_json("results.json", {}),
        lambda: export.write_whole(run.path, export.ONNX, b"onnx"),
    )
    without_secret(run.path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_of_a_tar_file(kind, outside, tmp_path):
    """It lies in the user's own cache; a link there is replaced, and nothing is written through it."""
    index = shards.TarIndex(shards.Names.of(["a"]), *(np.ones(1, np.int64) for _ in range(3)))
    stored = tmp_path / "indices" / "0123.npz"
    plant(kind, stored, outside)
    plant(kind, stored.with_name(".0123.npz.1.jacmatch-part"), outside)
    attempt(lambda: shards._save(stored, index), lambda: shards._load(stored, 10))
    without_secret(stored.parent, kind)


@pytest.mark.parametrize("verb", ["train --resume", "evaluate", "report", "doctor", "train --config"])
@pytest.mark.parametrize("name", ["settings.json", "result.json", "network.json", "student.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.ci
def test_a_command(verb, name, kind, trained, outside, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    plant(kind, tmp_path / "run" / name, outside)
    data = f"--data npz:{trained.parent}/data.npz"
    more = f"{data} --out out" if verb in ("evaluate", "doctor") else ""
    code = main(f"{verb} run {more}".split())
    printed = capsys.readouterr()
    assert code in (0, 2)
    assert len(printed.err.splitlines()) == (1 if code else 0)
    assert "my only copy" not in printed.out + printed.err
    without_secret(tmp_path / "run", kind)


# The module itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_its_own_is_refused_or_replaced(kind, outside, tmp_path):
    folder = tmp_path / "theirs"
    file = folder / "name"
    plant(kind, file, outside)
    for refused in (
        lambda: open_regular(file, os.O_WRONLY | os.O_CREAT, single=True),
        lambda: append(file, b"more"),
        lambda: try_lock(file),
    ):
        with pytest.raises(InputError, match="must be a regular file"):
            refused()
    if kind == "hard link":
        assert read(folder, file) == SECRET
    else:
        with pytest.raises((InputError, OSError)):
            read(folder, file)
    if kind == "folder":
        with pytest.raises(OSError, match="directory"):
            replace(file, b"new")
        assert os.listdir(folder) == ["name"]
    else:
        replace(file, b"new")
        assert (read(folder, file), os.listdir(folder)) == (b"new", ["name"])
        assert not file.is_symlink()


def test_the_name_of_an_unfinished_file_is_known_to_nobody(tmp_path, monkeypatch):
    """A process number would be: links could wait under all of them."""
    names = []
    monkeypatch.setattr(os, "replace", lambda unfinished, target: names.append(unfinished.name))
    for _ in range(20):
        replace(tmp_path / "a", b"")
    assert len(set(names)) == 20
    assert all(str(os.getpid()) != part for name in names for part in name.split("."))


def test_a_file_that_is_there_already_is_not_written_to(tmp_path, monkeypatch, outside):
    monkeypatch.setattr("jacmatch.files.secrets.token_hex", lambda _: "guessed")
    plant("link", tmp_path / ".a.guessed.jacmatch-part", outside)
    with pytest.raises(FileExistsError):
        replace(tmp_path / "a", b"new")


def test_a_folder_reached_by_a_link_is_the_folder_itself(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"a")
    (tmp_path / "link").symlink_to("real")
    assert read(tmp_path / "link", tmp_path / "link" / "a") == b"a"
    assert inside(tmp_path / "link", tmp_path / "link" / "b") == tmp_path / "link" / "b"
