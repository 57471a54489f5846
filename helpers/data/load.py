"""Preference pairs, read from any usual file and brought to one form.

The one form, which TRL's DPOTrainer takes as it is:

- `prompt`: list of {role, content}; a system turn may come first, a user turn is last
- `chosen`, `rejected`: lists of {role, content} that begin and end with an assistant turn
- `origin`: "pairs.jsonl:12" is a line of a file, "pairs.parquet row 12" a row; both count from 1
- the source's other columns (topic, flaw, tools, chat_template_kwargs, ...) as they were
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from datasets import Dataset, Features, Json, Value
from trl.data_utils import extract_prompt

from helpers.common import PROJECT, UserError, setting
from helpers.data import CODE
from helpers.data.layouts import FORMATS, Layout, check_arguments, find_layout, listed, lookup, opened
from helpers.data.messages import (
    ASSISTANT_MARK,
    MESSAGES,
    WHOLE_MESSAGES,
    check_roles,
    dialogue_turns,
    has_more,
    kind_of,
    read_template_kwargs,
    texts_of,
    to_messages,
    valid_text,
)
from helpers.data.preferences import Judge, LeftOut, is_missing, number_of
from helpers.data.report import LoadReport, load_report
from helpers.data.sources import LIBRARY_ERRORS, Source, open_source, printable, reason_of
from helpers.session import quiet_progress

MEDIA = ("images", "image", "videos", "video", "audios", "audio")
BUNDLED_PAIRS = Path(__file__).parent / "bundled" / "pairs.jsonl"
# Columns that DPOTrainer reads by name. A source's own column of that name is kept as "source_...".
RESERVED = set(
    "prompt chosen rejected origin left_out messages completion image images "
    "prompt_ids chosen_ids rejected_ids ref_chosen_logps ref_rejected_logps".split()
)


def _prompt(row: dict[str, Any], layout: Layout) -> Any:
    values = [lookup(row, name) for name in layout.prompt]
    if len(values) < 2:
        return values[0] if values else None
    texts = ["" if is_missing(value) else value for value in values]
    wrong = next((name for name, text in zip(layout.prompt, texts, strict=True) if not isinstance(text, str)), None)
    if wrong:
        raise LeftOut(f"{wrong} is no text, so it can't be joined with {' + '.join(layout.prompt)}")
    return "\n".join(filter(None, texts))


def _earlier(row: dict[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """The system turn and the earlier turns that have columns of their own."""
    turns: list[dict[str, Any]] = []
    system = opened(lookup(row, layout.system))
    if isinstance(system, dict | list):
        turns = to_messages(system, layout.system, "system", False)
    elif isinstance(system, str) and system.strip():
        turns = [{"role": "system", "content": valid_text(system)}]
    elif not isinstance(system, str) and not is_missing(system):
        raise LeftOut(f"{layout.system} is {kind_of(system)}, not text")
    history = opened(lookup(row, layout.history))
    if isinstance(history, str) and history.strip():
        raise LeftOut(f"{layout.history} is a text, not a list of turns")
    for entry in history or []:
        if isinstance(entry, list | tuple):  # LLaMA-Factory: [question, answer]
            if [type(text) for text in entry] != [str, str]:
                raise LeftOut(f"an entry of {layout.history} is not a question and an answer, both texts")
            sides = zip(("user", "assistant"), entry, strict=True)
            turns += [{"role": role, "content": valid_text(text)} for role, text in sides]
        else:
            turns += to_messages([entry], layout.history, "user", False)
    return turns


def _arena(prompt: list[str | None], side: list[str | None]) -> list[dict[str, Any]]:
    if len(prompt) != len(side) or None in (*prompt, *side):
        raise LeftOut("the lists of questions and answers have different lengths or a turn without text")
    pairs = zip(prompt, side, strict=True)
    return [turn for q, a in pairs for turn in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


def _pair(row: dict[str, Any], layout: Layout, better: str, worse: str) -> dict[str, Any]:
    """One row in the one form, without its origin; `better` and `worse` lead to its answers.

    Raises LeftOut with the reason if it is no pair.
    """
    prompt, chosen, rejected = _prompt(row, layout), lookup(row, better), lookup(row, worse)
    where = " + ".join(layout.prompt)
    lists = [texts for texts in map(texts_of, (prompt, chosen, rejected)) if texts]
    if len(lists) == 3:
        prompt, chosen, rejected = None, _arena(lists[0], lists[1]), _arena(lists[0], lists[2])
    # "Human: ..." is markup if the prompt is written in it, or if the whole text begins with such a prompt.
    marked = isinstance(prompt, str) and dialogue_turns(prompt) is not None
    whole = all(isinstance(side, str) and side.startswith("\n\nHuman:") for side in (chosen, rejected))
    dialogue = not layout.prompt or whole or (marked and isinstance(chosen, str) and chosen.startswith(prompt))
    if marked and not dialogue:
        sides = [
            ASSISTANT_MARK.sub("", side, count=1) if isinstance(side, str) else side for side in (chosen, rejected)
        ]
        chosen, rejected = sides
    chosen = to_messages(chosen, better, "assistant", dialogue)
    rejected = to_messages(rejected, worse, "assistant", dialogue)
    own = [] if is_missing(prompt) and prompt != "" else to_messages(prompt, where, "user", marked)
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        if not layout.prompt:
            raise LeftOut(f"no prompt, and {better} and {worse} are no dialogues that share one")
        prompt = own or to_messages(prompt, where, "user", marked)
        if marked and prompt[-1] == {"role": "assistant", "content": ""}:
            prompt = prompt[:-1]
    elif rejected[0]["role"] == "assistant" and len(rejected) == 1:  # ms-swift: only the last turn differs
        prompt, chosen = chosen[:-1], chosen[-1:]
    else:
        parts = extract_prompt({"chosen": chosen, "rejected": rejected})
        prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    if own is not prompt:
        prompt = _with_own(own, prompt, where)
    earlier = _earlier(row, layout)
    if earlier and prompt and prompt[0]["role"] == "system":
        if any(turn["role"] == "system" and turn != prompt[0] for turn in earlier):
            raise LeftOut(f"{layout.system} and the prompt hold two system turns that differ")
        earlier = [turn for turn in earlier if turn["role"] != "system"]
    prompt = [*earlier, *prompt]
    check_roles(prompt, chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _with_own(own: list[dict[str, Any]], shared: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The beginning that two whole dialogues share, with the system turn of the row's own prompt.

    Raises LeftOut if the row's prompt says something else.
    """
    system = [turn for turn in own if turn["role"] == "system"]
    for turn in own if shared else ():
        text = " ".join(turn["content"].split())
        turns = [" ".join(other["content"].split()) for other in shared]
        if turn["role"] == "user" and not any(text in other or (other and other in text) for other in turns):
            raise LeftOut(f"{where} is not in the two dialogues; columns={{'prompt': []}} takes what they share")
    return shared if shared and shared[0]["role"] == "system" else [*system, *shared]


