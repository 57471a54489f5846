"""Rows of JSON and CSV files, every value as it is written, with the line that each row starts on."""

import csv
import gzip
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.common import UserError
from helpers.data.messages import valid_text
from helpers.data.preferences import LeftOut

NO_SPACE = re.compile(r"[^ \t\r\n\ufeff]")
HALF_EMOJI = re.compile(r"\\u[dD][89a-fA-F]")  # or a whole one


def plain_value(value: Any) -> Any:
    """The same value as a table can hold it: arrays as lists, NaN as None, half an emoji as U+FFFD."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, dict):
        return {str(plain_value(key)): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain_value(value.tolist())
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """The bytes of a file, unpacked if its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice in the object {whole!r:.80}")
    return whole


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda name: plain_value(float(name)))


def _json_error(place: str, error: Exception) -> UserError:
    what, advice = str(error), "Mend that line, or take it out."
    if isinstance(error, json.JSONDecodeError):
        place, what = f"{place}, column {error.colno}", error.msg
        hints = {
            ",": "Take out that comma: objects that stand one a line have none between them.",
            "{": "A second object begins there. Put it on a line of its own.",
            "]": "If a comma stands before it, take that out.",
            "}": "If a comma stands before it, take that out.",
            "'": "JSON has double quotes. Write the rows with json.dumps.",
        }
        advice = hints.get(error.doc[error.pos : error.pos + 1], advice)
    return UserError(f"{place}: not valid JSON ({what}). {advice}")


def json_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Rows of JSON lines or of one JSON value. Not by `load_dataset`: its reader forgets the line numbers, makes
    dates of texts that look like dates, and says of an invalid file only that generating it failed."""
    with open_bytes(path) as file:
        texts = (line.decode("utf-8", "replace").strip(" \t\r\n\ufeff") for line in file)
        lines = ((number, line) for number, line in enumerate(texts, 1) if line)
        head = list(itertools.islice(lines, 2))
        for number, line in itertools.chain(head, lines) if len(head) > 1 else ():
            try:
                row = DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                if number == head[0][0] and isinstance(error, json.JSONDecodeError):
                    break
                raise _json_error(f"{name}, line {number}", error) from None
            yield f"{name}:{number}", plain_value(row) if HALF_EMOJI.search(line) else row
        else:
            if len(head) > 1:
                return
    yield from _json_document(path, name)  # one line, or a value that goes on after its first


def _json_document(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Rows of one list or object, or of objects one after the other that take several lines each."""
    with open_bytes(path) as file:
        text = file.read().decode("utf-8", "replace")
    values, end = [], 0
    while beginning := NO_SPACE.search(text, end):
        start = beginning.start()
        try:
            value, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise _json_error(name + line, error) from None
        values.append((start, plain_value(value)))
    rows = rows_in(values[0][1], name) if len(values) == 1 else None
    if rows is not None:
        yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))
        return
    line, end = 1, 0
    for start, value in values:
        line, end = line + text.count("\n", end, start), start
        yield f"{name}:{line}", value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def rows_in(whole: Any, name: str) -> list | None:
    """The rows that one value holds: a list, a dictionary of columns, of rows, or of one list; None if it is a row."""
    if isinstance(whole, list | tuple):
        return list(whole)
    if not isinstance(whole, dict) or any(
        _is_message(v[0] if isinstance(v, list) and v else v) for v in whole.values()
    ):
        return None
    lists = {key: value for key, value in whole.items() if isinstance(value, list)}
    tables = [key for key, value in lists.items() if value and all(isinstance(item, dict) for item in value)]
    if len(lists) == 1 and (tables or len(whole) == 1):  # {"version": 1, "data": [...]}
        return next(iter(lists.values()))
    if len(whole) == 1 and isinstance(inner := next(iter(whole.values())), dict):  # {"data": {...}}
        rows = rows_in(inner, name)
        return [inner] if rows is None else rows
    if lists and len(lists) == len(whole):
        sizes = ", ".join(f"{key!r} ({len(value)})" for key, value in lists.items())
        if len(tables) == len(lists):
            raise UserError(f"{name} holds several lists of rows: {sizes}. Save the one to read as a file of its own.")
        if len(set(map(len, lists.values()))) > 1:
            raise UserError(f"{name}: the columns are of unequal length: {sizes}.")
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    if not whole or not all(isinstance(value, dict) for value in whole.values()):
        return None
    keys = {tuple(value) for value in whole.values()}
    if len(keys) == 1 and all(str(key).isdigit() for key in keys.pop()):  # by pandas: column -> row number -> value
        return rows_in({key: list(value.values()) for key, value in whole.items()}, name)
    return list(whole.values())


