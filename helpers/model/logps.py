"""Log-probs of pairs under a model, and those of the reference, in a cache; how far a policy moved by its own replies.

Training, sweep and inspection all score through `pair_logps`, so that their figures can be compared.
"""

import contextlib
import hashlib
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from helpers.common import cache_folder, write_atomic
from helpers.data.render import IDS, data_hash, pair_lengths, prompt_ids, tokenize_pairs
from helpers.model import Model, Prompts, Tokenizer
from helpers.model.fingerprint import adapter_settings, base_model, config_hash, fingerprint, is_fresh, tokenizer_hash
from helpers.model.generate import Reply, evaluating, generate_replies
from helpers.model.load import check_token
from helpers.patches import fused_lm_head
from helpers.patches.shared_prompt import can_share


class PairLogps(NamedTuple):
    """Summed log-probs of each completion given its prompt, in nats, and their lengths; each of shape (pairs,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


def _ids(pairs: Dataset, tokenizer: Tokenizer) -> Dataset:
    return pairs if set(IDS) <= set(pairs.column_names) else tokenize_pairs(pairs, tokenizer)


def summed(model: Model, batch: dict[str, torch.Tensor], fused: bool) -> torch.Tensor:
    """Log-probs under `model` of the completions of a collated `batch` in nats, shape (rows,): chosen, then rejected.

    They are from TRL's `fused` head, or from the model's own logits.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = batch["completion_mask"]
    if fused:
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        return model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)
    logps = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
    return (logps.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * mask[:, 1:]).sum(dim=1)


def _rounded_alike(model: Model) -> torch.autocast:
    """As the trainer computes unless bf16 or fp16 is set otherwise, so that policy and reference are rounded alike."""
    dtype = base_model(model).dtype
    short = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, dtype=dtype if short else None, enabled=short)


@contextlib.contextmanager
def _without_zeros(model: Model) -> Iterator[None]:
    """In the block a fresh adapter is left out: what it adds is 0, and takes time."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers or any(layer.disable_adapters for layer in layers) or not is_fresh(model):
        yield
        return
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for weight, requires_grad in trained:
            weight.requires_grad = requires_grad


def pair_logps(
    model: Model,
    tokenizer: Tokenizer,
    pairs: Dataset,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    share: tuple[int, int] = (0, 1),
) -> PairLogps:
    """Log-probs of chosen and rejected under `model`, as in the DPO loss (Rafailov et al. 2023, eq. 7).

    Args:
        model, tokenizer: as `load_model` gives them, with or without an adapter.
        pairs: rows in the form that `load_pairs` gives, or already tokenised by `tokenize_pairs`.
        max_length: longer sequences are cut at their end, as the trainer cuts them.
        batch_size: pairs in a forward pass.
        share: (k, n): only the k-th of each n batches; the pairs of the others are zero.
    """
    # TRL does not document it, and all but scoring does without.
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    ids, inner = _ids(pairs, tokenizer).select_columns(list(IDS)), base_model(model)
    order = np.argsort(pair_lengths(ids), kind="stable")
    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=max_length)
    result, sums = torch.zeros(4, len(ids), dtype=torch.float64), []
    with (
        evaluating(model),
        torch.no_grad(),
        _rounded_alike(model),
        _without_zeros(model),
        fused_lm_head.applied(inner) as fused,
    ):
        laid_out_first = fused and can_share(inner)  # on the CPU, and then moved
        # Longest first: what a batch frees then has room for the next, and memory does not grow to the end.
        for start in list(reversed(range(0, len(ids), batch_size)))[share[0] :: share[1]]:
            index = order[start : start + batch_size]
            batch = collate(ids.select(index).to_list())
            check_token(model, tokenizer, int(batch["input_ids"].max()))
            result[2:, index] = torch.stack(batch["completion_mask"].sum(dim=1).double().chunk(2))
            if not laid_out_first:
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            sums.append((index, summed(model, batch, fused)))  # a GPU computes while the next batch is laid out
        for index, values in sums:
            result[:2, index] = torch.stack(values.double().cpu().chunk(2))
    return PairLogps(*result)


@contextlib.contextmanager
def in_32_bits(*models: Model) -> Iterator[bool]:
    """In the block `models` that are on a CPU compute in 32 bits; then their weights are as before, bit for bit.

    In bf16 a quarter of what a short run moves is rounded away (docs/results.md). A GPU's models stay as they are.
    Yields whether any did not compute in 32 bits before.
    """
    weights = [weight for model in models if model.device.type == "cpu" for weight in model.parameters()]
    short = [(weight, weight.dtype) for weight in weights if weight.dtype in (torch.bfloat16, torch.float16)]
    try:
        for weight, _ in short:
            weight.data = weight.data.float()
        yield bool(short)
    finally:
        for weight, dtype in short:
            weight.data = weight.data.to(dtype)


def reference_file(model: Model, tokenizer: Tokenizer, data: str, max_length: int) -> Path:
    """Where the cache keeps the log-probs under `model` of the ids whose `data_hash` is `data`.

    `model`, `tokenizer` and `max_length` decide them; beta, seed and loss do not, with which TRL's own cache changes.
    """
    parts = [fingerprint(model), config_hash(model), tokenizer_hash(tokenizer), data, str(max_length), str(model.dtype)]
    parts.append("2")  # before, a trainer's 16 bits could round what was kept as 32
    if not is_fresh(model):
        parts.append(json.dumps(adapter_settings(model)))
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    return cache_folder() / "reference" / f"{key}.safetensors"


def read_logps(path: Path, pairs: int) -> tuple[PairLogps, dict[str, str]] | None:
    """What `write_logps` wrote to `path` for so many `pairs`, and its notes; None if it is not there or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            logps, notes = PairLogps(*map(file.get_tensor, PairLogps._fields)), file.metadata() or {}
        if len(logps.chosen) != pairs:
            raise ValueError("wrong number of pairs")
        return logps, notes
    except FileNotFoundError:
        return None
    except Exception as error:  # safetensors has an exception type of its own for a file that is cut short
        print(f"The cached reference log-probs are damaged ({type(error).__name__}); computing them again.")
        return None


