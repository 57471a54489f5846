"""Which columns hold the prompt, the two answers, and what says which is better: by formats.yaml, else by usual names.
If two columns could hold the same thing, the reader is asked."""

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from helpers.common import UserError, visible
from helpers.data import tables

(USUAL, VERDICTS, FORMATS), (QUESTIONS,) = tables("formats.yaml"), tables("questions.yaml")
OBJECT = re.compile(r"""(?:[\s"]|\\.)*[{\[]""")  # or a list, in JSON or in JSON in JSON
HALF_EMOJI = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON, or a whole one
ANSWER = re.compile(r"((?:response|answer|completion|output|reply|candidate|conversation)s?[_ -]?)(a|b|0|1|2)", re.I)
PART = re.compile(r"\d+|[A-Z]?[^\W\d_A-Z]+|[A-Z]+")
MOST_NAMES = 20  # names or values in a message
RANKED = ("score", "rank")
TOLD_BY = ("preference", "scores", "one_hot", "votes", *RANKED)  # of what tells the better answer


@dataclass(frozen=True, eq=False)
class Layout:
    """Where one kind of source keeps things; formats.yaml says what each field means."""

    name: str = ""
    prompt: tuple[str, ...] = ()
    system: str = ""
    history: str = ""
    tools: str = ""
    answers: tuple[str, ...] = ("chosen", "rejected")
    text: str = ""
    kind: str = ""  # one of TOLD_BY; "" if the first answer is the better
    by: tuple[str, ...] = ()
    status: str = ""
    question: str = ""
    wins: str | tuple[tuple[Any, str], ...] | None = None

    def columns(self, names: Iterable[str]) -> set[str]:
        """The columns, of these names, that are read."""
        paths = (*self.prompt, self.system, self.history, self.status, self.tools, *self.answers, *self.by)
        return {_root(option, names) for path in paths for option in _options(path, names)}

    def __str__(self) -> str:
        """What is taken for what."""
        before = {"prompt": " + ".join(self.prompt), "system turn": self.system, "earlier turns": self.history}
        sides = f"chosen/rejected <- {', '.join(self.answers)} by {', '.join(self.by)}"
        if not self.kind:
            sides = "chosen <- {}; rejected <- {}".format(*self.answers)
        return "; ".join([*(f"{what} <- {where}" for what, where in before.items() if where), sides])


_one_of_each = functools.cache(Layout)  # so that equal layouts are one object, which is fast to look up


def asked(what: str, /, **values: Any) -> UserError:
    """The error with this text of questions.yaml."""
    return UserError(QUESTIONS[what].format(**values))


def shortened(texts: list[str]) -> str:
    """Texts for a message, at most MOST_NAMES of them."""
    return ", ".join(texts[:MOST_NAMES]) + (f" and {len(texts) - MOST_NAMES} more" if len(texts) > MOST_NAMES else "")


def listed(names: Iterable[str]) -> str:
    """Column names for a message, at most MOST_NAMES of them."""
    return shortened([repr(visible(str(name), 40)) for name in names])


def plain_value(value: Any) -> Any:
    """The same value as a table can hold it: arrays as lists, NaN as None, half an emoji as U+FFFD."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {str(plain_value(key)): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain_value(value.tolist())
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def opened(value: Any) -> Any:
    """What a cell holds as JSON, or as JSON in JSON; the cell itself if it is no text, or no JSON object or list."""
    if isinstance(value, str) and OBJECT.match(value):  # a cell of a CSV file
        with contextlib.suppress(ValueError, RecursionError):
            found = opened(plain_value(json.loads(value)) if HALF_EMOJI.search(value) else json.loads(value))
            return value if isinstance(found, str) else found
    return value


def _options(path: str, names: Iterable[str]) -> list[str]:
    """The paths that a path of formats.yaml lists; a reader's own column may have a bar in its name."""
    return [path] if path in names else path.split(" | ")


def _root(path: str, names: Iterable[str]) -> str:
    """The column of `names` that the path starts in; its own name may have dots. Empty if there is none."""
    parts = path.split(".")
    starts = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((start for start in starts if start in names), "")


def lookup(row: dict[str, Any], path: str) -> Any:
    """What `row` has under a column's name, or a path as in formats.yaml; None if it is not there."""
    if path in row or not ("." in path or "|" in path):
        return row.get(path)
    for option in path.split(" | "):
        root = _root(option, row)
        values, many = [row.get(root)], False
        for part in filter(None, option[len(root) :].split(".")):
            values = [opened(value) for value in values]
            if part == "*":
                values, many = [item for value in values if isinstance(value, list) for item in value], True
            elif part.isdigit():
                values = [value[int(part)] for value in values if isinstance(value, list) and len(value) > int(part)]
            else:
                values = [value.get(part) for value in values if isinstance(value, dict)]
        if root and (many or (values and values[0] is not None)):
            return values if many else values[0]
    return None


