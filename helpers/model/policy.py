"""The policy: a model with its adapter and tokenizer, and what is known of it."""

import functools

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from helpers.model import Model, Tokenizer
from helpers.model.fingerprint import adapter_hash, base_hash, base_model, fingerprint, is_fresh
from helpers.model.load import public_name


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
        return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(self.model).items()}

    def put_back(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the adapter the `weights` that `weights()` copied, or that a file holds."""
        set_peft_model_state_dict(self.model, weights)
