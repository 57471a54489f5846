"""`train_dpo`, which `03_train` shows step by step: check, reference, train by TRL, leave a run folder."""

import contextlib
import dataclasses
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from helpers.common import UserError, why_not_written
from helpers.data.check import MAX_PROMPT_LENGTH
from helpers.data.findings import Report
from helpers.model import Model, Tokenizer
from helpers.model.logps import (
    PairLogps,
    in_32_bits,
    pair_logps,
    read_logps,
    reference_file,
    with_reference,
    write_logps,
)
from helpers.model.memory import is_out_of_memory, return_freed_memory
from helpers.model.policy import Policy
from helpers.patches import works
from helpers.patches.fused_lm_head import own_forward
from helpers.run.card import model_card
from helpers.run.folder import Run, Status, save_adapter, save_run
from helpers.run.metrics import held_out_table, preference_metrics
from helpers.train import say
from helpers.train.job import Job, check_both
from helpers.train.processes import alone_in, once, one_voice, processes
from helpers.train.resume import ENDED, Checkpoints, last_complete, step_in
from helpers.train.settings import complete_settings
from helpers.train.trainer import check_start, make_trainer


def train_dpo(
    model: PeftModel,
    tokenizer: Tokenizer,
    train: Dataset,
    test: Dataset,
    folder: str | Path,
    *,
    ref_model: Model | None = None,
    early_stopping: int | None = None,
    replace: bool = False,
    max_prompt_length: int = MAX_PROMPT_LENGTH,
    on_long_prompt: Literal["shorten", "drop", "keep"] = "shorten",
    callbacks: Iterable[TrainerCallback] = (),
    **settings: Any,
) -> Run:
    """Train the model's LoRA adapter with DPO and leave a run folder.

    The reference is `ref_model` if one is given, else the policy as it is now: the base model for a fresh adapter, the
    SFT model for an adapter that was trained before. Its log-probs are computed once and cached. Before the first step
    they have to equal the policy's, or nothing is trained.

    An interrupted run (Ctrl-C, the stop button, a killed process) is resumed by the same call from its last complete
    checkpoint, with the result that it would have had. A finished one is loaded, adapter and all.

    Args:
        model: a model with a LoRA adapter (`add_lora`); trained in place. It is as it was if the run does not finish.
        tokenizer: the model's, as `load_model` gives it.
        train, test: pairs in the form that `load_pairs` gives; no prompt may be in both. They are checked
            (`check_pairs`), and trained and scored on the token ids of that check.
        folder: of the run, e.g. `output_folder("train")`.
        ref_model: the reference, if it is another model; loaded like `model`, with the same tokenizer.
        early_stopping: stop after so many evaluations without a better held-out loss.
        replace: start anew if `folder` holds another run; the old one is kept next to it as `NAME.old-1` and so on.
        max_prompt_length, on_long_prompt: what becomes of long prompts, as in `check_pairs`; a printed line and the
            model card say how many were shortened or left out.
        callbacks: of transformers, for the trainer.
        settings: DPOConfig settings that differ from `dpo_settings(model)`: beta, learning_rate, num_train_epochs ...
            On a GPU free memory decides how the pairs of a step are cut, and whether gradients are checkpointed, as
            long as none of the three settings for it is among them (`plan_for`); a run that goes on keeps its way.

    Returns:
        The run: `run.metrics` has the held-out figures, `run.history` the logged steps, `run.adapter` the folder of the
        trained adapter. The README.md in its folder is a model card.

    Raises:
        UserError: no adapter, a setting that can't be had, errors in the pairs, another run in the folder, too little
            memory (before training by an estimate, or when it ran out), a policy that does not start as its reference,
            a gradient that is not finite.
        KeyboardInterrupt: after an interruption, once everything is saved.
    """
    if not isinstance(model, PeftModel):
        raise UserError("The model has no LoRA adapter to train. Call `model = add_lora(model)` first.")
    folder = Path(folder).expanduser().resolve()
    with one_voice(folder):
        values, own = complete_settings(model, settings), list(callbacks) if isinstance(callbacks, Iterable) else [None]
        if None in own:
            raise UserError(f"callbacks={callbacks!r}: it has to be a list of transformers' callbacks.")
        if early_stopping is not None:
            if isinstance(early_stopping, bool) or not isinstance(early_stopping, int) or early_stopping < 1:
                raise UserError(say("no_patience", number=early_stopping))
            if values.get("eval_strategy") == "no":
                raise UserError('early_stopping counts evaluations, and eval_strategy="no" makes none. Leave one out.')
            own = [EarlyStoppingCallback(early_stopping), *own]
        rule = {"max_prompt_length": max_prompt_length, "on_long_prompt": on_long_prompt}
        pairs = check_both(train, test, tokenizer, values["max_length"], **rule)
        policy = Policy(model, tokenizer, pairs.train.template)
        reference = None if ref_model is None else Policy(ref_model, tokenizer)
        return run_job(Job(policy, reference, pairs, folder, values, settings), replace, own)


