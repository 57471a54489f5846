"""Inspection: what a run changed, in its replies, in the rewards it gives to pairs, and word by word.

All three functions take a run folder, or one that `open_run` opened, so that its model is loaded once for many
calls. Text of data sets and models in their tables is made safe to show by `visible`.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from helpers.common import UserError, visible
from helpers.data.render import tokenize_pairs
from helpers.model.fingerprint import base_hash, fingerprint, hash_tensors
from helpers.model.generate import generate_replies, repetition
from helpers.model.load import load_model
from helpers.model.logps import pair_logps
from helpers.run.folder import LORA_SCALE, Run
from helpers.run.metrics import held_out_table

# What run.json must hold for its model to be put together again, and of which type.
_NEEDED = {"model": str, "base": str, "start": str, "end": str, "reference": str, "config": dict, "lora": dict}
_NEEDED_SETTINGS = {"beta": (int, float), "max_length": int}


def _conversation(messages: list[dict]) -> str:
    if len(messages) == 1:
        return visible(messages[0]["content"])
    return visible("\n".join(f"{message['role']}: {message['content']}" for message in messages))


class OpenRun:
    """A run with its policy in memory.

    Attributes:
        run: the run.
        model: the policy.
        tokenizer: the run's.
        beta: as in training.
    """

    def __init__(
        self,
        run: Run,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        ref_model: PreTrainedModel | PeftModel | None = None,
    ):
        self.run, self.model, self.tokenizer, self.beta = run, model, tokenizer, run.info["config"]["beta"]
        self._ref_model = ref_model

    @contextlib.contextmanager
    def reference(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The reference, for the length of a `with` block; the policy must not be used in it.

        It is the model that was passed, the run's start adapter, or the base model: what it was in training.
        """
        if self._ref_model is not None:
            yield self._ref_model
        elif self.run.reference is not None:
            self.model.set_adapter("reference")
            try:
                yield self.model
            finally:
                self.model.set_adapter("default")
        else:
            with self.model.disable_adapter():
                yield self.model


def _check_info(run: Run) -> None:
    config = run.info.get("config")
    config = config if isinstance(config, dict) else {}
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(run.info.get(name), kind)]
    wrong += [f"config.{name}" for name, kind in _NEEDED_SETTINGS.items() if not isinstance(config.get(name), kind)]
    if wrong:
        raise UserError(
            f"run.json of {run.folder.name} lacks {', '.join(wrong)}: it was written by another version of these "
            "notebooks, or edited. Train the run again."
        )


def _check_adapter(folder: Path, expected: str, scale: dict) -> None:
    """Raise UserError where the adapter in `folder` is not there, is no safetensors file, or is another one."""
    name = f"{folder.parent.name}/{folder.name}"
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{name} holds adapter_model.bin, a format that can run code when it is read. Only safetensors are "
                "loaded here."
            )
        raise UserError(f"{name} holds no adapter_model.safetensors. Copy the run folder again, or train it again.")
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{name} holds no adapter_config.json. Copy the run folder again, or train it again.")
    try:
        weights = load_file(path)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"The adapter in {name} is damaged ({error}). Copy it or train the run again.") from error
    if hash_tensors(weights) != expected or {key: config.get(key) for key in LORA_SCALE} != scale:
        raise UserError(
            f"The adapter in {name} is not the one that run.json describes: one of the two was changed after "
            "training. Restore it, or train the run again."
        )


def _check_reference(run: Run, ref_model: PreTrainedModel | PeftModel | None) -> None:
    passed = run.info["reference"] != "the policy at its start"
    if passed and ref_model is None:
        raise UserError(
            f"The reference of the run in {run.folder.name} is a model that was passed to train_dpo. Pass it here "
            "too: open_run(run, ref_model=...)."
        )
    if ref_model is not None and fingerprint(ref_model) != run.info["reference"]:
        what = "another model than" if passed else "no model that was passed, so not"
        raise UserError(f"The reference of the run in {run.folder.name} is {what} the ref_model given here.")


