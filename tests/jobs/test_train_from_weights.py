"""`train --weights`: pretrained weights of other classes, all of them or the last layer alone trained further."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jacmatch import load_student
from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.jobs import Train
from jacmatch.models import build

SHAPE = (1, 8, 8)


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of a training script: 37 classes, prefixed names, without mean and std."""
    torch.manual_seed(3)
    net = build("cnn3", 37, SHAPE)
    state = {f"module.{name}": value for name, value in net.state_dict().items() if name not in ("mean", "std")}
    torch.save({"epoch": 9, "model": state}, tmp_path / "w.pth")
    return net, tmp_path / "w.pth"


def trained(weights, folder, **changes):
    job = Train(
        model="cnn3", weights=weights, mean=(0.5,), std=(0.25,), smoke=True, doctor=False, out=folder / "run", **changes
    )
    job.run()
    return load_student(folder / "run")


def test_a_probe_trains_the_last_layer_only(weights, tmp_path):
    net, file = weights
    student = trained(file, tmp_path, tune="head")
    own, given = student.state_dict(), net.state_dict()
    assert own["mean"].flatten().tolist() == [0.5]
    assert own["std"].flatten().tolist() == [0.25]
    names = [name for name, _ in net.named_parameters()]
    same = [name for name in names if own[name].shape == given[name].shape and torch.equal(own[name], given[name])]
    assert len(same) == len(names) - 2
    assert {len(own[name]) for name in names if name not in same} == {10}


def test_fine_tuning_trains_all_layers(weights, tmp_path):
    net, file = weights
    own = trained(file, tmp_path).state_dict()
    assert not [name for name, value in net.named_parameters() if torch.equal(own[name], value)]


def test_images_are_resized_inside_the_network(weights, tmp_path):
    student = trained(weights[1], tmp_path, size=12)
    x = torch.rand(2, *SHAPE)
    larger = torch.nn.functional.interpolate(x, (12, 12), mode="bilinear", align_corners=False)
    assert student.size == 12
    torch.testing.assert_close(student(x), student.network(larger))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 12}, r"`--size` of `train` must be used with --weights\."),
        ({"tune": "head"}, r"`--tune` of `train` must be used with --weights\."),
        ({"weights": "nothere.pt"}, r"Weights must be a readable file\. Got `nothere\.pt`"),
    ],
)
def test_flags_that_do_not_go_together(changes, message, tmp_path):
    changes = {name: Path(value) if name == "weights" else value for name, value in changes.items()}
    with pytest.raises(InputError, match=message):
        Train(smoke=True, out=tmp_path / "run", **changes).run()


def error_of(capsys, words):
    assert main(words.split()) == 2
    return capsys.readouterr().err


def test_messages_name_flags(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = "train --model cnn3 --weights w.pth --smoke"
    unknown = error_of(capsys, train)
    assert "Give both: --mean 0 --std 1" in unknown
    assert "for `compare` save a run by train --weights" in unknown
    other = error_of(capsys, "evaluate cnn3 --weights w.pth --mean 0 --std 1 --smoke")
    assert "37 outputs and the model 10. To fine-tune them for other classes: jacmatch train --weights w.pth" in other
    assert "jacmatch transfer --teacher-weights w.pth --teacher-outputs 37." in other
    assert "`nothere.pt` must be an existing file. Got no such file." in error_of(capsys, "evaluate nothere.pt")
    assert "`a/b.pt` must be an existing file." in error_of(capsys, "evaluate a/b.pt")
    assert "Write MODEL --weights w.pth" in error_of(capsys, "evaluate w.pth")
    assert "for a teacher --teacher-weights." in error_of(capsys, "distill --teacher w.pth")


def test_a_folder_as_data_is_answered_with_how_to_write_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/train/cat").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "photos/train/cat/0.png")
    assert "Write folder:photos for images in photos/train/CLASS/" in error_of(capsys, "train --data photos")
    np.savez(tmp_path / "mine.npz", x_train=np.zeros(1))
    assert "Write npz:mine.npz." in error_of(capsys, "train --data mine.npz")
