"""The job `surrogate`, on the command line and from Python."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import jacmatch
from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.jobs.surrogate import command as command_module
from jacmatch.jobs.surrogate.functions import open_function
from jacmatch.jobs.surrogate.points import Samples, cached, query
from jacmatch.jobs.surrogate.report import reached
from jacmatch.runs import Run
from jacmatch.surrogates import DataWarning

MODULE = """
import numpy as np
calls = []
def smooth(x):
    calls.append(len(x))
    x = np.asarray(x)
    return np.stack([np.sin(x[:, 0]) * x[:, 1], x.sum(1)], 1)
def still(x):
    return np.stack([np.asarray(x)[:, 0], np.ones(len(x))], 1)
def partials(x):
    return np.stack([np.stack([np.cos(x[:, 0]) * x[:, 1], np.sin(x[:, 0])], 1), np.ones_like(x)], 1)
def kink(x):
    return np.abs(np.asarray(x) - 0.5)[:, :1]
"""
BOX = "--low 0 1 --high 3 2"
SMALL = "--smoke --steps 2 --samples 8 --hidden 4 --onnx never --no-doctor"
GRID = np.random.default_rng(0).uniform((0, 1), (1, 2), (40, 2))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "simulator.py").write_text(MODULE)
    sys.modules.pop("simulator", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    np.save("grid.npy", GRID)
    claim = (tmp_path / "grid.npy").read_bytes()
    (tmp_path / "huge.npy").write_bytes(claim.replace(b"(40, 2), }          ", b"(40000000000000, 2)}"))
    yield tmp_path
    sys.modules.pop("simulator", None)


@pytest.fixture
def undrawn(monkeypatch, as_users_run):
    """Figure and type checks take longer than all the rest of a small job; one test has them."""
    monkeypatch.setattr(command_module, "figure", lambda *_, **__: b"<svg xmlns='http://www.w3.org/2000/svg'/>")


def does(command, code=0):
    assert main(shlex.split(f"surrogate {command}")) == code


def result(path):
    return json.loads((path / "result.json").read_text())


@pytest.mark.ci
def test_a_black_box_becomes_a_network(folder):
    does(f"--teacher simulator:smooth {BOX} {SMALL} --samples 8 16 --steps 10 --out run")
    content = result(folder / "run")
    assert content["function"]["way"] == "differences"
    assert content["student"]["rmse"] > 0
    assert content["teacher"] == {"rmse": 0.0, "parameters": None}
    assert [(row["samples"], row["method"]) for row in content["curves"]] == [
        (8, "values"),
        (8, "slopes"),
        (16, "values"),
        (16, "slopes"),
    ]
    # values once for themselves and once with the differences, and two for each input
    assert content["costs"]["training_calls"] == 16 * (2 + 2 * 2)
    assert content["costs"]["speed"]["batch"]["speed_up"] > 0
    page = (folder / "run" / "report.html").read_text()
    assert "none known; antithetic differences" in page
    assert "data:image/svg+xml;base64" in page
    assert (
        "speed-up" if content["costs"]["speed"]["single"]["speed_up"] >= 1 else "slow-down"
    ) + ", a single point" in page
    for text in ("evaluations for training, per seed", "safetensors: largest difference"):
        assert text in page
    assert content["export"]["safetensors"]["largest_difference"] < 1e-5
    student = jacmatch.load_student(folder / "run")
    test = np.load(folder / "run" / "points-test.npz")
    x, y = torch.from_numpy(test["x"]), torch.from_numpy(test["y"])
    error = (student(x.float()).detach().double() - y).square().mean().sqrt()
    assert float(error) == pytest.approx(content["student"]["rmse"], rel=1e-6)
    assert ((x[:, 0] >= 0) & (x[:, 0] <= 3) & (x[:, 1] >= 1)).all()


def test_the_settings_of_a_run_make_it_again_and_a_stopped_one_goes_on(folder, undrawn):
    command = f"--teacher simulator:smooth --jacobian simulator:partials {BOX} {SMALL} --methods slopes"
    does(f"{command} --out first")
    does(f"{command} --out second --max-steps 1")
    assert not (folder / "second" / "result.json").exists()
    calls = sys.modules["simulator"].calls
    before = len(calls)
    does(f"{command} --out second")
    assert (
        8 not in calls[before + 4 :][-2:]
    )  # its points are there already; only the points of the checks are evaluated again
    first, second = result(folder / "first"), result(folder / "second")
    assert first["student"] == second["student"]
    assert first["function"]["way"] == "own"
    does("--config first --out third", code=2)  # it would run code that a file names
    Path("other.json").write_text(json.dumps({"jacobian": "simulator:partials"}))
    does("--config other.json --out third", code=2)
    assert not (folder / "third").exists()
    does("--config first --allow-code --out third")
    assert result(folder / "third")["curves"][0]["errors"] == first["curves"][0]["errors"]


@pytest.mark.parametrize(
    "sampling",
    [
        "active",
        "given --points grid.npy",
        "latin-hypercube",
        "box",
    ],
)
@pytest.mark.ci
def test_every_way_of_sampling_runs(folder, undrawn, sampling):
    box = "" if "given" in sampling else BOX
    how = f"--sampling {sampling} --slopes jv --jacobian-share 0.3 --methods slopes"
    does(f"--teacher simulator:smooth {box} {SMALL} {how} --out run")
    content = result(folder / "run")
    assert content["curves"][-1]["samples"] == 8
    sizes = {path.name for path in (folder / "run").glob("points-seed0*")}
    whole = sampling.partition(" ")[0] in ("latin-hypercube", "active")  # of which a part is no such set
    assert sizes == ({"points-seed0-n8.npz"} if whole else {"points-seed0.npz"})
    assert content["costs"]["trial_calls"] == content["function"]["calls"] > 0
    if "given" in sampling:
        parts = [np.load(folder / "run" / f"points-{name}.npz")["x"] for name in ("seed0", "test")]
        assert all((part[:, None] == GRID[None]).all(2).any(1).all() for part in parts)
        assert not (parts[0][:, None] == parts[1][None]).all(2).any()  # held out


def test_a_file_has_points_values_and_partials(folder, undrawn):
    x = GRID.astype(np.float32)
    module = importlib.util.spec_from_file_location("simulator", folder / "simulator.py")
    simulator = importlib.util.module_from_spec(module)
    module.loader.exec_module(simulator)
    y, j = simulator.smooth(x), simulator.partials(x)
    arrays = {"x_train": x[:30], "y_train": y[:30], "x_test": x[30:], "y_test": y[30:], "j_train": j[:30]}
    np.savez("mine.npz", **arrays)
    np.savez("bare.npz", **{key: value for key, value in arrays.items() if key != "j_train"})
    does(f"--teacher npz:mine.npz {SMALL} --out run")
    content = result(folder / "run")
    assert content["teacher"] is None
    assert content["test_points"] == 10
    assert content["curves"][0]["errors"]["slopes"] is None  # no j_test
    does(f"--teacher npz:bare.npz {SMALL} --methods slopes --out bare", code=2)
    does(f"--teacher npz:bare.npz {SMALL} --out bare")
    assert result(folder / "bare")["methods"] == ["values"]
    assert result(folder / "bare")["notes"] == ["No partials are known: only values were learned."]
    does(f"--teacher npz:mine.npz {SMALL} --low 0 --out third", code=2)


def test_derivatives_of_a_file_may_be_known_in_part(folder, undrawn):
    x = np.random.default_rng(0).random((40, 2)).astype(np.float32)
    y, j = np.stack([x.prod(1), x.sum(1)], 1), np.full((40, 2, 2), np.nan, np.float32)
    j[:20, 1] = 1
    np.savez("part.npz", x_train=x, y_train=y, x_test=x, y_test=y, j_train=j, j_test=j)
    does(f"--teacher npz:part.npz {SMALL} --out run")
    content = result(folder / "run")
    assert "Derivatives are known at 40 of 160 entries; the others are left out." in content["notes"]
    assert all(np.isfinite(curve["errors"]["slopes"]["mean"]) for curve in content["curves"])


def test_a_fifth_of_a_file_without_a_test_part_is_held_out_and_inputs_may_have_any_shape(folder, undrawn):
    x = np.random.default_rng(0).random((40, 1, 2, 3)).astype(np.float32)
    np.savez("pixels.npz", x_train=x, y_train=(x**2).sum((1, 2, 3))[:, None], j_train=2 * x[:, None])
    does(f"--teacher npz:pixels.npz {SMALL} --out run")
    content = result(folder / "run")
    assert content["test_points"] == 8
    assert content["curves"][-1]["errors"]["slopes"]["mean"] > 0
    assert jacmatch.load_student(folder / "run")(torch.from_numpy(x)).shape == (40, 1)
    does(f"--teacher npz:pixels.npz {SMALL} --samples 33 --out second", code=2)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--teacher simulator:smooth", "--low` of `surrogate` must have a bound"),
        ("--teacher simulator:smooth --low 0 --high 1", "must take a batch"),
        (
            "--teacher simulator:still --low 0 0 --high 1 1",
            "must be given if an output never varies",
        ),
        (f"--teacher simulator:smooth {BOX} --input-units 1 2 3", "must give one number per input (2)"),
        (f"--teacher simulator:smooth {BOX} --input-units -1", "--input-units` of `surrogate` must be positive"),
        (
            f"--teacher simulator:smooth {BOX} --output-units 1 2 3",
            "must give one number per output (2)",
        ),
        (
            "--teacher simulator:smooth --low 0 1e9 --high 1 1000000010",
            "input 1: up to 1.00000001e+09, in units of 2.89",
        ),
        (f"--teacher simulator:smooth {BOX} --jacobian autograd", "must be differentiable by autograd"),
        (f"--teacher simulator:smoth {BOX}", "Nearest: smooth"),
        (f"--teacher simulator:smooth {BOX} --sampling given", "must be given together"),
        ("--teacher simulator:smooth --sampling given --points none.npy", "must be an .npy file"),
        ("--teacher simulator:smooth --sampling given --points huge.npy", "must be an .npy file"),
        ("--teacher simulator:smooth --sampling given --points grid.npy --low 0", "must be left out with `--points`"),
        (f"--teacher simulator:smooth {BOX} --jacobian-weight 1 --jacobian-share 0.2", "must not both be given"),
        (f"--teacher simulator:smooth {BOX} --samples 16 8", "must be ascending numbers"),
        (f"--teacher simulator:smooth {BOX} --test-samples 1", "--test-samples` of `surrogate` must be at least 2"),
        (f"--teacher simulator:smooth {BOX} --probes 0", "--probes` of `surrogate` must be at least 1"),
        (f"--teacher simulator:smooth {BOX} --jacobian simulator:still", "The Jacobian of simulator:smooth must"),
        ("--teacher npz:missing.npz", "missing.npz"),
        (f"--teacher simulator:smooth {BOX} --onnx always", "needs the package onnx"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(folder, capsys, monkeypatch, undrawn, command, message):
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    does(f"--smoke --steps 2 --hidden 4 --no-doctor {command} --out run", code=2)
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (folder / "run" / "result.json").exists()


def test_a_kink_at_the_step_is_reported(folder, undrawn):
    does(f"--teacher simulator:kink --low 0 --high 1 --inputs 1 --step 0.2 {SMALL} --methods slopes --out run")
    assert any("not smooth at the step of differences" in note for note in result(folder / "run")["notes"])


def test_an_output_that_never_varies_can_be_learned_in_given_units(folder, undrawn):
    units = "--output-units 1 0.1 --methods slopes"
    does(f"--teacher simulator:still --low 0 0 --high 1 1 {units} {SMALL} --out run")
    assert result(folder / "run")["student"]["rmse"] < 1
    student = jacmatch.load_student(folder / "run")
    assert student.y_scale[1] == pytest.approx(0.1)
    assert student.y_mean[1] == 1


def test_points_in_a_damaged_file_are_refused(tmp_path):
    run = Run.create(tmp_path / "run", "surrogate", {}, "0")
    samples = Samples(torch.rand(3, 2).double(), torch.rand(3, 1).double(), None, 3, 0.5)
    assert cached(run, "points", lambda: samples) is samples
    again = cached(run, "points", lambda: pytest.fail("queried twice"))
    assert torch.equal(again.x, samples.x)
    assert (again.calls, again.seconds, again.j) == (3, 0.5, None)
    for name, write in {
        "points": lambda file: file.write_text("torn"),
        "others": lambda file: np.savez(file, x=GRID, y=GRID[:5], calls=1, seconds=1.0),
    }.items():
        write(tmp_path / "run" / f"{name}.npz")
        with pytest.raises(InputError, match="must contain the points of this run"):
            cached(run, name, lambda: samples)


def test_one_output_may_be_a_vector_with_partials_like_the_inputs_and_counts_are_numbers(folder, undrawn):
    x = np.random.default_rng(0).random((20, 2))
    np.savez("whole.npz", x_train=x, y_train=x.sum(1, keepdims=True), j_train=np.ones((20, 1, 2)))
    np.savez("short.npz", x_train=x, y_train=x.sum(1), j_train=np.ones((20, 2)))
    np.savez("counts.npz", x_train=x, y_train=(9 * x).astype(int))
    for name in ("whole", "short", "counts"):
        does(f"--teacher npz:{name}.npz {SMALL} --model network --methods values --out {name}")
    assert result(folder / "short")["curves"][0]["errors"] == result(folder / "whole")["curves"][0]["errors"]
    assert result(folder / "short")["curves"][0]["errors"]["slopes"] is not None
    assert result(folder / "counts")["student"]["rmse"] > 0


@pytest.mark.parametrize(
    ("arrays", "flags", "message"),
    [
        ({"x_train": np.ones((4, 2)), "y_train": np.ones(4)}, "", "npz:f.npz must have at least 5 samples"),
        ({"x_train": GRID * [0, 1], "y_train": GRID}, "", "`--input-units` of `surrogate` must be given"),
        ({"x_train": GRID, "y_train": GRID * [0, 1]}, "", "`--output-units` of `surrogate` must be given"),
        ({"x_train": GRID, "y_train": GRID}, "--data npz:f.npz", "unknown flag --data. Use --teacher."),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(folder, undrawn, capsys, arrays, flags, message):
    np.savez("f.npz", **arrays)
    does(f"{flags or '--teacher npz:f.npz'} {SMALL} --out run", code=2)
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def field_arrays():
    """Fields (10, 2, 3) of two inputs, their Jacobians, and these as projections on the six unit vectors."""
    x = np.random.default_rng(0).random((10, 2))
    waves = np.arange(1, 7).reshape(2, 3)
    z = waves * x[:, 0, None, None] + x[:, 1, None, None]
    j = np.cos(z)[..., None] * np.stack([waves, np.ones((2, 3))], -1)
    units = np.broadcast_to(np.eye(6).reshape(6, 2, 3), (10, 6, 2, 3))
    return {"x_train": x, "y_train": np.sin(z), "j_train": j}, {"u_train": units, "j_train": j.reshape(10, 6, 2)}


def test_projections_on_unit_vectors_say_what_the_jacobian_of_a_field_says(folder, undrawn):
    arrays, projections = field_arrays()
    np.savez("whole.npz", **arrays)
    np.savez("projected.npz", **{**arrays, **projections})
    for name in ("whole", "projected"):
        does(f"--teacher npz:{name}.npz {SMALL} --methods slopes --model network --steps 20 --out {name}")
    whole, projected = (result(folder / name) for name in ("whole", "projected"))
    assert whole["output_shape"] == projected["output_shape"] == [2, 3]
    for measure in ("values", "slopes", "jacobian_cosine"):
        means = [each["curves"][0]["errors"][measure]["mean"] for each in (whole, projected)]
        assert means[1] == pytest.approx(means[0], rel=1e-3)
    assert jacmatch.load_student(folder / "projected")(torch.zeros(4, 2)).shape == (4, 6)
    assert main(shlex.split("evaluate projected")) == 0


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"y_train": np.ones((10, 6))}, "", "`u_train` of npz:f.npz is for fields"),
        ({"u_train": np.ones((10, 6, 5))}, "", "must have the shape (10, P, 2, 3): samples, projections, axes"),
        ({"u_train": np.full((10, 6, 2, 3), np.nan)}, "", "`u_train` of npz:f.npz must be finite"),
        ({"j_train": np.ones((10, 5, 2))}, "", "`j_train` of npz:f.npz must have the shape (10, 6, 2)"),
        ({"j_train": None}, "", "`u_train` of npz:f.npz needs `j_train`, the projections"),
        ({"u_train": None}, "", "`j_train` of npz:f.npz must be the Jacobians of the fields, (N, *output, *input)"),
        (
            {"x_test": np.ones((3, 2)), "y_test": np.ones((3, 2, 2))},
            "",
            "`y_test` of npz:f.npz must have the shape (N, 2",
        ),
        ({}, "--model gp", "cannot be used by a Gaussian process. Got --model gp"),
        ({}, "--solver adam", "need L-BFGS on the CPU. Got --solver adam"),
        ({}, "--jacobian-share 0.3", "need L-BFGS on the CPU. Got --jacobian-share"),
    ],
)
def test_wrong_projections_are_refused_in_one_line(folder, undrawn, capsys, changes, flags, message):
    arrays, projections = field_arrays()
    arrays = {**arrays, **projections, **changes}
    np.savez("f.npz", **{name: array for name, array in arrays.items() if array is not None})
    does(f"--teacher npz:f.npz {SMALL} {flags} --out run", code=2)
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_what_partials_save_is_read_off_the_curves():
    def row(method, samples, mean):
        return {"method": method, "samples": samples, "errors": {"values": {"mean": mean}}}

    curves = [row("values", 8, 3.0), row("values", 64, 1.0), row("slopes", 8, 0.9), row("slopes", 64, 0.5)]
    assert "at 64 points with 8" in reached({"methods": ["values", "slopes"], "curves": curves})
    curves = [row("values", 8, 3.0), row("slopes", 8, 4.0)]
    assert "never" in reached({"methods": ["values", "slopes"], "curves": curves})
    assert reached({"methods": ["values"], "curves": curves[:1]}) is None


FUNCTION = """
import numpy as np
from other import scale
def mine(x):
    return np.asarray(x).sum(1, keepdims=True) * {factor} + scale
