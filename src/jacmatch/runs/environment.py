"""Where and with what a run was made."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def environment(cuda: str | None = None) -> dict[str, Any]:
    """Versions, machine, commit and time, as written to `environment.json`.

    Args:
        cuda: Name of the GPU the job uses; this module does not import torch to find out.

    Example:
        >>> sorted(environment())
        ['commit', 'cpus', 'cuda', 'jacmatch', 'numpy', 'platform', 'python', 'started', 'torch']
    """
    return {
        "jacmatch": _version("jacmatch"),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cuda": cuda,
        "commit": commit(Path(__file__)),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit(file: Path) -> str | None:
    """The commit of the checkout that tracks `file`, with "-dirty" if the checkout has changes; None if none does.

    A package installed into a project's virtual environment lies inside that project's checkout without being part
    of it, so the file must be tracked.
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