def _made(names: tuple[str, ...], entry: dict[str, Any]) -> Layout:
    """The layout of an entry as in formats.yaml; of a path's options, those in the first column that is there."""

    def there(role: str) -> tuple[str, ...]:
        paths = []
        for path in entry.get(role, ()):
            roots = {option: _root(option, names) for option in _options(path, names)}
            first = next(filter(None, roots.values()), None)
            paths.append(" | ".join(option for option, root in roots.items() if root == first))
        return tuple(filter(None, paths))

    kind, wins = next((kind for kind in TOLD_BY if kind in entry), ""), entry.get("wins")
    return _one_of_each(
        **{key: entry[key] for key in ("name", "tools", "text", "status", "question") if key in entry},
        **{key: "".join(there(key)) for key in ("system", "history")},
        **{key: there(key) for key in ("prompt", "answers")},
        kind=kind,
        by=tuple(entry.get(kind, ())),
        wins=tuple(wins.items()) if isinstance(wins, dict) else wins,
    )


def _found(names: tuple[str, ...], columns: dict[str, list[str]], role: str) -> list[str]:
    """The columns for a role, those that are asked for or have usual names; capitals count if there is a choice."""
    found: list[str] = []
    for name in columns.get(role, USUAL[role]):
        same = [other for other in names if other == name or (role not in columns and other.lower() == name)]
        if len(same) > 1 and name not in same:
            raise asked("columns of two cases", names=listed(same))
        found += [name] if name in same else same
    return found


def _prompt_columns(names: tuple[str, ...], taken: list[str]) -> list[str]:
    found = [name for name in _found(names, {}, "prompt") if name not in taken]
    alpaca = {name.lower() for name in found} == {"instruction", "input"}  # two parts of one question
    if len(found) > 1 and found[0].lower() != "prompt" and not alpaca:
        raise asked("several prompts", names=listed(found), one=found[0], two=found[:2])
    return found if alpaca else found[:1]


def two_answers(names: Iterable[str]) -> list[str]:
    """Two columns of answers by their usual names; raises UserError if there are more such pairs."""
    found = sorted(filter(ANSWER.fullmatch, names), key=str.lower)
    families = (list(group) for _, group in itertools.groupby(found, lambda name: name.lower()[:-1]))
    two = [pair for pair in families if len(pair) == 2]
    if len(two) > 1:
        raise asked("two sets of answers", names=listed([*two[0], *two[1]]))
    return two[0] if two else []


@functools.lru_cache(10_000)
def parts(name: str) -> tuple[str, ...]:
    """The words and numbers in a name, in small letters: response, a, 1 for "responseA_1"."""
    return tuple(part.casefold() for part in PART.findall(name))


def apart(one: str, two: str) -> tuple[str, str]:
    """The one part in which two names differ, as each has it; two empty texts if they differ in more."""
    differ = [pair for pair in zip(parts(one), parts(two), strict=False) if len(set(pair)) > 1]
    return differ[0] if len(differ) == 1 and len(parts(one)) == len(parts(two)) else ("", "")


@functools.lru_cache(10_000)
def says(what: str, name: str) -> bool:
    """Whether a column's name has a word of this entry of formats.yaml."""
    return bool(re.search(USUAL[what], " ".join(parts(name))))


def twins(names: Iterable[str], answers: Iterable[str], what: str) -> list[tuple[str, str]]:
    """Pairs of columns that differ as those of the answers do and have a word of `what`, like model_a and model_b."""
    found, ends = {parts(name): name for name in names if says(what, name)}, apart(*answers)
    spelled = (("a", "b"), ("1", "2"))  # model_1 may have written response_a
    for one, two in dict.fromkeys((ends, *spelled)) if ends in spelled else (ends,):
        others = {made: tuple(two if part == one else part for part in made) for made in found if one in made}
        if twin := [(found[made], found[other]) for made, other in others.items() if other in found]:
            return twin
    return []


def _two_names(value: Any) -> bool:
    names = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return names and [len(value), len(set(value))] == [2, 2]


def check_arguments(columns: Any, wins: Any, scores: Any, ranked: Any, first_wins: Any) -> dict[str, list[str]]:
    """The columns of each role. Raises UserError for arguments of `load_pairs` that can't be meant."""
    keys = columns if isinstance(columns, dict) else [columns]
    if no_roles := [name for name in keys if keys is not columns or name not in USUAL["keys of columns="]]:
        raise asked("roles", names=listed(no_roles))
    if {"chosen", "rejected"} & set(keys) and {"a", "b", "preference"} & set(keys):
        raise asked("roles of two kinds", names=listed(keys))
    several = {"prompt"} if isinstance(columns.get("prompt"), list | tuple) else ()
    by_role = {role: list(name) if role in several else [name] for role, name in columns.items()}
    names = sum(by_role.values(), [])
    twice = [name for name in names if names.count(name) > 1]
    told = (("wins=", wins), ("first_wins=", first_wins), ("scores=", scores))
    said = [name for name, value in told if value is not None]
    wrong = {
        "no column names": not all(isinstance(name, str) for name in names),
        "column twice": twice,
        "two scores": scores is not None and not _two_names(scores),
        "kind of wins": not isinstance(wins, dict | str | None),
        "two judges": len(said) > 1,
        "ranked": ranked not in ("ends", "all"),
    }
    for question in filter(wrong.get, wrong):
        raise asked(question, columns=columns, twice=twice, scores=scores, wins=wins, said=said, ranked=ranked)
    return by_role


