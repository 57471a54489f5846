"""Rows of JSON and CSV files, every value as it is written, with the line that each row starts on."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers.common import UserError
from helpers.data import tables
from helpers.data.layouts import HALF_EMOJI, QUESTIONS, USUAL, asked, find_layout, plain_value
from helpers.data.preferences import LeftOut

JSONL = re.compile(r"\.(?:jsonl|ndjson)\b", re.I)
SPLIT = re.compile(tables("sources.yaml")[0]["splits"], re.I)
BESIDE = (*USUAL["prompt"], *USUAL["system"])  # next to a list of rows, such a text may belong to each of them
NO_SPACE = re.compile(r"[^ \t\r\n\ufeff]")
DOUBLED = re.compile(r'(?:^|\t)"[^\t]*""[^\t]*"(?:\t|[\r\n]*$)')  # a mark between tabs that is doubled in its field


def split_of(name: str) -> str:
    """The split that a name says, of a file or of a part of one; "" if it says none."""
    return "".join(found.groups("")).lower() if (found := SPLIT.match(name)) else ""


def open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """The bytes of a file, unpacked if its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if pairs and pairs[0][0][:1] == "\ufeff":
        pairs[0] = (pairs[0][0].lstrip("\ufeff"), pairs[0][1])
    whole = dict(pairs)
    if len(whole) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice in the object {whole!r:.80}")
    return whole


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda name: plain_value(float(name)))


def _values(text: str, name: str, only: int = 0) -> Iterator[tuple[int, Any]]:
    """The line that each value of a JSON text starts on, and the value; `only`: the number of the one line it is."""
    line, start, end = only or 1, 0, 0
    while found := NO_SPACE.search(text, end):
        line, start = line + text.count("\n", start, found.start()), found.start()
        try:
            if end and only:
                raise json.JSONDecodeError("Extra data", text, start)
            value, end = DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            place, hints = f"{name}, line {only or error.lineno}, column {error.colno}", QUESTIONS["JSON"]
            advice = hints.get(text[error.pos : error.pos + 1], hints["line"])
            raise asked("invalid JSON", place=place, error=error.msg, advice=advice) from None
        except (ValueError, RecursionError) as error:
            place = f"{name}, line {line}" if text[start] == "{" else name
            raise asked("invalid JSON", place=place, error=error, advice="Mend it, or take it out.") from None
        yield line, plain_value(value) if HALF_EMOJI.search(text, start, end) else value


