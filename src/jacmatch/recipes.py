"""The former name of `jacmatch.jobs`, for one release."""

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    from jacmatch import jobs

    if name.startswith("__"):
        raise AttributeError(name)
    warnings.warn("`jacmatch.recipes` is `jacmatch.jobs` now.", DeprecationWarning, stacklevel=2)
    return getattr(jobs, name)