def find_layout(names: tuple[str, ...], columns: dict[str, list[str]], scores: tuple[str, ...]) -> Layout | None:
    """The layout that these column names make, or None. Raises UserError if they have two readings or none by kind."""
    plain = all(_found(names, columns, role) for role in ("chosen", "rejected"))
    free = columns.keys() <= {"prompt", "system", "preference"} and not plain
    layout = _of_format(names, columns, scores) if free else None
    answers, by = (layout.answers, {}) if layout else _answers(names, columns, scores)
    if scores and answers:
        if any(says("ranks", name) for name in scores):
            raise asked("ranks", names=listed(scores))
        if apart(*scores) == apart(*answers)[::-1] != ("", ""):
            raise asked("scores exchanged", scores=scores, answers=answers)
    if layout or not answers:
        return layout
    if answers[0] == answers[1]:
        raise asked("column twice", twice=answers)
    prompt = columns["prompt"] if "prompt" in columns else _prompt_columns(names, sum(columns.values(), []))
    history = ["history"] if "history" not in prompt else []
    by = {"system": _system(names, columns), "history": history, **by}
    return _made(names, {"prompt": prompt, "answers": answers, **by})


def _of_format(names: tuple[str, ...], columns: dict[str, list[str]], scores: tuple[str, ...]) -> Layout | None:
    """The layout of the first public format that has these columns; raises UserError if its rows are no pairs. `scores`
    compare its two answers if their names differ as those do, and no other rule finds answers."""
    asks = {name for name in names if name.lower() in ("history", *USUAL["prompt"])}
    for entry in FORMATS:
        own = entry.get("scores") == [*scores] and asks <= set(entry["columns"])
        if scores and not own:
            if len(entry.get("answers", ())) != 2 or two_answers(names):
                continue
            entry = {key: entry[key] for key in entry.keys() - {*TOLD_BY, "wins", "status"}} | {"scores": scores}
        there = set(entry["columns"]) <= set(names) and not set(entry.get("without", ())) & set(names)
        if not there or columns.get("preference", entry.get("preference")) != entry.get("preference"):
            continue
        if "refused" in entry and not (entry.get("of one answer") and two_answers(names)):
            raise UserError(entry["refused"])
        layout = _made(names, {"system": _system(names, columns)} | entry | columns)
        if len(layout.answers) < len(entry.get("answers", "ab")) or (layout.kind in RANKED and two_answers(names)):
            continue  # other answers
        if scores and ("" in (ends := apart(*layout.answers)) or set(apart(*scores)) != set(ends)):
            continue  # nothing tells whose they are
        if not (scores or layout.kind in ("", *RANKED) or "preference" in columns):
            others = {*_found(names, {}, "preference"), *(name for name in names if says("verdict", name))}
            if others := [name for name in names if name in others - layout.columns(names)]:
                raise asked("several preferences", names=listed([*layout.by, *others]))
        others = [name for name in names if says("better answer", name) and name not in layout.columns(names)]
        if others and layout.answers[0] in ("response", "output"):
            raise asked("several answers", names=listed(layout.answers), others=listed(others), answers=layout.answers)
        return layout
    return None


def _system(names: tuple[str, ...], columns: dict[str, list[str]]) -> list[str]:
    """The column of the system turn, if there is one."""
    system = _found(names, columns, "system")
    if len(system) > 1:
        raise asked("several system turns", names=listed(system), one=system[0])
    return system


def _answers(names: tuple[str, ...], columns: dict[str, list[str]], scores: tuple[str, ...]) -> tuple[list, dict]:
    """The two columns of answers, and what tells the better one; no columns if the names tell of no pair."""
    if not scores and not {"a", "b", "preference"} & set(columns):
        sides = [_found(names, columns, role) for role in ("chosen", "rejected")]
        if all(sides):
            answers, others = [side[0] for side in sides], [name for side in sides for name in side[1:]]
            if answers == ["chosen", "rejected"] and min(map(len, sides)) == 1:  # no other pair
                others = []
            if others := [*others, *([] if {"chosen", "rejected"} & set(columns) else two_answers(names))]:
                raise asked("several answers", names=listed(answers), others=listed(others), answers=answers)
            return answers, {}
    two = [] if {"a", "b"} <= set(columns) else two_answers(names)
    if scores and not two and not {"a", "b"} & set(columns):  # compared instead of believed
        sides = [_found(names, columns, role)[:1] for role in ("chosen", "rejected")]
        two = sum(sides, []) if all(sides) else []
    answers = [columns.get(role, [name])[0] for role, name in zip("ab", two or ("", ""), strict=True)]
    found = _found(names, columns, "preference") or [name for name in names if says("yes or no", name)]
    found = [name for name in found if name not in answers]
    if not set(answers) <= set(names) or not (scores or found):
        return [], {}
    if len(found) > 1 and not scores:
        raise asked("several preferences", names=listed(found))
    return answers, {"scores": scores} if scores else {"preference": found}
