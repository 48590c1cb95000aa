"""What a run is made of is fingerprinted by content, and another experiment is refused by name."""

import functools
import json
import sys

import pytest

from jacmatch.errors import InputError
from jacmatch.runs import Run
from jacmatch.runs.identity import changed, code_of, digest_of, probe, source_of


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Writes the user's modules, and forgets them afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(sources):
        for name, source in sources.items():
            file = tmp_path / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(source)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_probes_agree_up_to_rounding_and_texts_exactly():
    assert not changed({"a": "x", "b": probe([100.0, 0.0])}, {"a": "x", "b": probe([100.009, 0.009])})
    assert changed({"b": probe([100.0, 0.0])}, {"b": probe([100.0, 0.02])}) == "b (off by 0.0% of the largest)"
    assert changed({"b": probe([1.0])}, {"b": probe([2.0])}) == "b (off by 50.0% of the largest)"
    assert changed({"b": probe([1.0])}, {"b": probe([1.0, 2.0])}) == "b (off by inf% of the largest)"
    assert changed({"b": probe([float("inf")])}, {"b": probe([1.0])}) == "b (not finite there, values here)"
    assert (
        changed({"a": "0" * 64, "c": 1}, {"a": "1" * 64})
        == "a (000000000000 there, 111111111111 here), c (1 there, nothing here)"
    )
    assert changed(dict.fromkeys("abcdefghij", 1), dict.fromkeys("abcdefghij", 2)).endswith(
        "h (1 there, 2 here), and 2 more"
    )


def test_code_is_that_of_a_module_and_of_all_that_it_imports(modules):
    modules(
        {
            "mine": "import math, numpy\nfrom pack import inner as other\ndef f():\n    import late\n",
            "late": "x = 1\n",
            "pack/__init__": "from . import inner\n",
            "pack/inner": "from .deep import y\n",
            "pack/deep": "y = 1\n",
            "unrelated": "",
        }
    )
    before = code_of("mine")
    assert sorted(before) == ["code late", "code mine", "code pack", "code pack.deep", "code pack.inner"]
    for name, source in {"late": "x = 2\n", "pack/deep": "y = 2\n"}.items():
        modules({name: source})
        after = code_of("mine")
        assert changed(before, after).startswith(f"code {name.replace('/', '.')} (")
        before = after
    modules({"late": "# a comment\nx  =  2\n", "unrelated": "x = 3\n"})
    assert code_of("mine") == before
    assert "late" not in sys.modules, "nothing is imported"
    assert code_of("no_such_module") == code_of("os.path") == code_of("jacmatch.runs") == code_of("") == {}


def test_a_module_that_is_no_python_is_compared_by_its_bytes(modules):
    modules({"broken": "def f(:\n"})
    before = code_of("broken")
    modules({"broken": "def g(:\n"})
    assert changed(before, code_of("broken")).startswith("code broken (")


def test_the_source_of_a_function_has_what_it_takes_from_around_it():
    def made(factor, inner=None):
        def f(x, offset=1):
            return factor * x + offset if inner is None else inner(x)

        return f

    class Base:
        def __call__(self, x):
            return x

    class Own(Base):
        pass

    assert source_of(made(2)) == source_of(made(2)) != source_of(made(3))
    assert source_of(made(1, made(2))) != source_of(made(1, made(3)))
    assert source_of(functools.partial(made(2), offset=1)) != source_of(functools.partial(made(2), offset=2))
    assert "return x" in source_of(Own()) == source_of(Own)
    assert source_of(len) == source_of(json.dumps) == source_of(pytest.raises) == ""
    recursive = made(1, len)
    recursive.__closure__[1].cell_contents = recursive
    assert source_of(recursive)


def test_a_run_goes_on_with_what_it_was_begun_with(tmp_path):
    run = Run.create(tmp_path / "run", "train", {}, "0")
    assert (run.inputs, run.inputs_digest) == ({}, None)
    run.check_inputs("data", {"x_train": "a"})
    run = Run.create(tmp_path / "run", "train", {}, "0")
    run.check_inputs("data", {"x_train": "a"})
    run.check_inputs("teacher", {"outputs": probe([1.0])})
    assert run.inputs_digest == digest_of({"teacher": {"outputs": probe([1.0])}, "data": {"x_train": "a"}})
    message = (
        r"must be resumed with the data that it was started with\. Got changes in x_train \(a there, b here\)\. "
        r"Restore the original inputs, or choose another --out"
    )
    with pytest.raises(InputError, match=message):
        run.check_inputs("data", {"x_train": "b"})
    assert run.inputs["data"] == {"x_train": "a"}


def test_a_run_inside_a_run_is_of_the_same_inputs(tmp_path):
    one, other = (Run.create(tmp_path / name, "train", {}, "0") for name in ("one", "other"))
    for run, digest in ((one, "a"), (other, "b")):
        run.check_inputs("data", {"x_train": digest})
        run.child("seed0")
    (tmp_path / "other" / "seed0").rename(tmp_path / "one" / "seed1")
    assert one.child("seed0").identity == one.inputs_digest != other.inputs_digest
    with pytest.raises(InputError, match=r"other inputs \(data, code, teacher\) than the run that it lies in\. Choose"):
        one.child("seed1")
