"""Verbs of other installed distributions: entry points of the group `jacmatch.verbs`, each of which is a `Verb`.

`jacmatch-research` adds `reproduce` and `bench` in this way. Nothing is imported before its verb, a list of names or
the help asks for it, and a verb of this package cannot be replaced.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GROUP = "jacmatch.verbs"
RESEARCH = ("reproduce", "bench")
"""The verbs of jacmatch-research, for a message where it is not installed."""


@dataclass(frozen=True)
class Verb:
    """A verb of the command line as another distribution describes it; the module of a `Verb` should import quickly.

    Attributes:
        job: Where its job is, as MODULE:CLASS; a frozen dataclass like those of `jacmatch.jobs`.
        show: Where the function is that prints a result on a console of rich, as MODULE:FUNCTION.
        help: One line for `jacmatch --help`.
        names: What `jacmatch list` shows besides: by heading, a mapping of names as MODULE:MAPPING.
    """

    job: str
    show: str
    help: str
    names: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def verbs() -> dict[str, Verb]:
    """Return the verbs of other distributions by name.

    Example:
        >>> sorted(verbs()) in ([], ["bench", "reproduce"])
        True
    """
    return {point.name: point.load() for point in sorted(importlib.metadata.entry_points(group=GROUP))}


def load(name: str) -> Any:
    """Import what MODULE:ATTRIBUTE names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
