"""Files, folders, lists, tables and names on the hub as rows with their origin."""

import functools
import glob
import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetsError

from helpers.common import UserError
from helpers.data.messages import kind_of
from helpers.data.report import load_report
from helpers.data.textfiles import csv_form, csv_rows, json_rows, open_bytes, plain_value, rows_in
from helpers.patches.dataset_key import dataset_key
from helpers.session import quiet_progress

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}  # suffix -> its reader in `datasets`
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *TABLES)
LIBRARY_ERRORS = (OSError, EOFError, RuntimeError, ValueError, zlib.error, pa.ArrowException, DatasetsError)
PICKLE = "is a pickle, which can run code when it is read; it was not opened. Save it as JSONL."
PACKED = "is packed. Unpack it and pass the file that was in it; only gzip (.gz) is read as it is."
# What to do about a file that is not read, by what its name ends in.
INSTEAD = {
    ".pkl .pickle .pt .pth .bin .joblib": PICKLE,
    ".zst .zip .bz2 .xz .lz4 .7z .rar .tar .tgz": PACKED,
    ".xlsx .xls .xlsm .ods": "is a spreadsheet. Save the sheet as CSV (UTF-8), or pass pandas.read_excel(...).",
    ".png .jpg .jpeg .gif .webp .bmp": "is a picture. A pair is text: a question and two answers to it.",
    ".db .sqlite .sqlite3": "is a database. Save the table as CSV, or pass pandas.read_sql(...).",
}
# The same by its first bytes, whatever its name.
MAGIC = {
    rb"\x80[\x02-\x05]": PICKLE,
    rb"PK\x03\x04": "is a spreadsheet or an archive. Save the sheet as CSV (UTF-8), or unpack the archive.",
    rb"\x28\xb5\x2f\xfd|BZh[1-9]|\xfd7zXZ": PACKED,
    rb"\x1f\x8b": "is gzipped, so its name must end in .gz.",
    rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]": "is written in UTF-16. Save it as UTF-8.",
    rb"\s*<(?i:!doctype|html|table|\?xml)": "is a web page. Download the file itself.",
    rb"version https://git-lfs": "is a pointer to the file. Run git lfs pull, or download the file itself.",
}
SPLIT = re.compile(r"(.+)-\d+-of-\d+\b|(?:.*[^a-z])?(train|test|valid|validation|val|dev|eval)(?![a-z])", re.IGNORECASE)


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


def _dataset_rows(table: Dataset, name: str) -> Iterator[tuple[str, Any]]:
    # A table that load_pairs made knows where its rows come from.
    ours = load_report(table) is not None and "origin" in table.column_names
    for number, row in enumerate(table, 1):
        yield row.pop("origin") if ours else f"{name} row {number}", row


def _from_dataset(table: Dataset | DatasetDict, name: str, split: str) -> Source:
    if isinstance(table, DatasetDict):
        if split not in table:
            raise UserError(f"There is no split {split!r}. Pass split= one of {', '.join(table)}.")
        table = table[split]
    table = table.with_format(None)
    return Source(name, functools.partial(_dataset_rows, table, name), dataset_key(table), table.features)


def _from_frame(frame: Any) -> Source:
    """Rows of a table of pandas, polars or pyarrow, by the protocol that all of them have."""
    try:
        table = pa.table(frame)
        plain = [  # `datasets` knows no categories of short texts, which polars has
            pa.array(column.to_pylist()) if pa.types.is_dictionary(column.type) else column for column in table.columns
        ]
        return _from_dataset(Dataset(pa.table(plain, names=table.column_names)), "table", "")
    except (*LIBRARY_ERRORS, KeyError) as error:
        raise UserError(
            f"The {type(frame).__name__} can't be read ({reason_of(error)}). Every column needs a name of its own and "
            "values of one kind; or pass its rows, in pandas frame.to_dict('records')."
        ) from None


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _from_files(files: list[Path], name: str) -> Source:
    """Rows of files of one kind, one file after the other."""
    splits = [match[1] or match[2] for file in files if (match := SPLIT.match(file.name))]
    for what, groups in (("kinds of file", Counter(map(_suffix, files))), ("splits", Counter(splits))):
        if len(groups) > 1:
            listed = ", ".join(f"{group} ({count})" for group, count in sorted(groups.items()))
            raise UserError(
                f"{name} holds several {what}: {listed}. Pass one file, or a pattern for those that belong together, "
                "like 'folder/train*.jsonl'."
            )
    top = os.path.commonpath([file.parent for file in files])
    sources = [_from_file(file, printable(str(file.relative_to(top)))) for file in files]
    keys = [source.key for source in sources]
    return Source(
        name,
        lambda: itertools.chain.from_iterable(source.rows() for source in sources),
        None if None in keys else xxhash.xxh3_128(repr(keys).encode()).hexdigest(),
        sources[0].features if all(source.features == sources[0].features for source in sources) else None,
    )


