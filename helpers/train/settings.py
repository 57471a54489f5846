"""The settings of a run: what `train_dpo` starts from, with reasons, and what it refuses."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import trl
import unsloth
from peft import LoraConfig, PeftModel
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations import integration_utils

from helpers.common import UserError
from helpers.data.check import MAX_PROMPT_LENGTH
from helpers.model.embedded import EMBEDDED_HUB_NAME
from helpers.model.load import public_name
from helpers.model.memory import pairs_a_step
from helpers.model.policy import check_adapter
from helpers.model.profiles import current_profile
from helpers.train import TABLE, say
from helpers.train.processes import processes

RUN_SETTINGS: dict[str, Any] = TABLE["run"]
DEFAULTS = {field.name: field.default for field in dataclasses.fields(trl.DPOConfig)}
_TYPES = get_type_hints(trl.DPOConfig)
_ABOVE_0, _FROM_0 = (TABLE[name].split() for name in ("above_0", "from_0"))
_KINDS: dict[type, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def check_settings(names: Iterable[str]) -> None:
    """Raise UserError for the first of `names` that DPOConfig does not know; on a GPU Unsloth's would just go on."""
    for name in (name for name in names if name not in DEFAULTS):
        near = difflib.get_close_matches(name, DEFAULTS, n=1)
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
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"DPOConfig does not take these settings: {error}") from error


def dpo_settings(model: PreTrainedModel | PeftModel | None = None) -> dict[str, Any]:
    """The settings that `train_dpo` starts from on this kind of machine; settings.yaml has the reason of each.

    Args:
        model: that is to be trained. The learning rate fits its size, and `max_length` is what it was loaded for
            (`load_model`). Left out, they are those of the profile's model for ordinary pairs.

    Returns:
        Arguments of DPOConfig by name: `DPOConfig(output_dir=..., **dpo_settings(model))`.
    """
    profile, bf16 = current_profile(), unsloth.is_bfloat16_supported()
    start, small = TABLE["start"], model is not None and public_name(model) == EMBEDDED_HUB_NAME
    settings = start["both"] | start[profile.name] | (start["small"] if small else {}) | {"bf16": bf16}
    settings["max_length"] = getattr(model, "max_seq_length", profile.max_length)  # Unsloth notes it on the model
    return settings | ({"fp16": not bf16} if profile.name == "gpu" else {})  # GPUs before Ampere


def _kind(name: str) -> type | None:
    """Of a setting that is a number, a text, or True or False, which of these; of texts from a list, none."""
    if name in TABLE["choices"]:
        return None
    kinds = set(get_args(_TYPES[name]) or (_TYPES[name],)) - {type(None)}
    return next((one for one in _KINDS if kinds == {one}), None)


def _not_a_value(name: str, value: Any, usual: dict[str, Any]) -> str:
    above = {**dict.fromkeys(_ABOVE_0, " above 0"), **dict.fromkeys(_FROM_0, ", 0 or above")}.get(name, "")
    left_out = f"; left out, it is {usual[name]}" if name in usual else ""
    return f"{name}={value!r}: it has to be {_KINDS[_kind(name) or float]}{above}{left_out}."


def _typed(name: str, value: Any, usual: dict[str, Any]) -> Any:
    """The `value` of a setting; a text that names a number is that number: YAML reads 5e-6 as a text."""
    kind = _kind(name)
    if kind is None or (value is None and type(None) in get_args(_TYPES[name])):
        return value
    plain = value.item() if hasattr(value, "item") else value  # of numpy
    try:
        found = TypeAdapter(kind, config={"allow_inf_nan": False}).validate_python(plain)
    except ValidationError:
        raise UserError(_not_a_value(name, value, usual)) from None
    return plain if kind is float and isinstance(plain, int | float) else found  # 10 and 10.0 steps are not the same


def complete_settings(model: PeftModel, settings: dict[str, Any]) -> dict[str, Any]:
    """`dpo_settings(model)` with the caller's `settings` in them; UserError if they or the adapter can't be had."""
    if isinstance(model, PeftModel):  # of a sweep it is the base
        check_adapter(model)
    check_settings(settings)
    usual = dpo_settings(model)
    values = usual | settings
    for name, value in settings.items():
        reason = TABLE["refused"].get(f"{name}={value}") or TABLE["refused"].get(name)
        off = (None, DEFAULTS[name]) if DEFAULTS[name] is True else (None, False, DEFAULTS[name])
        if reason and value not in off:
            raise UserError(f"{name}={value!r}: {reason}")
        values[name] = _typed(name, value, usual)
    for name in _ABOVE_0 + _FROM_0:
        value = values.get(name)
        if value is None and name in usual or value is not None and (value < 0 or value == 0 and name in _ABOVE_0):
            raise UserError(_not_a_value(name, value, usual))
    values |= _precision(settings)
    values = {name: value for name, value in values.items() if name not in TABLE["refused"]}  # at their defaults
    values |= {"report_to": values["report_to"] or "none", "precompute_ref_log_probs": False}  # they are, in any case
    _check_choices(values)
    return values


