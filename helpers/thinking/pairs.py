"""Thoughts between `<think>` and `</think>`: where they begin and end, pairs that differ in them, what goes wrong.

A thinking pair keeps each thought apart from its answer and holds no tags: `prompt` (text or messages),
`chosen_thought`, `chosen_answer`, `rejected_thought` (None: no thought at all), `rejected_answer`, `flaw` (what is
wrong with the rejected side), `topic` and `answer` (what a right answer must say, see `is_right`). 72 are written, and
`helpers.word_problems` makes more. `render_thinking` puts the tags where the model at hand wants them, and gives
pairs in the form of `load_pairs`.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from helpers.common import UserError
from helpers.data.load import BUNDLED_PAIRS
from helpers.thinking.tags import CLOSE, OPEN, think_boundary

BUNDLED_THINKING = BUNDLED_PAIRS.with_name("thinking_pairs.jsonl")
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


def load_thinking_pairs(path: str | Path = BUNDLED_THINKING) -> list[dict]:
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
