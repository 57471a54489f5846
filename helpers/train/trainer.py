"""A DPOTrainer on ids that were checked and log-probs that are cached, with progress as text."""

import time
from collections.abc import Iterable
from typing import Any

import trl
from accelerate import DistributedType
from datasets import Dataset
from peft import PeftModel
from transformers import (
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

from helpers.patches.cached_reference import use_cached_reference
from helpers.patches.cast_once import cast_weights_once
from helpers.patches.given_ids import trainer_class
from helpers.patches.shared_prompt import share_prompts
from helpers.patches.unsloth_checkpointing import set_checkpointing
from helpers.session import quiet_progress
from helpers.train.processes import share_steps, weigh_pairs


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
    ref_model: PreTrainedModel | PeftModel | None = None,
) -> trl.DPOTrainer:
    """A DPOTrainer that needs no reference model: `train` and `test` have the columns of `with_reference`.

    They are token ids, trained on as they are, or pairs, which TRL tokenises. With `precompute_ref_log_probs` in
    `config` they come without the columns, and TRL asks `ref_model`, or the policy as it is now. The trainer puts a
    forward of its own on the base model; `helpers.patches.fused_lm_head.own_forward` takes that off again.
    """
    set_checkpointing(model, bool(config.gradient_checkpointing))
    try:
        with quiet_progress(len(train)):
            trainer = trainer_class()(
                model=model,
                ref_model=ref_model,
                args=config,
                train_dataset=train,
                eval_dataset=test,
                processing_class=tokenizer,
                callbacks=list(callbacks),
            )
    finally:
        # TRL copies the adapter as a frozen one named "ref". It is not needed here; if it is there next to the policy,
        # transformers' resume loads neither (the policy would silently restart from zero), and a second try fails.
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
    if not config.precompute_ref_log_probs:
        use_cached_reference(trainer)
    share_prompts(model.get_base_model())
    if model.device.type == "cuda" and config.bf16:
        cast_weights_once(trainer)
    weigh_pairs(trainer)
    if trainer.accelerator.distributed_type != DistributedType.NO:
        share_steps(trainer)
    text_progress(trainer)
    return trainer
