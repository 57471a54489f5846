"""Preference pairs: read from any usual file, brought to one form, split without leaks.

The one form, which TRL's DPOTrainer takes as it is:

- `prompt`: list of {role, content}; a system turn may come first, a user turn is last
- `chosen`, `rejected`: lists of {role, content} that begin and end with an assistant turn
- `origin`: "pairs.jsonl:12" is a line of a file, "pairs.parquet row 12" a row; both count from 1
- the source's other columns (topic, flaw, chat_template_kwargs, ...) as they were
"""

import csv
import functools
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, DatasetDict, Features, Json, List, Value
from datasets.exceptions import DatasetsError

from helpers.errors import UserError
from helpers.session import PROJECT, setting

CODE = Path(__file__).read_text("utf-8")  # as it was imported; what another version has read is not taken
BUNDLED = Path(__file__).parent / "data" / "pairs.jsonl"
# Of the bundled pairs: one topic of programming, one of science, one of the body.
HELD_OUT_TOPICS = ["astronomy", "databases", "health"]

MESSAGES = List({"role": Value("string"), "content": Value("string")})

# Column names as public sets spell them; the first that is there is taken.
PROMPT = ("prompt", "question", "instruction", "query", "input", "context", "conversations", "conversation", "messages")
CHOSEN = ("chosen", "better_response", "preferred", "chosen_response", "preferred_response")
REJECTED = ("rejected", "worse_response", "dispreferred", "rejected_response", "dispreferred_response")
SYSTEM = ("system", "system_prompt")
PREFERENCE = "preference preferred winner choice better label labels vote better_response_id overall_preference".split()
ANSWER = re.compile(r"((?:response|answer|completion|output|reply|candidate|conversation)s?[_ ]?)(a|b|0|1|2)", re.I)
TIES = {"tie", "ties", "equal", "same", "both", "neither", "draw", "none"}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

# Columns that DPOTrainer reads by name. A source's own column of that name is kept as "source_...".
RESERVED = set(
    "prompt chosen rejected origin left_out messages completion image images "
    "prompt_ids chosen_ids rejected_ids ref_chosen_logps ref_rejected_logps".split()
)
# Arguments of `apply_chat_template` that are no variables of a template. A row that sets one would break rendering,
# or bring a template of its own.
NOT_TEMPLATE_VARIABLES = set(
    "conversation chat_template tools documents add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict tokenizer_kwargs return_assistant_tokens_mask".split()
)
NOT_READ_IN_MESSAGE = ("tool_calls", "tool_call_id", "reasoning_content", "thinking")
KINDS = {str: "a text", list: "a list", dict: "an object", bool: "a truth value", int: "a number", float: "a number"}

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System): ?")
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
LIBRARY_ERRORS = (OSError, EOFError, RuntimeError, ValueError, zlib.error, pa.ArrowException, DatasetsError)


class _LeftOut(Exception):
    """A row that is no pair; its text is the reason that the report names."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_pairs` read: rows = pairs + the rows it left out, those by reason."""

    rows: int
    pairs: int
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)  # reason -> {"count", "origins": the first five}

    def __str__(self) -> str:
        """One line, and one more for each reason."""
        lines = [f"{self.rows} rows read, {self.pairs} kept, {self.rows - self.pairs} left out"]
        for reason, rows in self.left_out.items():
            more = ", ..." if rows["count"] > len(rows["origins"]) else ""
            lines.append(f"  {rows['count']} left out: {reason} ({', '.join(rows['origins'])}{more})")
        return "\n".join(lines)


