"""A row of pairs becomes text and token ids here, and nowhere else.

What was checked is what is trained, scored, sampled and exported: all of them take the ids that this module makes, by
the chat template with the row's own `tools` and `chat_template_kwargs`. They are the ids that TRL's DPOTrainer would
make, in batches.
"""

import collections
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
BATCH = 500  # rows at a time: enough for the tokenizer's threads, little enough to keep memory flat
IDS = Features({name: List(Value("int32")) for name in ID_COLUMNS})


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What a `row` of pairs passes to the chat template besides its messages: `tools` and its chat_template_kwargs.

    `tools` is a list of schemas or their JSON; text that is no JSON raises ValueError. Arrow fills the keys that other
    rows have with None, so None is taken as not set.
    """
    tools, variables = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else None
    return ({"tools": tools} if tools else {}) | {name: one for name, one in variables.items() if one is not None}


def shared_options(pairs: Dataset) -> dict[str, Any]:
    """The chat_template_kwargs that all rows of `pairs` have in common, e.g. enable_thinking=False; else nothing."""
    if "chat_template_kwargs" not in pairs.column_names:
        return {}
    rows = [template_options({"chat_template_kwargs": own}) for own in pairs["chat_template_kwargs"]]
    return rows[0] if rows and all(row == rows[0] for row in rows) else {}


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options: Any) -> str:
    """One conversation as the text that the chat template makes of it.

    Args:
        tokenizer: the model's. Raises UserError if it has no chat template.
        messages: of one conversation.
        options: of the chat template; `add_generation_prompt=True` for a prompt.
    """
    if not tokenizer.chat_template:
        raise UserError("This tokenizer has no chat template: take the instruct version of the model, or set one.")
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def turns_of(prompt: Prompt) -> list[dict]:
    """The messages of a `prompt`."""
    turns = prompt["prompt"] if isinstance(prompt, dict) else prompt
    return [{"role": "user", "content": turns}] if isinstance(turns, str) else turns


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt], **options: Any) -> list[list[int]]:
    """Token ids of prompts up to where the reply begins.

    Args:
        tokenizer: the model's.
        prompts: each a question (str), a conversation, or a row of pairs, whose tools and chat_template_kwargs count.
        options: for the chat template of all of them, e.g. enable_thinking=False; what a row brings goes before it.
    """
    rows = [(turns_of(one), options | (template_options(one) if isinstance(one, dict) else {})) for one in prompts]
    texts = [render(tokenizer, turns, add_generation_prompt=True, **own) for turns, own in rows]
    return encode(tokenizer, texts) if texts else []


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered `texts`, to which `tokenizer` adds no special tokens: the template wrote them."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _or_none(call: Callable, *args: Any, **options: Any) -> Any:
    try:
        return call(*args, **options)
    except Exception:  # a template's own: it may raise anything
        return None


def batch_options(batch: dict[str, list]) -> list[dict | None]:
    """`template_options` of each row of `batch`; None for one whose tools cannot be read."""
    columns = [name for name in ("tools", "chat_template_kwargs") if name in batch]
    values = zip(*(batch[name] for name in columns), strict=True) if columns else [()] * len(batch["prompt"])
    return [_or_none(template_options, dict(zip(columns, row, strict=True))) for row in values]


class Renderer:
    """Renders and tokenises batches of pairs for one tokenizer.

    The beginning that prompt, chosen and rejected share is tokenised once, up to the last place where a cut cannot
    change the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        opening = self.texts([[{"role": "user", "content": "x"}]], [{}], add_generation_prompt=True)[0] or ""
        added = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
        fast = getattr(tokenizer, "is_fast", False) and not getattr(tokenizer, "split_special_tokens", False)
        contents = [token.content for token in added]
        self.cuts = [token.content for token in added if token.special and fast and cuts_cleanly(token, contents)]
        self.cuts.sort(key=opening.rfind, reverse=True)  # the token that opens the answer is nearly always the one

    def texts(self, conversations: list[list[dict]], options: list[dict | None], **kwargs: Any) -> list[str | None]:
        """Each of `conversations` with its row's `options` and all `kwargs`; None if the template refuses it."""
        apply = functools.partial(_or_none, self.tokenizer.apply_chat_template, tokenize=False)
        texts: list[str | None] = [None] * len(conversations)
        groups = collections.defaultdict(list)
        for row, own in enumerate(options):
            if own is not None:
                groups[json.dumps(own, sort_keys=True)].append(row)
        for rows in groups.values():
            of_all, group = (options[rows[0]] or {}) | kwargs, [conversations[row] for row in rows]
            rendered = apply(group, **of_all) or [apply(one, **of_all) for one in group]  # one of many may be refused
            for row, text in zip(rows, rendered, strict=True):
                texts[row] = text
        return texts

    def _cut(self, prompt: str, *others: str) -> int:
        """Up to where all texts are the same and may be cut, so that no token changes; 0 if there is no such place."""
        for token in self.cuts:
            place = prompt.rfind(token)
            if place > 0 and all(other.startswith(prompt[: place + len(token)]) for other in others):
                return place
        return 0

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """The rows of `batch`, columns of pairs as `load_pairs` gives them, as columns of text and ids.

        IDS are as TRL's trainer takes them; chosen_text and rejected_text are of the whole conversation; prompt_tokens
        counts the prompt with what opens the reply, also ids that are not the first of both conversations and so are
        left out of prompt_ids; refused says whether the chat template raised an error.
        """
        options, prompts = batch_options(batch), batch["prompt"]
        whole = [[a + b for a, b in zip(prompts, batch[side], strict=True)] for side in ("chosen", "rejected")]
        rendered = [self.texts(prompts, options, add_generation_prompt=True), *(self.texts(w, options) for w in whole)]
        refused = [None in texts for texts in zip(*rendered, strict=True)]
        texts = [[text or "" for text in column] for column in rendered]
        cuts = [self._cut(*row) for row in zip(*texts, strict=True)]
        parts, ends, *sides = self._tokens(texts, cuts)
        if self.cuts and parts and parts[0] + sides[0][0] != encode(self.tokenizer, [texts[1][0]])[0]:
            self.cuts = []  # by the rules of `cuts_cleanly` this cannot be; one row of each batch is looked at still
            return self(batch)
        result: dict[str, list] = {"chosen_text": texts[1], "rejected_text": texts[2], "refused": refused}
        result |= {name: [] for name in ("prompt_tokens", *IDS)}
        for part, end, chosen, rejected in zip(parts, ends, *sides, strict=True):
            shared = len(os.path.commonprefix([end, chosen, rejected]))
            result["prompt_tokens"].append(len(part) + len(end))
            result["prompt_ids"].append(part + end[:shared])
            result["chosen_ids"].append(chosen[shared:])
            result["rejected_ids"].append(rejected[shared:])
        return result

    def _tokens(self, texts: list[list[str]], cuts: list[int]) -> list[list[list[int]]]:
        """Ids of what the three texts of a row share, of the prompt's end after it, and of both sides after it."""
        parts = [text[:cut] for text, cut in zip(texts[0], cuts, strict=True)]
        endings, chosen, rejected = ([text[cut:] for text, cut in zip(column, cuts, strict=True)] for column in texts)
        unique = list(dict.fromkeys(endings))  # prompts have few
        ids = iter(encode(self.tokenizer, parts + chosen + rejected + unique))
        parts, chosen, rejected = (list(itertools.islice(ids, len(cuts))) for _ in range(3))
        of_ending = dict(zip(unique, ids, strict=True))
        return [parts, [of_ending[ending] for ending in endings], chosen, rejected]


