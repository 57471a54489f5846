"""Files, lists, datasets and names on the hub as rows with their origin."""

import csv
import functools
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets import Dataset, DatasetDict, Features
from datasets.exceptions import DatasetsError

from helpers.common import UserError
from helpers.data.messages import kind_of
from helpers.data.preferences import LeftOut
from helpers.data.report import load_report
from helpers.patches.dataset_key import dataset_key
from helpers.session import quiet_progress

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
LIBRARY_ERRORS = (OSError, EOFError, RuntimeError, ValueError, zlib.error, pa.ArrowException, DatasetsError)


@dataclass
class Source:
    """Where rows come from; `rows()` may be called more than once and yields (origin, row)."""

    name: str
    rows: Callable[[], Iterator[tuple[str, Any]]]
    key: str | None = None  # names the content; None: the result is kept in memory
    features: Features | None = None  # known beforehand if the source is typed


def reason_of(error: Exception) -> str:
    """The first line of what a library raised, or of its cause."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0][:300]


def printable(name: str) -> str:
    """A file name that can be shown."""
    return "".join(character if character.isprintable() else "?" for character in name)


def _open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _json_error(name: str, line: int, error: Exception) -> UserError:
    place = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return UserError(f"{name}, line {line}{place}: not valid JSON ({what}). Mend that line, or take it out.")


def _json_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Rows of JSON lines or of one JSON list. Not by `load_dataset`: its reader forgets the line numbers, makes
    dates of texts that look like dates, and says of an invalid file only that generating it failed."""
    with _open_bytes(path) as file:
        lines = (line.decode("utf-8", "replace").lstrip("\ufeff") for line in file)
        first = True
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line:
                continue
            whole = first and (line[0] == "[" or line == "{")
            try:
                row = None if whole else json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _json_error(name, number, error) from None
            # {"data": [...]} on one line is one document too.
            if whole or (first and isinstance(row, dict) and [type(value) for value in row.values()] == [list]):
                yield from _json_document(path, name)
                return
            first = False
            yield f"{name}:{number}", row


def _json_document(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    with _open_bytes(path) as file:
        text = file.read().decode("utf-8", "replace").lstrip("\ufeff")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _json_error(name, getattr(error, "lineno", 1), error) from None
    if isinstance(rows, dict):  # {"data": [...]}
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    for number, row in enumerate(rows, 1):
        yield f"{name} row {number}", row


def _csv_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV file, all as text. Not by `load_dataset`: its reader makes nothing of the answers "NA" and "None",
    and the number 1.5 of "1.50"."""
    csv.field_size_limit(sys.maxsize)
    with _open_bytes(path) as file, io.TextIOWrapper(file, "utf-8-sig", "replace", newline="") as lines:
        head = lines.readline()
        delimiter = max(",;\t|", key=lambda mark: len(next(csv.reader([head], delimiter=mark), [])))
        lines.seek(0)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise UserError(f"{name}: two columns of the first line have the same name.")
            start = reader.line_num + 1
            for fields in reader:
                if len(fields) == len(names):
                    yield f"{name}:{start}", dict(zip(names, fields, strict=True))
                elif fields:
                    yield f"{name}:{start}", LeftOut("more or fewer fields than the first line has")
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{name}, line {reader.line_num}: not valid CSV ({error}). A field that holds a quote, a line break or "
                f"{delimiter!r} must stand in double quotes, and a quote in it must be doubled."
            ) from None


def _dataset_rows(table: Dataset, name: str) -> Iterator[tuple[str, Any]]:
    # A table that load_pairs made knows where its rows come from.
    ours = load_report(table) is not None and "origin" in table.column_names
    for number, row in enumerate(table, 1):
        yield row.pop("origin") if ours else f"{name} row {number}", row


def _from_dataset(table: Dataset, name: str) -> Source:
    table = table.with_format(None)
    return Source(name, functools.partial(_dataset_rows, table, name), dataset_key(table), table.features)


def _from_file(path: Path) -> Source:
    name = printable(path.name)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (*SUFFIXES, ".gz"))[:5]
        raise UserError(f"{name} is a folder. Name one file in it{': ' + ', '.join(files) if files else ''}.")
    if path.stat().st_size == 0:
        raise UserError(f"{name} is empty.")
    with path.open("rb") as file:
        head = file.read(4)
    if suffix in PICKLES or re.match(rb"\x80[\x02-\x05]", head):
        raise UserError(f"{name} is a pickle, which can run code when it is read; it was not opened. Save it as JSONL.")
    if suffix not in SUFFIXES:
        raise UserError(f"{name}: a file ends in {', '.join(SUFFIXES)} (or .gz after it), this one in {suffix!r}.")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{name} is written in UTF-16. Save it as UTF-8.")
    if suffix == ".parquet":
        with quiet_progress(0):
            return _from_dataset(Dataset.from_parquet(str(path)), name)
    content = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    read = _csv_rows if suffix in (".csv", ".tsv") else _json_rows
    return Source(name, functools.partial(read, path, name), content.hexdigest())


def open_source(source: Any, split: str) -> Source:
    """Where the rows of `source` come from.

    Args:
        source, split: as in `load_pairs`.

    Raises:
        UserError: it is not there, or nothing that pairs can be read from.
    """
    if isinstance(source, DatasetDict):
        if split not in source:
            raise UserError(f"There is no split {split!r}. Pass split= one of {', '.join(source)}.")
        source = source[split]
    if isinstance(source, Dataset):
        return _from_dataset(source, "dataset")
    if isinstance(source, list | tuple):
        return Source("list", lambda: ((f"row {number}", row) for number, row in enumerate(source, 1)))
    if not isinstance(source, str | Path):
        raise UserError(
            f"Pairs can't be read from {kind_of(source)}. Pass a file, a list of dicts, a Dataset or a name on the hub."
        )
    path = Path(source).expanduser()
    if path.exists():
        return _from_file(path)
    known = path.name.removesuffix(".gz").endswith((*SUFFIXES, *PICKLES, ".py"))
    if known or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise UserError(f"There is no file {printable(str(source))}. Seen from the folder {Path.cwd().name}.")
    try:  # datasets 4 runs no code of a dataset: it refuses one that asks for it
        table = datasets.load_dataset(str(source), split=split)
    except LIBRARY_ERRORS as error:
        raise UserError(
            f"There is no file {source!r} here, and the hub does not give a set of that name ({reason_of(error)})."
        ) from None
    return _from_dataset(table, f"{source} {split}")
