"""A row of pairs becomes text and token ids here, and nowhere else.

What was checked is what is trained, scored, sampled and exported: all of them take the ids that this module makes, by
the chat template with the row's own `tools` and `chat_template_kwargs`. They are the ids that TRL's DPOTrainer would
make, in batches.
"""

import functools
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from helpers.common import UserError
from helpers.patches.given_ids import ID_COLUMNS
from helpers.session import quiet_progress

Prompt = str | list[dict] | dict  # a question, a conversation, or a row of pairs
BOTH = ("chosen", "rejected")
TEXTS = ("asked", "chosen_text", "rejected_text")
BATCH = 500  # rows at a time: enough for the tokenizer's threads, little enough to keep memory flat
IDS = Features({name: List(Value("int32")) for name in ID_COLUMNS})


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What a `row` of pairs passes to the chat template besides its messages: `tools` (schemas, or their JSON; other
    text raises ValueError) and its chat_template_kwargs. Arrow fills the keys of other rows with None: taken as not
    set."""
    tools, variables = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else None
    return ({"tools": tools} if tools else {}) | {name: one for name, one in variables.items() if one is not None}


def shared_options(pairs: Dataset) -> dict[str, Any]:
    """The chat_template_kwargs that all rows of `pairs` have in common, e.g. enable_thinking=False; else nothing."""
    kwargs = pairs["chat_template_kwargs"] if "chat_template_kwargs" in pairs.column_names else []
    rows = [template_options({"chat_template_kwargs": own}) for own in kwargs]
    return rows[0] if rows and all(row == rows[0] for row in rows) else {}


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options: Any) -> str:
    """The `messages` of one conversation as text, by the `tokenizer`'s chat template, which gets the `options`.
    `add_generation_prompt=True` is for a prompt. Raises UserError if there is no chat template."""
    if not tokenizer.chat_template:
        raise UserError("This tokenizer has no chat template: take the instruct version of the model, or set one.")
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def reply_opening(tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """What the `tokenizer`'s chat template, which gets the `options`, writes where a reply begins."""
    asked = [{"role": "user", "content": "Hi"}]
    return render(tokenizer, asked, add_generation_prompt=True, **options)[len(render(tokenizer, asked, **options)) :]