def _precision(settings: dict[str, Any]) -> dict[str, bool]:
    """What the caller's `settings` mean for bf16 and fp16, of which one may be a default."""
    asked = [name for name in ("bf16", "fp16") if _typed(name, settings.get(name, False), {})]
    if len(asked) > 1:
        raise UserError(say("both_16_bits"))
    bf16 = unsloth.is_bfloat16_supported()
    if asked and current_profile().name == "cpu" and not (asked == ["bf16"] and bf16):
        print(say("no_16_bits", name=asked[0], bits="bf16" if bf16 else "32 bits"))
    return {name: name in asked for name in ("bf16", "fp16") if asked}


def _figure(metric: Any) -> str:
    return str(metric).removeprefix("eval_")


def _check_choices(values: dict[str, Any]) -> None:
    """Raise UserError for a value that TRL would refuse only in a step, or never, or transformers far from here."""

    def given(name: str) -> list[Any]:
        value = values.get(name)
        if value is None:
            value = TABLE["choices"][name].partition(" ")[0]
        return list(value) or [[]] if isinstance(value, list | tuple) else [value]

    losses, reporters = given("loss_type"), integration_utils.INTEGRATION_TO_CALLBACK
    for name, text in TABLE["choices"].items():
        for one in given(name):
            if _figure(one) not in text.split():
                raise UserError(f"{name}={one!r}: TRL {trl.__version__} has {', '.join(text.split())}.")
    for name in set(given("report_to")) - {"none", "all", *integration_utils.get_available_reporting_integrations()}:
        if name not in reporters:
            raise UserError(f'report_to={name!r}: transformers knows {", ".join(reporters)}, and "none".')
        raise UserError(f'report_to="{name}" needs a package that is not here: `pip install {name}`.')
    metric = _figure(values.get("metric_for_best_model"))
    if metric in TABLE["either_may_be_better"].split() and values.get("greater_is_better") is None:
        raise UserError(say("which_is_better", metric=metric))
    if (weights := values.get("loss_weights")) is not None:
        numbers = isinstance(weights, list | tuple) and all(isinstance(one, int | float) for one in weights)
        if not numbers or not all(0 <= one < math.inf for one in weights) or not any(weights):
            raise UserError(say("loss_weights", weights=weights))
    for name in TABLE["need_workers"].split():
        if values.get(name) and not values.get("dataloader_num_workers"):
            raise UserError(f"{name}={values[name]!r}: there are none without dataloader_num_workers.")
    if values.get("use_weighting"):
        for loss in set(losses) & set(TABLE["not_weighted"].split()):
            raise UserError(say("not_weighted", trl=trl.__version__, loss=loss))
    if values.get("activation_offloading") and current_profile().name == "cpu":
        raise UserError("activation_offloading=True: it moves what is on a GPU to the machine's memory. Leave it out.")
    if values.get("ddp_backend") and processes().num_processes == 1:
        raise UserError(f"ddp_backend={values['ddp_backend']!r}: this is a run in one process. Leave it out.")
    smoothing, alpha = values.get("label_smoothing", 0), values.get("ld_alpha")
    smoothed = {loss: TABLE["smoothed"][loss] for loss in losses if loss in TABLE["smoothed"]}
    for loss, (low, high) in smoothed.items():
        if not low <= smoothing < high:
            raise UserError(f"label_smoothing={smoothing}: the loss {loss} takes it from {low:g} to below {high:g}.")
    if smoothing and not smoothed:
        print(say("not_smoothed", smoothing=smoothing, losses=" + ".join(losses)))
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(f"ld_alpha={alpha}: it is a weight from 0 to 1.")
    if alpha is not None and processes().num_processes > 1:
        raise UserError("ld_alpha needs a run in one process: TRL scores the reference for it, and shares no cache.")


def _steps(pairs: int, values: dict[str, Any]) -> int:
    total = values.get("max_steps") or -1
    return total if total > 0 else math.ceil(math.ceil(pairs / pairs_a_step(values)) * values["num_train_epochs"])


def passes_ahead(values: dict[str, Any], pairs: int, held_out: int, done: int, on_cpu: bool) -> float:
    """What is left after `done` steps of a run on so many `pairs`, by complete `values`, in passes over one pair.

    A pass is the reference's. Counted are the steps (settings.yaml has what one costs), the evaluations of the
    `held_out` pairs between them, and the scoring at the end, which `on_cpu` takes two passes.
    """
    config, cost, steps = run_config(Path(), pairs, values, values), TABLE["passes"], _steps(pairs, values)
    a_pair = cost["cpu" if on_cpu else "gpu"] + cost["checkpointing"] * bool(config.gradient_checkpointing)
    evaluations = config.num_train_epochs * (config.eval_strategy == "epoch")
    if config.eval_strategy == "steps":
        evaluations = steps / config.eval_steps if config.eval_steps >= 1 else 1 / config.eval_steps
    left = 1 - done / steps
    at_the_end = 2 if on_cpu else 1  # the policy, and in 32 bits the reference once more
    return left * (steps * pairs_a_step(values) * a_pair + evaluations * held_out) + at_the_end * held_out


