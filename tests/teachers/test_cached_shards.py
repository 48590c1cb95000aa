"""What lies on disk: whole or not there, checked before it is believed, and nothing that could run."""

import copy
import json
import os
import pickle
import pickletools
import shutil

import numpy as np
import pytest
import torch

from jacmatch import CachedTeacher, InputError, UnsupportedError
from jacmatch.teachers.cached.format import read_head, write_whole
from jacmatch.teachers.cached.reader import Shards
from jacmatch.teachers.cached.writer import Claims, write_shard

from .cache_folders import SAMPLES, VIEWS, inputs, make

SHARD = "view-00001/shard-00001"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make(tmp_path_factory.mktemp("original") / "seed0")


@pytest.fixture
def made(original, tmp_path):
    """A copy that a test may spoil."""
    folder = tmp_path / "seed0"
    shutil.copytree(original.folder, folder)
    return type(original)(folder, original.teacher, original.side, original.orders)


def read(made):
    ids = torch.arange(SAMPLES)
    return CachedTeacher(made.folder).answer(inputs(1), made.question(1, ids))


def test_tensordict_reads_a_shard(original):
    """The files are its own format, for whoever wants to look at them; ours are read without its loader."""
    from tensordict import TensorDict

    shard = TensorDict.load_memmap(original.folder / SHARD)
    assert shard["ids"].tolist() == original.orders[1][4:8].tolist()
    stored = Shards(original.folder).read(1, shard["ids"].clone())
    assert all(torch.equal(shard[name], stored[name]) for name in stored)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted on Linux")
def test_files_stay_open_up_to_a_limit_and_are_closed_with_the_reader(original, monkeypatch):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    ids = torch.arange(SAMPLES)
    before, unlimited = opened(), Shards(original.folder).read(1, ids)
    assert opened() == before, "the reader is gone, and its files are closed"
    monkeypatch.setattr("jacmatch.teachers.cached.reader._OPEN_FILES", 2)
    reader = Shards(original.folder)
    limited = reader.read(1, ids)
    assert opened() == before + 2
    assert all(torch.equal(limited[name], unlimited[name]) for name in unlimited)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(reader)))
    assert torch.equal(copied.read(1, ids)["outputs"], unlimited["outputs"])


def test_no_file_is_a_pickle(original):
    for file in original.folder.rglob("*"):
        if file.is_file() and file.suffix != ".memmap":
            json.loads(file.read_text())
            with pytest.raises(ValueError, match="opcode"):
                list(pickletools.genops(file.read_bytes()))


