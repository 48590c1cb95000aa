"""Modules that have moved can be imported by their former names, with a warning that names the new one."""

import importlib
import sys

import pytest

from jacmatch import former_names


@pytest.mark.parametrize("former", former_names.MODULES)
def test_a_former_name_warns_and_gives_the_module_of_today(former, monkeypatch):
    monkeypatch.delitem(sys.modules, former, raising=False)
    present = importlib.import_module(former_names.MODULES[former])
    with pytest.warns(DeprecationWarning, match=rf"`{former}` is now `{present.__name__}`"):
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
    assert moved.__module__ == "jacmatch.diagnostics.doctor"
    assert moved in vars(diagnostics).values()
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = training.other


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in former_names.NAMES.items() for n in names])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_former_name_gives_the_present_object(module, name):
    owner, _, present = former_names.NAMES[module][name].rpartition(".")
    expected = getattr(importlib.import_module(f"jacmatch.{owner}"), present)
    assert getattr(importlib.import_module(module), name) is expected