def partials(x):
    return {factor} * np.ones((len(x), 1, 2))
"""


@pytest.fixture
def changing(folder, monkeypatch):
    """Writes the user's function anew, as for a new process."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(factor=2.0, scale=0.5):
        for name in ("changing", "other"):
            sys.modules.pop(name, None)
        (folder / "changing.py").write_text(FUNCTION.format(factor=factor))
        (folder / "other.py").write_text(f"scale = {scale}\n")

    write()
    yield write
    for name in ("changing", "other"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"factor": 2.001},
            r"with the function that .* code changing \(.* values \(off by \d+\.\d% of the largest\)",
        ),
        (
            {"scale": 0.6},
            r"the function that .* Got changes in code other \(\w{12} there, \w{12} here\), values",
        ),
    ],
)
def test_a_stopped_run_does_not_go_on_with_another_function(changing, undrawn, capsys, change, message):
    command = f"--teacher changing:mine {BOX} {SMALL} --methods values --out run"
    does(f"{command} --max-steps 1")
    changing(**change)
    does(command, code=2)
    assert re.search(message, capsys.readouterr().err)
    changing()
    does(command)


def test_a_stopped_run_does_not_go_on_with_other_points(changing, undrawn, capsys):
    command = f"--teacher changing:mine --sampling given --points grid.npy {SMALL} --methods values --out run"
    does(f"{command} --max-steps 1")
    np.save("grid.npy", GRID[::-1])
    does(command, code=2)
    assert "must be resumed with the points that it was started with. Got changes in x (" in capsys.readouterr().err