def _load_policy(run: Run) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """(policy, tokenizer) of a run whose files were checked. Raises UserError where its base model is not here."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(run.adapter, trust_remote_code=False)
        model, _ = load_model(str(run.adapter), chat_template=tokenizer.chat_template)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"The model {run.info['model']!r} comes with Python code of its own, which is not run here."
            ) from error
        raise UserError(
            f"The base model {run.info['model']!r} of the run in {run.folder.name} cannot be loaded "
            f"({type(error).__name__}). Is it on this machine, or the hub within reach?"
        ) from error
    if base_hash(model) != run.info["base"]:
        raise UserError(
            f"The base model loaded here is not the one under the run in {run.folder.name}: {run.info['model']} has "
            "other weights, or they are loaded in another precision (16, 32 or 4 bits) than in training."
        )
    return model, tokenizer


def open_run(run: Run | str | Path, *, ref_model: PreTrainedModel | PeftModel | None = None) -> OpenRun:
    """Load a run's policy and reference, after a check that they are what the run left.

    On a CPU both then calculate in 32 bits: in the 16 of training, rounding moves the log-ratio of a token by
    a good part of what training does.

    Args:
        run: a run, or its folder.
        ref_model: the reference, for a run whose train_dpo had a `ref_model`.

    Raises:
        UserError: the folder is no finished run, was made by another version, or edited; there is no adapter, or not as
            safetensors; the base model is not here, is another one, or comes with code (which is never run).
    """
    run = run if isinstance(run, Run) else Run.load(run)
    _check_info(run)
    scales = run.info["lora"]
    _check_adapter(run.adapter, run.info["end"], scales.get("adapter"))
    if "reference" in scales:
        _check_adapter(run.folder / "reference", run.info["start"], scales["reference"])
    _check_reference(run, ref_model)
    model, tokenizer = _load_policy(run)
    if run.reference is not None:
        model.load_adapter(str(run.reference), adapter_name="reference")
    if model.device.type == "cpu":
        model.float()
    if ref_model is not None and ref_model.device.type == "cpu":
        ref_model = copy.deepcopy(ref_model).float()  # the caller's stays as it is
    return OpenRun(run, model.eval(), tokenizer, ref_model)


def _opened(run: OpenRun | Run | str | Path) -> OpenRun:
    return run if isinstance(run, OpenRun) else open_run(run)


def compare_generations(
    run: OpenRun | Run | str | Path, prompts: list[str | list[dict]], *, max_new_tokens: int = 80, **options: Any
) -> pd.DataFrame:
    """Replies of reference and policy to the same prompts, side by side.

    Args:
        run: a run, its folder, or what `open_run` gave.
        prompts: questions (str), or conversations as in the `prompt` column of `load_pairs`.
        max_new_tokens: where a reply is cut.
        options: of `generate_replies`: greedy where left out; temperature, top_p and seed to sample.

    Returns:
        One row a prompt: prompt, reference and policy (texts that are safe to show), and for both models the tokens of
        the reply, whether it ended before `max_new_tokens`, and the share of its 4-grams that repeat an earlier one.

    Raises:
        UserError: the run cannot be opened (see `open_run`).
    """
    opened = _opened(run)
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    options |= {"max_new_tokens": max_new_tokens}
    with opened.reference() as model:
        replies = {"reference": generate_replies(model, opened.tokenizer, prompts, **options)}
    replies["policy"] = generate_replies(opened.model, opened.tokenizer, prompts, **options)
    columns = {name: [visible(reply.text) for reply in group] for name, group in replies.items()}
    for name, group in replies.items():
        columns[f"{name}_tokens"] = [len(reply.ids) for reply in group]
        columns[f"{name}_ended"] = [reply.ended for reply in group]
        columns[f"{name}_repetition"] = [repetition(reply.ids) for reply in group]
    return pd.DataFrame({"prompt": [_conversation(prompt) for prompt in prompts]} | columns)


def implicit_rewards(run: OpenRun | Run | str | Path, pairs: Dataset, *, batch_size: int = 8) -> pd.DataFrame:
    """Implicit rewards of the pairs: beta times the log-ratio (Rafailov et al. 2023, section 4, after eq. 7).

    Completions that pass the run's `max_length` are cut as in training.

    Args:
        run: a run, its folder, or what `open_run` gave.
        pairs: any, in the form that `load_pairs` gives.
        batch_size: pairs in a forward pass.

    Returns:
        One row a pair, in their order: the columns of `Run.held_out` (log-probs in nats under reference and policy,
        tokens, log_ratio_gap), chosen_reward, rejected_reward, margin (their difference), and prompt, chosen and
        rejected as texts that are safe to show.

    Raises:
        UserError: the run cannot be opened (see `open_run`).
    """
    opened = _opened(run)
    ids = tokenize_pairs(pairs, opened.tokenizer)
    how = {"max_length": opened.run.info["config"]["max_length"], "batch_size": batch_size}
    with opened.reference() as model:
        reference = pair_logps(model, opened.tokenizer, ids, **how)
    table = held_out_table(pairs, reference, pair_logps(opened.model, opened.tokenizer, ids, **how))
    for name in {"origin", "topic", "flaw"} & set(table.columns):
        table[name] = [visible(str(value)) for value in table[name]]
    for side in ("chosen", "rejected"):
        table[f"{side}_reward"] = opened.beta * (table[f"{side}_policy"] - table[f"{side}_reference"])
    table["margin"] = table.chosen_reward - table.rejected_reward
    for name in ("prompt", "chosen", "rejected"):
        table[name] = [_conversation(messages) for messages in pairs[name]]
    return table


def _token_logps(model: PreTrainedModel | PeftModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probs of the completion's tokens in nats, shape (tokens,): the plain definition, one softmax a token."""
    if not completion:  # the prompt fills all of max_length
        return torch.zeros(0, dtype=torch.float64)
    ids = torch.tensor([prompt + completion], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0].double().cpu()