def is_hybrid(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the `tokenizer`'s chat template puts an empty thought before a reply if it gets enable_thinking=False."""
    return "</think>" in (_or_none(reply_opening, tokenizer, enable_thinking=False) or "")


def has_thought(row: dict[str, Any]) -> bool:
    """Whether an answer of this row of pairs has a thought."""
    turns = [turn for side in BOTH for turn in row[side]]
    return any("<think>" in turn["content"] or turn.get("reasoning_content") for turn in turns)


def thinking_off(row: dict[str, Any], hybrid: bool) -> dict[str, Any]:
    """What a `hybrid` thinker's chat template gets for a `row` of pairs whose answers are one turn without a thought:
    it writes an empty thought before such an answer, but before a reply it does so only if thinking is off."""
    ordinary = all(len(row.get(side, ())) == 1 for side in BOTH) and not has_thought(row)
    return {"enable_thinking": False} if hybrid and ordinary else {}


def turns_of(prompt: Prompt) -> list[dict]:
    """The messages of a `prompt`."""
    turns = prompt["prompt"] if isinstance(prompt, dict) else prompt
    return [{"role": "user", "content": turns}] if isinstance(turns, str) else turns


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt], **options: Any) -> list[list[int]]:
    """Token ids of `prompts` up to where the reply begins. `options` are for the `tokenizer`'s chat template, e.g.
    enable_thinking=False; what a row of pairs brings (tools, chat_template_kwargs) goes before them."""
    texts = []
    for one in prompts:
        own, off = (template_options(one), thinking_off(one, True)) if isinstance(one, dict) else ({}, {})
        off = off if off and is_hybrid(tokenizer) else {}  # asked of the template for few prompts
        texts.append(render(tokenizer, turns_of(one), add_generation_prompt=True, **off | options | own))
    return encode(tokenizer, texts)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered `texts`, to which `tokenizer` adds no special tokens: the template wrote them."""
    call = functools.partial(tokenizer, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return call(texts)["input_ids"] if texts else []


def rows_of(batch: dict[str, list]) -> list[dict[str, Any]]:
    """The rows of a `batch` of columns, without those that nothing is rendered from."""
    names = [name for name in ("prompt", *BOTH, "tools", "chat_template_kwargs", "origin") if name in batch]
    return [dict(zip(names, values, strict=True)) for values in zip(*(batch[name] for name in names), strict=True)]


def _or_none(call: Callable, *args: Any, **options: Any) -> Any:
    try:
        return call(*args, **options)
    except Exception:  # a template's own: it may raise anything
        return None


class Renderer:
    """Renders and tokenises batches of pairs for one tokenizer. The beginning that prompt, chosen and rejected share is
    tokenised once, up to the last place where a cut cannot change the ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.hybrid = tokenizer, is_hybrid(tokenizer)
        opening = self.text([{"role": "user", "content": "x"}], {}, add_generation_prompt=True) or ""
        added = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
        fast = getattr(tokenizer, "is_fast", False) and not getattr(tokenizer, "split_special_tokens", False)
        contents = [token.content for token in added]
        self.cuts = [token.content for token in added if token.special and fast and cuts_cleanly(token, contents)]
        self.cuts.sort(key=opening.rfind, reverse=True)  # the token that opens the answer is nearly always the one

    def text(self, messages: list[dict], options: dict | None, **more: Any) -> str | None:
        """`messages` by the chat template, which gets their row's `options` and `more`; None if it refuses them."""
        return None if options is None else _or_none(render, self.tokenizer, messages, **options | more)

    def _cut(self, prompt: str, *others: str) -> int:
        """Up to where all texts are the same and may be cut, so that no token changes; 0 if there is no such place."""
        places = ((place, prompt[: place + len(token)]) for token in self.cuts if (place := prompt.rfind(token)) > 0)
        return next((place for place, start in places if all(other.startswith(start) for other in others)), 0)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each of `rows`, pairs as `load_pairs` gives them: asked is the text of the prompt with what opens the
        reply, prompt_tokens counts its tokens; chosen_text and rejected_text are of the whole conversation. IDS are as
        TRL's trainer takes them: prompt_ids are those of asked that both conversations begin with. options is what the
        chat template got, refused whether it raised an error."""
        result, pieces = [self._texts(row) for row in rows], []
        for one in result:
            asked, *whole = (one[name] for name in TEXTS)
            cut = self._cut(asked, *whole)
            pieces += [asked[:cut], *(text[cut:] for text in (asked, *whole))]
        ids = iter(encode(self.tokenizer, pieces))
        for one in result:
            part, end, chosen, rejected = itertools.islice(ids, 4)
            if self.cuts and one is result[0] and part + chosen != encode(self.tokenizer, [one["chosen_text"]])[0]:
                self.cuts = []  # by the rules of `cuts_cleanly` this cannot be; one row of each batch is still compared
                return self(rows)
            shared = len(os.path.commonprefix([end, chosen, rejected]))
            one["prompt_tokens"] = len(part) + len(end)
            one |= zip(IDS, (part + end[:shared], chosen[shared:], rejected[shared:]), strict=True)
        return result

    def _texts(self, row: dict[str, Any]) -> dict[str, Any]:
        options = _or_none(lambda: thinking_off(row, self.hybrid) | template_options(row))
        texts = [self.text(row["prompt"], options, add_generation_prompt=True)]
        texts += [self.text(row["prompt"] + row[side], options) for side in BOTH]
        return {"options": options, "refused": None in texts} | {k: t or "" for k, t in zip(TEXTS, texts, strict=True)}


def cuts_cleanly(token: Any, others: Iterable[str]) -> bool:
    """Whether a text cut in two before the AddedToken `token` keeps its ids; `others` are the texts of all such tokens.
    A fast tokenizer takes its added tokens out of the raw text first (the leftmost, longest match), then normalises,
    splits and merges what lies between them piece by piece, so no merge crosses an added token. A cut before one could
    still be felt if the match took in white space, depended on the neighbours or on the normaliser, or if another match
    could begin before the cut and reach over it."""
    text, plain = token.content, not (token.lstrip or token.single_word or token.normalized)
    starts = [text[:n] for n in range(1, len(text))]
    return plain and not any(text in other[1:] or other.endswith(tuple(starts)) for other in others)


def mapped(pairs: Dataset, make: Callable, features: Features, **more: Any) -> Dataset:
    """What `make` gives for batches of `pairs`, in columns of their own; `more` is for `Dataset.map`."""
    with quiet_progress(len(pairs)):
        old = pairs.column_names
        return pairs.map(make, batched=True, batch_size=BATCH, remove_columns=old, features=features, **more)


def tokenize_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids of `pairs` as DPOTrainer makes them: columns prompt_ids, chosen_ids, rejected_ids (lists of int). The
    completion is what follows the prompt in the text of prompt and completion together. Raises UserError if the
    `tokenizer`'s chat template refuses a row."""
    renderer = Renderer(tokenizer)

    def ids(batch: dict[str, list], places: list[int]) -> dict[str, list]:
        rendered = renderer(rows := rows_of(batch))
        for place, row, one in zip(places, rows, rendered, strict=True):
            if one["refused"]:
                origin = row.get("origin", f"row {place + 1}")
                raise UserError(f"{origin}: the chat template refuses this row. check_pairs names all such rows.")
        return {name: [one[name] for one in rendered] for name in IDS}

    # Not kept on disk, where nobody would find it again.
    return mapped(pairs, ids, IDS, with_indices=True, keep_in_memory=True, new_fingerprint=uuid.uuid4().hex)


def token_counts(ids: Dataset) -> dict[str, np.ndarray]:
    """Tokens of "prompt", "chosen" and "rejected" of each pair, arrays of shape (pairs,); `ids` as in `IDS`."""
    table = ids.with_format("arrow")[:]
    return {name.removesuffix("_ids"): pc.list_value_length(table[name]).to_numpy() for name in IDS}


def pair_lengths(ids: Dataset) -> np.ndarray:
    """Tokens of each pair's longer side, prompt included, shape (pairs,); `ids` as in `IDS`."""
    counts = token_counts(ids)
    return counts["prompt"] + np.maximum(counts["chosen"], counts["rejected"])


def data_hash(ids: Dataset) -> str:
    """20 hex digits of the token `ids` of pairs (`IDS`), in their order."""
    digest = hashlib.sha256()
    for name in IDS:
        for batch in ids.select_columns([name]).with_format("arrow").iter(BATCH):
            for row in batch[name].to_pylist():
                digest.update(str(row).encode())
    return digest.hexdigest()[:20]
