"""Interruption and going on: whole checkpoints, Ctrl-C, and what makes two calls the same run."""

import contextlib
import dataclasses
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.common import file_hash, write_json
from helpers.model.memory import BATCH_SETTINGS, pairs_a_step
from helpers.model.policy import same_reference
from helpers.run.card import changed_settings
from helpers.run.folder import RunInfo
from helpers.train import TABLE
from helpers.train.processes import processes

# The settings that change what a run ends with; all others may differ between two calls of the same run.
RESULT_SETTINGS = frozenset(f"{TABLE['heeded']} {TABLE['result']}".split())
ENDED = "ended"  # a file in the last checkpoint: nothing is trained after it


@dataclasses.dataclass(eq=False)
class Checkpoints(TrainerCallback):
    """Marks each checkpoint as complete, with its files' hashes; the one that ends the training has a file ENDED.

    Only then older ones are removed, all but `limit` of them (save_total_limit) and the best. transformers itself would
    do it before, and go by the folders' times, which a copy or a clock that is set changes.

    Ctrl-C or the stop button ends the step in progress, saves it and stops; a second one stops at once. If the run's
    folder was removed, `begin_again` writes what it held besides.
    """

    begin_again: Callable[[], None]
    limit: int | None = None
    asked: bool = False  # by Ctrl-C
    begun: int = 0  # the step of the checkpoint that this call goes on from

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """transformers' hook."""
        self.begun = state.global_step

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """transformers' hook; a row whose mean would begin before this call says of how many steps it is."""
        rows = [row["step"] for row in state.log_history[:-1] if "loss" in row]
        if "loss" in logs and self.begun > max(rows, default=0):
            state.log_history[-1]["mean_of_steps"] = state.global_step - self.begun

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """transformers' hook."""
        control.should_save |= self.asked

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """transformers' hook; a checkpoint that was saved because of Ctrl-C does not end the training."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        processes().wait_for_everyone()  # each writes a file of its own
        if state.is_world_process_zero:
            if control.should_training_stop:
                (folder / ENDED).touch()
            files = {file.name: file_hash(file) for file in folder.iterdir() if file.is_file()}
            files.pop("complete.json", None)  # of a checkpoint that is written twice, at its step and as its epoch ends
            write_json(folder / "complete.json", files)
            self.begin_again()
            kept = {folder.name, Path(state.best_model_checkpoint or folder).name}
            older = [one for one in saved_in(folder.parent) if one.name not in kept]
            room = max(self.limit - len(kept), 0) if self.limit and self.limit > 0 else len(older)
            for one in older[: -room or None]:
                shutil.rmtree(one, ignore_errors=True)
        control.should_training_stop |= self.asked

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """transformers' hook, also called where Ctrl-C leaves an epoch; what is due at its end is then not yet due.

        At the real end it is done, and whether the training has ended is asked anew, since early stopping may say so.
        """
        if self.asked and state.epoch % 1 and state.global_step < state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.asked:
            control.should_save, control.should_training_stop = True, state.global_step >= state.max_steps

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In the block Ctrl-C is heard here, by the main thread of a single process; several would stop apart."""
        if threading.current_thread() is not threading.main_thread() or processes().num_processes > 1:
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, previous)
            print("Stopping after this step; press again to stop at once.", flush=True)

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def step_in(checkpoint: Path) -> int:
    """The step after which the folder `checkpoint` was written."""
    return int(checkpoint.name.rpartition("-")[2])


def saved_in(checkpoints: Path) -> list[Path]:
    """The checkpoints in the folder `checkpoints`, by their steps; what has another name is not the run's."""
    folders = [folder for folder in checkpoints.glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted((folder for folder in folders if folder.is_dir()), key=step_in)


def _is_whole(folder: Path) -> bool:
    """Whether the files of a checkpoint are those that were written; of older versions only their sizes are known."""
    with contextlib.suppress(AttributeError, LookupError, OSError, ValueError):
        written = json.loads((folder / "complete.json").read_text(encoding="utf-8")).items()
        facts = {int: lambda file: file.stat().st_size, str: file_hash}
        return all(facts[type(fact)](folder / name) == fact for name, fact in written)
    return False


def _best_before(folder: Path) -> Path | None:
    """The checkpoint that was the best one when `folder` was written, unless it is that one itself."""
    best = None
    with contextlib.suppress(LookupError, OSError, ValueError):
        best = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
    return folder.with_name(Path(best).name) if best and Path(best).name != folder.name else None


def last_complete(checkpoints: Path) -> Path | None:
    """The newest folder in `checkpoints` that is as it was written, and so is its best one; others are removed."""
    for folder in reversed(saved_in(checkpoints)):
        if _is_whole(folder) and ((best := _best_before(folder)) is None or _is_whole(best)):
            return folder
        print(f"{folder.name} is incomplete or damaged (it may have been cut short); it is not used.")
        shutil.rmtree(folder, ignore_errors=True)
    return None


def result_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of `config` that decide the result, without TRL's defaults, so that a new one is no difference."""
    found = {name: value for name, value in changed_settings(config).items() if name in RESULT_SETTINGS}
    if metric := found.get("metric_for_best_model"):
        found["metric_for_best_model"] = f"eval_{metric.removeprefix('eval_')}"
    if set(found.get("loss_weights", ())) == {1}:
        del found["loss_weights"]  # as TRL takes none of them
    return found


def differences(before: RunInfo, info: RunInfo) -> list[str]:
    """In what the run `before` differs from the one of `info`, in words; versions and machine may differ."""
    there, now = result_settings(before.config), result_settings(info.config)
    names = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
    names += [name for name, value in before.adapter.items() if value != info.adapter[name]]
    old, new = before.config | before.adapter, info.config | info.adapter
    changed = [f"{name} {old.get(name)} there, {new.get(name)} now" for name in names]
    if before.early_stopping not in (-1, info.early_stopping):
        changed += [f"early_stopping {before.early_stopping or None} there, {info.early_stopping or None} now"]
    changed += [f"other {name}" for name in ("model", "base") if before[name] != info[name]]
    changed += ["other reference"] * (not same_reference(before.reference, info.reference))
    changed += ["other settings of the base"] * (before.base_config not in ("", info.base_config))
    changed += ["other data"] * ((before.data.train, before.data.test) != (info.data.train, info.data.test))
    # The adapter's hash is that of the run's start, or of its end if the cell is run twice.
    return changed + ["another adapter to start from"] * (info.start not in (before.start, before.end))


def step_of(before: RunInfo | None, info: RunInfo) -> dict[str, Any] | None:
    """How the run `before` makes a step, if it is the run of `info` but for that; else None."""
    if before is None or not before.config.keys() >= set(BATCH_SETTINGS):
        return None
    step = {name: before.config[name] for name in BATCH_SETTINGS}
    same = not differences(before, dataclasses.replace(info, config=info.config | step))
    return step if same and pairs_a_step(step) == pairs_a_step(info.config) else None
