"""Scoring: log-probs of pairs under a model, the reference's kept in a cache, and what follows from the two.

Training, sweep and inspection all score through `pair_logps`, so that their figures can be compared. Hashes of weights
and token ids say when two things are the same.
"""

import hashlib
import json

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    parts = [tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