def json_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Rows of JSON lines, of objects of several lines each, or of one JSON value. Not by `load_dataset`, which forgets
    the line numbers, makes dates of texts that look like dates, and does not say what is invalid."""
    with open_bytes(path) as file:
        texts = (line.decode("utf-8", "replace").strip(" \t\r\n\ufeff") for line in file)
        lines = ((number, line) for number, line in enumerate(texts, 1) if line)
        head = list(itertools.islice(lines, 2))
        if len(head) > 1 and _is_json(head[0][1]):
            for number, text in itertools.chain(head, lines):
                yield from ((f"{name}:{line}", value) for line, value in _values(text, name, number))
            return
        file.seek(0)
        values = [(f"{name}:{line}", value) for line, value in _values(file.read().decode("utf-8", "replace"), name)]
    rows = rows_in(values[0][1], name) if len(values) == 1 else None
    yield from values if rows is None else ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _makes_pair(names: Iterable[str]) -> bool:
    try:
        return find_layout(tuple(names), {}, ()) is not None
    except UserError:  # a question about a pair
        return True


def rows_in(whole: Any, name: str) -> list | None:
    """The rows that one value holds: a list, a dictionary of columns, of rows, or of one list; None if it is a row."""
    if isinstance(whole, list | tuple):
        return list(whole)
    if not isinstance(whole, dict) or (JSONL.search(name) and _makes_pair(whole)):  # a line is a row
        return None
    values = list(whole.values())
    firsts = [value[0] if isinstance(value, list) and value else value for value in values]
    keys = [first.keys() for first in firsts if isinstance(first, dict)]
    if any({"role", "content"} <= one or {"from", "value"} <= one for one in keys):  # of messages
        return None
    lists = {key: value for key, value in whole.items() if isinstance(value, list)}
    tables = {key: value for key, value in lists.items() if value and all(isinstance(item, dict) for item in value)}
    found = tables if tables else lists if len(values) == 1 else {}
    if len(found) == 1 and not any(value for key, value in lists.items() if key not in found):
        return _wrapped(whole, name, *found)
    if len(values) == 1 and isinstance(values[0], dict):  # {"data": {...}}
        rows = rows_in(values[0], name)
        return values if rows is None else rows
    if len(lists) == len(values):
        sizes = ", ".join(f"{key!r} ({len(value)})" for key, value in lists.items())
        if values and (len(tables) == len(lists) or len(set(map(len, values))) > 1):
            raise asked("several lists" if len(tables) == len(lists) else "unequal columns", name=name, sizes=sizes)
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return _by_key(whole, name) if all(isinstance(value, dict) for value in values) else None


def _wrapped(whole: dict[str, Any], name: str, key: str) -> list | None:
    """The list under `key`, as in {"version": 1, "data": [...]}; None if `whole` is a row that has a list."""
    if _makes_pair(whole) or (len(whole) > 1 and JSONL.search(name) and not _makes_pair(whole[key][0])):
        return None
    if beside := [one for one in whole if one != key and one.lower() in BESIDE and whole[one]]:
        raise asked("beside rows", name=name, key=beside[0])
    return whole[key]


def _by_key(whole: dict[str, dict], name: str) -> list | None:
    """The rows of an object of objects: by their ids, or by pandas column -> row number -> value."""
    numbers = {tuple(map(str, value)) for value in whole.values()}
    if len(numbers) == 1 and all(map(str.isdigit, *numbers)):
        return rows_in({key: list(value.values()) for key, value in whole.items()}, name)
    if len(set(map(split_of, whole))) > 1:
        raise asked("splits in one", name=name, held=", ".join(map(repr, whole)))
    asks = any(name.lower() in USUAL["prompt"] for row in whole.values() for name in row)
    if texts := [key for key in whole if not asks and re.search(r"\s|[?\uff1f]", key)]:
        raise asked("keys are texts", name=name, key=texts[0])
    return list(whole.values())


def _open_text(path: Path, skip: int) -> Iterator[str]:
    with open_bytes(path) as file, io.TextIOWrapper(file, "utf-8-sig", "replace", newline="") as lines:
        yield from itertools.islice(lines, skip, None)


def _fields(path: Path, name: str, skip: int, form: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The fields of each row, the names among them, with the line that it starts on."""
    reader, start = csv.reader(_open_text(path, skip), **form), skip + 1
    try:
        for fields in reader:
            if fields:
                yield f"{name}:{start}", fields
            start = skip + reader.line_num + 1
    except csv.Error as error:
        line = skip + reader.line_num
        raise asked("invalid CSV", name=name, line=line, error=error, mark=form["delimiter"]) from None


def _count(rows: Iterator[tuple[str, list[str]]]) -> tuple[int, int, int]:
    """How many rows are as long as the first, how many are not, and how many fields begin with a space and a mark."""
    first, *others = [(len(fields), sum(field[:2] == ' "' for field in fields)) for _, fields in rows] or [(0, 0)]
    whole = sum(size == first[0] for size, _ in others)
    return whole, len(others) - whole, first[1] + sum(marks for _, marks in others)


