"""The fields of a job as flags, and the arguments of a command line as a job. tyro parses, and lays out the help.

The fields are read from the source of the job: `VERB --help` and a mistyped flag need no import of torch. A stand-in of
a job is a dataclass with the same name, docstrings, bases, fields, types and defaults, and without methods. The
expressions of the source (`Literal["kl", "squared"]`, `JacobianLoss`, `Path()`) are evaluated; a name that a module of
the same distribution defines or imports is looked up in the source of that module, and any other module is imported.
Only assignments and class headers are evaluated, so the defaults and types in such a module must not depend on other
code.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import tyro

from jacmatch import plugins
from jacmatch.errors import InputError

HEAVY = frozenset({"torch", "numpy", "jaxtyping", "scipy", "sklearn"})
"""Packages that are not imported for a stand-in."""


class _Names(dict[str, Any]):
    """The names of a module, each evaluated when it is looked up."""

    def __init__(self, module: str, file: Path) -> None:
        super().__init__(__builtins__=__builtins__)
        self.module, self.package = module, module if file.name == "__init__.py" else module.rpartition(".")[0]
        self.evaluations: dict[str, Callable[[], Any]] = {}
        for statement in ast.parse(file.read_bytes()).body:
            self._bind(statement)

    def _bind(self, statement: ast.stmt) -> None:
        """Record how to evaluate the names that a top-level statement of the module binds."""
        match statement:
            case ast.ClassDef(name=name):
                self.evaluations[name] = partial(self._class, statement)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.evaluations[name] = partial(self.value, value)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                self.evaluations[name] = partial(self.value, value)
            case ast.ImportFrom(module=module, level=level, names=names):
                full = importlib.util.resolve_name("." * level + (module or ""), self.package) if level else str(module)
                self.evaluations |= {each.asname or each.name: partial(_lookup, full, each.name) for each in names}
            case ast.Import(names=names):
                for each in names:
                    top = each.name if each.asname else each.name.partition(".")[0]
                    self.evaluations[each.asname or top] = partial(_imported, top)

    def __missing__(self, name: str) -> Any:
        self[name] = self.evaluations[name]()  # KeyError: a builtin, which `eval` looks up next, or a function
        return self[name]

    def value(self, node: ast.expr) -> Any:
        """Evaluate an expression of the module."""
        return eval(compile(ast.Expression(node), self.module, "eval"), self)

    def _class(self, node: ast.ClassDef) -> type[Any]:
        """A class with the fields and class variables of the source; those that cannot be evaluated are left out."""
        content: dict[str, Any] = {"__doc__": ast.get_docstring(node), "__module__": self.module, "__annotations__": {}}
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                variable = "ClassVar" in ast.unparse(each.annotation)
                if variable and each.target.id not in ("group", "main", "examples"):
                    continue
                content["__annotations__"][each.target.id] = self.value(each.annotation)
                if each.value is not None:
                    content[each.target.id] = self.value(each.value)
        made = type(node.name, tuple(self.value(base) for base in node.bases), content)
        made.__field_docs__ = field_docs(node)  # type: ignore[attr-defined]
        return dataclasses.dataclass(frozen=True)(made)


def stand_in(job: str) -> type[Any]:
    """Return the stand-in of MODULE:CLASS."""
    module, _, name = job.partition(":")
    made = _lookup(module, name)
    if not dataclasses.is_dataclass(made) or not isinstance(made, type):
        raise LookupError(f"{job} is not a class")
    return made


def declared(job: str) -> type[Any]:
    """Return the stand-in of MODULE:CLASS, or the class itself where there is none."""
    try:
        return stand_in(job)
    except Exception:  # another distribution may declare its settings differently
        loaded: type[Any] = plugins.load(job)
        return loaded


def docs_of(owner: type[Any]) -> dict[str, str]:
    """Return the docstrings under the fields of a class, by field."""
    known: dict[str, str] | None = vars(owner).get("__field_docs__")
    if known is not None:
        return known
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(node, ast.ClassDef)
    return field_docs(node)


def field_docs(node: ast.ClassDef) -> dict[str, str]:
    """Return the docstrings under the fields in the source of a class, in one line each."""
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _lookup(module: str, name: str) -> Any:
    """Return a name of a module: of this distribution's from its source, of another one by import."""
    names = _names_of(module)
    return getattr(_imported(module), name) if names is None else names[name]


def _imported(module: str) -> Any:
    if module.partition(".")[0] in HEAVY:
        raise LookupError(f"{module} is slow to import")
    return importlib.import_module(module)


