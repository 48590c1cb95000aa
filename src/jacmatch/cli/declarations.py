"""The fields of a job, read from its source: `VERB --help` and a mistyped flag need no import of torch.

A stand-in of a job is a dataclass with the same name, docstrings, bases, fields, types and defaults, and without
methods. The expressions of the source (`Literal["kl", "squared"]`, `JacobianLoss`, `Path()`) are evaluated; a name that
a module of the same distribution defines or imports is looked up in the source of that module, and any other module is
imported. Only assignments and class headers are evaluated, so the defaults and types in such a module must not depend
on other code.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import textwrap
from pathlib import Path
from typing import Any

from jacmatch import plugins

HEAVY = frozenset({"torch", "numpy", "jaxtyping", "scipy", "sklearn"})
"""Packages that are not imported for a stand-in."""


class _Names(dict[str, Any]):
    """The names of a module, each evaluated when it is looked up."""

    def __init__(self, module: str, file: Path) -> None:
        super().__init__(__builtins__=__builtins__)
        self.module, self.package = module, module if file.name == "__init__.py" else module.rpartition(".")[0]
        self.statements: dict[str, ast.stmt] = {}
        for statement in ast.parse(file.read_bytes()).body:
            for name in _bound(statement):
                self.statements[name] = statement

    def __missing__(self, name: str) -> Any:
        match self.statements.get(name):
            case ast.ClassDef() as node:
                self[name] = self._class(node)
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                self[name] = self.value(value)
            case ast.ImportFrom(module=module, level=level, names=names):
                origin = next(alias.name for alias in names if name in (alias.asname, alias.name))
                full = importlib.util.resolve_name("." * level + (module or ""), self.package) if level else str(module)
                self[name] = _lookup(full, origin)
            case ast.Import(names=names):
                self[name] = _imported(next(a.name if a.asname else name for a in names if name in _top(a)))
            case _:
                raise KeyError(name)  # a builtin, which `eval` looks up next, or a function
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
        raise LookupError(f"{job} is no class")
    return made


def of(job: str) -> type[Any]:
    """Return the stand-in of MODULE:CLASS, or the class itself where there is none."""
    try:
        return stand_in(job)
    except Exception:  # of a distribution that declares its settings in another way
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


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module binds."""
    match statement:
        case ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
        case ast.Import(names=names):
            return [name for alias in names for name in _top(alias)]
        case _:
            return []


def _top(alias: ast.alias) -> tuple[str]:
    return (alias.asname or alias.name.partition(".")[0],)


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
