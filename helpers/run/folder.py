"""The run folder: what a training run leaves. It holds no path, host or token: copy it to any machine."""

import contextlib
import hashlib
import itertools
import json
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from peft import PeftModel
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, TrainingArguments

from helpers.common import UserError, file_hash, write_atomic, write_json
from helpers.model.fingerprint import hash_tensors
from helpers.run import unreadable

POLICY_AT_START = "the policy at its start"  # `RunInfo.reference` of a run without a ref_model
USUAL_RULE = {"max_prompt_length": 256, "on_long_prompt": "shorten"}  # `check_pairs`; of runs that have none written
LORA_SCALE = ("r", "lora_alpha", "use_rslora")  # what scales an adapter; its weights do not tell
# What a run's folder holds; without run.json, that is last, it is something else.
FILES = ("adapter", "reference", "history.json", "metrics.json", "held_out.jsonl", "README.md", "run.json")


class Status(StrEnum):
    """How far a run has come."""

    RUNNING = "running"
    FINISHED = "finished"
    OUT_OF_MEMORY = "out of memory"
    NOT_FINITE = "stopped by a gradient that is not finite"


@dataclass
class DataInfo:
    """What a run knows of its pairs; `train` and `test` are hashes of their token ids."""

    train: str
    test: str
    findings: dict[str, int] = field(default_factory=dict)  # of the training pairs, code to count
    prompts: dict[str, int] = field(default_factory=dict)  # over the limit: "shortened", "left_out"
    bundled: bool = False  # they came with this project, so their licence is known (`load_report`)
    reading: list[str] = field(default_factory=list)  # how the training pairs were read (`load_report`)
    given: str = ""  # if the chat template writes the date: hash of pairs and template, in place of their tokens
    longest: int = 0  # tokens of the longest training pair, before any was cut; older runs have none


@dataclass
class RunInfo:
    """What run.json holds: model, data, settings and state of a run."""

    model: str  # the base model's name, as other machines know it
    profile: str  # of the machine that trained: "gpu" or "cpu"
    config: dict[str, Any]  # the trainer's settings (`describe_config`), as in one process
    train_pairs: int
    test_pairs: int
    data: DataInfo
    base: str  # hash of the base model's weights
    start: str  # hash of the adapter before training
    reference: str  # POLICY_AT_START, or `Policy.as_reference` of the ref_model; older runs lack its settings
    versions: dict[str, str]
    machine: str
    status: Status
    steps: int | None = None  # None until it is finished, as is `end`; of one NOT_FINITE the step that was not
    end: str | None = None  # hash of the trained adapter
    lora: dict[str, dict[str, Any]] = field(default_factory=dict)  # of "adapter", "reference": `_what_is_known`
    # GB "needed" by the estimate and "free" at the start; on a GPU also measured, of the fullest: "used", "peak".
    memory_gb: dict[str, float] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)  # for a prompt that brings no options (`shared_options`)
    prompts_rule: dict[str, Any] = field(default_factory=USUAL_RULE.copy)  # of `check_pairs`, for long prompts
    base_config: str = ""  # hash of the base's settings that change what it computes; older runs have none
    adapter: dict[str, Any] = field(default_factory=dict)  # ADAPTER_SETTINGS of what is trained; older runs have none
    early_stopping: int = -1  # after so many evaluations; 0: not; older runs do not say
    tokenizer: dict[str, str] = field(default_factory=dict)  # hashes of its files; older runs have none
    schema: int = 2  # version of this form; 1 had none written

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str = "run.json") -> "RunInfo":
        """The info that `to_json` gave as `values`, in any version; UserError names what `source` (the file) lacks."""
        wrong = []
        try:
            info = TypeAdapter(cls).validate_python({"schema": 1} | values)
        except ValidationError as error:
            wrong = [".".join(map(str, one["loc"])) for one in error.errors()]
        if values.get("status") == Status.FINISHED and not isinstance(values.get("end"), str):
            wrong.append("end")
        if isinstance(config := values.get("config"), dict):
            kinds = {"beta": (int, float), "max_length": int}
            wrong += [f"config.{name}" for name, kind in kinds.items() if not isinstance(config.get(name), kind)]
        if not wrong and info.schema > cls.schema:
            raise UserError(f"{source} was written by a newer version of these notebooks. Read it with that one.")
        if not wrong:
            return info
        text = f"{source} lacks {', '.join(wrong)}: it was written by another version of these notebooks, or edited. "
        raise UserError(text + "Train the run again, in another folder.")

    def __getitem__(self, name: str) -> Any:
        """A field by its name in run.json: `run.info["model"]`."""
        return getattr(self, name)

    to_json = asdict


