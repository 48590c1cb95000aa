"""Load the data set that `--data` names."""

import importlib.util
import sys
from collections.abc import Callable, Mapping

from jacmatch.datasets import folders, official, shards, synthetic
from jacmatch.datasets.arrays import OPTIONAL, REQUIRED, from_arrays, from_splits, load_npz
from jacmatch.datasets.data import Data
from jacmatch.datasets.files import is_dir, user_path
from jacmatch.datasets.streamed import Streamed
from jacmatch.errors import InputError, converted_errors, unknown_name, user_callable

# The first sentence of each docstring says what it is and how it is written.
LOADERS: dict[str, Callable[[str, int], Data]] = {
    "digits": synthetic.load_digits,
    "fashion-mnist": official.load_fashion_mnist,
    "cifar10": official.load_cifar10,
    "cifar100": official.load_cifar100,
    "npz": load_npz,
    "folder": folders.load,
    "stream": folders.load_streamed,
    "wds": shards.load,
    "synthetic": synthetic.load,
}


def is_code(spec: str) -> bool:
    """Return whether `load` treats the string as a PACKAGE.MODULE:CALLABLE, which it imports and calls."""
    name, colon, _ = spec.partition(":")
    return bool(colon) and name not in LOADERS and all(part.isidentifier() for part in name.split("."))


def load(spec: str, seed: int = 0) -> Data:
    """Load and check the data set that `spec` names.

    Args:
        spec: `digits`, `fashion-mnist[:DIR]`, `cifar10:DIR`, `cifar100:DIR`, `npz:FILE`, `folder:DIR[@SIZE]`,
            `stream:DIR[@SIZE]`, `wds:DIR[@SIZE]`, `synthetic[:D=6,K=3,N=200,T=1000]`, or
            `PACKAGE.MODULE:CALLABLE`: a function of your own without arguments that returns a `Data`, a dictionary of
            the arrays that `from_arrays` names, or a tuple of them in the order x_train, y_train, x_test, y_test, and
            optionally j_train, j_test.
        seed: Determines the split if there is no official one, and the inputs of `synthetic`.

    Raises:
        InputError: The data cannot be used.
        UnsupportedError: A package that is needed to read the data is not installed.

    Example:
        >>> data = load("synthetic:D=2,K=1,N=8")
        >>> data.train.jacobians.shape
        torch.Size([8, 1, 2])
    """
    name, _, argument = spec.partition(":")
    if name in LOADERS:
        return LOADERS[name](argument, seed)
    if is_code(spec) and ("." in name or _exists(name)):
        return _call(spec)
    if spec and is_dir(user_path(spec)):
        rule = "`--data` must name the kind of data in a folder."
        do = f"Write folder:{spec} for images in {spec}/train/CLASS/, with @SIZE to resize them (folder:{spec}@64)."
        raise InputError(rule, got=repr(spec), do=do)
    if spec.endswith(".npz") and name not in LOADERS:
        raise InputError("`--data` must name the kind of file.", got=repr(spec), do=f"Write npz:{spec}.")
    raise unknown_name("`--data`", spec, [*LOADERS, "PACKAGE.MODULE:CALLABLE"])


def _exists(module_name: str) -> bool:
    """Whether a top-level module exists; it is not imported."""
    return module_name in sys.modules or importlib.util.find_spec(module_name) is not None


def _call(spec: str) -> Data:
    """Return the data set of the user's function, which runs only because the user named it."""
    function = user_callable(spec, f"`--data {spec}`", f"`--data {spec}` must name a module that can be imported.")
    rule = f"`--data {spec}` must be callable without arguments and return a data set."
    with converted_errors(rule, "Call it in Python to see where."):
        given = function()
    if isinstance(given, Data) and isinstance(given.train.x, Streamed):
        return from_splits(spec, given.train, given.test)
    return from_arrays(spec, _arrays(spec, given))


def _arrays(spec: str, given: object) -> Mapping[str, object]:
    if isinstance(given, Data):
        named = {
            f"{key}_{part}": getattr(split, field)
            for part, split in (("train", given.train), ("test", given.test))
            for key, field in (("x", "x"), ("y", "y"), ("j", "jacobians"))
        }
        return {key: value for key, value in named.items() if value is not None}
    if isinstance(given, Mapping):
        return given
    if isinstance(given, tuple) and len(REQUIRED) <= len(given) <= len(REQUIRED + OPTIONAL):
        return dict(zip(REQUIRED + OPTIONAL, given, strict=False))
    rule = f"`--data {spec}` must return a Data, a dictionary or a tuple of arrays: {', '.join(REQUIRED)}."
    got = f"a tuple of {len(given)}" if isinstance(given, tuple) else type(given).__name__
    raise InputError(rule, got=got)
