"""Models: which one a machine gets, loading it, what it replies, its log-probs, and the memory that it needs."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.common import errors_of

Model = PreTrainedModel | PeftModel
Tokenizer = PreTrainedTokenizerBase
Prompts = Sequence[str | list[dict] | dict]  # questions, conversations, or rows of pairs

refusal = errors_of(__file__, "refusals.yaml")
