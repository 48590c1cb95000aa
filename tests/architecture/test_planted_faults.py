"""The faults of `make faults`: each names a line of the package that is there once, and tests that exist."""

import importlib.util
import sys

import pytest

from . import source


def planted():
    spec = importlib.util.spec_from_file_location("planted_faults", source.ROOT / "tests" / "planted_faults.py")
    module = sys.modules["planted_faults"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FAULTS


FAULTS = planted()


@pytest.mark.parametrize("name", FAULTS)
def test_the_line_and_the_tests_of_a_fault_exist(name):
    fault = FAULTS[name]
    assert (source.PACKAGE / fault.file).read_text(encoding="utf-8").count(fault.old) == 1
    assert all((source.ROOT / path.partition("::")[0]).exists() for path in fault.tests.split())
