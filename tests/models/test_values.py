"""Networks of which only values are known: ONNX files in each input type and layout, and functions of the user."""

import textwrap

import numpy as np
import pytest
import torch

from jacmatch import datasets
from jacmatch.cli import main
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jobs import Compare, Distill, Doctor, Surrogate, Train, Transfer
from jacmatch.jobs.study import Progress
from jacmatch.jobs.teachers import check_teacher
from jacmatch.models import ValuesOnly, build
from jacmatch.models.catalog import function_of_batch
from jacmatch.runs import Run
from jacmatch.teachers import BlackBoxTeacher, Question, as_teacher

from . import onnx_files

pytest.importorskip("onnxruntime")
SHAPE = (1, 2, 3)
LAYOUTS = [
    {},
    {"dtype": "float16"},
    {"dtype": "uint8"},
    {"nhwc": True},
    {"batch": 4},
    {"batch": 4, "nhwc": True, "dtype": "uint8"},
]


def expected(x, shape=SHAPE):
    """Outputs and Jacobian from the definition, in float64."""
    w = torch.from_numpy(onnx_files.weight(shape)).double()
    x = x.double().flatten(1)
    return torch.nn.functional.softplus(x) @ w, torch.sigmoid(x)[:, None] * w.T


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_outputs_are_those_of_the_definition(tmp_path, layout):
    network = build(f"onnx:{onnx_files.write(tmp_path / 'a.onnx', **layout)}", 3, SHAPE)
    x = torch.randint(0, 256, (7, *SHAPE), generator=torch.Generator().manual_seed(0)) / 255
    tolerance = 2e-3 if layout.get("dtype") == "float16" else 1e-5
    torch.testing.assert_close(network(x).double(), expected(x)[0], rtol=tolerance, atol=tolerance)
    assert not list(network.parameters())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_differences_are_near_the_derivative(tmp_path, layout):
    teacher = as_teacher(build(f"onnx:{onnx_files.write(tmp_path / 'a.onnx', **layout)}", 3, SHAPE))
    assert isinstance(teacher, BlackBoxTeacher)
    x = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.25
    v = torch.eye(6).view(6, 1, *SHAPE).expand(-1, 5, *SHAPE)
    products = teacher.answer(x, Question(tangents=v)).products.permute(1, 2, 0).double()
    error = (products - expected(x)[1]).norm() / expected(x)[1].norm()
    assert error < {"float16": 0.02, "uint8": 0.05}.get(layout.get("dtype", "float"), 2e-3)


def test_bytes_are_not_clipped_silently(tmp_path):
    network = build(f"onnx:{onnx_files.write(tmp_path / 'a.onnx', dtype='uint8')}", 3, SHAPE)
    with pytest.raises(InputError, match=r"for inputs outside \[0, 1\]\. Got uint8 inputs\. Divide the inputs by 255"):
        network(torch.full((2, *SHAPE), 128.0))


