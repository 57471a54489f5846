"""Replies of a model to prompts, in batches, and what can be counted in them."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from helpers.data.render import prompt_ids
from helpers.model import Model, Prompts, Tokenizer
from helpers.model.load import check_token


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """`model` in eval mode for the block, then in the mode that it had, also after an exception."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Reply(NamedTuple):
    """One completion."""

    text: str  # without special tokens
    ids: list[int]  # with the token that ends the turn
    ended: bool  # by the model; else it was cut at `max_new_tokens`


def generate_replies(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    **template_options: Any,
) -> list[Reply]:
    """One reply of `model` to each prompt, in their order; the reference's inside `with model.disable_adapter():`.

    Args:
        prompts: questions (str), conversations, or rows of pairs, whose `tools` and `chat_template_kwargs` count.
        max_new_tokens: where a reply is cut; its `ended` is then False.
        temperature: 0 is greedy; above 0 samples, with `top_p` and `seed`; a sampled reply depends on its batch too.
        batch_size: prompts at a time; left out, 16 on a CPU and 128 on a GPU, where more rows take hardly more time.
        tokenizer, template_options: its chat template is given these, e.g. enable_thinking=False.
    """
    ids = prompt_ids(tokenizer, prompts, **template_options)
    check_token(model, tokenizer, max(itertools.chain(*ids), default=0))
    batch_size = batch_size or (16 if model.device.type == "cpu" else 128)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    # Some models' own settings penalise repetition: their log-probs don't know of it. transformers warns where greedy
    # decoding is given settings of sampling, so they are taken away.
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0, "repetition_penalty": 1.0}
    sampling = sampling if temperature else dict.fromkeys(("temperature", "top_p", "top_k"))
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    sampling |= {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "eos_token_id": sorted(ends)}
    replies = {}
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(ids), batch_size):
            index = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in index]}, padding_side="left", return_tensors="pt")
            output = model.generate(**batch.to(model.device), pad_token_id=tokenizer.pad_token_id, **sampling)
            for i, row in zip(index, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), None)
                row = row if end is None else row[: end + 1]
                replies[i] = Reply(tokenizer.decode(row, skip_special_tokens=True), row, end is not None)
    return [replies[i] for i in range(len(ids))]


def repetition(ids: list[int], n: int = 4) -> float:
    """Share of n-grams of the `ids` that occurred before in the same reply (seq-rep-n of Welleck et al. 2019).

    >>> repetition([1, 2, 3, 1, 2, 3], n=3)
    0.25
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
