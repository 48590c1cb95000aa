"""The tables that README and benchmarks show are made of the results, and say what is not met and what is empty."""

import json
import sys
from pathlib import Path

import pytest

from jacmatch_research.bench import peers
from jacmatch_research.bench.claims import Conditions, NotMeasured

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tables(tmp_path):
    """`docs/tables.py`, as if the documentation lay in an empty folder."""
    names = {"__file__": str(tmp_path / "docs" / "tables.py"), "__name__": "tables"}
    exec((ROOT / "docs" / "tables.py").read_text(encoding="utf-8"), names)
    (tmp_path / "docs").mkdir()
    return names


def row(median, device="cpu", **changes):
    """A row of the claim `a ÷ b`, with the bound 2."""
    empty = median is None
    numbers = {"median": median, "low": median, "high": median, "n": 0 if empty else 3}
    met = None if empty else median <= 2
    made = {"claim": "a ÷ b", "case": "small", "device": device, "better": "lower", "must": 2.0, "aim": 1.5}
    return made | numbers | {"floor": None, "met": met, "why_empty": "no GPU available" if empty else None} | changes


def store(folder, name, *rows):
    path = folder / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")


def filled(tables, what):
    mark = f"<!-- table ../benchmarks/results{what} -->\n"
    return tables["filled"](f"{mark}old\n<!-- end of table -->").removeprefix(mark)


def test_a_claim_is_a_line_with_the_range_of_its_cases(tables, tmp_path):
    store(tmp_path, "step", row(1.9), row(None, "cuda"), row(2.5), row(1.0, claim="no bound", must=None, aim=None))
    store(tmp_path, "peers", row(1.25, claim="c ÷ d", better="higher", must=1.0, aim=1.5, met=True))
    assert filled(tables, "").splitlines()[2:] == [
        "| a ÷ b | ≤ 2.00 | ≤ 1.50 | **1.90–2.50** (1 of 2 met) |",
        "| c ÷ d | ≥ 1.00 | ≥ 1.50 | **1.25** |",
        "<!-- end of table -->",
    ]


def test_a_case_is_a_line_and_empty_rows_are_counted(tables, tmp_path):
    store(tmp_path, "step", row(2.5, low=0.0123), row(None, "cuda"), row(None, "cuda"))
    assert filled(tables, "/step.json").splitlines()[2:] == [
        "| **a ÷ b** | | | | | | |",
        "| small, cpu | 2.50 | 0.012–2.50 | 3 | 2.00 |  | no |",
        "",
        "Empty rows: 2 (cuda: no GPU available).",
        "<!-- end of table -->",
    ]


def test_rows_of_a_gpu_may_come_from_another_machine(tables, tmp_path):
    store(tmp_path, "step", row(1.9), row(None, "cuda"))
    store(tmp_path, "cuda/step", row(1.75, "cuda"))
    assert "| **1.90** | **1.75** |" in filled(tables, "")


def test_without_results_there_are_no_lines(tables):
    assert len(filled(tables, "").splitlines()) == 3


@pytest.mark.parametrize("library", ["timm", "torchdistill"])
@pytest.mark.parametrize("measure", [peers.given_batches, peers.whole_loop])
def test_a_library_that_is_not_installed_is_a_reason(library, measure, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    for name in [name for name in sys.modules if name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(NotMeasured, match=f"not installed: pip install '?{library}"):
        measure(Conditions(quick=True), "cnn5 → cnn3, 8×8, batch 128", library)


@pytest.mark.parametrize("library", ["timm", "torchdistill"])
def test_libraries_that_are_compared_make_the_same_students(library):
    """The same batches, loss and optimizer: after two steps the weights agree."""
    pytest.importorskip("timm.task" if library == "timm" else "torchdistill")
    import torch

    task = peers.Task.of(Conditions(quick=True), "cnn5 → cnn3, 8×8, batch 128")
    step, _, theirs = peers.stepped(task, library)
    objective = peers.ours(task)
    mine = peers.rivals.stepper(objective.student, lambda x, y: objective(x, y)["loss"])
    for x, y in task.batches():
        step(x, y)
        mine(x, y)
    for ours, other in zip(objective.student.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-5)


def test_the_sweep_is_counted_by_derivative_and_by_what_the_doctor_says(tables, tmp_path):
    """Two modules and an operator: jvp by `forward` is wrong once, and the doctor misses it; one alarm is false."""
    columns = list(tables["DERIVATIVES"])
    rows = [
        ["nn.A eval 0 batch", *["right"] * len(columns), "vjp=right forward=right", ""],
        ["nn.B eval 0 loop", *["wrong" if name == "forward" else "right" for name in columns], "forward=right", ""],
        [
            "torch.c 0 loop",
            *["refused" if name == "vjp" else "right" for name in columns],
            "vjp=fault forward=fault",
            "",
        ],
    ]
    path = tmp_path / "benchmarks" / "results" / "table.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(",".join(row) for row in [["configuration", *columns, "doctor", "faults"], *rows]))
    lines = filled(tables, "/table.csv").splitlines()
    assert (
        lines[0] == "| Modules of `torch.nn`: 2 configurations | right | refused | wrong | raw error | no reference |"
    )
    assert "| `jvp`, `forward` | 1 | 0 | 1 | 0 | 0 |" in lines
    assert "| `vjp` | 0 | 1 | 0 | 0 | 0 |" in lines
    assert lines[-5:-1] == [
        "| `vjp` | 1 | 1 | 0 | 0 |",
        "| `jvp`, `forward` | 1 | 0 | 1 | 1 |",
        "",
        "Faults reported for the 1 networks whose derivatives are all correct: none.",
    ]