def _ranked(row: dict[str, Any], layout: Layout, every: bool) -> list[dict[str, Any]]:
    """Pairs out of a list of answers with scores or ranks: the best against the worst, or each against each."""
    how = dict(layout.ranked)
    by = how.get("score") or how["rank"]
    answers = opened(lookup(row, how["list"]))
    if not isinstance(answers, list):
        raise LeftOut(f"{how['list']} is {kind_of(answers)}, not a list of answers")
    beside = opened(lookup(row, by))  # one score for each answer, in a column of their own
    if isinstance(beside, list) and len(beside) != len(answers):
        raise LeftOut(f"{how['list']} and {by} have different lengths")
    items = []
    for place, answer in enumerate(answers):
        item = answer if isinstance(answer, dict) else {"": answer}
        score = number_of(beside[place] if isinstance(beside, list) else lookup(item, by))
        if score is not None:
            items.append((score if "score" in how else -score, lookup(item, how.get("text", ""))))
    items.sort(key=lambda item: -item[0])
    if len(items) < 2 or items[0][0] == items[-1][0]:
        raise LeftOut("fewer than two answers with a score" if len(items) < 2 else "tie: all answers have one score")
    two = itertools.combinations(items, 2) if every else [(items[0], items[-1])]
    whole = Layout(prompt=layout.prompt, system=layout.system)
    pairs = [(better, worse) for (high, better), (low, worse) in two if high > low]
    return [_pair({**row, "chosen": one, "rejected": other}, whole, "chosen", "rejected") for one, other in pairs]


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
    """What one look at every row of a source tells: the layouts, the types of the other columns, what the values of a
    preference mean. `rows()` then yields every row in the one form, or with the reason why it is left out."""

    def __init__(self, source: Source, asked: dict[str, Any]):
        self.source, self.asked = source, asked
        self.columns, self.scores = asked["columns"], tuple(asked["scores"] or ())
        self.empty: frozenset[str] = frozenset()
        try:
            try:
                self._look()
            except UserError:
                if not self.empty:
                    raise
                self._look()  # once more, without the columns that hold nothing
            for judge in self.judges.values():
                judge.settle()
        except UserError as error:
            known = str(error).startswith(source.name)
            raise error if known else UserError(f"{source.name}: {error}") from None
        taken = frozenset().union(*(layout.read for layout in self.layouts))
        typed = source.features or {}
        self.extras: dict[str, Any] = {
            name: typed.get(name) or _column_feature(self.kinds[name])
            for name in self.names
            if name in self.kinds and name not in taken and name
        }
        for name in {"tools", "chat_template_kwargs"} & self.extras.keys():
            self.extras[name] = Json()  # a struct would give every row the keys of all, as None

    def _look(self) -> None:
        self.layout_of = functools.cache(lambda names: find_layout(names, self.columns, self.scores))
        self.layouts: dict[Layout, int] = {}
        self.judges: dict[Layout, Judge] = {}
        self.samples: dict[Layout, dict[str, Any]] = {}
        self.count, self.whole, self.tools = 0, False, True
        self.kinds: dict[str, set[str]] = {}
        names, question = dict.fromkeys(self.source.features or ()), None
        for _, row in self.source.rows():
            self.count += 1
            if not isinstance(row, dict):
                continue
            names.update(dict.fromkeys(row))
            for name, value in row.items():
                if not is_missing(value):
                    self.kinds.setdefault(name, set()).add(_column_kind(value))
            try:
                layout = self._layout(row)
            except UserError as error:
                question = question or error
                continue
            if layout:
                self.layouts[layout] = self.layouts.get(layout, 0) + 1
                self._see(row, layout)
        self.names: list[str] = list(names)
        if not self.count:
            raise UserError(f"{self.source.name} has no rows.")
        if question:
            self.empty = frozenset(names) - self.kinds.keys()
            raise question
        self._check_columns()

    def _see(self, row: dict[str, Any], layout: Layout) -> None:
        self.samples.setdefault(layout, row)
        if layout.a:
            if layout not in self.judges:
                self.judges[layout] = Judge(layout, self.asked["wins"], self.asked["first_wins"])
            self.judges[layout].see(row)
        self.whole = self.whole or any(has_more(lookup(row, path)) for path in (*layout.prompt, *layout.answers()))
        tools = opened(lookup(row, layout.tools or "tools"))
        self.tools = self.tools and (
            is_missing(tools) or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))
        )

    def _check_columns(self) -> None:
        given = [*self.columns.values(), *self.scores]
        wanted = list(itertools.chain.from_iterable([one] if isinstance(one, str) else one for one in given))
        missing = [name for name in wanted if name not in self.names]
        if missing or not self.layouts:
            what = "the names of the columns make no preference pair"
            what = f"there is no column {missing[0]!r}" if missing else what if self.names else "no row is an object"
            raise UserError(
                f"{what}. The columns are {listed(self.names)}. Pass columns={{'prompt': ..., 'chosen': ..., "
                "'rejected': ...} with their names, or columns={'prompt': ..., 'a': ..., 'b': ..., 'preference': ...} "
                "for two answers and a column that says which is better."
            )
        if (self.asked["wins"], self.asked["first_wins"]) != (None, None) and not any(
            layout.preference or layout.votes for layout in self.layouts
        ):
            read = "; ".join(map(str, self.layouts))
            raise UserError(f"wins= and first_wins= say what a column of preferences means, but none is read ({read}).")
        # One place of the prompt for all rows with these answers: an empty one is never filled from another column.
        prompts: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for layout in self.layouts:
            prompts.setdefault(layout.answers(), set()).add(layout.prompt)
        for places in prompts.values():
            if len(places - {()}) > 1:
                names = [" + ".join(place) for place in places if place]
                raise UserError(
                    f"the question is in {listed(names)}, another column in another row. Pass "
                    "columns={'prompt': ...} with one of them, and load the other rows by themselves."
                )

    def _layout(self, row: dict[str, Any]) -> Layout | None:
        """By the columns of the row; if its answers are in none of these, by those that hold something."""
        layout = self.layout_of(tuple(name for name in row if name not in self.empty) if self.empty else tuple(row))
        if layout is None or all(lookup(row, path) is None for path in layout.answers()):
            return self.layout_of(tuple(name for name, value in row.items() if value is not None)) or layout
        return layout

    def _used(self, line: str, row: dict[str, Any]) -> str:
        """The line with one name for each path of formats.yaml: of its options, the one that this row has."""
        answers = [item for value in row.values() if isinstance(value, list) for item in value[:1]]
        rows = [row, *(item for item in answers if isinstance(item, dict))]

        def used(found: re.Match) -> str:
            options = found[0].split(" | ")
            return next((option for option in options for one in rows if lookup(one, option) is not None), options[0])

        return re.sub(r"[^\s,;|]+(?: \| [^\s,;|]+)+", used, line).replace(".*", "")

    def reading(self) -> list[str]:
        """How the columns were read, a line for each layout and each preference; nothing for the three plain ones."""
        texts = [
            name
            for name in self.extras
            if name != "origin" and "string" in self.kinds[name] and not (name == "tools" and self.tools)
        ]
        plain = Layout(prompt=("prompt",), chosen="chosen", rejected="rejected")
        lines = []
        for layout, count in self.layouts.items():
            if str(layout) in (str(plain), str(Layout(chosen="chosen", rejected="rejected"))) and not texts:
                continue
            name = f", read as {layout.name}" if layout.name else ""
            read = [f"{layout}", *([self.judges[layout].reading()] if layout in self.judges else [])]
            read = [self._used(line, self.samples[layout]) for line in read] if layout.name else read
            lines += [f"{self.source.name}: {count} row{'s' * (count != 1)}{name}. {read[0]}", *read[1:]]
        return [*lines, f"not read: {listed(texts)}"] if texts else lines

    def features(self) -> Features:
        messages = WHOLE_MESSAGES if self.whole else MESSAGES
        ours = {"prompt": messages, "chosen": messages, "rejected": messages, "origin": Value("string")}
        extras = {self._kept_name(name): feature for name, feature in self.extras.items()}
        tools = {"tools": Json()} if any(layout.tools for layout in self.layouts) else {}
        return Features({**ours, **extras, **tools, "left_out": Value("string")})

    def _kept_name(self, name: str) -> str:
        return f"source_{name}" if name in RESERVED or (name == "tools" and not self.tools) else name

    def _row(self, row: Any) -> Iterator[dict[str, Any]]:
        if isinstance(row, LeftOut):
            raise row
        if not isinstance(row, dict):
            raise LeftOut(f"the row is {kind_of(row)}, not an object")
        layout = self._layout(row)
        if layout is None:
            raise LeftOut("no chosen and rejected, nor two answers with a preference")
        if media := next((name for name in MEDIA if row.get(name)), None):
            raise LeftOut(f"the row has {media}; only text is trained here")
        if layout.ranked:
            pairs = _ranked(row, layout, self.asked["ranked"] == "all")
        elif layout.a:
            first = self.judges[layout].winner(row) == "first"
            pairs = [_pair(row, layout, *((layout.a, layout.b) if first else (layout.b, layout.a)))]
        else:
            pairs = [_pair(row, layout, layout.chosen, layout.rejected)]
        extras = {self._kept_name(name): row.get(name) for name in self.extras}
        if "chat_template_kwargs" in extras:
            extras["chat_template_kwargs"] = read_template_kwargs(extras["chat_template_kwargs"])
        if layout.tools or "tools" in extras:
            extras["tools"] = opened(lookup(row, layout.tools or "tools")) or None
        yield from ({**extras, **pair} for pair in pairs)

    def rows(self) -> Iterator[dict[str, Any]]:
        nothing = dict.fromkeys(self.features()) | {"prompt": [], "chosen": [], "rejected": []}
        for origin, row in self.source.rows():
            try:
                for pair in self._row(row):
                    yield {**nothing, **pair, "origin": origin, "left_out": ""}
            except LeftOut as reason:
                yield {**nothing, "origin": origin, "left_out": str(reason)}


