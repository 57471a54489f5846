"""Where a model's thought begins and ends: its tags, as tokens and in its chat template, and a reply taken apart."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from helpers.data.render import encode, is_hybrid, reply_opening
from helpers.model import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
OPEN_AT_END = re.compile(rf"{OPEN}\s*$")
# The tags, and what other models and careless writers use for the same thing.
ANY_TAG = re.compile(
    r"(?i:<\s*/?\s*(?:think|thinking|thought|thoughts|reasoning)\s*/?\s*>"
    r"|\[/?think(?:ing)?\]|<\|/?think(?:ing)?\|>|&lt;/?think(?:ing)?&gt;)"
)


@dataclass(frozen=True)
class ThinkBoundary:
    """How a model opens and closes a thought."""

    # The generation prompt always opens a thought; holds an empty one with enable_thinking=False; knows of none.
    kind: Literal["thinking-only", "hybrid", "ordinary"]
    open_ids: tuple[int, ...]  # one token if the model has the tag as a token, several if not
    close_ids: tuple[int, ...]
    prompt_opens: bool  # the generation prompt ends inside a thought
    prompt_skips: bool  # it holds an empty one, closed

    @property
    def one_token(self) -> bool:
        """Whether the model has both tags as tokens."""
        return len(self.open_ids) == len(self.close_ids) == 1


@dataclass(frozen=True)
class Thinking:
    """A reply taken apart.

    `problems`: "unclosed", "unopened", "empty", "nested" (a tag opened twice), "repeated" (a second block or a second
    closing tag), "text before" (the first tag) and "spelling" (tags written in another way).
    """

    thought: str | None  # None: there is none at all
    answer: str | None  # None: the thought never closes
    problems: tuple[str, ...]

    @property
    def well_formed(self) -> bool:
        """One thought, not empty, closed, and nothing else that looks like a tag."""
        return self.thought is not None and not self.problems


def think_boundary(tokenizer: Tokenizer, enable_thinking: bool | None = None) -> ThinkBoundary:
    """How this model opens and closes a thought, read from its `tokenizer` and chat template (UserError without one).

    `enable_thinking` is passed to the chat template unless it is None (hybrid models have this switch).
    """
    prompt = reply_opening(tokenizer, **({} if enable_thinking is None else {"enable_thinking": enable_thinking}))
    opens = OPEN_AT_END.search(prompt) is not None
    kind = "hybrid" if is_hybrid(tokenizer) else "thinking-only" if opens else "ordinary"
    return ThinkBoundary(kind, *map(tuple, encode(tokenizer, [OPEN, CLOSE])), opens, CLOSE in prompt)


def _pieces(text_or_ids: str | Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Text, tag, text, tag, ..., text; up to the end of the turn."""
    if not isinstance(text_or_ids, str):
        ids = [int(i) for i in itertools.takewhile(lambda token: token != tokenizer.eos_token_id, text_or_ids)]
        boundary = think_boundary(tokenizer)
        if boundary.one_token:  # only the token is the tag; the same letters in other tokens are not
            tags = {boundary.open_ids[0]: OPEN, boundary.close_ids[0]: CLOSE}
            places = [-1, *(i for i, token in enumerate(ids) if token in tags), len(ids)]
            texts = [tokenizer.decode(ids[start + 1 : end]) for start, end in itertools.pairwise(places)]
            return [texts[0], *itertools.chain(*zip((tags[ids[i]] for i in places[1:-1]), texts[1:], strict=True))]
        text_or_ids = tokenizer.decode(ids)
    if tokenizer.eos_token:
        text_or_ids = text_or_ids.partition(tokenizer.eos_token)[0]
    return re.split(f"({OPEN}|{CLOSE})", text_or_ids)


def split_thinking(text_or_ids: str | Sequence[int], tokenizer: Tokenizer, opened: bool | None = None) -> Thinking:
    """A reply's thought and answer.

    The last tag decides, as in chat templates: if it closes, the answer is what follows it; if it opens, the thought
    never closes and there is no answer.

    Args:
        text_or_ids: one reply, without its prompt, as text or token ids; what follows the end of the turn is left out.
        tokenizer: of the model that replied.
        opened: whether the prompt ended inside a thought; by default what the model's generation prompt does, False
            for the content of a message, which carries both tags.
    """
    if opened is None:
        opened = think_boundary(tokenizer).prompt_opens
    pieces = _pieces(text_or_ids, tokenizer)
    tags = pieces[1::2]
    problems = {"spelling"} if any(map(ANY_TAG.search, pieces[::2])) else set()
    inside, any_block = opened, opened
    for tag in tags:
        if tag == OPEN and inside:
            problems.add("nested")
        elif not inside and any_block:
            problems.add("repeated")
        elif tag == CLOSE and not inside:
            problems.add("unopened")
        inside, any_block = tag == OPEN, True
    if not any_block:
        return Thinking(None, pieces[0].strip(), tuple(sorted(problems)))

    own_tag = not opened and tags[0] == OPEN
    # Without the answer and the tag before it.
    thought = "".join(pieces[2 if own_tag else 0 : None if inside else -2]).strip()
    empty = not re.sub(f"{OPEN}|{CLOSE}", "", thought).strip()
    more = {"text before": own_tag and pieces[0].strip(), "unclosed": inside, "empty": empty}
    problems |= {problem for problem, found in more.items() if found}
    return Thinking(thought, None if inside else pieces[-1].strip(), tuple(sorted(problems)))
