"""The table of a robust training: a row for each way of training, a column for each shift."""

from collections.abc import Mapping
from typing import Any

from jacmatch.report import Table
from jacmatch.report.experiments import entry


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The table of `jacmatch robust`, mean ± standard deviation over the seeds."""
    variants, settings = result["variants"], result["settings"]
    measure, form = ("accuracy", (100, 1)) if "accuracy" in result["student"] else ("rmse", (1, 4))
    rows = [
        (row["label"], str(row["steps"]), *(entry(each, *form) for each in (row[measure], *row["under"].values())))
        for row in variants
    ]
    named = [name.replace("gaussian-noise", "noise").replace("-", " ") for name in variants[0]["under"]]
    head = (f"{'accuracy %' if measure == 'accuracy' else 'rmse'} on the test part", "steps", "clean", *named)
    unit = "standard deviations of the data" if settings["unit"] == "normalized" else "units of the raw input"
    notes = (
        f"{settings['data']}, {variants[0]['seeds']} seed(s), {result['seconds']:.0f} s.",
        f"Noise in {unit}; nothing was chosen by looking at test data.",
    )
    return [Table("robust", "Under noise and shifts", head, tuple(rows), notes)]
