"""The settings of a run: what `train_dpo` starts from, with reasons, and what it refuses."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import trl
import unsloth
import yaml
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations import integration_utils

from helpers.common import UserError
from helpers.data.check import MAX_PROMPT_LENGTH
from helpers.model.embedded import EMBEDDED_HUB_NAME
from helpers.model.load import public_name
from helpers.model.memory import pairs_a_step
from helpers.model.policy import check_adapter
from helpers.model.profiles import current_profile
from helpers.train.processes import processes

# What train_dpo does with each setting of DPOConfig, and which values it takes; the file says more.
TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text(encoding="utf-8"))


def check_settings(names: Iterable[str]) -> None:
    """Raise UserError for the first of `names` that DPOConfig does not know; it gives the nearest one that it does.

    On a GPU Unsloth's DPOConfig would print a line and go on, so that a misspelt beta trains with the default.
    """
    known = [field.name for field in dataclasses.fields(trl.DPOConfig)]
    for name in (name for name in names if name not in known):
        near = difflib.get_close_matches(name, known, n=1)
        cure = f"did you mean {near[0]!r}?" if near else "see help(trl.DPOConfig)"
        cure = TABLE["gone"].get(name, cure).format(MAX_PROMPT_LENGTH=MAX_PROMPT_LENGTH)
        raise UserError(f"DPOConfig has no setting {name!r} in TRL {trl.__version__}: {cure}")


class DPOConfig(trl.DPOConfig):
    """TRL's DPOConfig, which refuses settings that it does not know on a CPU and a GPU alike.

    What each setting is and its default: `help(trl.DPOConfig)`, or TRL's documentation.

    Raises:
        UserError: a name that DPOConfig does not have, with what to write in its place, or a value that it refuses.
    """

    def __init__(self, *args: Any, **settings: Any):
        check_settings(settings)
        try:
            super().__init__(*args, **settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"DPOConfig does not take these settings: {error}") from error


def dpo_settings(model: PreTrainedModel | PeftModel | None = None) -> dict[str, Any]:
    """The settings that `train_dpo` starts from on this kind of machine; each has its reason next to it in the source.

    Args:
        model: that is to be trained. The learning rate fits its size, and `max_length` is what it was loaded for
            (`load_model`). Left out, they are those of the profile's model for ordinary pairs.

    Returns:
        Arguments of DPOConfig by name: `DPOConfig(output_dir=..., **dpo_settings(model))`.
    """
    profile, bf16 = current_profile(), unsloth.is_bfloat16_supported()
    gpu = profile.name == "gpu"
    small = not gpu or (model is not None and public_name(model) == EMBEDDED_HUB_NAME)
    settings = {
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
        # In 8 bits the optimizer's state takes a quarter of the memory; bitsandbytes needs a GPU for it.
        "optim": "adamw_8bit" if gpu else "adamw_torch_fused",
        # Effective batch 8: in one piece, since a GPU is busy only then; on a CPU in two, which have less padding.
        "per_device_train_batch_size": 8 if gpu else 4,
        "gradient_accumulation_steps": 1 if gpu else 2,
        "per_device_eval_batch_size": 8 if gpu else 4,
        # On a GPU train_dpo drops it if there is room, which is faster (plan_for); on a CPU memory is no concern.
        "gradient_checkpointing": gpu,
        "bf16": bf16,
    }
    return settings | ({"fp16": not bf16} if gpu else {})  # GPUs before Ampere


def _check_report_to(report_to: str | list[str]) -> None:
    """Raise UserError for a reporter that is not installed; transformers would raise three libraries down."""
    for name in set([report_to] if isinstance(report_to, str) else report_to) - {"none", "all"}:
        known = integration_utils.INTEGRATION_TO_CALLBACK
        if name not in known:
            raise UserError(f'report_to={name!r}: transformers knows {", ".join(known)}, and "none".')
        if name not in integration_utils.get_available_reporting_integrations():
            raise UserError(f'report_to="{name}" needs a package that is not here: `pip install {name}`.')


def complete_settings(model: PeftModel, settings: dict[str, Any]) -> dict[str, Any]:
    """`dpo_settings(model)` with the caller's `settings` in their place; UserError if they or the adapter can't be had.

    A text that names a number is that number: YAML reads 5e-6 as a text.
    """
    if isinstance(model, PeftModel):  # of a sweep it is the base
        check_adapter(model)
    check_settings(settings)
    usual, defaults = dpo_settings(model), {field.name: field.default for field in dataclasses.fields(trl.DPOConfig)}
    values = usual | settings
    for name, value in settings.items():
        reason = TABLE["refused"].get(f"{name}={value}") or TABLE["refused"].get(name)
        if reason and value not in (None, False, defaults[name]):
            raise UserError(f"{name}={value!r}: {reason}")
        if isinstance(value, str) and (type(defaults[name]) in (int, float) or name in ("eval_steps", "ld_alpha")):
            try:
                number = float(value)
            except ValueError:
                raise UserError(f"{name}={value!r}: it has to be a number.") from None
            values[name] = int(number) if number.is_integer() else number
    for name in TABLE["above_0"].split():
        whole = isinstance(defaults[name], int)
        if not isinstance(values[name], Integral if whole else Real) or not 0 < values[name] < math.inf:
            kind = "whole number" if whole else "number"
            raise UserError(f"{name}={values[name]!r}: it has to be a {kind} above 0; left out, it is {usual[name]}.")
    values |= {"report_to": values["report_to"] or "none", "precompute_ref_log_probs": False}  # they are, in any case
    _check_report_to(values["report_to"])
    _check_loss(values)
    return values


def _check_loss(values: dict[str, Any]) -> None:
    """Raise UserError for a value that TRL would refuse only in a step, or never."""
    given = {name: values.get(name) or text.split()[0] for name, text in TABLE["choices"].items()}
    given = {name: value if isinstance(value, list | tuple) else [value] for name, value in given.items()}
    for name, text in TABLE["choices"].items():
        for one in given[name]:
            if str(one).removeprefix("eval_") not in text.split():
                raise UserError(f"{name}={one!r}: TRL {trl.__version__} has {', '.join(text.split())}.")
    smoothing, alpha = values.get("label_smoothing", 0), values.get("ld_alpha")
    smoothed = {loss: TABLE["smoothed"][loss] for loss in given["loss_type"] if loss in TABLE["smoothed"]}
    for loss, (low, high) in smoothed.items():
        if not low <= smoothing < high:
            raise UserError(f"label_smoothing={smoothing}: the loss {loss} takes it from {low:g} to below {high:g}.")
    if smoothing and not smoothed:
        print(
            f"label_smoothing={smoothing} changes nothing: the loss {' + '.join(given['loss_type'])} does not read it. "
            'For labels that may be wrong there is loss_type="robust".'
        )
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(f"ld_alpha={alpha}: it is a weight from 0 to 1.")
    if alpha is not None and processes().num_processes > 1:
        raise UserError("ld_alpha needs a run in one process: TRL scores the reference for it, and shares no cache.")


# How a run is watched and kept, if the caller does not say otherwise; `run_config` says how often.
RUN_SETTINGS: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": None,
    "save_strategy": "steps",
    "save_steps": None,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "disable_tqdm": True,
    "remove_unused_columns": True,
}


def run_config(folder: Path, pairs: int, values: dict[str, Any], share: dict[str, Any]) -> DPOConfig:
    """The config of a process that has its `share` (`share_step`) of the complete settings `values` of a run.

    Of evaluating and saving, the one of which the caller says nothing follows the other one.
    """
    given = {name: value for name, value in share.items() if value is not None}
    total = given.get("max_steps", -1)
    if total <= 0:
        total = math.ceil(math.ceil(pairs / pairs_a_step(values)) * given["num_train_epochs"])
    every = math.ceil(total / 3)  # three evaluations, three checkpoints
    steps = given.get("eval_steps") or given.get("save_steps") or every
    usual = RUN_SETTINGS | {"eval_steps": steps, "save_steps": steps}
    for part, other in (("eval", "save"), ("save", "eval")):
        if given.get(f"{other}_strategy") == "epoch" and f"{part}_steps" not in given:
            usual[f"{part}_strategy"] = "epoch"
    config = usual | given
    config["load_best_model_at_end"] = given.get(
        "load_best_model_at_end", "no" not in (config["eval_strategy"], config["save_strategy"])
    )
    if config["eval_strategy"] != "steps":
        del config["eval_steps"]  # on a GPU Unsloth prints that it is ignored
    return DPOConfig(output_dir=str(folder / "checkpoints"), **config)