def _open_text(path: Path, skip: int) -> Iterator[str]:
    with open_bytes(path) as file, io.TextIOWrapper(file, "utf-8-sig", "replace", newline="") as lines:
        yield from itertools.islice(lines, skip, None)


def _row_counts(path: Path, skip: int, form: dict[str, Any], even: bool = False) -> tuple[int, int]:
    """How many rows are as long as the names, and how many are not (`even`: up to the first); (-1, 0): wrong quotes."""
    reader = csv.reader(_open_text(path, skip), **form)
    counts = [0, 0]
    try:
        width = len(next(reader, []))
        for fields in filter(None, reader):
            counts[len(fields) != width] += 1
            if even and counts[1]:
                break
    except csv.Error:
        return -1, 0
    return counts[0], counts[1]


def csv_form(path: Path, name: str, tsv: bool) -> tuple[int, dict[str, Any]]:
    """How many lines stand before the names, and the arguments of `csv.reader`.

    Text between tabs has no quotes by its standard, but pandas and Excel write them. So that no row swallows others,
    the reading with more whole rows counts. If both have as many, marks around a field are quotes only if they are
    around the names too, if those inside are doubled, or if the file is called .csv.
    """
    csv.field_size_limit(sys.maxsize)
    skip, head = next(((number, line) for number, line in enumerate(_open_text(path, 0)) if line.strip()), (0, ""))
    named = re.fullmatch(r'"?sep=(.)"?\s*', head)  # Excel's first line
    if named:
        skip, head = skip + 1, next(_open_text(path, skip + 1), "")
    names = {mark: next(csv.reader([head], delimiter=mark), []) for mark in ",;\t|"}
    mark = named[1] if named else "\t" if tsv and "\t" in head else max(names, key=lambda mark: len(names[mark]))
    spaced = mark == "," and len(names[mark]) > 1 and all(name.startswith(" ") for name in names[mark][1:])
    quotes = {"delimiter": mark, "strict": True, "skipinitialspace": spaced}
    text = {"delimiter": mark, "quoting": csv.QUOTE_NONE}
    usual = mark != "\t" or head.startswith('"')
    plain, plain_other = _row_counts(path, skip, text, even=usual)
    if usual and plain_other:
        return skip, quotes
    quoted, quoted_other = _row_counts(path, skip, quotes)
    if plain > quoted >= 0 and (usual or (plain_other and not quoted_other)):
        raise UserError(
            f"{name} can be read in two ways: as {quoted} rows with quotes around fields, or as {plain} rows, one a "
            "line, with quotes as text. Save it as JSONL, which has only one reading."
        )
    if usual or quoted > plain or (quoted == plain and (not tsv or _has_doubled(_open_text(path, skip)))):
        return skip, quotes
    return skip, text


def _has_doubled(lines: Iterator[str]) -> bool:
    fields = (field for line in lines for field in line.rstrip("\r\n").split("\t"))
    return any('""' in field[1:-1] for field in fields if field[:1] == field[-1:] == '"')


def csv_rows(path: Path, name: str, skip: int, form: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV file, all as text. Not by `load_dataset`: its reader makes nothing of the answers "NA" and "None",
    and the number 1.5 of "1.50"."""
    reader = csv.reader(_open_text(path, skip), **form)
    try:
        # A column without a name, like pandas' row numbers, is called by its place: it can be kept, but not read.
        names = [name.strip() or f"column {place}" for place, name in enumerate(next(reader, []), 1)]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(f"{name}: two columns of the first line have the same name, {twice[0]!r}. Rename one.")
        start, whole, other = skip + reader.line_num + 1, False, False
        for fields in reader:
            if len(fields) == len(names):
                whole = True
                yield f"{name}:{start}", dict(zip(names, fields, strict=True))
            elif fields:
                other = True
                yield f"{name}:{start}", LeftOut("more or fewer fields than the first line has")
            start = skip + reader.line_num + 1
        if other and not whole:
            raise UserError(
                f"{name}: no row has as many fields as line {skip + 1}, which should hold the names of the columns and "
                f"holds {', '.join(map(repr, names)):.200}."
            )
    except csv.Error as error:
        raise UserError(
            f"{name}, line {skip + reader.line_num}: not valid CSV ({error}). A field that holds a quote, a line break "
            f"or {form['delimiter']!r} must stand in double quotes, and a quote in it must be doubled."
        ) from None