@functools.cache
def _names_of(module: str) -> _Names | None:
    """The names of a module of a jacmatch distribution; None for others."""
    top, *parts = module.split(".")
    if not top.startswith("jacmatch"):
        return None
    spec = importlib.util.find_spec(top)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder, *parts)
        for file in (path.with_suffix(".py") if parts else path / "__init__.py", path / "__init__.py"):
            if file.is_file():
                return _Names(module, file)
    raise LookupError(module)


_SCALARS = {
    int: ("an integer", "INT"),
    float: ("a number", "FLOAT"),
    str: ("a string", "TEXT"),
    bool: ("true or false", "BOOL"),
    Path: ("a path", "PATH"),
    NoneType: ("none", "NONE"),
}


def fitted(kind: Any, value: object) -> Any:
    """Return the value converted to the type `kind`: list to tuple, int to float, str to path."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for each in inner:
            if fits(each, value):
                return fitted(each, value)
    elif origin is Literal:
        if any(type(value) is type(each) and value == each for each in inner):
            return value
    elif origin is tuple:
        kinds = _elements(inner, value)
        if isinstance(value, list | tuple) and len(kinds) == len(value):
            return tuple(fitted(each, element) for each, element in zip(kinds, value, strict=True))
    elif isinstance(value, str) and "\0" in value:
        pass  # no path or name can have it
    elif kind is float and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{value!r} is not {described(kind)}")


def fits(kind: Any, value: object) -> bool:
    """Return whether `fitted` accepts the value."""
    try:
        fitted(kind, value)
    except ValueError:
        return False
    return True


def readable(kind: Any, words: list[str]) -> bool:
    """Return whether the arguments after a flag can be parsed as the type `kind`."""
    for each in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        if get_origin(each) is tuple:
            kinds = _elements(get_args(each), words)
            if len(kinds) == len(words) and all(map(_readable, kinds, words)):
                return True
        elif len(words) == 1 and _readable(each, words[0]):
            return True
    return False


def many(kind: Any) -> bool:
    """Return whether a flag of this type takes more than one word."""
    return get_origin(kind) is tuple or any(get_origin(each) is tuple for each in get_args(kind))


def described(kind: Any) -> str:
    """Return the type in words, without None."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(described(each) for each in inner if each is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list, each {described(inner[0])}" if inner[-1] is ... else f"a list of {len(inner)}"
    return _SCALARS[kind][0] if kind in _SCALARS else str(kind)


def metavar(kind: Any) -> str:
    """Return the placeholder of a flag's value in the help.

    Example:
        >>> metavar(int | None), metavar(tuple[Literal["crop", "flip"], ...])
        ('INT', '{crop,flip} ...')
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return "|".join(metavar(each) for each in inner if each is not NoneType)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin is tuple:
        return f"{metavar(inner[0])} ..." if inner[-1] is ... else " ".join(map(metavar, inner))
    return _SCALARS[kind][1] if kind in _SCALARS else "VALUE"


def _elements(inner: tuple[Any, ...], value: object) -> tuple[Any, ...]:
    """Return the type of each element of a tuple."""
    endless = len(inner) == 2 and inner[1] is ... and isinstance(value, list | tuple)
    return (inner[0],) * len(value) if endless else inner  # type: ignore[arg-type]


def _readable(kind: Any, word: str) -> bool:
    values: list[object] = [word, None] if word == "None" else [word]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            values.append(number(word))
    return any(fits(kind, value) for value in values)


@dataclass(frozen=True)
class Options:
    """Options of every verb besides the fields of its job."""

    config: Path | None = None
    """JSON or YAML file with settings, or the folder of an earlier run. Options of the command override it."""
    resume: Path | None = None
    """Resume the unfinished run in this folder, with its settings. An option with another value is an error."""
    json: bool = False
    """Print only the result, as JSON on stdout."""
    traceback: bool = False
    """Print the Python traceback of an error."""


@dataclass(frozen=True)
class Flag:
    """A field of a job as a flag."""

    name: str  # name of the field
    kind: Any  # its type
    default: Any  # the value without the flag; `dataclasses.MISSING` if the flag is required
    positional: bool  # whether it is given by its position instead of a flag
    help: str  # the field's docstring
    group: str  # the heading in the help; empty for what every job takes

    @property
    def words(self) -> tuple[str, ...]:
        """The spellings of the flag; for a switch that is on by default, also its negation."""
        if self.positional:
            return (self.name.upper(),)
        word = self.name.replace("_", "-")
        return (f"--{word}", f"--no-{word}") if self.default is True else (f"--{word}",)

    def annotation(self) -> Any:
        """The type, annotated for tyro's help."""
        shown = self.name.upper() if self.positional else metavar(self.kind)
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


