"""The files of a finished surrogate, compared with it."""

import importlib.util
import sys

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.jobs.export import difference, to_onnx
from jacmatch.surrogates.modules import fit_surrogate


def test_a_file_that_differs_from_the_network_is_refused():
    net, x, t = torch.nn.Linear(2, 1), torch.rand(5, 2), torch.ones(1, dtype=torch.float64)
    assert difference(net, net, x, t, "it") == 0
    with pytest.raises(InputError, match="it must return what the network returns"):
        difference(lambda z: net(z) + 0.01, net, x, t, "it")


@pytest.mark.parametrize(
    "activation",
    ["softplus", *(pytest.param(name, marks=pytest.mark.ci) for name in ("silu", "tanh", "gelu", "relu"))],
)
def test_onnx_has_the_scalers_inside(tmp_path, monkeypatch, as_users_run, activation):
    """Far from 0, where a network without scalers would be far off; read by onnx itself, for any size of a batch."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    x = 1000 + torch.rand(30, 3)
    net = fit_surrogate(x, x.prod(1, keepdim=True), partials="none", hidden=(8,), activation=activation, steps=2)
    result = to_onnx(net, tmp_path, x, torch.ones(1, dtype=torch.float64), "always")
    assert (tmp_path / "student.onnx").is_file()
    assert result["checked_by"] == "onnx.reference"
    assert result["largest_difference"] < 1e-5
    monkeypatch.delitem(sys.modules, "onnxruntime")
    if importlib.util.find_spec("onnxruntime"):
        assert to_onnx(net, tmp_path, x, torch.ones(1, dtype=torch.float64))["checked_by"] == "onnxruntime"


def test_without_the_extra_there_is_no_onnx(tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    result = to_onnx(torch.nn.Linear(2, 1), tmp_path, torch.rand(4, 2), torch.ones(1, dtype=torch.float64))
    assert result == {"file": None, "why": "the extra onnx is not installed (onnx, onnxscript)"}
    assert to_onnx(torch.nn.Linear(2, 1), tmp_path, torch.rand(4, 2), torch.ones(1), "never")["file"] is None
