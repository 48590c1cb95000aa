"""Packages that only some models and files need."""

import importlib
from typing import Any

from jacmatch.errors import InputError


def optional_package(module: str, caller: str, install: str) -> Any:
    """The module of an optional package.

    Raises:
        InputError: it is not installed, or does not go with what is; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        package = module.partition(".")[0]
        raise InputError(f"{caller} needs the package {package}.", got=f"{error}", do=f"Run: {install}.") from error
