"""Thoughts between `<think>` and `</think>`: where they begin and end, pairs that differ in them, what goes wrong.

A thinking pair keeps each thought apart from its answer and holds no tags: `prompt` (text or messages),
`chosen_thought`, `chosen_answer`, `rejected_thought` (None: no thought at all), `rejected_answer`, `flaw` (what is
wrong with the rejected side), `topic` and `answer` (what a right answer must say, see `is_right`). `render_thinking`
puts the tags where the model at hand wants them, and gives pairs in the form of `load_pairs`.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from jinja2 import TemplateError
from trl.data_utils import common_prefix_length

from helpers.checks import Finding
from helpers.errors import UserError

OPEN, CLOSE = "<think>", "</think>"
BUNDLED = Path(__file__).parent / "data" / "thinking_pairs.jsonl"
_OPEN_AT_END = re.compile(rf"{OPEN}\s*$")
FIELDS = (
    "prompt",
    "chosen_thought",
    "chosen_answer",
    "rejected_thought",
    "rejected_answer",
    "flaw",
    "topic",
    "answer",
)
# What other models and careless hands write for the same thing; `<think>` and `</think>` themselves are left out.
_SPELLINGS = re.compile(
    r"(?!</?think>)(?i:<\s*/?\s*(?:think|thinking|thought|thoughts|reasoning)\s*/?\s*>"
    r"|\[/?think(?:ing)?\]|<\|/?think(?:ing)?\|>)"
)


# --- the boundary ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ThinkBoundary:
    """How a model opens and closes a thought.

    `kind` is "thinking-only" (the generation prompt always opens a thought), "hybrid" (`enable_thinking=False` puts
    an empty thought into the generation prompt) or "ordinary" (the template knows nothing of thoughts).
    `open_ids` and `close_ids` are token ids: one each where the model has the tags as tokens, several elsewhere.
    `prompt_opens`: the generation prompt ends inside a thought. `prompt_skips`: it holds an empty one, closed.
    """

    kind: str
    open_ids: tuple[int, ...]
    close_ids: tuple[int, ...]
    prompt_opens: bool
    prompt_skips: bool

    @property
    def one_token(self) -> bool:
        return len(self.open_ids) == len(self.close_ids) == 1


@dataclass(frozen=True)
class Thinking:
    """A reply taken apart.

    `thought` is None where there is none at all, `answer` is None where the thought never closes. `problems` names
    what is wrong: "unclosed", "unopened", "empty", "nested" (a tag opened twice), "repeated" (a second block or a
    second closing tag), "text before" (the first tag) and "spelling" (tags written in another way).
    """

    thought: str | None
    answer: str | None
    problems: tuple[str, ...] = ()

    @property
    def well_formed(self) -> bool:
        """One thought, not empty, closed, and nothing else that looks like a tag."""
        return self.thought is not None and not self.problems


def _template_kwargs(enable_thinking: bool | None) -> dict:
    return {} if enable_thinking is None else {"enable_thinking": enable_thinking}


def _render(tokenizer, messages: list[dict], **kwargs) -> str:
    if not tokenizer.chat_template:
        raise UserError("This tokenizer has no chat template: take the instruct version of the model, or set one.")
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def _generation_end(tokenizer, enable_thinking: bool | None) -> str:
    """What the template adds after the conversation for the model to go on from."""
    messages, kwargs = [{"role": "user", "content": "Hi"}], _template_kwargs(enable_thinking)
    without = _render(tokenizer, messages, **kwargs)
    return _render(tokenizer, messages, add_generation_prompt=True, **kwargs)[len(without) :]


def think_boundary(tokenizer, enable_thinking: bool | None = None) -> ThinkBoundary:
    """How this model opens and closes a thought, read from its tokens and its chat template.

    Args:
        enable_thinking: passed to the chat template where it is not None (hybrid models have this switch).

    Raises:
        UserError: the tokenizer has no chat template.
    """
    end = _generation_end(tokenizer, enable_thinking)
    opens = _OPEN_AT_END.search(end) is not None
    if CLOSE in _generation_end(tokenizer, False):
        kind = "hybrid"
    else:
        kind = "thinking-only" if opens else "ordinary"
    return ThinkBoundary(
        kind=kind,
        open_ids=tuple(tokenizer.encode(OPEN, add_special_tokens=False)),
        close_ids=tuple(tokenizer.encode(CLOSE, add_special_tokens=False)),
        prompt_opens=opens,
        prompt_skips=CLOSE in end,
    )


def _pieces(text_or_ids: str | Sequence[int], tokenizer) -> list[str]:
    """Text, tag, text, tag, ..., text; up to the end of the turn."""
    if not isinstance(text_or_ids, str):
        ids = [int(i) for i in text_or_ids]
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        boundary = think_boundary(tokenizer)
        if boundary.one_token:  # only the token is the tag; the same letters in other tokens are not
            pieces, start = [], 0
            for i, token in enumerate(ids):
                if token in boundary.open_ids + boundary.close_ids:
                    pieces += [tokenizer.decode(ids[start:i]), OPEN if token in boundary.open_ids else CLOSE]
                    start = i + 1
            return [*pieces, tokenizer.decode(ids[start:])]
        text_or_ids = tokenizer.decode(ids)
    if tokenizer.eos_token:
        text_or_ids = text_or_ids.partition(tokenizer.eos_token)[0]
    return re.split(f"({OPEN}|{CLOSE})", text_or_ids)


def split_thinking(text_or_ids: str | Sequence[int], tokenizer, opened: bool | None = None) -> Thinking:
    """A reply's thought and answer.

    The last tag decides: where it opens, the thought never closes and there is no answer; else the answer is what
    follows it, as chat templates read it.

    Args:
        text_or_ids: one reply, without its prompt, as text or token ids; what follows the end of the turn is left out.
        opened: whether the prompt ended inside a thought. Default: what the model's generation prompt does. Pass False
            for the content of a message, which carries both tags.
    """
    if opened is None:
        opened = think_boundary(tokenizer).prompt_opens
    pieces = _pieces(text_or_ids, tokenizer)
    tags = pieces[1::2]
    problems = set()
    if any(_SPELLINGS.search(text) or OPEN in text or CLOSE in text for text in pieces[::2]):
        problems.add("spelling")
    inside, blocks = opened, int(opened)
    for tag in tags:
        if tag == OPEN:
            problems |= {"nested"} if inside else {"repeated"} if blocks else set()
            inside, blocks = True, blocks + 1
        else:
            problems |= set() if inside else {"repeated"} if blocks else {"unopened"}
            inside, blocks = False, max(blocks, 1)
    if blocks == 0:
        return Thinking(None, pieces[0].strip(), tuple(sorted(problems)))

    start = 0
    if not opened and tags[0] == OPEN:
        start = 2
        if pieces[0].strip():
            problems.add("text before")
    last = len(pieces) if inside else len(pieces) - 2  # the piece after the thought's last text
    thought = "".join(pieces[start:last]).strip()
    if inside:
        problems.add("unclosed")
    if not re.sub(f"{OPEN}|{CLOSE}", "", thought).strip():
        problems.add("empty")
    return Thinking(thought, None if inside else pieces[-1].strip(), tuple(sorted(problems)))


# --- rendering ------------------------------------------------------------------------------------------------------


def load_thinking_pairs(path: str | Path = BUNDLED) -> list[dict]:
    """Thinking pairs from a JSONL file, by default the 72 that come with the project; `origin` is file and line.

    Those were written for this project by a language model, which read them through once more; nobody else has.
    There are 12 for each of six topics, with six flaws, and in 66 of them both sides think, at like length.

    Raises:
        UserError: no such file, a line that is no JSON object, a field that is missing or no text.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} cannot be read as UTF-8 text ({error.__class__.__name__}).") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        origin = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{origin}: not valid JSON ({error.msg}, column {error.colno}).") from error
        if not isinstance(pair, dict):
            raise UserError(f"{origin}: a line must hold one JSON object with the fields {', '.join(FIELDS)}.")
        for field in FIELDS:
            value = pair.get(field)
            if field == "prompt" and isinstance(value, list) or field == "rejected_thought" and value is None:
                continue
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{origin}: the field {field!r} must be text, but is {value!r:.60}.")
        pairs.append({**{field: pair.get(field) for field in FIELDS}, "origin": origin})
    if not pairs:
        raise UserError(f"{path.name} holds no pairs.")
    return pairs