def test_points_of_another_function_are_not_taken(folder, tmp_path):
    run = Run.create(tmp_path / "points", "surrogate", {}, "0.1.0")
    x = torch.rand(8, 2, dtype=torch.float64)
    function = open_function("mine", lambda z: z.sum(1, keepdim=True), x, torch.ones(2))
    first = cached(run, "points", lambda: query(function, x, jacobians=False), function)
    calls = function.points
    assert torch.equal(cached(run, "points", lambda: pytest.fail("queried twice"), function).y, first.y)
    assert function.points == calls
    other = open_function("mine", lambda z: z.sum(1, keepdim=True) * (1 + 1e-6), x, torch.ones(2))
    with pytest.raises(InputError, match=r"mine must return the values that .*points\.npz holds.* off by 1e-06 of"):
        cached(run, "points", lambda: first, other)


def test_a_gaussian_process_is_a_model_of_its_own(folder, undrawn, monkeypatch, capsys):
    command = (
        f"--teacher simulator:smooth --jacobian simulator:partials {BOX} --smoke --samples 12 --onnx never --model gp"
    )
    does(f"{command} --methods slopes --out run --no-doctor")
    content = result(folder / "run")
    assert content["solver"]["name"] == "gp"
    assert 0.5 < content["solver"]["coverage_90"] <= 1
    test = np.load(folder / "run" / "points-test.npz")
    student = jacmatch.load_student(folder / "run")
    x = torch.from_numpy(test["x"])
    assert student(x).numpy() == pytest.approx(test["y"], abs=0.02)
    does(f"{command} --solver adam --out other", code=2)
    assert "`--model gp` of `surrogate` takes no options of a network" in capsys.readouterr().err
    monkeypatch.setattr(command_module.processes, "LARGEST", 10)
    does(f"{command} --out other", code=2)
    assert "`--model gp` of `surrogate` takes up to 10 values and partials" in capsys.readouterr().err


