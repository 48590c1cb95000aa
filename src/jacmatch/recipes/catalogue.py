"""`jacmatch list`: every name that the command line knows."""

from dataclasses import dataclass
from typing import Any

from jacmatch import datasets, losses, models, objectives, teachers
from jacmatch.jacobian import ESTIMATORS, READOUTS
from jacmatch.recipes.bench import BENCHMARKS
from jacmatch.recipes.reproduce import EXPERIMENTS
from jacmatch.recipes.surrogate.examples import EXAMPLES


@dataclass(frozen=True)
class List:
    """List every name that the command line knows."""

    def run(self) -> dict[str, Any]:
        """Returns the names by axis."""
        axes = {
            "data": [*datasets.LOADERS, "PACKAGE.MODULE:CALLABLE"],
            "models": [*models.CATALOG, *models.FORMS],
            "probes": list(ESTIMATORS),
            "readouts": list(READOUTS),
            "points": list(objectives.POINTS),
            "output losses": list(losses.OUTPUT_LOSSES),
            "jacobian losses": list(losses.JACOBIAN_LOSSES),
            "penalties": list(losses.PENALTIES),
            "teachers": list(teachers.TEACHERS),
            "functions": [*EXAMPLES, "npz:FILE", "PACKAGE.MODULE:CALLABLE"],
            "experiments": list(EXPERIMENTS),
            "benchmarks": list(BENCHMARKS),
        }
        return {"job": "list", **axes}
