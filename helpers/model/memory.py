"""Memory: what a training run will need, by arithmetic over the model's sizes, and what is free."""

import contextlib
import ctypes
import gc
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import psutil
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PretrainedConfig

from helpers.data.render import pair_lengths, token_counts
from helpers.patches.shared_prompt import can_share, filler

# Measured peaks as times the formulas below. PLAIN: what the layers of transformers and PEFT keep (norms in 32 bits,
# inputs of the LoRA matrices, less what one forward for both sides saves), by benchmarks/memory.py. The others by
# benchmarks/gpu.py. FUSED: what Unsloth's layers keep. INPUTS: the layers' inputs, which are kept for recomputing.
# SHARED_INPUTS: the same, if all pairs are in one row.
PLAIN_FACTOR, FUSED_FACTOR, INPUTS_FACTOR, SHARED_INPUTS_FACTOR = 1.6, 0.76, 1.19, 1.05
PLAIN_CHECKPOINTING_BYTES = 1.1e9  # what recomputing plain layers took on top, at every size tried there
ESTIMATE_MARGIN = 1.25  # below this multiple of what is free, training is tried with a warning
# How a step is made; its pairs are the product of the first two.
BATCH_SETTINGS = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")


def pairs_a_step(settings: dict) -> int:
    """The effective batch of one process by DPOConfig `settings`."""
    return settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]


class MemoryEstimate(NamedTuple):
    """Bytes by what they are for."""

    weights: float  # of the loaded model
    adapter: float  # LoRA's parameters and gradients in fp32, and the optimizer's state
    activations: float  # what the backward pass of one micro-batch needs
    logits: float  # of the LM head, a piece of the batch at a time

    total = property(sum, doc="All four together.")
    training = property(lambda self: self.total - self.weights, doc="What comes on top of the loaded model.")


def estimate_memory(
    config: PretrainedConfig,
    *,
    pairs: int,
    tokens: int,
    prompt: int = 0,
    checkpointing: bool | str,
    load_in_4bit: bool,
    rank: int = 16,
    optim: str = "adamw_torch_fused",
    plain: bool = False,
) -> MemoryEstimate:
    """Bytes that DPO with LoRA on the seven projections and a cached reference needs at its peak.

    Args:
        config: of a Llama-like model.
        pairs: in a micro-batch (`per_device_train_batch_size`).
        tokens: of the longest sequence, prompt and answer.
        prompt: tokens of it that are the prompt's, which both answers share; does not count if `plain`.
        checkpointing: gradient checkpointing; one layer's activations are kept at a time, and the inputs of all layers.
            "unsloth": these go to the machine's memory.
        load_in_4bit: weights of the projections in bitsandbytes' NF4, else all in 16 bits.
        rank: of the LoRA adapter.
        optim: as in DPOConfig; an 8-bit optimizer keeps a quarter of the state.
        plain: the CPU profile, whose layers are transformers' own and keep more, attention scores among it.
    """
    config = config.get_text_config()
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    mlp, heads = getattr(config, "intermediate_size", None) or 4 * hidden, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    query, key = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    projections = [(hidden, other) for other in (query, query, key, key, mlp, mlp, mlp)]
    embeddings = vocabulary * hidden * (1 if config.tie_word_embeddings else 2)
    # NF4: half a byte, and a scale for each 64 weights that is itself quantised (Dettmers et al. 2023, section 3).
    of_a_weight = 0.5 + 0.127 / 8 if load_in_4bit else 2
    weights = embeddings * 2 + layers * sum(a * b for a, b in projections) * of_a_weight
    lora = layers * rank * sum(a + b for a, b in projections)
    adapter = lora * (4 + 4 + (2.1 if "8bit" in optim else 8))  # Adam's two moments, in 8 or 32 bits
    rows = pairs * (2 * tokens - (0 if plain else prompt))
    # For the backward pass, in 16 bits: inputs of norms and projections, q, k, v, the attention's output, and of the
    # MLP gate, up, their activation and product.
    layer = rows * 2 * (4 * hidden + 3 * query + 3 * key + 4 * mlp)
    if plain:
        layer = layer * PLAIN_FACTOR + 2 * pairs * heads * tokens**2 * 6  # scores and softmax, 32 and 16 bits
        recomputing = PLAIN_CHECKPOINTING_BYTES
    else:
        layer *= FUSED_FACTOR
        factor = SHARED_INPUTS_FACTOR if prompt else INPUTS_FACTOR
        recomputing = factor * layers * rows * hidden * 2 * (checkpointing != "unsloth")
    activations = 2 * layer + recomputing if checkpointing else layers * layer  # 2: with their gradients
    logits = min(rows * vocabulary, 16 * 2**20) * 4 * 3
    return MemoryEstimate(weights, adapter, activations, logits)


class BatchPlan(NamedTuple):
    """A step of `pieces` micro-batches of `pairs` each; the `bytes` that it needs, and why it is cut so, in words."""

    pairs: int
    pieces: int
    checkpointing: bool
    bytes: float
    reason: str


