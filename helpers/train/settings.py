"""The settings of a run: what `train_dpo` starts from, with reasons, and what it refuses."""

import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import trl
import unsloth
from peft import PeftModel
from transformers import PreTrainedModel

from helpers.common import UserError
from helpers.data.check import MAX_PROMPT_LENGTH
from helpers.model.embedded import EMBEDDED_HUB_NAME
from helpers.model.load import public_name
from helpers.model.memory import pairs_a_step
from helpers.model.policy import check_adapter
from helpers.model.profiles import current_profile

# Arguments of older TRL versions that much teaching material still passes, and what to do instead.
GONE = {
    "max_prompt_length": f"it is an argument of check_pairs and train_dpo, {MAX_PROMPT_LENGTH} by default",
    "max_completion_length": "max_length caps prompt and completion together",
    "rpo_alpha": 'use loss_type=["sigmoid", "sft"] with loss_weights',
    "reference_free": "leave it out; DPO always needs its reference",
    "generate_during_eval": "compare replies before and after yourself, as the end of 03_train does",
    "ref_adapter_name": "the reference is the policy before its first step",
    "thinking": "max_length is what the model was loaded for: load_model(thinking=True), or pass max_length",
}


def _check_report_to(report_to: str | list[str] | None) -> None:
    """Raise UserError if TensorBoard is asked for and not installed; transformers would raise three libraries down."""
    wanted = [report_to] if isinstance(report_to, str) else list(report_to or [])
    found = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    if "tensorboard" in wanted and not found:
        raise UserError('report_to="tensorboard" needs a package that is not here: `pip install tensorboard`.')


def check_settings(names: Iterable[str]) -> None:
    """Raise UserError for the first of `names` that DPOConfig does not know; it gives the nearest one that it does.

    On a GPU Unsloth's DPOConfig would print a line and go on, so that a misspelt beta trains with the default.
    """
    known = [field.name for field in dataclasses.fields(trl.DPOConfig)]
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        cure = GONE.get(name) or (f"did you mean {near[0]!r}?" if near else "see help(trl.DPOConfig)")
        raise UserError(f"DPOConfig has no setting {name!r} in TRL {trl.__version__}: {cure}")


class DPOConfig(trl.DPOConfig):
    """TRL's DPOConfig, which refuses settings that it does not know on a CPU and a GPU alike.

    What each setting is and its default: `help(trl.DPOConfig)`, or TRL's documentation.

    Raises:
        UserError: a name that DPOConfig does not have, with what to write in its place.
    """

    def __init__(self, *args: Any, **settings: Any):
        check_settings(settings)
        super().__init__(*args, **settings)


def dpo_settings(model: PreTrainedModel | PeftModel | None = None) -> dict[str, Any]:
    """The settings that `train_dpo` starts from on this kind of machine; each has its reason next to it in the source.

    Args:
        model: that is to be trained. The learning rate fits its size, and `max_length` is what it was loaded for
            (`load_model`). Left out, they are those of the profile's model for ordinary pairs.

    Returns:
        Arguments of DPOConfig by name: `DPOConfig(output_dir=..., **dpo_settings(model))`.
    """
    profile = current_profile()
    small = profile.name == "cpu" or (model is not None and public_name(model) == EMBEDDED_HUB_NAME)
    common = {
        # Ten times below SFT: a larger one drives both log-probs down. A small model and few steps need more.
        "learning_rate": 2e-4 if small else 5e-6,
        "beta": 0.1,  # the paper's value for dialogue (section 6) and TRL's default
        "max_length": getattr(model, "max_seq_length", profile.max_length),  # Unsloth notes it on the model
        "num_train_epochs": 1,  # preferences overfit fast: more epochs raise the margin before they raise accuracy
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # of all steps: the first gradients are the largest, as every pair still weighs a half
        "weight_decay": 0.0,  # the reference already pulls the policy back
        "logging_steps": 5,
        "logging_first_step": True,  # its loss is taken before the update, so it shows whether the start is right
        "report_to": "none",
        "seed": 0,
    }
    if profile.name == "gpu":
        return common | {
            "optim": "adamw_8bit",  # optimizer state in a quarter of the memory
            "per_device_train_batch_size": 8,  # effective batch 8 in one piece: the GPU is busy only then
            "gradient_accumulation_steps": 1,
            "per_device_eval_batch_size": 8,
            "gradient_checkpointing": True,  # train_dpo drops it if there is room, which is faster (plan_for)
            "bf16": unsloth.is_bfloat16_supported(),
            "fp16": not unsloth.is_bfloat16_supported(),  # GPUs before Ampere
        }
    return common | {
        "optim": "adamw_torch_fused",  # bitsandbytes' 8-bit optimizer needs a GPU
        "per_device_train_batch_size": 4,  # effective batch 8 in two pieces: less padding than in one
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "gradient_checkpointing": False,  # memory is no concern here, and recomputing costs time
        "bf16": unsloth.is_bfloat16_supported(),
    }


def complete_settings(model: PeftModel, settings: dict[str, Any]) -> dict[str, Any]:
    """`dpo_settings(model)` with the caller's `settings` in their place, if all of them and the adapter can be had."""
    if isinstance(model, PeftModel):  # of a sweep it is the base
        check_adapter(model)
    values = dpo_settings(model) | settings
    check_settings(values)
    _check_report_to(values["report_to"])
    return values


def _steps(pairs: int, values: dict[str, Any]) -> int:
    if values.get("max_steps", -1) > 0:
        return values["max_steps"]
    return math.ceil(math.ceil(pairs / pairs_a_step(values)) * values["num_train_epochs"])


# How a run is watched and kept, if the caller does not say otherwise; `run_config` says how often.
RUN_SETTINGS: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": None,
    "save_strategy": "steps",
    "save_steps": None,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "disable_tqdm": True,
    "remove_unused_columns": True,
}


def run_config(folder: Path, pairs: int, values: dict[str, Any], share: dict[str, Any]) -> DPOConfig:
    """The config of a process that has its `share` (`share_step`) of the complete settings `values` of a run."""
    every = max(1, math.ceil(_steps(pairs, values) / 3))  # three evaluations, three checkpoints
    usual = RUN_SETTINGS | {"eval_steps": every, "save_steps": every}
    if values.get("eval_strategy", "steps") != "steps":
        del usual["eval_steps"]  # on a GPU Unsloth prints that it is ignored
    return DPOConfig(output_dir=str(folder / "checkpoints"), **usual | share)
