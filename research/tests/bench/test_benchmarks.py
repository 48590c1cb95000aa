"""Every benchmark runs and keeps the schema, whatever its speed; so does every committed result."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from jacmatch.cli import main
from jacmatch_research.bench import BENCHMARKS
from jacmatch_research.bench.claims import (
    Case,
    Claim,
    Conditions,
    Measured,
    NotMeasured,
    Spread,
    compare,
    peak_memory,
    timed,
)
from jacmatch_research.bench.command import Bench
from jacmatch_research.processes import one_thread

BENCHES = Path(__file__).parents[3] / "benchmarks"
RESULTS = sorted(BENCHES.glob("results/**/*.json"))
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "null": type(None)}
HERE = Conditions(quick=True)


def check(value, schema, where="result"):
    """The part of JSON Schema that schema.json uses."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    allowed = tuple(python for kind in kinds for python in ((int, float) if kind == "number" else (TYPES[kind],)))
    assert not kinds or isinstance(value, allowed), f"{where} is {value!r}"
    assert not isinstance(value, bool) or "boolean" in kinds, f"{where} is {value!r}"
    assert value in schema.get("enum", [value]), f"{where} is {value!r}"
    for key in schema.get("required", []):
        assert key in value, f"{where} has no {key}"
    for key, part in schema.get("properties", {}).items():
        if key in value:
            check(value[key], part, f"{where}.{key}")
    for number, item in enumerate(value if "items" in schema else []):
        check(item, schema["items"], f"{where}[{number}]")


def schema():
    return json.loads((BENCHES / "schema.json").read_text())


def consistent(row):
    """Whether the numbers of a row fit together: an empty one has none, and a reason."""
    if row["why_empty"] is not None:
        empty = ("median", "low", "high", "met", "reached", "floor")
        return row["n"] == 0 and row["why_empty"] != "" and all(row[key] is None for key in empty)
    sign = 1 if row["better"] == "lower" else -1
    verdicts = (("must", "met"), ("aim", "reached"))
    right = all(
        row[verdict] is (None if row[bound] is None else sign * row["median"] <= sign * row[bound])
        for bound, verdict in verdicts
    )
    return right and row["n"] > 0 and row["low"] <= row["median"] <= row["high"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.relative_to(BENCHES).as_posix())
