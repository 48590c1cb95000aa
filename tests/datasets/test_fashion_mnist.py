"""The idx reader, the search for the files, the checksums."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from jacmatch import datasets
from jacmatch.datasets.official import OFFICIAL, IdxFile, candidate_folders, read_fashion_mnist, read_idx
from jacmatch.errors import InputError


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def small():
    """The four arrays and what `read` must expect of them."""
    random = np.random.RandomState(0)
    arrays = {
        "x_train": random.randint(0, 256, (20, 28, 28)).astype(np.uint8),
        "y_train": (np.arange(20) % 10).astype(np.uint8),
        "x_test": random.randint(0, 256, (10, 28, 28)).astype(np.uint8),
        "y_test": np.arange(10).astype(np.uint8),
    }
    files = {
        key: IdxFile(OFFICIAL[key].name, array.shape, hashlib.sha256(idx(array)).hexdigest())
        for key, array in arrays.items()
    }
    return arrays, files


def write(folder, arrays, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for key, array in arrays.items():
        name = OFFICIAL[key].name
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("packed", [True, False])
def test_four_files_become_images_and_labels(tmp_path, small, packed):
    arrays, files = small
    write(tmp_path, arrays, packed)
    data = read_fashion_mnist([tmp_path / "none", tmp_path], files)
    assert (data.name, data.classes, data.shape, len(data.train), len(data.test)) == (
        "fashion-mnist", 10, (1, 28, 28), 20, 10,
    )  # fmt: skip
    np.testing.assert_array_equal(data.train.x[:, 0].numpy(), arrays["x_train"])
    np.testing.assert_array_equal(data.test.y.numpy(), arrays["y_test"])


def test_where_it_looks_without_a_folder(tmp_path):
    installed = Path("/usr/share/datasets/fashion-mnist")
    assert candidate_folders("", "") == [installed]
    below = [tmp_path, tmp_path / "fashion-mnist", tmp_path / "usr/share/datasets/fashion-mnist"]
    assert candidate_folders("", str(tmp_path)) == [*below, installed]


def test_a_named_folder_is_the_only_one(tmp_path):
    below = [tmp_path, tmp_path / "fashion-mnist", tmp_path / "usr/share/datasets/fashion-mnist"]
    assert candidate_folders(str(tmp_path), "/elsewhere") == below


def test_the_environment_variable_is_used(tmp_path, monkeypatch):
    (tmp_path / "train-images-idx3-ubyte").touch()
    monkeypatch.setenv("JACMATCH_DATA", str(tmp_path))
    with pytest.raises(InputError, match="must have all four files of Fashion-MNIST"):
        datasets.load("fashion-mnist")


def test_official_checksums_are_complete():
    shapes = {key: file.shape for key, file in OFFICIAL.items()}
    images, labels = {"x_train": (60000, 28, 28), "x_test": (10000, 28, 28)}, {"y_train": (60000,), "y_test": (10000,)}
    assert shapes == images | labels
    assert len({file.sha256 for file in OFFICIAL.values() if len(bytes.fromhex(file.sha256)) == 32}) == 4


def test_missing_files_are_named_with_the_command_that_gets_them(tmp_path):
    with pytest.raises(
        InputError, match=r"needs its four idx files\. Got none of them in .*apt-get install dataset-fashion"
    ):
        datasets.load(f"fashion-mnist:{tmp_path}")
    with pytest.raises(InputError, match=r"apt-get download dataset-fashion-mnist && dpkg-deb -x"):
        read_fashion_mnist([tmp_path])
    with pytest.raises(InputError, match=r"`--data fashion-mnist:DIR` must name an existing folder\. Got '.*no'"):
        datasets.load(f"fashion-mnist:{tmp_path / 'no'}")


def test_an_incomplete_folder_is_refused(tmp_path, small):
    write(tmp_path, small[0])
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"all four files.*Got a folder without t10k-labels-idx1-ubyte\.gz"):
        read_fashion_mnist([tmp_path], small[1])


def test_the_command_line_accepts_the_official_files_only(tmp_path, small):
    write(tmp_path, small[0])
    with pytest.raises(
        InputError, match=r"train-images-idx3-ubyte\.gz must be an idx file of bytes of shape \(60000, 28, 28"
    ):
        datasets.load(f"fashion-mnist:{tmp_path}")


def test_a_wrong_checksum_names_the_file(tmp_path):
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(10000, np.uint8))))
    rule = r"t10k-labels-idx1-ubyte\.gz must contain the data set's official content \(SHA-256 0402a96d92fd…\)\. Got "
    with pytest.raises(InputError, match=rule + "[0-9a-f]{12}…"):
        read_idx(path, OFFICIAL["y_test"])


BROKEN = {
    "not packed": (lambda content: content, r"labels\.gz must be a Fashion-MNIST idx file\. Got BadGzipFile"),
    "cut off": (
        lambda content: gzip.compress(content)[:-12],
        r"labels\.gz must be a Fashion-MNIST idx file\. Got EOFError",
    ),
    "damaged": (
        lambda content: gzip.compress(content)[:10] + b"\x07" + gzip.compress(content)[11:],
        r"labels\.gz must be a Fashion-MNIST idx file\. Got error: Error -3",
    ),
    "other numbers": (
        lambda content: gzip.compress(content[:2] + b"\x0d" + content[3:]),
        r"must be an idx file of bytes of shape \(10,\)\. Got a file that begins with 00000d01",
    ),
    "other shape": (
        lambda content: gzip.compress(content[:7] + b"\x0b" + content[8:]),
        r"must be an idx file of bytes of shape \(10,\)\. Got a file that begins with 00000801 0000000b",
    ),
    "empty": (lambda content: gzip.compress(b""), "Got a file that begins with nothing"),
    "too short": (lambda content: gzip.compress(content[:-1]), r"must contain 18 bytes after unpacking\. Got 17"),
    "too long": (
        lambda content: gzip.compress(content + bytes(10**7)),
        r"must contain 18 bytes after unpacking\. Got more",
    ),
    "other labels": (
        lambda content: gzip.compress(content[:-1] + b"\x01"),
        "must contain the data set's official content",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(tmp_path, small, case):
    spoil, message = BROKEN[case]
    path = tmp_path / "labels.gz"
    path.write_bytes(spoil(idx(small[0]["y_test"])))
    with pytest.raises(InputError, match=message):
        read_idx(path, small[1]["y_test"])
