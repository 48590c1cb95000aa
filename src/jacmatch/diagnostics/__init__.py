"""Checks of networks, objectives and teachers, each against differences of its own values.

`doctor` checks the derivative engines of one network; `preflight_check` checks the objective of a training before its
first step; `benchmark_engines` measures which engine is the fastest. A `Finding` has a code that is stable across
versions; `report` gives the JSON document of a result.

The engines check themselves at their first use in `jacmatch.jacobian.verification`.
"""

from jacmatch.diagnostics.doctor import Diagnosis, EngineBenchmark, benchmark_engines, doctor
from jacmatch.diagnostics.preflight import PreflightReport, preflight_check, raise_for_faults, report
from jacmatch.jacobian.findings import CODES, FINDINGS, Finding

__all__ = [
    "CODES",
    "FINDINGS",
    "Diagnosis",
    "EngineBenchmark",
    "Finding",
    "PreflightReport",
    "benchmark_engines",
    "doctor",
    "preflight_check",
    "raise_for_faults",
    "report",
]
