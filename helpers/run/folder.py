"""The run folder: all that a training run leaves, and all that passes between the notebooks.

`Run.load` reads one without a model. What is written here holds no path, no host and no token, so that a folder can be
copied to another machine.
"""

import contextlib
import dataclasses
import json
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from helpers.common import UserError, write_atomic, write_json


@dataclasses.dataclass
class Run:
    """What a training run left in its folder: all that is needed to use or go on with it, on any machine.

    Attributes:
        folder: holds `adapter/` (LoRA weights and tokenizer), the files below, and a model card; `reference/` too
            where the run started from an adapter that was trained before.
        info: settings, model, versions, machine, data fingerprints, seeds, status.
        history: one dict for each logging and evaluation step, as TRL logs them.
        metrics: held-out figures before and after, seconds.
        held_out: one row for each held-out pair: origin, topic, flaw, log-probs under reference and policy.
    """

    folder: Path
    info: dict
    history: list[dict]
    metrics: dict
    held_out: pd.DataFrame | None

    @property
    def adapter(self) -> Path:
        """The folder of LoRA weights and tokenizer."""
        return self.folder / "adapter"

    @property
    def reference(self) -> Path | None:
        """The adapter that is the reference; None where the base model is, or a model that was passed."""
        folder = self.folder / "reference"
        return folder if folder.is_dir() else None

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Read a run's `folder`. Raises UserError where it is none, is unfinished, or can't be read."""
        folder = Path(folder)
        info = read_info(folder)
        if info is None:
            raise UserError(f"{folder.name} is no run folder: it has no run.json. 03_train makes one.")
        if info.get("status") != "finished":
            cure = "See diagnose(folder), then call" if info.get("status") == "out of memory" else "Call"
            raise UserError(f"The run in {folder.name} is {info.get('status')}. {cure} train_dpo again to finish it.")
        table = folder / "held_out.jsonl"
        try:
            history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            held_out = pd.read_json(table, lines=True) if table.is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"The run in {folder.name} cannot be read ({error}). Train it again.") from error
        return cls(folder, info, history, metrics, held_out)


def read_info(folder: Path) -> dict | None:
    """`Run.info` of the run in `folder`, finished or not; None where there is no run.json.

    Raises:
        UserError: run.json holds no JSON object.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(info, dict):
            raise ValueError("no object")
        return info
    except ValueError as error:
        raise UserError(
            f"{folder.name}/run.json is not valid JSON ({error}). Restore it, or use a new folder."
        ) from error


def versions() -> dict[str, str]:
    """Versions of what decides a result, by name: Python and the six libraries that train."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "transformers", "trl", "peft", "datasets", "unsloth")
    }


def machine() -> str:
    """The kind of machine in a few words, without its name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


# Paths, tokens, and what Unsloth sets on a GPU: workers by its cores and free memory, and reentrant checkpointing,
# which its kernels need and processes that share a step (DDP) can't take.
_PRIVATE_SETTINGS = ("output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "push_to_hub_token")
_PRIVATE_SETTINGS += ("dataset_num_proc", "gradient_checkpointing_kwargs")


def describe_config(config: TrainingArguments) -> dict:
    """The settings of a config (a DPOConfig, say) without paths, tokens and what differs by machine, as plain JSON."""
    values = {name: value for name, value in config.to_dict().items() if name not in _PRIVATE_SETTINGS}
    return json.loads(json.dumps(values, default=str))


# What scales an adapter; its weights do not tell.
LORA_SCALE = ("r", "lora_alpha", "use_rslora")


def set_aside(folder: Path) -> None:
    """Rename `folder` to NAME.old-1, or the next number that is free."""
    number = 1
    while folder.with_name(f"{folder.name}.old-{number}").exists():
        number += 1
    folder.rename(folder.with_name(f"{folder.name}.old-{number}"))


def save_adapter(folder: Path, model: PeftModel, info: dict) -> None:
    """Write the model's adapter as a folder that appears whole, and names its base as other machines know it.

    What scales the adapter goes into `info["lora"]`, since the weights alone do not tell.
    """
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    model.save_pretrained(part)
    config = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = info["model"]
    info.setdefault("lora", {})[folder.name] = {name: config[name] for name in LORA_SCALE}
    (part / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (part / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours lies beside the adapter
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def save_run(run: Run, model: PeftModel, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Write what a finished run leaves; `run.json` comes last, so that "finished" is true when it is read.

    Args:
        run: with its folder, and `info["status"]` set to "finished".
        model, tokenizer: go into `adapter/`.
        card: text of the folder's README.md.
    """
    folder = run.folder
    save_adapter(run.adapter, model, run.info)
    tokenizer.save_pretrained(run.adapter)
    write_json(folder / "history.json", run.history)
    write_json(folder / "metrics.json", run.metrics)
    write_atomic(folder / "held_out.jsonl", lambda path: run.held_out.to_json(path, orient="records", lines=True))
    write_atomic(folder / "README.md", lambda path: Path(path).write_text(card, encoding="utf-8"))
    write_json(folder / "run.json", run.info)
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    (folder / "checkpoints" / "README.md").unlink(missing_ok=True)  # TRL's card; ours lies beside the adapter
    with contextlib.suppress(OSError):  # not empty: TensorBoard's files, say, which stay
        (folder / "checkpoints").rmdir()