def load_report(pairs: Dataset) -> LoadReport | None:
    """What `load_pairs` said when these pairs were read; None for a dataset that it did not make.

    The report travels in `pairs.info.description`, so it is still there after a split or a selection.
    """
    try:
        return LoadReport(**json.loads(pairs.info.description))
    except (TypeError, ValueError):
        return None


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What `row` passes to the chat template: its chat_template_kwargs, without those that are None.

    Arrow fills the keys that other rows have with None, so None is taken as not set.
    """
    return {name: value for name, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}


@contextmanager
def quiet_progress(rows: int, enough: int = 20_000) -> Iterator[None]:
    """No progress bars of `datasets` where there are fewer than `enough` `rows`, too few to wait for."""
    hide = rows < enough and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


# Layouts: which columns hold what


@dataclass(frozen=True)
class _Layout:
    """The columns of one kind of source: chosen and rejected, or two answers and a preference."""

    prompt: str | None
    system: str | None
    chosen: str | None = None
    rejected: str | None = None
    a: str | None = None
    b: str | None = None
    preference: str | None = None

    def columns(self) -> set[str]:
        return {name for name in asdict(self).values() if name is not None}


def _find_layout(names: Iterable[str], columns: dict[str, str]) -> _Layout | None:
    """The layout that these column names make, or None; `columns` (ours -> the source's) goes before any guess."""
    by_lower = {name.lower(): name for name in names}

    def pick(ours: str, candidates: Iterable[str]) -> str | None:
        if ours in columns:
            return columns[ours] if columns[ours] in by_lower.values() else None
        return next((by_lower[name] for name in candidates if name in by_lower), None)

    prompt, system = pick("prompt", PROMPT), pick("system", SYSTEM)
    if not {"a", "b"} & set(columns):
        chosen, rejected = pick("chosen", CHOSEN), pick("rejected", REJECTED)
        if chosen and rejected:
            return _Layout(prompt, system, chosen=chosen, rejected=rejected)
    answers: dict[str, list[str]] = {}
    for name in by_lower:
        if found := ANSWER.fullmatch(name):
            answers.setdefault(found[1], []).append(name)
    first, second = next((sorted(pair) for pair in answers.values() if len(pair) == 2), (None, None))
    a, b, preference = pick("a", [first]), pick("b", [second]), pick("preference", PREFERENCE)
    return _Layout(prompt, system, a=a, b=b, preference=preference) if a and b and preference else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


class _Preference:
    """Reads a preference column; which numbers mean what follows from the numbers that the whole column holds."""

    def __init__(self, layout: _Layout, first_wins: Any):
        self.layout, self.first_wins = layout, first_wins
        self.low, self.high, self.fractions = np.inf, -np.inf, False
        tails = [ANSWER.fullmatch(name) for name in (layout.a, layout.b)]
        self.tails = tuple(tail[2].lower() if tail else letter for tail, letter in zip(tails, "ab", strict=True))

    def see(self, value: Any) -> None:
        number = _number(value)
        if number is not None:
            self.low, self.high = min(self.low, number), max(self.high, number)
            self.fractions |= number != int(number)

    def decide_scale(self, source: str) -> None:
        """Choose how numbers are read. Raises UserError where they could be read in two ways."""
        low, high, column = self.low, self.high, self.layout.preference
        if self.first_wins is not None or low > high:
            self.scale = "given"
        elif self.tails == ("0", "1") and 0 <= low and high <= 1 and not self.fractions:
            self.scale = "index"
        elif 1 <= low and high <= 2:
            self.scale = "one or two"
        elif low < 0:
            self.scale = "sign"
        elif high <= 1 and self.fractions:
            self.scale = "probability"
        else:
            raise UserError(
                f"{source}: the numbers in column {column!r} run from {low:g} to {high:g}, and do not say which "
                f"answer is better. Pass first_wins=..., the value that means that {self.layout.a!r} is the better "
                "one; every other value then means the other answer."
            )

    def second_wins(self, value: Any) -> bool:
        """True where the second answer is the better one. Raises _LeftOut for a tie or a value without a meaning."""
        if value is None or value == "":
            raise _LeftOut("no preference")
        text = str(value).strip().lower()
        if text in TIES or text.startswith("tie"):
            raise _LeftOut("tie")
        number = _number(value)
        if self.first_wins is not None:
            same = number == _number(self.first_wins) if number is not None else text == str(self.first_wins).lower()
            return not same
        if number is not None:
            # Distance above zero: the second answer is better.
            toward_second = {
                "index": number - 0.5,
                "one or two": number - 1.5,
                "sign": number,
                "probability": 0.5 - number,
            }[self.scale]
            if toward_second == 0:
                raise _LeftOut("tie")
            return toward_second > 0
        last = re.split(r"[_ ]", text)[-1]
        if text == self.layout.a.lower() or last in ("a", "first", self.tails[0]):
            return False
        if text == self.layout.b.lower() or last in ("b", "second", self.tails[1]):
            return True
        raise _LeftOut("the preference is not understood")


# One row


def _text(text: str) -> str:
    """The same text with halves of surrogate pairs, which no UTF-8 can hold, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _message(message: Any, column: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _LeftOut(f"{column} holds {_kind(message)} where a message should be")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    for key in NOT_READ_IN_MESSAGE:
        if message.get(key):
            raise _LeftOut(f"a message in {column} has {key}; only role and content are read")
    role = ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise _LeftOut(f"a message in {column} has no role among system, user, assistant")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise _LeftOut(f"a message in {column} holds {_kind(content)}, not text")
    return {"role": role, "content": _text(content)}


def _kind(value: Any) -> str:
    return "nothing" if value is None else KINDS.get(type(value), f"a {type(value).__name__}")


def _turns(text: str) -> list[dict[str, str]] | None:
    r"""The turns of a dialogue written as "\n\nHuman: ... \n\nAssistant: ..."; None for any other text."""
    start = TURN.match(text if text.startswith("\n\n") else text.lstrip("\n"))
    if not start or start[1] == "Assistant":
        return None
    parts = TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant", "System": "system"}
    return [
        {"role": roles[name], "content": _text(content.strip())}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _messages(value: Any, column: str, role: str, dialogue: bool) -> list[dict[str, str]]:
    """Any spelling of one or more turns as messages; a plain string becomes one turn of `role`."""
    if isinstance(value, str) and MESSAGES_AS_TEXT.match(value):
        try:
            value = json.loads(value)
        except ValueError:
            raise _LeftOut(f"{column} looks like a list of messages but is no JSON") from None
    if isinstance(value, str):
        turns = _turns(value) if dialogue else None
        return turns or [{"role": role, "content": _text(value)}]
    if isinstance(value, dict):
        value = [value]
    if value is None:
        raise _LeftOut(f"{column} is missing")
    if not isinstance(value, list):
        raise _LeftOut(f"{column} is {_kind(value)}, not text")
    if not value:
        raise _LeftOut(f"{column} is an empty list")
    return [_message(message, column) for message in value]


def _check_roles(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> None:
    for side, name in ((chosen, "chosen"), (rejected, "rejected")):
        if not side or side[-1]["role"] != "assistant":
            raise _LeftOut(f"the last assistant turn is missing in {name}")
    if not prompt:
        raise _LeftOut("the two dialogues share no beginning")
    if prompt[-1]["role"] != "user":
        raise _LeftOut(f"the prompt ends with a turn of the {prompt[-1]['role']}, not of the user")
    if not prompt[-1]["content"].strip():
        raise _LeftOut("the prompt is empty")
    start = 1 if prompt[0]["role"] == "system" else 0
    for side, name in ((chosen, "chosen"), (rejected, "rejected")):
        roles = [turn["role"] for turn in prompt[start:] + side]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise _LeftOut(f"unbalanced roles: user and assistant do not take turns in prompt and {name}")


def _pair(row: dict[str, Any], layout: _Layout, preference: _Preference | None) -> dict[str, Any]:
    """One row in the one form, without its origin. Raises _LeftOut with the reason where it is no pair."""
    better, worse = layout.chosen, layout.rejected
    if preference:
        better, worse = layout.a, layout.b
        if preference.second_wins(row.get(layout.preference)):
            better, worse = worse, better
    prompt, chosen, rejected = row.get(layout.prompt), row.get(better), row.get(worse)

    # "\n\nHuman: ..." is markup where the prompt is in it, or where the whole text begins with such a prompt.
    marked = isinstance(prompt, str) and _turns(prompt) is not None
    dialogue = prompt is None or (marked and isinstance(chosen, str) and chosen.startswith(prompt))
    chosen = _messages(chosen, better, "assistant", dialogue)
    rejected = _messages(rejected, worse, "assistant", dialogue)
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        if layout.prompt is None:
            names = f"{layout.chosen or layout.a} and {layout.rejected or layout.b}"
            raise _LeftOut(f"no prompt, and {names} are no dialogues that share one")
        prompt = _messages(prompt, layout.prompt, "user", marked)
        if marked and prompt[-1] == {"role": "assistant", "content": ""}:
            prompt = prompt[:-1]
    else:
        from trl.data_utils import extract_prompt

        parts = extract_prompt({"chosen": chosen, "rejected": rejected})
        prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    system = row.get(layout.system)
    if isinstance(system, str) and system.strip() and prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": _text(system)}, *prompt]
    _check_roles(prompt, chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _template_kwargs(value: Any) -> dict[str, Any]:
    """A row's template variables, from JSON or an object. Raises _LeftOut where it sets what it may not."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except ValueError:
            raise _LeftOut("chat_template_kwargs is no JSON") from None
    if not isinstance(value or {}, dict):
        raise _LeftOut(f"chat_template_kwargs is {_kind(value)}, not an object")
    wrong = NOT_TEMPLATE_VARIABLES & set(value or {})
    if wrong:
        raise _LeftOut(f"chat_template_kwargs sets {', '.join(sorted(wrong))}, which a row may not")
    return template_options({"chat_template_kwargs": value})


# Sources


@dataclass
class _Source:
    """Where rows come from; `rows()` may be called more than once and yields (origin, row)."""

    name: str
    rows: Callable[[], Iterator[tuple[str, Any]]]
    key: str | None = None  # names the content; None: the result is kept in memory
    features: Features | None = None  # known beforehand where the source is typed


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0][:300]


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _json_error(name: str, line: int, error: Exception) -> UserError:
    place = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return UserError(f"{name}, line {line}{place}: not valid JSON ({what}). Mend that line, or take it out.")


