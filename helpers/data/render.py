"""Preference pairs: read from any usual file, brought to one form, split without leaks.

The one form, which TRL's DPOTrainer takes as it is:

- `prompt`: list of {role, content}; a system turn may come first, a user turn is last
- `chosen`, `rejected`: lists of {role, content} that begin and end with an assistant turn
- `origin`: "pairs.jsonl:12" is a line of a file, "pairs.parquet row 12" a row; both count from 1
- the source's other columns (topic, flaw, chat_template_kwargs, ...) as they were
"""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What `row` passes to the chat template: its chat_template_kwargs, without those that are None.

    Arrow fills the keys that other rows have with None, so None is taken as not set.
    """
    return {name: value for name, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}


def tokenize_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids as DPOTrainer makes them: columns prompt_ids, chosen_ids, rejected_ids (lists of int).

    The completion is what follows the prompt in the text of prompt and completion together.

    Args:
        pairs: in the form that `load_pairs` gives; their `chat_template_kwargs`, where there are any, are heeded.
        tokenizer: the model's, with its chat template.
    """

    def tokenize(row: dict) -> dict:
        options = template_options(row) | {"tokenize": True, "return_dict": True}

        def ids(messages: list[dict], **more: Any) -> list[int]:
            return tokenizer.apply_chat_template(messages, **options, **more)["input_ids"]

        prompt = ids(row["prompt"], add_generation_prompt=True)
        chosen, rejected = ids(row["prompt"] + row["chosen"]), ids(row["prompt"] + row["rejected"])
        shared = min(len(os.path.commonprefix([prompt, chosen])), len(os.path.commonprefix([prompt, rejected])))
        return {"prompt_ids": prompt[:shared], "chosen_ids": chosen[shared:], "rejected_ids": rejected[shared:]}

    return Dataset.from_list([tokenize(row) for row in pairs])


def pair_lengths(ids: Iterable[dict]) -> list[int]:
    """Tokens of each pair's longer side, prompt included; `ids` as `tokenize_pairs` gives them."""
    return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in ids]


def data_hash(tokenised: Dataset) -> str:
    """20 hex digits of the token ids of pairs, `tokenised` by `tokenize_pairs`, in their order."""
    digest = hashlib.sha256()
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for ids in tokenised[column]:
            digest.update(json.dumps(ids).encode())
    return digest.hexdigest()[:20]