def run_job(job: Job, replace: bool = False, callbacks: Iterable[TrainerCallback] = ()) -> Run:
    """Do what `job` says; the other arguments and the result are those of `train_dpo`."""
    stopping = [one for one in callbacks if isinstance(one, EarlyStoppingCallback)]
    job.info.early_stopping = stopping[0].early_stopping_patience if stopping else 0
    with alone_in(job.folder):
        with _written(job.folder):  # another run may have to be put aside
            before = job.earlier(replace)
        if before is not None and before.status == Status.FINISHED:
            print(f"This run is finished already; loading it from {job.folder.name}.")
            run = once(lambda: Run.load(job.folder))
            job.policy.put_back(once(run.load_adapter))
            return run
        with _undone(job) as initial, own_forward((job.reference or job.policy).inner), own_forward(job.policy.inner):
            with _written(job.folder):
                once(job.begin)
            began = time.monotonic()
            reference, of_a_pair = _reference(job)
            seconds = {"reference_seconds": time.monotonic() - began}
            checkpoint = once(lambda: last_complete(job.folder / "checkpoints")) if before is not None else None
            print(job.ahead(step_in(checkpoint) if checkpoint else 0, of_a_pair), flush=True)
            trainer, seconds["train_seconds"] = _train(job, reference, callbacks, checkpoint)
            table = _scored(job, reference["test"], initial)
            with _written(job.folder):
                return once(lambda: _finish(job, trainer, table, seconds, initial))


def _of_a_checkpoint(error: Exception, control: TrainerControl) -> bool:
    """Whether `error` is from writing one, which `control` says is due. What reporters raise is also an OSError."""
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    callbacks = [one for one in owners if isinstance(one, TrainerCallback)]
    return isinstance(callbacks[-1], Checkpoints) if callbacks else control.should_save


@contextlib.contextmanager
def _written(folder: Path, is_from: Callable[[Exception], bool] = lambda error: True) -> Iterator[None]:
    """Raises UserError if the run could not be written to `folder` in the block, in which `is_from` says what did."""
    try:
        yield
    except Exception as error:
        if is_from(error) and (reason := why_not_written(error)):
            raise UserError(say("not_written", folder=folder, reason=reason)) from error
        raise


@contextlib.contextmanager
def _undone(job: Job) -> Iterator[dict[str, torch.Tensor]]:
    """Gives the adapter's weights; puts them back if the block ends in an error, and says if memory was short."""
    initial = job.policy.weights()
    try:
        yield initial
    except BaseException as error:
        job.policy.put_back(initial)
        if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
            job.write(Status.OUT_OF_MEMORY)
            raise UserError(say("out_of_memory", **job.info.memory_gb, savings=job.savings())) from error
        if isinstance(error, FloatingPointError):
            (step,) = error.args
            job.write(Status.NOT_FINITE, steps=step)
            raise UserError(say("not_finite", step=step, rate=job.values["learning_rate"])) from error
        raise


def _score(job: Job, policy: Policy, ids: Dataset) -> PairLogps:
    """`pair_logps` of `policy`, each process some of the batches."""
    share = processes().process_index, processes().num_processes
    size, max_length = job.scored_at_once, job.values["max_length"]
    part = pair_logps(policy.model, policy.tokenizer, ids, max_length=max_length, batch_size=size, share=share)
    return PairLogps(*(sum(parts) for parts in zip(*gather_object([part]), strict=True)))


def _reference(job: Job) -> tuple[dict[str, PairLogps], float | None]:
    """Log-probs of "train" and "test" under the reference, and how long that of a training pair took if it is known."""
    print(f"Reference log-probs of {sum(len(report.ids) for report in job.pairs.sets.values())} pairs ...", flush=True)
    test, _ = _reference_of(job, job.pairs.test)  # first: what a GPU compiles in its first batches is not timed
    train, seconds = _reference_of(job, job.pairs.train)
    return {"train": train, "test": test}, seconds and seconds / len(job.pairs.train.ids)


def _reference_of(job: Job, report: Report) -> tuple[PairLogps, float | None]:
    """The reference's log-probs, from the cache if they are there, and the seconds that they took on such a machine."""
    policy = job.reference or job.policy
    path = reference_file(policy.model, policy.tokenizer, report.hash, job.values["max_length"])
    kept = once(lambda: read_logps(path, len(report.ids)))
    if kept is None:
        began = time.monotonic()
        logps = _score(job, policy, report.ids)
        seconds = time.monotonic() - began
        once(lambda: _keep(path, logps, seconds=str(seconds), machine=job.info.machine))
        return logps, seconds
    logps, notes = kept
    if notes.get("machine") != job.info.machine:
        return logps, None
    try:
        return logps, float(notes["seconds"])
    except (LookupError, ValueError):  # of a note that was edited
        return logps, None