def _swallowed(path: Path, name: str, skip: int, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether rows that are whole in one reading begin within rows of the other."""
    starts, rows = {line for line, _ in _fields(path, name, skip, other)}, _fields(path, name, skip, one)
    size = len(next(rows, ("", []))[1])
    return any(len(fields) == size and line not in starts for line, fields in rows)


def _delimiter(path: Path, skip: int) -> str:
    """What stands between fields: of those that make a row as long as the first, the one that makes most names."""
    lines = list(itertools.islice(_open_text(path, skip), 50)) or [","]
    sizes = {mark: [len(row) for row in csv.reader(lines, delimiter=mark)] for mark in ",;\t|"}
    return max(sizes, key=lambda mark: (sizes[mark][0] > 1 and sizes[mark][0] in sizes[mark][1:], sizes[mark][0]))


def csv_form(path: Path, name: str, tsv: bool) -> tuple[int, dict[str, Any]]:
    """How many lines stand before the names, and the arguments of `csv.reader`. Text between tabs has no quotes by its
    standard, but pandas and Excel write them. So that no row swallows others, the reading with more whole rows counts.
    If both have as many, marks around a field are quotes only if they are around the names too, if those inside are
    doubled, or if the file is called .csv. Spaces before fields are dropped if marks after them are quotes then, as
    many rows are whole, and none of them is swallowed."""
    csv.field_size_limit(sys.maxsize)
    skip, head = next(((number, line) for number, line in enumerate(_open_text(path, 0)) if line.strip()), (0, ""))
    if named := re.fullmatch(r'"?sep=(.)"?\s*', head):  # Excel's first line
        skip, head = skip + 1, next(_open_text(path, skip + 1), "")
    mark = named[1] if named else "\t" if tsv and "\t" in head else _delimiter(path, skip)
    names = next(csv.reader([head], delimiter=mark), [])
    spaced = mark == "," and len(names) > 1 and all(name.startswith(" ") for name in names[1:])
    quotes: dict[str, Any] = {"delimiter": mark, "strict": True, "skipinitialspace": spaced}
    text: dict[str, Any] = {"delimiter": mark, "quoting": csv.QUOTE_NONE}
    usual = mark != "\t" or head.startswith('"')
    whole, other, _ = _count(_fields(path, name, skip, text))
    try:
        quoted, quoted_other, marks = _count(_fields(path, name, skip, quotes))
    except UserError:
        if usual:
            raise
        quoted, quoted_other, marks = -1, 0, 0
    if marks and mark != "\t":
        with contextlib.suppress(UserError):
            spaces = quotes | {"skipinitialspace": True}
            found = _count(_fields(path, name, skip, spaces))
            if found[0] >= quoted and found[2] < marks and not _swallowed(path, name, skip, quotes, spaces):
                print(QUESTIONS["spaces"].format(name=name))
                quoted, quoted_other, quotes["skipinitialspace"] = found[0], found[1], True
    if whole > quoted >= 0 and (not other if usual else other and not quoted_other):
        raise asked("two ways", name=name, quoted=quoted, whole=whole)
    doubled = quoted == whole and (not tsv or any(map(DOUBLED.search, _open_text(path, skip))))
    form, whole, other = (quotes, quoted, quoted_other) if usual or quoted > whole or doubled else (text, whole, other)
    if other and not whole:
        _, first = itertools.islice(_fields(path, name, skip, form), 2)
        what = "ends" if len(first[1]) == len(names) + 1 and not first[1][-1] else "no names"
        raise asked(what, name=name, line=skip + 1, held=", ".join(map(repr, names)), mark=mark)
    return skip, form


def csv_rows(path: Path, name: str, skip: int, form: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV file, all as text. Not by `load_dataset`: its reader makes nothing of the answers "NA" and "None",
    and the number 1.5 of "1.50"."""
    rows = _fields(path, name, skip, form)
    # A column without a name, like pandas' row numbers, is called by its place: it can be kept, but not read.
    names = [name.replace("\ufeff", "").strip() for name in next(rows, ("", []))[1]]
    names = [name or f"column {place}" for place, name in enumerate(names, 1)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{name}: two columns of the first line have the same name, {twice[0]!r}. Rename one.")
    for origin, fields in rows:
        if r"\N" in fields:  # databases write it for nothing
            fields = [None if field == r"\N" else field for field in fields]
        row = dict(zip(names, fields, strict=False))
        yield origin, row if len(fields) == len(names) else LeftOut("more or fewer fields than the first line has")