@pytest.mark.ci
def test_auto_keeps_the_process_where_a_distilled_network_loses_accuracy(folder, undrawn):
    command = f"--teacher simulator:smooth --jacobian simulator:partials {BOX} {SMALL} --samples 12 --methods slopes"
    does(f"{command} --out run")
    (folder / "run" / "result.json").unlink()
    does(f"{command} --out run")  # loads the process of the finished cell
    solver, notes = result(folder / "run")["solver"], result(folder / "run")["notes"]
    assert solver["model"] == "gp"  # two steps of a network do not follow the process
    assert solver["gp_held_out_loss"] < min(solver["held_out_loss"], 10 * solver["distilled_loss"])
    assert any(line.startswith("Selected model: gp. Held-out losses: network") for line in notes)
    test = np.load(folder / "run" / "points-test.npz")
    student = jacmatch.load_student(folder / "run")
    assert student(torch.from_numpy(test["x"])).numpy() == pytest.approx(test["y"], abs=0.02)


def test_a_note_says_which_model_was_selected_and_why():
    solver = {"model": "gp", "held_out_loss": 1.0, "gp_held_out_loss": 0.5, "distilled_loss": 0.25}
    (line,) = command_module._selected(solver)
    assert line == "Selected model: gp. Held-out losses: network 1; gp 0.5; distilled, against gp 0.25."
    assert not command_module._selected({"model": "network", "held_out_loss": 1.0, "gp_held_out_loss": None})


