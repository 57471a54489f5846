"""Processes that share a run (torchrun, accelerate launch): the step that one would make, and one that writes."""

import contextlib
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import trl
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import BatchSampler, Sampler
from transformers import TrainerCallback, TrainerState, TrainingArguments

from helpers.common import UserError
from helpers.data.render import token_counts
from helpers.model.memory import pairs_a_step
from helpers.train import say


def processes() -> PartialState:
    """The processes of this run: how many, which one this is. They are joined at the first call."""
    asked, on_cpu = int(os.environ.get("WORLD_SIZE", 1)), not torch.accelerator.is_available()
    if on_cpu and "LOCAL_RANK" in os.environ:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or accelerate would not join them; its launcher says "False"
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")  # not cpu:1, which torch.load refuses
    state = PartialState(cpu=on_cpu)
    if state.num_processes != asked:
        raise UserError(f"{asked} processes were started, and this one knows of {state.num_processes}. Use torchrun.")
    return state


@contextlib.contextmanager
def one_voice(folder: Path) -> Iterator[None]:
    """In the block only the first process prints; the others write to NAME.logs next to `folder`, kept if they die."""
    state, logs = processes(), folder.with_name(f"{folder.name}.logs")
    if state.is_main_process:
        if state.num_processes > 1:
            print(say("logs", number=state.num_processes, name=logs.name), flush=True)
        yield
        return
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"process-{state.process_index}.txt"
    with path.open("a", buffering=1) as log, contextlib.redirect_stdout(log):
        yield
    path.unlink()
    with contextlib.suppress(OSError):  # others are still there
        logs.rmdir()


def once(function: Callable[[], Any]) -> Any:
    """What `function` returns or raises in the first process, in all of them; the others do not call it."""
    box: list[Any] = [None, None]
    if processes().is_main_process:
        try:
            box[0] = function()
        except Exception as error:
            box[1] = error
    result, error = broadcast_object_list(box)
    if error is not None:
        raise error
    return result


def check_alike(**facts: Any) -> None:
    """Raise UserError if the processes do not agree on `facts`, by name."""
    every = gather_object([facts])
    for name in (name for name in facts if any(one[name] != facts[name] for one in every)):
        raise UserError(say("not_alike", name=name))


def _locked(folder: Path) -> list[FileLock]:
    """The lock of `folder`, next to it; in it, if only there one may write; none, if nothing can be written at all."""
    folder = folder.resolve()  # of which there may be several names
    for place in (folder.with_name(f".{folder.name}.lock"), folder / ".lock"):
        lock = FileLock(place, timeout=0)  # makes the folder above, too
        try:
            lock.acquire()
        except Timeout:
            raise UserError(say("not_alone", folder=folder)) from None
        except OSError:
            continue
        return [lock]
    return []


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """In the block no other run takes `folder`; raises UserError if one has it."""
    held: list[FileLock] = []
    once(lambda: held.extend(_locked(folder)))
    try:
        yield
    finally:
        for lock in held:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def share_step(values: dict[str, Any]) -> dict[str, Any]:
    """The settings `values` of a step for each process, so that all together take as many pairs as one would."""
    number, batch = processes().num_processes, pairs_a_step(values)
    each, rest = divmod(batch, number)
    if rest:
        fitting = " or ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        sizes = f"{each * number} or " * (each > 0) + str((each + 1) * number)
        raise UserError(say("not_shared", batch=batch, number=number, fitting=fitting, sizes=sizes))
    size = max(n for n in range(1, min(each, values["per_device_train_batch_size"]) + 1) if each % n == 0)
    return values | {"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size}


class _Shares(BatchSampler):
    """The batches of one process: an equal share of the pairs of each step, also of an epoch's last one.

    `tokens` are those of each pair. A step's pairs are dealt by them, there and back, since the process with most
    tokens is the one that all others wait for.
    """

    def __init__(self, sampler: Sampler, args: TrainingArguments, tokens: Sequence[int] | np.ndarray):
        super().__init__(sampler, args.train_batch_size, drop_last=False)
        self.tokens = tokens
        self.place, self.number, self.pieces = args.process_index, args.world_size, args.gradient_accumulation_steps

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.number / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.sampler)
        while pairs := list(itertools.islice(order, self.batch_size * self.pieces * self.number)):
            stride = self.number * math.ceil(len(pairs) / self.number / self.batch_size)
            pairs.sort(key=lambda pair: self.tokens[pair])
            for begin in range(stride, len(pairs), 2 * stride):
                pairs[begin : begin + stride] = pairs[begin : begin + stride][::-1]
            for first in range(self.place, stride, self.number):
                yield pairs[first::stride] or pairs[:1]  # which then counts nothing (`weigh_pairs`)


