"""A network in a run folder is the one that was put there, or is refused."""

import json

import pytest
import torch

from jacmatch import datasets
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.runs import Run


def test_one_flipped_bit_in_the_weights_is_refused(tmp_path):
    description = networks.Description("mlp:4", 3, (5,), (0.0,) * 5, (1.0,) * 5)
    network = description.build()
    networks.save(Run.create(tmp_path, "train", {}, "0"), network, description)
    x = torch.rand(2, 5)
    with torch.no_grad():
        assert torch.equal(networks.load_student(tmp_path)(x), network.eval()(x))
    file = tmp_path / networks.WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(
        InputError, match=r"must have the checksum that it was written with\. Got another\. It is damaged"
    ):
        networks.load_student(tmp_path)
    written = json.loads((tmp_path / networks.DESCRIPTION).read_text())
    del written["sha256"]  # of an older version, or put together by hand
    (tmp_path / networks.DESCRIPTION).write_text(json.dumps(written))
    networks.load_student(tmp_path)


def test_a_checkpoint_that_the_user_names_is_read(tmp_path):
    data = datasets.load("synthetic:D=5,K=3,N=8")
    net = networks.Description.of("mlp:4", data).build().eval()
    torch.save({"epoch": 3, "model": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "last.pth")
    again = networks.network("mlp:4", data, networks.Weights(tmp_path / "last.pth"))
    assert torch.equal(again(data.test.inputs()), net(data.test.inputs()))
