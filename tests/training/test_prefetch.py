"""Reading ahead changes when something is read, and nothing else."""

import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from jacmatch import datasets
from jacmatch.errors import InputError
from jacmatch.objectives import Distillation
from jacmatch.teachers import ModuleTeacher
from jacmatch.training import Training, agreement, calibration, evaluate, fit
from jacmatch.training.data import Ahead, Batches, in_order, resident

from . import cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of gray pictures, 16 for training and 4 for testing each."""
    path = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for part, count in (("train", 16), ("test", 4)):
        for label in "abc":
            (path / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 256, (8, 8)).astype(np.uint8)
                Image.fromarray(pixels).save(path / part / label / f"{number:02}.png")
    return path


@pytest.fixture(scope="module")
def memory(folder):
    return datasets.load(f"folder:{folder}")


@pytest.fixture(scope="module")
def disk(folder):
    return datasets.load(f"stream:{folder}")


GIVEN = {"seed": 5, "augment": ("crop", "flip"), "partners": True, "views": 2}


def same(one, other):
    names = ("x", "y", "ids", "partners", "partner_labels")
    return one.view == other.view and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), (1, 0), (2, 1), (2, 7)])
def test_batches_are_bit_for_bit_those_of_the_data_in_memory(memory, disk, workers, prefetch):
    expected = Batches(memory.train, 10, **GIVEN)
    reading = Batches(disk.train, 10, **GIVEN, workers=workers, prefetch=prefetch, resident_bytes=0)
    with closing(reading) as batches:
        for number in (*range(11), 3, 4, 40, 41, 2, 2):  # over the ends of epochs, and jumping as a resumed run does
            assert same(batches(number), expected(number)), number
        rows = torch.tensor([47, 0])
        assert same(batches.of(rows, 1), expected.of(rows, 1))


def test_what_is_ahead_is_read_before_it_is_requested():
    read, enough = [], threading.Event()

    def note(number):
        read.append(number)
        if len(read) == 4:
            enough.set()
        return number

    with closing(Ahead(lambda number: number, note, workers=1, ahead=3)) as ahead:
        assert ahead(7) == (7, 7)
        assert enough.wait(20)
        assert read == [7, 8, 9, 10]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jacmatch-data")]


def test_the_end_is_not_passed_and_without_workers_nothing_is_ahead():
    for workers, expected in ((2, {0, 1, 2}), (0, {0})):
        read = set()
        with closing(Ahead(lambda number: number, read.add, workers=workers, ahead=9, stop=3)) as ahead:
            ahead(0)
        assert read == expected if workers == 0 else read <= expected
        assert 0 in read


def test_an_error_is_raised_where_its_number_is_requested():
    def read(number):
        if number >= 2:
            raise InputError(f"{number} is broken.")
        return number

    with closing(Ahead(lambda number: number, read, workers=2, ahead=4)) as ahead:
        assert [ahead(number)[1] for number in (0, 1)] == [0, 1]
        with pytest.raises(InputError, match=r"2 is broken\."):
            ahead(2)
        with pytest.raises(InputError, match=r"3 is broken\."):
            ahead(3)


def test_small_sets_are_read_once_and_large_ones_stay_on_disk(disk, memory):
    size = 48 * 64
    assert disk.train.x.nbytes == size
    inside = resident(disk.train, torch.device("cpu"), size)
    assert torch.equal(inside.x, memory.train.x)
    assert resident(disk.train, torch.device("cpu"), size - 1) is disk.train
    few = disk.train.subset(torch.arange(3))
    assert torch.equal(resident(few, torch.device("cpu"), 3 * 64).x, memory.train.x[:3])


def trained(split, workers, folder=None, validation=None, **changes):
    objective = cases.distillation()
    settings = Training(steps=12, batch_size=16, augment=("crop",), workers=workers, resident_mib=0, **changes)
    run = None if folder is None else cases.begin(folder)
    fit(objective, split, settings, seed=2, run=run, validation=validation)
    return objective.student.state_dict()


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.ci
def test_students_are_the_same_from_memory_and_from_disk_with_any_workers(memory, disk, tmp_path):
    expected = trained(memory.train, 0)
    assert equal(expected, trained(disk.train, 0))
    trained(disk.train, 2, tmp_path, max_steps=5)  # and after an interruption, with another number of workers
    assert equal(expected, trained(disk.train, 1, tmp_path, disk.test))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jacmatch-data")]


def test_a_broken_picture_ends_the_run_in_its_step_and_leaves_the_checkpoint(folder, disk, tmp_path):
    path = folder / "train" / "a" / "00.png"
    content = path.read_bytes()
    order = Batches(disk.train, 16, seed=2).order(0).tolist()
    step = 10 + [order.index(0) // 16 == batch for batch in range(3)].index(
        True
    )  # the first after step 9 that needs it
    seen = []

    def on_step(number, _):
        seen.append(number)
        if number == 9:
            path.write_bytes(bytes(len(content)))

    settings = Training(steps=30, batch_size=16, workers=1, prefetch=0, resident_mib=0)
    try:
        with pytest.raises(InputError, match=r"train/a/00\.png must be an image"):
            fit(Distillation(cases.network()), disk.train, settings, seed=2, run=cases.begin(tmp_path), on_step=on_step)
    finally:
        path.write_bytes(content)
    assert 9 <= seen[-1] <= step + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jacmatch-data")]


def test_judgements_are_those_of_the_data_in_memory(memory, disk):
    student, teacher = cases.network(1).eval(), ModuleTeacher(cases.network(2))
    for judge in (
        lambda split: evaluate(student, split, batch_size=5, device="cpu"),
        lambda split: calibration(student, split, batch_size=5, device="cpu"),
        lambda split: agreement(student, teacher, split, samples=7, batch_size=5),
    ):
        assert judge(memory.test) == judge(disk.test)


def test_in_order_means_each_sample_once(memory, disk):
    for split in (memory.test, disk.test):
        x, y = (torch.cat(parts) for parts in zip(*in_order(split, 5, torch.device("cpu")), strict=True))
        assert torch.equal(x, memory.test.inputs())
        assert torch.equal(y, memory.test.y)
