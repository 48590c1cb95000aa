"""Every committed benchmark result keeps the schema and its bound; every benchmark runs, whatever its speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAMES = ["row_step", "jv_pass", "full_jacobian"]
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "null": type(None)}


def check(value, schema, where="result"):
    """The part of JSON Schema that schema.json uses."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    allowed = tuple(python for kind in kinds for python in ((int, float) if kind == "number" else (TYPES[kind],)))
    assert not kinds or isinstance(value, allowed), f"{where} is {value!r}"
    for key in schema.get("required", []):
        assert key in value, f"{where} has no {key}"
    for key, part in schema.get("properties", {}).items():
        if key in value:
            check(value[key], part, f"{where}.{key}")
    for number, item in enumerate(value if "items" in schema else []):
        check(item, schema["items"], f"{where}[{number}]")


def schema():
    return json.loads((BENCHMARKS / "schema.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_result_keeps_the_schema(name):
    result = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    check(result, schema())
    assert not result["quick"]
    assert result["command"] == f"python benchmarks/{name}.py"
    for row in result["rows"]:
        if "ratio_median" in row:
            assert row["ratio_low"] <= row["ratio_median"] <= row["ratio_high"]


def test_a_wrong_result_does_not_keep_the_schema():
    result = json.loads((BENCHMARKS / "results" / "row_step.json").read_text())
    del result["rows"][0]["case"]
    with pytest.raises(AssertionError, match=r"rows\[0\] has no case"):
        check(result, schema())


@pytest.mark.parametrize("name", ["row_step", "full_jacobian"])
def test_a_benchmark_runs(name, tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / f"{name}.py"), "--quick", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    result = json.loads(out.read_text())
    check(result, schema())
    assert result["quick"]
    assert len(result["rows"]) >= 4
