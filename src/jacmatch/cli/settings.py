"""The settings that `--config` or `--resume` names."""

import dataclasses
import difflib
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jacmatch import files
from jacmatch.cli.flags import Flag, described, fits, fitted, has_run
from jacmatch.errors import InputError
from jacmatch.runs import Run

_JSON_NAMES = {str: "text", int: "integer", float: "number", bool: "boolean", list: "list", dict: "mapping"}
_LARGEST = {".json": 2**26}  # bytes; a result may have long tables
_LARGEST_YAML = 2**20
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (PyYAML reads 012 as 10, 1:30 as 90, 1e-3 as a string); no dates, no key twice, no aliases."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if not pair[0].endswith((":int", ":float", ":timestamp"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; refuse a key that occurs twice."""
        return _unique(self.construct_pairs(node, deep=True))

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; refuse an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias; write the value out")
        return super().compose_node(parent, index)


_FLOAT = r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|nan))$"
for _kind, _rule in (("int", r"[-+]?(0|[1-9]\d*)$"), ("float", _FLOAT)):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_rule), list("-+.0123456789"))


def _unique(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} occurs twice")
    return mapping


def named(words: Sequence[str], flag: str = "--config") -> str | None:
    """Return the value of `--config` or `--resume` on a command line; None without."""
    value = None
    for number, word in enumerate(words):
        if word.startswith(f"{flag}="):
            value = word.partition("=")[2]
        elif word == flag and number + 1 < len(words):
            value = words[number + 1]
    return value


def chosen(words: Sequence[str], verb: str, known: Sequence[Flag]) -> dict[str, Any]:
    """Return the settings that `--config` or `--resume` names, by field name."""
    flag = "--config"
    config, resume = named(words), named(words, "--resume")
    if resume is not None and has_run(known):
        if config is not None:
            rule = "`--resume` uses the settings of its folder."
            raise InputError(rule, got=f"--config {config} too", do="Leave one of them out.")
        Run.open(Path(resume).expanduser(), finished=False)
        config, flag = resume, "--resume"
    if config is None or not has_run(known):  # without a run folder the flag is unknown
        return {}
    settings = read(config, verb, known, flag)
    settings.pop("allow_code", None)  # only the command line allows it
    given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    if "--allow-code" not in given:
        from jacmatch.jobs.settings import check_no_code  # knows the data sets and networks, and so imports torch

        unset = {name: value for name, value in settings.items() if f"--{name.replace('_', '-')}" not in given}
        check_no_code(verb, unset, f"`{flag} {config}`")
    return settings


def resumed(job: Any, folder: Path) -> Any:
    """Return the job with that run folder."""
    folder = folder.expanduser()
    if job.out not in (None, folder):
        raise InputError("`--out` must be omitted with `--resume`, or name the same folder.", got=str(job.out))
    return dataclasses.replace(job, out=folder)


def read(path: str, verb: str, known: Sequence[Flag], flag: str = "--config") -> dict[str, Any]:
    """Return the settings of a file by field name, each of the type of its field."""
    source = Path(path).expanduser()
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
            rule = f"`{flag} {path}` must contain only settings of `{verb}`."
            raise InputError(rule, got=f"the key {_SHORT.repr(key)}", do=do)
        if name in chosen:
            raise InputError(f"`{name}` must be given once in `{flag} {path}`.", got="two spellings")
        kind = fields[name].kind
        if not fits(kind, value):
            rule = f"`{key}` in `{flag} {path}` must be {described(kind)}."
            raise InputError(rule, got=f"{_SHORT.repr(value)} ({_JSON_NAMES.get(type(value), type(value).__name__)})")
        chosen[name] = fitted(kind, value)
    return chosen


def _mapping(source: Path, named: str) -> dict[Any, Any]:
    """Return the content of the file, or of the settings in a folder, out of which no link is followed."""
    folder = source if os.path.isdir(source) else None
    source = source / "settings.json" if folder else source
    rule = f"{named} must name a JSON or YAML file, or the folder of a run."
    largest = _LARGEST.get(source.suffix, _LARGEST_YAML)
    try:
        if folder:
            content = files.read(folder, source, largest)
        else:  # the user's own, and perhaps a pipe of the shell
            with source.open("rb") as file:
                content = file.read(largest + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        do = "Check the path."
        raise InputError(rule, got=f"{getattr(error, 'strerror', None) or error} ({source})", do=do) from error
    if len(content) > largest:
        raise InputError(rule, got=f"a file of more than {largest:,} bytes")
    try:
        text = content.decode()
        settings = json.loads(text, object_pairs_hook=_unique) if source.suffix == ".json" else yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises whatever its conversions do
        raise InputError(rule, got=f"a file that cannot be parsed ({' '.join(str(error).split())})") from error
    if not isinstance(settings, dict):
        what = "nothing" if settings is None else f"a {_JSON_NAMES.get(type(settings), type(settings).__name__)}"
        raise InputError(f"{named} must map settings to values.", got=what, do="Write lines like `seed: 1`.")
    return settings
