"""What users may rely on: the public names, the names on the command line, types, and a changelog that knows it."""

import importlib
import inspect
import json
import re
from importlib import resources

import jacmatch
from jacmatch import cli, datasets, jobs, losses, models, objectives, teachers
from jacmatch.datasets import arrays, folders, official, shards, synthetic
from jacmatch.losses import penalties
from jacmatch.models.inputs import RawInputs

from . import source

SNAPSHOT = json.loads((source.ROOT / "tests" / "architecture" / "public_names.json").read_text(encoding="utf-8"))


def exported(package, protocol):
    """The classes that a package exports and that follow a protocol."""
    names = inspect.getmembers(package, inspect.isclass)
    members = [name for name in vars(protocol) if not name.startswith("_") or name == "__call__"]
    return {
        kind
        for name, kind in names
        if name in package.__all__ and kind is not protocol and all(hasattr(kind, each) for each in members)
    }


def public_functions(*modules):
    """The functions that are defined in these modules and have no underscore."""
    return {
        function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


def test_the_public_names_are_those_of_the_snapshot():
    assert sorted(jacmatch.__all__) == SNAPSHOT, "say it in CHANGELOG.md, then change public_names.json"


def test_every_public_name_is_there_and_documented():
    for name in jacmatch.__all__:
        public = getattr(jacmatch, name)
        assert name == "__version__" or inspect.getdoc(public), name


def test_an_unknown_name_is_an_error():
    assert not hasattr(jacmatch, "jacobians")


def test_every_estimator_and_readout_has_a_name():
    package = importlib.import_module("jacmatch.jacobian")  # the attribute of that name is the function
    of_text = {package.TokenSubstitutions}  # no job has text
    assert set(package.ESTIMATORS.values()) == exported(package, package.Estimator) - of_text
    assert set(package.READOUTS.values()) == exported(package, package.Readout)


def test_every_point_and_teacher_has_a_name():
    assert set(objectives.POINTS.values()) == exported(objectives, objectives.Point)
    assert set(teachers.TEACHERS.values()) == exported(teachers, teachers.Teacher)


def test_every_penalty_has_a_name_and_named_losses_are_exported():
    exported_functions = {getattr(losses, name) for name in losses.__all__ if callable(getattr(losses, name))}
    assert set(losses.PENALTIES.values()) == exported_functions & public_functions(penalties)
    named = [*losses.OUTPUT_LOSSES.values(), *losses.JACOBIAN_LOSSES.values(), *losses.PENALTIES.values()]
    assert all(getattr(losses, function.__name__) is function for function in named)
    assert {function.__name__ for function in named} <= set(losses.__all__)


def test_every_model_has_a_name():
    networks = {value for value in vars(models).values() if inspect.isclass(value) and issubclass(value, RawInputs)}
    built = {getattr(builder, "func", builder) for builder in models.CATALOG.values()}
    assert built == networks - {models.Normalized}


def test_every_data_set_has_a_name():
    modules = (arrays, official, folders, shards, synthetic)
    loaders = {f for f in public_functions(*modules) if [*inspect.signature(f).parameters] == ["argument", "seed"]}
    assert set(datasets.LOADERS.values()) == loaders


def test_every_job_has_a_verb():
    classes = {getattr(jobs, name) for name in jobs.__all__ if inspect.isclass(getattr(jobs, name))}
    assert {verb.load() for verb in cli.VERBS.values()} == classes


def test_types_are_shipped():
    assert resources.files("jacmatch").joinpath("py.typed").is_file()
    assert "py.typed" in (source.ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_changelog_knows_the_version():
    changelog = (source.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[(Unreleased|{re.escape(jacmatch.__version__)})\]", changelog, re.MULTILINE)
