"""The environment of a run: versions, machine, commit."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_DECIDING = ("jacmatch", "torch", "numpy", "threads", "cuda", "commit")
"""Parts of an environment on which the bits of a result depend."""
_WARNED: dict[Any, Any] = {}  # registry of the warnings shown


def environment(cuda: str | None = None) -> dict[str, Any]:
    """Return versions, machine, commit and time, as in `environment.json`; `cuda` is the name of the GPU, if any.

    Example:
        >>> sorted(environment())
        ['commit', 'cpus', 'cuda', 'jacmatch', 'numpy', 'platform', 'python', 'started', 'threads', 'torch']
    """
    return {
        "jacmatch": _version("jacmatch"),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": threads(),
        "cuda": cuda,
        "commit": commit(Path(__file__)),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def threads() -> int | None:
    """Return the number of CPU threads of torch; None if torch is not imported.

    The order of summation, and so the last digits of a trained network, depend on it.
    """
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def warn_of_changes(before: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Warn in one line if a run is resumed in another environment than it was started in."""
    names = [name for name in _DECIDING if name in before and before[name] != here.get(name)]
    if names:
        there, now = (", ".join(f"{name} {given.get(name)}" for name in names) for given in (before, here))
        message = f"What is done so far was made with {there}; it goes on with {now}."
        message = f"{message} The result is that of a run without a stop up to rounding, not bit for bit."
        warnings.warn_explicit(
            message, UserWarning, "jacmatch", 0, registry=_WARNED
        )  # one line, once, and no source line


def commit(file: Path) -> str | None:
    """Return the commit of the checkout that tracks `file`, with "-dirty" if it has changes; None without one.

    A package installed into a project's virtual environment lies inside that project's checkout without being part of
    it, so the file must be tracked.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        for arguments in (
            ["ls-files", "--error-unmatch", file.name],
            ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        ):
            answer = subprocess.run([*git, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