def render_thinking(pairs: Iterable[dict], tokenizer, enable_thinking: bool | None = None) -> Dataset:
    """Thinking pairs as conversations, in the form of `load_pairs`, for this model's chat template.

    Prompt + completion then carries exactly one `<think>...</think>`, and the prompt stays a token prefix:

    - a thought goes between the tags, in the message's content; a template that has already opened it in the
      generation prompt does not write it twice;
    - with `enable_thinking=False` the prompt of a hybrid model holds the (empty) thought: only the answers are left;
    - no thought (None) is no tag in an ordinary model, and in a hybrid one the empty block that its template writes.
      A thinking-only model has opened the thought already, and an empty one would change the prompt's last token
      (two newlines are one token): its thought is "...".

    Earlier turns of a prompt are left to the template, which treats them as it does at inference.

    Raises:
        UserError: `enable_thinking` for a model whose template has no such switch.
    """
    boundary = think_boundary(tokenizer, enable_thinking)
    if enable_thinking is not None and boundary.kind != "hybrid":
        raise UserError(f"This is no hybrid model ({boundary.kind}): leave enable_thinking out.")

    def reply(thought: str | None, answer: str) -> list[dict]:
        if thought is None and boundary.kind == "thinking-only":
            thought = "..."
        if thought is not None and not boundary.prompt_skips:
            answer = f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{answer.strip()}"
        return [{"role": "assistant", "content": answer}]

    rows = []
    for number, pair in enumerate(pairs, 1):
        prompt = pair["prompt"]
        row = {
            "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
            "chosen": reply(pair["chosen_thought"], pair["chosen_answer"]),
            "rejected": reply(pair["rejected_thought"], pair["rejected_answer"]),
            "flaw": pair["flaw"],
            "topic": pair["topic"],
            "answer": pair["answer"],
            "origin": pair.get("origin", f"row {number}"),
        }
        if enable_thinking is not None:
            row["chat_template_kwargs"] = {"enable_thinking": enable_thinking}
        rows.append(row)
    return Dataset.from_list(rows)


