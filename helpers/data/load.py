"""Preference pairs, read from any usual file and brought to the one form that TRL's DPOTrainer takes as it is."""

import contextlib
import functools
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import xxhash
from datasets import Dataset, Features, Json, Value
from trl.data_utils import extract_prompt

from helpers.common import PROJECT, UserError, setting, visible
from helpers.data import CODE, dialogues, layouts, messages
from helpers.data.layouts import RANKED, Layout, asked, listed, lookup, opened, parts
from helpers.data.messages import WORDS
from helpers.data.preferences import Judge, LeftOut, is_missing, number_of
from helpers.data.report import LoadReport, load_report
from helpers.data.sources import LIBRARY_ERRORS, Source, open_source, printable, reason_of
from helpers.session import quiet_progress

BUNDLED_PAIRS = Path(__file__).parent / "bundled" / "pairs.jsonl"
SIDES = ("prompt", "chosen", "rejected")
PLACES = "abcdefgh"  # in a list
NOUN = re.compile(layouts.VERDICTS["nouns"])  # for an answer


def _text(row: dict[str, Any], name: str) -> Any:
    """What a column has. Raises LeftOut for a text that tables write for nothing."""
    value = lookup(row, name)
    if isinstance(value, str) and (text := value.strip()) in WORDS["nothing"]:
        raise LeftOut(f"{name} is the text {text!r}, which tables write for nothing")
    return value


def _prompt(row: dict[str, Any], layout: Layout) -> Any:
    values = [lookup(row, name) for name in layout.prompt]
    if len(values) < 2:
        return values[0] if values else None
    texts = {name: value for name, value in zip(layout.prompt, values, strict=True) if not is_missing(value)}
    if other := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise LeftOut(f"{other[0]} is no text, so it can't be joined with {' + '.join(layout.prompt)}")
    return "\n".join(texts.values())


