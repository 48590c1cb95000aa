"""`jacmatch list`: every name that the command line knows."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jacmatch import datasets, losses, models, objectives, plugins, teachers
from jacmatch.jacobian import ESTIMATORS, READOUTS
from jacmatch.jobs.surrogate.functions import EXAMPLES
from jacmatch.jobs.surrogate.source import FILES


@dataclass(frozen=True)
class List:
    """List all data sets, models, probes, readouts and other names of the command line."""

    main: ClassVar[str] = "json"
    examples: ClassVar[tuple[str, ...]] = ("", "--json")

    def run(self) -> dict[str, Any]:
        """Return the names by axis."""
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
            "functions": [*EXAMPLES, *(f"{kind}FILE" for kind in (*FILES, "onnx:")), "PACKAGE.MODULE:CALLABLE"],
        }
        for verb in plugins.verbs().values():
            axes |= {heading: list(plugins.load(name)) for heading, name in verb.names.items()}
        return {"job": "list", **axes}
