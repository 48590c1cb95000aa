"""Files that were made to do harm: they run nothing, fill no memory, and show nothing that lies outside their folder."""

import io
import json
import os
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jacmatch.cli import flags, main, settings
from jacmatch.datasets.images import decode_bytes
from jacmatch.errors import InputError
from jacmatch.models import load_weights, save_weights
from jacmatch.recipes import RECIPES, networks
from jacmatch.report import comparison, write_report
from jacmatch.runs import Run
from jacmatch.runs.files import inside
from jacmatch.teachers import CachedTeacher
from jacmatch.training import checkpoints

from .report.test_report import comparison as compared
from .report.test_report import read as page_of
from .teachers import cache_folders

pytestmark = pytest.mark.usefixtures("all_as_users_run")
OUTSIDE = r"must lie in .*\. Got a link that leads out of it\. Copy what it points to"

# Links -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with a network."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    rows = np.random.default_rng(0).random((12, 4), dtype=np.float32)
    arrays = {"x_train": rows, "x_test": rows, "y_train": np.arange(12) % 2, "y_test": np.arange(12) % 2}
    np.savez(folder.parent / "data.npz", **arrays)
    words = f"train --data npz:{folder.parent}/data.npz --model mlp:3 --steps 2 --batch-size 4 --validation 0"
    assert main([*words.split(), "--out", str(folder)]) == 0
    return folder


def swap(file, target):
    """Moves a file out of its folder and leaves a link to it."""
    target.mkdir()
    shutil.move(file, target / "moved")
    file.symlink_to(target / "moved")


def use(folder):
    run = Run.open(folder)
    _ = run.result, run.environment, run.metrics()
    networks.load_student(folder)


@pytest.mark.parametrize(
    "name", ["settings.json", "result.json", "environment.json", "metrics.jsonl", "network.json", "student.safetensors"]
)
def test_a_link_does_not_lead_out_of_a_run_folder(name, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    use(tmp_path / "run")
    swap(tmp_path / "run" / name, tmp_path / "outside")
    with pytest.raises(InputError, match=OUTSIDE):
        use(tmp_path / "run")


def test_a_link_within_the_folder_and_a_link_to_it_are_followed(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "kept").mkdir()
    (tmp_path / "run" / "result.json").rename(tmp_path / "run" / "kept" / "result.json")
    (tmp_path / "run" / "result.json").symlink_to("kept/result.json")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    use(tmp_path / "link")


@pytest.mark.parametrize("name", ["sheet.npz", "seed0/labels", "figure.svg"])
def test_a_report_shows_nothing_from_elsewhere(name, tmp_path):
    run = compared(tmp_path / "run")
    if name == "figure.svg":
        result = {**run.result, "about": "", "tables": []}
        result["tables"] = [{"title": "t", "head": ["a"], "rows": [["b"]], "notes": []}]
        (run.path / "result.json").write_text(json.dumps(result))
        (run.path / name).write_text("<svg/>")
    write_report(run.path)
    swap(run.path / name, tmp_path / "outside")
    with pytest.raises(InputError, match=OUTSIDE):
        write_report(run.path)


def test_a_name_in_a_result_is_no_path(tmp_path):
    run = compared(tmp_path / "run")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.jsonl").write_text('{"step": 1, "validation_accuracy": 0.123}\n' * 2)
    result = run.result
    for method in ("../../secret", str(tmp_path / "secret"), "*", "\0"):
        result["rows"][0]["method"] = method
        assert not comparison._students(run, method)
    result["rows"][0]["method"] = "../../secret"
    (run.path / "result.json").write_text(json.dumps(result))
    assert "script" not in page_of(write_report(run.path)).tags


def test_a_run_inside_a_run_is_not_written_elsewhere(tmp_path):
    run = Run.create(tmp_path / "run", "train", {}, "1")
    (tmp_path / "elsewhere").mkdir()
    (run.path / "seed0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=OUTSIDE):
        run.child("seed0/labels")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["cache.json", "view-00001/places.memmap", "view-00001/shard-00000"])
def test_a_link_does_not_lead_out_of_a_cache(name, tmp_path):
    made = cache_folders.make(tmp_path / "cache")
    swap(tmp_path / "cache" / name, tmp_path / "outside")
    with pytest.raises(InputError, match=OUTSIDE):
        CachedTeacher(tmp_path / "cache").answer(cache_folders.inputs(1)[:2], made.question(1, torch.arange(2)))


# Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"spec": "mlp:90000-90000"}, r"must hold the 3\d,\d{3},\d{3},\d{3} bytes of weights of 'mlp:90000-90000'"),
        ({"outputs": 10**12}, r"must hold the .* bytes of weights"),
        ({"outputs": 10**30}, r"network\.json must describe a network\. Got \w+Error"),
        ({"shape": [10**9]}, r"must hold the .* bytes of weights"),
        ({"outputs": float("inf")}, r"network\.json must be one JSON object"),
        ({"shape": 3}, r"network\.json must describe a network"),
    ],
)
def test_a_network_larger_than_its_weights_is_not_built(changes, rule, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "network.json"
    said = json.loads(file.read_text()) | {"mean": [0.0], "std": [1.0]} | changes
    file.write_text(json.dumps(said))
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
    with pytest.raises(InputError, match=r"must be a file of at most .*\. Got a device or a pipe"):
        load_weights(nn.Linear(3, 2), tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["bmp", "gif", "tiff", "ppm", "eps"])
def test_only_the_formats_that_are_named_are_opened(kind):
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, kind)
    with pytest.raises(InputError, match=r"an image must be an image\. Got UnidentifiedImageError"):
        decode_bytes(file.getvalue(), "an image", caller="the test", max_pixels=10)


