"""A DPOTrainer on ids that were checked and log-probs that are cached, with progress as text."""

import functools
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import trl
from accelerate import DistributedType
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from helpers.common import UserError, cache_folder
from helpers.data.render import pair_lengths
from helpers.model.generate import evaluating
from helpers.model.logps import summed
from helpers.patches.cached_reference import use_cached_reference
from helpers.patches.cast_once import cast_weights_once
from helpers.patches.given_ids import trainer_class
from helpers.patches.one_update import update_at_once
from helpers.patches.recorded_stack import record_stack
from helpers.patches.shared_prompt import SHARED_KINDS, lay_out_early, share_prompts
from helpers.patches.unsloth_checkpointing import set_checkpointing
from helpers.session import quiet_progress
from helpers.train import TABLE, say
from helpers.train.processes import share_steps, weigh_pairs

# By so many times the precision's epsilon and the square root of its tokens may a log-prob be off: batches that are
# padded otherwise are rounded otherwise. In bf16 that is 2.5 nats at 100 tokens; docs/settings.md has what is seen.
ROUNDING = 32


class _TextProgress(TrainerCallback):
    """One line of text for each logging step and the last one: no bar, no widget, readable in a saved notebook."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.begin, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # transformers logs the last step only if `logging_steps` divides it.
        if args.logging_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict, **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            seconds = time.monotonic() - self.begin
            left = seconds / max(state.global_step - self.first, 1) * (state.max_steps - state.global_step)
            step = f"step {state.global_step:4d} of {state.max_steps}"
            print(f"{step}   {_figures_of(logs)}   {left / 60:.1f} min left", flush=True)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: dict, **kwargs: Any) -> None:
        if state.is_world_process_zero and "eval_rewards/accuracies" in metrics:
            print(f"held out at step {state.global_step}:   {_figures_of(metrics, 'eval_')}", flush=True)


class _FiniteGradients(TrainerCallback):
    """Raises FloatingPointError with the first step whose gradient is not finite, when a step is next logged or saved.

    Until then the answer stays on the device, so that no step waits for it. Where a GradScaler leaves such steps out
    (fp16), they do no harm.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.first = torch.tensor(0)  # no step yet

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        weights = [weight for group in kwargs["optimizer"].param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        first = self.first.to(norm.device)
        self.first = torch.where((first == 0) & ~norm.isfinite(), state.global_step + 1, first)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        waits = control.should_log or control.should_evaluate or control.should_save
        if waits and (first := int(self.first)):
            raise FloatingPointError(first)


class _BatchAhead(TrainerCallback):
    """Gets the next batch while the GPU is still at the backward pass; before the next step it would wait for it."""

    def __init__(self, trainer: Trainer) -> None:
        self.batches: Iterator = iter(())
        self.ready: list[Any] = []
        loaders = trainer.get_train_dataloader

        def get_train_dataloader() -> DataLoader:
            loader = loaders()
            base = loader.base_dataloader  # accelerate's loader asks it for its batches by this method
            base.__iter__ = functools.partial(self._read, base)
            return loader

        trainer.get_train_dataloader = get_train_dataloader

    def _read(self, loader: DataLoader) -> Iterator:
        self.batches, self.ready = DataLoader.__iter__(loader), []
        while self.ready or self.fetch():
            yield self.ready.pop()

    def fetch(self) -> bool:
        """Get a batch unless one is ready; whether one is then."""
        if not self.ready:
            self.ready = list(itertools.islice(self.batches, 1))
        return bool(self.ready)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.fetch()


def _figures_of(logs: dict[str, Any], part: str = "") -> str:
    text = f"loss {float(logs[f'{part}loss']):.3f}"
    if f"{part}rewards/margins" in logs:  # not in SFT
        margin, accuracy = (float(logs[f"{part}rewards/{name}"]) for name in ("margins", "accuracies"))
        text += f"   margin {margin:+.3f}   accuracy {accuracy:.2f}"
    return text


def text_progress(trainer: Trainer) -> None:
    """Make `trainer` print one line of text a logging step, in place of its bars and printed dictionaries."""
    # The notebook's callback needs IPython, which a script need not have, so all are known by name.
    drawn = {"ProgressCallback", "PrinterCallback", "NotebookProgressCallback", "_TextProgress"}
    for callback in list(trainer.callback_handler.callbacks):
        if drawn & {one.__name__ for one in type(callback).__mro__}:
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
    """A DPOTrainer on `train` and `test` (ids, or pairs, which TRL tokenises) with the columns of `with_reference`.

    With `precompute_ref_log_probs` in `config` they come without these, and TRL asks `ref_model`, or the policy as it
    is now. The trainer puts a forward of its own on the base model, which `own_forward` takes off again.
    """
    set_checkpointing(model, bool(config.gradient_checkpointing))
    try:
        with quiet_progress(len(train)):
            given = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer}
            trainer = trainer_class()(model, ref_model, config, **given, callbacks=list(callbacks))
    finally:
        # TRL copies the adapter as a frozen one named "ref". It is not needed here; if it is there next to the policy,
        # transformers' resume loads neither (the policy would silently restart from zero), and a second try fails.
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
    share_prompts(model.get_base_model())
    if not config.precompute_ref_log_probs:
        use_cached_reference(trainer)
        lay_out_early(trainer)
    if model.device.type == "cuda":
        trainer.accelerator.dataloader_config.non_blocking = True  # or a copy of a batch waits for the step before
        trainer.add_callback(_BatchAhead(trainer))
        update_at_once(trainer)
        if config.bf16:
            cast_weights_once(trainer)
            record_stack(trainer)
    weigh_pairs(trainer)
    if trainer.accelerator.distributed_type != DistributedType.NO:
        share_steps(trainer)
    text_progress(trainer)
    if not config.fp16:
        trainer.add_callback(_FiniteGradients())
    return trainer


