"""What a user gets wrong: one line (what, rule, got, what to do), exit code 2, and nothing half written.

`{bad}` in a command is the folder of unusable files that the fixture `bad` makes, `{good}` the folder of usable ones;
a command runs in an empty folder.
"""

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jacmatch.cli import main
from jacmatch.jobs.study import Progress

from . import bad_settings

# PyTorch's own first use of forward mode compiles its decompositions with the deprecated torch.jit.script.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("all_as_users_run"),
]

SMALL = "--model mlp:4 --steps 12 --batch-size 8 --validation 0"
TRAIN = f"train --data npz:{{good}}/data.npz {SMALL}"
DISTILL = "distill --data npz:{good}/data.npz --teacher {good}/run --student mlp:3 --smoke --per-class 0"
TRANSFER = (
    "transfer --data npz:{good}/target.npz --teacher {good}/run --student mlp:3 --smoke --per-class 0 --validation 0 "
    "--methods lwf"
)
ROBUST = "robust --data npz:{good}/data.npz --model mlp:4 --smoke"
REGRESS = "--data synthetic:D=3,K=2,N=30,T=10"

X, Y = np.random.default_rng(0).random((30, 1, 4, 4), dtype=np.float32), np.arange(30) % 3
GOOD = {"x_train": X, "y_train": Y, "x_test": 1 - X[:12], "y_test": Y[:12]}
OBJECTS = np.empty(30, dtype=object)
ARRAYS = {
    "no_test": {"y_test": None},
    "unknown_array": {"x_tain": X},
    "objects": {"y_train": OBJECTS},
    "integers": {"x_train": (X * 255).astype(np.int64)},
    "three_axes": {"x_train": X[:, 0]},
    "channels_last": {"x_train": np.ones((30, 6, 6, 3), np.float32)},
    "up_to_255": {"x_train": np.round(X * 255)},
    "nan": {"x_train": np.where(np.arange(30)[:, None, None, None] == 4, np.float32("nan"), X)},
    "float_labels": {"y_train": Y.astype(np.float32)},
    "one_hot": {"y_train": np.eye(3, dtype=np.int64)[Y]},
    "negative": {"y_train": Y - 1},
    "gap": {"y_train": Y * 2},
    "new_class": {"y_test": Y[:12] + 1},
    "one_class": {"y_train": Y * 0, "y_test": Y[:12] * 0},
    "lengths": {"y_train": Y[:29]},
    "test_shape": {"x_test": X[:12, :, :3]},
    "empty": {"x_test": X[:0], "y_test": Y[:0]},
    "jacobians": {"j_train": np.ones((30, 2, 1, 4, 4), np.float32)},
}
MODULE = """
import numpy as np, torch
not_callable = 3
def raises(): raise RuntimeError("the disk is on fire\\nsecond line")
def wrong_thing(): return [1, 2]
def network_raises(outputs, shape): raise RuntimeError("no such layer")
def network_wrong(outputs, shape): return 3
def network_demands(depth): return torch.nn.Identity()
def two_outputs(shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(int(np.prod(shape)), 2))
"""
CONFIGS = {
    "unknown_key.json": '{"per_clas": 3}',
    "wrong_type.yaml": "steps: many",
    "float_for_int.yaml": "steps: 3.5",
    "bool_for_float.json": '{"lr": true}',
    "wrong_choice.yaml": "optimizer: adaam",
    "wrong_item.yaml": "augment: [crop, flop]",
    "list.yaml": "- steps: 3",
    "empty.yaml": "",
    "broken.yaml": "steps: [3",
    "broken.json": '{"steps": 3',
    "twice.yaml": "per-class: 3\nper_class: 4",
    "same_key.yaml": "steps: 3\nsteps: 4",
    "same_key.json": '{"steps": 3, "steps": 4}',
    "octal.yaml": "steps: 012",
    "minutes.yaml": "lr: 1:30",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Usable data, a run that trained on them, and its weights."""
    folder = tmp_path_factory.mktemp("good")
    for name in ("data", "target"):
        np.savez(folder / f"{name}.npz", **GOOD)
    np.savez(folder / "larger.npz", **{key: np.repeat(x, 2, -1) if x.ndim > 1 else x for key, x in GOOD.items()})
    command = f"train --data npz:{folder}/data.npz {SMALL} --out"
    assert main(shlex.split(f"{command} {folder}/run")) == 0
    assert main(shlex.split(f"{command} {folder}/unfinished --max-steps 10")) == 0
    return folder


@pytest.fixture(scope="module")
def bad(tmp_path_factory, good):
    """Files, folders and runs that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    OBJECTS[:] = "cat"
    for name, changes in ARRAYS.items():
        np.savez(folder / f"{name}.npz", **{key: x for key, x in {**GOOD, **changes}.items() if x is not None})
    whole = (good / "data.npz").read_bytes()
    (folder / "text.npz").write_text("x_train")
    (folder / "torn.npz").write_bytes(whole[: len(whole) // 2])
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    _pictures(folder)
    bad_settings.shards(folder)
    torch.save({"weight": torch.ones(2)}, folder / "weights.pt")
    weights = (good / "run" / "student.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(weights[: len(weights) // 2])
    for name in ("torn_settings", "torn_result", "torn_weights", "no_network", "foreign"):
        shutil.copytree(good / "run", folder / name)
    for name, file in (("torn_settings", "settings.json"), ("torn_result", "result.json")):
        (folder / name / file).write_text('{"job": "tra')
    (folder / "torn_weights" / "student.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "no_network" / "network.json").unlink()
    description = json.loads((folder / "foreign" / "network.json").read_text())
    (folder / "foreign" / "network.json").write_text(json.dumps({**description, "spec": "os:getcwd"}))
    return folder


def _pictures(folder):
    for name, sides in (("unequal", (4, 5)), ("one_broken", (4, 4)), ("stray", (4, 4))):
        for part in ("train", "test"):
            for label, side in zip(("cat", "dog"), sides, strict=True):
                (folder / name / part / label).mkdir(parents=True)
                for number in range(2):
                    Image.new("L", (side, side), 9 * number).save(folder / name / part / label / f"{number}.png")
    (folder / "one_broken" / "train" / "cat" / "1.png").write_text("no picture")
    (folder / "stray" / "train" / "cat" / "notes.txt").write_text("x")
    (folder / "no_classes" / "train").mkdir(parents=True)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """An empty working folder, a teacher cache of its own, and a module of the user's."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "users_own.py").write_text(MODULE)
    (tmp_path / "here").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")


def contents(folder=None):
    """Every file below a folder with what it holds, and every folder."""
    root = Path.cwd() if folder is None else folder
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


CASES = {
    # the command line itself
    "no such verb": ("distil", r"jacmatch: The verb .* Got 'distil'\. Nearest: distill.* Known: .*"),
    "flag before the verb": (
        "--data digits",
        r"jacmatch: The verb must be a known name\. Got '--data'\. .*",
    ),
    "unknown flag": (
        "distill --per-clas 3",
        r"jacmatch distill: unknown flag --per-clas\. Nearest: --per-class.* See jacmatch distill --help\.",
    ),
    "a positional as a flag": (
        "evaluate --model cnn3",
        r"jacmatch evaluate: --model is not a flag; MODEL is positional\. Write jacmatch evaluate MODEL\. .*",
    ),
    "a file of weights as a teacher": (
        "distill --teacher w.pth",
        r"jacmatch distill: `w\.pth` must be an existing file\. Got no such file\. Check the path\.",
    ),
    "flag of another verb": ("list --out x", r"jacmatch list: unknown flag --out\..* See jacmatch list --help\."),
    "no value": ("train --steps", r"`--steps` must be an integer\. Got nothing\."),
    "a fraction of a step": ("train --steps 3.5", r"`--steps` must be an integer\. Got '3\.5'\."),
    "a word for a number": ("train --lr=fast", r"`--lr` must be a number\. Got 'fast'\."),
    "unknown choice": (
        "train --optimizer adaam",
        r"`--optimizer` must be one of adam, adamw, sgd\. Got 'adaam'\. Nearest: adam",
    ),
    "unknown item": (
        "distill --methods labels gradients",
        r"`--methods` must be a list, each one of labels, outputs, jacobians\. Got 'labels' 'gradients'\.",
    ),
    "switch with value": ("train --smoke=yes", r"`--smoke` takes no value\. Got 'yes'\. Write --smoke\."),
    "stray word": ("train digits", r"unexpected word\. Got 'digits'\. See jacmatch train --help\."),
    "missing word": ("compare a", r"SECOND must be given\. Write jacmatch compare FIRST SECOND\."),
    # data: files
    "no such file": ("train --data npz:none.npz", r"`--data npz:FILE` must name an existing file\. Got 'none.npz',.*"),
    "no file named": ("train --data npz:", r"`--data npz:FILE` must .* Got no file\. Write for example npz:data.npz\."),
    "a folder for a file": ("train --data npz:{bad}", r"must name an existing file\. Got .* is a folder\."),
    "a text for an archive": ("train --data npz:{bad}/text.npz", r"text\.npz must be a numpy \.npz archive.*np\.savez"),
    "half an archive": ("train --data npz:{bad}/torn.npz", r"torn\.npz must be a numpy \.npz archive.*"),
    "objects in it": ("train --data npz:{bad}/objects.npz", r"must be a numpy \.npz archive of plain arrays.*"),
    "cifar without a folder": (
        "train --data cifar10",
        r"`--data cifar10:DIR` must name an existing folder\. Got no fol",
    ),
    "cifar elsewhere": ("train --data cifar10:{bad}", r"cifar10.*"),
    "no such fashion": ("train --data fashion-mnist:none", r"fashion-mnist.*'none'.*"),
    "no pictures": ("train --data folder:none", r"`--data folder:DIR` must name an existing folder\. Got 'none'.*"),
    "no classes": (
        "train --data folder:{bad}/no_classes",
        r"must have one folder for each class\. Got an empty folder",
    ),
    "unequal pictures": (
        "train --data folder:{bad}/unequal",
        r"must have the same size\. Got 4 × 4 in .* and 5 × 5 in .*\. Resize them.*@64\.",
    ),
    "no picture": ("train --data folder:{bad}/one_broken", r"1\.png must be an image.*"),
    "stray file": (
        "train --data folder:{bad}/stray",
        r"must have only \.png.* Got notes\.txt\. Convert or remove it\.",
    ),
    # data: contents
    "missing array": ("train --data npz:{bad}/no_test.npz", r"must have the arrays .*\(missing: y_test\)"),
    "misspelt array": ("train --data npz:{bad}/unknown_array.npz", r"Got 'x_tain'\. Nearest: x_train.*"),
    "pixels as integers": (
        "train --data npz:{bad}/integers.npz",
        r"`x_train` .* uint8 or a float type\. Got int64\. Con",
    ),
    "no channel": ("train --data npz:{bad}/three_axes.npz", r"\(N, C, H, W\).*Got shape \(30, 4, 4\)\. Give gray"),
    "channels last": (
        "train --data npz:{bad}/channels_last.npz",
        r"looks like \(N, H, W, C\)\. Put the channels first.*",
    ),
    "pixels above 1": ("train --data npz:{bad}/up_to_255.npz", r"pixels in \[0, 1\]\. Got integers.* by 255\."),
    "NaN pixels": (
        "train --data npz:{bad}/nan.npz",
        r"must be finite.*Got NaN or infinity in 1 of 30 rows, first in row 4",
    ),
    "labels as floats": (
        "train --data npz:{bad}/float_labels.npz",
        r"`y_train` .*\. Got float32 .* \.astype\(np\.int64\)",
    ),
    "labels one-hot": ("train --data npz:{bad}/one_hot.npz", r"Got int64 of shape \(30, 3\)\. Convert one-hot rows.*"),
    "label below 0": (
        "train --data npz:{bad}/negative.npz",
        r"class indices must count from 0\. Got -1 … 1\. Renumber",
    ),
    "label out of range": (
        "train --data npz:{bad}/gap.npz",
        r"must be 0 … K−1.* Got 3 distinct numbers from 0 to 4\. Renum",
    ),
    "label in test only": ("train --data npz:{bad}/new_class.npz", r"`y_test` .* 0 … 2\. Got 3\. Remove such rows.*"),
    "one class": ("train --data npz:{bad}/one_class.npz", r"at least two classes\. Got 1\."),
    "unequal lengths": ("train --data npz:{bad}/lengths.npz", r"equal lengths\. Got 30 inputs and 29 labels"),
    "unequal shapes": (
        "train --data npz:{bad}/test_shape.npz",
        r"same type and shape per row\. Got .*\(1, 4, 4\) and .*\(1, 3, 4\)",
    ),
    "nothing to test on": (
        "train --data npz:{bad}/empty.npz",
        r"`x_test` .* must not be empty\. Got shape \(0, 1, 4, 4\)",
    ),
    "Jacobians of another shape": (
        "train --data npz:{bad}/jacobians.npz",
        r"`j_train` .*\(30, 3, 1, 4, 4\)\. Got \(30, 2",
    ),
    "too few of a class": (TRAIN + " --per-class 11", r"class.* Got .*: 10.* Use at most 10\."),
    "too much held out": (TRAIN + " --validation 30", r"must be smaller than .*, 30\. Got 30\. Hold out fewer\."),
    "less than nothing held out": (
        TRAIN + " --validation -1",
        r"`--validation` must be a fraction below 1, or a.* Got -1\.0\.",
    ),
    "one and a half samples held out": (TRAIN + " --validation 1.5", r"`--validation` must be .*integer.* Got 1\.5\."),
    "no number held out": (TRAIN + " --validation nan", r"`--validation` must be a fraction below 1.* Got nan\."),
    # data and models of the user's own
    "unknown data": (
        "train --data digit",
        r"`--data` must be a known name\. Got 'digit'\. Nearest: digits\. Known: .*",
    ),
    "no such module": (
        "train --data users_owm:raises",
        r"Got 'users_owm:raises'|must name a module that can be imported",
    ),
    "no such callable": ("train --data users_own:raise", r"Got 'raise'\. Nearest: raises.*"),
    "callable raises": (
        "train --data users_own:raises",
        r"`--data users_own:raises` must .* Got RuntimeError: the disk is on fire\. Call it in Python.*",
    ),
    "callable gives no data": ("train --data users_own:wrong_thing", r"must return a Data, .* Got list\."),
    "unknown model": (
        TRAIN + " --model vgg-4",
        r"Got 'vgg-4'\. Nearest: vgg4.*RUN_FOLDER \(evaluate.*",
    ),
    "unknown student": (DISTILL + " --student resnet2", r"Got 'resnet2'\. Nearest: resnet.*"),
    "layout of nothing": (TRAIN + " --model mlp:big", r"`mlp:LAYOUT` must be widths.* Got 'big'\. Two layers .*"),
    "model too deep for the image": (
        TRAIN + " --model vgg9",
        r"must have at least 17 pixels per side.* Got \(1, 4, 4\)\. For 8×8.*",
    ),
    "model of no module": (TRAIN + " --model users_owm:network", r"must be importable.* Got 'users_owm:network'.*"),
    "model of no callable": (
        TRAIN + " --model users_own:not_callable",
        r"must be a function .* Got an object of type int",
    ),
    "model raises": (TRAIN + " --model users_own:network_raises", r"users_own:network_raises.*no such layer.*"),
    "model is none": (TRAIN + " --model users_own:network_wrong", r"torch\.nn\.Module\. Got an object of type int\."),
    "model wants more": (TRAIN + " --model users_own:network_demands", r"Got required parameters depth"),
    "model of two outputs": (TRAIN + " --model users_own:two_outputs", r"outputs.*2.*"),
    # settings
    "no steps": (TRAIN + " --steps 0", r"`steps` of `Training` must be an integer of at least 1\. Got 0\."),
    "negative batch": (TRAIN + " --batch-size -8", r"`batch_size` of `Training` .* at least 1\. Got -8\."),
    "negative rate": (TRAIN + " --lr -0.1", r"`lr` of `Training` must be finite and positive\. Got -0\.1\."),
    "rate is NaN": (TRAIN + " --lr nan", r"`lr` of `Training` must be finite and positive\. Got nan\."),
    "negative count of a class": (TRAIN + " --per-class -1", r"`--per-class` must be at least 0; .* Got -1\."),
    "milestone past the end": (TRAIN + " --milestones 1.5", r"`milestones` of `Training` .* Got \(1\.5,\)\. Use"),
    "warmup without end": (TRAIN + " --warmup 13", r"`warmup` .* not be longer than `steps`, 12\. Got 13\."),
    "crops of vectors": (f"train {REGRESS} {SMALL} --augment crop", r"images.*"),
    "seed of 67 bits": (TRAIN + " --seed 99999999999999999999", r"`--seed` must be .* Got 99999999999999999999\."),
    "seed below 0": (TRAIN + " --seed -1", r"`--seed` must be at least 0 .* Got -1\."),
    "unknown device": (TRAIN + " --device gpu", r"`device` must be 'cpu', 'cuda', 'cuda:N' or 'auto'\. Got 'gpu'\."),
    "no such GPU": (
        TRAIN + " --device cuda:99",
        r"`device` must be one that this machine has\. Got 'cuda:99'.* Use 'auto'",
    ),
    "fp16 on the CPU": (TRAIN + " --precision fp16", r"fp16.* needs a GPU\. Got device 'cpu'\. Use precision='bf16'"),
    "steps of distill": (DISTILL + " --steps -3", r"`steps` of `Training` must be .* at least 1\. Got -3\."),
    "no seeds": (DISTILL + " --seeds 0", r"`--seeds` of `distill` must be at least 1\. Got 0\."),
    "no methods": (DISTILL + " --methods", r"`--methods` of `distill` must name at least one\. Known: labels, .*"),
    "a method twice": (
        DISTILL + " --methods labels labels",
        r"`--methods` of `distill` must name each method once\. Got labels labels",
    ),
    "unknown probe": (
        DISTILL + " --probe random-output",
        r"`--probe` .* Got 'random-output'\. Nearest: random-outputs.*",
    ),
    "unknown readout": (DISTILL + " --readout logit", r"`--readout` .* Got 'logit'\. Nearest: .*logits.*"),
    "unknown loss": (DISTILL + " --jacobian-loss relativ", r"`--jacobian-loss` must be one of .* Nearest: relative"),
    "readout of a layer": (
        DISTILL + " --readout pooled-features",
        r"needs a layer or a head of each network\. Use the Python class",
    ),
    "more rows than outputs": (
        DISTILL + " --probe sampled-rows --probes 9",
        r"`--probes` of sampled-rows must be at most 3, all rows\. Got 9\.",
    ),
    "temperature of nothing": (DISTILL + " --temperature 0", r"`temperature` of .* must be positive.* Got 0"),
    "negative noise": (DISTILL + " --point noise --noise -1", r"-1.*"),
    "more than the whole gradient": (DISTILL + " --jacobian-share 1.5", r"[Ss]hare.*1\.5.*"),
    "negative weight": (DISTILL + " --labels-weight -1", r"`--labels-weight`.*-1.*"),
    "law of a probe without one": (
        DISTILL + " --probe top-class --probe-law sphere",
        r"`--probe-law` of `distill` needs --probe random-outputs or random-inputs or .*\. Got top-class",
    ),
    "fading after the end": (DISTILL + " --jacobian-fades-from 2", r"`fades_from` of .* must lie in \[0, 1\]\. Got 2"),
    "classes of a regression": (
        f"distill {REGRESS} --teacher mlp:4 --student mlp:3 --per-class 3",
        r"per.class.*regress",
    ),
    "kl of a regression": (
        f"distill {REGRESS} --teacher mlp:4 --student mlp:3 --per-class 0 --smoke --output-loss kl",
        r"regression.* Got kl\. Use .*output_loss='squared'",
    ),
    "no seeds of robust": (ROBUST + " --seeds 0", r"`--seeds` of `robust` must be at least 1\. Got 0\."),
    "no draws of noise": (ROBUST + " --draws 0", r"`--draws` of `robust` must be at least 1\. Got 0\."),
    "nothing to train": (
        ROBUST + " --penalty-weight --noise-augment",
        r"`--penalty-weight` or `--noise-augment` of `robust` must name at least one\.",
    ),
    "a weight twice": (
        ROBUST + " --penalty-weight 0.1 0.1",
        r"values of `--penalty-weight` of `robust` must all be different\. Got 0\.1 0",
    ),
    "a negative weight of the penalty": (
        ROBUST + " --penalty-weight -0.1",
        r"`--penalty-weight` of `robust` must be at least 0 and finite\. Got -0\.1\.",
    ),
    "no noise to train with": (
        ROBUST + " --noise-augment 0",
        r"`--noise-augment` of `robust` must be positive and finite\. Got 0",
    ),
    "noise that is NaN": (
        ROBUST + " --noise-levels nan",
        r"`--noise-levels` of `robust` must be positive and finite\. Got nan",
    ),
    "unknown penalty": (ROBUST + " --penalty hofman", r"`--penalty` must be one of hoffman, .* Nearest: hoffman"),
    "many times every row": (
        ROBUST + " --probe every-row --probes 2",
        r"`--probes` of `robust` must be 1 with --probe every-row\. Got 2\.",
    ),
    "one class of the wrong form": (
        ROBUST + " --probe label-class --penalty piecewise-linear-cross-entropy",
        r"must estimate the norm of all rows\. Got LabelClass",
    ),
    "a penalty for classes in a regression": (
        f"robust {REGRESS} --model mlp:3 --smoke --penalty paper-label-cross-entropy",
        r"`Robustness\(task='regression'\)` must not .* Got paper-label-cross-entropy\. Use form='squared-norm'",
    ),
    "no seeds of transfer": (TRANSFER + " --seeds 0", r"`--seeds` of `transfer` must be at least 1\. Got 0\."),
    "a teacher of the classes of the target": (
        TRANSFER.replace("target", "data"),
        r"`--teacher` of `transfer` must have been trained on classes other than .* Use `jacmatch distill --data",
    ),
    "unlabelled images of another size": (
        TRANSFER + " --unlabelled npz:{good}/larger.npz",
        r"`--unlabelled` of `transfer` must be images of shape \(1, 4, 4\), as --data has\. Got \(1, 4, 8\)",
    ),
    "unlabelled images where all are labelled": (
        TRANSFER + " --unlabelled npz:{good}/target.npz",
        r"`--unlabelled` of `transfer` must leave images that are not labeled\. Got none\.",
    ),
    "features of no layer": (
        TRANSFER.replace("lwf", "features") + " --feature-layer features.conv9",
        r"The layer of a readout must be a known name\. Got 'features\.conv9'",
    ),
    "unknown method of transfer": (
        TRANSFER + "+gradients",
        r"`--methods` must be a list, each one of labels, oracle, lwf, .*\. Got 'lwf\+gradients'",
    ),
    "a method of transfer twice": (
        TRANSFER + " lwf",
        r"`--methods` of `transfer` must name each method once\. Got lwf lwf",
    ),
    "the size of no weights": (
        TRANSFER + " --teacher-size 8",
        r"`--teacher-size` of `transfer` must be used with --teacher-weights",
    ),
    "a run and weights": (
        TRANSFER + " --teacher-weights {good}/run/student.safetensors",
        r"A run folder already contains its weights\. Got .*student\.safetensors",
    ),
    "weights of a transfer nowhere": (
        TRANSFER + " --teacher cnn3 --teacher-weights none.safetensors",
        r"Weights must be a readable file\. Got `none\.safetensors`",
    ),
    "transfer to a regression": (
        f"transfer {REGRESS} --teacher {{good}}/run --smoke",
        r"`--data` of `transfer` must have classes\. Got a regression",
    ),
    "no classes are left": (
        "transfer --data npz:{good}/data.npz --teacher mlp:4 --student mlp:3 --source-classes 2",
        r"`--source-classes` of `transfer` must leave two classes each for teacher and target\. Got 2 of 3\.",
    ),
    "maps of a perceptron": (
        TRANSFER + "+attention",
        r"The student must have feature maps with more than one pixel\. Got none\. Choose a convolutional",
    ),
    "half a pair": (
        TRANSFER + "+attention --pairs features.conv1",
        r"Each of `--pairs` must be STUDENT_LAYER:TEACHER_LAYER\. Got 'features\.conv1'",
    ),
    "a pair of no layer": (
        TRANSFER + "+attention --pairs layer9:layer1",
        r"A layer of the student in `--pairs` must be a known name\. Got 'layer9'\. Nearest: layer",
    ),
    "pooled to nothing": (TRANSFER + " --pool 0", r"`--pool` of `transfer` must be at least 1\. Got 0\."),
    "shares above one": (
        "transfer --smoke --recipe paper --outputs-share 0.9 --attention-share 0.2",
        r"The shares of all terms must add up to less than 1",
    ),
    "the report of no comparison": (
        "report {good}/run",
        r"must contain a comparison or tables\. Got a run of `train`\. Give a run of distill, ",
    ),
    # teachers and weights
    "teacher of other outputs": (
        "distill --data digits --teacher {good}/run --student mlp:3",
        r"must fit the data: inputs \(1, 8, 8\), 10 outputs\. Got inputs \(1, 4, 4\), 3 outputs",
    ),
    "teacher and student differ": (DISTILL + " --student users_own:two_outputs", r"outputs.*2.*"),
    "teacher nowhere": (DISTILL + " --teacher runs/none", r"runs/none must .*folder.*"),
    "pickled weights": (
        DISTILL + " --teacher mlp:4 --teacher-weights {bad}/weights.pt",
        r"weights\.pt` must contain the weights of this MLP\. Got missing: .*; not in the model: weight",
    ),
    "weights nowhere": (
        DISTILL + " --teacher mlp:4 --teacher-weights no.safetensors",
        r"readable file\. Got `no\.safe",
    ),
    "half the weights": (
        DISTILL + " --teacher mlp:4 --teacher-weights {bad}/torn.safetensors",
        r"must be a complete safeten",
    ),
    "weights of another model": (
        DISTILL + " --teacher mlp:5 --teacher-weights {good}/run/student.safetensors",
        r"must contain the weights of this .* Got of another shape: .*, must be .* Build the model they were trained.*",
    ),
    "weights for a run": (
        DISTILL + " --teacher-weights {good}/run/student.safetensors",
        r"A run folder already contains its weights\. Got .*\. Leave them out\.",
    ),
    "no weights": (
        "evaluate mlp:4 --data npz:{good}/data.npz",
        r"'mlp:4' must have trained weights.* Give a run folder, or .*",
    ),
    # run folders
    "a file for a folder": (TRAIN + " --out {good}/data.npz", r"\(`--out`\) must be new.* Got a file\. Choose another"),
    "a folder in a file": (TRAIN + " --out {good}/data.npz/run", r"\(`--out`\) must be .*\. Choose another --out\."),
    "no run": (
        TRAIN + " --out {bad}",
        r"\(`--out`\) must be new.* Got a folder that is not a run and contains '.*'\. Choose",
    ),
    "a finished run": (
        TRAIN + " --out {good}/run",
        r"\(`--out`\) must be new.* Got a finished run of `train`\. Choose",
    ),
    "another run": (
        TRAIN + " --out {good}/unfinished --lr 0.5 --seed 3",
        r"Got a run with other settings: lr \(0\.001 there, 0\.5 here\), seed \(0 there, 3 here\)\. Choose",
    ),
    "a run of another job": (DISTILL + " --out {good}/unfinished", r"Got a run of `train`, not of `distill`\. Choose"),
    "evaluates nothing": (
        "evaluate none/run",
        r"none/run must be a run folder\. Got no folder of that name\. Give the --out",
    ),
    "evaluates no run": ("evaluate {bad}", r"must be a run folder\. Got a folder without settings\.json\."),
    "evaluates torn settings": ("evaluate {bad}/torn_settings", r"settings\.json must be one JSON object.*damaged.*"),
    "evaluates no network": (
        "evaluate {bad}/no_network",
        r"must contain a trained network\. Got a run without network\.json",
    ),
    "evaluates torn weights": (
        "evaluate {bad}/torn_weights --data npz:{good}/data.npz",
        r"must have the checksum that it was written with\. Got another\. It is damaged",
    ),
    "evaluates on other data": (
        "evaluate {good}/run --data npz:{good}/larger.npz",
        r"must fit the data: inputs \(1, 4, 8\)",
    ),
    "evaluates foreign code": (
        "evaluate {bad}/foreign --data npz:{good}/data.npz",
        r"is built by code outside the package\. Got os:getcwd\. If you trust it, .*--allow-code",
    ),
    "compares with nothing": (
        "compare {good}/run none/run --data npz:{good}/data.npz",
        r"none/run must be a run folder",
    ),
    "compares too little": (
        "compare {good}/run {good}/run --samples 0",
        r"`--samples` of `compare` .* at least 1\. Got 0",
    ),
    "doctor of one sample": ("doctor mlp:4 --samples 1", r"`--samples` of `doctor` must be at least 2\. Got 1\."),
    "reports an unfinished run": (
        "report {good}/unfinished",
        r"must contain a finished run\. Got a run without result\.json\. R",
    ),
    "reports a torn result": ("report {bad}/torn_result", r"result\.json must be one JSON object.*damaged.*"),
    "reports no run": ("report {bad}", r"must be a run folder\. Got a folder without settings\.json\."),
    # configuration
    "no such config": (
        "train --config none.yaml",
        r"`--config none\.yaml` must name .* Got No such file.* Check the path\.",
    ),
    "config of no run": ("train --config .", r"`--config \.` must name .* Got No such file.*"),
    "unknown key": (
        "train --config {bad}/unknown_key.json",
        r"must contain only settings of `train`\. Got the key 'per_clas'\. Nearest: per_class\. See jacmatch train",
    ),
    "wrong type": (
        "train --config {bad}/wrong_type.yaml",
        r"`steps` in `.*` must be an integer\. Got 'many' \(text\)",
    ),
    "fraction in it": (
        "train --config {bad}/float_for_int.yaml",
        r"`steps` .* must be an integer\. Got 3\.5 \(number\)",
    ),
    "truth for a number": ("train --config {bad}/bool_for_float.json", r"`lr` .* a number\. Got True \(boolean\)"),
    "choice in it": ("train --config {bad}/wrong_choice.yaml", r"`optimizer` .* one of adam, .* Got 'adaam' \(text\)"),
    "item in it": ("train --config {bad}/wrong_item.yaml", r"`augment` .* a list, each one of .* \(list\)"),
    "no mapping": ("train --config {bad}/list.yaml", r"must map settings to values\. Got a list\."),
    "empty config": ("train --config {bad}/empty.yaml", r"must map settings to values\. Got nothing\."),
    "broken YAML": ("train --config {bad}/broken.yaml", r"Got a file that cannot be parsed \(.*line 1.*\)"),
    "broken JSON": ("train --config {bad}/broken.json", r"Got a file that cannot be parsed \(.*line 1.*\)"),
    "a key twice": ("train --config {bad}/twice.yaml", r"`per_class` must be given once in .*"),
    "one key twice": ("train --config {bad}/same_key.yaml", r"cannot be parsed \(the key 'steps' occurs twice\)"),
    "one key twice in JSON": ("train --config {bad}/same_key.json", r"\(the key 'steps' occurs twice\)"),
    "an octal number": ("train --config {bad}/octal.yaml", r"must be an integer\. Got '012' \(text\)"),
    "a sexagesimal number": ("train --config {bad}/minutes.yaml", r"must be a number\. Got '1:30' \(text\)"),
    "a device for a file": (
        "train --data npz:/dev/null",
        r"an existing file\. Got '/dev/null', which is not a regular file",
    ),
    **bad_settings.CASES,
    "settings of another job": ("distill --config {good}/run", r"must be for `distill`\. Got the settings of `train`"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, good, bad, tmp_path, capsys):
    command, expected = CASES[name]
    capsys.readouterr()
    before = contents(), contents(good), contents(bad)
    code = main(shlex.split(command.format(good=good, bad=bad)))
    out, err = capsys.readouterr()
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert re.search(expected, err), err
    assert err.startswith("jacmatch")
    assert "Traceback" not in err
    assert not out
    assert (contents(), contents(good), contents(bad)) == before


def test_there_are_many_cases():
    assert len(CASES) >= 100


# What the machine does --------------------------------------------------------------------------------------------


def run(command, capsys, code, **names):
    """What a command prints on stderr, after checking its exit code."""
    assert main(shlex.split(command.format(**names))) == code, capsys.readouterr().err
    return capsys.readouterr().err


def full(error=None, *_):
    raise error if isinstance(error, OSError) else OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("command", [TRAIN, DISTILL, "evaluate {good}/run --data npz:{good}/data.npz"])
def test_a_full_disk_is_one_line_and_leaves_nothing(command, good, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", full)
    err = run(command + " --out new/run", capsys, 2, good=good)
    assert re.fullmatch(
        r"jacmatch \w+: .*\(`--out`\) must be writable\. Got 'No space left on device'\. Free .*\n",
        err,
    )
    assert not contents()


def test_a_file_over_the_limit_of_the_shell(good, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", lambda _: full(OSError(errno.EFBIG, "File too large")))
    assert "Got 'File too large'. Raise the limit of the file size" in run(TRAIN + " --out run", capsys, 2, good=good)
    assert not contents()


def test_a_cache_that_cannot_be_made_is_named(good, monkeypatch, capsys):
    monkeypatch.setenv("JACMATCH_CACHE", "/dev/null/x")
    err = run(DISTILL.replace("{good}/run", "mlp:3"), capsys, 2, good=good)
    assert "The folder of cached teachers /dev/null/x/" in err
    assert "(`JACMATCH_CACHE`) must be writable. Got 'Not a directory'. Choose another JACMATCH_CACHE." in err


def test_closed_streams_and_an_encoding_without_the_letters(monkeypatch, good):
    """As of a service, of `>&-`, and of LC_ALL=C."""
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, None)
        assert main(["--version"]) == 0
        getattr(sys, name).close()
        monkeypatch.undo()
    monkeypatch.chdir(good)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(shlex.split("evaluate run --out é2")) == 0
    assert b"Run folder: \\xe92" in out.buffer.getvalue()


def test_a_disk_that_fills_up_in_training_keeps_the_checkpoint(good, monkeypatch, capsys):
    fsync, calls = os.fsync, []

    def later(descriptor):
        calls.append(descriptor)
        full() if len(calls) == 6 else fsync(
            descriptor
        )  # settings, environment, inputs, doctor, checkpoint of step 10, next

    monkeypatch.setattr(os, "fsync", later)
    err = run(TRAIN + " --out run", capsys, 2, good=good)
    assert re.fullmatch(r"jacmatch train: .*No space left on device.*\n", err)
    assert Path("run/checkpoint.pt").is_file()
    assert not Path("run/result.json").exists()
    assert main(shlex.split((TRAIN + " --out run").format(good=good))) == 0
    assert Path("run/result.json").is_file()


def test_a_folder_that_may_not_be_written(good, monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    err = run(TRAIN + " --out run", capsys, 2, good=good)
    assert "must be writable. Got 'Permission denied'. Choose another --out, or make that one" in err


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_no_memory(error, good, monkeypatch, capsys):
    def refused(*_, **__):
        raise error

    monkeypatch.setattr(torch.optim.Adam, "step", refused)
    err = run(TRAIN + " --out run", capsys, 2, good=good)
    assert (
        err
        == "jacmatch train: the memory is full. Use a smaller --batch-size, or less data. No run folder was written.\n"
    )
    assert not contents()


def test_a_loss_that_is_no_number_keeps_what_is_good(good, capsys):
    err = run(TRAIN + " --out run --lr 1e30 --optimizer sgd", capsys, 2, good=good)
    assert re.fullmatch(r"jacmatch train: .*must be finite.* Lower `lr`.*There is no checkpoint\.\n", err)
    assert not contents()


def test_an_empty_folder_stays_an_empty_folder(good, capsys):
    Path("run").mkdir()
    run(TRAIN + " --out run --device cuda:99", capsys, 2, good=good)
    assert contents() == {"run": None}


# Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, call):
    """Sends this process Ctrl-C in a step of training, once."""
    calls = []
    shown = Progress.training

    def training(self, name, steps):
        on_step = shown(self, name, steps)

        def interrupting(step, metrics):
            on_step(step, metrics)
            calls.append(step)
            if len(calls) == call:
                signal.raise_signal(signal.SIGINT)

        return interrupting

    monkeypatch.setattr(Progress, "training", training)


def result(folder):
    """The result of a run without what the clock and the machine decide."""
    content = json.loads((Path(folder) / "result.json").read_text())
    text = json.dumps(content)
    for key in ("seconds", "samples_per_second", "peak_memory_bytes"):
        text = re.sub(rf'"{key}": (\{{[^}}]*\}}|[^,}}]*)', f'"{key}": 0', text)
    return json.loads(text)


def test_ctrl_c_in_training_and_the_same_command_goes_on_bit_for_bit(good, monkeypatch, capsys):
    command = f"train --data npz:{good}/data.npz {SMALL} --ema 0.9 --out"
    assert main(shlex.split(f"{command} straight")) == 0
    interrupt_at(monkeypatch, 7)
    err = run(f"{command} cut", capsys, 130)
    assert err == "jacmatch train: interrupted. Finished work is kept in cut: run the same command again to resume.\n"
    assert Path("cut/checkpoint.pt").is_file()
    assert not Path("cut/result.json").exists()
    assert run(f"{command} cut", capsys, 0) == ""
    assert Path("cut/student.safetensors").read_bytes() == Path("straight/student.safetensors").read_bytes()
    assert result("cut") == result("straight")


@pytest.mark.ci
def test_ctrl_c_twice_in_a_comparison(good, monkeypatch, capsys):
    settings = "--steps 20 --batch-size 8 --seeds 1 --methods labels jacobians"
    command = f"{DISTILL.format(good=good).replace('--smoke', settings)} --out"
    assert main(shlex.split(f"{command} straight")) == 0
    for call in (5, 17):  # in the first student, and again in the second: 15 steps more for the first
        with monkeypatch.context() as patch:
            interrupt_at(patch, call)
            err = run(f"{command} cut", capsys, 130)
        assert (
            err
            == "jacmatch distill: interrupted. Finished work is kept in cut: run the same command again to resume.\n"
        )
        assert not Path("cut/result.json").exists()
    assert Path("cut/seed0/labels/result.json").is_file()
    assert main(shlex.split(f"{command} cut")) == 0
    for student in ("labels", "jacobians"):
        name = f"seed0/{student}/student.safetensors"
        assert (Path("cut") / name).read_bytes() == (Path("straight") / name).read_bytes()
    assert result("cut") == result("straight")


def test_ctrl_c_without_out_names_the_folder(good, monkeypatch, capsys):
    interrupt_at(monkeypatch, 3)
    err = run(TRAIN, capsys, 130, good=good)
    advice = "Finished work is kept in runs/train-001: run the same command with --out runs/train-001 again to resume."
    assert err == f"jacmatch train: interrupted. {advice}\n"
    assert run(TRAIN + " --out runs/train-001", capsys, 0, good=good) == ""


def test_ctrl_c_before_anything_is_written(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jacmatch.datasets.load", interrupted)
    err = run("train", capsys, 130)
    assert err == "jacmatch train: interrupted. No run folder was written.\n"
    assert not contents()


# The process ------------------------------------------------------------------------------------------------------


def process(*words, **more):
    """A finished process of the command line."""
    command = [sys.executable, "-m", "jacmatch", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


@pytest.mark.ci
def test_the_process_says_one_line_and_exits_with_2(good):
    ended = process(*shlex.split((TRAIN + " --lr nan").format(good=good)))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "jacmatch train: `lr` of `Training` must be finite and positive. Got nan.\n"
    assert not contents()


# Our own defects --------------------------------------------------------------------------------------------------


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr("jacmatch.datasets.load", int)  # no line of the test, which is no part of the package either
    err = run("train", capsys, 1)
    assert err.startswith("Traceback")
    assert ": 'digits'\njacmatch train: this is a defect of jacmatch. Please report it" in err


def test_a_traceback_shows_where_a_mistake_was_raised(capsys):
    err = run("train --data digit --traceback", capsys, 2)
    assert err.startswith("Traceback")
    assert "jacmatch.errors.InputError: `--data` must" in err
    assert err.splitlines()[-1].startswith("jacmatch train: `--data` must be a known name.")
