"""Models: which one a machine gets, loading it, what it replies, its log-probs, and the memory that it needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.common import UserError

Model = PreTrainedModel | PeftModel
Tokenizer = PreTrainedTokenizerBase
Prompts = Sequence[str | list[dict] | dict]  # questions, conversations, or rows of pairs

REFUSALS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("refusals.yaml").read_text("utf-8"))


def refusal(name: str, /, **values: Any) -> UserError:
    """The error with this text of refusals.yaml."""
    return UserError(REFUSALS[name].format(**values))
