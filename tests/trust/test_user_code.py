"""The user's own code that ends or breaks a job, and numbers that somebody has forged: one line and the right code."""

import importlib.util
import json
import operator
import sys

import pytest
import torch
from tests.report.test_report import comparison as compared
from torch import nn

from jacmatch.cli import main
from jacmatch.cli.command import translated
from jacmatch.datasets import Split
from jacmatch.errors import InputError, Stopped
from jacmatch.jacobian import output_tensor
from jacmatch.objectives import Distillation
from jacmatch.report import write_report
from jacmatch.runs import Run
from jacmatch.runs.files import decoded
from jacmatch.training import Training, fit

pytestmark = pytest.mark.usefixtures("all_as_users_run")
OWN = """
import sys, torch
def ends(code): sys.exit(code)
def breaks(_): raise RuntimeError("late\\nsecond line")
def stops(_): raise BaseException
def allocates(_): torch.empty(2**50)
def interrupts(_): raise KeyboardInterrupt
def mistakes(_): torch.ones(2) @ torch.ones(3)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A module of the user's."""
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN)
    spec = importlib.util.spec_from_file_location("own", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("ends", 0, r"^own\.py, line 3, in ends called sys\.exit\(0\): it must return\. "),
        ("ends", None, r"^own\.py, line 3, in ends called sys\.exit\(None\)"),
        ("breaks", 0, r"^own\.py, line 4, in breaks raised RuntimeError: late second line\. Fix it there"),
        ("stops", 0, r"^own\.py, line 5, in stops raised BaseException\. "),
        ("allocates", 0, r"^the memory is full\. Use a smaller --batch-size, or less data\.$"),
        ("mistakes", 0, r"^own\.py, line 8, in mistakes raised RuntimeError: .*size"),
    ],
)
def test_what_the_users_code_does_is_one_line(name, value, rule, own):
    with pytest.raises(Stopped, match=rule) as caught, translated():
        getattr(own, name)(value)
    assert "\n" not in str(caught.value)


def test_ctrl_c_our_own_errors_and_defects_stay_what_they_are(own):
    with pytest.raises(KeyboardInterrupt), translated():
        own.interrupts(0)
    with pytest.raises(InputError, match=r"^ours$") as caught, translated():
        raise InputError("ours")
    assert not isinstance(caught.value, Stopped)


def test_an_exit_of_the_users_data_is_no_success(tmp_path, monkeypatch, capsys):
    (tmp_path / "users_data.py").write_text("import sys\ndef data(): sys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_data", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "users_data:data", "--model", "mlp:4", "--out", "run"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("jacmatch train: users_data.py, line 2, in data called sys.exit(0): it must return.")
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) * float("nan")


@pytest.mark.parametrize("doctor", [False, True])
def test_a_network_of_nan_is_called_that(doctor):
    split = Split(torch.rand(20, 3), torch.arange(20) % 2)
    with pytest.raises(InputError, match=r"The term `labels` .*must be finite in every step\. Got nan in step 1"):
        fit(Distillation(Broken()), split, Training(steps=3, batch_size=10, doctor=doctor), seed=0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_outputs_that_are_no_real_numbers_are_refused(dtype):
    with pytest.raises(InputError, match=r"must return real floating-point outputs\. Got (complex64|int64|bool)\."):
        output_tensor(torch.ones(2, 3).to(dtype))


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 400, "1" * 5000])
def test_a_number_that_no_float_can_be_is_damage(number):
    with pytest.raises(InputError, match="must be one JSON object"):
        decoded(f'{{"seed": {number}}}'.encode(), "the file")


FORGED = ["a text", True, None, [], {}, [[1.0]], {"a": {"b": 1}}, -1.0, 1e300]


@pytest.mark.parametrize("value", FORGED, ids=str)
@pytest.mark.parametrize(
    "keys",
    [("seconds",), ("seed",), ("teacher",), ("rows", 0, "accuracy"), ("rows", 0, "accuracy", "mean"), ("rows", 1)],
)
def test_forged_numbers_of_a_result_are_refused_in_one_line(keys, value, tmp_path):
    run = compared(tmp_path / "run")
    result = json.loads((run.path / "result.json").read_text())
    at = result
    for key in keys[:-1]:
        at = operator.getitem(at, key)
    at[keys[-1]] = value
    (run.path / "result.json").write_text(json.dumps(result))
    if (keys == ("teacher",) and value is None) or (keys == ("seconds",) and value == 1e300):
        return  # a job may have none; and so long it can have taken
    with pytest.raises(
        InputError, match=r"result\.json must (be unchanged since its job wrote it|have the rows)"
    ) as caught:
        write_report(run.path)
    assert len(str(caught.value)) < 700
    assert Run.open(run.path, finished=False).job == "distill"