@dataclass
class Run:
    """What a training run left in its folder: all that is needed to use or go on with it, on any machine.

    `folder` holds `adapter/` (LoRA weights and tokenizer), FILES and a model card; `reference/` too if the run started
    from an adapter that was trained before.
    """

    folder: Path
    info: RunInfo  # model, data, settings and state
    history: list[dict[str, Any]]  # a row for each logging and evaluation step, as TRL logs them (and mean_of_steps)
    metrics: dict[str, Any]  # held-out figures before and after, seconds
    held_out: pd.DataFrame | None  # a row for each held-out pair (`held_out_table`)
    adapter = property(lambda self: self.folder / "adapter")
    reference = property(lambda self: folder if (folder := self.folder / "reference").is_dir() else None)

    def load_adapter(self, name: Literal["adapter", "reference"] = "adapter") -> dict[str, torch.Tensor]:
        """The weights of the adapter `name`; UserError unless that is a safetensors file that run.json describes."""
        folder, expected = self.folder / name, self.info.end if name == "adapter" else self.info.start
        weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        known, place = self.info.lora.get(name, {}), f"{self.folder.name}/{name}"  # older runs have none
        try:
            found, settings = load_file(weights), json.loads(config.read_text(encoding="utf-8"))
            same = not known or known.items() <= _what_is_known(settings).items()
        except FileNotFoundError as error:
            missing, pickled = config if weights.is_file() else weights, weights.with_suffix(".bin").is_file()
            code = "pickled" if pickled and missing == weights else "incomplete"
            raise unreadable(code, name=place, missing=missing.name) from error
        except (AttributeError, KeyError, SafetensorError, OSError, ValueError) as error:
            raise unreadable("damaged", name=place, error=error) from error
        if hash_tensors(found) != expected or not same:
            raise unreadable("other_adapter", name=place)
        return found

    def check_tokenizer(self) -> None:
        """Raise UserError unless the tokenizer in the folder is the one that was written."""
        for name, known in self.info.tokenizer.items():
            path, place = self.adapter / name, f"{self.folder.name}/adapter"
            if not path.is_file():
                raise unreadable("incomplete", name=place, missing=name)
            if file_hash(path) != known:
                raise unreadable("other_tokenizer", name=place, file=name)

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Read a run's `folder`. Raises UserError if it is none, is unfinished, or can't be read."""
        folder = Path(folder).expanduser()
        info = read_info(folder)
        if info is None:
            raise UserError(f"{folder.name} is no run folder: it has no run.json. 03_train makes one.")
        if info.status != Status.FINISHED:
            cure = "Call" if info.status == Status.RUNNING else "See diagnose(folder), then call"
            raise UserError(f"The run in {folder.name} is {info.status}. {cure} train_dpo again to finish it.")
        table = folder / "held_out.jsonl"
        try:
            history, metrics = (json.loads((folder / f"{name}.json").read_bytes()) for name in ("history", "metrics"))
            return cls(folder, info, history, metrics, pd.read_json(table, lines=True) if table.is_file() else None)
        except (OSError, ValueError) as error:
            raise UserError(f"The run in {folder.name} cannot be read ({error}). Train it again.") from error


def read_info(folder: Path) -> RunInfo | None:
    """`Run.info` of the run in `folder`, or None; UserError if run.json is no JSON or lacks something."""
    try:
        values = {} | json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (TypeError, ValueError) as error:  # the first if it is a list, say
        text = f"{folder.name}/run.json is not valid JSON ({error}). Restore it, or use a new folder."
        raise UserError(text) from error
    return RunInfo.from_json(values, f"{folder.name}/run.json")


def write_info(folder: Path, info: RunInfo) -> None:
    """Write `info` as the folder's run.json."""
    write_json(folder / "run.json", info.to_json())


