"""The package as one reads it: its rooms, which way they import, and what `help()` says. Nothing is run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import helpers

FOLDER = Path(helpers.__file__).parent
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.py")}
ROOMS = re.findall(r"^    (\w+)  +\S", helpers.__doc__, flags=re.M)  # in order of dependence

# What a room knows nothing of, whatever the order allows.
STRANGERS = {
    "pairs": ["models"],
    "models": ["pairs"],
    "checks": ["training", "thinking"],
    "thinking": ["training"],
    "diagnosis": ["models"],
    "sweep": ["plots"],
    "inspection": ["sweep"],
    "plots": ROOMS,
}


def imports(room: str) -> set[str]:
    """Rooms that this one imports, anywhere in its source."""
    names = set()
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.ImportFrom) and node.module == "helpers":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("helpers.") for name in names if name.startswith("helpers.") or name in ROOMS}


def test_front_door_names_every_room():
    assert sorted(ROOMS) == sorted(TREES.keys() - {"__init__"})


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    assert imports(room) <= set(ROOMS[: ROOMS.index(room)])


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_that_know_nothing_of_each_other(room):
    assert imports(room).isdisjoint(STRANGERS[room])


# ------------------------------------------------------------------------------------------------ what help() says


def functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions and methods, with their names."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name, node
            else:
                yield from functions(node.body, f"{prefix}{node.name}.")


PUBLIC = dict(found for room in ROOMS for found in functions(TREES[room].body, f"{room}."))


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
    ours = {name: value for name, value in named.items() if value.__module__.startswith("helpers")}
    assert len(ours) >= 20  # the others are re-exported
    assert [name for name, value in ours.items() if not (value.__doc__ or "").strip()] == []


def test_errors_that_a_function_raises_are_in_its_docstring():
    for name, function in PUBLIC.items():
        raises = [
            node for node in ast.walk(function) if isinstance(node, ast.Raise) and "UserError" in ast.unparse(node)
        ]
        assert not raises or "UserError" in ast.get_docstring(function), name
