"""The command line: `jacmatch VERB [OPTIONS]`.

`command` picks the verb and ends with an exit code, `flags` turns a recipe into flags with tyro, `settings` reads a
`--config`, `values` says which values a field takes, and `summary` prints what a job found.
"""

from jacmatch.cli.command import VERBS, main

__all__ = ["VERBS", "main"]
