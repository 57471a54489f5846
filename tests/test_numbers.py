"""A number in prose comes from an output on its page or from a committed result; those that do not are found here.

Measured numbers have a point, are percentages, are so many of so many, or are nats, GB, seconds, pairs or tokens a
second. Other whole numbers are mostly settings, sizes and minutes, and are not looked at. A number of two digits agrees
with another one by chance easily, so this finds much of what was not updated, and not all of it.
"""

import functools
import json
import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean

import pytest
import yaml
from bs4 import BeautifulSoup

from helpers.run.metrics import wilson_interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *NOTEBOOKS]
EXCEPTIONS = yaml.safe_load(Path(__file__).with_name("numbers.yaml").read_text(encoding="utf-8"))

TABLE = re.compile(r"<!-- ([\w-]+): begin -->(.*?)<!-- \1: end -->", re.S)  # tools/tables.py writes and checks these
LINES = re.compile(r"^    .+$", re.M)  # of a program; tests/test_results.py compares them with the page
# Not read as prose: code, formulas, addresses, versions and the names of models.
NO_PROSE = re.compile(
    r"```.*?```|\$\$.*?\$\$|`[^`]*`|\$[^$\n]+\$|\]\([^)]*\)|https?://\S+"
    r"|\b(?:Python|torch|TRL|Unsloth|transformers|PEFT|CUDA|version|Qwen|Phi|Apache-|eq\.|section) ?v?\d[\d.]*",
    re.S,
)
MEASURED = re.compile(
    r"(?<![\w.,])(?P<percent>\d+(?:\.\d+)?)(?:%| percent)"
    r"|(?<![\w.,])(?P<point>\d+\.\d+)(?!\w|\.\d)"
    r"|(?<![\w.,])(?P<whole>\d+)(?= (?:pairs a second|tokens a second|nats|GB|seconds)\b)"
    r"|(?<![\w.,])(?P<part>\d+) (?:out )?of (?:the |all )?(?P<all>\d+)(?![\w.]*\d)"
)
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
LEFT = re.compile(r"[\d.]+ min left")
RAW = {"losses", "gaps", "runs", "last_loss", "versions", "machine"}  # of a result: nobody quotes these one by one
OPERATORS = {"-": operator.sub, "+": operator.add, "*": operator.mul, "/": operator.truediv}


def numbers(text: str) -> Iterator[float]:
    return (float(found.replace(",", "")) for found in NUMBER.findall(text))


def shown(cell: dict) -> set[float]:
    """All numbers in a code cell, and in what it prints and shows as text."""
    texts = ["".join(cell["source"])]
    for output in cell["outputs"]:
        data = output.get("data", {})
        texts += ["".join(output.get("text", "")), "".join(data.get("text/plain", ""))]
        texts.append(BeautifulSoup("".join(data.get("text/html", "")), "html.parser").get_text(" "))
    return set(numbers(LEFT.sub("", "\n".join(texts))))


def leaves(value: object, place: tuple = ()) -> Iterator[tuple[tuple, float]]:
    """The numbers of a result, with where they are; the places of a list's rows are alike but for beta, step, split."""
    if isinstance(value, dict):
        rows = [value[key] for key in ("beta", "step", "split") if isinstance(value.get(key), str | int | float)]
        for name in value.keys() - RAW:
            yield from leaves(value[name], (*place, *rows, name))
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one, place)
    elif isinstance(value, str):
        yield from ((place, number) for number in numbers(value))
    elif isinstance(value, int | float):
        yield place, abs(float(value))


@functools.cache
def result(name: str) -> frozenset[float]:
    """The numbers of a committed result, and the mean over its rows (seeds, hosts) of each; of curves only that."""
    found = defaultdict(list)
    for place, number in leaves(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))):
        found[place].append(number)
    own = (number for place, values in found.items() if "history" not in place for number in values)
    return frozenset(own) | {mean(values) for values in found.values()}


def named(text: str) -> set[float]:
    """The numbers of the results whose file or program a text names."""
    names = {*re.findall(r"benchmarks/(?:results/)?(\w+)\.(?:json|py)", text)}
    names |= {name.replace("-", "_") for name, _ in TABLE.findall(text)}
    return set().union(*(result(name) for name in names if (RESULTS / f"{name}.json").exists()))


