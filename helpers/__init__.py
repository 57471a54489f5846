"""Front door of the notebooks: import from here first, and everything comes in the order that works."""

from helpers.session import shut_down_kernel  # noqa: I001  (first: it imports Unsloth before TRL)

from datasets import Dataset
from trl import DPOTrainer
from unsloth import FastLanguageModel, is_bfloat16_supported as is_bf16_supported

from helpers.checks import check_pairs
from helpers.diagnosis import diagnose
from helpers.errors import UserError
from helpers.inspection import compare_generations, implicit_rewards, token_rewards
from helpers.models import add_lora, current_profile, fix_pad_token, load_model, load_tokenizer
from helpers.pairs import load_pairs, split_pairs
from helpers.runs import Run
from helpers.training import DPOConfig, train_dpo

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "Dataset",
    "FastLanguageModel",
    "Run",
    "UserError",
    "add_lora",
    "check_pairs",
    "compare_generations",
    "current_profile",
    "diagnose",
    "fix_pad_token",
    "implicit_rewards",
    "is_bf16_supported",
    "load_model",
    "load_pairs",
    "load_tokenizer",
    "shut_down_kernel",
    "split_pairs",
    "token_rewards",
    "train_dpo",
]
