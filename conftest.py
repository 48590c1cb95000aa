"""One torch thread and fixed seeds for every test; type checks where they are wanted."""

import dataclasses
import functools
import gc
import importlib.util
import inspect
import operator
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # files of tests need not survive a loss of power, and a disk takes ms for each
gc.disable()  # modules are never garbage: while they are imported, each search for it is in vain

_FRAMEWORKS = {"huggingface": "transformers", "lightning": "lightning", "timm": "timm"}
collect_ignore = [  # modules whose doctests need a framework that is not installed
    f"src/jacmatch/integrations/{module}.py"
    for module, framework in _FRAMEWORKS.items()
    if importlib.util.find_spec(framework) is None
]


_with_shapes = jaxtyping.jaxtyped
_SHAPE = re.compile(rf"\b({'|'.join(name for name in dir(jaxtyping) if name[0].isupper())})\[")


def _checked(function: Any = None, *, typechecker: Any) -> Any:
    """Check types with as little as each function needs; jaxtyping would check all of them in its own way.

    Binding the arguments to the names of shapes takes ten times as long as a check of types, and most functions have no
    shapes. A function within another would be compiled again, in milliseconds, at each call of the other.
    """
    if function is None:
        return functools.partial(_checked, typechecker=typechecker)
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = _checked(function.__init__, typechecker=typechecker)
        return function
    if not inspect.isfunction(function) or _SHAPE.search(str(function.__annotations__)):
        return _with_shapes(function, typechecker=typechecker)
    if "<locals>" in function.__qualname__ or not function.__annotations__:
        return function
    typed = typechecker(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else typed)(*args, **kwargs)

    # the place of an error is the last file that no library has: this one belongs to those of jaxtyping
    call.__code__ = call.__code__.replace(co_filename=jaxtyping.__file__)
    return call


jaxtyping.jaxtyped = _checked  # the name that every function of the library is decorated with


_HOT = (("rules.op_replacements", "Replacements.__torch_function__"), ("callables", "_walk"))
"""Internal functions that run for each operator and each attribute of a network: half of all checks of types."""


def pytest_collection_finish() -> None:
    """Check no types of the hottest functions; search for garbage again, but no more among what has been imported."""
    for name, function in _HOT:
        if module := sys.modules.get(f"jacmatch.jacobian.{name}"):
            operator.attrgetter(function)(module).__no_type_check__ = True  # of `typing`; jaxtyping reads it
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_initialized():
        torch.manual_seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed queues a call for CUDA, with a trace of the stack


def _unchecked() -> Iterator[None]:
    """Without the type checks of the test suite, which would refuse a wrong type before the library does.

    They also take half the time of a test that trains: a module of such tests goes without them where what it calls is
    called with them elsewhere.
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


as_users_run = pytest.fixture(_unchecked, name="as_users_run")
all_as_users_run = pytest.fixture(_unchecked, name="all_as_users_run", scope="module")