def spoiled(file, change):
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def flip(data):
    data[len(data) // 2] ^= 1


@pytest.mark.parametrize("name", ["outputs", "products", "ids", "input_sums", "direction_sums"])
def test_a_single_bit_is_noticed_when_the_shard_is_used(made, name):
    spoiled(made.folder / SHARD / f"{name}.memmap", flip)
    teacher = CachedTeacher(made.folder)  # opening reads no entries
    first = made.orders[1][:4]
    teacher.answer(inputs(1)[first], made.question(1, first))  # another shard is as good as ever
    with pytest.raises(InputError, match=rf"{SHARD} must have the size .* Got another crc32 of {name}\.memmap"):
        teacher.answer(inputs(1), made.question(1, torch.arange(SAMPLES)))
    with pytest.raises(InputError, match=rf"another sha256 of {name}\.memmap\. Run the same `jacmatch cache build`"):
        Shards(made.folder).verify(1, 1, strong=True)


@pytest.mark.parametrize("name", [f"{SHARD}/products.memmap", "view-00001/places.memmap"])
def test_a_file_that_is_cut_off_is_noticed_when_the_cache_is_opened(made, name):
    spoiled(made.folder / name, lambda data: data.pop())
    with pytest.raises(InputError, match=rf"{name} must have the size .* Got \d+ bytes instead of \d+"):
        CachedTeacher(made.folder)


def test_a_file_that_is_cut_off_later_is_an_error(made):
    teacher = CachedTeacher(made.folder)
    question = made.question(1, torch.arange(SAMPLES))
    teacher.answer(inputs(1), question)  # all sums are known now
    spoiled(made.folder / SHARD / "products.memmap", lambda data: data.__delitem__(slice(8, None)))
    with pytest.raises(InputError, match="Got a file that is cut off"):
        teacher.answer(inputs(1), question)


def test_positions_of_other_samples_are_refused(made):
    file = made.folder / "view-00001/places.memmap"
    positions = np.fromfile(file, np.int64)
    positions[::-1].tofile(file)
    with pytest.raises(InputError, match="Got positions that are not those of the samples"):
        read(made)
    (positions + 100).tofile(file)
    with pytest.raises(InputError, match="Got positions beyond the last"):
        read(made)


@pytest.mark.parametrize("name", [SHARD, "view-00001/places.memmap"])
def test_what_is_missing_is_named(made, name):
    path = made.folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(
        InputError, match=rf"must be finished\. Got {name} missing\. Run its `jacmatch cache build` again"
    ):
        CachedTeacher(made.folder)


def test_many_missing_shards_are_counted(made):
    shutil.rmtree(made.folder / "view-00001")
    with pytest.raises(InputError, match=r"Got view-00001/places\.memmap, .*00000, .*shard-00001 and 1 more missing"):
        CachedTeacher(made.folder)


@pytest.mark.parametrize("change", [lambda sums: sums.pop("fields"), lambda sums: sums["fields"].pop("ids")])
def test_sums_that_are_missing_are_noticed(made, change):
    file = made.folder / SHARD / "shard.json"
    sums = json.loads(file.read_text())
    change(sums)
    file.write_text(json.dumps(sums))
    with pytest.raises(InputError, match=r"Got another size or no checksum of ids\.memmap"):
        read(made)
    file.unlink()
    with pytest.raises(InputError, match=r"Got no shard\.json"):
        read(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.update(format=2), r"must be of format 1, the one that this version reads"),
        (lambda head: head.pop("fields"), r"must describe a cache\. Got KeyError"),
        (lambda head: head["fields"][0].update(name="../../x"), r"must describe a cache\. Got ValueError: fields"),
        (lambda head: head["fields"][0].update(dtype="object"), r"must describe a cache\. Got ValueError: fields"),
        (lambda head: head["fields"][1].update(shape=[-1]), r"must describe a cache\. Got ValueError: fields"),
        (lambda head: head["fields"].append(head["fields"][0]), r"must describe a cache\. Got ValueError: fields"),
        (lambda head: head.update(samples=0), r"must describe a cache\. Got ValueError: sizes"),
        (lambda head: head.update(shard=3), r"must describe a cache\. Got ValueError: sizes"),
        (lambda head: head.update(views="two"), r"must describe a cache\. Got ValueError"),
        (lambda head: head.update(fingerprint=3), r"must describe a cache\. Got TypeError"),
    ],
)
def test_a_head_that_is_wrong_is_refused(made, change, message):
    head = json.loads((made.folder / "cache.json").read_text())
    change(head)
    (made.folder / "cache.json").write_text(json.dumps(head))
    with pytest.raises(InputError, match=message):
        CachedTeacher(made.folder)


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must be a teacher's cache .* Got a folder without cache\.json"):
        CachedTeacher(tmp_path)
    with pytest.raises(InputError, match="Got no folder of that name"):
        CachedTeacher(tmp_path / "none")
    (tmp_path / "cache.json").write_text('{"format":')
    with pytest.raises(InputError, match="must be one JSON object"):
        CachedTeacher(tmp_path)


def test_the_head_comes_back(original):
    head = read_head(original.folder)
    assert head.text() == (original.folder / "cache.json").read_bytes()
    assert (head.shards, head.names()[-1], list(head.rows(2))) == (3, (VIEWS - 1, 2), [8, 9])
    files = list(original.folder.rglob("*.memmap"))
    assert head.size == sum(file.stat().st_size for file in files)


# Writing ----------------------------------------------------------------------------------------------------------


def entries():
    return {"ids": torch.arange(4), "outputs": torch.rand(4, 2)}


@pytest.mark.parametrize("broken", ["fsync", "posix_fallocate", "rename"])
def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, broken):
    def refused(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*("pathlib.Path.rename",) if broken == "rename" else (os, broken), refused)
    with pytest.raises(InputError, match=r"\(`--cache`\) .*'No space left on device'. Free some space"):
        write_shard(tmp_path, "view-00000/shard-00000", entries())
    assert not list((tmp_path / "view-00000").iterdir())


def test_the_faster_of_two_processes_wins(tmp_path):
    name = "view-00000/shard-00000"
    write_shard(tmp_path, name, entries())
    before = (tmp_path / name / "outputs.memmap").read_bytes()
    write_shard(tmp_path, name, entries())
    assert (tmp_path / name / "outputs.memmap").read_bytes() == before
    assert [path.name for path in (tmp_path / "view-00000").iterdir()] == ["shard-00000"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    with pytest.raises(InputError, match=r"must be writable\. Got 'Permission denied'\. Choose"):
        write_whole(tmp_path, "cache.json", b"{}")
    assert not list(tmp_path.iterdir())


def test_without_tensordict_writing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensordict", None)
    with pytest.raises(UnsupportedError, match=r"needs tensordict: pip install 'jacmatch\[train\]'"):
        write_shard(tmp_path, "view-00000/shard-00000", entries())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs two processes at once")
def test_a_claim_holds_against_another_process_and_ends_with_it(tmp_path):
    with Claims(tmp_path).on(3) as mine:
        assert mine
        child = os.fork()
        if not child:  # the child's answer is its exit code; no test framework beyond this line
            others = Claims(tmp_path)
            with others.on(3) as theirs, others.on(4) as free:
                os._exit(10 * theirs + free)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    with Claims(tmp_path).on(4) as mine:
        assert mine
    assert not list(tmp_path.iterdir())
