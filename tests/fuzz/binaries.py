"""Files of the known data sets: what the bytes of a fuzzer mean, with the sizes and sums that its bytes have."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np

from jacmatch.datasets import official
from jacmatch.datasets.official import Batch, Edition, ImageGrids

_WIDTH = 1 + 32 * 32 * 3


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_binaries(data: bytes, folder: Path) -> None:
    """The first byte chooses among a file of CIFAR, a list of its labels, and an idx file, packed or not."""
    kind, content = data[:1], data[1:]
    if kind == b"c":
        rows = max(1, len(content) // _WIDTH)
        batch = Batch("data_batch_1", rows, _sum(content))
        (folder / "data_batch_1.bin").write_bytes(content)
        official.read(folder, Edition("cifar10", "x", (), (batch,), (batch,), 1, None, "Get it again."))
    elif kind == b"l":
        (folder / "data_batch_1.png").write_bytes(content)
        (folder / "labels.json").write_bytes(content)
        batch = Batch("data_batch_1", 2, "", "")
        image_grids = ImageGrids(("labels.json", "labels.json"), ("", ""))
        edition = Edition("cifar10", "x", (), (batch,), (batch,), 1, image_grids, "Get it again.")
        official._read_labels(folder / "labels.json", 3, _sum(bytes([0, 1, 2])), edition)
    else:
        unpacked = content
        if kind == b"z":
            try:
                unpacked = gzip.decompress(content)
            except (OSError, EOFError, gzip.zlib.error):
                unpacked = b""
        name = "images.gz" if kind == b"z" else "images"
        (folder / name).write_bytes(content)
        official.read_idx(folder / name, official.IdxFile("images", (2, 2, 2), _sum(unpacked)))


def binary_seeds(folder: Path) -> list[bytes]:
    idx = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2, *range(8)])
    labels = np.repeat(np.arange(4, dtype=np.uint8), _WIDTH).reshape(4, _WIDTH)
    return [
        b"c" + (labels % 2).tobytes(),
        b"l" + json.dumps([0, 1, 2]).encode(),
        b"i" + idx,
        b"z" + gzip.compress(idx, mtime=0),
    ]
