"""Any spelling of turns as messages, and what a pair's messages must look like.

A row that is no pair raises LeftOut with its reason.
"""

import json
import re
from typing import Any

from datasets import List, Value

from helpers.data.preferences import LeftOut
from helpers.data.render import template_options

MESSAGES = List({"role": Value("string"), "content": Value("string")})
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# Arguments of `apply_chat_template` that are no variables of a template. A row that sets one would break rendering,
# or bring a template of its own.
NOT_TEMPLATE_VARIABLES = set(
    "conversation chat_template tools documents add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict tokenizer_kwargs return_assistant_tokens_mask".split()
)
NOT_READ_IN_MESSAGE = ("tool_calls", "tool_call_id", "reasoning_content", "thinking")
VALUE_KINDS = {
    str: "a text",
    list: "a list",
    dict: "an object",
    bool: "a truth value",
    int: "a number",
    float: "a number",
}
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System): ?")
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")


def valid_text(text: str) -> str:
    """The same text with halves of surrogate pairs, which no UTF-8 can hold, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _to_message(message: Any, column: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise LeftOut(f"{column} holds {kind_of(message)} where a message should be")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    for key in NOT_READ_IN_MESSAGE:
        if message.get(key):
            raise LeftOut(f"a message in {column} has {key}; only role and content are read")
    role = ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise LeftOut(f"a message in {column} has no role among system, user, assistant")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise LeftOut(f"a message in {column} holds {kind_of(content)}, not text")
    return {"role": role, "content": valid_text(content)}


def kind_of(value: Any) -> str:
    """What `value` is, in words."""
    return "nothing" if value is None else VALUE_KINDS.get(type(value), f"a {type(value).__name__}")


def dialogue_turns(text: str) -> list[dict[str, str]] | None:
    r"""The turns of a dialogue written as "\n\nHuman: ... \n\nAssistant: ..."; None for any other text."""
    start = TURN.match(text if text.startswith("\n\n") else text.lstrip("\n"))
    if not start or start[1] == "Assistant":
        return None
    parts = TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant", "System": "system"}
    return [
        {"role": roles[name], "content": valid_text(content.strip())}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def to_messages(value: Any, column: str, role: str, dialogue: bool) -> list[dict[str, str]]:
    """Any spelling of one or more turns as messages; a plain string becomes one turn of `role`."""
    if isinstance(value, str) and MESSAGES_AS_TEXT.match(value):
        try:
            value = json.loads(value)
        except ValueError:
            raise LeftOut(f"{column} looks like a list of messages but is no JSON") from None
    if isinstance(value, str):
        turns = dialogue_turns(value) if dialogue else None
        return turns or [{"role": role, "content": valid_text(value)}]
    if isinstance(value, dict):
        value = [value]
    if value is None:
        raise LeftOut(f"{column} is missing")
    if not isinstance(value, list):
        raise LeftOut(f"{column} is {kind_of(value)}, not text")
    if not value:
        raise LeftOut(f"{column} is an empty list")
    return [_to_message(message, column) for message in value]


def check_roles(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> None:
    """Raise LeftOut unless user and assistant take turns, and the prompt ends with a question."""
    for side, name in ((chosen, "chosen"), (rejected, "rejected")):
        if not side or side[-1]["role"] != "assistant":
            raise LeftOut(f"the last assistant turn is missing in {name}")
    if not prompt:
        raise LeftOut("the two dialogues share no beginning")
    if prompt[-1]["role"] != "user":
        raise LeftOut(f"the prompt ends with a turn of the {prompt[-1]['role']}, not of the user")
    if not prompt[-1]["content"].strip():
        raise LeftOut("the prompt is empty")
    start = 1 if prompt[0]["role"] == "system" else 0
    for side, name in ((chosen, "chosen"), (rejected, "rejected")):
        roles = [turn["role"] for turn in prompt[start:] + side]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise LeftOut(f"unbalanced roles: user and assistant do not take turns in prompt and {name}")


def read_template_kwargs(value: Any) -> dict[str, Any]:
    """A row's template variables, from JSON or an object. Raises LeftOut if it sets what it may not."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except ValueError:
            raise LeftOut("chat_template_kwargs is no JSON") from None
    if not isinstance(value or {}, dict):
        raise LeftOut(f"chat_template_kwargs is {kind_of(value)}, not an object")
    wrong = NOT_TEMPLATE_VARIABLES & set(value or {})
    if wrong:
        raise LeftOut(f"chat_template_kwargs sets {', '.join(sorted(wrong))}, which a row may not")
    return template_options({"chat_template_kwargs": value})


def prompt_text(prompt: list[dict[str, str]]) -> str:
    """A prompt for comparing: roles and texts without regard to case and to the amount of white space."""
    return "\n".join(f"{turn['role']}: {' '.join(turn['content'].split()).casefold()}" for turn in prompt)
