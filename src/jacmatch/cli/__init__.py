"""The command line: `jacmatch VERB [OPTIONS]`.

`main` picks the verb, `settings` reads a `--config`, `flags` turns a recipe into flags with tyro, `values` says which
values a field takes, and `summary` prints what a job found.
"""

from jacmatch.cli.main import VERBS, main

__all__ = ["VERBS", "main"]