def with_sources(path: Path) -> Iterator[tuple[str, set[float]]]:
    """The prose of a page, and the numbers that it may quote.

    A cell of a notebook may quote the eight code cells before it and the two after it, and results named in its
    section. Another page is taken whole: its tables, the results and the notebooks that it names.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        found = named(text).union(*(numbers(table) for _, table in TABLE.findall(text)))
        found |= {number for line in LINES.findall(text) for number in numbers(line)}
        cells = [cell for one in NOTEBOOKS if f"{one.name})" in text for cell in cells_of(one)]
        found = found.union(*(shown(cell) for cell in cells if cell["cell_type"] == "code"))
        yield LINES.sub("", TABLE.sub("", text)), found
        return
    cells, section = cells_of(path), ""
    code = [(place, shown(cell)) for place, cell in enumerate(cells) if cell["cell_type"] == "code"]
    for place, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            section = "" if re.search("^## ", source, re.M) else section
            section += source
            before = [found for other, found in code if other < place][-8:]
            after = [found for other, found in code if other > place][:2]
            yield source, named(section).union(*before, *after)


def cells_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def has(text: str, found: Iterable[float], scale: float = 1) -> bool:
    """Whether a number rounds to `text`, as it is written."""
    half = 0.5001 * 10 ** -len(text.partition(".")[2])
    return any(abs(scale * number - float(text)) <= half for number in found)


def faults(text: str, found: set[float]) -> Iterator[tuple[str, str]]:
    """The measured numbers in a text that are not among those found, with the words around them."""
    text = NO_PROSE.sub(lambda match: " " * len(match[0]), text)
    for match in MEASURED.finditer(text):
        percent, point, whole, part, every = match.group("percent", "point", "whole", "part", "all")
        if percent:
            right = has(percent, found) or has(percent, found, 100)
        elif point or whole:
            right = has(point or whole, found)
        else:
            share = int(part) / max(int(every), 1)
            right = {int(part), int(every)} <= found or any(abs(share - number) < 0.005 for number in found)
        if not right:
            yield match[0], " ".join(text[max(0, match.start() - 60) : match.end() + 30].split())


def computed(expression: str) -> float:
    left, sign, right = expression.split()
    return OPERATORS[sign](*(sum(map(float, side.split("+"))) for side in (left, right)))


def excepted(page: str) -> set[float]:
    listed = EXCEPTIONS.get(page, {})
    counts = (map(int, one.split(" of ")) for one in listed.get("wilson", ()))
    plain = {float(one) for kind in ("drawn", "recorded", "known") for one in listed.get(kind, ())}
    return plain.union(*(wilson_interval(*count) for count in counts), map(computed, listed.get("computed", ())))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_each_number_in_prose_has_a_source(path):
    given, missing = excepted(path.stem), set()
    for text, found in with_sources(path):
        wrong = [f"{number}: ... {around} ..." for number, around in faults(text, found | given)]
        assert not wrong, "neither near it on the page nor in a result named there:\n" + "\n".join(wrong)
        missing |= {number.removesuffix("%").removesuffix(" percent") for number, _ in faults(text, found)}
    # An exception that is no longer needed would hide the next mistake.
    listed = EXCEPTIONS.get(path.stem, {})
    needed = {one for one in missing if " " not in one}
    for one in (number for kind in ("drawn", "recorded", "known") for number in listed.get(kind, ())):
        assert float(one) in {float(text) for text in needed}, one
    for one in listed.get("computed", ()):
        assert any(has(text, [computed(one), 100 * computed(one)]) for text in needed), one


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("a gap of 13.13 nats", []),
        ("a gap of 13.31 nats", ["13.31"]),
        ("97% of them, 98 percent", ["98 percent"]),
        ("7 of 40, then 9 of 40", ["9 of 40"]),
        ("13 nats, 20 pairs a second, 24 steps", ["20"]),
        ("`0.77` in TRL 1.15.0 with $x = 0.5$, see [it](3.4)", []),
    ],
)
def test_a_number_without_a_source_is_found(text, wrong):
    assert [number for number, _ in faults(text, {13.129, 0.97, 0.175})] == wrong


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_with_a_model_says_that_another_machine_has_other_numbers(path):
    code, prose = (
        "\n".join("".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == kind)
        for kind in ("code", "markdown")
    )
    assert "load_model(" not in code or "> **On another machine.** " in prose
