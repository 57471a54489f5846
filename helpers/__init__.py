"""Front door of the notebooks: import from here first. A reader goes on in `helpers/train/dpo.py`.

The wings behind it, each importing only from those above it:

    common    errors that speak to the reader, atomic writing, showing untrusted text, settings and folders
    patches   every reach into a private name of a library, one file each
    session   first cell: `.env`, text progress, imports in order
    shutdown  last cell: free the memory, end the session
    data      a file or a list becomes pairs that can be trusted, with their token ids
    model     profiles, loading, replies, log-probs, hashes, memory
    run       the run folder, its figures, diagnosis, keep or discard, its model card
    train     settings, trainer, `train_dpo`, the SFT start, the beta sweep, pairs from the policy's own replies
    thinking  think tags, thinking pairs, what is wrong with them, how they are scored
    after     inspection, recommendation, export
    teach     what only a notebook shows: figures and tables of lessons
"""

import helpers.session  # noqa: F401, I001  (first: it imports Unsloth before TRL)

from datasets import Dataset
from trl import DPOTrainer
from unsloth import FastLanguageModel, is_bfloat16_supported as is_bf16_supported

from helpers.after.export import export_run, kept_update
from helpers.after.inspection import compare_generations, implicit_rewards, open_run, token_rewards
from helpers.after.recommend import recommend
from helpers.after.retention import retention
from helpers.after.trl_script import share
from helpers.common import PROJECT, UserError, output_folder
from helpers.session import quiet_progress
from helpers.data.check import check_pairs
from helpers.data.load import BUNDLED_PAIRS, load_pairs
from helpers.data.render import tokenize_pairs
from helpers.data.report import load_report
from helpers.data.split import split_pairs
from helpers.model.generate import generate_replies
from helpers.model.load import add_lora, fix_pad_token, load_model, load_tokenizer
from helpers.model.logps import pair_logps, reference_logps
from helpers.model.memory import estimate_for, estimate_memory, plan_batch
from helpers.model.profiles import current_profile
from helpers.run.diagnosis import diagnose
from helpers.run.folder import Run, machine, versions
from helpers.run.metrics import accuracy_by, seed_interval, wilson_interval
from helpers.run.verdict import verdict
from helpers.shutdown import shut_down_kernel
from helpers.thinking.check import check_thinking
from helpers.thinking.pairs import load_thinking_pairs, render_thinking
from helpers.thinking.score import false_steps, score_thought, thought_shares, thought_table
from helpers.thinking.tags import split_thinking, think_boundary
from helpers.thinking.word_problems import KINDS, make_thinking_pairs
from helpers.train.dpo import train_dpo
from helpers.train.sample import sample_pairs
from helpers.train.settings import DPOConfig, dpo_settings
from helpers.train.sft import train_sft
from helpers.train.sweep import Sweep, sweep_beta
from helpers.train.trainer import text_progress

__all__ = [
    "BUNDLED_PAIRS", "DPOConfig", "DPOTrainer", "Dataset", "FastLanguageModel", "KINDS", "PROJECT", "Run", "Sweep",
    "UserError", "accuracy_by", "add_lora", "check_pairs", "check_thinking", "compare_generations", "current_profile",
    "diagnose", "dpo_settings", "estimate_for", "estimate_memory", "export_run", "false_steps", "fix_pad_token",
    "generate_replies", "implicit_rewards", "is_bf16_supported", "kept_update", "load_model", "load_pairs",
    "load_report", "load_thinking_pairs", "load_tokenizer", "machine", "make_thinking_pairs", "open_run",
    "output_folder", "pair_logps", "plan_batch", "quiet_progress", "recommend", "reference_logps", "render_thinking",
    "retention", "sample_pairs", "score_thought", "seed_interval", "share", "shut_down_kernel", "split_pairs",
    "split_thinking", "sweep_beta", "text_progress", "think_boundary", "thought_shares", "thought_table",
    "token_rewards", "tokenize_pairs", "train_dpo", "train_sft", "verdict", "versions", "wilson_interval",
]  # fmt: skip
