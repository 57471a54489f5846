"""The package as one reads it: its wings, which way they import, and what `help()` says. Nothing is run."""

import ast
import doctest
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import helpers

FOLDER = Path(helpers.__file__).parent
TREES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.rglob("*.py"))
}
MODULES = sorted(name for name in TREES if not name.endswith("__init__"))
WINGS = re.findall(r"^    (\w+)  +\S", helpers.__doc__, flags=re.M)  # in order of dependence


def imported(module: str) -> set[str]:
    """Our modules that this one imports, anywhere in its source."""
    names = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("helpers.") for name in names} & set(MODULES)


def wing(module: str) -> str:
    return module.partition(".")[0]


def test_front_door_names_every_wing():
    assert sorted(WINGS) == sorted({wing(module) for module in MODULES})


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    above = WINGS[: WINGS.index(wing(module)) + 1]
    assert {wing(other) for other in imported(module)} <= set(above)


def test_no_module_imports_itself_by_way_of_others():
    seen: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, (*path, module)
        if module not in seen:
            for other in imported(module):
                visit(other, (*path, module))
            seen.add(module)

    for module in MODULES:
        visit(module, ())


def top_level(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def test_no_two_objects_share_a_name():
    # Every patch has its self-test under the same name.
    counts = Counter(name for module in MODULES for name in set(top_level(TREES[module])))  # overloads are one
    del counts["self_test"]
    assert [name for name, count in counts.items() if count > 1] == []


# ------------------------------------------------------------------------------------------------ what help() says


def functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions and methods, with their names."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name, node
            else:
                yield from functions(node.body, f"{prefix}{node.name}.")


IMPORTS = {name: [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] for name, tree in TREES.items()}


def offered(module: str) -> set[str]:
    """What of a module the front door or another wing imports."""
    others = [node for name, nodes in IMPORTS.items() if wing(name) != wing(module) for node in nodes]
    return {alias.name for node in others if node.module == f"helpers.{module}" for alias in node.names}


PUBLIC = {
    f"{module}.{name}": function
    for module in MODULES
    for name, function in functions(TREES[module].body, "")
    if name.partition(".")[0] in offered(module)
}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_names_every_parameter(name):
    documentation = ast.get_docstring(PUBLIC[name]) or ""
    arguments = PUBLIC[name].args
    names = [one.arg for one in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    names += [one.arg for one in (arguments.vararg, arguments.kwarg) if one]
    unnamed = [one for one in names if one not in ("self", "cls") and not re.search(rf"\b{one}\b", documentation)]
    assert documentation and not unnamed, unnamed


def test_our_names_at_the_front_door_have_a_docstring():
    assert sorted(helpers.__all__) == helpers.__all__
    named = {name: getattr(helpers, name) for name in helpers.__all__}
    ours = {name: value for name, value in named.items() if getattr(value, "__module__", "").startswith("helpers")}
    assert len(ours) >= 20  # the others are re-exported, or constants
    assert [name for name, value in ours.items() if not (value.__doc__ or "").strip()] == []


def test_errors_that_a_function_raises_are_in_its_docstring():
    for name, function in PUBLIC.items():
        raises = [
            node for node in ast.walk(function) if isinstance(node, ast.Raise) and "UserError" in ast.unparse(node)
        ]
        assert not raises or "UserError" in ast.get_docstring(function), name


@pytest.mark.parametrize(
    "module", [name for name in MODULES if ">>> " in (FOLDER / f"{name.replace('.', '/')}.py").read_text()]
)
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"helpers.{module}")).failed == 0


# ------------------------------------------------------------------------------------------------ how it is written


def lines_of_code(function: ast.FunctionDef, source: list[str]) -> int:
    """Lines of a function without its docstring, comments and blank lines; its signature counts."""
    inside = set(range(function.lineno, function.end_lineno + 1))
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            inside -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in (source[i - 1] for i in inside))


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_a_screen(module):
    source = (FOLDER / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8").splitlines()
    every = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]
    assert [one.name for one in every if lines_of_code(one, source) > 60] == []
