"""Any spelling of turns as messages, and what a pair's messages must look like; else LeftOut says why not."""

import re
import unicodedata
from typing import Any

from datasets import Json, List, Value

from helpers.common import visible
from helpers.data import tables
from helpers.data.layouts import opened
from helpers.data.preferences import LeftOut, is_missing
from helpers.data.render import template_options

MESSAGES = List({"role": Value("string"), "content": Value("string")})
WHOLE_MESSAGES = List(Json())  # if any message has more than a role and a text
(WORDS,) = tables("words.yaml")
ROLES = {spelling: role for role, spellings in WORDS["roles"].items() for spelling in spellings}
KEPT, TEXT_KEYS, TALKS, NO_PLACE = WORDS["kept"], WORDS["texts"], WORDS["talks"], frozenset(WORDS["lost"])
LOOKS_LIKE_MESSAGES = re.compile(
    r"""\s*(?:array\()?\[?\s*\{\s*(?:["'](?:role|content|from|value)|[^{}]*,\s*["'](?:role|from))["']\s*:"""
)
PARTS = re.compile(r'\s*\[\s*\{[^{}]*"type"\s*:\s*"text"')


def _text_of_part(part: Any, column: str) -> str:
    """The text of one part of a message: {"type": "text", "text": ...}, {"text": ...} or a text by itself."""
    if isinstance(part, str):
        return part
    own = {name: value for name, value in part.items() if value} if isinstance(part, dict) else {}
    texts = [own[name] for name in TEXT_KEYS if name in own]
    other = next(
        (name for name in own if "type" not in own and name not in (*TEXT_KEYS, *WORDS["beside a text"])), None
    )
    if not isinstance(part, dict):
        kind = kind_of(part)
    elif other or own.get("type", "text") != "text":
        kind = other or own["type"]
    elif len(texts) > 1:
        kind = "several texts"
    elif texts and not isinstance(texts[0], str):
        kind = kind_of(texts[0])
    elif part.keys() & set(TEXT_KEYS):
        return "".join(texts)
    else:
        kind = "a text without a text"
    raise LeftOut(f"a message in {column} has a part that is no text ({visible(str(kind), 40)})")


def _role(message: dict[str, Any]) -> str | None:
    return ROLES.get(str(message.get("role") or message.get("from")).lower())


def _text_of(content: Any, column: str) -> str:
    if isinstance(content, list):
        return "".join(_text_of_part(part, column) for part in content)
    if not isinstance(content, str):
        raise LeftOut(f"a message in {column} holds {kind_of(content)}, not text")
    if PARTS.match(content) and opened(content) is not content:
        raise LeftOut(f"{column} holds the parts of a message as JSON in a text")
    return content


def _call(value: Any, column: str) -> dict[str, Any]:
    """A call of a tool as templates take it."""
    call = opened(value)
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise LeftOut(f"the tool_calls of a message in {column} hold {kind_of(function)}, not an object")
    name = next((name for name in WORDS["arguments"] if name in function), "arguments")
    own = {key: value for key, value in function.items() if key not in (name, "id")}
    made = {"type": "function", "function": {**own, "arguments": opened(function.get(name))}}
    return made | ({"id": call["id"]} if call.get("id") else {})


def _turns(message: Any) -> list[Any]:
    """The turns of a message, which may be a question and its answer: {input, output}, {human, assistant}."""
    if isinstance(message, dict) and not message.keys() & {"role", "from"}:
        asked = next((name for name in ("input", "human", "user") if name in message), "")
        roles = {"system": "system", "user": asked, "assistant": "output" if asked == "input" else "assistant"}
        held = {name for name, value in message.items() if value is not None}
        if (asked == "input" and not _lost(message)) or (asked and held <= set(roles.values())):
            return [{"role": role, "content": message[name]} for role, name in roles.items() if message.get(name)]
    return [message]


def _lost(given: dict[str, Any]) -> list[str]:
    """What an object has that belongs to its text or its messages, and has no place in them."""
    if NO_PLACE.isdisjoint(given):
        return []
    return [name for name in WORDS["lost"] if isinstance(given.get(name), str | list | dict) and holds(given[name])]