@dataclass(eq=False)
class _SameFigures(TrainerCallback):
    """Puts the mean over all processes in place of what each one logs of its own pairs."""

    held_out: int  # batches that this process scores

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict, **kwargs: Any) -> None:
        every = gather_object([(self.held_out if "eval_runtime" in logs else 1, logs)])
        weights = [weight for weight, _ in every]
        # A process that scores nothing has no loss; the first one has all names.
        logs |= {name: fmean([own.get(name, 0) for _, own in every], weights) for name in every[0][1]}
        if "num_tokens" in logs:
            logs["num_tokens"] *= args.world_size
        state.log_history[-1] |= logs


def weigh_pairs(trainer: trl.DPOTrainer) -> None:
    """Make each pair of a step count the same, in however many batches and processes it is cut.

    TRL takes the mean of a batch, and transformers that of a step's batches. Those differ in size where an epoch ends.
    """
    args, compute = trainer.args, trainer.compute_loss
    number, place = args.world_size, args.process_index
    whole, rest = divmod(len(trainer.train_dataset), args.train_batch_size * args.gradient_accumulation_steps * number)
    if not rest or (args.dataloader_drop_last and number == 1):  # several processes drop nothing
        return
    seen: Counter[int] = Counter()  # batches, by step

    @functools.wraps(compute)
    def compute_loss(model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        loss, step = compute(model, inputs, *more, **options), trainer.state.global_step
        if not model.training or step % (whole + 1) != whole:
            return loss
        counts = place + number * seen[step] < rest
        seen[step] += 1
        pairs = len(inputs["input_ids"]) // 2 if counts else 0
        return loss * (pairs * trainer.current_gradient_accumulation_steps * number / rest)

    trainer.compute_loss = compute_loss


def share_steps(trainer: trl.DPOTrainer) -> None:
    """Make `trainer` train on its share of each step, and average the gradients with the other processes.

    No DDP: it needs a hook on each weight, which weights cast once a batch and Unsloth's checkpointing do without. Each
    looks at its own figures, and `_SameFigures` takes the means when they are logged: TRL would wait for all processes
    a dozen times a step. To be called after `cast_weights_once`, whose gradients these are.
    """
    args, accelerator, number = trainer.args, trainer.accelerator, trainer.args.world_size
    step, batches, predict = trainer.training_step, trainer.get_train_dataloader, trainer.prediction_step
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    pairs = len(trainer.eval_dataset or ())
    scored = math.ceil(pairs / args.eval_batch_size)  # batches, shared by accelerate
    trainer.callback_handler.callbacks.insert(0, _SameFigures(len(range(args.process_index, scored, number))))
    trainer.gather_function = accelerator.gather = accelerator.gather_for_metrics = lambda own: own
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)  # without DDP
    accelerator.even_batches = False  # or pairs would be scored twice to fill the last batches

    def get_train_dataloader() -> Any:
        loader = batches()
        if number > 1:  # a launcher can start one process
            shard = loader.batch_sampler  # accelerate's, of which there is a part for each process
            tokens = np.sum(list(token_counts(trainer.train_dataset).values()), axis=0)
            shard.batch_sampler, shard.batch_size = _Shares(shard.batch_sampler.sampler, args, tokens), None
            shard.num_processes, shard.process_index = 1, 0
        return loader

    def prediction_step(model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> tuple:
        loss, *others = predict(model, inputs, *more, **options)
        return loss * (len(inputs["input_ids"]) // 2 * scored / pairs), *others  # each pair counts the same

    @functools.wraps(step)
    def training_step(*given: Any, **options: Any) -> torch.Tensor:
        loss = step(*given, **options)
        if accelerator.sync_gradients:
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            vector_to_parameters(accelerator.reduce(parameters_to_vector(gradients), "mean"), gradients)
        return loss

    trainer.get_train_dataloader, trainer.training_step = get_train_dataloader, training_step
    trainer.prediction_step = prediction_step
