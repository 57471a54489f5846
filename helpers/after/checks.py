"""Checks of a reply, which the panel of `retention` names as data. lm-eval loads this file alone: no import of ours."""

import json
import re
from collections.abc import Callable
from typing import Any


def words(text: str) -> list[str]:
    """The words of `text` in lower case; a number is one, and so is "it's"."""
    return re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text.lower())


def _json_keys(text: str, keys: list[str]) -> bool:
    try:
        found = json.loads(re.sub(r"^```\w*\n|```$", "", text.strip()))
    except (ValueError, RecursionError):  # the second if it is a thousand brackets
        return False
    return isinstance(found, dict) and set(keys) <= set(found)


def _numbers(text: str) -> list[str]:
    """Those of the first line that is not empty; models repeat the question before they answer."""
    return re.findall(r"\d+(?:\.\d+)?", text.strip().partition("\n")[0].replace(",", ""))


LISTED = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+\S", re.MULTILINE)  # a line of a list
CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "words_at_most": lambda text, value: 0 < len(words(text)) <= value,
    "words_at_least": lambda text, value: len(words(text)) >= value,
    "sentences_at_most": lambda text, value: bool(words(text)) and len(re.findall(r"[.!?]+(?=\s|$)", text)) <= value,
    "listed_at_least": lambda text, value: len(LISTED.findall(text)) >= value,
    "upper_case": lambda text, value: text.isupper() == value,
    "lower_case": lambda text, value: text.islower() == value,
    "has": lambda text, value: set(value) <= set(words(text)),
    "has_any": lambda text, value: not set(value).isdisjoint(words(text)),
    "has_at_least": lambda text, value: len(set(value["words"]) & set(words(text))) >= value["count"],
    "lacks": lambda text, value: set(value).isdisjoint(words(text)),
    "has_text": lambda text, value: value in text,
    "starts_with": lambda text, value: text.strip().startswith(value),
    "ends_with": lambda text, value: text.strip().endswith(value),
    "json_keys": _json_keys,
    "last_number": lambda text, value: _numbers(text)[-1:] == [str(value)],
}


def passes(checks: list[dict[str, Any]], text: str) -> bool:
    """Whether `text` passes all `checks`, each a dict of "check" (a name in CHECKS) and "value"."""
    return all(CHECKS[one["check"]](text, one["value"]) for one in checks)
