"""Training: settings with their reasons, reference log-probs computed once, and a run folder that resumes.

`train_dpo` is what `03_train` shows step by step: it checks the pairs, takes the reference's log-probs once, trains
with TRL's DPOTrainer, and leaves a run folder. Called again after an interruption it goes on where it stopped.
"""

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from helpers.common import write_json
from helpers.model.memory import BATCH_SETTINGS, pairs_a_step


class Checkpoints(TrainerCallback):
    """Marks each checkpoint as complete, with its files' sizes; one without such a mark was cut short."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / "complete.json", {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()})


def last_complete(checkpoints: Path) -> Path | None:
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


class StopAtStep(TrainerCallback):
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


# What makes two calls the same run; versions and machine may differ when it is resumed.
_IDENTITY = ("model", "base", "reference", "config", "data")


def same_run(before: dict, info: dict) -> bool:
    # The adapter in hand is the one the run started from, or, where its cell is run once more, the one it ended with.
    same_start = info["start"] in (before.get("start"), before.get("end"))
    return same_start and all(before.get(name) == info[name] for name in _IDENTITY)


def difference_of(before: dict, info: dict) -> str:
    config = before["config"], info["config"]
    changed = [
        f"{name} {config[0].get(name)} there, {config[1].get(name)} now"
        for name in sorted(config[0].keys() | config[1].keys())
        if config[0].get(name) != config[1].get(name)
    ]
    changed += [f"other {name}" for name in ("model", "reference", "data") if before.get(name) != info[name]]
    return "; ".join(changed[:3]) or "another adapter to start from"


def step_of(before: dict | None, info: dict) -> dict | None:
    """How the run `before` makes a step, where it is the one of `info` but for that; else None.

    The same pairs a step, in other pieces or with checkpointing, give the same gradient up to rounding.
    """
    if before is None or not before["config"].keys() >= set(BATCH_SETTINGS):
        return None
    step = {name: before["config"][name] for name in BATCH_SETTINGS}
    like_before = info | {"config": info["config"] | step}
    same_pairs = pairs_a_step(step) == pairs_a_step(info["config"])
    return step if same_pairs and same_run(before, like_before) else None
