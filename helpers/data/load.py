"""Preference pairs, read from any usual file and brought to one form.

The one form, which TRL's DPOTrainer takes as it is:

- `prompt`: list of {role, content}; a system turn may come first, a user turn is last
- `chosen`, `rejected`: lists of {role, content} that begin and end with an assistant turn
- `origin`: "pairs.jsonl:12" is a line of a file, "pairs.parquet row 12" a row; both count from 1
- the source's other columns (topic, flaw, tools, chat_template_kwargs, ...) as they were
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, DatasetDict, Features, Json, Value
from trl.data_utils import extract_prompt

from helpers.common import PROJECT, UserError, setting
from helpers.data import CODE
from helpers.data.layouts import Layout, find_layout
from helpers.data.messages import (
    MESSAGES,
    check_roles,
    dialogue_turns,
    kind_of,
    read_template_kwargs,
    to_messages,
    valid_text,
)
from helpers.data.preferences import LeftOut, Preference
from helpers.data.report import LoadReport
from helpers.data.sources import LIBRARY_ERRORS, Source, open_source, printable, reason_of
from helpers.session import quiet_progress

BUNDLED_PAIRS = Path(__file__).parent / "bundled" / "pairs.jsonl"
# Columns that DPOTrainer reads by name. A source's own column of that name is kept as "source_...".
RESERVED = set(
    "prompt chosen rejected origin left_out messages completion image images "
    "prompt_ids chosen_ids rejected_ids ref_chosen_logps ref_rejected_logps".split()
)


def _pair(row: dict[str, Any], layout: Layout, preference: Preference | None) -> dict[str, Any]:
    """One row in the one form, without its origin. Raises LeftOut with the reason if it is no pair."""
    better, worse = layout.chosen, layout.rejected
    if preference:
        better, worse = layout.a, layout.b
        if preference.second_wins(row.get(layout.preference)):
            better, worse = worse, better
    prompt, chosen, rejected = row.get(layout.prompt), row.get(better), row.get(worse)

    # "\n\nHuman: ..." is markup if the prompt is written in it, or if the whole text begins with such a prompt.
    marked = isinstance(prompt, str) and dialogue_turns(prompt) is not None
    dialogue = prompt is None or (marked and isinstance(chosen, str) and chosen.startswith(prompt))
    chosen = to_messages(chosen, better, "assistant", dialogue)
    rejected = to_messages(rejected, worse, "assistant", dialogue)
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        if layout.prompt is None:
            names = f"{layout.chosen or layout.a} and {layout.rejected or layout.b}"
            raise LeftOut(f"no prompt, and {names} are no dialogues that share one")
        prompt = to_messages(prompt, layout.prompt, "user", marked)
        if marked and prompt[-1] == {"role": "assistant", "content": ""}:
            prompt = prompt[:-1]
    else:
        parts = extract_prompt({"chosen": chosen, "rejected": rejected})
        prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    system = row.get(layout.system)
    if isinstance(system, str) and system.strip() and prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": valid_text(system)}, *prompt]
    check_roles(prompt, chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


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

    def __init__(self, source: Source, columns: dict[str, str], first_wins: Any):
        self.source = source
        self.layout_of = functools.cache(lambda names: find_layout(names, columns))
        self.preferences: dict[Layout, Preference] = {}
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
                self.preferences.setdefault(layout, Preference(layout, first_wins)).see(row[layout.preference])
            taken |= layout.columns() if layout else set()
            for name in row.keys() - taken:
                kinds.setdefault(name, set()).add(_column_kind(row[name]))
        if not self.count:
            raise UserError(f"{source.name} has no rows.")
        self._check_columns(list(names), columns)
        for preference in self.preferences.values():
            preference.decide_scale(source.name)
        typed = source.features or {}
        self.extras: dict[str, Any] = {
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

    def _layout(self, row: dict[str, Any]) -> Layout | None:
        """By the non-empty columns; if they make no pair, by all, so that the error can name what is missing."""
        filled = tuple(name for name, value in row.items() if value is not None and value != "")
        return self.layout_of(filled) or self.layout_of(tuple(row))

    def features(self) -> Features:
        ours = {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "origin": Value("string")}
        extras = {_kept_name(name): feature for name, feature in self.extras.items()}
        return Features({**ours, **extras, "left_out": Value("string")})

    def _row(self, row: Any) -> dict[str, Any]:
        if isinstance(row, LeftOut):
            raise row
        if not isinstance(row, dict):
            raise LeftOut(f"the row is {kind_of(row)}, not an object")
        layout = self._layout(row)
        if layout is None:
            raise LeftOut("no chosen and rejected, nor two answers with a preference")
        result = _pair(row, layout, self.preferences.get(layout))
        for name in self.extras:
            value = row.get(name)
            result[_kept_name(name)] = valid_text(value) if isinstance(value, str) else value
        if "chat_template_kwargs" in self.extras:
            result["chat_template_kwargs"] = read_template_kwargs(result["chat_template_kwargs"])
        return result

    def rows(self) -> Iterator[dict[str, Any]]:
        nothing = dict.fromkeys(self.features()) | {"prompt": [], "chosen": [], "rejected": []}
        for origin, row in self.source.rows():
            try:
                yield {**self._row(row), "origin": origin, "left_out": ""}
            except LeftOut as reason:
                yield {**nothing, "origin": origin, "left_out": str(reason)}


def _take_out(table: Dataset, source: str, bundled: bool) -> Dataset:
    """The pairs of a table that `_Reader.rows` made; the rows left out go into the report. Prints it if there are any.

    Raises UserError if no pair remains.
    """
    reasons = np.array(table["left_out"][:], dtype=object)
    left_out = {}
    for reason in dict.fromkeys(reasons[reasons != ""]):
        rows = np.flatnonzero(reasons == reason)
        left_out[reason] = {"count": len(rows), "origins": [table[int(row)]["origin"] for row in rows[:5]]}
    kept = np.flatnonzero(reasons == "")
    report = LoadReport(len(table), len(kept), left_out, bundled)
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
        columns: the source's columns, if they do not have the usual names: {"prompt": ..., "chosen": ...,
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
        source = BUNDLED_PAIRS if named is None else PROJECT / named if (PROJECT / named).exists() else named
    name = printable(Path(source).name) if isinstance(source, str | Path) else "The source"
    try:
        opened = open_source(source, split)
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
        raise UserError(f"{name} can't be read ({reason_of(error)}).") from None
    return _take_out(table, name, bundled=isinstance(source, str | Path) and Path(source) == BUNDLED_PAIRS)