def cuts_cleanly(token: Any, others: Iterable[str]) -> bool:
    """Whether a text may be tokenised in two parts, the second of which begins with `token`, and keeps its ids.

    `token` is an AddedToken, `others` the texts of all. A fast tokenizer takes its added tokens out of the raw text
    first (the leftmost, longest match), then normalises, splits and merges what lies between them piece by piece, so no
    merge crosses an added token. A cut before one could still be felt if the match took in white space, depended on
    the neighbours or on the normaliser, or if another match could begin before the cut and reach over it.
    """
    text = token.content
    reaches_over = any(
        text in other[1:] or any(other.endswith(text[:n]) for n in range(1, len(text))) for other in others
    )
    return not (token.lstrip or token.single_word or token.normalized or reaches_over)


# ------------------------------------------------------------------------------------------------ ids of a data set


def tokenize_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids as DPOTrainer makes them: columns prompt_ids, chosen_ids, rejected_ids (lists of int).

    The completion is what follows the prompt in the text of prompt and completion together.

    Args:
        pairs: in the form that `load_pairs` gives; their `tools` and `chat_template_kwargs`, if there are any, count.
        tokenizer: the model's, with its chat template.

    Raises:
        UserError: the chat template refuses a row.
    """
    renderer = Renderer(tokenizer)

    def ids(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        rendered = renderer(batch)
        if any(rendered["refused"]):
            row = rendered["refused"].index(True)
            origin = batch["origin"][row] if "origin" in batch else f"row {rows[row] + 1}"
            raise UserError(f"{origin}: the chat template refuses this row. check_pairs names all such rows.")
        return {name: rendered[name] for name in IDS}

    with quiet_progress(len(pairs)):
        return pairs.map(
            ids,
            batched=True,
            with_indices=True,
            batch_size=BATCH,
            remove_columns=pairs.column_names,
            features=IDS,
            keep_in_memory=True,  # on disk nobody would find it again
            new_fingerprint=uuid.uuid4().hex,
        )


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
