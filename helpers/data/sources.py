"""Files, folders, lists, tables and names on the hub as rows with their origin."""

import functools
import glob
import hashlib
import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Json, Value
from datasets.exceptions import DatasetsError

from helpers.common import UserError
from helpers.data import tables
from helpers.data.layouts import asked, plain_value, shortened
from helpers.data.messages import kind_of
from helpers.data.preferences import LeftOut
from helpers.data.report import load_report
from helpers.data.textfiles import csv_form, csv_rows, json_rows, open_bytes, rows_in, split_of
from helpers.patches.dataset_key import dataset_key
from helpers.session import quiet_progress

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}  # suffix -> its reader in `datasets`
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *TABLES)
PYTHON_ERRORS = (OSError, EOFError, ImportError, RuntimeError, OverflowError, ValueError)
LIBRARY_ERRORS = (*PYTHON_ERRORS, zlib.error, pa.ArrowException, DatasetsError)
SAID_OF, NO_FILES = tables("sources.yaml")
(REFUSED,) = tables("refused.yaml")
KNOWN = (*SUFFIXES, *" ".join(one["suffixes"] for one in REFUSED if "suffixes" in one).split())


@dataclass
class Source:
    """Where rows come from; `rows()` may be called more than once and yields (origin, row)."""

    name: str
    rows: Callable[[], Iterator[tuple[str, Any]]]
    key: str | None = None  # names the content; None: the result is kept in memory
    features: dict[str, Any] | None = None  # known beforehand if the source is typed


def reason_of(error: Exception) -> str:
    """The first line of what a library raised, or of its cause, and what to do about it if that is known."""
    cause = error.__cause__ or error
    reason = f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0][:300]
    return ". ".join([reason, *(advice for part, advice in SAID_OF["hints"].items() if part in reason)])


def printable(name: str) -> str:
    """A file name that can be shown."""
    return "".join(character if character.isprintable() else "?" for character in name)


def _from_dataset(given: Dataset | DatasetDict, name: str, split: str) -> Source:
    if isinstance(given, DatasetDict):
        if split not in given:
            raise UserError(f"There is no split {split!r}. Pass split= one of {', '.join(given)}.")
        given = given[split]
    ours = load_report(given) is not None and "origin" in given.column_names  # made by load_pairs
    table = given.with_format(None).rename_columns({name: name.replace("\ufeff", "") for name in given.column_names})
    types, labels = dict(table.features), {}
    for column, kind in table.features.items():
        if isinstance(kind, ClassLabel):  # a number for each name
            labels[column], types[column] = [*kind.names, None], Value("string")
        elif hasattr(kind, "decode") and not isinstance(kind, Json):  # sounds and pictures stay bytes
            table = table.cast_column(column, type(kind)(decode=False))
            types[column] = {"bytes": Value("binary"), "path": Value("string")}
        elif kind == Value("uint64"):  # those of 64 bits become objects
            types[column] = None

    def rows() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(table, 1):
            for column, names in labels.items():  # -1 is none of them
                row[column] = names[-1 if row[column] is None else row[column]]
            yield row.pop("origin") if ours else f"{name} row {number}", row

    return Source(name, rows, dataset_key(given.with_format(None)), types)


def _from_frame(frame: Any) -> Source:
    """Rows of a table of pandas, polars or pyarrow, by the protocol that all of them have."""
    try:
        table = pa.table(frame)
        plain = [  # `datasets` knows no categories of short texts, which polars has
            pa.array(column.to_pylist()) if pa.types.is_dictionary(column.type) else column for column in table.columns
        ]
        return _from_dataset(Dataset(pa.table(plain, names=table.column_names)), "table", "")
    except (*LIBRARY_ERRORS, KeyError) as error:
        raise asked("frame", kind=type(frame).__name__, reason=reason_of(error)) from None


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _from_files(files: list[Path], name: str) -> Source:
    """Rows of files of one kind, one file after the other."""
    top = os.path.commonpath([file.parent for file in files])
    splits = Counter(split_of(str(file.relative_to(top))) for file in files)
    if not re.search("test|val|dev|hold|held", " ".join(splits)):
        del splits[""]  # files that are not named by a split are to train on
    for what, groups in (("kinds of file", Counter(map(_suffix, files))), ("splits", splits)):
        if len(groups) > 1:
            held = ", ".join(f"{group or 'no name of a split'} ({count})" for group, count in sorted(groups.items()))
            raise asked("several files", name=name, what=what, held=held)
    sources = [_from_file(file, printable(str(file.relative_to(top)))) for file in files]
    keys = [source.key and (source.name, source.key) for source in sources]
    return Source(
        name,
        lambda: itertools.chain.from_iterable(source.rows() for source in sources),
        None if None in keys else xxhash.xxh3_128(repr(keys).encode()).hexdigest(),
        sources[0].features if all(source.features == sources[0].features for source in sources) else None,
    )


