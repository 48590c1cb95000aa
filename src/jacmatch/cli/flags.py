"""From a recipe to its flags, and from the words of a command line to a recipe. tyro parses and writes the help."""

import contextlib
import dataclasses
import difflib
import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from jacmatch.cli import values
from jacmatch.errors import InputError


@dataclass(frozen=True)
class Options:
    """What every verb takes besides the fields of its recipe."""

    config: Path | None = None
    """JSON or YAML file with settings, or the folder of an earlier run; flags override it."""
    resume: Path | None = None
    """Go on with the unfinished run in this folder, with its settings; a flag that says otherwise is refused."""
    json: bool = False
    """Print the result as JSON on stdout, and nothing else there."""
    traceback: bool = False
    """Show the lines of code behind an error."""


@dataclass(frozen=True)
class Flag:
    """A field of a recipe as the command line sees it.

    Attributes:
        name: Of the field.
        kind: Its type.
        default: What holds without the flag; `dataclasses.MISSING` where there is none.
        positional: Whether it is given by its place instead of a flag.
        help: The field's docstring.
        group: The heading it is listed under; empty for what every job takes.
    """

    name: str
    kind: Any
    default: Any
    positional: bool
    help: str
    group: str

    @property
    def words(self) -> tuple[str, ...]:
        """How it is written; also its opposite, where it holds without."""
        if self.positional:
            return (self.name.upper(),)
        word = self.name.replace("_", "-")
        return (f"--{word}", f"--no-{word}") if self.default is True else (f"--{word}",)

    def annotation(self) -> Any:
        """The type with what tyro shall show."""
        shown = self.name.upper() if self.positional else values.metavar(self.kind)
        silent = any(self.default is each for each in (None, (), False, dataclasses.MISSING))
        argument = tyro.conf.arg(
            help=self.help,
            metavar=None if self.kind is bool else shown,
            help_behavior_hint="" if silent else lambda default: f"(default: {default})",
        )
        markers = [tyro.conf.Positional] if self.positional else []
        markers += [tyro.conf.FlagCreatePairsOff] if self.default is False else []
        parts, annotated = (self.kind, argument, *markers), Annotated
        return annotated[parts]


def flags(recipe: type[Any], verb: str = "") -> list[Flag]:
    """The fields of a recipe in the order of its help: its own, then those of the dataclasses it extends.

    Args:
        recipe: A dataclass; a field annotated with `tyro.conf.Positional` has to be given, by its place, unless it is
            a tuple: that takes any number of words.
        verb: Names the recipe's own group.
    """
    hints = get_type_hints(recipe, include_extras=True)
    defaults = {field.name: field for field in dataclasses.fields(recipe)}
    owners = [each for each in recipe.__mro__ if dataclasses.is_dataclass(each)]
    listed: list[Flag] = []
    for owner in owners:
        helps = {each.arg_name: each.description for each in docstring_parser.parse_from_object(owner).params}
        base = owner is owners[-1] or owner is Options
        group = "" if base else verb if owner is recipe else owner.__name__.removesuffix("Fields").lower()
        for name in inspect.get_annotations(owner):
            if name in defaults:
                field, hint = defaults.pop(name), hints[name]
                kind, *markers = get_args(hint) if get_origin(hint) is Annotated else (hint,)
                positional = tyro.conf.Positional in markers
                default = dataclasses.MISSING if positional and not values.many(kind) else field.default
                text = " ".join((helps.get(name) or "").split())
                listed.append(Flag(name, kind, default, positional, text, group))
    return listed


def given(recipe: type[Any], words: Sequence[str]) -> set[str]:
    """The fields of a recipe whose flags are among the words."""
    said = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    return {flag.name for flag in flags(recipe) if said & set(flag.words)}


