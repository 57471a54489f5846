"""The policy: a model with its adapter and tokenizer, and what is known of it."""

import functools
import re

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from helpers.model import Model, Tokenizer, refusal
from helpers.model.fingerprint import (
    OF_ADAPTER,
    adapter_hash,
    adapter_weights,
    base_hash,
    base_model,
    config_hash,
    fingerprint,
    is_fresh,
)
from helpers.model.load import public_name


def check_adapter(model: PeftModel) -> None:
    """Raise UserError unless a run can train, save and measure the adapter of `model`."""
    config, names = model.active_peft_config, list(model.peft_config)
    if names != ["default"]:
        raise refusal("adapter names", names=", ".join(names))
    if config.peft_type != "LORA":
        raise refusal("adapter kind", kind=config.peft_type.value)
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise refusal("adapter start", value=config.init_lora_weights)
    if config.bias != "none":
        raise refusal("adapter bias", value=config.bias)
    inner = model.get_base_model()
    if isinstance(inner, PeftModel):
        raise refusal("adapter in an adapter")
    for setting in ("layer_replication", "alora_invocation_tokens"):
        if getattr(config, setting, None):
            raise refusal("adapter setting", setting=setting)
    if isinstance(inner.get_output_embeddings(), LoraLayer):
        raise refusal("adapter on the output layer")
    if isinstance(inner.get_input_embeddings(), LoraLayer) and inner.config.get_text_config().tie_word_embeddings:
        raise refusal("adapter on tied embeddings")
    if any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer)):
        raise refusal("adapter merged")
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not trained or any(layer.disable_adapters for layer in model.modules() if isinstance(layer, LoraLayer)):
        raise refusal("adapter frozen")
    if others := [name for name in trained if not re.search(OF_ADAPTER, name)]:
        raise refusal("base trained", name=others[0], number=len(others))


def same_reference(there: str, now: str) -> bool:
    """Whether the reference that a run has `there` is the one of `now`; older runs say nothing of its settings."""
    return there == now or now.startswith(f"{there} ")


class Policy:
    """A model in hand, with or without an adapter, and its tokenizer.

    `options` are what the chat template gets for a prompt that brings nothing of its own, e.g. enable_thinking=False.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, options: dict | None = None):
        self.model, self.tokenizer, self.options = model, tokenizer, options or {}

    name = functools.cached_property(lambda self: public_name(self.model))
    base = property(lambda self: base_hash(self.model))
    adapter = property(lambda self: adapter_hash(self.model))
    is_fresh = property(lambda self: is_fresh(self.model))
    as_reference = property(
        lambda self: f"{fingerprint(self.model)} {config_hash(self.model)}",
        doc="Hashes of a `ref_model`, for run.json: its weights, its adapter, its settings.",
    )
    inner = property(lambda self: base_model(self.model))
    device = property(lambda self: self.model.device)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the adapter's weights in the machine's memory, since a GPU may have no room for it."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in adapter_weights(self.model).items()}

    def put_back(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the adapter the `weights` that `weights()` copied, or that a file holds."""
        set_peft_model_state_dict(self.model, weights, adapter_name=self.model.active_adapters[0])
