"""What docstrings say of arguments is so: their names and their defaults. Modules are read, not imported."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffusers_localdit

ROOT = Path(diffusers_localdit.__file__).parent
# "name (`type`, *optional*, defaults to `value`):" at the indentation of the first argument; or several names.
ARGUMENT = re.compile(r"([\w, *]+) \((.*?)\):(?: |$)")


def functions(path: Path) -> Iterator[tuple[str, str, dict[str, ast.expr | None]]]:
    """Name, docstring, and the default of each argument, `None` where there is none; of a class, of its fields."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            fields = {x.target.id: x.value for x in node.body if isinstance(x, ast.AnnAssign)}
            makers = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
            defaults = arguments(makers[0]) if makers else fields
        elif isinstance(node, ast.FunctionDef):
            defaults = arguments(node)
        else:
            continue
        if "Args:" in (text := ast.get_docstring(node) or ""):
            yield node.name, text, defaults


def arguments(function: ast.FunctionDef) -> dict[str, ast.expr | None]:
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [*[None] * (len(positional) - len(given.defaults)), *given.defaults]
    pairs = [*zip(positional, defaults), *zip(given.kwonlyargs, given.kw_defaults)]
    pairs += [(argument, None) for argument in (given.vararg, given.kwarg) if argument is not None]
    return {argument.arg: default for argument, default in pairs}


def documented(text: str) -> Iterator[tuple[str, str]]:
    """Name and description of the type of each argument."""
    section = text.split("Args:\n", 1)[1].split("\n\n")[0]
    indentation = re.match(r" *", section).group()
    for line in section.splitlines():
        if match := ARGUMENT.match(line.removeprefix(indentation)):
            for name in match[1].split(", "):
                yield name.lstrip("*"), match[2]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_are_as_documented(path):
    constants = {
        x.targets[0].id: x.value
        for x in ast.parse(path.read_text()).body
        if isinstance(x, ast.Assign) and isinstance(x.targets[0], ast.Name)
    }
    for function, text, defaults in functions(path):
        for name, kind in documented(text):
            assert name in defaults, (function, name)
            default = defaults[name]
            if isinstance(default, ast.Name):
                default = constants.get(default.id, default)
            if (said := re.search(r"defaults to (?!the )(.+)$", kind)) is not None:
                assert default is not None, (function, name)
                assert ast.dump(default) == ast.dump(ast.parse(said[1].strip("`"), mode="eval").body), (function, name)
            elif default is not None:
                assert "*optional*" in kind or "defaults to the " in kind, (function, name)
