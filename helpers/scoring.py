"""Scoring: log-probs of pairs under a model, the reference's kept in a cache, and what follows from the two.

Training, sweep and inspection all score through `pair_logps`, so that their figures can be compared. Hashes of weights
and token ids say when two things are the same.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from statistics import NormalDist
from typing import Any, NamedTuple

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from helpers.files import write_atomic
from helpers.models import cache_folder
from helpers.pairs import quiet_progress, template_options
from helpers.shared_prompt import share_prompts


class PairLogps(NamedTuple):
    """Summed log-probs of each completion given its prompt, in nats, and their lengths; each of shape (pairs,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


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


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval for the share `successes` of `n` (Wilson 1927), which keeps within 0 and 1 also near them.

    Args:
        level: how often such intervals hold the true share.

    Returns:
        (lower end, upper end), from 0 to 1.

    >>> [round(end, 3) for end in wilson_interval(90, 120)]
    [0.666, 0.819]
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, spread = successes / n, z * z / n
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """20 hex digits of the names, types, shapes and values of `tensors`; the order of the dictionary does not count."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:20]


def adapter_hash(model: PeftModel) -> str:
    """`hash_tensors` of the LoRA weights of `model`."""
    return hash_tensors(get_peft_model_state_dict(model))


def is_fresh(model: PreTrainedModel | PeftModel) -> bool:
    """Whether `model` equals its base: as long as each B matrix is zero, an adapter changes nothing."""
    return not isinstance(model, PeftModel) or all(
        not tensor.any() for name, tensor in get_peft_model_state_dict(model).items() if "lora_B" in name
    )


def base_hash(model: PreTrainedModel | PeftModel) -> str:
    """`hash_tensors` of the weights of `model` below its adapter; the same with and without one.

    It takes seconds where a model has billions of them.
    """
    return hash_tensors(
        {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
            for name, tensor in model.state_dict().items()
            if "lora_" not in name
        }
    )


def fingerprint(model: PreTrainedModel | PeftModel, weights: str | None = None) -> str:
    """Hashes of what decides the log-probs of `model`: its weights, and its adapter where that is not fresh.

    Args:
        weights: `base_hash(model)`, where the caller has it already.
    """
    return f"{weights or base_hash(model)} {'fresh' if is_fresh(model) else adapter_hash(model)}"


def data_hash(tokenised: Dataset) -> str:
    """20 hex digits of the token ids of pairs, `tokenised` by `tokenize_pairs`, in their order."""
    digest = hashlib.sha256()
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for ids in tokenised[column]:
            digest.update(json.dumps(ids).encode())
    return digest.hexdigest()[:20]


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    parts = [tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


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
    parts = [fingerprint(model, weights), _tokenizer_hash(tokenizer)]
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


def held_out_table(test: Dataset, reference: PairLogps, policy: PairLogps) -> pd.DataFrame:
    """One row for each held-out pair, as `Run.held_out` keeps it.

    Args:
        test: the pairs.
        reference, policy: their log-probs under either model.

    Returns:
        Columns topic and flaw ("not given" where the pairs have none), origin where they have it, and for both sides
        chosen_reference, chosen_policy (log-probs in nats), chosen_tokens, and so on; log_ratio_gap in nats.
    """
    columns = {name: test[name] for name in ("origin", "topic", "flaw") if name in test.column_names}
    table = pd.DataFrame({"topic": "not given", "flaw": "not given"} | columns, index=range(len(test)))
    for side in ("chosen", "rejected"):
        table[f"{side}_reference"] = getattr(reference, side).numpy()
        table[f"{side}_policy"] = getattr(policy, side).numpy()
        table[f"{side}_tokens"] = getattr(policy, f"{side}_tokens").numpy().astype(int)
    table["log_ratio_gap"] = (table.chosen_policy - table.chosen_reference) - (
        table.rejected_policy - table.rejected_reference
    )
    return table


def preference_metrics(table: pd.DataFrame, beta: float) -> dict:
    """Held-out figures of a run.

    Args:
        table: as in `Run.held_out`.
        beta: as in training.

    Returns:
        pairs: how many.
        reference_accuracy: share of pairs whose chosen has the higher log-prob per token under the reference alone:
            what is there before any training.
        accuracy: share of pairs whose chosen has the higher implicit reward (log-ratio) after training.
        reference_accuracy_interval, accuracy_interval: their 95 percent intervals (`wilson_interval`).
        loss: the DPO loss in nats (Rafailov et al. 2023, eq. 7); ln 2 where nothing was learned.
        margin: mean of beta * log-ratio gap (Rafailov et al. 2023, section 5.1); depends on beta.
        log_ratio_gap: mean of margin / beta, in nats; comparable across betas.
        chosen_change, rejected_change: mean log-ratio of either side, in nats.
    """
    n, gap = len(table), torch.tensor(table.log_ratio_gap.to_numpy())
    before = int(
        (table.chosen_reference / table.chosen_tokens > table.rejected_reference / table.rejected_tokens).sum()
    )
    after = int((gap > 0).sum())
    return {
        "pairs": n,
        "reference_accuracy": before / n,
        "reference_accuracy_interval": wilson_interval(before, n),
        "accuracy": after / n,
        "accuracy_interval": wilson_interval(after, n),
        "loss": float(-torch.nn.functional.logsigmoid(beta * gap).mean()),
        "margin": float(beta * gap.mean()),
        "log_ratio_gap": float(gap.mean()),
        "chosen_change": float((table.chosen_policy - table.chosen_reference).mean()),
        "rejected_change": float((table.rejected_policy - table.rejected_reference).mean()),
    }


def accuracy_by(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Share of pairs with a positive margin for each value of `column`, with its interval and count.

    Args:
        table: as in `Run.held_out`.
        column: "topic" or "flaw", say.

    Returns:
        One row for each value, most pairs first; columns share, low, high (Wilson, 95 percent), pairs.
    """
    groups = (table.log_ratio_gap > 0).groupby(table[column]).agg(["sum", "size"]).sort_values("size", ascending=False)
    intervals = [wilson_interval(int(right), int(n)) for right, n in groups.itertuples(index=False)]
    return pd.DataFrame(
        {
            "share": groups["sum"] / groups["size"],
            "low": [low for low, _ in intervals],
            "high": [high for _, high in intervals],
            "pairs": groups["size"],
        }
    )