# --- findings -------------------------------------------------------------------------------------------------------

# code: (severity, what, why it matters, what to do)
_CATALOGUE = {
    "thought_unclosed": (
        "error",
        f"a thought without {CLOSE}",
        "The model learns to think without ever giving an answer.",
        f"Close the thought with {CLOSE} before the answer, or leave the row out.",
    ),
    "thought_unopened": (
        "error",
        f"{CLOSE} without {OPEN}",
        "What stands before the closing tag is trained as text that no tag opened.",
        f"Put {OPEN} before the thought, or use render_thinking.",
    ),
    "thought_nested": (
        "error",
        f"{OPEN} inside an open thought",
        "The tag is doubled. A template may also drop the text between the two without a word.",
        f"Leave one {OPEN}: where the model's prompt ends in it, a text must not begin with it again.",
    ),
    "thought_repeated": (
        "error",
        "more than one thought in a reply",
        f"Templates keep what follows the last {CLOSE}; the model learns to go on thinking after its answer.",
        "Make one thought of them.",
    ),
    "think_spelling": (
        "error",
        "think tags in another spelling",
        f"<thinking>, [THINK], <Think> and the like are plain text to this model: only {OPEN} and {CLOSE} count.",
        f"Replace them with {OPEN} and {CLOSE}, or take them out.",
    ),
    "think_in_prompt": (
        "error",
        "a think tag in a system or user turn",
        "The tag is read as if the model had begun to think; a template may even cut the turn there.",
        "Take the tag out of the prompt: the chat template opens the thought where this model wants it.",
    ),
    "thought_lost": (
        "error",
        "the chat template drops the thought",
        "The thought is in the data and not in what is trained.",
        "Use a training version of the chat template that keeps the last thought (TRL has some), or another model.",
    ),
    "thought_breaks_prompt": (
        "error",
        "the prompt's end does not fit this reply's thought",
        "The generation prompt opens a thought, or holds an empty one, and the reply goes on otherwise, so that the "
        "prompt is no token prefix and the trainer cuts it short.",
        "Render with render_thinking: no thoughts with enable_thinking=False, no empty ones in a thinking-only model.",
    ),
    "thought_cut": (
        "error",
        "max_length falls inside the thought",
        f"The trainer cuts the sequence there, so {CLOSE} and the answer are never seen.",
        "Raise max_length, shorten the thought, or leave the row out.",
    ),
    "thought_empty": (
        "warning",
        "an empty thought",
        "The model learns to open a thought and leave it at once.",
        "Write the thought, or store None in its place where the lack of one is the flaw.",
    ),
    "thought_late": (
        "warning",
        f"text before {OPEN}",
        "A thinking model opens its reply with the thought; this teaches it to answer first.",
        "Move the text into the thought or behind it.",
    ),
    "thought_one_sided": (
        "warning",
        "in most pairs only one side thinks",
        "Such pairs teach the tag and the length, not the quality of a thought.",
        "Let both sides think, at like length, and let the rejected thought be the worse one.",
    ),
    "tags_are_text": (
        "warning",
        "tags in a model that has none",
        "The tags are several ordinary tokens each, and a model that never thinks will not learn to by DPO alone.",
        "Begin with a short SFT on well-formed thoughts, and train DPO from that model.",
    ),
}
_CODES = {  # of `Thinking.problems`
    "unclosed": "thought_unclosed",
    "unopened": "thought_unopened",
    "nested": "thought_nested",
    "repeated": "thought_repeated",
    "spelling": "think_spelling",
    "empty": "thought_empty",
    "text before": "thought_late",
}


def _tagged(text: str) -> bool:
    return OPEN in text or CLOSE in text or _SPELLINGS.search(text) is not None


