"""Verbs of other installed distributions: entry points of the group `jacmatch.verbs`, each of which is a `Verb`.

`jacmatch-research` adds `reproduce` and `bench` in this way. A module is imported only when its verb is called, or for
`jacmatch list` and the help. A verb of this package cannot be replaced.
"""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GROUP = "jacmatch.verbs"
RESEARCH = ("reproduce", "bench")
"""The verbs of jacmatch-research, for a message where it is not installed."""


@dataclass(frozen=True)
class Verb:
    """A verb of the command line; the module in which another distribution defines one should import quickly.

    Attributes:
        job: MODULE:CLASS of its job, a frozen dataclass like those of `jacmatch.jobs`.
        show: MODULE:FUNCTION that prints a result on a console of rich.
        help: One line for `jacmatch --help`.
        names: Further sections of `jacmatch list`: for each heading, a mapping of names as MODULE:MAPPING.
    """

    job: str
    show: str
    help: str
    names: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> type[Any]:
        """Import the job."""
        job: type[Any] = load(self.job)
        return job


@functools.cache
def verbs() -> dict[str, Verb]:
    """Return the verbs of other distributions by name."""
    loaded = {}
    for point in sorted(importlib.metadata.entry_points(group=GROUP)):
        try:
            loaded[point.name] = point.load()
        except Exception as error:  # code of another distribution: the other verbs must still work
            text = f"The verb `{point.name}` of {point.value} cannot be loaded: {type(error).__name__}: {error}"
            warnings.warn(text, stacklevel=2)
    return loaded


def load(name: str) -> Any:
    """Import MODULE:ATTRIBUTE."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