@pytest.mark.ci
def test_a_gaussian_process_is_evaluated_and_exported(folder, undrawn):
    does(f"--teacher simulator:smooth {BOX} --smoke --samples 12 --onnx never --model gp --methods slopes --out run")
    test = np.load("run/points-test.npz")
    np.savez("new.npz", x_train=test["x"] + 1, y_train=test["y"], x_test=test["x"], y_test=test["y"])
    for verb in ("evaluate run --out judged", "export run --to pt2 --out files"):
        assert main(shlex.split(f"{verb} --data npz:new.npz")) == 0
    off = (jacmatch.load_student("run")(torch.from_numpy(test["x"])).numpy() - test["y"]).ravel()
    measured = json.loads(Path("judged/result.json").read_text())
    # samples and outputs of order 1 are rounded to float32 there
    assert measured["student"]["rmse"] == pytest.approx(np.sqrt(np.mean(off**2)), abs=float(np.finfo(np.float32).eps))
    program = torch.export.load("files/student.pt2").module()
    assert np.abs(program(torch.from_numpy(test["x"]).float()).numpy() - test["y"]).max() < 0.05


def test_samples_of_a_file_that_look_wrong_are_named_by_their_rows(folder, undrawn):
    x = np.random.default_rng(0).uniform((0, 1), (3, 2), (60, 2))
    x[40] = x[7]
    y = np.stack([np.sin(x[:, 0]) * x[:, 1], x.sum(1)], 1)
    j = np.stack([np.stack([np.cos(x[:, 0]) * x[:, 1], np.sin(x[:, 0])], 1), np.ones_like(x)], 1)
    y[40, 0] += 5
    np.savez("twice.npz", x_train=x, y_train=y, j_train=j)
    with pytest.warns(DataWarning) as caught:
        does(f"--teacher npz:twice.npz {SMALL} --methods values --out run")
    assert any("occur more than once" in str(each.message) and "rows 7, 40" in str(each.message) for each in caught)
    assert any("rows 7, 40" in note for note in result(folder / "run")["notes"])


def test_partials_of_a_file_that_are_wrong_in_one_row_are_named(folder, undrawn):
    x = np.random.default_rng(0).uniform(-1, 1, (200, 4))
    a, b, c, d = x.T
    j = np.stack([2 * np.cos(2 * a) * b, np.sin(2 * a), 2 * c, np.ones_like(d)], 1)[:, None]
    j[43] *= -9
    j[::5, 0, 2] = np.nan  # these rows are not judged
    np.savez("wrong.npz", x_train=x, y_train=(np.sin(2 * a) * b + c**2 + d)[:, None], j_train=j)
    with pytest.warns(DataWarning, match="partials of output 0 in row 43 disagree"):
        does(f"--teacher npz:wrong.npz {SMALL} --methods slopes --out run")
    assert any("in row 43" in note for note in result(folder / "run")["notes"])
