import errno
import hashlib
import os

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError
from jacmatch.training.checkpoints import _MARK, check_finite, check_same, load, load_weights, save


def seal(file):
    """Makes any file end as a checkpoint ends."""
    file.write_bytes(file.read_bytes() + _MARK + hashlib.sha256(file.read_bytes()).hexdigest().encode())


def test_what_is_saved_comes_back(tmp_path):
    state = {"step": 3, "rate": 0.1, "names": ("a", "b"), "none": None, "deep": {"list": [1, {"x": torch.arange(3)}]}}
    save(tmp_path / "c.pt", state)
    back = load(tmp_path / "c.pt")
    assert torch.equal(back["deep"]["list"][1]["x"], torch.arange(3))
    del back["deep"], state["deep"]
    assert back == state
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save(tmp_path / "c.pt", {"step": 1})

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"must be writable\. Got 'No space left on device'"):
        save(tmp_path / "c.pt", {"step": 2})
    monkeypatch.undo()
    assert load(tmp_path / "c.pt") == {"step": 1}
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    """torch itself reads most of them in silence."""
    file = tmp_path / "c.pt"
    save(file, {"x": torch.rand(20), "step": 3})
    whole = file.read_bytes()
    for offset in range(0, len(whole), 7):
        file.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << offset % 8]) + whole[offset + 1 :])
        with pytest.raises(InputError, match=r"c\.pt must be a complete checkpoint"):
            load(file)


@pytest.mark.parametrize("length", [0, 1, 100, 500, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, length):
    file = tmp_path / "c.pt"
    save(file, {"x": torch.rand(100)})
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(
        InputError, match=r"c\.pt must be a complete checkpoint of jacmatch\. .*Remove it to start again\."
    ):
        load(file)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint at all")
    with pytest.raises(InputError, match=r"text\.pt must be a complete checkpoint"):
        load(tmp_path / "text.pt")
    with pytest.raises(InputError, match=r"none\.pt must be a complete checkpoint .* Got FileNotFoundError"):
        load(tmp_path / "none.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="without the checksum that it was written with"):
        load(tmp_path / "tensor.pt")
    seal(tmp_path / "tensor.pt")
    with pytest.raises(InputError, match=r"tensor\.pt must be a checkpoint of jacmatch\. Got a Tensor"):
        load(tmp_path / "tensor.pt")


def test_code_in_a_file_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"step": Harmful()}, tmp_path / "c.pt")
    seal(tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"must be a complete checkpoint.*Weights only load failed"):
        load(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_another_run_is_recognized_by_its_settings(tmp_path):
    check_same(tmp_path / "c.pt", {"lr": 0.1, "seed": 1}, {"lr": 0.1, "seed": 1})
    with pytest.raises(
        InputError, match=r"of this run\. Got one that differs in lr \(0\.1 there, 0\.2 here\), seed \(1"
    ):
        check_same(tmp_path / "c.pt", {"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 2})
    with pytest.raises(InputError, match=r"clip \(nothing there, 1\.0 here\)"):
        check_same(tmp_path / "c.pt", {}, {"clip": 1.0})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5)), r"'1\.weight' of shape \(5, 2\), not of shape \(4, 2\)"),
        (nn.Sequential(nn.Linear(3, 2)), r"'1\.weight' of nothing, not of shape \(4, 2\)"),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.Linear(4, 1)),
            r"'2\.weight' of shape \(1, 4\), not of nothing",
        ),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4, bias=False)), r"'1\.bias' of nothing"),
    ],
)
def test_weights_of_another_model_are_refused_whole(tmp_path, other, message):
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(InputError, match=r"must contain weights of this model\. Got " + message):
        load_weights(network, other.state_dict(), tmp_path / "c.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_of_this_model_are_loaded(tmp_path):
    network, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other(torch.rand(4, 3))
    load_weights(network, other.state_dict(), tmp_path / "c.pt")
    assert torch.equal(network.running_mean, other.running_mean)


@pytest.mark.parametrize("name", ["weight", "running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(name, value):
    network = nn.BatchNorm1d(3)
    check_finite(network, "Do this.")
    network.state_dict()[name][1] = value
    with pytest.raises(InputError, match=rf"must stay finite .* Got NaN or infinity in '{name}'\. Do this\."):
        check_finite(network, "Do this.")