def what_will_happen(values: dict[str, Any], pairs: int, done: int, seconds: float | None) -> str:
    """What a run on so many `pairs`, by complete `values`, will do; `done` steps are made, the rest takes `seconds`."""
    steps, batch, rate = _steps(pairs, values), pairs_a_step(values), values["learning_rate"]
    minutes = "time_unknown" if seconds is None else "under_a_minute" if seconds < 60 else "minutes"
    time = say(minutes, minutes=(seconds or 0) / 60, s="s" * ((seconds or 0) >= 90))
    resumed = f" ({done} are done)" * (done > 0)
    return say("ahead", pairs=pairs, steps=steps, s="s" * (steps != 1), batch=batch, done=resumed, rate=rate, time=time)


def too_little_or_far(values: dict[str, Any], pairs: int, lora: LoraConfig) -> str:
    """What to say of a run on so many `pairs`, by complete `values`, that will end where it began, or far beyond the
    best; "" if neither.

    By benchmarks/results/learning_rate.json: while the log-ratio gap is below some 1.5 nats, it is 450 times learning
    rate times steps with a `lora` of alpha 16, within a quarter. It grows with alpha, whatever the rank, as more ranks
    move it as much further as alpha / rank scales each of them down; rank-stabilised LoRA divides by its root alone.
    Rate times steps is best at 0.007 to 0.009. From 0.018 on the KL is above 16 nats, and the accuracy lower. Trials on
    fewer pairs than were measured (60) learn those by heart, as they are meant to.
    """
    steps, rate = _steps(pairs, values), values["learning_rate"]
    alpha = lora.lora_alpha * (math.sqrt(lora.r) if lora.use_rslora else 1)
    reach = steps * alpha / 16  # for a rate of 1
    known = {"steps": steps, "s": "s" * (steps > 1), "rate": rate}
    if 450 * reach * rate < 0.3:  # as `diagnose` judges afterwards
        return say("hardly_moves", **known, gap=450 * reach * rate, better=3 / 450 / reach)
    if reach * rate > 0.015 and pairs >= 60:
        return say("goes_far", **known, better=0.008 / reach)
    return ""


def run_config(folder: Path, pairs: int, values: dict[str, Any], share: dict[str, Any]) -> DPOConfig:
    """The config of a process that has its `share` (`share_step`) of the complete settings `values` of a run."""
    given = {name: value for name, value in share.items() if value is not None}
    every = math.ceil(_steps(pairs, values) / 3)  # three evaluations, three checkpoints
    steps = given.get("eval_steps") or given.get("save_steps") or every
    config = RUN_SETTINGS | {"eval_steps": steps, "save_steps": steps}
    for part, other in (("eval", "save"), ("save", "eval")):  # the one that is not given follows the other one
        if given.get(f"{other}_strategy") == "epoch" and f"{part}_steps" not in given:
            config[f"{part}_strategy"] = "epoch"
    config |= given
    if _figure(config["metric_for_best_model"]) in TABLE["lower_is_better"].split():
        config.setdefault("greater_is_better", False)
    both = "no" not in (config["eval_strategy"], config["save_strategy"])
    config["load_best_model_at_end"] = given.get("load_best_model_at_end", both)
    if config["eval_strategy"] != "steps":
        del config["eval_steps"]  # on a GPU Unsloth prints that it is ignored
    made = DPOConfig(output_dir=str(folder / "checkpoints"), **config)
    if made.lr_scheduler_type in TABLE["by_metric"].split() and made.greater_is_better:
        made.lr_scheduler_kwargs = {"mode": "max"} | (made.lr_scheduler_kwargs or {})
    return made


def check_optimizer(config: DPOConfig, model: PeftModel) -> None:
    """Raise UserError if the optimizer that `config` names for `model`, or its schedule, cannot be made."""
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(config, model)
        kind = kind if kind.__module__.startswith("torch.") else torch.optim.SGD  # others may ask for the model
        options = options if kind is not torch.optim.SGD else {"lr": options.get("lr")}
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        plan = {"num_warmup_steps": 1, "num_training_steps": 10}
        get_scheduler(config.lr_scheduler_type, optimizer, **plan, scheduler_specific_kwargs=config.lr_scheduler_kwargs)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise UserError(say("not_made", error=error)) from error