def versions() -> dict[str, str]:
    """Versions of what decides a result, by name: Python and the six libraries that train."""
    libraries = ("torch", "transformers", "trl", "peft", "datasets", "unsloth")
    return {"python": platform.python_version()} | {name: version(name) for name in libraries}


def machine() -> str:
    """The kind of machine in a few words, without its name."""
    cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu


def describe_config(config: TrainingArguments) -> dict:
    """The settings of a config (a DPOConfig, say) without paths, tokens and what differs by machine, as plain JSON."""
    private = "output_dir logging_dir run_name hub_token hub_model_id push_to_hub_token".split()
    private += ["dataset_num_proc", "gradient_checkpointing_kwargs"]  # which Unsloth sets on a GPU, by its cores
    values = {name: value for name, value in config.to_dict().items() if name not in private}
    return json.loads(json.dumps(values, default=str))


def set_aside(folder: Path) -> None:
    """Rename `folder` to NAME.old-1, or the next number that is free."""
    names = (folder.with_name(f"{folder.name}.old-{number}") for number in itertools.count(1))
    folder.rename(next(name for name in names if not name.exists()))


def _what_is_known(config: dict[str, Any]) -> dict[str, Any]:
    """Of an adapter's `config`, for run.json: what scales it, and a hash of what is set, but for where its base is."""
    chosen = {name: value for name, value in config.items() if name != "base_model_name_or_path" and value is not None}
    text = json.dumps(chosen, sort_keys=True)
    return {name: config[name] for name in LORA_SCALE} | {"all": hashlib.sha256(text.encode()).hexdigest()[:20]}


def save_adapter(folder: Path, model: PeftModel, info: RunInfo) -> None:
    """Write the `model`'s adapter as a `folder` that appears whole; `info` names its base, and gets what scales it."""
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    model.save_pretrained(part)
    config = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = info.model
    info.lora[folder.name] = _what_is_known(config)
    (part / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (part / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is next to the adapter
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def save_run(run: Run, model: PeftModel, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Write a finished `run`: `model` and `tokenizer` into `adapter/`, `card` as README.md; last run.json says so."""
    folder = run.folder
    save_adapter(run.adapter, model, run.info)
    others = set(run.adapter.iterdir())
    tokenizer.save_pretrained(run.adapter)
    written = {path for path in run.adapter.rglob("*") if path.is_file()} - others  # some have templates in a folder
    run.info.tokenizer = {path.relative_to(run.adapter).as_posix(): file_hash(path) for path in sorted(written)}
    write_json(folder / "history.json", run.history)
    write_json(folder / "metrics.json", run.metrics)
    table = pd.DataFrame(run.held_out)
    write_atomic(folder / "held_out.jsonl", lambda path: table.to_json(path, orient="records", lines=True))
    write_atomic(folder / "README.md", lambda path: Path(path).write_text(card, encoding="utf-8"))
    write_info(folder, run.info)
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    (folder / "checkpoints" / "README.md").unlink(missing_ok=True)  # TRL's card; ours is next to the adapter
    with contextlib.suppress(OSError):  # not empty: TensorBoard's files, say, which stay
        (folder / "checkpoints").rmdir()
