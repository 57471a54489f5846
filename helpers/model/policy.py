"""The policy: a model with its adapter and tokenizer, and what is known of it."""

import functools

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from helpers.common import UserError
from helpers.model import Model, Tokenizer
from helpers.model.fingerprint import adapter_hash, adapter_weights, base_hash, base_model, fingerprint, is_fresh
from helpers.model.load import public_name


def check_adapter(model: PeftModel) -> None:
    """Raise UserError unless a run can train, save and measure the adapter of `model`."""
    config, names = model.active_peft_config, list(model.peft_config)
    if names != ["default"]:
        raise UserError(
            f"The model has the adapters {', '.join(names)}. Libraries save and load only one that is named 'default' "
            "without fail. Save yours (model.save_pretrained(FOLDER, selected_adapters=[NAME])) and load it alone: "
            "load_model(FOLDER/NAME)."
        )
    if config.peft_type != "LORA":
        raise UserError(f"The adapter is of the kind {config.peft_type.value}; only LoRA is supported. Use add_lora.")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise UserError(
            f"The adapter was made with init_lora_weights={config.init_lora_weights!r}, which may change the weights "
            "of the base: no other machine would have that base. Use add_lora, or init_lora_weights=True."
        )
    if config.bias != "none":
        raise UserError(f"The adapter has bias={config.bias!r}: it would train the base, which is the reference.")
    if isinstance(model.get_base_model().get_output_embeddings(), LoraLayer):
        raise UserError(
            "The adapter has LoRA on the output layer, which TRL's loss does not see. Leave that layer out of "
            "target_modules, or name it in modules_to_save."
        )


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
    fingerprint = property(lambda self: fingerprint(self.model))
    inner = property(lambda self: base_model(self.model))
    device = property(lambda self: self.model.device)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the adapter's weights."""
        return {name: tensor.clone() for name, tensor in adapter_weights(self.model).items()}

    def put_back(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the adapter the `weights` that `weights()` copied, or that a file holds."""
        set_peft_model_state_dict(self.model, weights, adapter_name=self.model.active_adapters[0])