def flags(job: type[Any], verb: str = "") -> list[Flag]:
    """Return the fields of a job in the order of its help: its own, then those of the dataclasses it extends.

    A dataclass in between names the group of its fields by a class variable `group`.
    """
    hints = get_type_hints(job, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(job)}
    owners = [each for each in job.__mro__ if dataclasses.is_dataclass(each)]
    listed: list[Flag] = []
    for number, owner in enumerate(owners):
        group = vars(owner).get("group", "" if owner is Options else verb)
        helps = docs_of(owner)
        for name in inspect.get_annotations(owner):
            if name not in fields or any(name in inspect.get_annotations(other) for other in owners[number + 1 :]):
                continue  # a new default of an inherited field: the field stays in the group that defines it
            kind, *markers = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
            positional = tyro.conf.Positional in markers
            default = dataclasses.MISSING if positional and not many(kind) else fields[name].default
            listed.append(Flag(name, kind, default, positional, helps.get(name, ""), group))
    return listed


def given(job: type[Any], words: Sequence[str]) -> set[str]:
    """Return the fields of a job whose flags are on the command line."""
    given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    return {flag.name for flag in flags(job) if given & set(flag.words)}


def parse(
    program: str, job: type[Any], words: Sequence[str], config: Mapping[str, Any]
) -> tuple[dict[str, Any], Options]:
    """Return the fields of the job that a command line describes, and the options around it."""
    known = [dataclasses.replace(flag, default=config.get(flag.name, flag.default)) for flag in _all(program, job)]
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            parsed = tyro.cli(_shape(known), prog=program, args=list(words), config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit:
        refuse(program, known, words, complaints.getvalue())
    given = {flag.name: getattr(getattr(parsed, flag.group) if flag.group else parsed, flag.name) for flag in known}
    names = given.keys() & {field.name for field in dataclasses.fields(Options)}
    return given, Options(**{name: given.pop(name) for name in names})


def print_help(program: str, job: type[Any], *, everything: bool) -> None:
    """Print the options of a verb and its examples."""
    known = _all(program, job)
    main = set(getattr(job, "main", "").split()) or {flag.name for flag in known[:_SHOWN]}
    shown = [flag for flag in known if everything or flag.positional or flag.name in main]
    if len(shown) < len(known):
        text = f"Show all {len(known)} options."
        shown.append(Flag("help_all", bool, False, False, text, ""))
    width = shutil.get_terminal_size().columns
    for paragraph in inspect.cleandoc(job.__doc__ or "").split("\n\n"):
        print(textwrap.fill(paragraph, width), end="\n\n")
    with contextlib.suppress(SystemExit):  # tyro ends like a program that has printed its help
        tyro.cli(_shape(shown), prog=program, description="", args=["--help"], config=(tyro.conf.OmitArgPrefixes,))
    if examples := getattr(job, "examples", ()):
        print("\nexamples:", *(f"  {program} {words}".rstrip() for words in examples), sep="\n")


_SHOWN = 10


def _all(program: str, job: type[Any]) -> list[Flag]:
    """Return the flags of a verb; one without a run folder has no settings to read."""
    own = flags(job, program.rpartition(" ")[2])
    return own + [flag for flag in flags(Options) if has_run(own) or flag.name not in ("config", "resume")]


def has_run(known: Sequence[Flag]) -> bool:
    """Return whether a job with these flags writes a run folder."""
    return any(flag.name == "out" for flag in known)


def _shape(known: Sequence[Flag]) -> type[Any]:
    """Return a dataclass for tyro that nests one dataclass for each group of flags."""

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
    """Report in one line what is wrong with arguments that tyro refused."""
    named = {word: flag for flag in known if not flag.positional for word in flag.words}
    positional = [flag for flag in known if flag.positional]
    see = f"See {program} --help."
    usage = " ".join([program, *(flag.words[0] for flag in positional)])
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    last = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-") and not readable(float, [word]):
            last = "--" + name.lstrip("-").replace("_", "-") if name.startswith("--") else name
            if last not in named:
                if (word := name.lstrip("-").replace("_", "-").upper()) in {flag.words[0] for flag in positional}:
                    raise InputError(f"{name} is not a flag; {word} is positional.", do=f"Write {usage}. {see}")
                raise unknown_flag(name, named, see)
            given[last] = [value] if equals else []
        elif last and (many(named[last].kind) or not (given[last] or named[last].kind is bool)):
            given[last].append(word)
        else:
            loose.append(word)
    for word, texts in given.items():
        kind = named[word].kind
        if kind is bool and texts:
            rule = f"`{word}` takes no value."
            raise InputError(rule, got=repr(texts[0]), do=f"Write {' or '.join(named[word].words)}.")
        if kind is not bool and not readable(kind, texts):
            got = " ".join(map(repr, texts)) or "nothing"
            raise InputError(f"`{word}` must be {described(kind)}.", got=got, do=_nearest(kind, texts))
    for flag, word in zip(positional, loose, strict=False):
        if not many(flag.kind) and not readable(flag.kind, [word]):
            rule = f"{flag.words[0]} must be {described(flag.kind)}."
            raise InputError(rule, got=repr(word), do=_nearest(flag.kind, [word]))
    missing = [flag.words[0] for flag in positional if flag.default is dataclasses.MISSING][len(loose) :]
    if missing:
        choices = [
            f"{each.words[0]} is {described(each.kind)}. " for each in positional if get_origin(each.kind) is Literal
        ]
        raise InputError(f"{' and '.join(missing)} must be given.", do=f"Write {usage}. {''.join(choices)}{see}")
    if len(loose) > len(positional) and not any(many(flag.kind) for flag in positional):
        raise InputError("unexpected word.", got=repr(loose[len(positional)]), do=see)
    raise InputError(" ".join(otherwise.translate(_BOX).split()))


SYNONYMS = {
    "steps": "epoch epochs num-epochs max-epochs iterations num-steps",
    "outputs-weight": "alpha kd-weight kd-alpha distill-weight distillation-weight soft-weight lambda-kd",
    "labels-weight": "ce-weight hard-weight label-weight",
    "jacobian-weight": "beta jac-weight jacobian-lambda sobolev-weight",
    "temperature": "temp tau kd-temperature t",
    "lr": "learning-rate",
    "batch-size": "bs batch mini-batch-size",
    "weight-decay": "wd l2",
    "optimizer": "opt optim",
    "schedule": "scheduler lr-scheduler",
    "student": "model arch network student-model",
    "model": "arch network student",
    "teacher": "teacher-model data",  # `surrogate` alone has no --data
    "teacher-weights": "weights checkpoint ckpt pretrained teacher-checkpoint",
    "weights": "checkpoint ckpt pretrained load",
    "data": "dataset data-dir data-path",
    "out": "output output-dir out-dir save-dir log-dir run-dir",
    "device": "gpu gpus cuda cpu",
    "devices": "nproc num-gpus world-size nproc-per-node",
    "seeds": "num-seeds n-seeds repeats",
    "precision": "amp fp16 bf16 mixed-precision dtype",
    "augment": "augmentation transforms",
    "clip": "grad-clip max-grad-norm clip-grad",
    "accumulate": "accumulation gradient-accumulation-steps grad-accum",
    "workers": "num-workers",
    "smoke": "dry-run debug fast-dev-run test",
    "per-class": "shots n-shot samples-per-class num-samples",
    "penalty-weight": "lambda jacobian-weight gradient-penalty",
}
"""What other programs call a flag."""
_NOTES = {
    "steps": "Training is counted in optimizer steps; an epoch has one step for each --batch-size samples. ",
    "data": "It is a function, or a table: npz:FILE, csv:FILE or parquet:FILE. ",
}


def unknown_flag(name: str, known: Sequence[str] | Mapping[str, Any], see: str) -> InputError:
    """Return an error for an unknown flag, with the flag of the same meaning or the nearest known ones."""
    word = name.lstrip("-").replace("_", "-").lower()
    for flag, others in SYNONYMS.items():
        if f"--{flag}" in known and word in others.split():
            note = _NOTES.get(flag) or _NOTES.get(word, "")
            return InputError(f"unknown flag {name}.", do=f"Use --{flag}. {note}{see}")
    near = difflib.get_close_matches(name.replace("_", "-"), list(known), n=3, cutoff=0.6)
    return InputError(f"unknown flag {name}.", do=f"Nearest: {', '.join(near)}. {see}" if near else see)


_BOX = str.maketrans(dict.fromkeys("╭╮╰╯│─", " "))


def _nearest(kind: Any, texts: Sequence[str]) -> str:
    """Return the nearest names, if the type is a list of names."""
    names = [str(name) for each in (kind, *get_args(kind)) for name in get_args(each) if isinstance(name, str)]
    near = [each for text in texts if text not in names for each in difflib.get_close_matches(text, names, n=1)]
    return f"Nearest: {', '.join(near)}." if near else ""
