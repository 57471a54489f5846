"""Models: which one a machine gets, loading it, what it replies, its log-probs, and the memory that it needs."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model = PreTrainedModel | PeftModel
Tokenizer = PreTrainedTokenizerBase
Prompts = Sequence[str | list[dict] | dict]  # questions, conversations, or rows of pairs