def _token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with its last one."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):  # part of a character
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        shown = text
    return texts


def token_rewards(run: OpenRun | Run | str | Path, pair: dict) -> pd.DataFrame:
    """How much each token adds to the implicit rewards of a pair.

    A log-prob of a text is the sum of its tokens' log-probs, so a reward is a sum too (Rafailov et al. 2024,
    arXiv:2404.12358). The sums are the rewards that `implicit_rewards` gives, to rounding: on a CPU within 0.001 nats
    of the log-ratio, in 16 bits or 4 within some tenths.

    Args:
        run: a run, its folder, or what `open_run` gave.
        pair: a row of pairs as `load_pairs` gives them.

    Returns:
        One row a token: side ("chosen", "rejected"), word (its number, from 0), token (text that is safe to show), id,
        eos (whether it ends the turn), reference and policy (log-probs in nats), log_ratio (nats), reward.

    Raises:
        UserError: the run cannot be opened (see `open_run`).
    """
    opened = _opened(run)
    row = tokenize_pairs(Dataset.from_list([pair]), opened.tokenizer)[0]
    tables = []
    for side in ("chosen", "rejected"):
        room = opened.run.info["config"]["max_length"] - len(row["prompt_ids"])
        ids = row[f"{side}_ids"][: max(room, 0)]
        texts = _token_texts(ids, opened.tokenizer)
        with opened.reference() as model:
            reference = _token_logps(model, row["prompt_ids"], ids)
        policy = _token_logps(opened.model, row["prompt_ids"], ids)
        special = [token in opened.tokenizer.all_special_ids for token in ids]
        # A word starts at a space, and around a special token.
        starts = [i > 0 and (text[:1].isspace() or special[i] or special[i - 1]) for i, text in enumerate(texts)]
        tables.append(
            pd.DataFrame(
                {
                    "side": side,
                    "word": pd.Series(starts, dtype=int).cumsum(),
                    "token": [visible(text) for text in texts],
                    "id": ids,
                    "eos": [token == opened.tokenizer.eos_token_id for token in ids],
                    "reference": reference.numpy(),
                    "policy": policy.numpy(),
                    "log_ratio": (policy - reference).numpy(),
                    "reward": opened.beta * (policy - reference).numpy(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
