"""Processes that share a run (torchrun, accelerate launch): the step that one would make, and one that writes.

No DDP: it needs a hook on each weight, which weights cast once a batch (`cast_once`) and Unsloth's checkpointing do
without. The gradients are averaged together, once a step.
"""

import contextlib
import functools
import itertools
import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import trl
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object
from filelock import FileLock, Timeout
from torch.utils.data import BatchSampler, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.common import UserError
from helpers.model.memory import pairs_a_step

T = TypeVar("T")


def processes() -> PartialState:
    """The processes of this run: how many, which one this is. They are joined at the first call."""
    asked, on_cpu = int(os.environ.get("WORLD_SIZE", 1)), not torch.accelerator.is_available()
    if on_cpu and "LOCAL_RANK" in os.environ:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # or accelerate would not join them
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")  # not cpu:1, which torch.load refuses
    state = PartialState(cpu=on_cpu)
    if state.num_processes != asked:
        raise UserError(f"{asked} processes were started, and this one knows of {state.num_processes}. Use torchrun.")
    return state


@contextlib.contextmanager
def one_voice(folder: Path) -> Iterator[None]:
    """In the block only the first process prints; the others have a log in NAME.logs beside `folder` while they run."""
    state, logs = processes(), folder.with_name(f"{folder.name}.logs")
    if state.num_processes == 1:
        yield
        return
    with _last_words(logs):
        if state.is_main_process:
            yield
            return
        logs.mkdir(parents=True, exist_ok=True)
        path = logs / f"process-{state.process_index}.txt"
        with path.open("a", buffering=1) as log, contextlib.redirect_stdout(log):
            try:
                yield
            except BaseException:
                traceback.print_exc(file=log)
                raise
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others are still there
        logs.rmdir()


@contextlib.contextmanager
def _last_words(logs: Path) -> Iterator[None]:
    """In the block a process that ends because another one on this machine died says which, and where its log is.

    That ends either in an error of the connection, or in torchrun's SIGTERM. Python's own handler would wait for a main
    thread that waits for the dead process, so a thread reads the signal.
    """
    state, host = processes(), platform.node()
    every = gather_object([(state.process_index, os.getpid(), host)])
    here = {rank: pid for rank, pid, other in every if other == host}
    heard, said = os.pipe()
    os.set_blocking(said, False)

    def speak() -> None:
        dead = [rank for rank, pid in here.items() if not psutil.pid_exists(pid)]
        if dead and state.process_index == min(here.keys() - dead):
            where = f"in {logs / f'process-{dead[0]}.txt'}" if dead[0] else "above"
            print(
                f"Process {dead[0]} of this run (pid {here[dead[0]]}) died, so the others are ended; what it said is "
                f"{where}. The same command goes on from the last complete checkpoint.",
                file=sys.stderr,
                flush=True,
            )

    def listen() -> None:
        while (number := os.read(heard, 1)) and number[0] != signal.SIGTERM:
            pass
        if number:
            speak()
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    before, wakeup = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(said)
    try:
        yield
    except RuntimeError:  # of a broken connection, perhaps
        time.sleep(2)  # until the dead process is known to be dead; torchrun may end this one first
        speak()
        raise
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.close(said)


