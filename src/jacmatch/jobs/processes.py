"""Python in other processes, without what lies in the working folder.

`python -m` and `python -c` import from the working folder first: a `yaml.py` of somebody else's data would be run. A
process that is started here has the search path of the one that starts it.
"""

import sys


def python(program: str, *options: str) -> list[str]:
    """Return the command that runs a program text in a fresh Python with the search path of this one.

    The path is set before anything is imported but `sys`, which is built in. Python 3.11 has an option for it, -P.

    Example:
        >>> import subprocess
        >>> subprocess.run(python("print('ran')"), capture_output=True, text=True).stdout.strip()
        'ran'
    """
    return [sys.executable, *options, "-c", f"import sys; sys.path[:] = {list(map(str, sys.path))!r}\n{program}"]