def _json_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Rows of JSON lines or of one JSON list. Not by `load_dataset`: its reader forgets the line numbers, makes
    dates of texts that look like dates, and says of an invalid file only that generating it failed."""
    with _open(path) as file:
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
    with _open(path) as file:
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
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", "replace", newline="") as lines:
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
                    yield f"{name}:{start}", _LeftOut("more or fewer fields than the first line has")
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


def _from_dataset(table: Dataset, name: str) -> _Source:
    table = table.with_format(None)
    key = table._fingerprint if table.cache_files else None
    return _Source(name, functools.partial(_dataset_rows, table, name), key, table.features)


def _from_file(path: Path) -> _Source:
    name = _printable(path.name)
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
    return _Source(name, functools.partial(read, path, name), content.hexdigest())


def _open_source(source: Any, split: str) -> _Source:
    if isinstance(source, DatasetDict):
        if split not in source:
            raise UserError(f"There is no split {split!r}. Pass split= one of {', '.join(source)}.")
        source = source[split]
    if isinstance(source, Dataset):
        return _from_dataset(source, "dataset")
    if isinstance(source, list | tuple):
        return _Source("list", lambda: ((f"row {number}", row) for number, row in enumerate(source, 1)))
    if not isinstance(source, str | Path):
        raise UserError(
            f"Pairs can't be read from {_kind(source)}. Pass a file, a list of dicts, a Dataset or a name on the hub."
        )
    path = Path(source).expanduser()
    if path.exists():
        return _from_file(path)
    known = path.name.removesuffix(".gz").endswith((*SUFFIXES, *PICKLES, ".py"))
    if known or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise UserError(f"There is no file {_printable(str(source))}. Seen from the folder {Path.cwd().name}.")
    try:  # datasets 4 runs no code of a dataset: it refuses one that asks for it
        table = datasets.load_dataset(str(source), split=split)
    except LIBRARY_ERRORS as error:
        raise UserError(
            f"There is no file {source!r} here, and the hub does not give a set of that name ({_reason(error)})."
        ) from None
    return _from_dataset(table, f"{source} {split}")


# From a source to the one form


def _kept_name(name: str) -> str:
    return f"source_{name}" if name in RESERVED else name


def _column_feature(values: set[str]) -> Any:
    """The type of a column that holds these kinds of values besides nothing; Json() for objects and for a mixture."""
    values = values - {"null"}
    if values == {"int64", "float64"}:
        return Value("float64")
    return Value(values.pop()) if len(values) == 1 and "json" not in values else Json() if values else Value("string")


def _column_kind(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 2**63:
        return "json"
    return {type(None): "null", bool: "bool", int: "int64", float: "float64", str: "string"}.get(type(value), "json")


class _Reader:
    """What one look at every row of a source tells: the layouts, the types of the other columns, the scale of the
    preference. `rows()` then yields every row in the one form, or with the reason why it is left out."""

    def __init__(self, source: _Source, columns: dict[str, str], first_wins: Any):
        self.source = source
        self.layout_of = functools.cache(lambda names: _find_layout(names, columns))
        self.preferences: dict[_Layout, _Preference] = {}
        self.count = 0
        names = dict.fromkeys(source.features or ())
        taken: set[str] = set()
        kinds: dict[str, set[str]] = {}
        for _, row in source.rows():
            self.count += 1
            if not isinstance(row, dict):
                continue
            layout = self._layout(row)
            names.update(dict.fromkeys(row))
            if layout and layout.preference:
                self.preferences.setdefault(layout, _Preference(layout, first_wins)).see(row[layout.preference])
            taken |= layout.columns() if layout else set()
            for name in row.keys() - taken:
                kinds.setdefault(name, set()).add(_column_kind(row[name]))
        if not self.count:
            raise UserError(f"{source.name} has no rows.")
        self._check_columns(list(names), columns)
        for preference in self.preferences.values():
            preference.decide_scale(source.name)
        typed = source.features or {}
        self.extras = {
            name: typed.get(name) or _column_feature(kinds[name])
            for name in names
            if name in kinds and name not in taken
        }
        if "chat_template_kwargs" in self.extras:
            self.extras["chat_template_kwargs"] = Json()  # a struct would give every row the keys of all, as None

    def _check_columns(self, names: list[str], columns: dict[str, str]) -> None:
        missing = [name for name in columns.values() if name not in names]
        if not missing and self.layout_of(tuple(names)):
            return
        what = f"there is no column {missing[0]!r}" if missing else "the names of the columns make no preference pair"
        raise UserError(
            f"{self.source.name}: {what}. The columns are {', '.join(map(repr, names))}. Pass columns={{'prompt': ..., "
            "'chosen': ..., 'rejected': ...} with their names, or columns={'prompt': ..., 'a': ..., 'b': ..., "
            "'preference': ...} for two answers and a column that says which is better."
        )

    def _layout(self, row: dict[str, Any]) -> _Layout | None:
        """By the columns that hold something; where these make no pair by all, so that what is missing is named."""
        filled = tuple(name for name, value in row.items() if value is not None and value != "")
        return self.layout_of(filled) or self.layout_of(tuple(row))

    def features(self) -> Features:
        ours = {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "origin": Value("string")}
        extras = {_kept_name(name): feature for name, feature in self.extras.items()}
        return Features({**ours, **extras, "left_out": Value("string")})

    def _row(self, row: Any) -> dict[str, Any]:
        if isinstance(row, _LeftOut):
            raise row
        if not isinstance(row, dict):
            raise _LeftOut(f"the row is {_kind(row)}, not an object")
        layout = self._layout(row)
        if layout is None:
            raise _LeftOut("no chosen and rejected, nor two answers with a preference")
        result = _pair(row, layout, self.preferences.get(layout))
        for name in self.extras:
            value = row.get(name)
            result[_kept_name(name)] = _text(value) if isinstance(value, str) else value
        if "chat_template_kwargs" in self.extras:
            result["chat_template_kwargs"] = _template_kwargs(result["chat_template_kwargs"])
        return result

    def rows(self) -> Iterator[dict[str, Any]]:
        nothing = dict.fromkeys(self.features()) | {"prompt": [], "chosen": [], "rejected": []}
        for origin, row in self.source.rows():
            try:
                yield {**self._row(row), "origin": origin, "left_out": ""}
            except _LeftOut as reason:
                yield {**nothing, "origin": origin, "left_out": str(reason)}


def _take_out(table: Dataset, source: str) -> Dataset:
    """The pairs of a table that `_Reader.rows` made; the rows left out go into the report. Prints it if there are any.

    Raises UserError where no pair remains.
    """
    reasons = np.array(table["left_out"][:], dtype=object)
    left_out = {}
    for reason in dict.fromkeys(reasons[reasons != ""]):
        rows = np.flatnonzero(reasons == reason)
        left_out[reason] = {"count": len(rows), "origins": [table[int(row)]["origin"] for row in rows[:5]]}
    kept = np.flatnonzero(reasons == "")
    report = LoadReport(len(table), len(kept), left_out)
    if not len(kept):
        raise UserError(f"{source} holds no preference pair. {report}")
    if left_out:
        print(f"{source}: {report}")
        table = table.select(kept)
    table = table.remove_columns("left_out")
    table.info.description = json.dumps(asdict(report))
    return table


def load_pairs(
    source: str | Path | list[dict] | Dataset | DatasetDict | None = None,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    first_wins: Any = None,
) -> Dataset:
    r"""Preference pairs in one form, whatever they come in.

    A row of the source may hold

    1. prompt, chosen, rejected as texts, or as lists of {role, content} with or without a system turn;
    2. chosen and rejected as whole dialogues that share a beginning, as lists or written "\n\nHuman: ...
       \n\nAssistant: ..."; the prompt is what they share, up to a whole turn;
    3. question, better_response, worse_response, and names like these;
    4. two answers (response_a and response_b, answer_0 and answer_1, ...) and a column that says which is better: the
       name or letter of the answer; 1 or 2; a number below zero for the first and above zero for the second; a
       fraction from 0 to 1, the probability that the first is better; "tie". Ties are left out.

    Bytes that are no UTF-8 become U+FFFD, which `check_pairs` reports. Of a message only role and content are kept. A
    row that is no pair is left out and counted: a printed line says so and `load_report(pairs)` holds it, so that rows
    read = pairs + rows left out.

    Args:
        source: a file (JSONL, JSON, CSV, Parquet; the first three also gzipped), a list of dicts, a Dataset, or a name
            on the hub; left out, what `DPO_DATA` names, else the pairs that come with this project.
        split: which one to take, of a hub name or a DatasetDict.
        columns: the source's columns, where the usual names do not find them: {"prompt": ..., "chosen": ...,
            "rejected": ...} or {"prompt": ..., "a": ..., "b": ..., "preference": ...}, and "system".
        first_wins: the value of the preference column that says that the first answer is better; it is asked for where
            0 and 1 could mean either.

    Returns:
        A Dataset with `prompt`, `chosen`, `rejected` (lists of {role, content}), `origin` (file and line or row, from
        1) and the source's other columns.

    Raises:
        UserError: a source that can't be read or holds no pair; it names file, line and column.

    >>> load_pairs([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}])[0]["prompt"]
    [{'role': 'user', 'content': '2 + 2?'}]
    """
    columns = columns or {}
    unknown = set(columns) - {"prompt", "system", "chosen", "rejected", "a", "b", "preference"}
    if unknown:
        raise UserError(
            f"columns= has the key {min(unknown)!r}. Its keys are ours (prompt, system, chosen, rejected, or a, b, "
            "preference) and its values the names in the source."
        )
    if source is None:
        named = setting("DPO_DATA")
        source = BUNDLED if named is None else PROJECT / named if (PROJECT / named).exists() else named
    name = _printable(Path(source).name) if isinstance(source, str | Path) else "The source"
    try:
        opened = _open_source(source, split)
        name = opened.name
        reader = _Reader(opened, columns, first_wins)
        with quiet_progress(reader.count):
            if opened.key is None:
                table = Dataset.from_list(list(reader.rows()), features=reader.features())
            else:
                # Kept on disk by datasets under the name of the content and of all that reading depends on.
                parts = (opened.key, name, sorted(columns.items()), first_wins, CODE)
                key = xxhash.xxh3_128(repr(parts).encode()).hexdigest()
                table = Dataset.from_generator(reader.rows, features=reader.features(), fingerprint=key)
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        raise UserError(f"{name} can't be read ({_reason(error)}).") from None
    return _take_out(table, name)


# Splitting


def prompt_text(prompt: list[dict[str, str]]) -> str:
    """A prompt for comparing: roles and texts without regard to case and to the amount of white space."""
    return "\n".join(f"{turn['role']}: {' '.join(turn['content'].split()).casefold()}" for turn in prompt)


def split_pairs(
    pairs: Dataset,
    test_size: float = 0.2,
    seed: int = 0,
    by: str | None = None,
    held_out: list[str] | None = None,
) -> DatasetDict:
    """Pairs to train on and pairs held out, as DatasetDict(train, test); no prompt is on both sides.

    The held-out part is never larger than asked for, and smaller by less than one group where the groups allow it.

    Args:
        pairs: in the form that `load_pairs` gives.
        test_size: the share of pairs to hold out.
        seed: of the drawing.
        by: a column whose equal values stay together: by="topic" makes two sides without a common topic. Left out,
            prompts are drawn; of the bundled pairs, the topics HELD_OUT_TOPICS are held out instead.
        held_out: the values of that column to hold out; test_size and seed then have no say.

    Raises:
        UserError: a side would be empty, a column or a topic is not there, or (by a column) one prompt stands under two
            topics that fall on different sides.
    """
    if by is None:
        topics = set(pairs["topic"]) if "topic" in pairs.column_names else set()
        bundled = held_out is None and set(HELD_OUT_TOPICS) <= topics
        by, held_out = ("topic", HELD_OUT_TOPICS) if bundled else ("prompt", held_out)
    if by not in pairs.column_names:
        raise UserError(f"There is no column {by!r} to split by. Columns: {', '.join(pairs.column_names)}.")
    prompts = [prompt_text(prompt) for prompt in pairs["prompt"]]
    keys = prompts if by == "prompt" else [str(value) for value in pairs[by]]
    sizes = Counter(keys)
    if held_out is not None:
        absent = [name for name in held_out if name not in sizes]
        if absent or isinstance(held_out, str):
            raise UserError(f"held_out is a list of values of {by!r}; it has {', '.join(sorted(sizes)[:20])}.")
        test = set(held_out)
    else:
        if not 0 < test_size < 1:
            raise UserError(f"test_size is the share of pairs held out, between 0 and 1, not {test_size!r}.")
        test, room = set(), round(test_size * len(pairs))
        groups = sorted(sizes)
        for index in np.random.default_rng(seed).permutation(len(groups)):
            if sizes[groups[index]] <= room:
                test.add(groups[index])
                room -= sizes[groups[index]]
    in_test = np.array([key in test for key in keys])
    if in_test.all() or not in_test.any():
        raise UserError(
            f"Splitting {len(pairs)} pairs by {by!r} ({len(sizes)} different) leaves one side empty. "
            "Take another test_size, or another column."
        )
    both = {prompts[row] for row in np.flatnonzero(in_test)} & {prompts[row] for row in np.flatnonzero(~in_test)}
    if both:
        rows = [pairs[row]["origin"] for row, prompt in enumerate(prompts) if prompt in both][:5]
        raise UserError(f"The same prompt stands under two values of {by!r} ({', '.join(rows)}): make them one.")
    return DatasetDict(train=pairs.select(np.flatnonzero(~in_test)), test=pairs.select(np.flatnonzero(in_test)))
