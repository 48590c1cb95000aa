"""Imports: the contract lists every package, and optional packages are imported where they are used."""

import re
import sys

from importlinter import api

from . import source

NEEDED = {"torch", "numpy", "jaxtyping", "jacmatch"}
"""What floors 0 to 2 may import when they are imported; anything else waits until it is used."""


def contracts():
    return api.read_configuration(str(source.ROOT / "pyproject.toml"))["contracts_options"]


def test_every_package_is_in_the_import_contract():
    (floors,) = [contract for contract in contracts() if contract.get("containers") == ["jacmatch"]]
    layers = floors["layers"]
    listed = {name.strip() for layer in layers for name in layer.split("|")}
    there = {path.stem for path in source.PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert listed == there - {"__init__"}
    assert floors["exhaustive"] == "True"


def imported(*folders, without=NEEDED):
    """What the files below these folders import at their top, apart from Python's own and what is named."""
    known = without | set(sys.stdlib_module_names)
    return {
        f"{source.name(path)}:{line} {name}"
        for path in source.files(*folders)
        for name, line in source.at_top(source.tree(path))
        if name.partition(".")[0] not in known
    }


def test_the_lower_floors_import_without_optional_packages():
    packages = [
        f"src/jacmatch/{name}"
        for name in ("runs", "jacobian", "losses", "models", "datasets", "teachers", "objectives")
    ]
    assert not imported(*packages)
    alone = [source.PACKAGE / name for name in ("__init__.py", "errors.py", "version.py")]
    names = {name for path in alone for name, _ in source.at_top(source.tree(path))}
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch", "jacmatch"}


def test_run_folders_and_reports_need_no_torch():
    assert not [name for name in imported("src/jacmatch/runs", "src/jacmatch/report", without=set()) if "torch" in name]


def test_a_loss_sees_no_module():
    names = {name for path in source.files("src/jacmatch/losses") for name, _ in source.at_top(source.tree(path))}
    assert {name for name in names if name.startswith("torch.nn")} <= {"torch.nn.functional"}


def test_annotations_are_not_changed():
    """Deferred annotations would hide the shapes from jaxtyping."""
    files = source.files("src", "research", "tests", "benchmarks")
    assert not [source.name(path) for path in files if re.search("^from __future__", path.read_text(), re.MULTILINE)]
