"""Which columns of a source hold the prompt, the two answers, and what says which is better.

Public formats that have names of their own are a table, formats.yaml. All others are found by usual column names; if
two columns could hold the same thing, the reader is asked.
"""

import contextlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helpers.common import UserError, visible

FORMATS = yaml.safe_load(Path(__file__).with_name("formats.yaml").read_text(encoding="utf-8"))
PROMPT_NAMES = (
    "prompt question instruction query input context conversations conversation messages "
    "trajectory context_messages".split()
)
CHOSEN_NAMES = "chosen better_response preferred chosen_response preferred_response response_chosen".split()
REJECTED_NAMES = (
    "rejected worse_response dispreferred rejected_response dispreferred_response response_rejected".split()
)
SYSTEM_NAMES = "system system_prompt".split()
PREFERENCE_NAMES = (
    "preference preferred winner choice better label labels vote better_response_id overall_preference".split()
)
ANSWER = re.compile(r"((?:response|answer|completion|output|reply|candidate|conversation)s?[_ -]?)(a|b|0|1|2)", re.I)
SHOWN_NAMES = 20


@dataclass(frozen=True)
class Layout:
    """Where one kind of source keeps things; formats.yaml says what each field means.

    `prompt` has several columns if they are to be joined. `read`: the source's columns that are read.
    """

    name: str = ""
    prompt: tuple[str, ...] = ()
    system: str = ""
    history: str = ""
    tools: str = ""
    chosen: str = ""
    rejected: str = ""
    a: str = ""
    b: str = ""
    preference: str = ""
    wins: str | tuple[tuple[Any, str], ...] | None = None
    scores: tuple[str, ...] = ()
    one_hot: tuple[str, ...] = ()
    votes: tuple[str, ...] = ()
    status: str = ""
    ranked: tuple[tuple[str, str], ...] = ()
    read: frozenset[str] = frozenset()

    def answers(self) -> tuple[str, ...]:
        """Where the answers stand."""
        return (
            (dict(self.ranked)["list"],)
            if self.ranked
            else (self.a, self.b)
            if self.a
            else (self.chosen, self.rejected)
        )

    def __str__(self) -> str:
        """What is taken for what; formats.yaml's bars and stars are left out."""
        prompt = f"prompt <- {' + '.join(self.prompt)}; " if self.prompt else ""
        if self.system:
            prompt += f"system turn <- {self.system}; "
        if self.history:
            prompt += f"earlier turns <- {self.history}; "
        if self.ranked:
            ranked = dict(self.ranked)
            return f"{prompt}chosen/rejected <- {ranked['list']} by {ranked.get('score') or ranked['rank']}"
        if self.chosen:
            return f"{prompt}chosen <- {self.chosen}; rejected <- {self.rejected}"
        by = self.preference or ", ".join(self.scores or self.one_hot or self.votes)
        return f"{prompt}chosen/rejected <- {self.a}, {self.b} by {by}"


def listed(names: list[str]) -> str:
    """Column names for a message, at most SHOWN_NAMES of them."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(repr(visible(str(name), 40)) for name in names[:SHOWN_NAMES]) + more


def opened(value: Any) -> Any:
    """What a cell holds as JSON; the cell itself if it is no text, or no JSON object or list."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # a cell of a CSV file
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _root(path: str, names: Iterable[str]) -> str:
    """The column of `names` that the path starts in; its own name may have dots. Empty if there is none."""
    parts = path.split(".")
    starts = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((start for start in starts if start in names), "")


def lookup(row: dict[str, Any], path: str) -> Any:
    """What stands in `row` under a column's name, or a path as in formats.yaml; None if it is not there."""
    if path in row or not path:
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


def _made(names: tuple[str, ...], **fields: Any) -> Layout:
    """The layout with these fields; of a path's options, those that start in a column are kept."""
    read = set()

    def there(path: str) -> str:
        options = [option for option in path.split(" | ") if _root(option, names)]
        read.update(_root(option, names) for option in options)
        return " | ".join(options)

    for key, value in fields.items():
        if key in ("prompt", "scores", "one_hot", "votes"):
            fields[key] = tuple(map(there, value))
        elif key == "ranked":
            read.update(_root(option, names) for path in dict(value).values() for option in path.split(" | "))
        elif key not in ("name", "wins"):
            fields[key] = there(value) if value else ""
    return Layout(**fields, read=frozenset(read - {""}))


def _of_table(names: tuple[str, ...], columns: dict[str, Any]) -> Layout | None:
    for entry in FORMATS:
        if set(entry["columns"]) <= set(names) and not set(entry.get("without", ())) & set(names):
            if "refused" in entry:
                raise UserError(entry["refused"])
            fields = {key: value for key, value in entry.items() if key not in ("columns", "without")}
            for key in ("scores", "one_hot", "votes"):
                fields[key] = tuple(fields.get(key, ()))
            fields |= columns
            given = fields.get("prompt", ())
            fields["prompt"] = (given,) if isinstance(given, str) else tuple(given)
            for key in ("wins", "ranked"):
                if isinstance(fields.get(key), dict):
                    fields[key] = tuple(fields[key].items())
            return _made(names, **fields)
    return None


