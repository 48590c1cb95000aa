"""Archives and arrays: what the bytes of a fuzzer mean, and whole ones to begin with."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jacmatch.datasets import arrays as npz
from jacmatch.datasets import shards
from jacmatch.datasets.arrays import from_arrays

ARRAYS = ("x_train", "y_train", "x_test", "y_test", "j_train")


def pieces(data: bytes, count: int) -> list[bytes]:
    """The data cut up: two bytes give the length of each piece but the last."""
    parts = []
    for _ in range(count - 1):
        length, data = int.from_bytes(data[:2], "big"), data[2:]
        parts.append(data[:length])
        data = data[length:]
    return [*parts, data]


def joined(parts: list[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts[:-1]) + parts[-1]


def read_npz(data: bytes, folder: Path) -> None:
    file = folder / "data.npz"
    if data[:1] == b"0":
        file.write_bytes(data[1:])
    else:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in zip(ARRAYS, pieces(data[1:], len(ARRAYS)), strict=True):
                if content:
                    archive.writestr(f"{name}.npy", content)
    npz.load_npz(str(file), 0)


def npz_seeds(folder: Path) -> list[bytes]:
    x, y = np.random.default_rng(0).random((6, 1, 2, 2), dtype=np.float32), np.arange(6) % 2
    targets, jacobians = np.ones((6, 2), np.float32), np.ones((6, 2, 1, 2, 2), np.float32)
    seeds = []
    for arrays in ((x, y, x, y), (x, targets, x, targets, jacobians)):
        whole, contents = io.BytesIO(), []
        np.savez(whole, **dict(zip(ARRAYS, arrays, strict=False)))
        for array in arrays:
            one = io.BytesIO()
            np.save(one, array)
            contents.append(one.getvalue())
        contents += [b""] * (len(ARRAYS) - len(contents))
        seeds += [b"0" + whole.getvalue(), b"1" + joined(contents)]
    return seeds


def read_tar(data: bytes, folder: Path) -> None:
    """The index of a shard and its first images; the kept index lies in the folder, too."""
    (folder / "train.tar").write_bytes(data)
    loaded = shards.load(f"{folder}@4", 0)
    loaded.train.inputs(torch.arange(min(2, len(loaded.train))))


def tar_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = io.BytesIO()
        with tarfile.open(fileobj=whole, mode="w", format=form) as archive:
            for number in range(10):
                image = io.BytesIO()
                Image.new("L", (4, 4), number).save(image, "png")
                for suffix, content in (("png", image.getvalue()), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{'ä' * (60 if form else 1)}{number}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        seeds.append(whole.getvalue())
    return seeds


_KINDS = ("<f4", "<f8", "|u1", "<i8", "|b1", "<c8", "<f2", "|S3", "<U2", ">f4")


def read_arrays(data: bytes, folder: Path) -> None:
    """`from_arrays` of arrays whose types and shapes the bytes say."""
    arrays = {}
    for name, piece in zip(ARRAYS, pieces(data, len(ARRAYS)), strict=True):
        if piece:
            kind, axes = np.dtype(_KINDS[piece[0] % len(_KINDS)]), piece[1 : 2 + (piece[0] >> 5)]
            content = piece[len(axes) + 1 :]
            count = int(np.prod([axis % 8 for axis in axes], dtype=int))
            filled = (content * (count * kind.itemsize // max(len(content), 1) + 1))[: count * kind.itemsize]
            if len(filled) == count * kind.itemsize:
                arrays[name] = np.frombuffer(filled, kind).reshape([axis % 8 for axis in axes])
    from_arrays("npz:fuzz", arrays)


def written(array: np.ndarray) -> bytes:
    """An array as `read_arrays` reads it."""
    axes = (array.ndim - 1) << 5
    kind = next(byte for byte in range(axes, axes + 32) if np.dtype(_KINDS[byte % len(_KINDS)]) == array.dtype)
    return bytes([kind, *array.shape]) + array.tobytes()


def arrays_seeds(folder: Path) -> list[bytes]:
    x, y = np.arange(24, dtype=np.uint8).reshape(6, 1, 2, 2), np.arange(6) % 2
    targets, jacobians = np.ones((6, 2), np.float32), np.ones((6, 2, 1, 2, 2), np.float32)
    return [joined([*map(written, (x, y, x, y)), b""]), joined([*map(written, (x, targets, x, targets, jacobians))])]