def write_logps(path: Path, logps: PairLogps, **notes: str) -> None:
    """Write `logps` to `path`, with `notes` on how they came about."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in logps._asdict().items()}
    write_atomic(path, lambda part: save_file(tensors, part, metadata=notes))


def reference_logps(
    model: Model, tokenizer: Tokenizer, pairs: Dataset, *, max_length: int, batch_size: int = 8
) -> PairLogps:
    """`pair_logps` (model, tokenizer, pairs, max_length, batch_size) of the reference, kept in the cache folder."""
    ids = _ids(pairs, tokenizer)
    path = reference_file(model, tokenizer, data_hash(ids), max_length)
    if kept := read_logps(path, len(ids)):
        return kept[0]
    logps = pair_logps(model, tokenizer, ids, max_length=max_length, batch_size=batch_size)
    write_logps(path, logps)
    return logps


def with_reference(pairs: Dataset, logps: PairLogps) -> Dataset:
    """The `pairs` (or their ids) with the two columns in which DPOTrainer looks for the reference's `logps`."""
    table = pairs.with_format("arrow")[:]  # `add_column` would copy a selection row by row
    for name, values in (("ref_chosen_logps", logps.chosen), ("ref_rejected_logps", logps.rejected)):
        table = table.append_column(name, [values.float().tolist()])
    return Dataset(table, fingerprint=uuid.uuid4().hex)  # by itself it would pickle the whole table for a name


def sample_twice(model: Model, tokenizer: Tokenizer, prompts: Prompts, **sampling: Any) -> list[Reply]:
    """Two replies to each prompt at temperature 1: first one to each, then the second ones.

    The model, tokenizer, prompts and sampling (max_new_tokens, seed, and batch_size, 32 if left out) are as in
    `generate_replies`.
    """
    sampling = {"batch_size": 32} | sampling
    return generate_replies(model, tokenizer, [*prompts, *prompts], temperature=1.0, **sampling)


def _next_logps(inner: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Log-probs of the next token over the vocabulary from last hidden states, in 32 bits whatever the model's are.

    Logits in 16 bits are some hundredths off, and a KL from them is too large: each error adds to it. Models that scale
    or cap their logits say so in their config (the names are those that TRL's fused LM head reads).
    """
    config, head = inner.config.get_text_config(), inner.get_output_embeddings()
    # A part of the vocabulary at a time, so that the head is never whole in 32 bits.
    logits = torch.cat([states.float() @ part.float().T for part in head.weight.split(2**14)], dim=-1)
    if head.bias is not None:
        logits += head.bias.float()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        if scale := getattr(config, name, None):
            logits *= 1 / scale if name == "logits_scaling" and config.model_type != "hyperclovax" else scale
            break
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(dim=-1)


def _reply_kl(policy: PeftModel, tokenizer: Tokenizer, asked: list[list[int]], replies: list[list[int]]) -> list[float]:
    """KL(policy || reference) in nats of each reply (token ids) to the prompts `asked`, summed over its tokens."""
    inner, found = base_model(policy), [0.0] * len(replies)
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]) + len(replies[i]))
    with evaluating(policy), torch.no_grad():
        for batch in (order[start : start + 8] for start in range(0, len(order), 8)):
            rows = {"input_ids": [asked[i] + replies[i] for i in batch]}
            inputs = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(policy.device)
            with _rounded_alike(policy):
                ours = inner.base_model(**inputs, use_cache=False).last_hidden_state
                with policy.disable_adapter():
                    theirs = inner.base_model(**inputs, use_cache=False).last_hidden_state
            for i, *states in zip(batch, ours, theirs, strict=True):
                predict = slice(len(asked[i]) - 1, len(asked[i]) + len(replies[i]) - 1)  # the tokens of the reply
                for both in zip(*(one[predict].split(64) for one in states), strict=True):
                    p, q = (_next_logps(inner, one) for one in both)
                    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)
                    found[i] += float(kl.clamp(min=0).sum())  # rounding can leave a 0 just below it
    return found


class SampledKL(NamedTuple):
    """`kl`, mean of sampled replies in nats, `error`, its standard error over prompts, and the replies."""

    kl: float
    error: float
    replies: list[Reply]


def sampled_kl(policy: PeftModel, tokenizer: Tokenizer, prompts: Prompts, **sampling: Any) -> SampledKL:
    """How far the policy moved from the model under its adapter: KL(policy || reference) of whole replies.

    Two replies to each prompt are sampled from the policy at temperature 1. At each position of a reply the KL between
    the two next-token distributions is computed exactly, over the whole vocabulary; a reply's KL is their sum. The mean
    over replies is the Rao-Blackwellised estimator of Amini, Vieira and Cotterell (2025, arXiv 2504.10637): unbiased,
    never negative, and with no more variance than the mean of log policy - log reference of the sampled tokens. A reply
    counts up to where it is cut. policy, tokenizer, prompts and sampling are as in `sample_twice`.
    """
    replies = sample_twice(policy, tokenizer, prompts, **sampling)
    with in_32_bits(policy):
        found = _reply_kl(policy, tokenizer, 2 * prompt_ids(tokenizer, prompts), [reply.ids for reply in replies])
    by_prompt = np.reshape(found, (2, len(prompts))).mean(axis=0)
    return SampledKL(float(by_prompt.mean()), float(by_prompt.std(ddof=1) / math.sqrt(len(prompts))), replies)
