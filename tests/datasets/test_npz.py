"""Archives of the user's."""

import io
import zipfile

import numpy as np
import pytest
import torch

from jacmatch import datasets
from jacmatch.datasets import files
from jacmatch.errors import InputError


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_is_read(tmp_path, images, vectors, save):
    for name, arrays in (("images", images), ("vectors", vectors)):
        path = tmp_path / f"{name}.npz"
        save(path, **arrays)
        data = datasets.load(f"npz:{path}")
        assert data.name == f"npz:{path}"
        assert data.fingerprint == datasets.from_arrays("mine", arrays).fingerprint
    assert torch.equal(data.train.jacobians, torch.from_numpy(vectors["j_train"].astype(np.float32)))


def missing(folder, arrays):
    return folder / "none.npz"


def directory(folder, arrays):
    return folder


def empty(folder, arrays):
    path = folder / "a.npz"
    path.touch()
    return path


def text(folder, arrays):
    path = folder / "a.npz"
    path.write_text("1,2,3\n")
    return path


def truncated(folder, arrays):
    path = folder / "a.npz"
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:900])
    return path


def corrupted(folder, arrays):
    path = folder / "a.npz"
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF  # in the data of x_train: the checksum of the member is wrong
    path.write_bytes(bytes(content))
    return path


def single_array(folder, arrays):
    path = folder / "a.npy"
    np.save(path, arrays["x_train"])
    return path


def objects(folder, arrays):
    path = folder / "a.npz"
    np.savez(path, **(arrays | {"y_train": np.array([{}] * 12, dtype=object)}), allow_pickle=True)
    return path


def no_arrays(folder, arrays):
    path = folder / "a.npz"
    np.savez(path, x_train=arrays["x_train"])
    return path


def other_arrays(folder, arrays):
    path = folder / "a.npz"
    np.savez(path, **arrays, y_tset=arrays["y_test"])
    return path


def header_lies(folder, arrays):
    path = folder / "a.npz"
    np.savez(path, **{key: array for key, array in arrays.items() if key != "x_train"})
    single = folder / "x.npy"
    np.save(single, arrays["x_train"])
    content = single.read_bytes().replace(b"(12, 1, 6, 5)", b"(99, 1, 6, 5)")
    with zipfile.ZipFile(path, "a") as members:
        members.writestr("x_train.npy", content)
    return path


def header_of_terabytes(folder, arrays):
    path = folder / "a.npz"
    np.savez(path, **{key: array for key, array in arrays.items() if key != "x_train"})
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**15, 1, 6, 5)})
    with zipfile.ZipFile(path, "a") as members:
        members.writestr("x_train.npy", header.getvalue())
    return path


def channels_last(folder, arrays):
    path = folder / "a.npz"
    np.savez(path, **(arrays | {"x_train": np.zeros((12, 6, 5, 3), np.uint8)}))
    return path


CASES = {
    missing: r"`--data npz:FILE` must name an existing file\. Got '.*none\.npz', which does not exist\. Check the path",
    directory: r"must name an existing file\. Got '.*', which is a folder",
    empty: r"a\.npz must be a numpy \.npz archive of plain arrays\. Got BadZipFile.*Write it with np\.savez",
    text: "a.npz must be a numpy .npz archive",
    truncated: "a.npz must be a numpy .npz archive",
    corrupted: r"a\.npz must be a numpy \.npz archive of plain arrays\. Got BadZipFile: Bad CRC",
    single_array: r"a\.npy must be a numpy \.npz archive",
    objects: r"a\.npz must be a numpy \.npz archive of plain arrays\. Got ValueError: Object arrays cannot be loaded",
    no_arrays: r"npz:.*a\.npz must have the arrays .*missing: y_train, x_test, y_test",
    other_arrays: r"Each array of npz:.*a\.npz must be a known name\. Got 'y_tset'\. Nearest: y_test",
    header_lies: r"a\.npz must be a numpy \.npz archive of plain arrays\. Got ValueError",
    header_of_terabytes: r"a\.npz must be a numpy \.npz archive of plain arrays\. Got .*MemoryError",
    channels_last: r"`x_train` of npz:.*a\.npz must be images .* looks like \(N, H, W, C\)",
}


@pytest.mark.parametrize("make", CASES)
def test_bad_archives_are_refused(tmp_path, images, make):
    path = make(tmp_path, images)
    with pytest.raises(InputError, match=CASES[make]):
        datasets.load(f"npz:{path}")


def test_no_file_is_refused():
    with pytest.raises(
        InputError, match=r"`--data npz:FILE` must name an existing file\. Got no file\. Write for example"
    ):
        datasets.load("npz:")


def test_an_archive_larger_than_the_memory_is_refused_before_it_is_unpacked(tmp_path, images, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", **images)
    monkeypatch.setattr(files, "_physical_memory", lambda: 500)
    with pytest.raises(
        InputError, match=r"The arrays of .*a\.npz must fit into memory\. Got 0\.0 GiB on a machine with 0\.0"
    ):
        datasets.load(f"npz:{tmp_path / 'a.npz'}")
