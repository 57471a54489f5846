"""The policy: a model with its adapter and tokenizer, and what is known of it, computed once."""

import functools

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.model.fingerprint import adapter_hash, base_hash, base_model, fingerprint, is_fresh
from helpers.model.load import public_name


class Policy:
    """A model in hand.

    Attributes:
        model, tokenizer: as `load_model` gives them, with or without an adapter.
        options: what the chat template gets for a prompt that brings nothing of its own, e.g. enable_thinking=False.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, options: dict | None = None
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, options or {}

    @functools.cached_property
    def name(self) -> str:
        """Of the base model, as other machines know it."""
        return public_name(self.model)

    @property
    def base(self) -> str:
        """`base_hash`: of the weights below the adapter."""
        return base_hash(self.model)

    @property
    def adapter(self) -> str:
        """`adapter_hash`: of the adapter as it is now."""
        return adapter_hash(self.model)

    @property
    def is_fresh(self) -> bool:
        """Whether the adapter changes nothing yet."""
        return is_fresh(self.model)

    @property
    def fingerprint(self) -> str:
        """What decides the log-probs: base, and adapter if it is not fresh."""
        return fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def inner(self) -> PreTrainedModel:
        """The base model inside the adapter."""
        return base_model(self.model)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the adapter's weights."""
        return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(self.model).items()}

    def put_back(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the adapter the `weights` that `weights()` copied, or that a file holds."""
        set_peft_model_state_dict(self.model, weights)