class _Names:
    """Column names by role, without regard to case where that is certain."""

    def __init__(self, names: tuple[str, ...], columns: dict[str, Any]):
        self.names, self.columns = names, columns
        self.by_lower: dict[str, list[str]] = {}
        for name in names:
            self.by_lower.setdefault(name.lower(), []).append(name)

    def of(self, candidate: str) -> str | None:
        same = self.by_lower.get(candidate, [])
        if candidate in same or len(same) < 2:
            return candidate if candidate in same else next(iter(same), None)
        raise UserError(f"columns {listed(same)} differ in case only. Pass columns= with the one to read.")

    def pick(self, role: str, candidates: Iterable[str]) -> str:
        if role in self.columns:
            return self.columns[role] if self.columns[role] in self.names else ""
        return next(filter(None, map(self.of, candidates)), "")

    def prompt(self) -> tuple[str, ...]:
        if "prompt" in self.columns:
            given = self.columns["prompt"]
            return (given,) if isinstance(given, str) else tuple(given)
        found = [name for name in map(self.of, PROMPT_NAMES) if name and name not in self.columns.values()]
        if len(found) < 2 or found[0].lower() == "prompt":
            return tuple(found[:1])
        if {name.lower() for name in found} == {"instruction", "input"}:  # Alpaca's two parts of one question
            return tuple(found)
        raise UserError(
            f"several columns could hold the question: {listed(found)}. Pass columns={{'prompt': {found[0]!r}}} to "
            f"read one, or columns={{'prompt': {found[:2]!r}}} to join them by a line break, in this order."
        )

    def answers(self) -> list[str]:
        families: dict[str, list[str]] = {}
        for name in self.names:
            if found := ANSWER.fullmatch(name):
                families.setdefault(found[1].lower(), []).append(name)
        two = [sorted(pair, key=str.lower) for pair in families.values() if len(pair) == 2]
        if len(two) > 1:
            raise UserError(
                f"there are two sets of answers, {listed([*two[0], *two[1]])}. Pass columns={{'prompt': ..., 'a': ..., "
                "'b': ..., 'preference': ...} with the ones to read."
            )
        return two[0] if two else ["", ""]

    def preference(self, answers: list[str]) -> str:
        if "preference" in self.columns:
            return self.pick("preference", [])
        found = [name for name in map(self.of, PREFERENCE_NAMES) if name and name not in answers]
        if len(found) > 1:
            raise UserError(
                f"several columns could say which answer is better: {listed(found)}. Pass "
                "columns={'preference': ...} with one of them."
            )
        return found[0] if found else ""


def check_arguments(columns: Any, wins: Any, scores: Any, ranked: Any, first_wins: Any) -> None:
    """Raise UserError for arguments of `load_pairs` that can't be meant: of another kind, or two for one question."""
    roles = ("prompt", "system", "chosen", "rejected", "a", "b", "preference")
    if not isinstance(columns, dict) or set(columns) - set(roles):
        wrong = [name for name in columns if name not in roles] if isinstance(columns, dict) else [columns]
        raise UserError(
            f"columns= has the key {listed(wrong)}. Its keys are ours (prompt, system, chosen, rejected, or a, b, "
            "preference) and its values the names in the source."
        )
    lists = [name if role == "prompt" and isinstance(name, list | tuple) else [name] for role, name in columns.items()]
    names = [name for some in lists for name in some]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"columns= has {columns!r}; each value is the name of a column (prompt: or a list of names).")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"columns= has the column {twice[0]!r} twice.")
    if scores is not None and (isinstance(scores, str) or len(set(scores)) != 2 or len(scores) != 2):
        raise UserError(f"scores= is two columns, of the first and of the second answer, not {scores!r}.")
    if not isinstance(wins, dict | str | None):
        raise UserError(f"wins= is {{value: 'first', 'second', 'tie' or None}} or a rule in text, not {wins!r}.")
    given = {"wins=": wins, "first_wins=": first_wins, "scores=": scores}
    said = [name for name, value in given.items() if value is not None]
    if len(said) > 1:
        raise UserError(f"{' and '.join(said)} both say which answer is better. Pass one of them.")
    if ranked not in ("ends", "all"):
        raise UserError(f"ranked is 'ends' or 'all', not {ranked!r}.")


def find_layout(names: tuple[str, ...], columns: dict[str, Any], scores: tuple[str, ...]) -> Layout | None:
    """The layout that these column names make, or None; `columns` and `scores`, as in `load_pairs`, go first.

    Raises UserError, without the source's name, if the names can be read in two ways or hold no pairs by their kind.
    """
    ours = _Names(names, columns)
    plain = {"chosen", "rejected"} <= set(names)
    if not set(columns) - {"prompt", "system"} and not scores and not plain and (known := _of_table(names, columns)):
        return known
    system, history = ours.pick("system", SYSTEM_NAMES), "history" if "history" in names else ""
    if not {"a", "b", "preference"} & set(columns) and not scores:
        chosen, rejected = ours.pick("chosen", CHOSEN_NAMES), ours.pick("rejected", REJECTED_NAMES)
        if chosen and rejected:
            if "chosen" not in columns and "rejected" not in columns and (two := list(filter(None, ours.answers()))):
                raise UserError(
                    f"the answers could be in {listed([chosen, rejected])} or in {listed(two)}. Pass "
                    f"columns={{'chosen': {chosen!r}, 'rejected': {rejected!r}}} or columns={{'a': {two[0]!r}, "
                    f"'b': {two[1]!r}, 'preference': ...}}."
                )
            prompt = ours.prompt()
            history = "" if history in prompt else history
            return _made(names, prompt=prompt, system=system, history=history, chosen=chosen, rejected=rejected)
    two = ["", ""] if {"a", "b"} <= set(columns) else ours.answers()
    a, b = (columns.get(role, name) for role, name in zip("ab", two, strict=True))
    if not {a, b} <= set(names):
        return None
    preference = "" if scores else ours.preference([a, b])
    if not preference and not scores:
        return None
    prompt = ours.prompt()
    history = "" if history in prompt else history
    fields = {"prompt": prompt, "system": system, "history": history, "a": a, "b": b}
    return _made(names, **fields, preference=preference, scores=scores)
