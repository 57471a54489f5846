"""Thinking pairs, whose sides differ in their thoughts: read from a file, and rendered for the model to be trained.

A thinking pair keeps each thought apart from its answer and holds no tags: `prompt` (text or messages),
`chosen_thought`, `chosen_answer`, `rejected_thought` (None: no thought at all), `rejected_answer`, `flaw` (what is
wrong with the rejected side), `topic` and `answer` (what a right answer must say, see `score.is_right`).
"""

from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset

from helpers.common import UserError
from helpers.data.load import BUNDLED_PAIRS
from helpers.data.sources import open_source
from helpers.model import Tokenizer
from helpers.thinking.tags import CLOSE, OPEN, think_boundary

BUNDLED_THINKING = BUNDLED_PAIRS.with_name("thinking_pairs.jsonl")
THINKING_FIELDS = "prompt chosen_thought chosen_answer rejected_thought rejected_answer flaw topic answer".split()


def load_thinking_pairs(path: str | Path = BUNDLED_THINKING) -> list[dict]:
    """Thinking pairs from the JSONL file at `path`, by default the 72 of this project; `origin` is file and line.

    A language model wrote those for this project and twice read them through critically; no person has. Raises
    UserError if there is no such file, or a line is no JSON object, or lacks a field.
    """
    pairs = []
    for origin, row in open_source(path, "train").rows():
        if not isinstance(row, dict):
            raise UserError(f"{origin}: a line must hold one JSON object with the fields {', '.join(THINKING_FIELDS)}.")
        pair = {field: row.get(field) for field in THINKING_FIELDS}
        for field, value in pair.items():
            if field == "prompt" and isinstance(value, list) or field == "rejected_thought" and value is None:
                continue
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{origin}: the field {field!r} must be text, but is {value!r:.60}.")
        pairs.append(pair | {"origin": origin})
    if not pairs:
        raise UserError(f"{Path(path).name} holds no pairs.")
    return pairs


def render_thinking(pairs: Iterable[dict], tokenizer: Tokenizer, enable_thinking: bool | None = None) -> Dataset:
    """Thinking pairs as conversations, in the form of `load_pairs` with an `answer`, for this model's chat template.

    Prompt + completion then carries exactly one `<think>...</think>`, and the prompt stays a token prefix. With
    `enable_thinking=False` the prompt of a hybrid model holds the (empty) thought: only the answers are left. Earlier
    turns of a prompt are left to the template, which treats them as it does at inference.

    Args:
        pairs, tokenizer: as `load_thinking_pairs` gives them, and of the model that they are for.
        enable_thinking: only for a hybrid model; False puts an empty thought into its prompt.

    Raises:
        UserError: `enable_thinking` for a model whose template has no such switch.
    """
    boundary = think_boundary(tokenizer, enable_thinking)
    if enable_thinking is not None and boundary.kind != "hybrid":
        raise UserError(f"This model is {boundary.kind}, not hybrid: leave enable_thinking out.")

    def reply(thought: str | None, answer: str) -> list[dict]:
        if thought is None and boundary.kind == "thinking-only":
            # It is opened already, and an empty one would change the prompt's last token (two newlines are one token).
            thought = "..."
        if thought is not None and not boundary.prompt_skips:
            answer = f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{answer.strip()}"
        return [{"role": "assistant", "content": answer}]

    options = {} if enable_thinking is None else {"chat_template_kwargs": {"enable_thinking": enable_thinking}}
    rows = []
    for number, pair in enumerate(pairs, 1):
        prompt = pair["prompt"]
        row = {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        row |= {side: reply(pair[f"{side}_thought"], pair[f"{side}_answer"]) for side in ("chosen", "rejected")}
        row |= {name: pair[name] for name in ("flaw", "topic", "answer")}
        rows.append(row | {"origin": pair.get("origin", f"row {number}")} | options)
    return Dataset.from_list(rows)
