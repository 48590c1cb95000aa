"""A job on data that stay on disk ends with the very network that it ends with on the same data in memory."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jacmatch.cli import main


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The same grey pictures as a folder and as tar shards."""
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    random = np.random.RandomState(0)
    for part, count in (("train", 20), ("test", 4)):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for number, label in enumerate("ab"):
                for index in range(count):
                    path = tmp_path / part / label / f"{index:02}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(random.randint(0, 256, (8, 8)).astype(np.uint8)).save(path)
                    tar.add(path, f"{label}{path.name}")
                    written = path.with_suffix(".cls")
                    written.write_text(str(number))
                    tar.add(written, f"{label}{written.name}")
                    written.unlink()
    (tmp_path / "shards").mkdir()
    for part in ("train", "test"):
        (tmp_path / f"{part}.tar").rename(tmp_path / "shards" / f"{part}.tar")
    return tmp_path


def trained(data, folder, *more):
    job = [
        "train",
        "--data",
        data,
        "--model",
        "cnn3",
        "--steps",
        "8",
        "--batch-size",
        "16",
        "--seed",
        "3",
        "--out",
        str(folder),
        *more,
    ]
    assert main(job) == 0
    return load_file(folder / "student.safetensors") if (folder / "student.safetensors").is_file() else None


@pytest.mark.ci
def test_networks_are_the_same_from_memory_folders_and_shards(pictures, capsys):
    expected = trained(f"folder:{pictures}", pictures / "memory")
    stream = ("--resident-mib", "0", "--workers", "2")
    assert trained(f"stream:{pictures}", pictures / "parts", *stream, "--max-steps", "5") is None
    for weights in (
        trained(f"stream:{pictures}", pictures / "parts", "--resident-mib", "0", "--workers", "0"),
        trained(f"wds:{pictures / 'shards'}", pictures / "shards-run", *stream),
    ):
        assert all(torch.equal(value, weights[name]) for name, value in expected.items())


def test_a_broken_picture_is_one_line_that_names_it(pictures, capsys):
    path = pictures / "train" / "b" / "07.png"
    path.write_bytes(path.read_bytes()[:30])
    assert main(["train", "--data", f"stream:{pictures}", "--smoke", "--out", str(pictures / "run")]) == 2
    err = capsys.readouterr().err
    assert "train/b/07.png must be an image. Got" in err
    assert "Traceback" not in err
