"""Hashes that say when two models are the same: of the base, of the adapter, and of what decides the log-probs."""

import hashlib
import json
import re
import weakref
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from helpers.model import Model, Tokenizer

OF_ADAPTER = r"lora_|\.modules_to_save\.|\.trainable_tokens_"  # in the names of weights that are not the base's
# Settings of an adapter that its weights do not tell; older runs know the first three.
ADAPTER_SETTINGS = ("r", "lora_alpha", "use_rslora", "alpha_pattern", "lora_dropout")
# Base model -> (its samples and changes, base_hash): it takes seconds if a model has billions of weights.
_BASES: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[str, str]]" = weakref.WeakKeyDictionary()
# Tokenizer -> (its number of tokens, a hash of them).
_VOCABULARIES: "weakref.WeakKeyDictionary[Tokenizer, tuple[int, str]]" = weakref.WeakKeyDictionary()


def base_model(model: Model) -> PreTrainedModel:
    """The model inside a PeftModel, or `model` itself if it has no adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """20 hex digits of the names, types, shapes and values of `tensors`; the order of the dictionary does not count."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of the active adapter of `model`, by their names in its file."""
    return get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])


def adapter_hash(model: PeftModel) -> str:
    """`hash_tensors` of the adapter of `model`."""
    return hash_tensors(adapter_weights(model))


def adapter_settings(model: Model) -> dict[str, Any]:
    """ADAPTER_SETTINGS of the adapter of `model`; of a base model none."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return {name: getattr(config, name, None) for name in ADAPTER_SETTINGS if config}


def is_fresh(model: Model) -> bool:
    """Whether `model` surely equals its base: what its adapter adds is zero, as one of LoRA's two matrices is."""
    if not isinstance(model, PeftModel):
        return True
    # Without the base's embeddings, PEFT does not ask the hub whether they were resized.
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
    return not any(
        tensor.any() for name, tensor in state.items() if not re.search("lora_A|lora_embedding_B|base_layer", name)
    )


def base_hash(model: Model) -> str:
    """`hash_tensors` of the weights of `model` below its adapter; the same with and without one.

    It is computed again only if the weights were changed. torch counts such changes; those behind its back
    (`weight.data`) are noticed by a sample of each tensor.
    """
    tensors = {
        re.sub(r"^base_model\.model\.|\.(token_adapter|base_layer|original_module)\b", "", name): tensor
        for name, tensor in model.state_dict().items()
        if not re.search(OF_ADAPTER, name)
    }
    sampled = {name: t.flatten()[:: max(1, t.numel() // 64)] for name, t in tensors.items()}
    changes = sum(tensor._version for tensor in tensors.values())  # noqa: SLF001  (named in torch's own documentation)
    sample, inner = f"{hash_tensors(sampled)} {changes}", base_model(model)
    if _BASES.get(inner, ("", ""))[0] != sample:
        _BASES[inner] = (sample, hash_tensors(tensors))
    return _BASES[inner][1]


def fingerprint(model: Model) -> str:
    """Hashes of what decides the log-probs of `model`: its weights, and its adapter if that is not fresh."""
    return f"{base_hash(model)} {'fresh' if is_fresh(model) else adapter_hash(model)}"


def config_hash(model: Model) -> str:
    """20 hex digits of the settings of `model` that may change what it computes, e.g. `rope_parameters`."""
    values = base_model(model).config.to_diff_dict()
    harmless = "architectures dtype model_name transformers_version unsloth_fixed unsloth_version use_cache".split()
    values = {name: one for name, one in values.items() if name not in harmless and not name.endswith("token_id")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:20]


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """20 hex digits of what `tokenizer` makes of a text: vocabulary, chat template, pad and EOS token."""
    if _VOCABULARIES.get(tokenizer, (0, ""))[0] != len(tokenizer):
        numbers = tokenizer.get_vocab()
        tokens = sorted(numbers, key=numbers.__getitem__)
        listed = json.dumps([tokens, [numbers[token] for token in tokens]])
        _VOCABULARIES[tokenizer] = len(tokenizer), hashlib.sha256(listed.encode()).hexdigest()
    parts = [_VOCABULARIES[tokenizer][1], tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
