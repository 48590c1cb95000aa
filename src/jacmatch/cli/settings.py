"""Reading what `--config` names."""

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jacmatch.cli import values
from jacmatch.cli.flags import Flag
from jacmatch.errors import InputError
from jacmatch.runs import Run

_JSON_NAMES = {str: "text", int: "whole number", float: "number", bool: "boolean", list: "list", dict: "mapping"}


class _Loader(yaml.SafeLoader):
    """YAML's own types only, where 1e-3 is a number: PyYAML reads it as a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def named(words: Sequence[str], flag: str = "--config") -> str | None:
    """What stands behind `--config` or `--resume` on a command line, None without."""
    found = None
    for number, word in enumerate(words):
        if word.startswith(f"{flag}="):
            found = word.partition("=")[2]
        elif word == flag and number + 1 < len(words):
            found = words[number + 1]
    return found


def chosen(words: Sequence[str], verb: str, known: Sequence[Flag]) -> dict[str, Any]:
    """The settings that `--config` or `--resume` name on a command line, by field name.

    Raises:
        InputError: As `read`; or both are there.
    """
    config, resume = named(words), named(words, "--resume")
    if resume is not None:
        if config is not None:
            rule = "`--resume` takes the settings of its folder."
            raise InputError(rule, got=f"--config {config} too", do="Leave one of them out.")
        Run.open(Path(resume).expanduser(), finished=False)
        return read(resume, verb, known, flag="--resume")
    return {} if config is None else read(config, verb, known)


def resumed(job: Any, folder: Path) -> Any:
    """The job in that folder.

    Raises:
        InputError: The command line names another one.
    """
    folder = folder.expanduser()
    if job.out not in (None, folder):
        raise InputError("`--out` must be left out beside `--resume`, or name the same folder.", got=str(job.out))
    return dataclasses.replace(job, out=folder)


def read(path: str, verb: str, known: Sequence[Flag], flag: str = "--config") -> dict[str, Any]:
    """The settings of a file by field name, each of the type of its field.

    Args:
        path: A JSON or YAML file of settings, the `settings.json` or `result.json` of a run, or a run's folder.
        verb: The job they are for.
        known: Its fields.
        flag: Which names the file, for messages.

    Raises:
        InputError: There is no such file, it is damaged, it belongs to another job, or it has an unknown key or a value
            of a wrong type.
    """
    source = Path(path).expanduser()
    source = source / "settings.json" if source.is_dir() else source
    settings = _mapping(source, f"`{flag} {path}`")
    if isinstance(settings.get("settings"), dict) and "job" in settings:
        if settings["job"] != verb:
            raise InputError(f"`{flag} {path}` must be for `{verb}`.", got=f"the settings of `{settings['job']}`")
        settings = settings["settings"]
    fields = {flag.name: flag for flag in known}
    chosen: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
            nearest = f"Nearest: {', '.join(near)}. " if near else ""
            do = f"{nearest}See jacmatch {verb} --help."
            raise InputError(f"`{flag} {path}` must have settings of `{verb}` only.", got=f"the key {key!r}", do=do)
        if name in chosen:
            raise InputError(f"`{name}` must be once in `{flag} {path}`.", got="two spellings of it")
        kind = fields[name].kind
        if not values.fits(kind, value):
            rule = f"`{key}` in `{flag} {path}` must be {values.described(kind)}."
            raise InputError(rule, got=f"{value!r} ({_JSON_NAMES.get(type(value), type(value).__name__)})")
        chosen[name] = values.fitted(kind, value)
    return chosen


def _mapping(source: Path, named: str) -> dict[Any, Any]:
    """What the file says."""
    rule = f"{named} must name a JSON or YAML file, or the folder of a run."
    try:
        text = source.read_text(encoding="utf-8")
        settings = json.loads(text) if source.suffix == ".json" else yaml.load(text, _Loader)
    except OSError as error:
        raise InputError(rule, got=f"{error.strerror} ({source})", do="Check the path.") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: also bytes that are no UTF-8
        raise InputError(rule, got=f"a file that cannot be parsed ({' '.join(str(error).split())})") from error
    if not isinstance(settings, dict):
        what = "nothing" if settings is None else f"a {_JSON_NAMES.get(type(settings), type(settings).__name__)}"
        raise InputError(f"{named} must hold settings by name.", got=what, do="Write lines like `seed: 1`.")
    return settings
