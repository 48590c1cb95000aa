"""From the words of the command line to a loader, and functions of the user's."""

import sys

import numpy as np
import pytest

from jacmatch import datasets
from jacmatch.errors import InputError, UnsupportedError

MODULE = """
import numpy as np
from jacmatch import datasets
from jacmatch.errors import InputError, UnsupportedError

x, y = np.arange(24.0).reshape(6, 4), np.arange(6) % 2
number = 3

def dictionary():
    return {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2]}

def four():
    return x, y, x[:2], y[:2]

def five():
    return x, y[:, None] * 1.0, x[:2], y[:2, None] * 1.0, np.zeros((6, 1, 4))

def data():
    return datasets.from_arrays("inner", {**dict(zip(("x_train", "y_train", "x_test", "y_test", "j_train"), five()))})

def unchecked():
    from dataclasses import replace
    good = data()
    return replace(good, train=good.train.subset(__import__("torch").arange(5)), outputs=99, classes=7)

def three():
    return x, y, x

def nothing():
    return None

def keys():
    return {"X_train": x}

def fails():
    raise RuntimeError("no such column\\nin the table")

def refuses():
    raise InputError("Mine must be so.")

def cannot():
    raise UnsupportedError("Not here.")

def needs(argument):
    return four()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A package of the user's with one module of functions and two that cannot be imported."""
    package = tmp_path / "my_pictures"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sets.py").write_text(MODULE)
    (package / "broken.py").write_text("import numpy as np\n1 / 0\n")
    (package / "syntax.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_pictures.sets"
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pictures"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["dictionary", "four"])
def test_a_function_may_give_a_dictionary_or_a_tuple(module, name):
    data = datasets.load(f"{module}:{name}")
    assert (data.name, data.classes, data.shape, len(data.train), len(data.test)) == (f"{module}:{name}", 2, (4,), 6, 2)


def test_a_function_may_give_jacobians_or_a_data_set(module):
    with pytest.warns(UserWarning, match="integers"):
        five, data = datasets.load(f"{module}:five"), datasets.load(f"{module}:data")
    assert five.train.jacobians.shape == (6, 1, 4)
    assert five.fingerprint == data.fingerprint
    assert data.name == f"{module}:data"


def test_what_a_given_data_set_says_of_itself_is_not_believed(module):
    with pytest.warns(UserWarning, match="integers"):
        data = datasets.load(f"{module}:unchecked")
    assert (data.outputs, data.classes, len(data.train)) == (1, None, 5)


def test_a_module_without_a_package_is_enough(module, monkeypatch, tmp_path):
    (tmp_path / "flat_module_of_mine.py").write_text(MODULE)
    assert len(datasets.load("flat_module_of_mine:four").train) == 6
    del sys.modules["flat_module_of_mine"]


CALLABLES = {
    "sets:dictonary": r"callable of module my_pictures\.sets must be a known name\. Got 'dictonary'\. Nearest: dict",
    "sets:number": "the callable of module my_pictures.sets must be a known name. Got 'number'",
    "sets:": r"the callable of module my_pictures\.sets must be a known name\. Got ''",
    "none:load": r"must name a module that can be imported\. Got ModuleNotFoundError: No module named 'my_p",
    "broken:load": r"must name a module that can be imported\. Got ZeroDivisionError.*on PYTHONPATH",
    "syntax:load": r"must name a module that can be imported\. Got SyntaxError",
    "sets:three": r"must return a Data, a dictionary or a tuple of arrays: x_train, .*Got a tuple of 3",
    "sets:nothing": r"must return a Data, a dictionary or a tuple of arrays.*Got NoneType",
    "sets:keys": r"Each array of my_pictures\.sets:keys must be a known name\. Got 'X_train'\. Nearest: .*x_train",
    "sets:fails": r"must be callable without arguments and return a data set\. Got RuntimeError: no such column\. Call",
    "sets:needs": r"must be callable without arguments and return a data set\. Got TypeError",
    "sets:refuses": "^Mine must be so.$",
}


@pytest.mark.parametrize("spec", CALLABLES)
def test_bad_functions_are_refused(module, spec):
    with pytest.raises(InputError, match=CALLABLES[spec]):
        datasets.load(f"my_pictures.{spec}")


def test_a_function_of_the_running_program_is_loaded(module, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "my_set", lambda: (np.eye(2), np.arange(2)) * 2, raising=False)
    assert datasets.load("__main__:my_set").classes == 2


def test_what_a_function_cannot_do_stays_what_it_is(module):
    with pytest.raises(UnsupportedError, match=r"^Not here\.$"):
        datasets.load(f"{module}:cannot")


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [
        ("fashion_mnist", "fashion-mnist"),
        ("fashon-mnist:some/where", "fashion-mnist"),
        ("cifar", "cifar10[0]?, cifar100?"),
        ("digit", "digits"),
        ("Digits", "digits"),
        ("folders:pictures", "folder"),
    ],
)
def test_unknown_names_get_the_nearest_known(spec, nearest):
    with pytest.raises(
        InputError, match=rf"`--data` must be a known name\. Got '{spec}'\. Nearest: {nearest}.*Known: PACKAGE"
    ):
        datasets.load(spec)


@pytest.mark.parametrize("spec", ["", ":", "a b:c", "../x:y", "a..b:c"])
def test_what_is_no_name_at_all_is_refused(spec):
    with pytest.raises(InputError, match="`--data` must be a known name"):
        datasets.load(spec)


@pytest.mark.parametrize("name", ["npz", "folder", "cifar10", "fashion-mnist"])
@pytest.mark.parametrize("path", ["a" * 5000, "nul\0byte", "~nobody-of-this-name/x"])
def test_impossible_paths_are_refused(name, path):
    with pytest.raises(InputError, match=rf"`--data {name}:(DIR|FILE)` must name an existing (folder|file)\. Got"):
        datasets.load(f"{name}:{path}")


def test_every_loader_says_in_its_first_sentence_how_it_is_written():
    for name, loader in datasets.LOADERS.items():
        assert f"`{name}" in loader.__doc__.splitlines()[0]


def test_no_code_runs_for_a_name_that_only_looks_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digitz.py").write_text("raise SystemExit\n")
    np.savez(tmp_path / "npz.npz", a=np.zeros(1))
    with pytest.raises(InputError, match="must be a known name"):
        datasets.load("digitz")


def test_an_archive_without_its_kind_is_answered_with_the_kind():
    with pytest.raises(InputError, match=r"must name the kind of file\. Got 'data\.npz'\. Write npz:data\.npz\."):
        datasets.load("data.npz")
