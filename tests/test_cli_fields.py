"""How the fields of a recipe become flags, and which values they take: on the command line and in a `--config`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from jacmatch.cli import VERBS, flags, settings
from jacmatch.errors import InputError


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class Sample:
    """A recipe with a field of every type."""

    word: Annotated[str, tyro.conf.Positional] = ""
    """Comes first."""
    count: int = 1
    """A count."""
    share: float | None = None
    """A share."""
    folder: Path | None = None
    """A folder."""
    kind: Literal["one", "two"] = "one"
    """A kind."""
    both: bool = False
    """Both."""
    sizes: tuple[int, ...] = ()
    """Sizes."""
    limits: tuple[float, float] = (0.0, 1.0)
    """Limits."""


def test_every_type_of_field():
    words = ["w", "--count", "2", "--share", "3", "--folder", "p", "--kind", "two", "--both", "--sizes", "4", "5"]
    fields, options = flags.parse("jacmatch sample", Sample, [*words, "--limits", "-1", "2e0", "--json"], {})
    assert Sample(**fields) == Sample("w", 2, 3.0, Path("p"), "two", True, (4, 5), (-1.0, 2.0))
    assert (options.json, options.traceback, options.config) == (True, False, None)


def test_a_config_is_what_holds_without_flags():
    given = {"word": "w", "count": 2, "share": 0.5, "both": True, "sizes": (4, 5)}
    fields, _ = flags.parse("jacmatch sample", Sample, ["--no-both", "--share", "None"], given)
    assert Sample(**fields) == Sample("w", 2, None, both=False, sizes=(4, 5))


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float | None, None, None),
        (int | None, 3, 3),
        (Path | None, "a", Path("a")),
        (str, "3", "3"),
        (bool, True, True),
        (Literal["32", "bf16"], "32", "32"),
        (tuple[float, ...], [1, 2.5], (1.0, 2.5)),
        (tuple[int, int], [1, 2], (1, 2)),
        (tuple[Literal["a", "b"], ...] | None, ["b"], ("b",)),
    ],
)
def test_values_that_fit(kind, value, expected):
    fitted = flags.fitted(kind, value)
    assert fitted == expected
    assert type(fitted) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 3.0),
        (int, True),
        (int, "3"),
        (float, "3"),
        (float, True),
        (str, 3),
        (bool, 1),
        (bool, "yes"),
        (Path, 3),
        (Literal["32", "bf16"], 32),
        (Literal[1, 2], True),
        (tuple[int, ...], 3),
        (tuple[int, ...], [1, "2"]),
        (tuple[int, int], [1]),
        (int | None, "none"),
        (tuple[str, ...], "ab"),
    ],
)
def test_values_that_do_not(kind, value):
    with pytest.raises(ValueError, match="is not "):
        flags.fitted(kind, value)


def test_numbers_in_yaml_are_numbers():
    Path("mine.yaml").write_text("lr: 1e-3\nclip: 2E+1\nema: 5.e-1\nweight_decay: 0.5\n")
    known = flags.flags(VERBS["train"].load())
    chosen = settings.read("mine.yaml", "train", known)
    assert chosen == {"lr": 1e-3, "clip": 20.0, "ema": 0.5, "weight_decay": 0.5}


def test_yaml_runs_no_code():
    Path("mine.yaml").write_text("lr: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InputError, match="cannot be parsed"):
        settings.read("mine.yaml", "train", flags.flags(VERBS["train"].load()))


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ([], None),
        (["--config"], None),
        (["--config", "a"], "a"),
        (["--config=a"], "a"),
        (["--config", "a", "--config=b"], "b"),
    ],
)
def test_the_config_on_a_command_line(words, path):
    assert settings.named(words) == path
