"""Training: settings with their reasons, reference log-probs computed once, and a run folder that resumes.

`train_dpo` is what `03_train` shows step by step: it checks the pairs, takes the reference's log-probs once, trains
with TRL's DPOTrainer, and leaves a run folder. Called again after an interruption it goes on where it stopped.
"""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers.common import UserError, write_json
from helpers.data.check import check_pairs
from helpers.data.render import data_hash, pair_lengths, tokenize_pairs
from helpers.model.fingerprint import adapter_hash, base_hash, fingerprint, is_fresh
from helpers.model.load import public_name
from helpers.model.logps import pair_logps, reference_logps, with_reference
from helpers.model.memory import (
    BATCH_SETTINGS,
    ESTIMATE_MARGIN,
    estimate_for,
    free_memory,
    is_out_of_memory,
    plan_for,
    return_freed_memory,
)
from helpers.model.profiles import current_profile
from helpers.run.card import model_card
from helpers.run.folder import Run, describe_config, machine, read_info, save_adapter, save_run, set_aside, versions
from helpers.run.metrics import held_out_table, preference_metrics
from helpers.train.resume import Checkpoints, StopAtStep, difference_of, last_complete, same_run, step_of
from helpers.train.settings import check_report_to, check_settings, dpo_settings, run_config
from helpers.train.trainer import make_trainer


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
    check_report_to(values["report_to"])
    train, test, findings = _checked(train, test, tokenizer, values["max_length"])

    train_ids, test_ids = tokenize_pairs(train, tokenizer), tokenize_pairs(test, tokenizer)
    base = base_hash(model)
    reference_model, reference_base = (model, base) if ref_model is None else (ref_model, base_hash(ref_model))
    config = run_config(folder, len(train), values)
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
        step = None if nothing_kept else step_of(before, info)
        if step is None:
            plan = plan_for(model, train_ids, values, free)
            step = dict(zip(BATCH_SETTINGS, plan[:3], strict=True))
        values |= step
        config = run_config(folder, len(train), values)
        info["config"] = describe_config(config)
    info["memory_gb"] = {
        "needed": round(estimate_for(model, train_ids, values).training / 1e9, 2),
        "free": round(free / 1e9, 2),
    }
    if before is not None and not same_run(before, info):
        if not replace and not nothing_kept:
            raise UserError(
                f"{folder} holds another run ({difference_of(before, info)}). Give this one a folder of its own, "
                "or pass replace=True: the old run is then kept beside it."
            )
        set_aside(folder)
        before = None
    if before is not None and before["status"] == "finished":
        print(f"This run is finished already; loading it from {folder.name}.")
        set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
        return Run.load(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = last_complete(folder / "checkpoints") if before is not None else None
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
    stop = StopAtStep()
    callbacks = [stop, Checkpoints()]
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
