"""Modules that have moved can be imported by their former names, with a warning that names the new one."""

import importlib
import sys

import pytest

from jacmatch import former_modules


@pytest.mark.parametrize("former", former_modules.MOVED)
def test_a_former_name_warns_and_gives_the_module_of_today(former, monkeypatch):
    monkeypatch.delitem(sys.modules, former, raising=False)
    present = importlib.import_module(former_modules.MOVED[former])
    with pytest.warns(DeprecationWarning, match=rf"`{former}` is `{present.__name__}` now"):
        module = importlib.import_module(former)
    defined = {name for name, value in vars(present).items() if getattr(value, "__module__", "") == present.__name__}
    public = [name for name in defined if not name.startswith("__")]
    assert all(getattr(module, name) is getattr(present, name) for name in public)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


@pytest.mark.parametrize("name", ["Trial", "engine_trial"])
def test_what_moved_to_diagnostics_warns(name):
    from jacmatch import diagnostics, training

    with pytest.warns(DeprecationWarning, match=f"{name}` is now `jacmatch.diagnostics"):
        moved = getattr(training, name)
    assert moved.__module__ == "jacmatch.diagnostics.engine_benchmark"
    assert moved in vars(diagnostics).values()
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = training.other


def test_renamed_functions_are_available():
    former_names = {former for former in former_modules.RENAMED for name in former_modules.MOVED if _has(name, former)}
    assert former_names == set(former_modules.RENAMED)


def _has(module, name):
    present = importlib.import_module(former_modules.MOVED[module])
    return hasattr(present, former_modules.RENAMED[name])