def test_a_text_in_an_image_does_not_fill_the_memory():
    from PIL.PngImagePlugin import PngInfo

    file, info = io.BytesIO(), PngInfo()
    info.add_text("comment", "x" * 2**21, zip=True)
    Image.new("L", (2, 2)).save(file, "png", pnginfo=info)
    assert len(file.getvalue()) < 2**13
    with pytest.raises(InputError, match=r"must be an image\. Got ValueError: Decompressed data too large"):
        decode_bytes(file.getvalue(), "an image", caller="the test", max_pixels=10)


def test_a_checkpoint_has_no_parts_larger_than_itself(tmp_path):
    file = tmp_path / "checkpoint.pt"
    checkpoints.save(file, {"a": torch.zeros(1000)})
    whole, packed = io.BytesIO(file.read_bytes()[: -checkpoints._END]), io.BytesIO()
    with zipfile.ZipFile(whole) as parts, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as others:
        for part in parts.infolist():
            others.writestr(part.filename, parts.read(part))
    body = packed.getvalue()
    file.write_bytes(body + checkpoints._MARK + checkpoints.hashlib.sha256(body).hexdigest().encode())
    with pytest.raises(InputError, match=r"must be a whole checkpoint.* Got parts that are larger than the file"):
        checkpoints.load(file)


def test_pictures_of_a_report_and_files_of_a_run_are_bounded(tmp_path, monkeypatch):
    run = compared(tmp_path / "run")
    monkeypatch.setattr(comparison, "_SHEET", 4000)
    np.savez_compressed(run.path / "sheet.npz", images=np.zeros(10_000))
    with pytest.raises(InputError, match=r"sheet\.npz must be a picture sheet\. Got a damaged file \(more than 64 MiB"):
        write_report(run.path)
    with pytest.raises(InputError, match=r"result\.json must have at most 10 bytes\. Got [\d,]+\."):
        inside(run.path, run.path / "result.json", 10)


DEEP = "[" * 100_000
BOMB = "augment:\n- &a [crop, crop, crop]\n" + "".join(
    f"- &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
TEXTS = {
    "deep.json": (DEEP, "cannot be parsed"),
    "deep.yaml": (DEEP[:1500], "cannot be parsed"),
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
        settings.read(str(tmp_path / name), "distill", flags.flags(RECIPES["distill"]))
    assert len(str(caught.value)) < 600


def test_deep_json_in_a_run_is_damaged(tmp_path):
    (tmp_path / "settings.json").write_text(DEEP)
    with pytest.raises(InputError, match=r"settings\.json must be one JSON object.*damaged"):
        Run.open(tmp_path)


# Code ------------------------------------------------------------------------------------------------------------

MODULE = """
import pathlib, numpy as np, torch
pathlib.Path("ran").touch()
def data():
    x, y = np.random.default_rng(0).random((12, 4)).astype("float32"), np.arange(12) % 2
    return x, y, x, y
def network(outputs):
    return torch.nn.Linear(4, outputs)
"""
FEW = "--steps 2 --batch-size 4 --validation 0"


@pytest.fixture
def _code(tmp_path, monkeypatch):
    """A module that leaves a file where it is imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "somebodys.py").write_text(MODULE)
    (tmp_path / "here").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "somebodys", raising=False)
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.usefixtures("_code")
@pytest.mark.parametrize(
    ("key", "value"), [("data", "somebodys:data"), ("model", "somebodys:network"), ("data", "some.bodys:not/a name")]
)
def test_a_config_runs_no_code_without_leave(key, value, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: value, "allow_code": True}))
    assert main(f"train --config {file} {FEW} --out run".split()) == 2
    said = capsys.readouterr().err
    assert f"`{key}` in `--config {file}` must not name code outside the package, which the job would run." in said
    assert f"Got '{value}'. If you trust it, add --allow-code.\n" in said
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.usefixtures("_code")
def test_code_that_the_user_names_or_allows_runs(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"data": "somebodys:data", "model": "somebodys:network"}))
    assert main(f"train --config {file} {FEW} --allow-code --out allowed".split()) == 0
    named = "--data somebodys:data --model=somebodys:network"
    assert main(f"train --config {file} {FEW} {named} --out named".split()) == 0
    for folder in ("allowed", "named"):
        assert "allow_code" not in json.loads((tmp_path / "here" / folder / "settings.json").read_text())["settings"]


@pytest.mark.usefixtures("_code")
def test_a_run_that_somebody_left_runs_no_code(trained, tmp_path, capsys):
    shutil.copytree(trained, "run")
    (tmp_path / "here" / "run" / "result.json").unlink()
    file = tmp_path / "here" / "run" / "settings.json"
    said = json.loads(file.read_text())
    said["settings"]["model"] = "somebodys:network"
    file.write_text(json.dumps(said))
    assert main("train --resume run".split()) == 2
    assert "`model` in `--resume run` must not name code outside the package" in capsys.readouterr().err
    assert not (tmp_path / "here" / "ran").exists()


@pytest.mark.usefixtures("_code")
def test_a_job_builds_only_its_own_network(trained, tmp_path):
    shutil.copytree(trained, "run")
    file = tmp_path / "here" / "run" / "network.json"
    assert isinstance(networks.load_own(file.parent, "mlp:3"), nn.Module)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"spec": "somebodys:network"}))
    with pytest.raises(InputError, match=r"must be 'mlp:3', which this job makes\. Got 'somebodys:network'"):
        networks.load_own(file.parent, "mlp:3")
    assert not (tmp_path / "here" / "ran").exists()
