"""Scoring: log-probs of pairs under a model, the reference's kept in a cache, and what follows from the two.

Training, sweep and inspection all score through `pair_logps`, so that their figures can be compared. Hashes of weights
and token ids say when two things are the same.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from helpers.common import cache_folder, write_atomic
from helpers.data.render import data_hash, pair_lengths, tokenize_pairs
from helpers.model.fingerprint import fingerprint, tokenizer_hash
from helpers.patches.shared_prompt import share_prompts
from helpers.session import quiet_progress


class PairLogps(NamedTuple):
    """Summed log-probs of each completion given its prompt, in nats, and their lengths; each of shape (pairs,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


@contextlib.contextmanager
def _pair_forward(inner: PreTrainedModel) -> Iterator[None]:
    """For a while, a forward that gives log-probs without storing logits; a trainer's own is put back afterwards."""
    before = vars(inner).get("forward")
    add_fused_lm_head(inner)
    share_prompts(inner)
    try:
        yield
    finally:
        del inner.forward
        if before is not None:
            inner.forward = before


def pair_logps(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
) -> PairLogps:
    """Log-probs of chosen and rejected under `model`, as in the DPO loss (Rafailov et al. 2023, eq. 7).

    Pairs of like length share a batch, which leaves little padding; the result is in the order of `pairs`.

    Args:
        model, tokenizer: as `load_model` gives them, with or without an adapter.
        pairs: rows in the form that `load_pairs` gives, or already tokenised by `tokenize_pairs`.
        max_length: longer sequences are cut at their end, as the trainer cuts them.
        batch_size: pairs in a forward pass.
    """
    if "prompt_ids" not in pairs.column_names:
        pairs = tokenize_pairs(pairs, tokenizer)
    rows = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()
    lengths = pair_lengths(rows)
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=max_length)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    result = torch.empty(4, len(rows), dtype=torch.float64)
    was_training = model.training
    model.eval()
    # The trainer's own precision, so that the policy and its reference are rounded alike.
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=inner.dtype == torch.bfloat16)
    with torch.no_grad(), autocast, _pair_forward(inner):
        # Longest first: what a batch frees then has room for the next, and memory does not grow to the end.
        for start in reversed(range(0, len(rows), batch_size)):
            index = order[start : start + batch_size]
            batch = {name: tensor.to(model.device) for name, tensor in collate([rows[i] for i in index]).items()}
            mask = batch["completion_mask"]
            labels = batch["input_ids"].masked_fill(mask == 0, -100)
            logps = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            ).log_probs.sum(dim=1)
            result[:2, index] = torch.stack(logps.double().cpu().chunk(2))
            result[2:, index] = torch.stack(mask.sum(dim=1).double().cpu().chunk(2))
    model.train(was_training)
    return PairLogps(*result)


def reference_logps(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    max_length: int,
    batch_size: int = 8,
    weights: str | None = None,
) -> PairLogps:
    """`pair_logps` of the reference, kept in the cache folder: computed once, read for every later run.

    The key holds all that decides the result: the weights (and the adapter's, where it is not fresh), tokenizer,
    chat template, token ids of the pairs, and max_length. Beta, seed, learning rate and loss are no part of it.
    TRL keeps such a cache too (`precompute_ref_log_probs`), but its key changes with every setting, and data that
    is in memory never meets it.

    Args:
        model: the reference.
        tokenizer, pairs, max_length, batch_size: as in `pair_logps`.
        weights: `base_hash(model)`, where the caller has it already.
    """
    tokenised = tokenize_pairs(pairs, tokenizer) if "prompt_ids" not in pairs.column_names else pairs
    parts = [fingerprint(model, weights), tokenizer_hash(tokenizer)]
    parts += [data_hash(tokenised), str(max_length), str(model.dtype)]
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    path = cache_folder() / "reference" / f"{key}.safetensors"
    if path.is_file():
        try:
            stored = load_file(path)
            if len(stored["chosen"]) == len(tokenised):
                return PairLogps(**stored)
            raise ValueError("wrong number of pairs")
        except Exception as error:  # safetensors has an exception type of its own for a file that is cut short
            print(f"The cached reference log-probs are damaged ({type(error).__name__}); computing them again.")
    logps = pair_logps(model, tokenizer, tokenised, max_length=max_length, batch_size=batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda part: save_file({k: v.contiguous() for k, v in logps._asdict().items()}, part))
    return logps


def with_reference(pairs: Dataset, logps: PairLogps) -> Dataset:
    """The pairs with the two columns in which DPOTrainer looks for the reference's log-probs.

    Args:
        pairs: in the form that `load_pairs` gives.
        logps: of these pairs under the reference, as `reference_logps` gives them.
    """
    with quiet_progress(len(pairs)):
        for name, values in (("ref_chosen_logps", logps.chosen), ("ref_rejected_logps", logps.rejected)):
            pairs = pairs.add_column(name, values.float().tolist())
    return pairs
