"""The command line: `jacmatch VERB [OPTIONS]`.

`verbs` is the table of verbs, `command` runs one and returns an exit code, `flags` turns the fields of a job into flags
with tyro and defines which values they take, `settings` reads a `--config`, and `summary` prints results.
"""

from jacmatch.cli.command import main
from jacmatch.cli.verbs import VERBS

__all__ = ["VERBS", "main"]
