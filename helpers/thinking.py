"""Thoughts between `<think>` and `</think>`: where they begin and end, pairs that differ in them, what goes wrong.

A thinking pair keeps each thought apart from its answer and holds no tags: `prompt` (text or messages),
`chosen_thought`, `chosen_answer`, `rejected_thought` (None: no thought at all), `rejected_answer`, `flaw` (what is
wrong with the rejected side), `topic` and `answer` (what a right answer must say, see `is_right`). 72 are written, and
`helpers.word_problems` makes more. `render_thinking` puts the tags where the model at hand wants them, and gives
pairs in the form of `load_pairs`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from helpers.checks import Finding
from helpers.errors import UserError
from helpers.generation import Reply
from helpers.pairs import template_options
from helpers.scoring import wilson_interval
from helpers.word_problems import false_steps, is_right

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
    r"|\[/?think(?:ing)?\]|<\|/?think(?:ing)?\|>|&lt;/?think(?:ing)?&gt;)"
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
        """Whether the model has both tags as tokens."""
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


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs: Any) -> str:
    if not tokenizer.chat_template:
        raise UserError("This tokenizer has no chat template: take the instruct version of the model, or set one.")
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def _generation_end(tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None) -> str:
    """What the template adds after the conversation for the model to go on from."""
    messages, kwargs = [{"role": "user", "content": "Hi"}], _template_kwargs(enable_thinking)
    without = _render(tokenizer, messages, **kwargs)
    return _render(tokenizer, messages, add_generation_prompt=True, **kwargs)[len(without) :]


def think_boundary(tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None) -> ThinkBoundary:
    """How this model opens and closes a thought, read from its tokens and its chat template.

    Args:
        tokenizer: the model's.
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


def _pieces(text_or_ids: str | Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
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


def split_thinking(
    text_or_ids: str | Sequence[int], tokenizer: PreTrainedTokenizerBase, opened: bool | None = None
) -> Thinking:
    """A reply's thought and answer.

    The last tag decides: where it opens, the thought never closes and there is no answer; else the answer is what
    follows it, as chat templates read it.

    Args:
        text_or_ids: one reply, without its prompt, as text or token ids; what follows the end of the turn is left out.
        tokenizer: of the model that replied.
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
    """Thinking pairs from the JSONL file at `path`, by default the 72 of this project; `origin` is file and line.

    Those were written for this project by a language model, which read them through critically twice; no person has.
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


def render_thinking(
    pairs: Iterable[dict], tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None
) -> Dataset:
    """Thinking pairs as conversations, in the form of `load_pairs`, for this model's chat template.

    Prompt + completion then carries exactly one `<think>...</think>`, and the prompt stays a token prefix:

    - a thought goes between the tags, in the message's content; a template that has already opened it in the
      generation prompt does not write it twice;
    - with `enable_thinking=False` the prompt of a hybrid model holds the (empty) thought: only the answers are left;
    - no thought (None) is no tag in an ordinary model, and in a hybrid one the empty block that its template writes.
      A thinking-only model has opened the thought already, and an empty one would change the prompt's last token
      (two newlines are one token): its thought is "...".

    Earlier turns of a prompt are left to the template, which treats them as it does at inference.

    Args:
        pairs: as `load_thinking_pairs` gives them.
        tokenizer: of the model that they are for.
        enable_thinking: of a hybrid model: whether its prompt opens a thought, or holds an empty one.

    Returns:
        Pairs in the form of `load_pairs`, with the columns flaw, topic, answer and origin.

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


def _prompt_codes(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> set[str]:
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


def check_thinking(
    pairs: Iterable[dict], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[Finding]:
    """What is wrong with the thoughts of these pairs, for a report of `check_pairs`: `report.add(check_thinking(...))`.

    Looks at each message as it is written and, where that is in order, at what the chat template makes of it: the
    tokens that the trainer will see.

    Args:
        pairs: rows as `render_thinking` and `load_pairs` give them; also prompt, chosen and rejected as plain text,
            as they stand for the trainer, template and all.
        tokenizer: of the model that they are for.
        max_length: tokens of prompt + completion that the trainer keeps.

    Returns:
        One finding for each thing that is wrong, with the rows that show it; none where all is well.

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
    row: dict, side: str, tokenizer: PreTrainedTokenizerBase, boundary: ThinkBoundary, max_length: int | None
) -> tuple[set[str], bool]:
    """The codes of what is wrong with one side, and whether it thinks."""
    prompt, reply = row["prompt"], row[side]
    kwargs = template_options(row)
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


# --- measuring ------------------------------------------------------------------------------------------------------


def thought_table(replies: Sequence[Reply], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """What a program can say of the thoughts in these replies; the means of its columns are a model's figures.

    Args:
        replies: as `generate_replies` gives them.
        answers: what each answer must say (the field `answer` of a pair), in the order of `replies`.
        tokenizer: of the model that replied.

    Returns:
        One row for each reply: well_formed (one whole thought, then the answer, no other tag), closed (whatever else
        is wrong, a thought ends and an answer follows), right (see `is_right`; an answer without a thought counts
        too), false_steps (statements that can be evaluated and are false), thought_tokens (0 without a thought) and
        cut (the reply met max_new_tokens before its end).
    """
    rows = []
    for reply, answer in zip(replies, answers, strict=True):
        found = split_thinking(reply.ids, tokenizer)
        thought = found.thought or ""
        rows.append(
            {
                "well_formed": found.well_formed,
                "closed": found.thought is not None and found.answer is not None,
                "right": is_right(found.answer, answer),
                "false_steps": len(false_steps(thought)),
                "thought_tokens": len(tokenizer.encode(thought, add_special_tokens=False)),
                "cut": not reply.ended,
            }
        )
    return pd.DataFrame(rows)


def thought_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Shares of well-formed, closed and right replies in a table of `thought_table`.

    Returns:
        Three rows; columns share, low, high (Wilson, 95 percent) and pairs (the count of replies).
    """
    rows = {}
    for column in ("well_formed", "closed", "right"):
        low, high = wilson_interval(int(table[column].sum()), len(table))
        rows[column.replace("_", "-")] = {"share": table[column].mean(), "low": low, "high": high, "pairs": len(table)}
    return pd.DataFrame.from_dict(rows, orient="index").astype({"pairs": int})