def _plan(need: Callable[[int, bool], float], free: float, batch: int) -> BatchPlan | None:
    """The fastest way that fits (benchmarks/gpu.py); `need` gives the bytes for pairs in a micro-batch, checkpointing.

    A pass over few tokens leaves a GPU waiting for its next kernel, so the batch stays whole if it can.
    """
    ways = [(False, 1), *((True, 2**i) for i in range(batch.bit_length()))]
    needs = [need(batch // pieces, checkpointing) for checkpointing, pieces in ways]
    for place, (checkpointing, pieces) in enumerate(ways):
        if needs[place] * ESTIMATE_MARGIN <= free:
            reasons = (
                "everything is kept for the backward pass",
                f"without checkpointing {needs[0] / 1e9:.0f} GB would be needed",
                f"in fewer pieces {needs[place - 1] / 1e9:.1f} GB would be needed",
            )
            return BatchPlan(batch // pieces, pieces, checkpointing, needs[place], reasons[min(place, 2)])
    return None


def plan_batch(config: PretrainedConfig, free: float, *, tokens: int) -> BatchPlan | None:
    """The fastest way to train 8 pairs a step in 4 bits on a GPU, with room for the estimate's error; needs no GPU.

    None if not even one pair fits. `config` and `tokens` are as in `estimate_memory`, for every pair; `free` are bytes
    before the model is loaded.
    """
    estimate = partial(estimate_memory, config, tokens=tokens, load_in_4bit=True, optim="adamw_8bit")
    return _plan(lambda pairs, on: estimate(pairs=pairs, checkpointing=on).total, free, batch=8)


def _longest_row(ids: Dataset, pairs: int, max_length: int) -> int:
    """Tokens of so many pairs in one row, each prompt once: the longest one, and others as they may be drawn."""
    prompt, *answers = token_counts(ids).values()
    each = prompt + sum(np.minimum(answer, max_length - prompt) for answer in answers)
    others = pairs - 1
    drawn = each.max() + others * each.mean() + 2 * each.std() * others**0.5
    tokens = math.ceil(min(pairs * each.max(), drawn))
    return tokens + filler(tokens)


def estimate_for(model: PeftModel, ids: Dataset, settings: dict) -> MemoryEstimate:
    """`estimate_memory` for a policy that is loaded.

    Every pair is taken as the longest. Where all pairs are in one row, one of them is the longest, and the others are
    as long as pairs drawn at random.
    `model` has a LoRA adapter, `ids` are the training pairs' (`tokenize_pairs`), `settings` those of `dpo_settings`.
    """
    plain, pairs = model.device.type == "cpu", settings["per_device_train_batch_size"]
    tokens, prompt = min(int(pair_lengths(ids).max()), settings["max_length"]), 0
    if not plain and can_share(model.get_base_model()):
        prompt = int(token_counts(ids)["prompt"].mean())
        tokens = math.ceil((_longest_row(ids, pairs, settings["max_length"]) / pairs + prompt) / 2)
    return estimate_memory(
        model.config,
        pairs=pairs,
        tokens=tokens,
        prompt=prompt,
        checkpointing=settings["gradient_checkpointing"],
        load_in_4bit=bool(getattr(model, "is_loaded_in_4bit", False)),
        rank=next(iter(model.peft_config.values())).r,
        optim=settings["optim"],
        plain=plain,
    )


def plan_for(model: PeftModel, ids: Dataset, settings: dict, free: float) -> BatchPlan:
    """`plan_batch` for a policy that is loaded, by its own pairs; if nothing fits, what needs least.

    Bytes (`free`, the plan's) are on top of the loaded model. The step keeps its number of pairs, a power of two. The
    model, ids and settings are as in `estimate_for`.
    """

    def need(pairs: int, checkpointing: bool) -> float:
        step = {"per_device_train_batch_size": pairs, "gradient_checkpointing": checkpointing}
        return estimate_for(model, ids, settings | step).training

    batch = pairs_a_step(settings)
    return _plan(need, free, batch) or BatchPlan(1, batch, True, need(1, True), "no other way needs less")


def _glibc(function: str, *values: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no glibc: Windows, macOS, musl
        getattr(ctypes.CDLL("libc.so.6"), function)(*values)


def keep_freed_memory() -> None:
    """On Linux, make glibc reuse a step's freed tensors: fetched anew, page by page, they are a tenth of its time."""
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    _glibc("mallopt", m_mmap_max, 0)
    _glibc("mallopt", m_trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Give the kernel what was freed and glibc kept for reuse, as `keep_freed_memory` asks it to."""
    _glibc("malloc_trim", 0)


def free_memory(device: torch.device) -> float:
    """Bytes that are free on `device`, the model's: of the GPU, with what torch holds unused, or of the machine."""
    if device.type == "cuda":
        gc.collect()  # frees what an earlier trainer recorded
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return_freed_memory()
    return psutil.virtual_memory().available


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says so: CUDA's allocator has an exception of its own, all others say it in words."""
    said = any(words in str(error).lower() for words in ("can't allocate memory", "out of memory"))
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))