def _take_out(table: Dataset, reader: _Reader, reading: list[str], bundled: bool) -> Dataset:
    """The pairs of a table that `_Reader.rows` made; the rows left out go into the report. Prints what is not plain.

    Raises UserError if no pair remains.
    """
    reasons = np.array(table["left_out"][:], dtype=object)
    left_out = {}
    for reason in dict.fromkeys(reasons[reasons != ""]):
        rows = np.flatnonzero(reasons == reason)
        left_out[reason] = {"count": len(rows), "origins": [table[int(row)]["origin"] for row in rows[:5]]}
    kept = np.flatnonzero(reasons == "")
    report = LoadReport(reader.count, len(kept), left_out, bundled, reading)
    if not len(kept):
        raise UserError(f"{reader.source.name} holds no preference pair. {report}")
    if left_out:
        print(report if reading else f"{reader.source.name}: {report}")
        table = table.select(kept)
    elif reading:
        print("\n".join(reading))
    table = table.remove_columns("left_out")
    table.info.description = json.dumps(asdict(report))
    return table


def load_pairs(
    source: Any = None,
    *,
    split: str = "train",
    columns: dict[str, Any] | None = None,
    wins: dict[Any, str | None] | str | None = None,
    scores: tuple[str, str] | None = None,
    ranked: Literal["ends", "all"] = "ends",
    first_wins: Any = None,
) -> Dataset:
    r"""Preference pairs in one form, whatever they come in.

    A row of the source may hold

    1. prompt, chosen, rejected as texts, or as lists of {role, content} with or without a system turn;
    2. chosen and rejected as whole dialogues that share a beginning, as lists or written "\n\nHuman: ...
       \n\nAssistant: ..."; the prompt is what they share, up to a whole turn;
    3. question, better_response, worse_response, and names like these; instruction and input are joined;
    4. two answers (response_a and response_b, answer_0 and answer_1, ...) and a column that names the better one.
       Ties are left out. Numbers, truth values and words that are not certain are asked about: pass `wins`;
    5. one of these public formats, which are known by their columns:
    {formats}

    What was read is printed, unless it is the three plain columns: which columns were taken for what, what each
    value of the preference was taken for, and which columns of text were not read. A row that is no pair is left out
    and counted: rows read = rows that became pairs + rows left out. `load_report(pairs)` has all of it.

    Bytes that are no UTF-8 become U+FFFD, which `check_pairs` reports. A message keeps its role, its text, calls of
    tools and a `reasoning_content`.

    Args:
        source: a file (JSONL, JSON, CSV, TSV, Parquet, Arrow; also gzipped), a folder or a pattern of such files, a
            folder of `save_to_disk`, a list of dicts, a Dataset, a data frame, or a name on the hub; left out, what
            `DPO_DATA` names, else the pairs that come with this project.
        split: which one to take, of a hub name or a DatasetDict.
        columns: the source's columns, if they do not have the usual names: {"prompt": ..., "chosen": ...,
            "rejected": ...} or {"prompt": ..., "a": ..., "b": ..., "preference": ...}, and "system". A list of
            columns as the prompt is joined by line breaks.
        wins: what each value of the preference column means: {1: "first", 2: "second", 3: "tie", "skip": None}
            (None leaves rows out), or a rule for a scale of numbers, "1 to 3 first, 4 to 6 second" or
            "< 0 first, 0 tie, > 0 second". It has to cover every value of the column.
        scores: two columns with a number for each answer; the higher one is better.
        ranked: of a list of ranked answers, "ends" pairs the best with the worst, "all" each with each.
        first_wins: the short form of `wins` for a column of two values: the one that means the first answer.

    Returns:
        A Dataset with `prompt`, `chosen`, `rejected` (lists of {role, content}), `origin` (file and line or row,
        from 1) and the source's other columns.

    Raises:
        UserError: a source that can't be read, holds no pair, or can be read in two ways; it names file, line and
            column, and what to pass.

    >>> load_pairs([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}])[0]["prompt"]
    [{'role': 'user', 'content': '2 + 2?'}]
    """
    columns = {} if columns is None else columns
    check_arguments(columns, wins, scores, ranked, first_wins)
    asked = {"columns": columns, "wins": wins, "scores": scores, "ranked": ranked, "first_wins": first_wins}
    if source is None:
        named = setting("DPO_DATA")
        source = BUNDLED_PAIRS if named is None else PROJECT / named if (PROJECT / named).exists() else named
    name = printable(Path(source).name) if isinstance(source, str | Path) else "The source"
    try:
        found = open_source(source, split)
        name = found.name
        reader = _Reader(found, asked)
        with quiet_progress(reader.count):
            if found.key is None:
                table = Dataset.from_list(list(reader.rows()), features=reader.features())
            else:
                # Kept on disk by datasets under the name of the content and of all that reading depends on.
                key = xxhash.xxh3_128(repr((found.key, name, sorted(asked.items()), CODE)).encode()).hexdigest()
                table = Dataset.from_generator(reader.rows, features=reader.features(), fingerprint=key)
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        raise UserError(f"{name} can't be read ({reason_of(error)}).") from None
    path = Path(source) if isinstance(source, str | Path) else None
    known = (path and path.parent == BUNDLED_PAIRS.parent) or (isinstance(source, Dataset) and load_report(source))
    return _take_out(table, reader, [] if known else reader.reading(), bundled=path == BUNDLED_PAIRS)


load_pairs.__doc__ = (load_pairs.__doc__ or "").replace(
    "    {formats}",
    "\n".join(
        f"       - {entry['name']}: {', '.join(entry['columns'])}{' (no pairs: refused)' if 'refused' in entry else ''}"
        for entry in FORMATS
    ),
)
