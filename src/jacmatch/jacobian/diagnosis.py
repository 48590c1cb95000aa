"""What the doctor says."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing the doctor has seen.

    Attributes:
        code: A short name, stable across versions.
        severity: `fault` where results would be wrong or cannot be had; `note` where the library deals with it.
        what: What was seen.
        way_out: What to do.
    """

    code: str
    severity: Literal["fault", "note"]
    what: str
    way_out: str


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says of a module.

    Attributes:
        engine: The first of reverse, forward, differences that is right; `none` where no engine is.
        findings: What was seen.
        engines: For each engine `right`, or what is wrong with it.
    """

    engine: str
    findings: tuple[Finding, ...]
    engines: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not any(finding.severity == "fault" for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"engine: {self.engine}", *(f"  {name:<12} {state}" for name, state in self.engines.items())]
        lines += [f"{f.severity} [{f.code}] {f.what} Way out: {f.way_out}" for f in self.findings]
        return "\n".join(lines if self.findings else [*lines, "no fault found"])
