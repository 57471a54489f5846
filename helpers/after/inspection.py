"""Inspection: what a run changed, in its replies, in the rewards of pairs, and token by token.

All three functions take a run, its folder, or what `open_run` gave, which loads the model once for many calls, and
raise the UserError of `open_run`. Texts in their tables are safe to show (`visible`).
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer

from helpers.after import refused
from helpers.common import visible
from helpers.data.render import BOTH, Prompt, Renderer, tokenize_pairs, turns_of
from helpers.model import Model, Tokenizer
from helpers.model.fingerprint import base_hash, config_hash
from helpers.model.generate import generate_replies, repetition
from helpers.model.load import load_model, not_found
from helpers.model.logps import pair_logps
from helpers.model.policy import Policy, same_reference
from helpers.run.folder import POLICY_AT_START, Run
from helpers.run.metrics import held_out_table


def _conversation(prompt: Prompt) -> str:
    first, *rest = turns = turns_of(prompt)
    return visible("\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) if rest else first["content"])


@dataclasses.dataclass(repr=False, eq=False)
class OpenRun:
    """A run with its policy in memory; `ref_model` is the reference if that was passed to the training."""

    run: Run
    model: PeftModel
    tokenizer: Tokenizer
    ref_model: Model | None = None

    def __post_init__(self) -> None:
        self.beta, self.max_length = self.run.info.config["beta"], self.run.info.config["max_length"]

    @contextlib.contextmanager
    def reference(self) -> Iterator[Model]:
        """The model that was passed to the training, the adapter that it started from, or the base model.

        For a `with` block in which the policy must not be used.
        """
        with contextlib.ExitStack() as after:
            if self.ref_model is None and self.run.reference is None:
                after.enter_context(self.model.disable_adapter())
            elif self.ref_model is None:
                after.callback(self.model.set_adapter, "default")
                self.model.set_adapter("reference")
            yield self.ref_model or self.model

    def both(self, ask: Callable[[Model], Any]) -> dict[str, Any]:
        """What `ask` gives for the "reference" and for the "policy"."""
        with self.reference() as model:
            answers = {"reference": ask(model)}
        return answers | {"policy": ask(self.model)}


def check_files(run: Run) -> Tokenizer:
    """The tokenizer of `run`; UserError unless it can be loaded and the adapters are as run.json describes them."""
    run.load_adapter()
    if "reference" in run.info.lora:
        run.load_adapter("reference")
    run.check_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(run.adapter, trust_remote_code=False)
    except Exception as error:  # tokenizers has no type of its own
        raise not_found(str(run.adapter), error) from error


def _check_reference(run: Run, ref_model: Model | None) -> None:
    passed = run.info.reference != POLICY_AT_START
    if passed and ref_model is None:
        raise refused("reference_needed", run=run.folder.name)
    if ref_model is not None and not same_reference(run.info.reference, Policy(ref_model, None).as_reference):
        what = "another model than" if passed else "no model that was passed, so not"
        raise refused("other_reference", run=run.folder.name, what=what)


def compare_base(run: Run, model: Model) -> None:
    """Raise UserError unless the base of `model` is that of the run: the same weights, the same settings."""
    in_32_bits = not getattr(model, "is_loaded_in_4bit", False)  # as a run may have been trained
    if run.info.base != base_hash(model) and not (in_32_bits and run.info.base == base_hash(model.float())):
        raise refused("other_base", run=run.folder.name, model=run.info.model)
    if run.info.base_config not in ("", config_hash(model)):
        raise refused("other_base_config", run=run.folder.name, model=run.info.model)


def load_policy(run: Run) -> tuple[PeftModel, Tokenizer]:
    """(policy, tokenizer) of a run whose files were checked. Raises UserError if its base model is not here."""
    tokenizer = check_files(run)
    model, _ = load_model(str(run.adapter), chat_template=tokenizer.chat_template)
    compare_base(run, model)
    return model, tokenizer


AnyRun = OpenRun | Run | str | Path


def open_run(run: AnyRun, *, ref_model: Model | None = None) -> OpenRun:
    """Load a run's policy and reference, after a check that they are what the run left.

    On a CPU both calculate in 32 bits. In the 16 bits of training, rounding changes the log-ratio of a token by a good
    part of what training changes.

    Args:
        run: a run, or its folder; what is open already is returned as it is.
        ref_model: the reference, for a run whose train_dpo had a `ref_model`.

    Raises:
        UserError: the folder is no finished run, or was edited; the adapter is missing or no safetensors file; the
            base model is not here, is another one, or comes with code (which is never run).
    """
    if isinstance(run, OpenRun):
        return run
    run = run if isinstance(run, Run) else Run.load(run)
    _check_reference(run, ref_model)
    model, tokenizer = load_policy(run)
    if run.reference is not None:
        model.load_adapter(str(run.reference), adapter_name="reference")
    if model.device.type == "cpu":
        model.float()
    if ref_model is not None and ref_model.device.type == "cpu":
        ref_model = copy.deepcopy(ref_model).float()  # the caller's stays as it is
    return OpenRun(run, model.eval(), tokenizer, ref_model)


def compare_generations(
    run: AnyRun, prompts: Sequence[Prompt], *, max_new_tokens: int = 80, **options: Any
) -> pd.DataFrame:
    """Replies of reference and policy to the same prompts, side by side: a row for each prompt.

    Columns: prompt, reference and policy (texts), and for both models the tokens of the reply, whether it ended before
    `max_new_tokens`, and the share of its 4-grams that repeat an earlier one.

    Args:
        run: a run, its folder, or what `open_run` gave.
        prompts: questions (str), conversations, or rows of pairs, whose `tools` and `chat_template_kwargs` count. For
            the others the chat template gets what all training prompts had in common (`run.info.template`).
        max_new_tokens: where a reply is cut.
        options: of `generate_replies`; greedy by default, temperature, top_p and seed to sample.
    """
    opened = open_run(run)
    options = opened.run.info.template | options | {"max_new_tokens": max_new_tokens}
    replies = opened.both(lambda model: generate_replies(model, opened.tokenizer, prompts, **options))
    columns: dict[str, list] = {"prompt": [_conversation(prompt) for prompt in prompts]}
    columns |= {name: [visible(reply.text) for reply in group] for name, group in replies.items()}
    for name, group in replies.items():
        columns[f"{name}_tokens"] = [len(reply.ids) for reply in group]
        columns[f"{name}_ended"] = [reply.ended for reply in group]
        columns[f"{name}_repetition"] = [repetition(reply.ids) for reply in group]
    return pd.DataFrame(columns)


def implicit_rewards(run: AnyRun, pairs: Dataset) -> pd.DataFrame:
    """Implicit rewards of `pairs`: beta times the log-ratio (Rafailov et al. 2023, section 4, after eq. 7).

    Completions that pass the `max_length` of `run` are cut as in training. One row a pair, in their order: the columns
    of `Run.held_out` (log-probs in nats under reference and policy, tokens, log_ratio_gap), chosen_reward,
    rejected_reward, margin (their difference), and the texts.
    """
    opened = open_run(run)
    ids = tokenize_pairs(pairs, opened.tokenizer)
    logps = opened.both(lambda model: pair_logps(model, opened.tokenizer, ids, max_length=opened.max_length))
    table = held_out_table(pairs, **logps)
    for name in {"origin", "topic", "flaw"} & set(table.columns):
        table[name] = [visible(str(value)) for value in table[name]]
    for side in BOTH:
        table[f"{side}_reward"] = opened.beta * (table[f"{side}_policy"] - table[f"{side}_reference"])
    table["margin"] = table.chosen_reward - table.rejected_reward
    for name in ("prompt", *BOTH):
        table[name] = [_conversation(messages) for messages in pairs[name]]
    return table


def token_logps(model: Model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probs in nats under `model` of the tokens of `completion` after `prompt`, ids both, shape (tokens,): the
    plain definition, one softmax a token."""
    ids = torch.tensor([prompt + completion], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0].double().cpu()


