"""`jacmatch report`: write the page of a finished run again from its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jacmatch.report import write_report


@dataclass(frozen=True)
class Report:
    """Write the HTML report of a finished run."""

    main: ClassVar[str] = "json"
    examples: ClassVar[tuple[str, ...]] = ("runs/distill-001", "runs/distill-001 --json")

    folder: Annotated[Path, tyro.conf.Positional] = Path()
    """The run folder."""

    def run(self) -> dict[str, Any]:
        """Write the page, and return its path."""
        return {"job": "report", "report": str(write_report(self.folder))}