def _from_folder(path: Path, name: str, split: str) -> Source:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():  # by save_to_disk
        return _from_dataset(datasets.load_from_disk(path), name, split)
    inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    files = [file for file in inside if not file.is_dir() and file.name[0] != "_" and _suffix(file) in KNOWN]
    if not files:
        held = printable(", ".join(file.name for file in inside[:5]) or "nothing")
        raise UserError(f"{name} is a folder without a file in {', '.join(SUFFIXES)}. It holds {held}.")
    if others := [file.name + "/" * file.is_dir() for file in inside if file not in files]:
        print(f"{name}: not read: {printable(shortened(others))}")
    return _from_files(files, name)


def _from_file(path: Path, name: str) -> Source:
    suffix = _suffix(path)
    if not path.exists():
        raise asked("broken link", name=name)
    if path.stat().st_size == 0:
        raise UserError(f"{name} is empty.")
    instead = [one["advice"] for one in REFUSED if suffix in one.get("suffixes", "").split()]
    if suffix in SUFFIXES:
        with open_bytes(path) as file:
            head = file.read(4096)
        said = [one for one in REFUSED if "bytes" in one and suffix in one.get("of", suffix).split()]
        instead = [one["advice"] for one in said if re.match(one["bytes"].encode(), head)]
    if instead:
        raise UserError(f"{name} {instead[0]}")
    if suffix not in SUFFIXES:
        raise asked("suffix", name=name, suffixes=", ".join(SUFFIXES), suffix=suffix)
    if suffix in TABLES:
        with quiet_progress(0):
            table = datasets.load_dataset(TABLES[suffix], data_files=glob.escape(str(path)), split="train")
        return _from_dataset(table, name, "")
    with path.open("rb") as file:
        content = hashlib.file_digest(file, xxhash.xxh3_128)
    form = csv_form(path, name, suffix == ".tsv") if suffix in (".csv", ".tsv") else ()
    rows = functools.partial(csv_rows if form else json_rows, path, name, *form)
    return Source(name, lambda: _with_objects(rows(), name), content.hexdigest())


def _with_objects(rows: Iterable[tuple[str, Any]], name: str) -> Iterator[tuple[str, Any]]:
    """The same rows; raises UserError after the last if none is an object."""
    kinds = {}
    for origin, row in rows:
        kinds.setdefault(type(row), row)
        yield origin, row
    if kinds and not kinds.keys() & {dict, LeftOut}:
        raise asked("no object", name=name, kind=kind_of(next(iter(kinds.values()))))


def open_source(source: Any, split: str) -> Source:
    """Where the rows of `source` come from; `source` and `split` are as in `load_pairs`. Raises UserError if it is not
    there, or nothing that pairs can be read from."""
    if isinstance(source, Dataset | DatasetDict):
        return _from_dataset(source, "dataset", split)
    if isinstance(source, IterableDataset | IterableDatasetDict):
        raise UserError("A streamed dataset has no end that is known. Pass list(dataset.take(1000)).")
    if hasattr(source, "__arrow_c_stream__"):
        return _from_frame(source)
    frames = [key for key in source if hasattr(source[key], "__arrow_c_stream__")] if isinstance(source, dict) else []
    if frames:
        raise asked("frames", held=shortened(list(map(repr, frames))))
    if isinstance(source, dict | list | tuple | Iterator):
        whole = plain_value(list(source) if isinstance(source, Iterator) else source)
        rows = rows_in(whole, "The dictionary")
        named = [(f"row {number}", row) for number, row in enumerate([whole] if rows is None else rows, 1)]
        return Source("list", lambda: _with_objects(named, "list"))
    if not isinstance(source, str | Path):
        raise asked("source", kind=kind_of(source))
    for one in NO_FILES:
        if re.match(one["text"], str(source)):
            raise UserError(f"{printable(str(source)):.80} {one['advice']}")
    path = Path(source).expanduser()
    name = printable(path.name)
    if path.is_dir():
        return _from_folder(path, name, split)
    if path.exists():
        return _from_file(path, name)
    files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if not file.is_dir())  # noqa: PTH207  (may be absolute)
    if files:
        return _from_files(files, name)
    if _suffix(path) in (*KNOWN, ".py") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise UserError(f"There is no file {printable(str(source))}. Seen from the folder {Path.cwd().name}.")
    try:  # datasets 4 runs no code of a dataset: it refuses one that asks for it
        table = datasets.load_dataset(str(source), split=split)
    except LIBRARY_ERRORS as error:
        said = " ".join(str(error.__cause__ or error).split())[:500]
        raise asked("hub", source=source, said=said, split=split) from None
    return _from_dataset(table, f"{source} {split}", split)
