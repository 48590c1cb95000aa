"""The JSON document of a check: `doctor.json` of a run folder, and the modes in the result of `jacmatch doctor`."""

from typing import Any

from jacmatch.diagnostics.doctor import Diagnosis
from jacmatch.diagnostics.preflight import PreflightReport
from jacmatch.jacobian.findings import Finding

FILE = "doctor.json"
"""The file of a run folder that holds the document."""


def report(result: Diagnosis | PreflightReport) -> dict[str, Any]:
    """Return the document of a result, ready for JSON.

    The fields `ok`, `findings` and `says` are always there. A `Diagnosis` adds `engine` and `engines`, a
    `PreflightReport` adds `errors` and `exact`.

    Example:
        >>> report(Diagnosis("reverse", (), {"reverse": "right"}))["ok"]
        True
    """
    document = {
        "ok": result.ok,
        "findings": [_finding(each) for each in result.findings],
        "says": str(result),
    }
    if isinstance(result, Diagnosis):
        return {**document, "engine": result.engine, "engines": result.engines}
    return {**document, "errors": result.errors, "exact": result.exact}


def _finding(finding: Finding) -> dict[str, str]:
    """The fields of a finding; `way_out` is the former name of `remedy`."""
    return {**vars(finding), "way_out": finding.remedy}