def _earlier(row: dict[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """The system turn and the earlier turns that have columns of their own."""
    system, history = _text(row, layout.system), opened(lookup(row, layout.history))
    nothing = is_missing(system.strip() if isinstance(system, str) else system)
    turns = [] if nothing else messages.to_messages(system, layout.system, "system")
    if not isinstance(history, list) and not is_missing(history):
        raise LeftOut(f"{layout.history} is {messages.kind_of(history)}, not a list of turns")
    for entry in [] if is_missing(history) else history:
        if not isinstance(entry, list):
            turns += messages.to_messages([entry], layout.history, "user")
        elif [type(text) for text in entry] == [str, str] and entry[1].strip():  # LLaMA-Factory: [question, answer]
            turns += _arena(entry[:1], entry[1:])
        else:
            raise LeftOut(f"an entry of {layout.history} is not a question and an answer, both texts")
    return turns


def _tools(row: dict[str, Any], layout: Layout) -> list[Any]:
    """What a row has as its tools, in a column of their own, with an answer or with the prompt; each may be JSON."""
    cells = (lookup(row, name) for name in (*layout.answers, *layout.prompt))
    found = [lookup(row, layout.tools or "tools"), *map(_own_tools, cells)]
    tools = next((opened(tools) for tools in found if not is_missing(tools)), [])
    return [opened(tool) for tool in (tools if isinstance(tools, list) else [tools])]


def _own_tools(cell: Any) -> Any:
    """The tools that a cell has next to its messages."""
    cell = opened(cell)
    return opened(cell.get("tools")) if isinstance(cell, dict) and messages.talk_in(cell) is not None else None


def _arena(prompt: list[str | None], side: list[str | None]) -> list[dict[str, Any]]:
    if len(prompt) != len(side) or None in (*prompt, *side):
        raise LeftOut("the lists of questions and answers have different lengths or a turn without text")
    texts = itertools.chain.from_iterable(zip(prompt, side, strict=True))
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def _labels(row: dict[str, Any], layout: Layout) -> list[str]:
    """The texts in the answers' columns, if they only name other columns, or keys, ids or places in their cells."""
    judged = layout.kind and not {"chosen", "rejected"} & set(layout.answers)
    cells = [] if judged else [lookup(row, path) for path in layout.answers]
    sides = [str(cell) for cell in cells if not isinstance(cell, list | dict)]
    if len(sides) < 2 or max(map(len, sides)) > 60:  # characters; a longer text is an answer, not the name of one
        return []
    names = {name for name, value in row.items() if isinstance(value, str | list | dict)}
    own = {name for name in row if {"chosen", "rejected"} & set(parts(name))}  # what is said of the two answers
    held = dict(zip(row, map(opened, row.values()), strict=True))
    if _beside(row, layout, sides, held):
        return sides
    names |= {str(value) for name, value in row.items() if name not in own and layouts.says("keys", name)}
    firsts = {name: parts(name)[:1] for name in row if name not in own}
    answers = {name for name, first in firsts.items() if first and (NOUN.fullmatch(first[0]) or first[0] in [*PLACES])}
    start = 0 if any("0" in parts(side) for side in sides) else 1  # of places in a list
    for name, cell in held.items():
        if isinstance(cell, dict):
            names |= {key for key, value in cell.items() if isinstance(value, str | list | dict)}
        items = cell if isinstance(cell, list) and not set(map(str, cell)) & set(sides) else []
        objects = [item for item in items if isinstance(item, dict)]
        if not any({"role", "from"} & item.keys() for item in objects):  # turns
            keys = {key for item in objects for key in item if layouts.says("keys", key)}
            if layouts.says("lists of answers", name):
                keys |= {key for item in objects for key in item if layouts.says("models", key)}
            names |= {str(item[key]) for item in objects for key in keys & item.keys()}
            if len(items) > 1 and (objects or layouts.says("lists", name)):
                names |= set(map(str, range(start, start + len(items))))
                answers |= {*PLACES[: len(items)], *names} if layouts.says("lists of answers", name) else set()
    made, of_answers = [*map(parts, names)], [*map(parts, answers)]
    if all(_names(parts(side), made) or _names(_place(side), of_answers) for side in sides):
        return sides
    # "A" names text_1 too, and "1" text_a: of answers, not of options, and if none of these texts is a side.
    spelled = {name for name in answers & row.keys() if len(parts(name)) == 2 and parts(name)[0] != "option"}
    spelled = {name for name in spelled if NOUN.fullmatch(parts(name)[0])}
    numbered = [_numbered(parts(name)) for name in spelled if not any(str(row[one]) in sides for one in spelled)]
    return sides if all(_names(_numbered(_place(side)), numbered) for side in sides) else []


def _beside(row: dict[str, Any], layout: Layout, sides: list[str], held: dict[str, Any]) -> bool:
    """Whether short texts are names or flags, by what other columns of the row hold (`held`, with JSON opened): the
    texts of both answers, a list of models with one of their answers, or one answer with a flag for each side."""
    read, flags = layout.columns(row), len({*map(str.lower, sides)} & {"0", "1", "true", "false"}) == 2
    texts = {
        " ".join(parts(name)): value
        for name, value in row.items()
        if name not in read and isinstance(value, str) and value.strip() and layouts.says("an answer", name)
    }
    chosen = {name: texts.get(name.replace("chosen", "rejected")) for name in texts if name.startswith("chosen")}
    both = ((texts[name], sides[0], other, sides[1]) for name, other in chosen.items() if other)
    if any(not (a.strip() in b or b in a or c.strip() in d or d in c) for a, b, c, d in both):
        return True
    flags &= [*map(str.lower, layout.answers)] == ["chosen", "rejected"]
    if flags and any(texts.get(name, sides[0]) not in sides for name in ("response", "completion")):
        return True
    lists = {name: cell for name, cell in held.items() if isinstance(cell, list)}
    models = [cell for name, cell in lists.items() if layouts.says("lists of models", name)]
    models = [cell for cell in models if set(sides) <= set(map(str, cell))]
    answers = [cell for name, cell in lists.items() if layouts.says("lists of answers", name)]
    return any(len(cell) == len(other) and cell is not other for cell in models for other in answers)


def _place(label: str) -> tuple[str, ...]:
    """Of "response A" or "the first" the part that tells which."""
    words = [word for word in parts(label) if not (word == "the" or NOUN.fullmatch(word))]
    return (str(WORDS["ordinals"].get(words[0], words[0])),) if len(words) == 1 and ":" not in label else ()


def _numbered(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(PLACES.index(word) + 1) if word in [*PLACES] else word for word in words)


def _names(label: tuple[str, ...], made: list[tuple[str, ...]]) -> bool:
    """Whether a label is the beginning or the end of what names something."""
    return bool(label) and any(label in (one[: len(label)], one[-len(label) :]) for one in made)


def _pair(row: dict[str, Any], layout: Layout, better: str, worse: str) -> dict[str, Any]:
    """A row in the one form; `better` and `worse` lead to its answers. Raises LeftOut with the reason if it is none."""
    where = " + ".join(layout.prompt)
    prompt, *sides = _prompt(row, layout), lookup(row, better), lookup(row, worse)
    tools = [tools for tools in map(_own_tools, sides) if tools]
    if len(tools) == 2 and tools[0] != tools[1]:
        raise LeftOut("the two answers come with different tools")
    lists = [found for found in map(messages.texts_of, (prompt, *sides)) if found]
    if len(lists) == 3:
        if not layout.name and max(map(len, lists)) > 1:
            raise LeftOut(f"{where}, {better} and {worse} are lists of texts, and nothing tells whose turns these are")
        prompt, sides = None, [_arena(lists[0], side) for side in lists[1:]]
    prompt, sides, _ = dialogues.as_turns(prompt, sides)
    chosen = messages.to_messages(sides[0], better, "assistant")
    rejected = messages.to_messages(sides[1], worse, "assistant")
    own = [] if is_missing(prompt) and prompt != "" else messages.to_messages(prompt, where, "user")
    firsts = [[turn["role"] for turn in side[:2]] for side in (chosen, rejected)]
    if own and chosen[0] == rejected[0] and firsts == [["system", "assistant"]] * 2:
        own, chosen, rejected = [chosen[0], *own], chosen[1:], rejected[1:]
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        if not own:
            raise LeftOut(f"{where} is missing" if where else layouts.QUESTIONS["no prompt"].format(better, worse))
        if not messages.holds(lookup(row, layout.history)):  # after which "None" can be a reply
            for name in layout.prompt:
                _text(row, name)
        prompt = own
    elif len(rejected) == 1:  # ms-swift: only the last turn differs
        prompt, chosen = _with_own(own, chosen[:-1], where), chosen[-1:]
    else:
        found = extract_prompt({"chosen": chosen, "rejected": rejected})
        prompt, chosen, rejected = _with_own(own, found["prompt"], where), found["chosen"], found["rejected"]
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    prompt, earlier = prompt[len(system) :], _earlier(row, layout)
    if system and any(turn["role"] == "system" and turn not in system for turn in earlier):
        raise LeftOut(f"{layout.system} and the prompt hold two system turns that differ")
    talk = [turn for turn in earlier if turn["role"] != "system"]
    system = system or [turn for turn in earlier if turn["role"] == "system"]
    prompt = [*system, *(talk if prompt[: len(talk)] != talk else ()), *prompt]  # the prompt may hold the talk already
    messages.check_roles(prompt, chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _with_own(own: list[dict[str, Any]], shared: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """What two whole dialogues share, with the system turn of the row's prompt. Raises LeftOut if that asks more."""
    texts = [" ".join(turn["content"].split()) for turn in own if turn["role"] == "user"]
    talk = " ".join(" ".join(turn["content"].split()) for turn in shared)
    if shared and not all(text in talk for text in texts):
        raise LeftOut(f"{where} is not in the two dialogues; columns={{'prompt': []}} takes what they share")
    system = [turn for turn in own if turn["role"] == "system"]
    return shared if shared and shared[0]["role"] == "system" else [*system, *shared]


def _ranked(row: dict[str, Any], layout: Layout, every: bool) -> list[dict[str, Any]]:
    """Pairs out of a list of answers with scores or ranks: the best against the worst, or each against each."""
    (name,), (by,) = layout.answers, layout.by
    answers, numbers = opened(lookup(row, name)), opened(lookup(row, by))
    if not isinstance(answers, list):
        raise LeftOut(f"{name} is {messages.kind_of(answers)}, not a list of answers")
    objects = [answer if isinstance(answer, dict) else {layout.text: answer} for answer in answers]
    if isinstance(numbers, list):  # a number for each answer, in a column of their own
        if len(numbers) != len(answers):
            raise LeftOut(f"{name} and {by} have different lengths")
        objects = [{**answer, by.split(" | ")[0]: number} for answer, number in zip(objects, numbers, strict=True)]
    scores, other = _scores(objects, by.split(" | ")), "rank" if layout.kind == "score" else "score"
    both = [(x, y) for x, y in zip(scores, _scores(objects, [other]), strict=True) if x is not None and y is not None]
    if any((x[0] - y[0]) * (x[1] - y[1]) > 0 for x, y in itertools.combinations(both, 2)):
        raise LeftOut(f"{by} and {other} of {name} say different things")
    sign, found = (1 if layout.kind == "score" else -1), zip(scores, objects, strict=True)
    items = [(sign * score, lookup(answer, layout.text)) for score, answer in found if score is not None]
    items.sort(key=lambda item: -item[0])
    if len(items) < 2:
        held = visible(str([lookup(answer, by) for answer in objects]), 60)
        raise LeftOut(f"fewer than two answers with a score ({by}: {held})")
    if items[0][0] == items[-1][0]:
        raise LeftOut("tie: all answers have one score")
    two = itertools.combinations(items, 2) if every else [(items[0], items[-1])]
    pairs = [{**row, "chosen": better, "rejected": worse} for (high, better), (low, worse) in two if high > low]
    return [_pair(pair, layout, "chosen", "rejected") for pair in pairs]


def _scores(answers: list[dict[str, Any]], names: list[str]) -> list[float | None]:
    """The numbers of the first name that all answers have; raises LeftOut if they have some of one, some of another."""
    scores = {name: [number_of(lookup(answer, name)) for answer in answers] for name in names}
    used = {name: numbers for name, numbers in scores.items() if any(number is not None for number in numbers)}
    whole = [numbers for numbers in used.values() if None not in numbers]
    if len(used) > 1 and not whole:
        raise LeftOut(f"the answers have scores of several kinds ({', '.join(used)}), and none that all of them have")
    return [*whole, *used.values(), [None] * len(answers)][0]


class _Reader:
    """What one look at every row tells: the layouts, the types of the other columns, what the values of a preference
    mean. `rows()` then yields every row in the one form, or with the reason why it is left out."""

    def __init__(self, source: Source, given: dict[str, Any]):
        self.source, self.given = source, given
        self.layout_of = functools.cache(lambda names: layouts.find_layout(names, given["columns"], given["scores"]))
        question = self._look(set())
        if question and (empty := {name for name, kinds in self.kinds.items() if not kinds}):
            question = self._look(empty)  # once more, without the columns that hold nothing
        if not self.count:
            raise UserError(f"{source.name} has no rows.")
        try:
            if question:
                raise question
            self._check_columns()
            for judge in self.judges.values():
                judge.settle()
        except UserError as error:
            raise UserError(f"{source.name}: {error}") from None
        taken = {""}.union(*(layout.columns(self.kinds) for layout in self.judges))
        others = {name: kinds for name, kinds in self.kinds.items() if kinds and name not in taken}
        ours = {*WORDS["reserved"], *(() if self.tools else ("tools",))}
        self.kept = {name: f"source_{name}" if name in ours else name for name in others}  # what they are called here
        held = ((name, " ".join(kind.__name__ for kind in kinds)) for name, kinds in others.items())
        typed = {name: Value(WORDS["types"][kind]) if kind in WORDS["types"] else Json() for name, kind in held}
        # A struct would give every row the keys of all, as None.
        typed |= {name: kind for name, kind in (source.features or {}).items() if kind}
        typed |= dict.fromkeys(("tools", "chat_template_kwargs"), Json())
        extras = {here: typed[name] for name, here in self.kept.items()}
        self.calls = "tools" in extras or (self.calls and self.tools)
        extras |= {"tools": Json()} if self.calls else {}
        sides = dict.fromkeys(SIDES, messages.WHOLE_MESSAGES if self.whole else messages.MESSAGES)
        self.features = Features({**sides, "origin": Value("string"), **extras, "left_out": Value("string")})

    def _look(self, empty: set[str]) -> UserError | None:
        """See every row, without these columns. Returns the first question about a row's columns."""
        self.empty = empty
        self.judges: dict[Layout, Judge] = {}  # in each, the rows of this layout
        self.marks: Counter[str] = Counter()  # of dialogues that are written into one text, except Anthropic's
        self.count, self.quoted, self.whole, self.tools, self.calls, question = 0, 0, False, True, False, None
        self.kinds: dict[str, set[type]] = defaultdict(set, {name: set() for name in self.source.features or ()})
        for origin, row in self.source.rows():
            self.count += 1
            if not isinstance(row, dict):
                continue
            if ".tsv" in origin:
                self.quoted += sum(cell[:1] == cell[-1:] == '"' != cell for cell in map(str, row.values()))
            for name, value in row.items():
                kinds = self.kinds[name]
                if not is_missing(value):  # a whole number of more than 64 bits is an object too
                    kinds.add(object if isinstance(value, int) and abs(value) >= 2**63 else type(value))
            try:
                if layout := self._layout(row):
                    self._see(row, layout)
            except UserError as error:
                question = question or error
        return question

    def _see(self, row: dict[str, Any], layout: Layout) -> None:
        if layout not in self.judges:
            self.judges[layout] = Judge(layout, row, self.given)
        self.judges[layout].see(row)
        cells = [lookup(row, path) for path in (*layout.prompt, *layout.answers)]
        self.whole = self.whole or any(map(messages.has_more, (*cells, lookup(row, layout.history))))
        if any(isinstance(cell, str) and cell[:2] != "\n\n" and dialogues.may_begin(cell) for cell in cells):
            with contextlib.suppress(LeftOut):
                name = dialogues.as_turns(_prompt(row, layout), cells[len(layout.prompt) :])[2]
                self.marks += Counter([name] if name else ())
        tools = _tools(row, layout)
        self.tools, self.calls = self.tools and {dict}.issuperset(map(type, tools)), self.calls or bool(tools)

    def _check_columns(self) -> None:
        names = list(self.kinds)
        wanted = [*itertools.chain.from_iterable(self.given["columns"].values()), *self.given["scores"]]
        missing = [f"there is no column {name!r}" for name in wanted if name not in names]
        if missing or not self.judges:
            unread = "the names of the columns make no preference pair" if names else "no row is an object"
            if not missing and (two := layouts.two_answers(names)):
                scores = [*layouts.twins(names, two, "scores"), ("...", "...")][0]
                raise asked("no preference", names=listed(two), columns=listed(names), scores=scores)
            raise asked("no pair", what=missing[0] if missing else unread, names=listed(names))
        for name, kinds in (("wins", {"preference", "votes"}), ("first_wins", {"preference"})):
            if self.given[name] is not None and not kinds & {layout.kind for layout in self.judges}:
                raise asked("nothing to judge", read="; ".join(map(str, self.judges)))
        # One place of the prompt for all rows with these answers: an empty one is never filled from another column.
        for answers in dict.fromkeys(layout.answers for layout in self.judges):
            places = {layout.prompt for layout in self.judges if layout.answers == answers} - {()}
            whole = max(places, key=len, default=())  # of which a row may lack parts, as Alpaca's input
            given = self.given["columns"].get("prompt", whole[:1])
            if not all(set(place) <= set(whole) and place[0] in given for place in places):
                raise asked("prompt elsewhere", names=listed(sorted(map(" + ".join, places))))

    def _layout(self, row: dict[str, Any]) -> Layout | None:
        """By the columns of the row; if these hold no answers or have two readings, by those that hold something."""
        names, layout = tuple(name for name in row if name not in self.empty), None
        try:
            layout = self.layout_of(names)
            if layout and any(lookup(row, path) is not None for path in layout.answers):
                return layout
        except UserError:
            if None not in map(row.get, names):
                raise
        return self.layout_of(tuple(name for name, value in row.items() if value is not None)) or layout

    def reading(self) -> list[str]:
        """How the columns were read, a line for each layout and each preference; nothing for the three plain ones."""
        used, lines = {"origin", "chat_template_kwargs", *(["tools"] if self.tools else [])}, []
        # A number is named, too, if it might say that chosen and rejected are exchanged.
        texts = [name for name in self.kept if self.kinds[name] - {int, float} or layouts.says("doubts", name)]
        texts = [name for name in texts if name not in used]
        for layout, judge in self.judges.items():
            if str(layout).removeprefix("prompt <- prompt; ") == str(Layout()) and not texts:
                continue
            name = f", read as {layout.name}" if layout.name else ""
            read = [f"{layout}", *([judge.reading()] if judge.judges else [])]
            read = [_used(line, judge.sample) for line in read] if layout.name else read
            lines += [f"{self.source.name}: {judge.count} row{'s' * (judge.count != 1)}{name}. {read[0]}", *read[1:]]
        marks = ", ".join(f"{name} ({count})" for name, count in self.marks.most_common())
        lines += [f"turns <- marks in the texts: {marks}"] if marks else []
        if self.quoted:
            lines.append(layouts.QUESTIONS["quotes"].format(name=self.source.name, count=self.quoted))
        return [*lines, f"not read: {listed(texts)}"] if texts else lines

    def _row(self, row: Any) -> list[dict[str, Any]]:
        """The pairs of a row, without their origin. Raises LeftOut with the reason if it is none."""
        if isinstance(row, LeftOut):
            raise row
        if not isinstance(row, dict):
            raise LeftOut(f"the row is {messages.kind_of(row)}, not an object")
        if row and all(name == value for name, value in row.items()):
            raise LeftOut("the row repeats the names of the columns")
        if (layout := self._layout(row)) is None:
            raise LeftOut("no chosen and rejected, nor two answers with a preference")
        if media := next((name for name in WORDS["media"] if messages.holds(row.get(name))), None):
            raise LeftOut(f"the row has {media}; only text is trained here")
        if not {"chosen", "rejected"} <= self.given["columns"].keys() and (texts := _labels(row, layout)):
            raise LeftOut(layouts.QUESTIONS["labels"].format(*layout.answers, texts=", ".join(texts)))
        if layout.kind in RANKED:
            pairs = _ranked(row, layout, self.given["ranked"] == "all")
        else:
            pairs = [_pair(row, layout, *self.judges[layout].order(row))]
        extras = {here: row.get(name) for name, here in self.kept.items()}
        if "chat_template_kwargs" in extras:
            extras["chat_template_kwargs"] = messages.read_template_kwargs(extras["chat_template_kwargs"])
        if self.calls:
            extras["tools"] = _tools(row, layout) or None
        return [{**extras, **pair} for pair in pairs]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of the source: its pairs, or one with the reason why it is left out."""
        nothing = dict.fromkeys(self.features) | dict.fromkeys(SIDES, [])
        for origin, row in self.source.rows():
            try:
                for pair in self._row(row):
                    yield {**nothing, **pair, "origin": origin, "left_out": ""}
            except LeftOut as reason:
                yield {**nothing, "origin": origin, "left_out": str(reason)}


def _used(line: str, row: dict[str, Any]) -> str:
    """The line with one name for each path of formats.yaml: of its options, the one that this row has."""
    answers = [item for value in row.values() if isinstance(value, list) for item in value[:1]]
    rows = [row, *(item for item in answers if isinstance(item, dict))]

    def used(found: re.Match) -> str:
        options = found[0].split(" | ")
        return next((option for option in options for one in rows if lookup(one, option) is not None), options[0])

    return re.sub(r"[^\s,;|]+(?: \| [^\s,;|]+)+", used, line).replace(".*", "")


def _take_out(table: Dataset, reader: _Reader, reading: list[str], bundled: bool) -> Dataset:
    """The pairs of a table from `_Reader.rows`, with a report. Prints what is not plain. UserError if there is none."""
    places = defaultdict(list)  # of each reason; "" for pairs
    for place, reason in enumerate(table["left_out"][:]):
        places[reason].append(place)
    kept = places.pop("", [])
    first = table["origin"]
    left_out = {why: {"count": len(rows), "origins": [first[row] for row in rows[:5]]} for why, rows in places.items()}
    report = LoadReport(reader.count, len(kept), left_out, bundled, reading)
    if not kept:
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
    """Preference pairs in one form, or a UserError that says what to pass. A row of the source may hold

    {formats}

    Args:
        source: a file (JSONL, JSON, CSV, TSV, Parquet, Arrow; also gzipped), a folder or a pattern of such files, a
            `save_to_disk` folder, a list of dicts, a Dataset, a data frame, a hub name; else `DPO_DATA`, or our pairs.
        split: which one to take, of a hub name or a DatasetDict.
        columns: the source's columns by our names: {"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ...,
            "a": ..., "b": ..., "preference": ...}, and "system". A list of columns as the prompt is joined.
        wins: what each value of the preference means: {1: "first", 2: "second", 3: "tie", "skip": None} (None leaves
            rows out), or a rule for numbers: "1 to 3 first, 4 to 6 second" or "< 0 first, 0 tie, > 0 second".
        scores: two columns with a number for each answer; the higher one is better.
        ranked: of a list of ranked answers, "ends" pairs the best with the worst, "all" each with each.
        first_wins: the short form of `wins` for a column of two values: the one that means the first answer.

    Returns:
        A Dataset with `prompt`, `chosen` and `rejected` (lists of {role, content}; answers begin with the assistant),
        `origin` ("pairs.jsonl:12" is a line, "pairs.parquet row 12" a row) and the source's other columns as they were.

    >>> load_pairs([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}])[0]["prompt"]
    [{'role': 'user', 'content': '2 + 2?'}]
    """
    roles = layouts.check_arguments({} if columns is None else columns, wins, scores, ranked, first_wins)
    given = {"columns": roles, "wins": wins, "scores": tuple(scores or ()), "ranked": ranked, "first_wins": first_wins}
    if source is None:
        named = setting("DPO_DATA")
        source = BUNDLED_PAIRS if named is None else PROJECT / named if (PROJECT / named).exists() else named
    name = printable(Path(source).name) if isinstance(source, str | Path) else "The source"
    try:
        found = open_source(source, split)
        name = found.name
        reader = _Reader(found, given)
        with quiet_progress(reader.count):
            if found.key is None:
                table = Dataset.from_list(list(reader.rows()), features=reader.features)
            else:
                # Kept on disk by datasets under the name of the content and of all that reading depends on.
                key = xxhash.xxh3_128(repr((found.key, name, sorted(given.items()), CODE)).encode()).hexdigest()
                table = Dataset.from_generator(reader.rows, features=reader.features, fingerprint=key)
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        raise UserError(f"{name} can't be read ({reason_of(error)}).") from None
    path = Path(source) if isinstance(source, str | Path) else None
    known = (path and path.parent == BUNDLED_PAIRS.parent) or (isinstance(source, Dataset) and load_report(source))
    return _take_out(table, reader, [] if known else reader.reading(), bundled=path == BUNDLED_PAIRS)


_formats = (
    f"   - {entry['name']}: {', '.join(entry['columns'])}{' (no pairs: refused)' * ('refused' in entry)}"
    for entry in layouts.FORMATS
)
_help = layouts.USUAL["help"].replace("{formats}", "\n".join(_formats)).strip()
load_pairs.__doc__ = (load_pairs.__doc__ or "").replace("{formats}", _help.replace("\n", "\n    "))