def once(function: Callable[[], T]) -> T:
    """What `function` returns or raises in the first process, in all of them; the others do not call it."""
    if processes().num_processes == 1:
        return function()
    box: list[Any] = [None, None]
    if processes().is_main_process:
        try:
            box[0] = function()
        except Exception as error:
            box[1] = error
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def check_alike(**facts: Any) -> None:
    """Raise UserError if the processes do not agree on `facts`, by name."""
    every = gather_object([facts])
    for name in facts:
        if any(one[name] != facts[name] for one in every):
            raise UserError(
                f"The processes that share this run have different values for {name}. Each has to load the same "
                "model, add the same adapter (same seed) and read the same pairs in the same order."
            )


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """In the block no other run takes `folder`; raises UserError if one has it."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))

    def take() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"Another run is training in {folder} at this moment. Wait for it, or take another folder."
            ) from None

    once(take)
    try:
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


# ------------------------------------------------------------------------------------------------ a step


def share_step(values: dict[str, Any]) -> dict[str, Any]:
    """The settings `values` of a step for each process, so that all together take as many pairs as one would."""
    number, batch = processes().num_processes, pairs_a_step(values)
    if batch % number:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        below, above = batch // number * number, -(-batch // number) * number
        raise UserError(
            f"{batch} pairs a step cannot be shared equally by {number} processes. Either start "
            f"{' or '.join(map(str, divisors))} processes, or take {f'{below} or ' if below else ''}{above} pairs "
            "a step (per_device_train_batch_size times gradient_accumulation_steps, for all processes together)."
        )
    each = batch // number
    size = max(n for n in range(1, min(each, values["per_device_train_batch_size"]) + 1) if each % n == 0)
    return values | {"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size}


class _Shares(BatchSampler):
    """The batches of one process: an equal share of the pairs of each step, also of an epoch's last one.

    A process that gets none of the last pairs has the first of them, which then counts nothing (`weigh_pairs`).
    """

    def __init__(self, sampler: Sampler, args: TrainingArguments):
        self.sampler, self.batch_size, self.drop_last = sampler, args.train_batch_size, False
        self.place, self.number = args.process_index, args.world_size
        self.step = self.batch_size * args.gradient_accumulation_steps * self.number

    def pieces(self, pairs: int) -> int:
        return math.ceil(math.ceil(pairs / self.number) / self.batch_size)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.step)
        return whole * self.pieces(self.step) + self.pieces(rest)

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.sampler)
        while pairs := list(itertools.islice(order, self.step)):
            share, pieces = pairs[self.place :: self.number], self.pieces(len(pairs))
            for piece in range(pieces):
                yield share[piece::pieces] or pairs[:1]


class _SameFigures(TrainerCallback):
    """Puts the mean over all processes in place of what each one logs of its own pairs."""

    def __init__(self, held_out: int):
        self.held_out = held_out  # pairs that this process scores

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any
    ) -> None:
        """transformers' hook."""
        own = [self.held_out if "eval_loss" in logs else 1, *map(float, logs.values())]
        every = gather(torch.tensor([own], dtype=torch.float64, device=args.device))
        total = (every[:, 1:] * every[:, :1]).sum(dim=0)
        logs |= dict(zip(logs, (total / every[:, 0].sum()).tolist(), strict=True))
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
    done = {"step": -1, "batches": 0}

    @functools.wraps(compute)
    def compute_loss(model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        loss, step = compute(model, inputs, *more, **options), trainer.state.global_step
        if not model.training or step % (whole + 1) != whole:
            return loss
        done["batches"] = done["batches"] + 1 if done["step"] == step else 1
        done["step"] = step
        counts = done["batches"] <= len(range(place, rest, number))
        pairs = len(inputs["input_ids"]) // 2 if counts else 0
        return loss * (pairs * trainer.current_gradient_accumulation_steps * number / rest)

    trainer.compute_loss = compute_loss


def share_steps(trainer: trl.DPOTrainer) -> None:
    """Make `trainer` train on its share of each step, and average the gradients with the other processes.

    What it logs is the mean over the processes, taken when it is logged: TRL would wait for all of them a dozen times
    a step. To be called after `cast_weights_once`, whose gradients these are.
    """
    args, accelerator, test = trainer.args, trainer.accelerator, range(len(trainer.eval_dataset or ()))
    mine = test[args.process_index :: args.world_size]
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    trainer.callback_handler.callbacks.insert(0, _SameFigures(len(mine)))
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)  # without DDP

    def train_batches(loader: Any) -> Any:
        shard = loader.batch_sampler  # of accelerate, which would repeat pairs to fill the last batches
        shard.batch_sampler = _Shares(shard.batch_sampler.sampler, args)
        shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def test_batches(loader: Any) -> Any:
        shard, size = loader.batch_sampler, args.eval_batch_size
        rows = mine or test[:1]  # a process without pairs has one that counts nothing
        shard.batch_sampler = [rows[start : start + size] for start in range(0, len(rows), size)]
        shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def average_gradients(loss: torch.Tensor) -> torch.Tensor:
        if accelerator.sync_gradients:
            used = [weight for weight in weights if weight.grad is not None]
            mean = accelerator.reduce(torch.cat([weight.grad.flatten() for weight in used]), "mean")
            for weight, gradient in zip(used, mean.split([weight.numel() for weight in used]), strict=True):
                weight.grad = gradient.view_as(weight)
        return loss

    @contextlib.contextmanager
    def without_gathering() -> Iterator[None]:
        accelerator.gather = accelerator.gather_for_metrics = lambda own: own
        try:
            yield
        finally:
            del accelerator.gather, accelerator.gather_for_metrics

    def change(name: str, then: Callable[[Any], Any], around: Callable[[], Any] = contextlib.nullcontext) -> None:
        method = getattr(trainer, name)

        @functools.wraps(method)
        def changed(*given: Any, **options: Any) -> Any:
            with around():
                return then(method(*given, **options))

        setattr(trainer, name, changed)

    if args.world_size > 1:  # a launcher can start one process
        change("get_train_dataloader", train_batches)
        change("get_eval_dataloader", test_batches)
    change("training_step", average_gradients, without_gathering)
    change("evaluate", lambda metrics: metrics, without_gathering)
