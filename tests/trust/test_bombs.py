"""Small files that say to be large fill no memory, and what is not meant to be opened is not."""

import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from tests.report.test_report import comparison as compared
from torch import nn

from jacmatch.cli import VERBS, flags, settings
from jacmatch.datasets.streamed import decode
from jacmatch.errors import InputError
from jacmatch.files import inside
from jacmatch.jobs import networks
from jacmatch.models import load_weights, save_weights
from jacmatch.report import page, write_report
from jacmatch.runs import Run
from jacmatch.training import checkpoints

pytestmark = pytest.mark.usefixtures("all_as_users_run")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"spec": "mlp:90000-90000"}, r"must contain the 3\d,\d{3},\d{3},\d{3} bytes of weights of 'mlp:90000-90000'"),
        ({"outputs": 10**12}, r"must contain the .* bytes of weights"),
        ({"outputs": 10**30}, r"network\.json must describe a network\. Got \w+Error"),
        ({"shape": [10**9]}, r"must contain the .* bytes of weights"),
        ({"outputs": float("inf")}, r"network\.json must be one JSON object"),
        ({"shape": 3}, r"network\.json must describe a network"),
    ],
)
def test_a_network_larger_than_its_weights_is_not_built(changes, rule, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "network.json"
    head = json.loads(file.read_text()) | {"mean": [0.0], "std": [1.0]} | changes
    file.write_text(json.dumps(head))
    with pytest.raises(InputError, match=rule):
        networks.load_student(tmp_path / "run")


def test_weights_far_larger_than_the_module_are_not_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_weights(nn.Linear(3, 2), file)
    os.truncate(file, 2**40)  # without blocks on disk
    with pytest.raises(InputError, match=r"must be a file of at most 134,217,856 bytes\. Got 1,099,511,627,776 bytes"):
        load_weights(nn.Linear(3, 2), file)


def test_weights_are_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"must be a file of weights\. Got a device or a pipe"):
        load_weights(nn.Linear(3, 2), tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["bmp", "gif", "tiff", "ppm", "eps"])
def test_only_the_formats_that_are_named_are_opened(kind):
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, kind)
    with pytest.raises(InputError, match=r"an image must be an image\. Got UnidentifiedImageError"):
        decode(file.getvalue(), "an image", caller="the test", max_pixels=10)


def test_a_text_in_an_image_does_not_fill_the_memory():
    from PIL.PngImagePlugin import PngInfo

    file, info = io.BytesIO(), PngInfo()
    info.add_text("comment", "x" * 2**21, zip=True)
    Image.new("L", (2, 2)).save(file, "png", pnginfo=info)
    assert len(file.getvalue()) < 2**13
    with pytest.raises(InputError, match=r"must be an image\. Got ValueError: Decompressed data too large"):
        decode(file.getvalue(), "an image", caller="the test", max_pixels=10)


def test_a_checkpoint_has_no_parts_larger_than_itself(tmp_path):
    file = tmp_path / "checkpoint.pt"
    checkpoints.save(file, {"a": torch.zeros(1000)})
    whole, packed = io.BytesIO(file.read_bytes()[: -checkpoints._END]), io.BytesIO()
    with zipfile.ZipFile(whole) as parts, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as others:
        for part in parts.infolist():
            others.writestr(part.filename, parts.read(part))
    body = packed.getvalue()
    file.write_bytes(body + checkpoints._MARK + checkpoints.hashlib.sha256(body).hexdigest().encode())
    with pytest.raises(InputError, match=r"must be a complete checkpoint.* Got parts that are larger than the file"):
        checkpoints.load(file)


def test_pictures_of_a_report_and_files_of_a_run_are_bounded(tmp_path, monkeypatch):
    run = compared(tmp_path / "run")
    monkeypatch.setattr(page, "_LARGEST_ARRAYS", 4000)
    np.savez_compressed(run.path / "jacobian_figure.npz", images=np.zeros(10_000))
    with pytest.raises(InputError, match=r"arrays of the figure of Jacobians\. Got ValueError: more than 64 MiB"):
        write_report(run.path)
    with pytest.raises(InputError, match=r"result\.json must have at most 10 bytes\. Got [\d,]+\."):
        inside(run.path, run.path / "result.json", 10)


DEEP = "[" * 100_000
BOMB = "augment:\n- &a [crop, crop, crop]\n" + "".join(
    f"- &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
TEXTS = {
    "deep.json": (DEEP, "cannot be parsed"),
    "deep.yaml": (DEEP[:400], "cannot be parsed"),
    "bomb.yaml": (BOMB, r"cannot be parsed \(an alias; write the value out\)"),
    "tags.yaml": ("steps: !!int ''", "cannot be parsed"),
    "switch.yaml": ("smoke: !!bool perhaps", "cannot be parsed"),
    "time.yaml": ("seed: !!timestamp noon", "cannot be parsed"),
    "object.yaml": ("seed: !!python/object/apply:os.system [true]", "cannot be parsed"),
    "long.yaml": ("#" * (2**20 + 1), r"Got a file of more than 1,048,576 bytes"),
    "wide.yaml": (f"steps: {'9' * 4000}x", r"`steps` .* Got '9+\.\.\.9+x' \(text\)"),
    "bytes.yaml": ("\udcff", "cannot be parsed"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_settings_that_do_harm_are_one_short_line(name, tmp_path):
    text, rule = TEXTS[name]
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rule) as caught:
        settings.read(str(tmp_path / name), "distill", flags.flags(VERBS["distill"].load()))
    assert len(str(caught.value)) < 600


def test_deep_json_in_a_run_is_damaged(tmp_path):
    (tmp_path / "settings.json").write_text(DEEP)
    with pytest.raises(InputError, match=r"settings\.json must be one JSON object.*damaged"):
        Run.open(tmp_path)
