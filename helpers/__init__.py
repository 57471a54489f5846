"""Front door of the notebooks: import from here first, and everything comes in the order that works.

The rooms behind it, each importing only from those above it:

    errors         the exception that speaks to the reader
    files          writing that leaves nothing half-made
    text           showing text that may hold anything
    session        first and last cell: .env, imports in order, kernel shutdown
    pairs          reading and splitting preference pairs
    models         profiles, loading a model, its pad token, LoRA
    checks         what is wrong with pairs, for a tokenizer
    generation     replies of a model
    shared_prompt  a pair's prompt computed once
    scoring        log-probs of pairs, the reference's cache, held-out figures
    memory         what training needs, and what is free
    runs           the run folder
    cards          its model card
    training       settings, trainer, train_dpo
    sft            a start for models that lack a habit
    word_problems  thinking pairs made by a program, and what judges them
    thinking       the think boundary, thinking pairs and what is wrong with them
    sweep          one run for each beta
    diagnosis      from symptom to cure
    inspection     what a run changed: replies, rewards, tokens
    export         handing a run over
    trl_dpo        the script that an export starts
    plots          figures from plain numbers
"""

from helpers.session import shut_down_kernel  # noqa: I001  (first: it imports Unsloth before TRL)

from datasets import Dataset
from trl import DPOTrainer
from unsloth import FastLanguageModel, is_bfloat16_supported as is_bf16_supported

from helpers.checks import check_pairs
from helpers.diagnosis import diagnose
from helpers.errors import UserError
from helpers.export import export_run
from helpers.inspection import compare_generations, implicit_rewards, token_rewards
from helpers.models import add_lora, current_profile, fix_pad_token, load_model, load_tokenizer
from helpers.pairs import load_pairs, split_pairs
from helpers.runs import Run
from helpers.sweep import sweep_beta
from helpers.thinking import check_thinking, split_thinking, think_boundary
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
    "check_thinking",
    "compare_generations",
    "current_profile",
    "diagnose",
    "export_run",
    "fix_pad_token",
    "implicit_rewards",
    "is_bf16_supported",
    "load_model",
    "load_pairs",
    "load_tokenizer",
    "shut_down_kernel",
    "split_pairs",
    "split_thinking",
    "sweep_beta",
    "think_boundary",
    "token_rewards",
    "train_dpo",
]