def _from_folder(path: Path, name: str, split: str) -> Source:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():  # by save_to_disk
        return _from_dataset(datasets.load_from_disk(path), name, split)
    known = (*SUFFIXES, *" ".join(INSTEAD).split())
    inside = sorted(file for file in path.iterdir() if not file.name.startswith((".", "_")))
    files = [file for file in inside if file.is_file() and _suffix(file) in known]
    if not files:
        held = printable(", ".join(file.name for file in inside[:5]) or "nothing")
        raise UserError(f"{name} is a folder without a file in {', '.join(SUFFIXES)}. It holds {held}.")
    return _from_files(files, name)


def _from_file(path: Path, name: str) -> Source:
    suffix = _suffix(path)
    if path.stat().st_size == 0:
        raise UserError(f"{name} is empty.")
    instead = [advice for suffixes, advice in INSTEAD.items() if suffix in suffixes.split()]
    if suffix in SUFFIXES:
        with open_bytes(path) as file:
            head = file.read(64)
        instead = [advice for magic, advice in MAGIC.items() if re.match(magic, head)]
    if instead:
        raise UserError(f"{name} {instead[0]}")
    if suffix not in SUFFIXES:
        raise UserError(
            f"{name}: a file ends in {', '.join(SUFFIXES)} (or .gz after it), this one in {suffix!r}. Save its rows as "
            "JSONL, one JSON object a line."
        )
    if suffix in TABLES:
        with quiet_progress(0):
            table = datasets.load_dataset(TABLES[suffix], data_files=glob.escape(str(path)), split="train")
        return _from_dataset(table, name, "")
    content = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    rows = functools.partial(json_rows, path, name)
    if suffix in (".csv", ".tsv"):
        rows = functools.partial(csv_rows, path, name, *csv_form(path, name, suffix == ".tsv"))
    return Source(name, rows, content.hexdigest())


def open_source(source: Any, split: str) -> Source:
    """Where the rows of `source` come from.

    Args:
        source, split: as in `load_pairs`.

    Raises:
        UserError: it is not there, or nothing that pairs can be read from.
    """
    if isinstance(source, Dataset | DatasetDict):
        return _from_dataset(source, "dataset", split)
    if isinstance(source, IterableDataset | IterableDatasetDict):
        raise UserError("A streamed dataset has no end that is known. Pass list(dataset.take(1000)).")
    if hasattr(source, "__arrow_c_stream__"):
        return _from_frame(source)
    if isinstance(source, dict | list | tuple | Iterator):
        rows = list(source) if isinstance(source, Iterator) else rows_in(plain_value(source), "The dictionary")
        rows = [source] if rows is None else rows
        return Source("list", lambda: ((f"row {number}", plain_value(row)) for number, row in enumerate(rows, 1)))
    if not isinstance(source, str | Path):
        raise UserError(
            f"Pairs can't be read from {kind_of(source)}. Pass a file, a list of dicts, a Dataset or a name on the hub."
        )
    path = Path(source).expanduser()
    name = printable(path.name)
    if path.is_dir():
        return _from_folder(path, name, split)
    if path.exists():
        return _from_file(path, name)
    files = sorted(filter(Path.is_file, map(Path, glob.glob(str(path), recursive=True))))  # noqa: PTH207  (may be absolute)
    if files:
        return _from_files(files, name)
    known = (*SUFFIXES, *" ".join(INSTEAD).split(), ".py")
    if _suffix(path) in known or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise UserError(f"There is no file {printable(str(source))}. Seen from the folder {Path.cwd().name}.")
    try:  # datasets 4 runs no code of a dataset: it refuses one that asks for it
        table = datasets.load_dataset(str(source), split=split)
    except LIBRARY_ERRORS as error:
        said = " ".join(str(error.__cause__ or error).split())[:500]
        raise UserError(
            f"There is no file {source!r} here, and the hub does not give a set of that name ({said}). One of several "
            f"configurations is read by load_pairs(datasets.load_dataset({source!r}, NAME, split={split!r}))."
        ) from None
    return _from_dataset(table, f"{source} {split}", split)
