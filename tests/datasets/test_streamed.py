"""Folders of pictures that are left on disk: the same numbers as in memory, and each way in which they can be wrong."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from jacmatch import datasets
from jacmatch.datasets import Split, streamed
from jacmatch.datasets import data as data_module
from jacmatch.errors import InputError


def save(path, seed, size=(6, 5), mode="RGB"):
    """A picture of noise; `size` is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, six training and two test pictures each, of one size."""
    for part, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                save(tmp_path / part / label / f"{number}.png", len(label) + 7 * number + 100 * (label == "dog"))
    return tmp_path


def same(a, b):
    return torch.equal(a.stored(), b.stored()) and torch.equal(a.y, b.y)


@pytest.mark.parametrize("size", ["", "@3"])
@pytest.mark.parametrize("test", [True, False])
def test_numbers_are_those_of_the_folder_in_memory(folder, size, test):
    if not test:
        shutil.rmtree(folder / "test")
    memory, disk = (datasets.load(f"{name}:{folder}{size}", seed=3) for name in ("folder", "stream"))
    assert same(memory.train, disk.train)
    assert same(memory.test, disk.test)
    assert (memory.mean, memory.std, memory.shape, memory.classes) == (disk.mean, disk.std, disk.shape, disk.classes)
    rows = torch.tensor([5, 0, 5])
    assert torch.equal(memory.train.inputs(rows), disk.train.inputs(rows))
    assert torch.equal(memory.train.subset(rows).inputs(), disk.train.subset(rows).inputs())
    assert isinstance(disk.train.subset(rows).x, streamed.Streamed)


def test_grey_pictures_have_one_channel(folder):
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    memory, disk = (datasets.load(f"{name}:{folder}") for name in ("folder", "stream"))
    assert disk.shape == (1, 5, 6)
    assert same(memory.train, disk.train)
    save(folder / "train" / "dog" / "3.png", 1)  # one of 12 that are looked at
    assert datasets.load(f"stream:{folder}").shape == (3, 5, 6)


def test_a_coloured_picture_among_grey_ones_is_named_when_it_is_met(folder, monkeypatch):
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    save(folder / "train" / "cat" / "1.png", 1)
    monkeypatch.setattr(streamed, "_LOOKED_AT", 2)
    monkeypatch.setattr(data_module, "_COUNTED", 2)
    data = datasets.load(f"stream:{folder}")
    assert data.train.inputs(torch.tensor([0, 2])).shape == (2, 1, 5, 6)
    with pytest.raises(InputError, match=r"must be gray.* Got a color image, train/cat/1\.png\. Convert them"):
        data.train.inputs(torch.tensor([1]))


def test_statistics_of_many_pictures_are_of_evenly_spaced_ones(folder, monkeypatch):
    whole = datasets.load(f"folder:{folder}")
    monkeypatch.setattr(data_module, "_COUNTED", 4)
    some = datasets.load(f"stream:{folder}")
    rows = torch.tensor([0, 3, 7, 11])
    assert some.train.x.spread(4).tolist() == rows.tolist()
    assert (some.mean, some.std) == data_module.statistics(whole.train.subset(rows))
    assert some.mean != whole.mean


@pytest.mark.parametrize(("total", "count"), [(1, 1), (1, 5), (7, 7), (7, 3), (10**9, 4), (5, 1)])
def test_spread_rows_are_different_and_begin_and_end_with_the_data(total, count):
    rows = streamed.spread(total, count)
    assert len(set(rows.tolist())) == len(rows) == min(total, count)
    assert rows[0] == 0
    assert count == 1 or rows[-1] == total - 1


class Changed:
    """The ways in which a folder can become another data set; each is a name and what it does to the folder."""

    def name(folder):
        (folder / "train" / "cat" / "5.png").rename(folder / "train" / "cat" / "6.png")

    def label(folder):
        (folder / "train" / "cat" / "5.png").rename(folder / "train" / "dog" / "6.png")

    def content(folder):
        save(folder / "train" / "cat" / "2.png", 999)

    def order(folder):
        for a, b in (("0", "x"), ("1", "0"), ("x", "1")):
            (folder / "test" / "cat" / f"{a}.png").rename(folder / "test" / "cat" / f"{b}.png")


@pytest.mark.parametrize("change", ["name", "label", "content", "order"])
def test_the_fingerprint_is_that_of_the_data(folder, tmp_path, change):
    before = datasets.load(f"stream:{folder}")
    elsewhere = shutil.copytree(folder, tmp_path.with_name(f"{tmp_path.name}-copy"))
    assert datasets.load(f"stream:{elsewhere}").fingerprint == before.fingerprint
    fingerprint = before.fingerprint
    assert fingerprint != datasets.load(f"stream:{folder}@4").fingerprint
    getattr(Changed, change)(folder)
    assert datasets.load(f"stream:{folder}").fingerprint != fingerprint


def test_a_picture_that_cannot_be_decoded_is_named_when_it_is_met(folder, monkeypatch):
    broken = folder / "train" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=r"train/cat/1\.png must be an image\. Got"):
        datasets.load(f"stream:{folder}")  # all are looked at here
    monkeypatch.setattr(streamed, "_LOOKED_AT", 2)
    monkeypatch.setattr(data_module, "_COUNTED", 2)
    data = datasets.load(f"stream:{folder}")
    with pytest.raises(InputError, match=r"train/cat/1\.png must be an image\. Got .*Repair or remove the file"):
        data.train.inputs(torch.tensor([0, 1]))


def _other_size(folder):
    save(folder / "train" / "dog" / "5.png", 1, size=(6, 7))


def _empty(folder):
    (folder / "train" / "dog" / "5.png").write_bytes(b"")


def _large(folder):
    with (folder / "train" / "dog" / "5.png").open("r+b") as file:
        file.truncate(2**26 + 1)


def _one_class(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "dog")


WRONG = {
    _other_size: r"must be 5 × 6 like the first\. Got 7 × 6 in train/dog/5\.png\. Resize them.*stream:.*@64",
    _empty: r"5\.png must have at least 1 byte and at most 67,108,864\. Got 0\.",
    _large: r"5\.png must have at least 1 byte and at most 67,108,864\. Got 67,108,865\.",
    _one_class: r"must have at least two classes\. Got 1",
}


@pytest.mark.parametrize("spoil", WRONG)
def test_bad_folders_are_refused(folder, spoil):
    spoil(folder)
    with pytest.raises(InputError, match=WRONG[spoil]):
        datasets.load(f"stream:{folder}")


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(streamed, "MAX_PIXELS", 29)
    with pytest.raises(InputError, match=r"train/cat/0\.png must have at most 29 pixels\. Got 30\. Scale it down"):
        datasets.load(f"stream:{folder}")


def test_another_layout_is_refused_as_for_folders(folder):
    (folder / "train").rename(folder / "training")
    with pytest.raises(InputError, match=r"must have a folder `train`"):
        datasets.load(f"stream:{folder}")
    with pytest.raises(InputError, match=r"`--data stream:DIR` must name an existing folder"):
        datasets.load("stream:/nowhere")
    with pytest.raises(InputError, match=r"SIZE of `--data stream:DIR@SIZE` must be an integer"):
        datasets.load(f"stream:{folder}@0")


def test_pictures_that_change_or_vanish_while_a_job_runs_are_named(folder):
    data = datasets.load(f"stream:{folder}")
    with (folder / "train" / "cat" / "0.png").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=r"0\.png must not change after .* Got .* Do not change the data"):
        data.train.inputs(torch.tensor([0]))
    (folder / "train" / "cat" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png must be a readable file\. Got FileNotFoundError.*still there"):
        data.train.inputs(torch.tensor([1]))


def test_several_threads_may_read_and_leave_pillows_limit_alone(folder):
    data, limit = datasets.load(f"stream:{folder}"), Image.MAX_IMAGE_PIXELS
    alone = data.train.stored()
    with ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(data.train.stored, [torch.arange(12)] * 20))
    assert all(torch.equal(alone, block) for block in blocks)
    assert limit == Image.MAX_IMAGE_PIXELS is not None


def test_names_in_little_memory_are_the_names():
    names = ["", "a/ß.png", "b", "\udcff.png", "", "c"]
    packed = streamed.Names.of(names)
    assert [packed[number] for number in range(len(packed))] == names


def test_a_function_of_the_users_may_give_streamed_data(folder, tmp_path, monkeypatch):
    (tmp_path / "my_stream.py").write_text(
        f"from jacmatch import datasets\ndef make():\n    return datasets.load('stream:{folder}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(datasets.load("my_stream:make").train.x, streamed.Streamed)


def test_some_classes_of_streamed_data_are_data(folder):
    save(folder / "train" / "emu" / "0.png", 1)
    save(folder / "test" / "emu" / "0.png", 2)
    chosen = datasets.of_classes(datasets.load(f"stream:{folder}"), [2, 0])
    assert chosen.train.y.tolist() == [1] * 6 + [0]
    assert isinstance(chosen.train, Split)