def _evaluated(trainer: trl.DPOTrainer, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """What `trainer` would log of a `batch` of held-out pairs; no callback is told, and nothing is kept."""
    callbacks, history, logs = trainer.callback_handler.callbacks, list(trainer.state.log_history), {}
    trainer.callback_handler.callbacks = []
    trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    trainer.log(logs)
    trainer.callback_handler.callbacks, trainer.state.log_history = callbacks, history
    return logs


def check_start(trainer: trl.DPOTrainer, settings: dict[str, Any]) -> float:
    """Raise UserError unless the policy is its reference before the first step; `settings` are the caller's.

    Returns the share of what rounding is allowed that the difference takes.

    For the longest and the shortest pair, the `trainer`'s own loss has to find rewards of 0, and each of the four rows
    by itself, without padding and with no prompt shared, the log-probs of the reference. Of an architecture that is not
    among those compared with TRL, the model's own logits have to give the shortest pair's.
    """
    model, args, order = trainer.model, trainer.args, pair_lengths(trainer.train_dataset).argsort()
    batch = trainer.data_collator(trainer.train_dataset.select([order[-1], order[0]]).to_list())
    reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    inputs, alone = {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}, []
    by_logits = torch.zeros(())
    with evaluating(model), torch.no_grad(), trainer.accelerator.autocast():
        logs = _evaluated(trainer, batch)
        for row, size in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            own = {name: values[row : row + 1, :size].to(model.device) for name, values in inputs.items()}
            alone.append(summed(model, own, fused=True)[0].cpu())
            if row == 1 and model.config.model_type not in SHARED_KINDS:
                by_logits = (summed(model, own, fused=False)[0].cpu() - alone[1]).abs()
    precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    eps = max(torch.finfo(dtype).eps for dtype in (precision, model.dtype))
    allowed = 1e-2 + ROUNDING * eps * batch["completion_mask"].sum(dim=1).sqrt()
    by_loss = max(abs(logs[f"eval_rewards/{side}"]) for side in ("chosen", "rejected")) / trainer.beta
    by_row = (torch.stack(alone) - reference).abs() * (trainer.ld_alpha is None)  # which weighs a row by its partner
    if by_logits > allowed[1]:
        raise UserError(say("not_its_logits", kind=model.config.model_type, nats=by_logits, allowed=allowed[1]))
    loss_right, rows_right = by_loss <= allowed.max(), bool((by_row <= allowed).all())
    if loss_right and rows_right:
        return max(by_loss / float(allowed.max()), float((by_row / allowed).max()))
    cause = f"a {model.config.model_type} model gives a row other log-probs if more rows are computed with it"
    if not loss_right:
        known = f"{TABLE['result']} {TABLE['harmless']}".split()
        cause = " or ".join(name for name in settings if name not in known) or "TRL's loss"
        if not rows_right:
            cause = f"log-probs that were cached for another model (delete {cache_folder() / 'reference'})"
    nats = max(by_loss, by_row.max())
    raise UserError(say("not_at_reference", nats=nats, allowed=allowed.max(), cause=cause))