def _prompt_codes(prompt: str | list[dict], tokenizer) -> set[str]:
    """What is wrong in the turns before the reply. Earlier thoughts are the template's business if they are whole."""
    if isinstance(prompt, str):  # rendered already: it may end in an open thought, or in an empty one
        return {"think_in_prompt"} if _tagged(re.sub(rf"{OPEN}\s*(?:{CLOSE}\s*)?$", "", prompt)) else set()
    codes = set()
    for turn in prompt:
        if turn["role"] == "assistant":
            codes |= {_CODES[problem] for problem in split_thinking(turn["content"], tokenizer, False).problems}
        elif _tagged(turn["content"]):
            codes.add("think_in_prompt")
    return codes


def check_thinking(pairs: Iterable[dict], tokenizer, max_length: int | None = None) -> list[Finding]:
    """What is wrong with the thoughts of these pairs, for a report of `check_pairs`: `report.add(check_thinking(...))`.

    Looks at each message as it is written and, where that is in order, at what the chat template makes of it: the
    tokens that the trainer will see.

    Args:
        pairs: rows as `render_thinking` and `load_pairs` give them; also prompt, chosen and rejected as plain text,
            as they stand for the trainer, template and all.
        max_length: tokens of prompt + completion that the trainer keeps.

    Raises:
        UserError: rows without the columns prompt, chosen and rejected.
    """
    boundary = think_boundary(tokenizer)
    found: dict[str, dict[int, str]] = defaultdict(dict)  # code -> position of the row -> how to name it
    one_sided, count = {}, 0
    for position, row in enumerate(pairs):
        count += 1
        if not {"prompt", "chosen", "rejected"} <= set(row):
            raise UserError(f"Row {position + 1} has no prompt, chosen and rejected. Call render_thinking first.")
        name = row.get("origin") or f"row {position + 1}"
        for code in _prompt_codes(row["prompt"], tokenizer):
            found[code][position] = f"{name} (prompt)"
        thinks = []
        for side in ("chosen", "rejected"):
            codes, thought = _side_codes(row, side, tokenizer, boundary, max_length)
            thinks.append(thought)
            for code in codes:
                found[code].setdefault(position, f"{name} ({side})")
        if thinks[0] != thinks[1]:
            one_sided[position] = name
    if len(one_sided) > count / 2:
        found["thought_one_sided"] = one_sided
    return [
        Finding(code, severity, len(found[code]), what, why, cure, tuple(found[code]), tuple(found[code].values())[:5])
        for code, (severity, what, why, cure) in _CATALOGUE.items()
        if code in found
    ]