def read(program: str, recipe: type[Any], words: Sequence[str], config: Mapping[str, Any]) -> tuple[Any, Options]:
    """The job that a command line asks for, and the options around it.

    Args:
        program: What comes before the words, for messages.
        recipe: The dataclass of the verb.
        words: What follows the verb.
        config: Settings that take the place of defaults.

    Raises:
        InputError: The words are not flags of this verb with values of their types.
        SystemExit: The words ask for help, which has been printed.
    """
    known = [
        dataclasses.replace(flag, default=config.get(flag.name, flag.default))
        for flag in flags(recipe, program.rpartition(" ")[2]) + flags(Options)
    ]
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            parsed = tyro.cli(
                _shape(known),
                prog=program,
                description=inspect.cleandoc(recipe.__doc__ or ""),
                args=list(words),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        refuse(program, known, words, complaints.getvalue())
    given = {flag.name: getattr(getattr(parsed, flag.group) if flag.group else parsed, flag.name) for flag in known}
    options = Options(*(given.pop(field.name) for field in dataclasses.fields(Options)))
    return recipe(**given), options


def _shape(known: Sequence[Flag]) -> type[Any]:
    """A dataclass for tyro with one dataclass inside for each group of flags."""

    def fields(group: str) -> list[tuple[str, Any, Any]]:
        return [
            (flag.name, flag.annotation(), dataclasses.field(default=flag.default))
            for flag in known
            if flag.group == group
        ]

    groups = dict.fromkeys(flag.group for flag in known if flag.group)
    inner = [(group, dataclasses.make_dataclass(group, fields(group), kw_only=True)) for group in groups]
    return dataclasses.make_dataclass("job", [*inner, *fields("")], kw_only=True)


def refuse(program: str, known: Sequence[Flag], words: Sequence[str], otherwise: str) -> NoReturn:
    """Says in one line what is wrong with words that tyro refused.

    Args:
        program: What comes before the words.
        known: The flags.
        words: The words.
        otherwise: What tyro said, for a fault that is not found here.

    Raises:
        InputError: Always.
    """
    named = {word: flag for flag in known if not flag.positional for word in flag.words}
    places = [flag for flag in known if flag.positional]
    see = f"See {program} --help."
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    last = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-") and not values.readable(float, [word]):
            last = "--" + name.lstrip("-").replace("_", "-") if name.startswith("--") else name
            if last not in named:
                raise unknown_flag(name, named, see)
            given[last] = [value] if equals else []
        elif last and (values.many(named[last].kind) or not (given[last] or named[last].kind is bool)):
            given[last].append(word)
        else:
            loose.append(word)
    for word, texts in given.items():
        kind = named[word].kind
        if kind is bool and texts:
            raise InputError(
                f"`{word}` takes no value.", got=repr(texts[0]), do=f"Write {' or '.join(named[word].words)}."
            )
        if kind is not bool and not values.readable(kind, texts):
            raise InputError(
                f"`{word}` must be {values.described(kind)}.", got=_quoted(texts), do=_nearest(kind, texts)
            )
    for flag, word in zip(places, loose, strict=False):
        if not values.many(flag.kind) and not values.readable(flag.kind, [word]):
            rule = f"{flag.words[0]} must be {values.described(flag.kind)}."
            raise InputError(rule, got=repr(word), do=_nearest(flag.kind, [word]))
    missing = [flag.words[0] for flag in places if flag.default is dataclasses.MISSING][len(loose) :]
    if missing:
        usage = " ".join([program, *(flag.words[0] for flag in places)])
        raise InputError(f"{' and '.join(missing)} must be given.", do=f"Write {usage}. {see}")
    if len(loose) > len(places) and not any(values.many(flag.kind) for flag in places):
        raise InputError("unexpected word.", got=repr(loose[len(places)]), do=see)
    raise InputError(" ".join(otherwise.translate(_BOX).split()))


def unknown_flag(name: str, known: Sequence[str] | Mapping[str, Any], see: str) -> InputError:
    """An error for a flag that is not there, with the nearest that is."""
    near = difflib.get_close_matches(name.replace("_", "-"), list(known), n=3, cutoff=0.5)
    return InputError(f"unknown flag {name}.", do=f"Nearest: {', '.join(near)}. {see}" if near else see)


_BOX = str.maketrans(dict.fromkeys("╭╮╰╯│─", " "))


def _quoted(texts: Sequence[str]) -> str:
    return " ".join(map(repr, texts)) or "nothing"


def _nearest(kind: Any, texts: Sequence[str]) -> str:
    """The nearest of a list of names, where the type is one."""
    names = [str(name) for each in (kind, *get_args(kind)) for name in get_args(each) if isinstance(name, str)]
    near = [each for text in texts if text not in names for each in difflib.get_close_matches(text, names, n=1)]
    return f"Nearest: {', '.join(near)}." if near else ""
