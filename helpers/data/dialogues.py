"""Dialogues that are written into one text, by the marks of dialogues.yaml."""

import re
from typing import Any

from helpers.data import tables
from helpers.data.preferences import LeftOut

Turns = list[dict[str, Any]]
NEVER = "(?!)"
HUMAN = "\n\nHuman:"
SPACE = re.compile(r" (?!\s)")
OPTIONS = re.compile(r"(?m)^\s*\(?B[.):]")  # of a question with answers to choose from
_TEXT = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
LIST = re.compile(rf"\s*\[\s*{_TEXT}(?P<more>\s*,\s*{_TEXT})*\s*\]\s*", re.DOTALL)  # of texts, in a text
BEGIN = re.compile(
    r"\s*(?:<s>(?!\s*\[INST\])|<bos>|\[gMASK\]<sop>|<\|begin_of_text\|>|<\|startoftext\|>|<\|endoftext\|>|<｜begin▁of▁sentence｜>)"
)


class Marks:
    """One spelling; an entry of dialogues.yaml."""

    def __init__(self, entry: dict[str, Any]):
        roles = {role: entry.get(role, NEVER) for role in ("user", "assistant", "system")}
        end, names = entry.get("end", NEVER), "|".join(f"(?P<{role}>{name})" for role, name in roles.items())
        self.name, self.token = entry["name"], entry.get("token", False)
        self.spaced = entry["mark"].endswith(" ?") or roles["assistant"].endswith(" ?")
        bare = entry["mark"].removeprefix(r"\n\n")
        self.mark = re.compile(entry["mark"].format(f"(?:{names})"))
        answer = bare.format(f"(?:{roles['assistant']})")
        self.answer = re.compile(rf"\A\s*(?:(?:{end})\s*)?{answer}")  # at the beginning of a text
        self.end = re.compile(rf"(?:\s*(?:{end}))+\s*\Z")
        self.alone = re.compile(entry.get("alone", "" if self.token else NEVER))
        self.inside = re.compile(entry.get("inside", NEVER))
        self.opening = re.compile(entry.get("opening", NEVER), re.DOTALL)
        # What a dialogue must begin with.
        self.first = bare.format(f"(?:{roles['user']}|{roles['system']})") + f"|{self.opening.pattern}"

    def turns(self, text: str) -> Turns | None:
        """The turns of a whole dialogue; None for any other text."""
        marks = list(self.mark.finditer(text))
        if not marks:
            return None
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        turns = [
            {"role": mark.lastgroup, "content": self.bare(text[mark.end() : end])}
            for mark, end in zip(marks, ends, strict=True)
        ]
        if opening := text[: marks[0].start()].strip():
            if not self.opening.fullmatch(opening):
                return None
            turns.insert(0, {"role": "system", "content": opening})
        if not any(turn["content"] for turn in turns):  # marks alone
            return None
        if turns[0] == {"role": "system", "content": ""}:
            del turns[0]
        roles = [turn["role"] for turn in turns if turn["role"] != "system"]
        alternate = len(roles) > 1 and roles == (["user", "assistant"] * len(roles))[: len(roles)]
        return turns if alternate or (roles[:1] == ["user"] and self.alone.match(text)) else None

    def certain(self, mark: str) -> bool:
        """Whether nobody begins an answer with this mark; Anthropic's without its empty line is a word of prose."""
        return self.token and (self is not SPELLINGS[0] or mark.startswith("\n\n"))

    def bare(self, text: str) -> str:
        """The text of one turn."""
        return self.inside.sub("\n", self.end.sub("", text.strip())).strip()


SPELLINGS = list(map(Marks, tables("dialogues.yaml")[0]))
# What a text must begin with to be a dialogue at all: asked first, which is far faster.
START = re.compile(rf"{BEGIN.pattern}|{'|'.join(marks.first for marks in SPELLINGS)}", re.DOTALL)
ANSWER_MARK = re.compile("|".join(marks.answer.pattern for marks in SPELLINGS))


def may_begin(text: str) -> bool:
    """Whether a text can be a dialogue."""
    return bool(START.match(text.lstrip())) or HUMAN in text


def read(text: Any, prompt: bool = False) -> tuple[Marks, Turns] | None:
    r"""The turns of a dialogue in one text ("\n\nHuman: ... \n\nAssistant: ..." and the like), and how it is spelled.

    None for any other text or value. A `prompt` may have a system turn without a mark before Anthropic's.
    """
    if not isinstance(text, str):
        return None
    bare = text.lstrip()
    if "\n<extra_id_1>Assistant\n" in text and not bare.startswith("<extra_id"):  # HelpSteer2's first user has no mark
        text = bare = f"<extra_id_1>User\n{bare}"
    if prompt and HUMAN in text and text.rstrip().endswith("\n\nAssistant:") and not START.match(bare):
        before, human, rest = text.partition(HUMAN)  # what stands before the first turn is the system's
        turns = SPELLINGS[0].turns(human + rest)
        return (SPELLINGS[0], [{"role": "system", "content": before.strip()}, *turns]) if turns else None
    if not START.match(bare):
        return None
    text = BEGIN.sub("", text if text.startswith("\n\n") else bare, count=1)
    return next(((marks, turns) for marks in SPELLINGS if (turns := marks.turns(text))), None)