def _scored(job: Job, reference: PairLogps, initial: dict[str, torch.Tensor]) -> pd.DataFrame:
    """The held-out pairs under policy and `reference`, on a CPU in 32 bits; `initial` is the adapter at its start."""
    test, models = job.pairs.test, [one.model for one in (job.policy, job.reference) if one is not None]
    with in_32_bits(*models) as widened:
        policy, trained = _score(job, job.policy, test.ids), job.policy.weights()
        if widened:  # the reference was scored in 16 bits, as training needs it
            job.policy.put_back(initial)
            reference, _ = _reference_of(job, test)
            job.policy.put_back(trained)
    return held_out_table(test.pairs, reference, policy)


def _keep(path: Path, logps: PairLogps, **notes: str) -> None:
    try:
        write_logps(path, logps, **notes)
    except Exception as error:  # safetensors has a type of its own
        print(say("not_cached", folder=path.parent, reason=why_not_written(error) or error))


def _trainer(job: Job, reference: dict[str, PairLogps], callbacks: Iterable[TrainerCallback]) -> trl.DPOTrainer:
    """The trainer, on the ids that were checked and the reference's log-probs; those with `ld_alpha` are TRL's."""
    data = {name: report.ids if works("given_ids") else report.pairs for name, report in job.pairs.sets.items()}
    config, ref_model = job.config, None
    if config.ld_alpha is None and works("cached_reference"):
        data = {name: with_reference(data[name], reference[name]) for name in data}
    else:
        # Under new names: the one in TRL's cache of reference log-probs knows no settings.
        data = {name: Dataset(one.with_format("arrow")[:], fingerprint=uuid.uuid4().hex) for name, one in data.items()}
        config.precompute_ref_log_probs = True
        ref_model = job.reference.model if job.reference else None
    try:
        trainer = make_trainer(job.policy.model, job.policy.tokenizer, *data.values(), config, callbacks, ref_model)
        if job.reference is None:
            check_start(trainer, job.settings)
    except UserError:
        raise
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"TRL does not take this model with these settings: {error}") from error
    return trainer


def _train(
    job: Job, reference: dict[str, PairLogps], callbacks: Iterable[TrainerCallback], checkpoint: Path | None
) -> tuple[Trainer, float]:
    """Train from the last whole `checkpoint`, or from the start; returns the trainer and the seconds of its steps."""
    device, checkpoints = job.policy.device, Checkpoints(job.begin_again)
    loaded = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    trainer = _trainer(job, reference, [*callbacks, checkpoints])
    trainer.args.restore_callback_states_from_checkpoint = True  # how long early stopping has waited
    checkpoints.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    if checkpoint is not None:
        trainer.args.eval_on_start = False  # that was done
        print(f"Resuming from step {step_in(checkpoint)}.")
    return_freed_memory()  # what scoring freed rarely fits the batches of training
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    if checkpoint is not None and (checkpoint / ENDED).exists():  # interrupted after its last step
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        kept = checkpoint.with_name(Path(best or checkpoint).name)
        job.policy.put_back(load_file(kept / "adapter_model.safetensors"))
    else:
        written = _written(job.folder, lambda error: _of_a_checkpoint(error, trainer.control))
        # accelerate puts an autocast around the model's forward. Left there, it would round the scoring in 32 bits.
        with own_forward(job.policy.model), checkpoints.listening(), written:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - began
    if device.type == "cuda":
        peak, memory = torch.cuda.max_memory_allocated(device), job.info.memory_gb
        peak, used = map(max, zip(*gather_object([(peak, peak - loaded)]), strict=True))
        memory |= {"used": round(used / 1e9, 2), "peak": round(peak / 1e9, 2)}
        print(say("peak", **memory))
    if checkpoints.asked:
        print(say("stopped", step=trainer.state.global_step, total=trainer.state.max_steps))
        raise KeyboardInterrupt
    return trainer, seconds


def _finish(job: Job, trainer: Trainer, held_out: pd.DataFrame, seconds: dict, initial: dict) -> Run:
    """Write what the run leaves; `initial` are the adapter's weights at its start."""
    job.begin_again()  # its folder may have been removed while training
    policy, state, trained = job.policy, trainer.state, job.policy.weights()
    policy.put_back(initial)
    if job.reference is None and not policy.is_fresh:
        save_adapter(job.folder / "reference", policy.model, job.info)
    policy.put_back(trained)
    info = dataclasses.replace(job.info, status=Status.FINISHED, steps=state.global_step, end=policy.adapter)
    run = Run(job.folder, info, state.log_history, preference_metrics(held_out, job.config.beta) | seconds, held_out)
    save_run(run, policy.model, policy.tokenizer, model_card(run, "run"))
    return Run.load(job.folder)
