"""Training: settings with their reasons, reference log-probs computed once, and a run folder that resumes.

`train_dpo` is what `03_train` shows step by step: it checks the pairs, takes the reference's log-probs once, trains
with TRL's DPOTrainer, and leaves a run folder. Called again after an interruption it goes on where it stopped.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import trl
import unsloth
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from helpers.cards import model_card
from helpers.checks import MAX_PROMPT_LENGTH, check_pairs
from helpers.errors import UserError
from helpers.files import write_json
from helpers.memory import (
    BATCH_SETTINGS,
    ESTIMATE_MARGIN,
    estimate_for,
    free_memory,
    is_out_of_memory,
    pairs_a_step,
    plan_for,
    return_freed_memory,
)
from helpers.models import EMBEDDED, Profile, current_profile, named_model, public_name
from helpers.pairs import quiet_progress
from helpers.runs import Run, describe_config, machine, read_info, save_adapter, save_run, set_aside, versions
from helpers.scoring import (
    adapter_hash,
    base_hash,
    data_hash,
    fingerprint,
    held_out_table,
    is_fresh,
    pair_lengths,
    pair_logps,
    preference_metrics,
    reference_logps,
    tokenize_pairs,
    with_reference,
)
from helpers.shared_prompt import share_prompts

# ---------------------------------------------------------------------------------------------- settings

# Arguments of older TRL versions that much teaching material still passes, and what to do instead.
GONE = {
    "max_prompt_length": f"prompts are capped by check_pairs(max_prompt_length={MAX_PROMPT_LENGTH})",
    "max_completion_length": "max_length caps prompt and completion together",
    "rpo_alpha": 'use loss_type=["sigmoid", "sft"] with loss_weights',
    "reference_free": "leave it out; DPO always needs its reference",
    "generate_during_eval": "compare replies before and after yourself, as the end of 03_train does",
    "ref_adapter_name": "the reference is the policy before its first step",
}


def _check_report_to(report_to: str | list[str] | None) -> None:
    """Raise UserError for TensorBoard where it is not installed; transformers would raise three libraries down."""
    wanted = [report_to] if isinstance(report_to, str) else list(report_to or [])
    found = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    if "tensorboard" in wanted and not found:
        raise UserError('report_to="tensorboard" needs a package that is not here: `pip install tensorboard`.')


def check_settings(names: Iterable[str]) -> None:
    """Raise UserError where one of these `names` is none that DPOConfig knows; it gives the nearest one that is.

    TRL itself raises a TypeError here, but on a GPU Unsloth's DPOConfig prints a line and goes on without the
    setting, so that a misspelt beta trains with the default.
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


