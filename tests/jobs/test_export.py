"""`jacmatch export`: the files give what the network gives, and `load.py` needs torch alone."""

import json
import subprocess
import sys

import pytest
import torch

from jacmatch import datasets, load_student
from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.jobs import Compare, Export, Train, export, networks

X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "student"
    Train(model="cnn3", smoke=True, doctor=False, out=folder).run()
    return folder


@pytest.mark.ci
def test_the_program_is_loaded_with_torch_alone(run, tmp_path):
    result = Export(trained=str(run), to=("pt2", "safetensors", "hf"), smoke=True, out=tmp_path / "out").run()
    assert result["files"]["student.pt2"]["value_relative_error"] < 1e-6
    torch.save(X, tmp_path / "x.pt")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['jacmatch', 'safetensors', 'onnx']));"
        f"sys.path.insert(0, {str(tmp_path / 'out')!r}); import torch; from load import load;"
        f"torch.save(load()(torch.load({str(tmp_path / 'x.pt')!r})), {str(tmp_path / 'y.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    with torch.no_grad():
        wanted = load_student(run)(X)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), wanted)
    # the folder for the Hub is a teacher again
    again = networks.network(f"hf:{tmp_path / 'out'}", datasets.load("digits"))
    torch.testing.assert_close(again(X), wanted)
    assert json.loads((tmp_path / "out/config.json").read_text())["spec"] == "cnn3"


@pytest.mark.ci
def test_onnx_and_int8_agree_in_value_and_derivative(run, tmp_path):
    pytest.importorskip("onnxruntime")
    result = Export(trained=str(run), int8=True, samples=16, out=tmp_path / "out").run()
    whole, small = (result["files"][name] for name in ("student.onnx", "student.int8.onnx"))
    assert whole["value_relative_error"] < 1e-5
    assert whole["jacobian_cosine"] > 0.999
    assert small["value_relative_error"] < 0.2
    assert small["jacobian_cosine"] > 0.5
    assert small["bytes"] < whole["bytes"]
    second = f"onnx:{tmp_path / 'out/student.onnx'}"
    audit = Compare(first=str(run), second=second, samples=8, at_least=("top1=1",), out=tmp_path / "audit").run()
    assert audit["agreement"]["value_relative_error"] < 1e-5
    card = (tmp_path / "out/README.md").read_text()
    for part in ("license: TO FILL IN", "## Data", "## Teacher", "## Recipe", "## Accuracy", "## Cost", "## License"):
        assert part in card
    assert "| student.int8.onnx |" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, r"`--samples` of `export` must be at least 1\. Got 0"),
        ({"int8": True, "to": ("pt2",)}, r"`--int8` of `export` must be used with --to onnx\. Got pt2"),
        ({"trained": "resnet20"}, r"must be given the folder of a run\. Got 'resnet20'"),
    ],
)
def test_settings_that_do_not_go_together(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Export(**{"trained": str(tmp_path), "out": tmp_path / "out", **changes}).run()


def test_a_folder_without_a_network_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--to", "pt2", "--out", str(tmp_path / "out")]) == 2
    assert "must be a run folder" in capsys.readouterr().err


def test_names_in_a_model_card_are_no_markup():
    name = "a\n---\n<script> [b](c) `d` 1_0"
    assert export._plain(name) == r"a\\n---\\n\<script\> \[b\](c) \`d\` 1_0"
    assert export._plain(1 / 3) == "0.3333"