def holds(value: Any) -> bool:
    """Whether a cell has anything, or a list or an object in it."""
    value = opened(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value or None]
    return any(item is not None for item in items)


def _to_message(message: Any, column: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise LeftOut(f"{column} is a list that holds {kind_of(message)} where a message {{role, content}} should be")
    named = message.get("role") or message.get("from")
    texts = [message[name] for name in TEXT_KEYS if message.get(name) is not None]
    content = next((text for text in texts if text and isinstance(text, str | list)), texts[0] if texts else None)
    if lost := _lost(message):
        raise LeftOut(f"a message in {column} has {', '.join(lost)} beside its text")
    if (role := _role(message)) is None:
        named = visible(str(named), 40)
        raise LeftOut(f"a message in {column} has no role among system, user, assistant, tool, but {named!r}")
    more = {ours: message[name] for name, ours in KEPT.items() if message.get(name)}
    if str(named).lower() == "function_call":  # LLaMA-Factory: the call is the text
        more, content = {"tool_calls": content}, None
    if "tool_calls" in more:  # `function_call` is the older spelling of one
        calls = opened(more["tool_calls"])
        calls = calls if isinstance(calls, list) else [calls]
        more["tool_calls"], content = [_call(call, column) for call in calls], content or ""
    return {"role": role, "content": _text_of(content, column), **more}


def has_more(value: Any) -> bool:
    """Whether messages in a cell have more than a role and a text."""
    if isinstance(value, str) and value.lstrip()[:1] == '"':
        value = opened(value)
    if isinstance(value, str):
        return value.lstrip()[:1] in ("{", "[") and any(f'"{name}"' in value for name in KEPT)
    if isinstance(items := talk_in(value) or value, list):
        return any(map(has_more, items))
    called = isinstance(value, dict) and "function_call" in (value.get("from"), value.get("role"))
    return called or (isinstance(value, dict) and any(map(value.get, KEPT)))


def talk_in(value: Any) -> list[Any] | None:
    """The messages in an object that has them under a name of their own."""
    lists = (value.get(name) for name in TALKS) if isinstance(value, dict) else ()
    return next((one for one in lists if isinstance(one, list)), None)


def kind_of(value: Any) -> str:
    """What `value` is, in words."""
    return WORDS["kinds"].get(name := type(value).__name__, f"a {name}")


def texts_of(value: Any) -> list[str | None] | None:
    """A list of texts (or nulls), or its JSON, as Chatbot Arena has for the turns of one side; else None."""
    value = opened(value)
    texts = isinstance(value, list) and value and all(isinstance(item, str | None) for item in value)
    return value if texts and not _messages_in(value) else None


def _messages_in(value: Any, objects: bool = False, role: str = "") -> list[dict[str, Any]] | None:
    """The messages of a cell, objects or JSON; pandas makes a list of JSON texts of them (datasets#8343). Else None.

    Of unusual names in JSON, which may be an honest answer, only those of a message that has nothing else.
    """
    items = [opened(item) for item in (value if isinstance(value, list) else [value])]
    whole = all(isinstance(item, dict) and _is_message(item, objects, role) for item in items)
    return items if items and whole else None


def _is_message(item: dict[str, Any], objects: bool, role: str) -> bool:
    names = item.keys()
    if names & {"role", "from"}:
        text = isinstance(item.get("text"), str) or isinstance(item.get("parts"), list)
        alone = objects or (len(names) == 2 and _role(item) is not None)
        return bool(names & {"content", "value", *KEPT}) or (text and alone)
    both = names - {"system"} in ({"human", "assistant"}, {"user", "assistant"})
    return both and role == "user" and all(isinstance(text, str) for text in item.values())


def _certain(found: Any, role: str) -> bool:
    """Whether JSON in JSON, which may be an honest answer, is messages of known roles that can stand in such a cell."""
    turns = talk_in(found) or (found if isinstance(found, list) else [found])
    known = [isinstance(turn, dict) and _role(turn) for turn in map(opened, turns)]
    return all(known) and (role == "user" or known[-1:] == [role])


def to_messages(value: Any, column: str, role: str) -> list[dict[str, Any]]:
    """Any spelling of one or more turns as messages; a plain string becomes one turn of `role`."""
    if isinstance(value, str) and value.lstrip()[:1] not in ("[", "{", "a", '"'):  # most are plain
        return [{"role": role, "content": value}]
    found = opened(value)
    if isinstance(value, str) and value.lstrip()[:1] == '"' and not _certain(found, role):
        return [{"role": role, "content": value}]
    if isinstance(found, dict) and (talk := talk_in(found)) is not None:
        if lost := _lost(found):
            raise LeftOut(f"{column} has {', '.join(lost)} beside its messages")
        others = found.keys() - {*TALKS, "tools", "system"}
        last = talk[-1] if talk and isinstance(talk[-1], dict) else {}
        if found is not value and others and _role(last) == role:
            raise LeftOut(f"{column} holds messages as JSON in a text, beside {visible(', '.join(sorted(others)), 60)}")
        if found is value or not others:
            system = [{"role": "system", "content": found["system"]}] if found.get("system") else []
            found = value = [*(turn for turn in system if turn not in talk[:1]), *talk]
    objects = isinstance(value, list) and value and isinstance(value[0], dict)  # as most are
    if not objects and (items := _messages_in(found, value is found, role)):
        value = items
    elif isinstance(value, str) and found is value and LOOKS_LIKE_MESSAGES.match(value):
        raise LeftOut(f"{column} looks like a list of messages but is no JSON")
    value = [value] if isinstance(value, str | dict) else value
    if not isinstance(value, list) or not value:
        nothing = "an empty list" if value == [] else "missing" if is_missing(value) else f"{kind_of(value)}, not text"
        raise LeftOut(f"{column} is {nothing}")
    if isinstance(value[0], str) and all(isinstance(item, str) for item in value):
        if len(value) > 1:
            raise LeftOut(f"{column} is a list of {len(value)} texts: write one row for each, or join them")
        return [{"role": role, "content": _text_of(value[0], column)}]
    turns = [_to_message(turn, column) for message in value for turn in _turns(message)]
    if not any("tool_call_id" in turn for turn in turns):  # then an id tells nothing, and could be the one difference
        for call in (call for turn in turns for call in turn.get("tool_calls", ())):
            call.pop("id", None)
    return turns


def check_roles(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> None:
    """Raise LeftOut unless user and assistant take turns, and the prompt ends with a question."""
    sides = {"chosen": chosen, "rejected": rejected}
    for name, side in sides.items():
        if not side or side[-1]["role"] != "assistant":
            raise LeftOut(f"the last assistant turn is missing in {name}")
    if not prompt:
        raise LeftOut("the two dialogues share no beginning")
    if prompt[-1]["role"] not in ("user", "tool"):
        role = "system or developer" if prompt[-1]["role"] == "system" else prompt[-1]["role"]
        raise LeftOut(f"the prompt ends with a turn of the {role}, not of the user")
    if not prompt[-1]["content"].strip():
        raise LeftOut("the prompt is empty")
    for name, side in sides.items():
        before = ""
        for turn in prompt[prompt[0]["role"] == "system" :] + side:
            if turn["role"] not in WORDS["after"][before]:
                raise LeftOut(f"unbalanced roles: user and assistant do not take turns in prompt and {name}")
            before = "calls" if turn.get("tool_calls") else turn["role"]


def read_template_kwargs(value: Any) -> dict[str, Any]:
    """A row's template variables, from JSON or an object. Raises LeftOut if it sets what it may not."""
    value = opened(value.strip()) if isinstance(value, str) else value
    if not isinstance(value or {}, dict):
        what = "no JSON" if isinstance(value, str) else f"{kind_of(value)}, not an object"
        raise LeftOut(f"chat_template_kwargs is {what}")
    if wrong := set(value or {}).intersection(WORDS["no variables"]):
        raise LeftOut(f"chat_template_kwargs sets {', '.join(sorted(wrong))}, which a row may not")
    return template_options({"chat_template_kwargs": value})


def prompt_text(prompt: list[dict[str, str]]) -> str:
    """A prompt for comparing: roles and texts without regard to case, to the amount of white space, and to how a letter
    with an accent is written."""
    text = "\n".join(f"{turn['role']}: {' '.join(turn['content'].split()).casefold()}" for turn in prompt)
    return unicodedata.normalize("NFC", text)
