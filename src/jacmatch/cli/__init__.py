"""The command line: `jacmatch VERB [OPTIONS]`.

`verbs` is the table of verbs, `command` runs one and returns an exit code, `flags` turns the fields of a job into flags
with tyro, `settings` reads a `--config`, `values` defines which values a field takes, and `summary` prints results.
"""

from jacmatch.cli.command import main
from jacmatch.cli.verbs import VERBS

__all__ = ["VERBS", "main"]