def test_mean_and_deviation_that_a_file_does_not_hold(tmp_path):
    path = f"onnx:{onnx_files.write(tmp_path / 'a.onnx')}"
    x = torch.rand(3, *SHAPE)
    torch.testing.assert_close(
        build(path, 3, SHAPE, (0.5,), (0.25,))(x).double(), expected((x - 0.5) / 0.25)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "shape", "outputs", "message"),
    [
        ({}, (1, 3, 3), 3, r"takes samples of shape \(1, 3, 3\), NCHW or NHWC\. Got float of shape \(any, 1, 2, 3\)"),
        ({}, SHAPE, 5, r"with 5 outputs for these data\. Got 3\. Its classes must be those of the data"),
        ({"inputs": 2}, SHAPE, 3, r"with one input\. Got 2: x0, x1\. Export a network of one input tensor"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, options, shape, outputs, message):
    with pytest.raises(InputError, match=message):
        build(f"onnx:{onnx_files.write(tmp_path / 'a.onnx', **options)}", outputs, shape)


def test_what_is_no_onnx_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must be an ONNX file\. Got no such file\. Check the path"):
        build("onnx:nothere.onnx", 3, SHAPE)
    (tmp_path / "a.onnx").write_bytes(b"text")
    with pytest.raises(InputError, match=r"must be an ONNX file that onnxruntime can read\. Got .* Export it again"):
        build(f"onnx:{tmp_path / 'a.onnx'}", 3, SHAPE)


def test_a_function_must_return_a_row_for_each_sample():
    with pytest.raises(InputError, match=r"`function` must return outputs \(2, K\) for 2 samples\. Got shape \(2,\)"):
        ValuesOnly(lambda x: x.sum(1))(torch.ones(2, 3))
    with pytest.raises(InputError, match="`relative_step` of `BlackBoxTeacher` must be between 0 and 1"):
        BlackBoxTeacher(torch.sin, relative_step=2.0)
    with pytest.raises(UnsupportedError, match="has values only"):
        as_teacher(ValuesOnly(torch.sin)).answer(torch.ones(1, 2), Question(cotangents=torch.ones(1, 1, 2)))


MODULE = """
import numpy as np, torch
W = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
def predict(images): return np.tanh(images.reshape(len(images), -1)) @ W
def builder(outputs, shape): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs))
trained = builder(10, None)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mine_of_values.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "mine_of_values"


def test_a_callable_is_a_function_of_a_batch_a_network_or_a_builder(module):
    x = torch.rand(2, 1, 8, 8)
    predict = function_of_batch(f"{module}:predict")
    imported = __import__(module)
    np.testing.assert_allclose(predict(x).numpy(), imported.predict(x.numpy()), rtol=1e-6)
    assert function_of_batch(f"{module}:trained") is imported.trained
    assert function_of_batch(f"{module}:builder") is None


@pytest.fixture
def digits(tmp_path):
    return f"onnx:{onnx_files.write(tmp_path / 'digits.onnx', (1, 8, 8), outputs=10)}"


@pytest.mark.ci
def test_an_onnx_teacher_in_each_job(digits, tmp_path):
    shared = {"smoke": True, "seed": 0}
    result = Distill(teacher=digits, student="mlp:4", out=tmp_path / "distill", **shared).run()
    assert result["teacher_check"]["accuracy"] < 0.5
    result = Doctor(model=digits, data="digits", out=tmp_path / "doctor", smoke=True).run()
    assert result["modes"]["training"]["engine"] == "differences"
    assert not result["modes"]["training"]["findings"]
    result = Compare(first=digits, second=digits, out=tmp_path / "compare", **shared).run()
    assert result["agreement"]["jacobian_cosine"] == pytest.approx(1.0)
    Transfer(teacher=digits, methods=("labels", "lwf"), student="mlp:4", out=tmp_path / "transfer", **shared).run()
    with pytest.raises(InputError, match="must be labels, mixup or lwf for a teacher without gradients"):
        Transfer(teacher=digits, out=tmp_path / "other", **shared).run()


@pytest.mark.ci
def test_a_function_as_teacher_of_distill(module, tmp_path):
    result = Distill(teacher=f"{module}:predict", student="mlp:4", smoke=True, out=tmp_path / "run").run()
    assert result["teacher_source"] == f"{module}:predict"


@pytest.mark.ci
def test_a_surrogate_of_an_onnx_file(tmp_path):
    path = onnx_files.write(tmp_path / "f.onnx", (3,), outputs=2)
    job = Surrogate(teacher=f"onnx:{path}", low=(-1.0,) * 3, high=(1.0,) * 3, smoke=True, out=tmp_path / "run")
    assert job.run()["agreement"]["jacobian_cosine"] > 0.9


def test_an_onnx_file_is_no_student(digits, tmp_path):
    with pytest.raises(InputError, match="has no gradients, so it cannot be trained"):
        Train(model=digits, smoke=True, out=tmp_path / "run").run()


class Recorded(Progress):
    """A progress that records its messages."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def message(self, line):
        self.lines.append(line)


def nearest_mean(data):
    """A teacher without training: minus the squared distances from the class means, a linear function of x."""
    x, y = data.train.inputs().flatten(1), data.train.y
    means = torch.stack([x[y == number].mean(0) for number in range(10)])
    return lambda z: 2 * z.flatten(1) @ means.T - means.square().sum(1)


def test_a_teacher_under_other_preprocessing_is_reported():
    data = datasets.load("digits")
    teacher = nearest_mean(data)
    progress = Recorded()
    wrong = ValuesOnly(lambda z: teacher(z / 255))  # it was made for inputs up to 255
    result = check_teacher(wrong, data, progress)
    assert result["better"].startswith("mean 0, std 1/255")
    assert result["better_accuracy"] > result["accuracy"] + 0.05
    assert "Give these as --teacher-mean and --teacher-std." in progress.lines[0]


def test_a_teacher_with_classes_in_another_order_is_reported():
    data = datasets.load("digits")
    teacher, order = nearest_mean(data), [1, 0, *range(2, 10)]
    progress = Recorded()
    result = check_teacher(ValuesOnly(lambda z: teacher(z)[:, order]), data, progress)
    assert result["better"] == "another order of classes"
    assert "(class 0 is 1, 1 is 0). Reorder them." in progress.lines[0]


def test_a_teacher_that_fits_is_not_reported():
    data = datasets.load("digits")
    progress = Recorded()
    assert set(check_teacher(ValuesOnly(nearest_mean(data)), data, progress)) == {"accuracy"}
    assert not progress.lines


def test_a_teacher_of_other_classes_under_other_preprocessing_is_reported():
    """Its outputs tell the classes apart for inputs up to 255, and are all zero for inputs up to 1."""
    data, progress = datasets.load("digits"), Recorded()
    mixing = torch.randn(64, 7, generator=torch.Generator().manual_seed(0))
    wrong = ValuesOnly(lambda z: (z.flatten(1) > 127).float() @ mixing)
    result = check_teacher(wrong, data, progress, other_classes=True)
    assert result["better"].startswith("mean 0, std 1/255")
    assert result["accuracy"] < 0.2 < 0.4 < result["better_accuracy"]
    assert progress.lines[0].startswith("The teacher separates the classes of")
    right = ValuesOnly(lambda z: (z.flatten(1) > 0.5).float() @ mixing)
    assert set(check_teacher(right, data, progress, other_classes=True)) == {"accuracy"}
    assert len(progress.lines) == 1


@pytest.mark.ci
def test_evaluate_and_compare_report_another_preprocessing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code = """
        from jacmatch import datasets
        data = datasets.load("digits")
        x, y = data.train.inputs().flatten(1), data.train.y
        means = __import__("torch").stack([x[y == number].mean(0) for number in range(10)])
        def values(z):
            return 2 * z.flatten(1) / 255 @ means.T - means.square().sum(1)
    """
    (tmp_path / "elsewhere.py").write_text(textwrap.dedent(code))
    assert main(["evaluate", "elsewhere:values", "--data", "digits", "--out", "one"]) == 0
    message = " ".join(capsys.readouterr().err.split())
    assert "The network elsewhere:values is right on" in message
    assert "Give these as --mean and --std." in message
    assert Run.open("one").result["network_check"]["better"].startswith("mean 0, std 1/255")
    assert main(["compare", *["elsewhere:values"] * 2, "--data", "digits", "--samples", "2", "--out", "two"]) == 0
    assert "jacmatch train --weights, with --mean and --std." in " ".join(capsys.readouterr().err.split())


@pytest.mark.ci
def test_compare_fails_below_a_requirement(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["compare", digits, digits, "--data", "digits", "--smoke"]
    assert main([*words, "--at-least", "cosine=0.99", "top1=1", "--at-most", "value_error=0", "--out", "good"]) == 0
    assert (tmp_path / "good/worst.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--at-least", "cosine=1.5", "--out", "bad"]) == 2
    message = capsys.readouterr().err
    assert "cosine 1, at least 1.5 required" in message
    assert "The whole result is in bad." in message
    assert (tmp_path / "bad/result.json").is_file()
    assert main([*words, "--at-least", "cos=1"]) == 2
    assert "must be NAME=NUMBER, NAME one of top1, cosine" in capsys.readouterr().err
    assert main([*words, "--at-most", "cosine=x"]) == 2