def test_a_committed_result_keeps_the_schema(path):
    result = json.loads(path.read_text())
    check(result, schema())
    assert all(map(consistent, result["rows"]))
    assert not result["quick"]
    assert result["name"] == path.stem
    assert result["command"].startswith(f"jacmatch bench {path.stem}")
    known = {(case.claim.text, case.name) for case in BENCHMARKS[path.stem].cases}
    assert {(row["claim"], row["case"]) for row in result["rows"]} == known, "measure it again"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of all benchmarks, quick."""
    folder = tmp_path_factory.mktemp("quick")
    assert main(["bench", "--smoke", "--out", str(folder)]) == 0
    return folder


@pytest.mark.ci
def test_every_benchmark_runs_and_keeps_the_schema(quick):
    assert {path.stem for path in quick.iterdir()} == BENCHMARKS.keys()
    for name, benchmark in BENCHMARKS.items():
        result = json.loads((quick / f"{name}.json").read_text())
        check(result, schema())
        assert result["quick"]
        assert all(map(consistent, result["rows"]))
        assert result["command"] == f"jacmatch bench {name} --smoke"
        assert len(result["rows"]) == sum(len(case.devices) for case in benchmark.cases)


@pytest.mark.ci
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_rows_of_a_gpu_stay_empty_without_one_and_say_so(quick):
    rows = [row for path in quick.iterdir() for row in json.loads(path.read_text())["rows"] if row["device"] == "cuda"]
    assert rows
    assert {row["why_empty"] for row in rows} == {"no GPU available"}


@pytest.mark.ci
def test_what_a_person_reads(tmp_path, monkeypatch, capsys):
    """Claims, numbers and bounds of what is measured; one line for what is not."""
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "memory", "--smoke"]) == 0
    out = capsys.readouterr().out
    for text in (
        "peak memory of a full Jacobian",
        "chunk_size=32, cpu",
        "median",
        "numbers mean nothing",
        "Run folder: runs/bench-001",
    ):
        assert text in out
    assert torch.cuda.is_available() or "cuda: 5 row(s) empty: no GPU available\n" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result["rows"][0].pop("case"), r"rows\[0\] has no case"),
        (lambda result: result["rows"][0].update(median="1.0"), r"rows\[0\].median is '1.0'"),
        (lambda result: result["rows"][0].update(device="tpu"), r"rows\[0\].device is 'tpu'"),
        (lambda result: result["rows"][0].update(n=True), r"rows\[0\].n is True"),
    ],
)
def test_a_wrong_result_does_not_keep_the_schema(change, message):
    result = json.loads(next(path for path in RESULTS if path.stem == "products").read_text())
    change(result)
    with pytest.raises(AssertionError, match=message):
        check(result, schema())


# How a row comes about --------------------------------------------------------------------------------------------


def row(claim, measured, **conditions):
    return Case(claim, "case", lambda _: measured).row(Conditions(**conditions))


@pytest.mark.parametrize(
    ("claim", "median", "met", "reached"),
    [
        (Claim("c", 2.0, 1.5), 1.4, True, True),
        (Claim("c", 2.0, 1.5), 2.0, True, False),
        (Claim("c", 2.0, 1.5), 2.1, False, False),
        (Claim("c", 1.0, 1.5, better="higher"), 1.6, True, True),
        (Claim("c", 1.0, 1.5, better="higher"), 0.9, False, False),
        (Claim("c", 1.2, 1.0, of_floor=True), 0.6, True, False),
        (Claim("c", 1.2, 1.0, of_floor=True), 0.61, False, False),
        (Claim("c", 2.0), 1.0, True, None),
        (Claim("c"), 1.0, None, None),
    ],
)
def test_a_row_says_whether_the_median_keeps_the_bounds(claim, median, met, reached):
    result = row(claim, Measured(Spread(median, 0.0, 9.0, 3), floor=0.5))
    assert (result["met"], result["reached"], result["floor"]) == (met, reached, 0.5)
    assert result["must"] == (claim.must * 0.5 if claim.of_floor else claim.must)


def test_what_cannot_be_measured_says_why_and_keeps_its_bounds():
    def absent(_):
        raise NotMeasured("timm is not installed")

    result = Case(Claim("c", 2.0, 1.5), "case", absent).row(HERE)
    assert consistent(result)
    assert (result["why_empty"], result["must"], result["aim"]) == ("timm is not installed", 2.0, 1.5)
    assert (
        row(Claim("c", 2.0), Measured(Spread.of([1.0])), missing="no GPU available")["why_empty"] == "no GPU available"
    )


def test_a_defect_of_a_benchmark_is_no_empty_row():
    with pytest.raises(ZeroDivisionError):
        Case(Claim("c"), "case", lambda _: 1 / 0).row(HERE)


def test_a_spread_is_median_and_quartiles():
    ratios = [0.9, 1.3, 1.0, 1.1, 2.0]
    assert Spread.of(ratios) == Spread(statistics.median(ratios), 1.0, 1.3, 5)
    assert Spread.of([0.00123456]).median == 0.001235
    assert Spread.of([1.5]) == Spread(1.5, 1.5, 1.5, 1)


def test_contestants_take_turns_in_going_first():
    calls = []
    times = compare(Conditions(), lambda: calls.append("a"), lambda: calls.append("b"), 4)
    assert "".join(calls) == "ab" + "ba" + "ab" + "ba" + "ab"
    assert times.spread.n == 4


def test_the_ratio_is_that_of_the_times():
    """A contestant that takes three ticks against one of two, on a clock that only they move."""
    now = [0.0]

    def takes(ticks):
        def run():
            now[0] += ticks

        return run

    conditions = Conditions(clock=lambda: now[0])
    times = compare(conditions, takes(3), takes(2), 5)
    assert times.spread == Spread(1.5, 1.5, 1.5, 5)
    assert times.baseline_seconds == 2.0
    assert timed(conditions, takes(4)) == 4.0


def test_one_thread_for_the_block_only():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_fresh_process():
    small, large = (peak_memory(Conditions(), f"x = torch.ones({size}, 2**20)") for size in (1, 64))
    assert large - small == pytest.approx(63 * 4 * 2**20, rel=0.05)


def test_the_former_name_of_smoke_is_accepted_with_a_warning():
    with pytest.warns(DeprecationWarning, match="`--quick` of `bench` is now `--smoke`"):
        assert Bench(quick=True).smoke
