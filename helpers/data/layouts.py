"""Which columns of a source hold the prompt, the two answers, and what says which is better."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

# Column names as public sets spell them; the first that is there is taken.
PROMPT_NAMES = (
    "prompt",
    "question",
    "instruction",
    "query",
    "input",
    "context",
    "conversations",
    "conversation",
    "messages",
)
CHOSEN_NAMES = ("chosen", "better_response", "preferred", "chosen_response", "preferred_response")
REJECTED_NAMES = ("rejected", "worse_response", "dispreferred", "rejected_response", "dispreferred_response")
SYSTEM_NAMES = ("system", "system_prompt")
PREFERENCE_NAMES = (
    "preference preferred winner choice better label labels vote better_response_id overall_preference".split()
)
ANSWER = re.compile(r"((?:response|answer|completion|output|reply|candidate|conversation)s?[_ ]?)(a|b|0|1|2)", re.I)


@dataclass(frozen=True)
class Layout:
    """The columns of one kind of source: chosen and rejected, or two answers and a preference."""

    prompt: str | None
    system: str | None
    chosen: str = ""
    rejected: str = ""
    a: str = ""
    b: str = ""
    preference: str = ""

    def columns(self) -> set[str]:
        """Names of the source's columns that are read."""
        return {name for name in asdict(self).values() if name}


def find_layout(names: Iterable[str], columns: dict[str, str]) -> Layout | None:
    """The layout that these column names make, or None; `columns` (ours -> the source's) goes before any guess."""
    by_lower = {name.lower(): name for name in names}

    def pick(ours: str, candidates: Iterable[str]) -> str | None:
        if ours in columns:
            return columns[ours] if columns[ours] in by_lower.values() else None
        return next((by_lower[name] for name in candidates if name in by_lower), None)

    prompt, system = pick("prompt", PROMPT_NAMES), pick("system", SYSTEM_NAMES)
    if not {"a", "b"} & set(columns):
        chosen, rejected = pick("chosen", CHOSEN_NAMES), pick("rejected", REJECTED_NAMES)
        if chosen and rejected:
            return Layout(prompt, system, chosen=chosen, rejected=rejected)
    answers: dict[str, list[str]] = {}
    for name in by_lower:
        if found := ANSWER.fullmatch(name):
            answers.setdefault(found[1], []).append(name)
    two = next((sorted(pair) for pair in answers.values() if len(pair) == 2), [])
    a, b, preference = pick("a", two[:1]), pick("b", two[1:]), pick("preference", PREFERENCE_NAMES)
    return Layout(prompt, system, a=a, b=b, preference=preference) if a and b and preference else None