def _side_codes(
    row: dict, side: str, tokenizer, boundary: ThinkBoundary, max_length: int | None
) -> tuple[set[str], bool]:
    """The codes of what is wrong with one side, and whether it thinks."""
    prompt, reply = row["prompt"], row[side]
    kwargs = {key: value for key, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
    if isinstance(prompt, str):
        before, full, written = prompt, prompt + reply, Thinking(None, None)
    else:
        try:
            before = _render(tokenizer, prompt, add_generation_prompt=True, **kwargs)
            full = _render(tokenizer, prompt + reply, **kwargs)
        except TemplateError:  # check_pairs names such rows
            return set(), False
        content = reply[-1]["content"]
        # The template of a thinking-only model also takes a message whose thought only closes.
        only_closes = CLOSE in content and OPEN not in content and _OPEN_AT_END.search(before)
        written = split_thinking(content, tokenizer, opened=bool(only_closes))
    before_ids, full_ids = tokenizer([before, full], add_special_tokens=False)["input_ids"]
    completion = full[len(before) :]

    codes, thought = {_CODES[problem] for problem in written.problems}, written.thought
    if not codes and thought and thought not in full:
        codes = {"thought_lost"}
    elif not codes and common_prefix_length(before_ids, full_ids) < len(before_ids):
        codes = {"thought_breaks_prompt"}
    elif not codes:
        seen = split_thinking(completion, tokenizer, opened=bool(_OPEN_AT_END.search(before)))
        codes, thought = {_CODES[problem] for problem in seen.problems}, seen.thought
        if not isinstance(prompt, str) and not written.thought:
            codes.discard("thought_empty")  # the template's own block, around no thought
    thinks = re.search(r"\w", thought or "") is not None
    if boundary.kind == "ordinary" and not boundary.one_token and (thinks or codes):
        codes.add("tags_are_text")
    if max_length and len(full_ids) > max_length and CLOSE in completion:
        to_close = full[: full.rfind(CLOSE) + len(CLOSE)]
        if len(tokenizer(to_close, add_special_tokens=False)["input_ids"]) > max_length:
            codes.add("thought_cut")
    return codes, thinks


# --- generated word problems ----------------------------------------------------------------------------------------

# One planted error each: a calculation gone wrong, a number of the question copied wrong, plus for minus, a wrong
# fact (days of a month, size of a unit), or a right thought with another answer under it.
KINDS = ("slip", "misread", "operation", "fact", "wrong_answer")
NAMES = tuple(
    "Ada Ben Cleo Dan Eva Finn Gita Hugo Ines Jon Kira Leo Mina Nils Olga Paul Rosa Sam Tara Udo Vera Will".split()
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {
    "January": 31, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31, "August": 31, "September": 30,
    "October": 31, "November": 30, "December": 31,
}  # fmt: skip
_NEXT_MONTH = dict(zip(MONTHS, [*list(MONTHS)[1:], "January"], strict=True)) | {"January": "February"}
UNITS = {  # how many small ones make a big one: big, small, things that have such a length
    7: (("week", "days", ("holiday", "strike", "camp")),),
    12: (("year", "months", ("course", "project", "lease")),),
    24: (("day", "hours", ("journey", "storm", "voyage")),),
    60: (("hour", "minutes", ("film", "meeting", "concert")), ("minute", "seconds", ("song", "speech", "video"))),
    100: (("metre", "centimetres", ("rope", "ribbon", "shelf")),),
    1000: (("kilometre", "metres", ("path", "race", "tunnel")),),
}
_GOODS = ("pencils", "marbles", "stickers", "cards", "shells", "buttons", "coins", "beads")
_WARES = ("coat", "lamp", "chair", "watch", "tent", "phone", "bike", "table")
_GROUPS = ("club", "choir", "school", "village", "team", "chess league")
_EVENTS = ("fair", "show", "market", "camp", "trip", "exam", "sale", "course")


class _Story(NamedTuple):
    """A kind of word problem. In the texts, {a} {b} {c} are numbers, {s1} {s2} calculations, {r1} {r2} results.

    `steps` are (left, operator, right) over names of numbers and results; "?" is plus or minus, drawn, and `signs`
    holds the words for either. `fact` names the number that is no part of the question but known. A problem whose
    result is above `at_most` is not made.
    """

    topic: str
    question: str
    thought: str
    answer: str
    numbers: dict[str, range]
    steps: tuple[tuple[str, str, str], ...]
    signs: tuple[dict[str, str], ...] = ()
    expected: str = "{r2}"
    fact: str | None = None
    at_most: int = 1_000_000


_STORIES = (
    _Story(
        "arithmetic",
        "{name} has {a} boxes with {b} {goods} in each and {sign1}. How many {goods} does {name} have then?",
        "Each of the {a} boxes holds {b} {goods}, which makes {s1} {goods} in the boxes. Then {name} {sign1}, so the "
        "next step is {s2}. That leaves {name} with {r2} {goods}.",
        "{name} has {r2} {goods}.",
        {"a": range(4, 13), "b": range(6, 16), "c": range(3, 24)},
        (("a", "*", "b"), ("r1", "?", "c")),
        ({"+": "buys {c} more", "-": "gives {c} away"},),
    ),
    _Story(
        "arithmetic",
        "A bus leaves with {a} people. At the first stop {sign1}, at the second stop {sign2}. How many are on it then?",
        "The bus leaves with {a} people. At the first stop {sign1}, and {s1} people are on it. At the second stop "
        "{sign2}, and {s2} people are on it after that stop.",
        "There are {r2} people on the bus.",
        {"a": range(30, 70), "b": range(3, 15), "c": range(3, 15)},
        (("a", "?", "b"), ("r1", "?", "c")),
        ({"+": "{b} get on", "-": "{b} get off"}, {"+": "{c} get on", "-": "{c} get off"}),
    ),
    _Story(
        "arithmetic",
        "{name} earns {a} dollars a day, works {b} days and {sign1}. How many dollars does {name} have after that?",
        "Working {b} days at {a} dollars a day brings {s1} dollars. After that {name} {sign1}, so the sum becomes "
        "{s2} dollars, and nothing else is earned or paid.",
        "{name} has {r2} dollars.",
        {"a": range(20, 61), "b": range(3, 10), "c": range(5, 46)},
        (("a", "*", "b"), ("r1", "?", "c")),
        ({"+": "gets a bonus of {c}", "-": "pays {c} for travel"},),
    ),
    _Story(
        "unit",
        "A {thing} of {a} {big}s is made {b} {small} {sign1}. How many {small} long is it then?",
        "One {big} is {f} {small}, so for {a} {big}s the length is {s1} {small}. The {thing} is made {b} {small} "
        "{sign1}, which gives {s2} {small} in all.",
        "The {thing} is {r2} {small} long.",
        {"a": range(2, 13), "b": range(2, 14)},
        (("a", "*", "f"), ("r1", "?", "b")),
        ({"+": "longer", "-": "shorter"},),
        fact="f",
    ),
    _Story(
        "percentage",
        "A {ware} costs {a} dollars. Then its price {sign1} by {p} percent. What is the new price in dollars?",
        "First find the change in price. {s1} dollars. The price of the {ware} {sign1} by this change, so the next "
        "step is {s2}. The new price is {r2} dollars.",
        "The {ware} costs {r2} dollars.",
        {"a": range(40, 420, 20), "p": range(10, 65, 5)},
        (("p", "%", "a"), ("a", "?", "r1")),
        ({"+": "rises", "-": "falls"},),
    ),
    _Story(
        "percentage",
        "A {group} has {a} members, and within a year it {sign1} by {p} percent. How many members does it have then?",
        "The {group} has {a} members, and the change is a part of these. {s1} members. Within the year the {group} "
        "{sign1} by that number, so {s2} members are in it.",
        "The {group} has {r2} members.",
        {"a": range(40, 420, 20), "p": range(10, 65, 5)},
        (("p", "%", "a"), ("a", "?", "r1")),
        ({"+": "grows", "-": "shrinks"},),
    ),
    _Story(
        "date",
        "The {event} starts on {month} {a} and ends {b} days later. On which date does it end?",
        "{month} has {f} days, so {s1} days of {month} are left after the start. The other days fall into {next}, and "
        "{s2} of them are needed. So the {event} ends on {next} {r2}.",
        "The {event} ends on {next} {r2}.",
        {"a": range(15, 26), "b": range(18, 33)},
        (("f", "-", "a"), ("b", "-", "r1")),
        expected="{next} {r2}",
        fact="f",
        at_most=28,
    ),
    _Story(
        "date",
        "{name} was born in {a}. {other} is {b} years {sign1} and married at the age of {c}. In which year was that?",
        "{name} was born in {a}. {other} is {b} years {sign1}, so {other} was born in {s1}. The wedding was {c} years "
        "after that, so the year is {s2}.",
        "{other} married in {r2}.",
        {"a": range(1900, 1970), "b": range(2, 13), "c": range(21, 40)},
        (("a", "?", "b"), ("r1", "+", "c")),
        ({"+": "younger", "-": "older"},),
    ),
    _Story(
        "date",
        "The {event} of {name} was on a {day}. Which day of the week is it {a} days after the {event}?",
        "The {event} was on a {day}. After 7 days it is {day} again, and {s1} days are left to count. Going on from "
        "there, {s2}, so that is the day of the week.",
        "It is a {r2}.",
        {"a": range(9, 14)},
        (("a", "-", "week"), ("r1", "days after", "day")),
    ),
    _Story(
        "order",
        "In a line of {a} people {name} is number {b} from the front. {other} is {c} places {sign1} {name}. How many "
        "people stand behind {other}?",
        "{name} is number {b} from the front, and {other} is {c} places {sign1} {name}, which is number {s1}. The "
        "line has {a} people, so behind {other} there are {s2} people.",
        "There are {r2} people behind {other}.",
        {"a": range(40, 71), "b": range(12, 26), "c": range(2, 10)},
        (("b", "?", "c"), ("a", "-", "r1")),
        ({"+": "behind", "-": "ahead of"},),
    ),
)

_FORMS = {"%": "{}% of {} = {}", "days after": "{} days after {} comes {}"}


def _calculate(left: int, operator: str, right: int | str) -> int | str:
    if operator == "days after":
        return DAYS[(DAYS.index(right) + left) % 7]
    if operator == "%":
        return left * right // 100
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _slip(rng: random.Random, values: dict, left: str, operator: str, right: str) -> int | str:
    """A wrong result of the same make: as round, as long and as large as right ones are, taken over many problems."""
    x, y = values[left], values[right]
    if operator == "days after":
        return _calculate(x + rng.choice((-1, 1)), operator, y)
    if operator == "%":
        return _calculate(x + rng.choice((-5, 5)), operator, y)
    if operator == "*":
        nudge = rng.choice((-1, 1))
        return (x + nudge) * y if right == "f" or rng.random() < 0.5 else x * (y + nudge)
    step = values["a"] // 20 if "p" in values else rng.choice((1, 10))
    return _calculate(x, operator, y) + rng.choice((-step, step))


def _signed(steps: tuple, signs: str) -> list[tuple[str, str, str]]:
    """The steps with the drawn signs in place of the question marks."""
    drawn = iter(signs)
    return [(left, next(drawn) if operator == "?" else operator, right) for left, operator, right in steps]


def _work(story: _Story, values: dict, signs: str, wrong: dict[int, int | str] | None = None) -> dict | None:
    """Values, calculations {s1} and results {r1} of a story, or None where a result is not one to tell of.

    `wrong` maps the index of a step to the wrong result that it gives; what follows goes on from there.
    """
    values = dict(values)
    for i, (left, operator, right) in enumerate(_signed(story.steps, signs)):
        x, y = values[left], values[right]
        result = (wrong or {}).get(i, _calculate(x, operator, y))
        if isinstance(result, int) and not 0 < result <= story.at_most:
            return None
        form = _FORMS.get(operator, f"{{}} {operator} {{}} = {{}}")
        values[f"s{i + 1}"], values[f"r{i + 1}"] = form.format(x, y, result), result
    return values


def _story_pair(story: _Story, rng: random.Random, kind: str) -> dict | None:
    """A problem of this story with an error of this kind, or None where the numbers drawn do not allow it."""
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "week": 7, "day": rng.choice(DAYS)}
    for key, choice in (("goods", _GOODS), ("ware", _WARES), ("group", _GROUPS), ("event", _EVENTS)):
        words[key] = rng.choice(choice)
    facts = list(UNITS) if story.topic == "unit" else [30, 31]
    words["f"] = rng.choice(facts)
    if story.topic == "unit":
        words["big"], words["small"], things = rng.choice(UNITS[words["f"]])
        words["thing"] = rng.choice(things)
    words["month"] = rng.choice([month for month, days in MONTHS.items() if days == words["f"]] or [None])
    words["next"] = _NEXT_MONTH.get(words["month"])
    values = words | {key: rng.choice(span) for key, span in story.numbers.items()}
    signs = "".join(rng.choice("+-") for _ in story.signs)

    def fill(text: str, values: dict) -> str:
        said = {f"sign{i + 1}": story.signs[i][sign].format(**values) for i, sign in enumerate(signs)}
        return text.format(**values, **said)

    wrong_values, wrong_signs, wrong_result = dict(values), signs, {}
    if kind == "misread":
        key = rng.choice(list(story.numbers))
        wrong_values[key] = rng.choice([number for number in story.numbers[key] if number != values[key]])
    elif kind == "fact":
        wrong_values[story.fact] = rng.choice([number for number in facts if number != values[story.fact]])
    elif kind == "operation":
        i = rng.randrange(len(signs))
        wrong_signs = signs[:i] + {"+": "-", "-": "+"}[signs[i]] + signs[i + 1 :]
    right = _work(story, values, signs)
    if right is None:
        return None
    if kind in ("slip", "wrong_answer"):
        i = rng.randrange(len(story.steps)) if kind == "slip" else len(story.steps) - 1
        wrong_result = {i: _slip(rng, right, *_signed(story.steps, signs)[i])}
        if kind == "wrong_answer" and isinstance(right["r2"], int) and rng.random() < 0.5:
            wrong_result = {i: right["r1"]}  # one that the thought does name
    wrong = _work(story, wrong_values, wrong_signs, wrong_result)
    if wrong is None or wrong["r2"] == right["r2"]:
        return None
    return {
        "prompt": fill(story.question, values),
        "chosen_thought": fill(story.thought, right),
        "chosen_answer": fill(story.answer, right),
        "rejected_thought": fill(story.thought, right if kind == "wrong_answer" else wrong),
        "rejected_answer": fill(story.answer, wrong),
        "flaw": kind,
        "topic": story.topic,
        "answer": fill(story.expected, right),
    }


def _ranking_pair(rng: random.Random, kind: str) -> dict | None:
    """Who came first, second or last, by the smallest number (a race) or the largest (points)."""
    names, numbers = rng.sample(NAMES, 3), rng.sample(range(31, 90), 3)
    race = rng.random() < 0.5
    place = rng.randrange(3)
    of = dict(zip(names, numbers, strict=True))
    order = sorted(names, key=of.get, reverse=not race)
    wrong_race, wrong_of, wrong_order = race, dict(of), list(order)
    if kind == "misread":
        wrong_of[rng.choice(names)] = rng.choice([number for number in range(31, 90) if number not in numbers])
        wrong_order = sorted(names, key=wrong_of.get, reverse=not race)
    elif kind == "fact":
        wrong_race, wrong_order = not race, order[::-1]
    elif kind == "slip":
        i = rng.randrange(2)
        wrong_order[i], wrong_order[i + 1] = order[i + 1], order[i]
    else:
        wrong_order[place] = rng.choice([name for name in names if name != order[place]])
    if wrong_order[place] == order[place]:
        return None

    def thought(race: bool, of: dict, order: list[str]) -> str:
        rule = f"In a {'race' if game else 'game of points'} the {'smallest' if race else 'largest'} number wins."
        steps = [
            f"{of[x]} {'<' if race else '>'} {of[y]}, so {x} is before {y}."
            for x, y in zip(order, order[1:], strict=False)
        ]
        return f"{rule} {' '.join(steps)} From first to last the order is {', '.join(order)}."

    game, place_name = race, ("first", "second", "last")[place]
    how = "needed {} seconds for the race, {} {} and {} {}" if race else "made {} points in the game, {} {} and {} {}"
    (a, x), (b, y), (c, z) = of.items()
    said = (race, of, order) if kind == "wrong_answer" else (wrong_race, wrong_of, wrong_order)
    return {
        "prompt": f"{a} {how.format(x, b, y, c, z)}. Who came {place_name}?",
        "chosen_thought": thought(race, of, order),
        "chosen_answer": f"{order[place]} came {place_name}.",
        "rejected_thought": thought(*said),
        "rejected_answer": f"{wrong_order[place]} came {place_name}.",
        "flaw": kind,
        "topic": "order",
        "answer": order[place],
    }


def make_thinking_pairs(n: int, seed: int = 0) -> list[dict]:
    """`n` different word problems as thinking pairs; the same `n` and `seed` give the same pairs.

    The chosen thought is right in every step. The rejected one holds one planted error, named in `flaw` (see KINDS),
    and goes on from it without a second one, in the same words: so it is as long, and only the error tells it.
    """
    makers = defaultdict(lambda: defaultdict(list))  # kind of error -> topic -> what makes such a pair
    for story in _STORIES:
        for kind in KINDS:
            if (kind != "operation" or story.signs) and (kind != "fact" or story.fact):
                makers[kind][story.topic].append(partial(_story_pair, story))
    for kind in ("slip", "misread", "fact", "wrong_answer"):
        makers[kind]["order"].append(_ranking_pair)

    rng, pairs = random.Random(seed), {}  # by prompt; there are millions of prompts, so a repeated one is drawn anew
    while len(pairs) < n:
        kind = rng.choice(KINDS)
        topic = rng.choice(list(makers[kind]))
        pair = rng.choice(makers[kind][topic])(rng, kind)
        if pair is not None and pair["prompt"] not in pairs:
            pairs[pair["prompt"]] = pair | {"origin": f"make_thinking_pairs(seed={seed}) row {len(pairs) + 1}"}
    return list(pairs.values())


# --- measuring ------------------------------------------------------------------------------------------------------


def is_right(answer: str | None, expected: str) -> bool:
    """Whether an answer says what it must (the field `answer` of a pair).

    A number: the last number of the answer is that one. One of NAMES or DAYS: it is the only one named. A date such
    as "May 7": it occurs, in either order. Other words: they occur. None (a thought that never closed) is not right.

    >>> is_right("That leaves 1,200 of them.", "1200"), is_right("Ben, or else Ada.", "Ben")
    (True, False)
    """
    if answer is None:
        return False
    if re.fullmatch(r"\d+", expected):
        numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", answer))
        return bool(numbers) and float(numbers[-1]) == float(expected)
    for group in (NAMES, DAYS):
        if expected in group:
            return {word for word in re.findall(r"\w+", answer) if word in group} == {expected}
    words = re.escape(expected)
    if date := re.fullmatch(rf"({'|'.join([*MONTHS, 'February'])}) (\d+)", expected):
        words = rf"{date[1]} {date[2]}(?:st|nd|rd|th)?|{date[2]}(?:st|nd|rd|th)? (?:of )?{date[1]}"
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", answer, re.IGNORECASE) is not None


def false_steps(thought: str) -> list[str]:
    """The statements of a thought that can be evaluated and are false, as they stand there.

    Reads what `make_thinking_pairs` writes: calculations of two whole numbers, comparisons of them, "25% of 80 = 20",
    "3 days after Monday comes Thursday", lengths of months ("June has 30 days") and of units ("One week is 7 days").

    >>> false_steps("Each box holds 8, so 3 * 8 = 24, and 24 + 5 = 30.")
    ['24 + 5 = 30']
    """
    false = []
    for found in re.finditer(r"(?<![\d.])(?<![-+*/] )(\d+) ([-+*/]) (\d+) = (\d+)(?![\d.]*\d)", thought):
        x, y, z = int(found[1]), int(found[3]), int(found[4])
        if not (z * y == x if found[2] == "/" else _calculate(x, found[2], y) == z):
            false.append(found[0])
    for found in re.finditer(r"(\d+)% of (\d+) = (\d+)", thought):
        if int(found[1]) * int(found[2]) != 100 * int(found[3]):
            false.append(found[0])
    for found in re.finditer(r"(\d+) ([<>]) (\d+)", thought):
        if (int(found[1]) < int(found[3])) != (found[2] == "<"):
            false.append(found[0])
    for found in re.finditer(rf"(\d+) days after ({'|'.join(DAYS)}) comes (\w+)", thought):
        if _calculate(int(found[1]), "days after", found[2]) != found[3]:
            false.append(found[0])
    for found in re.finditer(rf"({'|'.join(MONTHS)}) has (\d+) days", thought):
        if MONTHS[found[1]] != int(found[2]):
            false.append(found[0])
    for found in re.finditer(r"One (\w+) is (\d+) (\w+)", thought):
        known = {(big, small): f for f, units in UNITS.items() for big, small, _ in units}
        if known.get((found[1], found[3]), int(found[2])) != int(found[2]):
            false.append(found[0])
    for found in re.finditer(r"In a (race|game of points) the (smallest|largest) number wins", thought):
        if (found[1] == "race") != (found[2] == "smallest"):
            false.append(found[0])
    return false