def dpo_settings(profile: Profile | None = None, *, thinking: bool = False) -> dict:
    """The settings that `train_dpo` starts from on this kind of machine; each stands beside its reason in the source.

    Args:
        profile: left out, that of this machine (`current_profile`).
        thinking: whether `max_length` is the profile's for thinking pairs, which are longer.

    Returns:
        Arguments of DPOConfig by name: `DPOConfig(output_dir=..., **dpo_settings())`.
    """
    profile = profile or current_profile()
    small = profile.name == "cpu" or named_model(profile, thinking) == EMBEDDED
    common = {
        # Ten times below SFT: a larger one drives both log-probs down. A small model and few steps need more.
        "learning_rate": 2e-4 if small else 5e-6,
        "beta": 0.1,  # the paper's value for dialogue (section 6) and TRL's default
        "max_length": profile.thinking_max_length if thinking else profile.max_length,
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
            "gradient_checkpointing": True,  # train_dpo drops it where there is room, which is faster (plan_for)
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


# ---------------------------------------------------------------------------------------------- the trainer


class _TextProgress(TrainerCallback):
    """One line of text for each logging step: no bar, no widget, readable in a saved notebook."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin, self.first = time.monotonic(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        seconds = time.monotonic() - self.begin
        left = seconds / max(state.global_step - self.first, 1) * (state.max_steps - state.global_step)
        scores = ""
        if "rewards/margins" in logs:  # not in SFT
            scores = (
                f"margin {float(logs['rewards/margins']):+.3f}   accuracy {float(logs['rewards/accuracies']):.2f}   "
            )
        print(
            f"step {state.global_step:4d} of {state.max_steps}   loss {float(logs['loss']):.3f}   {scores}"
            f"{left / 60:.1f} min left",
            flush=True,
        )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and "eval_rewards/accuracies" in metrics:
            print(
                f"held out at step {state.global_step}:   loss {metrics['eval_loss']:.3f}   "
                f"margin {metrics['eval_rewards/margins']:+.3f}   accuracy {metrics['eval_rewards/accuracies']:.2f}",
                flush=True,
            )


def text_progress(trainer: Trainer) -> None:
    """Make `trainer` print one line of text a logging step, in place of its bars and printed dictionaries."""
    for callback in list(trainer.callback_handler.callbacks):
        # The notebook's callback is known by name: its module needs IPython, which a script need not have.
        if isinstance(callback, (ProgressCallback, PrinterCallback, _TextProgress)) or (
            type(callback).__name__ == "NotebookProgressCallback"
        ):
            trainer.remove_callback(callback)
    trainer.add_callback(_TextProgress())


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    test: Dataset | None,
    config: trl.DPOConfig,
    callbacks: Iterable[TrainerCallback] = (),
) -> trl.DPOTrainer:
    """A DPOTrainer whose reference log-probs stand in the data, so it needs no reference model.

    Args:
        model, tokenizer: the policy, with its LoRA adapter, and its tokenizer.
        train, test: pairs with the columns of `with_reference`; without `test` nothing is evaluated.
        config: in full; `dpo_settings` gives what is usual on this machine.
        callbacks: of transformers, beside the one that prints a line a logging step.
    """
    # On a GPU Unsloth checkpoints as the adapter was made, whatever the config says; here the config decides.
    made = getattr(model, "_unsloth_gradient_checkpointing", None)
    if model.device.type != "cpu" and made is not None and bool(made) != config.gradient_checkpointing:
        model._unsloth_gradient_checkpointing = config.gradient_checkpointing
    try:
        with quiet_progress(len(train)):
            trainer = trl.DPOTrainer(
                model=model,
                args=config,
                train_dataset=train,
                eval_dataset=test,
                processing_class=tokenizer,
                callbacks=list(callbacks),
            )
    finally:
        # TRL copies the adapter as a frozen one named "ref". It is not needed here; where it stands beside the policy,
        # transformers' resume loads neither (the policy would silently restart from zero), and a second try fails.
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
    trainer.precompute_ref_logps = True
    share_prompts(model.get_base_model())
    if model.device.type == "cuda" and config.bf16 and config.world_size == 1:
        cast_weights_once(trainer)
    text_progress(trainer)
    return trainer


def cast_weights_once(trainer: trl.DPOTrainer) -> None:
    """Have the adapter's weights cast to bf16 once for each batch, all together; the results stay the same.

    Unsloth's kernels cast a weight wherever they use it: in the forward pass, where that is repeated for checkpointing,
    in the backward pass, and its gradient back. That is a fifth of a step's kernels, each of which the CPU hands over.
    The optimizer, clipping and checkpoints see the 32-bit weights and their gradients, as before.

    Args:
        trainer: its `training_step` is wrapped. One that trains anything beside LoRA's two matrices, or has them in
            16 bits already, is left as it is.
    """
    model = trainer.model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = [(name, module) for name, module in model.named_modules() if ".lora_A." in name or ".lora_B." in name]
    modules = [module for name, module in matrices if f"{name}.weight" in trained]
    weights = [module.weight for module in modules]
    if len(weights) < len(trained) or any(weight.dtype != torch.float32 for weight in weights):
        return
    short = [torch.nn.Parameter(weight.detach().bfloat16()) for weight in weights]
    step = trainer.training_step

    def put(parameters: list[torch.nn.Parameter]) -> None:
        for module, parameter in zip(modules, parameters, strict=True):
            module._parameters["weight"] = parameter

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            torch._foreach_copy_(short, weights)
        for parameter in short:
            parameter.grad = None
        try:
            put(short)
            loss = step(*args, **kwargs)
        finally:
            put(weights)
        first, further = [], []  # batches of a step
        for weight, parameter in zip(weights, short, strict=True):
            if parameter.grad is None:
                continue
            if weight.grad is None:
                weight.grad = torch.empty_like(weight)
                first.append((weight.grad, parameter.grad))
            else:
                further.append((weight.grad, parameter.grad))
        for add, pairs in ((torch._foreach_copy_, first), (torch._foreach_add_, further)):
            if pairs:
                add(*map(list, zip(*pairs, strict=True)))
        return loss

    trainer.training_step = training_step


# ---------------------------------------------------------------------------------------------- interruption


class _Checkpoints(TrainerCallback):
    """Marks each checkpoint as complete, with its files' sizes; one without such a mark was cut short."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / "complete.json", {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()})


def _last_complete(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose files all have the size they were written with; broken ones are removed."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for folder in reversed(found):
        try:
            sizes = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
            if all((folder / name).stat().st_size == size for name, size in sizes.items()):
                return folder
        except (OSError, ValueError):
            pass
        print(f"{folder.name} is incomplete (it was being written when the run ended); it is not used.")
        shutil.rmtree(folder, ignore_errors=True)
    return None


class _StopAtStep(TrainerCallback):
    """Ctrl-C or the stop button ends the step in progress, saves it and stops; a second one stops at once."""

    asked = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def stop(number: int, frame: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, previous)
            print("Stopping after this step; press again to stop at once.", flush=True)

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _checked(
    train: Dataset, test: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Dataset, dict[str, int]]:
    """Both sets, with long prompts shortened as check_pairs says, and what was found in the first: code to count.

    Raises UserError for what would spoil training or a measurement.
    """
    report = check_pairs(train, tokenizer, max_length, test=test)
    held_out = check_pairs(test, tokenizer, max_length)
    report.raise_for_errors()
    held_out.raise_for_errors()
    return report.pairs, held_out.pairs, {finding.code: finding.count for finding in report.findings}


def _steps(pairs: int, values: dict) -> int:
    if values.get("max_steps", -1) > 0:
        return values["max_steps"]
    return math.ceil(math.ceil(pairs / pairs_a_step(values)) * values["num_train_epochs"])


def _run_config(folder: Path, pairs: int, values: dict) -> DPOConfig:
    """The settings of a run on so many `pairs`: with `values`, what lets it be resumed and watched."""
    every = max(1, math.ceil(_steps(pairs, values) / 3))  # three evaluations, three checkpoints
    usual = {
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }
    if values.get("eval_strategy", "steps") != "steps":
        del usual["eval_steps"]  # on a GPU Unsloth prints that it is ignored
    return DPOConfig(
        output_dir=str(folder / "checkpoints"), disable_tqdm=True, remove_unused_columns=True, **usual | values
    )


# What makes two calls the same run; versions and machine may differ when it is resumed.
_IDENTITY = ("model", "base", "reference", "config", "data")


def _same_run(before: dict, info: dict) -> bool:
    # The adapter in hand is the one the run started from, or, where its cell is run once more, the one it ended with.
    same_start = info["start"] in (before.get("start"), before.get("end"))
    return same_start and all(before.get(name) == info[name] for name in _IDENTITY)


def _difference(before: dict, info: dict) -> str:
    config = before["config"], info["config"]
    changed = [
        f"{name} {config[0].get(name)} there, {config[1].get(name)} now"
        for name in sorted(config[0].keys() | config[1].keys())
        if config[0].get(name) != config[1].get(name)
    ]
    changed += [f"other {name}" for name in ("model", "reference", "data") if before.get(name) != info[name]]
    return "; ".join(changed[:3]) or "another adapter to start from"


def _step_of(before: dict | None, info: dict) -> dict | None:
    """How the run `before` makes a step, where it is the one of `info` but for that; else None.

    The same pairs a step, in other pieces or with checkpointing, give the same gradient up to rounding.
    """
    if before is None or not before["config"].keys() >= set(BATCH_SETTINGS):
        return None
    step = {name: before["config"][name] for name in BATCH_SETTINGS}
    like_before = info | {"config": info["config"] | step}
    same_pairs = pairs_a_step(step) == pairs_a_step(info["config"])
    return step if same_pairs and _same_run(before, like_before) else None


def _savings(model: PeftModel, ids: Dataset, values: dict) -> str:
    """What to change where memory is short, each with what it saves by the estimate."""
    size, pieces, lengths = (
        values["per_device_train_batch_size"],
        values["gradient_accumulation_steps"],
        pair_lengths(ids),
    )
    changes = []
    if not values["gradient_checkpointing"]:
        changes.append(({"gradient_checkpointing": True}, "slower"))
    if size > 1:
        halved = {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": pieces * 2}
        changes.append((halved, "the same effective batch"))
    half = min(max(lengths), values["max_length"]) // 2
    changes.append(({"max_length": half}, f"cuts {sum(n > half for n in lengths)} of {len(ids)} pairs"))
    need = estimate_for(model, ids, values).training
    lines = ["What to change in the call, and what it saves:"]
    for change, note in changes:
        text = ", ".join(f"{name}={value}" for name, value in change.items())
        saved = need - estimate_for(model, ids, values | change).training
        lines.append(f"- {text} ({note}): {saved / 1e9:.1f} GB")
    return "\n".join(lines)


def _check_memory(model: PeftModel, ids: Dataset, values: dict, folder: Path, info: dict) -> None:
    """Say so where training needs more than is free; refuse where it needs far more."""
    need, free = info["memory_gb"].values()
    if need < free:
        return
    text = f"Training needs about {need:.1f} GB beside the loaded model, and {free:.1f} GB are free."
    if need > ESTIMATE_MARGIN * free:
        write_json(folder / "run.json", info | {"status": "out of memory"})
        raise UserError(f"{text}\n{_savings(model, ids, values)}")
    print(f"{text} It may not fit.\n{_savings(model, ids, values)}")


def train_dpo(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    test: Dataset,
    folder: str | Path,
    *,
    ref_model: PreTrainedModel | PeftModel | None = None,
    early_stopping: int | None = None,
    replace: bool = False,
    thinking: bool = False,
    **settings: Any,
) -> Run:
    """Train the model's LoRA adapter with DPO and leave a run folder.

    The reference is `ref_model` where one is given, else the policy as it is now: the base model for a fresh
    adapter, the SFT model for an adapter that was trained before. Its log-probs are computed once and cached.

    An interrupted run (Ctrl-C, the stop button, a killed process) is resumed by the same call from its last complete
    checkpoint, with the result that it would have had. A finished one is loaded, adapter and all.

    On a GPU the step's pairs are cut into micro-batches, with or without gradient checkpointing, as free memory
    allows (`plan_for`); it says which and why. A run that goes on keeps what it began with.

    Args:
        model: a model with a LoRA adapter (`add_lora`); trained in place. Left as it was where the run is not finished.
        tokenizer: the model's, as `load_model` gives it.
        train, test: pairs in the form that `load_pairs` gives; no prompt may be in both. Prompts of more than 256
            tokens are shortened from the left by whole turns, or left out (`check_pairs`).
        folder: of the run, e.g. `output_folder("train")`.
        ref_model: the reference, where it is another model; loaded like `model`, with the same tokenizer.
        early_stopping: stop after so many evaluations without a better held-out loss.
        replace: start anew where `folder` holds another run; the old one is kept beside it as `NAME.old-1` and so on.
        thinking: whether `max_length` is the profile's for thinking pairs.
        settings: DPOConfig settings that differ from `dpo_settings()`: beta, learning_rate, num_train_epochs ...
            With per_device_train_batch_size, gradient_accumulation_steps or gradient_checkpointing among them, a GPU's
            free memory decides nothing.

    Returns:
        The run: `run.metrics` has the held-out figures, `run.history` the logged steps, `run.adapter` the folder of the
        trained adapter. The README.md in its folder is a model card.

    Raises:
        UserError: no adapter, a setting that TRL does not know, errors in the pairs, another run in the folder, too
            little memory (before training by an estimate, or when it ran out).
        KeyboardInterrupt: after an interruption, once everything is saved.
    """
    if not isinstance(model, PeftModel):
        raise UserError("The model has no LoRA adapter to train. Call `model = add_lora(model)` first.")
    folder = Path(folder)
    values = dpo_settings(thinking=thinking) | settings
    check_settings(values)
    _check_report_to(values["report_to"])
    train, test, findings = _checked(train, test, tokenizer, values["max_length"])

    train_ids, test_ids = tokenize_pairs(train, tokenizer), tokenize_pairs(test, tokenizer)
    base = base_hash(model)
    reference_model, reference_base = (model, base) if ref_model is None else (ref_model, base_hash(ref_model))
    config = _run_config(folder, len(train), values)
    info = {
        "status": "running",
        "model": public_name(model),
        "profile": current_profile().name,
        "config": describe_config(config),
        "steps": None,
        "train_pairs": len(train),
        "test_pairs": len(test),
        "data": {"train": data_hash(train_ids), "test": data_hash(test_ids), "findings": findings},
        "base": base,
        "start": adapter_hash(model),
        "reference": "the policy at its start" if ref_model is None else fingerprint(ref_model, reference_base),
        "versions": versions(),
        "machine": machine(),
    }
    before, free, plan = read_info(folder), free_memory(model.device), None
    nothing_kept = (
        before is not None and before["status"] != "finished" and not any(folder.glob("checkpoints/checkpoint-*"))
    )
    if model.device.type == "cuda" and not settings.keys() & set(BATCH_SETTINGS):
        step = None if nothing_kept else _step_of(before, info)
        if step is None:
            plan = plan_for(model, train_ids, values, free)
            step = dict(zip(BATCH_SETTINGS, plan[:3], strict=True))
        values |= step
        config = _run_config(folder, len(train), values)
        info["config"] = describe_config(config)
    info["memory_gb"] = {
        "needed": round(estimate_for(model, train_ids, values).training / 1e9, 2),
        "free": round(free / 1e9, 2),
    }
    if before is not None and not _same_run(before, info):
        if not replace and not nothing_kept:
            raise UserError(
                f"{folder} holds another run ({_difference(before, info)}). Give this one a folder of its own, "
                "or pass replace=True: the old run is then kept beside it."
            )
        set_aside(folder)
        before = None
    if before is not None and before["status"] == "finished":
        print(f"This run is finished already; loading it from {folder.name}.")
        set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
        return Run.load(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _last_complete(folder / "checkpoints") if before is not None else None
    if plan is not None:
        at_once, on = f"{plan.pairs} pair{'s' * (plan.pairs > 1)} at once", "on" if plan.checkpointing else "off"
        print(
            f"{at_once}, checkpointing {on}: needs about {plan.bytes / 1e9:.1f} of {free / 1e9:.1f} GB free; "
            f"{plan.reason}."
        )
    _check_memory(model, train_ids, values, folder, info)
    write_json(folder / "run.json", info)

    initial = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    batch_size = values["per_device_eval_batch_size"]
    stop = _StopAtStep()
    callbacks = [stop, _Checkpoints()]
    if early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping))
    finished = False
    try:
        print(f"Reference log-probs of {len(train) + len(test)} pairs ...", flush=True)
        began = time.monotonic()
        ref_train, ref_test = (
            reference_logps(
                reference_model,
                tokenizer,
                ids,
                max_length=config.max_length,
                batch_size=batch_size,
                weights=reference_base,
            )
            for ids in (train_ids, test_ids)
        )
        reference_seconds = time.monotonic() - began
        if ref_model is None and not is_fresh(model):
            save_adapter(folder / "reference", model, info)
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            loaded = torch.cuda.memory_allocated(model.device)
        trainer = make_trainer(
            model, tokenizer, with_reference(train, ref_train), with_reference(test, ref_test), config, callbacks
        )
        if checkpoint is not None:
            print(f"Resuming from step {checkpoint.name.rpartition('-')[2]}.")
        return_freed_memory()  # what scoring freed rarely fits the batches of training
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(model.device)
        began = time.monotonic()
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        train_seconds = time.monotonic() - began
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(model.device)
            memory = info["memory_gb"]
            memory |= {"used": round((peak - loaded) / 1e9, 2), "peak": round(peak / 1e9, 2)}
            print(
                f"Peak GPU memory {memory['peak']:.2f} GB, {memory['used']:.2f} beside the loaded model "
                f"(estimated: {memory['needed']:.2f})."
            )
        finished = not stop.asked
        if not finished:
            step, total = trainer.state.global_step, trainer.state.max_steps
            print(f"Stopped and saved at step {step} of {total}. The same call goes on from there.")
            raise KeyboardInterrupt
        policy = pair_logps(model, tokenizer, test_ids, max_length=config.max_length, batch_size=batch_size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        write_json(folder / "run.json", info | {"status": "out of memory"})
        raise UserError(
            f"Out of memory. By the estimate, training needs {info['memory_gb']['needed']:.1f} GB beside the loaded "
            f"model. The last checkpoint is kept.\n{_savings(model, train_ids, values)}\n"
            "A changed setting makes another run: where this one has a checkpoint, pass replace=True with it."
        ) from error
    except OSError as error:
        raise UserError(
            f"The run could not be written to {folder} ({error.strerror or error}). The last complete checkpoint is "
            "kept; make room and call train_dpo again."
        ) from error
    finally:
        if not finished:
            set_peft_model_state_dict(model, initial)
    table = held_out_table(test, ref_test, policy)
    metrics = preference_metrics(table, config.beta) | {
        "reference_seconds": reference_seconds,
        "train_seconds": train_seconds,
    }
    info |= {"status": "finished", "steps": trainer.state.global_step, "end": adapter_hash(model)}
    run = Run(folder, info, trainer.state.log_history, metrics, table)
    save_run(run, model, tokenizer, model_card(run, "run"))
    return Run.load(folder)