def as_turns(prompt: Any, sides: list[Any]) -> tuple[Any, list[Any], str]:
    """A prompt and its two answers, each as turns if marks tell these, else as it is; and the name of the spelling.

    A prompt in marks ends with a question. Answers are whole dialogues if both are, in one spelling, and go on from
    the prompt; else a mark before the answer alone is taken off, if the prompt has such marks too: a word of prose off
    both answers or off neither, and never the letter of an option. Raises LeftOut if marks that nobody writes in prose
    stand in one of the answers only, or for lists that became text.
    """
    _refuse_lists(prompt, sides)
    asked, talks = read(prompt, prompt=True), [read(side) for side in sides]
    opened = bool(asked) and asked[1][-1] == {"role": "assistant", "content": ""}  # by a mark before both answers
    if opened:
        asked[1].pop()
    if asked and not asked[0].token and asked[1][-1]["role"] != "user":
        asked = None
    whole = [talk for talk in talks if talk and (talk[0].token or talk[1][-1]["role"] == "assistant")]
    if len(whole) == 2 and whole[0][0] is whole[1][0]:
        marks = whole[0][0]
        own = asked[1] if asked else prompt
        if marks.token or not prompt or _goes_on(own, [turns for _, turns in whole]):
            return own, [turns for _, turns in whole], marks.name
    elif any(talk and talk[0].token for talk in whole) and all(isinstance(side, str) for side in sides):
        raise LeftOut("only one of the two answers is a whole dialogue with marks")
    asked = asked or _begun(prompt, sides)
    if asked:
        marks, prompt = asked
        found = [marks.answer.match(side) if isinstance(side, str) else None for side in sides]
        letters = all(one and one[0].strip() == "A:" for one in found) and OPTIONS.search(prompt[-1]["content"])
        both = all(found) and not letters
        own = [one if one and (both or marks.certain(one[0])) else None for one in found]
        sides = [side[one.end() :] if one else side for side, one in zip(sides, own, strict=True)]
        sides = [marks.end.sub("", side) if isinstance(side, str) else side for side in sides]
        if opened and marks.spaced and all(isinstance(side, str) and SPACE.match(side) for side in sides):
            sides = [side[1:] for side in sides]  # the space belongs to the mark
    return prompt, sides, asked[0].name if asked else ""


def _refuse_lists(prompt: Any, sides: list[Any]) -> None:
    """Raise LeftOut for a prompt that is the text of a list of texts, or for two such answers of one text, as pandas
    writes them into CSV files. A list in JSON can be an honest answer."""
    found = [LIST.fullmatch(side) if isinstance(side, str) else None for side in sides]
    wrapped = all(one and not one["more"] for one in found) and any("['" in side for side in sides)
    if wrapped or (isinstance(prompt, str) and LIST.fullmatch(prompt)):
        raise LeftOut(f"{'both answers are' if wrapped else 'the prompt is'} a list in a text: save plain texts")


def _goes_on(own: Any, talks: list[Turns]) -> bool:
    """Whether the last question of a prompt, a text or turns, is asked in both talks."""
    last = own[-1] if isinstance(own, list) else own
    question = " ".join(str(last.get("content") if isinstance(last, dict) else last).split())
    users = [[" ".join(turn["content"].split()) for turn in talk if turn["role"] == "user"] for talk in talks]
    return all(any(question in user for user in one) for one in users)


def _begun(prompt: Any, sides: list[Any]) -> tuple[Marks, Any] | None:
    """The spelling if both answers begin with its mark, and the prompt, which has to begin with one too in prose."""
    if not all(isinstance(side, str) and ANSWER_MARK.match(side) for side in sides):
        return None
    for marks in SPELLINGS:
        found = [one[0] for side in sides if (one := marks.answer.match(side))]
        if len(found) == len(sides):
            if not (isinstance(prompt, str) and START.match(prompt.lstrip())):
                return (marks, prompt) if prompt and marks.certain("") else None
            talk = read(f"{prompt}\n\n{found[0].lstrip()}")
            if talk is None and BEGIN.match(prompt) and marks.certain(""):
                return marks, prompt
            return (talk[0] if all(map(talk[0].answer.match, sides)) else marks, talk[1][:-1]) if talk else None
    return None
