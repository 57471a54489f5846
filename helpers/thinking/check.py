"""What is wrong with the think tags and thoughts of pairs: `check_thinking`, whose findings go into a report."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from helpers.common import UserError, documents
from helpers.data.findings import Finding
from helpers.data.render import BOTH, Renderer, encode
from helpers.model import Tokenizer
from helpers.thinking.tags import ANY_TAG, CLOSE, OPEN, OPEN_AT_END, split_thinking, think_boundary

_FOUND: dict[str, dict[str, Any]] = documents(__file__, "findings.yaml")[0]
_CODES = {"spelling": "think_spelling", "text before": "thought_late"}  # of `Thinking.problems`, if not thought_...


def _codes(content: str, tokenizer: Tokenizer, opened: bool) -> tuple[set[str], str | None]:
    """The codes of what is wrong with the tags of a text, and its thought."""
    found = split_thinking(content, tokenizer, opened)
    return {_CODES.get(problem, f"thought_{problem}") for problem in found.problems}, found.thought


def _prompt_codes(prompt: str | list[dict], tokenizer: Tokenizer) -> set[str]:
    """What is wrong in the turns before the reply. Earlier thoughts that are whole are left to the template."""
    if isinstance(prompt, str):  # rendered already: it may end in an open thought, or in an empty one
        prompt = [{"role": "user", "content": re.sub(rf"{OPEN}\s*(?:{CLOSE}\s*)?$", "", prompt)}]
    replies = [turn["content"] for turn in prompt if turn["role"] == "assistant"]
    codes = set().union(*(_codes(reply, tokenizer, opened=False)[0] for reply in replies))
    asked = any(ANY_TAG.search(turn["content"]) for turn in prompt if turn["role"] != "assistant")
    return codes | ({"think_in_prompt"} if asked else set())


def check_thinking(pairs: Iterable[dict], tokenizer: Tokenizer, max_length: int | None = None) -> list[Finding]:
    """What is wrong with the thoughts of these pairs, for a report of `check_pairs`: `report.add(check_thinking(...))`.

    It looks at each message as it is written, and if that is in order, at what the chat template makes of it.

    Args:
        pairs: rows as `render_thinking` and `load_pairs` give them; or prompt, chosen and rejected as the text that
            the trainer gets, with the chat template applied.
        tokenizer: of the model that they are for.
        max_length: tokens of prompt + completion that the trainer keeps.

    Raises:
        UserError: rows without the columns prompt, chosen and rejected.
    """
    boundary = think_boundary(tokenizer)
    tags_are_text = boundary.kind == "ordinary" and not boundary.one_token
    found: dict[str, dict[int, str]] = defaultdict(dict)  # code -> position of the row -> how to name it
    rows, renderer = list(pairs), Renderer(tokenizer)
    for position, row in enumerate(rows):
        if not {"prompt", *BOTH} <= set(row):
            raise UserError(f"Row {position + 1} has no prompt, chosen and rejected. Call render_thinking first.")
        name = row.get("origin") or f"row {position + 1}"
        for code in _prompt_codes(row["prompt"], tokenizer):
            found[code][position] = f"{name} (prompt)"
        if isinstance(prompt := row["prompt"], str):  # rendered already
            texts = {"asked": prompt, "refused": False} | {f"{side}_text": prompt + row[side] for side in BOTH}
        else:
            (texts,) = renderer([row])
        sides = {side: _side_codes(row, side, texts, tokenizer, max_length) for side in BOTH}
        for side, (codes, thinks) in sides.items():
            for code in codes | ({"tags_are_text"} if tags_are_text and (thinks or codes) else set()):
                found[code].setdefault(position, f"{name} ({side})")
        if sides["chosen"][1] != sides["rejected"][1]:
            found["thought_one_sided"][position] = name
    if len(found["thought_one_sided"]) <= len(rows) / 2:
        del found["thought_one_sided"]
    return [
        Finding(code, count=len(found[code]), rows=tuple(found[code]), origins=tuple(found[code].values())[:5], **one)
        for code, one in _FOUND.items()
        if code in found
    ]


def _side_codes(
    row: dict, side: str, texts: dict[str, Any], tokenizer: Tokenizer, max_length: int | None
) -> tuple[set[str], bool]:
    """The codes of what is wrong with one side, and whether it thinks; `texts` are those of `Renderer`."""
    before, full, codes, written = texts["asked"], texts[f"{side}_text"], set(), None
    if texts["refused"]:  # check_pairs names such rows
        return set(), False
    if not isinstance(row["prompt"], str):
        content = row[side][-1]["content"]
        # The template of a thinking-only model also takes a message whose thought only closes.
        only_closes = CLOSE in content and OPEN not in content and OPEN_AT_END.search(before)
        codes, written = _codes(content, tokenizer, opened=bool(only_closes))
    before_ids, full_ids = encode(tokenizer, [before, full])
    completion, thought = full[len(before) :], written
    if not codes and written and written not in full:
        codes = {"thought_lost"}
    elif not codes and full_ids[: len(before_ids)] != before_ids:
        codes = {"thought_breaks_prompt"}
    elif not codes:
        codes, thought = _codes(completion, tokenizer, opened=bool(OPEN_AT_END.search(before)))
        if not isinstance(row["prompt"], str) and not written:
            codes.discard("thought_empty")  # the template's own block, around no thought
    if max_length and len(full_ids) > max_length and CLOSE in completion:
        to_close = full[: full.rfind(CLOSE) + len(CLOSE)]
        if len(encode(tokenizer, [to_close])[0]) > max_length:
            codes.add("thought_cut")
    return codes, re.search(r"\w", thought or "") is not None
