"""Tables of text: means ± standard deviations over seeds."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Spread = Mapping[str, Any]
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        name: Stem of its files.
        title: What it shows, in one line.
        head: Headings; the first is that of the rows.
        rows: As many entries as there are headings.
        notes: What a reader must know, a sentence or two each.
    """

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table in Markdown, with title and notes.

        Example:
            >>> print(Table("t", "Accuracy", ("row", "n = 1"), (("labels", "5.0"),)).markdown())
            **Accuracy**
            <BLANKLINE>
            | row | n = 1 |
            | --- | ---: |
            | labels | 5.0 |
            <BLANKLINE>
        """
        lines = [self.head, ("---", *["---:"] * (len(self.head) - 1)), *self.rows]
        body = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
        notes = [f"\n{note}" for note in self.notes]
        return "\n".join([f"**{self.title}**", "", *body, *notes, ""])

    def plain(self) -> dict[str, Any]:
        """The table as plain values, as a result has it."""
        return {"title": self.title, "head": self.head, "rows": self.rows, "notes": self.notes}

    def csv(self) -> str:
        """The table as comma-separated values, headings first."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.head, *self.rows])
        return text.getvalue()


def entry(value: Spread | None, scale: float | int = 100, digits: int = 1) -> str:
    """A mean ± standard deviation as text; a dash where nothing was measured.

    Example:
        >>> entry(spread([0.5, 0.52]))
        '51.0 ± 1.4'
    """
    if value is None:
        return NOTHING
    mean: str = f"{scale * value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {scale * value['std']:.{digits}f}"