def _token_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with its last one."""
    shown = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    for end in range(1, len(ids)):
        if shown[end].endswith("\ufffd"):  # part of a character
            shown[end] = shown[end - 1]
    return [after[len(before) :] for before, after in pairwise(shown)]


def _side_rewards(opened: OpenRun, side: str, prompt: list[int], completion: list[int]) -> pd.DataFrame:
    tokenizer, ids = opened.tokenizer, completion[: max(opened.max_length - len(prompt), 0)]
    texts, special = _token_texts(ids, tokenizer), [token in tokenizer.all_special_ids for token in ids]
    # A word starts at a space, and around a special token.
    starts = [i > 0 and (text[:1].isspace() or special[i] or special[i - 1]) for i, text in enumerate(texts)]
    words = {"side": side, "word": pd.Series(starts, dtype=int).cumsum(), "token": list(map(visible, texts)), "id": ids}
    table = pd.DataFrame(words | {"eos": [token == tokenizer.eos_token_id for token in ids]})
    table = table.assign(**opened.both(lambda model: token_logps(model, prompt, ids).numpy()))
    return table.assign(log_ratio=table.policy - table.reference, reward=opened.beta * (table.policy - table.reference))


def token_rewards(run: AnyRun, pair: dict) -> pd.DataFrame:
    """How much each token adds to the implicit rewards of `pair`, a row as `load_pairs` gives them, in this `run`.

    A log-prob of a text is the sum of its tokens' log-probs, so a reward is a sum too (Rafailov et al. 2024,
    arXiv:2404.12358): that of `implicit_rewards`, with log-ratios within 0.001 nats on a CPU, some tenths in 16 bits or
    4. One row a token: side ("chosen", "rejected"), word (its number, from 0), token (its text), id, eos (whether it
    ends the turn), reference and policy (log-probs in nats), log_ratio (nats), reward. Raises UserError if the chat
    template refuses the pair.
    """
    opened = open_run(run)
    # Not as a Dataset, which would give each tool of the row the keys of the others.
    (row,) = Renderer(opened.tokenizer)([pair])
    if row["refused"]:
        raise refused("template")
    tables = [_side_rewards(opened, side, row["prompt_ids"], row[f"{side}_ids"]) for side in BOTH]
    return pd.concat(tables, ignore_index=True)
